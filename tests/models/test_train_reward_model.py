"""The proxy reward model: how it reads, learns and is loaded."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import make_policy
from hypothesis import given
from hypothesis import strategies as st

from dense_rlhf.config.params import RewardParams
from dense_rlhf.models import train_reward_model
from dense_rlhf.models.language_models import LanguageModel
from dense_rlhf.models.reward_model import RewardModel, batches
from dense_rlhf.models.train_reward_model import pack_kept, pair_ids, share_of
from dense_rlhf.types import InputError, LabelledText, Message, PreferencePair, Reading


@pytest.fixture(scope="module")
def texts(tokenizer):
    """Readings of random tokens, of every length from none to 9."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: tuple(torch.randint(2, len(tokenizer), (n,), generator=generator).tolist())  # noqa: E731
    return [Reading(draw(n % 4), draw(n // 2)) for n in range(12)]


# ---------------------------------------------------------------------------------------------------- labels


@given(st.integers(1, 300), st.floats(0.001, 1), st.floats(0.001, 1), st.integers(0, 9))
def test_a_larger_share_of_the_labels_holds_a_smaller_one(n, labels, other, seed):
    examples, few, many = list(range(n)), min(labels, other), max(labels, other)
    if round(few * n) == 0:
        with pytest.raises(InputError, match=f"leaves none of {n} examples"):
            share_of(examples, few, seed)
    else:
        smaller, larger = (share_of(examples, share, seed) for share in (few, many))
        assert len(smaller) == len(set(smaller)) == round(few * n)
        assert set(smaller) <= set(larger) <= set(examples) and share_of(examples, 1.0, seed) == examples


def test_a_share_is_drawn_over_the_whole_file():
    """Files are often in order of label."""
    kept = share_of([0] * 500 + [1] * 500, 0.1, seed=0)
    assert 30 < sum(kept) < 70 and share_of(list(range(50)), 0.1, 0) != share_of(list(range(50)), 0.1, 1)


# ---------------------------------------------------------------------------------------------------- proxy


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_pack_kept_moves_the_kept_tokens_to_the_front_in_order(rows):
    keep = torch.tensor(rows)
    ids = torch.arange(100, 100 + keep.numel()).view(keep.shape)
    packed, lengths = pack_kept(ids, keep, eos_id=7)
    for row in range(len(rows)):
        assert packed[row, : lengths[row]].tolist() == [*ids[row][keep[row]].tolist(), 7]


def test_score_equals_the_classifiers_own_forward_one_by_one(reward_model, tokenizer, texts):
    ours = reward_model.score(texts)
    for reading, score in zip(texts, ours.tolist()):
        alone = torch.tensor([[*reading.prompt, *reading.response, tokenizer.eos_token_id]])
        with torch.no_grad():
            assert abs(reward_model.model(input_ids=alone).logits.item() - score) < 1e-5
    assert ours.std() > 0.1  # it does read its input


@pytest.mark.parametrize("budget", [1, 17, 64, 10**6])
def test_score_does_not_depend_on_token_budget_or_row_order(reward_model, texts, budget):
    ours, order = reward_model.score(texts), torch.randperm(len(texts), generator=torch.Generator().manual_seed(1))
    other = replace(reward_model, token_budget=budget).score([texts[i] for i in order])
    assert torch.allclose(other, ours[order], atol=1e-5)


@given(st.lists(st.integers(0, 9)), st.integers(1, 30))
def test_batches_cover_every_item_once_within_the_budget(sizes, budget):
    made = [[sizes[i] for i in numbers] for numbers in batches(sizes, budget)]
    assert sum(made, []) == sorted(sizes)
    assert all(len(batch) * batch[-1] <= budget or len(batch) == 1 for batch in made)
    for batch, following in zip(made, made[1:]):  # no batch could have taken one more
        assert (len(batch) + 1) * following[0] > budget


def test_a_suffix_stands_behind_every_text(reward_model, texts):
    longer = replace(reward_model, suffix=(5, 9))
    wanted = replace(reward_model, suffix=(9,)).outputs([[*t.prompt, *t.response, 5] for t in texts])
    assert torch.allclose(longer.score(texts), wanted, atol=1e-5)
    assert not torch.allclose(longer.score(texts), reward_model.score(texts), atol=1e-2)


def test_a_model_without_eos_wants_a_suffix(reward_model):
    from types import SimpleNamespace

    tokens = SimpleNamespace(eos_token_id=None, pad_token_id=None)
    with pytest.raises(InputError, match="no EOS to read at; give a suffix"):
        RewardModel(reward_model.model, tokens)
    assert RewardModel(reward_model.model, tokens, suffix=(3,)).suffix == (3,)


def test_calibrated_gives_mean_zero_sd_one_and_composes(reward_model, texts):
    first = reward_model.calibrated(reward_model.score(texts))
    scores = first.score(texts)
    assert abs(scores.mean().item()) < 1e-5 and abs(scores.std().item() - 1) < 1e-5
    second = first.calibrated(scores[:7])  # on other texts: again mean 0 and sd 1 there
    again = second.score(texts)[:7]
    assert abs(again.mean().item()) < 1e-5 and abs(again.std().item() - 1) < 1e-5
    assert torch.allclose(again, (scores[:7] - scores[:7].mean()) / scores[:7].std(), atol=1e-5)


def test_calibrated_refuses_constant_scores(reward_model):
    with pytest.raises(InputError, match="standard deviation"):
        reward_model.calibrated(torch.ones(5))


def test_training_on_labels_separates_the_words(tokenizer):
    texts = [LabelledText(t, label) for t, label in (("good great film", 1), ("bad awful plot", 0))] * 4
    params = RewardParams(hidden=16, layers=1, heads=2, steps=60, batch=16, lr=1e-2, window=8, max_drop=0.3)
    model = train_reward_model.train_on_labels(texts, tokenizer, params, seed=0)
    proxy = RewardModel(model, tokenizer)
    good, bad = proxy.outputs(tokenizer(["good great film", "bad awful plot"], add_special_tokens=False)["input_ids"])
    assert good > 1 and bad < -1  # logits
    again = train_reward_model.train_on_labels(texts, tokenizer, params, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_a_batch_in_parts_of_similar_length_teaches_the_same(tokenizer, monkeypatch):
    texts = [LabelledText("good film " * n, n % 2) for n in range(1, 7)]
    params = RewardParams(hidden=16, layers=2, heads=2, steps=3, batch=7, window=12)
    taught = []
    for parts in (1, 4):
        monkeypatch.setattr(train_reward_model, "PARTS", parts)
        taught.append(train_reward_model.train_on_labels(texts, tokenizer, params, seed=0))
    for whole, in_parts in zip(*(model.parameters() for model in taught)):
        assert torch.allclose(whole, in_parts, atol=1e-5)


def test_pair_ids_read_prompt_reply_and_eos(tokenizer):
    chosen, rejected = train_reward_model.pair_ids(PreferencePair("the film", "was good", "was bad"), tokenizer)
    assert tokenizer.decode(chosen) == "the film was good<eos>"
    assert tokenizer.decode(rejected) == "the film was bad<eos>"


def test_training_on_pairs_prefers_the_chosen_reply(tokenizer, tmp_path):
    pairs = [PreferencePair("the film was", "good and great", "bad and awful")] * 8
    params = RewardParams(hidden=16, layers=1, heads=2, steps=15, batch=8, lr=1e-2, window=64)
    proxy = RewardModel(train_reward_model.train_on_pairs(pairs, tokenizer, params, 0, tmp_path), tokenizer)
    ours = proxy.outputs([ids[:-1] for ids in train_reward_model.pair_ids(pairs[0], tokenizer)])
    assert ours[0] > ours[1] + 0.5
    with pytest.raises(InputError, match="0 of 8 pairs have at most 3 tokens"):
        train_reward_model.train_on_pairs(pairs, tokenizer, replace(params, window=3), 0, tmp_path)


FROM_POLICY = RewardParams(name="policy", layers=1, steps=15, batch=8, lr=1e-2, window=64)


def test_a_reward_model_starts_as_the_first_layers_of_the_policy(tokenizer):
    policy = make_policy(tokenizer)
    ids = torch.tensor([tokenizer("the film was good")["input_ids"]])
    model = train_reward_model.fresh_classifier(FROM_POLICY, tokenizer, policy)
    assert (model.config.num_hidden_layers, model.config.num_labels, model.dtype) == (1, 1, torch.float32)
    given = policy(ids, output_hidden_states=True).hidden_states[1]
    assert torch.allclose(model.base_model(ids).last_hidden_state, policy.base_model.norm(given), atol=1e-6)
    half = train_reward_model.fresh_classifier(FROM_POLICY, tokenizer, make_policy(tokenizer).to(torch.bfloat16))
    assert half.dtype == torch.float32
    assert len(policy.base_model.layers) == policy.config.num_hidden_layers > 1  # the policy keeps its own
    with pytest.raises(InputError, match="reward.layers is 9, wanted at most the policy's"):
        train_reward_model.fresh_classifier(replace(FROM_POLICY, layers=9), tokenizer, policy)


@pytest.mark.parametrize(
    "examples",
    [
        [PreferencePair("the film was", "good and great", "bad and awful")] * 8,
        [LabelledText("good and great", 1), LabelledText("bad and awful", 0)] * 4,
    ],
)
def test_a_reward_model_learns_from_the_policys_layers(tokenizer, examples, monkeypatch, tmp_path):
    monkeypatch.setenv("DENSE_RLHF_CACHE", str(tmp_path))
    load = lambda start: train_reward_model.load_reward_model(examples, start, FROM_POLICY, "r")  # noqa: E731
    policy = LanguageModel(make_policy(tokenizer), tokenizer, "one")
    before = copy.deepcopy(policy.model.state_dict())
    proxy = load(policy)
    good, bad = proxy.outputs(tokenizer(["good and great", "bad and awful"], add_special_tokens=False)["input_ids"])
    assert good > bad + 0.5
    assert all(torch.equal(weight, before[name]) for name, weight in policy.model.state_dict().items())
    with pytest.raises(InputError, match="only a tokenizer is given"):
        load(tokenizer)
    halved = replace(policy, model=make_policy(tokenizer).to(torch.bfloat16))
    assert load(policy).revision == proxy.revision
    assert len({proxy.revision, load(replace(policy, revision="two")).revision, load(halved).revision}) == 3


def test_an_unreachable_hub_model_raises(tokenizer):
    with pytest.raises(InputError, match="reward.name.*nobody/no-such-reward-model"):
        train_reward_model.load_reward_model([], tokenizer, RewardParams(name="nobody/no-such-reward-model"), "r")


def test_a_local_reward_model_is_loaded_whatever_the_policys_vocabulary(tokenizer, reward_model, tmp_path):
    reward_model.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    params, text = RewardParams(name=str(tmp_path)), " was good"
    loaded = train_reward_model.load_reward_model([], tokenizer, params, "r")
    own = [tokenizer(part)["input_ids"] for part in ("the film", text)]
    reading = loaded.reading(*own)
    assert reading.spread is None and [list(reading.prompt), list(reading.response)] == own
    assert torch.equal(loaded.score([reading]), reward_model.score([reading]))
    from dense_rlhf.models.tiny_recipe import train_tokenizer

    other = train_tokenizer(["zebra zebra"], 262)
    loaded = train_reward_model.load_reward_model([], other, params, "r")
    through = loaded.reading(*(other(part)["input_ids"] for part in ("the film", text)))
    assert loaded.policy_tokenizer is other and (through.prompt, through.response) == (reading.prompt, reading.response)
    assert torch.equal(loaded.score([through]), reward_model.score([reading]))
    assert through.spread.shape == (len(own[1]), len(text))  # this policy writes letter by letter


def test_a_trained_reward_model_is_found_again(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setenv("DENSE_RLHF_CACHE", str(tmp_path))
    texts = [LabelledText("good film", 1), LabelledText("bad film", 0)]
    params = RewardParams(hidden=16, layers=1, heads=2, steps=2, batch=4, window=8)
    first = train_reward_model.load_reward_model(texts, tokenizer, params, "r")
    monkeypatch.setattr("dense_rlhf.models.train_reward_model.train_on_labels", None)  # a second training would fail
    second = train_reward_model.load_reward_model(texts, tokenizer, params, "r")
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters()))
    with monkeypatch.context() as elsewhere, pytest.raises(TypeError):
        elsewhere.setattr(torch, "get_num_threads", lambda: 99)  # rounds otherwise, so it is trained again
        train_reward_model.load_reward_model(texts, tokenizer, params, "r")
    other = copy.deepcopy(tokenizer)
    other.chat_template = "[{{ messages[0].content }}]"  # decides what it learns of dialogues
    with pytest.raises(TypeError):
        train_reward_model.load_reward_model(texts, other, params, "r")


def test_a_reward_model_reads_dialogues_as_its_policy_does(tokenizer):
    """In training and in judgement: through the chat template where the tokenizer has one."""
    pair = PreferencePair((Message("user", "hi"),), "good", "bad")
    with_template = copy.deepcopy(tokenizer)
    with_template.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    for of, wanted in ((tokenizer, "\n\nHuman: hi\n\nAssistant: good"), (with_template, "[user]hi[assistant]good")):
        chosen, rejected = pair_ids(pair, of)
        assert tokenizer.decode(chosen[:-1]) == wanted and chosen[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(rejected[:-1]) == wanted[:-4] + "bad"
