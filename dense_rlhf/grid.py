"""Expand a study into notebook runs, and execute them: one subprocess a run, on past failures.

Order: reward model; everything that needs only it; policies with learned weights; the comparison.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dense_rlhf.attribution import SOURCES
from dense_rlhf.context import check_features
from dense_rlhf.data import DATASETS
from dense_rlhf.ledger import is_live, lock, trial_seed
from dense_rlhf.params import ABLATIONS, RunParams, ShapeParams, StudyParams
from dense_rlhf.runs import RunFolder, artefacts, provenance, repository_root
from dense_rlhf.store import content_key, file_sha256, package_sha256, remove_checkpoints, write_json, write_text
from dense_rlhf.strict import parse
from dense_rlhf.types import InputError


@dataclass(frozen=True)
class Job:
    """One notebook run."""

    name: str
    notebook: str
    stage: int
    params: RunParams
    weights_from: str | None = None  # the job whose search learns this one's weights


def check_names(study: StudyParams) -> None:
    """Raise `InputError` for a dataset, source or feature that no registry has, and for a seed that is a trial's."""
    for data in study.datasets:
        if data.name not in DATASETS:
            raise InputError(f"data.name is {data.name!r}, wanted one of {', '.join(DATASETS)}")
    for arm, shape in study.arms.items():
        unknown = [source for source in shape.sources if source not in SOURCES]
        if unknown:
            raise InputError(f"arms.{arm}.sources: {unknown[0]!r} is not known, wanted some of {', '.join(SOURCES)}")
        check_features(f"arms.{arm}.features", shape.features)
        if shape.is_learned and not {"04_ppo", "05_bayesian_optimisation"} <= set(study.notebooks):
            raise InputError(f"arms.{arm} learns its weights: notebooks must name 04_ppo and 05_bayesian_optimisation")
        trials = [trial_seed(study.seeds[0], trial) for trial in range(study.run.bo.trials)] if shape.is_learned else []
        if known := [seed for seed in study.seeds if seed in trials]:
            raise InputError(f"seeds: {known[0]} is a trial's of the search for arms.{arm}; policies want fresh seeds")
    check_features("bo.features", study.run.bo.features)


def expand(study: StudyParams) -> list[Job]:
    """datasets x arms x seeds, as jobs in the order in which they can run."""
    check_names(study)
    jobs: list[Job] = []
    for data in study.datasets:
        prefix = f"{data.name}-" if len(study.datasets) > 1 else ""
        base = replace(study.run, data=data, seed=study.seeds[0])
        single = {"01_reward_model": 0, "02_attribution": 1, "03_shaping": 1, "06_comparison": 3}
        single |= dict.fromkeys(ABLATIONS, 1)
        for notebook in [n for n in study.notebooks if n in single]:
            jobs.append(Job(prefix + Path(notebook).name, notebook, single[notebook], base))
        for arm, shape in study.arms.items():
            jobs += _arm_jobs(study, replace(base, arm=arm, shape=shape), prefix)
    # long jobs first within a stage, so that no worker ends up alone with one
    return sorted(jobs, key=lambda job: (job.stage, not job.notebook.startswith("05"), job.notebook[:2] < "04"))


def _arm_jobs(study: StudyParams, params: RunParams, prefix: str) -> list[Job]:
    search = f"{prefix}05_bayesian_optimisation-{params.arm}" if params.shape.is_learned else None
    jobs = [Job(search, "05_bayesian_optimisation", 1, params)] if search else []
    if "04_ppo" in study.notebooks:
        for seed in study.seeds:
            name = f"{prefix}04_ppo-{params.arm}-seed{seed}"
            jobs.append(Job(name, "04_ppo", 2 if search else 1, replace(params, seed=seed), search))
    return jobs


def runs_folder(study: StudyParams) -> Path:
    return repository_root() / "runs" / study.study


# ---------------------------------------------------------------------------------------------------- one run


def job_key(job: Job, flat: dict, upstream: list[str]) -> str:
    """Changes when the notebook, its parameters, any source file of the package, or a run that it reads changes."""
    notebook = file_sha256(repository_root() / "notebooks" / f"{job.notebook}.ipynb")
    return content_key([flat, notebook, upstream, package_sha256()])


def learned_params(job: Job, runs: Path) -> RunParams:
    """The job's parameters, with what its search among `runs` has learned: `shape` of the search's metrics."""
    if not job.weights_from:
        return job.params
    learned = RunFolder(runs / job.weights_from).load_json("metrics.json").get("shape")
    if not learned:
        raise InputError(f"{job.name} needs the weights of {job.weights_from}, which did not finish")
    return replace(job.params, shape=parse(ShapeParams, asdict(job.params.shape) | learned, "shape"))


def prepare(job: Job, folder: Path, threads: int) -> str:
    """Write the run's `params.yaml` and return its status: `ok` where the same run is finished, else `pending`.

    A folder left by other parameters or other code is emptied; one left by the same is kept, and with it the ledger
    of a search that was cut short. Raises `InputError` where that would empty a search that is running.
    """
    import yaml

    params, run = learned_params(job, folder.parent), RunFolder(folder)
    flat = params.flat() | {"threads": params.threads or threads}
    reads = sorted(folder.parent.glob("*/key.txt")) if job.notebook == "06_comparison" else []
    upstream = [path.read_text() for path in reads if path.parent != folder]
    with lock(folder / ".lock"):
        left = run.file("key.txt").read_text() if run.file("key.txt").exists() else ""
        if params.threads is None:
            flat = _as_begun(job, flat, upstream, run, left)
        key = job_key(job, flat, upstream)
        if run.load_json("run.json").get("key") == key and run.load_json("run.json").get("status") == "ok":
            return "ok"
        if left != key:
            _empty(folder)
        run.file("run.json").unlink(missing_ok=True)
        flat |= {"run_dir": str(folder)}
        write_text(run.file("params.yaml"), yaml.safe_dump(flat, sort_keys=False, allow_unicode=True))
        write_text(run.file("key.txt"), key)
    return "pending"


def _as_begun(job: Job, flat: dict, upstream: list[str], run: RunFolder, left: str) -> dict:
    """The same parameters with the threads that the folder's run began with, if it is the same run otherwise."""
    import yaml

    path = run.file("params.yaml")
    threads = yaml.safe_load(path.read_text(encoding="utf-8"))["threads"] if path.exists() else flat["threads"]
    begun = flat | {"threads": threads}
    return begun if job_key(job, begun, upstream) == left else flat


def _empty(folder: Path) -> None:
    """Remove all but the lock."""
    if is_live(folder / "trials.jsonl"):
        raise InputError(f"{folder} has a search of other parameters or code that is running; end it first")
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def execute_notebook(notebook: str, folder: Path) -> None:
    """Run a notebook with the parameters in `folder`, in this process. Raises what papermill raises."""
    import papermill
    import yaml
    from traitlets.config import Config

    run = RunFolder(folder)
    parameters = yaml.safe_load(run.file("params.yaml").read_text(encoding="utf-8"))
    source, target = repository_root() / "notebooks" / f"{notebook}.ipynb", run.file("notebook.ipynb")
    with tempfile.TemporaryDirectory(prefix="drl-") as sockets:  # unnamed, kernels of two runs would share theirs
        manager = {"transport": "ipc", "ip": f"{sockets}/k"}
        papermill.execute_notebook(
            str(source), str(target), parameters=parameters, kernel_name="python3", progress_bar=False,
            cwd=str(repository_root()), config=Config({"KernelManager": manager}),
        )  # fmt: skip


def launch(job: Job, folder: Path, threads: int, timeout: float) -> str:
    """Execute one prepared run in a subprocess of its own process group: `ok`, `failed` or `timeout`."""
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    command = [sys.executable, "-m", "dense_rlhf", "execute", job.notebook, str(folder)]
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            return "ok" if child.wait(timeout) == 0 else "failed"
        except subprocess.TimeoutExpired:
            return "timeout"
        finally:  # also on an interrupt: no kernel is left behind
            _end_group(child)


def _end_group(child: subprocess.Popen) -> None:
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


def run_job(job: Job, folder: Path, threads: int, timeout: float) -> dict:
    """Prepare, execute, and write `run.json` last. Returns its content; status `cached` where nothing had to run."""
    start = time.time()
    try:
        if prepare(job, folder, threads) == "ok":
            return RunFolder(folder).load_json("run.json") | {"status": "cached"}
        status, error = launch(job, folder, threads, timeout), ""
        if status != "ok":
            error = _last_line(folder / "log.txt") if status == "failed" else f"no end after {timeout / 60:.0f} minutes"
    except InputError as problem:
        folder.mkdir(parents=True, exist_ok=True)
        status, error = "failed", str(problem)
    if status == "ok":
        remove_checkpoints(folder)
    key = (folder / "key.txt").read_text() if (folder / "key.txt").exists() else ""
    record = {
        "job": job.name, "notebook": job.notebook, "arm": job.params.arm, "seed": job.params.seed, "status": status,
        "dataset": job.params.data.name, "error": error, "key": key, "started": start, "seconds": time.time() - start,
        **provenance(), "artefacts": artefacts(folder),
    }  # fmt: skip
    write_json(folder / "run.json", record)
    return record


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "ended without a word"


# ---------------------------------------------------------------------------------------------------- the grid


def run_grid(study: StudyParams, say: Callable[[str], None]) -> list[dict]:
    """Run every job, stage by stage, `workers` at a time; a failure stops nothing else. Returns the records."""
    jobs, folder, records = expand(study), runs_folder(study), []
    _forget_stale(folder, {job.name for job in jobs})
    start = time.time()

    def work(job: Job) -> dict:
        record = run_job(job, folder / job.name, threads_of(job, jobs, study.workers), 60 * study.timeout_minutes)
        records.append(record)
        say(f"{len(records):3d}/{len(jobs)}  {record['status']:8s}{record['seconds']:6.0f} s  {job.name}"
            + (f": {record['error']}" if record["error"] else "") + _left(len(records), len(jobs), start))  # fmt: skip
        return record

    pool = ThreadPoolExecutor(study.workers)
    try:
        for stage in sorted({job.stage for job in jobs}):
            for _ in pool.map(work, [job for job in jobs if job.stage == stage]):
                pass
    finally:
        pool.shutdown(cancel_futures=True)
    return sorted(records, key=lambda record: record["job"])


def threads_of(job: Job, jobs: list[Job], workers: int) -> int:
    """A job's share of the cores among those of its stage that run at once."""
    at_once = min(workers, sum(other.stage == job.stage for other in jobs))
    return max(1, len(os.sched_getaffinity(0)) // at_once)


def _left(done: int, total: int, start: float) -> str:
    if done == total:
        return ""
    return f"   (about {(time.time() - start) / done * (total - done) / 60:.0f} min left)"


def _forget_stale(folder: Path, names: Iterable[str]) -> None:
    """Runs of jobs that the study no longer has must not reach its comparison."""
    for record in folder.glob("*/run.json"):
        if record.parent.name not in names:
            stale = json.loads(record.read_text(encoding="utf-8")) | {"status": "stale"}
            write_json(record, stale)


QUICK_ARMS = {
    "sparse": ShapeParams(("terminal",)), "uniform": ShapeParams(("uniform",)),
    "shap-signed": ShapeParams(("shap",), normalise="signed"),
}  # fmt: skip


def quick_study(params: RunParams, folder: Path, progress: Callable = iter) -> None:
    """Train three arms in this process and leave their run folders under `folder`: a comparison to play with."""
    from dense_rlhf.bilevel import judge_against_reference, load_task, train_policy

    task = load_task(params.data, params.policy, params.reward, params.ppo, progress)
    prompts = task.data.validation_prompts[: params.evaluation.prompts]
    for arm, shape in QUICK_ARMS.items():
        run = RunFolder(folder / f"04_ppo-{arm}-seed{params.seed}")
        trained = train_policy(task, shape.reward_shape(), params.ppo, params.attribution, params.seed, progress)
        run.save_table("history", trained.history)
        run.save_table("seconds", trained.seconds)
        run.save_table("evaluation", judge_against_reference(task, trained.policy, prompts, params.ppo, params.seed))
        record = {"notebook": "04_ppo", "arm": arm, "seed": params.seed, "dataset": params.data.name, "status": "ok"}
        write_json(run.file("run.json"), record)


def describe(job: Job) -> str:
    """One line of a dry run."""
    shape: ShapeParams = job.params.shape
    if job.notebook not in ("04_ppo", "05_bayesian_optimisation"):
        return job.name
    weights = shape.weights if isinstance(shape.weights, str) else "/".join(f"{w:g}" for w in shape.weights)
    return f"{job.name}  [{' + '.join(shape.sources)}: {weights}, {shape.normalise}]"
