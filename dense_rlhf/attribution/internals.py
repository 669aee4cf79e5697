"""Sources that look inside the reward model: its attention, its scores of prefixes, its gradients.

Each is `(reward_model, rollout, params) -> Attribution`, runs in batches under the model's token budget, and leaves the
model as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dense_rlhf.attribution.engine import PACKED, coalition_scores
from dense_rlhf.attribution.kinds import share
from dense_rlhf.attribution.removal import Explained, in_score_units, on_policy_tokens
from dense_rlhf.config.params import AttributionParams
from dense_rlhf.models.reward_model import RewardModel, padded
from dense_rlhf.types import Attribution, InputError, Reading, Rollout

WATCHING = "sdpa_watched"  # transformers' name for our attention

# ---------------------------------------------------------------------------------------------------- attention


def attention(reward_model: RewardModel, rollout: Rollout, params: AttributionParams) -> Attribution:
    """Where the reward model looked: last layer, mean over heads, row of the read position (Chan et al., 2024).

    share_t = a_t / sum of a over the response, a = mean over heads of softmax(q_read K' / sqrt(d)); it has no sign. A
    response of EOS alone has its whole share there. Raises `InputError` for a model that is not one of `PACKED`.
    """
    readings = reward_model.readings(rollout)
    weights = on_policy_tokens(rollout, readings, read_attention(reward_model, readings))
    alone = ~rollout.players.any(-1, keepdim=True)
    weights = torch.where(alone, rollout.mask.to(weights), weights)
    return share("attention", rollout, weights / weights.sum(-1, keepdim=True), evaluations=1)


@torch.no_grad()
def read_attention(reward_model: RewardModel, readings: Sequence[Reading]) -> list[Tensor]:
    """Last-layer attention of the read position, mean over heads, at each response's tokens (n_i,)."""
    kind = reward_model.model.config.model_type
    if kind not in PACKED:
        wanted = f"take one of {', '.join(PACKED)}, or another source"
        raise InputError(f"attention of a reward model of type {kind!r} is not read; {wanted}")
    attention: dict[int, Tensor] = {}
    with watched(reward_model.model):
        for rows in _batches(reward_model, readings, reward_model.budget):
            ids, real = _whole(reward_model, [readings[i] for i in rows])
            watch = {"read": reward_model.ends(ids, real), "heard": []}
            reward_model.model.base_model(input_ids=ids, attention_mask=real.long(), use_cache=False, **watch)
            attention |= {i: row[_inside(readings[i])] for i, row in zip(rows, watch["heard"][0].mean(1))}
    return [attention[i] for i in range(len(readings))]


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model's last layer appends the attention (B, heads, L) of the positions `read` to `heard`."""
    before = model.config._attn_implementation
    AttentionInterface.register(WATCHING, _watched_attention)
    AttentionMaskInterface.register(WATCHING, sdpa_mask)
    model.set_attn_implementation(WATCHING)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _watched_attention(module, query, key, value, attention_mask, **options):
    """sdpa with one row of attention; eager attention would hold layers * heads * L^2 numbers for it."""
    read, heard = options.pop("read"), options.pop("heard")
    if module.layer_idx == module.config.num_hidden_layers - 1:
        rows, columns = torch.arange(len(read), device=read.device), torch.arange(key.shape[2], device=read.device)
        sees = columns <= read[:, None]
        if attention_mask is not None:
            sees &= attention_mask[rows, 0, read]
        asks = query[rows, :, read].unflatten(1, (key.shape[1], -1))  # query heads that share a key head, together
        logits = torch.einsum("bkgd,bkld->bkgl", asks, key).flatten(1, 2).float() * options["scaling"]
        heard.append(logits.masked_fill(~sees[:, None], -torch.inf).softmax(-1))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


# ---------------------------------------------------------------------------------------------------- prefixes


def prefix(reward_model: RewardModel, rollout: Rollout, params: AttributionParams) -> Attribution:
    """What each token changed when it was written: credit_t = f(x, y_1..t) - f(x, y_1..t-1) (RED, arXiv 2411.08302).

    Score units, telescopes to f(x, y) - f(x). RED reads the head at token t itself; here every prefix is read as the
    model was taught, at the end of the suffix. A token has no credit for what it lets later tokens mean. Tokens are
    dropped one by one, whatever `removal` and `players` are.
    """
    readings = reward_model.readings(rollout)
    masks = [np.tril(np.ones((k + 1, k), bool), -1) for k in (len(reading.response) for reading in readings)]
    scores = coalition_scores(reward_model, readings, masks)
    credits, baseline = [prefixes.double().diff() for prefixes in scores], torch.stack([one[0] for one in scores])
    return in_score_units("prefix", rollout, readings, Explained(credits, baseline, sum(map(len, masks))), True)


# ---------------------------------------------------------------------------------------------------- gradients


def gradient_input(reward_model: RewardModel, rollout: Rollout, params: AttributionParams) -> Attribution:
    """First-order Taylor: credit_t = df/de_t . e_t, e the response's token embeddings (Shrikumar et al., 2016).

    Score units; the baseline is the score with all embeddings of the response zero. The gap is the rest of the
    expansion, zero for a model linear in the embeddings. Prompt and suffix keep theirs.
    """
    zero = torch.zeros_like(reward_model.model.get_input_embeddings().weight[0].detach())
    return _along_lines("gradient_input", reward_model, rollout, zero, [1.0], [1.0])


def integrated_gradients(reward_model: RewardModel, rollout: Rollout, params: AttributionParams) -> Attribution:
    """credit_t = (e_t - e0) . mean of df/de_t on the line from e0 to e_t, all t at once (Sundararajan et al., 2017).

    Score units, at `ig_steps` Gauss-Legendre nodes. e0 is the embedding of the suffix's last token, which ends every
    text: models normalise what they read, so on a line from zero, or from the vocabulary's mean, everything would
    change at its very start. The gap is the quadrature's error; no completeness is claimed.
    """
    nodes, weights = np.polynomial.legendre.leggauss(params.ig_steps)  # on (-1, 1)
    ends = {reward_model.suffix_of(reading)[-1:] for reading in reward_model.readings(rollout)}
    if len(ends) != 1 or ends == {()}:
        raise InputError("integrated_gradients starts at the token that ends every text, and these have none in common")
    start = reward_model.model.get_input_embeddings().weight[ends.pop()[0]].detach()
    nodes, weights = ((nodes + 1) / 2).tolist(), (weights / 2).tolist()
    return _along_lines("integrated_gradients", reward_model, rollout, start, nodes, weights)


def _along_lines(
    source: str, reward_model: RewardModel, rollout: Rollout, start: Tensor, nodes: list[float], weights: list[float]
) -> Attribution:
    """credit_t = (e_t - start) . sum over nodes of weight * df/de_t at start + node (e - start)."""
    readings = reward_model.readings(rollout)
    baseline = torch.empty(len(readings), dtype=reward_model.dtype, device=reward_model.model.device)
    with torch.no_grad():
        for rows in _batches(reward_model, readings, reward_model.budget):
            baseline[rows] = _on_lines(reward_model, [readings[i] for i in rows], start, [0.0] * len(rows))[0]
    jobs = [(i, n) for i, reading in enumerate(readings) if reading.response for n in range(len(nodes))]
    credits = [torch.zeros(len(reading.response), dtype=torch.float64, device=start.device) for reading in readings]
    # a backward pass keeps the states of all layers, a forward pass of one
    budget = reward_model.budget // getattr(reward_model.model.config, "num_hidden_layers", 1)
    for rows in _batches(reward_model, [readings[i] for i, _ in jobs], budget):
        which, at = zip(*(jobs[row] for row in rows))
        scores, points, lines = _on_lines(reward_model, [readings[i] for i in which], start, [nodes[n] for n in at])
        (gradient,) = torch.autograd.grad(scores.sum(), points)
        for i, n, product in zip(which, at, (gradient.to(lines) * lines).sum(-1).double()):
            credits[i] += weights[n] * product[_inside(readings[i])]
    explained = Explained(credits, baseline, len(readings) + 2 * len(jobs))
    return in_score_units(source, rollout, readings, explained)


def _on_lines(
    reward_model: RewardModel, readings: Sequence[Reading], start: Tensor, nodes: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (b,) at each line's node, the embeddings there (b, L, H), and the whole lines (b, L, H).

    A line leads from `start` to the embedding of a response's token; prompt and suffix do not move.
    """
    ids, real = _whole(reward_model, readings)
    inside = torch.zeros_like(real)
    for row, reading in enumerate(readings):
        inside[row, _inside(reading)] = True
    embeddings = reward_model.model.get_input_embeddings()(ids).detach().to(reward_model.dtype)
    lines = (embeddings - start).masked_fill(~inside[..., None], 0)
    node = torch.tensor(nodes, dtype=lines.dtype, device=lines.device)[:, None, None]
    points = (embeddings + (node - 1) * lines).to(reward_model.model.dtype).requires_grad_(torch.is_grad_enabled())
    segments = [list(reading.segments) for reading in readings if reading.segments]
    kinds = {"token_type_ids": padded(segments, 0, ids.device)[0]} if segments else {}
    outputs = reward_model.read(real, reward_model.ends(ids, real), inputs_embeds=points, **kinds)
    return reward_model.calibrate(outputs.to(lines.dtype)), points, lines


# ---------------------------------------------------------------------------------------------------- what is read


def _whole(reward_model: RewardModel, readings: Sequence[Reading]) -> tuple[Tensor, Tensor]:
    """Prompt, response and suffix: token ids (b, L), and which are real."""
    return reward_model.padded([reward_model.whole(reading) for reading in readings])


def _inside(reading: Reading) -> slice:
    """Where the response is."""
    return slice(len(reading.prompt), len(reading.prompt) + len(reading.response))


def _batches(reward_model: RewardModel, readings: Sequence[Reading], budget: int) -> Iterator[list[int]]:
    """Numbers of the readings, those of similar length together."""
    return reward_model.batches([reward_model.whole(reading) for reading in readings], budget)
