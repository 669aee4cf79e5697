"""The proxy reward model and the additive judges."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from dense_rlhf import rewards
from dense_rlhf.additive import WORD, AdditiveJudge, train_gold_judge
from dense_rlhf.params import RewardParams
from dense_rlhf.rewards import pack_kept
from dense_rlhf.types import InputError, LabelledText, PreferencePair


@pytest.fixture(scope="module")
def subsets(tokenizer):
    """Random rows of token ids (N, L) and random kept subsets, the empty and the full one among them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, len(tokenizer), (12, 9), generator=generator)
    keep = torch.rand(12, 9, generator=generator) < torch.rand(12, 1, generator=generator)
    keep[0], keep[1] = False, True
    return ids, keep


# ---------------------------------------------------------------------------------------------------- proxy


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_pack_kept_moves_the_kept_tokens_to_the_front_in_order(rows):
    keep = torch.tensor(rows)
    ids = torch.arange(100, 100 + keep.numel()).view(keep.shape)
    packed, lengths, order = pack_kept(ids, keep, eos_id=7)
    for row in range(len(rows)):
        kept = ids[row][keep[row]].tolist()
        assert packed[row, : lengths[row]].tolist() == [*kept, 7]
        assert ids[row][order[row, : len(kept)]].tolist() == kept


def test_score_equals_the_classifiers_own_forward_one_by_one(reward_model, tokenizer, subsets):
    ids, keep = subsets
    ours = reward_model.score(ids, keep)
    for row in range(len(ids)):
        alone = torch.cat([ids[row][keep[row]], torch.tensor([tokenizer.eos_token_id])])[None]
        with torch.no_grad():
            assert abs(reward_model.model(input_ids=alone).logits.item() - ours[row].item()) < 1e-5
    assert ours.std() > 0.1  # it does read its input


@pytest.mark.parametrize("budget", [1, 17, 64, 10**6])
def test_score_does_not_depend_on_token_budget_or_row_order(reward_model, subsets, budget):
    ids, keep = subsets
    ours, order = reward_model.score(ids, keep), torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))
    other = replace(reward_model, token_budget=budget).score(ids[order], keep[order])
    assert torch.allclose(other, ours[order], atol=1e-5)


def test_batches_cover_every_row_once_within_the_budget(reward_model):
    lengths = torch.tensor([1, 2, 2, 3, 5, 8])
    batches = list(replace(reward_model, token_budget=8)._batches(torch.arange(6), lengths))
    assert torch.cat(batches).tolist() == list(range(6))
    assert all(len(rows) * lengths[rows].max() <= 8 for rows in batches) and len(batches) < 6


def test_score_does_not_see_removed_tokens(reward_model, subsets):
    ids, keep = subsets
    other = ids.masked_fill(~keep, 5)
    assert torch.allclose(reward_model.score(other, keep), reward_model.score(ids, keep), atol=1e-6)


def test_calibrated_gives_mean_zero_sd_one_and_composes(reward_model, subsets):
    first = reward_model.calibrated(reward_model.score(*subsets))
    scores = first.score(*subsets)
    assert abs(scores.mean().item()) < 1e-5 and abs(scores.std().item() - 1) < 1e-5
    second = first.calibrated(scores[:7])  # on other texts: again mean 0 and sd 1 there
    again = second.score(*subsets)[:7]
    assert abs(again.mean().item()) < 1e-5 and abs(again.std().item() - 1) < 1e-5
    assert torch.allclose(again, (scores[:7] - scores[:7].mean()) / scores[:7].std(), atol=1e-5)


def test_calibrated_refuses_constant_scores(reward_model):
    with pytest.raises(InputError, match="standard deviation"):
        reward_model.calibrated(torch.ones(5))


def test_training_on_labels_separates_the_words(tokenizer):
    texts = [LabelledText(t, label) for t, label in (("good great film", 1), ("bad awful plot", 0))] * 4
    params = RewardParams(hidden=16, layers=1, heads=2, steps=60, batch=16, lr=1e-2, window=8, max_drop=0.3)
    model = rewards.train_on_labels(texts, tokenizer, params, seed=0)
    proxy = rewards.RewardModel(model, tokenizer)
    encoded = tokenizer(["good great film", "bad awful plot"], add_special_tokens=False, padding=True,
                        padding_side="right", return_tensors="pt")  # fmt: skip
    good, bad = proxy.score(encoded["input_ids"], encoded["attention_mask"].bool())
    assert good > 1 and bad < -1  # logits
    again = rewards.train_on_labels(texts, tokenizer, params, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_pair_ids_read_prompt_reply_and_eos(tokenizer):
    chosen, rejected = rewards.pair_ids(PreferencePair("the film", "was good", "was bad"), tokenizer)
    assert tokenizer.decode(chosen) == "the film was good<eos>"
    assert tokenizer.decode(rejected) == "the film was bad<eos>"


def test_training_on_pairs_prefers_the_chosen_reply(tokenizer, tmp_path):
    pairs = [PreferencePair("the film was", "good and great", "bad and awful")] * 8
    params = RewardParams(hidden=16, layers=1, heads=2, steps=15, batch=8, lr=1e-2, window=64)
    proxy = rewards.RewardModel(rewards.train_on_pairs(pairs, tokenizer, params, 0, tmp_path), tokenizer)
    chosen, rejected = (torch.tensor([ids[:-1]]) for ids in rewards.pair_ids(pairs[0], tokenizer))
    ours = [proxy.score(ids, torch.ones_like(ids).bool()).item() for ids in (chosen, rejected)]
    assert ours[0] > ours[1] + 0.5
    with pytest.raises(InputError, match="0 of 8 pairs have at most 3 tokens"):
        rewards.train_on_pairs(pairs, tokenizer, replace(params, window=3), 0, tmp_path)


def test_an_unreachable_hub_model_raises(tokenizer):
    with pytest.raises(InputError, match="reward.name.*nobody/no-such-reward-model"):
        rewards.load_reward_model([], tokenizer, RewardParams(name="nobody/no-such-reward-model"), "r")


def test_a_local_reward_model_is_loaded_whatever_the_policys_vocabulary(tokenizer, reward_model, tmp_path):
    reward_model.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    params, text = RewardParams(name=str(tmp_path)), " was good"
    loaded = rewards.load_reward_model([], tokenizer, params, "r")
    own = [tokenizer(part)["input_ids"] for part in ("the film", text)]
    reading = loaded.reading(*own)
    assert loaded.policy_tokenizer is None and [list(reading.prompt), list(reading.response)] == own
    assert torch.equal(loaded.score([reading]), reward_model.score([reading]))
    from dense_rlhf.language_model import train_tokenizer

    other = train_tokenizer(["zebra zebra"], 262)
    loaded = rewards.load_reward_model([], other, params, "r")
    through = loaded.reading(*(other(part)["input_ids"] for part in ("the film", text)))
    assert loaded.policy_tokenizer is other and (through.prompt, through.response) == (reading.prompt, reading.response)
    assert torch.equal(loaded.score([through]), reward_model.score([reading]))
    assert through.spread.shape == (len(own[1]), len(text))  # this policy writes letter by letter


def test_a_trained_reward_model_is_found_again(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setenv("DENSE_RLHF_CACHE", str(tmp_path))
    texts = [LabelledText("good film", 1), LabelledText("bad film", 0)]
    params = RewardParams(hidden=16, layers=1, heads=2, steps=2, batch=4, window=8)
    first = rewards.load_reward_model(texts, tokenizer, params, "r")
    monkeypatch.setattr(rewards, "train_on_labels", None)  # a second training would fail
    second = rewards.load_reward_model(texts, tokenizer, params, "r")
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters()))


# ---------------------------------------------------------------------------------------------------- judges

WORDS = {"good": 1.5, "bad": -2.0, "naïve": 0.7, "日本": 3.0, "don't": -0.25, "é": 0.1, "film": 0.0}


def test_a_judge_adds_up_its_words_and_ignores_others():
    judge = AdditiveJudge("j", WORDS)
    assert judge.score("Good, GOOD but bad; unknown film") == pytest.approx(1.0)
    assert judge.score("goodness ungood") == 0


@given(st.lists(st.one_of(st.sampled_from([*WORDS, " ", ", ", "🙂", "Good"]), st.text(max_size=4)), max_size=8))
def test_token_credit_sums_to_the_score(tokenizer, parts):
    text, judge = "".join(parts), AdditiveJudge("j", WORDS)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    credit = judge.token_credit(tokenizer, ids)
    assert len(credit) == len(ids)
    assert sum(credit) == pytest.approx(judge.score(tokenizer.decode(ids)), abs=1e-9)


@given(st.lists(st.integers(0, 299), max_size=12))
def test_token_credit_sums_to_the_score_for_any_tokens(tokenizer, ids):
    """A policy samples bytes that make no character, too."""
    judge = AdditiveJudge("j", {chr(c): c / 100 for c in range(97, 123)} | WORDS)
    assert sum(judge.token_credit(tokenizer, ids)) == pytest.approx(judge.score(tokenizer.decode(ids)), abs=1e-9)


def test_token_credit_falls_on_the_tokens_of_the_word(tokenizer):
    ids = tokenizer("the film was bad !", add_special_tokens=False)["input_ids"]
    credit = AdditiveJudge("j", WORDS).token_credit(tokenizer, ids)
    bad = [t for t, token in enumerate(ids) if "b" in (text := tokenizer.decode([token])) or "d" in text]
    assert [t for t, c in enumerate(credit) if c] == bad


GOOD, BAD = "a good and great film, I loved it", "a bad and awful film, I hated it"
LABELLED = [LabelledText(f"{text} {'slow' if i % 3 else 'fast'}", label)
            for i in range(8) for text, label in ((GOOD, 1), (BAD, 0))]  # fmt: skip


def tfidf():
    return TfidfVectorizer(lowercase=True, token_pattern=WORD.pattern, norm=None, min_df=5)


def test_gold_judge_is_the_logistic_regression_without_its_intercept():
    judge, features = train_gold_judge(LABELLED), tfidf()
    X, y = features.fit_transform([e.text for e in LABELLED]), [e.label for e in LABELLED]
    model = LogisticRegression(C=1e-3, max_iter=500).fit(X, y)
    texts = ["good good awful", "a great slow film", "hated, HATED!"]
    wanted = model.decision_function(features.transform(texts)) - model.intercept_
    assert np.allclose([judge.score(t) for t in texts], wanted, atol=1e-9)
    assert judge.score("good great") > 0 > judge.score("bad awful")


def test_gold_judge_of_pairs_is_a_bradley_terry_model():
    pairs = [PreferencePair("p", f"{GOOD} {i % 2}", f"{BAD} {i % 3}") for i in range(12)]
    judge, features = train_gold_judge(pairs), tfidf()
    chosen, rejected = [p.chosen for p in pairs], [p.rejected for p in pairs]
    features.fit(chosen + rejected)
    difference = (features.transform(chosen) - features.transform(rejected)).toarray()
    both, won = np.concatenate([difference, -difference]), np.repeat([1, 0], len(pairs))
    model = LogisticRegression(C=5e-4, fit_intercept=False, max_iter=500).fit(both, won)  # every pair twice
    assert judge.score(pairs[0].chosen) > judge.score(pairs[0].rejected)
    margins = [judge.score(p.chosen) - judge.score(p.rejected) for p in pairs]
    assert np.allclose(margins, model.decision_function(difference), atol=1e-3)


def test_gold_judge_is_cached_whole(monkeypatch, tmp_path):
    monkeypatch.setenv("DENSE_RLHF_CACHE", str(tmp_path))
    assert rewards.load_gold_judge(LABELLED, "r") == train_gold_judge(LABELLED)
    monkeypatch.setattr(rewards, "train_gold_judge", None)
    assert rewards.load_gold_judge(LABELLED, "r").score(GOOD) > 0


def test_lexicon_holds_human_valences():
    lexicon = rewards.load_lexicon()
    assert lexicon.score("a good film") > 0 > lexicon.score("an awful film") and len(lexicon.weights) > 7000
    assert max(map(abs, lexicon.weights.values())) <= 4
