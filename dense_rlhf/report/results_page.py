"""`RESULTS.md`: what all recorded studies say, for a reader of nothing else. Every number is rendered from the runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path

from dense_rlhf.evaluation.claims import HELPED, NOT_ASKED, Claim, judge
from dense_rlhf.evaluation.results import Finding
from dense_rlhf.evaluation.rule import CONTRADICTED, SECOND_LOOK, SUPPORTED, UNDECIDED, level
from dense_rlhf.evaluation.words import EQUAL_KL, UPDATES, identity, plural, signed
from dense_rlhf.files import write_text
from dense_rlhf.report.comparison import CLOCK, verdict
from dense_rlhf.report.index import MAIN, rank
from dense_rlhf.report.results_claims import ASKED, MARKS, Study, by_key, claims, each, few, marks, open_questions
from dense_rlhf.report.results_figures import Figures
from dense_rlhf.runs import RunFolder
from dense_rlhf.view.escape import scrub, visible
from dense_rlhf.view.html import TEMPLATES
from dense_rlhf.view.live import duration

PLAIN = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "\\|", "`": "'", "*": "\\*", "\n": " "})
GROUNDS = "Cost", "At one common step size"


def write_results(studies: Iterable[Study], to: Path) -> Path:
    """Write `RESULTS.md` into a folder that has the pages in reports/, and its figures next to those pages."""
    ordered = sorted(studies, key=lambda study: (rank(study.name), study.name))
    main = [study for study in ordered if study.name in MAIN] or ordered
    figures = Figures(to)
    rows, opened = claims(ordered), by_key(open_questions(ordered))
    about = {
        "across": figures.across(rows),
        "main": [_long(study, finding, figures) for study, finding in each(main)],
        "gains": _gains(main),
        "clock": CLOCK,
        "lines": _short(ordered, main),
        "claims": by_key(rows),
        "open": [row for row in opened if not _unasked(row)],
        "unasked": [(row["text"], reason) for row in opened if (reason := _unasked(row))],
        "surprises": _surprises(ordered),
        "undecided": _undecided(rows),
        "studies": [_study(study, rows) for study in ordered],
        "shares": _shares(ordered),
        "machines": _machines(ordered),
        "margins": sorted({f"{f.margin:g} of gold, {f.margin:.0%} of the value loss" for _, f in each(ordered)}),
        "level": f"{level(SECOND_LOOK):g}",
        "asked": ASKED,
        "marks": MARKS,
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
    return visible(str(value)).translate(PLAIN).replace("](", "]\\(")


def _short(studies: Sequence[Study], main: Sequence[Study]) -> list[tuple[str, str]]:
    """What main studies say, and where else dense rewards help at equal KL too: name, one line."""
    lines = [(study.named(finding), verdict(finding).line) for study, finding in each(main)]
    others = [(study.named(finding), _at_kl(finding)) for study, finding in each(studies) if study not in main]
    helped = "; ".join(f"{name}: {gain}" for name, gain in others if gain)
    return lines + [("Better at equal KL too", f"{helped}.")] * bool(helped)


def _at_kl(finding: Finding) -> str:
    """The gains over the baseline at equal KL of the arms that support the main claim there; empty if none does."""
    cases = [case for c in judge(finding) if (c.key, c.where) == (HELPED, EQUAL_KL) for case in c.cases]
    gains = [(case, c) for case in cases if case.verdict == SUPPORTED for c in case.comparisons if not c.is_control]
    return ", ".join(f"{case.arm} {signed(c.difference)} over {c.rival} at {c.kl:.1f} nats" for case, c in gains)


# ---------------------------------------------------------------------------------------------------- the answers


def _unasked(row: Mapping) -> str:
    """Who would ask an open question that nobody has asked; empty for others."""
    (first, *_), *_ = row["at"].values()
    return first["why"] if first["verdict"] == NOT_ASKED else ""


def _surprises(studies: Sequence[Study]) -> list[str]:
    """Claims that fail, claims whose answer depends on where it is asked, and arms that are another in all but name."""
    lines: dict[str, dict[str, list[str]]] = {}
    for study, finding in each(studies):
        for asked in _by_key(judge(finding)):
            verdicts = {claim.where: claim.verdict for claim in asked}
            if len(verdicts) > 1 and len({*verdicts.values()} - {UNDECIDED}) > 1:
                answer = ", ".join(f"{verdict} at {where}" for where, verdict in verdicts.items())
            elif CONTRADICTED in verdicts.values():
                answer = CONTRADICTED
            else:
                continue
            lines.setdefault(answer, {}).setdefault(asked[0].key, []).append(study.named(finding))
        for arm in finding.arms.values():
            if text := identity(arm):
                lines.setdefault(text.removesuffix("."), {}).setdefault("", []).append(study.named(finding))
    return [f"{answer}: {_by_claim(named)}" for answer, named in sorted(lines.items())]


def _by_claim(named: Mapping[str, Sequence[str]]) -> str:
    """Each claim with the studies that say so of it; the studies alone where it is of no claim."""
    return "; ".join(f"{key} ({few(studies)})" if key else few(studies) for key, studies in named.items())


def _undecided(rows: Sequence[Mapping]) -> list[str]:
    """Claims that no study decides, with where, and how many seeds would decide them, study by study."""
    places: dict[str, list[dict]] = {}
    for row in rows:
        if row["where"]:
            places.setdefault(f"{row['key']} at {row['where']}", []).append(row)
    open_ = {place: own for place, own in sorted(places.items()) if all(row["verdict"] == UNDECIDED for row in own)}
    return [f"{place} ({', '.join(_wanted(row) for row in own)})" for place, own in open_.items()]


def _wanted(row: Mapping) -> str:
    return f"{row['study']}{': ' * bool(row['needs'])}{row['needs']}"


def _by_key(claims: Sequence[Claim]) -> list[list[Claim]]:
    return [list(group) for _, group in groupby(claims, key=lambda claim: claim.key)]


# ---------------------------------------------------------------------------------------------------- a dataset


def _long(study: Study, finding: Finding, figures: Figures) -> dict:
    """What a dataset cost, and its figures."""
    grounds = {name: text.removesuffix(CLOCK) for name, text in verdict(finding).grounds.items() if name in GROUNDS}
    grounds = {"To be known": study.outline.remark} | grounds if study.outline.remark else grounds
    drawn = figures.gains(finding, study.named(finding), Path("reports", study.name))
    return {"name": study.named(finding), "page": study.page(finding), "grounds": grounds, "figures": drawn}


def _gains(main: Sequence[Study]) -> list[list[str]]:
    """A head and rows: arms, from the highest gold in the first study down; what each gains over the baseline of its
    study, at equal updates and, in the columns that follow, at each KL."""
    columns = [
        (
            f"{study.named(finding)}, {at}" if at == UPDATES else f"at {at}",
            {name: getattr(arm, field) for name, arm in finding.arms.items()},
        )
        for study, finding in each(main)
        for field, at in _places(finding).items()
    ]
    gold = [(arm.name, -arm.gold.mean) for _, finding in each(main) for arm in finding.arms.values()]
    first = dict(reversed(gold))  # an arm of several studies stands where the first has it
    rivals = {finding.baseline for _, finding in each(main)}
    names = sorted((name for name in first if name not in rivals), key=lambda name: first[name])
    rows = [
        [name, *("–" if (gain := gains.get(name)) is None else str(gain) for _, gains in columns)] for name in names
    ]
    return [["arm", *(head for head, _ in columns)], *rows]


def _places(finding: Finding) -> dict[str, str]:
    """Where arms of a dataset are compared: the field of an arm with its gain there, and words for it."""
    at = {field: f"{kl:.1f} nats" for field, kl in zip(("gain_at_kl", "gain_far"), finding.levels)}
    places = {"gain": UPDATES} | at
    return {field: words for field, words in places.items() if any(getattr(a, field) for a in finding.arms.values())}


# ---------------------------------------------------------------------------------------------------- the studies


def _study(study: Study, rows: Sequence[Mapping]) -> dict:
    """What a study says of each claim, setting by setting; what it rests on, what it cost, and where its record is."""
    records, first = [run.record() for run in study.runs], next(iter(study.findings), None)
    datasets = [(study.named(finding), study.page(finding)) for finding in study.findings]
    return {
        "name": study.name,
        "seeds": min(len(arm.seeds) for arm in first.arms.values()) if first else "–",
        "runs": len(records),
        "time": duration(sum(record.get("seconds") or 0 for record in records)),
        "commits": sorted({str(record.get("commit"))[:7] for record in records}),
        "not_committed": len(study.not_committed),
        "datasets": len(datasets),
        "marks": marks(rows, datasets[0][1]) if len(datasets) == 1 else {},
        "settings": [(name, page, marks(rows, page)) for name, page in datasets if len(datasets) > 1],
    }


def _shares(studies: Sequence[Study]) -> dict[str, list[str]]:
    """What all seeds of a study share, with the studies."""
    shares: dict[str, list[str]] = {}
    for study in studies:
        if shared := study.drawn_once:
            shares.setdefault(", ".join(shared), []).append(study.name)
    return shares


def _machines(studies: Sequence[Study]) -> list[str]:
    """What the runs of all studies ran on, with how many threads, the most common first."""
    every = Counter(_machine(run) for study in studies for run in study.runs)
    return [f"{name} ({plural(number, 'run')})" for name, number in every.most_common()]


def _machine(run: RunFolder) -> str:
    record, threads = run.record(), run.parameters().get("threads", "?")
    name = record.get("gpu") or record.get("processor") or record.get("machine") or "unknown"
    return f"{name}, {record.get('cores', '?')} cores, {threads} of them used"
