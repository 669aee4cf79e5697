"""Features of a token, known before any credit, that the weights of a shape may depend on.

Each is `rollout -> (B, T)` in [-1, 1] and reads no other row; its values on padding are not used. A new one is a
function and a line in `FEATURES`; the contract tests pick it up. The registry is read before a study starts, so torch
is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dense_rlhf.types import InputError, Rollout, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

PARTS = 3  # of a response: opening, middle, ending
MIDDLE = 3.0  # nats, a token of probability 1/20, is neither expected nor surprising


def _places(rollout: Rollout) -> tuple[Tensor, Tensor]:
    """The number t of each token (B, T), from 0, and the length n (B, 1) of its response, both float32."""
    return rollout.mask.cumsum(-1).float() - 1, rollout.mask.sum(-1, keepdim=True).float()


def position(rollout: Rollout) -> Tensor:
    """(2 t + 1 - n) / n: from nearly -1 at the first of n tokens to nearly 1 at the last; its mean is zero."""
    t, n = _places(rollout)
    return (2 * t + 1 - n) / n


def opening(rollout: Rollout) -> Tensor:
    """1 in the first third of the response, 0 after it; the first token always belongs."""
    t, n = _places(rollout)
    return (PARTS * t < n).float()


def ending(rollout: Rollout) -> Tensor:
    """1 in the last third of the response, 0 before it; the last token always belongs."""
    t, n = _places(rollout)
    return (PARTS * (n - 1 - t) < n).float()


def surprisal(rollout: Rollout) -> Tensor:
    """(s - 3) / (s + 3) of s = -log pi_ref nats: -1 where the reference was certain, near 1 where it was surprised."""
    s = (-rollout.ref_logprobs.float()).clamp(min=0)
    return (s - MIDDLE) / (s + MIDDLE)


def length(rollout: Rollout) -> Tensor:
    """The response's length in octaves, the same on all its tokens: -1 for one token, 0 for 16, 1 for 256 or more."""
    n = _places(rollout)[1]
    return (n.log2().round() / 4 - 1).clamp(max=1).expand(rollout.mask.shape)


def features(rollout: Rollout, names: Sequence[str]) -> Tensor:
    """The features `names` of each token, (B, T, F). Raises `InputError` for an unknown one."""
    import torch

    check_features("shape.features", names)
    columns = [FEATURES[name](rollout).masked_fill(~rollout.mask, 0) for name in names]
    return torch.stack(columns, -1) if columns else torch.zeros(*rollout.mask.shape, 0, device=rollout.mask.device)


def check_features(where: str, names: Sequence[str]) -> None:
    """Raise `InputError` for an unknown feature; `where` names the setting."""
    unknown = [name for name in names if name not in FEATURES]
    if unknown:
        hint = did_you_mean(unknown[0], FEATURES)
        raise InputError(f"{where}: {unknown[0]!r} is not known, wanted some of {', '.join(FEATURES)}{hint}")


FEATURES: dict[str, Callable[[Rollout], Tensor]] = {
    feature.__name__: feature for feature in (position, opening, ending, surprisal, length)
}
