"""Open questions that the settings of a study answer, by the rule that decides the claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dense_rlhf.evaluation.claims import GOLD, HELPED, judge
from dense_rlhf.evaluation.results import CONTROL, DENSE, Finding
from dense_rlhf.evaluation.rule import Case, Comparison, decide, overall
from dense_rlhf.evaluation.words import EQUAL_KL, UPDATES, why
from dense_rlhf.statistics import Difference, paired

LONGER = "Do dense rewards help more where responses are longer?"
WORSE = "Does credit from a worse reward model still teach?"
Row = dict[str, str]  # question, at, verdict, why; and dataset, whose page shows it


def by_settings(study: str, findings: Sequence[Finding]) -> list[Row]:
    """What the settings of a study answer; nothing for a study that asks no open question, or lacks a setting."""
    by_name = {finding.dataset: finding for finding in findings}
    if study == "length":
        return _gains_more(LONGER, by_name, "reviews-tokens-12", "reviews-tokens-48")
    if study == "reward_model":
        return [row for name in ("reviews-labels-1", "reviews-labels-10") for row in _helps(WORSE, by_name, name)]
    return []


def _helps(question: str, by_name: Mapping[str, Finding], setting: str) -> list[Row]:
    """Whether dense rewards beat sparse ones and controls in one setting: the claim that answers the main question."""
    if setting not in by_name:
        return []
    claims = [claim for claim in judge(by_name[setting]) if claim.key == HELPED]
    return [_row(question, f"{claim.where}, {setting}", claim.verdict, claim.why, setting) for claim in claims]


def _row(question: str, at: str, verdict: str, why: str, dataset: str) -> Row:
    return {"question": question, "at": at, "verdict": verdict, "why": why, "dataset": dataset}


def _gains_more(question: str, by_name: Mapping[str, Finding], low: str, high: str) -> list[Row]:
    """Whether dense arms gain more over sparse ones and over controls in the setting `high` than in `low`.

    At equal KL: at one KL, the largest that every run of both settings reaches.
    """
    if not {low, high} <= set(by_name):
        return []
    settings = by_name[low], by_name[high]
    level = min((min(f.levels) for f in settings if f.levels), default=None)
    places = {UPDATES: None} | ({EQUAL_KL: level} if all(f.levels for f in settings) else {})
    arms = [arm.name for arm in settings[1].of_kind(DENSE) if arm.name in settings[0].arms]
    asked = [(arm, where, kl) for where, kl in places.items() for arm in arms]
    cases = decide([_case(arm, kl, settings) for arm, _, kl in asked], min(len(f.judged[f.baseline]) for f in settings))
    rows = []
    for where in places:
        own = [case for case, (_, place, _) in zip(cases, asked) if place == where]
        verdict = overall([case.verdict for case in own])
        reason = f"Of the gain with {high}, less that with {low}. {why(own, (GOLD,), verdict)}"
        rows.append(_row(question, where, verdict, reason, high))
    return rows


def _case(arm: str, kl: float | None, settings: tuple[Finding, Finding]) -> Case:
    rivals = settings[1].baseline, *(control.name for control in settings[1].of_kind(CONTROL))
    compared = [Comparison(name, i > 0, GOLD.text, kl, _more(arm, name, kl, settings)) for i, name in enumerate(rivals)]
    return Case(arm, tuple(compared), 1, settings[1].margin)


def _more(arm: str, rival: str, kl: float | None, settings: tuple[Finding, Finding]) -> Difference | None:
    """What an arm gains over a rival in the second setting, less the same in the first, seed by seed."""
    first, second = (_gains(finding, arm, rival, kl) for finding in settings)
    both = [seed for seed in second if seed in first]
    return paired([second[seed] for seed in both], [first[seed] for seed in both]) if both else None


def _gains(finding: Finding, arm: str, rival: str, kl: float | None) -> dict[int, float]:
    """Gold of an arm less a rival's by seed: of the policies that trainings end with, or of those at a KL."""
    ours, theirs = (_gold(finding, name, kl) for name in (arm, rival))
    return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}


def _gold(finding: Finding, arm: str, kl: float | None) -> dict[int, float]:
    if kl is not None:
        return dict(finding.at(arm, kl)["gold"])
    return {seed: float(judged["gold"].mean()) for seed, judged in finding.judged.get(arm, {}).items()}
