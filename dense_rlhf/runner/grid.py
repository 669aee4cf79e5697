"""Run a study's jobs, each in its turn, continuing after failures; finished ones are not run again."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from dense_rlhf.config.params import BENCHMARKS, UNSEEN, DataParams, RunParams, ShapeParams
from dense_rlhf.config.strict import SHIPPED
from dense_rlhf.config.study import StudyParams
from dense_rlhf.files import content_key, write_json
from dense_rlhf.fingerprint import source_key
from dense_rlhf.runner.console import Screen, tally
from dense_rlhf.runner.execution import Limits
from dense_rlhf.runner.executors import Local
from dense_rlhf.runner.jobs import BAD, blank, cancel, finish, finished, held_by, run_job
from dense_rlhf.runner.plan import Job, awaits, expand, runs_folder, threads_of
from dense_rlhf.runs import GOOD, RunFolder, finished_runs, stages, workspace
from dense_rlhf.types import InputError

MT_BENCH = "downstream.mt_bench_path"
PATIENCE = 1.0  # seconds until a job that another process runs is looked at again


@dataclass
class _Grid:
    """The jobs that have ended, are running, or wait."""

    jobs: list[Job]
    chosen: set[str]  # names of the jobs to run; the others keep their status
    folder: Path
    study: StudyParams
    executor: object  # one of `executors`
    screen: Screen
    force: bool
    max_failures: int | None
    ended: dict[str, dict] = field(default_factory=dict)
    running: dict[Future, Job] = field(default_factory=dict)
    later: dict[str, float] = field(default_factory=dict)  # when to look again at a job that another process runs
    start: float = field(default_factory=time.time)

    def run(self) -> None:
        """Return when all jobs have ended. An interrupt stops the running ones, records that, and is raised again."""
        try:
            while len(self.ended) < len(self.jobs):
                self._start_ready()
                self._collect()
        except KeyboardInterrupt:
            self._interrupt()
            raise

    @property
    def threads(self) -> int:
        return threads_of(self.jobs, self.executor.workers)

    def _start_ready(self) -> None:
        begun = {job.name for job in self.running.values()} | self.ended.keys()
        for job in [job for job in self.jobs if job.name not in begun]:
            if self._failures() >= (self.max_failures or len(self.jobs) + 1):
                self._end(job, blank(job, "cancelled", f"not started, after {self._failures()} failures"))
            elif len(self.running) >= self.executor.workers:
                return
            elif awaits(job, self.jobs) <= self.ended.keys() and self.later.get(job.name, 0) < time.time():
                self._start(job)

    def _failures(self) -> int:
        return sum(record["status"] in BAD for record in self.ended.values())

    def _start(self, job: Job) -> None:
        folder, threads = self.folder / job.name, self.threads
        if reason := self._hopeless(job):
            self._end(job, cancel(job, folder, reason))
        elif held_by(folder):
            self._put_off(job)
        elif not self.force and (record := finished(job, folder, threads)):
            self._end(job, record)
        else:
            limits = Limits(threads, 60 * self.study.timeout_minutes)
            self.running[self.executor.submit(run_job, job, folder, limits, self.force)] = job
            self._show()

    def _hopeless(self, job: Job) -> str:
        """Why a job whose upstream has ended cannot run; a comparison needs only one finished policy."""
        status = {name: self.ended[name]["status"] for name in job.upstream}
        if lost := [name for name in job.needs if status[name] not in GOOD]:
            return f"needs {lost[0]}, which is {status[lost[0]]}"
        if job.reads and not any(status[name] in GOOD for name in job.reads):
            return f"needs a finished policy; none of {len(job.reads)} finished"
        return ""

    def _put_off(self, job: Job) -> None:
        if job.name not in self.later:
            holder = held_by(self.folder / job.name) or "another process"
            self.screen.say(f"waiting for {job.name}, which {holder} runs")
        self.later[job.name] = time.time() + PATIENCE

    def _collect(self) -> None:
        """Record the jobs that have ended; wait a moment if none has."""
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
        """The run's record; `killed` if the executor lost it, `busy` if it is still running."""
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
            recorded = future in done and not future.exception() and future.result()["status"] not in BAD
            if not recorded and not held_by(self.folder / job.name):
                finish(job, self.folder / job.name, "cancelled", "interrupted", time.time())

    # ------------------------------------------------------------------------------------------------ what is shown

    def _end(self, job: Job, record: dict) -> None:
        self.ended[job.name] = record
        if record["status"] != "cached" and not (self.screen.terminal and record["status"] == "ok"):
            count = f"{len(self._statuses()):3d}/{len(self.chosen)}"
            error = f": {record['error']}" if record["error"] else ""
            line = f"{count}  {record['status']:9s}{record['seconds']:6.0f} s  {job.name}{error}"
            self.screen.say(line + self._remaining())
        self._show()

    def _show(self) -> None:
        statuses = self._statuses()
        running = f"{len(statuses)}/{len(self.chosen)} · {len(self.running)} running"
        self.screen.bar(" · ".join([running, *tally(statuses)]) + self._remaining())

    def _statuses(self) -> list[str]:
        """The statuses of the chosen jobs that have ended."""
        return [record["status"] for name, record in self.ended.items() if name in self.chosen]

    def _remaining(self) -> str:
        """The remaining time, estimated from the pace of the runs that were not cached."""
        statuses = self._statuses()
        ran, waiting = sum(status != "cached" for status in statuses), len(self.chosen) - len(statuses)
        minutes = (time.time() - self.start) / ran * waiting / 60 if ran else 0
        return f"   (about {minutes:.0f} min left)" if ran and waiting else ""


def run_grid(
    study: StudyParams,
    screen: Screen | None = None,
    executor=None,
    names: Iterable[str] | None = None,
    force: bool = False,
    max_failures: int | None = None,
) -> list[dict]:
    """Run every job, or those in `names`, as many at a time as the executor takes; a failure stops nothing else.

    With `force` finished jobs run again, and nothing that runs share is read. After `max_failures` nothing more is
    started. Returns the records in order of name.
    """
    jobs, folder = expand(study), runs_folder(study)
    _forget_stale(folder, {job.name for job in jobs})
    if force:
        shutil.rmtree(stages(), ignore_errors=True)
    chosen = {job.name for job in jobs} if names is None else set(names)
    with executor or Local(study.workers) as where:
        grid = _Grid(jobs, chosen, folder, study, where, screen or Screen(), force, max_failures)
        for job in [job for job in jobs if job.name not in chosen]:
            grid.ended[job.name] = finished(job, folder / job.name, grid.threads) or {"status": "pending"}
        grid.run()
    return [grid.ended[name] for name in sorted(chosen)]


def check_data(study: StudyParams) -> None:
    """Read a study's local files and own datasets, before a job starts. Raises `InputError` with parameter and file."""
    rollouts = max(run.ppo.rollouts for run in study.comparisons)
    own = [data for data in study.datasets if data.path or ":" in data.name]
    readers = [(f"data.{'path' if d.path else 'name'}", d.path or d.name, partial(_read, d, rollouts)) for d in own]
    people = {reader[:2]: reader for run in study.comparisons for reader in _readers(run)}
    if set(BENCHMARKS) & set(study.notebooks):
        readers += [reader for run in study.comparisons for reader in _benchmark_readers(run)]
    if UNSEEN in study.notebooks:
        readers += [reader for run in study.comparisons for reader in _question_readers(run.downstream.mt_bench_path)]
    for name, path, load in (*readers, *people.values()):
        try:
            load()
        except InputError as error:
            reason = str(error).removeprefix(f"{name}: ").removeprefix(path).lstrip(": ")
            raise InputError(f"{name} is {path}: {reason}") from error


def _read(data: DataParams, rollouts: int) -> None:
    """Read a dataset. Raises `InputError` unless it has the prompts of one update and words for the gold judge."""
    from dense_rlhf.data import load_data
    from dense_rlhf.models.word_judge import check_words

    read = load_data(data)
    check_words(read.gold)
    number = len(read.train_prompts)
    if number < rollouts:
        raise InputError(f"ppo.rollouts is {rollouts}, but there are {number} training prompts; lower it")


def has_own_models(study: StudyParams) -> bool:
    """Whether models are folders of the user's and nothing comes from a hub, so that all can be checked at once."""
    names = study.run.policy.name, study.run.reward.name
    is_here = [data.path or ":" in data.name or data.name == "reviews" for data in study.datasets]
    return any(map(os.path.isdir, names)) and all(n in SHIPPED or os.path.isdir(n) for n in names) and all(is_here)


def _benchmark_readers(run: RunParams) -> list[tuple[str, str, Callable]]:
    """As `_readers`, for the benchmarks' files. Raises `InputError` where no endpoint is set for the judge."""
    from dense_rlhf.evaluation.judge import alpaca_eval, mt_bench
    from dense_rlhf.evaluation.judge.client import MODEL, connect, setting

    setting(MODEL)
    connect(run.judge)
    alpaca, folder = run.downstream.alpaca_path, run.downstream.mt_bench_path
    readers = [("downstream.alpaca_path", alpaca, partial(alpaca_eval.read_instructions, alpaca))] if alpaca else []
    if folder:
        readers += [(MT_BENCH, folder, partial(mt_bench.read_prompts, folder)), *_question_readers(folder)]
    return readers


def _question_readers(folder: str) -> list[tuple[str, str, Callable]]:
    from dense_rlhf.evaluation.judge import mt_bench

    return [(MT_BENCH, folder, partial(mt_bench.read_questions, folder))]


def _readers(run: RunParams) -> list[tuple[str, str, Callable]]:
    """Parameter, path and loader of each file of human annotations; the loaders are slow to import."""
    names = "attribution.rationale_path", "evaluation.sst_path", "evaluation.toxic_path"
    paths = run.attribution.rationale_path, run.evaluation.sst_path, run.evaluation.toxic_path
    if not any(paths):
        return []
    from dense_rlhf.attribution.human_marks import load_sst_trees, load_toxic_spans
    from dense_rlhf.attribution.human_words import load_rationale_judge

    loaders = load_rationale_judge, load_sst_trees, load_toxic_spans
    return [(name, path, partial(load, path)) for name, path, load in zip(names, paths, loaders) if path]


def _forget_stale(folder: Path, names: Iterable[str]) -> None:
    """Mark the finished runs that the study no longer has as stale: they must not reach its comparison."""
    for path in folder.glob("[!.]*/run.json"):
        record = RunFolder(path.parent).record()
        if path.parent.name not in names and record.get("status") == "ok":
            write_json(path, record | {"status": "stale"}, sealed=True)


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
        if len(list(study.glob("[!.]*/run.json"))) < len(QUICK_ARMS):
            quick_study(params, study, progress)
    return [run for run in finished_runs(Path(study)) if run.record()["dataset"] == params.where]


def quick_study(params: RunParams, folder: Path, progress: Callable = iter) -> None:
    """Train three arms in this process and leave their run folders under `folder`: a comparison to play with."""
    from dense_rlhf.evaluation.arms import judge_against_reference
    from dense_rlhf.training.evaluate import held_out
    from dense_rlhf.training.inner_loop import Recipe, Session, train_policy
    from dense_rlhf.training.task import load_task

    task = load_task(params, progress)
    name, prompts = held_out(task.data, params.evaluation.prompts)
    for arm, shape in QUICK_ARMS.items():
        run = RunFolder(folder / f"04_ppo-{arm}-seed{params.seed}")
        recipe = Recipe.of(replace(params, arm=arm, shape=shape))
        trained = train_policy(task, recipe, Session(progress))
        run.save_table("history", trained.history)
        run.save_table("seconds", trained.seconds)
        run.save_table(name, judge_against_reference(task, trained.policy, prompts, params.ppo, params.seed))
        record = {"notebook": "04_ppo", "arm": arm, "seed": params.seed, "dataset": params.where, "status": "ok"}
        write_json(run.file("run.json"), record, sealed=True)
