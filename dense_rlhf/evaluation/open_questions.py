"""Open questions that the settings or the arms of a study answer, by the rule that decides the claims."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from dense_rlhf.evaluation.claims import GOLD, HELPED, Claim, Matchup, Question, ask, controls_of, judge
from dense_rlhf.evaluation.results import CONTROL, DENSE, Finding
from dense_rlhf.evaluation.rule import Case, Comparison, decide, overall
from dense_rlhf.evaluation.words import EQUAL_KL, UPDATES, why
from dense_rlhf.statistics import Difference, paired

Answer = tuple[str, Claim]  # the dataset or setting whose page shows it; its key and text are the question


def answers(study: str, findings: Sequence[Finding]) -> list[Answer]:
    """What a study answers; nothing for one that asks no open question, or lacks a setting or an arm."""
    by_name = {finding.dataset: finding for finding in findings}
    return [answer for text, asks in OPEN.get(study, {}).items() for answer in asks(text, by_name)]


def _helps(question: str, by_name: Mapping[str, Finding], settings: Sequence[str]) -> list[Answer]:
    """Whether dense rewards beat sparse ones and controls in a setting: the claim that answers the main question."""
    return [
        (setting, replace(claim, key=question, text=question))
        for setting in settings
        if setting in by_name
        for claim in judge(by_name[setting])
        if claim.key == HELPED
    ]


def _beats(question: str, by_name: Mapping[str, Finding], arm: str, rival: str) -> list[Answer]:
    """Whether an arm has more gold than a rival and the controls."""

    def asks(finding: Finding) -> list[Matchup]:
        return [Matchup(finding.arms[arm], [rival], controls_of(finding, finding.arms[arm]))]

    return [
        (name, claim)
        for name, finding in by_name.items()
        if {arm, rival} <= set(finding.arms)
        for claim in ask(finding, [Question(question, question, (GOLD,), 1, asks)])
    ]


def _gains_more(question: str, by_name: Mapping[str, Finding], low: str, high: str) -> list[Answer]:
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
        own = tuple(case for case, (_, place, _) in zip(cases, asked) if place == where)
        verdict = overall([case.verdict for case in own])
        reason = f"Of the gain with {high}, less that with {low}. {why(own, (GOLD,), verdict)}"
        rows.append((high, Claim(question, question, where, verdict, reason, own)))
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


OPEN: dict[str, dict[str, Callable[[str, Mapping[str, Finding]], list[Answer]]]] = {  # by the study that asks
    "length": {
        "Do dense rewards help more with 48 tokens than with 12?": partial(
            _gains_more, low="reviews-tokens-12", high="reviews-tokens-48"
        )
    },
    "reward_model": {
        "Does credit from a worse reward model still teach?": partial(
            _helps, settings=("reviews-labels-1", "reviews-labels-10")
        )
    },
    "kl": {
        "Do dense rewards help more without a price of KL than at four times the usual?": partial(
            _gains_more, low="reviews-kl-fourfold", high="reviews-kl-free"
        )
    },
    "budget": {
        "Does credit from eight times the evaluations teach more?": partial(
            _gains_more, low="reviews-single", high="reviews-eightfold"
        )
    },
    "normalisation": {
        "Does credit with its signs teach more than its softmax?": partial(
            _beats, arm="shap-signed", rival="softmax-1"
        ),
        "Does a sharp softmax of credit teach more than the paper's?": partial(
            _beats, arm="softmax-003", rival="softmax-1"
        ),
    },
}
