"""Comparison pages: the arms of one dataset, or the tables of one ablation.

They read metrics and tables of run folders only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dense_rlhf.evaluation import claims
from dense_rlhf.evaluation.claims import HELPED, Claim, judge
from dense_rlhf.evaluation.findings import across
from dense_rlhf.evaluation.overoptimisation import fits, law_table
from dense_rlhf.evaluation.results import CONTROL, DENSE, Arm, Finding
from dense_rlhf.evaluation.rule import CONTRADICTED, NO_DIFFERENCE, RULE, SUPPORTED, UNDECIDED, Case
from dense_rlhf.evaluation.words import (
    EQUAL_KL,
    UPDATES,
    basis,
    cost_at,
    identity,
    p_value,
    seeds_needed,
    signed,
    tuning,
)
from dense_rlhf.report.charts import forest
from dense_rlhf.report.page import chip, draw, sections, table
from dense_rlhf.runs import RunFolder
from dense_rlhf.statistics import Interval
from dense_rlhf.view.html import escaped, part
from dense_rlhf.view.live import duration

if TYPE_CHECKING:
    from markupsafe import Markup

ROWS = 60  # of an ablation's table that its page shows; the file has all
METHOD = "mean over seeds with its 95 % t interval; a point without a bar has none"
CLOCK = "Seconds to a KL, and of a training, are those of sampling, explaining and learning, by the clock."


@dataclass(frozen=True)
class Verdict:
    """What one dataset says: a word, a line, what it rests on, and each claim."""

    answer: str  # yes, no, or unclear
    line: str
    grounds: dict[str, str]
    claims: Sequence[Mapping[str, str]] = ()  # key, text, where, verdict, why


def verdict(finding: Finding) -> Verdict:
    """What was found of dense rewards on one dataset: which arm, how much, at which KL and cost, how sure."""
    listed = [{name: getattr(c, name) for name in ("key", "text", "where", "verdict", "why")} for c in judge(finding)]
    dense = finding.of_kind(DENSE)
    arms = [arm for arm in dense if not arm.same_as]
    if not arms:
        line = (
            " ".join(["No arm is dense but in name.", *map(identity, dense)]) if dense else "No dense arm has finished."
        )
        return Verdict("unclear", line, {}, listed)
    asked = {claim.where: claim for claim in judge(finding) if claim.key == HELPED}
    if finding.baseline == "reference":
        return Verdict("unclear", "No sparse arm has finished, so that nothing can be compared with it.", {}, listed)
    arm = _leading(finding, asked) or arms[0]
    grounds = _over_a_control(finding, _case(asked, UPDATES, arm.name))
    grounds |= {"Cost": _cost(finding, arm), "How sure": _sure(finding, arm, asked)}
    if none := _what_no_arm_did(finding, asked):
        grounds["What no arm is shown to do"] = none
    if chosen := tuning(finding):
        grounds["Step sizes"] = chosen
    if finding.common and (there := finding.common.arms.get(arm.name)) and there.gain:
        step = f" ({there.step:g})" if there.step else ""
        grounds["At one common step size"] = f"{arm.name} has gold {signed(there.gain)} over {finding.baseline}{step}."
    if same := [text for other in finding.arms.values() if (text := identity(other))]:
        grounds["The same under two names"] = " ".join(same)
    return Verdict(_answer(asked), _line(finding, arm, asked), grounds, listed)


def _answer(asked: Mapping[str, Claim]) -> str:
    verdicts = [claim.verdict for claim in asked.values()]
    return "yes" if SUPPORTED in verdicts else "no" if verdicts and UNDECIDED not in verdicts else "unclear"


def _leading(finding: Finding, asked: Mapping[str, Claim]) -> Arm | None:
    """The dense arm with the highest gold among those that support the claim, at equal updates or else at equal KL."""
    for claim in asked.values():
        if names := [case.arm for case in claim.cases if case.verdict == SUPPORTED]:
            return max((finding.arms[name] for name in names), key=lambda arm: arm.gold.mean)
    return None


def _line(finding: Finding, arm: Arm, asked: Mapping[str, Claim]) -> str:
    """The arm with the highest gold in one sentence: how much at equal updates, at which KL, and at equal KL."""
    base = finding.arms[finding.baseline]
    if len(arm.seeds) < 2 or not arm.gain or not arm.gain.known:
        chance = "one seed says nothing about other seeds" if len(arm.seeds) < 2 else "there is no interval"
        return f"{arm.name} has gold {signed(arm.gain)} over {base.name} after equal updates, and {chance}."
    at_updates, at_kl = (_case(asked, where, arm.name) for where in (UPDATES, EQUAL_KL))
    verb, doubt = ("reaches", "") if at_updates and at_updates.verdict != UNDECIDED else ("has", UNDECIDED)
    if at_updates and at_updates.verdict == NO_DIFFERENCE:
        doubt = f"{NO_DIFFERENCE}, margin {finding.margin:g}"
    text = (
        f"{arm.name} {verb} gold {signed(arm.gain)} over {base.name} after equal updates{f' ({doubt})' * bool(doubt)}"
    )
    if arm.kl and base.kl:
        text += f", at {arm.kl.mean:.1f} nats of KL against {base.kl.mean:.1f}"
    return f"{text}{_steps(arm, base)}; at equal KL {_at_kl(finding, at_kl)}."


def _steps(arm: Arm, other: Arm) -> str:
    """The step sizes of two arms, where they differ."""
    differ = arm.step and other.step and arm.step != other.step
    return f", with steps of {arm.step:g} against {other.step:g}" if differ else ""


def _case(asked: Mapping[str, Claim], where: str, arm: str) -> Case | None:
    return next((case for case in (asked[where].cases if where in asked else ()) if case.arm == arm), None)


def _at_kl(finding: Finding, case: Case | None) -> str:
    """What an arm's case says at equal KL, with its differences from the baseline."""
    known = [] if case is None else [c for c in case.comparisons if c.rival == finding.baseline and c.difference]
    if not known:
        return "it is not known, for no KL is reached by both with every seed"
    at = ", ".join(f"{signed(c.difference)} at {c.kl:.1f} nats" for c in known)
    words = {SUPPORTED: "it is better too", CONTRADICTED: "it is worse", NO_DIFFERENCE: NO_DIFFERENCE}
    margin = f", margin {finding.margin:g}" * (case.verdict == NO_DIFFERENCE)
    far = finding.levels[-1]
    slower = [n for n in (case.arm, finding.baseline) if len(finding.at(n, far)) < len(finding.judged[n])]
    how = "with every seed" if any(len(finding.at(n, far)) for n in slower) else "with any seed"
    short = f"; {' and '.join(slower)} did not get to {far:.1f} nats {how}" if far > known[-1].kl else ""
    return f"{words.get(case.verdict, 'it is undecided')} ({at}{margin}{short})"


def _over_a_control(finding: Finding, case: Case | None) -> dict[str, str]:
    """What an arm gains over the control that it gains least over."""
    known = [c for c in (case.comparisons if case else ()) if c.is_control and c.difference]
    nearest = min(known, key=lambda c: c.difference.mean, default=None)
    if not nearest:
        return {}
    steps = _steps(finding.arms[case.arm], finding.arms[nearest.rival])
    words = f"{signed(nearest.difference)} gold over {nearest.rival}, after equal updates{steps}."
    return {"Over the nearest control": words}


def _cost(finding: Finding, arm: Arm) -> str:
    """What the arm costs, and what it and the baseline take to reach each KL that arms are compared at."""
    base, text = finding.arms[finding.baseline], cost(arm, finding.arms[finding.baseline])
    for level in finding.levels:
        ours, theirs = (cost_at(finding, name, level) for name in (arm.name, base.name))
        text += f" To {level:.1f} nats: {arm.name} {ours}; {base.name} {theirs}."
    return f"{text} {CLOCK}"


def _sure(finding: Finding, arm: Arm, asked: Mapping[str, Claim]) -> str:
    cases = {where: case for where in (UPDATES, EQUAL_KL) if (case := _case(asked, where, arm.name))}
    tested = {where: case for where, case in cases.items() if case.has_interval}
    text = [f"At {where} {case.verdict}, {p_value(_p(case))} after Holm." for where, case in tested.items()]
    text += [seeds_needed(case) for case in list(tested.values())[:1] if case.verdict == UNDECIDED]
    return " ".join([basis(finding), *(text or ["No interval: that takes two seeds."])])


def _p(case: Case) -> float:
    return case.p_equal if case.verdict == NO_DIFFERENCE else case.p_differs


def _what_no_arm_did(finding: Finding, asked: Mapping[str, Claim]) -> str:
    """What the study asked of every dense arm and saw in none."""
    controls = [arm.name for arm in finding.of_kind(CONTROL)]
    beaten = " and ".join([finding.baseline, *(["every control"] if controls else [])])
    missing = [where for where, claim in asked.items() if claim.verdict != SUPPORTED]
    return f"To end above {beaten} at {' or at '.join(missing)}." if missing else ""


def cost(arm: Arm, base: Arm) -> str:
    """What training the arm costs, compared with the baseline, in words."""
    if not arm.seconds:
        return "Unknown: the runs recorded no times."
    whole = (
        f"A run takes {duration(arm.run)} by the clock, {duration(arm.seconds)} of it"
        if arm.run
        else f"A run spends {duration(arm.seconds)}"
    )
    text = f"{whole} training, {arm.explain or 0:.0%} of that explaining"
    if base.seconds:
        text += f"; a training takes {arm.seconds / base.seconds:.1f} times that of {base.name}"
    searches = arm.search and f"{arm.search.number} searches" if arm.search and arm.search.number > 1 else "one search"
    return text + (f"; {searches} for the weights took {duration(arm.search.seconds)} more." if arm.search else ".")


def verdict_html(answer: Verdict) -> Markup:
    """What was found with its grounds, and the verdicts on the claims."""
    by_claim: dict[tuple[str, str], dict[str, str]] = {}
    for claim in answer.claims:
        by_claim.setdefault((claim["key"], claim["text"]), {})[claim["where"]] = claim["verdict"]
    rows = []
    for (key, text), verdicts in by_claim.items():
        both = (verdicts.get(UPDATES, verdicts.get("", "")), verdicts.get(EQUAL_KL, ""))
        rows.append((f"{key}. {text}", *(chip(word) if word else "–" for word in both)))
    listed = table("", ("claim", f"at {UPDATES}", f"at {EQUAL_KL}"), rows) if rows else ""
    reasons = [(f"{c['key']}{', at ' * bool(c['where'])}{c['where']}", c["verdict"], c["why"]) for c in answer.claims]
    return draw("verdict", answer.answer, answer.line, answer.grounds, listed, reasons)


def claims_html(finding: Finding) -> Markup:
    """The rule, and every comparison that a verdict rests on."""
    rows = [row.values() for row in claims.rows(judge(finding))]
    what = "Gold in log-odds, value loss as a ratio; 95 % intervals over seeds"
    return draw("rule", RULE, basis(finding), table(what, claims.HEAD, rows) if rows else "")


# ---------------------------------------------------------------------------------------------------- a dataset


def dataset_page(study: str, finding: Finding) -> tuple[Markup, Markup]:
    """Body and contents of the comparison of all arms on one dataset: the answer, figures, then tables."""
    ranked = sorted(finding.arms.values(), key=lambda arm: -arm.gold.mean)
    base, seeds = finding.baseline, "95 % interval over seeds"
    trained = [arm for arm in ranked if arm.kind != "reference"]
    common = [arm for arm in finding.common.arms.values() if arm.gain] if finding.common else []
    at = dict(zip(("gain_at_kl", "gain_far"), finding.levels))
    none = part("paragraph", "No KL is reached by two arms with every seed.")
    gains = {field: _known(trained, field) for field in ("gain", *at)}
    figures = [forest(gains[field], f"{seeds}, at {level:.1f} nats") for field, level in at.items()]
    parts = [
        ("verdict", "Did dense rewards help?", verdict_html(verdict(finding))),
        ("gold", "Gold score", forest({a.name: a.gold for a in ranked}, f"Log-odds, {METHOD}", None)),
        ("gain", f"Gain over {base} at equal updates", forest(gains["gain"], f"The same prompts, {seeds}")),
        ("kl", f"Gain over {base} at equal KL", draw("joined", figures) if any(figures) else none),
        ("common", "At one common step size", forest(_known(common, "gain"), f"Gold over {base}, {seeds}")),
        ("improvement", f"Probability of a higher score than {base}", forest(_known(trained, "improves"), COIN, 0.5)),
        ("laws", "Over-optimisation", _laws(finding)),
        ("numbers", "All numbers", _arm_tables(finding.arms.values())),
        ("claims", "What the verdicts rest on", claims_html(finding)),
        ("seeds", "Each seed", _seed_table(finding)),
    ]
    return sections(f"{study}: all arms on {finding.dataset}", parts)


COIN = "Of a run drawn from each, 95 % interval over seeds; 0.5 is a coin"


def _known(arms: Iterable[Arm], field: str) -> dict[str, Interval]:
    return {arm.name: value for arm in arms if (value := getattr(arm, field))}


def _laws(finding: Finding) -> Markup | str:
    """Where gold peaks as each arm moves away from the reference; nothing if no path is long enough."""
    if finding.history is None or not {"kl", "gold", "update"} <= set(finding.history):
        return ""
    laws = law_table(fits(finding.history))
    what = "Gold (log-odds) while training: d (alpha - beta log d) over its start, d = sqrt(KL) (Gao et al., 2022)"
    return "" if laws.empty else table(f"{what}; 95 % t intervals over seeds", list(laws.columns), laws.values.tolist())


COLUMNS = {"gold": "gold", "KL (nats)": "kl", "gain": "gain", "gain at a low KL": "gain_at_kl"}
COLUMNS |= {"gain at a far KL": "gain_far"}  # heading: field of an arm
MORE = {"IQM of gold": "iqm", "win rate": "win", "win rate, equal length": "win_lc", "P(higher)": "improves"}


def _arm_tables(arms: Iterable[Arm]) -> Markup:
    """Scores and gains of every arm; beneath them wins and costs."""
    arms = list(arms)
    scores = [[a.name, *(draw("number", getattr(a, field)) for field in COLUMNS.values())] for a in arms]
    others = [
        [
            *(a.name, len(a.seeds), *(draw("number", getattr(a, field)) for field in MORE.values())),
            duration(a.seconds) if a.seconds else "–",
        ]
        for a in arms
    ]
    head = ("arm", "seeds", *MORE, "training")
    first = table("Gold in log-odds, 95 % intervals over seeds", ("arm", *COLUMNS), scores)
    second = table(f"Wins over the untrained reference; IQM has an interval from five seeds on. {CLOCK}", head, others)
    return draw("joined", [first, second])


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
    return draw("joined", [figure, forest(odds, f"Probability of improvement over sparse, mean over {names}", 0.5)])


# ---------------------------------------------------------------------------------------------------- an ablation


def ablation_page(study: str, run: RunFolder) -> tuple[Markup, Markup]:
    """Body and contents of an ablation's page: its intervals as figures, its numbers and tables."""
    metrics = run.load_json("metrics.json")
    groups = {key: intervals for key, value in metrics.items() if (intervals := dict(intervals_in(value)))}
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


def intervals_in(value: object, name: str = "") -> list[tuple[str, Interval]]:
    """Every mean with low and high inside a metric, named by its path."""
    if isinstance(value, dict) and {"mean", "low", "high"} <= set(value):
        mean, *bounds = (value[key] for key in ("mean", "low", "high"))
        if bounds == [None, None]:  # of one seed: JSON knows no infinity
            bounds = [-math.inf, math.inf]
        known = isinstance(mean, (int, float)) and math.isfinite(mean) and None not in bounds
        return [(name or "all", Interval(mean, *bounds))] if known else []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [pair for key, item in inner for pair in intervals_in(item, f"{name} {key}".strip())]


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
