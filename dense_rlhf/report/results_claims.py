"""What recorded studies say of each claim, as rows for `RESULTS.md`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dense_rlhf.config.params import ABLATIONS
from dense_rlhf.evaluation.claims import IDENTITY, NOT_ASKED, QUESTIONS, Claim, judge
from dense_rlhf.evaluation.open_questions import OPEN, answers
from dense_rlhf.evaluation.results import DRAWN, Finding
from dense_rlhf.evaluation.rule import CONTRADICTED, NO_DIFFERENCE, SUPPORTED, UNDECIDED, Case, overall
from dense_rlhf.evaluation.words import EQUAL_KL, LEADS, NEAREST, UPDATES, p_value, plural, signed
from dense_rlhf.report.record import Outline
from dense_rlhf.runs import RunFolder

ANSWERS = SUPPORTED, CONTRADICTED, NO_DIFFERENCE  # in this order, others follow
ASKED = tuple(question.key for question in QUESTIONS)
MARKS = {SUPPORTED: "+", CONTRADICTED: "−", NO_DIFFERENCE: "=", UNDECIDED: "?"}
FEW = 3  # names that a list has at most
LEAD = re.compile(rf"(?:{NEAREST}|(?:{'|'.join(LEADS.values())}), \d+ of \d+ arms?): ")  # of a reason
ASKED_BY = {  # open questions by the ablation that asks
    "contextual": ["Do weights that depend on the token teach more than constant ones?"],
    "human": ["Does credit from words that people marked teach more than SHAP?"],
    "dimension": ["Does each further source need more trials?"],
    "ppo": [
        "Do dense rewards teach more at lambda 0.8 than at the usual one?",
        "Do dense rewards help where the critic starts as the reward model?",
    ],
    "baselines": [
        "Do dense rewards help without a critic?",
        "Does PPO with its critic end above RLOO, at one step size?",
    ],
} | OPEN


@dataclass(frozen=True)
class Study:
    """A recorded study: its outline, its runs, and what they say."""

    outline: Outline
    runs: Sequence[RunFolder]
    findings: Sequence[Finding]
    not_committed: Sequence[str] = ()

    @property
    def name(self) -> str:
        return self.outline.study

    def named(self, finding: Finding) -> str:
        """The study, or its dataset or setting where it has several."""
        return self.name if len(self.findings) == 1 else finding.dataset

    def page(self, finding: Finding) -> str:
        return f"reports/{self.name}/comparison-{finding.dataset}.html"

    @property
    def drawn_once(self) -> list[str]:
        """What all seeds share, so that no interval covers another draw of it."""
        if self.findings:
            return self.findings[0].drawn_once
        trained = any(answer["at"] == UPDATES for _, answer in self.answers())
        return list(DRAWN.values()) if trained else []

    def answers(self) -> list[tuple[RunFolder, dict[str, str]]]:
        """What its ablation notebooks answer, each with its run."""
        runs = [run for run in self.runs if run.record()["notebook"] in ABLATIONS]
        return [(run, answer) for run in runs for answer in run.load_json("metrics.json").get("answers") or ()]


def claims(studies: Sequence[Study]) -> list[dict]:
    """A row for each claim that a dataset or a setting is asked, at each place."""
    return [
        _claim(claim) | {"study": study.named(finding), "page": study.page(finding)}
        for study, finding in each(studies)
        for claim in judge(finding)
    ]


def open_questions(studies: Sequence[Study]) -> list[dict]:
    """A row for each answer to an open question; where no recorded study asks one, a row that names who would."""
    across = [
        _claim(claim) | {"study": study.name, "page": f"reports/{study.name}/comparison-{dataset}.html"}
        for study in studies
        for dataset, claim in answers(study.name, study.findings)
    ]
    within = [
        _claim(_answer(answer)) | {"study": study.name, "page": f"reports/{study.name}/comparison-{run.path.name}.html"}
        for study in studies
        for run, answer in study.answers()
    ]
    unasked = [
        _claim(Claim(text, text, "", NOT_ASKED, f"params/ablations/{name}.yaml")) | {"study": "", "page": ""}
        for name, questions in ASKED_BY.items()
        if name not in {study.name for study in studies}
        for text in questions
    ]
    return across + within + unasked


def _answer(answer: Mapping[str, str]) -> Claim:
    """What an ablation's notebook answers, its reason cut short."""
    return Claim(answer["question"], answer["question"], answer["at"], answer["verdict"], _first(answer["why"]))


def _first(why: str) -> str:
    """A reason up to its first interval, without what the verdict and the page's head say; all, if it has none."""
    why = LEAD.sub("", why).replace(" after Holm)", ")")
    sentences = re.split(r"(?<=[.)]) (?=[A-Z])", why)
    number = next((n for n, sentence in enumerate(sentences) if "[" in sentence), len(sentences))
    return " ".join(sentences[: number + 1])


def by_key(rows: Sequence[dict]) -> list[dict]:
    """By claim or question: at each place, by verdict, the first that says so, and how many do."""
    asked: dict[str, list[dict]] = {}
    for row in rows:
        asked.setdefault(row["key"], []).append(row)
    return [own[0] | {"at": _by_place(_answered(own))} for _, own in sorted(asked.items())]


def _by_place(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """By where a claim was asked, a row for each verdict, answers first; what was asked elsewhere stands at the first.

    Next to answers, undecided rows have no reason.
    """
    places: dict[str, dict[str, dict]] = {}
    for row in sorted(rows, key=lambda row: _rank(row["verdict"])):
        at = places.setdefault(EQUAL_KL if row["where"] == EQUAL_KL else UPDATES, {})
        silent = {"why": ""} if row["verdict"] == UNDECIDED and at.keys() - {UNDECIDED} else {}
        at.setdefault(row["verdict"], row | silent | {"number": 0})["number"] += 1
    return {where: list(at.values()) for where, at in places.items()}


def _answered(rows: Sequence[dict]) -> list[dict]:
    """The rows that answer one claim; else one row: an identity, or why no study asked it."""
    if answers := [row for row in rows if row["verdict"] not in (NOT_ASKED, IDENTITY)]:
        return answers
    if identity := [row for row in rows if row["verdict"] == IDENTITY]:
        return identity[:1]
    reasons = {row["why"]: [r["study"] for r in rows if r["why"] == row["why"]] for row in rows}
    why = " ".join(f"{few(studies)}{': ' * any(studies)}{reason}" for reason, studies in reasons.items())
    return [rows[0] | {"study": "", "why": why}]


def few(studies: Sequence[str]) -> str:
    """The first of many names, and how many more there are."""
    more = len(studies) - FEW
    return ", ".join(studies) if more <= 0 else f"{', '.join(studies[:FEW])} and {more} more"


def marks(rows: Sequence[Mapping], page: str) -> dict[str, str]:
    """By claim, what the dataset or setting of a page says of it: a mark for each place where it was asked."""
    places: dict[str, list[str]] = {}
    for row in rows:
        if row["page"] == page and row["verdict"] in MARKS:
            wanted = row["needs"] if row["verdict"] == UNDECIDED and row["needs"].isdigit() else ""
            places.setdefault(row["key"], []).append(MARKS[row["verdict"]] + wanted)
    return {key: "\u00a0".join(own) for key, own in places.items()}


def each(studies: Sequence[Study]) -> list[tuple[Study, Finding]]:
    """Each dataset and setting of the studies."""
    return [(study, finding) for study in studies for finding in study.findings]


def _rank(verdict: str) -> int:
    return ANSWERS.index(verdict) if verdict in ANSWERS else len(ANSWERS)


def _claim(claim: Claim) -> dict[str, object]:
    """A claim in one line: its verdict, and the comparison of the arm that it quotes."""
    logs = {m.text: m.log for question in QUESTIONS for m in question.measures}
    case = _quoted(claim.cases)
    return {
        "key": claim.key,
        "text": claim.text,
        "where": claim.where,
        "verdict": claim.verdict,
        "why": claim.why if case is None else _evidence(case, logs),
        "needs": "" if case is None else _seeds_needed(case),
        "case": case,
    }


def _quoted(cases: Sequence[Case]) -> Case | None:
    """Of the arms with the verdict of all together, the one that differs most from its first rival, in the direction of
    the verdict; of undecided ones, the one nearest to an answer."""
    verdict = overall([case.verdict for case in cases])
    tested = [
        case for case in cases if case.verdict == verdict and case.has_interval and case.comparisons[0].difference
    ]
    if verdict == UNDECIDED:
        return min(tested, key=lambda c: min(c.p_differs, c.p_equal), default=None)
    sign = -1 if verdict == CONTRADICTED else 1
    return max(tested, key=lambda c: sign * c.wanted * c.comparisons[0].difference.mean, default=None)


def _evidence(case: Case, logs: Mapping[str, bool]) -> str:
    """An arm less its first rival, and less the control that it is least above, with p."""
    first = [c for c in case.comparisons if c.rival == case.comparisons[0].rival and c.difference]
    controls = [c for c in case.comparisons if c.is_control and c.difference and c.measure == first[0].measure]
    least = min(controls, key=lambda c: case.wanted * c.difference.mean, default=None)
    shown = [first[0], *([least] if least else [])]
    texts = [f"{signed(c.difference, logs[c.measure])} against {c.rival}" for c in shown]
    nats = {f" at {c.kl:.1f} nats" for c in shown if c.kl is not None and not math.isnan(c.kl)}
    p = case.p_equal if case.verdict == NO_DIFFERENCE else case.p_differs
    return f"{case.arm} {', '.join(texts)}{', '.join(sorted(nats))} ({plural(case.seeds, 'seed')}, {p_value(p)})"


def _seeds_needed(case: Case) -> str:
    fewest = min(case.seeds_to_decide())
    if fewest <= case.seeds:  # the more tests, the more seeds
        return ""
    return f"{fewest:.0f}" if math.isfinite(fewest) else "more than 1000"
