"""Token rewards from token ids: they sum to the model's own scores, whatever the batch and the trainer's tokenizer."""

import math
from copy import deepcopy
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from conftest import SENTENCES
from hypothesis import given, settings
from hypothesis import strategies as st

from dense_rlhf.adapters import Scorer, dense_rewards
from dense_rlhf.attribution import attribute
from dense_rlhf.attribution.explain import explain
from dense_rlhf.config.params import AttributionParams
from dense_rlhf.models import tiny_recipe
from dense_rlhf.shaping.rewards import shape_rewards
from dense_rlhf.types import InputError, Message, RewardShape

SIGNED = RewardShape(("shap",), (1.0,), "signed")
MIXED = RewardShape(("shap", "uniform"), (0.6, 0.4))
ASKED = "the film"
ANSWERS = [" was good and the cast was great", " was bad", " was slow but the music was good; a waste of time"]


@pytest.fixture
def scorer(reward_model):
    return Scorer(reward_model.model, reward_model.tokenizer)


@pytest.fixture
def ids(tokenizer):
    """Prompt and response ids; the first two responses have an end."""
    answers = [tokenizer(text)["input_ids"] for text in ANSWERS]
    return [tokenizer(ASKED)["input_ids"]] * 3, [
        [*ids, *([tokenizer.eos_token_id] * (i < 2))] for i, ids in enumerate(answers)
    ]


def own_scores(model, prompt_ids, response_ids):
    """The model's own forward on each whole sequence by itself."""
    with torch.no_grad():
        rows = [torch.tensor([[*asked, *answer]]) for asked, answer in zip(prompt_ids, response_ids)]
        return [model(input_ids=row).logits.item() for row in rows]


@pytest.mark.parametrize("shape", [SIGNED, MIXED, RewardShape(("terminal",), (1.0,))], ids=lambda s: s.sources)
def test_rewards_sum_to_the_models_own_scores(scorer, ids, shape):
    rewards = dense_rewards(scorer, *ids, shape)
    assert [len(row) for row in rewards] == [len(row) for row in ids[1]]
    np.testing.assert_allclose([row.sum() for row in rewards], own_scores(scorer.model, *ids), atol=1e-5)


def test_sparse_pays_the_last_token(scorer, ids):
    rewards = dense_rewards(scorer, *ids, RewardShape(("terminal",), (1.0,)))
    assert all(not row[:-1].any() and row[-1] for row in rewards)


def test_rewards_are_those_of_a_study(rollout, reward_model):
    """Responses cut out of a rollout's padding get the rewards that PPO pays; its proxy reads EOS after each."""
    study = shape_rewards(rollout, attribute(reward_model, rollout, ["shap"], AttributionParams()), SIGNED)
    queries = [ids[keep] for ids, keep in zip(rollout.queries, rollout.query_mask)]
    responses = [ids[keep] for ids, keep in zip(rollout.responses, rollout.mask)]
    judge = Scorer(reward_model.model, reward_model.tokenizer, adds_end=True)
    for own, row in zip(study, dense_rewards(judge, queries, responses, SIGNED), strict=True):
        np.testing.assert_allclose(row, own[: len(row)].numpy(), atol=1e-5)


def test_a_score_is_shifted_and_scaled(scorer, ids):
    calibrated = Scorer(scorer.model, scorer.tokenizer, offset=0.3, scale=2.0)
    for raw, row in zip(dense_rewards(scorer, *ids, SIGNED), dense_rewards(calibrated, *ids, SIGNED)):
        assert row.sum() == pytest.approx((raw.sum() - 0.3) / 2, abs=1e-5)


@settings(max_examples=8)
@given(
    order=st.permutations(range(3)),
    size=st.integers(1, 3),
    source=st.sampled_from(["shap", "random", "shuffled", "lime"]),
)
def test_batch_and_order_change_nothing(reward_model, tokenizer, order, size, source):
    shape = RewardShape((source,), (1.0,), "signed")
    asked = tokenizer(ASKED)["input_ids"]
    answers = [tokenizer(text)["input_ids"] for text in ANSWERS]
    alone = [dense_rewards(Scorer(reward_model.model, tokenizer), [asked], [a], shape)[0] for a in answers]
    chosen = order[:size]
    together = dense_rewards(Scorer(reward_model.model, tokenizer), [asked] * size, [answers[i] for i in chosen], shape)
    for i, row in zip(chosen, together):
        np.testing.assert_allclose(row, alone[i], atol=1e-5)


def test_a_retry_costs_nothing(scorer, ids):
    first = dense_rewards(scorer, *ids, SIGNED)
    spent = scorer.cost.evaluations
    again = dense_rewards(scorer, *ids, SIGNED)
    assert all((a == b).all() for a, b in zip(first, again))
    assert scorer.cost.evaluations == spent > 0 and scorer.cost.remembered == 3 and scorer.cost.responses == 6
    dense_rewards(scorer, *ids, MIXED)
    assert scorer.cost.evaluations > spent


def test_answers_are_copies_and_the_latest_are_kept(reward_model, ids):
    scorer = Scorer(reward_model.model, reward_model.tokenizer, memory=1)
    for row in dense_rewards(scorer, *ids, SIGNED):
        row[:] = 99
    dense_rewards(scorer, ids[0][2:], ids[1][2:], SIGNED)
    assert scorer.cost.remembered == 1
    (kept,) = dense_rewards(scorer, ids[0][2:], ids[1][2:], SIGNED)
    assert (kept != 99).all()
    dense_rewards(scorer, ids[0][:1], ids[1][:1], SIGNED)
    assert scorer.cost.remembered == 2


def test_twice_in_one_batch_is_scored_once(scorer, ids):
    rewards = dense_rewards(scorer, ids[0][:1] * 2, ids[1][:1] * 2, SIGNED)
    assert (rewards[0] == rewards[1]).all() and scorer.cost.remembered == 1


def test_another_tokenizer_reads_the_text(reward_model, tokenizer):
    """A trainer with a tokenizer of its own: the score is that of `explain`, the credit aligned by characters."""
    other = tiny_recipe.train_tokenizer([s.upper() + s for s in SENTENCES], 280)
    scorer = Scorer(reward_model.model, tokenizer, trainer_tokenizer=other)
    prompts, responses = [other(ASKED)["input_ids"]] * 3, [other(text)["input_ids"] for text in ANSWERS]
    responses[0] = [*responses[0], other.eos_token_id]
    rewards = dense_rewards(scorer, prompts, responses, SIGNED)
    for text, row, given_ids in zip(ANSWERS, rewards, responses):
        assert len(row) == len(given_ids)
        explained = explain(reward_model.model, tokenizer, ASKED, text, end="eos")
        assert row.sum() == pytest.approx(explained.score, abs=1e-5)


def test_messages_go_through_the_models_template(reward_model, tokenizer):
    other = tiny_recipe.train_tokenizer(SENTENCES, 280)
    asked = (Message("user", "the film"),)
    scorer = Scorer(reward_model.model, tokenizer, trainer_tokenizer=other)
    ids = [other("whatever the trainer wrote")["input_ids"]], [other(ANSWERS[0])["input_ids"]]
    (row,) = dense_rewards(scorer, *ids, SIGNED, [asked])
    explained = explain(reward_model.model, tokenizer, asked, ANSWERS[0], end="eos")
    assert row.sum() == pytest.approx(explained.score, abs=1e-5)


def test_ids_that_the_trainers_tokenizer_lacks_are_named(reward_model, tokenizer, ids):
    other = Scorer(reward_model.model, reward_model.tokenizer, tokenizer)
    prompts, (answer, *_) = ids
    for bad in ([[9999], answer], [prompts[0], [*answer, 9999]]):
        with pytest.raises(InputError, match=r"_ids\[0\] has token 9999, which the trainer's tokenizer lacks"):
            dense_rewards(other, [bad[0]], [bad[1]], SIGNED)


@pytest.mark.parametrize(
    "prompt_ids, response_ids, message",
    [
        ([[1]], [[1], [2]], "1 prompt_ids, 2 response_ids; wanted one each"),
        ([[1]], [[]], r"response_ids\[0\] is float64 of shape \(0,\), wanted at least one token id"),
        ([[]], [[1]], r"prompt_ids\[0\]"),
        ([[1]], [[-100]], "none of them padding"),
        ([[1]], [[0.5]], "float64"),
        ([[1]], [[[1]]], r"shape \(1, 1\)"),
    ],
)
def test_bad_ids_are_named(scorer, prompt_ids, response_ids, message):
    with pytest.raises(InputError, match=message):
        dense_rewards(scorer, prompt_ids, response_ids, SIGNED)


@pytest.mark.parametrize("options", [{"scale": 0.0}, {"scale": -1.0}, {"offset": math.inf}, {"memory": -1}])
def test_a_scorer_of_no_use_is_refused(reward_model, options):
    with pytest.raises(InputError, match=rf"{next(iter(options))} is .*, wanted"):
        Scorer(reward_model.model, reward_model.tokenizer, **options)


def test_a_scorer_stays_as_it_is(scorer):
    """What it remembers was answered with these settings."""
    with pytest.raises(FrozenInstanceError):
        scorer.offset = 1.0


def test_one_text_is_no_list_of_prompts(scorer, ids):
    with pytest.raises(InputError, match="prompts are one text, wanted one each a response"):
        dense_rewards(scorer, [ids[0][0]], [ids[1][0]], SIGNED, "a")


def test_a_prompt_that_is_none_is_refused(scorer, ids):
    """In place of reading the ids of one row and the messages of another."""
    with pytest.raises(InputError, match="wanted text or messages"):
        dense_rewards(scorer, *ids, SIGNED, ["the film", None, "the film"])


def test_no_rows_are_no_rewards(scorer):
    assert dense_rewards(scorer, [], [], SIGNED) == []


def test_what_this_model_cannot_is_named(scorer, ids):
    with pytest.raises(InputError, match="log_ratio cannot explain"):
        dense_rewards(scorer, *ids, RewardShape(("log_ratio",), (1.0,)))
    with pytest.raises(InputError, match="row 0: .* has 300 embeddings, but the text has token 1000000"):
        dense_rewards(scorer, [[1]], [[10**6]], SIGNED)


def test_a_model_in_training_is_refused(reward_model, ids):
    reward_model.model.train()
    try:
        with pytest.raises(InputError, match="training mode"):
            dense_rewards(Scorer(reward_model.model, reward_model.tokenizer), *ids, SIGNED)
    finally:
        reward_model.model.eval()


def test_a_score_that_is_not_finite_is_refused(reward_model, ids):
    model = deepcopy(reward_model.model)
    torch.nn.init.constant_(model.score.weight, math.nan)
    with pytest.raises(InputError, match="not finite"):
        dense_rewards(Scorer(model, reward_model.tokenizer), *ids, SIGNED)
