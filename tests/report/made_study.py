"""Run folders of a study that was never run: made-up policies and notebooks, for whatever reads or draws them."""

import base64
import io
import json
from dataclasses import dataclass

import nbformat
import numpy as np
import pandas as pd
from PIL import Image

from dense_rlhf.files import finite
from dense_rlhf.view import display

ARMS = {  # arm: sources, gold after training, KL, seconds an update
    "sparse": (["terminal"], 0.35, 2.2, (1.0, 0.0, 0.6)),
    "uniform": (["uniform"], 0.30, 2.1, (1.0, 0.0, 0.6)),
    "shap": (["shap"], 0.33, 2.2, (1.0, 0.7, 0.6)),
    "shap-signed": (["shap"], 0.80, 4.5, (1.0, 0.7, 0.6)),
    "bo-shap": (["shap", "terminal"], 0.45, 2.6, (1.0, 0.7, 0.6)),
}
VERSIONS = {"torch": "2.13.0", "trl": "1.16.0", "shap": "0.51.0"}


@dataclass
class Study:
    """As much of `StudyParams` as reports read."""

    study: str
    arms: dict
    seeds: tuple[int, ...] = (0, 1, 2)
    comparisons: tuple = ()


def record(job, notebook, dataset="reviews", arm="sparse", seed=0, status="ok", error=""):
    return {
        "job": job,
        "notebook": notebook,
        "arm": arm,
        "seed": seed,
        "status": status,
        "dataset": dataset,
        "error": error,
        "key": "k",
        "started": 1.0 + seed,
        "seconds": 75.0,
        "commit": "0123abc",
        "python": "3.11.7",
        "machine": "x86_64",
        "cores": 2,
        "versions": VERSIONS,
        "artefacts": {},
    }


def evaluation(gold, kl, seed, texts, prompts=60):
    rng = np.random.default_rng([seed, int(100 * gold)])
    reference = np.random.default_rng(seed).normal(0, 0.9, prompts)
    scores = gold + rng.normal(0, 0.1) + reference + rng.normal(0, 0.7, prompts)
    word = [texts[i % len(texts)] for i in range(prompts)]
    return pd.DataFrame(
        {
            "prompt": word,
            "response": word,
            "proxy": scores,
            "gold": scores,
            "kl": rng.normal(kl, 1, prompts),
            "reference_gold": reference,
            "reference_proxy": reference,
            "win": (scores > reference) * 1.0,
            "win_lc": ((scores > reference) * 1.0).mean(),
        }
    )


def history(gold, kl, seed, updates=20):
    rng, share = np.random.default_rng([seed, int(100 * gold)]), np.linspace(0, 1, updates)
    return pd.DataFrame(
        {
            "update": range(updates),
            "gold": gold * share + rng.normal(0, 0.05, updates),
            "proxy": gold * share,
            "kl": kl * share,
            "value_loss": 0.2 + rng.normal(0, 0.01, updates),
            "explained_variance": 0.5,
        }
    )


def picture():
    """A figure's bytes: a line on white."""
    pixels = np.full((240, 400, 3), 255, np.uint8)
    for x in range(400):
        pixels[120 + int(80 * np.sin(x / 40)) : 126 + int(80 * np.sin(x / 40)), x] = (213, 94, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def notebook(texts, title="A made-up notebook"):
    """An executed notebook that shows `texts` by every helper of `display`, prints them, and has a careless cell."""
    v4 = nbformat.v4
    shown = [
        display.table(pd.DataFrame({"text": texts, "value": 1.5}), "Rows of a dataset").data,
        display.heatmaps(list(texts), {text: [0.5] * len(texts) for text in list(texts)[:3]}, "Tokens").data,
        *(display.note(text).data + display.check(text, True).data for text in texts),
        display.text_table({text: text for text in texts}).data,
    ]
    outputs = [v4.new_output("display_data", {"text/html": html, "text/plain": "x"}) for html in shown]
    careless = [
        v4.new_output("display_data", {"text/html": text, "text/markdown": text, "text/plain": text}) for text in texts
    ]
    drawn = v4.new_output(
        "display_data", {"image/png": picture(), "text/plain": "x"}, metadata={"image/png": {"alt": "a wave"}}
    )
    streams = [v4.new_output("stream", name=name, text="\n".join(texts)) for name in ("stdout", "stderr")]
    cells = [
        v4.new_markdown_cell(f"# {title}\n\nMath: $r'_t = s \\sum_i w_i E_{{i,t}}$.\n\n$$a^2$$"),
        v4.new_markdown_cell("## First part"),
        v4.new_code_cell("show(<everything> & more)", outputs=[drawn, *outputs]),
        v4.new_markdown_cell("## Second part"),
        v4.new_code_cell("careless()", outputs=careless + streams),
    ]
    return v4.new_notebook(cells=cells, metadata={"language_info": {"name": "python"}})


def run(root, study, one, tables=(), metrics=None, texts=("a good film",), params=()):
    """Write one run folder, `params` beside those of its arm; returns its record. Without the package's care for
    power failures, which takes most of the time."""
    folder = root / "runs" / study / one["job"]
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in dict(tables).items():
        frame.to_csv(folder / f"{name}.csv", index=False)
    (folder / "metrics.json").write_text(json.dumps(finite(metrics or {"warnings": []})))
    sources = ARMS.get(one["arm"], (["shap"],))[0]
    lines = [f"arm: {one['arm']}", f"seed: {one['seed']}", f"shape_sources: {sources}", *params]
    (folder / "params.yaml").write_text("\n".join(lines))
    (folder / "log.txt").write_text("as it went\n")
    nbformat.write(notebook(list(texts), one["job"]), folder / "notebook.ipynb")
    (folder / "run.json").write_text(json.dumps(one))
    return one


def policies(root, study, datasets=("reviews",), seeds=(0, 1, 2), arms=ARMS, texts=("a good film",)):
    """A trained policy for each dataset, arm and seed."""
    records = []
    for dataset in datasets:
        for arm, (_, gold, kl, seconds) in arms.items():
            for seed in seeds:
                spent = pd.DataFrame([seconds] * 20, columns=["sample", "explain", "learn"])
                tables = {
                    "evaluation": evaluation(gold, kl, seed, texts),
                    "test": evaluation(gold, kl, seed, texts),
                    "history": history(gold, kl, seed),
                    "seconds": spent.assign(update=range(20)),
                }
                one = record(f"{dataset}-04_ppo-{arm}-seed{seed}", "04_ppo", dataset, arm, seed)
                records.append(run(root, study, one, tables, texts=texts))
    return records


def broken(root, study, texts=("a good film",)):
    """Runs that failed in several ways; one left no notebook."""
    records = []
    for seed, status in enumerate(("failed", "timeout", "killed", "cancelled", "stale")):
        one = record(
            f"reviews-04_ppo-lime-seed{seed}",
            "04_ppo",
            arm="lime",
            seed=seed,
            status=status,
            error=f"ValueError: {texts[seed % len(texts)]}",
        )
        records.append(run(root, study, one, texts=texts))
    (root / "runs" / study / records[-1]["job"] / "notebook.ipynb").unlink()
    return records


def ablation(root, study, texts=("a good film",)):
    """An ablation whose metrics and tables carry `texts` as names and values."""
    metrics = {"gain": {text: {"mean": 0.1, "low": -0.1, "high": 0.3} for text in texts}, "kind": list(texts)}
    metrics |= {f"metric {text}": text for text in texts}
    tables = {
        "results": pd.DataFrame({"arm": list(texts), "gold": 0.5, **{f"c{i} {t}": t for i, t in enumerate(texts[:20])}})
    }
    return [run(root, study, record("ppo", "ablations/ppo"), tables, metrics, texts)]


def whole(root, texts=("a good film",), seeds=(0, 1), arms=ARMS):
    """Two studies: policies on two datasets with failures and single notebooks, and an ablation: (study, records)."""
    few = {name: arms[name] for name in list(arms)[:3]}
    first = policies(root, "made", ("reviews",), seeds, arms, texts) + broken(root, "made", texts)
    first += policies(root, "made", ("hh_rlhf",), seeds[:1], few, texts)
    search = record("05_bayesian_optimisation-bo-shap", "05_bayesian_optimisation", arm="bo-shap")
    singles = [record(name, name) for name in ("01_reward_model", "02_attribution")] + [search]
    first += [run(root, "made", one, texts=texts) for one in singles]
    second = ablation(root, "ablated", texts)
    return [(Study("made", ARMS | {"lime": None}, seeds), first), (Study("ablated", {}, (0,)), second)]
