"""A training survives what happens to it: kills, numbers that are not finite, checkpoints of another training."""

import json
import os
import signal
import time
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from shutil import copytree, rmtree

import kill_points
import pandas as pd
import pytest
import torch
from kill_points import PARAMS, SHAPE
from safetensors.torch import load_file, save_file
from whole_runs import command, make_workspace

from dense_rlhf import ppo
from dense_rlhf.config.params import AttributionParams, PolicyParams
from dense_rlhf.ppo import checkpoint
from dense_rlhf.training.inner_loop import Recipe, Session, is_trained, train_policy
from dense_rlhf.types import InputError, RewardShape

EXPLAIN = AttributionParams()
SPARSE = RewardShape(("terminal",), (1.0,))


@pytest.fixture(scope="module")
def task():
    return kill_points.make_task()


def test_kills_at_random_moments_lose_nothing():
    """A handful; `python tests/training/kill_points.py 100` for more."""
    killed, lost = kill_points.kill_points(3, seed=1)
    assert killed and not lost


KINDS = {"all": {}, "lora": {"lora_rank": 2}, "separate": {"critic": "separate"}, "last": {"trainable_layers": 1}}


@pytest.mark.parametrize("policy", [PolicyParams(**kind) for kind in KINDS.values()], ids=KINDS)
def test_a_training_cut_short_ends_as_an_unbroken_one(task, policy, tmp_path):
    class Cut(Exception):
        pass

    def cut(row):
        if row["update"] == 4:
            raise Cut

    task = replace(task, policy=policy)
    unbroken = train_policy(task, Recipe(SHAPE, PARAMS, EXPLAIN, 0))
    params = replace(PARAMS, checkpoint_every=2)  # how often decides nothing
    with pytest.raises(Cut):
        train_policy(task, Recipe(SHAPE, params, EXPLAIN, 0), Session(watch=cut, folder=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000004"]
    rows = []
    torch.rand(3)  # the global generator is elsewhere by then
    resumed = train_policy(task, Recipe(SHAPE, params, EXPLAIN, 0), Session(watch=rows.append, folder=tmp_path))
    assert [row["update"] for row in rows] == [4, 5, 6, 7]
    pd.testing.assert_frame_equal(resumed.history, unbroken.history, check_exact=True)
    for (name, a), b in zip(unbroken.policy.named_parameters(), resumed.policy.parameters()):
        assert torch.equal(a, b), name


def test_a_finished_training_is_read_and_not_repeated(task, tmp_path, monkeypatch):
    first = train_policy(task, Recipe(SPARSE, PARAMS, EXPLAIN, 0), Session(folder=tmp_path))
    monkeypatch.setattr("dense_rlhf.training.inner_loop._improve", None)
    again = train_policy(task, Recipe(SPARSE, PARAMS, EXPLAIN, 0), Session(folder=tmp_path))
    pd.testing.assert_frame_equal(first.history, again.history, check_exact=True)


def test_a_checkpoint_of_another_training_is_not_resumed(task, tmp_path):
    few = replace(PARAMS, updates=2)
    train_policy(task, Recipe(SPARSE, few, EXPLAIN, 0), Session(folder=tmp_path))
    other_prompts = replace(task, data=replace(task.data, train_prompts=task.data.train_prompts[::-1]))
    other_unit = replace(task, reward_model=replace(task.reward_model, scale=2.0))
    for change in (
        {"seed": 1},
        {"ppo": replace(few, lr=1e-3)},
        {"shape": SHAPE},
        {"task": other_prompts},
        {"task": other_unit},
    ):
        given = {"task": task, "shape": SPARSE, "ppo": few, "attribution": EXPLAIN, "seed": 0} | change
        other, recipe = given.pop("task"), Recipe(**given)
        fresh, again = (train_policy(other, recipe, Session(folder=folder)).history for folder in (None, tmp_path))
        pd.testing.assert_frame_equal(fresh, again, check_exact=True)


ALONE = RewardShape(("shap",), (1.0,), temperature=0.5)
NAMES = [  # of the same training
    RewardShape(("shap", "terminal"), (1.0, 0.0), temperature=(0.5, 9.0)),
    RewardShape(("lime", "shap"), (0.0, 1.0), "softmax", 0.5, ("position",), ((1.0,), (2.0,))),
]


def test_a_training_of_several_names_is_trained_once(task, tmp_path, monkeypatch):
    alone, *others = (train_policy(task, Recipe(shape, PARAMS, EXPLAIN, 0)) for shape in (ALONE, *NAMES))
    for other in others:
        pd.testing.assert_frame_equal(alone.history, other.history, check_exact=True)
    stages = Session(stages=tmp_path / "stages")
    first = train_policy(task, Recipe(ALONE, PARAMS, EXPLAIN, 0), stages)
    after = torch.get_rng_state()
    monkeypatch.setattr("dense_rlhf.training.inner_loop._improve", None)
    for shape in (ALONE, *NAMES):
        assert is_trained(replace(task), Recipe(shape, PARAMS, EXPLAIN, 0), stages.stages)
        read = train_policy(replace(task), Recipe(shape, PARAMS, EXPLAIN, 0), stages)
        assert torch.equal(torch.get_rng_state(), after) and read.warnings == first.warnings
        assert (first.read, read.read) == (0, PARAMS.updates) and first.about | {"read": read.read} == read.about
        for name in ("history", "seconds"):
            pd.testing.assert_frame_equal(getattr(first, name), getattr(read, name), check_exact=True)
        pd.testing.assert_frame_equal(alone.history, read.history, check_exact=True)
        assert all(map(torch.equal, alone.policy.state_dict().values(), read.policy.state_dict().values()))
    for change in ({"seed": 1}, {"shape": SPARSE}, {"ppo": replace(PARAMS, lr=1e-3)}):
        assert not is_trained(task, replace(Recipe(ALONE, PARAMS, EXPLAIN, 0), **change), stages.stages)
        with pytest.raises(TypeError):
            train_policy(task, replace(Recipe(ALONE, PARAMS, EXPLAIN, 0), **change), stages)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    with pytest.raises(TypeError):  # which would round differently
        train_policy(replace(task), Recipe(ALONE, PARAMS, EXPLAIN, 0), stages)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_a_damaged_stage_is_trained_again_with_a_warning(task, tmp_path, name):
    few = Recipe(SPARSE, replace(PARAMS, updates=2), EXPLAIN, 0)
    first = train_policy(task, few, Session(stages=tmp_path))
    (path,) = tmp_path.glob(f"training/*/checkpoint-000002/{name}")
    _flip(path)
    with pytest.warns(UserWarning, match=f"{path} is not as it was written, so its policy is trained again"):
        again = train_policy(task, few, Session(stages=tmp_path))
    assert again.read == 0 and train_policy(task, few, Session(stages=tmp_path)).read == 2
    pd.testing.assert_frame_equal(first.history, again.history, check_exact=True)


def test_runs_that_want_the_same_training_at_once_wait_for_one(task, tmp_path):
    torch.set_num_threads(1)  # a fork would lose the others
    few, children = Recipe(SPARSE, replace(PARAMS, updates=3), EXPLAIN, 0), []
    for number in range(3):
        if not (child := os.fork()):
            read = train_policy(task, few, Session(stages=tmp_path)).read
            (tmp_path / f"read-{number}").write_text(str(read))
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert sorted(path.read_text() for path in tmp_path.glob("read-*")) == ["0", "3", "3"]


def test_a_training_of_another_run_that_was_cut_short_goes_on(task, tmp_path):
    few = Recipe(SPARSE, replace(PARAMS, updates=3, checkpoint_every=1), EXPLAIN, 0)
    unbroken = train_policy(task, few)
    with pytest.raises(KeyboardInterrupt):
        cut = Session(
            stages=tmp_path, until=lambda history: len(history) == 2 and (_ for _ in ()).throw(KeyboardInterrupt)
        )
        train_policy(task, few, cut)
    assert not is_trained(task, few, tmp_path)
    resumed = train_policy(task, few, Session(stages=tmp_path))
    assert resumed.read == 2
    pd.testing.assert_frame_equal(unbroken.history, resumed.history, check_exact=True)


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-9] ^= 1  # in the last tensor, or in a number of the history
    path.write_bytes(data)


def _edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


DAMAGE = {
    "one bit of a tensor": lambda folder: _flip(folder / "tensors.safetensors"),
    "no tensors": lambda folder: (folder / "tensors.safetensors").unlink(),
    "other bytes": lambda folder: (folder / "tensors.safetensors").write_bytes(b"nothing"),
    "policy missing": lambda folder: save_file(
        {k: v for k, v in load_file(folder / "tensors.safetensors").items() if not k.startswith("policy/")},
        folder / "tensors.safetensors",
    ),
    "one bit of a number": lambda folder: _flip(folder / "state.json"),
    "other history": lambda folder: _edit(folder / "state.json", history=[]),
    "no groups": lambda folder: _edit(folder / "state.json", groups=[]),
    "another schedule": lambda folder: _edit(folder / "state.json", schedule={}),
    "another key": lambda folder: _edit(folder / "state.json", key="another"),
    "no hashes": lambda folder: (folder / "hashes.json").unlink(),
    "a file too many": lambda folder: (folder / "adapter_config.json").write_text("{}"),
}


@pytest.fixture(scope="module")
def half_way(task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("half_way")
    train_policy(task, Recipe(SPARSE, replace(PARAMS, updates=1), EXPLAIN, 0), Session(folder=folder))
    return folder / "checkpoint-000001"


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_said_what_to_remove(task, half_way, tmp_path, damage):
    damage(copytree(half_way, tmp_path / half_way.name))
    with pytest.raises(InputError, match="checkpoint-000001/.* not as it was written.*; remove .*checkpoint-000001 to"):
        train_policy(task, Recipe(SPARSE, replace(PARAMS, updates=1), EXPLAIN, 0), Session(folder=tmp_path))


@pytest.mark.parametrize("name", ["generator", "policy/value_head.bias", "optimizer/value_head.bias/exp_avg"])
def test_the_state_of_another_learner_is_refused_by_name(task, name):
    learner = ppo.make_learner(task.fresh_policy(), PARAMS, 0)
    tensors, plain = checkpoint.learner_state(learner)
    for wrong in ({name: torch.zeros(3)}, {}):
        with pytest.raises(InputError, match=f"{name!r} is missing or of another shape"):
            checkpoint.restore(learner, {k: v for k, v in tensors.items() if k != name} | wrong, plain)
    with pytest.raises(InputError, match="'kl_coef' is missing"):
        checkpoint.restore(learner, tensors, {k: v for k, v in plain.items() if k != "kl_coef"})


def test_half_a_checkpoint_is_never_seen(task, tmp_path, monkeypatch):
    monkeypatch.setattr("os.rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train_policy(task, Recipe(SPARSE, PARAMS, EXPLAIN, 0), Session(folder=tmp_path))
    assert checkpoint.load_checkpoint(tmp_path) is None
    monkeypatch.undo()
    train_policy(task, Recipe(SPARSE, PARAMS, EXPLAIN, 0), Session(folder=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000008"]


@pytest.mark.parametrize("broken", ["reward", "loss", "gradient"])
def test_a_number_that_is_not_finite_stops_the_run_and_keeps_its_rollout(task, tmp_path, monkeypatch, broken):
    whole, step = ppo.update, []

    def update(learner, rollout, rewards, params):
        step.append(learner)
        if len(step) == 3 and broken == "reward":
            rewards = rewards.clone().index_fill_(0, torch.tensor([1]), float("inf"))
        if len(step) == 3 and broken == "loss":
            learner.policy.value_head.bias.data.fill_(float("nan"))
        if len(step) == 3 and broken == "gradient":
            learner.policy.value_head.weight.register_hook(lambda grad: grad * float("inf"))
        return whole(learner, rollout, rewards, params)

    monkeypatch.setattr(ppo, "update", update)
    with pytest.raises(ppo.Diverged, match=r"update 2: .*not finite: .*failure.safetensors"):
        train_policy(task, Recipe(SPARSE, PARAMS, EXPLAIN, 0), Session(folder=tmp_path))
    record = json.loads((tmp_path / "failure.json").read_text())
    named = {"reward": "reward", "loss": "value_loss", "gradient": "grad_norm"}[broken]
    assert record["update"] == 2 and record["metrics"][named] in ("nan", "inf") and named in record["error"]
    kept = load_file(tmp_path / "failure.safetensors")
    assert {"responses", "mask", "logprobs", "scores"} <= kept.keys() and len(kept["scores"]) == PARAMS.rollouts
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-000002"]


def test_without_a_folder_it_stops_as_well(task, monkeypatch):
    monkeypatch.setattr("dense_rlhf.ppo.learner.token_rewards", lambda rollout, *_: rollout.values * float("nan"))
    with pytest.raises(ppo.Diverged, match="update 0: PPO met a number that is not finite: reward"):
        train_policy(task, Recipe(SPARSE, PARAMS, EXPLAIN, 0))


def test_a_training_in_trouble_warns_by_name(task):
    wild = replace(PARAMS, lr=0.3, kl_coef=0.0, kl_target=None, updates=10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = []
        trained = train_policy(
            task, Recipe(RewardShape(("terminal",), (1.0,)), wild, EXPLAIN, 0), Session(watch=rows.append)
        )
    names = [sign.name for sign in trained.warnings]
    assert names and set(names) <= {"KLBlowUp", "EntropyCollapse"}
    assert {w.category.__name__ for w in caught} >= set(names)
    for sign in trained.warnings:
        assert sign.name in rows[sign.update]["warnings"] and str(sign.update) not in ("", None)
    assert [row["warnings"] for row in rows].count("") == len(rows) - len({sign.update for sign in trained.warnings})


def train_by_command(folder: Path, data, kill: bool = False) -> int:
    """`python -m dense_rlhf train` at smoke size, killed once it has left a checkpoint."""
    study = ("size=smoke", "ppo.updates=6", "ppo.checkpoint_every=1", f"study={folder.name.partition('.')[0]}")
    study += ("policy.trainable_layers=1", f"data.path={data}")  # small checkpoints
    options = [part for setting in study for part in ("--set", setting)]
    arguments = ("dense_rlhf", "train", "params/reviews.yaml", "--arm", "shap-signed", *options)
    child = command(folder.parents[2], os.devnull, *arguments)
    while kill and child.poll() is None:
        if list(folder.glob("checkpoint-*[3-9]")):
            with suppress(ProcessLookupError):  # it has ended, and its keeper has reaped it
                os.kill(child.pid, signal.SIGKILL)
            break
        time.sleep(0.01)
    return child.wait()


def killed_by_signal(folder: Path, data) -> bool:
    """Whether a training was killed half-way; on a busy machine one may end before the signal is sent."""
    for _ in range(5):
        if train_by_command(folder, data, kill=True) == -signal.SIGKILL:
            return True
        rmtree(folder)
    return False


def test_the_command_goes_on_where_it_was_killed(few_reviews):
    train = make_workspace() / "runs" / "train"
    folders = [train / f"{name}.shap-signed-seed0" for name in ("killed", "whole")]
    assert killed_by_signal(folders[0], few_reviews)
    assert list(folders[0].glob("checkpoint-*"))
    assert [train_by_command(folder, few_reviews) for folder in folders] == [0, 0]
    for name in ("history.csv", "evaluation.csv", "metrics.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    assert not list(folders[0].glob("checkpoint-*"))
    made = json.loads((folders[0] / "run.json").read_text())
    assert made["status"] == "ok" and made["processes"] == 1 and made["params"]["ppo_updates"] == 6
