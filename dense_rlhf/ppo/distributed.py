"""One process, or several that train one policy through accelerate; no other module knows which."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from dense_rlhf.types import InputError, Rollout

if TYPE_CHECKING:
    from dense_rlhf.models.policy import PolicyWithValue


class Alone:
    """A single process: it has all rows and exchanges nothing."""

    rank, world = 0, 1
    keeps = True  # checkpoints can be written

    def prepare(self, policy: PolicyWithValue, optimizer: torch.optim.Optimizer):
        """The policy and the optimiser, wrapped for training."""
        return policy, optimizer

    @contextmanager
    def one_after_another(self) -> Iterator[None]:
        """The first process runs the block, then the others do."""
        yield

    def unwrap(self, policy) -> PolicyWithValue:
        """The policy without what `prepare` wrapped it in."""
        return policy

    def share(self, rows):
        """This process's part of `rows`."""
        return rows

    def backward(self, policy: PolicyWithValue, loss: Tensor, last: bool) -> None:
        """Add the gradient of one micro-batch; after the `last` one, that of all processes."""
        loss.backward()

    def clip(self, policy: PolicyWithValue, optimizer: torch.optim.Optimizer, norm: float) -> float:
        """Clip the gradient of all trained weights to `norm`; returns its norm before."""
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        return torch.nn.utils.clip_grad_norm_(weights, norm).item()

    def total(self, logs: Tensor) -> Tensor:
        """(n,) of logs (micro-batches, n): the largest of the first number, sums of the others."""
        return torch.cat([logs[:, :1].amax(0), logs[:, 1:].sum(0)])

    def gather(self, rollout: Rollout, rewards: Tensor) -> tuple[Rollout, Tensor]:
        """The rollouts and rewards of all processes as one."""
        return rollout, rewards

    def average(self, metrics: dict[str, float]) -> dict[str, float]:
        """Metrics averaged over the processes."""
        return metrics


class Together(Alone):
    """One of several processes, as accelerate started them.

    Each samples and explains its own prompts; then all hold the whole rollout, which is small next to a model, and
    compute equal shares of every mini-batch: whitening, metrics and the update are those of one process.
    """

    def __init__(self):
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes

    def prepare(self, policy: PolicyWithValue, optimizer: torch.optim.Optimizer):
        kind, self.keeps = self.accelerator.distributed_type, self.accelerator.distributed_type != "DEEPSPEED"
        if policy.cut and kind in ("FSDP", "DEEPSPEED"):
            raise InputError(
                f"policy.trainable_layers is given, but {kind} splits the weights and can keep no frozen trunk; "
                "take policy.lora_rank, or params/accelerate/ddp.yaml"
            )
        if kind in ("FSDP", "DEEPSPEED"):
            policy.sample_from_a_copy()
        if kind == "DEEPSPEED":  # requires a number that it does not use: micro-batches are ours
            self.accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
        return self.accelerator.prepare(policy, optimizer)

    def one_after_another(self):
        return self.accelerator.main_process_first()

    def unwrap(self, policy) -> PolicyWithValue:
        return self.accelerator.unwrap_model(policy)

    def share(self, rows):
        if len(rows) % self.world:
            raise InputError(
                f"{len(rows)} responses do not divide among {self.world} processes; wanted multiples of their number "
                "in ppo.rollouts and ppo.minibatch"
            )
        return rows[self.rank :: self.world]

    def backward(self, policy: PolicyWithValue, loss: Tensor, last: bool) -> None:
        self.accelerator.gradient_state._set_sync_gradients(last)  # DeepSpeed steps where it syncs
        with nullcontext() if last else self.accelerator.no_sync(policy):
            self.accelerator.backward(loss * self.world)  # gradients are averaged over processes

    def clip(self, policy: PolicyWithValue, optimizer: torch.optim.Optimizer, norm: float) -> float:
        before = self.accelerator.clip_grad_norm_(policy.parameters(), norm)
        return float(before.full_tensor() if hasattr(before, "full_tensor") else before)

    def total(self, logs: Tensor) -> Tensor:
        return super().total(self.accelerator.gather(super().total(logs)[None]))

    def gather(self, rollout: Rollout, rewards: Tensor) -> tuple[Rollout, Tensor]:
        from accelerate.utils import gather_object

        fields = rollout.tensors() | {"rewards": rewards}
        whole = {name: self.accelerator.gather(self._widened(name, x).contiguous()) for name, x in fields.items()}
        rewards, prompts = whole.pop("rewards"), rollout.prompts
        return Rollout(**whole, prompts=prompts and tuple(gather_object(list(prompts)))), rewards

    def _widened(self, name: str, x: Tensor) -> Tensor:
        """A field of a rollout padded to the widest of all processes; prompts are padded on the left."""
        if x.dim() == 1:
            return x
        widths = self.accelerator.gather(torch.tensor([x.shape[1]], device=self.accelerator.device))
        more = int(widths.max()) - x.shape[1]
        return F.pad(x, (0, 0, 0, more) if x.dim() == 3 else (more, 0) if name.startswith("quer") else (0, more))

    def average(self, metrics: dict[str, float]) -> dict[str, float]:
        own = torch.tensor(list(metrics.values()), dtype=torch.float64, device="cpu")
        return dict(zip(metrics, self.accelerator.reduce(own.to(self.accelerator.device), "mean").tolist()))


def these() -> Alone:
    """This process's group under `accelerate launch` or torchrun, else a single process."""
    return Together() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Alone()
