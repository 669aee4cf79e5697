"""One process of several: `torchrun --nproc_per_node N one_of_several.py FOLDER`; the first writes what it got."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from stand_ins import SENTENCES, make_policy, make_rollout
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dense_rlhf import ppo
from dense_rlhf.config.params import PolicyParams, PPOParams, RewardParams
from dense_rlhf.models.policy import PolicyWithValue, trainable_copy
from dense_rlhf.models.reward_model import RewardModel
from dense_rlhf.models.tiny_recipe import train_tokenizer
from dense_rlhf.models.train_reward_model import fresh_classifier
from dense_rlhf.ppo.checkpoint import keep, learner_state, resume
from dense_rlhf.ppo.distributed import Together, these

PARAMS = PPOParams(updates=4, rollouts=6, max_new_tokens=8, minibatch=2, micro_batch=1, epochs=2, lr=1e-2)
KINDS = {
    "plain": PolicyParams(),
    "lora": PolicyParams(lora_rank=2),
    "last": PolicyParams(trainable_layers=1),
    "sharded": PolicyParams(),
}


class Sharded(Together):
    """What accelerate makes of a policy under FSDP 2, which it does not do on a CPU."""

    def prepare(self, policy, optimizer):
        policy.sample_from_a_copy()
        names = {id(p): name for name, p in policy.named_parameters()}
        mesh = init_device_mesh("cpu", (self.world,))
        for module in (*policy.lm.base_model.layers, policy):
            fully_shard(module, mesh=mesh)
        sharded = dict(policy.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [sharded[names[id(p)]] for p in group["params"]]
        return policy, optimizer

    def backward(self, policy, loss, last):
        policy.set_requires_gradient_sync(last)
        (loss * self.world).backward()

    def clip(self, policy, optimizer, norm):
        return torch.nn.utils.clip_grad_norm_(policy.parameters(), norm).full_tensor().item()


def work(kind: str, folder: Path):
    """Two updates on rollouts that every process makes alike, with a checkpoint and a restart between them."""
    tokenizer = train_tokenizer(SENTENCES, 300)
    torch.manual_seed(0)
    reference = PolicyWithValue(make_policy(tokenizer), KINDS[kind].trainable_layers).requires_grad_(False).eval()
    reward_model = RewardModel(fresh_classifier(RewardParams(hidden=16, layers=1, heads=2), tokenizer), tokenizer)
    processes, logs = these(), []
    if kind == "sharded" and processes.world > 1:
        processes = Sharded()
    learner = ppo.make_learner(trainable_copy(reference, KINDS[kind]), PARAMS, 0, processes)
    for seed in (1, 2):
        policy = processes.unwrap(learner.policy)
        mine = make_rollout(policy, reference, reward_model, tokenizer, seed=seed)
        rewards = torch.randn(mine.mask.shape, generator=torch.Generator().manual_seed(seed)) * mine.mask
        if processes.world > 1:  # each hands in its own rows, in the order in which one process has them
            own = processes.share(torch.arange(len(rewards)))
            mine, rewards = processes.gather(mine.take(own), rewards[own][:, : mine.take(own).mask.shape[1]])
            gathered = torch.arange(len(rewards))
            order = torch.cat([gathered[rank :: processes.world] for rank in range(processes.world)]).argsort()
            mine, rewards = mine.take(order), rewards[order][:, : mine.mask.shape[1]]
        logs.append(ppo.update(learner, mine, rewards, PARAMS))
        keep(folder, "key", learner, logs, [])
        learner = ppo.make_learner(trainable_copy(reference, KINDS[kind]), PARAMS, 5, processes)
        with processes.one_after_another():  # the checkpoint is there before anyone reads it
            pass
        resume(folder, "key", learner)
    weights = learner_state(learner)[0]
    return processes.rank, {name: x for name, x in weights.items() if name.startswith("policy/")}, logs


def leave(folder: Path) -> None:
    """Work through all kinds, and write the first process's weights and metrics."""
    for kind in KINDS:
        rank, weights, logs = work(kind, folder / kind)
        if not rank:
            save_file(weights, folder / f"{kind}.safetensors")
            (folder / f"{kind}.json").write_text(json.dumps(logs))


if __name__ == "__main__":
    torch.set_num_threads(1)
    leave(Path(sys.argv[1]))
