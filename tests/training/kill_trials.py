"""Kill a search at every event of its ledger and start it again: it must propose what an unbroken one does.

    python tests/training/kill_trials.py

Each search runs in a forked process that kills itself with SIGKILL as it writes a given event: once half of the line is
on disk, and once all of it is. Another process then runs to the end. A noisy parabola stands in for a training, and one
trial fails.
"""

import itertools
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from dense_rlhf.bayesopt import ledger
from dense_rlhf.bayesopt.ledger import Ledger, trials
from dense_rlhf.bayesopt.search import Search
from dense_rlhf.bayesopt.space import Space
from dense_rlhf.files import append_line, read_ledger

FAILS = 3  # the trial
WAYS = ("half", "whole")  # of the line is on disk at the kill


def make_ledger(path: Path, number: int) -> Ledger:
    return Ledger(path, partial(Search, Space(2), initial=2, seed=7), number, seed=7, about={"search": "toy"})


def trial(row: dict) -> tuple[dict, None]:
    """A value of point and seed alone."""
    noise = random.Random(row["seed"]).gauss(0, 0.1)
    value = math.nan if row["trial"] == FAILS else noise - (row["point"][0] - 0.3) ** 2
    return {"event": "observed", "value": value, "standard_error": 0.1}, None


def dying(at: int, way: str):
    """`append_line` that ends the process as it writes event number `at`."""
    calls = itertools.count()

    def append(path: Path, event: dict) -> None:
        if next(calls) == at:
            line = json.dumps(event).encode() + b"\n"
            with open(path, "ab") as file:
                file.write(line[: len(line) // 2] if way == "half" else line)
            os.kill(os.getpid(), signal.SIGKILL)
        append_line(path, event)

    return append


def forked(book: Ledger, append=append_line) -> bool:
    """Search in a forked process; whether it came to its end."""
    child = os.fork()
    if child == 0:
        ledger.append_line = append
        try:
            book.run(trial)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def proposals(path: Path) -> list[tuple]:
    return [(row["trial"], row["point"], row["seed"], row["status"], row.get("value")) for row in trials(path)]


def kill_trials(number: int, points=None) -> tuple[int, list]:
    """How many kills, and those (event, way) whose ledger does not propose and observe what an unbroken one does."""
    torch.set_num_threads(1)  # a fork would lose the others
    root = Path(tempfile.mkdtemp())
    unbroken = root / "unbroken.jsonl"
    make_ledger(unbroken, number).run(trial)
    wanted, events = proposals(unbroken), len(read_ledger(unbroken))
    points, lost = list(points or itertools.product(range(events), WAYS)), []
    for at, way in points:
        book = make_ledger(root / f"{at}-{way}.jsonl", number)
        killed, ended = not forked(book, dying(at, way)), forked(book)
        if not killed or not ended or proposals(book.path) != wanted:
            lost.append((at, way))
    return len(points), lost


if __name__ == "__main__":
    start = time.time()
    kills, lost = kill_trials(9)
    print(f"{kills} kills, {len(lost)} lost {lost or ''} ({time.time() - start:.0f} s)")
    sys.exit(bool(lost))
