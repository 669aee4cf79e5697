"""Run folders of a study whose truth is known: arms walk along one frontier of gold over KL, each at its own pace."""

import json
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from made_study import record

UPDATES, PROMPTS = 24, 40
SLOPE = 0.05  # gold a nat, of every arm without an `edge`


@dataclass(frozen=True)
class Planted:
    """One arm: what it is paid, how far it walks, and by how much it is better there than the others."""

    sources: tuple[str, ...] = ("terminal",)
    weights: tuple[float, ...] = (1.0,)
    normalise: str = "softmax"
    kl: float = 2.0  # after `UPDATES`
    edge: float = 0.0  # of gold, at any KL
    loss: float = 1.0  # value loss; explained variance is 1 less it
    spread: float = 0.02  # of gold over seeds
    same: str = ""  # another arm, whose very results it has
    search: dict | None = None  # metrics and parameters of its search
    searches: int = 1


SPARSE = Planted()
ARMS = {
    "sparse": SPARSE,
    "uniform": Planted(("uniform",), kl=2.1, loss=0.6),
    "shuffled": Planted(("shuffled",), normalise="signed", kl=2.4, loss=0.9),
    "shap": Planted(("shap",), kl=2.2, loss=0.6),
    "shap-signed": Planted(("shap",), normalise="signed", kl=6.7, loss=0.3),
}


@dataclass(frozen=True)
class Study:
    """Where it is, and what its runs share."""

    folder: object  # runs/STUDY
    arms: dict = field(default_factory=lambda: dict(ARMS))
    seeds: tuple[int, ...] = tuple(range(5))
    longer: dict = field(default_factory=dict)  # arm: updates of trainings that went on
    params: dict = field(default_factory=dict)  # flat, of every run

    def write(self):
        for name, arm in self.arms.items():
            for seed in self.seeds:
                self._policy(name, arm, seed)
                if name in self.longer:
                    self._policy(name, arm, seed, self.longer[name])
            for search in range(arm.searches if arm.search else 0):
                self._search(name, arm, search)
        return self

    def _policy(self, name, arm, seed, updates=None):
        regime = "longer" if updates else "own"
        job = f"04_ppo-{name}{'-longer' * bool(updates)}-seed{seed}"
        folder, rng = self._folder(job), np.random.default_rng([seed, *(arm.same or name).encode()])
        kl = arm.kl * np.arange(1, (updates or UPDATES) + 1) / UPDATES
        gold = SLOPE * kl + arm.edge + rng.normal(0, 0.01) + rng.normal(0, 0.002, len(kl))
        losses = arm.loss * np.exp(rng.normal(0, 0.02) + rng.normal(0, 0.01, len(kl)))
        rows = {"update": range(len(kl)), "kl": kl, "gold": gold, "proxy": gold, "value_loss": losses}
        rows |= {"value_error_mc": losses, "explained_variance": 1 - losses, "explained_variance_mc": 1 - losses}
        pd.DataFrame(rows).to_csv(folder / "history.csv", index=False)
        spent = {"update": range(len(kl)), "sample": 1.0, "explain": 0.5 * ("shap" in arm.sources), "learn": 1.0}
        pd.DataFrame(spent).to_csv(folder / "seconds.csv", index=False)
        for table in ("evaluation", "test"):
            judged = self._judged(arm, SLOPE * kl[-1] + arm.edge, kl[-1], rng)
            judged.to_csv(folder / f"{table}.csv", index=False)
        flat = {"arm": name, "seed": seed, "regime": regime, "shape_sources": list(arm.sources)}
        flat |= {"shape_weights": list(arm.weights), "shape_normalise": arm.normalise, "shape_temperature": 1.0}
        self._end(folder, job, "04_ppo", flat, regime)

    def _judged(self, arm, gold, kl, rng):
        noise = np.random.default_rng(0).normal(size=PROMPTS)
        noise -= noise.mean()
        mean = gold + arm.spread * rng.normal()
        columns = {"gold": mean + noise, "proxy": mean + noise, "kl": kl + 0.1 * rng.normal() + noise}
        return pd.DataFrame(columns | {"win": (noise > -0.5) * 1.0, "reference_gold": noise, "reference_proxy": noise})

    def _search(self, name, arm, seed):
        job = f"05_bayesian_optimisation-{name}-seed{seed}"
        folder = self._folder(job)
        (folder / "metrics.json").write_text(json.dumps(arm.search["metrics"]))
        self._end(folder, job, "05_bayesian_optimisation", {"arm": name, "seed": seed} | arm.search["params"], "own")

    def _end(self, folder, job, notebook, flat, regime):
        flat = {
            "evaluation_margin": 0.1,
            "ppo_lam": 0.95,
            "ppo_rollouts": 40,
            "reward_seed": 0,
            "attribution_seed": flat["seed"],
        } | flat
        flat |= self.params
        (folder / "params.yaml").write_text("\n".join(f"{key}: {value}" for key, value in flat.items()))
        dataset = "reviews" if regime == "own" else f"reviews-{regime}"
        one = record(job, notebook, dataset, flat["arm"], flat["seed"]) | {"regime": regime}
        (folder / "run.json").write_text(json.dumps(one))

    def _folder(self, job):
        (folder := self.folder / job).mkdir(parents=True)
        return folder
