"""Advantages of single tokens by comparison with the other responses to a prompt, where a trainer's own sum rewards."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal

import torch
from torch import Tensor

from dense_rlhf.types import InputError

SCALES = ("sd", "leave_one_out", "none")


def group_to_go(
    rewards: Tensor,
    mask: Tensor,
    groups: Sequence[Hashable],
    scale: Literal["sd", "leave_one_out", "none"] = "sd",
    eps: float = 1e-6,
) -> Tensor:
    """Advantages (B, T), zero outside the mask, of token rewards (B, T); `groups` names each response's prompt.

        A_i,t = (G_i,t - mean_j G_j,min(t, T_j)) * s,   G_i,t = sum_{u >= t} r_i,u,

    j over the K responses to i's prompt, t from a response's first token to its last, T_j; S_j = G_j,0 are the scores.
    `s` is 1 / (sd_j S_j + eps) for "sd" (GRPO: Shao et al., 2024), K / (K - 1) for "leave_one_out" (RLOO: Ahmadian et
    al., 2024; the baseline is then the mean of the others, which no action of i can move) and 1 for "none" (Dr. GRPO:
    Liu et al., 2025). Where only last tokens are paid, G_j is S_j throughout and these are those estimators. A response
    that is masked whole is no part of its group. A group of one, which has nothing to compare with, gets zeros. Rewards
    are zero outside responses. Raises `InputError` for shapes that differ, integers, and another `scale`.
    """
    if rewards.shape != mask.shape or len(rewards) != len(groups):
        shapes = f"rewards {tuple(rewards.shape)}, mask {tuple(mask.shape)}, {len(groups)} groups"
        raise InputError(f"{shapes}; wanted (B, T), (B, T) and B")
    if not rewards.is_floating_point():
        raise InputError(f"rewards are {rewards.dtype}, wanted floating point")
    if scale not in SCALES:
        raise InputError(f"scale is {scale!r}, wanted one of {', '.join(SCALES)}")
    groups = groups.tolist() if hasattr(groups, "tolist") else groups  # elements of a tensor equal themselves alone
    mask, places = mask.bool(), torch.arange(mask.shape[1], device=mask.device)
    to_go = rewards.flip(-1).cumsum(-1).flip(-1)
    first, last = mask.int().argmax(-1, keepdim=True), (places * mask).amax(-1, keepdim=True)
    held = to_go.gather(-1, torch.minimum(first + places, last))  # responses begin where they do, here all at 0
    advantages = torch.zeros_like(rewards)
    for rows in _rows(groups, mask.any(-1).tolist()):
        if len(rows) == 1:
            continue
        sd, others = to_go[rows, 0].std() + eps, len(rows) / (len(rows) - 1)
        factor = {"sd": 1 / sd, "leave_one_out": others, "none": 1.0}[scale]
        baseline = held[rows].mean(0)[(places - first[rows]).clamp(min=0)]
        advantages[rows] = (to_go[rows] - baseline) * factor
    return advantages.masked_fill(~mask, 0)


def _rows(groups: Sequence[Hashable], kept: Sequence[bool]) -> list[list[int]]:
    """The rows of each group that are kept."""
    rows: dict[Hashable, list[int]] = {}
    for row, name in enumerate(groups):
        if kept[row]:
            rows.setdefault(name, []).append(row)
    return list(rows.values())
