"""The settings of a study compared: what each arm gains over the baseline of its own setting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dense_rlhf.config.params import RunParams
from dense_rlhf.evaluation.open_questions import Answer
from dense_rlhf.evaluation.results import Arm, Finding
from dense_rlhf.report.charts import forest
from dense_rlhf.report.comparison import METHOD
from dense_rlhf.report.page import draw, table

if TYPE_CHECKING:
    from markupsafe import Markup

EQUAL_UPDATES = "after equal updates on the same prompts, 95 % interval over seeds"
EQUAL_KL = "at the largest KL that both reach, 95 % interval over seeds"
ANSWER = ("question", "at", "verdict", "why")
HEAD = ("setting", "arm", "gold (log-odds)", "KL (nats)", "gain at equal updates", "gain at equal KL")


def in_order(findings: Sequence[Finding], comparisons: Sequence[RunParams]) -> list[Finding]:
    """Findings in the order in which a study names its datasets and settings."""
    places = [run.where for run in comparisons]
    return sorted(findings, key=lambda f: places.index(f.dataset) if f.dataset in places else len(places))


def settings_html(
    findings: Sequence[Finding], comparisons: Sequence[RunParams], answers: Sequence[Answer] = ()
) -> Markup:
    """What the study answers, two figures for each arm with a line for each setting, and all numbers; empty for a study
    without settings and open questions."""
    several = len({run.where.removesuffix(f"-{run.setting}") for run in comparisons}) > 1
    names = {run.where: run.where if several else run.setting for run in comparisons if run.setting}
    varied = {names[f.dataset]: f for f in findings if f.dataset in names}
    arms = dict.fromkeys(arm for f in varied.values() for arm in f.arms if arm not in (f.baseline, "reference"))
    figures = [figure for arm in arms for figure in _figures(arm, {n: f for n, f in varied.items() if arm in f.arms})]
    rows = [_row(name, arm) for name, f in varied.items() for arm in f.arms.values()]
    parts = [*figures, table(f"Every arm in every setting; {METHOD}", HEAD, rows)] if varied else []
    if answers:
        cells = [[claim.text, f"{claim.where}, {dataset}", claim.verdict, claim.why] for dataset, claim in answers]
        parts = [table("What the study answers, by the rule of the claims", ANSWER, cells), *parts]
    return draw("joined", parts)


def _figures(arm: str, varied: dict[str, Finding]) -> list[Markup | str]:
    """What one arm gains over the baseline in each setting, at equal updates and at equal KL."""
    base = next(iter(varied.values())).baseline
    gains = {name: gain for name, f in varied.items() if (gain := f.arms[arm].gain)}
    at_kl = {name: gain for name, f in varied.items() if (gain := f.arms[arm].gain_at_kl)}
    pairs = (gains, EQUAL_UPDATES), (at_kl, EQUAL_KL)
    return [forest(values, f"Gold of {arm} over {base} {how}") for values, how in pairs]


def _row(setting: str, arm: Arm) -> list[object]:
    return [setting, arm.name, *(draw("number", value) for value in (arm.gold, arm.kl, arm.gain, arm.gain_at_kl))]
