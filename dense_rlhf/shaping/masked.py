"""Sum, mean, variance, whitening and softmax under a boolean mask: the only such code in the package."""

from __future__ import annotations

import torch
from torch import Tensor

from dense_rlhf.types import InputError


def _check(x: Tensor, mask: Tensor) -> None:
    if x.shape != mask.shape:
        raise InputError(f"values have shape {tuple(x.shape)} and mask {tuple(mask.shape)}, wanted the same")


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of `x` where `mask`; NaN and infinity outside the mask do not leak in."""
    _check(x, mask)
    kept = x.masked_fill(~mask, 0)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `x` where `mask`; NaN where nothing is kept."""
    total = masked_sum(x, mask, dim)
    return total / (mask.sum() if dim is None else mask.sum(dim))


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Unbiased variance of `x` where `mask`; zero where fewer than two values are kept."""
    n = mask.sum()
    if n < 2:
        return x.new_zeros(())
    return masked_sum((x - masked_mean(x, mask)).square(), mask) / (n - 1)


def masked_whiten(x: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """`x` shifted to mean 0 and scaled to variance 1 where `mask`, zero elsewhere."""
    white = (x - masked_mean(x, mask)) * torch.rsqrt(masked_var(x, mask) + eps)
    return white.masked_fill(~mask, 0)


def masked_softmax(x: Tensor, mask: Tensor) -> Tensor:
    """Softmax of each row of `x` (B, T) over its kept positions, exactly zero elsewhere. Raises on an empty row."""
    _check(x, mask)
    if not bool(mask.any(-1).all()):
        raise InputError("softmax over a row with nothing kept; every response needs at least one token")
    return torch.softmax(x.masked_fill(~mask, -torch.inf), -1)


def effective_share(weights: Tensor, mask: Tensor) -> Tensor:
    """Effective sample size over length, (B,), of weights (B, T): 1 is an even spread, 1/T a single token.

    ESS = (sum |e|)^2 / sum e^2 (Kish, 1965). Zero weights everywhere give NaN.
    """
    absolute = weights.abs()
    ess = masked_sum(absolute, mask, -1).square() / masked_sum(absolute.square(), mask, -1)
    return ess / mask.sum(-1)
