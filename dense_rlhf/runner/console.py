"""What the commands `run` and `status` say: lines, one line that is written over on a terminal, and how to go on."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from dense_rlhf.runner.grid import tally
from dense_rlhf.runner.jobs import BAD, GOOD, state
from dense_rlhf.runner.plan import Job
from dense_rlhf.types import InputError


class Screen:
    """Lines to standard output; below them, on a terminal only, a progress line."""

    def __init__(self):
        self.terminal, self.shown = sys.stdout.isatty(), False

    def say(self, line: str) -> None:
        self.clear()
        print(line, flush=True)

    def bar(self, text: str) -> None:
        print("\r\x1b[K" + text[: shutil.get_terminal_size().columns - 1], end="", flush=True)
        self.shown = True

    def clear(self) -> None:
        """Take the progress line away."""
        if self.shown:
            print("\r\x1b[K", end="", flush=True)
        self.shown = False


def selected(jobs: list[Job], folder: Path, only: str | None) -> list[str]:
    """The jobs that `--only` names: all, those that `failed`, or those whose name fits, with * for any letters.

    Raises `InputError` where no job has such a name.
    """
    names = [job.name for job in jobs]
    if only == "failed":
        return [name for name in names if state(folder / name, "")[0] in (*BAD, "cancelled")]
    found = names if only is None else [name for name in names if fnmatchcase(name, only)]
    if not found:
        raise InputError(
            f"--only is {only!r}, wanted failed, or the name of a run, * for any letters: " + ", ".join(names)
        )
    return found


def failures(records: Iterable[dict], study: str, command: str) -> list[str]:
    """For each run that is not ok: what went wrong, and what to paste. `command` runs the study."""
    lines = []
    for record in records:
        if record["status"] in GOOD:
            continue
        lines += [f"{record['status']}: {record['job']}", f"  {record['error']}"]
        if record["status"] in BAD:
            folder = f"runs/{study}/{record['job']}"
            lines += [
                f"  log:   {folder}/log.txt",
                f"  again: {command} --only {shlex.quote(record['job'])}",
                f"  alone: papermill notebooks/{record['notebook']}.ipynb out.ipynb -f {folder}/params.yaml",
            ]
    return lines


def summary(records: list[dict]) -> str:
    """How many runs have each status."""
    return f"{len(records)} runs: " + (", ".join(f"{n} {name}" for name, n in tally(records).items()) or "none chosen")


def states(jobs: list[Job], folder: Path, why: dict[str, str]) -> tuple[list[str], bool]:
    """A line for each job, failures first, then one that counts; and whether all are ok."""
    found = {job.name: state(folder / job.name, why[job.name]) for job in jobs}
    order = sorted(found, key=lambda name: found[name][0] not in BAD)
    lines = [f"{found[name][0]:10s}{name}" + (f": {found[name][1]}" if found[name][1] else "") for name in order]
    counts = tally({"status": status} for status, _ in found.values())
    lines.append(f"{len(jobs)} runs: " + ", ".join(f"{n} {name}" for name, n in counts.items()))
    return lines, set(counts) == {"ok"}
