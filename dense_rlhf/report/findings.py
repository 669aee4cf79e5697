"""What a study found, as plain values: the indexes, the comparison pages and `summary.json` are made of it.

Reads run folders only: metrics, tables and parameters, never a notebook's outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dense_rlhf.runs import RunFolder, histories
from dense_rlhf.statistics import Interval, bootstrap, difference, difference_at_kl, improvement, interquartile_mean

if TYPE_CHECKING:
    import pandas as pd

CONTROLS = {"uniform", "random", "shuffled"}
SPARSE, CONTROL, DENSE = "sparse", "control", "dense"


@dataclass(frozen=True)
class Arm:
    """One arm on one dataset: how good, how sure, at what cost. Gains are over the baseline on the same prompts."""

    name: str
    kind: str  # sparse, control or dense; reference: the untrained policy
    seeds: tuple[int, ...]
    gold: Interval
    iqm: Interval
    kl: Interval | None = None
    win: Interval | None = None
    gain: Interval | None = None
    gain_at_kl: Interval | None = None
    improves: Interval | None = None
    seconds: float | None = None  # of training, median over seeds
    explain: float | None = None  # share of it that went into explaining
    search: float = 0.0  # seconds that learning its weights took, once
    path: tuple[float, ...] = ()  # gold while training, mean over seeds

    @property
    def sure(self) -> bool:
        """Whether an interval of its gain at equal KL knows of more than one seed."""
        return len(self.seeds) > 1


@dataclass(frozen=True)
class Finding:
    """All arms of one dataset, in the study's order, and what they are compared with."""

    dataset: str
    arms: dict[str, Arm]
    baseline: str
    prompts: int
    judged: Mapping[str, Mapping[int, pd.DataFrame]] = field(repr=False)

    def of_kind(self, kind: str) -> list[Arm]:
        """The arms of one kind, highest gold first."""
        return sorted((arm for arm in self.arms.values() if arm.kind == kind), key=lambda arm: -arm.gold.mean)

    def gap(self, ours: str, theirs: str) -> Interval | None:
        """Gold of one arm less that of another on the seeds and prompts that both have."""
        return _gap(self.judged.get(ours, {}), self.judged.get(theirs, {}))


def findings(runs: Iterable[RunFolder], order: Sequence[str] = ()) -> list[Finding]:
    """One for each dataset on which a policy was trained, among finished `runs`; arms in `order`."""
    by_dataset: dict[str, list[RunFolder]] = {}
    for run in runs:
        by_dataset.setdefault(str(run.load_json("run.json").get("dataset")), []).append(run)
    return [found for name, group in by_dataset.items() if (found := _finding(name, group, order))]


def _finding(dataset: str, runs: list[RunFolder], order: Sequence[str]) -> Finding | None:
    policies = [run for run in runs if _record(run).get("notebook") == "04_ppo" and run.file("evaluation.csv").exists()]
    if not policies:
        return None
    judged, kinds = _judged(policies), {_record(run)["arm"]: kind(run) for run in policies}
    sparse = [arm for arm, what in kinds.items() if what == SPARSE]
    baseline = "sparse" if "sparse" in sparse else sparse[0] if sparse else "reference"
    curves = _curves(policies)
    searches = {_record(run).get("arm"): _record(run).get("seconds", 0.0) for run in runs
                if _record(run).get("notebook") == "05_bayesian_optimisation"}  # fmt: skip
    names = ["reference", *(a for a in order if a in kinds), *(a for a in kinds if a not in order)]
    arms = {name: _arm(name, kinds.get(name, "reference"), judged, baseline, curves, searches.get(name, 0.0))
            for name in names}  # fmt: skip
    return Finding(dataset, arms, baseline, min(len(t) for by in judged.values() for t in by.values()), judged)


def _record(run: RunFolder) -> dict:
    return run.load_json("run.json")


def kind(run: RunFolder) -> str:
    """What the run's arm is: sparse reward, a control that knows nothing of tokens, or dense."""
    import yaml

    path = run.file("params.yaml")
    flat = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    sources = set(flat.get("shape_sources") or [_record(run).get("arm")])
    if sources <= {"terminal", "sparse"}:
        return SPARSE
    return CONTROL if sources <= CONTROLS | {"terminal"} else DENSE


def _judged(policies: list[RunFolder]) -> dict[str, dict[int, pd.DataFrame]]:
    """Judgements by arm and seed; the reference answered the same prompts once a seed."""
    found: dict[str, dict[int, pd.DataFrame]] = {"reference": {}}
    for run in policies:
        table, record = run.load_table("evaluation"), _record(run)
        if len(table):
            found.setdefault(record["arm"], {})[record["seed"]] = table
            reference = table[["reference_gold", "reference_proxy"]].set_axis(["gold", "proxy"], axis=1)
            found["reference"].setdefault(record["seed"], reference)
    return found


def _curves(policies: list[RunFolder]) -> dict[str, pd.DataFrame | None]:
    """History and seconds of all policies; None where a run left none."""
    tables = {}
    for name in ("history", "seconds"):
        having = [run for run in policies if run.file(f"{name}.csv").exists()]
        tables[name] = histories(having, name) if having else None
    return tables


def _gap(ours: Mapping[int, pd.DataFrame], theirs: Mapping[int, pd.DataFrame]) -> Interval | None:
    both = [seed for seed in ours if seed in theirs and len(ours[seed]) == len(theirs[seed])]
    return difference([ours[s] for s in both], [theirs[s] for s in both]) if both else None


def _arm(name: str, what: str, judged: Mapping, baseline: str, curves: Mapping, search: float) -> Arm:
    tables, base = judged.get(name, {}), judged[baseline]
    gold = [table["gold"].to_numpy() for table in tables.values()]
    rivals = [table["gold"].to_numpy() for table in base.values()]
    compared = name != baseline
    seconds, explain = _cost(curves["seconds"], name)
    columns = {c: bootstrap([t[c].to_numpy() for t in tables.values()]) for c in ("kl", "win")
               if all(c in t for t in tables.values())}  # fmt: skip
    return Arm(
        name, what, tuple(sorted(tables)), bootstrap(gold), interquartile_mean([gold]), **columns,
        gain=_gap(tables, base) if compared else None,
        gain_at_kl=_at_kl(curves["history"], name, baseline) if compared and what != "reference" else None,
        improves=improvement([gold], [rivals]) if compared else None, seconds=seconds, explain=explain, search=search,
        path=_path(curves["history"], name),
    )  # fmt: skip


def _cost(seconds: pd.DataFrame | None, arm: str) -> tuple[float | None, float | None]:
    """Seconds of one training and the share that explaining took."""
    rows = None if seconds is None else seconds[seconds["arm"] == arm]
    if rows is None or rows.empty or not {"sample", "explain", "learn"} <= set(rows):
        return None, None
    parts = rows.groupby("seed")[["sample", "explain", "learn"]].sum()
    whole = parts.sum(axis=1)
    return float(whole.median()), float((parts["explain"] / whole.where(whole > 0)).median())


def _at_kl(history: pd.DataFrame | None, ours: str, theirs: str) -> Interval | None:
    if history is None or not {"kl", "gold", "proxy", "update"} <= set(history):
        return None
    seeds = [set(history[history["arm"] == arm]["seed"]) for arm in (ours, theirs)]
    both = history[history["seed"].isin(seeds[0] & seeds[1])]
    try:
        return difference_at_kl(both, ours, theirs) if len(both) else None
    except (LookupError, ValueError):  # a path without numbers
        return None


def _path(history: pd.DataFrame | None, arm: str) -> tuple[float, ...]:
    rows = None if history is None else history[history["arm"] == arm]
    return () if rows is None or rows.empty else tuple(map(float, rows.groupby("update")["gold"].mean()))


def across(found: Sequence[Finding]) -> dict[str, dict[str, Interval]]:
    """Of arms that all datasets have: gain over the baseline in standard deviations of the reference's gold score, the
    interquartile mean over datasets and seeds, and the probability of improvement."""
    names = [name for name in found[0].arms if all(name in f.arms and f.baseline in f.judged for f in found)]
    scaled = {name: [_scaled(f, name) for f in found] for name in names}
    base = [_scaled(f, f.baseline) for f in found]
    return {name: {"iqm": interquartile_mean(scaled[name]), "improves": improvement(scaled[name], base)}
            for name in names if any(f.baseline != name for f in found)}  # fmt: skip


def _scaled(found: Finding, arm: str) -> list[np.ndarray]:
    """Per-prompt gold of each seed, less the baseline's mean, in standard deviations of the reference's."""
    reference = np.concatenate([t["gold"].to_numpy() for t in found.judged["reference"].values()])
    centre = np.mean([t["gold"].mean() for t in found.judged[found.baseline].values()])
    spread = float(reference.std()) or 1.0
    return [(t["gold"].to_numpy() - centre) / spread for t in found.judged[arm].values()]

