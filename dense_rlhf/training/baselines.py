"""Baselines by trl on the models and rewards of our PPO: RLOO, GRPO, their dense variants, DPO; and best of n.

They differ in the estimator: advantages, loss and loop are trl's. Prompts, sampler, log-probabilities, rewards,
optimiser and its schedule, numbers of rollouts and of steps, and the history are our PPO's.
"""

from __future__ import annotations

import io
import logging
import math
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dense_rlhf import ppo
from dense_rlhf.config.params import PPOParams
from dense_rlhf.models.dialogue import render
from dense_rlhf.models.language_models import default_device
from dense_rlhf.models.policy import PolicyWithValue
from dense_rlhf.ppo.sampling import prompt_batches
from dense_rlhf.ppo.warnings import diagnose
from dense_rlhf.shaping.masked import masked_whiten
from dense_rlhf.training.dpo import BATCH, QUIET, Pairs, train_dpo, unpadded
from dense_rlhf.training.evaluate import HELD_OUT, check_prompts, judged
from dense_rlhf.training.inner_loop import Recipe, TrainedPolicy, collect, measure
from dense_rlhf.training.task import Task, step_seed
from dense_rlhf.types import InputError, Prompt, Responses

# ---------------------------------------------------------------------------------------------------- advantages


def returns_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """G_t = sum_{s >= t} gamma^(s - t) r_s, (B, T): generalised advantages without a critic at lambda = 1."""
    return ppo.gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)


def leave_one_out_to_go(rewards: Tensor, mask: Tensor, group: int, gamma: float) -> Tensor:
    """Advantages (B, T): the return to go minus its mean over the other responses to the prompt, at the same token.

    A_i,t = G_i,t - 1/(K-1) sum_{j != i} G_j,t: the leave-one-out baseline (Kool et al., 2019) as one that depends on
    time (Peters and Schaal, 2008), with G = 0 after a response's end. Unbiased, as the others are independent of i.
    PRIME (Cui et al., 2025) subtracts the others' mean reward from every token instead, which makes length costly.
    """
    returns = returns_to_go(rewards, mask, gamma).unflatten(0, (-1, group))
    others = (returns.sum(1, keepdim=True) - returns) / (group - 1)
    return (returns - others).flatten(0, 1).masked_fill(~mask, 0)


def normalised_to_go(rewards: Tensor, mask: Tensor, group: int, gamma: float) -> Tensor:
    """Advantages (B, T): the sum from t on of rewards whitened over all tokens of the responses to a prompt.

    A_t = sum_{s >= t} gamma^(s - t) (r_s - mean) / sd: process supervision of GRPO (Shao et al., 2024, section 4.1.3),
    where gamma is 1. Each further token costs the mean, so that a group of positive mean learns to be brief.
    """
    white = [masked_whiten(*rows) for rows in zip(rewards.split(group), mask.split(group))]
    return returns_to_go(torch.cat(white), mask, gamma)


# ---------------------------------------------------------------------------------------------------- on trl's trainers


@dataclass
class Run:
    """A training by one of trl's trainers: its source of rollouts and rewards, and a history like our PPO's."""

    task: Task
    recipe: Recipe
    group: int  # responses to a prompt in one update
    progress: Callable = iter
    kl_in_loss: bool = False  # the penalty; else in the rewards
    history: list[dict[str, float]] = field(default_factory=list)
    clocks: list[list[float]] = field(default_factory=list)
    by_text: dict[str, Prompt] = field(default_factory=dict)  # the prompts, by the text that trl hands on

    @cached_property
    def learner(self) -> ppo.Learner:
        """Policy, optimiser and schedule as our PPO has them."""
        return ppo.make_learner(self.task.fresh_policy(), self.recipe.ppo, self.recipe.seed)

    @cached_property
    def steps(self) -> Iterator[int]:
        """The updates still to come."""
        return iter(self.progress(range(self.recipe.ppo.updates)))

    def prompts(self) -> list[str]:
        """The prompts of all updates in order, rendered, `rollouts / group` an update."""
        params, tokenizer = self.recipe.ppo, self.task.tokenizer
        batches = prompt_batches(self.task.data.train_prompts, params.rollouts // self.group, self.recipe.seed)
        asked = [(render(prompt, tokenizer), prompt) for prompt in chain(*islice(batches, params.updates))]
        self.by_text |= dict(asked)
        return [text for text, _ in asked]

    def collect(self, prompts: Sequence[str]) -> None:
        """End the last update, then `inner_loop.collect`; `group` neighbouring responses have one prompt."""
        if self.history:
            self.learner.schedule.step()
            self.learner.follow_kl(self.history[-1]["kl"], self.recipe.ppo)
        step = next(self.steps)
        asked = [self.by_text.get(text, text) for text in prompts]
        batch = collect(self.task, self.learner, self.recipe, asked, step, self.kl_in_loss)
        self.rollout, self.rewards = batch.rollout, batch.rewards
        self.clocks.append(batch.clock)
        self.history.append(measure(self.task, batch.rollout, step) | batch.metrics)

    def finished(self, metrics: dict[str, list[float]]) -> TrainedPolicy:
        """The policy with its history; trl's `metrics` are a number for each micro-batch."""
        next(self.steps, None)  # lets a progress bar close
        for ours, theirs in (("entropy", "entropy"), ("clipped", "clip_ratio/region_mean")):
            for row, values in zip(self.history, np.reshape(metrics[theirs], (len(self.history), -1))):
                row[ours] = values.mean().item()
        stops = [clock[0] for clock in self.clocks[1:]] + [time.perf_counter()]
        seconds = _seconds([[*clock, stop] for clock, stop in zip(self.clocks, stops)])
        return TrainedPolicy(self.learner.policy.eval(), pd.DataFrame(self.history), seconds, diagnose(self.history))


def _seconds(clocks: list[list[float]]) -> pd.DataFrame:
    """Spans in seconds, a row for each row of four times."""
    spans = pd.DataFrame(np.diff(clocks), columns=["sample", "explain", "learn"])
    return spans.rename_axis("update").reset_index()


class OnRollouts:
    """Mixed into a trainer of trl: rollouts and log-probabilities are those of `run`.

    trl's own code would add special tokens to the prompts, sample padding, and count positions over padding.
    """

    run: Run
    estimate: Callable[[Run], Tensor] | None  # advantages (B, T) in place of trl's (B,)

    def _tokenize_prompts(self, prompts):
        self.run.collect(prompts)
        self.beta = self.run.learner.kl_coef if self.run.kl_in_loss else 0.0
        return unpadded(self.run.rollout.queries, self.run.rollout.query_mask), None, {}

    def _generate_single_turn(self, prompt_ids, images, fields, group=None):
        ids = unpadded(self.run.rollout.responses, self.run.rollout.mask)
        return ids if group is None else (ids, None)  # RLOO's own, and GRPO's

    def _get_per_token_logps_and_entropies(self, model, ids, mask, T, *_, **__):
        rollout = self.run.rollout
        if not torch.is_grad_enabled():  # of the policy that sampled, and of the reference
            return (rollout.ref_logprobs if model is self.ref_model else rollout.logprobs)[:, :T], None, None
        unknown = torch.zeros(len(ids), device=ids.device)
        texts = Responses(ids[:, :-T], mask[:, :-T].bool(), ids[:, -T:], mask[:, -T:].bool(), unknown, unknown.bool())
        logprobs, _, entropies = self.run.learner.policy(texts, self.temperature)
        return logprobs, entropies, None

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        if self.estimate:
            batch["advantages"] = self.estimate(self.run)[:, : batch["completion_ids"].shape[1]]
        return batch

    def log(self, *_):
        """Prints nothing and leaves the metrics for `Run.finished`."""


@contextmanager
def _isolated() -> Iterator[Path]:
    """A folder for trl to write in. Its changes to random generators and accelerate are undone, its logs suppressed."""
    python, numpy, disabled = random.getstate(), np.random.get_state(), logging.root.manager.disable
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        from accelerate.state import AcceleratorState, GradientState, PartialState

        states = [state._shared_state for state in (PartialState, AcceleratorState, GradientState)]
        before = [dict(state) for state in states]
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield Path(folder)
        finally:
            logging.disable(disabled)
            random.setstate(python)
            np.random.set_state(numpy)
            for state, old in zip(states, before):
                state.clear()
                state.update(old)


def _settings(params: PPOParams, group: int, seed: int) -> dict:
    """`params` by trl's names. The KL coefficient is set later: above 0, trl would reload the reference from a hub."""
    micro, cpu = math.gcd(params.minibatch, params.micro_batch), not torch.cuda.is_available()
    steps = params.updates * params.epochs * params.rollouts // params.minibatch
    sample = dict(num_generations=group, max_completion_length=params.max_new_tokens, temperature=params.temperature)
    batch = dict(per_device_train_batch_size=micro, gradient_accumulation_steps=params.minibatch // micro)
    batch |= dict(steps_per_generation=params.rollouts // micro, num_iterations=params.epochs, max_steps=steps)
    loss = dict(epsilon=params.clip, max_grad_norm=params.max_grad_norm, beta=0.0)
    order = dict(seed=seed, shuffle_dataset=False, disable_dropout=True)
    device = dict(use_cpu=cpu, bf16=False, dataloader_pin_memory=not cpu)
    return sample | batch | loss | order | device | QUIET


def _train(run: Run, kind: str, estimate: Callable[[Run], Tensor] | None = None, **settings) -> TrainedPolicy:
    """Train by trl's `kind`; `estimate` gives our advantages (B, T) in place of trl's."""
    with _isolated() as folder:
        import datasets
        import trl

        trainer, config = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
        ours = type(kind, (OnRollouts, trainer), {"run": run, "estimate": staticmethod(estimate) if estimate else None})
        lm, optimizer = run.learner.policy.lm, run.learner.optimizer
        steady = torch.optim.lr_scheduler.MultiplicativeLR(optimizer, lambda step: 1.0)  # `collect` lowers the rate
        teacher = ours(
            lm,
            lambda completion_ids, **_: run.rewards.sum(-1).tolist(),
            config(str(folder), **_settings(run.recipe.ppo, run.group, run.recipe.seed), **settings),
            datasets.Dataset.from_dict({"prompt": run.prompts()}),
            processing_class=run.task.tokenizer,
            optimizers=(optimizer, steady),
        )
        lm.__dict__.pop("forward", None)  # trl's patch: in a copy of this model it would run this one's weights
        teacher.ref_model = run.task.reference.lm
        teacher.train()
        return run.finished(teacher._metrics["train"])


# ---------------------------------------------------------------------------------------------------- the baselines


def rloo(run: Run) -> TrainedPolicy:
    """RLOO by trl (Ahmadian et al., 2024): one clipped ratio a response, leave-one-out advantage of its summed reward.

    The KL penalty is in the reward as in our PPO. Shapes that keep sums all train as the sparse one does.
    """
    return _train(run, "RLOO")


def grpo(run: Run) -> TrainedPolicy:
    """GRPO by trl (Shao et al., 2024): a clipped ratio a token, summed rewards whitened over a prompt's responses.

    The loss is a mean over tokens (trl's default, DAPO) and has the KL penalty, k3. Shapes that keep sums all train as
    the sparse one does.
    """
    return _train(replace(run, kl_in_loss=True), "GRPO")


def rloo_to_go(run: Run) -> TrainedPolicy:
    """`leave_one_out_to_go` in trl's GRPO loss, summed over a response's tokens; the KL penalty is in the rewards.

    trl's RLOO loss has one ratio a response: it refuses (B, T), or broadcasts it wrongly if B = T. At the policy that
    sampled, the gradient here is RLOO's.
    """

    def estimate(run: Run) -> Tensor:
        return leave_one_out_to_go(run.rewards, run.rollout.mask, run.group, run.recipe.ppo.gamma)

    return _train(run, "GRPO", estimate, loss_type="luspo")


def grpo_to_go(run: Run) -> TrainedPolicy:
    """`grpo` with the advantages (B, T) of `normalised_to_go`."""

    def estimate(run: Run) -> Tensor:
        return normalised_to_go(run.rewards, run.rollout.mask, run.group, run.recipe.ppo.gamma)

    return _train(replace(run, kl_in_loss=True), "GRPO", estimate)


def dpo(run: Run) -> TrainedPolicy:
    """DPO by trl (Rafailov et al., 2023) on pairs of the reference's responses, as many as our PPO samples in all.

    The proxy's score chooses, so shape and group are not used; beta is the KL coefficient; every layer learns, at the
    rate of `dpo.LR`, in `epochs` passes. The history has a row before and one after. Sampling rounds up to 64 pairs.
    """
    task, params, seed = run.task, run.recipe.ppo, run.recipe.seed
    if not params.kl_coef > 0:
        raise InputError(f"dpo: ppo.kl_coef is {params.kl_coef}, wanted a number above 0: it is the beta of DPO")
    prompts, clock = task.data.train_prompts, [time.perf_counter()]
    pairs = Pairs(task.reference, task.reward_model, task.tokenizer, params.max_new_tokens, seed)
    with _isolated():
        rows = pairs.preferences(prompts, params.updates * params.rollouts // 2, run.progress)
        clock.append(time.perf_counter())
        with redirect_stdout(io.StringIO()):  # trl prints its last metrics
            steps = max(1, params.epochs * len(rows) // BATCH)
            lm = train_dpo(task.reference.lm, rows, task.tokenizer, steps, params.kl_coef, seed)
        lm.__dict__.pop("forward", None)  # trl's patch, as above
        policy = PolicyWithValue(lm).to(default_device()).eval()
    clock.append(time.perf_counter())
    batch = next(prompt_batches(prompts, params.rollouts, seed))
    history = [
        measure(task, task.rollout(taught, batch, params, step_seed(seed, step)), step)
        for taught, step in ((task.reference, 0), (policy, params.updates))
    ]
    return TrainedPolicy(policy, pd.DataFrame(history), _seconds([[*clock[:2], *clock[1:]]]))


def best_of_n(task: Task, prompts: Sequence[Prompt], params: PPOParams, seed: int, n: int = 4) -> pd.DataFrame:
    """The reference's best of `n` responses to each prompt by the proxy, judged: the columns of `evaluate`.

    kl is log n - (n - 1)/n nats, an upper bound of KL(best of n || reference) (Beirami et al., 2024, theorem 3.1).
    """
    if n < 1:
        raise InputError(f"best_of_n: n is {n}, wanted at least 1")
    check_prompts(prompts)
    size, tables = max(1, params.rollouts // n), []
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        asked, step = [p for p in batch for _ in range(n)], step_seed(seed, HELD_OUT + start)
        responses = task.scored_responses(task.reference, asked, params, step)
        best = responses.scores.view(-1, n).argmax(-1)
        best = best + torch.arange(0, len(asked), n, device=best.device)
        tables.append(judged(task, batch, responses.take(best)).assign(kl=math.log(n) - (n - 1) / n))
    return pd.concat(tables, ignore_index=True)


def train_baseline(task: Task, name: str, recipe: Recipe, group: int = 4, progress: Callable = iter) -> TrainedPolicy:
    """Train the baseline `name` with `group` responses a prompt. Equal arguments give equal histories on one machine.

    Raises `InputError` for an unknown name and for a group that does not divide `recipe.ppo.rollouts`.
    """
    if name not in BASELINES:
        raise InputError(f"baseline {name!r} is not known, wanted one of {', '.join(BASELINES)}")
    rollouts = recipe.ppo.rollouts
    if group < 2 or rollouts % group:
        raise InputError(f"{name}: group is {group}, wanted above 1 and a divisor of ppo.rollouts = {rollouts}")
    return BASELINES[name](Run(task, recipe, group, progress))


BASELINES: dict[str, Callable[[Run], TrainedPolicy]] = {
    baseline.__name__: baseline for baseline in (rloo, grpo, rloo_to_go, grpo_to_go, dpo)
}
