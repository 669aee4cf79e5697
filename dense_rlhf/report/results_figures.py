"""The figures of `RESULTS.md`: a claim over all studies, and what each arm of a main study gains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dense_rlhf.evaluation.claims import HELPED
from dense_rlhf.evaluation.results import Finding
from dense_rlhf.evaluation.rule import Case
from dense_rlhf.evaluation.words import EQUAL_KL, UPDATES
from dense_rlhf.files import write_text
from dense_rlhf.report.charts import drawable, forest, title_of
from dense_rlhf.statistics import Difference, Interval

MOST = 5
Figure = tuple[str, str]  # its file, from the folder of `RESULTS.md`, and its alt text


@dataclass
class Figures:
    """Writes at most `MOST` figures; what comes after them is not drawn."""

    to: Path  # the folder of `RESULTS.md`
    drawn: list[Figure] = field(default_factory=list)

    def across(self, rows: Sequence[Mapping]) -> list[Figure]:
        """What each study says of claim `HELPED`, by the arm that its verdict quotes, at each place.

        `rows` have the key, place, study and case of a claim, as `results_page` makes them.
        """
        start = len(self.drawn)
        for where in (UPDATES, EQUAL_KL):
            asked = [row for row in rows if (row["key"], row["where"]) == (HELPED, where) and row["case"]]
            gains = _by_kl([(row["study"], row["case"]) for row in asked])
            what = f"Gold over its rival at {where} (log-odds, 95 % interval over seeds)"
            what += f", claim {HELPED}: of each study the arm that its verdict quotes"
            self._draw(gains, what, f"reports/{where.replace(' ', '-')}.svg")
        return self.drawn[start:]

    def gains(self, finding: Finding, name: str, folder: Path) -> list[Figure]:
        """What each arm of a dataset gains over the baseline, at equal updates and at equal KL."""
        start, trained = len(self.drawn), [arm for arm in finding.arms.values() if arm.kind != "reference"]
        over = f"{name}: gold over {finding.baseline} (log-odds, 95 % interval over seeds),"
        asked = {"gain": f"{over} after equal updates"}
        asked |= {at: f"{over} at {kl:.1f} nats" for at, kl in zip(("gain_at_kl", "gain_far"), finding.levels)}
        for at, what in asked.items():
            gains = {arm.name: gain for arm in trained if (gain := getattr(arm, at))}
            self._draw(gains, what, f"{folder.as_posix()}/{at}-{finding.dataset}.svg")
        return self.drawn[start:]

    def _draw(self, intervals: Mapping[str, Interval], what: str, file: str) -> None:
        if len(self.drawn) < MOST and (picture := forest(intervals, what, alone=True)):
            write_text(self.to / file, f"{picture}\n")
            self.drawn.append((file, f"{title_of(drawable(intervals), 0.0)}. {what}"))


def _by_kl(cases: Sequence[tuple[str, Case]]) -> dict[str, Difference]:
    """What the arm of each case gains over its first rival, in the order of the KL where it was asked, if at one."""
    gains = {}
    for study, case in sorted(cases, key=lambda row: row[1].comparisons[0].kl or 0.0):
        first = case.comparisons[0]
        where = f"{first.kl:.1f} nats, " if first.kl else ""
        gains[f"{case.arm} ({where}{study})"] = first.difference
    return {name: gain for name, gain in gains.items() if gain}
