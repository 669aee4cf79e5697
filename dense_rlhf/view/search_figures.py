"""Figures of a search over weights: `ax` in, `ax` out; titles state the finding, as in `figures`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dense_rlhf.view.figures import colour

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from dense_rlhf.bayesopt.search import Search
    from dense_rlhf.bayesopt.space import Point
    from dense_rlhf.statistics import Interval

PHASES = {"anchor": ("s", "#000000"), "quasi-random": ("o", "#56B4E9"), "chosen": ("D", "#882255")}
CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(0.75)]])  # of the ternary plot


def trials(ax: Axes, search: Search, phases: Sequence[str], unit: str) -> Axes:
    """The observed value of each trial with its standard error, if known; the mark shows how it was chosen."""
    for phase in dict.fromkeys(phases):
        places = [i for i, other in enumerate(phases) if other == phase]
        mark, hue = PHASES[phase]
        x, y, errors = zip(*[(i + 1, search.values[i], search.errors[i] or 0.0) for i in places])
        ax.errorbar(x, y, yerr=errors, fmt=mark, ms=5, color=hue, label=f"{phase} ± SE")
    ax.set(xlabel="trial (1 training each, its own seed)", ylabel=f"value ({unit})")
    return _key(ax)


def _key(ax: Axes) -> Axes:
    """Put the legend to the right of the axes, where it hides no trial."""
    ax.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def trace(ax: Axes, path: pd.DataFrame) -> Axes:
    """The incumbent after each trial: its posterior mean and 95 % interval."""
    hue = colour("shap")
    ax.fill_between(path["n"], path["low"], path["high"], color=hue, alpha=0.2, step="mid", label="95 % (posterior)")
    ax.step(path["n"], path["mean"], where="mid", color=hue, label="incumbent")
    return _key(ax)


def band(ax: Axes, interval: Interval) -> Axes:
    """Band that holds 95 % of single trials at quasi-random points."""
    ax.axhspan(interval.low, interval.high, color="0.5", alpha=0.15, label="95 % of Sobol trials\n(predicted)")
    ax.axhline(interval.mean, color="0.5", ls=":")
    return _key(ax)


def posterior_line(ax: Axes, search: Search, names: Sequence[str], unit: str) -> Axes:
    """Two sources: the posterior over the weight of the first with its 95 % band, and the trials."""
    _slice(ax, search, [(w, 1 - w) for w in np.linspace(0, 1, 51)], 0, colour("bo-shap"))
    ax.plot([point[0] for point in search.points], search.values, "o", color="0.3", label="trials")
    ax.set(xlabel=f"weight of {names[0]} (the rest: {names[1]})", ylabel=f"value ({unit})")
    ax.legend(fontsize="small")
    return ax


def slices(axes: Sequence[Axes], search: Search, names: Sequence[str], unit: str) -> Sequence[Axes]:
    """Each source's weight from 0 to 1 through the incumbent, one panel a source; the others keep their ratios."""
    best, d = np.array(search.incumbent()[0]), search.space.d
    for i, (ax, name) in enumerate(zip(axes, names, strict=True)):
        others = best[:d] * (np.arange(d) != i)
        others = others / others.sum() if others.any() else (np.arange(d) != i) / max(d - 1, 1)
        _slice(ax, search, [w * np.eye(d)[i] + (1 - w) * others for w in np.linspace(0, 1, 33)], i, colour(name))
        ax.axvline(best[i], color="0.3", ls=":")
        ax.set(xlabel="weight (dotted: incumbent)", ylabel=f"value ({unit})")
        ax.label_outer()
    return axes


def _slice(ax: Axes, search: Search, weights: Sequence[Sequence[float]], varied: int, hue: str) -> None:
    """The posterior with its 95 % band along `weights` (N, d), against the one that varies."""
    mean, sd = search.posterior(_points(search, weights))
    x = [w[varied] for w in weights]
    ax.fill_between(x, mean - 1.96 * sd, mean + 1.96 * sd, color=hue, alpha=0.2, label="95 % (posterior)")
    ax.plot(x, mean, color=hue)


def _points(search: Search, weights: Sequence[Sequence[float]]) -> list[Point]:
    """Weights (N, d) as points, with the incumbent's values of all other searched parameters."""
    beyond = search.incumbent()[0][search.space.d :]
    return [search.space.settled((*map(float, row), *beyond)) for row in weights]


def ternary(axes: Sequence[Axes], search: Search, names: Sequence[str], unit: str, steps: int = 30) -> Sequence[Axes]:
    """Three sources: posterior mean and half its 95 % interval over the triangle of weights, trials, incumbent (star).

    Each corner is a single source. `axes` are two panels.
    """
    grid = np.array([(i, j, steps - i - j) for i in range(steps + 1) for j in range(steps + 1 - i)]) / steps
    mean, sd = search.posterior(_points(search, grid))
    tried = np.array(search.points)[:, :3] @ CORNERS
    best = np.array(search.incumbent()[0][:3]) @ CORNERS
    for ax, shown, label in zip(axes, (mean, 1.96 * sd), ("posterior mean", "half its 95 % interval"), strict=True):
        filled = ax.tricontourf(*(grid @ CORNERS).T, shown, levels=12, cmap="cividis")
        ax.figure.colorbar(filled, ax=ax, label=f"{label} ({unit})")
        ax.plot(*tried.T, "o", ms=4, color="white", mec="black")
        ax.plot(*best, "*", ms=15, color="#D55E00", mec="black")
        for (x, y), name in zip(CORNERS, names, strict=True):
            ax.text(x, y + (0.04 if y else -0.04), name, ha="center", va="bottom" if y else "top")
        ax.set(xlim=(-0.1, 1.1), ylim=(-0.15, 1.0), aspect="equal")
        ax.axis("off")
    return axes


def calibration(ax: Axes, left_out: pd.DataFrame, unit: str) -> Axes:
    """Each observation against its leave-one-out prediction with 95 % interval; red if the interval misses it."""
    for inside, hue in ((True, colour("bo-shap")), (False, colour("shap-signed"))):
        shown = left_out[(left_out["z"].abs() <= 1.96) == inside]
        label = "interval holds it" if inside else "interval misses it"
        ax.errorbar(shown["observed"], shown["mean"], yerr=1.96 * shown["sd"], fmt="o", ms=4, color=hue, label=label)
    ends = left_out["observed"].min(), left_out["observed"].max()
    ax.plot(ends, ends, color="0.5", ls=":")
    ax.set(xlabel=f"observed value ({unit})", ylabel="predicted from the others, 95 %")
    return _key(ax)


def until_goal(ax: Axes, needed: Mapping[str, Mapping[int, Interval]], most: int, ylabel: str) -> Axes:
    """Trials until a goal against the number of sources: a line a method, its 95 % intervals side by side.

    Hollow marks above the dotted line are goals that were not reached in `most` trials.
    """
    top = 1.06 * most
    for place, (name, by_size) in enumerate(needed.items()):
        x = np.array(list(by_size)) + 0.08 * (place - (len(needed) - 1) / 2)
        mean, low, high = np.minimum([(i.mean, i.low, i.high) for i in by_size.values()], top).T
        ax.vlines(x, low, high, color=colour(name), lw=2, alpha=0.5)
        ax.plot(x, mean, color=colour(name), lw=1, label=name)
        for reached, fill in ((mean < top, colour(name)), (mean >= top, "white")):
            ax.plot(x[reached], mean[reached], "o", ms=5, color=colour(name), mfc=fill)
    ax.axhline(most, color="0.5", ls=":")
    sizes = sorted({d for by_size in needed.values() for d in by_size})
    ax.set(xlabel="sources d", ylabel=ylabel, ylim=(0, 1.1 * most), xticks=sizes)
    return _key(ax)


def shares(ax: Axes, table: pd.DataFrame, hues: Mapping[str, str], xlabel: str) -> Axes:
    """Stacked shares, a bar for each row of `table`, named by its index; each column has its colour in `hues`."""
    start = np.zeros(len(table))
    for kind, hue in hues.items():
        ax.barh([str(name) for name in table.index], table[kind], left=start, color=hue, label=kind)
        start += table[kind].to_numpy()
    ax.set(xlabel=xlabel, xlim=(0, 1), ylim=(len(table) - 0.5, -0.5))
    return ax
