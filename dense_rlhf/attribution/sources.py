"""The sources of credit. A new one is a function and a line in `SOURCES`; the contract tests pick it up.

The registry is read before a study starts, so whatever needs torch is imported where it is used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from inspect import signature
from typing import TYPE_CHECKING

from dense_rlhf.attribution.kinds import Designed, Gaussian, Internal, share
from dense_rlhf.config.params import AttributionParams
from dense_rlhf.config.parse import named
from dense_rlhf.types import Attribution, InputError, Rollout

if TYPE_CHECKING:
    from torch import Tensor

    from dense_rlhf.models.reward_model import RewardModel


def terminal(reward_model: RewardModel, rollout: Rollout, params: AttributionParams) -> Attribution:
    """All on the last token: sparse RLHF."""
    last = rollout.mask.cumsum(-1) == rollout.mask.sum(-1, keepdim=True)
    last &= rollout.mask
    return share("terminal", rollout, last.float())


def uniform(reward_model: RewardModel, rollout: Rollout, params: AttributionParams) -> Attribution:
    """The same on every token."""
    return share("uniform", rollout, rollout.mask / rollout.mask.sum(-1, keepdim=True))


def random(reward_model: RewardModel, rollout: Rollout, params: AttributionParams) -> Attribution:
    """A control: shares drawn from Dirichlet(1), reproducible from each response's tokens."""
    draws = _exponential(rollout, params.seed) * rollout.mask
    return share("random", rollout, draws / draws.sum(-1, keepdim=True))


@dataclass(frozen=True)
class Shuffled:
    """A control: the credit of another source, each response's in a random order, reproducible from its tokens."""

    source: str

    def __call__(self, reward_model: RewardModel, rollout: Rollout, params: AttributionParams) -> Attribution:
        ordered = attribute(reward_model, rollout, [self.source], params)[self.source]
        draws, credit = _exponential(rollout, params.seed), ordered.credit.clone()
        for row, players in enumerate(rollout.players):
            credit[row, players] = ordered.credit[row, players][draws[row, players].argsort()]
        return replace(ordered, credit=credit)


def _exponential(rollout: Rollout, seed: int) -> Tensor:
    """Draws (B, T), each row's from its own tokens alone: the batch that a response is in changes nothing."""
    import torch

    generator, draws = torch.Generator(), torch.zeros(rollout.mask.shape)
    for row, ids, mask in zip(draws, rollout.responses.cpu(), rollout.mask.cpu()):
        digest = sha256(ids[mask].numpy().tobytes()).digest()
        generator.manual_seed(seed + int.from_bytes(digest[:6]))
        row[mask] = torch.empty(int(mask.sum())).exponential_(generator=generator)
    return draws.to(rollout.mask.device)


def attribute(
    reward_model: RewardModel,
    rollout: Rollout,
    sources: Sequence[str],
    params: AttributionParams,
    progress: Callable = iter,
) -> dict[str, Attribution]:
    """Explain every response of `rollout` by each source; sources that remove tokens share their evaluations.

    `progress` wraps the batches of coalitions and may raise to cancel. Raises `InputError` for an unknown source, and
    where credit is not finite.
    """
    kinds = {source: named(SOURCES, source, "sources") for source in sources}
    designed = {source: kind for source, kind in kinds.items() if isinstance(kind, Designed)}
    done: dict[str, Attribution] = {}
    if designed:
        from dense_rlhf.attribution.removal import explain_by_removal

        done = explain_by_removal(reward_model, rollout, designed, params, progress)
    for source in sources:
        if source not in designed:
            start = time.perf_counter()
            made = kinds[source](reward_model, rollout, params)
            done[source] = replace(made, source=source, seconds=time.perf_counter() - start)
    for source, attribution in done.items():
        if not bool(attribution.credit.isfinite().all()):
            cause = "so a score or gradient of the reward model is not"
            raise InputError(f"{source}: credit is not finite, {cause}; look at its weights and dtype")
    return {source: done[source] for source in sources}


def available(reward_model: RewardModel, params: AttributionParams | None = None) -> list[str]:
    """The sources that can explain this reward model: `log_ratio` needs a DPO policy, `rationale` a file.

    `attention` is read from some decoders; gradients need a model that takes embeddings in place of tokens.
    """
    from dense_rlhf.attribution.engine import PACKED

    config = reward_model.model.config
    no_embeddings = config.is_encoder_decoder or "inputs_embeds" not in signature(reward_model.model.forward).parameters
    missing = {"log_ratio": reward_model.implicit is None, "rationale": not (params and params.rationale_path)}
    missing |= {"attention": config.model_type not in PACKED or not reward_model.has_head}
    missing |= dict.fromkeys(("gradient_input", "integrated_gradients"), no_embeddings)
    return [source for source, kind in SOURCES.items() if not missing.get(getattr(kind, "source", source))]


def placebos() -> dict[str, str]:
    """The sources that shuffle the credit of another, and whose."""
    return {source: kind.source for source, kind in SOURCES.items() if isinstance(kind, Shuffled)}


SOURCES: dict[str, Designed | Callable[[RewardModel, Rollout, AttributionParams], Attribution]] = {
    "terminal": terminal,
    "uniform": uniform,
    "random": random,
    "shuffled": Shuffled("shap"),
    "shuffled_attention": Shuffled("attention"),
    "shap": Designed("permutation_shap", lambda k, p: (p.permutations, p.seed), complete=True),
    "gaussian": Gaussian("gaussian_shap", lambda k, p: (p.samples_per_token * k, p.seed), complete=True),
    "owen": Designed("owen", lambda k, p: (p.owen_depth,), complete=True),
    "kernel": Designed("kernel_shap", lambda k, p: (p.samples_per_token * k, p.seed), complete=True),
    "leverage": Designed("leverage_shap", lambda k, p: (p.samples_per_token * k, p.seed), complete=True),
    "lime": Designed("ridge_lime", lambda k, p: (p.lime_samples, p.seed)),
    "shared_lime": Designed("shared_lime", lambda k, p: (p.permutations, p.seed)),
    "leave_one_out": Designed("leave_one_out", lambda k, p: ()),
    "attention": Internal("dense_rlhf.attribution.internals:attention"),
    "prefix": Internal("dense_rlhf.attribution.internals:prefix"),
    "gradient_input": Internal("dense_rlhf.attribution.internals:gradient_input"),
    "integrated_gradients": Internal("dense_rlhf.attribution.internals:integrated_gradients"),
    "lexicon": Internal("dense_rlhf.attribution.external:lexicon"),
    "rationale": Internal("dense_rlhf.attribution.external:rationale"),
    "log_ratio": Internal("dense_rlhf.attribution.external:log_ratio"),
}
