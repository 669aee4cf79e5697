"""Kill a training at random moments and start it again: nothing may be lost.

    python tests/training/kill_points.py 100

Each point trains in a forked process, kills it with SIGKILL at a random moment one to three times, lets the last try
run to its end, and compares the metrics file with that of an unbroken training, byte by byte.
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from conftest import DEVICE, PROMPTS, SENTENCES, make_policy

from dense_rlhf.config.params import AttributionParams, PolicyParams, PPOParams, RewardParams
from dense_rlhf.data import Dataset
from dense_rlhf.files import write_text
from dense_rlhf.fingerprint import source_key
from dense_rlhf.models.language_models import LanguageModel
from dense_rlhf.models.policy import PolicyWithValue
from dense_rlhf.models.reward_model import RewardModel
from dense_rlhf.models.tiny_recipe import train_tokenizer
from dense_rlhf.models.train_reward_model import fresh_classifier
from dense_rlhf.models.word_judge import AdditiveJudge
from dense_rlhf.training.inner_loop import Recipe, Session, train_policy
from dense_rlhf.training.task import Task
from dense_rlhf.types import LabelledText, RewardShape

SHAPE = RewardShape(("shap", "terminal"), (0.5, 0.5), "signed")
PARAMS = PPOParams(
    updates=8, rollouts=4, max_new_tokens=6, minibatch=2, lr=1e-2, checkpoint_every=1, scale_rewards=True, kl_target=0.5
)


def make_task() -> Task:
    tokenizer = train_tokenizer(SENTENCES, 300)
    torch.manual_seed(0)
    reference = PolicyWithValue(make_policy(tokenizer)).requires_grad_(False).eval()
    classifier = fresh_classifier(RewardParams(hidden=16, layers=1, heads=2), tokenizer).eval().to(DEVICE)
    text = [LabelledText("the film was good", 1)]
    data = Dataset("inline", "r0", text, text, PROMPTS, PROMPTS[:4], text)
    judge = AdditiveJudge("gold", {chr(c): c / 1000 for c in range(97, 123)})
    proxy = RewardModel(classifier, tokenizer)
    return Task(data, LanguageModel(reference.lm, tokenizer, "m0"), reference, proxy, judge, judge, PolicyParams())


def train(task: Task, folder: Path, shape: RewardShape = SHAPE) -> None:
    trained = train_policy(task, Recipe(shape, PARAMS, AttributionParams(), 0), Session(folder=folder))
    write_text(folder / "metrics.csv", trained.history.to_csv(index=False))


def forked(task: Task, folder: Path, seconds: float | None) -> bool:
    """Train in a forked process, killed after `seconds`; whether it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            train(task, folder)
            os._exit(0)
        finally:
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return status == 0


def kill_points(points: int, seed: int = 0) -> tuple[int, list[int]]:
    """How many trainings were killed before their end, and the points whose metrics differ from an unbroken one's."""
    torch.set_num_threads(1)  # a fork would lose the others
    task, dice, root, killed, lost = make_task(), random.Random(seed), Path(tempfile.mkdtemp()), 0, []
    source_key("dense_rlhf.training.inner_loop")  # hashed once, in the parent
    start = time.time()
    assert forked(task, root / "unbroken", None)
    whole, wanted = time.time() - start, (root / "unbroken" / "metrics.csv").read_bytes()
    for point in range(points):
        folder = root / str(point)
        for _ in range(dice.randint(1, 3)):
            killed += not forked(task, folder, dice.uniform(0, whole))
        ended = forked(task, folder, None)
        if not ended or (folder / "metrics.csv").read_bytes() != wanted:
            lost.append(point)
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(root)
    return killed, lost


if __name__ == "__main__":
    points = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    start = time.time()
    killed, lost = kill_points(points)
    took = time.time() - start
    print(f"{points} kill points, {killed} trainings killed, {len(lost)} lost {lost or ''} ({took:.0f} s)")
    sys.exit(bool(lost))
