"""One job in its folder: prepared, executed, recorded, and what its folder tells of it.

.lock  held while the folder is prepared      .running  held while the job runs, by whoever runs it
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Event

from dense_rlhf.bayesopt.ledger import is_live
from dense_rlhf.files import is_locked, lock, naming, write_json, write_text
from dense_rlhf.runner.execution import HEARTBEAT, SILENT, Limits, cpu_seconds, heartbeat, launch
from dense_rlhf.runner.plan import Job, judge, key_of, training_inputs
from dense_rlhf.runs import RunFolder, artefacts, provenance
from dense_rlhf.types import InputError, one_line

STATES = ("ok", "cached", "running", "failed", "timeout", "killed", "cancelled", "stale", "pending")
BAD = ("failed", "timeout", "killed")  # also cancelled, which is no fault of its own
RUNNING = ".running"


def prepare(job: Job, folder: Path, threads: int, force: bool = False) -> str:
    """Write the run's `params.yaml` and return its status: `ok` where the same run is finished, else `pending`.

    A folder is emptied where its trainings depend on something else now, and with `force`. Otherwise it is kept, with
    the ledger of a search that was cut short and the policy of a training that is only shown again. Raises `InputError`
    where that would empty a search that is running.
    """
    import yaml

    run = RunFolder(folder)
    check_place(folder)
    with lock(folder / ".lock"):
        found = judge(job, folder, threads)
        if not (found.why or force):
            _revive(run)
            return "ok"
        if force or not found.same:
            _empty(folder)
        for path in map(run.file, ("run.json", *found.broken)):
            with naming(path, "removed"):
                path.unlink(missing_ok=True)
        flat = found.inputs["parameters"] | ({"study_dir": str(folder.parent)} if job.reads else {})
        write_text(run.file("params.yaml"), yaml.safe_dump(flat, sort_keys=False, allow_unicode=True))
        write_json(run.file("inputs.json"), found.inputs)
    return "pending"


def _revive(run: RunFolder) -> None:
    """A finished run that the study had lost and has again."""
    record = run.record()
    if record["status"] == "stale":
        write_json(run.file("run.json"), record | {"status": "ok", "error": ""}, sealed=True)


def check_place(folder: Path) -> None:
    """Raise `InputError` where a run would go through a link, or into a folder of somebody else's."""
    if folder.is_symlink() or folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a link or a file, wanted a folder of the runner's own; move it away")
    names = {path.name for path in folder.iterdir() if path.name[0] != "."} if folder.exists() else set()
    if not names & {"run.json", "inputs.json", "params.yaml"} and (others := names - {"log.txt"}):
        raise InputError(f"{folder} holds {min(others)}, which no run wrote; move it away")


def _empty(folder: Path) -> None:
    """Remove all but the locks, the record first: what is half removed must not look finished.

    Raises `InputError` for a search that is running, and for a file that came after the run had finished.
    """
    if is_live(folder / "trials.jsonl"):
        raise InputError(f"{folder} has a search of other parameters or code that is running; end it first")
    record = RunFolder(folder).record()
    own = {"run.json", "log.txt", *record.get("artefacts", ()), *record.get("folders", ())}
    late = sorted(path.name for path in folder.iterdir() if path.name[0] != "." and path.name not in own)
    if late and "folders" in record and record.get("status") in ("ok", "stale"):
        raise InputError(
            f"{folder} holds {late[0]}, which its run did not write and the next would remove; move it away"
        )
    (folder / "run.json").unlink(missing_ok=True)
    write_json(folder / "inputs.json", {})  # so that the rest is removed even if this is cut short
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in (".lock", RUNNING, "inputs.json"):
            path.unlink()


def run_job(
    job: Job, folder: Path, limits: Limits, force: bool = False, gpus: str | None = None, stop: Event | None = None
) -> dict:
    """Prepare, execute, and write `run.json` last. Returns its content; status `cached` where nothing had to run.

    Status `busy`, and nothing done, where another process runs this job. `gpus` takes the place of those in `limits`;
    `stop` as in `launch`.
    """
    try:
        check_place(folder)
    except InputError as problem:  # nothing is written there
        return blank(job, "failed", str(problem))
    start = time.time()
    try:
        held = lock(folder / RUNNING, wait=False)
    except InputError as problem:
        return finish(job, folder, "failed", str(problem), start)
    if held is None:
        return {"job": job.name, "status": "busy"}
    with held:
        try:
            with naming(folder, "written"):
                held.truncate(0)
                held.write(json.dumps({"host": platform.node(), "pid": os.getpid(), "since": start}).encode())
                held.flush()
                if prepare(job, folder, limits.threads, force) == "ok":
                    return RunFolder(folder).record() | {"status": "cached"}
                write_json(folder / HEARTBEAT, {"cell": 0})
                status, error = launch(job.notebook, folder, replace(limits, gpus=gpus), stop, (held.fileno(),))
        except InputError as problem:
            status, error = "failed", str(problem)
        return finish(job, folder, status, error, start)


def finish(job: Job, folder: Path, status: str, error: str, start: float) -> dict:
    """Write the record of a run that has ended, with the keys of what it depended on; one that cannot be written is
    returned all the same, and not ok."""
    record = blank(job, status, error) | {"started": start, "seconds": time.time() - start} | provenance()
    try:
        with naming(folder, "written"):
            (folder / HEARTBEAT).unlink(missing_ok=True)
            if (used := cpu_seconds(folder)) is not None:
                record["cpu_seconds"] = used
            if inputs := RunFolder(folder).inputs():
                record |= {"key": key_of(inputs), "training_key": key_of(training_inputs(inputs))}
            folders = sorted(path.name for path in folder.iterdir() if path.is_dir())
            write_json(folder / "run.json", record | {"artefacts": artefacts(folder), "folders": folders}, sealed=True)
    except InputError as problem:
        return record | {"status": "failed" if status == "ok" else status, "error": error or str(problem)}
    return record


def blank(job: Job, status: str, error: str) -> dict:
    return {
        "job": job.name,
        "notebook": job.notebook,
        "arm": job.params.arm,
        "seed": job.params.seed,
        "status": status,
        "dataset": job.params.where,
        "regime": job.params.regime,
        "error": error,
        "key": "",
        "started": time.time(),
        "seconds": 0.0,
    }


def finished(job: Job, folder: Path, threads: int) -> dict | None:
    """The record of a run that need not run again, as `cached`; None where it must."""
    run = RunFolder(folder)
    try:
        if judge(job, folder, threads).why:
            return None
        _revive(run)
    except InputError:  # the run itself will say so
        return None
    return run.record() | {"status": "cached"}


def cancel(job: Job, folder: Path, reason: str) -> dict:
    """Record that a job could not run. What it once finished is kept, but must not reach a comparison: it is stale."""
    run, record = RunFolder(folder), blank(job, "cancelled", reason)
    old = run.record()
    done = old.get("status") in ("ok", "stale")
    with suppress(InputError):  # in a folder of somebody else's nothing is written
        check_place(folder)
        write_json(run.file("run.json"), old | {"status": "stale", "error": reason} if done else record, sealed=True)
    return record


def held_by(folder: Path) -> str:
    """Who runs a job now; empty where nobody does."""
    path = folder / RUNNING
    if not is_locked(path):
        return ""
    try:
        who = json.loads(path.read_text(encoding="utf-8"))
        since = time.strftime("%H:%M:%S", time.localtime(who["since"]))
        return one_line(f"process {who['pid']} on {who['host']} since {since}")
    except (ValueError, LookupError, TypeError, OverflowError):  # it is just being written
        return "another process"


def state(folder: Path, why: str) -> tuple[str, str]:
    """A job's state as its folder tells it, and what there is to say of it; `why` it would run."""
    record, beat = RunFolder(folder).record(), heartbeat(folder)
    if who := held_by(folder):
        sign = f"cell {beat['cell']}, last sign {beat['age']:.0f} s ago, " if beat else ""
        return "running", f"{'not answering: ' * (beat.get('age', 0) > SILENT)}{sign}{who}"
    if record.get("status") in ("ok", "stale"):
        return ("stale", why) if why else ("ok", f"{record['seconds']:.0f} s")
    if record:
        return record["status"], record["error"]
    return ("killed", f"in cell {beat['cell']}, with its runner") if beat else ("pending", why)
