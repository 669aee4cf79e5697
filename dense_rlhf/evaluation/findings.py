"""A study's results read from its run folders: what indexes, comparison pages, claims and `summary.json` are made of.

Reads only metrics, tables and parameters of run folders, never a notebook's outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from statistics import median
from typing import TYPE_CHECKING

from dense_rlhf.attribution.sources import placebos
from dense_rlhf.config.params import EvaluationParams
from dense_rlhf.evaluation.results import CONTROL, DENSE, PARTS, SPARSE, TABLES, Arm, Finding, Search
from dense_rlhf.runs import RunFolder, histories
from dense_rlhf.statistics import Difference, Interval, improvement, interquartile_mean, summarise

if TYPE_CHECKING:
    import pandas as pd

CONTROLS = "uniform", "random"  # and every placebo
OWN = ("arm", "seed", "threads", "shape", "run", "bo")  # parameters, by first word, in which paired runs may differ
SEARCH, TUNING = "05_bayesian_optimisation", "11_step_size"
STEP = "ppo_lr"  # so may this one: every arm has its own step size


class _ReadOnce(RunFolder):
    """A run folder whose record is read once."""

    def record(self) -> dict:
        return self._record

    @cached_property
    def _record(self) -> dict:
        return super().record()


def findings(runs: Iterable[RunFolder], order: Sequence[str] = ()) -> list[Finding]:
    """A finding per dataset on which one of the finished `runs` trained a policy; arms in `order`.

    Trainings at the common step size, and longer ones, belong to the finding of their dataset.
    """
    by_dataset: dict[str, dict[str, list[RunFolder]]] = {}
    for run in (_ReadOnce(run.path) for run in runs):
        regime = _regime(run)
        dataset = str(run.record().get("dataset")).removesuffix("" if regime == "own" else f"-{regime}")
        by_dataset.setdefault(dataset, {}).setdefault(regime, []).append(run)
    made = (_with_regimes(dataset, by_regime, order) for dataset, by_regime in by_dataset.items())
    return [finding for finding in made if finding]


def _regime(run: RunFolder) -> str:
    return str(run.record().get("regime") or "own")


def _with_regimes(dataset: str, runs: Mapping[str, list[RunFolder]], order: Sequence[str]) -> Finding | None:
    finding = _finding(dataset, runs.get("own", []), order)
    if finding is None:
        return None
    longer = [run for run in runs.get("longer", []) if run.file("history.csv").exists()]
    curves = {name: _curves(longer, name) for name in ("history", "seconds")}
    common = _finding(dataset, runs.get("common-step", []), order)
    finding = replace(finding, longer=curves["history"], longer_seconds=curves["seconds"], common=common)
    if finding.longer is not None and len(finding.levels) > 1:
        for name, arm in finding.arms.items():
            finding.arms[name] = replace(arm, **_at_levels(finding, name))
    return finding


def _finding(dataset: str, runs: Sequence[RunFolder], order: Sequence[str]) -> Finding | None:
    """The finding of trainings in one regime."""
    finished = [run for run in runs if run.record().get("notebook") == "04_ppo"]
    policies = [run for run in finished if any(run.file(f"{name}.csv").exists() for name in TABLES)]
    if not policies:
        return None
    name = "test" if all(run.file("test.csv").exists() for run in policies) else "evaluation"
    judged, kinds = judgements(policies, name), {}
    settings: dict[str, dict[int, dict | str]] = {}
    for run in policies:
        arm = run.record()["arm"]
        kinds.setdefault(arm, kind(arm, _sources(run)))
        settings.setdefault(arm, {})[run.record()["seed"]] = _settings(run)
    sparse = [arm for arm, what in kinds.items() if what == SPARSE]
    baseline = "sparse" if "sparse" in sparse else sparse[0] if sparse else "reference"
    prompts = min(len(t) for by in judged.values() for t in by.values())
    shaping = next((run.load_json("metrics.json") for run in runs if run.record().get("notebook") == "03_shaping"), {})
    curves = {"history": _curves(policies, "history"), "seconds": _curves(policies, "seconds")}
    data = dict(judged=judged, settings=settings, shaping=shaping, margin=_margin(policies)) | curves
    finding = Finding(dataset, baseline, prompts, name, **data)
    about = {arm: _about(arm, runs, policies) | _cost(curves["seconds"], arm) for arm in kinds}
    for arm in ["reference", *(a for a in order if a in kinds), *(a for a in kinds if a not in order)]:
        finding.arms[arm] = _arm(finding, arm, kinds.get(arm, "reference"), about.get(arm, {}))
    for arm in finding.arms.values():
        finding.arms[arm.name] = replace(arm, same_as=_same_as(finding, arm))
    return finding


def _sources(run: RunFolder) -> tuple[str, ...]:
    """Sources of the run's reward; without parameters, the arm's name is the source."""
    return tuple(run.parameters().get("shape_sources") or [run.record().get("arm")])


def kind(arm: str, sources: Sequence[str]) -> str:
    """`SPARSE`, `DENSE`, or `CONTROL`: a reward by token that ignores what the tokens are."""
    if set(sources) <= {"terminal", "sparse"}:
        return SPARSE
    return CONTROL if set(sources) <= {"terminal", *CONTROLS, *placebos()} else DENSE


def _settings(run: RunFolder) -> dict | str:
    """The parameters that must be equal for runs of one seed to be pairs; without parameters, the run's own folder."""
    given = run.parameters().items()
    flat = {name: value for name, value in given if name.split("_")[0] not in OWN and name != STEP}
    return flat if run.file("params.yaml").exists() else str(run.path)


def _margin(policies: Sequence[RunFolder]) -> float:
    """The strictest margin that the parameters state."""
    stated = [run.parameters().get("evaluation_margin") for run in policies]
    return min((float(margin) for margin in stated if margin is not None), default=EvaluationParams.margin)


def judgements(runs: Iterable[RunFolder], table: str) -> dict[str, dict[int, pd.DataFrame]]:
    """Judgements of the trained policies and the reference, by arm and seed, from one of `TABLES`."""
    by_arm: dict[str, dict[int, pd.DataFrame]] = {"reference": {}}
    for run in runs:
        record = run.record()
        if record.get("notebook") == "04_ppo" and len(judged := run.load_table(table)):
            by_arm.setdefault(record["arm"], {})[record["seed"]] = judged
            reference = judged[["reference_gold", "reference_proxy"]].set_axis(["gold", "proxy"], axis=1)
            by_arm["reference"].setdefault(record["seed"], reference)
    return by_arm


def _curves(policies: Sequence[RunFolder], name: str) -> pd.DataFrame | None:
    """History or seconds of all policies; None if no run has any."""
    having = [run for run in policies if run.file(f"{name}.csv").exists()]
    return histories(having, name) if having else None


# ---------------------------------------------------------------------------------------------------- arms


def _about(arm: str, runs: Sequence[RunFolder], policies: Sequence[RunFolder]) -> dict:
    """The rewards of an arm, its step size, and the searches for its weights."""
    own = [run for run in policies if run.record()["arm"] == arm]
    flat, steps = own[0].parameters(), {run.parameters().get(STEP) for run in own}
    rewards = tuple(_rewards(run) for run in sorted(own, key=lambda run: run.record()["seed"]))
    about = {"sources": _sources(own[0]), "normalise": str(flat.get("shape_normalise", "")), "rewards": rewards}
    about["step"] = steps.pop() if len(steps) == 1 else None
    about["run"] = median(run.record().get("seconds") or 0.0 for run in own) or None
    of_arm = [run for run in runs if run.record().get("arm") == arm]
    searches, tuned = ([r for r in of_arm if r.record().get("notebook") == what] for what in (SEARCH, TUNING))
    about |= {"search": _search(searches)} if searches else {}
    cost = tuned[0].load_json("metrics.json") if tuned else {}
    known = {"trainings", "updates", "seconds"} <= cost.keys()
    return about | ({"tuning": (cost["trainings"], cost["updates"], cost["seconds"])} if known else {})


def _rewards(run: RunFolder) -> tuple:
    """What a policy was paid, in a form that is equal for equal rewards; empty if its parameters do not tell."""
    flat = run.parameters()
    weights, how = flat.get("shape_weights"), str(flat.get("shape_normalise", ""))
    if not isinstance(weights, list) or flat.get("shape_features"):
        return ()
    paid = tuple(sorted((s, round(float(w), 9)) for s, w in zip(_sources(run), weights) if w > 0))
    temperature = str(flat.get("shape_temperature")) if how == "softmax" and paid != (("terminal", 1.0),) else ""
    return paid, temperature, how if paid != (("terminal", 1.0),) else ""


def _search(runs: Sequence[RunFolder]) -> Search:
    params, metrics = [run.parameters() for run in runs], [run.load_json("metrics.json") for run in runs]
    even = []
    for result in metrics:
        alone = [s for s, weight in zip(result.get("sources") or (), result.get("weights") or ()) if weight > 0.999]
        even += [float(ess) for s in alone if (ess := (result.get("ess") or {}).get(s)) is not None]
    return Search(
        number=len({run.record().get("seed") for run in runs}),
        trials=min(int(flat.get("bo_trials") or 1) for flat in params),
        strategy=str(params[0].get("bo_strategy") or "gp"),
        seconds=sum(run.record().get("seconds") or 0.0 for run in runs),
        updates=min(int(flat.get("bo_updates") or 0) for flat in params),
        even=tuple(even),
    )


def _arm(finding: Finding, name: str, what: str, about: Mapping) -> Arm:
    tables, base = finding.judged.get(name, {}), finding.judged[finding.baseline]
    gold, rivals = ([float(t["gold"].mean()) for t in side.values()] for side in (tables, base))
    columns = [c for c in ("gold", "kl", "win", "win_lc") if all(c in t for t in tables.values())]
    fields = {c: summarise({name: list(tables.values())}, c)[name] for c in columns}
    fields |= {"iqm": interquartile_mean([gold]), "path": _path(finding.history, name)}
    if name != finding.baseline:
        fields |= {"gain": finding.compare(name, finding.baseline), "improves": improvement([gold], [rivals])}
        fields |= _at_levels(finding, name)
    return Arm(name, what, tuple(sorted(tables)), **fields, **about)


def _same_as(finding: Finding, arm: Arm) -> str:
    """The arm of fixed weights, before this one if its own are fixed too, that paid the same in every seed, and whose
    policies answered alike; empty if there is none."""
    ours, names = finding.judged[arm.name], [*finding.arms]
    for other in finding.arms.values():
        earlier = arm.search or names.index(other.name) < names.index(arm.name)
        alike = all(arm.rewards) and arm.rewards and arm.rewards == other.rewards
        if other.name == arm.name or other.search or not earlier or not alike:
            continue
        theirs = finding.judged[other.name]
        if all(ours[seed]["gold"].tolist() == theirs[seed]["gold"].tolist() for seed in ours):
            return other.name
    return ""


def _at_levels(finding: Finding, name: str) -> dict[str, Difference | None]:
    """What an arm gains over the baseline at each of the KLs that arms are compared at."""
    if name in (finding.baseline, "reference"):
        return {}
    gains = [finding.compare_at_kl(name, finding.baseline, level=level) for level in finding.levels]
    return dict(zip(("gain_at_kl", "gain_far"), gains))


def _cost(seconds: pd.DataFrame | None, arm: str) -> dict[str, float]:
    """Seconds of one training and the share spent explaining, if recorded."""
    rows = None if seconds is None else seconds[seconds["arm"] == arm]
    if rows is None or rows.empty or not set(PARTS) <= set(rows):
        return {}
    parts = rows.groupby("seed")[list(PARTS)].sum()
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
