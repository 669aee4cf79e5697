"""A verdict on each of the paper's claims, by a fixed rule from the runs: supported, contradicted or undecided.

`RULE` describes what `judge` does, and is shown with every verdict.
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
    "Each claim says that an arm differs from its rivals in one direction. An arm supports the claim if it differs in "
    "that direction from every rival and every control of the study (uniform, random, shuffled: they ignore what the "
    "tokens are), both at equal updates and at equal KL. It contradicts the claim if it differs in the opposite "
    "direction from some rival, both at equal updates and at equal KL. Seeds are the unit: the test is Student's "
    "paired t where a seed gave both arms the same prompts in the same order and the same start, otherwise Welch's; "
    "intervals are at 95 %, tests two-sided. An arm's p is the largest of the tests that its answer needs, corrected "
    f"over all arms and claims of the dataset (Holm); it must be below {ALPHA:g}. A claim is supported if at least one "
    "arm supports it and none contradicts it, contradicted if at least one arm contradicts it and none supports it, "
    "and undecided otherwise; one seed decides nothing. An identity is checked by enumeration. Learned weights come "
    "from one search per arm, so the intervals do not cover variation between searches."
)


Matchup = tuple[Arm, Sequence[str], Sequence[str]]  # an arm, its rivals, the controls that it has to beat


@dataclass(frozen=True)
class Question:
    """A claim as a comparison: `wanted` is the sign of the difference that supports it."""

    key: str
    text: str
    measure: str
    unit: str
    wanted: int
    asks: Callable[[Finding], list[Matchup]]
    late: str = ""  # a metric of training, over its second half; if empty, gold on held-out prompts


@dataclass(frozen=True)
class Comparison:
    """Differences of one arm from another, at equal updates and at equal KL; None where the runs lack the data."""

    rival: str
    is_control: bool
    updates: Difference | None
    at_kl: Difference | None

    @property
    def differences(self) -> dict[str, Difference | None]:
        return {UPDATES: self.updates, EQUAL_KL: self.at_kl}

    def p(self, sign: int) -> float:
        """The larger of the two p-values; 1 unless both differences have this sign."""
        return max(d.p if d and d.mean * sign > 0 else 1.0 for d in self.differences.values())


@dataclass(frozen=True)
class Case:
    """The evidence of one arm on one claim; `p` is corrected over all cases of the dataset."""

    arm: str
    comparisons: tuple[Comparison, ...]
    wanted: int
    p: float = 1.0
    tests: int = 1  # how many cases p was corrected for
    verdict: str = UNDECIDED

    @property
    def supports(self) -> float:
        """p that the arm differs in the wanted direction from all rivals and controls."""
        return max(comparison.p(self.wanted) for comparison in self.comparisons)

    @property
    def opposes(self) -> float:
        """p that the arm differs in the opposite direction from at least one rival (Bonferroni)."""
        rivals = [comparison.p(-self.wanted) for comparison in self.comparisons if not comparison.is_control]
        return min(1.0, len(rivals) * min(rivals))

    @property
    def raw_p(self) -> float:
        """Uncorrected p of the likelier answer; the other's is then 1."""
        return min(self.supports, self.opposes)

    @property
    def seeds(self) -> int:
        """Seeds of the comparison with the fewest."""
        return min((d.seeds for d in self._known), default=0)

    @property
    def has_interval(self) -> bool:
        """Whether any of the differences has an interval."""
        return any(d.known for d in self._known)

    @property
    def _known(self) -> list[Difference]:
        return [d for comparison in self.comparisons for d in comparison.differences.values() if d]


@dataclass(frozen=True)
class Claim:
    """A claim of the paper with its verdict, the reason in words, and the evidence of each arm."""

    key: str
    text: str
    verdict: str
    why: str
    unit: str = ""
    cases: tuple[Case, ...] = ()


# ---------------------------------------------------------------------------------------------------- the questions


def _controls(finding: Finding) -> list[str]:
    return [arm.name for arm in finding.of_kind(CONTROL)]


def _dense(finding: Finding) -> list[Matchup]:
    """Every dense arm against the sparse one, if there is one."""
    rivals = [finding.baseline] if finding.baseline != "reference" else []
    return [(arm, rivals, _controls(finding)) for arm in finding.of_kind(DENSE) if rivals]


def _learned(finding: Finding) -> list[Matchup]:
    """Every arm with learned weights against the fixed weights that its search could have had."""
    asked = []
    for arm in (a for a in finding.arms.values() if a.trials):
        fixed = [
            other.name
            for other in finding.arms.values()
            if other.sources
            and not other.trials
            and set(other.sources) <= set(arm.sources)
            and (other.kind == SPARSE or other.normalise == arm.normalise)
        ]
        asked += [(arm, fixed, _controls(finding))] if fixed else []
    return asked


def _wide(finding: Finding) -> list[Matchup]:
    """Every arm with four or more learned weights against the learned ones with fewer, at as many trials."""
    learned = [a for a in finding.arms.values() if a.trials >= BUDGET]
    asked = []
    for arm in (a for a in learned if len(a.sources) >= MANY):
        fewer = [o.name for o in learned if len(o.sources) < len(arm.sources) and o.trials == arm.trials]
        asked += [(arm, fewer, [])] if fewer else []
    return asked


GOLD = "gold after training", "log-odds"
LOSS = "value loss, second half of training", "squared score"
QUESTIONS = (
    Question("1a", "Dense rewards cut the value loss", *LOSS, -1, _dense, "value_loss"),
    Question("1b", "Dense rewards speed learning", *GOLD, 1, _dense),
    Question("2", "Learned weights beat fixed ones downstream", *GOLD, 1, _learned),
    Question("3", f"{MANY} sources degrade at {BUDGET} trials", *GOLD, -1, _wide),
)
IDENTITY = "Additive attributions keep the optimal policy"
NOT_ASKED = {
    "1a": "no dense arm to compare with a sparse one",
    "1b": "no dense arm to compare with a sparse one",
    "2": "no arm with learned weights to compare with fixed weights of its sources",
    "3": f"no search over {MANY} or more sources to compare with one over fewer, both of {BUDGET} or more trials",
}


# ---------------------------------------------------------------------------------------------------- the rule


@lru_cache(maxsize=8)
def judge(finding: Finding) -> tuple[Claim, ...]:
    """All claims on one dataset, by `RULE`."""
    asked = [(q, [_case(finding, q, *matchup) for matchup in q.asks(finding)]) for q in QUESTIONS]
    tested = [case for _, cases in asked for case in cases if case.has_interval]
    corrected = dict(zip(map(id, tested), holm([case.raw_p for case in tested])))
    claims = []
    for question, cases in asked:
        decided = tuple(_decide(case, corrected.get(id(case), 1.0), len(tested)) for case in cases)
        verdict = _overall([case.verdict for case in decided])
        why = _why(question, decided, verdict)
        claims.append(Claim(question.key, question.text, verdict, why, question.unit, decided))
    return *claims, _identity(finding.shaping)


def _case(finding: Finding, question: Question, arm: Arm, rivals: Sequence[str], controls: Sequence[str]) -> Case:
    comparisons = []
    for rival in (*sorted(rivals, key=lambda name: -finding.arms[name].gold.mean), *controls):
        pair = arm.name, rival
        updates = finding.compare_late(*pair, question.late) if question.late else finding.compare(*pair)
        at_kl = finding.compare_at_kl(*pair, question.late or "gold")
        comparisons.append(Comparison(rival, rival in controls, updates, at_kl))
    return Case(arm.name, tuple(comparisons), question.wanted)


def _decide(case: Case, p: float, tests: int) -> Case:
    verdict = UNDECIDED
    if case.has_interval and p < ALPHA:
        verdict = SUPPORTED if case.supports < case.opposes else CONTRADICTED
    return replace(case, p=p, tests=tests, verdict=verdict)


def _overall(verdicts: Sequence[str]) -> str:
    decided = set(verdicts) - {UNDECIDED}
    return decided.pop() if len(decided) == 1 else UNDECIDED


def _why(question: Question, cases: Sequence[Case], verdict: str) -> str:
    """The reason for the verdict, with the numbers of the runs."""
    if not cases:
        return f"Not asked in this study: {NOT_ASKED[question.key]}."
    if verdict != UNDECIDED:
        named = "; ".join(_words(case, question) for case in cases if case.verdict == verdict)
        return f"{sum(case.verdict == verdict for case in cases)} of {len(cases)} arms: {named}."
    if {SUPPORTED, CONTRADICTED} <= {case.verdict for case in cases}:
        return "The arms disagree: " + "; ".join(f"{c.arm} {c.verdict}" for c in cases if c.verdict != UNDECIDED) + "."
    if not any(case.has_interval for case in cases):
        return "One seed has no interval."
    closest = min((case for case in cases if case.has_interval), key=lambda case: case.raw_p)
    return f"Closest to a verdict: {_words(closest, question)}. {_open(closest)}{seen(closest, question.unit)}"


def _words(case: Case, question: Question) -> str:
    """An arm and its difference from its first rival."""
    first = case.comparisons[0]
    parts = [f"{signed(d)} at {where}" for where, d in first.differences.items() if d]
    return (
        f"{case.arm} less {first.rival} in {question.measure}: {', '.join(parts) or 'unknown'} ({question.unit}; "
        f"{case.seeds} seed{'s' * (case.seeds != 1)}, p {number(case.p)} after Holm)"
    )


def _open(case: Case) -> str:
    """The comparisons that keep an arm from supporting the claim."""
    missing = [
        f"{comparison.rival} at {where}"
        for comparison in case.comparisons
        for where, d in comparison.differences.items()
        if d is None or d.mean * case.wanted <= 0 or d.p >= ALPHA
    ]
    return f"No significant difference, without correction, from: {', '.join(missing)}. " if missing else ""


def seen(case: Case, unit: str) -> str:
    """The difference from the first rival that this many seeds would have shown, at Holm's first step."""
    rival, first = case.comparisons[0].rival, case.comparisons[0].updates
    if first and first.df > 0 and first.error == first.mean == 0:
        return f"{case.arm} and {rival} are the same in every seed."
    least = detectable(first, tests=case.tests) if first else math.inf
    if not math.isfinite(least):
        return ""
    return f"{case.seeds} seeds detect a difference of {number(least)} ({unit}) at equal updates with power 0.8."


def _identity(shaping: Mapping) -> Claim:
    """The fourth claim, checked by enumerating every response: no seeds and no interval."""
    regret = {name: r for name, r in (shaping.get("regret") or {}).items() if isinstance(r, (int, float))}
    regret.pop("sparse", None)
    if not regret:
        return Claim("4", IDENTITY, UNDECIDED, "Not asked in this study: notebook 03 has not run.")
    worst = max(regret, key=regret.get)
    verdict = SUPPORTED if regret[worst] < 1e-9 else CONTRADICTED
    lost = shaping.get("discounted_regret") or {}
    cosine = shaping.get("cosine") or {}
    measured = [name for name in regret if name in lost and name in cosine]
    words = "{} loses {:.2f} at γ = 0.8, and its expected advantages have cosine {:.2f} with the true ones"
    more = [words.format(name, lost[name], cosine[name]) for name in measured]
    why = (
        f"Score lost by the best response at γ = 1, mean over {shaping.get('games', 'the')} enumerated token MDPs: at "
        f"most {regret[worst]:.1g} ({worst}). This does not cover γ < 1, or learning"
    )
    return Claim("4", IDENTITY, verdict, f"{why}{': ' * bool(more)}{'; '.join(more)}.")


# ---------------------------------------------------------------------------------------------------- words


def number(value: float) -> str:
    """A p or a difference of any size, with two significant digits if small, else two decimals."""
    return f"{value:.2g}" if abs(value) < 0.1 else f"{value:.2f}"


def signed(difference: Difference | None) -> str:
    """A difference with its sign and interval; a dash if it is None."""
    if difference is None:
        return "–"
    digits = 2 if max(abs(difference.mean), difference.high - difference.mean if difference.known else 0) >= 0.1 else 3
    bounds = f"[{difference.low:+.{digits}f}, {difference.high:+.{digits}f}]" if difference.known else "[no interval]"
    return f"{difference.mean:+.{digits}f} {bounds}"


HEAD = ("claim", "arm", "less", UPDATES, EQUAL_KL, "Hedges' g", "pairs", "seeds", "p (Holm)", "verdict")


def rows(claims: Sequence[Claim]) -> list[dict[str, str]]:
    """One row of text for each pair of arm and rival (or control), with the columns `HEAD`."""
    cells = []
    for key, case in [(claim.key, case) for claim in claims for case in claim.cases]:
        for i, comparison in enumerate(case.comparisons):
            updates, at_kl = comparison.updates, comparison.at_kl
            either = updates or at_kl
            rival = comparison.rival + " (control)" * comparison.is_control
            g = "–" if updates is None or math.isnan(updates.g) else f"{updates.g:+.1f}"
            pairs = "–" if either is None else "paired" if either.paired else "Welch"
            answer = (number(case.p), case.verdict) if i == 0 else ("", "")
            sides = key, case.arm, rival, signed(updates), signed(at_kl)
            cells.append((*sides, g, pairs, str(case.seeds), *answer))
    return [dict(zip(HEAD, row)) for row in cells]


def basis(finding: Finding) -> str:
    """Seeds and prompts that all verdicts of a dataset rest on, in words."""
    seeds = min(len(arm.seeds) for arm in finding.arms.values())
    return f"{seeds} seed{'s' * (seeds > 1)}, {finding.prompts} held-out prompts each: {TABLES[finding.table]}."
