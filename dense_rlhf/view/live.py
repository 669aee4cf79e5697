"""What a training shows while it runs: a live curve in a notebook, log lines elsewhere, TensorBoard where asked."""

from __future__ import annotations

import base64
import io
import math
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from IPython.display import display

from dense_rlhf.types import InputError
from dense_rlhf.view.display import esc, is_live
from dense_rlhf.view.figures import colour

SHOWN = {  # column of the history: on a line, on the panel, form of the number
    "proxy": ("proxy", "proxy (sd)", "+z.2f"),
    "gold": ("gold", "gold (log-odds)", "+z.2f"),
    "kl": ("KL", "KL (nats)", "z.2f"),
    "value_loss": ("value loss", "value loss", ".3f"),
    "explained_variance": ("EV", "explained variance", "z.2f"),
}
LOG_SECONDS = 10.0
DRAW_SECONDS = 1.0
DRAW_SHARE = 0.05  # of the time, at most, goes into drawing
SMOOTH = 5  # updates, as in `plots.curves`
BLUE, ORANGE, PURPLE, RED = (colour(name) for name in ("bo-shap", "shap", "attention", "shap-signed"))


def watcher(updates: int, label: str, tensorboard: str | Path | None = None) -> Watcher:
    """Show `updates` of a training as suits the place; use it in a `with` block, and as `watch` of `train_policy`.

    `tensorboard` is a folder for event files. Raises `InputError` where it cannot be one or the package is missing.
    """
    track = Track(updates, label)
    boards = [Board(track, Path(tensorboard))] if tensorboard else []
    return Watcher(track, [Live(track) if is_live() else Log(track), *boards])


class Watcher:
    """Hands each row to its views. A view that fails is told of and left out: training goes on."""

    def __init__(self, track: Track, views: list) -> None:
        self.track, self.views = track, views

    def __call__(self, row: Mapping[str, float]) -> None:
        self.track.add(row)
        self._each("show")

    def __enter__(self) -> Watcher:
        self.track.start = self.track.clock()
        return self

    def __exit__(self, *_: object) -> None:
        self._each("close")
        self.views = []

    def _each(self, act: str) -> None:
        for view in list(self.views):
            try:
                getattr(view, act)()
            except Exception as problem:  # a full disk or a closed stream must not cost hours of training
                self.views.remove(view)
                say(f"{self.track.label}: {type(view).__name__} no longer watches, {problem!r}")


def say(line: str) -> None:
    """A line to standard error, where there still is one."""
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------- what is known


def number(value: object) -> float:
    """The value as a float, NaN where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def duration(seconds: float) -> str:
    """`40 s`, `3 min` or `2 h 10 min`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class Track:
    """How far a training has come: the shown series, the time, and the warnings."""

    def __init__(self, updates: int, label: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.updates, self.label, self.clock = updates, " ".join(str(label).split()), clock
        self.start, self.row, self.series = clock(), {}, {name: [] for name in ("update", *SHOWN)}
        self.active, self.urgent, self.first, self._told = [], [], {}, {}

    def add(self, row: Mapping[str, float]) -> None:
        """Take in one update. `urgent` are its warnings, each at most once in `LOG_SECONDS`."""
        self.row = row
        for name, values in self.series.items():
            value = number(row.get(name, len(values) if name == "update" else None))
            values.append(value if math.isfinite(value) else math.nan)
        names, now = row.get("warnings"), self.clock()
        names = [" ".join(name.split()) for name in names.split(",")] if isinstance(names, str) else []
        self.active = [name for name in names if name]
        self.urgent = [name for name in self.active if now - self._told.get(name, -math.inf) >= LOG_SECONDS]
        self._told |= dict.fromkeys(self.urgent, now)
        for name in self.urgent:
            self.first.setdefault(name, self.done - 1)

    @property
    def done(self) -> int:
        """Updates so far, those before a checkpoint included."""
        seen = self.series["update"]
        return 0 if not seen else int(seen[-1]) + 1 if seen[-1] == seen[-1] else len(seen)

    def due(self, last: float, pause: float) -> bool:
        """Whether the newest update has to be shown: the last, a warning, or `pause` after `last` (-inf: the first)."""
        return self.done == self.updates or bool(self.urgent) or self.clock() - last >= pause

    def left(self) -> str:
        """`3 min left` while it runs, `took 5 min` at the end."""
        seen, spent = len(self.series["update"]), self.clock() - self.start
        if self.done >= self.updates or not seen:
            return f"took {duration(spent)}" if seen else "waiting for the first update"
        return f"{duration(spent / seen * (self.updates - self.done))} left"

    def values(self) -> dict[str, str]:
        """The newest numbers in words, a dash for what is missing."""
        newest = {name: number(self.row.get(name)) for name in SHOWN}
        return {name: "–" if value != value else format(value, SHOWN[name][2]) for name, value in newest.items()}

    def line(self) -> str:
        """All of it on one line."""
        numbers = [f"{SHOWN[name][0]} {value}" for name, value in self.values().items()]
        warned = [f"WARNING {', '.join(self.active)}"] if self.active else []
        return "  ".join([self.label, f"{self.done}/{self.updates}", *numbers, self.left(), *warned])


# ---------------------------------------------------------------------------------------------------- views


class Log:
    """Lines on standard error: one at most every `LOG_SECONDS`, and the first, the last and every new warning."""

    def __init__(self, track: Track) -> None:
        self.track, self.last, self.shown = track, -math.inf, 0

    def show(self) -> None:
        if self.track.due(self.last, LOG_SECONDS):
            self.last, self.shown = self.track.clock(), self.track.done
            say(self.track.line())

    def close(self) -> None:
        if self.shown != self.track.done:
            say(self.track.line())


class Live:
    """One output of a notebook cell, updated in place: bar, numbers and curves; a plain figure when closed."""

    def __init__(self, track: Track) -> None:
        self.track, self.last, self.pause = track, -math.inf, DRAW_SECONDS
        self.handle = display(self._bundle(), raw=True, display_id=True)  # and everything slow is imported

    def show(self) -> None:
        start = time.perf_counter()
        if self.track.due(self.last, self.pause):
            self.handle.update(self._bundle(), raw=True)
            self.last = self.track.clock()
            self.pause = max(DRAW_SECONDS, (time.perf_counter() - start) / DRAW_SHARE)

    def close(self) -> None:
        if not self.track.row:
            return self.handle.update({"text/plain": f"{self.track.label}: no update was made"}, raw=True)
        data, alt = picture(self.track, headline(self.track)), describe(self.track)
        self.handle.update({"image/png": data, "text/plain": alt}, raw=True, metadata={"image/png": {"alt": alt}})

    def _bundle(self) -> dict[str, str]:
        return {"text/html": panel(self.track), "text/plain": self.track.line()}


class Board:
    """TensorBoard scalars under `folder`; what is not finite is left out and counted."""

    def __init__(self, track: Track, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter

            folder.mkdir(parents=True, exist_ok=True)
        except ImportError:
            raise InputError("tensorboard is not installed; try: pip install 'dense-rlhf[tensorboard]'") from None
        except OSError as problem:
            raise InputError(f"TensorBoard cannot write into {folder}: {problem.strerror}") from None
        self.track, self.folder, self.skipped, self.writer = track, folder, 0, None
        self.open = partial(SummaryWriter, str(folder), flush_secs=10)

    def show(self) -> None:
        step = self.track.done - 1
        # what an earlier attempt wrote from this step on is hidden
        self.writer = self.writer or self.open(purge_step=step)
        for name, value in self.track.row.items():
            if name == "update" or isinstance(value, str):
                continue
            if math.isfinite(number(value)):
                self.writer.add_scalar(name, number(value), step)
            else:
                self.skipped += 1

    def close(self) -> None:
        if self.writer:
            self.writer.close()
        if self.skipped:
            say(f"{self.track.label}: {self.skipped} values that are not finite were left out of {self.folder}")


# ---------------------------------------------------------------------------------------------------- looks


ROW = "display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 1em"


def panel(track: Track) -> str:
    """Bar, numbers, warnings and figure as HTML without scripts, in the colours of the page around it."""
    numbers = "".join(
        f"<span><span style='opacity:.7;font-size:85%'>{SHOWN[name][1]}</span><br>"
        f"<strong style='font-variant-numeric:tabular-nums'>{value}</strong></span>"
        for name, value in track.values().items()
    )
    return (
        f"<div class='mathjax_ignore' style='max-width:660px'><div style='{ROW}'><strong>{esc(track.label)}</strong>"
        f"<span>{track.done}/{track.updates} updates, {track.left()}</span></div>"
        f"<progress style='width:100%;accent-color:{BLUE}' aria-label='PPO updates' max='{max(1, track.updates)}' "
        f"value='{track.done}'></progress><div style='{ROW};margin:.4em 0'>{numbers}</div>"
        f"{_warned(track) if track.first else ''}{_image(track)}</div>"
    )


def _warned(track: Track) -> str:
    style = f"border-left:4px solid {RED};padding-left:.6em;margin:.4em 0"
    return f"<div role='status' style='{style}'>{esc(warnings(track))}</div>"


def _image(track: Track) -> str:
    source = f"data:image/png;base64,{base64.b64encode(picture(track)).decode()}"
    return f"<img style='max-width:100%;border-radius:4px' alt='{esc(describe(track))}' src='{source}'>"


def warnings(track: Track) -> str:
    """Each warning with the update that it began at, and whether it still holds."""
    return ", ".join(
        f"{name} {'since' if name in track.active else 'at'} update {update}" for name, update in track.first.items()
    )


def _ends(track: Track, name: str) -> tuple[str, str]:
    """Means of the first and the last few updates, in words."""
    known = [value for value in track.series[name] if value == value]
    parts = (known[:SMOOTH], known[-SMOOTH:])
    return tuple(format(sum(part) / len(part), SHOWN[name][2]) if part else "–" for part in parts)


def headline(track: Track) -> str:
    """What the finished figure shows: a line, and one with the warnings."""
    (first, last), stopped = _ends(track, "gold"), track.done < track.updates
    end = f"{'stopped after' if stopped else 'after'} {track.done}{f' of {track.updates}' * stopped} updates"
    text = f"{track.label}: gold goes from {first} to {last} at KL {_ends(track, 'kl')[1]}, {end}"
    lines = [text, f"Warnings: {warnings(track)}"] if track.first else [text]
    return "\n".join(textwrap.fill(line, 84) for line in lines)


def describe(track: Track) -> str:
    """The figure in words."""
    parts = (
        f"{SHOWN[name][0]} from {first} to {last}"
        for name in ("proxy", "gold", "kl")
        for first, last in [_ends(track, name)]
    )
    warned = f" Warnings: {warnings(track)}." if track.first else ""
    return f"{track.label}, curves over {track.done} of {track.updates} PPO updates: {', '.join(parts)}.{warned}"


def picture(track: Track, title: str = "") -> bytes:
    """Proxy and gold above, KL below, as a PNG: each update thin, the running mean thick. Leaves no global state."""
    import pandas as pd
    import seaborn as sns
    from matplotlib.figure import Figure

    frame = pd.DataFrame(track.series)
    style = {"grid.color": "0.9", "axes.edgecolor": "0.7"}
    with sns.axes_style("whitegrid", style), sns.plotting_context("notebook", font_scale=0.85):
        figure, buffer = Figure(figsize=(6.5, 4.3), layout="constrained"), io.BytesIO()
        top, bottom = figure.subplots(2, sharex=True, height_ratios=(3, 2))
        _curve(top, frame, "proxy", BLUE, "--", SHOWN["proxy"][1])
        _curve(top, frame, "gold", ORANGE, "-", SHOWN["gold"][1])
        _curve(bottom, frame, "kl", PURPLE, "-", "")
        for update in set(track.first.values()):
            lines = [ax.axvline(update, color=RED, ls=":") for ax in (top, bottom)]
            lines[0].set_label("warning begins")
        for ax, names in ((top, ["proxy", "gold"]), (bottom, ["kl"])):
            if frame[names].isna().all(axis=None):
                ax.set_yticks([])
        _dress(top, bottom, max(track.updates, track.done))
        figure.suptitle(title, x=0.01, ha="left", fontsize="medium", parse_math=False)
        figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return buffer.getvalue()


def _curve(ax, frame, name: str, hue: str, style: str, label: str) -> None:
    ax.plot(frame["update"], frame[name], color=hue, lw=0.8, alpha=0.45)
    mean = frame[name].rolling(SMOOTH, min_periods=1).mean()
    ax.plot(frame["update"], mean, style, color=hue, lw=2, label=label, marker="o" if len(frame) == 1 else None)


def _dress(top, bottom, updates: int) -> None:
    top.set(ylabel="score of the rollouts")
    bottom.set(
        ylabel="KL from reference\n(nats a response)",
        xlabel=f"PPO update (thick: running mean of {SMOOTH})",
        xlim=(-0.02 * updates - 0.5, 1.02 * updates - 0.5),
    )
    bottom.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = top.get_legend_handles_labels()
    once = dict(zip(labels, handles))
    top.legend(once.values(), once, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderaxespad=0)
