"""What a study runs, in which order, from which inputs, and why each run would run again.

Order: reward model, and meanwhile the notebook that trains the second judge; searches and choices of step
sizes, the longest first; policies; what nothing waits for; the comparison.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from dense_rlhf.attribution import SOURCES
from dense_rlhf.bayesopt.ledger import trial_seed
from dense_rlhf.config.params import ABLATIONS, BENCHMARKS, DRAWN, RunParams, ShapeParams
from dense_rlhf.config.parse import module_file, named
from dense_rlhf.config.study import StudyParams
from dense_rlhf.data import DATASETS
from dense_rlhf.files import content_key, settled_sha256
from dense_rlhf.fingerprint import cell_imports, dependencies, source_key
from dense_rlhf.runs import RunFolder, altered, environment_key, workspace
from dense_rlhf.shaping.features import check_features
from dense_rlhf.types import InputError

COMPARING = ("06_comparison", "07_overoptimisation", "08_critic", "09_verdicts")  # notebooks that read all policies
SHOWN_BY = ("view", "report", "runner", "evaluation")  # packages whose code changes what a page shows, and no training
SHOWING = ("notebook", "source", "shown")  # inputs that can change while every training stays what it is
LONG = {"05_bayesian_optimisation": -2, "11_step_size": -1}  # notebooks of many trainings, the longest first
RESULTS = {"shape": "weights", "step_size": "step size"}  # metrics that other runs take, in words
MOST = 5000  # runs of a study
RENDERED = "rendered again: "  # begins a reason that repeats no training


@dataclass(frozen=True)
class Job:
    """One notebook run."""

    name: str
    notebook: str
    stage: int
    params: RunParams
    weights_from: str | None = None  # the job whose search learns this one's weights
    step_from: str | None = None  # the job that chooses this one's step size
    reads: tuple[str, ...] = ()  # the jobs whose finished runs it compares

    @property
    def needs(self) -> tuple[str, ...]:
        """The jobs without whose results this one cannot run."""
        return tuple(filter(None, (self.weights_from, self.step_from)))

    @property
    def upstream(self) -> tuple[str, ...]:
        return (*self.needs, *self.reads)


# ---------------------------------------------------------------------------------------------------- expansion


def check_names(study: StudyParams) -> None:
    """Raise `InputError` for a dataset, source or feature that no registry has, and for a seed that is a trial's."""
    for data in study.datasets:
        named(DATASETS, data.name, "data.name")
    for arm, shape in study.arms.items():
        for source in shape.sources:
            named(SOURCES, source, f"arms.{arm}.sources")
        check_features(f"arms.{arm}.features", shape.features)
        if shape.is_learned and not {"04_ppo", "05_bayesian_optimisation"} <= set(study.notebooks):
            raise InputError(f"arms.{arm} learns its weights: notebooks must name 04_ppo and 05_bayesian_optimisation")
        most = max(run.bo.trials for run in study.comparisons) if shape.is_learned else 0
        trials = {trial_seed(seed, trial) for seed in search_seeds(study) for trial in range(most)}
        if known := [seed for seed in study.seeds if seed in trials]:
            raise InputError(f"seeds: {known[0]} is a trial's of the search for arms.{arm}; policies want fresh seeds")
    if study.step_sizes and tuning_seed(study) in study.seeds:
        raise InputError(f"seeds: {tuning_seed(study)} chooses the step sizes; policies want fresh seeds")
    for run in study.comparisons:
        check_features("bo.features", run.bo.features)


def expand(study: StudyParams) -> list[Job]:
    """datasets x settings x arms x seeds, as jobs in the order in which they can run.

    Raises `InputError` for more than `MOST`, and for names that make two runs of one name.
    """
    policies = len(study.seeds) * (len(study.arms) * (1 + study.common_step) + len(study.longer))
    compared = len(study.datasets) * max(1, len(study.settings))
    if (number := compared * (len(study.notebooks) + policies * ("04_ppo" in study.notebooks))) > MOST:
        raise InputError(f"the study has {number:,} runs, wanted {MOST:,} at most; name fewer arms, seeds or settings")
    check_names(study)
    jobs: list[Job] = []
    for run in study.comparisons:
        several = [run.data.short_name] * (len(study.datasets) > 1) + [run.setting] * bool(run.setting)
        prefix, base = "".join(f"{name}-" for name in several), drawn(study, run, study.seeds[0])
        arms = [
            job
            for arm, shape in study.arms.items()
            for job in _arm_jobs(study, replace(run, arm=arm, shape=shape), prefix)
        ]
        policies = tuple(job.name for job in arms if job.notebook == "04_ppo")
        single = {"01_reward_model": 0, "04_one_update": 0, "02_attribution": 4, "03_shaping": 4}
        single |= dict.fromkeys(COMPARING, 5) | dict.fromkeys(ABLATIONS + BENCHMARKS, 1)
        for notebook in [n for n in study.notebooks if n in single]:
            reads = policies if notebook in COMPARING else ()
            jobs.append(Job(prefix + Path(notebook).name, notebook, single[notebook], base, reads=reads))
        jobs += arms
    if doubled := [name for name, times in Counter(job.name for job in jobs).items() if times > 1]:
        raise InputError(f"two runs would be called {doubled[0]}; give data (called) or settings other names")
    # long jobs first within a stage, so that no worker ends up alone with one
    return sorted(jobs, key=lambda job: (job.stage, LONG.get(job.notebook, 0)))


def drawn(study: StudyParams, params: RunParams, seed: int) -> RunParams:
    """The parameters with what `study.redraws` names drawn by this seed."""
    redrawn = {"proxy": "reward", "explainer": "attribution"}
    groups = {group: getattr(params, group) for what, group in redrawn.items() if what in study.redraws}
    groups = {name: replace(group, seed=group.seed + seed) for name, group in groups.items()}
    return replace(params, seed=seed, **groups)


def search_seeds(study: StudyParams) -> tuple[int, ...]:
    """A search for each of these: the first seed's weights are all seeds' unless the search is redrawn."""
    return study.seeds if "search" in study.redraws else study.seeds[:1]


def tuning_seed(study: StudyParams) -> int:
    """The seed of the trainings that choose a step size, which no policy and no trial has."""
    return study.seeds[0] + 500


def _arm_jobs(study: StudyParams, params: RunParams, prefix: str) -> list[Job]:
    """The searches for an arm's weights, the choice of its step size, its policies."""
    if params.shape.weights == DRAWN:
        params = replace(params, bo=replace(params.bo, strategy="random"))
    jobs, searches = [], dict.fromkeys(study.seeds)
    if params.shape.is_learned:
        for seed in search_seeds(study):
            name = f"{prefix}05_bayesian_optimisation-{params.arm}" + f"-seed{seed}" * ("search" in study.redraws)
            jobs.append(Job(name, "05_bayesian_optimisation", 1, drawn(study, params, seed)))
            searches |= {other: name for other in study.seeds if other == seed or "search" not in study.redraws}
    if "04_ppo" not in study.notebooks:
        return jobs
    stage, step, first = 1 + params.shape.is_learned, None, study.seeds[0]
    if study.step_sizes:
        tried = replace(drawn(study, params, first), seed=tuning_seed(study), step_sizes=study.step_sizes)
        jobs.append(Job(step := f"{prefix}11_step_size-{params.arm}", "11_step_size", stage, tried, searches[first]))
        stage += 1
    for seed in study.seeds:
        for regime, one in _regimes(study, drawn(study, params, seed)).items():
            name = "-".join(filter(None, (params.arm, regime * (regime != "own"), f"seed{seed}")))
            own = step if regime != "common-step" else None
            jobs.append(Job(f"{prefix}04_ppo-{name}", "04_ppo", stage, one, searches[seed], own))
    return jobs


def _regimes(study: StudyParams, params: RunParams) -> dict[str, RunParams]:
    """One seed of an arm at its own step size and, where the study asks for it, at the common one or for longer."""
    regimes = {"own": params}
    if study.common_step:
        regimes["common-step"] = replace(params, regime="common-step")
    if updates := study.longer.get(params.arm):
        regimes["longer"] = replace(params, regime="longer", ppo=replace(params.ppo, updates=updates))
    return regimes


def awaits(job: Job, jobs: Iterable[Job]) -> set[str]:
    """The jobs that must have ended before this one: its upstream, and those that fill the cache of models."""
    return {other.name for other in jobs if other.stage == 0 < job.stage} | set(job.upstream)


def threads_of(jobs: Sequence[Job], workers: int) -> int:
    """Each job's share of the cores, the same for all: sums round alike, so what one has trained the others read."""
    return max(1, len(os.sched_getaffinity(0)) // min(workers, len(jobs)))


def updates_of(job: Job) -> int:
    """PPO updates of a job's trainings, if it can read none of them from another's."""
    run = job.params
    of_search, of_steps = run.bo.trials * run.bo.updates, len(run.step_sizes) * run.ppo.updates
    trained = {"04_ppo": run.ppo.updates, "05_bayesian_optimisation": of_search, "11_step_size": of_steps}
    return trained.get(job.notebook, 0)


def runs_folder(study: StudyParams) -> Path:
    return workspace() / "runs" / study.study


def describe(job: Job) -> str:
    """Its name, and for one with an arm the rewards."""
    shape: ShapeParams = job.params.shape
    if job.notebook not in ("04_ppo", *LONG):
        return job.name
    weights = shape.weights if isinstance(shape.weights, str) else "/".join(f"{w:g}" for w in shape.weights)
    return f"{job.name}  [{' + '.join(shape.sources)}: {weights}, {shape.normalise}]"


# ---------------------------------------------------------------------------------------------------- inputs


def learned_params(job: Job, runs: Path) -> RunParams:
    """The job's parameters, with the weights that its search among `runs` has learned (`shape` of its metrics) and the
    step size that was chosen for it (`step_size`)."""
    params = job.params
    if job.weights_from:
        learned = _result(job, job.weights_from, "shape", runs)
        params = replace(params, shape=ShapeParams(**asdict(params.shape) | learned))
    if job.step_from:
        params = replace(params, ppo=replace(params.ppo, lr=_result(job, job.step_from, "step_size", runs)))
    return params


def _result(job: Job, needed: str, name: str, runs: Path) -> object:
    """One of the metrics of a job that this one needs."""
    if not (result := RunFolder(runs / needed).load_json("metrics.json").get(name)):
        raise InputError(f"{job.name} needs the {RESULTS[name]} of {needed}, which did not finish")
    return result


def inputs(job: Job, flat: dict, runs: Path) -> dict:
    """All that decides a run: its key is their hash. Without `SHOWING` they are what its trainings depend on.

    `source` is all code that the notebook imports, `training` the part of it that can change a number that was
    trained; `upstream` has the training keys of the finished runs that it reads, `shown` their keys.
    """
    notebook = workspace() / "notebooks" / f"{job.notebook}.ipynb"
    try:
        cells, modules = _cells(notebook, notebook.stat().st_mtime_ns)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # no file, or no notebook
        problem = f"{type(error).__name__}: {error}"
        raise InputError(f"{notebook} is no notebook that can be read ({problem}); restore it") from error
    records = {name: RunFolder(runs / name).record() for name in job.upstream}
    finished = {name: record for name, record in records.items() if record.get("status") == "ok"}
    return {
        "notebook": cells,
        "source": source_key(*modules),
        "training": source_key(*(module for module in modules if module.split(".")[1] not in SHOWN_BY)),
        "locks": environment_key(),
        "parameters": flat,
        "files": _files(flat),
        "upstream": {name: record.get("training_key") for name, record in finished.items()},
        "shown": {name: record.get("key") for name, record in finished.items()},
    }


def key_of(inputs: dict) -> str:
    """Hash of what decides a run: a file counts by its content and its name, wherever it lies."""
    files = inputs.get("files", ())
    named = {name: Path(value).name for name, value in inputs["parameters"].items() if name in files}
    return content_key(inputs | {"parameters": inputs["parameters"] | named})


def _where_left(now: dict, left: dict) -> dict:
    """Inputs with the places of `left` for files that are the same: those may have moved since."""
    own, places = now["parameters"], left.get("parameters", {})
    same = [name for name, sha in now["files"].items() if name in own and left.get("files", {}).get(name) == sha]
    moved = {name: places[name] for name in same if Path(str(places.get(name))).name == Path(own[name]).name}
    return now | {"parameters": own | moved}


def training_inputs(inputs: dict) -> dict:
    """What the trainings of a run depend on."""
    return {name: value for name, value in inputs.items() if name not in SHOWING}


@cache
def _cells(notebook: Path, changed: int) -> tuple[str, tuple[str, ...]]:
    """Hash of the code cells, and the modules that they need. A study overrides the cell tagged `parameters`."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = [
        cell for cell in cells if cell["cell_type"] == "code" and "parameters" not in cell["metadata"].get("tags", [])
    ]
    sources = ["".join(cell["source"]) for cell in code]
    return content_key(sources), tuple(sorted(dependencies(cell_imports(sources))))


def _files(flat: dict) -> dict[str, str]:
    """Hashes of local files, models and modules that parameters name; the hub is not asked where a branch is now."""
    named = {
        name: Path(value)
        for name, value in flat.items()
        if value and (name.endswith("_path") or name in ("policy_name", "reward_name"))
    }
    named |= {path: Path(path) for path in flat["downstream_checkpoints"]}
    named |= {name: path for name in (flat["data_name"], *flat["shape_sources"]) if (path := module_file(name))}
    named = {name: path for name, path in named.items() if os.path.exists(path)}
    try:
        paths = {name: sorted(path.iterdir()) if path.is_dir() else [path] for name, path in named.items()}
        return {
            name: content_key([[path.name, settled_sha256(path)] for path in found if path.is_file()])
            for name, found in paths.items()
        }
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error


# ---------------------------------------------------------------------------------------------------- the reason


@dataclass(frozen=True)
class Verdict:
    """What a run would read now, and the reason to run; none where a run of the same is finished and intact."""

    inputs: dict
    why: str
    same: bool  # the trainings that the folder holds, finished or not, depend on the same
    broken: tuple[str, ...] = ()  # artefacts that are missing or altered

    @property
    def key(self) -> str:
        return key_of(self.inputs)


def judge(job: Job, folder: Path, threads: int) -> Verdict:
    """Compare a run's inputs with those that its folder was left by. Raises `InputError` without learned weights."""
    run = RunFolder(folder)
    left, record = run.inputs(), run.record()
    flat, own = learned_params(job, folder.parent).flat(), job.params.threads
    now = inputs(job, flat | {"threads": own or threads}, folder.parent)
    if own is None and left:  # begun on another number of cores it is still the same run
        begun = now | {"parameters": flat | {"threads": left["parameters"].get("threads")}}
        now = begun if _where_left(begun, left) == left else now
    if left != (met := _where_left(now, left)):
        same = bool(left) and training_inputs(left) == training_inputs(met)
        shown = RENDERED if same and record.get("status") in ("ok", "stale") else ""
        return Verdict(now, shown + (_changes(left, met) if left else "new"), same)
    if record.get("status") not in ("ok", "stale") or record.get("key") != key_of(now):
        return Verdict(now, f"{record['status']} before" if "status" in record else "did not finish", same=True)
    broken = altered(folder, record)
    return Verdict(now, f"{', '.join(broken)}: missing or altered" if broken else "", same=True, broken=tuple(broken))


def _changes(left: dict, now: dict) -> str:
    """Which inputs differ, in words."""
    labels = {
        "notebook": "notebook changed",
        "training": "source of its trainings changed",
        "source": "source of what it shows changed",
        "locks": "packages changed",
    }
    changed = [name for name in labels if left.get(name) != now[name]]
    found = [labels[name] for name in changed if not (name == "source" and "training" in changed)]
    for name in ("parameters", "files", "upstream", "shown"):
        old, new = left.get(name, {}), now[name]
        names = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        if name == "parameters":
            names = [f"{key} {old.get(key)} -> {new.get(key)}" for key in names]
        if names:
            more = f" and {len(names) - 3} more" if names[3:] else ""
            found.append(f"{'upstream' if name == 'shown' else name} changed: {', '.join(names[:3])}{more}")
    return "; ".join(found)


def reasons(jobs: list[Job], runs: Path, workers: int, force: bool = False) -> dict[str, str]:
    """Why each job would run, in their order; empty for one that is finished."""
    found: dict[str, str] = {}
    for job in jobs:
        upstream = "forced" if force else _upstream(job, found)
        own = "" if act(upstream) == "run" else _reason(job, runs / job.name, threads_of(jobs, workers))
        found[job.name] = own if act(own) == "run" else upstream or own
    return found


def _upstream(job: Job, why: dict[str, str]) -> str:
    """The reason that those which a job reads give it; those that train again come first."""
    again = sorted((name for name in job.upstream if why.get(name)), key=lambda name: act(why[name]) == "render")
    if not again:
        return ""
    more = f" and {len(again) - 1} more" if again[1:] else ""
    return (RENDERED if act(why[again[0]]) == "render" else "") + f"upstream runs: {again[0]}{more}"


def act(why: str) -> str:
    """What a reason leads to: `cached` where there is none, `render` where no training is repeated, else `run`."""
    return ("render" if why.startswith(RENDERED) else "run") if why else "cached"


def _reason(job: Job, folder: Path, threads: int) -> str:
    try:
        return judge(job, folder, threads).why
    except InputError as problem:  # another process may be about to change that
        return str(problem)
