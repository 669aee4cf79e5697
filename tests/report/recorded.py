"""A made-up study whose runs have finished: as `made_study`, with hashes and provenance."""

import json

import made_study

from dense_rlhf.report.record import Compared, Outline
from dense_rlhf.runs import RunFolder, artefacts

ARMS = {arm: made_study.ARMS[arm] for arm in ("sparse", "shap")}
COMMIT = "0123456789" * 4


def study(root, seeds=(0, 1), texts=("a good film",), commit=COMMIT, dataset="reviews"):
    """Run folders below `root`/runs/made of two arms and an ablation: (outline, runs)."""
    for name in ("notebooks", "params"):
        (root / name).mkdir(parents=True, exist_ok=True)
    made_study.policies(root, "made", seeds=seeds, arms=ARMS, texts=texts)
    one = made_study.record("ppo", "ablations/ppo")
    answer = {"question": "Is it?", "at": "equal KL", "verdict": "undecided", "why": f"Too few seeds. {texts[-1]}"}
    metrics = {"gain": {"mean": 0.1, "low": -0.1, "high": 0.3}, "answers": [answer], "warnings": []}
    made_study.run(root, "made", one, metrics=metrics, texts=texts)
    runs = [RunFolder(path.parent) for path in sorted((root / "runs" / "made").glob("*/run.json"))]
    for run in runs:
        with open(run.file("params.yaml"), "a") as file:
            file.write(f"\ndata_name: {dataset}\n")
        record = json.loads(run.file("run.json").read_text())
        if record["commit"] == "0123abc":
            record |= {"commit": commit, "key": f"{record['seed']}{'ab' * 7}", "artefacts": artefacts(run.path)}
            run.file("run.json").write_text(json.dumps(record))
    compared = (Compared("reviews", ""),)
    return Outline("made", tuple(ARMS), tuple(seeds), compared, "dense-rlhf run params/made.yaml"), runs
