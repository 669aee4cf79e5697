"""`RESULTS.md`: what all recorded studies say, for a reader of nothing else. Every number is rendered from the runs."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

from dense_rlhf.config.params import ABLATIONS
from dense_rlhf.evaluation.claims import HELPED, IDENTITY, NOT_ASKED, QUESTIONS, Claim, judge
from dense_rlhf.evaluation.open_questions import LONGER, WORSE, by_settings
from dense_rlhf.evaluation.results import Finding
from dense_rlhf.evaluation.rule import CONTRADICTED, NO_DIFFERENCE, SUPPORTED, UNDECIDED, Case
from dense_rlhf.evaluation.words import EQUAL_KL, LEADS, NEAREST, UPDATES, identity, p_value, plural, signed
from dense_rlhf.files import write_text
from dense_rlhf.report.comparison import verdict
from dense_rlhf.report.index import MAIN, rank
from dense_rlhf.report.page import times
from dense_rlhf.report.record import Outline
from dense_rlhf.report.results_figures import Figures
from dense_rlhf.runs import RunFolder
from dense_rlhf.view.escape import scrub, visible
from dense_rlhf.view.html import TEMPLATES

MARKS = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "\\|", "`": "'", "*": "\\*", "\n": " "})
ANSWERS = SUPPORTED, CONTRADICTED, NO_DIFFERENCE  # in this order, others follow
LEAD = re.compile(rf"(?:{NEAREST}|(?:{'|'.join(LEADS.values())}), \d+ of \d+ arms?): ")  # of a reason
COMMAND = 90  # characters of a command that are shown
SEPARATE = 2  # settings of a study up to which each has its own row
GROUNDS = "Cost", "Step sizes", "At one common step size"
OPEN = {  # by the ablation that asks it
    "contextual": "Do weights that depend on the token teach more than constant ones?",
    "human": "Does credit from words that people marked teach more than SHAP?",
    "dimension": "Does each further source need more trials?",
    "length": LONGER,
    "reward_model": WORSE,
}


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

    @property
    def is_summed(self) -> bool:
        """Whether one row says how many of its settings say what."""
        return self.name not in MAIN and len(self.findings) > SEPARATE


def write_results(studies: Iterable[Study], to: Path) -> Path:
    """Write `RESULTS.md` into a folder that has the pages in reports/, and its figures next to those pages."""
    ordered = sorted(studies, key=lambda study: (rank(study.name), study.name))
    main = [study for study in ordered if study.name in MAIN] or ordered
    figures = Figures(to)
    about = {
        "across": figures.across(_each(_findings(ordered))),
        "main": [_long(study, finding, figures) for study, finding in _findings(main)],
        "studies": [_study(study) for study in ordered],
        "lines": _short(ordered, main),
        "claims": _claims(ordered),
        "open": _open(ordered),
        "shares": _shares(ordered),
        "machines": _machines(ordered),
    }
    about |= {
        "surprises": _surprises(ordered),
        "untold": _untold(ordered),
        "names": ", ".join,
        "places": (UPDATES, EQUAL_KL),
    }
    text = _environment().get_template("results.md.j2").render(about)
    write_text(to / "RESULTS.md", scrub(text))
    return to / "RESULTS.md"


@cache
def _environment():
    import jinja2

    loader, strict = jinja2.FileSystemLoader(TEMPLATES), jinja2.StrictUndefined
    return jinja2.Environment(loader=loader, undefined=strict, finalize=plain, trim_blocks=True, lstrip_blocks=True)


def plain(value: object) -> str:
    """Text that Markdown shows as it is: no HTML, no table's border, no link."""
    return visible(str(value)).translate(MARKS).replace("](", "]\\(")


def _short(studies: Sequence[Study], main: Sequence[Study]) -> list[tuple[str, str]]:
    """What main studies say, and others where dense rewards help at equal KL too: name, one line."""
    return [
        (_named(study, finding), verdict(finding).line)
        for study, finding in _findings(studies)
        if study in main or _helps_at_kl(finding)
    ]


def _helps_at_kl(finding: Finding) -> bool:
    return (HELPED, EQUAL_KL, SUPPORTED) in [(claim.key, claim.where, claim.verdict) for claim in judge(finding)]


def _study(study: Study) -> dict:
    """What a study rests on, what it cost, and how it is computed anew."""
    records, first = [run.record() for run in study.runs], next(iter(study.findings), None)
    return {
        "name": study.name,
        "seeds": min(len(arm.seeds) for arm in first.arms.values()) if first else "–",
        "runs": len(records),
        "time": times(records),
        "parameters": _cut(study.outline.command.removeprefix("dense-rlhf run ")),
        "commits": sorted({str(record.get("commit"))[:12] for record in records}),
        "not_committed": len(study.not_committed),
    }


def _cut(command: str) -> str:
    """Its beginning; the record has it whole."""
    return command if len(command) <= COMMAND else f"{command[: COMMAND - 1]}…"


# ---------------------------------------------------------------------------------------------------- the answers


def _claims(studies: Sequence[Study]) -> list[dict]:
    """A row for each claim: at each place, by verdict, what the studies that asked it say."""
    asked: dict[str, list[dict]] = {}
    for study in studies:
        for row in _settings(study) if study.is_summed else _each(_findings([study])):
            asked.setdefault(row["key"], []).append(row)
    return [own[0] | {"at": _by_place(_answered(own))} for _, own in sorted(asked.items())]


def _by_place(rows: Sequence[dict]) -> dict[str, dict[str, list[dict]]]:
    """Rows by where a claim was asked, then by their verdict, answers first; what has no place stands at the first.

    Next to answers, undecided rows have no reason.
    """
    places: dict[str, dict[str, list[dict]]] = {}
    for row in sorted(rows, key=lambda row: _rank(row["verdict"])):
        at = places.setdefault(row["where"] or UPDATES, {})
        silent = {"why": ""} if row["verdict"] == UNDECIDED and at.keys() - {UNDECIDED} else {}
        at.setdefault(row["verdict"], []).append(row | silent)
    return places


def _answered(rows: Sequence[dict]) -> list[dict]:
    """The rows that answer one claim; else one row: an identity, or why no study asked it."""
    if answers := [row for row in rows if row["verdict"] not in (NOT_ASKED, IDENTITY)]:
        return answers
    if identity := [row for row in rows if row["verdict"] == IDENTITY]:
        return identity[:1]
    reasons = {row["why"]: [r["study"] for r in rows if r["why"] == row["why"]] for row in rows}
    why = " ".join(f"{', '.join(studies)}: {reason}" for reason, studies in reasons.items())
    return [rows[0] | {"study": "", "why": why}]


def _each(pairs: Sequence[tuple[Study, Finding]]) -> list[dict]:
    """A row for each claim that a dataset is asked."""
    return [
        _claim(claim) | {"study": _named(study, finding), "page": _page(study, finding)}
        for study, finding in pairs
        for claim in judge(finding)
    ]


def _settings(study: Study) -> list[dict]:
    """A row for each claim of a study with settings: which of them say what."""
    each = [_claim(claim) | {"setting": finding.dataset} for finding in study.findings for claim in judge(finding)]
    rows = []
    for place in dict.fromkeys((c["key"], c["where"]) for c in each):
        own = [c for c in each if (c["key"], c["where"]) == place]
        saying = {v: [c["setting"] for c in own if c["verdict"] == v] for v in dict.fromkeys(c["verdict"] for c in own)}
        verdict = own[0]["verdict"] if len(saying) == 1 else "differs"
        why = "; ".join(f"{v} with {', '.join(settings)}" for v, settings in saying.items())
        why = why.removeprefix(f"{verdict} ")
        about = {"study": study.name, "page": f"reports/{study.name}/index.html"}
        rows.append(own[0] | {"verdict": verdict, "why": why} | about)
    return rows


def _open(studies: Sequence[Study]) -> dict[str, list[dict]]:
    """By open question, what ablations answer; nothing but how to ask it where no recorded study has."""
    answers = [
        answer | {"study": study.name, "page": _page_of(run)}
        for study in studies
        for run in study.runs
        if run.record()["notebook"] in ABLATIONS
        for answer in run.load_json("metrics.json").get("answers") or ()
    ]
    across = [
        answer | {"study": study.name, "page": f"reports/{study.name}/comparison-{answer['dataset']}.html"}
        for study in studies
        for answer in by_settings(study.name, study.findings)
    ]
    recorded = {study.name for study in studies}
    nothing = {"at": "", "verdict": NOT_ASKED, "study": ""}
    unasked = [
        nothing | {"question": question, "why": f"params/ablations/{name}.yaml would."}
        for name, question in OPEN.items()
        if name not in recorded
    ]
    rows: dict[str, list[dict]] = {}
    for row in answers + across + unasked:
        rows.setdefault(row["question"], []).append(row | {"why": _first(row["why"])})
    return rows


def _first(why: str) -> str:
    """A reason up to its first interval, without what the verdict and the page's head say; all, if it has none."""
    why = LEAD.sub("", why).replace(" after Holm)", ")")
    sentences = re.split(r"(?<=[.)]) (?=[A-Z])", why)
    number = next((n for n, sentence in enumerate(sentences) if "[" in sentence), len(sentences))
    return " ".join(sentences[: number + 1])


def _surprises(studies: Sequence[Study]) -> list[str]:
    """Claims that fail, claims whose answer depends on where it is asked, and arms that are another in all but name."""
    lines: dict[str, list[str]] = {}
    for study, finding in _findings(studies):
        for claims in _by_key(judge(finding)):
            verdicts = {claim.where: claim.verdict for claim in claims}
            if len(verdicts) > 1 and len({*verdicts.values()} - {UNDECIDED}) > 1:
                answers = ", ".join(f"{verdict} at {where}" for where, verdict in verdicts.items())
            elif CONTRADICTED in verdicts.values():
                answers = CONTRADICTED
            else:
                continue
            lines.setdefault(f"{claims[0].text} ({claims[0].key}): {answers}", []).append(_named(study, finding))
        for arm in finding.arms.values():
            if text := identity(arm):
                lines.setdefault(text.removesuffix("."), []).append(_named(study, finding))
    return [f"{text}: {', '.join(names)}" for text, names in sorted(lines.items())]


def _untold(studies: Sequence[Study]) -> dict[str, list[str]]:
    """By claim and place, the studies in which it is undecided, and how many seeds would decide it."""
    untold: dict[str, list[str]] = {}
    for row in _each(_findings(studies)):
        if row["verdict"] == UNDECIDED:
            untold.setdefault(f"{row['key']}{row['at']}", []).append(f"{row['study']}{row['needs']}")
    return dict(sorted(untold.items()))


def _findings(studies: Sequence[Study]) -> list[tuple[Study, Finding]]:
    """Each dataset of the studies that are not summed."""
    return [(study, finding) for study in studies if not study.is_summed for finding in study.findings]


def _by_key(claims: Sequence[Claim]) -> list[list[Claim]]:
    return [list(group) for _, group in groupby(claims, key=lambda claim: claim.key)]


def _named(study: Study, finding: Finding) -> str:
    """A study, or its dataset or setting where it has several."""
    return study.name if len(study.findings) == 1 else finding.dataset


def _page(study: Study, finding: Finding) -> str:
    return f"reports/{study.name}/comparison-{finding.dataset}.html"


def _page_of(run: RunFolder) -> str:
    return f"reports/{run.path.parent.name}/comparison-{run.path.name}.html"


# ---------------------------------------------------------------------------------------------------- a dataset


def _long(study: Study, finding: Finding, figures: Figures) -> dict:
    """A dataset with its arms, its costs and its figures."""
    grounds = {name: text for name, text in verdict(finding).grounds.items() if name in GROUNDS}
    grounds = {"To be known": study.outline.remark} | grounds if study.outline.remark else grounds
    about = {"name": _named(study, finding), "page": _page(study, finding), "grounds": grounds}
    drawn = figures.gains(finding, about["name"], Path("reports", study.name))
    return about | {"head": _head(finding), "arms": _arms(finding), "figures": drawn}


def _columns(finding: Finding) -> dict[str, str]:
    """Field of an arm: heading, for each that some arm has."""
    at = {field: f"gain at {kl:.1f} nats" for field, kl in zip(("gain_at_kl", "gain_far"), finding.levels)}
    named = {"gold": "gold", "kl": "KL (nats)", "gain": "gain at equal updates"} | at
    return {field: head for field, head in named.items() if any(getattr(arm, field) for arm in finding.arms.values())}


def _head(finding: Finding) -> list[str]:
    return ["arm", "seeds", *_columns(finding).values()]


def _arms(finding: Finding) -> list[list[str]]:
    """Arms from the highest gold down: scores, and gains over the baseline."""
    ranked = sorted(finding.arms.values(), key=lambda arm: -arm.gold.mean)
    rows = []
    for arm in ranked:
        numbers = ["–" if (value := getattr(arm, field)) is None else str(value) for field in _columns(finding)]
        rows.append([arm.name, str(len(arm.seeds)), *numbers])
    return rows


def _rank(verdict: str) -> int:
    return ANSWERS.index(verdict) if verdict in ANSWERS else len(ANSWERS)


def _claim(claim: Claim) -> dict[str, object]:
    """A claim in one line: its verdict, and the comparison of the arm that is nearest to deciding it."""
    logs = {m.text: m.log for question in QUESTIONS for m in question.measures}
    tested = [case for case in claim.cases if case.has_interval]
    case = min(tested, key=lambda c: (_rank(c.verdict), min(c.p_differs, c.p_equal)), default=None)
    return {
        "key": claim.key,
        "text": claim.text,
        "where": claim.where,
        "at": f" at {claim.where}" * bool(claim.where),
        "verdict": claim.verdict,
        "why": claim.why if case is None else _evidence(case, logs),
        "needs": "" if case is None else _seeds_needed(case),
        "case": case,
    }


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
    return f" {fewest:.0f}" if math.isfinite(fewest) else " more than 1000"


# ---------------------------------------------------------------------------------------------------- the rest


def _shares(studies: Sequence[Study]) -> dict[str, list[str]]:
    """What all seeds of a study share, with the studies."""
    shares: dict[str, list[str]] = {}
    for study in studies:
        if study.findings and (shared := study.findings[0].drawn_once):
            shares.setdefault(" and ".join(shared), []).append(study.name)
    return shares


def _machines(studies: Sequence[Study]) -> list[str]:
    """What the runs of all studies ran on, with how many threads, the most common first."""
    every = Counter(_machine(run) for study in studies for run in study.runs)
    return [f"{name} ({plural(number, 'run')})" for name, number in every.most_common()]


def _machine(run: RunFolder) -> str:
    record, threads = run.record(), run.parameters().get("threads", "?")
    name = record.get("gpu") or record.get("processor") or record.get("machine") or "unknown"
    return f"{name}, {record.get('cores', '?')} cores, {threads} of them used"
