"""The one way in which adapters ask for token rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dense_rlhf.types import InputError

IDS = Sequence[Sequence[int]]
Rewards = Callable[..., Sequence[np.ndarray]]  # prompt_ids, response_ids, prompts if asked for -> N arrays (T_i,)


def paid(rewards: Rewards, prompt_ids: IDS, response_ids: IDS, *prompts: Sequence[object]) -> list[np.ndarray]:
    """What `rewards` pays for the tokens of each response: N arrays (T_i,) of float32.

    Raises `InputError` unless there is one for each token.
    """
    rows = [np.asarray(row, np.float32) for row in rewards(prompt_ids, response_ids, *prompts)]
    if len(rows) != len(response_ids):
        raise InputError(f"rewards of {len(rows)} responses, wanted {len(response_ids)}")
    for i, (row, ids) in enumerate(zip(rows, response_ids)):
        if row.shape != (len(ids),):
            raise InputError(f"rewards of response {i} have shape {row.shape}, wanted one a token, ({len(ids)},)")
    return rows
