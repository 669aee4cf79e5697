"""One way to read a dialogue: what people's tokenizers, templates and folders bring along."""

import copy
import json

import numpy as np
import pytest
import torch
import transformers
from conftest import SENTENCES, TINY, jitter
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from dense_rlhf.attribution.explain import explain
from dense_rlhf.config.params import PolicyParams, PPOParams, RewardParams
from dense_rlhf.data import Dataset
from dense_rlhf.models.dialogue import Reader, messages_of, prompt_ids, turn_ends, without_refused
from dense_rlhf.models.language_models import load_policy
from dense_rlhf.models.policy import PolicyWithValue
from dense_rlhf.models.reward_model import longest_text
from dense_rlhf.models.text_spans import tokenise
from dense_rlhf.models.train_reward_model import load_reward_model
from dense_rlhf.ppo.sampling import encode_prompts, sample_responses
from dense_rlhf.types import InputError, Message, PreferencePair

SPECIAL = ["<|endoftext|>", "<pad>", "<s>", "</s>", "<user>", "<assistant>", "<end_of_turn>"]
CHAT = (
    "<s>{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<end_of_turn>' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}" + CHAT[len("<s>{% for m in messages %}") :]
)


def byte_level(trim=False, bos=False, **options):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    made.post_processor = processors.ByteLevel(trim_offsets=trim)
    if bos:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
        )
    names = dict(eos_token="<|endoftext|>", pad_token="<pad>", bos_token="<s>")
    extra = ["<user>", "<assistant>", "<end_of_turn>"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, additional_special_tokens=extra, **names | options
    )


def classifier(tokenizer, kind="Llama", **options):
    sizes = TINY if kind != "GPT2" else dict(n_embd=16, n_layer=2, n_head=2)
    ids = dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    config = getattr(transformers, f"{kind}Config")(**sizes | ids | dict(num_labels=1) | options)
    torch.manual_seed(0)
    return jitter(getattr(transformers, f"{kind}ForSequenceClassification")(config), seed=1)


def own(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, 0].item()


# ---------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("kind", ["GPTNeoX", "Llama"])
@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize(
    "response", [" good film ", " good film   ", "   ", " good  film\n", "\n", "\u3000good \u00a0"]
)
def test_white_space_at_the_end_of_a_response_is_a_token_of_it(kind, trim, response):
    tokenizer = byte_level(trim)
    model, prompt = classifier(tokenizer, kind), "the answer is"
    explained = explain(model, tokenizer, prompt, response)
    ids = tokenizer(prompt + response)["input_ids"]
    assert explained.score == pytest.approx(own(model, ids), abs=1e-5)
    assert explained.baseline == pytest.approx(own(model, tokenizer(prompt)["input_ids"]), abs=1e-5)
    assert len(explained.tokens) == len(ids) - len(tokenizer(prompt)["input_ids"])
    assert "".join(explained.tokens) == response


def test_a_prompt_that_was_rendered_before_gets_no_second_bos():
    tokenizer = byte_level(bos=True, chat_template=CHAT)
    model, turns = classifier(tokenizer), [{"role": "user", "content": "what is the answer"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text + " good film", add_special_tokens=False)["input_ids"]
    with pytest.warns(UserWarning, match="special tokens at the start would stand twice"):
        assert explain(model, tokenizer, text, " good film").score == pytest.approx(own(model, ids), abs=1e-5)
    for prompt in (text, turns):
        (row,) = prompt_ids([prompt], tokenizer)
        assert row == tokenizer(text, add_special_tokens=False)["input_ids"] and row.count(tokenizer.bos_token_id) == 1
    assert prompt_ids(["the film"], tokenizer)[0] == tokenizer("the film")["input_ids"]  # BOS once
    one_of_its_own = tokenise(tokenizer, "", "<s> good", special=True)
    assert len(one_of_its_own.before) == 1  # the response's own is left to it


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}],
        [{"role": "user", "content": "hi"}, {"role": "user", "content": "are you there"}],
    ],
)
def test_a_dialogue_that_the_template_refuses_is_one_line(turns):
    tokenizer = byte_level(chat_template=STRICT)
    for read in (
        lambda: explain(classifier(tokenizer), tokenizer, turns, "x"),
        lambda: encode_prompts([turns], tokenizer),
    ):
        with pytest.raises(
            InputError, match="chat template refuses a dialogue of (system|user), user,? .*(not supp|altern)"
        ):
            read()


def test_refused_dialogues_are_counted_before_anything_starts():
    fine, two = (Message("user", "hi"),), (Message("user", "hi"), Message("user", "there"))
    pairs = [PreferencePair(prompt, "a", "b") for prompt in (fine, two)]
    data = Dataset("made", "r", pairs, pairs, [fine, two, "text"], [fine], pairs, counts={"read": 7})
    kept = without_refused(data, {"the policy": byte_level(chat_template=STRICT)})
    assert [len(rows) for rows in (kept.reward, kept.gold, kept.test, kept.train_prompts)] == [1, 1, 1, 2]
    ((reason, number),) = [item for item in kept.counts.items() if item[0] != "read"]
    assert number == 4 and reason.startswith("left out: the policy: the chat template refuses a dialogue of user, user")
    with pytest.raises(InputError, match="nothing is left for train_prompts"):
        without_refused(
            Dataset("made", "r", pairs, pairs, [two], [fine], pairs), {"the policy": byte_level(chat_template=STRICT)}
        )


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{% for i in range(10**9) %}{% endfor %}", "{{ messages[9].x.y }}"]
)
def test_whatever_a_template_raises_is_one_line(template):
    tokenizer = byte_level(chat_template=template)
    with pytest.raises(InputError, match="^the chat template (refuses|does not keep)"):
        explain(classifier(tokenizer), tokenizer, [{"role": "user", "content": "hi"}], "x")


def test_prompts_come_as_text_or_turns_of_any_kind_and_nothing_else():
    turns = [{"role": "user", "content": "hi"}]
    wanted = (Message("user", "hi"),)
    assert messages_of(turns) == messages_of(np.array(turns)) == messages_of(wanted) == wanted
    for wrong in (None, 5, b"hi", [], {"role": "user", "content": "hi"}, [None], [{"role": "tool", "content": "x"}]):
        with pytest.raises(InputError, match="^prompt "):
            messages_of(wrong)
    for content in (None, [{"type": "text", "text": "hi"}]):
        with pytest.raises(InputError, match="content as text"):
            messages_of([{"role": "assistant", "content": content, "tool_calls": []}])
    tokenizer = byte_level()
    with pytest.raises(InputError, match="one text"):
        encode_prompts("the film", tokenizer)
    with pytest.raises(InputError, match="prompts is empty"):
        encode_prompts([], tokenizer)
    with pytest.raises(InputError, match="lone surrogate"):
        encode_prompts(["a \ud83d b"], tokenizer)


def test_a_reply_is_written_after_a_space_only_where_it_has_none():
    tokenizer, turns = byte_level(), [{"role": "user", "content": "hi"}]
    model = classifier(tokenizer)
    ids = tokenizer("\n\nHuman: hi\n\nAssistant: good")["input_ids"]
    scores = [explain(model, tokenizer, turns, response).score for response in ("good", " good")]
    assert scores == pytest.approx([own(model, ids)] * 2, abs=1e-5)


@pytest.mark.parametrize("trim, wanted", [("", " good film "), (" | trim", "good film"), (".rstrip()", " good film")])
@pytest.mark.parametrize("around", [("", ""), (" [/INST] ", " </s>"), ("\n", "\n")])
def test_white_space_of_a_template_is_not_taken_for_the_responses(around, trim, wanted):
    """A reply is read as the template writes it, whatever stands beside it."""
    before, after = (json.dumps(text) for text in around)
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}{{ " + before + " }}"
        "{% else %}{{ m.content" + trim + " }}{{ " + after + " }}{% endif %}{% endfor %}"
    )
    tokenizer = byte_level(chat_template=template)
    reading, spans = Reader(tokenizer, ends=False).read((Message("user", "hi"),), " good film ")
    text = "[INST] hi" + around[0] + wanted + around[1]
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " good film "}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == text
    assert tokenizer.decode([*reading.prompt, *reading.response, *reading.suffix]) == text
    assert "".join(" good film "[a:b] for a, b in spans) == wanted


def says(reply):
    """A chat template that writes a reply, `r`, in its own way."""
    return CHAT.replace("{{ '<'", "{% set r = m['content'] %}{{ '<'").replace(
        "m['content'] +", f"({reply} if m['role'] == 'assistant' else r) +"
    )


THINKING = {
    "drops": "r.split('</think>')[-1]",
    "rewrites": "'<think>\n' + r.split('</think>')[0].split('<think>')[-1] * ('</think>' in r) + '\n</think>\n\n'"
    " + r.split('</think>')[-1]",
}


@pytest.mark.parametrize("template", THINKING)
@pytest.mark.parametrize("reply", ["good film", "<think>hm</think>good film", "<think>good film</think>good film", ""])
def test_a_reply_is_scored_as_the_template_writes_it(template, reply, saved):
    """In a study, whose policy may think aloud."""
    tokenizer, policy = byte_level(chat_template=says(THINKING[template])), byte_level()
    model, prompt = classifier(tokenizer), (Message("user", "hi"),)
    loaded = load_reward_model([], policy, RewardParams(name=saved(model, tokenizer)), "x")
    reading = loaded.reading(*(policy(text)["input_ids"] for text in ("hi", reply)), prompt)
    text = tokenizer.apply_chat_template([*map(vars, prompt), {"role": "assistant", "content": reply}], tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert loaded.score([reading]).item() == pytest.approx(own(model, ids), abs=1e-5)
    assert tokenizer.decode(reading.response) == reply.split("</think>")[-1]


def test_a_template_that_keeps_no_end_of_a_reply_is_refused():
    reader = Reader(byte_level(chat_template=says("r | replace('film', 'movie')")))
    assert reader.read((Message("user", "hi"),), "good plot")[0].response
    with pytest.raises(InputError, match="something else than the response 'good film'"):
        reader.read((Message("user", "hi"),), "good film")


# ---------------------------------------------------------------------------------------------------- reward models


@pytest.fixture
def saved(tmp_path):
    """Writes a model and its tokenizer into a folder; returns the folder's name."""

    def save(model, tokenizer):
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return str(tmp_path)

    return save


def without(folder, name, as_name=None):
    """Take one weight out of a folder's model, or give it another name."""
    weights = load_file(f"{folder}/model.safetensors")
    weight = weights.pop(name)
    if as_name:
        weights[as_name] = weight
    save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("as_name", [None, "v_head.weight"])
def test_a_head_that_was_not_saved_is_named(saved, as_name):
    tokenizer = byte_level()
    folder = saved(classifier(tokenizer), tokenizer)
    without(folder, "score.weight", as_name)
    named = "lacks score.weight" + (f" and has no place for {as_name}" if as_name else "")
    with pytest.raises(InputError, match=f"reward.name.*{named}"):
        load_reward_model([], tokenizer, RewardParams(name=folder), "x")


def test_a_language_model_is_no_reward_model_and_the_other_way_round(saved):
    tokenizer = byte_level()
    sizes = dict(vocab_size=len(tokenizer), num_labels=1, pad_token_id=1, tie_word_embeddings=False)
    folder = saved(transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, **sizes)), tokenizer)
    with pytest.raises(InputError, match="lacks score.weight"):
        load_reward_model([], tokenizer, RewardParams(name=folder), "x")
    folder = saved(classifier(tokenizer, tie_word_embeddings=False), tokenizer)
    with pytest.raises(InputError, match="policy.name.*lacks lm_head.weight"):
        load_policy(PolicyParams(name=folder))


@pytest.mark.parametrize("damage", ["half", "empty", "text"])
def test_a_damaged_file_of_weights_is_one_line(saved, damage, tmp_path):
    tokenizer = byte_level()
    folder = saved(classifier(tokenizer), tokenizer)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes({"half": whole[: len(whole) // 2], "empty": b"", "text": b"no weights at all"}[damage])
    for load in (
        lambda: load_reward_model([], tokenizer, RewardParams(name=folder), "x"),
        lambda: load_policy(PolicyParams(name=folder)),
    ):
        with pytest.raises(InputError, match="(reward|policy).name: cannot load"):
            load()


def test_an_adapter_is_refused_by_name(saved, tmp_path):
    tokenizer = byte_level()
    folder = saved(classifier(tokenizer), tokenizer)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(InputError, match="is an adapter; merge it"):
        load_reward_model([], tokenizer, RewardParams(name=folder), "x")


def test_one_of_several_outputs_is_chosen_by_number(saved):
    tokenizer = byte_level()
    model = classifier(tokenizer, num_labels=2)
    folder, ids = saved(model, tokenizer), tokenizer("the film was good")["input_ids"]
    with pytest.raises(InputError, match="has 2 outputs, wanted one; say which is the score, reward.output=0 to 1"):
        load_reward_model([], tokenizer, RewardParams(name=folder), "x")
    with pytest.raises(InputError, match="output is 2, but"):
        explain(model, tokenizer, "the film", " was good", output=2)
    with torch.no_grad():
        both = model(input_ids=torch.tensor([[*ids, tokenizer.eos_token_id]])).logits[0].tolist()
    for output in (0, 1):
        loaded = load_reward_model([], tokenizer, RewardParams(name=folder, output=output), "x")
        reading = loaded.reading(*(tokenizer(part)["input_ids"] for part in ("the film", " was good")))
        assert loaded.score([reading]).item() == pytest.approx(both[output], abs=1e-5)
        explained = explain(model, tokenizer, "the film", " was good", output=output, end="eos")
        assert explained.score == pytest.approx(both[output], abs=1e-5)


def test_a_model_that_can_tell_segments_says_that_they_are_read_as_one():
    tokenizer = byte_level()
    model = classifier(tokenizer, "Bert", type_vocab_size=2)
    with pytest.warns(UserWarning, match="two segments apart; .* pair=True"):
        explain(model, tokenizer, "the film", " was good")


def test_relative_positions_do_not_end():
    tokenizer = byte_level()
    options = dict(relative_attention=True, pos_att_type=["p2c", "c2p"], max_position_embeddings=16)
    free, biased = (classifier(tokenizer, "DebertaV2", position_biased_input=b, **options) for b in (False, True))
    prompt, response = "the film was good and the cast was great", " but the plot was bad and awful"
    ids = tokenizer(prompt + response)["input_ids"]
    assert len(ids) > 16 and longest_text(free) == float("inf")
    assert explain(free, tokenizer, prompt, response).score == pytest.approx(own(free, ids), abs=1e-5)
    with pytest.raises(InputError, match="reads at most 16"):
        explain(biased, tokenizer, prompt, response)


def test_a_tokenizer_of_more_tokens_than_the_model_has_is_named():
    tokenizer = byte_level()
    with pytest.raises(InputError, match="has 200 embeddings, but the text has token"):
        explain(classifier(tokenizer, vocab_size=200), tokenizer, "the film", " was great")


def test_eos_written_in_a_response_is_read_by_models_that_pool_at_it():
    tokenizer = byte_level(eos_token="</s>")
    ends = [("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=ends)
    sizes = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, d_model=16)
    config = transformers.BartConfig(
        **sizes, vocab_size=len(tokenizer), num_labels=1, pad_token_id=1, eos_token_id=tokenizer.eos_token_id
    )
    model = jitter(transformers.BartForSequenceClassification(config), seed=1)
    for response in (" good film", " good</s> film", "</s></s>"):
        ids = tokenizer("the answer is" + response)["input_ids"]
        explained = explain(model, tokenizer, "the answer is", response)
        assert explained.score == pytest.approx(own(model, ids), abs=1e-5) and abs(explained.gap) < 1e-4


CHANGES = {
    "model.safetensors": lambda bytes_: bytes_[:-1] + b"!",
    "config.json": lambda text: text.replace(b'"max_position_embeddings": ', b'"max_position_embeddings": 1'),
    "generation_config.json": lambda text: text.replace(b"{", b'{"eos_token_id": [0, 6],', 1),
    "tokenizer.json": lambda text: text + b"\n",
    "chat_template.jinja": lambda text: text + b"!",
}


def test_a_folder_is_known_by_every_file_that_makes_its_model(saved, tmp_path):
    """Trainings are kept by it."""
    tokenizer = byte_level(chat_template=CHAT)
    sizes = dict(vocab_size=len(tokenizer), pad_token_id=1, tie_word_embeddings=False)
    folder = saved(transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, **sizes)), tokenizer)
    revisions = [load_policy(PolicyParams(name=folder)).revision]
    (tmp_path / ".cache").write_text("no part of it")
    assert load_policy(PolicyParams(name=folder)).revision == revisions[0]
    for name, change in CHANGES.items():
        (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
        revisions.append(load_policy(PolicyParams(name=folder)).revision)
    assert len(set(revisions)) == len(CHANGES) + 1


# ---------------------------------------------------------------------------------------------------- policies


@pytest.mark.parametrize("sampler", ["cache", "captured", "generate"])
def test_every_token_that_ends_a_turn_ends_it(sampler, reference, tokenizer):
    """Those of the generation config; and what the chat template writes after a reply, where that is a token."""
    lm, end = transformers.LlamaForCausalLM(copy.deepcopy(reference.lm.config)), 7
    with torch.no_grad():
        for p in lm.parameters():
            p.zero_()
        lm.lm_head = torch.nn.Linear(16, len(tokenizer))
        lm.lm_head.weight.zero_()
        lm.lm_head.bias.fill_(-50.0)[end] = 50.0
    params, policy = PPOParams(max_new_tokens=8, sampler=sampler), PolicyWithValue(lm)
    generator = torch.Generator().manual_seed(0)
    assert sample_responses(policy, ["the film"], tokenizer, params, generator).mask.sum() == 8  # it is no end
    lm.generation_config.eos_token_id = [tokenizer.eos_token_id, end]
    drawn = sample_responses(policy, ["the film"], tokenizer, params, generator)
    assert drawn.mask.sum() == 1 and drawn.ended.all() and not drawn.players.any()
    for template in (CHAT, CHAT.replace("'<end_of_turn>'", "'\\n<end_of_turn>\\n'")):
        chatty = byte_level(chat_template=template)
        assert turn_ends(chatty) == {chatty.eos_token_id, chatty.convert_tokens_to_ids("<end_of_turn>")}


@pytest.mark.parametrize("sampler", ["cache", "captured", "generate"])
def test_ids_that_no_token_has_are_never_sampled(sampler, saved):
    tokenizer = byte_level()
    config = transformers.LlamaConfig(
        **TINY, vocab_size=len(tokenizer) + 64, pad_token_id=1, eos_token_id=0, tie_word_embeddings=False
    )
    lm = transformers.LlamaForCausalLM(config)
    params = PPOParams(max_new_tokens=40, sampler=sampler)
    loaded = load_policy(PolicyParams(name=saved(lm, tokenizer))).model
    assert loaded.get_output_embeddings().weight.shape[0] == len(tokenizer)  # so that log-probabilities agree
    for each in (lm, loaded):
        drawn = sample_responses(
            PolicyWithValue(each.eval()), ["the film"] * 8, tokenizer, params, torch.Generator().manual_seed(0)
        )
        assert drawn.responses.max() < len(tokenizer) and drawn.mask.sum() > 200


@pytest.mark.parametrize("token", ["pad_token", "eos_token", "unk_token"])
def test_a_policy_with_fewer_embeddings_than_tokens_is_refused(token, saved):
    tokenizer = byte_level()
    lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, vocab_size=len(tokenizer)))
    tokenizer.add_special_tokens({token: "[NEW]"})
    with pytest.raises(InputError, match="policy.name: .* has 300 embeddings for 301 tokens"):
        load_policy(PolicyParams(name=saved(lm, tokenizer)))


@pytest.mark.parametrize("sampler", ["cache", "captured", "generate"])
@pytest.mark.parametrize("fault", ["nan weight", "inf logit", "tiny temperature"])
def test_probabilities_that_are_not_finite_are_one_line(sampler, fault, reference, tokenizer):
    lm = transformers.LlamaForCausalLM(copy.deepcopy(reference.lm.config)).eval()
    lm.lm_head = torch.nn.Linear(16, len(tokenizer))
    if fault == "nan weight":
        torch.nn.init.constant_(lm.model.norm.weight, torch.nan)
    if fault == "inf logit":
        with torch.no_grad():
            lm.lm_head.bias[9] = torch.inf
    params = PPOParams(max_new_tokens=4, sampler=sampler, temperature=1e-300 if fault == "tiny temperature" else 1.0)
    with pytest.raises(InputError, match="not finite.*ppo.temperature"):
        sample_responses(PolicyWithValue(lm), ["the film"], tokenizer, params, torch.Generator())


def test_a_prompt_beyond_the_policys_positions_is_one_line(reference, tokenizer):
    lm = transformers.LlamaForCausalLM(copy.deepcopy(reference.lm.config)).eval()
    lm.config.max_position_embeddings = 12
    with pytest.raises(
        InputError, match="a prompt of .* tokens and ppo.max_new_tokens = 8 are more than the policy's 12"
    ):
        sample_responses(
            PolicyWithValue(lm), ["the film was good"], tokenizer, PPOParams(max_new_tokens=8), torch.Generator()
        )


def test_padding_that_ends_a_reply_is_refused(reference, tokenizer):
    lm = transformers.LlamaForCausalLM(copy.deepcopy(reference.lm.config)).eval()
    lm.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    with pytest.raises(InputError, match="padding token '<pad>' also ends a reply"):
        sample_responses(PolicyWithValue(lm), ["the film"], tokenizer, PPOParams(), torch.Generator())
