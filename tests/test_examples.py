"""Every script in examples/ does what its header says."""

import importlib.util
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from checkout import WRITES, make_checkout
from conftest import ROOT

from dense_rlhf.attribution import SOURCES
from dense_rlhf.config.params import AttributionParams, DataParams
from dense_rlhf.data import DATASETS, load_data

SCRIPTS = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}


@pytest.fixture
def example():
    """Loads a script by name; what it registered is forgotten afterwards."""
    kept = [(registry, dict(registry)) for registry in (SOURCES, DATASETS)]

    def load(name):
        spec = importlib.util.spec_from_file_location(name, SCRIPTS[name])
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    for registry, before in kept:
        registry.clear()
        registry.update(before)


@pytest.mark.parametrize("name", SCRIPTS)
def test_form(name):
    text = SCRIPTS[name].read_text()
    assert f"python examples/{name}.py" in text.split('"""')[1] and len(text.splitlines()) < 90
    assert f"examples/{name}.py" in (ROOT / "README.md").read_text()


def test_any_reward_model_is_explained(example, reward_model, tokenizer, tmp_path, capsys):
    reward_model.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    explained = example("explain_a_reward_model").main(str(tmp_path), "the film", " was good and the cast was bad")
    assert explained.complete and abs(explained.gap) < 1e-4
    output = capsys.readouterr().out
    assert output.count(" = baseline ") == 2 and "gaussian on " in output and "leave_one_out on " in output


def test_grpo_trains_on_an_advantage_for_each_token(example, few_reviews):
    script = example("token_rewards_in_grpo")
    trainer = script.main(str(few_reviews), reward_steps=20, updates=1)
    (batch,) = trainer._buffered_inputs
    mask = batch["completion_mask"].bool()
    assert batch["advantages"].shape == mask.shape and not batch["advantages"][~mask].any()
    assert batch["advantages"][mask].std() > 0
    spread = [row[keep].unique().numel() for row, keep in zip(batch["advantages"], mask) if keep.sum() > 2]
    assert min(spread) > 1  # also within a response
    rewards = trainer.dense(batch)
    ids = [
        torch.cat([q[m.bool()], r[k]]).tolist()
        for q, m, r, k in zip(batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], mask)
    ]
    eos = trainer.processing_class.eos_token_id
    ended = [row if row[-1] == eos else [*row, eos] for row in ids]
    scores = trainer.dense.rewards.args[0].reward_model.read_whole(ended)
    assert torch.allclose(rewards.sum(-1), scores, atol=1e-4)


def test_a_dataset_is_brought(example, capsys):
    script = example("bring_a_dataset")
    made = load_data(DataParams(name="replies"))
    texts = [row.text for part in (made.reward, made.gold, made.test) for row in part]
    assert len(texts) == len(set(texts)) and not set(made.train_prompts) & set(made.validation_prompts)
    assert {row.label for row in made.reward} == {0, 1} and made.counts["read"] == 1500
    script.main(reward_steps=40)
    assert "the reward model agrees with" in capsys.readouterr().out


def test_a_source_is_written(example, few_reviews, reward_model, rollout):
    script = example("write_a_source")
    attribution = script.surprisal(reward_model, rollout, AttributionParams())
    assert (
        torch.allclose(attribution.credit.sum(-1), rollout.scores, atol=1e-4)
        and not attribution.credit[~rollout.mask].any()
    )
    paid = (attribution.credit / rollout.scores[:, None])[rollout.mask]
    assert torch.equal(
        paid.argmax(),
        (-rollout.ref_logprobs * rollout.mask / (-rollout.ref_logprobs * rollout.mask).sum(-1, keepdim=True))[
            rollout.mask
        ].argmax(),
    )
    assert set(script.main(str(few_reviews), reward_steps=20, responses=16)) == {"surprisal", "shap", "random"}


def test_a_server_without_its_packages_says_which(example, monkeypatch):
    script = example("serve_a_judge")
    monkeypatch.setattr(script, "find_spec", lambda name: None if name == "uvicorn" else True)
    with pytest.raises(SystemExit, match=r"^error: uvicorn: not installed; pip install 'dense-rlhf\[serve\]'$"):
        script.main(8000)


def test_the_served_model_is_called_by_its_name_and_not_by_a_path(example, tmp_path, monkeypatch):
    script = example("serve_a_judge")
    monkeypatch.setenv("DENSE_RLHF_CACHE", str(tmp_path))
    for target in ("one", "one", "two"):
        monkeypatch.setattr("dense_rlhf.models.language_models.smollm2_folder", lambda target=target: tmp_path / target)
        link = script.served_folder()
        assert link.name == script.MODEL and link.readlink() == tmp_path / target


@pytest.fixture
def cluster(tmp_path):
    """Calls the script in a checkout whose one notebook takes no time."""
    study = make_checkout(
        tmp_path,
        {
            "notebooks": ["04_ppo"],
            "workers": 1,
            "threads": 1,
            "ppo": {"lr": 0.5},
            "arms": {"a": {"sources": ["terminal"]}},
            "sizes": {"smoke": {"seeds": [3]}},
        },
        {"04_ppo": ("import json, pathlib", WRITES)},
    )
    (tmp_path / "params" / "ablations").mkdir()
    study.rename(tmp_path / "params" / "ablations" / "kl.yaml")

    def call(*options):
        path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
        given = {"env": os.environ | {"PYTHONPATH": path}, "cwd": tmp_path, "capture_output": True, "text": True}
        done = subprocess.run([sys.executable, str(SCRIPTS["run_on_a_cluster"]), *options], **given)
        ended = [path.parent.name for path in tmp_path.glob("runs/*/*/run.json")]
        return done.stdout + done.stderr, done.returncode, ended

    return call


def test_a_grid_is_planned_for_any_cluster(cluster):
    for where in ("ray", "slurm"):
        output, code, ended = cluster(where, "--dry-run")
        assert code == 0 and not ended and "run       04_ppo-a-seed3" in output, output


@pytest.mark.parametrize("where, extra", [("local", "torch"), ("ray", "ray"), ("slurm", "submitit")])
def test_a_grid_runs_where_it_is_told(cluster, where, extra):
    if not find_spec(extra):
        pytest.skip(f"the extra is not installed: pip install 'dense-rlhf[{where}]'")
    output, code, ended = cluster(where)
    assert code == 0 and ended == ["04_ppo-a-seed3"] and "index.html" in output, output
