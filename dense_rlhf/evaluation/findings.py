"""What a study found, as plain values: the indexes, the comparison pages, the claims and `summary.json` are made of it.

Reads run folders only: metrics, tables and parameters, never a notebook's outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dense_rlhf.runs import RunFolder, histories
from dense_rlhf.statistics import (
    Difference,
    Interval,
    improvement,
    interquartile_mean,
    over_seeds,
    paired,
    values_at_kl,
    welch,
)
from dense_rlhf.types import InputError

if TYPE_CHECKING:
    import pandas as pd

CONTROLS = {"uniform", "random", "shuffled"}
SPARSE, CONTROL, DENSE = "sparse", "control", "dense"
TABLES = {"test": "test prompts, which chose nothing", "evaluation": "validation prompts, on which searches chose too"}
OWN = ("arm", "seed", "threads", "shape", "run")  # first words of parameters that may differ between pairs


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
    win_lc: Interval | None = None  # were its responses as long as the reference's
    gain: Difference | None = None
    gain_at_kl: Difference | None = None
    improves: Interval | None = None
    seconds: float | None = None  # of training, median over seeds
    explain: float | None = None  # share of it that went into explaining
    search: float = 0.0  # seconds that learning its weights took, once
    trials: int = 0  # of that search; 0: its weights are fixed
    sources: tuple[str, ...] = ()
    normalise: str = ""
    path: tuple[float, ...] = ()  # gold while training, mean over seeds


Judged = Mapping[str, Mapping[int, "pd.DataFrame"]]  # arm -> seed -> judgements by prompt


@dataclass(frozen=True, eq=False)
class Finding:
    """All arms of one dataset, in the study's order, and what they are compared with."""

    dataset: str
    baseline: str
    prompts: int
    table: str  # of `TABLES`: where the judgements are from
    judged: Judged = field(repr=False)
    history: pd.DataFrame | None = field(repr=False)
    settings: Mapping[str, Mapping[int, object]] = field(repr=False)  # arm -> seed -> parameters but `OWN`
    shaping: Mapping = field(repr=False, default_factory=dict)  # metrics of notebook 03
    arms: dict[str, Arm] = field(default_factory=dict)

    def of_kind(self, kind: str) -> list[Arm]:
        """The arms of one kind, highest gold first."""
        return sorted((arm for arm in self.arms.values() if arm.kind == kind), key=lambda arm: -arm.gold.mean)

    def pairs(self, ours: str, theirs: str) -> bool:
        """Whether a seed gives both arms the same prompts in the same order from the same start: all that they were
        told is alike but the shape of their rewards. The reference has no training, and answered the same prompts."""
        a, b = self.settings.get(ours, {}), self.settings.get(theirs, {})
        both = [seed for seed in a if seed in b]
        return "reference" in (ours, theirs) or bool(both) and all(a[seed] == b[seed] for seed in both)

    def compare(self, ours: str, theirs: str, column: str = "gold") -> Difference | None:
        """Held-out judgements of one arm less those of another; None where one has none."""
        sides = [
            {seed: float(t[column].mean()) for seed, t in self.judged.get(arm, {}).items() if column in t}
            for arm in (ours, theirs)
        ]
        return self._test(ours, theirs, *sides)

    def compare_late(self, ours: str, theirs: str, column: str) -> Difference | None:
        """A metric of training, mean over its second half, of one arm less that of another."""
        return self._test(ours, theirs, *(self.late(arm, column) for arm in (ours, theirs)))

    def late(self, arm: str, column: str) -> dict[int, float]:
        """Mean of a metric over the second half of training, by seed, of seeds where it is a number."""
        if self.history is None or column not in self.history:
            return {}
        runs = self.history[(self.history["arm"] == arm) & (self.history["update"] >= self.history["update"].max() / 2)]
        return {int(seed): float(value) for seed, value in runs.groupby("seed")[column].mean().dropna().items()}

    def compare_at_kl(self, ours: str, theirs: str, column: str = "gold") -> Difference | None:
        """A metric of training where both arms of a seed first reach the largest KL that both know, at the latest."""
        if self.history is None or not {"kl", "update", column} <= set(self.history):
            return None
        try:
            values = values_at_kl(self.history, ours, theirs, column)
            return (paired if self.pairs(ours, theirs) else welch)(*values)
        except (InputError, LookupError):  # no seed that both have, or a path without numbers
            return None

    def _test(self, ours: str, theirs: str, a: Mapping[int, float], b: Mapping[int, float]) -> Difference | None:
        if not a or not b:
            return None
        both = [seed for seed in a if seed in b]
        if self.pairs(ours, theirs) and both:
            return paired([a[seed] for seed in both], [b[seed] for seed in both])
        return welch(list(a.values()), list(b.values()))


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
    name = "test" if all(run.file("test.csv").exists() for run in policies) else "evaluation"
    judged, shapes = judgements(policies, name), {_record(run)["arm"]: _shape(run) for run in policies}
    kinds = {arm: kind(arm, sources) for arm, (sources, _) in shapes.items()}
    sparse = [arm for arm, what in kinds.items() if what == SPARSE]
    baseline = "sparse" if "sparse" in sparse else sparse[0] if sparse else "reference"
    settings: dict[str, dict[int, object]] = {}
    for run in policies:
        settings.setdefault(_record(run)["arm"], {})[_record(run)["seed"]] = _settings(run)
    prompts = min(len(t) for by in judged.values() for t in by.values())
    shaping = next((run.load_json("metrics.json") for run in runs if _record(run).get("notebook") == "03_shaping"), {})
    found = Finding(dataset, baseline, prompts, name, judged, _curves(policies, "history"), settings, shaping)
    searches = {_record(r).get("arm"): r for r in runs if _record(r).get("notebook") == "05_bayesian_optimisation"}
    seconds = _curves(policies, "seconds")
    for arm in ["reference", *(a for a in order if a in kinds), *(a for a in kinds if a not in order)]:
        about = _about(arm, shapes.get(arm), searches.get(arm)) | _cost(seconds, arm)
        found.arms[arm] = _arm(found, arm, kinds.get(arm, "reference"), about)
    return found


def _record(run: RunFolder) -> dict:
    return run.load_json("run.json")


def _shape(run: RunFolder) -> tuple[tuple[str, ...], str]:
    """Sources and normalisation of the run's reward; of a run without parameters, its arm's name as the source."""
    flat = run.parameters()
    return tuple(flat.get("shape_sources") or [_record(run).get("arm")]), str(flat.get("shape_normalise", ""))


def kind(arm: str, sources: Sequence[str]) -> str:
    """What an arm of these sources is: sparse reward, a control that knows nothing of tokens, or dense."""
    if set(sources) <= {"terminal", "sparse"}:
        return SPARSE
    return CONTROL if set(sources) <= CONTROLS | {"terminal"} else DENSE


def _settings(run: RunFolder) -> object:
    """The parameters that must be alike for runs of one seed to be pairs; of a run without any, its own folder."""
    flat = {name: value for name, value in run.parameters().items() if name.split("_")[0] not in OWN}
    return flat if run.file("params.yaml").exists() else str(run.path)


def judgements(runs: Iterable[RunFolder], table: str) -> dict[str, dict[int, pd.DataFrame]]:
    """Judgements of the trained policies among `runs`, by arm and seed, from one of `TABLES`; the reference answered
    the same prompts once a seed."""
    found: dict[str, dict[int, pd.DataFrame]] = {"reference": {}}
    for run in runs:
        record = _record(run)
        if record.get("notebook") == "04_ppo" and len(judged := run.load_table(table)):
            found.setdefault(record["arm"], {})[record["seed"]] = judged
            reference = judged[["reference_gold", "reference_proxy"]].set_axis(["gold", "proxy"], axis=1)
            found["reference"].setdefault(record["seed"], reference)
    return found


def _curves(policies: list[RunFolder], name: str) -> pd.DataFrame | None:
    """History or seconds of all policies; None where no run left any."""
    having = [run for run in policies if run.file(f"{name}.csv").exists()]
    return histories(having, name) if having else None


def _about(arm: str, shape: tuple[tuple[str, ...], str] | None, search: RunFolder | None) -> dict:
    sources, normalise = shape or ((), "")
    about = {"sources": sources, "normalise": normalise}
    if search is None:
        return about
    return about | {
        "search": _record(search).get("seconds") or 0.0,
        "trials": int(search.parameters().get("bo_trials") or 1),
    }


def _arm(found: Finding, name: str, what: str, about: Mapping) -> Arm:
    tables, base = found.judged.get(name, {}), found.judged[found.baseline]
    gold, rivals = ([float(t["gold"].mean()) for t in side.values()] for side in (tables, base))
    columns = {
        c: over_seeds([t[c].to_numpy() for t in tables.values()])
        for c in ("kl", "win", "win_lc")
        if all(c in t for t in tables.values())
    }
    gains = (
        {}
        if name == found.baseline
        else {
            "gain": found.compare(name, found.baseline),
            "improves": improvement([gold], [rivals]),
            "gain_at_kl": found.compare_at_kl(name, found.baseline) if what != "reference" else None,
        }
    )
    return Arm(
        name,
        what,
        tuple(sorted(tables)),
        over_seeds([t["gold"].to_numpy() for t in tables.values()]),
        interquartile_mean([gold]),
        path=_path(found.history, name),
        **columns,
        **gains,
        **about,
    )


def _cost(seconds: pd.DataFrame | None, arm: str) -> dict[str, float]:
    """Seconds of one training and the share that explaining took, where known."""
    rows = None if seconds is None else seconds[seconds["arm"] == arm]
    if rows is None or rows.empty or not {"sample", "explain", "learn"} <= set(rows):
        return {}
    parts = rows.groupby("seed")[["sample", "explain", "learn"]].sum()
    whole = parts.sum(axis=1)
    return {"seconds": float(whole.median()), "explain": float((parts["explain"] / whole.where(whole > 0)).median())}


def _path(history: pd.DataFrame | None, arm: str) -> tuple[float, ...]:
    rows = None if history is None else history[history["arm"] == arm]
    return () if rows is None or rows.empty else tuple(map(float, rows.groupby("update")["gold"].mean()))


def across(found: Sequence[Finding]) -> dict[str, dict[str, Interval]]:
    """Of arms that all datasets have: gain over the baseline in standard deviations of the reference's gold score, the
    interquartile mean over datasets and seeds, and the probability of improvement."""
    names = [name for name in found[0].arms if all(name in f.arms and f.baseline in f.judged for f in found)]
    scaled = {name: [_scaled(f, name) for f in found] for name in names}
    base = [_scaled(f, f.baseline) for f in found]
    return {
        name: {"iqm": interquartile_mean(scaled[name]), "improves": improvement(scaled[name], base)}
        for name in names
        if any(f.baseline != name for f in found)
    }


def _scaled(found: Finding, arm: str) -> list[float]:
    """Gold of each seed, less the baseline's mean, in standard deviations of the reference's responses."""
    import numpy as np

    reference = np.concatenate([t["gold"].to_numpy() for t in found.judged["reference"].values()])
    centre = np.mean([t["gold"].mean() for t in found.judged[found.baseline].values()])
    spread = float(reference.std()) or 1.0
    return [float(t["gold"].mean() - centre) / spread for t in found.judged[arm].values()]
