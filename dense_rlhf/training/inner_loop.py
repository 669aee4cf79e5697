"""The inner loop: train a policy with one reward shape."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from dense_rlhf import ppo
from dense_rlhf.attribution import attribute
from dense_rlhf.config.params import AttributionParams, PPOParams, RunParams
from dense_rlhf.config.parse import module_file
from dense_rlhf.files import content_key, lock, settled_sha256
from dense_rlhf.fingerprint import source_key
from dense_rlhf.models.language_models import machine
from dense_rlhf.models.policy import PolicyWithValue
from dense_rlhf.models.reward_model import RewardModel
from dense_rlhf.ppo.checkpoint import checkpoint_at, discard_damaged, keep, resume, save_failure
from dense_rlhf.ppo.distributed import Alone
from dense_rlhf.ppo.rollout import response_texts
from dense_rlhf.ppo.sampling import prompt_batches
from dense_rlhf.ppo.warnings import Sign, diagnose
from dense_rlhf.shaping.rewards import Shaped, shaped
from dense_rlhf.training.task import Task, step_seed
from dense_rlhf.types import InputError, Prompt, RewardShape, Rollout

RANKS = 1_000_000_007  # between the sampling seeds of two processes


@dataclass(frozen=True)
class Recipe:
    """All that decides a training, besides its task."""

    shape: RewardShape
    ppo: PPOParams
    attribution: AttributionParams
    seed: int

    @classmethod
    def of(cls, params: RunParams) -> Recipe:
        """The training that the parameters of a run describe."""
        return cls(params.shape.reward_shape(), params.ppo, params.attribution, params.seed)


@dataclass(frozen=True)
class Session:
    """How a training is shown, kept, shared among processes and ended early; changes none of its numbers."""

    progress: Callable = iter
    watch: Callable[[dict], None] | None = None  # called with the metrics of each update
    folder: Path | None = None  # of checkpoints, and of the rollout of a training that diverged
    stages: Path | None = None  # where all runs keep their trainings by content, in place of checkpoints in `folder`
    processes: Alone | None = None
    until: Callable[[list[dict]], bool] | None = None  # asked before each update, with all metrics, whether to stop

    def __post_init__(self):
        if self.stages and self.processes and self.processes.world > 1:
            raise InputError(f"stages are shared by trainings of one process, this is of {self.processes.world}")


@dataclass(frozen=True)
class TrainedPolicy:
    """A policy and the record of its training."""

    policy: PolicyWithValue
    history: pd.DataFrame  # metrics, a row an update
    seconds: pd.DataFrame  # wall time, a row an update: sample, explain, learn
    warnings: list[Sign] = field(default_factory=list)
    read: int = 0  # updates that were trained earlier, and read

    @property
    def about(self) -> dict[str, float]:
        """For metrics: updates, how many of them were read, and the seconds of all when they were trained."""
        parts = self.seconds.drop(columns="update", errors="ignore")
        return {"updates": len(self.history), "read": self.read, "seconds": float(parts.to_numpy().sum())}


def train_policy(task: Task, recipe: Recipe, session: Session = Session()) -> TrainedPolicy:
    """Inner loop: sample, explain, shape, improve. The same task and recipe give the same history on one machine.

    A training that was cut short resumes from its checkpoint in `session.folder`. With `session.stages` it resumes from
    any run's, and one that has ended is read; another process that is at the same training is waited for. One that
    meets a number that is not finite leaves its rollout in `session.folder` and raises `Diverged`. An early end is no
    part of a checkpoint.
    """
    recipe = replace(recipe, shape=recipe.shape.effective)
    with _checkpoints(task, recipe, session) as folder:
        return _train(task, recipe, session, folder)


@contextmanager
def _checkpoints(task: Task, recipe: Recipe, session: Session) -> Iterator[Path | None]:
    """The folder of a training's checkpoints: its own, or, locked for as long, the one that its runs share."""
    if session.stages is None:
        yield session.folder
        return
    folder = _shared(task, recipe, session.stages)
    with lock(folder.with_name(f".{folder.name}.lock")):
        discard_damaged(folder)
        yield folder


def _shared(task: Task, recipe: Recipe, stages: Path) -> Path:
    return stages / "training" / content_key([training_key(task, recipe), machine()])


def is_trained(task: Task, recipe: Recipe, stages: Path) -> bool:
    """Whether some run has left this whole training in `stages`."""
    return checkpoint_at(_shared(task, recipe, stages), recipe.ppo.updates).is_dir()


def _train(task: Task, recipe: Recipe, session: Session, folder: Path | None) -> TrainedPolicy:
    params = recipe.ppo
    torch.manual_seed(recipe.seed)
    learner = ppo.make_learner(task.fresh_policy(), params, recipe.seed, session.processes)
    key = training_key(task, recipe)
    history, seconds = resume(folder, key, learner)
    read, batches = len(history), prompt_batches(task.data.train_prompts, params.rollouts, recipe.seed)
    batches = islice(batches, read, None)
    for step in session.progress(range(read, params.updates)):
        if session.until and session.until(history):
            break
        try:
            row, took = _improve(task, learner, recipe, next(batches), step)
        except ppo.Diverged as error:
            raise save_failure(session.folder, step, error, learner.processes) from None
        history.append(row)
        seconds.append({"update": step} | took)
        signs = [sign for sign in diagnose(history) if sign.update == step]
        for sign in signs:
            warnings.warn(f"update {step}: {sign.text}", sign.kind, stacklevel=3)
        if session.watch:
            session.watch(row | took | {"warnings": ", ".join(sign.name for sign in signs)})
        if (step + 1) % params.checkpoint_every == 0 or step + 1 == params.updates:
            keep(folder, key, learner, history, seconds)
    policy = learner.processes.unwrap(learner.policy).eval()
    return TrainedPolicy(policy, pd.DataFrame(history), pd.DataFrame(seconds), diagnose(history), read)


def training_key(task: Task, recipe: Recipe) -> str:
    """What decides a training: a checkpoint of another is not resumed. What changes no reward is no part of it."""
    recipe, code = replace(recipe, shape=recipe.shape.effective), source_key("dense_rlhf.training.inner_loop")
    return content_key([asdict(recipe.shape), *fixed_settings(task, recipe), recipe.seed, code])


def fixed_settings(task: Task, recipe: Recipe) -> list:
    """What decides a training besides its shape, its seed and the code."""
    named = [recipe.attribution.rationale_path, *map(module_file, recipe.shape.sources)]
    files = [settled_sha256(Path(path)) for path in named if path and Path(path).is_file()]
    return [asdict(replace(recipe.ppo, checkpoint_every=1)), asdict(recipe.attribution), files, task.key]


def _improve(
    task: Task, learner: ppo.Learner, recipe: Recipe, prompts: Sequence[Prompt], step: int
) -> tuple[dict[str, float], dict[str, float]]:
    """One update on responses to `prompts`: its metrics, and the seconds that each part took."""
    batch = collect(task, learner, recipe, prompts, step)
    losses = ppo.update(learner, batch.rollout, batch.rewards, recipe.ppo)
    clock = [*batch.clock, time.perf_counter()]
    row = measure(task, batch.rollout, step) | losses | batch.metrics
    learner.follow_kl(row["kl"], recipe.ppo)
    return row, {name: b - a for name, a, b in zip(("sample", "explain", "learn"), clock, clock[1:])}


@dataclass(frozen=True)
class Experience:
    """What an update learns from."""

    rollout: Rollout
    rewards: Tensor  # (B, T), all that a token is paid
    metrics: dict[str, float]  # of shaping and pay
    clock: list[float]  # before sampling, after it, and after explaining


def collect(
    task: Task, learner: ppo.Learner, recipe: Recipe, prompts: Sequence[Prompt], step: int, kl_in_loss: bool = False
) -> Experience:
    """Sample, explain, shape and pay responses to `prompts`; each process does its share, and all get the whole."""
    together, clock = learner.processes, [time.perf_counter()]
    policy, seed = together.unwrap(learner.policy), step_seed(recipe.seed, step) + RANKS * together.rank
    mine = task.rollout(policy, together.share(prompts), recipe.ppo, seed)
    clock.append(time.perf_counter())
    made = explain_and_shape(task.reward_model, mine, recipe)
    diagnostics = together.average(made.diagnostics)
    clock.append(time.perf_counter())
    rollout, dense = together.gather(mine, made.rewards)
    rewards, paid = learner.pay(rollout, dense, recipe.ppo, kl_in_loss)
    return Experience(rollout, rewards, diagnostics | paid, clock)


def explain_and_shape(reward_model: RewardModel, rollout: Rollout, recipe: Recipe) -> Shaped:
    """The shaped rewards of a rollout, from the credit of the sources that have weight."""
    credit = attribute(reward_model, rollout, list(recipe.shape.weighted), recipe.attribution)
    return shaped(rollout, credit, recipe.shape)


def measure(task: Task, rollout: Rollout, step: int) -> dict[str, float]:
    """Training metrics of one batch, before the update that it causes."""
    judged = task.judge(rollout.prompts, response_texts(rollout, task.tokenizer))
    return {
        "update": step,
        "proxy": rollout.scores.mean().item(),
        **{name: sum(scores) / len(scores) for name, scores in judged.items()},
        "kl": ppo.sequence_kl(rollout).mean().item(),
        "length": rollout.mask.sum(-1).float().mean().item(),
    }
