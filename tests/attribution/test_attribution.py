"""Sources of credit: the contract of all of them, and the numbers of the libraries that invented them."""

import copy
import math
from dataclasses import replace
from importlib import import_module
from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import RATIONALES

from dense_rlhf.attribution import SOURCES, attribute
from dense_rlhf.attribution.agreement import known_credit, rank_agreement
from dense_rlhf.attribution.coalitions import permutation_shap, ridge_lime
from dense_rlhf.attribution.kinds import Designed, Internal
from dense_rlhf.attribution.parity import plain_scores
from dense_rlhf.attribution.sources import Shuffled
from dense_rlhf.config.params import AttributionParams
from dense_rlhf.models.word_judge import AdditiveJudge
from dense_rlhf.types import InputError

SHARES = ("terminal", "uniform", "random", "attention", "shuffled_attention")
DRAWN = ("random", "shuffled", "shuffled_attention")
PARAMS = AttributionParams(permutations=1, lime_samples=32, rationale_path=RATIONALES, seed=4)


def explain(source, reward_model, rollout, params=PARAMS):
    return attribute(reward_model, rollout, [source], params)[source]


def value_function(reward_model, rollout, row):
    """What a library is given: masks over the response's tokens (n, k) -> scores (n,); the prompt is fixed."""
    reading = reward_model.readings(rollout)[row]
    return plain_scores(reward_model, reading), len(reading.response)


def rows_with_players(rollout):
    return [row for row, k in enumerate(rollout.players.sum(-1).tolist()) if k]


# ---------------------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize("source", SOURCES)
def test_contract(source, reward_model, rollout):
    attribution, again = (explain(source, reward_model, rollout) for _ in range(2))
    assert attribution.source == source and attribution.credit.shape == rollout.mask.shape
    assert attribution.baseline.shape == attribution.gap.shape == rollout.scores.shape
    assert not attribution.credit[~rollout.mask].any() and attribution.credit.isfinite().all()
    assert attribution.credit.any() or source in ("lexicon", "rationale")  # made-up words have no valence
    gap = rollout.scores - attribution.baseline - attribution.credit.sum(-1)
    in_score_units = source not in ("lexicon", "rationale", "log_ratio")
    assert torch.allclose(attribution.gap, gap, atol=1e-5) if in_score_units else attribution.gap.isnan().all()
    assert not attribution.complete or attribution.gap.abs().max() <= 1e-5
    assert attribution.is_share == (source in SHARES) and (attribution.complete or not attribution.is_share)
    assert torch.equal(attribution.credit, again.credit) and attribution.evaluations == again.evaluations
    assert attribution.seconds > 0


@pytest.mark.parametrize("source", SOURCES)
def test_a_response_of_eos_alone_is_explained(source, reward_model, rollout, tokenizer):
    """No player: a share is all its own, the others have nothing to explain."""
    mask = rollout.mask.clone()
    mask[0] = torch.arange(mask.shape[1]) == 0
    responses, ended = rollout.responses.clone(), rollout.ended.clone()
    responses[0] = tokenizer.pad_token_id
    responses[0, 0], ended[0] = tokenizer.eos_token_id, True
    alone = replace(rollout, mask=mask, responses=responses, ended=ended)
    attribution = explain(source, reward_model, replace(alone, scores=reward_model.score(reward_model.readings(alone))))
    assert attribution.credit.isfinite().all() and not attribution.credit[~mask].any()
    assert attribution.credit[0, 0] != 0 if attribution.is_share else attribution.credit[0, 0] == 0
    assert attribution.gap[0].isnan() or attribution.gap[0].abs() < 1e-5


@pytest.mark.parametrize("source", [s for s in SOURCES if s not in DRAWN])  # drawn for the batch
def test_rows_do_not_depend_on_each_other(source, reward_model, rollout):
    fields = {name: x.flip(0) for name, x in rollout.tensors().items()}
    flipped = explain(source, reward_model, replace(rollout, **fields))
    assert torch.allclose(flipped.credit.flip(0), explain(source, reward_model, rollout).credit, atol=1e-5)


@pytest.mark.parametrize("source", [s for s in SOURCES if s not in ("terminal", "uniform", "random")])
def test_eos_is_never_a_player(source, reward_model, rollout):
    eos = rollout.mask & ~rollout.players & rollout.players.any(-1, keepdim=True)  # alone, it is all there is
    assert eos.any() and not explain(source, reward_model, rollout).credit[eos].any()


ASKING = [s for s in SOURCES if s not in ("lexicon", "rationale", "log_ratio")]  # those that read the score


def altered(reward_model, value):
    """The same reward model with every weight of its head set to `value`."""
    model = copy.deepcopy(reward_model.model)
    model.score.weight.data.fill_(value)
    return replace(reward_model, model=model)


@pytest.mark.parametrize("source", ASKING)
def test_scores_that_are_all_equal_earn_nothing(source, reward_model, rollout):
    flat = altered(reward_model, 0.0)
    attribution = explain(source, flat, replace(rollout, scores=torch.zeros_like(rollout.scores)))
    assert not attribution.credit.any() and attribution.gap.abs().max() < 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("source", ASKING)
def test_scores_that_are_not_finite_are_refused(source, bad, reward_model, rollout):
    with pytest.raises(InputError, match="not finite|the reward model gave"):
        explain(source, altered(reward_model, bad), replace(rollout, scores=torch.full_like(rollout.scores, bad)))


def test_an_unknown_source_raises(reward_model, rollout):
    with pytest.raises(InputError, match="sources: 'shapley' is not known, wanted terminal"):
        attribute(reward_model, rollout, ["terminal", "shapley"], PARAMS)


@pytest.mark.parametrize("source", SOURCES)
def test_every_line_of_the_registry_names_a_function(source):
    kind = SOURCES[source]
    if isinstance(kind, Designed):
        design = kind.design(3, PARAMS)
        assert design.masks.shape[1] == len(design.operator) == 3
    elif isinstance(kind, Internal):
        module, _, function = kind.place.partition(":")
        assert function == source and callable(getattr(import_module(module), function))
        assert kind.place.startswith("dense_rlhf.attribution.")  # a string that decides a training's key
    elif isinstance(kind, Shuffled):
        assert kind.source in SOURCES and source.startswith("shuffled")
    else:
        assert kind.__name__ == source


@pytest.mark.parametrize("source", [name for name, kind in SOURCES.items() if isinstance(kind, Shuffled)])
def test_a_placebo_has_the_credit_of_its_source_on_other_tokens(source, reward_model, rollout):
    """The same sizes, signs and sum in every response; another draw with another seed."""
    placebo, ordered = explain(source, reward_model, rollout), explain(SOURCES[source].source, reward_model, rollout)
    assert torch.equal(placebo.credit.sort(-1).values, ordered.credit.sort(-1).values)
    assert not torch.equal(placebo.credit, ordered.credit) and placebo.is_share == ordered.is_share
    assert placebo.source == source and torch.allclose(placebo.credit.sum(-1), ordered.credit.sum(-1), atol=1e-6)
    again, other = (explain(source, reward_model, rollout, replace(PARAMS, seed=seed)).credit for seed in (4, 5))
    assert torch.equal(again, placebo.credit) and not torch.equal(other, placebo.credit)


def test_a_source_of_ones_own_is_named_by_its_python_path(reward_model, rollout):
    own = "dense_rlhf.attribution.sources:uniform"
    assert torch.equal(explain(own, reward_model, rollout).credit, explain("uniform", reward_model, rollout).credit)


def test_terminal_and_uniform_are_what_they_say(reward_model, rollout):
    last = rollout.mask.sum(-1) - 1
    terminal = explain("terminal", reward_model, rollout).credit
    assert torch.equal(terminal.gather(-1, last[:, None]).squeeze(-1), rollout.scores)
    assert int((terminal != 0).sum()) == len(last)
    uniform = explain("uniform", reward_model, rollout).credit
    for row, keep in enumerate(rollout.mask):
        assert torch.allclose(uniform[row][keep], rollout.scores[row] / keep.sum())


def test_random_depends_on_the_seed(reward_model, rollout):
    first, second = (explain("random", reward_model, rollout, replace(PARAMS, seed=s)).credit for s in (0, 1))
    assert not torch.allclose(first, second)
    assert torch.allclose(first.sum(-1), rollout.scores, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- shap


@pytest.mark.parametrize("permutations", [1, 3])
def test_shap_gives_the_numbers_of_the_shap_library(permutations, reward_model, rollout):
    import shap

    params = replace(PARAMS, permutations=permutations)
    ours, rows = explain("shap", reward_model, rollout, params), rows_with_players(rollout)
    assert 1 in rollout.players.sum(-1) and len(rows) > 3
    for row in rows:
        f, k = value_function(reward_model, rollout, row)
        masker = shap.maskers.Independent(np.zeros((1, k)))
        explainer = shap.PermutationExplainer(f, masker, seed=params.seed)  # its seed works once
        theirs = explainer(np.ones((1, k)), max_evals=permutations * (2 * k + 1), silent=True)
        assert np.abs(theirs.values[0] - ours.credit[row, :k].numpy()).max() <= 1e-5
        assert abs(theirs.base_values.item() - ours.baseline[row].item()) <= 1e-5


@pytest.mark.parametrize("permutations", [1, 2])
def test_shap_is_complete(permutations, reward_model, rollout):
    attribution = explain("shap", reward_model, rollout, replace(PARAMS, permutations=permutations))
    assert attribution.gap.abs().max() < 1e-5 and attribution.credit.abs().max() > 0.05


def test_shap_counts_its_evaluations(reward_model, rollout):
    sizes = rollout.players.sum(-1).tolist()
    wanted = [len(permutation_shap(k, 1, PARAMS.seed).masks) if k else 1 for k in sizes]
    assert explain("shap", reward_model, rollout).evaluations == pytest.approx(sum(wanted) / len(rollout.scores))


def game(k, seed=0):
    """A game of pairs: y(S) = sum of weights and of pair bonuses in S."""
    rng = np.random.default_rng(seed)
    weights, pairs = rng.normal(size=k), np.triu(rng.normal(size=(k, k)), 1)
    return lambda z: z @ weights + np.einsum("ni,ij,nj->n", z, pairs, z)


def shapley(f, k):
    """By definition: the mean over all subsets of the others."""
    phi = np.zeros(k)
    for i in range(k):
        for size in range(k):
            for subset in combinations([j for j in range(k) if j != i], size):
                z = np.zeros((2, k))
                z[:, list(subset)], z[1, i] = 1, 1
                without, with_ = f(z)
                phi[i] += math.factorial(size) * math.factorial(k - size - 1) / math.factorial(k) * (with_ - without)
    return phi


def test_shap_of_an_additive_or_pairwise_game_is_exact_after_one_permutation():
    """Antithetic permutations are exact for interactions of order two."""
    design = permutation_shap(4, 1, 0)
    y = game(4)(design.masks.double().numpy())
    assert np.allclose(design.operator.numpy() @ y, shapley(game(4), 4), atol=1e-12)


def test_shap_converges_to_brute_force(reward_model, rollout):
    f, total = value_function(reward_model, rollout, int(rollout.players.sum(-1).argmax()))
    k = 4  # a game of the first four tokens, the others absent
    full = lambda z: f(np.pad(z, ((0, 0), (0, total - k))))  # noqa: E731
    exact = shapley(full, k)
    errors = []
    for permutations in (1, 400):
        design = permutation_shap(k, permutations, 0)
        errors.append(np.abs(design.operator.numpy() @ full(design.masks.numpy()) - exact).max())
    assert errors[1] < 0.03 * np.abs(exact).max() and errors[1] <= errors[0] + 1e-6


# ---------------------------------------------------------------------------------------------------- lime


def lime_text(k, samples, seed, f):
    """Explain k distinct words with lime's own text explainer; returns its masks and its coefficients."""
    from lime.lime_text import LimeTextExplainer

    words, drawn = [f"w{i}" for i in range(k)], []

    def classify(texts):
        drawn.append(np.array([[word in text.split() for word in words] for text in texts]))
        return f(drawn[-1])[:, None]

    explainer = LimeTextExplainer(feature_selection="none", random_state=np.random.RandomState(seed))
    explanation = explainer.explain_instance(
        " ".join(words), classify, labels=(0,), num_features=k, num_samples=samples
    )
    return drawn[0], np.array([weight for _, weight in sorted(explanation.local_exp[0])])


@pytest.mark.parametrize("samples, seed", [(32, 4), (100, 0)])
def test_lime_draws_the_masks_and_gives_the_numbers_of_the_lime_library(samples, seed, reward_model, rollout):
    ours = explain("lime", reward_model, rollout, AttributionParams(lime_samples=samples, seed=seed))
    for row in rows_with_players(rollout):
        f, k = value_function(reward_model, rollout, row)
        masks, weights = lime_text(k, samples, seed, f)
        drawn = {tuple(m) for m in masks.tolist()}
        assert {tuple(m) for m in ridge_lime(k, samples, seed).masks.tolist()} == drawn | {(False,) * k}
        assert np.abs(weights - ours.credit[row, :k].numpy()).max() <= 1e-5


def test_lime_equals_lime_base_on_the_same_neighbourhood():
    from lime.lime_base import LimeBase

    k, f = 6, game(6)
    masks, _ = lime_text(k, 50, 2, f)
    distances = 100 * (1 - np.sqrt(masks.mean(1)))
    base = LimeBase(lambda d: np.sqrt(np.exp(-(d**2) / 25**2)), random_state=np.random.RandomState(0))
    _, coefficients, *_ = base.explain_instance_with_data(
        masks.astype(float), f(masks)[:, None], distances, 0, k, feature_selection="none"
    )
    design = ridge_lime(k, 50, 2)
    ours = design.operator.numpy() @ f(design.masks.double().numpy())
    assert np.allclose([weight for _, weight in sorted(coefficients)], ours, atol=1e-9)


@pytest.mark.parametrize(
    "design", [permutation_shap(k, 2, 1) for k in (1, 2, 5)] + [ridge_lime(k, 20, 1) for k in (1, 5)]
)
def test_designs_start_with_the_empty_and_the_full_coalition_and_repeat_none(design):
    assert not design.masks[0].any() and design.masks[1].all()
    assert len(design.masks.unique(dim=0)) == len(design.masks)
    assert design.operator.shape == design.masks.T.shape
    assert design.operator.sum(-1).abs().max() < 1e-9  # a constant explains nothing


# ---------------------------------------------------------------------------------------------------- attention


def test_attention_is_the_eager_last_layer_of_the_unpadded_sequence(reward_model, rollout, tokenizer):
    eager = copy.deepcopy(reward_model.model)
    eager.set_attn_implementation("eager")
    credit = explain("attention", reward_model, rollout).credit
    for row in rows_with_players(rollout):
        query = rollout.queries[row][rollout.query_mask[row]]
        response = rollout.responses[row][rollout.players[row]]
        ids = torch.cat([query, response, torch.tensor([tokenizer.eos_token_id])])[None]
        with torch.no_grad():
            attention = eager(input_ids=ids, output_attentions=True).attentions[-1][0].mean(0)[-1]
        on_response = attention[len(query) : -1]
        share = credit[row, : len(response)] / rollout.scores[row]
        assert torch.allclose(share, on_response / on_response.sum(), atol=1e-5)
        assert len(response) == 1 or on_response.max() > 1.05 * on_response.min()


def test_attention_leaves_the_model_as_it_was(reward_model, rollout):
    before = reward_model.model.config._attn_implementation
    explain("attention", reward_model, rollout)
    assert reward_model.model.config._attn_implementation == before != "eager"


# ---------------------------------------------------------------------------------------------------- agreement


def test_rank_agreement_of_itself_is_one_and_of_an_even_spread_nan(reward_model, rollout):
    known, players = explain("shap", reward_model, rollout).credit, rollout.players
    several = players.sum(-1) > 1
    for credit, wanted in ((known, 1), (2 * known + 1, 1), (-known, -1)):
        assert np.allclose(rank_agreement(credit, known, players)[several], wanted)
    assert np.isnan(rank_agreement(known, known, players)[~several]).all()
    uniform = explain("uniform", reward_model, rollout).credit
    assert np.isnan(rank_agreement(uniform, known, players)).all()


def test_known_credit_is_the_judges_and_zero_elsewhere(rollout, tokenizer):
    judge = AdditiveJudge("j", {chr(c): 1.0 for c in range(97, 123)})
    credit = known_credit(judge, rollout, tokenizer)
    assert not credit[~rollout.players].any()
    texts = [tokenizer.decode(ids[keep]) for ids, keep in zip(rollout.responses, rollout.players)]
    assert credit.sum(-1).tolist() == pytest.approx([judge.score(text) for text in texts], abs=1e-5)
