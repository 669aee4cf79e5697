"""The output of `run` and `status`: lines, a progress line on a terminal, and commands to run failed jobs again."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from dense_rlhf.runner.jobs import BAD, STATES, state
from dense_rlhf.runner.plan import Job, act, describe
from dense_rlhf.runs import GOOD, RunFolder
from dense_rlhf.types import InputError, did_you_mean


class Screen:
    """Lines on standard output and, on a terminal only, a progress line below them."""

    def __init__(self):
        self.terminal = bool(sys.stdout) and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.shown = False

    def say(self, line: str) -> None:
        self.clear()
        print(line, flush=True)

    def bar(self, text: str) -> None:
        """Overwrite the progress line."""
        if not self.terminal:
            return
        print("\r\x1b[K" + text[: shutil.get_terminal_size().columns - 1], end="", flush=True)
        self.shown = True

    def clear(self) -> None:
        """Erase the progress line."""
        if self.shown:
            print("\r\x1b[K", end="", flush=True)
        self.shown = False


def selected(jobs: list[Job], folder: Path, only: str | None) -> list[str]:
    """The names of the jobs that `--only` selects: all, those that `failed`, or those that match a pattern with *.

    Raises `InputError` if no job matches.
    """
    names = [job.name for job in jobs]
    if only == "failed":
        return [name for name in names if state(folder / name, "")[0] in (*BAD, "cancelled")]
    chosen = names if only is None else [name for name in names if fnmatchcase(name, only)]
    if not chosen:
        known = ", ".join(names)
        hint = did_you_mean(only, ("failed", *names))
        raise InputError(f"--only is {only!r}, wanted failed, or the name of a run, * for any letters: {known}{hint}")
    return chosen


def planned(jobs: list[Job], why: dict[str, str], workers: int) -> list[str]:
    """The output of a dry run: a line for each job, with the reason why it would run, and a count."""
    reasons = [(job, why[job.name]) for job in jobs]
    lines = [f"{act(reason):8s}{describe(job)}" + (f": {reason}" if reason else "") for job, reason in reasons]
    would = sum(bool(reason) for _, reason in reasons)
    return [*lines, f"{len(jobs)} runs, {would} to run, {workers} at a time; nothing was started"]


def failures(records: Iterable[dict], study: str, command: str) -> list[str]:
    """For each run that is not ok: the error, and commands to paste. `command` runs the study."""
    lines = []
    for record in records:
        if record["status"] in GOOD:
            continue
        lines += [f"{record['status']}: {record['job']}", f"  {record['error']}"]
        if record["status"] in BAD:
            folder, notebook = f"runs/{study}/{record['job']}", f"notebooks/{record['notebook']}.ipynb"
            lines += [
                f"  log:   {folder}/log.txt",
                f"  again: {command} --only {shlex.quote(record['job'])}",
                f"  alone: papermill {notebook} out.ipynb -f {folder}/params.yaml --log-level ERROR",
            ]
    return lines


def tally(statuses: Iterable[str]) -> list[str]:
    """The number of runs with each status, such as `3 ok`, in the order of `STATES`."""
    counts = Counter(statuses)
    return [f"{counts[status]} {status}" for status in sorted(counts, key=STATES.index)]


def summary(statuses: list[str]) -> str:
    return f"{len(statuses)} runs: {', '.join(tally(statuses)) or 'none chosen'}"


def spent(records: Iterable[dict], folder: Path, pages: float) -> list[str]:
    """What the runs that were just made took, in a line: in cells, training, starting and ending; and the pages."""
    ran = [record for record in records if record["status"] == "ok"]
    cells, trained = (sum(of(RunFolder(folder / record["job"])) for record in ran) for of in (_in_cells, _trained))
    total = sum(record["seconds"] for record in ran)
    around = f"{total:.0f} s of runs: {cells:.0f} s in cells, {total - cells:.0f} s to start and end them"
    return [f"{around}; {trained:.0f} s trained policies of 04_ppo; pages took {pages:.0f} s"] if ran else []


def _in_cells(run: RunFolder) -> float:
    """The seconds that papermill noted for the cells of an executed notebook; 0 where it cannot be read."""
    with suppress(InputError, LookupError, TypeError, AttributeError):
        return sum(cell["metadata"]["papermill"]["duration"] or 0 for cell in run.load_json("notebook.ipynb")["cells"])
    return 0.0


def _trained(run: RunFolder) -> float:
    """The seconds of a policy's training, if all of it was done in this run."""
    with suppress(InputError, LookupError, TypeError):
        about = run.load_json("trained.json")
        return 0.0 if about["read"] else about["seconds"]
    return 0.0


def states(jobs: list[Job], folder: Path, why: dict[str, str]) -> tuple[list[str], bool]:
    """A line for each job, failures first, then a count; and whether all are ok."""
    now = {job.name: state(folder / job.name, why[job.name]) for job in jobs}
    order = sorted(now, key=lambda name: now[name][0] not in BAD)
    lines = [f"{now[name][0]:10s}{name}" + (f": {now[name][1]}" if now[name][1] else "") for name in order]
    statuses = [status for status, _ in now.values()]
    return [*lines, summary(statuses)], set(statuses) == {"ok"}
