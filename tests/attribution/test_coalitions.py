"""Coalition designs: the numbers of shap and lime, exact values by brute force, and what each design promises."""

from math import comb, factorial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dense_rlhf.attribution.coalitions import (
    Design,
    _leverage_sample,
    kernel_shap,
    leave_one_out,
    leverage_shap,
    owen,
    permutation_shap,
    ridge_lime,
    shared_lime,
)
from dense_rlhf.types import InputError

COMPLETE = {
    "permutation": lambda k, seed: permutation_shap(k, 2, seed),
    "owen": lambda k, seed: owen(k),
    "kernel": lambda k, seed: kernel_shap(k, 10 * k, seed),
    "leverage": lambda k, seed: leverage_shap(k, 10 * k, seed),
}
COARSE = {"owen 2": lambda k, seed: owen(k, 2), "kernel min": lambda k, seed: kernel_shap(k, 2 * k, seed)}
PARTIAL = {
    "lime": lambda k, seed: ridge_lime(k, 40, seed),
    "shared": lambda k, seed: shared_lime(k, 2, seed),
    "leave one out": lambda k, seed: leave_one_out(k),
}
EVERY = COMPLETE | COARSE | PARTIAL


def credit(design: Design, f) -> np.ndarray:
    return design.operator.numpy() @ f(design.masks.double().numpy())


def game(k, seed=0):
    """Pairs and a random network: interactions of every order."""
    rng = np.random.default_rng(seed)
    pairs, first, second = rng.normal(size=(k, k)), rng.normal(size=(k, 12)), rng.normal(size=12)
    return lambda z: np.einsum("ni,ij,nj->n", z, pairs, z) / k + np.tanh(z @ first + 0.3) @ second + 2


def pairwise(k, seed=0):
    weights, pairs = np.random.default_rng(seed).normal(size=(2, k, k))
    return lambda z: z @ weights[0] + np.einsum("ni,ij,nj->n", z, pairs, z)


def shapley(f, k):
    """By definition, over all subsets."""
    masks = (np.arange(2**k)[:, None] >> np.arange(k) & 1).astype(bool)
    y, number, sizes = f(masks.astype(float)), np.arange(2**k), masks.sum(1)
    chance = np.array([factorial(s) * factorial(k - s - 1) / factorial(k) for s in range(k)] + [0])
    return np.array([(chance[sizes] * (y[number | 1 << i] - y) * ~masks[:, i]).sum() for i in range(k)])


def close(found, wanted, tolerance=1e-9):
    return np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


# ---------------------------------------------------------------------------------------------------- libraries


def partition_tree(k, depth):
    """The halving as shap wants it: children before parents, the root last, a negative height where it stops."""
    rows = []

    def grow(start, stop, level):
        if stop - start == 1:
            return start
        middle = (start + stop) // 2
        children = grow(start, middle, level + 1), grow(middle, stop, level + 1)
        rows.append([*children, 1.0 if depth is None or level < depth else -1.0, stop - start])
        return k + len(rows) - 1

    grow(0, k, 0)
    return np.array(rows, float).reshape(-1, 4)


@pytest.mark.parametrize("k, depth", [(k, None) for k in (1, 2, 3, 5, 8, 11, 16)] + [(11, 1), (11, 2), (16, 3), (5, 9)])
def test_owen_gives_the_numbers_of_the_shap_library(k, depth):
    import shap

    f, masker = game(k), shap.maskers.Partition(np.zeros((1, k)), clustering=partition_tree(k, depth))
    theirs = shap.PartitionExplainer(f, masker)(np.ones((1, k)), max_evals=10**6, fixed_context=None, silent=True)
    assert close(credit(owen(k, depth), f), theirs.values[0])


@pytest.mark.parametrize(
    "k, samples, seed",
    [(1, 10, 0), (2, 2, 0), (2, 100, 1), (3, 4, 0), (4, 9, 5), (5, 40, 1), (6, 30, 2), (7, 100, 3), (8, 200, 0)]
    + [(9, 200, 1), (10, 900, 2), (11, 2070, 0), (12, 2072, 4), (16, 300, 0), (24, 240, 0), (24, 2096, 7)],
)
def test_kernel_shap_gives_the_numbers_of_the_shap_library(k, samples, seed):
    import shap

    f, design = game(k), kernel_shap(k, samples, seed)
    explainer = shap.KernelExplainer(f, np.zeros((1, k)))
    np.random.seed(seed)
    theirs = explainer.shap_values(np.ones((1, k)), nsamples=samples, l1_reg=False, silent=True)
    assert close(credit(design, f), theirs[0])
    assert len(design.masks) <= samples + 2


@pytest.mark.parametrize("k", [1, 2, 3, 8, 33, 64])
def test_permutation_shap_gives_the_numbers_of_the_shap_library(k):
    import shap

    f = game(k)
    explainer = shap.PermutationExplainer(f, shap.maskers.Independent(np.zeros((1, k))), seed=3)
    theirs = explainer(np.ones((1, k)), max_evals=2 * (2 * k + 1), silent=True)
    assert close(credit(permutation_shap(k, 2, 3), f), theirs.values[0])


@pytest.mark.parametrize("k, permutations", [(1, 1), (2, 3), (6, 4), (24, 2)])
def test_shared_lime_is_limes_fit_on_the_masks_of_permutation_shap(k, permutations):
    from lime.lime_base import LimeBase

    rng, order, rows = np.random.RandomState(5), np.arange(k), [np.ones(k)]
    for _ in range(permutations):  # one player joins after the other, then they leave in the same order
        rng.shuffle(order)
        z = np.zeros(k)
        for player in order:
            rows.append(z.copy())
            z[player] = 1
        for player in order:
            z[player] = 0
            rows.append(z.copy())
    masks, f = np.array(rows), game(k)
    base = LimeBase(lambda d: np.sqrt(np.exp(-(d**2) / 25**2)), random_state=np.random.RandomState(0))
    distances = 100 * (1 - np.sqrt(masks.mean(1)))
    theirs = base.explain_instance_with_data(masks, f(masks)[:, None], distances, 0, k, feature_selection="none")[1]
    design = shared_lime(k, permutations, 5)
    assert close(credit(design, f), np.array([weight for _, weight in sorted(theirs)]))
    assert torch.equal(design.masks, permutation_shap(k, permutations, 5).masks)


# ---------------------------------------------------------------------------------------------------- exact values


@pytest.mark.parametrize("k", range(1, 12))
def test_least_squares_on_all_subsets_is_exact(k):
    exact = shapley(game(k), k)
    for design in (kernel_shap(k, 2 * k + 2048, 0), leverage_shap(k, 2**k, 0)):
        assert len(design.masks) == 2**k
        assert close(credit(design, game(k)), exact)


@pytest.mark.parametrize("k", [1, 2, 5, 8, 11])
def test_pairs_of_complements_are_exact_where_players_interact_in_pairs(k):
    exact = shapley(pairwise(k), k)
    for design in (permutation_shap(k, 1, 0), leverage_shap(k, 8 * k, 0)):
        assert close(credit(design, pairwise(k)), exact)


def test_estimates_come_closer_with_more_scores():
    k, exact = 11, shapley(game(11), 11)
    for method, few, many in ((permutation_shap, 1, 40), (kernel_shap, 60, 900), (leverage_shap, 60, 900)):
        errors = [np.mean([np.abs(credit(method(k, n, s), game(k)) - exact) for s in range(8)]) for n in (few, many)]
        assert errors[1] < 0.35 * errors[0] and errors[1] < 0.06 * np.abs(exact).max()


def test_owen_by_hand():
    """Of three players the first stands alone, and the others are one for it."""
    y = {(): 1.0, (0,): 2.0, (1,): 5.0, (2,): 7.0, (0, 1): 11.0, (0, 2): 3.0, (1, 2): 4.0, (0, 1, 2): 20.0}
    f = lambda z: np.array([y[tuple(np.flatnonzero(row))] for row in z])  # noqa: E731
    first = (2 - 1 + 20 - 4) / 2
    second = (5 - 1 + 4 - 7 + 11 - 2 + 20 - 3) / 4
    assert np.allclose(credit(owen(3), f), [first, second, 19 - first - second], atol=1e-12)
    assert np.allclose(credit(owen(3, 1), f), [first, (19 - first) / 2, (19 - first) / 2], atol=1e-12)
    assert np.allclose(credit(leave_one_out(3), f), [20 - 4, 20 - 3, 20 - 11], atol=1e-12)


def test_counts_are_those_documented():
    for k in (1, 2, 4, 8, 16, 32, 64):
        assert len(owen(k).masks) == 2 + 2 * (k * k - 1) // 3
        assert len(leave_one_out(k).masks) == {1: 2, 2: 4}.get(k, k + 2)
        assert len(permutation_shap(k, 3, 0).masks) <= 2 + 3 * (2 * k - 2)
    assert len(owen(64, 3).masks) == len(owen(8).masks) == 44
    assert len(leverage_shap(64, 301, 0).masks) == 302
    assert len(ridge_lime(24, 64, 0).masks) <= 65


# ---------------------------------------------------------------------------------------------------- leverage


@pytest.mark.parametrize("k, samples", [(4, 8), (5, 12), (6, 14), (6, 31)])
def test_leverage_samples_expect_the_kernels_equations(k, samples):
    """Over seeds a subset's weight, zero where it is not drawn, has the kernel weight as its mean."""
    total, runs = np.zeros(2**k), 1500
    for seed in range(runs):
        masks, weight = _leverage_sample(k, samples, seed)
        assert len(masks) == 2 * (samples // 2)
        total[masks @ (1 << np.arange(k))] += weight
    sizes = np.array([bin(n).count("1") for n in range(1, 2**k - 1)])
    kernel = np.array([(k - 1) / (comb(k, s) * s * (k - s)) for s in sizes])
    assert np.abs(total[1:-1] / runs / kernel - 1).max() < 0.2


@pytest.mark.parametrize("function", [kernel_shap, leverage_shap])
def test_numbers_of_numpy_will_do(function):
    made, own = (function.__wrapped__(k, 300, 0) for k in (np.int64(70), 70))  # the cache takes them for Python's
    assert made.masks.equal(own.masks) and made.operator.equal(own.operator)


def test_leverage_draws_no_subset_twice():
    """Nor, of half the players, a subset and later its complement."""
    for seed in range(60):
        masks, _ = _leverage_sample(8, 40, seed)
        assert len(np.unique(masks, axis=0)) == len(masks) == 40


def test_leverage_sizes_are_uniform_and_complements_present():
    masks, _ = _leverage_sample(40, 390, 0)
    counts = np.bincount(masks.sum(1), minlength=41)[1:40]
    assert counts.min() >= 9 and counts.max() <= 11
    assert len(np.unique(masks, axis=0)) == len(masks)
    assert {tuple(row) for row in masks} == {tuple(~row) for row in masks}


# ---------------------------------------------------------------------------------------------------- promises

players, seeds = st.integers(1, 14), st.integers(0, 10**6)


@given(st.sampled_from(sorted(EVERY)), players, seeds)
def test_a_design_begins_with_empty_and_full_repeats_none_and_ignores_constants(name, k, seed):
    design = EVERY[name](k, seed)
    assert design.masks.dtype == torch.bool and design.operator.dtype == torch.float64
    assert not design.masks[0].any() and design.masks[1].all()
    assert len(design.masks.unique(dim=0)) == len(design.masks)
    assert design.operator.shape == design.masks.T.shape
    assert design.operator.sum(-1).abs().max() < 1e-9


@given(st.sampled_from(sorted(COMPLETE | COARSE)), players, seeds)
def test_complete_credit_sums_to_the_gap(name, k, seed):
    design = EVERY[name](k, seed)
    wanted = torch.zeros(len(design.masks), dtype=torch.float64)
    wanted[:2] = torch.tensor([-1.0, 1.0])
    assert torch.allclose(design.operator.sum(0), wanted, atol=1e-9)


@given(st.sampled_from([*sorted(COMPLETE), "leave one out"]), players, seeds)
def test_an_additive_game_is_recovered(name, k, seed):
    weights = np.random.default_rng(seed).normal(size=k)
    assert close(credit(EVERY[name](k, seed), lambda z: 3 + z @ weights), weights)


@given(st.sampled_from(sorted(EVERY)), players, seeds)
def test_a_design_depends_on_its_seed_alone(name, k, seed):
    design = EVERY[name](k, seed)
    for function in (permutation_shap, owen, kernel_shap, leverage_shap, ridge_lime, shared_lime, leave_one_out):
        function.cache_clear()
    again = EVERY[name](k, seed)
    assert again is not design
    assert torch.equal(again.masks, design.masks) and torch.equal(again.operator, design.operator)


def test_no_design_touches_numpys_global_random_state():
    before = np.random.get_state()[1].tolist(), np.random.get_state()[2]
    for make in EVERY.values():
        make(13, 12345)
    assert (np.random.get_state()[1].tolist(), np.random.get_state()[2]) == before


def test_seeds_differ():
    for name in ("permutation", "kernel", "leverage", "lime", "shared"):
        first, second = (EVERY[name](12, seed).masks for seed in (0, 1))
        assert first.shape != second.shape or not torch.equal(first, second)


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", sorted(EVERY))
def test_no_players_raise(name):
    with pytest.raises(InputError, match="k is 0, wanted at least 1; leave out responses without a token"):
        EVERY[name](0, 0)


@pytest.mark.parametrize(
    "function, arguments, message",
    [
        (kernel_shap, (10, 17, 0), r"samples is 17, wanted at least 18; 10 players need 2 \(k - 1\); take more"),
        (leverage_shap, (10, 17, 0), r"samples is 17, wanted at least 18; .*permutation_shap"),
        (permutation_shap, (5, 0, 0), "permutations is 0, wanted at least 1; take 1"),
        (shared_lime, (5, 0, 0), "permutations is 0, wanted at least 1; take those"),
        (ridge_lime, (5, 1, 0), "samples is 1, wanted at least 2; the full text is the first"),
        (owen, (5, 0), "depth is 0, wanted at least 1; take None"),
    ],
)
def test_too_little_raises(function, arguments, message):
    with pytest.raises(InputError, match=message):
        function(*arguments)
