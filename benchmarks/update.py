"""CPU seconds of one update of the default study, by part and by arm: this checkout against another, in turns.

    python benchmarks/update.py OTHER_CHECKOUT [REPEATS] > update.jsonl

A process each, on one thread. Arms differ only in how they explain; the proxy has the study's size and random weights.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ARMS = {
    "sparse": ({"terminal": 1.0}, "softmax"),
    "uniform": ({"uniform": 1.0}, "softmax"),
    "shuffled": ({"shuffled": 1.0}, "signed"),
    "shap": ({"shap": 1.0}, "softmax"),
    "shap-signed": ({"shap": 1.0}, "signed"),
    "mixed": ({"shap": 0.5, "terminal": 0.5}, "softmax"),
}
PARTS = "sample", "score", "appraise", "learn"
WARM = 1  # update that is not counted


def work() -> None:
    """An update of a policy, explained for each arm in turn, for every line that arrives; answers with seconds."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from dense_rlhf import ppo
    from dense_rlhf.attribution import attribute
    from dense_rlhf.config.params import AttributionParams, DataParams, PolicyParams, PPOParams, RewardParams
    from dense_rlhf.data import load_data
    from dense_rlhf.models.language_models import load_policy
    from dense_rlhf.models.policy import PolicyWithValue, trainable_copy
    from dense_rlhf.models.reward_model import RewardModel
    from dense_rlhf.ppo.rollout import scored
    from dense_rlhf.ppo.sampling import prompt_batches
    from dense_rlhf.shaping.rewards import shape_rewards
    from dense_rlhf.types import RewardShape

    torch.set_num_threads(1)
    torch.manual_seed(0)
    params, proxy, lm = PPOParams(updates=16, lr=5e-4), RewardParams(), load_policy(PolicyParams())
    size = dict(hidden_size=proxy.hidden, num_hidden_layers=proxy.layers, num_attention_heads=proxy.heads)
    ids = dict(vocab_size=len(lm.tokenizer), pad_token_id=lm.tokenizer.pad_token_id, num_labels=1)
    scorer = LlamaForSequenceClassification(LlamaConfig(**size, **ids, intermediate_size=2 * proxy.hidden)).eval()
    reward_model = RewardModel(scorer.requires_grad_(False), lm.tokenizer, scale=0.1)
    reference = PolicyWithValue(lm.model).requires_grad_(False)
    learner = ppo.make_learner(trainable_copy(reference, PolicyParams()), params, 0)
    batches, generator = prompt_batches(load_data(DataParams()).train_prompts, params.rollouts, 0), torch.Generator()
    for _ in sys.stdin:
        clock = {"start": time.process_time()}

        def clocked(part, made, clock=clock):
            clock[part] = time.process_time()
            return made

        texts = ppo.sample_responses(learner.policy, next(batches), lm.tokenizer, params, generator)
        texts = clocked("score", scored(clocked("sample", texts), reward_model))
        rollout = ppo.appraise(learner.policy, reference, texts, params.temperature, params.micro_batch)
        clocked("appraise", rollout)
        for arm, (sources, normalise) in ARMS.items():
            shape = RewardShape(tuple(sources), tuple(sources.values()), normalise)
            credit = attribute(reward_model, rollout, list(sources), AttributionParams())
            rewards = clocked(arm, shape_rewards(rollout, credit, shape))
        clocked("learn", ppo.update(learner, rollout, learner.pay(rollout, rewards, params)[0], params))
        print(json.dumps({name: clock[name] - last for last, name in zip(clock.values(), list(clock)[1:])}), flush=True)


def main(other: str, repeats: int = 9) -> None:
    """One line a part and an arm: median seconds there and here, and their ratio over the repeats."""
    here, sides, rounds = Path(__file__).parent.parent, [], []
    for tree in (Path(other), here):
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        sides.append(subprocess.Popen([sys.executable, __file__, "--work"], env=environment, **pipes))
    for n in range(WARM + repeats):
        seconds = {}
        for side in sides if n % 2 else sides[::-1]:
            print("go", file=side.stdin, flush=True)
            seconds[side] = json.loads(side.stdout.readline())
        rounds.append([with_arms(seconds[side]) for side in sides])
        print(n, json.dumps(rounds[-1]), file=sys.stderr, flush=True)
    for side in sides:
        side.stdin.close()
    for name in rounds[0][0]:
        before, after = ([pair[k][name] for pair in rounds[WARM:]] for k in (0, 1))
        ratio = statistics.median(b / a for a, b in zip(before, after))
        medians = {"before": statistics.median(before), "after": statistics.median(after), "ratio": ratio}
        print(json.dumps({"part": name, "repeats": repeats} | {key: round(x, 3) for key, x in medians.items()}))


def with_arms(seconds: dict[str, float]) -> dict[str, float]:
    """The seconds of each part, then those of a whole update of each arm."""
    common = sum(seconds[part] for part in PARTS)
    return seconds | {f"update of {arm}": common + seconds[arm] for arm in ARMS}


if __name__ == "__main__":
    work() if sys.argv[1:] == ["--work"] else main(sys.argv[1], *map(int, sys.argv[2:]))
