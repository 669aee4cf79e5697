"""Faithfulness against reward models whose true credit is known, and labels that people gave to words."""

from dataclasses import dataclass, replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SENTENCES, SHARED
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dense_rlhf.attribution import attribute
from dense_rlhf.attribution import faithfulness as measured
from dense_rlhf.attribution.agreement import average_precision
from dense_rlhf.attribution.faithfulness import (
    MEASURES,
    RANDOM,
    STEPS,
    Draws,
    aopc,
    area,
    completeness,
    evenness,
    faithfulness,
    fresh_coalitions,
    infidelity,
    leave_one_out_tau,
    path_counts,
    removal_agreement,
    removal_path,
    seed_agreement,
    surrogate_beyond_size,
    surrogate_correlation,
    surrogate_r2,
)
from dense_rlhf.attribution.human_marks import (
    MarkedText,
    load_sst_trees,
    load_toxic_spans,
    parse_tree,
    readable,
    text_rollout,
    token_marks,
)
from dense_rlhf.config.params import AttributionParams
from dense_rlhf.models.reward_model import RewardModel
from dense_rlhf.models.tiny_recipe import train_tokenizer
from dense_rlhf.types import Attribution, InputError

PARAMS = AttributionParams(permutations=2, lime_samples=256, seed=4)
TEXTS = [*SENTENCES, "a", "the plot was bad and the cast was bad", "I loved it, a great film, good music, great"]


@dataclass(frozen=True)
class Planted(RewardModel):
    """The score is a sum over present tokens, and `bonus` for every three of them: what each earns is known."""

    weights: torch.Tensor | None = None  # (vocabulary,)
    bonus: float = 0.0

    def read_whole(self, sequences, attended=None, segments=None):
        assert attended is None
        bare = [[token for token in sequence if token not in self.suffix] for sequence in sequences]
        tokens = [torch.tensor(sequence, dtype=torch.long) for sequence in bare]
        return torch.stack([0.3 + self.weights[ids].sum() + self.bonus * (len(ids) // 3) for ids in tokens])


def planted(tokenizer, bonus=0.0, seed=0):
    weights = torch.randn(len(tokenizer), generator=torch.Generator().manual_seed(seed))
    kind = SimpleNamespace(model_type="planted", max_position_embeddings=None)
    kind.get_text_config = lambda: kind
    embeddings = SimpleNamespace(weight=torch.empty(len(tokenizer), 1))
    parts = dict(base_model=None, get_input_embeddings=lambda: embeddings)
    model = SimpleNamespace(config=kind, **parts, device=torch.device("cpu"), dtype=torch.float32)
    return Planted(model, tokenizer, weights=weights, bonus=bonus)


def truth(model, rollout):
    """The credit of an additive planted model."""
    credit = model.weights[rollout.responses].masked_fill(~rollout.players, 0)
    baseline = torch.full_like(rollout.scores, 0.3)
    return Attribution("truth", credit, baseline, rollout.scores - baseline - credit.sum(-1), 0.0, 0.0, True)


def reversed_of(attribution):
    return replace(
        attribution, source="reversed", credit=-attribution.credit, gap=attribution.gap + 2 * attribution.credit.sum(-1)
    )


@pytest.fixture(scope="module")
def additive(tokenizer):
    """Model, rollout, and all measures of the truth, its reverse, the library's sources and the controls."""
    model = planted(tokenizer)
    rollout = text_rollout(TEXTS, tokenizer, model)
    sources = attribute(model, rollout, ["terminal", "uniform", "random", "shuffled", "shap", "lime"], PARAMS)
    sources |= {"truth": truth(model, rollout), "reversed": reversed_of(truth(model, rollout))}
    return model, rollout, sources, faithfulness(model, rollout, sources, PARAMS)


def of(table, source, measure):
    chosen = table[(table["source"] == source) & (table["measure"] == measure)]
    assert len(chosen) == len(TEXTS) and chosen["response"].tolist() == list(range(len(TEXTS)))
    return chosen["value"].to_numpy()


SEVERAL = np.array([text != "a" for text in TEXTS])


# ---------------------------------------------------------------------------------------------------- a planted model


@pytest.mark.parametrize("source", ["truth", "shap"])
def test_the_credit_of_an_additive_model_is_faithful(source, additive):
    table = additive[3]
    for measure in ("surrogate_r2", "surrogate_correlation", "leave_one_out_tau"):
        assert (of(table, source, measure)[SEVERAL] > 0.9).all(), measure  # rounding splits ties of equal tokens
    for measure in ("surrogate_r2", "surrogate_correlation", "surrogate_beyond_size"):
        assert np.allclose(of(table, source, measure)[SEVERAL], 1, atol=1e-4), measure
    assert np.nanmax(of(table, source, "infidelity")) < 1e-8 and np.nanmax(of(table, source, "gap")) < 1e-4
    chance = of(table, RANDOM, "comprehensiveness")
    assert (of(table, source, "comprehensiveness") > chance)[SEVERAL].all()
    assert (of(table, source, "sufficiency") < of(table, RANDOM, "sufficiency"))[SEVERAL].all()
    for measure in ("deletion", "insertion"):
        assert (of(table, source, measure)[SEVERAL] > 0.1).all()


def test_reversed_credit_is_worse_than_none(additive):
    table = additive[3]
    for measure in ("surrogate_correlation", "surrogate_beyond_size", "leave_one_out_tau"):
        assert (of(table, "reversed", measure)[SEVERAL] < -0.9).all()
    for measure in ("surrogate_r2", "deletion", "insertion"):
        assert (of(table, "reversed", measure)[SEVERAL] < 0).all(), measure
    chance = of(table, RANDOM, "comprehensiveness")
    assert (of(table, "reversed", "comprehensiveness") < chance)[SEVERAL].all()


def test_controls_are_near_chance(tokenizer):
    """Over many responses a shuffled ranking gains nothing, to 3 standard errors; the truth does."""
    model, rng = planted(tokenizer, seed=1), np.random.default_rng(0)
    words = sorted({word for text in SENTENCES for word in text.split()})
    rollout = text_rollout([" ".join(rng.choice(words, 12)) for _ in range(60)], tokenizer, model)
    sources = attribute(model, rollout, ["shuffled", "random"], PARAMS) | {"truth": truth(model, rollout)}
    table = faithfulness(model, rollout, sources, PARAMS, Draws(fresh=16))
    means = table.groupby(["source", "measure"])["value"].agg(["mean", "sem"])
    for source in ("shuffled", "random"):
        for measure in ("deletion", "insertion", "leave_one_out_tau", "surrogate_beyond_size"):
            mean, sem = means.loc[(source, measure)]
            assert abs(mean) < 3 * sem and means.loc[("truth", measure), "mean"] > 10 * sem, (source, measure)
        assert means.loc[(source, "surrogate_correlation"), "mean"] > 0.3  # size alone tells much


def test_an_even_spread_ranks_nothing_and_explains_little(additive):
    table = additive[3]
    for measure in (
        "comprehensiveness",
        "sufficiency",
        "deletion",
        "insertion",
        "leave_one_out_tau",
        "surrogate_beyond_size",
    ):
        assert np.isnan(of(table, "uniform", measure)).all()
    assert (of(table, "uniform", "surrogate_r2")[SEVERAL] < 0.7).all()
    assert np.allclose(of(table, "uniform", "evenness"), 1)
    lengths = additive[1].mask.sum(-1).numpy()
    assert np.allclose(of(table, "terminal", "evenness"), 1 / lengths)


def test_a_response_of_one_token_is_not_measured_by_forwards(additive):
    table = additive[3]
    assert not SEVERAL.all()
    free = {"gap", "relative_gap", "evenness"}
    for source, measure in product(additive[2], set(MEASURES) - free):
        assert np.isnan(of(table, source, measure)[~SEVERAL]).all()
    assert np.isfinite(of(table, "shap", "gap")).all()


def test_interactions_show_in_the_surrogate_only(tokenizer):
    additive, curved = planted(tokenizer), planted(tokenizer, bonus=1.5)
    rollout = text_rollout(TEXTS[:4], tokenizer, curved)
    params = replace(PARAMS, permutations=20)
    attributions = {"shap": attribute(curved, rollout, ["shap"], params)["shap"]}
    table = faithfulness(curved, rollout, attributions, params, Draws(fresh=200)).set_index("measure")["value"]
    assert (table["surrogate_r2"] < 0.999).all() and (table["surrogate_r2"] > 0.5).all()
    assert (table["infidelity"] > 0.01).all() and (table["gap"] < 1e-4).all()
    attributions = {"shap": replace(attributions["shap"], baseline=attributions["shap"].baseline + 5)}
    shifted = faithfulness(curved, rollout, attributions, params, Draws(fresh=200)).set_index("measure")["value"]
    assert (shifted["surrogate_r2"] < -1).all()
    assert np.allclose(shifted["surrogate_correlation"], table["surrogate_correlation"])
    assert additive.bonus == 0


def test_numbers_by_hand(tokenizer):
    """Every measure once more, from its definition, one plain forward at a time."""
    model = planted(tokenizer, bonus=0.7)
    rollout = text_rollout(["the film was good and the cast was great"], tokenizer, model)
    attributions = attribute(model, rollout, ["shap"], PARAMS)
    table = faithfulness(model, rollout, attributions, PARAMS, Draws(5)).set_index(["source", "measure"])["value"]
    ids, credit = rollout.responses[0], attributions["shap"].credit[0].double().numpy()
    k, baseline = len(ids), attributions["shap"].baseline.item()

    def f(keep):
        return model.outputs([ids[torch.as_tensor(np.asarray(keep, bool))].tolist()]).item()

    full, empty = f(np.ones(k)), f(np.zeros(k))
    sign = 1 if full > empty else -1
    order = np.argsort(-sign * credit)
    drops, lacks = [], []
    for tenth in range(1, 11):
        top = order[: int(np.ceil(round(k * tenth / 10, 6)))]
        keep = np.isin(np.arange(k), top)
        drops.append(sign * (full - f(~keep)))
        lacks.append(sign * (full - f(keep)))
    assert table["shap", "comprehensiveness"] == pytest.approx(np.mean(drops), abs=1e-5)
    assert table["shap", "sufficiency"] == pytest.approx(np.mean(lacks), abs=1e-5)
    rng = np.random.default_rng([5, *ids.tolist()])
    fresh = fresh_coalitions(k, 64, rng)
    y = np.array([f(keep) for keep in fresh])
    wanted = 1 - np.mean((y - baseline - fresh @ credit) ** 2) / np.var(y)
    assert table["shap", "surrogate_r2"] == pytest.approx(wanted, abs=1e-4)
    assert table["shap", "infidelity"] == pytest.approx(np.mean(((~fresh) @ credit - (full - y)) ** 2), abs=1e-4)
    assert table["shap", "surrogate_correlation"] == pytest.approx(np.corrcoef(fresh @ credit, y)[0, 1], abs=1e-4)


def test_areas_are_beside_a_random_order(tokenizer):
    """In tenths of 10 or 20 players trapezoids are plain means, so the areas say what ERASER's two say against it."""
    model = planted(tokenizer, bonus=0.7)
    ids = tokenizer(" ".join(SENTENCES))["input_ids"]
    rollout = text_rollout([tokenizer.decode(ids[:20]), tokenizer.decode(ids[:10])], tokenizer, model)
    assert rollout.mask.sum(-1).tolist() == [20, 10]
    table = faithfulness(model, rollout, attribute(model, rollout, ["lime"], PARAMS), PARAMS)
    value = table.set_index(["source", "measure", "response"])["value"]
    for row in (0, 1):
        ours, chance = value["lime"].xs(row, level=1), value[RANDOM].xs(row, level=1)
        assert ours["deletion"] == pytest.approx(ours["comprehensiveness"] - chance["comprehensiveness"])
        assert ours["insertion"] == pytest.approx(chance["sufficiency"] - ours["sufficiency"])


def test_a_response_below_its_baseline_is_read_the_other_way(tokenizer):
    """Mirroring the model and the credit changes no measure of ranking."""
    model = planted(tokenizer)
    mirrored = replace(model, scale=-1.0)
    tables = []
    for one in (model, mirrored):
        rollout = text_rollout(TEXTS, tokenizer, one)
        tables.append(faithfulness(one, rollout, attribute(one, rollout, ["shap"], PARAMS), PARAMS))
    assert (rollout.scores - 0.3 > 0).any() and (rollout.scores - 0.3 < 0).any()
    a, b = (t[(t["measure"] != "evenness")]["value"].to_numpy() for t in tables)
    assert np.allclose(a, b, atol=1e-3, equal_nan=True)


def test_a_share_says_how_much_not_which_way(additive):
    """Its support is its weights, even where the score has the other sign than the deviation from the baseline."""
    model, rollout, _, _ = additive
    weights = torch.rand(rollout.mask.shape, generator=torch.Generator().manual_seed(1)) * rollout.mask
    credit = weights * rollout.scores[:, None]
    mirrored = [Attribution("s", c, rollout.scores, rollout.scores, 0, 0, is_share=True) for c in (credit, -credit)]
    a, b = (faithfulness(model, rollout, {"s": shares}, PARAMS) for shares in mirrored)
    ranking = a["measure"].isin(
        ["comprehensiveness", "sufficiency", "deletion", "insertion", "leave_one_out_tau", "surrogate_correlation"]
    )
    assert np.allclose(a[ranking]["value"], b[ranking]["value"], equal_nan=True)


def test_credit_in_other_units_has_a_correlation_but_no_r2(additive):
    model, rollout, sources, table = additive
    other = replace(sources["truth"], credit=7 * sources["truth"].credit, gap=torch.full_like(rollout.scores, np.nan))
    measured = faithfulness(model, rollout, {"other": other}, PARAMS)
    for measure in ("surrogate_r2", "infidelity", "gap", "relative_gap"):
        assert np.isnan(of(measured, "other", measure)).all()
    for measure in ("surrogate_correlation", "comprehensiveness", "leave_one_out_tau", "deletion"):
        assert np.allclose(of(measured, "other", measure), of(table, "truth", measure), equal_nan=True, atol=1e-6)


def test_credit_of_eos_is_always_there(tokenizer):
    model = planted(tokenizer)
    plain = text_rollout(TEXTS[:2], tokenizer, model)
    eos = torch.full((2, 1), tokenizer.eos_token_id)
    lengths = plain.mask.sum(-1, keepdim=True)
    responses = torch.cat([plain.responses, eos], 1).scatter(1, lengths, eos)
    mask = torch.arange(responses.shape[1]) <= lengths
    zero = torch.zeros(mask.shape)
    rollout = replace(
        plain,
        responses=responses,
        mask=mask,
        logprobs=zero,
        ref_logprobs=zero,
        values=zero,
        ended=torch.ones(2, dtype=torch.bool),
    )
    exact = truth(model, rollout)
    moved = replace(exact, credit=exact.credit.scatter(1, lengths, 0.3), baseline=torch.zeros(2))
    a, b = (faithfulness(model, rollout, {"s": attribution}, PARAMS)["value"] for attribution in (exact, moved))
    measure = faithfulness(model, rollout, {"s": exact}, PARAMS)["measure"]
    same = ~measure.isin(["evenness", "gap", "relative_gap"])
    assert np.allclose(a[same], b[same], atol=1e-5)


# ---------------------------------------------------------------------------------------------------- gathering


def test_forwards_are_shared_and_counted(additive):
    """One pass for both ends of each response, one for all the rest, no coalition of a response twice."""
    model, rollout, sources, _ = additive
    seen = {}

    def spy(reward_model, readings, masks, *rest):
        for reading, mask in zip(readings, masks):
            assert len(np.unique(mask, axis=0)) == len(mask)
            seen.setdefault(reading.response, []).append(len(mask))
        return real(reward_model, readings, masks, *rest)

    real, measured.coalition_scores = measured.coalition_scores, spy
    try:
        faithfulness(model, rollout, sources, PARAMS, Draws(fresh=8, orders=2))
    finally:
        measured.coalition_scores = real
    assert len(seen) == SEVERAL.sum()
    for response, asked in seen.items():
        k, paths = len(response), len(sources) - 1 + 2  # uniform ranks nothing
        assert len(asked) == 2 and asked[0] == 2 and asked[1] <= 8 + k + 2 + 2 * (STEPS - 1) * paths


def test_rows_and_sources_do_not_depend_on_each_other(additive):
    model, rollout, sources, table = additive
    few = torch.tensor([5, 1])
    prompts = tuple(rollout.prompts[row] for row in few.tolist())
    part = replace(rollout, **{name: value[few] for name, value in rollout.tensors().items()}, prompts=prompts)
    shap = sources["shap"]
    shap = replace(shap, credit=shap.credit[few], baseline=shap.baseline[few], gap=shap.gap[few])
    alone = faithfulness(model, part, {"shap": shap}, PARAMS)
    for measure in MEASURES:
        values = alone[(alone["source"] == "shap") & (alone["measure"] == measure)]["value"]
        assert np.allclose(values, of(table, "shap", measure)[few], atol=1e-5, equal_nan=True), measure
    again = faithfulness(model, part, {"shap": shap}, PARAMS, Draws(1))
    assert not np.allclose(again["value"], alone["value"], equal_nan=True)


@pytest.mark.parametrize("removal", ["drop", "attention_mask", "replace:the"])
def test_a_real_reward_model(removal, reward_model, rollout):
    params = replace(PARAMS, removal=removal)
    attributions = attribute(reward_model, rollout, ["terminal", "uniform", "random", "shap", "lime"], params)
    attributions |= {"reversed": reversed_of(attributions["shap"])}
    table = faithfulness(reward_model, rollout, attributions, params, Draws(fresh=32))
    values = table.groupby(["source", "measure"])["value"]
    mean, B = values.mean(), len(rollout.scores)
    assert set(table["measure"]) == set(MEASURES) and set(values.size()) == {B}
    for measure in ("surrogate_correlation", "leave_one_out_tau", "deletion", "insertion"):
        assert mean["shap", measure] > 0.01 > mean["reversed", measure], measure
    assert mean["shap", "surrogate_r2"] > max(mean["uniform", "surrogate_r2"], 0)


def test_words_are_removed_whole(tokenizer, reward_model):
    params = replace(PARAMS, players="words")
    rollout = text_rollout(SENTENCES, tokenizer, reward_model)
    attributions = attribute(reward_model, rollout, ["shap"], params)
    table = faithfulness(reward_model, rollout, attributions, params)
    readings = reward_model.readings(rollout)
    words = [measured.player_groups(reward_model, reading, "words").max() + 1 for reading in readings]
    assert words == [len(text.split()) for text in SENTENCES] != [len(reading.response) for reading in readings]
    assert table[table["measure"] == "gap"]["value"].max() < 1e-4
    assert (table[table["measure"] == "surrogate_correlation"]["value"] > 0.2).all()


def test_progress_wraps_the_batches_and_may_cancel(tokenizer, additive):
    class Cancelled(Exception):
        pass

    def cancel(jobs):
        raise Cancelled

    model, rollout, sources, _ = additive
    with pytest.raises(Cancelled):
        faithfulness(model, rollout, {"shap": sources["shap"]}, PARAMS, progress=cancel)


def test_bad_input_raises(additive, tokenizer):
    model, rollout, sources, _ = additive
    shap = sources["shap"]
    with pytest.raises(InputError, match="credit of 'shap' is"):
        faithfulness(model, rollout, {"shap": replace(shap, credit=shap.credit[:, 1:])}, PARAMS)
    with pytest.raises(InputError, match="another name"):
        faithfulness(model, rollout, {RANDOM: shap}, PARAMS)
    with pytest.raises(InputError, match="fresh is 1"):
        Draws(fresh=1)


def test_credit_on_a_policys_letters_is_measured_on_the_reward_models_tokens(tokenizer):
    """The truth, told letter by letter, is as faithful as on the tokens; its letters in another order are not."""
    other, model = train_tokenizer(["zebra"], 262), planted(tokenizer)
    letters = replace(model, policy_tokenizer=other)
    rollout = text_rollout(TEXTS, other, letters)
    shap = attribute(letters, rollout, ["shap"], PARAMS)["shap"]
    turned = replace(shap, source="turned", credit=shap.credit.flip(1).masked_fill(~rollout.players, 0))
    table = faithfulness(letters, rollout, {"shap": shap, "turned": turned}, PARAMS)
    fit = table[table["measure"] == "surrogate_r2"].groupby("source")["value"].mean()
    assert fit["shap"] == pytest.approx(1, abs=1e-4) and fit["turned"] < 0.9


# ---------------------------------------------------------------------------------------------------- pure measures


def test_removal_agreement_and_seed_agreement(reward_model, rollout):
    by = {
        r: attribute(reward_model, rollout, ["shap"], replace(PARAMS, removal=r))["shap"]
        for r in ("drop", "attention_mask", "replace:the")
    }
    agreement = removal_agreement(by, rollout)
    assert list(agreement) == [("drop", "attention_mask"), ("drop", "replace:the"), ("attention_mask", "replace:the")]
    several = rollout.players.sum(-1).numpy() > 1
    assert all(np.isfinite(values[several]).all() and np.isnan(values[~several]).all() for values in agreement.values())
    assert np.allclose(seed_agreement(by["drop"], by["drop"], rollout)[several], 1)
    lime = [
        attribute(reward_model, rollout, ["lime"], replace(PARAMS, lime_samples=n, seed=s))["lime"]
        for n in (8, 512)
        for s in (0, 1)
    ]
    noisy, steady = (np.nanmean(seed_agreement(*lime[i : i + 2], rollout)) for i in (0, 2))
    assert noisy < steady < 1 + 1e-9


def test_completeness_and_evenness_without_forwards(rollout):
    credit = rollout.mask.float()
    baseline = rollout.scores - 2
    attribution = Attribution("s", credit, baseline, rollout.scores - baseline - credit.sum(-1), 0, 0)
    lengths = rollout.mask.sum(-1).numpy()
    gap = completeness(attribution, rollout)
    assert np.allclose(gap["gap"], np.abs(2 - lengths)) and np.allclose(gap["relative_gap"], np.abs(2 - lengths) / 2)
    assert np.allclose(evenness(attribution, rollout), 1)
    still = completeness(replace(attribution, baseline=rollout.scores), rollout)
    assert np.isnan(still["relative_gap"]).all() and np.isfinite(still["gap"]).all()


@given(st.integers(2, 40), st.integers(0, 5))
def test_fresh_coalitions_are_neither_empty_nor_full(k, seed):
    masks = fresh_coalitions(k, 50, np.random.default_rng(seed))
    assert masks.shape == (50, k) and masks.any(1).all() and not masks.all(1).any()


def test_sizes_of_fresh_coalitions_are_uniform_and_players_alike():
    masks = fresh_coalitions(6, 20000, np.random.default_rng(0))
    sizes = np.bincount(masks.sum(1), minlength=7) / len(masks)
    assert np.allclose(sizes[1:6], 0.2, atol=0.015) and np.allclose(masks.mean(0), 0.5, atol=0.02)


@given(st.integers(1, 40), st.integers(0, 9))
def test_a_path_moves_the_most_supporting_first(k, seed):
    rng = np.random.default_rng(seed)
    support, ties = rng.integers(0, 4, k).astype(float), rng.permutation(k)
    kept, alone = removal_path(support, ties)
    assert (kept == ~alone).all() and kept[0].all() and alone[-1].all()
    for tenth, there in enumerate(alone):
        assert there.sum() == -(-k * tenth // 10) == path_counts(k)[tenth]
        assert not there.any() or there.all() or support[there].min() >= support[~there].max()
    assert (alone[1:] >= alone[:-1]).all()


def test_ties_are_broken_by_the_draw_not_by_place():
    firsts = [removal_path(np.ones(10), np.random.default_rng(s).permutation(10))[1][1].argmax() for s in range(200)]
    assert len(set(firsts)) == 10


values = arrays(float, 12, elements=st.floats(-3, 3))


@given(values, values, st.floats(0.1, 5), st.floats(-3, 3))
def test_r2_is_of_the_numbers_and_correlation_up_to_an_affine_map(predicted, scores, slope, shift):
    r2, r = surrogate_r2(predicted, scores), surrogate_correlation(predicted, scores)
    moved = surrogate_correlation(slope * predicted + shift, scores)
    if np.isnan(r) or np.isnan(moved):
        return
    assert r == pytest.approx(moved, abs=1e-4) and r2 <= r**2 + 1e-6
    fit = np.polyval(np.polyfit(predicted, scores, 1), predicted)
    assert surrogate_r2(fit, scores) == pytest.approx(r**2, abs=1e-4)
    assert surrogate_correlation(-predicted, scores) == pytest.approx(-r)


def test_undefined_is_nan():
    even, rising = np.full(5, 2.0), np.arange(5.0)
    assert np.isnan(surrogate_r2(rising, even)) and surrogate_r2(even, rising) == 0
    assert np.isnan(surrogate_correlation(even, rising)) and np.isnan(leave_one_out_tau(even, rising))
    sizes = np.array([1, 2, 1, 3, 2])
    for predicted, scores in ((0.1 * sizes, rising), (rising, even)):
        assert np.isnan(surrogate_beyond_size(predicted, scores, sizes))
    assert surrogate_beyond_size(rising + 7 * sizes, rising - 2 * sizes, sizes) == pytest.approx(1)
    assert np.isnan(surrogate_r2(np.full(5, np.nan), rising)) and np.isnan(infidelity(np.full(5, np.nan), rising))


def test_area_and_aopc_of_known_curves():
    line = np.linspace(1, 0, STEPS + 1)
    assert area(line, 20) == pytest.approx(0.5) and area(np.ones(STEPS + 1), 7) == pytest.approx(1)
    assert area(np.where(path_counts(2) > 0, 0.0, 1.0), 2) == pytest.approx(0.25)  # 1, 0, 0 at none, half, all
    assert aopc(1.0, line) == pytest.approx(np.mean(np.arange(1, 11) / 10))


# ---------------------------------------------------------------------------------------------------- marked tokens


def marks(*rows):
    return torch.tensor(rows, dtype=torch.float)


def test_finding_marked_tokens():
    credit = marks([3, -1, 2, 0.5, 9], [1, 1, 1, 1, 0], [1, 2, 0, 0, 0])
    positive = marks([1, 0, 0, 0.2, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0])
    players = torch.tensor([[True] * 4 + [False], [True] * 4 + [False], [True] * 2 + [False] * 3])
    assert np.allclose(average_precision(credit, positive, players), [(1 + 2 / 3) / 2, 0.25, np.nan], equal_nan=True)
    assert np.isnan(average_precision(credit, torch.ones_like(positive), players)).all()


def test_a_tree_keeps_words_labels_and_places():
    tree = parse_tree("(3 (2 It) (4 (1 -LRB-and\\/or-RRB-) (4 (4 good) (0 bad))))\n")
    assert tree.text == "It (and/or) good bad" and tree.label == 1 and tree.values == (0, -1, 2, -2)
    assert [tree.text[a:b] for a, b in tree.spans] == ["It", "(and/or)", "good", "bad"]
    assert tree.marked == set(range(3, 11)) | set(range(12, 16)) | set(range(17, 20))
    assert parse_tree("(4 good)").spans == [(0, 4)]


@pytest.mark.parametrize("bad", ["", "(3 (2 a)", "(2 a) (2 b)", "(5 a)", "(2 (2 a) b)", "a", "()", "(2 (2 a))) "])
def test_a_broken_tree_is_named_by_file_and_line(bad, tmp_path):
    (tmp_path / "trees.txt").write_text(f"(2 (2 a) (3 b))\n{bad}\n(2 c)\n")
    with pytest.raises(InputError, match=r"trees.txt, line 2: .* is not one tree"):
        load_sst_trees(tmp_path / "trees.txt")


def test_toxic_characters_become_stretches(tmp_path):
    path = tmp_path / "toxic.csv"
    path.write_text('spans,text\n"[4, 5, 6, 8, 11, 12]","You mad\n of it"\n[],fine\n', encoding="utf-8")
    first, second = load_toxic_spans(path)
    assert first == MarkedText("You mad\n of it", [(4, 7), (8, 9), (11, 13)], (1.0,) * 3, first.label)
    assert second.text == "fine" and second.spans == []
    assert first.marked == {4, 5, 6, 8, 11, 12} and np.isnan(first.label)


@pytest.mark.parametrize("row", ['"[1, 99]",short', "nonsense,short", '"[""a""]",short', "7,short", "[true],it", "[0]"])
def test_a_broken_row_is_named_by_file_and_line(row, tmp_path):
    (tmp_path / "toxic.csv").write_text(f"spans,text\n[],fine\n{row}\n")
    with pytest.raises(InputError, match=r"toxic.csv, line 3: spans"):
        load_toxic_spans(tmp_path / "toxic.csv")


@pytest.mark.parametrize("load", [load_sst_trees, load_toxic_spans])
def test_a_missing_or_strange_file_raises(load, tmp_path):
    with pytest.raises(InputError, match="no file at .*nowhere"):
        load(tmp_path / "nowhere")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="bytes is not readable"):
        load(tmp_path / "bytes")
    (tmp_path / "columns").write_text("text\nhello\n")
    with pytest.raises(InputError, match="columns, line 1"):
        load(tmp_path / "columns")


def test_texts_become_a_rollout_that_can_be_explained(tokenizer, reward_model):
    rollout = text_rollout(TEXTS, tokenizer, reward_model)
    assert [tokenizer.decode(i[m]) for i, m in zip(rollout.responses, rollout.mask)] == TEXTS
    assert rollout.queries.shape == (len(TEXTS), 0) and torch.equal(rollout.players, rollout.mask)
    alone = [reward_model.calibrate(reward_model.outputs([tokenizer(t)["input_ids"]])).item() for t in TEXTS]
    assert rollout.scores.tolist() == pytest.approx(alone, abs=1e-5)
    shap = attribute(reward_model, rollout, ["shap"], PARAMS)["shap"]
    assert shap.gap.abs().max() < 1e-4
    for texts in ([], ["good", ""]):
        with pytest.raises(InputError, match="without a token"):
            text_rollout(texts, tokenizer, reward_model)


def test_unreadable_texts_are_left_out_and_counted(tokenizer):
    texts = [MarkedText(t, [], ()) for t in ["good film", "", "a bad plot " * 20]]
    kept, counts = readable(texts, tokenizer, 20)
    assert kept == texts[:1] and counts == {"read": 3, "kept": 1, "empty": 1, "too long": 1}


def test_marks_move_to_tokens_by_characters(tokenizer, reward_model):
    text = MarkedText("the film was zgreatx", [(4, 8), (13, 20)], (2.0, -1.0))
    other = MarkedText("good", [], ())
    rollout = text_rollout([text.text, other.text], tokenizer, reward_model)
    marks = token_marks([text, other], rollout, tokenizer)
    tokens = [tokenizer.decode([i]) for i in rollout.responses[0][rollout.mask[0]].tolist()]
    assert marks.shape == rollout.mask.shape and marks[0].sum() == pytest.approx(1) and not marks[1].any()
    place = 0
    for token, mark in zip(tokens, marks[0]):
        inside = [min(place + len(token), b) > max(place, a) for a, b in text.spans]
        assert np.sign(mark.item()) == (1 if inside[0] else -1 if inside[1] else 0)
        place += len(token)
    with pytest.raises(InputError, match="tokens of text 0"):
        token_marks([other, text], rollout, tokenizer)


def real(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is absent; it is never shipped")
    return path


@pytest.mark.parametrize("name, count", [("dev", 1101), ("test", 2210)])
def test_the_sentiment_treebank(name, count):
    trees = load_sst_trees(real(f"sst/{name}.txt"))
    assert len(trees) == count
    assert all(tree.text[a:b].strip() and " " not in tree.text[a:b] for tree in trees for a, b in tree.spans)
    labels = np.array([tree.label for tree in trees])
    assert set(labels) == {-2, -1, 0, 1, 2}
    sums = np.array([sum(tree.values) for tree in trees])
    assert np.corrcoef(labels, sums)[0, 1] > 0.4  # words carry much of the sentence


def test_the_toxic_posts(tokenizer, reward_model):
    posts = load_toxic_spans(real("toxic_spans/tsd_trial.csv"))
    assert len(posts) == 690 and sum(not post.spans for post in posts) == 43
    assert posts[0].text[15:20] + posts[0].text[27:32] == "moronbigot"
    kept, counts = readable(posts, tokenizer, 60)
    assert counts["kept"] + sum(counts.get(why, 0) for why in ("empty", "too long", "changed by the tokenizer")) == 690
    rollout = text_rollout([post.text for post in kept[:20]], tokenizer, reward_model)
    marked = token_marks(kept[:20], rollout, tokenizer)
    chance = average_precision(torch.zeros_like(marked), marked, rollout.players)
    assert np.allclose(average_precision(marked, marked, rollout.players)[np.isfinite(chance)], 1)
    assert 0 < np.nanmean(chance) < 0.9
