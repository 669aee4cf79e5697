"""Figures: `ax` in, `ax` out; titles state the finding; each method has one colour-blind-safe colour throughout."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from IPython.display import display

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from dense_rlhf.statistics import Interval

# Wong (2011) and Tol's muted set: distinct under all common forms of colour blindness
COLOURS = dict(
    pair.split(":")
    for pair in (
        "reference:#777777, sparse:#000000, terminal:#000000, uniform:#56B4E9, random:#999933, attention:#CC79A7, "
        "shap:#E69F00, shap-signed:#D55E00, lime:#009E73, lime-signed:#117733, bo:#882255, bo-shap:#0072B2, "
        "owen:#B8860B, gaussian:#1B9E77, kernel:#F0E442, leverage:#CC6677, shared_lime:#44AA99, "
        "leave_one_out:#332288, prefix:#6699CC, "
        "integrated_gradients:#AA4499, gradient_input:#661100, lexicon:#BBBBBB, log_ratio:#004488, shuffled:#DDCC77, "
        "ppo:#222255, rloo:#66CCEE, rloo_to_go:#4477AA, grpo:#EE6677, grpo_to_go:#AA3377, dpo:#228833, "
        "best_of_n:#CCBB44, rationale:#38A6A5, shap + lexicon:#5F4690, shap + rationale:#0F8554, static:#1D6996, "
        "contextual:#CC503E, gp:#882255, gp on sobol:#EE6677, saas:#009E73, additive:#E69F00, sobol:#0072B2, "
        "nei:#CC79A7"
    ).split(", ")
)
SPARE = ("#88CCEE", "#225522", "#663333", "#EE3377", "#0077BB")


def colour(method: str) -> str:
    """The method's colour; an unknown name gets a fixed one that depends on its letters."""
    return COLOURS.get(method) or SPARE[sum(method.encode()) % len(SPARE)]


def axes(width: float = 6.5, height: float = 3.6) -> Axes:
    """An empty pair of axes in the project's style."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="whitegrid", context="notebook", font_scale=0.85)
    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def panels(names: Sequence[str], width: float = 9.5, height: float = 3.8, share: bool = True) -> list[Axes]:
    """Empty axes side by side, one per name, with a common y scale if `share`."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="whitegrid", context="notebook", font_scale=0.85)
    row = plt.subplots(1, len(names), figsize=(width, height), layout="constrained", sharey=share)[1]
    for ax, name in zip(row, names):
        ax.set_title(name, loc="right", fontsize="small")
    return list(row)


def radar(spokes: Sequence[str], intervals: Mapping[str, Sequence[Interval]], top: float, height: float = 4.6) -> Axes:
    """A closed line for each method with its 95 % band, if known; one interval per spoke, from 0 to `top`."""
    import matplotlib.pyplot as plt

    ax = plt.subplots(figsize=(6.5, height), layout="constrained", subplot_kw={"projection": "polar"})[1]
    angles = [2 * math.pi * i / len(spokes) for i in range(len(spokes))]
    for name, row in intervals.items():
        closed = [i if i.known else replace(i, low=i.mean, high=i.mean) for i in (*row, row[0])]
        mean, low, high = ([getattr(i, part) for i in closed] for part in ("mean", "low", "high"))
        ax.plot([*angles, 0.0], mean, "o-", ms=4, color=colour(name), label=name)
        ax.fill_between([*angles, 0.0], low, high, color=colour(name), alpha=0.15)
    ax.set_xticks(angles, list(spokes), fontsize="small")
    ax.tick_params(axis="x", pad=9)
    ax.set(ylim=(0, top), theta_zero_location="N", theta_direction=-1)
    ax.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.1, 1))
    return ax


def show(ax: Axes, alt: str) -> None:
    """Display the figure of `ax` as a PNG with its alt text, and close it; the title of `ax` becomes the figure's."""
    import matplotlib.pyplot as plt

    title = ax.get_title()
    ax.set_title("")
    if len(ax.figure.axes) > 1:
        ax.figure.suptitle(textwrap.fill(title, 115), x=0.01, ha="left", fontsize="medium")
    else:
        ax.set_title(textwrap.fill(title, 80), loc="left", fontsize="medium")
    buffer = io.BytesIO()
    ax.figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight", metadata={"Software": None})
    plt.close(ax.figure)
    display({"image/png": buffer.getvalue(), "text/plain": alt}, raw=True, metadata={"image/png": {"alt": alt}})


def listed(values: Mapping[str, object]) -> str:
    """`name: value; name: value`, for the alt text of a figure."""
    return "; ".join(f"{name}: {value}" for name, value in values.items())


def curves(ax: Axes, history: pd.DataFrame, y: str, ylabel: str, smooth: int = 5) -> Axes:
    """`y` by PPO update: a line per arm (mean over seeds, running mean of `smooth`) and a band over all seeds."""
    import seaborn as sns

    rolled = history.sort_values("update").copy()
    rolled[y] = rolled.groupby(["arm", "seed"])[y].transform(lambda v: v.rolling(smooth, min_periods=1).mean())
    seeds, arms = rolled["seed"].nunique(), list(dict.fromkeys(history["arm"]))
    hues = {arm: colour(arm) for arm in arms}
    sns.lineplot(rolled, x="update", y=y, hue="arm", hue_order=arms, palette=hues, ax=ax, errorbar=("pi", 100))
    ax.set(xlabel=f"PPO update (band: range of {seeds} seed{'s' * (seeds > 1)})", ylabel=ylabel)
    return ax


def point_ranges(ax: Axes, intervals: Mapping[str, Interval], xlabel: str, tint: str | None = None) -> Axes:
    """A row per method: a point with its 95 % interval, hollow if that is unknown; `tint` colours all."""
    for row, (name, interval) in enumerate(intervals.items()):
        hue = tint or colour(name)
        if interval.known:
            ax.plot([interval.low, interval.high], [row, row], color=hue, lw=3, solid_capstyle="round")
        ax.plot(interval.mean, row, "o", color=hue, ms=8, mfc=hue if interval.known else "none")
    ax.set_yticks(range(len(intervals)), list(intervals))
    ax.set(xlabel=xlabel, ylim=(len(intervals) - 0.5, -0.5))
    return ax


def bands(ax: Axes, x: Sequence[float], intervals: Mapping[str, Sequence[Interval]], xlabel: str, ylabel: str) -> Axes:
    """A line with its 95 % band, where known, for each method: an interval for every `x`, drawn evenly spaced."""
    places = range(len(x))
    for name, row in intervals.items():
        ax.plot(places, [i.mean for i in row], "o-", ms=4, color=colour(name), label=name)
        known = [n for n in places if row[n].known]
        low, high = [row[n].low for n in known], [row[n].high for n in known]
        ax.fill_between(known, low, high, color=colour(name), alpha=0.15)
    ax.axhline(0, color="0.5", ls=":")
    ax.set_xticks(places, [f"{value:g}" for value in x])
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.label_outer()
    return ax


def over_tokens(ax: Axes, tokens: Sequence[str], series: Mapping[str, Sequence[float]], ylabel: str) -> Axes:
    """A line per method over the tokens of one response, which label the x axis."""
    places = range(len(tokens))
    for name, values in series.items():
        ax.plot(places, values, "o-", ms=4, color=colour(name), label=name)
    ax.axhline(0, color="0.5", ls=":")
    shown = [token.strip() or "␣" for token in tokens]
    ax.set_xticks(places, shown, rotation=60, ha="right", fontsize="x-small", parse_math=False)
    ax.set(ylabel=ylabel)
    ax.legend(fontsize="small")
    return ax


def frontier(ax: Axes, history: pd.DataFrame, x: str = "kl", y: str = "gold", smooth: int = 5) -> Axes:
    """Gold score against KL during training: a thin line per seed, with a dot at its end."""
    for (arm, _), run in history.groupby(["arm", "seed"], sort=False):
        path = run.sort_values("update")[[x, y]].rolling(smooth, min_periods=1).mean()
        ax.plot(path[x], path[y], color=colour(arm), lw=1.2, alpha=0.8)
        ax.plot(path[x].iloc[-1], path[y].iloc[-1], "o", color=colour(arm), label=arm)
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(*zip(*{label: (handle, label) for handle, label in zip(handles, labels)}.values()))
    ax.set(xlabel="KL from the reference (nats a response)", ylabel="gold score (log-odds)")
    return ax
