"""How many trials do more weights need? Searches of functions whose best is known, each a line of a ledger."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from dense_rlhf.bayesopt import audit
from dense_rlhf.bayesopt.known_functions import Landscape, landscape
from dense_rlhf.bayesopt.search import Search
from dense_rlhf.bayesopt.space import Space
from dense_rlhf.config.params import DimensionParams
from dense_rlhf.files import Journal, content_key
from dense_rlhf.fingerprint import source_key
from dense_rlhf.statistics import Interval, t_interval

CHECKPOINTS = (10, 15, 20, 25, 30, 40, 50, 60, 80, 100)  # trials after which a search is asked for its answer
OBSERVED = ("random", "sobol")  # strategies without a model: they answer with the best they saw
AUDITED = "gp"
RIVALS = ("saas", "additive", "nei")  # of `gp`, beside the question: trials and seeds of their own


@dataclass(frozen=True)
class Case:
    """One search: a landscape over `d` weights, seen through normal noise of standard deviation 1 / `snr`."""

    landscape: str
    d: int
    snr: float
    strategy: str
    seed: int  # of the landscape, the noise and the search
    trials: int


def cases(params: DimensionParams) -> list[Case]:
    """Every search that the parameters ask for. Seeds are outermost, so that what is there is comparable.

    On a flat landscape, where all answers are right, only the audit is asked. `RIVALS` have trials and seeds of
    their own.
    """
    trials = {strategy: min(params.trials, params.rival_trials) for strategy in RIVALS}
    return [
        Case(name, d, snr, strategy, seed, trials.get(strategy, params.trials))
        for seed in range(params.seeds)
        for snr in params.snr
        for d in params.d
        for name in params.landscapes
        for strategy in params.strategies
        if (name != "flat" or strategy == AUDITED) and not (strategy in RIVALS and seed >= params.rival_seeds)
    ]


def checkpoints(trials: int) -> list[int]:
    return [n for n in CHECKPOINTS if n < trials] + [trials]


def search_known(case: Case) -> list[dict]:
    """Run one search, and ask it after each of `checkpoints`: a row a method, whose `regret` is without noise.

    Without a model the answer is the best observation, else the incumbent. `gp on sobol` is the incumbent of the model
    on Sobol's points: what is left of the lead of `gp` over it is due to choosing them. The noise of trial n is the
    same for every strategy, and its size is known to the search, as replicates would tell it.
    """
    truth, search = landscape(case.landscape, case.d, case.seed), Search(Space(case.d), case.strategy, seed=case.seed)
    noise = np.random.default_rng([case.seed, 7]).standard_normal(case.trials) / case.snr
    rows, asked = [], checkpoints(case.trials)
    for n in range(1, case.trials + 1):
        point = search.suggest()
        search.observe(point, float(truth.function(np.array(point)) + noise[n - 1]), 1 / case.snr)
        if n in asked:
            rows += [{"n": n} | row for row in _answers(search, truth)]
    return rows


def _answers(search: Search, truth: Landscape) -> list[dict]:
    """What a search answers now, by method."""
    rows = []
    if search.strategy in OBSERVED:
        seen = search.points[int(np.argmax(search.values))]
        rows.append({"method": search.strategy, "regret": _regret(truth, seen)})
    if search.strategy != "random":
        method = "gp on sobol" if search.strategy == "sobol" else search.strategy
        rows.append({"method": method, "regret": _regret(truth, search.incumbent()[0])})
    if search.strategy == AUDITED:
        found = audit.verdict(search, [f"source {i}" for i in range(search.space.d)])
        rows[-1] |= {
            "kind": found.kind,
            "p": found.p,
            "expected": found.regret.expected,
            "tolerance": found.tolerance,
            "more": found.more,
            "seen": signal_to_noise(search),
        }
    return rows


def _regret(truth: Landscape, point: Sequence[float]) -> float:
    return max(float(truth.regret(np.array(point))), 0.0)


def run_searches(params: DimensionParams, ledger: Path, progress: Callable = iter) -> pd.DataFrame:
    """Every search of `cases`, a row a method and checkpoint: landscape, d, snr, seed, n, method, regret, verdict.

    Each search is a line of `ledger`: a comparison that was cut short goes on behind the last.
    """
    journal, code, tables = Journal(ledger), source_key("dense_rlhf.bayesopt.trials_needed"), []
    for case in progress(cases(params)):
        line = journal.get_or_make(content_key([asdict(case), CHECKPOINTS, code]), partial(_timed, case))
        tables.append(pd.DataFrame(line["rows"]).assign(**{k: line[k] for k in ("landscape", "d", "snr", "seed")}))
    return pd.concat(tables, ignore_index=True)


def _timed(case: Case) -> dict:
    start = time.perf_counter()
    return asdict(case) | {"rows": search_known(case), "seconds": time.perf_counter() - start}


# ---------------------------------------------------------------------------------------------------- tables


def unsearched(params: DimensionParams) -> pd.DataFrame:
    """What no search at all would fall short: columns landscape, d, equal weights, best source, random weights.

    Means over the seeds' landscapes.
    """
    rows = []
    for name in [name for name in params.landscapes if name != "flat"]:
        for d in params.d:
            truths = [landscape(name, d, seed) for seed in range(params.seeds)]
            drawn = np.random.default_rng(0).dirichlet(np.ones(d), 1024)
            found = [(t.regret(np.full(d, 1 / d)), t.regret(np.eye(d)).min(), t.regret(drawn).mean()) for t in truths]
            rows.append([name, d, *np.mean(found, 0)])
    return pd.DataFrame(rows, columns=["landscape", "d", "equal weights", "best source", "random weights"])


def regrets(found: pd.DataFrame) -> pd.DataFrame:
    """Columns d, snr, method, n, regret and `function`: a landscape of one seed. Flat ones, without regret, are out."""
    sloped = found[found["landscape"] != "flat"]
    return sloped.assign(function=sloped["landscape"] + sloped["seed"].astype(str)).drop(columns=["landscape", "seed"])


def common(rows: pd.DataFrame) -> pd.DataFrame:
    """Of `regrets`, those functions and checkpoints that every method knows."""
    methods = rows["method"].nunique()
    return rows[rows.groupby(["d", "snr", "function", "n"])["method"].transform("nunique") == methods]


def _by_function(rows: pd.DataFrame) -> pd.DataFrame:
    """Regrets of one d, snr and method: a row a function, a column a checkpoint."""
    return rows.pivot(index="function", columns="n", values="regret")


def curve(rows: pd.DataFrame) -> list[Interval]:
    """Mean regret after each checkpoint with its 95 % t interval over functions, of one d, snr and method."""
    table = _by_function(rows)
    return [t_interval(table[n]) for n in table]


def needed(rows: pd.DataFrame, goal: float, repeats: int = 1000) -> Interval:
    """Trials from which on the mean regret is at most `goal`, of one d, snr and method; infinity where it ends above.

    On a straight line between checkpoints; the first stands for all before it. 95 % bootstrap interval over functions.
    """
    table = _by_function(rows)
    regret, n = table.to_numpy(), table.columns.to_numpy()
    picks = np.random.default_rng(0).integers(len(regret), size=(repeats, len(regret)))
    drawn = [_reached(n, regret[pick].mean(0), goal) for pick in picks]
    low, high = np.quantile(drawn, [0.025, 0.975], method="inverted_cdf")  # between infinities there is no mean
    return Interval(_reached(n, regret.mean(0), goal), float(low), float(high))


def _reached(n: np.ndarray, regret: np.ndarray, goal: float) -> float:
    above = np.flatnonzero(regret > goal)
    if not len(above):
        return float(n[0])
    i = above[-1]
    if i + 1 == len(n):
        return math.inf
    return float(n[i] + (n[i + 1] - n[i]) * (regret[i] - goal) / (regret[i] - regret[i + 1]))


def gain(rows: pd.DataFrame, n: int, ours: str, theirs: str) -> Interval:
    """Regret of method `theirs` less that of `ours` after n trials on the same functions, of one snr, over all d."""
    table = rows[rows["n"] == n].pivot(index=["d", "function"], columns="method", values="regret")
    return t_interval((table[theirs] - table[ours]).dropna())


def growth(trials: Mapping[int, float]) -> float:
    """Trials that each further source costs, by least squares; NaN unless every d reaches the goal."""
    return float(np.polyfit(*zip(*trials.items()), 1)[0]) if np.isfinite(list(trials.values())).all() else np.nan


def signal_to_noise(search: Search, seed: int = 0) -> float:
    """Sd of the posterior mean over Sobol points by that of one observation: too low while the model knows little."""
    mean, _ = search.posterior(search.space.sobol(256, seed))
    return float(mean.std() / np.sqrt(audit.noise_variance(search).mean()))


def verdicts(found: pd.DataFrame) -> pd.DataFrame:
    """How often the audit says what: a row snr, d, n and `flat` (or not), the share of each kind, and `searches`.

    `true`: of those that say converged, the share whose regret is within the tolerance that the audit named.
    """
    audited = found[found["method"] == AUDITED].assign(flat=lambda t: t["landscape"] == "flat")
    rows = []
    for (snr, d, n, flat), group in audited.groupby(["snr", "d", "n", "flat"]):
        said = group[group["kind"] == audit.CONVERGED]
        shares = {kind: (group["kind"] == kind).mean() for kind in (audit.CONVERGED, audit.MORE, audit.FLAT)}
        true = (said["regret"] <= said["tolerance"]).mean() if len(said) else np.nan
        rows.append({"snr": snr, "d": d, "n": n, "flat": flat} | shares | {"true": true, "searches": len(group)})
    return pd.DataFrame(rows)
