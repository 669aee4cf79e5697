"""A study's results as plain values, from which indexes, comparison pages, claims and `summary.json` are made.

Reads only metrics, tables and parameters of run folders, never a notebook's outputs.
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
    paired,
    summarise,
    values_at_kl,
    welch,
)
from dense_rlhf.types import InputError

if TYPE_CHECKING:
    import pandas as pd

CONTROLS = {"uniform", "random", "shuffled"}
SPARSE, CONTROL, DENSE = "sparse", "control", "dense"
TABLES = {"test": "test prompts, used for no choice", "evaluation": "validation prompts, which searches also used"}
OWN = ("arm", "seed", "threads", "shape", "run", "bo")  # parameters, by first word, in which paired runs may differ
STEP = "ppo_lr"  # so may this one: every arm has its own step size


@dataclass(frozen=True)
class Arm:
    """Scores, intervals and costs of one arm on one dataset; gains are over the baseline on the same prompts."""

    name: str
    kind: str  # sparse, control or dense; reference: the untrained policy
    seeds: tuple[int, ...]
    gold: Interval
    iqm: Interval
    kl: Interval | None = None
    win: Interval | None = None
    win_lc: Interval | None = None  # win rate, corrected to responses of equal length
    gain: Difference | None = None
    gain_at_kl: Difference | None = None
    improves: Interval | None = None
    seconds: float | None = None  # of training, median over seeds
    explain: float | None = None  # share of `seconds` spent explaining
    search: float = 0.0  # seconds of the one search for its weights
    trials: int = 0  # of that search; 0 if the weights are fixed
    sources: tuple[str, ...] = ()
    normalise: str = ""
    path: tuple[float, ...] = ()  # gold while training, mean over seeds


Judged = Mapping[str, Mapping[int, "pd.DataFrame"]]  # arm -> seed -> judgements by prompt


@dataclass(frozen=True, eq=False)
class Finding:
    """All arms of one dataset, in the study's order, and the data to compare them."""

    dataset: str
    baseline: str
    prompts: int
    table: str  # one of `TABLES`, which the judgements are from
    judged: Judged = field(repr=False)
    history: pd.DataFrame | None = field(repr=False)
    settings: Mapping[str, Mapping[int, object]] = field(repr=False)  # arm -> seed -> parameters except `OWN`
    shaping: Mapping = field(repr=False, default_factory=dict)  # metrics of notebook 03
    arms: dict[str, Arm] = field(default_factory=dict)

    def of_kind(self, kind: str) -> list[Arm]:
        """The arms of one kind, highest gold first."""
        return sorted((arm for arm in self.arms.values() if arm.kind == kind), key=lambda arm: -arm.gold.mean)

    def pairs(self, ours: str, theirs: str) -> bool:
        """Whether a seed gives both arms the same prompts in the same order from the same start: all parameters except
        the shape are equal. The reference has no training, and answered the same prompts."""
        a, b = self.settings.get(ours, {}), self.settings.get(theirs, {})
        both = [seed for seed in a if seed in b]
        return "reference" in (ours, theirs) or bool(both) and all(a[seed] == b[seed] for seed in both)

    def compare(self, ours: str, theirs: str, column: str = "gold") -> Difference | None:
        """Held-out judgements of one arm less those of another; None if either has none."""
        sides = [
            {seed: float(t[column].mean()) for seed, t in self.judged.get(arm, {}).items() if column in t}
            for arm in (ours, theirs)
        ]
        return self._test(ours, theirs, *sides)

    def compare_late(self, ours: str, theirs: str, column: str) -> Difference | None:
        """Difference of a training metric, averaged over the second half of training."""
        return self._test(ours, theirs, *(self.late(arm, column) for arm in (ours, theirs)))

    def late(self, arm: str, column: str) -> dict[int, float]:
        """Mean of a metric over the second half of training, by seed, without seeds where it is NaN."""
        if self.history is None or column not in self.history:
            return {}
        runs = self.history[(self.history["arm"] == arm) & (self.history["update"] >= self.history["update"].max() / 2)]
        return {int(seed): float(value) for seed, value in runs.groupby("seed")[column].mean().dropna().items()}

    def compare_at_kl(self, ours: str, theirs: str, column: str = "gold") -> Difference | None:
        """Difference of a training metric at the largest KL that both arms of a seed reach; None if unknown."""
        if self.history is None or not {"kl", "update", column} <= set(self.history):
            return None
        try:
            values = values_at_kl(self.history, ours, theirs, column)
            return (paired if self.pairs(ours, theirs) else welch)(*values)
        except (InputError, LookupError):  # no seed in common, or only NaN
            return None

    def _test(self, ours: str, theirs: str, a: Mapping[int, float], b: Mapping[int, float]) -> Difference | None:
        if not a or not b:
            return None
        both = [seed for seed in a if seed in b]
        if self.pairs(ours, theirs) and both:
            return paired([a[seed] for seed in both], [b[seed] for seed in both])
        return welch(list(a.values()), list(b.values()))


def findings(runs: Iterable[RunFolder], order: Sequence[str] = ()) -> list[Finding]:
    """A finding per dataset on which one of the finished `runs` trained a policy; arms in `order`."""
    by_dataset: dict[str, list[RunFolder]] = {}
    for run in runs:
        by_dataset.setdefault(str(run.record().get("dataset")), []).append(run)
    return [finding for name, group in by_dataset.items() if (finding := _finding(name, group, order))]


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
    finding = Finding(dataset, baseline, prompts, name, judged, _curves(policies, "history"), settings, shaping)
    searches = {_record(r).get("arm"): r for r in runs if _record(r).get("notebook") == "05_bayesian_optimisation"}
    seconds = _curves(policies, "seconds")
    for arm in ["reference", *(a for a in order if a in kinds), *(a for a in kinds if a not in order)]:
        about = _about(arm, shapes.get(arm), searches.get(arm)) | _cost(seconds, arm)
        finding.arms[arm] = _arm(finding, arm, kinds.get(arm, "reference"), about)
    return finding


def _record(run: RunFolder) -> dict:
    return run.record()


def _shape(run: RunFolder) -> tuple[tuple[str, ...], str]:
    """Sources and normalisation of the run's reward; without parameters, the arm's name is the source."""
    flat = run.parameters()
    return tuple(flat.get("shape_sources") or [_record(run).get("arm")]), str(flat.get("shape_normalise", ""))


def kind(arm: str, sources: Sequence[str]) -> str:
    """`SPARSE`, `DENSE`, or `CONTROL`: a reward by token that ignores what the tokens are."""
    if set(sources) <= {"terminal", "sparse"}:
        return SPARSE
    return CONTROL if set(sources) <= CONTROLS | {"terminal"} else DENSE


def _settings(run: RunFolder) -> object:
    """The parameters that must be equal for runs of one seed to be pairs; without parameters, the run's own folder."""
    given = run.parameters().items()
    flat = {name: value for name, value in given if name.split("_")[0] not in OWN and name != STEP}
    return flat if run.file("params.yaml").exists() else str(run.path)


def judgements(runs: Iterable[RunFolder], table: str) -> dict[str, dict[int, pd.DataFrame]]:
    """Judgements of the trained policies and the reference, by arm and seed, from one of `TABLES`."""
    by_arm: dict[str, dict[int, pd.DataFrame]] = {"reference": {}}
    for run in runs:
        record = _record(run)
        if record.get("notebook") == "04_ppo" and len(judged := run.load_table(table)):
            by_arm.setdefault(record["arm"], {})[record["seed"]] = judged
            reference = judged[["reference_gold", "reference_proxy"]].set_axis(["gold", "proxy"], axis=1)
            by_arm["reference"].setdefault(record["seed"], reference)
    return by_arm


def _curves(policies: list[RunFolder], name: str) -> pd.DataFrame | None:
    """History or seconds of all policies; None if no run has any."""
    having = [run for run in policies if run.file(f"{name}.csv").exists()]
    return histories(having, name) if having else None


def _about(arm: str, shape: tuple[tuple[str, ...], str] | None, search: RunFolder | None) -> dict:
    sources, normalise = shape or ((), "")
    about = {"sources": sources, "normalise": normalise}
    if search is None:
        return about
    trials = int(search.parameters().get("bo_trials") or 1)
    return about | {"search": _record(search).get("seconds") or 0.0, "trials": trials}


def _arm(finding: Finding, name: str, what: str, about: Mapping) -> Arm:
    tables, base = finding.judged.get(name, {}), finding.judged[finding.baseline]
    gold, rivals = ([float(t["gold"].mean()) for t in side.values()] for side in (tables, base))
    columns = [c for c in ("gold", "kl", "win", "win_lc") if all(c in t for t in tables.values())]
    fields = {c: summarise({name: list(tables.values())}, c)[name] for c in columns}
    fields |= {"iqm": interquartile_mean([gold]), "path": _path(finding.history, name)}
    if name != finding.baseline:
        at_kl = finding.compare_at_kl(name, finding.baseline) if what != "reference" else None
        gain = finding.compare(name, finding.baseline)
        fields |= {"gain": gain, "gain_at_kl": at_kl, "improves": improvement([gold], [rivals])}
    return Arm(name, what, tuple(sorted(tables)), **fields, **about)


def _cost(seconds: pd.DataFrame | None, arm: str) -> dict[str, float]:
    """Seconds of one training and the share spent explaining, if recorded."""
    columns = ["sample", "explain", "learn"]
    rows = None if seconds is None else seconds[seconds["arm"] == arm]
    if rows is None or rows.empty or not set(columns) <= set(rows):
        return {}
    parts = rows.groupby("seed")[columns].sum()
    whole = parts.sum(axis=1)
    return {"seconds": float(whole.median()), "explain": float((parts["explain"] / whole.where(whole > 0)).median())}


def _path(history: pd.DataFrame | None, arm: str) -> tuple[float, ...]:
    rows = None if history is None else history[history["arm"] == arm]
    return () if rows is None or rows.empty else tuple(map(float, rows.groupby("update")["gold"].mean()))


def across(results: Sequence[Finding]) -> dict[str, dict[str, Interval]]:
    """For each arm that all datasets have, `iqm`: the interquartile mean over datasets and seeds of the gain over the
    baseline, in standard deviations of the reference's gold score; `improves`: the probability of improvement."""
    names = [name for name in results[0].arms if all(name in f.arms and f.baseline in f.judged for f in results)]
    scaled = {name: [_scaled(f, name) for f in results] for name in names}
    base = [_scaled(f, f.baseline) for f in results]
    return {
        name: {"iqm": interquartile_mean(scaled[name]), "improves": improvement(scaled[name], base)}
        for name in names
        if any(f.baseline != name for f in results)
    }


def _scaled(finding: Finding, arm: str) -> list[float]:
    """Gold of each seed less the baseline's mean, in standard deviations over the reference's responses."""
    import numpy as np

    reference = np.concatenate([t["gold"].to_numpy() for t in finding.judged["reference"].values()])
    centre = np.mean([t["gold"].mean() for t in finding.judged[finding.baseline].values()])
    spread = float(reference.std()) or 1.0
    return [float(t["gold"].mean() - centre) / spread for t in finding.judged[arm].values()]
