"""Record what TRL 1.12.0's PPOTrainer computes on a tiny model into golden.npz; README.md has the two commands.

`PPOTrainer.train` is one method without hooks. Two functions that it looks up in its module are wrapped, and read its
local variables where they are called: once a rollout `masked_whiten`, four times a micro-batch `masked_mean`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import (
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

PAD, EOS, VOCAB = 0, 1, 64
B, P, T = 8, 5, 10
SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    tie_word_embeddings=False,
    pad_token_id=PAD,
    eos_token_id=EOS,
    bos_token_id=EOS,
)
SETTINGS = dict(
    learning_rate=5e-3,
    adam_epsilon=1e-4,
    lr_scheduler_type="linear",
    num_ppo_epochs=2,
    kl_coef=0.2,
    gamma=1.0,
    lam=0.9,
    temperature=0.7,
    cliprange=0.2,
    cliprange_value=0.2,
    vf_coef=0.5,
    per_device_train_batch_size=B,
    gradient_accumulation_steps=1,
    response_length=T,
    local_rollout_forward_batch_size=B,
    num_sample_generations=0,
    whiten_rewards=True,
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    report_to="none",
    save_strategy="no",
    logging_strategy="no",
    disable_tqdm=True,
    seed=1,
)
ROLLOUT = ("queries", "responses", "logprobs", "ref_logprobs", "values", "scores", "rewards", "advantages", "returns")
MICRO_BATCH = ("new_logprobs", "vpred", "vf_loss", "vf_clipfrac", "pg_loss")


@dataclass(frozen=True)
class Case:
    """A run of PPOTrainer: how long, what is recorded, and what differs from SETTINGS."""

    settings: dict
    updates: int = 1
    dense: bool = False  # replace the score by noise on every token
    weights: bool = False  # record the final weights


CASES = {
    "sparse": Case({}, updates=3, weights=True),
    "dense": Case({"gamma": 0.95}, updates=3, dense=True, weights=True),
    "early_eos": Case({"stop_token": "eos"}),
    "k3": Case({"stop_token": "eos", "kl_estimator": "k3", "missing_eos_penalty": 1.5, "gamma": 0.95}),
    "mini_batches": Case({"num_mini_batches": 2, "gradient_accumulation_steps": 2}, updates=2),  # of B rollouts each
}

# ---------------------------------------------------------------------------------------------------- models


def drawn(model: nn.Module, seed: int) -> nn.Module:
    """Weights that a fresh model can be told apart by, multiples of 1/256 so that they compress."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.copy_((torch.randn(p.shape, generator=generator) * 40).round() / 256)
    return model.eval()


def policy(seed: int) -> LlamaForCausalLM:
    """About a tenth of its tokens are EOS, none is padding."""
    lm = LlamaForCausalLM(LlamaConfig(**SHAPE))
    lm.lm_head = nn.Linear(16, VOCAB)
    nn.init.zeros_(lm.lm_head.bias)
    with torch.no_grad():
        lm.lm_head.bias[[PAD, EOS]] = torch.tensor([-1e4, 1.5])
    return drawn(lm, seed)


def classifier(seed: int, scale: float = 1.0) -> LlamaForSequenceClassification:
    """A reward or value model, its head with a bias like ours."""
    model = LlamaForSequenceClassification(LlamaConfig(num_labels=1, **SHAPE))
    model.score = nn.Linear(16, 1)
    nn.init.zeros_(model.score.bias)
    drawn(model, seed).score.weight.data.mul_(scale)
    return model


def prompts(size: int) -> Dataset:
    """Prompts of 2 to P tokens."""
    rng = np.random.default_rng(0)
    return Dataset.from_dict(
        {"input_ids": [rng.integers(2, VOCAB, rng.integers(2, P + 1)).tolist() for _ in range(size)]}
    )


def collator() -> DataCollatorWithPadding:
    words = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(2, VOCAB)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<eos>")),
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
    )
    return DataCollatorWithPadding(tokenizer, padding="max_length", max_length=P)


# ---------------------------------------------------------------------------------------------------- recording

whiten, mean = ppo_trainer.masked_whiten, ppo_trainer.masked_mean


def picked(local: dict, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    return {name: local[name].detach().numpy().copy() for name in names}


def recorder(log: list[dict], dense: bool) -> tuple[Callable, Callable]:
    """Stand-ins for masked_whiten and masked_mean that compute the same and append to `log`, a dictionary a rollout.

    PPOTrainer whitens rewards by its only call with shift_mean=False: here rewards are left as they are, or replaced.
    """
    noise = torch.Generator().manual_seed(0)

    def on_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
        local = sys._getframe(1).f_locals
        if not shift_mean:
            log.append({})
            rewards = replaced(values, local["scores"]) if dense else values
            log[-1]["whitened_rewards"] = whiten(rewards, mask, shift_mean=False).numpy()
            return rewards
        arrays, white = picked(local, ROLLOUT), whiten(values, mask)
        masks = {"mask": mask.numpy(), "value_mask": ~local["padding_mask_p1"].numpy()}
        log[-1] |= arrays | masks | {"white": white.numpy(), "micro": []}
        return white

    def replaced(values: Tensor, scores: Tensor) -> Tensor:
        shaped = torch.randn(values.shape, generator=noise)
        log[-1]["shaped"] = shaped.numpy()
        sparse = nn.functional.pad(scores[:, None], (T - 1, 0))
        return values - sparse + shaped

    def on_mean(values: Tensor, mask: Tensor, axis: int | None = None) -> Tensor:
        arrays, local = mean(values, mask, axis), sys._getframe(1).f_locals
        if "pg_losses2" in local and "pg_loss" in local:  # the last of the four calls a micro-batch
            log[-1]["micro"].append(picked(local, MICRO_BATCH) | {"pg_clipfrac": arrays.numpy()})
        return arrays

    return on_whiten, on_mean


def train(case: Case, folder: str) -> tuple[PPOTrainer, list[int]]:
    """A finished PPOTrainer, and the optimiser steps that it took in each update."""
    settings, collate, steps = SETTINGS | case.settings, collator(), []
    batch = B * settings["gradient_accumulation_steps"]
    data = prompts(max(case.updates, 2) * batch)  # one batch alone would be the last of each pass
    trainer = PPOTrainer(
        PPOConfig(folder, total_episodes=case.updates * batch, **settings),
        collate.tokenizer,
        policy(0),
        policy(1),
        classifier(2, 4.0),
        data,
        classifier(3),
        collate,
    )
    trainer.optimizer.optimizer.register_step_post_hook(lambda *_: steps.append(trainer.state.global_step))
    trainer.train()
    return trainer, np.bincount(steps).tolist()


def record(case: Case) -> dict[str, np.ndarray]:
    """All that PPOTrainer computed: (update, ...) or (update, micro-batch, ...), and the final weights."""
    log: list[dict] = []
    ppo_trainer.masked_whiten, ppo_trainer.masked_mean = recorder(log, case.dense)
    with tempfile.TemporaryDirectory() as folder:
        trainer, steps = train(case, folder)
    micro = [rollout.pop("micro") for rollout in log]
    arrays = {name: np.stack([rollout[name] for rollout in log]) for name in log[0]}
    arrays |= {name: np.stack([[m[name] for m in one] for one in micro]) for name in micro[0][0]}
    weights = flat(trainer.model.policy, trainer.model.value_model) if case.weights else {}
    return arrays | {"steps": np.array(steps)} | weights


def flat(lm: nn.Module, value_model: nn.Module) -> dict[str, np.ndarray]:
    """The weights of each model in the order of its parameters, one vector."""
    both = {"policy": lm, "value_model": value_model}
    return {name: nn.utils.parameters_to_vector(model.parameters()).detach().numpy() for name, model in both.items()}


def main() -> None:
    assert trl.__version__ == "1.12.0", f"this is trl {trl.__version__}"
    np.random.permutation = np.arange  # micro-batches in the order of the rollout
    cases = {
        name: record(case) | {"settings": np.array(json.dumps(SETTINGS | case.settings))}
        for name, case in CASES.items()
    }
    cases["mini_batches"] = {"steps": cases["mini_batches"]["steps"]}
    cases["initial"] = flat(policy(0), classifier(3)) | {"settings": np.array(json.dumps(SHAPE))}
    arrays = {f"{name}/{key}": array for name, case in cases.items() for key, array in case.items()}
    np.savez_compressed(Path(__file__).with_name("golden.npz"), **arrays)


if __name__ == "__main__":
    main()
