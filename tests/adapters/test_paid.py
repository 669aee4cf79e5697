"""What adapters take for token rewards, and what they refuse."""

import numpy as np
import pytest
import torch

from dense_rlhf.adapters.paid import paid
from dense_rlhf.types import InputError

IDS = [[1, 2], [3]]


@pytest.mark.parametrize(
    "rows",
    [
        [[1, 2], [3]],
        (np.array([1.0, 2.0]), np.array([3], np.int64)),
        [torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0], dtype=torch.bfloat16)],
    ],
)
def test_numbers_of_any_kind_are_rewards(rows):
    first, second = paid(lambda *_: rows, IDS, IDS)
    assert first.tolist() == [1, 2] and second.tolist() == [3] and first.dtype == second.dtype == np.float32


@pytest.mark.parametrize(
    "rows, wanted",
    [
        ([[1.0, np.nan], [3.0]], r"response 0 are not finite"),
        ([[1.0, 2.0], [1e300]], r"response 1 are not finite"),
        ([["1", "2"], ["3"]], "response 0 are <U1"),
        ([[True, False], [True]], "response 0 are bool"),
        ([np.array([1j, 2]), [3]], "response 0 are complex128"),
        ([[1.0, 2.0], [None]], "response 1 are object"),
        ([[1.0], [3.0]], r"response 0 have shape \(1,\), wanted one a token, \(2,\)"),
        ([[1.0, 2.0]], "rewards of 1 responses, wanted 2"),
        (None, "rewards are NoneType, wanted an array for each response"),
    ],
)
def test_what_are_no_rewards_is_refused(rows, wanted):
    with pytest.raises(InputError, match=wanted):
        paid(lambda *_: rows, IDS, IDS)
