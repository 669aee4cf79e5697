"""What the trainings of an ablation answer, by the rule that decides the claims."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from dense_rlhf.evaluation.claims import GOLD
from dense_rlhf.evaluation.frontier import difference_at_kl
from dense_rlhf.evaluation.rule import NO_DIFFERENCE, Case, Comparison, decide, overall
from dense_rlhf.evaluation.words import EQUAL_KL, UPDATES, p_value, plural, signed, why
from dense_rlhf.statistics import Difference, difference, paired

if TYPE_CHECKING:
    from dense_rlhf.evaluation.arms import Arms

Rivals = tuple[Sequence[str], Sequence[str]]  # of an arm: rivals, and controls that it has to beat as well


def answers(
    question: str, asked: Mapping[str, Rivals], arms: Arms, margin: float, test: Callable = paired
) -> list[dict[str, str]]:
    """Whether each arm of `asked` has more gold than its rivals and controls, at equal updates and at equal KL.

    A row for each of the two: question, at, verdict, why. Equal KL is the largest that both arms of a seed reach.
    `margin` is in log-odds. `test` is `welch` where a seed gives the arms other prompts. All tests of a question share
    the error rates of `rule.RULE`.
    """
    places = UPDATES, EQUAL_KL
    cases = [_case(arm, rivals, arms, margin, where, test) for where in places for arm, rivals in asked.items()]
    decided = decide(cases, len(arms.judged["reference"]))
    rows = []
    for where, own in zip(places, (decided[: len(asked)], decided[len(asked) :])):
        verdict = overall([case.verdict for case in own])
        rows.append({"question": question, "at": where, "verdict": verdict, "why": why(own, (GOLD,), verdict)})
    return rows


def answer_pairs(
    question: str, at: str, ours: Sequence[float], theirs: Sequence[float], margin: float
) -> dict[str, str]:
    """Whether `ours` are higher than `theirs`, both (N,) of the same functions: a row as of `answers`."""
    more = paired(ours, theirs)
    case = decide([Case("ours", (Comparison("theirs", False, "", None, more),), 1, margin)], more.seeds)[0]
    p = case.p_equal if case.verdict == NO_DIFFERENCE else case.p_differs
    reason = f"{signed(more)} ({plural(more.seeds, 'function')}, margin {margin:g}, {p_value(p)})"
    return {"question": question, "at": at, "verdict": case.verdict, "why": reason}


def _case(arm: str, rivals: Rivals, arms: Arms, margin: float, where: str, test: Callable) -> Case:
    names = [(name, is_control) for is_control, group in enumerate(rivals) for name in group]
    kl = math.nan if where == EQUAL_KL else None
    compared = (Comparison(name, bool(c), GOLD.text, kl, _less(arm, name, arms, where, test)) for name, c in names)
    return Case(arm, tuple(compared), 1, margin)


def _less(ours: str, theirs: str, arms: Arms, where: str, test: Callable) -> Difference:
    if where == EQUAL_KL:
        return difference_at_kl(arms.history, ours, theirs, test=test)
    return difference(arms.judged[ours], arms.judged[theirs], test=test)
