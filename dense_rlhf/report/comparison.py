"""Comparison pages: the arms of one dataset, or the tables of one ablation.

They read metrics and tables of run folders only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dense_rlhf.evaluation import claims
from dense_rlhf.evaluation.claims import (
    CONTRADICTED,
    EQUAL_KL,
    SUPPORTED,
    UNDECIDED,
    UPDATES,
    Claim,
    basis,
    judge,
    signed,
)
from dense_rlhf.evaluation.findings import CONTROL, DENSE, Arm, Finding, across
from dense_rlhf.evaluation.overoptimisation import fits, law_table
from dense_rlhf.report.charts import forest
from dense_rlhf.report.page import sections, table
from dense_rlhf.runs import RunFolder
from dense_rlhf.statistics import Interval
from dense_rlhf.view.escape import esc
from dense_rlhf.view.live import duration

ROWS = 60  # of an ablation's table; the whole is in the file
HELPED = "1b"  # the claim that answers the question: gold after training, of every dense arm
ANSWERS = {SUPPORTED: "yes", CONTRADICTED: "no", UNDECIDED: "unclear"}
CHIPS = {SUPPORTED: "good", CONTRADICTED: "bad", UNDECIDED: "idle"}


@dataclass(frozen=True)
class Verdict:
    """Whether dense rewards helped on one dataset: a word, a line, what it rests on, and each claim of the paper."""

    answer: str  # yes, no, or unclear
    line: str
    grounds: dict[str, str]
    claims: Sequence[Mapping[str, str]] = ()  # key, text, verdict, why


def verdict(finding: Finding) -> Verdict:
    """Whether dense rewards helped, by the rule of `claims`; by how much, how sure, at what cost."""
    claimed = [{"key": c.key, "text": c.text, "verdict": c.verdict, "why": c.why} for c in judge(finding)]
    if not finding.of_kind(DENSE):
        return Verdict("unclear", "No dense arm has finished.", {}, claimed)
    claim = next(c for c in judge(finding) if c.key == HELPED)
    return Verdict(ANSWERS[claim.verdict], _line(finding, claim), _grounds(finding, claim), claimed)


def _line(finding: Finding, claim: Claim) -> str:
    """The answer in one sentence."""
    base, n = finding.baseline, len(claim.cases)
    named = ", ".join(case.arm for case in claim.cases if case.verdict == claim.verdict)
    if claim.verdict == SUPPORTED:
        return f"Dense rewards helped: {named} ended above {base} and every control, at equal updates and at equal KL."
    if claim.verdict == CONTRADICTED:
        return f"Dense rewards did not help: {named} ended below {base} at equal updates and at equal KL."
    if base == "reference":
        return "It is undecided whether dense rewards helped: no sparse arm has finished."
    if not any(case.has_interval for case in claim.cases):
        return "It is undecided whether dense rewards helped: one seed says nothing of others."
    if decided := [f"{case.arm} {case.verdict}" for case in claim.cases if case.verdict != UNDECIDED]:
        return f"It is undecided whether dense rewards helped: the arms disagree ({', '.join(decided)})."
    faster = [case.arm for case in claim.cases if (d := case.comparisons[0].updates) and d.low > 0]
    hint = f"; at equal updates, each alone, {', '.join(faster)} ended above {base}" if faster else ""
    return f"It is undecided whether dense rewards helped: none of {n} dense arms passes every comparison{hint}."


def _grounds(finding: Finding, claim: Claim) -> dict[str, str]:
    """By how much, how sure, at what cost: of the arm with the smallest p."""
    best, n = _spokesman(finding, claim), len(finding.of_kind(DENSE))
    base, grounds = finding.arms[finding.baseline], {}
    chosen = f", the dense arm (of {n}) with the smallest p," if n > 1 else ""
    grounds["By how much"] = (
        f"{best.name}{chosen} has {signed(best.gain)} gold (log-odds) over {base.name} at {UPDATES}."
    )
    if best.gain_at_kl:
        grounds["At equal KL"] = f"{signed(best.gain_at_kl)} gold over {base.name} at {EQUAL_KL}."
    if controls := finding.of_kind(CONTROL):
        gap = finding.compare(best.name, controls[0].name)
        grounds["Over a control"] = f"{signed(gap)} gold over {controls[0].name}, the best control, at {UPDATES}."
    return grounds | {"How sure": _sure(finding, claim, best), "At what cost": cost(best, base)}


def _spokesman(finding: Finding, claim: Claim) -> Arm:
    """The arm whose answer is surest; where none has an interval, the one with the highest gold."""
    measured = [case for case in claim.cases if case.has_interval]
    if not measured:
        return finding.of_kind(DENSE)[0]
    return finding.arms[min(measured, key=lambda c: (c.raw_p, -finding.arms[c.arm].gold.mean)).arm]


def _sure(finding: Finding, claim: Claim, best: Arm) -> str:
    case = next((case for case in claim.cases if case.arm == best.name and case.has_interval), None)
    if case is None:
        return f"{basis(finding)} No interval: that takes two seeds."
    return (
        f"{basis(finding)} p {claims.number(case.p)} after Holm's correction of {case.tests} answers. "
        f"{claims.seen(case, claim.unit)}"
    )


def cost(arm: Arm, base: Arm) -> str:
    """What training the arm costs, compared with the baseline, in words."""
    if not arm.seconds:
        return "unknown: the runs recorded no times."
    text = f"a training takes {duration(arm.seconds)}, {arm.explain or 0:.0%} of it to explain"
    if base.seconds:
        text += f"; {arm.seconds / base.seconds:.1f} times that of {base.name}"
    return text + (f"; learning the weights took {duration(arm.search)} more, once." if arm.search else ".")


def verdict_html(verdict: Verdict) -> str:
    """The verdict as a paragraph and a list, and each claim in a line."""
    grounds = "".join(f"<p><strong>{esc(name)}:</strong> {esc(text)}</p>" for name, text in verdict.grounds.items())
    lead = f"<div class='verdict {esc(verdict.answer)}'><p class='lead'>{esc(verdict.line)}</p>{grounds}</div>"
    lines = ((esc(f"{c['key']}. {c['text']}"), _chip(c["verdict"]), esc(c["why"])) for c in verdict.claims)
    listed = table("The paper's claims on this dataset", ("claim", "verdict", "why"), lines)
    return lead + (listed if verdict.claims else "")


def _chip(word: str) -> str:
    return f"<span class='chip {CHIPS.get(word, 'idle')}'>{esc(word)}</span>"


def claims_html(finding: Finding) -> str:
    """Every comparison that a verdict rests on, and the rule."""
    cells = [[esc(row[name]) for name in claims.HEAD] for row in claims.rows(judge(finding))]
    listed = (
        table(
            "Every comparison: gold in log-odds, value loss (1a) in squared scores; 95 % intervals over seeds",
            claims.HEAD,
            cells,
        )
        if cells
        else ""
    )
    return f"<p><strong>The rule.</strong> {esc(claims.RULE)}</p><p>{esc(basis(finding))}</p>{listed}"


# ---------------------------------------------------------------------------------------------------- a dataset


def dataset_page(study: str, finding: Finding) -> tuple[str, str]:
    """Body and contents of the comparison of all arms on one dataset."""
    arms = list(finding.arms.values())
    ranked = sorted(arms, key=lambda arm: -arm.gold.mean)
    gains = {arm.name: arm.gain for arm in ranked if arm.gain and arm.kind != "reference"}
    at_kl = {arm.name: arm.gain_at_kl for arm in ranked if arm.gain_at_kl}
    improves = {arm.name: arm.improves for arm in ranked if arm.improves and arm.kind != "reference"}
    base = finding.baseline
    body, listed = sections(
        [
            ("verdict", "Did dense rewards help?", verdict_html(verdict(finding))),
            ("claims", "What the verdicts rest on", claims_html(finding)),
            ("gold", "Gold score", forest({a.name: a.gold for a in ranked}, f"Gold score (log-odds), {METHOD}")),
            (
                "gain",
                f"Gain over {base} at equal updates",
                forest(gains, f"Mean gold over {base} on the same prompts, 95 % interval over seeds"),
            ),
            ("kl", f"Gain over {base} at equal KL", _at_kl(at_kl, base)),
            (
                "improvement",
                "Probability of improvement",
                forest(improves, f"Probability that a run scores higher than one of {base}; 0.5 is a coin"),
            ),
            ("laws", "Over-optimisation", _laws(finding)),
            ("numbers", "All numbers", _arm_table(arms)),
            ("seeds", "Each seed", _seed_table(finding)),
        ]
    )
    return f"<h1>{esc(study)}: all arms on {esc(finding.dataset)}</h1>{body}", listed


METHOD = "mean over seeds with its 95 % t interval; a point alone has none"


def _at_kl(gains: Mapping[str, Interval], base: str) -> str:
    if not gains:
        return "<p>No seed has the KL of both arms over time.</p>"
    what = f"Gold over {base} at the largest KL that both reach, 95 % interval over seeds"
    return forest(gains, what)


def _laws(finding: Finding) -> str:
    """Where gold peaks as each arm moves away from the reference; nothing where no path is long enough."""
    if finding.history is None or not {"kl", "gold", "update"} <= set(finding.history):
        return ""
    fitted = law_table(fits(finding.history))
    what = "Gold (log-odds) while training: d (alpha - beta log d) over its start, d = sqrt(KL) (Gao et al., 2022)"
    cells = [[esc(value) for value in row] for row in fitted.values.tolist()]
    return table(f"{what}; 95 % t intervals over seeds", list(fitted.columns), cells) if cells else ""


COLUMNS = {"gold, mean": "gold", "gold, IQM": "iqm", "KL (nats)": "kl", "win rate": "win"}
COLUMNS |= {"win rate, equal length": "win_lc", "gain": "gain", "gain at equal KL": "gain_at_kl"}
COLUMNS |= {"P(improvement)": "improves"}  # heading: field of an arm


def _arm_table(arms: Sequence[Arm]) -> str:
    rows = [
        [
            *(esc(a.name), a.kind, str(len(a.seeds))),
            *(cell(getattr(a, field)) for field in COLUMNS.values()),
            duration(a.seconds) if a.seconds else "–",
            "–" if a.explain is None else f"{a.explain:.0%}",
        ]
        for a in arms
    ]
    what = "95 % intervals over seeds (IQM: from five seeds on); gold in log-odds, wins over the untrained reference"
    return table(f"Every arm, with {what}", ("arm", "kind", "seeds", *COLUMNS, "training", "explaining"), rows)


def cell(interval: Interval | None) -> str:
    return f"<span class='number'>{esc(interval)}</span>" if interval else "–"


def _seed_table(finding: Finding) -> str:
    rows = [
        (
            esc(arm),
            esc(seed),
            f"{t['gold'].mean():.2f}",
            f"{t['proxy'].mean():.2f}",
            f"{t['kl'].mean():.2f}" if "kl" in t else "–",
        )
        for arm, by in finding.judged.items()
        for seed, t in by.items()
    ]
    return table("Means over the held-out prompts of each run", ("arm", "seed", "gold", "proxy", "KL"), rows)


def across_html(findings: Sequence[Finding]) -> str:
    """Arms that several datasets have, over all of them; nothing for one dataset."""
    both = [f for f in findings if f.baseline != "reference"]
    if len(both) < 2:
        return ""
    over = across(both)
    names = ", ".join(f.dataset for f in both)
    units = "in standard deviations of the reference's gold score"
    gains, odds = ({arm: o[key] for arm, o in over.items()} for key in ("iqm", "improves"))
    return forest(gains, f"Gain over sparse {units}, interquartile mean over {names}") + forest(
        odds, f"Probability of improvement over sparse, mean over {names}"
    )


# ---------------------------------------------------------------------------------------------------- an ablation


def ablation_page(study: str, run: RunFolder) -> tuple[str, str]:
    """Body and contents of an ablation's page: its intervals as figures, its numbers and tables."""
    metrics, name = run.load_json("metrics.json"), run.path.name
    groups = {key: intervals for key, value in metrics.items() if (intervals := dict(_intervals(value)))}
    plain = {key: value for key, value in metrics.items() if key not in groups and key != "revisions"}
    parts = [
        (f"m-{i}", key.replace("_", " "), forest(intervals, f"{key.replace('_', ' ')}: value with its 95 % interval"))
        for i, (key, intervals) in enumerate(groups.items())
    ]
    rows = [(esc(key), f"<code>{esc(value)}</code>") for key, value in plain.items()]
    listed = table("Other metrics", ("name", "value"), rows) if rows else ""
    parts.append(("numbers", "Numbers", listed))
    parts += [
        (f"t-{path.stem}", f"Table: {path.stem}", csv_table(run, path.stem)) for path in sorted(run.path.glob("*.csv"))
    ]
    body, listed = sections(parts)
    return f"<h1>{esc(study)}: {esc(name)}</h1>{body}", listed


def _intervals(value: object, name: str = "") -> list[tuple[str, Interval]]:
    """Every mean with low and high inside a metric, named by its path."""
    if isinstance(value, dict) and {"mean", "low", "high"} <= set(value):
        mean, *bounds = (value[key] for key in ("mean", "low", "high"))
        if bounds == [None, None]:  # of one seed: JSON knows no infinity
            bounds = [-math.inf, math.inf]
        known = isinstance(mean, (int, float)) and math.isfinite(mean) and None not in bounds
        return [(name or "all", Interval(mean, *bounds))] if known else []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [one for key, item in inner for one in _intervals(item, f"{name} {key}".strip())]


def csv_table(run: RunFolder, name: str) -> str:
    """The first rows of a run's table, numbers rounded."""
    frame = run.load_table(name)
    more = f"; the first {ROWS} of {len(frame)} rows, all are in {name}.csv" if len(frame) > ROWS else ""
    rows = [[_value(value) for value in row] for row in frame.head(ROWS).values.tolist()]
    return table(f"{name}.csv{more}", [esc(column) for column in frame.columns], rows) if rows else ""


def _value(value: object) -> str:
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.4g}"
    return esc(value, 300)
