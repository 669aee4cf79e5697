"""SkyRL's own trainer on our token rewards, from a generator's output to advantages."""

import asyncio
import typing
from types import SimpleNamespace

import typing_extensions

typing.TypedDict = typing_extensions.TypedDict  # SkyRL is for Python 3.12, and pydantic asks for this on 3.11

import common  # noqa: E402
import torch  # noqa: E402
from skyrl.train.config import AlgorithmConfig  # noqa: E402
from skyrl.train.generators.base import GeneratorInterface  # noqa: E402
from skyrl.train.trainer import RayPPOTrainer  # noqa: E402

from dense_rlhf.adapters.skyrl import DenseGenerator  # noqa: E402

GIVEN = common.batch()
ESTIMATORS = "gae", "reinforce++", "grpo", "rloo", "dense_grpo", "dense_rloo"


class Generator(GeneratorInterface):
    """Has generated already."""

    async def generate(self, input_batch):
        return {
            "prompt_token_ids": GIVEN["prompt_ids"],
            "response_ids": GIVEN["response_ids"],
            "rewards": [sum(row) for row in GIVEN["sparse"]],
            "loss_masks": [[1] * len(row) for row in GIVEN["response_ids"]],
            "stop_reasons": None,
            "rollout_metrics": {},
            "rollout_logprobs": None,
        }


def advantages(generator):
    """Advantages and returns by estimator."""
    made = {}
    for name in ESTIMATORS:
        trainer = object.__new__(RayPPOTrainer)
        algorithm = AlgorithmConfig(advantage_estimator=name, gamma=GIVEN["gamma"], lambd=GIVEN["lam"])
        options = SimpleNamespace(
            n_samples_per_prompt=3,
            step_wise_trajectories=False,
            merge_stepwise_output=False,
            zero_variance_filter=False,
        )
        sizes = {"train_batch_size": 2, "policy_mini_batch_size": 2, "critic_mini_batch_size": 2}
        critic = SimpleNamespace(model=SimpleNamespace(path=None))
        settings = SimpleNamespace(algorithm=algorithm, critic=critic, **sizes)
        trainer.cfg = SimpleNamespace(trainer=settings, generator=options)
        trainer.dispatch = SimpleNamespace(get_lcm_dp_size=lambda: 1)
        trainer.tokenizer, trainer.all_metrics = SimpleNamespace(pad_token_id=0), {}
        output = asyncio.run(generator.generate({"prompts": [None] * len(GIVEN["groups"])}))
        output, names = trainer.postprocess_generator_output(output, GIVEN["groups"])
        data = trainer.convert_to_training_input(output, names)
        mask = data["response_mask"].bool()
        values = torch.zeros(mask.shape)
        values[mask] = torch.cat([torch.tensor(row) for row in GIVEN["values"]])
        data["values"] = values
        data = trainer.compute_advantages_and_returns(data)
        kept = [keep.bool() for keep in data["response_mask"]]
        made[name] = [[row[k].tolist() for row, k in zip(data[x], kept)] for x in ("advantages", "returns")]
    return made


common.answer(
    "skyrl",
    {
        "dense": advantages(DenseGenerator(Generator(), common.token_rewards(GIVEN, "dense"), messages=True)),
        "sparse": advantages(DenseGenerator(Generator(), common.token_rewards(GIVEN, "sparse"))),
        "theirs": advantages(Generator()),
    },
)
