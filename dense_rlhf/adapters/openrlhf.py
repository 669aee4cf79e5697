"""OpenRLHF on token rewards: an experience maker that moves each response's score to the tokens that earned it.

Run with OpenRLHF 0.11.2, with stubs for DeepSpeed and the models; a script takes the place of its command:

    from dense_rlhf.adapters.client import RewardClient
    from dense_rlhf.adapters.openrlhf import install

    install(RewardClient("http://127.0.0.1:8700"))
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__")

and is started with the command's own arguments. The token rewards' sums become the scores; `--reward.remote_url
zero.py`, a file whose `reward_func` returns zeros, saves a second reward model. Any estimator will do.
`--train.async_enable`, which makes its trainer elsewhere, is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from openrlhf.trainer.ppo_utils import experience_maker
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from torch import Tensor

from dense_rlhf.adapters.group import group_to_go
from dense_rlhf.adapters.paid import paid
from dense_rlhf.types import InputError

GROUPED = {"rloo": "leave_one_out", "group_norm": "sd", "reinforce_baseline": "none", "dr_grpo": "none"}


def install(rewards) -> None:
    """Have OpenRLHF's PPO trainer pay tokens by `rewards`, a callable that can be pickled. Call it in the driver."""
    import ray
    from openrlhf.trainer import ppo_trainer

    if "--train.async_enable" in sys.argv:
        raise InputError("--train.async_enable makes its trainer where this does not reach; leave it out")

    class PPOTrainer(ppo_trainer.PPOTrainer.__ray_metadata__.modified_class.__ray_actor_class__):
        def __init__(self, *args, **kwargs):
            ppo_trainer.RemoteExperienceMaker = partial(DenseExperienceMaker, rewards=rewards)  # in the trainer's actor
            super().__init__(*args, **kwargs)

    ppo_trainer.PPOTrainer = ray.remote(PPOTrainer)


class DenseExperienceMaker(RemoteExperienceMaker):
    """OpenRLHF's, which pays `rewards` of the prompts' and responses' ids in place of scores at the last tokens.

    Penalties, clipping, baselines, KL, advantages and returns are OpenRLHF's own; a sparse reward changes none.
    """

    def __init__(self, *args, rewards, **kwargs):
        super().__init__(*args, **kwargs)
        self.rewards = rewards

    @torch.no_grad()
    def compute_advantages_and_returns(self, experiences):
        texts = [text for experience in experiences for text in _texts(experience)]
        rows = iter(paid(self.rewards, *zip(*texts)))
        dense = []
        for one in experiences:
            rewards = torch.zeros(one.action_mask.shape)
            for i, keep in enumerate(one.action_mask.bool().cpu()):
                rewards[i, keep] = torch.from_numpy(next(rows))
            one.rewards = one.info["reward"] = rewards.sum(-1)
            dense.append(rewards)
        with _added(self._moves(experiences, dense)):
            return super().compute_advantages_and_returns(experiences)

    def _moves(self, experiences, dense: list[Tensor]) -> list[Tensor]:
        """What tokens gain or lose where the score leaves the last token: (B, A) of each experience, rows sum to zero.

        m_t = D_t - D_{t+1}, D_t = A_t of the token rewards less A_t of their sum at the last token, A without KL:
        `group_to_go` where the estimator compares a group, else the reward to go.
        """
        estimator, longest = self.strategy.args.algo.advantage.estimator, max(part.shape[1] for part in dense)
        mask = _stacked([one.action_mask.bool().cpu() for one in experiences], longest)
        rewards = _stacked(dense, longest)
        last = (torch.arange(longest) * mask).amax(-1, keepdim=True)
        sparse = torch.zeros_like(rewards).scatter(-1, last, rewards.sum(-1, keepdim=True))
        if estimator in GROUPED:
            samples = self.strategy.args.rollout.n_samples_per_prompt
            groups = [place // samples for one in experiences for place in one.index]
            gain = partial(group_to_go, mask=mask, groups=groups, scale=GROUPED[estimator], eps=1e-9)
            ahead = gain(rewards) - gain(sparse)
            moved = ahead - torch.nn.functional.pad(ahead[:, 1:], (0, 1))
        else:
            moved = rewards - sparse
        rows = moved.split([len(part) for part in dense])
        return [row[:, : part.shape[1]] for row, part in zip(rows, dense)]


def _stacked(parts: list[Tensor], width: int) -> Tensor:
    """Rows of all experiences, padded to one width."""
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])


def _texts(experience) -> list[tuple[list[int], list[int]]]:
    """Ids of prompt and response of each row. Actions are the tokens from the second on."""
    texts = []
    for ids, kept, acts in zip(experience.sequences, experience.attention_mask, experience.action_mask.bool()):
        places = acts.nonzero()[:, 0] + 1
        if not len(places) or int(places[-1] - places[0]) + 1 != len(places):
            raise InputError("a response has no token, or turns of tools, which earn no token rewards here")
        start = int(places[0])
        texts.append((ids[:start][kept[:start].bool()].tolist(), ids[places].tolist()))
    return texts


@contextmanager
def _added(moves: list[Tensor]) -> Iterator[None]:
    """OpenRLHF's token rewards with `moves` on top, in the order of its experiences."""
    theirs, rest = experience_maker.compute_reward, iter(moves)

    def compute_reward(*args, **kwargs) -> Tensor:
        rewards = theirs(*args, **kwargs)
        return rewards + next(rest).to(rewards)

    experience_maker.compute_reward = compute_reward
    try:
        yield
    finally:
        experience_maker.compute_reward = theirs
