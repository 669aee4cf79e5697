"""Figures: `ax` in, `ax` out; titles state the finding; one colour-blind-safe colour a method, everywhere."""

from __future__ import annotations

import io

from IPython.display import display
from matplotlib.axes import Axes


def show(ax: Axes, alt: str) -> None:
    """Display the figure of `ax` as a PNG with its alt text, and close it."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    ax.figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight", metadata={"Software": None})
    plt.close(ax.figure)
    display({"image/png": buffer.getvalue(), "text/plain": alt}, raw=True, metadata={"image/png": {"alt": alt}})
