"""Progress of a running training: live curves in a notebook, log lines elsewhere, TensorBoard on request."""

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
from dense_rlhf.view.display import is_live
from dense_rlhf.view.figures import colour
from dense_rlhf.view.html import part

SHOWN = {  # column of the history: name in a line, name on the panel, format
    "proxy": ("proxy", "proxy (sd)", "+z.2f"),
    "gold": ("gold", "gold (log-odds)", "+z.2f"),
    "kl": ("KL", "KL (nats)", "z.2f"),
    "value_loss": ("value loss", "value loss", ".3f"),
    "explained_variance": ("EV", "explained variance", "z.2f"),
}
LOG_SECONDS = 10.0
DRAW_SECONDS = 1.0
DRAW_SHARE = 0.05  # of the time, at most, is spent drawing
SMOOTH = 5  # updates, as in `figures.curves`
BLUE, ORANGE, PURPLE, RED = (colour(name) for name in ("bo-shap", "shap", "attention", "shap-signed"))


def watcher(updates: int, label: str, tensorboard: str | Path | None = None) -> Watcher:
    """Show a training of `updates` updates; use it in a `with` block, and as `watch` of `train_policy`.

    `tensorboard` is a folder for event files. Raises `InputError` if it cannot be written or the package is missing.
    """
    track = Track(updates, label)
    boards = [Board(track, Path(tensorboard))] if tensorboard else []
    return Watcher(track, [Live(track) if is_live() else Log(track), *boards])


class Watcher:
    """Passes each row to its views. A view that fails is reported and dropped, and training continues."""

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
            except Exception as problem:  # a full disk or a closed stream must not end the training
                self.views.remove(view)
                say(f"{self.track.label}: {type(view).__name__} no longer watches, {problem!r}")


def say(line: str) -> None:
    """Print a line to standard error, unless that is closed."""
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------- the state


def number(value: object) -> float:
    """The value as a float; NaN if it is not a number."""
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
    """The state of a training: the series shown, the time, and the warnings."""

    def __init__(self, updates: int, label: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.updates, self.label, self.clock = updates, " ".join(str(label).split()), clock
        self.start, self.row, self.series = clock(), {}, {name: [] for name in ("update", *SHOWN)}
        self.active, self.urgent, self.first, self._shown_at = [], [], {}, {}

    def add(self, row: Mapping[str, float]) -> None:
        """Record one update. `urgent` are its warnings, each at most once in `LOG_SECONDS`."""
        self.row = row
        for name, values in self.series.items():
            value = number(row.get(name, len(values) if name == "update" else None))
            values.append(value if math.isfinite(value) else math.nan)
        names, now = row.get("warnings"), self.clock()
        names = [" ".join(name.split()) for name in names.split(",")] if isinstance(names, str) else []
        self.active = [name for name in names if name]
        self.urgent = [name for name in self.active if now - self._shown_at.get(name, -math.inf) >= LOG_SECONDS]
        self._shown_at |= dict.fromkeys(self.urgent, now)
        for name in self.urgent:
            self.first.setdefault(name, self.done - 1)

    @property
    def done(self) -> int:
        """Updates so far, including those before a checkpoint."""
        updates = self.series["update"]
        return 0 if not updates else int(updates[-1]) + 1 if updates[-1] == updates[-1] else len(updates)

    def due(self, last: float, pause: float) -> bool:
        """Whether to show the newest update: the final one, a warning, or `pause` seconds after `last`."""
        return self.done == self.updates or bool(self.urgent) or self.clock() - last >= pause

    def remaining(self) -> str:
        """`3 min left` during training, `took 5 min` at the end."""
        seen, spent = len(self.series["update"]), self.clock() - self.start
        if self.done >= self.updates or not seen:
            return f"took {duration(spent)}" if seen else "waiting for the first update"
        return f"{duration(spent / seen * (self.updates - self.done))} left"

    def values(self) -> dict[str, str]:
        """The newest numbers as text; a dash if missing."""
        newest = {name: number(self.row.get(name)) for name in SHOWN}
        return {name: "–" if value != value else format(value, SHOWN[name][2]) for name, value in newest.items()}

    def line(self) -> str:
        """Label, updates, numbers, time and warnings on one line."""
        numbers = [f"{SHOWN[name][0]} {value}" for name, value in self.values().items()]
        warned = [f"WARNING {', '.join(self.active)}"] if self.active else []
        return "  ".join([self.label, f"{self.done}/{self.updates}", *numbers, self.remaining(), *warned])


# ---------------------------------------------------------------------------------------------------- views


class Log:
    """Lines on standard error: the first, the last, every new warning, and otherwise one per `LOG_SECONDS`."""

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
    """One output of a notebook cell, updated in place: bar, numbers and curves; a static figure when closed."""

    def __init__(self, track: Track) -> None:
        self.track, self.last, self.pause = track, -math.inf, DRAW_SECONDS
        self.handle = display(self._bundle(), raw=True, display_id=True)  # imports the slow packages now

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
    """TensorBoard scalars under `folder`; values that are not finite are skipped and counted."""

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
        # hides what an earlier attempt wrote from this step on
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
            say(f"{self.track.label}: {self.skipped} values that are not finite were not written to {self.folder}")


# ---------------------------------------------------------------------------------------------------- drawing


def panel(track: Track) -> str:
    """Bar, numbers, warnings and figure as HTML without scripts, in the colours of the page around it."""
    numbers = {SHOWN[name][1]: value for name, value in track.values().items()}
    figure = base64.b64encode(picture(track)).decode(), describe(track)
    return str(part("panel", track, numbers, warnings(track), figure, (BLUE, RED)))


def warnings(track: Track) -> str:
    """Each warning with its first update; `since` if it still holds, else `at`."""
    began = {name: "since" if name in track.active else "at" for name in track.first}
    return ", ".join(f"{name} {began[name]} update {update}" for name, update in track.first.items())


def _ends(track: Track, name: str) -> tuple[str, str]:
    """Means of the first and the last `SMOOTH` known values, as text."""
    known = [value for value in track.series[name] if value == value]
    sides = (known[:SMOOTH], known[-SMOOTH:])
    return tuple(format(sum(side) / len(side), SHOWN[name][2]) if side else "–" for side in sides)


def headline(track: Track) -> str:
    """The finished figure's title: the result, and a line for any warnings."""
    (first, last), stopped = _ends(track, "gold"), track.done < track.updates
    end = f"{'stopped after' if stopped else 'after'} {track.done}{f' of {track.updates}' * stopped} updates"
    text = f"{track.label}: gold goes from {first} to {last} at KL {_ends(track, 'kl')[1]}, {end}"
    lines = [text, f"Warnings: {warnings(track)}"] if track.first else [text]
    return "\n".join(textwrap.fill(line, 84) for line in lines)


def describe(track: Track) -> str:
    """The figure's alt text."""
    parts = ("{} from {} to {}".format(SHOWN[name][0], *_ends(track, name)) for name in ("proxy", "gold", "kl"))
    warned = f" Warnings: {warnings(track)}." if track.first else ""
    return f"{track.label}, curves over {track.done} of {track.updates} PPO updates: {', '.join(parts)}.{warned}"


def picture(track: Track, title: str = "") -> bytes:
    """A PNG of proxy and gold above KL: updates thin, running means thick. Changes no global state."""
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
        for ax, names, label in ((top, ["proxy", "gold"], "warning begins"), (bottom, ["kl"], None)):
            for update in set(track.first.values()):
                ax.axvline(update, color=RED, ls=":", label=label)
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
    xlabel = f"PPO update (thick: running mean of {SMOOTH})"
    bottom.set(ylabel="KL from reference\n(nats a response)", xlabel=xlabel)
    bottom.set(xlim=(-0.02 * updates - 0.5, 1.02 * updates - 0.5))
    bottom.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = top.get_legend_handles_labels()
    once = dict(zip(labels, handles))
    top.legend(once.values(), once, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderaxespad=0)
