"""The arithmetic of docs/scale.md: what params/hh_rlhf.yaml would take with larger models on H100s.

    python benchmarks/scale.py > table.md

Operations and bytes are those of `dense-rlhf check`. The seconds of a step are multiplied by what it took over what was
computed for it, at the largest model measured (gpu.jsonl, one H200, which has the H100's chip).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from transformers import LlamaConfig

from dense_rlhf.config.params import RunParams
from dense_rlhf.config.study import load_study
from dense_rlhf.runner import cost, timing
from dense_rlhf.runner.plan import expand, updates_of

ROOT = Path(__file__).resolve().parents[1]
STUDY = ROOT / "params" / "hh_rlhf.yaml"
H100 = next(device for device in timing.DEVICES if device.name == "H100")
PROMPT, TOKEN_BUDGET = 128, 32768  # tokens
ARMS = {"sparse": ["terminal"], "SHAP": ["shap"]}
ONE, EIGHT = "1B on one H100", "8B on eight H100"
SHAPES = {  # Llama 3's; policy and reward model are alike
    ONE: (1, {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}),
    EIGHT: (8, {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}),
}


def models(name: str, params: RunParams) -> cost.Models:
    shape = dict(vocab_size=128256, num_attention_heads=32, num_key_value_heads=8, num_labels=1, pad_token_id=0)
    config = LlamaConfig(**shape, **SHAPES[name][1])
    return cost.assemble(cost.empty_policy(config, "bfloat16"), cost.empty_classifier(config, "bfloat16"), params)


def row(name: str) -> list[str]:
    """A table's row: seconds of an update by step and arm, GiB a card, GPU hours of the study."""
    cards = SHAPES[name][0]
    study = load_study(STUDY)
    each = replace(study.run.ppo, rollouts=study.run.ppo.rollouts // cards, minibatch=study.run.ppo.minibatch // cards)
    each = replace(each, micro_batch=min(each.micro_batch, each.minibatch))
    params = replace(study.run, ppo=each)
    made = models(name, params)
    seconds = {
        arm: {work.step: work.seconds(H100) for work in timing.time(made, params, PROMPT, sources)}
        for arm, sources in ARMS.items()
    }
    updates = Counter()
    for job in expand(study):
        shape = study.arms.get(job.params.arm)
        updates["SHAP" if shape and set(shape.sources) - {"terminal", "uniform"} else "sparse"] += updates_of(job)
    hours = {arm: updates[arm] * sum(seconds[arm].values()) / 3600 for arm in ARMS}
    gib = cost.peak(cost.memory(made, params, PROMPT, TOKEN_BUDGET)) / 2**30
    steps = [seconds["SHAP"][step] for step in ("sample", "score", "explain", "log-probabilities", "update")]
    ratio = sum(seconds["SHAP"].values()) / sum(seconds["sparse"].values())
    return [name, *(f"{one:.2f}" for one in steps), f"{ratio:.2f}", f"{gib:.0f}", f"{cards * sum(hours.values()):.0f}"]


def table() -> str:
    head = ["policy and reward model", "sample", "score", "explain", "log-probabilities", "update"]
    head += ["SHAP over sparse", "GiB a card", "GPU hours"]
    rows = [head, ["---"] * len(head), *map(row, SHAPES)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


if __name__ == "__main__":
    print(table())
