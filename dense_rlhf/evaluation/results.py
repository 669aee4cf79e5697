"""What a study found on one dataset, as plain values: its arms, and how any two of them differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from dense_rlhf.config.params import EvaluationParams
from dense_rlhf.evaluation.frontier import at_kl
from dense_rlhf.statistics import Difference, Interval, paired, t_interval, welch

if TYPE_CHECKING:
    import pandas as pd

SPARSE, CONTROL, DENSE = "sparse", "control", "dense"
TABLES = {"test": "test prompts, used for no choice", "evaluation": "validation prompts, which searches also used"}
DRAWN = {"reward_seed": "the reward model", "attribution_seed": "the explainer's samples"}  # or each seed its own
PARTS = ("sample", "explain", "learn")  # of the time that a training takes
SMOOTH = 3  # updates of the running means by which a path reaches a KL


@dataclass(frozen=True)
class Search:
    """What the searches behind an arm's weights had and chose."""

    number: int  # of searches with seeds of their own
    trials: int  # of each
    strategy: str
    seconds: float  # of all
    updates: int = 0  # of each trial
    even: tuple[float, ...] = ()  # ESS/T of the source, for each search that chose one source alone


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
    gain_at_kl: Difference | None = None  # at the low KL that every arm reaches
    gain_far: Difference | None = None  # at the KL where the fastest arm ends
    improves: Interval | None = None
    run: float | None = None  # seconds of a whole run by the clock, median over seeds
    seconds: float | None = None  # of it training
    explain: float | None = None  # share of `seconds` spent explaining
    search: Search | None = None  # None if the weights are fixed
    sources: tuple[str, ...] = ()
    normalise: str = ""
    rewards: tuple = ()  # by seed, equal for equal rewards
    step: float | None = None  # its step size
    tuning: tuple[int, int, float] | None = None  # trainings that chose it, their updates and seconds; None: no choice
    same_as: str = ""  # an arm before it with the same rewards and the same results
    path: tuple[float, ...] = ()  # gold while training, mean over seeds

    @property
    def trials(self) -> int:
        """Of each search for its weights; 0 if they are fixed."""
        return self.search.trials if self.search else 0


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
    settings: Mapping[str, Mapping[int, dict | str]] = field(repr=False)  # arm -> seed -> parameters of a pair
    shaping: Mapping = field(repr=False, default_factory=dict)  # metrics of notebook 03
    arms: dict[str, Arm] = field(default_factory=dict)
    seconds: pd.DataFrame | None = field(repr=False, default=None)  # of each update of `history`
    longer: pd.DataFrame | None = field(repr=False, default=None)  # histories of longer trainings, to reach a KL
    longer_seconds: pd.DataFrame | None = field(repr=False, default=None)
    common: Finding | None = field(repr=False, default=None)  # the same arms at one common step size
    margin: float = EvaluationParams.margin  # a difference that does not matter, as the parameters state it
    _crossed: dict = field(init=False, repr=False, default_factory=dict)  # what `at` has computed

    def of_kind(self, kind: str) -> list[Arm]:
        """The arms of one kind, highest gold first."""
        return sorted((arm for arm in self.arms.values() if arm.kind == kind), key=lambda arm: -arm.gold.mean)

    def pairs(self, ours: str, theirs: str) -> bool:
        """Whether a seed gives both arms the same prompts in the same order from the same start: all parameters except
        the shape are equal. The reference has no training, and answered the same prompts."""
        a, b = self.settings.get(ours, {}), self.settings.get(theirs, {})
        both = [seed for seed in a if seed in b]
        return "reference" in (ours, theirs) or bool(both) and all(a[seed] == b[seed] for seed in both)

    def parameter_values(self, parameter: str) -> list:
        """What the runs of all arms have for a parameter, each value once, in order."""
        flats = [flat for by_seed in self.settings.values() for flat in by_seed.values() if isinstance(flat, dict)]
        return sorted({flat[parameter] for flat in flats if parameter in flat})

    def compare(self, ours: str, theirs: str, column: str = "gold") -> Difference | None:
        """Held-out judgements of one arm less those of another; None if either has none."""
        sides = [
            {seed: float(t[column].mean()) for seed, t in self.judged.get(arm, {}).items() if column in t}
            for arm in (ours, theirs)
        ]
        return self._test(ours, theirs, *sides)

    def compare_late(self, ours: str, theirs: str, column: str, scale: Callable = float) -> Difference | None:
        """Difference of a training metric, averaged over the second half of training, on another `scale` if wanted."""
        return self._test(ours, theirs, *(_scaled_by(scale, self.late(arm, column)) for arm in (ours, theirs)))

    def late(self, arm: str, column: str) -> dict[int, float]:
        """Mean of a metric over the second half of training, by seed, without seeds where it is NaN."""
        if self.history is None or column not in self.history:
            return {}
        runs = self.history[(self.history["arm"] == arm) & (self.history["update"] >= self.history["update"].max() / 2)]
        return {int(seed): float(value) for seed, value in runs.groupby("seed")[column].mean().dropna().items()}

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """KLs (nats) that arms are compared at: the largest that every run reaches and, where it is further by a tenth
        or more, the one that every run of the fastest arm reaches. Running means of `SMOOTH` updates."""
        if self.history is None or not {"kl", "update"} <= set(self.history):
            return ()
        runs = self.history.sort_values("update").groupby(["arm", "seed"])["kl"]
        reach = runs.apply(lambda kl: kl.rolling(SMOOTH, min_periods=1).mean().max()).groupby("arm")
        low, far = float(reach.min().min()), float(reach.min()[reach.mean().idxmax()])
        return (low, far) if far >= 1.1 * low else (low,) if low > 0 else ()

    def at(self, arm: str, level: float) -> pd.DataFrame:
        """A row a seed that reaches a KL: metrics of its policies there (`frontier.at_kl`), updates and seconds of
        training to it.

        Of the arm's longer trainings, if it has some and not every seed's own training reaches the level.
        """
        if (arm, level) not in self._crossed:
            rows = _crossings(self.history, self.seconds, arm, level, self._ends)
            if self.longer is not None and len(rows) < len(self.judged[arm]):
                on = _crossings(self.longer, self.longer_seconds, arm, level)
                rows = on if len(on) > len(rows) else rows
            self._crossed[arm, level] = rows
        return self._crossed[arm, level]

    @cached_property
    def _ends(self) -> pd.DataFrame:
        """The policies that trainings end with, as judged on held-out prompts: means by arm and seed, and of how many
        updates' batches (`evaluations`). Without those whose batch is not known."""
        import pandas as pd

        rows = []
        for arm, by_seed in self.settings.items():
            for seed, flat in by_seed.items():
                if batch := isinstance(flat, dict) and flat.get("ppo_rollouts"):
                    judged = self.judged[arm][seed]
                    about = {"arm": arm, "seed": seed, "evaluations": len(judged) / batch}
                    rows.append(dict(judged.mean(numeric_only=True)) | about)
        return pd.DataFrame(rows, columns=["arm", "seed", "evaluations", "kl", "gold", "proxy"])

    def compare_at_kl(
        self, ours: str, theirs: str, column: str = "gold", level: float | None = None, scale: Callable = float
    ) -> Difference | None:
        """Difference of a training metric where both arms reach a KL, by default the lowest of `levels`; None where a
        seed of either does not reach it, or the metric is not known."""
        if not self.levels or column not in self.history:
            return None
        sides = [self.at(arm, self.levels[0] if level is None else level)[column].dropna() for arm in (ours, theirs)]
        if any(len(side) < len(self.judged[arm]) for arm, side in zip((ours, theirs), sides)):
            return None
        return self._test(ours, theirs, *(_scaled_by(scale, dict(side)) for side in sides))

    def _test(self, ours: str, theirs: str, a: Mapping[int, float], b: Mapping[int, float]) -> Difference | None:
        if not a or not b:
            return None
        both = [seed for seed in a if seed in b]
        if self.pairs(ours, theirs) and both:
            return paired([a[seed] for seed in both], [b[seed] for seed in both])
        return welch(list(a.values()), list(b.values()))

    def rank_after(self, updates: int, column: str = "proxy") -> Interval | None:
        """How well what a search sees predicts what it is for: Spearman's rank correlation over arms of a metric after
        `updates` (the mean of the last `SMOOTH`) with held-out gold at the end, mean over the seeds that all arms have.

        None for fewer than three arms, or values that do not differ. Arms are at their own step sizes.
        """
        from scipy.stats import spearmanr

        rows = self.history if self.history is not None and column in self.history else None
        if rows is None or rows["arm"].nunique() < 3:
            return None
        early = rows[(rows["update"] < updates) & (rows["update"] >= updates - SMOOTH)]
        early = early.groupby(["seed", "arm"])[column].mean().unstack().dropna()
        ends = {arm: {seed: t["gold"].mean() for seed, t in self.judged[arm].items()} for arm in early}
        ranks = [
            spearmanr(row, [ends[arm][seed] for arm in early]).statistic
            for seed, row in early.iterrows()
            if all(seed in by_seed for by_seed in ends.values()) and row.nunique() > 1
        ]
        return t_interval(ranks, (-1, 1)) if ranks and not any(map(math.isnan, ranks)) else None

    @property
    def drawn_once(self) -> list[str]:
        """What all seeds share, so that no interval covers another draw of it."""
        by_arm = [list(by_seed.values()) for by_seed in self.settings.values() if len(by_seed) > 1]
        by_arm = [flats for flats in by_arm if all(isinstance(flat, dict) for flat in flats)]
        drawn = {n: [{flat.get(n) for flat in flats} for flats in by_arm] for n in DRAWN}
        once = [DRAWN[n] for n, seeds in drawn.items() if seeds and all(len(values) == 1 for values in seeds)]
        several = [arm for arm in self.arms.values() if len(arm.seeds) > 1]
        stepped = any(arm.tuning for arm in several)
        searched = any(arm.search and arm.search.number == 1 for arm in several)
        return once + ["each arm's step size"] * stepped + ["the search for weights"] * searched


def _crossings(
    history: pd.DataFrame, seconds: pd.DataFrame | None, arm: str, level: float, judged: pd.DataFrame | None = None
) -> pd.DataFrame:
    rows = at_kl(history[history["arm"] == arm], level, SMOOTH, judged).set_index("seed")
    if seconds is None or not set(PARTS) <= set(seconds):
        return rows.assign(seconds=math.nan)
    spent = seconds[seconds["arm"] == arm].sort_values("update")
    totals = {seed: run[list(PARTS)].sum(axis=1).cumsum().to_numpy() for seed, run in spent.groupby("seed")}
    at = {seed: float(totals[seed][math.ceil(u)]) for seed, u in rows["update"].items() if seed in totals}
    return rows.assign(seconds=[at.get(seed, math.nan) for seed in rows.index])


def _scaled_by(scale: Callable, values: Mapping[int, float]) -> dict[int, float]:
    """Values by seed on another scale; nothing if that is the logarithm and a value is not above 0."""
    if scale is math.log and any(value <= 0 for value in values.values()):
        return {}
    return {seed: scale(value) for seed, value in values.items()}
