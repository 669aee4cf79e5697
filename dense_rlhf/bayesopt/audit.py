"""Audit of a search: does it know when it cannot tell? Tables, checks and a verdict from a `Search`.

`names` are those of the search's weights, in order. Numbers beyond the weights are held at the incumbent's. Values,
and everything in their unit, are in the unit of the observations.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.linalg import helmert
from scipy.spatial.distance import cdist
from scipy.stats import norm, ttest_ind

from dense_rlhf.bayesopt.search import Search, noise_variance
from dense_rlhf.bayesopt.space import Point
from dense_rlhf.statistics import Interval
from dense_rlhf.types import InputError

LEVEL = 0.05  # false alarms of "the weights can be told apart"
LENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  # length-scales of the test, in median distances between points
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9, 0.97)  # of the variance that is signal
TOLERANCE = 0.25, 0.05  # negligible regret: a share of one observation's sd, and of the posterior's range
EARLIEST = 4  # trials a number of a point, before which the model is too sure to call anything converged
JUMP, OFTEN = 0.25, 0.25  # oscillation: the weight moved in one step, and the share of such steps
BEATEN = 0.95  # probability of being better from which on the incumbent counts as better than a plain mixture
EVEN = 0.95  # ESS/T from which credit is an even spread in all but name
PER_DIMENSION = 6  # trials a number of a point that a model needs
FEW = 6  # pairs, below which a rank correlation has no interval
CHOOSING = ("gp", "saas", "additive", "nei")  # strategies whose model chooses points
CONVERGED, MORE, FLAT = "converged", "needs more trials", "cannot be told apart"


# ---------------------------------------------------------------------------------------------------- tables


def until(search: Search, n: int) -> Search:
    """The search as it stood after its first `n` observations."""
    return replace(search, points=search.points[:n], values=search.values[:n], errors=search.errors[:n])


def moved(search: Search, a: Point, b: Point) -> float:
    """Total variation distance between the weights of two points: the share of weight that moved."""
    return float(np.abs(np.subtract(a, b)[: search.space.d]).sum() / 2)


def trace(search: Search) -> pd.DataFrame:
    """What the search would have answered after each trial n: the incumbent and its 95 % interval.

    Starts once trials outnumber a point's coordinates, as two trials that happen to agree would look certain.
    Columns n, point, mean, low, high, and `moved`: the share of weight that changed since the row above.
    """
    rows = []
    for n in range(min(search.space.size + 1, len(search.values)), len(search.values) + 1):
        point, mean, sd = until(search, n).incumbent()
        step = moved(search, point, rows[-1]["point"]) if rows else np.nan
        rows.append(dict(n=n, point=point, mean=mean, low=mean - 1.96 * sd, high=mean + 1.96 * sd, moved=step))
    return pd.DataFrame(rows)


def phases(search: Search) -> list[str]:
    """How each trial came about: "anchor", "quasi-random" (Sobol points), or "chosen" by the model."""
    planned, anchors, kinds = Counter(search.start), set(search.space.anchors()), []
    later = "chosen" if search.strategy in CHOOSING else "quasi-random"
    for point in search.points:
        kinds.append(("anchor" if point in anchors else "quasi-random") if planned[point] > 0 else later)
        planned[point] -= 1
    return kinds


def quasi_random_band(search: Search, seed: int = 0) -> Interval:
    """Value of one trial at a random Sobol point: mean and 95 % interval over points, posterior and noise."""
    mean, sd = search.posterior(search.space.sobol(256, seed))
    scatter = np.sqrt(sd**2 + noise_variance(search).mean())
    draws = mean[:, None] + scatter[:, None] * norm.ppf((np.arange(100) + 0.5) / 100)
    return Interval(float(mean.mean()), *map(float, np.quantile(draws, [0.025, 0.975])))


def gain_over_quasi_random(search: Search) -> Interval | None:
    """Mean value of chosen trials less that of quasi-random ones, 95 % (Welch); None with fewer than two of either.

    Compares observations, without a model. Anchors count as neither.
    """
    values, phase = np.array(search.values), np.array(phases(search))
    chosen, drawn = values[phase == "chosen"], values[phase == "quasi-random"]
    if min(len(chosen), len(drawn)) < 2:
        return None
    interval = ttest_ind(chosen, drawn, equal_var=False).confidence_interval()
    return Interval(float(chosen.mean() - drawn.mean()), float(interval.low), float(interval.high))


def noise_parts(search: Search) -> pd.DataFrame:
    """How much one observation scatters, by cause: columns noise, sd (NaN if unknown), and `known by`."""
    noise, errors = search.noise(), [error for error in search.errors if error]
    within = math.sqrt(np.mean(np.square(errors))) if errors else math.nan
    between = math.sqrt(noise.between) if noise.degrees else math.nan
    rows = [
        ("prompts and responses", within, f"standard errors of {len(errors)} trials"),
        ("another seed, beyond that", between, f"{noise.degrees} repeats of a point"),
        ("one observation", math.sqrt(noise_variance(search).mean()), "what the model takes"),
    ]
    return pd.DataFrame(rows, columns=["noise", "sd", "known by"])


def leave_one_out(search: Search) -> pd.DataFrame:
    """Each observation predicted from all others: columns observed, mean, sd (of an observation) and z.

    Hyper-parameters are kept, so they were fitted to it too.
    """
    (mean, variance), values = search.model().leave_one_out(), np.array(search.values)
    sd = np.sqrt(variance)
    return pd.DataFrame({"observed": values, "mean": mean, "sd": sd, "z": (values - mean) / sd})


def q_squared(left_out: pd.DataFrame) -> float:
    """1 - PRESS / SS: 1 predicts perfectly, 0 no better than the mean of the others, below 0 worse."""
    y = left_out["observed"]
    others = (y.sum() - y) / (len(y) - 1)
    total = float(((y - others) ** 2).sum())
    return 1 - float(((y - left_out["mean"]) ** 2).sum()) / total if total else math.nan


def coverage(left_out: pd.DataFrame) -> float:
    """The share of observations inside the 95 % interval predicted from the others."""
    return float((left_out["z"].abs() <= 1.96).mean())


def signal_to_noise(search: Search, seed: int = 0) -> float:
    """Sd of the posterior mean over Sobol points by that of one observation; too low while the model knows little."""
    mean, _ = search.posterior(search.space.sobol(256, seed))
    return float(mean.std() / np.sqrt(noise_variance(search).mean()))


# ---------------------------------------------------------------------------------------------------- can it tell?


def p_flat(search: Search, repeats: int = 999, seed: int = 0) -> float:
    """Permutation p-value of "the points make no difference", under which values are exchangeable over points.

    It needs no noise level. Statistic: the largest gain in restricted log marginal likelihood of a Gaussian process
    over a constant, over `LENGTHS` and `SHARES`. Points chosen after seeing values are not quite exchangeable, but on
    flat functions the false alarms stayed below `LEVEL`. With k trials p is at least 1/k!.
    """
    points, values = search.space.to_unit(search.points), np.array(search.values)
    distances = cdist(points, points)
    if np.ptp(values) == 0 or not distances.any():
        return 1.0
    rng = np.random.default_rng(seed)
    shuffled = np.stack([values, *(rng.permutation(values) for _ in range(repeats))])
    lengths = np.median(distances[distances > 0]) * np.array(LENGTHS)
    gains = np.max([_gain(np.exp(-0.5 * (distances / length) ** 2), shuffled) for length in lengths], 0)
    return float((gains >= gains[0] - 1e-9).mean())


def _gain(kernel: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Largest log-likelihood gain of a kernel (N, N) over independent noise, for each row of values (R, N): (R,).

    Computed on the N - 1 contrasts, which cancel a constant; their scale is maximised out.
    """
    contrasts = helmert(len(kernel))
    eigenvalues, vectors = np.linalg.eigh(contrasts @ kernel @ contrasts.T)
    eigenvalues = eigenvalues.clip(min=0) / eigenvalues.mean()
    squares = np.square(values @ contrasts.T @ vectors)
    variances = np.array([share * eigenvalues + 1 - share for share in SHARES])
    ratio = (squares[:, None] / variances).mean(-1) / squares.mean(-1, keepdims=True)
    return (-0.5 * squares.shape[1] * np.log(ratio) - 0.5 * np.log(variances).sum(-1)).max(-1)


def plain_mixtures(search: Search, names: Sequence[str]) -> dict[str, Point]:
    """Points of equal weights and of each source alone (`terminal` alone is sparse reward), by label."""
    d, beyond = search.space.d, search.incumbent()[0][search.space.d :]
    if len(names) != d:
        raise InputError(f"{len(names)} names for {d} weights: {', '.join(names)}; wanted one for each weight")
    labels = ["equal weights", *(f"{name} alone" + " (sparse)" * (name == "terminal") for name in names)]
    weights = [(1 / d,) * d, *map(tuple, np.eye(d).tolist())]
    return {label: search.space.settled(point + beyond) for label, point in zip(labels, weights)}


def beats(search: Search, names: Sequence[str]) -> pd.DataFrame:
    """Is the incumbent better than each of `plain_mixtures`? From the joint posterior.

    Columns against, difference, low, high (95 %) and probability; NaN where the incumbent is that mixture.
    """
    best, others = search.incumbent()[0], plain_mixtures(search, names)
    mean, covariance = search.joint([best, *others.values()])
    variance = covariance[0, 0] + covariance.diagonal()[1:] - 2 * covariance[0, 1:]
    same = np.array([np.allclose(best, point, atol=1e-9) for point in others.values()])
    difference = np.where(same, np.nan, mean[0] - mean[1:])
    sd = np.sqrt(np.maximum(variance, 1e-300))
    ends = dict(low=difference - 1.96 * sd, high=difference + 1.96 * sd)
    return pd.DataFrame(
        dict(against=list(others), difference=difference, **ends, probability=norm.cdf(difference / sd))
    )


class Regret(NamedTuple):
    """By how much the best of all points may exceed the incumbent, by the posterior."""

    expected: float
    high: float  # 95 %
    spread: float  # range of the posterior mean over all points


def regret(search: Search, draws: int = 2000, seed: int = 0) -> Regret:
    """E[max f - f(incumbent)] over joint posterior draws at the trials, the anchors and 256 Sobol points."""
    points = [search.incumbent()[0], *search.points, *search.space.anchors(), *search.space.sobol(256, seed)]
    mean, covariance = search.joint(points)
    eigenvalues, vectors = np.linalg.eigh(covariance)
    factor = vectors * np.sqrt(eigenvalues.clip(min=0))
    sampled = mean + np.random.default_rng(seed).standard_normal((draws, len(points))) @ factor.T
    short = sampled.max(1) - sampled[:, 0]
    return Regret(float(short.mean()), float(np.quantile(short, 0.95)), float(np.ptp(mean)))


@dataclass(frozen=True)
class Verdict:
    """`kind`, one of `CONVERGED`, `MORE` and `FLAT`, and `text`: the same in words, with the other numbers."""

    kind: str
    text: str
    p: float  # of `p_flat`
    regret: Regret
    tolerance: float
    noise: float  # standard deviation of one observation
    more: int  # trials
    unbeaten: tuple[str, ...] = ()  # of `plain_mixtures`: those that the incumbent is not shown to be better than

    @property
    def winner(self) -> bool:
        """Whether a winner is claimed: better than equal weights, sparse and each source, at `BEATEN`."""
        return self.kind != FLAT and not self.unbeaten


def verdict(search: Search, names: Sequence[str], unit: str = "") -> Verdict:
    """Converged, about n more trials, or the weights cannot be told apart at this noise.

    Told apart: `p_flat` is below `LEVEL`. Converged: told apart, and the expected regret is within a quarter of one
    observation's standard deviation or a twentieth of the posterior's range, whichever is larger: a smaller regret is
    invisible or does not matter. `more` assumes that regret falls with the root of the number of trials, and asks for
    at least `EARLIEST` trials a number: with fewer the model is too sure, as known functions show
    (`ablations/dimension`).
    """
    n, p, short = len(search.values), p_flat(search), regret(search)
    noise = float(np.sqrt(noise_variance(search).mean()))
    tolerance = max(TOLERANCE[0] * noise, TOLERANCE[1] * short.spread)
    more = max(0, math.ceil(n * ((short.expected / tolerance) ** 2 - 1)), EARLIEST * search.space.size - n)
    more = more if more < 10 else 5 * math.ceil(more / 5)  # a rough law deserves no more digits
    kind = FLAT if p >= LEVEL else MORE if more else CONVERGED
    chances = beats(search, names)
    unbeaten = tuple(chances["against"][chances["probability"] < BEATEN])  # it may be one of them itself: NaN
    wordless = Verdict(kind, "", p, short, tolerance, noise, more, unbeaten)
    return replace(wordless, text=_in_words(wordless, search, names, f" {unit}" if unit else ""))


def _in_words(verdict: Verdict, search: Search, names: Sequence[str], unit: str) -> str:
    short, n = verdict.regret, len(search.values)
    test = f"permutation test over {n} trials, p = {verdict.p:.3f}, level {LEVEL:g}"
    bound = f"{verdict.tolerance:.2g} (a quarter of one observation's sd or a twentieth of the posterior's range)"
    small = short.expected <= verdict.tolerance
    gain = f"the best weights are expected to gain another {short.expected:.2g}{unit}, {'within ' if small else ''}"
    early = f", which {n} trials of {search.space.size} numbers are too few to trust" * small
    level = f", but the incumbent not from {', '.join(verdict.unbeaten)}: no winner is claimed" * bool(verdict.unbeaten)
    apart = f"The weights can be told apart ({test}){level}. {_compared(search, names)}"
    unrepeated = " No point was tried twice: what another seed changes is not counted." * (not search.noise().degrees)
    scatter = f"One observation scatters by {verdict.noise:.2g}{unit} (sd)"
    spread = f"over all weights the posterior mean moves by {short.spread:.2g}"
    text = {
        FLAT: f"The weights cannot be told apart at this noise ({test}). {scatter}; {spread}. No winner is claimed.",
        MORE: f"Needs about {verdict.more} more trials: {gain}{'' if small else 'more than '}{bound}{early}. {apart}",
        CONVERGED: f"Converged: {gain}{bound}. {apart}",
    }
    return text[verdict.kind] + unrepeated


def _compared(search: Search, names: Sequence[str]) -> str:
    best, chances = search.incumbent()[0], beats(search, names)
    mixture = ", ".join(f"{name} {weight:.2f}" for name, weight in zip(names, best))
    known = [row for row in chances.itertuples() if not math.isnan(row.probability)]
    listed = ", ".join(f"{row.against} {row.probability:.2f}" for row in known)
    return f"Probability that the incumbent ({mixture}) is better than: {listed}."


# ---------------------------------------------------------------------------------------------------- signatures


class Check(NamedTuple):
    """A failure signature: present, absent, or None if that cannot be told; with the number and text behind it."""

    name: str
    present: bool | None
    number: float
    text: str


def oscillation(path: pd.DataFrame) -> Check:
    """Does the incumbent still jump in the last third of a `trace`, more than once and in many steps?"""
    steps = path["moved"].iloc[len(path) - len(path) // 3 :]
    if len(steps) < 3:
        return Check("oscillation", None, math.nan, f"{len(path)} steps are too few")
    jumps = int((steps > JUMP).sum())
    text = f"{jumps} of the last {len(steps)} steps moved more than {JUMP:.0%} of the weight"
    return Check("oscillation", jumps > max(1, OFTEN * len(steps)), jumps / len(steps), text)


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Spearman's correlation with its 95 % interval by Fieller's (1957) normal approximation; NaN below `FEW` pairs."""
    rho = float(pd.Series(a, dtype=float).corr(pd.Series(b, dtype=float), method="spearman"))
    if len(a) < FEW or math.isnan(rho):
        return Interval(rho, math.nan, math.nan)
    z, half = math.atanh(np.clip(rho, -0.999, 0.999)), 1.96 * math.sqrt(1.06 / (len(a) - 3))
    return Interval(rho, math.tanh(z - half), math.tanh(z + half))


def overfitting(search: Search, trials: Sequence[Mapping]) -> Check:
    """Does gold fall as the proxy rises, over all trials or the better half? `trials` hold point, proxy, gold."""
    table = pd.DataFrame({name: [t[name] for t in trials] for name in ("proxy", "gold")}, dtype=float)
    if len(table) < FEW:
        return Check("reward overfitting", None, math.nan, f"{len(table)} trials are too few")
    best = table[table["proxy"] >= table["proxy"].median()]
    rho, top = rank_correlation(table["proxy"], table["gold"]), rank_correlation(best["proxy"], best["gold"])
    here = [t["gold"] for t in trials if tuple(t["point"]) == search.incumbent()[0]]
    among = f"{top.mean:.2f}" if math.isnan(top.high) else top  # too few for an interval
    at_best = f"{np.mean(here):.2f}" if here else "not known"
    text = (
        f"rank correlation of proxy and gold {rho} over {len(table)} trials, {among} over the {len(best)} of "
        f"higher proxy; gold at the incumbent {at_best}, best trial {table['gold'].max():.2f}"
    )
    present = True if rho.high < 0 or top.high < 0 else False if rho.low > 0 else None
    return Check("reward overfitting", present, rho.mean, text)


def dimension(search: Search, q2: float) -> Check:
    """Four numbers or more, and fewer than `PER_DIMENSION` trials for each or a model that predicts nothing?"""
    n, size = len(search.values), search.space.size
    present = size >= 4 and (not q2 > 0 or n < PER_DIMENSION * size)
    return Check(
        "too many dimensions", present, float(size), f"{n} trials for {size} numbers; leave-one-out Q² {q2:.2f}"
    )


def misalignment(search: Search, names: Sequence[str], agreement: Mapping[str, Interval]) -> Check:
    """Is the heaviest source no better than chance? `agreement`: each source's rank correlation with known credit."""
    source = names[int(np.argmax(search.incumbent()[0][: search.space.d]))]
    if source not in agreement:
        return Check("misaligned explanations", None, math.nan, f"{source}, the heaviest source, ranks no tokens")
    rho = agreement[source]
    text = f"credit of {source}, the heaviest source, agrees with known credit at {rho}"
    return Check("misaligned explanations", not rho.low > 0, rho.mean, text)


def evenness(search: Search, names: Sequence[str], trials: Sequence[Mapping]) -> pd.DataFrame:
    """How evenly each source spread its pay, ESS/T (1 is even): mean over trials that paid it, and at the incumbent.

    `trials` hold point and ess (a share for each source with weight).
    """
    best, paid = search.incumbent()[0], pd.DataFrame([t["ess"] for t in trials], columns=list(names), dtype=float)
    here = paid.loc[[tuple(t["point"]) == best for t in trials]]
    rows = [(name, float(paid[name].mean()), float(here[name].mean())) for name in names]
    return pd.DataFrame(rows, columns=["source", "ESS/T", "at the incumbent"])


def sameness(even: pd.DataFrame) -> Check:
    """Is a source of `evenness`, other than uniform, an even spread in all but name? Two such sources are one."""
    credited = even[(even["source"] != "uniform") & even["ESS/T"].notna()]
    shares = ", ".join(f"{source} {share:.2f}" for source, share in zip(credited["source"], credited["ESS/T"]))
    text = f"ESS/T {shares or 'not known'}; from {EVEN:g} on a source is an even spread"
    present = bool((credited["ESS/T"] > EVEN).any()) if len(credited) else None
    return Check("even in all but name", present, float(credited["ESS/T"].max()), text)


def checks(
    search: Search,
    names: Sequence[str],
    trials: Sequence[Mapping],
    path: pd.DataFrame,
    left_out: pd.DataFrame,
    agreement: Mapping[str, Interval] | None = None,
) -> list[Check]:
    """Every failure signature, by name. `trials`: point, proxy, gold and ess of each; `path`: `trace`."""
    even = evenness(search, names, trials)
    model = dimension(search, q_squared(left_out)), misalignment(search, names, agreement or {})
    return [oscillation(path), overfitting(search, trials), *model, sameness(even)]
