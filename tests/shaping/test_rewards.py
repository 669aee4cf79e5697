"""Credit becomes reward: the sum is kept, padding stays empty, baselines are one-hot shapes, weights may see tokens."""

from dataclasses import replace

import pytest
import torch
from conftest import RATIONALES
from hypothesis import given
from hypothesis import strategies as st

from dense_rlhf.attribution import SOURCES, attribute
from dense_rlhf.config.params import AttributionParams
from dense_rlhf.shaping.features import FEATURES, features
from dense_rlhf.shaping.masked import effective_share
from dense_rlhf.shaping.rewards import dense_reward, shape_rewards, shaped, token_weights
from dense_rlhf.types import NORMALISERS, Attribution, InputError, RewardShape

SHARES = {"terminal", "uniform", "random", "attention", "shuffled_attention"}


@pytest.fixture(scope="module")
def attributions(reward_model, rollout):
    return attribute(reward_model, rollout, list(SOURCES), AttributionParams(seed=2, rationale_path=RATIONALES))


def plain(credit, rollout, source="x"):
    """An attribution of given credit (B, T), not a share."""
    credit = credit.masked_fill(~rollout.mask, 0)
    zero = torch.zeros_like(rollout.scores)
    return Attribution(source, credit, zero, rollout.scores - credit.sum(-1), 0, 0)


def check_contract(rewards, rollout):
    assert rewards.shape == rollout.mask.shape and not rewards[~rollout.mask].any()
    assert torch.allclose(rewards.sum(-1), rollout.scores, atol=2e-4)


@pytest.mark.parametrize("normalise", ["softmax", "magnitude", "signed"])
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_sums_to_the_scores(source, normalise, attributions, rollout):
    check_contract(shape_rewards(rollout, attributions, RewardShape((source,), (1.0,), normalise)), rollout)


def test_shares_are_the_sparse_and_even_baselines_the_random_control_and_attention(attributions):
    assert {s for s, attribution in attributions.items() if attribution.is_share} == SHARES


@pytest.mark.parametrize("source", sorted(SHARES))
def test_shares_stay_as_they_are_under_every_normaliser(source, attributions, rollout):
    for normalise in NORMALISERS:
        rewards = shape_rewards(rollout, attributions, RewardShape((source,), (1.0,), normalise))
        assert torch.equal(rewards, attributions[source].credit)


weights = st.lists(st.floats(0, 1), min_size=2, max_size=2).filter(lambda w: sum(w) > 0.1)


@given(st.integers(0, 1000), st.floats(0.01, 10), st.sampled_from(NORMALISERS), weights)
def test_any_credit_and_mixture_sums_to_the_scores(rollout, seed, size, normalise, pair):
    credit = size * torch.randn(2, *rollout.mask.shape, generator=torch.Generator().manual_seed(seed))
    if normalise == "sum":
        credit = credit.abs() + 1e-2
    given_ = {name: plain(c, rollout, name) for name, c in zip("ab", credit)}
    shape = RewardShape(("a", "b"), tuple(w / sum(pair) for w in pair), normalise, temperature=size)
    check_contract(shape_rewards(rollout, given_, shape), rollout)


@given(st.integers(0, 1000), st.sampled_from(NORMALISERS), st.permutations([0.0, 0.0, 0.25, 0.75]), st.booleans())
def test_what_changes_no_reward_is_no_part_of_the_effective_shape(rollout, seed, normalise, mixture, alone):
    """Bit for bit: a training is known by its effective shape."""
    generator = torch.Generator().manual_seed(seed)
    credit = 0.1 + torch.rand(4, *rollout.mask.shape, generator=generator)
    given_ = {name: plain(c, rollout, name) for name, c in zip("abcd", credit)}
    mixture = tuple(float(w == 0.75) if alone else w for w in mixture)
    slopes, temperature = tuple((1.5 * (w == 0),) for w in mixture), tuple(1.0 + w for w in mixture)
    shape = RewardShape(tuple("abcd"), mixture, normalise, temperature, ("position",), slopes)
    few = shape.effective
    assert few.effective == few and len(few.sources) == (1 if alone else 2) and not few.slopes and all(few.weights)
    for whole, part in zip(shaped(rollout, given_, shape), shaped(rollout, given_, few)):
        assert torch.equal(whole, part) if isinstance(whole, torch.Tensor) else whole == part


def test_slopes_that_differ_stay_in_the_effective_shape(rollout):
    shape = RewardShape(tuple("abc"), (0.5, 0.0, 0.5), "signed", 2.0, ("position",), ((1.0,), (2.0,), (0.0,)))
    few = RewardShape(("a", "c"), (0.5, 0.5), "signed", 1.0, ("position",), ((1.0,), (0.0,)))
    assert shape.effective == few
    weights = token_weights(rollout, shape)
    assert torch.allclose(weights[..., [0, 2]], token_weights(rollout, few)) and not weights[..., 1].any()


def test_one_hot_terminal_is_sparse_rlhf_bit_for_bit(attributions, rollout):
    sparse = torch.zeros_like(rollout.values)
    sparse[torch.arange(len(sparse)), rollout.mask.sum(-1) - 1] = rollout.scores
    assert torch.equal(shape_rewards(rollout, attributions, RewardShape(("terminal",), (1.0,))), sparse)
    among = RewardShape(("shap", "terminal", "uniform"), (0.0, 1.0, 0.0))
    assert torch.equal(shape_rewards(rollout, attributions, among), sparse)


def test_softmax_is_the_papers_formula(attributions, rollout):
    shape = RewardShape(("shap", "lime"), (0.25, 0.75), temperature=0.5)
    rewards = shape_rewards(rollout, attributions, shape)
    for row, keep in enumerate(rollout.mask):
        mix = sum(w * (attributions[s].credit[row][keep] / 0.5).softmax(-1) for s, w in zip(*shape_parts(shape)))
        assert torch.allclose(rewards[row][keep], rollout.scores[row] * mix, atol=1e-5)


def shape_parts(shape):
    return shape.sources, shape.weights


def test_signed_keeps_differences_of_credit(rollout):
    credit = torch.randn(rollout.mask.shape, generator=torch.Generator().manual_seed(1))
    rewards = dense_reward(rollout, plain(credit, rollout), RewardShape(("x",), (1.0,), "signed"))
    for row, keep in enumerate(rollout.mask):
        assert torch.allclose(rewards[row][keep].diff(), credit[row][keep].diff(), atol=1e-5)


@given(st.floats(0, 1))
def test_a_mixture_with_an_even_spread_scales_signed_credit(attributions, rollout, unit):
    """So credit in other units, such as people's, is brought into score units by its weight."""
    credit, shape = attributions["shap"].credit, RewardShape(("shap", "uniform"), (unit, 1 - unit), "signed")
    rewards = shape_rewards(rollout, attributions, shape)
    rest = (rollout.scores - unit * credit.sum(-1)) / rollout.mask.sum(-1)
    assert torch.allclose(rewards, (unit * credit + rest[:, None]) * rollout.mask, atol=1e-5)


def test_sum_is_the_share_of_the_score(rollout):
    credit = torch.rand(rollout.mask.shape, generator=torch.Generator().manual_seed(1)) + 0.1
    shape = RewardShape(("x",), (1.0,), "sum")
    rewards = dense_reward(rollout, plain(credit, rollout), shape)
    wanted = plain(credit, rollout).credit * (rollout.scores / plain(credit, rollout).credit.sum(-1))[:, None]
    assert torch.allclose(rewards, wanted, atol=1e-5)
    negative = dense_reward(rollout, plain(-credit, rollout), shape)
    assert torch.allclose(rewards, negative, atol=1e-5)


def test_magnitude_is_the_share_of_the_sizes_and_even_where_there_are_none(rollout):
    credit, shape = torch.randn(rollout.mask.shape), RewardShape(("x",), (1.0,), "magnitude")
    sizes = dense_reward(rollout, plain(credit.abs() + 0.1, rollout), replace(shape, normalise="sum"))
    given_ = (credit.abs() + 0.1) * torch.where(credit < 0, -1, 1)
    assert torch.allclose(dense_reward(rollout, plain(given_, rollout), shape), sizes, atol=1e-5)
    even = (rollout.scores / rollout.mask.sum(-1))[:, None] * rollout.mask
    assert torch.allclose(dense_reward(rollout, plain(0 * credit, rollout), shape), even, atol=1e-6)


def test_sum_refuses_mixed_signs_and_nothing(rollout):
    credit = torch.ones(rollout.mask.shape)
    credit[:, 1] = -0.5
    for bad in (credit, 0 * credit):
        with pytest.raises(InputError, match="one sign"):
            dense_reward(rollout, plain(bad, rollout), RewardShape(("x",), (1.0,), "sum"))


def test_shapes_that_disagree_raise(attributions, rollout):
    cut = replace(attributions["shap"], credit=attributions["shap"].credit[:, :-1])
    with pytest.raises(InputError, match="'shap'"):
        shape_rewards(rollout, {"shap": cut}, RewardShape(("shap",), (1.0,)))


def test_a_missing_attribution_raises_unless_its_weight_is_zero(attributions, rollout):
    shape = RewardShape(("shap", "human"), (0.5, 0.5))
    with pytest.raises(InputError, match="no attribution for human"):
        shape_rewards(rollout, attributions, shape)
    shape_rewards(rollout, attributions, replace(shape, weights=(1.0, 0.0)))


def test_effective_share_is_one_for_uniform_and_one_token_for_terminal(attributions, rollout):
    shares = {s: effective_share(attributions[s].credit, rollout.mask) for s in ("uniform", "terminal")}
    assert torch.allclose(shares["uniform"], torch.ones(len(rollout.scores)), atol=1e-5)
    assert torch.allclose(shares["terminal"], 1 / rollout.mask.sum(-1), atol=1e-5)
    shape = RewardShape(("uniform", "terminal", "shap"), (0.5, 0.5, 0.0))
    diagnostics = shaped(rollout, attributions, shape).diagnostics
    assert diagnostics["ess/uniform"] == pytest.approx(1, abs=1e-5)
    assert diagnostics["ess/terminal"] == pytest.approx((1 / rollout.mask.sum(-1)).mean().item(), abs=1e-5)
    assert diagnostics.keys() == {"ess/uniform", "ess/terminal", "flipped"}


def test_the_sign_trap_is_measured(rollout):
    """Softmax times a negative score punishes every token, good ones too; signed flips none of a complete credit."""
    negative = replace(rollout, scores=-rollout.scores.abs() - 1)
    credit = plain(torch.ones(rollout.mask.shape), negative)
    shape = RewardShape(("x",), (1.0,))
    assert shaped(negative, {"x": credit}, shape).diagnostics["flipped"] == pytest.approx(1)
    complete = plain(negative.scores[:, None] / rollout.mask.sum(-1, keepdim=True) * rollout.mask, negative)
    assert shaped(negative, {"x": complete}, replace(shape, normalise="signed")).diagnostics["flipped"] == 0


# ---------------------------------------------------------------------------------------------------- temperatures


def test_each_source_has_its_own_temperature(attributions, rollout):
    shape = RewardShape(("shap", "lime"), (0.25, 0.75), temperature=(0.1, 3.0))
    alone = [
        dense_reward(rollout, attributions[s], RewardShape((s,), (1.0,), temperature=t))
        for s, t in zip(shape.sources, shape.temperature)
    ]
    assert torch.equal(shape_rewards(rollout, attributions, shape), 0.25 * alone[0] + 0.75 * alone[1])
    same = replace(shape, temperature=(0.5, 0.5))
    assert torch.equal(
        shape_rewards(rollout, attributions, same),
        shape_rewards(rollout, attributions, replace(shape, temperature=0.5)),
    )


def test_a_source_without_a_temperature_raises(attributions, rollout):
    shape = RewardShape(("shap", "lime"), (0.25, 0.75), temperature=(0.1, 3.0))
    with pytest.raises(InputError, match="temperature: none for 'owen'"):
        dense_reward(rollout, attributions["owen"], shape)
    with pytest.raises(InputError, match="wanted a number above 0, or 2"):
        replace(shape, temperature=(0.1,))


# ---------------------------------------------------------------------------------------------------- context

CONTEXT = RewardShape(
    ("shap", "terminal"), (0.4, 0.6), "signed", features=("position", "surprisal"), slopes=((1.5, -2.0), (0.0, 0.0))
)
numbers = st.floats(-30, 30)


@given(st.integers(0, 1000), st.sampled_from(NORMALISERS), weights, st.lists(numbers, min_size=4, max_size=4))
def test_any_slopes_sum_to_the_scores(rollout, seed, normalise, pair, slopes):
    """Also where the score is zero, and where a response has one token, as one of `rollout` does."""
    assert 1 in rollout.mask.sum(-1)
    credit = torch.randn(2, *rollout.mask.shape, generator=torch.Generator().manual_seed(seed))
    if normalise == "sum":
        credit = credit.abs() + 1e-2
    zeroed = replace(rollout, scores=rollout.scores * (torch.arange(len(rollout.scores)) % 3 > 0))
    given_ = {name: plain(c, zeroed, name) for name, c in zip("ab", credit)}
    shape = RewardShape(
        ("a", "b"),
        tuple(w / sum(pair) for w in pair),
        normalise,
        (0.3, 2.0),
        ("position", "length"),
        (tuple(slopes[:2]), tuple(slopes[2:])),
    )
    rewards = shape_rewards(zeroed, given_, shape)
    check_contract(rewards, zeroed)
    if normalise != "signed":
        assert (rewards * zeroed.scores[:, None] >= 0).all() and not rewards[zeroed.scores == 0].any()


@pytest.mark.parametrize("normalise", ["softmax", "signed"])
@pytest.mark.parametrize("feature", FEATURES)
def test_slopes_of_zero_are_the_static_shape_bit_for_bit(feature, normalise, attributions, rollout):
    static = RewardShape(("shap", "lime", "terminal"), (0.2, 0.3, 0.5), normalise, 0.1)
    flat = replace(static, features=(feature,), slopes=((0.0,),) * 3)
    assert not flat.is_contextual
    assert torch.equal(shape_rewards(rollout, attributions, flat), shape_rewards(rollout, attributions, static))
    assert shaped(rollout, attributions, flat).diagnostics == shaped(rollout, attributions, static).diagnostics


@pytest.mark.parametrize("normalise", NORMALISERS)
def test_one_hot_terminal_is_sparse_rlhf_whatever_the_slopes(normalise, attributions, rollout):
    shape = replace(CONTEXT, weights=(0.0, 1.0), normalise=normalise)
    assert not shape.is_contextual
    assert torch.equal(shape_rewards(rollout, attributions, shape), attributions["terminal"].credit)


@given(weights, st.lists(numbers, min_size=4, max_size=4), numbers)
def test_token_weights_are_the_formula_on_the_simplex(rollout, pair, slopes, shift):
    base = tuple(w / sum(pair) for w in pair)
    shape = RewardShape(
        ("a", "b"), base, features=("surprisal", "ending"), slopes=(tuple(slopes[:2]), tuple(slopes[2:]))
    )
    mixed, phi = token_weights(rollout, shape), features(rollout, shape.features).double()
    assert (mixed >= 0).all() and torch.allclose(mixed.sum(-1), torch.ones(rollout.mask.shape), atol=1e-5)
    raw = [w * (s[0] * phi[..., 0] + s[1] * phi[..., 1]).exp() for w, s in zip(base, shape.slopes)]
    assert torch.allclose(mixed.double(), torch.stack([x / sum(raw) for x in raw], -1), atol=1e-4)
    shifted = replace(shape, slopes=tuple((a + shift, b) for a, b in shape.slopes))  # only differences matter
    assert torch.allclose(token_weights(rollout, shifted), mixed, atol=1e-4)
    assert torch.allclose(mixed[~rollout.mask], torch.tensor(base), atol=1e-6)


def test_a_weight_just_below_zero_is_none_at_any_token(rollout):
    exact = RewardShape(("a", "b", "c"), (0.5, 0.5, 0.0), features=("ending",), slopes=((1.0,), (0.0,), (0.0,)))
    rounded = replace(exact, weights=(0.5, 0.5, -1e-17))
    assert torch.equal(token_weights(rollout, rounded), token_weights(rollout, exact))


def test_the_mix_of_weights_by_token(attributions, rollout):
    """Signed: what is missing of the score evenly; softmax: rescaled."""
    w = token_weights(rollout, CONTEXT)
    assert w[rollout.mask].std(0).min() > 0.1
    for normalise in ("signed", "softmax"):
        shape = replace(CONTEXT, normalise=normalise)
        rewards = shape_rewards(rollout, attributions, shape)
        parts = [dense_reward(rollout, attributions[s], shape) for s in shape.sources]
        for row, keep in enumerate(rollout.mask):
            mixed, score = sum(w[row, keep, k] * parts[k][row, keep] for k in (0, 1)), rollout.scores[row]
            spread, rescaled = mixed + (score - mixed.sum()) / keep.sum(), mixed * score / mixed.sum()
            assert torch.allclose(rewards[row, keep], spread if normalise == "signed" else rescaled, atol=1e-5)


def test_a_steep_slope_hands_each_part_to_one_source(rollout):
    """Early tokens follow a, late ones b: differences of reward within either half are its source's own."""
    credit = torch.randn(2, *rollout.mask.shape, generator=torch.Generator().manual_seed(1))
    given_ = {name: plain(c, rollout, name) for name, c in zip("ab", credit)}
    shape = RewardShape(("a", "b"), (0.5, 0.5), "signed", features=("position",), slopes=((-400.0,), (400.0,)))
    rewards = shape_rewards(rollout, given_, shape)
    for row, n in enumerate(rollout.mask.sum(-1).tolist()):
        early, late = slice(0, n // 2), slice((n + 1) // 2, n)
        for part, c in ((early, credit[0]), (late, credit[1])):
            assert torch.allclose(rewards[row, part].diff(), c[row, part].diff(), atol=1e-5)


def test_weights_that_leave_nothing_of_a_score_raise(rollout):
    """Each source pays one token only, where the other has all the weight."""
    first = torch.zeros(rollout.mask.shape)
    first[:, 0] = 1
    last = torch.zeros(rollout.mask.shape)
    last[torch.arange(len(last)), rollout.mask.sum(-1) - 1] = 1
    given_ = {
        name: replace(plain(share * rollout.scores[:, None], rollout, name), is_share=True)
        for name, share in (("first", first), ("last", last))
    }
    shape = RewardShape(("first", "last"), (0.5, 0.5), features=("position",), slopes=((400.0,), (-400.0,)))
    long = rollout.mask.sum(-1) > 1
    with pytest.raises(InputError, match=f"shape.slopes leave no weight .* in {int(long.sum())} of {len(long)}"):
        shape_rewards(rollout, given_, shape)
    check_contract(shape_rewards(rollout, given_, replace(shape, slopes=((4.0,), (-4.0,)))), rollout)
    nothing = replace(rollout, scores=0 * rollout.scores)
    unpaid = {name: replace(one, credit=0 * one.credit) for name, one in given_.items()}
    assert not shape_rewards(nothing, unpaid, shape).any()


def test_a_missing_attribution_raises_for_weights_that_see_tokens_too(attributions, rollout):
    with pytest.raises(InputError, match="no attribution for terminal"):
        shape_rewards(rollout, {"shap": attributions["shap"]}, CONTEXT)


def test_diagnostics_flip_against_the_credit_as_it_is_weighed(rollout):
    """Early tokens weigh the good source, late ones the bad: the late rewards are negative, and so is their credit."""
    scored = replace(rollout, scores=0.1 * rollout.mask.sum(-1))
    ones = torch.ones(rollout.mask.shape)
    sizes = {"good": 2, "bad": -1}
    given_ = {name: replace(plain(size * ones, scored, name), is_share=True) for name, size in sizes.items()}
    shape = RewardShape(("good", "bad"), (0.5, 0.5), "signed", features=("position",), slopes=((-9.0,), (9.0,)))
    assert (shape_rewards(scored, given_, shape) < -1).any()
    assert shaped(scored, given_, shape).diagnostics["flipped"] == 0
