"""Run a study's jobs, each in its turn, on past failures; what is finished is not run again."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from dense_rlhf.config.params import BENCHMARKS, RunParams, ShapeParams
from dense_rlhf.config.study import StudyParams
from dense_rlhf.files import content_key, write_json
from dense_rlhf.fingerprint import source_key
from dense_rlhf.runner.executors import Local
from dense_rlhf.runner.jobs import BAD, GOOD, STATES, blank, cancel, finish, finished, held_by, run_job
from dense_rlhf.runner.plan import Job, awaits, expand, runs_folder, threads_of
from dense_rlhf.runs import RunFolder, finished_runs, workspace
from dense_rlhf.types import InputError

PATIENCE = 1.0  # seconds until a job that another process runs is looked at again


@dataclass
class _Grid:
    """What has ended, what runs, and what waits."""

    jobs: list[Job]
    chosen: set[str]  # names of those to run; the others only stand as they are
    folder: Path
    study: StudyParams
    executor: object  # of `executors`
    say: Callable[[str], None]
    bar: Callable[[str], None] | None
    force: bool
    max_failures: int | None
    ended: dict[str, dict] = field(default_factory=dict)
    running: dict[Future, Job] = field(default_factory=dict)
    later: dict[str, float] = field(default_factory=dict)  # when to look again at what another process runs
    start: float = field(default_factory=time.time)

    def run(self) -> None:
        """Until all has ended. On an interrupt all that runs is ended and marked before it is raised again."""
        try:
            while len(self.ended) < len(self.jobs):
                self._start_ready()
                self._collect()
        except KeyboardInterrupt:
            self._interrupt()
            raise

    def threads(self, job: Job) -> int:
        return threads_of(job, self.jobs, self.executor.workers)

    def _start_ready(self) -> None:
        active = {job.name for job in self.running.values()}
        for job in [job for job in self.jobs if job.name not in self.ended and job.name not in active]:
            if self._failures() >= (self.max_failures or len(self.jobs) + 1):
                self._end(job, blank(job, "cancelled", f"not begun, after {self._failures()} failures"))
            elif len(self.running) >= self.executor.workers:
                return
            elif awaits(job, self.jobs) <= self.ended.keys() and self.later.get(job.name, 0) < time.time():
                self._start(job)

    def _failures(self) -> int:
        return sum(record["status"] in BAD for record in self.ended.values())

    def _start(self, job: Job) -> None:
        folder, threads = self.folder / job.name, self.threads(job)
        if reason := self._hopeless(job):
            self._end(job, cancel(job, folder, reason))
        elif held_by(folder):
            self._put_off(job)
        elif not self.force and (record := finished(job, folder, threads)):
            self._end(job, record)
        else:
            timeout = 60 * self.study.timeout_minutes
            self.running[self.executor.submit(run_job, job, folder, threads, timeout, self.force)] = job
            self._show()

    def _hopeless(self, job: Job) -> str:
        """Why a job cannot run whose upstream has ended; a comparison takes the policies that there are."""
        status = {name: self.ended[name]["status"] for name in job.upstream}
        search = job.weights_from
        if search and status[search] not in GOOD:
            return f"needs {search}, which is {status[search]}"
        if job.reads and not any(status[name] in GOOD for name in job.reads):
            return f"needs a finished policy; of {len(job.reads)} there is none"
        return ""

    def _put_off(self, job: Job) -> None:
        if job.name not in self.later:
            self.say(f"waiting for {job.name}, which {held_by(self.folder / job.name) or 'another process'} runs")
        self.later[job.name] = time.time() + PATIENCE

    def _collect(self) -> None:
        """Take in what has ended; wait a moment where nothing has."""
        done = wait(self.running, timeout=PATIENCE, return_when=FIRST_COMPLETED).done
        if not self.running and self.later:
            time.sleep(PATIENCE / 4)
        for future in done:
            job = self.running.pop(future)
            record = self._result(job, future)
            if record["status"] == "busy":
                self._put_off(job)
            else:
                self._end(job, record)

    def _result(self, job: Job, future: Future) -> dict:
        """The run's record; `killed` where the executor lost it, `busy` where it runs on without us."""
        try:
            return future.result()
        except Exception as error:  # of Ray or submitit
            folder = self.folder / job.name
            if held_by(folder):
                return {"status": "busy"}
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            return finish(job, folder, "killed", reason, time.time())

    def _interrupt(self) -> None:
        self.executor.stop()
        done = wait(self.running, timeout=10).done
        for future, job in self.running.items():
            told = future in done and not future.exception() and future.result()["status"] not in BAD
            if not told and not held_by(self.folder / job.name):
                finish(job, self.folder / job.name, "cancelled", "interrupted", time.time())

    # ------------------------------------------------------------------------------------------------ what is said

    def _end(self, job: Job, record: dict) -> None:
        self.ended[job.name] = record
        if record["status"] == "cached" or (self.bar and record["status"] == "ok"):
            return self._show()
        count = f"{len(self._records()):3d}/{len(self.chosen)}"
        self.say(
            f"{count}  {record['status']:9s}{record['seconds']:6.0f} s  {job.name}"
            + (f": {record['error']}" if record["error"] else "")
            + self._left()
        )
        self._show()

    def _show(self) -> None:
        if self.bar:
            counts = [f"{n} {name}" for name, n in tally(self._records()).items()]
            self.bar(
                f"{len(self._records())}/{len(self.chosen)} · {len(self.running)} running"
                + "".join(f" · {text}" for text in counts)
                + self._left()
            )

    def _records(self) -> list[dict]:
        """Of the chosen jobs that have ended."""
        return [record for name, record in self.ended.items() if name in self.chosen]

    def _left(self) -> str:
        """An estimate from the pace of what was not cached."""
        ran = sum(record["status"] != "cached" for record in self._records())
        left = len(self.chosen) - len(self._records())
        minutes = (time.time() - self.start) / ran * left / 60 if ran else 0
        return f"   (about {minutes:.0f} min left)" if ran and left else ""


def tally(records: Iterable[dict]) -> dict[str, int]:
    """How many records have each status, in the order of `STATES`."""
    found = Counter(record["status"] for record in records)
    return dict(sorted(found.items(), key=lambda item: STATES.index(item[0])))


def run_grid(
    study: StudyParams,
    say: Callable[[str], None],
    bar: Callable[[str], None] | None = None,
    executor=None,
    names: Iterable[str] | None = None,
    force: bool = False,
    max_failures: int | None = None,
) -> list[dict]:
    """Run every job, or those in `names`, as many at a time as the executor takes; a failure stops nothing else.

    `say` takes lines, `bar` the text of a line that is written over, where there is a terminal. After `max_failures`
    nothing more is begun. Returns the records in order of name.
    """
    jobs, folder = expand(study), runs_folder(study)
    _forget_stale(folder, {job.name for job in jobs})
    chosen = {job.name for job in jobs} if names is None else set(names)
    with executor or Local(study.workers) as where:
        grid = _Grid(jobs, chosen, folder, study, where, say, bar, force, max_failures)
        for job in [job for job in jobs if job.name not in chosen]:
            grid.ended[job.name] = finished(job, folder / job.name, grid.threads(job)) or {"status": "pending"}
        grid.run()
    return [grid.ended[name] for name in sorted(chosen)]


def check_data(study: StudyParams) -> None:
    """Raise `InputError`, naming parameter and file, where a local file cannot be read: before anything is started."""
    from dense_rlhf.data import load_data

    readers = [("data.path", data.path, lambda data=data: load_data(data)) for data in study.datasets if data.path]
    people = {reader[:2]: reader for run in study.comparisons for reader in _readers(run)}
    if set(BENCHMARKS) & set(study.notebooks):
        readers += [reader for run in study.comparisons for reader in _benchmark_readers(run)]
    for name, path, load in (*readers, *people.values()):
        try:
            load()
        except InputError as error:
            raise InputError(f"{name} is {path}: {str(error).removeprefix(f'{path} ')}") from error


def _benchmark_readers(run: RunParams) -> list[tuple[str, str, Callable]]:
    """As `_readers`, of the benchmarks' files. Raises `InputError` where there is no endpoint that could be asked."""
    from dense_rlhf.evaluation.judge import alpaca_eval, mt_bench
    from dense_rlhf.evaluation.judge.client import MODEL, connect, setting

    setting(MODEL)
    connect(run.judge)
    alpaca, folder = run.downstream.alpaca_path, run.downstream.mt_bench_path
    found = [("downstream.alpaca_path", alpaca, partial(alpaca_eval.read_instructions, alpaca))] if alpaca else []
    if folder:
        readers = mt_bench.read_prompts, mt_bench.read_questions
        found += [("downstream.mt_bench_path", folder, partial(read, folder)) for read in readers]
    return found


def _readers(run: RunParams) -> list[tuple[str, str, Callable]]:
    """Parameter, path and loader of what people marked; the loaders are slow to import."""
    people = run.attribution.rationale_path, run.evaluation.sst_path, run.evaluation.toxic_path
    if not any(people):
        return []
    from dense_rlhf.attribution.human_marks import load_sst_trees, load_toxic_spans
    from dense_rlhf.attribution.human_words import load_rationale_judge

    names = "attribution.rationale_path", "evaluation.sst_path", "evaluation.toxic_path"
    return [
        (name, path, partial(load, path))
        for name, path, load in zip(names, people, (load_rationale_judge, load_sst_trees, load_toxic_spans))
        if path
    ]


def _forget_stale(folder: Path, names: Iterable[str]) -> None:
    """Runs of jobs that the study no longer has must not reach its comparison."""
    for record in folder.glob("*/run.json"):
        found = json.loads(record.read_text(encoding="utf-8"))
        if record.parent.name not in names and found.get("status") == "ok":
            write_json(record, found | {"status": "stale"})


QUICK_ARMS = {
    "sparse": ShapeParams(("terminal",)),
    "uniform": ShapeParams(("uniform",)),
    "shap-signed": ShapeParams(("shap",), normalise="signed"),
}


def compared_runs(params: RunParams, study: Path | str | None, progress: Callable = iter) -> list[RunFolder]:
    """The finished runs of a study on the dataset of `params`; without a study, those of `quick_study`, kept by key."""
    if study is None:
        key = content_key([params.flat(), source_key("dense_rlhf.training.inner_loop")])
        study = workspace() / "runs" / "interactive" / f"quick-{key[:12]}"
        if len(list(study.glob("*/run.json"))) < len(QUICK_ARMS):
            quick_study(params, study, progress)
    return [run for run in finished_runs(Path(study)) if run.load_json("run.json")["dataset"] == params.where]


def quick_study(params: RunParams, folder: Path, progress: Callable = iter) -> None:
    """Train three arms in this process and leave their run folders under `folder`: a comparison to play with."""
    from dense_rlhf.evaluation.arms import judge_against_reference
    from dense_rlhf.training.inner_loop import Recipe, Session, train_policy
    from dense_rlhf.training.task import load_task

    task = load_task(params, progress)
    splits = {"evaluation": task.data.validation_prompts, "test": task.data.test_prompts}
    for arm, shape in QUICK_ARMS.items():
        run = RunFolder(folder / f"04_ppo-{arm}-seed{params.seed}")
        recipe = Recipe.of(replace(params, arm=arm, shape=shape))
        trained = train_policy(task, recipe, Session(progress))
        run.save_table("history", trained.history)
        run.save_table("seconds", trained.seconds)
        for name in [name for name, prompts in splits.items() if prompts]:
            held_out = splits[name][: params.evaluation.prompts]
            run.save_table(name, judge_against_reference(task, trained.policy, held_out, params.ppo, params.seed))
        record = {"notebook": "04_ppo", "arm": arm, "seed": params.seed, "dataset": params.where, "status": "ok"}
        write_json(run.file("run.json"), record)
