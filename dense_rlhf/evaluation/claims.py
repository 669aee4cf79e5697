"""The paper's claims, judged by a rule from the runs alone: supported, contradicted, or undecided here.

`RULE` is shown wherever a verdict is; what it says is what `judge` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from dense_rlhf.evaluation.findings import CONTROL, DENSE, SPARSE, TABLES, Arm, Finding
from dense_rlhf.statistics import ALPHA, Difference, detectable, holm

SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided here"
UPDATES, EQUAL_KL = "equal updates", "equal KL"
MANY, BUDGET = 4, 25  # sources and trials of the third claim

RULE = (
    "Each claim asks whether an arm differs from its rivals in one direction. An arm supports it where it does so from "
    "every rival and every control of the study (uniform, random, shuffled: they know nothing of tokens), at equal "
    "updates and at equal KL. It contradicts it where it differs in the other direction from a rival, at equal updates "
    "and at equal KL. Seeds are the unit: a difference is Student's paired one where the same seed gave both arms the "
    "same prompts in the same order and the same start, else Welch's; intervals are at 95 %, tests two-sided. An arm's "
    "p is the largest of the tests that its answer rests on, corrected over all arms and claims of the dataset (Holm); "
    f"it must be below {ALPHA:g}. A claim is supported where an arm supports it and none contradicts it, contradicted "
    "the other way round, and otherwise undecided here; one seed decides nothing. An identity is checked by "
    "enumeration. Learned weights come from one search an arm: what another search would find is not in the intervals."
)


@dataclass(frozen=True)
class Question:
    """A claim as a comparison: `wanted` is the sign of the difference that supports it."""

    key: str
    text: str
    measure: str
    unit: str
    wanted: int
    asks: Callable[[Finding], list[tuple[Arm, list[str], list[str]]]]  # an arm, its rivals, the controls to beat
    late: str = ""  # the metric of training that is asked about; gold on held-out prompts where none is given


@dataclass(frozen=True)
class Comparison:
    """One arm less another, at equal updates and at equal KL; None where the runs do not tell."""

    rival: str
    is_control: bool
    updates: Difference | None
    at_kl: Difference | None

    def p(self, sign: int) -> float:
        """The larger p of both, 1 unless both have this sign."""
        both = self.updates, self.at_kl
        return max(one.p if one and one.mean * sign > 0 else 1.0 for one in both)


@dataclass(frozen=True)
class Case:
    """What one arm says of one claim; `p` is corrected over all cases of the dataset."""

    arm: str
    comparisons: tuple[Comparison, ...]
    wanted: int
    p: float = 1.0
    tests: int = 1  # how many answers p was corrected for
    verdict: str = UNDECIDED

    @property
    def supports(self) -> float:
        """p that it differs as wanted from all: rivals and controls."""
        return max(one.p(self.wanted) for one in self.comparisons)

    @property
    def opposes(self) -> float:
        """p that it differs the other way from one of its rivals, of which any will do."""
        rivals = [one.p(-self.wanted) for one in self.comparisons if not one.is_control]
        return min(1.0, len(rivals) * min(rivals))

    @property
    def nearest(self) -> float:
        """p of the answer that it is nearest to, not corrected; both cannot be below 1."""
        return min(self.supports, self.opposes)

    @property
    def seeds(self) -> int:
        """Of the comparison that has fewest."""
        return min((d.seeds for one in self.comparisons for d in (one.updates, one.at_kl) if d), default=0)

    @property
    def told(self) -> bool:
        """Whether any of its comparisons has an interval."""
        return any(d.known for one in self.comparisons for d in (one.updates, one.at_kl) if d)


@dataclass(frozen=True)
class Claim:
    """A claim of the paper with its verdict, the reason in words, and what each arm says."""

    key: str
    text: str
    verdict: str
    why: str
    unit: str = ""
    cases: tuple[Case, ...] = ()


# ---------------------------------------------------------------------------------------------------- the questions


def _controls(found: Finding) -> list[str]:
    return [arm.name for arm in found.of_kind(CONTROL)]


def _dense(found: Finding) -> list[tuple[Arm, list[str], list[str]]]:
    """Every dense arm against sparse; nothing where there is no sparse arm."""
    rivals = [found.baseline] if found.baseline != "reference" else []
    return [(arm, rivals, _controls(found)) for arm in found.of_kind(DENSE) if rivals]


def _learned(found: Finding) -> list[tuple[Arm, list[str], list[str]]]:
    """Every arm with learned weights against the fixed weights that its search could have had."""
    asked = []
    for arm in (a for a in found.arms.values() if a.trials):
        fixed = [
            other.name
            for other in found.arms.values()
            if other.sources
            and not other.trials
            and set(other.sources) <= set(arm.sources)
            and (other.kind == SPARSE or other.normalise == arm.normalise)
        ]
        asked += [(arm, fixed, _controls(found))] if fixed else []
    return asked


def _wide(found: Finding) -> list[tuple[Arm, list[str], list[str]]]:
    """Every arm with four or more learned weights against the learned ones with fewer, at as many trials."""
    learned = [a for a in found.arms.values() if a.trials >= BUDGET]
    asked = []
    for arm in (a for a in learned if len(a.sources) >= MANY):
        fewer = [o.name for o in learned if len(o.sources) < len(arm.sources) and o.trials == arm.trials]
        asked += [(arm, fewer, [])] if fewer else []
    return asked


QUESTIONS = (
    Question(
        "1a",
        "Dense rewards cut the value loss",
        "value loss, second half of training",
        "squared score",
        -1,
        _dense,
        "value_loss",
    ),
    Question("1b", "Dense rewards speed learning", "gold after training", "log-odds", 1, _dense),
    Question("2", "Learned weights beat fixed ones downstream", "gold after training", "log-odds", 1, _learned),
    Question("3", f"{MANY} sources degrade at {BUDGET} trials", "gold after training", "log-odds", -1, _wide),
)
IDENTITY = "Additive attributions keep the optimal policy"
NOT_ASKED = {
    "1a": "no dense arm beside a sparse one",
    "1b": "no dense arm beside a sparse one",
    "2": "no arm with learned weights beside fixed ones of its sources",
    "3": f"no search of {MANY} or more sources beside one of fewer, both of {BUDGET} or more trials",
}


# ---------------------------------------------------------------------------------------------------- the rule


@lru_cache(maxsize=8)
def judge(found: Finding) -> tuple[Claim, ...]:
    """All claims on one dataset, by `RULE`."""
    asked = [(q, [_case(found, q, *one) for one in q.asks(found)]) for q in QUESTIONS]
    told = [case for _, cases in asked for case in cases if case.told]
    corrected = dict(zip(map(id, told), holm([case.nearest for case in told])))
    claims = []
    for question, cases in asked:
        decided = tuple(_decide(case, corrected.get(id(case), 1.0), len(told)) for case in cases)
        verdict = _overall([case.verdict for case in decided])
        why = _why(question, decided, verdict)
        claims.append(Claim(question.key, question.text, verdict, why, question.unit, decided))
    return *claims, _identity(found.shaping)


def _case(found: Finding, question: Question, arm: Arm, rivals: Sequence[str], controls: Sequence[str]) -> Case:
    comparisons = []
    for rival in (*sorted(rivals, key=lambda name: -found.arms[name].gold.mean), *controls):
        updates = (
            found.compare_late(arm.name, rival, question.late) if question.late else found.compare(arm.name, rival)
        )
        at_kl = found.compare_at_kl(arm.name, rival, question.late or "gold")
        comparisons.append(Comparison(rival, rival in controls, updates, at_kl))
    return Case(arm.name, tuple(comparisons), question.wanted)


def _decide(case: Case, p: float, tests: int) -> Case:
    verdict = UNDECIDED
    if case.told and p < ALPHA:
        verdict = SUPPORTED if case.supports < case.opposes else CONTRADICTED
    return replace(case, p=p, tests=tests, verdict=verdict)


def _overall(verdicts: Sequence[str]) -> str:
    decided = set(verdicts) - {UNDECIDED}
    return decided.pop() if len(decided) == 1 else UNDECIDED


def _why(question: Question, cases: Sequence[Case], verdict: str) -> str:
    """What the verdict rests on, in words and numbers of the runs."""
    if not cases:
        return f"Not asked in this study: {NOT_ASKED[question.key]}."
    if verdict != UNDECIDED:
        named = "; ".join(_said(case, question) for case in cases if case.verdict == verdict)
        return f"{sum(case.verdict == verdict for case in cases)} of {len(cases)} arms: {named}."
    if {SUPPORTED, CONTRADICTED} <= {case.verdict for case in cases}:
        return "The arms disagree: " + "; ".join(f"{c.arm} {c.verdict}" for c in cases if c.verdict != UNDECIDED) + "."
    if not any(case.told for case in cases):
        return "One seed has no interval."
    closest = min((case for case in cases if case.told), key=lambda case: case.nearest)
    return f"Nearest is {_said(closest, question)}. {_open(closest)}{seen(closest, question.unit)}"


def _said(case: Case, question: Question) -> str:
    """An arm with its difference from its first rival."""
    first = case.comparisons[0]
    parts = [f"{signed(d)} at {where}" for d, where in ((first.updates, UPDATES), (first.at_kl, EQUAL_KL)) if d]
    return (
        f"{case.arm} less {first.rival} in {question.measure}: {', '.join(parts) or 'unknown'} ({question.unit}; "
        f"{case.seeds} seed{'s' * (case.seeds != 1)}, p {number(case.p)} after Holm)"
    )


def _open(case: Case) -> str:
    """The comparisons that keep an arm from supporting its claim."""
    missing = [
        f"{one.rival} at {where}"
        for one in case.comparisons
        for d, where in ((one.updates, UPDATES), (one.at_kl, EQUAL_KL))
        if d is None or d.mean * case.wanted <= 0 or d.p >= ALPHA
    ]
    return f"Not told apart, each test alone, from: {', '.join(missing)}. " if missing else ""


def seen(case: Case, unit: str) -> str:
    """The difference from its first rival that so many seeds would have shown, at Holm's first step."""
    rival, first = case.comparisons[0].rival, case.comparisons[0].updates
    if first and first.df > 0 and first.error == first.mean == 0:
        return f"{case.arm} and {rival} are the same in every seed."
    least = detectable(first, tests=case.tests) if first else math.inf
    if not math.isfinite(least):
        return ""
    return (
        f"With {case.seeds} seeds a difference of {number(least)} ({unit}) at equal updates would have been seen "
        "with power 0.8."
    )


def _identity(shaping: Mapping) -> Claim:
    """The fourth claim: by enumeration of every response, no seed and no interval."""
    regret = {
        name: value
        for name, value in (shaping.get("regret") or {}).items()
        if isinstance(value, (int, float)) and name != "sparse"
    }
    if not regret:
        return Claim("4", IDENTITY, UNDECIDED, "Not asked in this study: notebook 03 has not run.")
    worst = max(regret, key=lambda name: regret[name])
    verdict = SUPPORTED if regret[worst] < 1e-9 else CONTRADICTED
    lost = shaping.get("discounted_regret") or {}
    cosine = shaping.get("cosine") or {}
    more = [
        f"{name} loses {lost[name]:.2f} at γ = 0.8, its expected advantages have cosine {cosine[name]:.2f} with "
        "the true ones"
        for name in regret
        if name in lost and name in cosine
    ]
    return Claim(
        "4",
        IDENTITY,
        verdict,
        f"Score lost by the best response at γ = 1, mean over "
        f"{shaping.get('games', 'the')} token MDPs that were enumerated: at most {regret[worst]:.1g} "
        f"({worst}). It says nothing of γ < 1 or of the way there{': ' * bool(more)}{'; '.join(more)}.",
    )


# ---------------------------------------------------------------------------------------------------- words


def number(value: float) -> str:
    """A number of a size that is not known beforehand, readably: a p or a difference."""
    return f"{value:.2g}" if abs(value) < 0.1 else f"{value:.2f}"


def signed(found: Difference | None) -> str:
    """A difference with its sign and interval; a dash where there is none."""
    if found is None:
        return "–"
    digits = 2 if max(abs(found.mean), found.high - found.mean if found.known else 0) >= 0.1 else 3
    bounds = f"[{found.low:+.{digits}f}, {found.high:+.{digits}f}]" if found.known else "[no interval]"
    return f"{found.mean:+.{digits}f} {bounds}"


HEAD = ("claim", "arm", "less", UPDATES, EQUAL_KL, "Hedges' g", "pairs", "seeds", "p (Holm)", "verdict")


def rows(claims: Sequence[Claim]) -> list[dict[str, str]]:
    """A row an arm and rival, under `HEAD`, as text; the controls stand beside the rivals."""
    found = []
    for claim in claims:
        for case in claim.cases:
            for i, one in enumerate(case.comparisons):
                first = one.updates or one.at_kl
                g = "–" if one.updates is None or math.isnan(one.updates.g) else f"{one.updates.g:+.1f}"
                cells = (
                    claim.key,
                    case.arm,
                    one.rival + " (control)" * one.is_control,
                    signed(one.updates),
                    signed(one.at_kl),
                    g,
                    "–" if first is None else "paired" if first.paired else "Welch",
                    str(case.seeds),
                    number(case.p) if i == 0 else "",
                    case.verdict if i == 0 else "",
                )
                found.append(dict(zip(HEAD, cells)))
    return found


def basis(found: Finding) -> str:
    """What all verdicts of a dataset rest on."""
    seeds = min(len(arm.seeds) for arm in found.arms.values())
    return f"{seeds} seed{'s' * (seeds > 1)}, {found.prompts} held-out prompts each: {TABLES[found.table]}."
