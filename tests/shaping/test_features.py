"""Features of tokens: their contract, and weights that depend on them."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_types import tiny_rollout

from dense_rlhf.shaping.features import FEATURES, features
from dense_rlhf.shaping.masked import masked_mean
from dense_rlhf.types import InputError


def of_lengths(*lengths, ended=True):
    """A rollout of responses of these lengths, surprising by turns."""
    B, T = len(lengths), max(lengths)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(sum(lengths))
    logprobs = -torch.empty(B, T).exponential_(0.3, generator=generator) * mask
    ids = torch.ones(B, T, dtype=torch.long)
    return tiny_rollout(
        queries=ids[:, :1],
        query_mask=ids[:, :1] > 0,
        responses=ids,
        mask=mask,
        logprobs=logprobs,
        ref_logprobs=logprobs,
        values=0 * logprobs,
        scores=torch.zeros(B),
        ended=torch.full((B,), ended),
    )


def rest(*lengths):
    """Features (B, T, F) of all names, by row without padding."""
    rollout = of_lengths(*lengths)
    return [row[:n] for row, n in zip(features(rollout, list(FEATURES)), lengths)]


@pytest.mark.parametrize("name", FEATURES)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=4))
def test_range_and_mask(name, lengths):
    rollout = of_lengths(*lengths)
    values = features(rollout, [name])[..., 0]
    assert values.shape == rollout.mask.shape and values.dtype == torch.float32
    assert values.isfinite().all() and values.abs().max() <= 1 and not values[~rollout.mask].any()


@pytest.mark.parametrize("name", FEATURES)
def test_a_row_is_its_own(name, rollout):
    """Other responses, their order, and the padding that they bring, change nothing."""
    whole = features(rollout, [name])
    for row in range(len(rollout.scores)):
        alone = rollout.take(torch.tensor([row]))
        n = int(rollout.mask[row].sum())
        assert alone.mask.shape == (1, n) and torch.equal(features(alone, [name])[0], whole[row, :n])
    flipped = rollout.take(torch.arange(len(rollout.scores)).flip(0))
    assert torch.equal(features(flipped, [name]).flip(0), whole)


@pytest.mark.parametrize("name", FEATURES)
def test_what_a_response_is_paid_and_what_the_policy_thinks_of_it_do_not_matter(name, rollout):
    other = replace(rollout, scores=rollout.scores + 1, logprobs=rollout.logprobs - 1, values=rollout.values + 1)
    assert torch.equal(features(other, [name]), features(rollout, [name]))


@pytest.mark.parametrize("name", FEATURES)
def test_it_says_something(name):
    values = torch.cat([row[:, list(FEATURES).index(name)] for row in rest(1, 2, 7, 24, 200)])
    assert values.std() > 0.1 and values.unique().numel() > 1


def named(name, *lengths):
    return [row[:, list(FEATURES).index(name)].tolist() for row in rest(*lengths)]


def test_position_runs_from_first_to_last():
    one, four = named("position", 1, 4)
    assert one == [0] and four == [-0.75, -0.25, 0.25, 0.75]
    rollout = of_lengths(3, 8, 50)
    assert masked_mean(features(rollout, ["position"])[..., 0], rollout.mask, -1).abs().max() < 1e-6


def test_opening_and_ending_are_thirds_and_mirror_each_other():
    lengths = (1, 2, 3, 4, 6, 9, 10)
    assert [sum(row) for row in named("opening", *lengths)] == [math.ceil(n / 3) for n in lengths]
    for start, end in zip(named("opening", *lengths), named("ending", *lengths)):
        assert start == end[::-1] and start[0] == 1 and start == sorted(start, reverse=True)


def test_surprisal_is_the_references_and_rises():
    rollout = of_lengths(5)
    logprobs = torch.tensor([[0.0, -1.0, -3.0, -9.0, -1e6]])
    values = features(replace(rollout, ref_logprobs=logprobs), ["surprisal"])[0, :, 0]
    assert values.tolist() == pytest.approx([-1, -0.5, 0, 0.5, 1], abs=1e-4)
    above = features(replace(rollout, ref_logprobs=logprobs + 1e-4), ["surprisal"])  # rounding of a sure token
    assert above.min() == -1


def test_length_is_in_octaves():
    assert [row[0] for row in named("length", 1, 2, 16, 17, 31, 256, 999)] == [-1, -0.75, 0, 0, 0.25, 1, 1]
    assert all(len(set(row)) == 1 for row in named("length", 5, 30))


def test_features_stand_in_the_order_of_their_names(rollout):
    both = features(rollout, ["surprisal", "position"])
    assert torch.equal(both[..., :1], features(rollout, ["surprisal"]))
    assert torch.equal(both[..., 1:], features(rollout, ["position"]))
    assert features(rollout, []).shape == (*rollout.mask.shape, 0)


def test_an_unknown_feature_raises(rollout):
    with pytest.raises(InputError, match="shape.features: 'colour' is not known, wanted some of position"):
        features(rollout, ["position", "colour"])
