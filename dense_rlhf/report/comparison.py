"""Comparison pages: the arms of one dataset, or the tables of one ablation, beside each other.

They read metrics and tables of run folders only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dense_rlhf.escape import esc
from dense_rlhf.live import duration
from dense_rlhf.report.charts import forest
from dense_rlhf.report.findings import CONTROL, DENSE, Arm, Finding, across
from dense_rlhf.report.page import sections, table
from dense_rlhf.runs import RunFolder
from dense_rlhf.statistics import Interval

ENOUGH = 5  # seeds of which an interval says enough to answer yes
ROWS = 60  # of an ablation's table; the whole is in the file


@dataclass(frozen=True)
class Verdict:
    """Whether dense rewards helped on one dataset: a word, a line, and what it rests on."""

    answer: str  # yes, no, or unclear
    line: str
    grounds: dict[str, str]


def verdict(found: Finding) -> Verdict:
    """Whether dense arms beat the baseline: at equal updates, at equal KL, over a control; how sure; at which cost."""
    dense = found.of_kind(DENSE)
    if not dense:
        return Verdict("unclear", "No dense arm has finished.", {})
    faster = [arm for arm in dense if arm.gain and arm.gain.low > 0]
    better = [arm for arm in dense if arm.sure and arm.gain_at_kl and arm.gain_at_kl.low > 0]
    n = f"{len(dense)} dense arm{'s' * (len(dense) > 1)}"
    return Verdict(*_answer(found, dense, faster, better, n), _grounds(found, dense[0], faster, better, n))


def _answer(found: Finding, dense: Sequence[Arm], faster: Sequence[Arm], better: Sequence[Arm], n: str) -> tuple:
    """A word and a line. Yes is said of equal KL only, on enough seeds, and where no control does as well."""
    base = found.baseline
    if base == "reference":
        return "unclear", f"{len(faster)} of {n} improved on the untrained policy; there is no sparse arm beside them."
    if better:
        line = f"{len(better)} of {n} {'is' if len(better) == 1 else 'are'} above {base} at equal KL"
        alike = [c.name for c in found.of_kind(CONTROL) if c.gain_at_kl
                 and c.gain_at_kl.mean >= max(arm.gain_at_kl.low for arm in better)]  # fmt: skip
        if min(len(arm.seeds) for arm in better) < ENOUGH:
            return "unclear", f"Dense rewards may help: {line}, on too few seeds to be sure of it."
        if alike:
            return "unclear", f"{line}, but {alike[0]}, which knows nothing of tokens, does as well."
        return "yes", f"Dense rewards helped: {line}."
    if faster:
        return "unclear", (f"Dense rewards learned faster in {len(faster)} of {n}; that they reach a better policy "
                           f"than {base} at equal KL is not shown.")  # fmt: skip
    if all(arm.gain and arm.gain.high < 0 for arm in dense):
        return "no", f"Dense rewards did not help: every one of {n} ends below {base}."
    return "unclear", f"No effect of dense rewards is shown: none of {n} can be told from {base}."


def _grounds(found: Finding, best: Arm, faster: Sequence[Arm], better: Sequence[Arm], n: str) -> dict[str, str]:
    base = found.arms[found.baseline]
    much = f"at equal updates {best.name}, highest of {n}, has {_signed(best.gain)} gold (log-odds) over {base.name}"
    said = {"By how much": f"{much}; the interval is above zero for {len(faster)} of {n}."}
    if best.gain_at_kl:
        unsure = "" if best.sure else ", one seed, so without an interval"
        at_kl = f"{best.gain_at_kl.mean:+.2f}" if not best.sure else _signed(best.gain_at_kl)
        said["At equal KL"] = f"{at_kl} gold{unsure}; the interval is above zero for {len(better)} of {n}."
    if controls := found.of_kind(CONTROL):
        gap = found.gap(best.name, controls[0].name)
        said["Over a control"] = f"{_signed(gap)} gold over {controls[0].name}, the best control" if gap else "unknown"
    seeds = min(len(arm.seeds) for arm in found.arms.values())
    lucky = "" if n.startswith("1 ") else f" Taking the highest of {n} flatters it."
    few = {1: " One seed says nothing of others."}.get(seeds, " Few seeds: intervals are too short." * (seeds < ENOUGH))
    said["How sure"] = f"{seeds} seed{'s' * (seeds > 1)}, {found.prompts} held-out prompts each.{few}{lucky}"
    said["At which cost"] = cost(best, base)
    return said


def cost(arm: Arm, base: Arm) -> str:
    """What training the arm takes beside the baseline, in words."""
    if not arm.seconds:
        return "unknown: the runs left no times."
    text = f"a training takes {duration(arm.seconds)}, {arm.explain or 0:.0%} of it to explain"
    if base.seconds:
        text += f"; {arm.seconds / base.seconds:.1f} times that of {base.name}"
    return text + (f"; learning the weights took {duration(arm.search)} more, once." if arm.search else ".")


def _signed(interval: Interval | None) -> str:
    return f"{interval.mean:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]" if interval else "–"


def verdict_html(found: Verdict) -> str:
    """The verdict as a paragraph and a list."""
    grounds = "".join(f"<p><strong>{esc(name)}:</strong> {esc(text)}</p>" for name, text in found.grounds.items())
    return f"<div class='verdict {esc(found.answer)}'><p class='lead'>{esc(found.line)}</p>{grounds}</div>"


# ---------------------------------------------------------------------------------------------------- a dataset


def dataset_page(study: str, found: Finding) -> tuple[str, str]:
    """Body and contents of the comparison of all arms on one dataset."""
    arms = list(found.arms.values())
    ranked = sorted(arms, key=lambda arm: -arm.iqm.mean)
    gains = {arm.name: arm.gain for arm in ranked if arm.gain and arm.kind != "reference"}
    at_kl = {arm.name: arm.gain_at_kl for arm in ranked if arm.gain_at_kl and arm.sure}
    improves = {arm.name: arm.improves for arm in ranked if arm.improves and arm.kind != "reference"}
    base = found.baseline
    body, listed = sections([
        ("verdict", "Did dense rewards help?", verdict_html(verdict(found))),
        ("gold", "Gold score", forest({a.name: a.iqm for a in ranked}, f"Gold score (log-odds), {METHOD}")),
        ("gain", f"Gain over {base} at equal updates",
         forest(gains, f"Mean gold over {base} on the same prompts, 95 % interval over seeds and prompts")),
        ("kl", f"Gain over {base} at equal KL", _at_kl(at_kl, base)),
        ("improvement", "Probability of improvement",
         forest(improves, f"Probability that a run scores higher than one of {base}; 0.5 is a coin")),
        ("numbers", "All numbers", _arm_table(arms)),
        ("seeds", "Each seed", _seed_table(found)),
    ])  # fmt: skip
    return f"<h1>{esc(study)}: all arms on {esc(found.dataset)}</h1>{body}", listed


METHOD = "interquartile mean over seeds with its 95 % interval (bootstrap over seeds and prompts)"


def _at_kl(gains: Mapping[str, Interval], base: str) -> str:
    if not gains:
        return "<p>One seed, or no shared KL: no interval can be given.</p>"
    what = f"Gold over {base} where both first reach the largest KL that both know, 95 % interval over seeds"
    return forest(gains, what)


def _arm_table(arms: Sequence[Arm]) -> str:
    head = ("arm", "kind", "seeds", "gold, IQM", "gold, mean", "KL (nats)", "win rate", "gain", "gain at equal KL",
            "P(improvement)", "training", "explaining")  # fmt: skip
    rows = [[esc(a.name), a.kind, str(len(a.seeds)), _cell(a.iqm), _cell(a.gold), _cell(a.kl), _cell(a.win),
             _cell(a.gain), _cell(a.gain_at_kl) if a.sure else _mean(a.gain_at_kl), _cell(a.improves),
             duration(a.seconds) if a.seconds else "–", f"{a.explain:.0%}" if a.explain is not None else "–"]
            for a in arms]  # fmt: skip
    return table("Every arm, with 95 % intervals; gold in log-odds, wins over the untrained reference", head, rows)


def _cell(interval: Interval | None) -> str:
    return f"<span class='number'>{esc(interval)}</span>" if interval else "–"


def _mean(interval: Interval | None) -> str:
    return f"{interval.mean:.2f}" if interval else "–"


def _seed_table(found: Finding) -> str:
    rows = [(esc(arm), esc(seed), f"{t['gold'].mean():.2f}", f"{t['proxy'].mean():.2f}",
             f"{t['kl'].mean():.2f}" if "kl" in t else "–") for arm, by in found.judged.items()
            for seed, t in by.items()]  # fmt: skip
    return table("Means over the held-out prompts of each run", ("arm", "seed", "gold", "proxy", "KL"), rows)


def across_html(found: Sequence[Finding]) -> str:
    """Arms that several datasets have, over all of them; nothing for one dataset."""
    both = [f for f in found if f.baseline != "reference"]
    if len(both) < 2:
        return ""
    over = across(both)
    names = ", ".join(f.dataset for f in both)
    units = "in standard deviations of the reference's gold score"
    gains, odds = ({arm: o[key] for arm, o in over.items()} for key in ("iqm", "improves"))
    return (forest(gains, f"Gain over sparse {units}, interquartile mean over {names}")
            + forest(odds, f"Probability of improvement over sparse, mean over {names}"))  # fmt: skip


# ---------------------------------------------------------------------------------------------------- an ablation


def ablation_page(study: str, run: RunFolder) -> tuple[str, str]:
    """Body and contents of what one ablation left: its intervals as figures, its numbers and tables."""
    metrics, name = run.load_json("metrics.json"), run.path.name
    groups = {key: found for key, value in metrics.items() if (found := dict(_intervals(value)))}
    plain = {key: value for key, value in metrics.items() if key not in groups and key != "revisions"}
    parts = [(f"m-{i}", key.replace("_", " "), forest(found, f"{key.replace('_', ' ')}: value with its 95 % interval"))
             for i, (key, found) in enumerate(groups.items())]  # fmt: skip
    rows = [(esc(key), f"<code>{esc(value)}</code>") for key, value in plain.items()]
    listed = table("What metrics.json holds beside", ("name", "value"), rows) if rows else ""
    parts.append(("numbers", "Numbers", listed))
    parts += [(f"t-{path.stem}", f"Table: {path.stem}", csv_table(run, path.stem))
              for path in sorted(run.path.glob("*.csv"))]  # fmt: skip
    body, listed = sections(parts)
    return f"<h1>{esc(study)}: {esc(name)}</h1>{body}", listed


def _intervals(value: object, name: str = "") -> list[tuple[str, Interval]]:
    """Every mean with low and high inside a metric, named by its way there."""
    if isinstance(value, dict) and {"mean", "low", "high"} == set(value):
        numbers = [value[key] for key in ("mean", "low", "high")]
        known = all(isinstance(v, (int, float)) and math.isfinite(v) for v in numbers)
        return [(name or "all", Interval(*numbers))] if known else []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [one for key, item in inner for one in _intervals(item, f"{name} {key}".strip())]


def csv_table(run: RunFolder, name: str) -> str:
    """A table of the run, its first rows; numbers rounded."""
    frame = run.load_table(name)
    more = f"; the first {ROWS} of {len(frame)} rows, all are in {name}.csv" if len(frame) > ROWS else ""
    rows = [[_value(value) for value in row] for row in frame.head(ROWS).values.tolist()]
    return table(f"{name}.csv{more}", [esc(column) for column in frame.columns], rows) if rows else ""


def _value(value: object) -> str:
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.4g}"
    return esc(value, 300)
