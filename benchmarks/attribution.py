"""Explaining one batch of rollouts: our batched SHAP and LIME against the libraries, response by response.

    python benchmarks/attribution.py [--quick]      one JSON object a line; runs alternate between the two sides

Same reward model, responses and numbers of evaluations; the numbers agree to 1e-4 (tests/test_attribution.py).
"""

import argparse
import json
import statistics
import time

from dense_rlhf.attribution import attribute
from dense_rlhf.attribution.library import library_lime, library_shap
from dense_rlhf.bilevel import load_task
from dense_rlhf.params import AttributionParams, DataParams, PolicyParams, PPOParams, RewardParams


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="end within a minute")
    quick = parser.parse_args().quick
    repeats, responses, reward = (3, 8, RewardParams(steps=20)) if quick else (7, 32, RewardParams())
    task = load_task(DataParams(), PolicyParams(), reward, PPOParams())
    rollout = task.roll(task.reference, task.data.validation_prompts[:responses], PPOParams(), seed=0)
    params = AttributionParams(permutations=2)
    for source, library in {"shap": library_shap, "lime": library_lime}.items():
        def ours(source=source):
            attribute(task.reward_model, rollout, [source], params)

        def peer(library=library):
            for row in range(responses):
                library(task.reward_model, rollout, row, params)

        ours(), peer()  # imports and caches
        pairs = [(seconds(ours), seconds(peer)) for _ in range(repeats)]
        ratio = statistics.median(theirs / own for own, theirs in pairs)
        own, theirs = (statistics.median(column) for column in zip(*pairs))
        print(json.dumps({"benchmark": "attribution", "case": f"{source}, {responses} responses of "
                          f"{rollout.mask.shape[1]} tokens", "peer": source, "ratio": round(ratio, 2), "unit": "s",
                          "repeats": repeats, "ours": round(own, 4), "theirs": round(theirs, 4)}))  # fmt: skip


if __name__ == "__main__":
    main()
