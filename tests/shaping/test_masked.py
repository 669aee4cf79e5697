"""Properties of the masked statistics."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dense_rlhf.shaping.masked import (
    effective_share,
    masked_mean,
    masked_softmax,
    masked_sum,
    masked_var,
    masked_whiten,
)
from dense_rlhf.types import InputError


@st.composite
def masked_values(draw, low=-20.0, high=20.0):
    """Float64 values (B, T) and a right-padded mask with at least one token a row."""
    T = draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(1, T), min_size=1, max_size=4))
    row = st.lists(st.floats(low, high), min_size=T, max_size=T)
    x = torch.tensor([draw(row) for _ in lengths], dtype=torch.float64)
    return x, torch.arange(T) < torch.tensor(lengths)[:, None]


@given(masked_values())
def test_softmax_sums_to_one_and_is_zero_off_the_mask(case):
    x, mask = case
    share = masked_softmax(x, mask)
    assert torch.allclose(share.sum(-1), torch.ones(len(x), dtype=x.dtype), atol=1e-12)
    assert torch.equal(share[~mask], torch.zeros_like(share[~mask]))
    row = x[0][mask[0]]
    assert torch.allclose(share[0][mask[0]], (row - row.max()).exp() / (row - row.max()).exp().sum(), atol=1e-12)


@given(masked_values(), st.sampled_from([float("nan"), float("inf"), -float("inf")]))
def test_nothing_leaks_from_outside_the_mask(case, bad):
    x, mask = case
    dirty = x.masked_fill(~mask, bad)
    for function in (masked_sum, masked_mean, masked_var, masked_whiten, masked_softmax):
        assert torch.equal(function(dirty, mask), function(x, mask)), function.__name__
    shares = effective_share(dirty, mask), effective_share(x, mask)
    assert torch.equal(*(share.nan_to_num(-1) for share in shares))


@given(masked_values())
def test_statistics_equal_those_of_the_kept_values(case):
    x, mask = case
    kept = x[mask]
    assert masked_sum(x, mask).item() == pytest.approx(kept.sum().item(), abs=1e-9)
    assert masked_mean(x, mask).item() == pytest.approx(kept.mean().item(), abs=1e-9)
    assert masked_var(x, mask).item() == pytest.approx(kept.var().item() if len(kept) > 1 else 0, abs=1e-9)
    assert torch.allclose(masked_mean(x, mask, -1)[-1], x[-1][mask[-1]].mean(), atol=1e-9)


@given(masked_values())
def test_whitening_gives_mean_zero_variance_one(case):
    x, mask = case
    white = masked_whiten(x, mask)
    assert torch.equal(white[~mask], torch.zeros_like(white[~mask]))
    assert white[mask].mean().abs() < 1e-6
    if mask.sum() > 1 and x[mask].var() > 1e-2:  # far above eps
        assert abs(white[mask].var().item() - 1) < 1e-5


@given(masked_values(low=-5, high=5))
def test_effective_share_lies_between_one_token_and_all(case):
    x, mask = case
    weights = torch.where(x.abs() < 1e-3, 1e-3, x)
    share = effective_share(weights, mask)
    assert (share >= 1 / mask.sum(-1) - 1e-9).all() and (share <= 1 + 1e-9).all()


def test_effective_share_of_known_spreads():
    mask = torch.tensor([[True, True, True, False]])
    assert effective_share(torch.tensor([[2.0, -2.0, 2.0, 9.0]]), mask).item() == pytest.approx(1)
    assert effective_share(torch.tensor([[0.0, 5.0, 0.0, 9.0]]), mask).item() == pytest.approx(1 / 3)
    assert effective_share(torch.zeros(1, 4), mask).isnan().all()


def test_shapes_that_disagree_and_empty_rows_raise():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(InputError, match="same"):
        masked_mean(x[:, :1], mask)  # would broadcast
    mask[1] = False
    with pytest.raises(InputError, match="nothing kept"):
        masked_softmax(x, mask)
