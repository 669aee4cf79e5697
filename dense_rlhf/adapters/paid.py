"""The one way in which adapters ask for token rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from dense_rlhf.types import InputError

IDS = Sequence[Sequence[int]]
Rewards = Callable[..., Sequence[np.ndarray]]  # prompt_ids, response_ids, prompts if asked for -> N arrays (T_i,)


def paid(rewards: Rewards, prompt_ids: IDS, response_ids: IDS, *prompts: Sequence[object]) -> list[np.ndarray]:
    """What `rewards` pays for the tokens of each response: N arrays (T_i,) of float32.

    Raises `InputError` unless there is one finite number for each token.
    """
    given = rewards(prompt_ids, response_ids, *prompts)
    if not isinstance(given, Iterable):
        raise InputError(f"rewards are {type(given).__name__}, wanted an array for each response")
    rows = [_array(row) for row in given]
    if len(rows) != len(response_ids):
        raise InputError(f"rewards of {len(rows)} responses, wanted {len(response_ids)}")
    for i, (row, ids) in enumerate(zip(rows, response_ids)):
        if row.shape != (len(ids),):
            raise InputError(f"rewards of response {i} have shape {row.shape}, wanted one a token, ({len(ids)},)")
        if row.dtype.kind not in "fiu":
            raise InputError(f"rewards of response {i} are {row.dtype}, wanted numbers")
        with np.errstate(over="ignore"):
            rows[i] = row.astype(np.float32)
        if not np.isfinite(rows[i]).all():
            raise InputError(f"rewards of response {i} are not finite in float32: {row}")
    return rows


def _array(row: object) -> np.ndarray:
    """A row as an array; a tensor may be on a GPU, be part of a graph, or have a dtype that NumPy lacks."""
    return row.detach().cpu().double().numpy() if hasattr(row, "detach") else np.asarray(row)
