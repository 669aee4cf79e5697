"""How differences, cases and costs are put into words; numbers come from the runs, sentences from rules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dense_rlhf.evaluation.results import TABLES, Arm, Finding
from dense_rlhf.evaluation.rule import CONTRADICTED, NO_DIFFERENCE, SUPPORTED, UNDECIDED, Case, Comparison
from dense_rlhf.statistics import Difference
from dense_rlhf.view.live import duration

UPDATES, EQUAL_KL = "equal updates", "equal KL"
LEADS = {
    SUPPORTED: "Differs that way",
    CONTRADICTED: "Differs the other way",
    NO_DIFFERENCE: NO_DIFFERENCE.capitalize(),
}
NEAREST = "Nearest to an answer"
EVEN = 0.95  # ESS/T from which on credit is an even spread in all but name


class Measure(NamedTuple):
    """What is compared. `log`: on logarithms, so that a difference is a ratio, and the margin a share."""

    text: str
    unit: str
    column: str
    log: bool = False

    def margin(self, margin: float) -> float:
        """The margin in the unit of the differences."""
        return math.log1p(margin) if self.log else margin


def number(value: float) -> str:
    """A p or a difference of any size, with two significant digits if small, else two decimals."""
    return f"{value:.2g}" if abs(value) < 0.1 else f"{value:.2f}"


def p_value(p: float) -> str:
    """A p with its letter."""
    return "p < 0.001" if p < 0.001 else f"p {number(p)}"


def signed(difference: Difference | None, log: bool = False) -> str:
    """A difference with its sign and interval, or as a ratio if it is one of logarithms; a dash if it is None."""
    if difference is None:
        return "–"
    if log:
        mean, low, high = (math.exp(min(x, 700)) for x in (difference.mean, difference.low, difference.high))
        return f"×{mean:.2f} " + (f"[{low:.2f}, {high:.2f}]" if difference.known else "[no interval]")
    digits = 2 if max(abs(difference.mean), difference.high - difference.mean if difference.known else 0) >= 0.1 else 3
    bounds = f"[{difference.low:+.{digits}f}, {difference.high:+.{digits}f}]" if difference.known else "[no interval]"
    return f"{difference.mean:+.{digits}f} {bounds}"


def plural(n: float, word: str) -> str:
    """A rounded number of things."""
    return f"{n:.0f} {word}{'s' * (round(n) != 1)}"


# ---------------------------------------------------------------------------------------------------- a case


def why(cases: Sequence[Case], measures: Sequence[Measure], verdict: str) -> str:
    """The reason for the verdict of `rule.overall` on some arms, with the numbers of the runs."""
    logs = {m.text: m.log for m in measures}
    if verdict == UNDECIDED:
        return _undecided(cases, logs)
    kinds = [kind for kind in (verdict, CONTRADICTED, NO_DIFFERENCE) if any(c.verdict == kind for c in cases)]
    parts = []
    for kind in dict.fromkeys(kinds):
        named = "; ".join(_case(case, logs) for case in cases if case.verdict == kind)
        parts.append(f"{LEADS[kind]}, {_share(cases, kind)}: {named}")
    open_ = [case.arm for case in cases if case.verdict == UNDECIDED]
    return ". ".join(parts + [f"Undecided: {', '.join(open_)}"] * bool(open_)) + "."


def _share(cases: Sequence[Case], kind: str) -> str:
    return f"{sum(case.verdict == kind for case in cases)} of {plural(len(cases), 'arm')}"


def _case(case: Case, logs: Mapping[str, bool]) -> str:
    """An arm less its first rival, and less the rival or control that it is least better than."""
    first = [c for c in case.comparisons if c.rival == case.comparisons[0].rival]
    text = f"{case.arm} less {_compared(first, logs)}"
    if case.verdict in (SUPPORTED, NO_DIFFERENCE) and case.nearest[0].rival != first[0].rival:
        control = ", a control" * case.nearest[0].is_control
        text += f"; least over {_compared(case.nearest, logs)}{control}"
    p = case.p_equal if case.verdict == NO_DIFFERENCE else case.p_differs
    share = f"{math.expm1(case.margin):.0%}" if logs[first[0].measure] else f"{case.margin:g}"
    margin = f", margin {share}" * (case.verdict == NO_DIFFERENCE)
    return f"{text} ({plural(case.seeds, 'seed')}{margin}, {p_value(p)} after Holm)"


def _compared(comparisons: Sequence[Comparison], logs: Mapping[str, bool]) -> str:
    """A rival, and the differences from it: of what, and where."""
    texts = []
    for measure in dict.fromkeys(c.measure for c in comparisons):
        of_measure = [(c, signed(c.difference, logs[measure])) for c in comparisons if c.measure == measure]
        at = [f"{text} at {c.kl:.1f} nats" if c.kl and not math.isnan(c.kl) else text for c, text in of_measure]
        texts.append(f"{measure} {', '.join(at)}")
    return f"{comparisons[0].rival}: {', '.join(texts)}"


def _undecided(cases: Sequence[Case], logs: Mapping[str, bool]) -> str:
    """The arm nearest to an answer, what keeps it from one, and how many seeds would give it."""
    unknown = [case for case in cases if case.verdict == UNDECIDED]
    tested = [case for case in unknown if case.has_interval]
    if not tested:
        one = any(c.difference for case in unknown for c in case.comparisons)
        return "One seed has no interval." if one else "The runs do not have the numbers: no path of KL, or no metric."
    closest = min(tested, key=lambda case: min(case.differs, case.equals))
    open_ = f" Undecided: {', '.join(case.arm for case in unknown)}." if len(cases) > 1 else ""
    return f"{NEAREST}: {_case(closest, logs)}. {_missing(closest)}{seeds_needed(closest)}{open_}"


def _missing(case: Case) -> str:
    """What an arm that points the wanted way has not passed."""
    missing = dict.fromkeys(c.rival for c in case.comparisons if c.difference is None)
    lacking = f"Not compared with {', '.join(missing)}. " if missing else ""
    first = case.comparisons[0].difference
    if first is None or first.mean * case.wanted <= 0:
        return lacking
    level = [c for c in case.comparisons if c.rival not in missing and c.p(case.wanted) >= 0.05]
    names = ", ".join(dict.fromkeys(c.rival for c in level))
    return lacking + (f"Not told apart, each tested alone, from {names}. " if names else "")


def seeds_needed(case: Case) -> str:
    """How many seeds would decide it, were all as measured."""
    differ, same = case.seeds_to_decide()
    fewest = min(differ, same)
    if not math.isfinite(fewest):
        return "Were differences and spread as measured, no number of seeds up to 1000 would decide."
    answer = "a difference" if differ <= same else "that none matters"
    return f"Were differences and spread as measured, {fewest:.0f} seeds would show {answer} (chance 0.8)."


# ---------------------------------------------------------------------------------------------------- arms and runs


def cost_at(finding: Finding, arm: str, level: float) -> str:
    """What an arm took to reach a KL, mean over seeds: updates, and seconds of training by the clock."""
    at = finding.at(arm, level)
    if at.empty:
        return "never"
    spent = at["seconds"].mean()
    return plural(at["update"].mean() + 1, "update") + ("" if math.isnan(spent) else f", {duration(spent)}")


def trial_rank(finding: Finding, updates: int) -> str:
    """How well a trial of so many updates predicts the end of a training, from the trainings of all arms."""
    rank = finding.rank_after(updates)
    of = f"of the proxy after {plural(updates, 'update')}, where a trial ends, with gold at the end"
    return f"Rank correlation {of}: {rank if rank else 'not known'}, over arms, mean over seeds."


def tuning(finding: Finding) -> str:
    """The step size of each arm and what choosing them took, in words; empty where none was chosen."""
    arms = [arm for arm in finding.arms.values() if arm.tuning and arm.step]
    if not arms:
        return ""
    trainings, updates, seconds = (sum(numbers) for numbers in zip(*(arm.tuning for arm in arms)))
    sizes = ", ".join(f"{arm.name} {arm.step:g}" for arm in arms)
    took = f"{plural(trainings, 'training')}, {plural(updates, 'update')}, {duration(seconds)}"
    return f"{sizes}. Chosen on validation prompts at equal cost, {took} in all; none of these trainings is compared."


def identity(arm: Arm) -> str:
    """What an arm is under another name, or in all but name; empty if it is only itself."""
    if arm.search and arm.same_as:
        even = f", which at ESS/T {min(arm.search.even):.2f} is an even spread in all but name" if _is_even(arm) else ""
        return f"{arm.name} is {arm.same_as}: its search put all weight there{even}."
    if arm.same_as:
        return f"{arm.name} is {arm.same_as} under another name."
    if _is_even(arm):
        return f"{arm.name} learned one source alone, which at ESS/T {min(arm.search.even):.2f} is an even spread."
    return ""


def _is_even(arm: Arm) -> bool:
    return bool(arm.search) and len(arm.search.even) == arm.search.number and min(arm.search.even) > EVEN


def basis(finding: Finding) -> str:
    """Seeds and prompts that all verdicts of a dataset rest on, and what every seed shares, in words."""
    seeds = min(len(arm.seeds) for arm in finding.arms.values())
    text = f"{plural(seeds, 'seed')}, {finding.prompts} held-out prompts each: {TABLES[finding.table]}."
    for name, what in (("ppo_lam", "Lambda"), ("ppo_kl_coef", "KL coefficient")):
        values = finding.parameter_values(name)
        text += f" {what} {' or '.join(f'{value:g}' for value in values)}." if values else ""
    steps = {arm.step for arm in finding.arms.values() if arm.step}
    if len(steps) == 1 and not tuning(finding):
        text += f" All arms have one step size, {steps.pop():g}: what a larger step gains is not taken out."
    shared = finding.drawn_once
    return text + (f" All seeds share {', '.join(shared)}: no interval covers another draw of it." if shared else "")
