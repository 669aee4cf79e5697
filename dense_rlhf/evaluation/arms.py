"""Arms compared: shapes trained from the same reference with the same updates, prompts and seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd

from dense_rlhf.config.params import PPOParams, RunParams
from dense_rlhf.evaluation.judge.length_control import FEWEST, length_controlled
from dense_rlhf.evaluation.judge.scored import win_rate
from dense_rlhf.files import Journal, content_key, finite
from dense_rlhf.models.policy import PolicyWithValue
from dense_rlhf.training.evaluate import evaluate
from dense_rlhf.training.inner_loop import Recipe, train_policy, training_key
from dense_rlhf.training.task import Task
from dense_rlhf.types import Prompt, RewardShape

KEPT = ["update", "gold", "proxy", "kl", "length", "value_loss", "explained_variance"]  # of a training's history
JUDGED = ["gold", "proxy", "kl", "win", "reference_gold", "reference_proxy"]


@dataclass(frozen=True)
class Arms:
    """What each arm reached on held-out prompts, and its training metrics."""

    judged: dict[str, list[pd.DataFrame]]  # arm, the reference first: a table a seed, columns gold, proxy, kl, win
    history: pd.DataFrame  # `KEPT`, a row an update, with columns arm and seed
    warnings: dict[str, list[str]]  # arm: names of the signs of a training that goes wrong


def recipes(
    shapes: Mapping[str, RewardShape], params: RunParams, seeds: Sequence[int]
) -> dict[tuple[str, int], Recipe]:
    """A training for each arm and seed, seeds outermost, so that arms are comparable after each round."""
    return {
        (arm, seed): Recipe(shape, params.ppo, params.attribution, seed)
        for seed in seeds
        for arm, shape in shapes.items()
    }


def train_arms(
    task: Task,
    recipes: Mapping[tuple[str, int], Recipe],
    prompts: Sequence[Prompt],
    ledger: Path,
    progress: Callable = iter,
) -> Arms:
    """Train a policy for each arm and seed, judge its answers to held-out `prompts` next to the reference's.

    Each training is a line of `ledger`: a comparison that was cut short resumes after the last. Equal recipes are
    trained once.
    """
    journal, lines = Journal(ledger), []
    for (arm, seed), recipe in progress(list(recipes.items())):
        key = content_key([training_key(task, recipe), [str(prompt) for prompt in prompts]])
        line = journal.get_or_make(key, partial(_trained, task, arm, recipe, prompts))
        lines.append(line | {"arm": arm, "seed": seed})
    return _collect(lines)


def _trained(task: Task, arm: str, recipe: Recipe, prompts: Sequence[Prompt]) -> dict:
    trained = train_policy(task, recipe)
    judged = judge_against_reference(task, trained.policy, prompts, recipe.ppo, recipe.seed)
    return {
        "arm": arm,
        "seed": recipe.seed,
        "history": finite(trained.history[KEPT].to_dict("list")),
        "warnings": [sign.name for sign in trained.warnings],
        "judged": judged[JUDGED].to_dict("list"),
    }


def _collect(lines: list[dict]) -> Arms:
    judged: dict[str, list[pd.DataFrame]] = {"reference": []}
    first = lines[0]["arm"]
    for line in lines:
        table = pd.DataFrame(line["judged"])
        judged.setdefault(line["arm"], []).append(table)
        if line["arm"] == first:  # the reference gives every arm the same answers
            before = table[["reference_gold", "reference_proxy"]].set_axis(["gold", "proxy"], axis=1)
            judged["reference"].append(before.assign(kl=0.0, win=0.5))
    history = [pd.DataFrame(line["history"]).assign(arm=line["arm"], seed=line["seed"]) for line in lines]
    warnings = {arm: sorted({w for line in lines if line["arm"] == arm for w in line["warnings"]}) for arm in judged}
    return Arms(judged, pd.concat(history, ignore_index=True), warnings)


def judge_against_reference(
    task: Task,
    policy: PolicyWithValue,
    prompts: Sequence[Prompt],
    params: PPOParams,
    seed: int,
    stages: Path | None = None,
) -> pd.DataFrame:
    """`evaluate`, with columns on the reference's answers to the same prompts: `reference_` and each score's name, win,
    and with at least five prompts win_lc, the win at equal length."""
    judged, before = (evaluate(task, p, prompts, params, seed, stages) for p in (policy, task.reference))
    win = win_rate(judged["gold"], before["gold"])
    known = {"win_lc": length_controlled(win, judged["response"], before["response"])} if len(win) >= FEWEST else {}
    scores = before.drop(columns=["prompt", "response", "kl"]).add_prefix("reference_")
    return judged.join(scores).assign(win=win, **known)
