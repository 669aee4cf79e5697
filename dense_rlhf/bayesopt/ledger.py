"""The record of a search: an append-only file of JSON lines, one an event, that any number of processes share.

    proposed -> running -> observed | stopped | failed

A proposal follows from the lines above it and the search's settings; nothing else is kept, so that a search killed
anywhere goes on as if it had not been. Whoever runs a trial holds its lock (flock), which the kernel takes back from
the dead. Machines that share the folder must share its locks: NFS does unless mounted with nolock or local_lock, Lustre
where mounted with flock.
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
from dense_rlhf.types import InputError

if TYPE_CHECKING:
    from dense_rlhf.bayesopt.search import Search

ENDS = ("observed", "stopped", "failed")
FAILURES = 3  # one after another end a search
COMPLETE, CORRELATION = 5, 0.7  # trials, and their rank correlation of halfway and end, that let others stop halfway
ALONE = "ledger.lock"
Left = TypeVar("Left")  # what a trial leaves beside its numbers, such as a policy


# ---------------------------------------------------------------------------------------------------- the file


def trials(path: Path) -> list[dict]:
    """The trials of a search in their order, each a dict of all that its events say.

    - always: `trial`, `status` (its last event), `search`, `sources`, `point`, its first numbers as `weights`, `seed`,
      `rng` (all that fixed the proposal), `noise` (of the search then), `code`; once begun `host` and `pid`;
    - observed: `value` and its `standard_error`, means over the prompts of `proxy`, `gold` and `kl`, `updates`,
      `history` (the proxy of each update's batch), `rung` (its entry halfway), `ess` (mean ESS/T of each source that
      had weight), `seconds`;
    - stopped: the same without proxy, gold and kl, with value and standard error foretold from `rung`, and the
      rank `correlation` that allowed it;
    - failed: `reason`, `seconds`, and no value.

    Raises `InputError` for a ledger of something else.
    """
    rows: dict[int, dict] = {}
    for event in read_ledger(path):
        kind, trial = event.get("event"), event.get("trial")
        begins = kind == "proposed" and trial == len(rows) and isinstance(event.get("point"), list)
        if not begins and not (kind in ("running", *ENDS) and trial in list(rows)):
            raise InputError(f"{path} is not the ledger of a search; move it away")
        rows.setdefault(trial, {}).update({"status": kind} | event)
    return [row | {"point": tuple(row["point"])} for row in rows.values()]


def is_live(path: Path) -> bool:
    """Whether a process runs a trial of this ledger now."""
    folder = path.with_suffix(".d")
    if not folder.exists():
        return False
    with lock(folder / ALONE):  # nobody takes a trial meanwhile
        found = [lock(held, wait=False) for held in folder.glob("*.lock") if held.name != ALONE]
        for file in filter(None, found):
            file.close()
    return None in found


def trial_seed(seed: int, trial: int) -> int:
    """The seed of trial 0, 1, ... of a search: 1000, 2000, ... above its own, where no other training has its seed."""
    return seed + 1000 * (trial + 1)


# ---------------------------------------------------------------------------------------------------- the loop


@dataclass(frozen=True)
class Ledger:
    """A search and its record at `path`; locks, and what a trial needs while it runs, are in the folder beside it."""

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
        """The search with all that was observed, in the trials' order."""
        search = self.empty()
        for row in self.rows():
            if "value" in row:
                search.observe(row["point"], row["value"], row.get("standard_error"))
        return search

    def run(
        self,
        trial: Callable[[dict], tuple[dict, Left]],
        ended: Callable[[dict, Left], None] = lambda row, left: None,
        progress: Callable = iter,
    ) -> Search:
        """Run trials until none is left, beside any other processes that do, and return what was observed.

        `trial` takes a row of `trials`, trains at its `point` with its `seed`, and returns the event, such as
        `{"event": "observed", "value": 1.0, "standard_error": 0.1}`, and what it leaves; `ended` is called with both
        once they are recorded, by one process at a time. A value that is not finite is a failed trial. Raises
        `InputError` where three failed one after another. A trial whose process died is run again, point and seed the
        same; what `trial` raises leaves it to the next process.
        """
        done = sum(row["status"] in ENDS for row in self.rows())
        for _ in progress(range(done, self.number)):
            claimed = self._claim()
            if claimed is None:
                break
            self._finish(*claimed, trial, ended)
        return self.replay()

    def _claim(self) -> tuple[dict, IO] | None:
        """The next trial, its lock held: of a process that died, else a new one. None once all have ended."""
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
        """A new trial: its point follows from what was observed, and from what runs or has failed."""
        last = [row for row in rows if row["status"] in ENDS][-FAILURES:]
        if [row["status"] for row in last] == ["failed"] * FAILURES:
            raise InputError(
                f"{FAILURES} trials failed one after another, the last: {last[-1]['reason']}. Change what "
                f"makes them fail; {self.path} has them all"
            )
        search, pending = self.replay(), [row for row in rows if "value" not in row]
        settings = {name: getattr(search, name) for name in ("strategy", "initial", "anchors", "replicates", "seed")}
        observed = [row["trial"] for row in rows if "value" in row]
        point = search.suggest([row["point"] for row in pending])
        self._append(
            "proposed",
            len(rows),
            **self.about,
            point=point,
            weights=point[: search.space.d],
            seed=trial_seed(self.seed, len(rows)),
            noise=asdict(search.noise()),
            code=_code(),
            rng=settings | {"observed": observed, "pending": [row["trial"] for row in pending]},
        )
        return self.rows()[-1]

    def _finish(self, row: dict, held: IO, trial: Callable, ended: Callable) -> None:
        """Run one trial and record how it ended."""
        with held:
            self._append("running", row["trial"], host=platform.node(), pid=os.getpid(), code=_code())
            start = time.perf_counter()
            event, left = trial(row)
            event = _honest(event) | {"seconds": time.perf_counter() - start}
            with self.alone():
                self._append(event.pop("event"), row["trial"], **event)
                ended(self.rows()[row["trial"]], left)

    def _append(self, event: str, trial: int, **more: object) -> None:
        append_line(self.path, finite({"event": event, "trial": trial} | more | {"time": time.time()}))

    def alone(self) -> IO:
        """The lock under which the ledger is read and added to."""
        return lock(self.folder / ALONE)

    def _hold(self, trial: int, wait: bool = True) -> IO | None:
        return lock(self.folder / f"{trial:03d}.lock", wait)


def _code() -> dict[str, str]:
    return {"source": source_key("dense_rlhf.bayesopt.search")} | {name: version(name) for name in ("torch", "botorch")}


def _honest(event: dict) -> dict:
    """The event, or a failure where its numbers cannot be observed."""
    value, error = event.get("value", math.nan), event.get("standard_error")
    if event["event"] == "failed" or math.isfinite(value) and (error is None or math.isfinite(error)):
        return event
    return {"event": "failed", "reason": f"its value is {value}, with a standard error of {error}"}


# ---------------------------------------------------------------------------------------------------- early stopping


@dataclass(frozen=True)
class Halfway:
    """What complete trials were worth halfway (`rungs`) and at the end (`values`), and what that foretells."""

    rungs: Sequence[float]
    values: Sequence[float]

    @classmethod
    def of(cls, rows: Sequence[dict]) -> Halfway:
        """Of those `trials` that ran to their end."""
        complete = [row for row in rows if row["status"] == "observed"]
        return cls([row["rung"] for row in complete], [row["value"] for row in complete])

    @property
    def correlation(self) -> float:
        """Spearman's; zero where there are fewer than five trials, or they do not differ."""
        from scipy.stats import spearmanr

        if len(self.values) < COMPLETE or min(len(set(self.rungs)), len(set(self.values))) < 2:
            return 0.0
        return float(spearmanr(self.rungs, self.values).statistic)

    def stops(self, rung: float) -> bool:
        """Whether a trial below the median halfway can be ended there."""
        from statistics import median

        return self.correlation >= CORRELATION and rung < median(self.rungs)

    def foretell(self, rung: float) -> tuple[float, float | None]:
        """The value that the regression line predicts, and the standard error of a new observation around it.

        s^2 (1 + 1/n + (x - mean x)^2 / Sxx), where s^2 are the squared residuals over n - 2. None in place of zero.
        """
        from statistics import fmean, linear_regression

        slope, intercept = linear_regression(self.rungs, self.values)
        n, centre = len(self.rungs), fmean(self.rungs)
        residual = sum((y - intercept - slope * x) ** 2 for x, y in zip(self.rungs, self.values)) / (n - 2)
        spread = sum((x - centre) ** 2 for x in self.rungs)
        return intercept + slope * rung, math.sqrt(residual * (1 + 1 / n + (rung - centre) ** 2 / spread)) or None
