"""Searches of functions whose best is known: regret by trials, and how many trials a small regret takes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd

from dense_rlhf.bayesopt import audit
from dense_rlhf.bayesopt.known_functions import Landscape, landscape
from dense_rlhf.bayesopt.reported_functions import REPORTED
from dense_rlhf.bayesopt.search import Search
from dense_rlhf.bayesopt.space import Point, Space
from dense_rlhf.config.params import DimensionParams
from dense_rlhf.files import Journal, content_key
from dense_rlhf.fingerprint import source_key
from dense_rlhf.statistics import Interval, t_interval

CHECKPOINTS = (10, 15, 20, 25, 30, 40, 50, 60, 80, 100)  # numbers of trials after which the regret is noted
OBSERVED = ("random", "sobol")  # strategies without a model: their answer is the best observation
AUDITED = "gp"
RIVALS = ("saas", "additive", "nei")  # alternatives to `gp`, with trials and seeds of their own


@dataclass
class Experiment:
    """A landscape of `d` weights seen through normal noise of standard deviation 1 / `snr`, and its evaluations.

    The noise of evaluation n follows from `seed`, so it is the same for every method.
    """

    landscape: str
    d: int
    snr: float
    seed: int
    points: list[Point] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def __post_init__(self):
        self._noise = np.random.default_rng([self.seed, 7])

    @cached_property
    def truth(self) -> Landscape:
        return landscape(self.landscape, self.d, self.seed)

    def __call__(self, point: Point) -> float:
        """One noisy evaluation."""
        value = float(self.truth.function(np.array(point)) + self._noise.standard_normal() / self.snr)
        self.points.append(tuple(point))
        self.values.append(value)
        return value

    def run(self, search: Search, trials: int) -> Search:
        """The same search, continued until it has `trials` observations; it is told the noise, as replicates would."""
        while len(search.values) < trials:
            point = search.suggest()
            search.observe(point, self(point), 1 / self.snr)
        return search

    def best_observed(self) -> Point:
        return self.points[int(np.argmax(self.values))]

    def regret(self, point: Sequence[float]) -> float:
        """How far the noise-free value of a point falls short of the best, in sd of the function."""
        return max(float(self.truth.regret(np.array(point))), 0.0)


@dataclass(frozen=True)
class Case:
    """One search of `trials` evaluations by one strategy; `seed` decides landscape, noise and search."""

    landscape: str
    d: int
    snr: float
    strategy: str
    seed: int
    trials: int


def cases(params: DimensionParams) -> list[Case]:
    """Every search that the parameters ask for, seeds outermost, so that an unfinished set is balanced.

    On a flat landscape every answer is right, so only the audited strategy runs.
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
    """Run one search; a row for each of `checkpoints` and each method: n, method, regret (noise-free), and the audit's.

    A strategy without a model answers with its best observation, every other with its incumbent. `gp on sobol` is the
    model's incumbent among Sobol points, so the lead of `gp` over it comes from choosing the points.
    """
    experiment = Experiment(case.landscape, case.d, case.snr, case.seed)
    search, rows = Search(Space(case.d), case.strategy, seed=case.seed), []
    for n in checkpoints(case.trials):
        rows += [{"n": n} | row for row in _answers(experiment.run(search, n), experiment)]
    return rows


def _answers(search: Search, experiment: Experiment) -> list[dict]:
    rows = []
    if search.strategy in OBSERVED:
        rows.append({"method": search.strategy, "regret": experiment.regret(experiment.best_observed())})
    if search.strategy != "random":
        method = "gp on sobol" if search.strategy == "sobol" else search.strategy
        rows.append({"method": method, "regret": experiment.regret(search.incumbent()[0])})
    if search.strategy == AUDITED:
        verdict = audit.verdict(search, [f"source {i}" for i in range(search.space.d)])
        rows[-1] |= {name: getattr(verdict, name) for name in ("kind", "p", "tolerance", "more")}
        rows[-1] |= {"expected": verdict.regret.expected, "seen": audit.signal_to_noise(search)}
    return rows


def run_searches(planned: Sequence[Case], ledger: Path, progress: Callable = iter) -> pd.DataFrame:
    """`search_known` of every case, with landscape, d, snr, seed, `function`: the landscape of one seed, and `group`:
    "reported", or "tuning" for functions that settings of the search may have been chosen by.

    Each search is a line of `ledger`, so a comparison that was interrupted resumes after the last line.
    """
    journal, code, tables = Journal(ledger), source_key("dense_rlhf.bayesopt.known_searches"), []
    for case in progress(planned):
        line = journal.get_or_make(content_key([asdict(case), CHECKPOINTS, code]), partial(_timed, case))
        about = {name: line[name] for name in ("landscape", "d", "snr", "seed")}
        about["group"] = "reported" if case.landscape in REPORTED else "tuning"
        tables.append(pd.DataFrame(line["rows"]).assign(**about, function=f"{case.landscape}{case.seed}"))
    return pd.concat(tables, ignore_index=True)


def _timed(case: Case) -> dict:
    start = time.perf_counter()
    return asdict(case) | {"rows": search_known(case), "seconds": time.perf_counter() - start}


# ---------------------------------------------------------------------------------------------------- regret by trials


def common(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of `run_searches` at those functions and checkpoints that every method has."""
    methods = rows["method"].nunique()
    return rows[rows.groupby(["d", "snr", "function", "n"])["method"].transform("nunique") == methods]


def _by_function(rows: pd.DataFrame) -> pd.DataFrame:
    """Regrets of one d, snr and method: a row a function, a column a checkpoint."""
    return rows.pivot(index="function", columns="n", values="regret")


def curve(rows: pd.DataFrame) -> list[Interval]:
    """Mean regret at each checkpoint with its 95 % t interval over functions, of one d, snr and method."""
    table = _by_function(rows)
    return [t_interval(table[n], (0, math.inf)) for n in table]


def needed(rows: pd.DataFrame, goal: float, repeats: int = 1000) -> Interval:
    """Trials after which the mean regret stays at most `goal`, for one d, snr and method; infinity if it ends above.

    Linear between checkpoints; the first stands for everything before it. 95 % bootstrap interval over functions.
    """
    table = _by_function(rows)
    regret, n = table.to_numpy(), table.columns.to_numpy()
    picks = np.random.default_rng(0).integers(len(regret), size=(repeats, len(regret)))
    reached = [_reached(n, regret[pick].mean(0), goal) for pick in picks]
    low, high = np.quantile(reached, [0.025, 0.975], method="inverted_cdf")  # infinities cannot be interpolated
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
    """Regret of method `theirs` less that of `ours` after n trials of the same functions, for one snr, over all d."""
    table = rows[rows["n"] == n].pivot(index=["d", "function"], columns="method", values="regret")
    return t_interval((table[theirs] - table[ours]).dropna())


def calibration(rows: pd.DataFrame, bins: int = 5) -> pd.DataFrame:
    """Mean expected and true regret of audits, in `bins` of equally many by the expected one, and all together.

    Columns expected, regret, low and high (95 % t interval of the true mean over audits, as if independent), audits.
    """
    ranks = rows["expected"].rank(method="first")
    places = np.ceil(ranks / len(rows) * min(bins, len(rows)))
    means = [of for _, of in rows.groupby(places)] + [rows]
    truth = [t_interval(of["regret"], (0, math.inf)) for of in means]
    about = [{"expected": of["expected"].mean(), "audits": len(of)} for of in means]
    return pd.DataFrame([row | {"regret": t.mean, "low": t.low, "high": t.high} for row, t in zip(about, truth)])
