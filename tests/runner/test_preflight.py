"""The dry run: what it finds, that it goes on, that it reads no weights."""

import json
import shutil
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
import safetensors
import transformers
import yaml
from transformers import AutoModelForSequenceClassification, LlamaConfig, PreTrainedTokenizerFast

from dense_rlhf.__main__ import main
from dense_rlhf.config.params import PolicyParams, RewardParams
from dense_rlhf.models import language_models, reward_model, tiny_recipe, train_reward_model
from dense_rlhf.runner import preflight

TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}<a>{% endif %}"
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": 320,
}
COMMITS = {"org/policy": "a" * 40, "org/reward": "b" * 40, "Anthropic/hh-rlhf": "c" * 40}


@pytest.fixture
def folders(tmp_path, tokenizer):
    """A policy and a reward model, 400 dialogues, and a study of them; `write` changes configs."""

    def write(name, architecture, own=None, **changes):
        folder = tmp_path / name
        made = own or PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", pad_token="<pad>", chat_template=TEMPLATE
        )
        kind = getattr(transformers, architecture)
        kind(kind.config_class(**SHAPE | changes)).save_pretrained(folder)
        made.save_pretrained(folder)
        return folder

    write("policy", "LlamaForCausalLM")
    write("reward", "LlamaForSequenceClassification", num_labels=1)
    with open(tmp_path / "pairs.jsonl", "w") as file:
        for row in pairs():
            file.write(json.dumps(row) + "\n")
    study = {
        "arms": {"shap": {"sources": ["shap"]}},
        "data": {"name": "hh_rlhf", "path": str(tmp_path / "pairs.jsonl")},
        "policy": {"name": str(tmp_path / "policy")},
        "reward": {"name": str(tmp_path / "reward")},
        "ppo": {"updates": 1, "rollouts": 8, "minibatch": 8, "max_new_tokens": 6},
        "notebooks": ["04_ppo"],
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    return SimpleNamespace(root=tmp_path, write=write, study=tmp_path / "study.yaml")


def pairs():
    start = "\n\nHuman: what of film {}?\n\nAssistant: "
    return [{"chosen": start.format(i) + "good", "rejected": start.format(i) + "bad"} for i in range(400)]


@pytest.fixture
def dry_run(folders, capsys):
    """Run the check; its exit code, and its lines by kind."""

    def run(*settings):
        code = main(["check", str(folders.study), *[part for one in settings for part in ("--set", one)]])
        lines = capsys.readouterr().out.splitlines()
        return code, {
            kind: [line for line in lines if line.startswith(kind)] for kind in ("ok", "note", "FAIL", "skip")
        } | {"all": lines}

    return run


def test_a_sound_study_passes_and_has_a_budget(dry_run):
    code, lines = dry_run()
    assert code == 0 and not lines["FAIL"] and not lines["skip"], lines
    text = "\n".join(lines["all"])
    assert "reads prompt and response as text" in text and "through its chat template: least" in text
    assert "400 rows read, 0 left out" in text and "memory, at the longest prompt" in text and "explain shap" in text
    assert text.count("1 safetensors") == 2 and "128 positions for" in text


def test_a_processor_without_bfloat16_is_said_where_a_model_computes_in_it(dry_run, monkeypatch):
    monkeypatch.setattr(preflight, "bfloat16_slowdown", lambda: 8.04)
    assert not dry_run()[1]["note"]
    (note,) = dry_run("policy.dtype=bfloat16")[1]["note"]
    assert "policy.dtype" in note and "takes 8 times as long in bfloat16 as in float32" in note
    monkeypatch.setattr(preflight, "bfloat16_slowdown", lambda: 0.5)
    assert not dry_run("policy.dtype=bfloat16")[1]["note"]
    assert 0.01 < language_models.bfloat16_slowdown() < 1000


def test_no_weights_are_read(dry_run, monkeypatch):
    class Header:
        def __init__(self, path, framework):
            self.keys = safetensors.safe_open(path, framework).keys

    monkeypatch.setattr(language_models, "safe_open", Header)
    monkeypatch.setattr(transformers.modeling_utils, "load_state_dict", lambda *_, **__: pytest.fail("read weights"))
    assert dry_run()[0] == 0


@pytest.mark.parametrize(
    "settings, field, message",
    [
        (["policy.trainable_layers=9"], "policy ", "trainable_layers is 9, but the model has 2 layers"),
        (["ppo.rollouts=800", "ppo.minibatch=8"], "ppo.rollouts", "is 800, but there are"),
        (["ppo.max_new_tokens=200"], "policy.name", "has 128 positions, but the longest prompt and ppo.max_new"),
        (["policy.name=nowhere/policy"], "policy.name", "'nowhere/policy' at main is no folder here"),
        (["reward.name=nowhere/reward"], "reward.name", "'nowhere/reward' at main is no folder here"),
        (["data.path=null"], "data.name", "cannot load Anthropic/hh-rlhf at its default branch from the hub"),
        (["data.max_prompt_chars=3"], "data.name", "leave nothing for"),
    ],
)
def test_what_a_parameter_asks_in_vain_is_one_line_and_the_rest_goes_on(dry_run, settings, field, message):
    code, lines = dry_run(*settings)
    assert code == 2 and any(line.startswith(f"FAIL  {field}") and message in line for line in lines["FAIL"]), lines
    assert len(lines["ok"]) >= 4 and all(
        line[6:].split()[0].startswith(("policy", "reward", "data", "ppo")) for line in lines["FAIL"]
    )


def test_adapters_are_found_and_counted(dry_run):
    code, lines = dry_run("policy.lora_rank=4")
    numbers = 2 * 4 * (4 * (32 + 32) + 3 * (32 + 64)) + 33
    assert code == 0 and any(f"{numbers:,} numbers learn: LoRA of rank 4 on 14 linear maps" in x for x in lines["ok"])


def break_labels(folders):
    folders.write("reward", "LlamaForSequenceClassification", num_labels=2)


def no_head(folders):
    folders.write("reward", "LlamaForCausalLM", num_labels=1, tie_word_embeddings=False)


def an_adapter(folders):
    (folders.root / "reward" / "adapter_config.json").write_text("{}")


def drop_weights(folders):
    (folders.root / "policy" / "model.safetensors").rename(folders.root / "policy" / "pytorch_model.bin")


def break_config(folders):
    (folders.root / "reward" / "config.json").write_text('{"model_type": "llama", ')


def drop_tokenizer(folders):
    for path in (folders.root / "policy").glob("tokenizer*"):
        path.unlink()


def only_eos(folders):
    backend = tiny_recipe.train_tokenizer(["the film was good"], 280).backend_tokenizer
    own = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    folders.write("policy", "LlamaForCausalLM", own=own)


def few_embeddings(folders):
    folders.write("policy", "LlamaForCausalLM", vocab_size=100)


@pytest.mark.parametrize(
    "harm, field, message",
    [
        (break_labels, "reward.name", "has 2 outputs, wanted one"),
        (no_head, "reward.name", "lacks score.weight"),
        (an_adapter, "reward.name", "is an adapter"),
        (drop_weights, "policy.name", "has no .safetensors among"),
        (break_config, "reward.name", "its config.json:"),
        (drop_tokenizer, "policy.name", "its tokenizer:"),
        (only_eos, "policy.name", "no special token other than EOS to pad with"),
        (few_embeddings, "policy.name", "the model 100"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_wrong_files_are_one_line_and_the_rest_goes_on(dry_run, folders, harm, field, message):
    harm(folders)
    code, lines = dry_run()
    assert code == 2 and any(line.startswith(f"FAIL  {field}") and message in line for line in lines["FAIL"]), lines
    assert any("rows read" in line for line in lines["ok"])


@pytest.mark.parametrize("harm", [break_config, drop_weights, drop_tokenizer, few_embeddings])
def test_run_refuses_what_check_refuses_before_anything_starts(folders, harm, monkeypatch, capsys):
    monkeypatch.setattr("dense_rlhf.runner.grid.run_grid", lambda *_: pytest.fail("it started"))
    harm(folders)
    assert main(["run", str(folders.study)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(("error: policy.name: ", "error: reward.name: ")) and error.count("\n") == 1


def test_another_vocabulary_is_read_as_text_and_no_critic(dry_run, folders):
    other = tiny_recipe.train_tokenizer(["so many other words here"] * 3, 290)
    folders.write("reward", "LlamaForSequenceClassification", own=other, num_labels=1)
    assert dry_run()[0] == 0
    code, lines = dry_run("policy.critic=separate")
    assert any("in its own tokens" in line for line in lines["ok"])
    assert code == 2 and any("'separate' starts as the reward model" in line for line in lines["FAIL"])


def test_a_source_that_the_reward_model_cannot_give_is_named(dry_run, folders):
    asked = "arms.look.sources=[attention]"
    assert dry_run(asked)[0] == 0
    folders.write("reward", "GemmaForSequenceClassification", num_labels=1)
    code, lines = dry_run(asked)
    assert code == 2 and any("attention cannot be had of a gemma" in line for line in lines["FAIL"]), lines


def test_a_template_that_writes_dates_is_noted(dry_run, folders, tokenizer):
    template = "{% if strftime_now %}{% endif %}" + TEMPLATE
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", pad_token="<pad>", chat_template=template
    )
    folders.write("policy", "LlamaForCausalLM", own=made)
    code, lines = dry_run()
    assert code == 0 and any("today's date" in line for line in lines["note"])


def test_a_gpu_that_is_too_small_fails(dry_run, monkeypatch):
    monkeypatch.setattr("dense_rlhf.runner.preflight._gpu", lambda: ("small GPU", 1e-4))
    code, lines = dry_run()
    assert code == 2 and any("small GPU has 0.0 GiB; lower ppo.micro_batch" in line for line in lines["FAIL"])
    monkeypatch.setattr("dense_rlhf.runner.preflight._gpu", lambda: ("large GPU", 1e4))
    assert dry_run()[0] == 0


@pytest.mark.parametrize("settings", [[], ["reward.name=scratch"], ["reward.name=policy", "reward.layers=1"]])
def test_labelled_texts_are_read_as_continuations(dry_run, few_reviews, settings):
    code, lines = dry_run(f"data={{name: reviews, path: {few_reviews}}}", *settings)
    assert code == 0 and not lines["FAIL"], lines


@pytest.mark.parametrize("name", ["scratch", "policy"])
def test_a_reward_model_to_be_trained_here(dry_run, name):
    code, lines = dry_run(f"reward.name={name}", "reward.layers=1")
    assert code == 0, lines
    assert any(f"{name}:" in line for line in lines["ok"])


def test_a_reward_model_of_more_layers_than_the_policy_has(dry_run):
    code, lines = dry_run("reward.name=policy", "reward.layers=99")
    assert code == 2 and any("reward.layers is 99, wanted at most the policy's" in line for line in lines["FAIL"]), (
        lines
    )


# ---------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(folders, monkeypatch, tmp_path):
    """A hub that answers for two models and one dataset: commits and file lists; files lie in the cache already."""

    class Api:
        def model_info(self, name, revision, files_metadata):
            assert revision == "main" and files_metadata
            files = [SimpleNamespace(rfilename="model.safetensors", size=3_000_000_000)]
            return SimpleNamespace(sha=COMMITS[name], siblings=files)

        def dataset_info(self, name, revision=None):
            return SimpleNamespace(sha=COMMITS[name])

    def load_dataset(name, revision, split, streaming=False):
        assert revision == COMMITS[name] and split == "train"
        rows = datasets.IterableDataset.from_generator(lambda: iter(pairs() * 4))
        return rows if streaming else pytest.fail("the whole dataset was asked for")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("policy", "reward"):
        repository, commit = tmp_path / "hub" / f"models--org--{name}", COMMITS[f"org/{name}"]
        shutil.copytree(tmp_path / name, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
    return tmp_path / "hub"


HUB = ["policy.name=org/policy", "reward.name=org/reward", "data.path=null", "policy.revision=main"]


def test_commits_are_resolved_and_files_listed(dry_run, hub):
    code, lines = dry_run(*HUB)
    assert code == 0, lines
    text = "\n".join(lines["all"])
    for name in ("policy", "reward"):
        assert f"org/{name} at main is commit {COMMITS[f'org/{name}']}" in text
    assert f"hh_rlhf at {COMMITS['Anthropic/hh-rlhf']}: 1,000 rows read" in text
    assert text.count("1 safetensors, 3.00 GB") == 2 and "training prompts" not in text


def test_models_of_the_hub_record_the_commit_that_was_read(hub, tokenizer):
    made = hub / "models--org--reward" / "snapshots" / COMMITS["org/reward"]
    config = LlamaConfig.from_pretrained(made)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(made)
    loaded = train_reward_model.load_reward_model([], tokenizer, RewardParams(name="org/reward"), "")
    assert loaded.revision == COMMITS["org/reward"]
    made = hub / "models--org--policy" / "snapshots" / COMMITS["org/policy"]
    language_models.AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(made)).save_pretrained(made)
    assert language_models.load_policy(PolicyParams(name="org/policy")).revision == COMMITS["org/policy"]


@pytest.mark.parametrize(
    "policy, reward, shared",
    [
        ({"a": 0}, {"a": 0}, True),
        ({"a": 0}, {"a": 0, "b": 1}, True),
        ({"a": 0, "b": 1}, {"a": 0}, False),
        ({"a": 0, "b": 1}, {"a": 1, "b": 0}, False),
    ],
)
def test_tokens_are_shared_where_the_policys_are_among_the_reward_models(policy, reward, shared):
    have = lambda vocabulary: SimpleNamespace(get_vocab=lambda: vocabulary)  # noqa: E731
    assert reward_model.shares_tokens(have(policy), have(reward)) is shared
