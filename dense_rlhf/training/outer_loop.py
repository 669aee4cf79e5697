"""The outer loop: `search_shape` learns the weights of a reward shape from policies that `train_policy` trains."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd

from dense_rlhf import ppo
from dense_rlhf.bayesopt.ledger import Halfway, Ledger
from dense_rlhf.bayesopt.search import Search
from dense_rlhf.bayesopt.space import Point, Space
from dense_rlhf.config.params import BOParams
from dense_rlhf.files import content_key, damaged, lock, read_json, remove_checkpoints, write_folder, write_json
from dense_rlhf.fingerprint import source_key
from dense_rlhf.models.policy import PolicyWithValue
from dense_rlhf.ppo.checkpoint import save_policy
from dense_rlhf.training.evaluate import check_prompts, evaluate
from dense_rlhf.training.inner_loop import Recipe, Session, TrainedPolicy, fixed_settings, train_policy
from dense_rlhf.training.task import Task
from dense_rlhf.types import InputError, Prompt, RewardShape


def search_space(shape: RewardShape, bo: BOParams) -> Space:
    """Points are the weights of the sources, then, where searched, log temperatures, the sign switch, and slopes.

    Slopes are a row a source, a number a feature; the last source's are zero, since only differences matter. The
    numbers of a source without weight change nothing, nor do the slopes of one with all weight: they are idle.
    Raises `InputError` where a search would change nothing.
    """
    bo.check(shape)
    K, F = len(shape.sources), len(bo.features)
    temperatures = {"fixed": 0, "shared": 1, "each": K}[bo.temperature]
    bounds = ((math.log(bo.temperature_low), math.log(bo.temperature_high)),) * temperatures
    slopes, first = ((-bo.slope, bo.slope),) * ((K - 1) * F), temperatures + bo.signs
    idle = [(k, k, 0.0) for k in range(K) if bo.temperature == "each"]
    idle += [(first + i, i // F, value) for i in range(len(slopes)) for value in (0.0, 1.0)]
    return Space(K, bounds + ((0.0, 1.0),) * bo.signs + slopes, (temperatures,) * bo.signs, tuple(idle))


def shape_at(shape: RewardShape, bo: BOParams, point: Point) -> RewardShape:
    """The shape at a point of `search_space`; what is not searched is the given shape's."""
    K, F, extras = len(shape.sources), len(bo.features), list(point[len(shape.sources) :])
    fields = {"weights": tuple(point[:K])}
    if bo.temperature != "fixed":
        n = K if bo.temperature == "each" else 1
        logs, extras = extras[:n], extras[n:]
        fields["temperature"] = tuple(map(math.exp, logs)) if n == K else math.exp(logs[0])
    if bo.signs:
        fields["normalise"] = "signed" if extras.pop(0) else "softmax"
    if F:
        rows = [tuple(extras[i * F : (i + 1) * F]) for i in range(K - 1)]
        fields |= {"features": bo.features, "slopes": (*rows, (0.0,) * F)}
    return replace(shape, **fields)


@dataclass(frozen=True)
class Objective:
    """What a search maximises: the mean of `values` of the table of `evaluate` on held-out `prompts`."""

    prompts: tuple[Prompt, ...]
    values: Callable[[pd.DataFrame], Sequence[float]]  # a number a prompt

    def __post_init__(self):
        check_prompts(self.prompts)
        if len(self.prompts) < 2:
            raise InputError(f"{len(self.prompts)} held-out prompts give no standard error; wanted at least 2")

    @classmethod
    def of(cls, bo: BOParams, prompts: Sequence[Prompt]) -> Objective:
        """The objective that `bo.objective` names."""
        return cls(tuple(prompts), partial(OBJECTIVES[bo.objective], bo))


def search_shape(
    task: Task, recipe: Recipe, bo: BOParams, objective: Objective, ledger: Path, progress: Callable = iter
) -> tuple[RewardShape, Search]:
    """Outer loop: propose a shape, train a policy from the reference, observe its `objective` on held-out prompts.

    A trial is the first `bo.updates` updates of `recipe`'s training, on its schedule. A value's standard error is over
    prompts and responses, without what prompts add to all weights alike; how PPO varies between seeds is not in it. The
    weights of `recipe.shape` are ignored. Any number of processes may search on one `ledger` (see
    `dense_rlhf.bayesopt.ledger`): each resumes from it and returns when all trials have ended. Returns the incumbent's
    shape and the search; the incumbent's policy is saved in the folder `policy` next to the ledger.
    Raises `InputError` for the ledger of another search, and for trials longer than the training.
    """
    if bo.updates > recipe.ppo.updates:
        raise InputError(f"bo.updates is {bo.updates}, wanted at most ppo.updates = {recipe.ppo.updates}")
    shape, seed = recipe.shape, recipe.seed
    empty = partial(Search, search_space(shape, bo), bo.strategy, bo.initial, bo.anchors, bo.replicates, seed)
    about = {"search": _search_key(task, recipe, bo, objective), "sources": list(shape.sources)}
    trials = Trials(task, recipe, bo, objective, Ledger(ledger, empty, bo.trials, seed, about))
    search = trials.book.run(trials.run, trials.ended, progress)
    trials.keep_incumbent(search)
    return shape_at(shape, bo, search.incumbent()[0]), search


def _search_key(task: Task, recipe: Recipe, bo: BOParams, objective: Objective) -> str:
    """What decides a search, its code too: the ledger of another is refused. More trials make no other search."""
    shape, prompts = asdict(recipe.shape) | {"weights": None}, list(map(str, objective.prompts))
    name = getattr(objective.values, "__qualname__", None)
    settings, code = [shape, asdict(bo) | {"trials": None}, recipe.seed], source_key("dense_rlhf.training.outer_loop")
    return content_key([*settings, prompts, code, *fixed_settings(task, recipe), name])


@dataclass(frozen=True)
class Trials:
    """How a trial of a search is run, and what is kept of it."""

    task: Task
    recipe: Recipe  # of a trial, apart from its shape and seed
    bo: BOParams
    objective: Objective
    book: Ledger

    @property
    def policy(self) -> Path:
        """The folder of the incumbent's policy."""
        return self.book.path.with_name("policy")

    def train(self, row: dict, until: Callable[[list[dict]], bool] | None = None) -> TrainedPolicy:
        """The policy of a trial, trained from the reference with the shape at its point and its seed."""
        shape = shape_at(self.recipe.shape, self.bo, row["point"])
        recipe = replace(self.recipe, shape=shape, seed=row["seed"])

        def ends(history: list[dict]) -> bool:
            return len(history) == self.bo.updates or until is not None and until(history)

        return train_policy(self.task, recipe, Session(folder=self._folder(row), until=ends))

    def run(self, row: dict) -> tuple[dict, TrainedPolicy | None]:
        """Train and judge one trial: its event in the ledger, and its policy."""
        halfway, rung = Halfway.of(self.book.rows()), max(self.bo.updates // 2, 1)
        stops = (
            self.bo.stop_early and row["point"] not in self.book.empty().space.anchors()
        )  # their repeats measure noise
        until = (lambda history: len(history) == rung and halfway.stops(history[-1]["proxy"])) if stops else None
        try:
            trained = self.train(row, until)
        except ppo.Diverged as error:
            return {"event": "failed", "reason": str(error)}, None
        means, proxy = trained.history.mean(), list(trained.history["proxy"])
        ess = {name.removeprefix("ess/"): mean for name, mean in means.items() if name.startswith("ess/")}
        about = {"updates": len(proxy), "history": proxy, "rung": proxy[rung - 1], "ess": ess}
        if len(proxy) == self.bo.updates:
            return {"event": "observed"} | self.judge(trained.policy) | about, trained
        value, error = halfway.predict(about["rung"])
        about |= {"value": value, "standard_error": error, "correlation": halfway.correlation}
        return {"event": "stopped"} | about, trained

    def judge(self, policy: PolicyWithValue) -> dict[str, float | None]:
        """The value of a policy, its standard error, and the means of proxy, gold and KL.

        All weights answer the same prompts with the same sampler seeds, so what is common to them cannot mislead the
        search: the share of the variance over prompts that the reference's answers have too is no part of the error.
        """
        judged, values = self._judged(policy)
        common = np.corrcoef(values, self._before)[0, 1] if values.std() and self._before.std() else 0.0
        error = float(values.std(ddof=1) * math.sqrt((1 - common) / len(values)))
        means = dict(judged[["proxy", "gold", "kl"]].mean())
        return {"value": float(values.mean()), "standard_error": error or None} | means

    @cached_property
    def _before(self) -> np.ndarray:
        """The objective of the reference's answers, a number a prompt."""
        return self._judged(self.task.reference)[1]

    def _judged(self, policy: PolicyWithValue) -> tuple[pd.DataFrame, np.ndarray]:
        judged = evaluate(self.task, policy, self.objective.prompts, self.recipe.ppo, self.recipe.seed)
        values = np.asarray(self.objective.values(judged), dtype=float)
        if values.shape != (len(judged),):
            raise InputError(f"the objective gave shape {values.shape}, wanted a number for each of {len(judged)}")
        return judged, values

    def ended(self, row: dict, trained: TrainedPolicy | None) -> None:
        """Delete a recorded trial's checkpoints; save its policy if its point is the incumbent."""
        remove_checkpoints(self._folder(row))
        search = self.book.replay()
        if row["status"] == "observed" and len(search.values) > 1 and search.incumbent()[0] == row["point"]:
            self._keep(row, trained)

    def keep_incumbent(self, search: Search) -> None:
        """Train the incumbent's policy again if the saved one is of another point, or, with a warning, damaged."""
        leads = [row for row in self.book.rows() if "value" in row and row["point"] == search.incumbent()[0]]
        leads.sort(key=lambda row: row["status"] == "observed")  # last, if any: `ended` has kept its policy
        with lock(self.book.folder / "policy.lock"):
            file = damaged(self.policy) if self.policy.exists() else None
            if file:
                warnings.warn(f"{file} is not as it was written, so the policy is trained again", stacklevel=2)
            if file or read_json(self.policy / "trial.json") not in map(_identity, leads):
                self._keep(leads[-1], self.train(leads[-1]))
                remove_checkpoints(self._folder(leads[-1]))

    def _keep(self, row: dict, trained: TrainedPolicy) -> None:
        def fill(folder: Path) -> None:
            save_policy(trained.policy, self.task.tokenizer, folder)
            write_json(folder / "trial.json", _identity(row))

        write_folder(self.policy, fill)

    def _folder(self, row: dict) -> Path:
        return self.book.folder / f"{row['trial']:03d}"


def _identity(row: dict) -> dict:
    return {"point": list(row["point"])} | {name: row[name] for name in ("search", "trial", "seed")}


OBJECTIVES: dict[str, Callable[[BOParams, pd.DataFrame], pd.Series]] = {
    "proxy": lambda bo, judged: judged["proxy"],
    "gold": lambda bo, judged: judged["gold"],
    "penalised": lambda bo, judged: judged["proxy"] - bo.kl_weight * judged["kl"],
}
