"""The paper's claims and the field's counter-claims, each asked of a study at equal updates and at equal KL.

What decides is `rule.RULE`; the fourth claim is about enumerated games, and needs no seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from dense_rlhf.attribution.sources import placebos
from dense_rlhf.evaluation.results import CONTROL, DENSE, SPARSE, Arm, Finding
from dense_rlhf.evaluation.rule import CONTRADICTED, SUPPORTED, UNDECIDED, Case, Comparison, decide, overall
from dense_rlhf.evaluation.words import EQUAL_KL, UPDATES, Measure, p_value, signed, trial_rank, why
from dense_rlhf.statistics import Difference

NOT_ASKED, IDENTITY = "not asked", "an identity"  # in place of a verdict
HELPED = "1b"  # the claim that answers the main question: gold of every dense arm
MANY, BUDGET = 4, 25  # sources and trials of the third claim
GOOD_CRITIC = 0.5  # explained variance of returns from which on the sixth claim calls a critic good
EXACT = 1e-9  # score lost that is rounding


class Matchup(NamedTuple):
    """An arm, its rivals, and the controls that it has to beat as well; a control may be one that is missing."""

    arm: Arm
    rivals: Sequence[str]
    controls: Sequence[str] = ()


class Unasked(NamedTuple):
    """Why a study says nothing of a claim."""

    why: str
    verdict: str = NOT_ASKED


@dataclass(frozen=True)
class Question:
    """A claim as a comparison: `wanted` is the sign of the difference that supports it."""

    key: str
    text: str
    measures: tuple[Measure, ...]
    wanted: int
    asks: Callable[[Finding], list[Matchup] | Unasked]
    denies: bool = False  # the claim is that there is no such difference


@dataclass(frozen=True)
class Claim:
    """A claim with its verdict at equal updates or at equal KL, the reason in words, and the evidence of each arm."""

    key: str
    text: str
    where: str  # `UPDATES`, `EQUAL_KL`, or empty if that makes no difference
    verdict: str
    why: str
    cases: tuple[Case, ...] = ()


# ---------------------------------------------------------------------------------------------------- the questions


def controls_of(finding: Finding, arm: Arm) -> list[str]:
    """The controls of the study; for signed credit also `shuffled`, where it is missing."""
    controls = finding.of_kind(CONTROL)
    placebo = any("shuffled" in c.sources and c.normalise == arm.normalise for c in controls)
    return [c.name for c in controls] + ["shuffled"] * (arm.normalise == "signed" and not placebo)


def _dense(finding: Finding) -> list[Matchup] | Unasked:
    """Every dense arm, but for those that are another, against the sparse one."""
    arms = [arm for arm in finding.of_kind(DENSE) if not arm.same_as]
    if finding.baseline == "reference" or not arms:
        return Unasked("no dense arm to compare with a sparse one")
    return [Matchup(arm, [finding.baseline], controls_of(finding, arm)) for arm in arms]


def _learned(finding: Finding) -> list[Matchup] | Unasked:
    """Every arm of a search that chose against the fixed weights that it could have had; random search is a control."""
    asked = []
    for arm in (a for a in finding.arms.values() if a.search and a.search.strategy != "random"):
        mixed = [o for o in finding.arms.values() if o.sources and set(o.sources) <= set(arm.sources)]
        alike = [o for o in mixed if o.kind == SPARSE or o.normalise == arm.normalise]
        searched = [o for o in alike if o.search and o.trials == arm.trials and set(o.sources) == set(arm.sources)]
        drawn = [o.name for o in searched if o.search.strategy == "random"]
        fixed = [o for o in alike if not o.search]
        if any(o.kind != SPARSE for o in fixed):  # to beat sparse rewards is the first claim
            asked.append(Matchup(arm, [o.name for o in fixed], controls_of(finding, arm) + drawn))
    return asked or Unasked("no arm with learned weights to compare with fixed, dense weights of its sources")


def _wide(finding: Finding) -> list[Matchup] | Unasked:
    """Every arm of four or more learned weights against learned ones of fewer, at as many trials."""
    learned, asked = [a for a in finding.arms.values() if a.trials >= BUDGET], []
    for arm in (a for a in learned if len(a.sources) >= MANY):
        fewer = [o for o in learned if len(o.sources) < len(arm.sources) and o.trials == arm.trials]
        asked += [Matchup(arm, [o.name for o in fewer])] if fewer else []
    if not asked:
        none = f"no search over {MANY} or more sources to compare with one over fewer, both of {BUDGET} or more trials"
        return Unasked(none)
    compared = dict.fromkeys(name for m in asked for name in (m.arm.name, *m.rivals))
    single = [name for name in compared if not _one_search_a_seed(finding.arms[name])]
    if single:
        few = "not one search for each seed, and the claim is about searches"
        return Unasked(f"not decided: {', '.join(single)} {'has' if len(single) == 1 else 'have'} {few}", UNDECIDED)
    return asked


def _one_search_a_seed(arm: Arm) -> bool:
    return bool(arm.search) and arm.search.number == len(arm.seeds) > 1


def _attention(finding: Finding) -> list[Matchup] | Unasked:
    """Every arm of attention's credit against arms of the same credit in a random order."""
    controls = [c for c in finding.of_kind(CONTROL) if any(placebos().get(s) == "attention" for s in c.sources)]
    asked = []
    for arm in finding.of_kind(DENSE):
        rivals = [c.name for c in controls if c.normalise == arm.normalise]
        if set(arm.sources) <= {"attention", "terminal"} and rivals:
            asked.append(Matchup(arm, rivals))
    return asked or Unasked("no arm of attention beside one of shuffled attention")


def _cancelled(finding: Finding) -> list[Matchup] | Unasked:
    """`_dense`, where lambda is 1 and the sparse arm's critic is good."""
    asked = _dense(finding)
    if isinstance(asked, Unasked):
        return asked
    if (lambdas := finding.parameter_values("ppo_lam")) != [1]:
        return Unasked(f"lambda is {', '.join(f'{lam:g}' for lam in lambdas) or 'not known'}, wanted 1")
    late = finding.late(finding.baseline, "explained_variance_mc") or finding.late(
        finding.baseline, "explained_variance"
    )
    explained = list(late.values())
    if not explained or (mean := sum(explained) / len(explained)) < GOOD_CRITIC:
        share = f"{mean:.2f}" if explained else "an unknown share"
        return Unasked(f"the sparse arm's critic explains {share} of the variance of returns, wanted {GOOD_CRITIC:g}")
    return asked


GOLD = Measure("gold", "log-odds", "gold")
LOSS = Measure("value loss", "a ratio", "value_loss", log=True)
MC_ERROR = Measure("the critic's error against returns-to-go", "a ratio", "value_error_mc", log=True)
QUESTIONS = (
    Question("1a", "Dense rewards cut the value loss", (LOSS, MC_ERROR), -1, _dense),
    Question("1b", "Dense rewards speed learning", (GOLD,), 1, _dense),
    Question("2", "Learned weights beat fixed ones downstream", (GOLD,), 1, _learned),
    Question("3", f"{MANY} sources degrade at {BUDGET} trials", (GOLD,), -1, _wide),
    Question("5", "Attention's credit beats its shuffled placebo", (GOLD,), 1, _attention),
    Question("6", "With lambda 1 and a good critic nothing is left to gain", (GOLD,), 1, _cancelled, denies=True),
)
THESE = "These weights, from one search, beat fixed ones downstream"


def _text(question: Question, asked: list[Matchup]) -> str:
    return THESE if question.key == "2" and not all(_one_search_a_seed(m.arm) for m in asked) else question.text


# ---------------------------------------------------------------------------------------------------- the verdicts


@lru_cache(maxsize=256)
def judge(finding: Finding) -> tuple[Claim, ...]:
    """All claims on one dataset, in the order of their keys."""
    claims = [*ask(finding, QUESTIONS), *_fourth(finding.shaping)]
    return tuple(sorted(claims, key=lambda claim: claim.key))


def ask(finding: Finding, questions: Sequence[Question]) -> list[Claim]:
    """Each question at equal updates and at equal KL, or why it is not asked; all cases share the error rates."""
    asked = {question: question.asks(finding) for question in questions}
    open_ = {(q, where): m for q, m in asked.items() if not isinstance(m, Unasked) for where in (UPDATES, EQUAL_KL)}
    cases = [_case(finding, q, m, where) for (q, where), matchups in open_.items() for m in matchups]
    decided = iter(decide(cases, len(finding.judged.get(finding.baseline, ()))))
    claims = [
        Claim(q.key, q.text, "", u.verdict, f"{u.why[0].upper()}{u.why[1:]}.")
        for q, u in asked.items()
        if isinstance(u, Unasked)
    ]
    for (question, where), matchups in open_.items():
        own = tuple(next(decided) for _ in matchups)
        verdict = overall([case.verdict for case in own])
        reason = why(own, question.measures, verdict) + _explained(finding, question, own)
        verdict = _denied(verdict) if question.denies else verdict
        claims.append(Claim(question.key, _text(question, matchups), where, verdict, reason, own))
    return claims


def _explained(finding: Finding, question: Question, cases: Sequence[Case]) -> str:
    """What a verdict's evidence leaves out: of the value loss, what each critic explains of the returns-to-go, however
    much they vary; of learned weights, how well what a search sees predicts what it is for."""
    if GOLD in question.measures:
        searches = [s for case in cases if (s := finding.arms[case.arm].search)] if question.key in ("2", "3") else []
        return "".join(f" {trial_rank(finding, n)}" for n in sorted({s.updates for s in searches}) if n)
    names = dict.fromkeys(name for case in cases for name in (case.arm, *(c.rival for c in case.comparisons)))
    late = {name: list(finding.late(name, "explained_variance_mc").values()) for name in names}
    shares = ", ".join(f"{name} {sum(known) / len(known):.2f}" for name, known in late.items() if known)
    return f" Explained variance of returns-to-go, late in training: {shares}." if shares else ""


def _denied(verdict: str) -> str:
    """The verdict on "there is no such difference" from the one on the difference."""
    return {UNDECIDED: UNDECIDED, SUPPORTED: CONTRADICTED}.get(verdict, SUPPORTED)


def _case(finding: Finding, question: Question, matchup: Matchup, where: str) -> Case:
    arm, rivals, controls = matchup
    rivals = sorted(rivals, key=lambda name: -finding.arms[name].gold.mean)
    main, *more = question.measures
    measures = [main, *(m for m in more if finding.history is not None and m.column in finding.history)]
    comparisons = tuple(
        Comparison(name, name not in rivals, measure.text, kl, difference)
        for name in (*rivals, *controls)
        for measure in measures
        for kl, difference in _differences(finding, measure, (arm.name, name), where)
    )
    return Case(arm.name, comparisons, question.wanted, main.margin(finding.margin))


def _differences(
    finding: Finding, measure: Measure, pair: tuple[str, str], where: str
) -> list[tuple[float | None, Difference | None]]:
    """After equal updates one; at equal KL, with its level, one for each level that both reach, and for the lowest."""
    scale, levels = (math.log if measure.log else float), finding.levels or (math.nan,)
    if pair[1] not in finding.arms:
        return [(None if where == UPDATES else levels[0], None)]
    if where == UPDATES:
        late = (measure.column, scale) if measure is not GOLD else None
        return [(None, finding.compare_late(*pair, *late) if late else finding.compare(*pair))]
    low, *further = [(kl, finding.compare_at_kl(*pair, measure.column, kl, scale)) for kl in levels]
    return [low, *(at for at in further if at[1])]


# ---------------------------------------------------------------------------------------------------- the fourth claim


def _fourth(shaping: Mapping) -> list[Claim]:
    """What additive rewards keep, by enumeration of token MDPs in notebook 03."""
    regret = [r for r in (shaping.get("regret") or {}).values() if isinstance(r, (int, float))]
    identity = "Any reward that keeps each response's sum keeps the objective, an even spread included; no verdict"
    checked = f": at most {max(regret):.1g} lost on {shaping.get('games', 'the')} games" if regret else ""
    below = f" at gamma {shaping['gamma']:g}" if isinstance(shaping.get("gamma"), (int, float)) else " below gamma 1"
    return [
        Claim("4a", "Additive rewards keep the objective at gamma 1", "", IDENTITY, f"{identity}{checked}."),
        _enumerated("4b", "Additive rewards keep the policy that learning settles on", shaping.get("settles")),
        _enumerated("4c", f"Additive rewards keep the best response{below}", shaping.get("discounted")),
    ]


def _enumerated(key: str, text: str, by_reward: Mapping | None) -> Claim:
    """Contradicted if some reward loses score on enumerated games; which do and which do not. Sparse is the measure."""
    given = {name: row for name, row in (by_reward or {}).items() if name != "sparse" and isinstance(row, Mapping)}
    if not given:
        return Claim(key, text, "", NOT_ASKED, "Notebook 03 has not asked this.")
    losing = sorted((name for name, row in given.items() if row["lost"] > EXACT), key=lambda n: -given[n]["lost"])
    losses = ", ".join(f"{name} {given[name]['lost']:.3f} (in {given[name]['share']:.0%} of games)" for name in losing)
    kept = ", ".join(name for name in given if name not in losing)
    games = next(iter(given.values()))["games"]
    parts = [f"Score lost, mean of {games} games: {losses}"] * bool(losing) + [f"None lost by {kept}"] * bool(kept)
    return Claim(key, text, "", CONTRADICTED if losing else SUPPORTED, ". ".join(parts) + ". Exact, without seeds.")


# ---------------------------------------------------------------------------------------------------- the evidence

HEAD = ("claim", "at", "arm", "less", "difference", "seeds", "p, differs", "p, equal", "verdict")


def rows(judged: Sequence[Claim]) -> list[dict[str, str]]:
    """One row of text for each comparison of an arm with a rival or control, with the columns `HEAD`."""
    logs = {m.text: m.log for question in QUESTIONS for m in question.measures}
    cells = []
    for claim, case in ((one, case) for one in judged for case in one.cases):
        for i, c in enumerate(case.comparisons):
            at = claim.where if c.kl is None or math.isnan(c.kl) else f"{c.kl:.1f} nats"
            rival, d = c.rival + " (control)" * c.is_control, c.difference
            seeds = "–" if d is None else f"{d.seeds} {'paired' if d.paired else 'Welch'}"
            answer = (p_value(case.p_differs)[2:], p_value(case.p_equal)[2:], case.verdict) if i == 0 else ("", "", "")
            key = claim.key if c.measure == case.comparisons[0].measure else f"{claim.key}, {c.measure}"
            cells.append((key, at, case.arm, rival, signed(d, logs[c.measure]), seeds, *answer))
    return [dict(zip(HEAD, row)) for row in cells]
