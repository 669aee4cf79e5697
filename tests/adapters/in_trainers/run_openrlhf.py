"""OpenRLHF's own experience maker on our token rewards. Stubs stand in for what wants a GPU: DeepSpeed, models, Ray."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import common
import torch
from ray import cloudpickle

ROOT = Path(importlib.util.find_spec("openrlhf").origin).parent
MODELS = ModuleType("openrlhf.models")
MODELS.__path__ = [str(ROOT / "models")]  # its utils are its own
sys.modules |= {"openrlhf.models": MODELS}
for name in ("deepspeed", "flash_attn", "flash_attn.utils", "flash_attn.utils.distributed", "flash_attn.bert_padding"):
    sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None))
for name in ("trainer.ray", "trainer.ray.launcher", "trainer.ray.vllm_engine", "utils.deepspeed", "datasets"):
    sys.modules[f"openrlhf.{name}"] = MagicMock()
sys.modules |= {"openrlhf.datasets.utils": MagicMock(), "vllm": MagicMock()}

from openrlhf.trainer import ppo_trainer  # noqa: E402
from openrlhf.trainer.ppo_utils.experience import Experience  # noqa: E402
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker  # noqa: E402

from dense_rlhf.adapters.openrlhf import DenseExperienceMaker, install  # noqa: E402

GIVEN = common.batch()
ESTIMATORS = "gae", "reinforce", "rloo", "reinforce_baseline", "group_norm", "dr_grpo", "flash_reinforce"
SHARES = [0, 3], [1, 2, 4], [5]  # rows of each experience: a prompt's responses lie in several


def arguments(estimator, clip=None, penalty=0.0):
    advantage = SimpleNamespace(estimator=estimator, gamma=GIVEN["gamma"], lambd=GIVEN["lam"], no_std_norm=True)
    reward = SimpleNamespace(
        clip_range=clip, overlong_buffer_len=None, overlong_penalty_factor=1.0, stop_properly_penalty_coef=penalty
    )
    rollout = SimpleNamespace(n_samples_per_prompt=3, max_new_tokens=99)
    return SimpleNamespace(rollout=rollout, reward=reward, algo=SimpleNamespace(advantage=advantage))


def on_actions(i, row, kind=torch.float32):
    """Numbers of response `i` at its actions, which begin at the second token."""
    return torch.tensor([0] * (len(GIVEN["prompt_ids"][i]) - 1) + list(row), dtype=kind)


def experiences(truncated):
    made = []
    for share in SHARES:
        texts = [torch.tensor(GIVEN["prompt_ids"][i] + GIVEN["response_ids"][i]) for i in share]
        pad = torch.nn.utils.rnn.pad_sequence
        columns = {name: pad([on_actions(i, GIVEN[name][i]) for i in share], True) for name in ("values", "kl")}
        scores = torch.tensor([sum(GIVEN["sparse"][i]) for i in share])
        made.append(
            Experience(
                sequences=pad(texts, True),
                attention_mask=pad([torch.ones_like(text) for text in texts], True),
                action_mask=pad([on_actions(i, [1] * len(GIVEN["values"][i]), torch.long) for i in share], True),
                index=list(share),
                rewards=scores,
                truncated=torch.full((len(share),), truncated),
                info={"reward": scores.clone()},
                **columns,
            )
        )
    return made


def responses(made, name):
    """Numbers of each response, in the batch's order."""
    rows = {
        i: getattr(one, name)[row][one.action_mask[row].bool()].tolist()
        for one in made
        for row, i in enumerate(one.index)
    }
    return [rows[i] for i in sorted(rows)]


def advantages(kind=None, clip=None, penalty=0.0):
    """Advantages and returns by estimator: of our token rewards of `kind`, or OpenRLHF's of scores."""
    made = {}
    for name in ESTIMATORS:
        strategy = SimpleNamespace(args=arguments(name, clip, penalty))
        parts = None, None, None, None, SimpleNamespace(value=GIVEN["kl_coef"]), strategy, None
        if kind:
            maker = DenseExperienceMaker(*parts, rewards=common.token_rewards(GIVEN, kind))
        else:
            maker = RemoteExperienceMaker(*parts)
        done = maker.compute_advantages_and_returns(experiences(truncated=bool(penalty)))
        made[name] = [responses(done, "advantages"), responses(done, "returns")]
    return made


def installed():
    """The experience maker of the trainer that OpenRLHF's command would start."""
    install(common.token_rewards(GIVEN, "dense"))
    assert cloudpickle.dumps(ppo_trainer.PPOTrainer.__ray_metadata__.modified_class)  # as Ray sends it
    ppo_trainer.prepare_datasets = MagicMock(return_value=(MagicMock(), None, 1))
    ppo_trainer.get_tokenizer = ppo_trainer.SamplesGenerator = MagicMock()
    args = MagicMock()
    args.logger.wandb.key = args.logger.tensorboard_dir = None
    trainer = object.__new__(ppo_trainer.PPOTrainer.__ray_metadata__.modified_class)
    trainer.__init__("policy", MagicMock(args=args), *[None] * 5)
    return type(trainer.experience_maker).__name__


common.answer(
    "openrlhf",
    {
        "dense": advantages("dense"),
        "sparse": advantages("sparse"),
        "theirs": advantages(),
        "sparse, clipped and penalised": advantages("sparse", [-0.1, 0.1], 0.5),
        "theirs, clipped and penalised": advantages(None, [-0.1, 0.1], 0.5),
        "installed": installed(),
    },
)
