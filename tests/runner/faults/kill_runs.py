"""Kill runner, worker or kernel of a study at random moments and run it again: nothing is lost, nothing called ok.

    python tests/runner/faults/kill_runs.py 50

A tiny study of made-up notebooks (two policies, a search, a comparison) is killed up to four times with SIGKILL, then
runs to its end. After each kill: no process is left behind, and what a record calls ok is whole. At the end: what was
finished before a kill was not run again, and all artefacts equal those of an unbroken study, byte by byte.
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil
from checkout import JUDGED, command, make_checkout

from dense_rlhf.runs import RunFolder, altered

TARGETS = {"runner": "", "worker": "dense-worker", "kernel": "dense-kernel"}  # names of processes
STUDY = {
    "notebooks": ["04_ppo", "05_bayesian_optimisation", "06_comparison"],
    "workers": 2,
    "ppo": {"lr": 0.5},
    "arms": {"sparse": {"sources": ["terminal"]}, "bo": {"sources": ["shap", "terminal"], "weights": "learned"}},
}
SLOWLY = (
    "import json, pathlib, time",
    """for i in range(20):
    time.sleep(0.02)
    with open(pathlib.Path(run_dir, 'steps.txt'), 'w' if i == 0 else 'a') as file:
        file.write(f'{i}\\n')""",
)
TRAINED = (
    """pathlib.Path(run_dir, 'metrics.json').write_text(json.dumps({'lr': ppo_lr, 'weights': shape_weights}))
"""
    + JUDGED
)
LEARNED = "pathlib.Path(run_dir, 'metrics.json').write_text(json.dumps({'shape': {'weights': [0.25, 0.75]}}))"
COMPARED = """from dense_rlhf.runs import finished_runs
runs = finished_runs(pathlib.Path(run_dir).parent)
found = {run.path.name: run.load_json('metrics.json') for run in runs if run.path.name.startswith('04')}
pathlib.Path(run_dir, 'metrics.json').write_text(json.dumps(found))"""
NOTEBOOKS = {
    "04_ppo": (*SLOWLY, TRAINED),
    "05_bayesian_optimisation": (*SLOWLY, LEARNED),
    "06_comparison": (*SLOWLY, COMPARED),
}


def processes(folder: Path, name: str = "") -> list[psutil.Process]:
    """The processes that work in this checkout, or those of a name; a fork has the command line of another."""
    matching = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.cwd() == str(folder) and process.status() != "zombie":
                matching += [process] if name in process.name() else []
        except psutil.Error:
            continue
    return matching


def records(folder: Path) -> dict[str, dict]:
    runs = (RunFolder(path.parent) for path in folder.glob("runs/s/*/run.json"))
    return {run.path.name: run.load_json("run.json") for run in runs}


def results(folder: Path) -> dict[str, bytes]:
    """What the notebooks wrote; times, paths and what is named after them differ from run to run."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for name in ("metrics.json", "steps.txt")
        for path in sorted(folder.glob(f"runs/s/*/{name}"))
    }


def whole(folder: Path) -> list[str]:
    """Runs that are called ok and are not."""
    named, files = records(folder).items(), {"metrics.json", "steps.txt"}
    return [
        name
        for name, record in named
        if record["status"] == "ok"
        and (altered(folder / "runs" / "s" / name, record) or not files <= record["artefacts"].keys())
    ]


def left_behind(folder: Path, patience: float = 60.0) -> list[str]:
    """The processes that outlive their runner by some seconds: each ends by itself, on a busy machine not at once."""
    until = time.monotonic() + patience
    while (alive := processes(folder)) and time.monotonic() < until:
        time.sleep(0.1)
    return [f"left behind: {' '.join(process.cmdline())[:80]}" for process in alive]


def strike(folder: Path, wanted: dict[str, bytes], target: str, seconds: float) -> tuple[bool, list[str]]:
    """Run the study, kill one `target` after some seconds; whether one was there, and what is wrong after that.

    A kernel that is killed behind its last cell harms nothing: then all must be as wanted.
    """
    runner = command(folder, "run", "params/s.yaml")
    time.sleep(seconds)
    victims = [runner]
    while target != "runner" and runner.poll() is None and not (victims := processes(folder, TARGETS[target])):
        time.sleep(0.05)
    if runner.poll() is not None or not victims:
        runner.communicate()
        return False, []
    try:
        random.choice(victims).send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:  # it ended meanwhile
        runner.communicate()
        return False, []
    wrong = []
    if target == "runner":
        runner.communicate()
        wrong += left_behind(folder)
    elif runner.communicate(timeout=600) and runner.returncode == 0 and results(folder) != wanted:
        wrong.append(f"exit 0 although a {target} was killed")
    return True, wrong + [f"not ok: {name}" for name in whole(folder)]


def finished(folder: Path) -> dict[str, float]:
    """When the runs that are ok began; a comparison of fewer policies is rightly made again."""
    return {
        name: record["started"]
        for name, record in records(folder).items()
        if record["status"] == "ok" and not name.startswith("06")
    }


def one_study(folder: Path, wanted: dict[str, bytes], kills: list[tuple[str, float]]) -> tuple[int, list[str]]:
    """Kill a fresh study as often as `kills` say, then let it end: how many kills hit, and what went wrong."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    hits, wrong, before = 0, [], {}
    for target, seconds in kills:
        hit, problems = strike(folder, wanted, target, seconds)
        hits, wrong, before = hits + hit, wrong + problems, before | finished(folder)
    last = command(folder, "run", "params/s.yaml")
    printed = last.communicate()[0]
    after = finished(folder)
    wrong += [f"run again: {name}" for name in before if before[name] != after.get(name)]
    if last.returncode or results(folder) != wanted:
        wrong.append(f"exit {last.returncode}, other results: {printed[-500:]}")
    return hits, wrong


def kill_runs(points: int, seed: int = 0, say=lambda line: None) -> tuple[int, list]:
    """How many kills hit, at least `points`, and what went wrong."""
    dice, folder, hits, wrong = random.Random(seed), Path(tempfile.mkdtemp()) / "c", 0, []
    random.seed(seed)
    make_checkout(folder, STUDY, NOTEBOOKS)
    start = time.time()
    unbroken = command(folder, "run", "params/s.yaml")
    printed = unbroken.communicate()[0]
    took, wanted = time.time() - start, results(folder)
    assert unbroken.returncode == 0 and len(wanted) == 8, printed
    while hits < points:
        number = min(dice.randint(2, 4), points - hits)
        kills = [(list(TARGETS)[(hits + i) % 3], dice.uniform(0.3, 0.7 * took)) for i in range(number)]
        hit, problems = one_study(folder, wanted, kills)
        hits, wrong = hits + hit, wrong + [(kills, text) for text in problems]
        say(f"{hits:3d}/{points} kills after {time.time() - start:.0f} s, {len(wrong)} wrong {problems or ''}")
    shutil.rmtree(folder.parent)
    return hits, wrong


if __name__ == "__main__":
    number, began = int(sys.argv[1]) if len(sys.argv) > 1 else 50, time.time()
    hit, bad = kill_runs(number, say=lambda line: print(line, flush=True))
    print(f"{hit} kills, {len(bad)} wrong {json.dumps(bad) if bad else ''} ({time.time() - began:.0f} s)")
    sys.exit(bool(bad))
