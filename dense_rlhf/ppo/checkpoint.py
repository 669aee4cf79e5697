"""Checkpoints: all that decides the rest of a training, in safetensors and JSON, written whole or not at all."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from dense_rlhf.files import check_sealed, damaged, read_json, remove_checkpoints, seal, write_folder, write_json
from dense_rlhf.ppo.learner import Diverged
from dense_rlhf.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dense_rlhf.models.policy import PolicyWithValue
    from dense_rlhf.ppo.distributed import Alone
    from dense_rlhf.ppo.learner import Learner

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)
OWN_STATE = ("kl_coef", "moments")  # of the learner, plain numbers


def learner_state(learner: Learner) -> tuple[dict[str, Tensor], dict]:
    """The state of a learner as tensors and as JSON, without frozen weights.

    All processes must call it; the first one gets the whole.
    """
    weights, optimizer = get_state_dict(learner.policy, learner.optimizer, options=WHOLE)
    tensors = {f"policy/{name}": weight for name, weight in weights.items()}
    for name, moments in optimizer.get("state", {}).items():
        tensors |= {f"optimizer/{name}/{key}": value for key, value in moments.items()}
    tensors |= {"generator": learner.generator.get_state(), "torch": torch.get_rng_state()}
    plain = {"groups": optimizer.get("param_groups"), "schedule": learner.schedule.state_dict()}
    plain |= {name: getattr(learner, name) for name in OWN_STATE}
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, plain


def restore(learner: Learner, tensors: dict[str, Tensor], plain: dict) -> None:
    """Put a learner back to where `learner_state` saw it; of a finished training only the policy is there.

    Raises `InputError` for the state of a learner of other weights.
    """
    _check_fit(learner, tensors, plain)
    weights, moments = {}, {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "policy":
            weights[rest] = tensor
        elif kind == "optimizer":
            weight, _, key = rest.rpartition("/")
            moments.setdefault(weight, {})[key] = tensor
    if plain.get("finished"):
        set_model_state_dict(learner.policy, weights, options=WHOLE)
    else:
        optimizer = {"state": moments, "param_groups": plain["groups"]}
        set_state_dict(
            learner.policy, learner.optimizer, model_state_dict=weights, optim_state_dict=optimizer, options=WHOLE
        )
    learner.schedule.load_state_dict(plain["schedule"])
    learner.generator.set_state(tensors["generator"])
    torch.set_rng_state(tensors["torch"])
    for name in OWN_STATE:
        setattr(learner, name, plain[name])


def _check_fit(learner: Learner, tensors: dict[str, Tensor], plain: dict) -> None:
    """Raise `InputError`, which names the first part that differs, for the state of a learner of other weights."""
    mine, settings = learner_state(learner)
    if learner.processes.rank:  # the first has the whole
        return
    wanted = {name: (x.shape, x.dtype) for name, x in mine.items() if _is_kept(name) or not plain.get("finished")}
    found = {name: (x.shape, x.dtype) for name, x in tensors.items()}
    differ = [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]
    if differ := sorted(differ) + sorted(settings.keys() - plain.keys()):
        raise InputError(f"a checkpoint of other weights: {differ[0]!r} is missing or of another shape; remove it")


def _is_kept(name: str) -> bool:
    """Whether a tensor stays when a training is finished: all but the optimiser's moments, two thirds of the bytes."""
    return not name.startswith("optimizer/")


def resume(folder: Path | None, key: str, learner: Learner) -> tuple[list[dict], list[dict]]:
    """Restore `learner` from the checkpoint of this training; returns metrics and seconds of the updates so far."""
    checkpoint = load_checkpoint(folder) if folder else None
    if checkpoint is None or checkpoint[1].get("key") != key:
        return [], []
    restore(learner, *checkpoint)
    return checkpoint[1]["history"], checkpoint[1]["seconds"]


def keep(folder: Path | None, key: str, learner: Learner, history: list[dict], seconds: list[dict]) -> None:
    """Checkpoint a training, where it has a folder and its processes can be kept.

    Of a finished training the optimiser's moments are left out: it is only read again.
    """
    if folder is None or not learner.processes.keeps:
        return
    tensors, plain = learner_state(learner)
    plain["finished"] = len(history) >= learner.schedule.total_iters
    if plain["finished"]:
        tensors = {name: tensor for name, tensor in tensors.items() if _is_kept(name)}
    if learner.processes.rank == 0:
        plain |= {"key": key, "history": history, "seconds": seconds}
        save_checkpoint(folder, len(history), tensors, plain)


def save_failure(folder: Path | None, step: int, error: Diverged, processes: Alone) -> Diverged:
    """Save the rollout and the metrics of a step with a number that is not finite; returns an error that says where."""
    where = ""
    if folder is not None and processes.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: x.detach().cpu().contiguous() for name, x in error.rollout.tensors().items()}
        save_file(tensors, folder / "failure.safetensors")
        metrics = {name: str(value) for name, value in error.metrics.items()}
        write_json(folder / "failure.json", {"update": step, "error": str(error), "metrics": metrics})
        where = f". Its rollout is in {folder / 'failure.safetensors'}"
    return Diverged(error.metrics, error.rollout, f"update {step}: {error}{where}")


def checkpoint_at(folder: Path, step: int) -> Path:
    """Where a training's state after `step` updates is, or would be."""
    return folder / f"checkpoint-{step:06d}"


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], plain: dict) -> None:
    """Write `folder/checkpoint-STEP`, whole or not at all, then remove older ones."""
    target = checkpoint_at(folder, step)

    def fill(draft: Path) -> None:
        save_file(tensors, draft / "tensors.safetensors")
        (draft / "state.json").write_text(json.dumps(plain), encoding="utf-8")

    write_folder(target, fill)
    remove_checkpoints(folder, but=target)


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict] | None:
    """The newest checkpoint in `folder`, or None. Raises `InputError` for one that is not as it was written."""
    newest = max(folder.glob("checkpoint-*"), default=None)
    if newest is None:
        return None
    check_sealed(newest, f"remove {newest} to train from the start")
    return load_file(newest / "tensors.safetensors"), read_json(newest / "state.json")


def discard_damaged(folder: Path) -> None:
    """Remove the checkpoints in `folder`, with a warning, if the newest is not as it was written."""
    newest = max(folder.glob("checkpoint-*"), default=None)
    if newest and (file := damaged(newest)):
        warnings.warn(f"{file} is not as it was written, so its policy is trained again", stacklevel=2)
        remove_checkpoints(folder)


def save_policy(policy: PolicyWithValue, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save the policy, adapters merged, with its tokenizer, for `from_pretrained` and `policy.name` to read; sealed."""
    policy.sampling_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    seal(folder)
