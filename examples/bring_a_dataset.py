"""Bring a dataset: a function from parameters to a `Dataset`.

    python examples/bring_a_dataset.py

Every study and notebook takes it by its Python path, `data.name=bring_a_dataset:load_replies`, where this file lies in
the folder from which the study runs. In a checkout, a line in `DATASETS` of `dense_rlhf/data/__init__.py` gives it a
name, and the contract tests pick it up. (Pairs and labelled texts in a file need no code: see `docs/studies.md`.)
"""

import argparse
import random

from dense_rlhf.attribution.explain import explain
from dense_rlhf.config.params import DataParams, PPOParams, RewardParams, RunParams
from dense_rlhf.data import DATASETS, Dataset, review_prompts, split_reviews
from dense_rlhf.files import content_key
from dense_rlhf.models.train_reward_model import proxy_correct
from dense_rlhf.training.task import load_task

KIND = ("thank you for asking", "happy to help you", "we are sorry for that", "we will put it right today")
RUDE = ("that is not our problem", "stop asking us that", "read the terms you signed", "we do not care at all")
START = "about your order of last {} number {}: {} and then {}, "


def load_replies(params: DataParams, rows: int | None = None) -> Dataset:
    """Made-up replies of a shop, labelled 1 kind and 0 rude."""
    dice, replies = random.Random(0), []
    for number in range(rows or 1500):
        label = dice.randrange(2)
        day, phrases = dice.choice(("monday", "friday", "sunday")), dice.choices(KIND if label else RUDE, k=2)
        replies.append((START.format(day, number, *phrases) + dice.choice(KIND if label else RUDE), str(label)))
    splits, counts = split_reviews(replies)  # by content: no text serves two purposes
    train, validation = (review_prompts(splits[name], params.prompt_words, counts) for name in ("train", "validation"))
    taught = {name: splits[name] for name in ("reward", "gold", "test")}
    prompts = dict(train_prompts=train, validation_prompts=validation)
    return Dataset("replies", content_key(replies), **taught, **prompts, counts=dict(counts))


DATASETS["replies"] = load_replies


def main(reward_steps: int = 100) -> None:
    reward, ppo = RewardParams(steps=reward_steps, batch=32), PPOParams(rollouts=16, minibatch=16)
    task = load_task(RunParams(data=DataParams(name="replies"), reward=reward, ppo=ppo))
    print(task.data.counts)
    agreed = proxy_correct(task.reward_model, task.data.test, reward.window).mean()
    print(f"the reward model agrees with {agreed:.0%} of {len(task.data.test)} labels; its score of one reply:")
    model, reply = task.reward_model.model, task.data.test[0].text[40:]
    print(explain(model, task.tokenizer, "about your order: ", reply, end="eos"))  # its texts ended in EOS


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
