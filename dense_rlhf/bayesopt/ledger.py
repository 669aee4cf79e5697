"""The record of a search: a file of JSON lines, one an event, that any number of processes append to.

    proposed -> running -> observed | stopped | failed

A proposal follows from the lines above it and the search's settings alone, so a search killed at any point resumes as
if it had not been. A process holds its trial's lock (flock), which the kernel releases when the process dies. Machines
that share the folder must share its locks: NFS does unless mounted with nolock or local_lock, Lustre if mounted with
flock.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar

from dense_rlhf.files import append_line, finite, lock, read_ledger
from dense_rlhf.fingerprint import source_key
from dense_rlhf.types import InputError, is_number

if TYPE_CHECKING:
    from dense_rlhf.bayesopt.search import Search

ENDS = ("observed", "stopped", "failed")
FAILURES = 3  # in a row end a search
COMPLETE, CORRELATION = 5, 0.7  # trials, and rank correlation of halfway and end, from which others may stop halfway
ALONE = "ledger.lock"
MEANS = ("standard_error", "proxy", "gold", "kl", "correlation", "seconds")  # of an event: a number, or null
Extra = TypeVar("Extra")  # what a trial returns besides its numbers, such as a policy


# ---------------------------------------------------------------------------------------------------- the file


def trials(path: Path) -> list[dict]:
    """The trials of a search in order, each a dict of all fields of its events.

    - always: `trial`, `status` (its last event), `search`, `sources`, `point`, its first numbers as `weights`, `seed`,
      `rng` (all that fixed the proposal), `noise` (of the search then), `code`; once begun `host` and `pid`;
    - observed: `value` and its `standard_error`, means over the prompts of `proxy`, `gold` and `kl`, `updates`,
      `history` (the proxy of each update's batch), `rung` (its entry halfway), `ess` (mean ESS/T of each source that
      had weight), `seconds`;
    - stopped: the same without proxy, gold and kl, with value and standard error predicted from `rung`, and the
      rank `correlation` that allowed it;
    - failed: `reason`, `seconds`, and no value.

    Raises `InputError` if the file is not the ledger of a search.
    """
    rows: dict[int, dict] = {}
    for event in read_ledger(path):
        kind, trial = event.get("event"), event.get("trial")
        begins = kind == "proposed" and trial == len(rows) and isinstance(event.get("point"), list)
        if not begins and not (kind in ("running", *ENDS) and trial in list(rows)):
            raise InputError(f"{path} is not the ledger of a search; move it away")
        if fault := _fault(event):
            raise InputError(f"{path}: trial {trial} was {kind} with {fault}, wanted finite numbers; move it away")
        rows.setdefault(trial, {}).update({"status": kind} | event)
    return [row | {"point": tuple(row["point"])} for row in rows.values()]


def _fault(event: dict) -> str:
    """The first entry of an event that no search writes; empty where there is none."""
    numbers = {name: event[name] for name in ("value", "rung", "seed") if name in event}
    if event["event"] in ("observed", "stopped"):
        numbers.setdefault("value", None)
    numbers |= {name: event[name] for name in MEANS if event.get(name) is not None}
    point = event.get("point", [])
    numbers |= {f"point[{i}]": x for i, x in enumerate(point if isinstance(point, list) else [None])}
    return next((f"{name} = {value!r:.80}" for name, value in numbers.items() if not is_number(value)), "")


def is_live(path: Path) -> bool:
    """Whether a process is running a trial of this ledger now."""
    folder = path.with_suffix(".d")
    if not folder.exists():
        return False
    with lock(folder / ALONE):  # nobody takes a trial meanwhile
        files = [lock(path, wait=False) for path in folder.glob("*.lock") if path.name != ALONE]
        for file in filter(None, files):
            file.close()
    return None in files


def trial_seed(seed: int, trial: int) -> int:
    """The seed of trial 0, 1, ... of a search: 1000, 2000, ... above its own, which no other training uses."""
    return seed + 1000 * (trial + 1)


# ---------------------------------------------------------------------------------------------------- the loop


@dataclass(frozen=True)
class Ledger:
    """A search and its record at `path`; locks and the files of running trials are in `folder`, next to it."""

    path: Path
    empty: Callable[[], Search]  # the search before its first trial
    number: int  # of trials, failed ones included
    seed: int
    about: dict = field(default_factory=dict)  # `search`: a key of all that decides it; `sources`

    @property
    def folder(self) -> Path:
        return self.path.with_suffix(".d")

    def rows(self) -> list[dict]:
        """`trials` of the file. Raises `InputError` where they are of another search."""
        rows = trials(self.path)
        for row in rows:
            if any(row.get(name) != value for name, value in self.about.items()):
                raise InputError(f"{self.path} is of another search, of sources {row.get('sources')}; move it away")
        return rows

    def replay(self) -> Search:
        """The search with every observation, in the trials' order."""
        search = self.empty()
        for row in self.rows():
            if "value" in row:
                try:
                    search.observe(row["point"], row["value"], row.get("standard_error"))
                except InputError as error:
                    raise InputError(f"{self.path}, trial {row['trial']}: {error}; move it away") from error
        return search

    def run(
        self,
        trial: Callable[[dict], tuple[dict, Extra]],
        ended: Callable[[dict, Extra], None] = lambda row, extra: None,
        progress: Callable = iter,
    ) -> Search:
        """Run trials until all have ended, together with any other processes, and return the search.

        `trial` takes a row of `trials`, trains at its `point` with its `seed`, and returns an event, such as
        `{"event": "observed", "value": 1.0, "standard_error": 0.1}`, and an extra; `ended` is called with the recorded
        row and the extra, by one process at a time. A value that is not finite is a failed trial; three in a row raise
        `InputError`. A trial whose process died, or in which `trial` raised, is run again at the same point and seed.
        """
        done = sum(row["status"] in ENDS for row in self.rows())
        for _ in progress(range(done, self.number)):
            claimed = self._claim()
            if claimed is None:
                break
            self._finish(*claimed, trial, ended)
        return self.replay()

    def _claim(self) -> tuple[dict, IO] | None:
        """The next trial with its lock held: a dead process's, else a new one; None once all have ended."""
        while True:
            with self.alone():
                rows = self.rows()
                running = [row for row in rows if row["status"] not in ENDS]
                for row in running:
                    if held := self._hold(row["trial"], wait=False):
                        return row, held
                if len(rows) < self.number:
                    return self._propose(rows), self._hold(len(rows))
            if not running:
                return None
            self._hold(running[0]["trial"]).close()

    def _propose(self, rows: list[dict]) -> dict:
        """A new trial, at the point that follows from the observed, running and failed ones."""
        last = [row for row in rows if row["status"] in ENDS][-FAILURES:]
        if [row["status"] for row in last] == ["failed"] * FAILURES:
            raise InputError(
                f"{FAILURES} trials failed in a row, the last: {last[-1]['reason']}. Change what makes them fail; "
                f"{self.path} has them all"
            )
        search, pending = self.replay(), [row for row in rows if "value" not in row]
        settings = {name: getattr(search, name) for name in ("strategy", "initial", "anchors", "replicates", "seed")}
        observed = [row["trial"] for row in rows if "value" in row]
        point = search.suggest([row["point"] for row in pending])
        chosen = dict(point=point, weights=point[: search.space.d], seed=trial_seed(self.seed, len(rows)))
        chosen |= dict(noise=asdict(search.noise()), code=_code())
        chosen["rng"] = settings | {"observed": observed, "pending": [row["trial"] for row in pending]}
        self._append("proposed", len(rows), **self.about, **chosen)
        return self.rows()[-1]

    def _finish(self, row: dict, held: IO, trial: Callable, ended: Callable) -> None:
        """Run one trial and record how it ended."""
        with held:
            self._append("running", row["trial"], host=platform.node(), pid=os.getpid(), code=_code())
            start = time.perf_counter()
            event, extra = trial(row)
            event = _honest(event) | {"seconds": time.perf_counter() - start}
            with self.alone():
                self._append(event.pop("event"), row["trial"], **event)
                ended(self.rows()[row["trial"]], extra)

    def _append(self, event: str, trial: int, **more: object) -> None:
        append_line(self.path, finite({"event": event, "trial": trial} | more | {"time": time.time()}))

    def alone(self) -> IO:
        """The lock under which the ledger is read and appended to."""
        return lock(self.folder / ALONE)

    def _hold(self, trial: int, wait: bool = True) -> IO | None:
        return lock(self.folder / f"{trial:03d}.lock", wait)


def _code() -> dict[str, str]:
    return {"source": source_key("dense_rlhf.bayesopt.search")} | {name: version(name) for name in ("torch", "botorch")}


def _honest(event: dict) -> dict:
    """The event, or a failure where its numbers cannot be observed."""
    value, error = event.get("value"), event.get("standard_error")
    if event["event"] == "failed" or is_number(value) and (error is None or is_number(error)):
        return event
    return {"event": "failed", "reason": f"its value is {value}, with a standard error of {error}"}


# ---------------------------------------------------------------------------------------------------- early stopping


@dataclass(frozen=True)
class Halfway:
    """Values of complete trials halfway (`rungs`) and at the end (`values`), and the prediction they give."""

    rungs: Sequence[float]
    values: Sequence[float]

    @classmethod
    def of(cls, rows: Sequence[dict]) -> Halfway:
        """From those `trials` that ran to their end."""
        complete = [row for row in rows if row["status"] == "observed"]
        return cls([row["rung"] for row in complete], [row["value"] for row in complete])

    @property
    def correlation(self) -> float:
        """Spearman's; zero for fewer than five trials, or trials that do not differ."""
        from scipy.stats import spearmanr

        if len(self.values) < COMPLETE or min(len(set(self.rungs)), len(set(self.values))) < 2:
            return 0.0
        return float(spearmanr(self.rungs, self.values).statistic)

    def stops(self, rung: float) -> bool:
        """Whether a trial with this value halfway can stop: below the median, and halfway predicts the end."""
        from statistics import median

        return self.correlation >= CORRELATION and rung < median(self.rungs)

    def predict(self, rung: float) -> tuple[float, float | None]:
        """The value on the least-squares line, and the standard error of a new observation around it.

        Its square is s^2 (1 + 1/n + (x - mean x)^2 / Sxx), s^2 the squared residuals over n - 2. None if zero.
        """
        from statistics import fmean, linear_regression

        slope, intercept = linear_regression(self.rungs, self.values)
        n, centre = len(self.rungs), fmean(self.rungs)
        variance = sum((y - intercept - slope * x) ** 2 for x, y in zip(self.rungs, self.values)) / (n - 2)
        spread = sum((x - centre) ** 2 for x in self.rungs)
        return intercept + slope * rung, math.sqrt(variance * (1 + 1 / n + (rung - centre) ** 2 / spread)) or None
