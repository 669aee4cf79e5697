"""Explaining any reward model: decoders and encoders, their own scores, players, display."""

import html
import math
from itertools import combinations

import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import SENTENCES, jitter
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from dense_rlhf.attribution.explain import explain
from dense_rlhf.types import InputError, Message

PROMPT, RESPONSE = "the film", " was good. A bad plot, and awful acting"
HOSTILE = "<script>alert('x')</script> &amp; $\\frac{$ \x00 \u202e film\U0001f642"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<user>", "<assistant>", "<end>"]
CHAT = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def word_pieces(lower=True):
    """A tokenizer as BERT's: [CLS] text [SEP], lower case, words cut by white space, unknown words one token."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=lower)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(SENTENCES, trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL))
    ends = [(token, made.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.fixture(scope="module")
def bert_tokenizer():
    return word_pieces()


@pytest.fixture
def chat_tokenizer(tokenizer):
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=CHAT,
    )
    made.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>", "<end>"]})
    return made


SIZE = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
GROUPED = dict(**SIZE, num_key_value_heads=1, head_dim=8)
DECODERS = {
    "Llama": SIZE,
    "Mistral": GROUPED,
    "Qwen2": GROUPED,
    "Qwen3": GROUPED,
    "Gemma": GROUPED,
    "Gemma2": GROUPED,
    "GPT2": dict(n_embd=16, n_layer=2, n_head=2),
    "GPTNeoX": SIZE,
}
ENCODERS = {
    "Bert": SIZE,
    "Roberta": SIZE,
    "DebertaV2": dict(**SIZE, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "DistilBert": dict(dim=16, n_layers=2, n_heads=2, hidden_dim=32),
}


def build(kind, tokenizer, **extra):
    """A random classifier of one kind with one output."""
    config = getattr(transformers, f"{kind}Config")(
        **{**DECODERS, **ENCODERS}[kind],
        vocab_size=len(tokenizer),
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
        **extra,
    )
    torch.manual_seed(0)
    return jitter(getattr(transformers, f"{kind}ForSequenceClassification")(config), seed=1)


def own_score(model, ids):
    ids = torch.tensor([ids])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item()


@pytest.fixture(scope="module")
def llama(tokenizer):
    return build("Llama", tokenizer)


@pytest.mark.parametrize("kind", ["Llama", "Bert"])
def test_a_model_without_a_head_is_one_line(kind, tokenizer):
    with pytest.raises(InputError, match=f"{kind}Model cannot read .* tokens .*logits"):
        explain(build(kind, tokenizer).base_model, tokenizer, PROMPT, RESPONSE, pair=False)


@pytest.fixture(scope="module")
def bert(bert_tokenizer):
    return build("Bert", bert_tokenizer)


# ---------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("source, end", [("shap", None), ("lime", "eos"), ("owen", "eos"), ("owen", None)])
@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoders_scores_are_its_own(kind, source, end, tokenizer):
    model = build(kind, tokenizer)
    explained = explain(model, tokenizer, PROMPT, RESPONSE, source, end=end)
    prompt = tokenizer(PROMPT)["input_ids"]
    whole = tokenizer(PROMPT + RESPONSE)["input_ids"]
    after = [tokenizer.eos_token_id] if end else []
    assert explained.score == pytest.approx(own_score(model, [*whole, *after]), abs=1e-5)
    assert explained.baseline == pytest.approx(own_score(model, [*prompt, *after]), abs=1e-5)
    assert explained.text == PROMPT + RESPONSE + "<eos>" * bool(end)
    last = "<eos>" if end else tokenizer.convert_ids_to_tokens(whole[-1])
    assert explained.read_at == f"token {len(whole) + len(after)} of {len(whole) + len(after)}, {last!r}"
    assert abs(explained.score - explained.baseline) > 1e-2
    assert explained.engine == ("packed" if kind in ("Llama", "Mistral", "Qwen2", "Qwen3") else "plain")
    assert len(explained.tokens) == len(whole) - len(prompt) and "".join(explained.tokens) == RESPONSE
    assert explained.complete == (source != "lime") and (abs(explained.gap) <= 1e-5 or not explained.complete)
    assert explained.score == pytest.approx(explained.baseline + sum(explained.credit) + explained.gap, abs=1e-12)


@pytest.mark.parametrize("removal", ["drop", "attention_mask", "replace:[UNK]"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoders_scores_are_its_own(kind, removal, bert_tokenizer):
    model = build(kind, bert_tokenizer)
    explained = explain(model, bert_tokenizer, PROMPT, RESPONSE, removal=removal)
    assert explained.score == pytest.approx(own_score(model, bert_tokenizer(PROMPT + RESPONSE)["input_ids"]), abs=1e-5)
    if removal == "drop":
        assert explained.baseline == pytest.approx(own_score(model, bert_tokenizer(PROMPT)["input_ids"]), abs=1e-5)
    assert explained.text.startswith(("[CLS] the film", "[CLS]the film")) and explained.text.endswith("[SEP]")
    assert explained.read_at.startswith(f"what {kind}ForSequenceClassification pools of")
    assert abs(explained.gap) <= 1e-5 and explained.engine == "plain" and len(set(explained.credit)) > 3
    assert "".join(explained.tokens) == RESPONSE and explained.tokens[0] == " was"  # not lower-cased, no ##


def shapley(value, k):
    """By definition: the mean over all orders of what a player adds."""
    credit = np.zeros(k)
    for i in range(k):
        others = [j for j in range(k) if j != i]
        for size in range(k):
            weight = math.factorial(size) * math.factorial(k - size - 1) / math.factorial(k)
            credit[i] += weight * sum(value({*s, i}) - value(set(s)) for s in combinations(others, size))
    return credit


@pytest.mark.parametrize("players", ["tokens", "words"])
@pytest.mark.parametrize("side", ["decoder", "encoder"])
def test_kernel_shap_of_all_coalitions_is_shapley_by_definition(side, players, tokenizer, bert_tokenizer, llama, bert):
    model, own = (llama, tokenizer) if side == "decoder" else (bert, bert_tokenizer)
    response = {"tokens": " was good.", "words": " was good. A bad plot"}[players]
    explained = explain(model, own, PROMPT, response, "kernel", players, samples_per_token=40, end="eos")
    ids = own(PROMPT + response)["input_ids"]
    if side == "decoder":
        ids = [*ids, own.eos_token_id]
    start, k = len(ids) - 1 - len(explained.tokens), len(explained.players)
    assert 2 <= k <= 6

    def value(kept):
        return own_score(
            model,
            [t for n, t in enumerate(ids) if not start <= n < len(ids) - 1 or explained.player[n - start] in kept],
        )

    assert np.allclose(explained.player_credit, shapley(value, k), atol=1e-5)


def test_a_tokenizers_own_special_tokens_stay(tokenizer, llama):
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), eos_token="<eos>", pad_token="<pad>"
    )
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    explained = explain(llama, made, PROMPT, RESPONSE)
    assert explained.score == pytest.approx(own_score(llama, made(PROMPT + RESPONSE)["input_ids"]), abs=1e-5)
    assert explained.baseline == pytest.approx(own_score(llama, made(PROMPT)["input_ids"]), abs=1e-5)


def test_an_empty_prompt_and_a_response_that_goes_on_with_a_word(tokenizer, llama, bert, bert_tokenizer):
    assert explain(bert, bert_tokenizer, "", "good film").baseline == pytest.approx(own_score(bert, [2, 3]), abs=1e-5)
    assert "".join(explain(llama, tokenizer, "", "good film", end="eos").tokens) == "good film"
    with pytest.raises(InputError, match="reads no token at all, .* end='eos'"):
        explain(llama, tokenizer, "", "good film")
    assert tokenizer.tokenize(" was") == ["\u0120was"]
    with pytest.warns(UserWarning, match="a token would lie in both"):
        explained = explain(llama, tokenizer, "the wa", "s film")
    ids = tokenizer("the wa")["input_ids"] + tokenizer("s film")["input_ids"]
    assert explained.score == pytest.approx(own_score(llama, ids), abs=1e-5) and "".join(explained.tokens) == "s film"
    explained = explain(llama, tokenizer, "it ", "was")  # white space joins the token that it belongs to
    whole = tokenizer("it was")["input_ids"]
    assert explained.score == pytest.approx(own_score(llama, whole), abs=1e-5) and explained.tokens == ["was"]


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Bert"])
def test_adapters_are_explained_unmerged(kind, tokenizer, bert_tokenizer):
    own = bert_tokenizer if kind == "Bert" else tokenizer
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear")
    model = peft.get_peft_model(build(kind, own), config)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, 0, 0.3)
    explained = explain(model.eval(), own, PROMPT, RESPONSE)
    with model.disable_adapter():
        bare = explain(model, own, PROMPT, RESPONSE)
    merged = explain(model.merge_and_unload(), own, PROMPT, RESPONSE)
    assert explained.score == pytest.approx(merged.score, abs=1e-5)
    assert explained.credit == pytest.approx(merged.credit, abs=1e-5)
    assert explained.engine == merged.engine and abs(explained.score - bare.score) > 1e-3


def test_adapters_that_add_tokens_are_refused(tokenizer):
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    with pytest.raises(InputError, match="PROMPT_TUNING adapters"):
        explain(peft.get_peft_model(build("Llama", tokenizer), config).eval(), tokenizer, PROMPT, RESPONSE)


# ---------------------------------------------------------------------------------------------------- dialogues


DIALOGUE = (Message("user", "what a good film"), Message("assistant", "it was"), Message("user", "good"))


def test_a_dialogue_goes_through_the_chat_template(chat_tokenizer):
    model = build("Qwen2", chat_tokenizer)
    explained = explain(model, chat_tokenizer, DIALOGUE, "good")  # also a word of the prompt
    turns = [vars(m) for m in (*DIALOGUE, Message("assistant", "good"))]
    ids = chat_tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    assert explained.score == pytest.approx(own_score(model, ids), abs=1e-5) and "".join(explained.tokens) == "good"
    none = chat_tokenizer.apply_chat_template([*turns[:-1], {"role": "assistant", "content": ""}], return_dict=True)
    assert explained.baseline == pytest.approx(own_score(model, none["input_ids"]), abs=1e-5)
    again = explain(model, chat_tokenizer, [vars(m) for m in DIALOGUE], "good")
    assert again.credit == explained.credit


@pytest.mark.parametrize(
    "template, response",
    [
        (CHAT.replace("m['content']", "m['content'] | trim"), " good"),
        (CHAT.replace("m['content']", "m['content'] + m['content']"), "good"),
        (CHAT.replace("m['content']", "m['content'].split('</think>')[-1]"), "a</think>b"),
        ("{{ messages[0]['content'] }}", "good"),
    ],
)
def test_a_template_that_alters_the_response_is_refused(template, response, chat_tokenizer):
    chat_tokenizer.chat_template = template
    with pytest.raises(InputError, match="chat template does not keep the response"):
        explain(build("Llama", chat_tokenizer), chat_tokenizer, DIALOGUE, response)


PARTS = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ call.name }}{% endfor %}<end>{% endfor %}"
)


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "user", "content": [{"type": "text", "text": "what a "}, {"type": "text", "text": "good film"}]}],
        [{"role": "user", "content": "hi"}, {"role": "tool", "content": "the plot", "name": "look"}],
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "it", "tool_calls": [{"name": "was"}]}],
        [{"role": "user", "content": "hi"}, {"role": "critic", "content": "bad"}],
    ],
)
def test_turns_of_parts_and_tools_are_what_the_template_makes_of_them(turns, chat_tokenizer):
    chat_tokenizer.chat_template = PARTS
    model = build("Llama", chat_tokenizer)
    explained = explain(model, chat_tokenizer, turns, "<think>bad</think> good")  # and thinking that the template keeps
    whole = [*turns, {"role": "assistant", "content": "<think>bad</think> good"}]
    ids = chat_tokenizer.apply_chat_template(whole, return_dict=True)["input_ids"]
    assert explained.score == pytest.approx(own_score(model, ids), abs=1e-5)
    assert explained.text == chat_tokenizer.decode(ids)
    with pytest.raises(InputError, match="wanted a role"):
        explain(model, chat_tokenizer, [{"content": "hi"}], "good")
    chat_tokenizer.chat_template = None
    if not isinstance(turns[-1]["content"], str) or turns[-1]["role"] in ("tool", "critic"):
        with pytest.raises(InputError, match="wanted a role of user, .* and content as text"):
            explain(model, chat_tokenizer, turns, "good")


def test_a_dialogue_without_a_template_is_written_out(tokenizer, llama):
    explained = explain(llama, tokenizer, DIALOGUE[:1], "good film")
    text = "\n\nHuman: what a good film\n\nAssistant: good film"
    ids = tokenizer(text)["input_ids"]
    assert (
        explained.score == pytest.approx(own_score(llama, ids), abs=1e-5) and "".join(explained.tokens) == "good film"
    )


# ---------------------------------------------------------------------------------------------------- players


def test_players_are_words_sentences_or_spans(tokenizer, llama):
    def parts(players):
        explained = explain(llama, tokenizer, PROMPT, RESPONSE, players=players)
        credit = np.array(explained.credit)
        for number, total in enumerate(explained.player_credit):
            own = credit[np.array(explained.player) == number]
            assert np.allclose(own, total / len(own)) and abs(explained.gap) < 1e-5
        return [RESPONSE[a:b] for a, b in explained.players]

    words = [" was", " good.", " A", " bad", " plot,", " and", " awful", " acting"]
    assert parts("words") == words
    assert parts("sentences") == [" was good.", " A bad plot, and awful acting"]
    assert parts([(5, 10), (12, 21)]) == [" was", " good.", " A", " bad plot", ", and awful acting"]
    assert parts([(0, len(RESPONSE))]) == [RESPONSE]


@pytest.mark.parametrize("spans", [[(3, 3)], [(0, 99)], [(-1, 3)], [(4, 9), (2, 3)], [(0, 5), (4, 9)], [(5, 4)]])
def test_spans_that_do_not_fit_are_named(spans, tokenizer, llama):
    with pytest.raises(InputError, match=r"spans: \("):
        explain(llama, tokenizer, PROMPT, RESPONSE, players=spans)


@pytest.mark.parametrize(
    "players", [[(0,)], [None], 5, ["ab"], [(0.0, 3.0)], [(True, 3)], [(0, 3, 4)], None, "", "tokenz"]
)
def test_players_of_another_type_are_refused(players, tokenizer, llama):
    with pytest.raises(InputError, match="wanted (rising|tokens, words)"):
        explain(llama, tokenizer, PROMPT, RESPONSE, players=players)


@pytest.mark.parametrize(
    "options", [dict(seed=-1), dict(output="0"), dict(output=True), dict(removal=None), dict(sed=1)]
)
def test_options_of_another_type_are_refused(options, tokenizer, llama):
    with pytest.raises(InputError, match=f"{[*options][0]} is "):
        explain(llama, tokenizer, PROMPT, RESPONSE, **options)


def test_a_span_inside_of_a_token_is_refused(tokenizer, llama):
    with pytest.raises(InputError, match="smaller part of a token"):
        explain(llama, tokenizer, PROMPT, " good film", players=[(1, 2)])


# ---------------------------------------------------------------------------------------------------- display


@pytest.mark.parametrize("side", ["decoder", "encoder"])
def test_hostile_text_is_escaped(side, tokenizer, bert_tokenizer, llama, bert):
    model, own = (llama, tokenizer) if side == "decoder" else (bert, bert_tokenizer)
    explained = explain(model, own, PROMPT, HOSTILE, players="words")
    assert "".join(explained.tokens) == HOSTILE
    for page in (explained._repr_html_(), plot_text(explained)):
        assert "<script" not in page and "alert(&#x27;x" in page
        assert "\x00" not in page and "\u202e" not in page and "⟨202e⟩" in page and "⟨0000⟩" in page
        assert "&amp;amp;" in page and "&amp;" in html.unescape(page)
    assert "onerror" not in explained._repr_html_() and "onclick" not in explained._repr_html_()
    assert repr(explained).isprintable() or {c for c in repr(explained) if not c.isprintable()} == {"\n"}
    draw(explained)


def plot_text(explained):
    import shap

    return shap.plots.text(explained.to_shap(), display=False)


def draw(explained):
    import matplotlib
    import shap

    matplotlib.use("agg")
    for plot in (shap.plots.bar, shap.plots.waterfall):
        matplotlib.pyplot.figure()  # theirs draw into whatever axes another test left
        plot(explained.to_shap(), show=False)
        matplotlib.pyplot.gcf().canvas.draw()  # labels are read as mathematics only now
        matplotlib.pyplot.close("all")


def test_it_shows_itself(tokenizer, llama):
    explained = explain(llama, tokenizer, PROMPT, RESPONSE, players="words")
    page, text = explained._repr_html_(), repr(explained)
    top = explained.ranked()
    assert list(top["credit"].abs()) == sorted(map(abs, explained.player_credit), reverse=True)
    assert top["share"].sum() == pytest.approx(1) and top.part.iloc[0] in page and repr(top.part.iloc[0]) in text
    for part in (f"score {explained.score:.4f} = baseline {explained.baseline:.4f}", "LlamaForSequence", "packed"):
        assert part in html.unescape(page) and part in text
    assert page.count("<span") == len(explained.tokens) and "more parts" not in page
    assert "more parts move it less" in explain(llama, tokenizer, PROMPT, RESPONSE)._repr_html_()


def test_frame_and_shap_hold_the_same_numbers(tokenizer, llama):
    explained = explain(llama, tokenizer, PROMPT, RESPONSE + " \U0001f642", players="words")
    frame = explained.to_frame()
    assert list(frame.columns) == ["token", "start", "end", "player", "credit", "half_width"]
    assert frame["credit"].sum() == pytest.approx(explained.score - explained.baseline, abs=1e-5)
    assert (
        "".join(frame["token"]) == explained.response and (frame["start"][1:].values == frame["end"][:-1].values).all()
    )
    shown = explained.to_shap()
    assert shown.values.tolist() == explained.player_credit and shown.base_values == explained.baseline
    assert np.allclose(shown.values, frame.groupby("player")["credit"].sum())
    assert " good." in shown.feature_names and len(shown.data) == len(explained.players)


# ---------------------------------------------------------------------------------------------------- errors


def test_no_tokenizer_and_no_weights_are_named(tokenizer):
    for other in (None, "llama"):
        with pytest.raises(InputError, match="^tokenizer is .*AutoTokenizer"):
            explain(build("Llama", tokenizer), other, PROMPT, RESPONSE)
    with pytest.raises(InputError, match="meta device"):
        explain(build("Llama", tokenizer).to("meta"), tokenizer, PROMPT, RESPONSE)


def test_wrong_input_is_refused_in_words(tokenizer, llama, bert, bert_tokenizer, monkeypatch):
    def refuse(match, model=llama, own=tokenizer, prompt=PROMPT, response=RESPONSE, **more):
        with pytest.raises(InputError, match=match):
            explain(model, own, prompt, response, **more)

    refuse("wanted text that is not empty", response="")
    refuse("wanted text that is not empty", response=None)
    refuse("wanted one that removes tokens: shap", source="attention")
    refuse("wanted one that removes tokens: shap", source="nonsense")
    refuse("wanted tokens, words, sentences", players="letters")
    refuse("wanted text or messages", prompt=())
    refuse("wanted text or messages", prompt=None)
    refuse("wanted a role", prompt=[{"role": "judge", "content": "x"}])
    refuse("wanted a role", prompt=[Message("user", None)])
    refuse("not valid Unicode", response="\ud800")
    refuse("reads nothing", model=bert, own=bert_tokenizer, response=" \x00 ")
    refuse("training mode", model=build("Llama", tokenizer).train())
    refuse(
        "has 2 outputs, wanted one",
        model=transformers.LlamaForSequenceClassification(
            transformers.LlamaConfig(**SIZE, vocab_size=len(tokenizer), num_labels=2)
        ).eval(),
    )
    refuse("wanted a Hugging Face sequence classifier", model=torch.nn.Linear(1, 1))
    refuse("end is 'EOS', wanted None", end="EOS")
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    refuse("take a fast tokenizer")


@pytest.mark.parametrize("kind, name", [("Llama", "max_position_embeddings"), ("GPT2", "n_positions")])
def test_a_text_longer_than_the_model_is_refused(kind, name, tokenizer):
    text = " good" * 9
    fits = len(tokenizer(PROMPT + text)["input_ids"])
    explain(build(kind, tokenizer, **{name: fits}), tokenizer, PROMPT, text)
    with pytest.raises(InputError, match=f"are {fits} tokens, .* at most {fits - 1}"):
        explain(build(kind, tokenizer, **{name: fits - 1}), tokenizer, PROMPT, text)


def test_robertas_positions_begin_after_its_padding(bert_tokenizer):
    fits = len(bert_tokenizer(PROMPT + RESPONSE)["input_ids"])
    explain(build("Roberta", bert_tokenizer, max_position_embeddings=fits + 1), bert_tokenizer, PROMPT, RESPONSE)
    with pytest.raises(InputError, match=f"at most {fits - 1}"):
        explain(build("Roberta", bert_tokenizer, max_position_embeddings=fits), bert_tokenizer, PROMPT, RESPONSE)


def test_a_model_that_reads_padding_is_never_given_any(bert_tokenizer):
    class PoolsPadding(transformers.BertForSequenceClassification):
        def forward(self, input_ids, attention_mask=None):
            output = super().forward(input_ids, attention_mask=attention_mask)
            return type(output)(logits=output.logits + input_ids.shape[1])

    model = PoolsPadding(build("Bert", bert_tokenizer).config).eval()
    explained = explain(model, bert_tokenizer, PROMPT, RESPONSE)
    assert explained.score == pytest.approx(own_score(model, bert_tokenizer(PROMPT + RESPONSE)["input_ids"]), abs=1e-5)
    assert explained.baseline == pytest.approx(own_score(model, bert_tokenizer(PROMPT)["input_ids"]), abs=1e-5)


def test_a_model_that_gives_nan_is_refused(tokenizer):
    model = build("Llama", tokenizer)
    torch.nn.init.constant_(model.score.weight, torch.nan)
    with pytest.raises(InputError, match="nan"):
        explain(model, tokenizer, PROMPT, RESPONSE)
