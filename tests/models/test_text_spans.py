"""Where tokens lie in their text, credit between two cuts of it, and reward models with a vocabulary of their own."""

import re
from dataclasses import replace

import pytest
import torch
from conftest import PROMPTS, SENTENCES, TINY, jitter, make_rollout
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForSequenceClassification,
)

from dense_rlhf.attribution import attribute
from dense_rlhf.attribution.parity import library_shap
from dense_rlhf.attribution.sources import available
from dense_rlhf.config.params import AttributionParams
from dense_rlhf.models.dialogue import Reader
from dense_rlhf.models.reward_model import RewardModel
from dense_rlhf.models.text_spans import UNSPACED, cut, groups, homes, overlap, partition, tile, token_spans, tokenise
from dense_rlhf.models.tiny_recipe import train_tokenizer
from dense_rlhf.types import InputError


def translate(policy, reward, prompt, response):
    reading = Reader(reward).translate(policy, prompt, response, None)
    same = torch.eye(len(response), dtype=torch.float64)  # where the tokens are the policy's own
    return reading if reading.spread is not None else replace(reading, spread=same)


def made(model, trainer, **parts):
    one = Tokenizer(model)
    for name, part in parts.items():
        setattr(one, name, part)
    one.train_from_iterator([*SENTENCES, "日本 naïve 🙂"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=one, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")


SPECIAL = ["<unk>", "<pad>", "</s>"]
BYTES = [f"<0x{n:02X}>" for n in range(256)]


def word_pieces():
    """Lower case, white space lost, unknown words one token."""
    return made(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer(vocab_size=150, special_tokens=SPECIAL),
        normalizer=normalizers.BertNormalizer(lowercase=True),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(),
    )


def unigram():
    """SentencePiece's cut: a mark for each space, one more in front, unknown characters one token."""
    return made(
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=150, special_tokens=SPECIAL, unk_token="<unk>"),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
    )


def byte_fallback():
    """As Llama 2 and Gemma: SentencePiece's cut, unknown characters as their bytes, the first space dropped."""
    one = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    one.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    one.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    one.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL + BYTES))
    return PreTrainedTokenizerFast(tokenizer_object=one, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")


TOKENIZERS = {
    "small": train_tokenizer(SENTENCES, 280),
    "large": train_tokenizer(SENTENCES, 340),
    "word pieces": word_pieces(),
    "unigram": unigram(),
    "byte fallback": byte_fallback(),
}
POLICIES = ("small", "large", "byte fallback")
AWKWARD = [
    "naïve 日本🙂",
    "e\u0301 a\u0308",
    "  two  spaces ",
    "\x00",
    "👩\u200d👧 family",
    " was\ngood",
    "",
    "ﬁ Å",
    "\u202e x",
]
texts = st.one_of(
    st.sampled_from(SENTENCES + AWKWARD),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.lists(st.sampled_from(["good", " film", "é", " ", "🙂", "日", ".", "\n", "Great"]), max_size=8).map("".join),
)
tokens = st.lists(st.integers(2, 279), max_size=14)  # any: half characters, lone continuation bytes


def by_prefixes(tokenizer, ids):
    """The definition: what each prefix's text adds, never more than a longer prefix's."""
    ends = [len(tokenizer.decode(ids[: t + 1])) for t in range(len(ids))]
    ends = [min(ends[t:]) for t in range(len(ends))]
    return list(zip([0, *ends[:-1]], ends))


def check_partition(spans, length):
    assert [a for a, _ in spans] == [0, *(b for _, b in spans[:-1])] and spans[-1][1] == length
    assert all(a <= b for a, b in spans)


# ---------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("name", TOKENIZERS)
@given(ids=tokens, text=texts)
@example(ids=[200, 201], text="naïve 日本🙂")
@example(ids=[258, 390, 400, 400, 390], text="")  # byte fallback: pieces that are not the text
def test_token_spans_are_those_of_the_prefixes_and_partition_the_text(name, ids, text):
    tokenizer = TOKENIZERS[name]
    for own in (tokenizer(text, add_special_tokens=False)["input_ids"], [t % len(tokenizer) for t in ids]):
        spans = token_spans(tokenizer, own)
        assert spans == by_prefixes(tokenizer, own)
        if own:
            check_partition(spans, len(tokenizer.decode(own)))


def test_half_characters_and_lone_continuation_bytes():
    tokenizer = TOKENIZERS["small"]
    smile = tokenizer("🙂")["input_ids"]
    assert len(smile) == 4 and token_spans(tokenizer, smile) == [(0, 1), (1, 1), (1, 1), (1, 1)]
    check_partition(token_spans(tokenizer, smile[1:3]), len(tokenizer.decode(smile[1:3])))
    assert token_spans(tokenizer, []) == []


@pytest.mark.parametrize("name", TOKENIZERS)
def test_token_spans_decode_little(name, monkeypatch):
    tokenizer, decoded = TOKENIZERS[name], []
    ids = (tokenizer(" ".join(SENTENCES * 4) + " 🙂日本")["input_ids"] * 12)[:256]
    wanted, decode = by_prefixes(tokenizer, ids), type(tokenizer).decode
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, ids: decoded.append(len(ids)) or decode(self, ids))
    assert len(ids) == 256 and token_spans(tokenizer, ids) == wanted
    assert sum(decoded) < 8 * len(ids)  # every prefix: 128 times


@given(st.sampled_from(sorted(TOKENIZERS)), texts, texts, texts)
@example("unigram", "the film ", "was", "")
@example("byte fallback", "the film", " was 🙂", " good")
def test_tokenise_covers_the_middle_and_keeps_the_whole_where_no_token_straddles(name, before, middle, after):
    tokenizer = TOKENIZERS[name]
    try:
        sides = tokenise(tokenizer, before, middle, after)
    except InputError:
        assert middle and not tokenizer(middle, add_special_tokens=False)["input_ids"] or not middle.strip()
        return
    assert len(sides.middle) == len(sides.spans)
    if middle:
        assert all(0 <= a <= b <= len(middle) for a, b in sides.spans)
        check_partition(tile(sides.spans, len(middle)), len(middle))
    parts, whole = [*sides.before, *sides.middle, *sides.after], tokenizer(before + middle + after)["input_ids"]
    apart = [t for part in (before, middle, after) for t in tokenizer(part)["input_ids"]]
    assert parts in (whole, apart)


def test_a_token_that_straddles_is_cut_and_one_that_holds_only_white_space_before_is_kept():
    small = TOKENIZERS["small"]
    assert small.tokenize(" was") == ["\u0120was"]
    sides = tokenise(small, "it wa", "s good")
    assert [sides.before, sides.middle] == [small(part)["input_ids"] for part in ("it wa", "s good")]
    sides = tokenise(small, "it ", "was")
    assert sides.middle == small(" was")["input_ids"] and sides.spans == [(0, 3)]


# ---------------------------------------------------------------------------------------------------- translating


@given(st.sampled_from(POLICIES), st.sampled_from(sorted(TOKENIZERS)), texts, tokens, st.integers(0, 9))
def test_translating_conserves_every_total(policy, reward, prompt, ids, seed):
    policy, reward = TOKENIZERS[policy], TOKENIZERS[reward]
    ids = [t % len(policy) for t in ids]
    before = policy(prompt, add_special_tokens=False)["input_ids"]
    both = policy.decode([*before, *ids])
    reading = translate(policy, reward, before, ids)
    assert reading.spread.shape == (len(reading.response), len(ids))
    assert torch.allclose(reading.spread.sum(-1), torch.ones(len(reading.response), dtype=torch.float64), atol=1e-12)
    credit = torch.randn(len(reading.response), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert abs((credit @ reading.spread).sum() - credit.sum()) <= 1e-12 * max(1, credit.abs().sum())
    own = reward(both, add_special_tokens=False)["input_ids"]
    start = token_spans(policy, [*before, *ids])[len(before)][0] if ids else len(both)
    apart = [reward(part, add_special_tokens=False)["input_ids"] for part in (both[:start], both[start:])]
    assert [*reading.prompt, *reading.response] in (own, [*apart[0], *apart[1]])


def test_a_word_of_several_tokens_there_and_back():
    small, large = TOKENIZERS["small"], TOKENIZERS["large"]
    prompt, parts, text = small("it")["input_ids"], small(" great")["input_ids"], " great"
    assert len(parts) > 2 and large.tokenize(text) == ["\u0120great"]
    there = translate(small, large, prompt, parts)
    covered = [(b - a) / len(text) for a, b in token_spans(small, parts)]
    assert there.spread.tolist() == [pytest.approx(covered)]  # the one token's credit, by characters
    back = translate(large, small, there.prompt, there.response)
    assert list(back.response) == parts and back.spread.tolist() == [[1]] * len(parts)
    assert list(back.prompt) == prompt


def test_the_space_that_a_policy_drops_at_the_start_of_a_text_is_kept():
    policy, reward = TOKENIZERS["byte fallback"], TOKENIZERS["large"]
    prompt, response = (policy(text)["input_ids"] for text in ("the film", "was good"))
    assert policy.decode(response) == "was good" and policy.decode([*prompt, *response]) == "the film was good"
    reading = translate(policy, reward, prompt, response)
    assert reward.decode(list(reading.prompt)) == "the film"
    assert reward.decode(list(reading.response)) == " was good"


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
@pytest.mark.parametrize("text", [" \n ", "\x00", "\u200d"])
def test_a_response_that_is_read_as_nothing_has_no_token_to_earn_credit(name, text):
    """A policy may sample one at any time: it must not end the training."""
    policy = TOKENIZERS["small"]
    ids = policy(text, add_special_tokens=False)["input_ids"]
    reading = translate(policy, TOKENIZERS[name], policy("it", add_special_tokens=False)["input_ids"], ids)
    assert reading.spread.shape == (len(reading.response), len(ids)) and len(ids)
    assert bool(reading.response) or name == "word pieces"


def test_special_tokens_of_the_policy_are_left_out_of_the_prompt():
    small, large = TOKENIZERS["small"], TOKENIZERS["large"]
    ids = small("it")["input_ids"]
    with_pad, plain = (translate(small, large, p, ids) for p in ([small.pad_token_id, *ids], ids))
    assert with_pad.prompt == plain.prompt and with_pad.response == plain.response


def test_a_tokenizer_without_offsets_is_refused(monkeypatch):
    small = TOKENIZERS["small"]
    monkeypatch.setattr(type(small), "is_fast", False)
    with pytest.raises(InputError, match="take a fast tokenizer"):
        translate(small, small, [], small("a")["input_ids"])


def test_a_normaliser_that_drops_text_keeps_the_rest_in_place():
    dropping = train_tokenizer(SENTENCES, 280)
    drop = [normalizers.Replace("bad ", ""), normalizers.Lowercase()]
    dropping.backend_tokenizer.normalizer = normalizers.Sequence(drop)
    sides = tokenise(dropping, "THE ", "bad bad FILM", "")
    text = "bad bad FILM"
    assert "".join(text[a:b] for a, b in tile(sides.spans, len(text))) == text
    assert dropping.decode(sides.middle).strip() == "film"
    small = TOKENIZERS["small"]
    reading = translate(small, dropping, [], small(text)["input_ids"])
    assert torch.allclose(reading.spread.sum(-1), torch.ones(len(reading.response), dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------- cuts


@st.composite
def cuts(draw, length):
    inner = draw(st.lists(st.integers(0, length), max_size=6).map(sorted))
    ends = [0, *inner, length]
    return list(zip(ends, ends[1:]))


@given(st.data(), st.integers(1, 30))
def test_overlap_conserves_totals_between_any_two_cuts(data, length):
    given_, onto = (data.draw(cuts(length)) for _ in range(2))
    given_ = [span for span in given_ if span[1] > span[0]]
    shares = overlap(given_, onto)
    assert (shares.sum(-1) - 1).abs().max() <= 1e-12 and (shares >= 0).all()
    for row, (a, b) in enumerate(given_):
        wanted = [len(set(range(a, b)) & set(range(c, d))) / (b - a) for c, d in onto]
        assert shares[row].tolist() == pytest.approx(wanted, abs=1e-12)


def test_spans_that_meet_nothing_are_named():
    with pytest.raises(InputError, match=r"token 1 at characters \(3, 5\)"):
        overlap([(0, 3), (3, 5)], [(0, 3)])
    with pytest.raises(InputError, match="token 0"):
        overlap([(0, 3)], [])
    assert overlap([], [(0, 1)]).shape == (0, 1)


@given(st.one_of(texts, st.text(" \n\t.!?aé", max_size=20)))
def test_words_and_sentences_partition_any_text(text):
    for kind in ("words", "sentences"):
        spans = cut(text, kind)
        assert "".join(text[a:b] for a, b in spans) == text
        if spans:
            check_partition(spans, len(text))
    if not re.search(f"[{UNSPACED}]", text):
        assert sum(bool(text[a:b].strip()) for a, b in cut(text, "words")) == len(text.split())


def test_words_and_sentences():
    pieces = lambda text, kind: [text[a:b] for a, b in cut(text, kind)]  # noqa: E731
    assert pieces(" a  bc\nd ", "words") == [" a", "  bc", "\nd "]
    assert pieces("One. Two?! 3.5 is one\n\nFour", "sentences") == ["One.", " Two?!", " 3.5 is one\n\n", "Four"]
    assert pieces("", "words") == [] and pieces(" ", "words") == [" "]
    with pytest.raises(InputError, match="wanted tokens, words, sentences or spans"):
        cut("a", "letters")


@pytest.mark.parametrize(
    "text, words, sentences",
    [
        ("电影很好。我不喜欢结尾！你呢？", 12, ["电影很好。", "我不喜欢结尾！", "你呢？"]),
        ("映画は、よかった。「はい。」と言った", 14, ["映画は、よかった。", "「はい。」", "と言った"]),
        ("ภาพยนตร์ดี มาก", 11, ["ภาพยนตร์ดี มาก"]),
        ("film很好 good", 4, ["film很好 good"]),
        ('He said "no." Then left. Why?!', 6, ['He said "no."', " Then left.", " Why?!"]),
        ("هل هو جيد؟ نعم.", 4, ["هل هو جيد؟", " نعم."]),
        ("अच्छी फ़िल्म। हाँ।", 3, ["अच्छी फ़िल्म।", " हाँ।"]),
        ("Das ist gut… Nein!", 4, ["Das ist gut…", " Nein!"]),
    ],
)
def test_words_and_sentences_of_scripts_without_spaces(text, words, sentences):
    assert [text[a:b] for a, b in cut(text, "sentences")] == sentences
    assert len(cut(text, "words")) == words


@given(st.data(), st.integers(1, 30))
def test_groups_put_every_token_in_one_player_without_gaps(data, length):
    own, spans = (data.draw(cuts(length)) for _ in range(2))
    players = groups(own, spans)
    assert len(players) == len(own) and sorted(set(players)) == list(range(max(players) + 1))
    assert players == sorted(players) and players[0] == 0
    for (a, b), home in zip(own, homes(own, spans)):
        shared = [min(b, d) - max(a, c) for c, d in spans]
        assert a == b or shared[home] == max(shared)


def test_a_token_that_straddles_goes_where_most_of_it_lies_and_an_empty_one_with_the_one_before():
    words = [(0, 4), (4, 10)]
    assert groups([(0, 3), (3, 6), (6, 6), (6, 10)], words) == [0, 1, 1, 1]
    assert groups([(0, 5), (5, 5), (5, 10)], words) == [0, 0, 1]
    assert groups([(0, 10)], words) == [0] and groups([], words) == [] and groups([(0, 0), (0, 4)], words) == [0, 0]
    assert groups([(0, 1), (1, 2)], []) == [0, 0]


@given(st.data(), st.integers(0, 30))
def test_partition_keeps_the_spans_and_names_what_is_between(data, length):
    spans = [span for span in data.draw(cuts(length))[:: data.draw(st.integers(1, 2))] if span[0] < span[1]]
    parts = partition(spans, length)
    assert set(spans) <= set(parts) and all(a < b for a, b in parts)
    if length:
        check_partition(parts, length)


@pytest.mark.parametrize("spans", [[(2, 2)], [(3, 1)], [(-1, 2)], [(0, 6)], [(0, 3), (2, 4)], [(3, 4), (0, 1)]])
def test_partition_refuses_and_names_a_span(spans):
    with pytest.raises(InputError, match=r"spans: \(-?\d, \d\) in a text of 5"):
        partition(spans, 5)


def test_tile_gives_gaps_to_the_span_after():
    assert tile([(1, 3), (4, 6), (5, 6), (7, 8)], 10) == [(0, 3), (3, 6), (6, 6), (6, 10)]
    assert tile([], 4) == [] and tile([(0, 3), (1, 2), (3, 4)], 4) == [(0, 3), (3, 3), (3, 4)]


# ---------------------------------------------------------------------------------------------------- in PPO


def reader(tokenizer, policy_tokenizer):
    """A random reward model with a vocabulary of its own."""
    config = LlamaConfig(vocab_size=len(tokenizer), **TINY, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    model = jitter(LlamaForSequenceClassification(config), seed=1)
    return RewardModel(model, tokenizer, policy_tokenizer=policy_tokenizer)


@pytest.mark.parametrize("players", ["tokens", "words"])
@pytest.mark.parametrize("name", ["large", "unigram", "byte fallback"])
def test_a_reward_model_with_another_vocabulary_is_complete_on_the_policys_tokens(
    name, players, tokenizer, reference, policy
):
    own = reader(TOKENIZERS[name], tokenizer)
    rollout = make_rollout(policy, reference, own, tokenizer, seed=4)
    readings = own.readings(rollout)
    for row, (keep, shown) in enumerate(zip(rollout.players, rollout.query_mask)):
        prompt, response = (tokenizer.decode(x) for x in (rollout.queries[row][shown], rollout.responses[row][keep]))
        assert prompt == PROMPTS[row]
        sides = tokenise(own.tokenizer, prompt, response)
        ids = torch.tensor([[*sides.before, *sides.middle, own.tokenizer.eos_token_id]])
        with torch.no_grad():
            assert own.model(ids).logits.item() == pytest.approx(rollout.scores[row].item(), abs=1e-5)
    attributions = attribute(own, rollout, ["shap", "lime"], AttributionParams(players=players))
    assert attributions["shap"].gap.abs().max() <= 1e-5 and attributions["shap"].credit.any()
    assert not attributions["lime"].credit[~rollout.players].any()
    alone = [reading for reading in readings if len(reading.response) > 1]
    assert alone and any(len(r.response) != r.spread.shape[1] for r in alone)


def test_credit_on_policy_tokens_sums_to_credit_on_reward_tokens(tokenizer, reference, policy):
    from dense_rlhf.attribution.removal import explain_readings, on_policy_tokens, player_groups
    from dense_rlhf.attribution.sources import SOURCES

    own, params = reader(TOKENIZERS["large"], tokenizer), AttributionParams()
    rollout = make_rollout(policy, reference, own, tokenizer, seed=4)
    readings = own.readings(rollout)
    of = [player_groups(own, reading, "tokens") for reading in readings]
    attribution = explain_readings(own, readings, of, {"lime": SOURCES["lime"]}, params)["lime"]
    credit = on_policy_tokens(rollout, readings, attribution.credits)
    assert credit.sum(-1).tolist() == pytest.approx([c.sum().item() for c in attribution.credits], abs=1e-5)
    assert attribution.scores.tolist() == pytest.approx(rollout.scores.tolist(), abs=1e-5)


def test_the_same_vocabulary_read_through_its_text_gives_the_same_credit(tokenizer, reward_model, reference, policy):
    through = replace(reward_model, policy_tokenizer=tokenizer)
    rollout = make_rollout(policy, reference, reward_model, tokenizer, seed=4)
    same = [
        row
        for row, (a, b) in enumerate(zip(through.readings(rollout), reward_model.readings(rollout)))
        if (a.prompt, a.response) == (b.prompt, b.response)
    ]
    direct, read = (attribute(one, rollout, ["shap"], AttributionParams())["shap"] for one in (reward_model, through))
    assert same and torch.allclose(direct.credit[same], read.credit[same], atol=1e-5)


def test_the_shap_library_agrees_on_the_policys_tokens(tokenizer, reference, policy):
    own = reader(TOKENIZERS["large"], tokenizer)
    rollout = make_rollout(policy, reference, own, tokenizer, seed=4)
    ours = attribute(own, rollout, ["shap"], AttributionParams())["shap"].credit
    row = int(rollout.players.sum(-1).argmax())
    assert own.readings(rollout)[row].spread is not None
    theirs = library_shap(own, rollout, row, AttributionParams())
    assert torch.allclose(theirs, ours[row], atol=1e-4) and theirs.any()


def test_sources_that_a_model_cannot_give_are_not_available(tokenizer):
    decoder = reader(TOKENIZERS["large"], tokenizer)
    assert {"attention", "gradient_input"} <= set(available(decoder)) and "log_ratio" not in available(decoder)
    sizes = dict(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=len(tokenizer), num_labels=1)
    t5 = T5ForSequenceClassification(T5Config(**sizes, pad_token_id=1, eos_token_id=0, decoder_start_token_id=1))
    missing = {"attention", "gradient_input", "integrated_gradients"}
    assert not missing & set(available(replace(decoder, model=t5))) and "shap" in available(replace(decoder, model=t5))
