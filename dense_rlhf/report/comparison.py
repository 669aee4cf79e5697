"""Comparison pages: the arms of one dataset, or the tables of one ablation.

They read metrics and tables of run folders only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dense_rlhf.evaluation import claims
from dense_rlhf.evaluation.claims import CONTRADICTED, EQUAL_KL, SUPPORTED, UNDECIDED, UPDATES, Claim, judge, signed
from dense_rlhf.evaluation.findings import CONTROL, DENSE, Arm, Finding, across
from dense_rlhf.evaluation.overoptimisation import fits, law_table
from dense_rlhf.report.charts import forest
from dense_rlhf.report.page import chip, draw, sections, table
from dense_rlhf.runs import RunFolder
from dense_rlhf.statistics import Interval
from dense_rlhf.view.html import escaped, part
from dense_rlhf.view.live import duration

if TYPE_CHECKING:
    from markupsafe import Markup

ROWS = 60  # of an ablation's table that its page shows; the file has all
HELPED = "1b"  # the claim that answers the question: gold after training, of every dense arm
ANSWERS = {SUPPORTED: "yes", CONTRADICTED: "no", UNDECIDED: "unclear"}
METHOD = "mean over seeds with its 95 % t interval; a point without a bar has none"


@dataclass(frozen=True)
class Verdict:
    """Whether dense rewards helped on one dataset: a word, a line, what it rests on, and each claim of the paper."""

    answer: str  # yes, no, or unclear
    line: str
    grounds: dict[str, str]
    claims: Sequence[Mapping[str, str]] = ()  # key, text, verdict, why


def verdict(finding: Finding) -> Verdict:
    """Whether dense rewards helped, by the rule of `claims`; by how much, how sure, at what cost."""
    listed = [{"key": c.key, "text": c.text, "verdict": c.verdict, "why": c.why} for c in judge(finding)]
    if not finding.of_kind(DENSE):
        return Verdict("unclear", "No dense arm has finished.", {}, listed)
    claim = next(c for c in judge(finding) if c.key == HELPED)
    return Verdict(ANSWERS[claim.verdict], _line(finding, claim), _grounds(finding, claim), listed)


def _line(finding: Finding, claim: Claim) -> str:
    """The answer in one sentence."""
    base = finding.baseline
    named = ", ".join(case.arm for case in claim.cases if case.verdict == claim.verdict)
    if claim.verdict == SUPPORTED:
        return f"Dense rewards helped: {named} ended above {base} and every control, at equal updates and at equal KL."
    if claim.verdict == CONTRADICTED:
        return f"Dense rewards did not help: {named} ended below {base} at equal updates and at equal KL."
    return f"It is undecided whether dense rewards helped: {_open(base, claim)}."


def _open(base: str, claim: Claim) -> str:
    """Why there is no answer."""
    if base == "reference":
        return "no sparse arm has finished"
    if not any(case.has_interval for case in claim.cases):
        return "one seed says nothing about other seeds"
    if decided := [f"{case.arm} {case.verdict}" for case in claim.cases if case.verdict != UNDECIDED]:
        return f"the arms disagree ({', '.join(decided)})"
    faster = [case.arm for case in claim.cases if (d := case.comparisons[0].updates) and d.low > 0]
    hint = f"; at equal updates, each tested alone, {', '.join(faster)} ended above {base}" if faster else ""
    return f"none of {len(claim.cases)} dense arms passes every comparison{hint}"


def _grounds(finding: Finding, claim: Claim) -> dict[str, str]:
    """By how much, how sure, at what cost: of the arm with the smallest p."""
    best, n = _clearest(finding, claim), len(finding.of_kind(DENSE))
    base = finding.arms[finding.baseline]
    chosen = f", the dense arm (of {n}) with the smallest p," if n > 1 else ""
    gain = f"{best.name}{chosen} has {signed(best.gain)} gold (log-odds) over {base.name} at {UPDATES}."
    grounds = {"By how much": gain}
    if best.gain_at_kl:
        grounds["At equal KL"] = f"{signed(best.gain_at_kl)} gold over {base.name} at {EQUAL_KL}."
    if controls := finding.of_kind(CONTROL):
        gap = finding.compare(best.name, controls[0].name)
        grounds["Over a control"] = f"{signed(gap)} gold over {controls[0].name}, the best control, at {UPDATES}."
    return grounds | {"How sure": _sure(finding, claim, best), "At what cost": cost(best, base)}


def _clearest(finding: Finding, claim: Claim) -> Arm:
    """The dense arm with the smallest p; if none has an interval, the one with the highest gold."""
    known = [case for case in claim.cases if case.has_interval]
    if not known:
        return finding.of_kind(DENSE)[0]
    return finding.arms[min(known, key=lambda c: (c.raw_p, -finding.arms[c.arm].gold.mean)).arm]


def _sure(finding: Finding, claim: Claim, best: Arm) -> str:
    case = next((case for case in claim.cases if case.arm == best.name and case.has_interval), None)
    if case is None:
        return f"{claims.basis(finding)} No interval: that takes two seeds."
    p = f"p {claims.number(case.p)} after Holm's correction of {case.tests} answers."
    return f"{claims.basis(finding)} {p} {claims.seen(case, claim.unit)}"


def cost(arm: Arm, base: Arm) -> str:
    """What training the arm costs, compared with the baseline, in words."""
    if not arm.seconds:
        return "unknown: the runs recorded no times."
    text = f"a training takes {duration(arm.seconds)}, {arm.explain or 0:.0%} of it to explain"
    if base.seconds:
        text += f"; {arm.seconds / base.seconds:.1f} times that of {base.name}"
    return text + (f"; learning the weights took {duration(arm.search)} more, once." if arm.search else ".")


def verdict_html(answer: Verdict) -> Markup:
    """The verdict with its grounds, and a table of the claims."""
    rows = [(f"{c['key']}. {c['text']}", chip(c["verdict"]), c["why"]) for c in answer.claims]
    listed = table("The paper's claims on this dataset", ("claim", "verdict", "why"), rows) if rows else ""
    return draw("verdict", answer.answer, answer.line, answer.grounds, listed)


def claims_html(finding: Finding) -> Markup:
    """The rule, and every comparison that a verdict rests on."""
    rows = [row.values() for row in claims.rows(judge(finding))]
    what = "gold in log-odds, value loss (1a) in squared scores; 95 % intervals over seeds"
    listed = table(f"Every comparison: {what}", claims.HEAD, rows) if rows else ""
    return draw("rule", claims.RULE, claims.basis(finding), listed)


# ---------------------------------------------------------------------------------------------------- a dataset


def dataset_page(study: str, finding: Finding) -> tuple[Markup, Markup]:
    """Body and contents of the comparison of all arms on one dataset."""
    ranked = sorted(finding.arms.values(), key=lambda arm: -arm.gold.mean)
    trained = [arm for arm in ranked if arm.kind != "reference"]
    gains = {arm.name: arm.gain for arm in trained if arm.gain}
    at_kl = {arm.name: arm.gain_at_kl for arm in ranked if arm.gain_at_kl}
    improves = {arm.name: arm.improves for arm in trained if arm.improves}
    base, seeds = finding.baseline, "95 % interval over seeds"
    coin = f"Probability that a run scores higher than one of {base}; 0.5 is a coin"
    none = part("paragraph", "No seed has the KL of both arms over time.")
    at_largest = f"Gold over {base} at the largest KL that both reach, {seeds}"
    parts = [
        ("verdict", "Did dense rewards help?", verdict_html(verdict(finding))),
        ("claims", "What the verdicts rest on", claims_html(finding)),
        ("gold", "Gold score", forest({a.name: a.gold for a in ranked}, f"Gold score (log-odds), {METHOD}")),
        ("gain", f"Gain over {base} at equal updates", forest(gains, f"Mean gold over {base}, same prompts, {seeds}")),
        ("kl", f"Gain over {base} at equal KL", forest(at_kl, at_largest) or none),
        ("improvement", "Probability of improvement", forest(improves, coin)),
        ("laws", "Over-optimisation", _laws(finding)),
        ("numbers", "All numbers", _arm_table(finding.arms.values())),
        ("seeds", "Each seed", _seed_table(finding)),
    ]
    return sections(f"{study}: all arms on {finding.dataset}", parts)


def _laws(finding: Finding) -> Markup | str:
    """Where gold peaks as each arm moves away from the reference; nothing if no path is long enough."""
    if finding.history is None or not {"kl", "gold", "update"} <= set(finding.history):
        return ""
    laws = law_table(fits(finding.history))
    what = "Gold (log-odds) while training: d (alpha - beta log d) over its start, d = sqrt(KL) (Gao et al., 2022)"
    return "" if laws.empty else table(f"{what}; 95 % t intervals over seeds", list(laws.columns), laws.values.tolist())


COLUMNS = {"gold, mean": "gold", "gold, IQM": "iqm", "KL (nats)": "kl", "win rate": "win"}
COLUMNS |= {"win rate, equal length": "win_lc", "gain": "gain", "gain at equal KL": "gain_at_kl"}
COLUMNS |= {"P(improvement)": "improves"}  # heading: field of an arm


def _arm_table(arms: Iterable[Arm]) -> Markup:
    rows = [
        [
            *(a.name, a.kind, len(a.seeds)),
            *(draw("number", getattr(a, field)) for field in COLUMNS.values()),
            duration(a.seconds) if a.seconds else "–",
            "–" if a.explain is None else f"{a.explain:.0%}",
        ]
        for a in arms
    ]
    what = "95 % intervals over seeds (IQM: from five seeds on); gold in log-odds, wins over the untrained reference"
    return table(f"Every arm, with {what}", ("arm", "kind", "seeds", *COLUMNS, "training", "explaining"), rows)


def _seed_table(finding: Finding) -> Markup:
    rows = [
        (arm, seed, *(f"{judged[name].mean():.2f}" if name in judged else "–" for name in ("gold", "proxy", "kl")))
        for arm, by_seed in finding.judged.items()
        for seed, judged in by_seed.items()
    ]
    return table("Means over the held-out prompts of each run", ("arm", "seed", "gold", "proxy", "KL"), rows)


def across_html(findings: Sequence[Finding]) -> Markup | str:
    """Arms that several datasets have, over all of them; nothing for one dataset."""
    compared = [f for f in findings if f.baseline != "reference"]
    if len(compared) < 2:
        return ""
    over = across(compared)
    names = ", ".join(f.dataset for f in compared)
    gains, odds = ({arm: o[key] for arm, o in over.items()} for key in ("iqm", "improves"))
    units = "in standard deviations of the reference's gold score"
    figure = forest(gains, f"Gain over sparse {units}, interquartile mean over {names}")
    return draw("joined", [figure, forest(odds, f"Probability of improvement over sparse, mean over {names}")])


# ---------------------------------------------------------------------------------------------------- an ablation


def ablation_page(study: str, run: RunFolder) -> tuple[Markup, Markup]:
    """Body and contents of an ablation's page: its intervals as figures, its numbers and tables."""
    metrics = run.load_json("metrics.json")
    groups = {key: intervals for key, value in metrics.items() if (intervals := dict(_intervals(value)))}
    plain = {key: value for key, value in metrics.items() if key not in groups and key != "revisions"}
    parts = []
    for i, (key, intervals) in enumerate(groups.items()):
        name = key.replace("_", " ")
        parts.append((f"m-{i}", name, forest(intervals, f"{name}: value with its 95 % interval")))
    rows = [(key, part("code", value)) for key, value in plain.items()]
    parts.append(("numbers", "Numbers", table("Other metrics", ("name", "value"), rows) if rows else ""))
    tables = [path.stem for path in sorted(run.path.glob("*.csv"))]
    parts += [(f"t-{name}", f"Table: {name}", csv_table(run, name)) for name in tables]
    return sections(f"{study}: {run.path.name}", parts)


def _intervals(value: object, name: str = "") -> list[tuple[str, Interval]]:
    """Every mean with low and high inside a metric, named by its path."""
    if isinstance(value, dict) and {"mean", "low", "high"} <= set(value):
        mean, *bounds = (value[key] for key in ("mean", "low", "high"))
        if bounds == [None, None]:  # of one seed: JSON knows no infinity
            bounds = [-math.inf, math.inf]
        known = isinstance(mean, (int, float)) and math.isfinite(mean) and None not in bounds
        return [(name or "all", Interval(mean, *bounds))] if known else []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [pair for key, item in inner for pair in _intervals(item, f"{name} {key}".strip())]


def csv_table(run: RunFolder, name: str) -> Markup | str:
    """The first rows of a run's table, numbers rounded."""
    frame = run.load_table(name)
    more = f"; the first {ROWS} of {len(frame)} rows, all are in {name}.csv" if len(frame) > ROWS else ""
    rows = [[_value(value) for value in row] for row in frame.head(ROWS).values.tolist()]
    return table(f"{name}.csv{more}", list(frame.columns), rows) if rows else ""


def _value(value: object) -> object:
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.4g}"
    return escaped(value, 300)
