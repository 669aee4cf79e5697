"""Scores and credit of every architecture are those of its own forward, in `explain` and as a study's reward model."""

import inspect
from collections import defaultdict
from itertools import compress, product
from math import factorial

import numpy as np
import pytest
import torch
import transformers
from conftest import SENTENCES, jitter
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification

from dense_rlhf.attribution.explain import explain
from dense_rlhf.attribution.removal import explain_readings
from dense_rlhf.attribution.sources import SOURCES
from dense_rlhf.config.params import AttributionParams, RewardParams
from dense_rlhf.models.train_reward_model import load_reward_model

SIZES = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_key_value_heads=2,
    head_dim=8, d_model=16, n_layer=2, n_head=2, n_embd=16, n_layers=2, n_heads=2, dim=16, hidden_dim=32,
    num_layers=2, num_heads=2, d_ff=32, d_kv=8, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, ffn_dim=32, embedding_size=16, d_inner=32,
    emb_dim=16, n_inner=32, word_embed_proj_dim=16, dff=32, attention_window=4,
)  # fmt: skip
DECODERS = (
    "arcee biogpt bloom ctrl diffllama doge exaone4 gemma gemma2 gemma3_text glm glm4 gpt2 gpt_bigcode gpt_neox helium "
    "hunyuan_v1_dense llama ministral mistral mixtral modernbert-decoder mpt nemotron olmo olmo2 olmo3 openai-gpt opt "
    "persimmon phi phi3 qwen3 seed_oss smollm3 stablelm starcoder2 gpt_oss jetmoe minimax"
).split()
ENCODERS = (
    "albert bert camembert convbert data2vec-text deberta deberta-v2 distilbert electra ernie eurobert flaubert fnet "
    "megatron-bert modernbert mpnet nystromformer rembert roberta roberta-prelayernorm roformer xlm-roberta xlnet "
    "big_bird gte ibert nomic_bert"
).split()
SEQ2SEQ = "bart mbart mt5 mvp t5".split()
WORDS = sorted({word for text in SENTENCES for word in text.replace(",", " ,").replace(";", " ;").split()})
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<sep>", "<user>", "<assistant>", "<end>"]
CHAT = (
    "<s> {% for m in messages %}<{{ m.role }}> {{ m.content }} <end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
PROMPT, RESPONSE = "the film was", " good and great"


def words(ends="", **options):
    """A tokenizer of whole words, that adds what `ends` says around `$A`: as T5's, Llama's or BERT's."""
    made = Tokenizer(models.WordLevel({w: n for n, w in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if ends:
        pair = ends.replace("</s>", "<sep>") + " $B:1 </s>:1"
        ids = [(token, SPECIAL.index(token)) for token in ("<s>", "</s>", "<sep>")]
        made.post_processor = processors.TemplateProcessing(single=ends, pair=pair, special_tokens=ids)
    names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", sep_token="<sep>", pad_token="<pad>")
    extra = [token for token in SPECIAL if token not in names.values()]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, additional_special_tokens=extra, **names | options
    )


def classifier(kind, tokenizer, **options):
    """A random classifier of one kind that does read its text."""
    known = transformers.CONFIG_MAPPING[kind]()
    sizes = {name: value for name, value in SIZES.items() if hasattr(known, name)}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "bos")}
    ids |= dict(decoder_start_token_id=ids["pad_token_id"]) if kind in SEQ2SEQ else {}
    config = transformers.CONFIG_MAPPING[kind](**sizes | ids | dict(num_labels=1, vocab_size=len(tokenizer)) | options)
    torch.manual_seed(0)
    return jitter(AutoModelForSequenceClassification.from_config(config), seed=1, scale=0.3)


@torch.no_grad()
def own(model, rows, kinds):
    """The model's own forward on texts of one length, with as many ends."""
    ids, kinds = torch.tensor(rows), {"token_type_ids": torch.tensor(kinds)} if kinds else {}
    return model(input_ids=ids, attention_mask=torch.ones(ids.shape), **kinds).logits[:, 0].tolist()


def by_definition(model, before, middle, after, kinds):
    """Scores of no and of all response tokens, and the Shapley value of each, from the own forward of every text."""
    k, p = len(middle), len(before)
    values, alike = {}, defaultdict(list)
    for keep in product([False, True], repeat=k):
        kept = [True] * p + list(keep) + [True] * len(after)
        text, segments = (list(compress(part, kept)) for part in ([*before, *middle, *after], kinds or kept))
        alike[len(text), text.count(model.config.eos_token_id)].append((keep, text, segments))
    for group in alike.values():
        coalitions, rows, segments = zip(*group)
        values |= zip(coalitions, own(model, rows, kinds and segments))
    credit = np.zeros(k)
    for keep, value in values.items():
        for t in range(k):
            size = sum(keep) - keep[t]
            weight = factorial(size) * factorial(k - size - 1) / factorial(k)
            credit[t] += weight * value * (1 if keep[t] else -1)
    return values[(False,) * k], values[(True,) * k], credit


def inputs(tokenizer, prompt, response, pair):
    """What a user would give the model."""
    if pair:
        return tokenizer(prompt, response, return_tensors="pt")
    if isinstance(prompt, str):
        return tokenizer(prompt + response, return_tensors="pt")
    turns = [*prompt, {"role": "assistant", "content": response}]
    return tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)


def check(model, tokenizer, prompt, response, reference, policy, folder, **reading):
    """Both ways into the package against the definition; the folder is given the model where it is empty."""
    baseline, score, credit = by_definition(model, *reference)
    assert abs(score - baseline) > 1e-4 and np.ptp(credit) > 1e-5  # the model reads the response
    as_in_studies = dict(pair=False, end="eos") | reading
    explained = explain(model, tokenizer, prompt, response, "kernel", samples_per_token=8, **as_in_studies)
    assert [explained.baseline, explained.score] == pytest.approx([baseline, score], abs=1e-5)
    assert explained.credit == pytest.approx(credit, abs=1e-4)
    given = inputs(tokenizer, prompt, response, reading.get("pair"))
    with torch.no_grad():
        score_as_given = model(**given).logits[0, 0].item()
    if given["input_ids"].shape[1] == sum(map(len, reference[:3])):
        assert explained.score == pytest.approx(score_as_given, abs=1e-5)
    else:  # without EOS, which only end="eos" adds
        bare = explain(model, tokenizer, prompt, response, "kernel", samples_per_token=8, pair=False)
        assert bare.score == pytest.approx(score_as_given, abs=1e-5)
        assert bare.credit == pytest.approx(by_definition(model, *reference[:2], [], None)[2], abs=1e-4)
    if not any(folder.iterdir()):
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    loaded = load_reward_model([], policy, RewardParams(name=str(folder), **reading), "r")
    query, ids = (policy(part, add_special_tokens=False)["input_ids"] for part in (PROMPT, response))
    one = loaded.reading(query, ids, None if isinstance(prompt, str) else tuple(prompt))
    assert loaded.score([one]).item() == pytest.approx(score, abs=1e-5)
    params, design = AttributionParams(samples_per_token=8), {"kernel": SOURCES["kernel"]}
    in_study = explain_readings(loaded, [one], [np.arange(len(one.response))], design, params)["kernel"]
    assert in_study.credits[0].tolist() == pytest.approx(credit, abs=1e-4)


FORMS = list(product([False, True], repeat=4))  # BOS, template, pad = EOS, special tokens in the text


@pytest.fixture(scope="module")
def policy():
    return words()


@pytest.mark.parametrize("kind", DECODERS)
def test_decoders(kind, policy, tmp_path):
    """Two of the sixteen forms for each architecture, other ones from one to the next."""
    number = DECODERS.index(kind)
    for form in range(2):
        bos, template, pad_is_eos, special = FORMS[(number * 7 + form * 11) % 16]
        options = dict(chat_template=CHAT) if template else {}
        tokenizer = words("<s> $A" if bos else "", **options | (dict(pad_token="</s>") if pad_is_eos else {}))
        response = " good </s> film" if special else RESPONSE
        prompt = [{"role": "user", "content": PROMPT}] if template else PROMPT
        before = (
            ["<s>", "<user>", *PROMPT.split(), "<end>", "<assistant>"] if template else ["<s>"] * bos + PROMPT.split()
        )
        after = ["<end>"] if template else ["</s>"] if kind not in ("ctrl", "modernbert-decoder") else []
        parts = [tokenizer.convert_tokens_to_ids(part) for part in (before, response.split(), after)]
        folder = tmp_path / str(form)
        folder.mkdir()
        check(
            classifier(kind, tokenizer),
            tokenizer,
            prompt,
            response.strip() if template else response,
            (*parts, None),
            policy,
            folder,
        )


@pytest.mark.parametrize("kind", [*ENCODERS, *SEQ2SEQ])
def test_encoders(kind, policy, tmp_path):
    """A text, a dialogue and two segments, each in one of eight forms, other ones from one architecture to the next."""
    number, pools = [*ENCODERS, *SEQ2SEQ].index(kind), kind in SEQ2SEQ  # where its only EOS is
    for place, shape in enumerate(["text", "text"] if pools else ["text", "dialogue", "pair"]):
        bare, pad_is_eos, special = list(product([False, True], repeat=3))[(number * 3 + place * 5) % 8]
        ends = "$A </s>" if pools or kind in ("xlnet", "flaubert") else "<s> $A </s>"  # the first read the last token
        ends = "" if bare and shape != "pair" and not pools else ends
        options = dict(pad_token="</s>") if pad_is_eos and not pools else {}
        response = " good </s> film" if special else RESPONSE
        before, after = [*ends.split("$A")[0].split(), *PROMPT.split()], ends.split("$A")[-1].split()
        if shape == "dialogue":
            options["chat_template"], response = CHAT, response.strip()
            before, after = ["<s>", "<user>", *PROMPT.split(), "<end>", "<assistant>"], ["<end>"]
        elif shape == "pair":
            before.append("<sep>")
        tokenizer = words(ends, **options)
        model = classifier(kind, tokenizer)
        parts = [tokenizer.convert_tokens_to_ids(part) for part in (before, response.split(), after)]
        segments = shape == "pair" and "token_type_ids" in inspect.signature(model.forward).parameters
        segments = segments and getattr(model.config, "type_vocab_size", 2) > 1
        if segments:
            tokenizer = words(ends, model_input_names=["input_ids", "token_type_ids", "attention_mask"], **options)
        kinds = [0] * len(parts[0]) + [1] * (len(parts[1]) + len(parts[2])) if segments else None
        folder = tmp_path / str(place)
        folder.mkdir()
        prompt = [{"role": "user", "content": PROMPT}] if shape == "dialogue" else PROMPT
        pair = dict(pair=True) if shape == "pair" else {}
        check(model, tokenizer, prompt, response, (*parts, kinds), policy, folder, **pair)


@pytest.mark.parametrize(
    "kind, shape",
    [
        *(("llama", "decoder"), ("gpt2", "decoder"), ("qwen3", "decoder")),
        *(("bert", "encoder"), ("modernbert", "encoder"), ("deberta-v2", "encoder")),
        *(("bart", "encoder-decoder"), ("t5", "encoder-decoder")),
        *(("bert", "two segments"), ("electra", "two segments"), ("xlnet", "two segments")),
    ],
)
def test_values_of_eight_players_are_those_of_all_coalitions(kind, shape):
    pair, last = shape == "two segments", kind in ("bart", "t5", "xlnet")  # those read their last token
    ends = "" if shape == "decoder" else "$A </s>" if last else "<s> $A </s>"
    names = ["input_ids", "attention_mask", *["token_type_ids"] * pair]
    tokenizer, response = words(ends, model_input_names=names), " good and bad ; the film was good"
    around = [part.split() for part in ends.split("$A")] if ends else [[], []]
    parts = [*around[0], *PROMPT.split(), *["<sep>"] * pair], response.split(), around[1]
    before, middle, after = (tokenizer.convert_tokens_to_ids(part) for part in parts)
    kinds = [0] * len(before) + [1] * (8 + len(after)) if pair else None
    model = classifier(kind, tokenizer)
    baseline, score, credit = by_definition(model, before, middle, after, kinds)
    assert np.ptp(credit) > 1e-4
    for source in ("gaussian", "kernel"):
        explained = explain(model, tokenizer, PROMPT, response, source, samples_per_token=32, pair=pair)
        assert explained.evaluations == 2**8
        assert [explained.baseline, explained.score] == pytest.approx([baseline, score], abs=1e-5)
        assert explained.credit == pytest.approx(credit, abs=1e-5)
