"""Train one policy of a study, or search for an arm's weights, without a notebook, in one process or several."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dense_rlhf.config.params import RunParams, ShapeParams
from dense_rlhf.config.strict import shown
from dense_rlhf.config.study import StudyParams, load_study
from dense_rlhf.files import finite, remove_checkpoints, write_json
from dense_rlhf.runner.jobs import prepare
from dense_rlhf.runner.plan import check_names, drawn, expand, runs_folder, threads_of
from dense_rlhf.runs import RunFolder, provenance, python_path, stages, workspace
from dense_rlhf.types import InputError, RewardShape, did_you_mean

if TYPE_CHECKING:
    import pandas as pd

    from dense_rlhf.training.inner_loop import TrainedPolicy
    from dense_rlhf.training.task import Task


def one_run(study: StudyParams, arm: str, seed: int) -> RunParams:
    """The parameters of one policy of a study, at the step size ppo.lr. Raises `InputError` for an unknown or a
    learned arm."""
    check_names(study)
    if _known(study, arm).is_learned:
        raise InputError(
            f"arms.{arm}.weights are learned by the outer loop; run the study, or give them: "
            f"--set 'arms.{arm}.weights=[0.5, 0.5]'"
        )
    return drawn(study, replace(study.run, data=study.datasets[0], arm=arm, shape=study.arms[arm]), seed)


def _known(study: StudyParams, arm: str) -> ShapeParams:
    """An arm of a study of one dataset and no settings."""
    if arm not in study.arms:
        known = ", ".join(study.arms)
        raise InputError(f"--arm is {shown(arm)}, wanted one of {known}{did_you_mean(arm, study.arms)}")
    if len(study.datasets) != 1:
        raise InputError(f"the study has {len(study.datasets)} datasets; choose one with --set 'data={{name: ...}}'")
    if study.settings:
        raise InputError(
            f"the study has the settings {', '.join(study.settings)}; choose by the parameters "
            "themselves: --set settings=null --set ppo.kl_coef=0.1"
        )
    return study.arms[arm]


def train_folder(study: StudyParams, arm: str, seed: int) -> RunFolder:
    return RunFolder(workspace() / "runs" / "train" / f"{study.study}.{arm}-seed{seed}")


def train(study: StudyParams, arm: str, seed: int, tensorboard: bool = False) -> RunFolder:
    """Train, judge and keep one policy: `runs/train/STUDY.ARM-seedN`.

    Holds history.csv, seconds.csv, evaluation.csv, metrics.json, run.json, and `policy/`, a Hugging Face folder with
    adapters merged. A training that the study has run in this workspace is read. Started again after a kill it resumes
    from its checkpoint and ends with the same metrics.
    """
    params, run = one_run(study, arm, seed), train_folder(study, arm, seed)  # before imports that take seconds
    _spare(run, finite(params.flat()))
    import torch

    from dense_rlhf.evaluation.arms import judge_against_reference
    from dense_rlhf.ppo.distributed import these
    from dense_rlhf.training.inner_loop import Recipe, Session, is_trained, train_policy
    from dense_rlhf.training.task import load_task
    from dense_rlhf.view.live import watcher

    recipe, processes = Recipe.of(params), these()
    torch.set_num_threads(params.threads or torch.get_num_threads())
    with processes.one_after_another():  # the first fills the caches
        task = load_task(params)
    shared = stages() if processes.world == 1 and is_trained(task, recipe, stages()) else None
    board = run.path / "tensorboard" if tensorboard else None
    with nullcontext() if processes.rank else watcher(params.ppo.updates, f"{arm} seed {seed}", board) as watch:
        session = Session(watch=watch, folder=run.path, stages=shared, processes=processes)
        trained = train_policy(task, recipe, session)
    prompts = task.data.validation_prompts[: params.evaluation.prompts]
    judged = judge_against_reference(task, trained.policy, prompts, params.ppo, seed)
    if not processes.rank:
        _write(run, task, trained, judged, params, processes.world)
    return run


def _spare(run: RunFolder, flat: dict) -> None:
    """Raise `InputError` where a policy that was trained with other parameters would be replaced."""
    left = run.load_json("run.json").get("params", {})
    if changed := [f"{name} {value} -> {flat[name]}" for name, value in left.items() if flat.get(name, value) != value]:
        raise InputError(
            f"{run.path} holds a policy of other parameters ({changed[0]}); move it away, or --set study=NAME"
        )


def _write(
    run: RunFolder, task: Task, trained: TrainedPolicy, judged: pd.DataFrame, params: RunParams, world: int
) -> None:
    """Write the results of a training, then delete its checkpoint."""
    from dense_rlhf.ppo.checkpoint import save_policy

    for name, table in dict(history=trained.history, seconds=trained.seconds, evaluation=judged).items():
        run.save_table(name, table)
    means = judged[["proxy", "gold", "kl", "win", "reference_gold"]].mean().to_dict()
    warnings = [sign._asdict() for sign in trained.warnings]
    run.save_metrics(means | {"warnings": warnings, "revisions": task.revisions})
    save_policy(trained.policy, task.tokenizer, run.path / "policy")
    record = dict(job=run.path.name, notebook="train", arm=params.arm, seed=params.seed, status="ok")
    record |= dict(dataset=params.where, processes=world, params=finite(params.flat()))
    write_json(run.file("run.json"), record | provenance(), sealed=True)
    remove_checkpoints(run.path)


def search(study: StudyParams, arm: str, progress: Callable = iter) -> tuple[RunFolder, RewardShape | None]:
    """Learn an arm's weights, the first seed's, in the folder of notebook 05; the shape is None if that run has ended.

    The ledger is `trials.jsonl` of the folder, the incumbent's policy `policy/`. Any number of these may run, on
    machines that share the checkout, also while the study runs: each takes the next trial until none is left. All use
    as many threads as the first. Raises `InputError` for an arm whose weights are given.
    """
    if not _known(study, arm).is_learned:
        learned = ", ".join(name for name, shape in study.arms.items() if shape.is_learned)
        raise InputError(
            f"arms.{arm}.weights are given, so there is nothing to learn; learned arms: {learned or 'none'}"
        )
    jobs = expand(study)
    job = next(job for job in jobs if (job.notebook, job.params.arm) == ("05_bayesian_optimisation", arm))
    run = RunFolder(runs_folder(study) / job.name)
    if prepare(job, run.path, threads_of(jobs, study.workers)) == "ok":
        return run, None
    return run, _search(RunParams.read(run.file("params.yaml")), run, progress)


def _search(params: RunParams, run: RunFolder, progress: Callable) -> RewardShape:
    import torch

    from dense_rlhf.training.inner_loop import Recipe
    from dense_rlhf.training.outer_loop import Objective, search_shape
    from dense_rlhf.training.task import load_task

    torch.set_num_threads(params.threads)
    task = load_task(params)
    objective = Objective.of(params.bo, task.data.validation_prompts[: params.evaluation.prompts])
    return search_shape(task, Recipe.of(params), params.bo, objective, run.file("trials.jsonl"), progress)[0]


def launch(
    study: str | Path,
    arm: str,
    seed: int = 0,
    processes: int = 1,
    settings: Iterable[str] = (),
    config: str | Path | None = None,
) -> RunFolder:
    """Call `train` in `processes` new processes, from a notebook.

    `config` is an accelerate file, such as `params/accelerate/fsdp.yaml`; without one each process has a copy of the
    policy. Raises `InputError` with the reason of a training that failed.
    """
    wanted, last = load_study(Path(study), settings), ""
    one_run(wanted, arm, seed)
    accelerate = ["accelerate.commands.launch", "--config_file", str(config), "--num_processes", str(processes)]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]  # on a CPU the only one
    command = [sys.executable, "-m", *(accelerate if config else torchrun)]
    command += ["-m", "dense_rlhf", "train", str(study), "--arm", arm, "--seed", str(seed)]
    for pair in settings:
        command += ["--set", pair]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    child = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": python_path()}, **piped)
    for line in child.stdout:
        last = line.strip() if line.startswith("error: ") or not last.startswith("error: ") else last
        print(line, end="", flush=True)
    if child.wait():
        raise InputError(f"the training ended with code {child.returncode}: {last}")
    return train_folder(wanted, arm, seed)
