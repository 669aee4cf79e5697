"""The rule by which differences between arms decide a question: four verdicts, and the error rates that they share.

`RULE` says in words what `decide` does, and is shown with every verdict. `tests/evaluation/test_rule.py` simulates it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dense_rlhf.statistics import ALPHA, Difference, holm, seeds_needed

SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided"
NO_DIFFERENCE = "no difference that matters"
SECOND_LOOK = 10  # seeds from which on a study's second and last look counts
LEVELS = 0.8 * ALPHA, 0.2 * ALPHA  # of the first and of the second look: together ALPHA

RULE = (
    "A claim says that an arm differs from its rivals in one direction; it is asked once at equal updates and once at "
    "equal KL. Seeds are the unit, and a test is Student's t: paired where a seed gave both arms the same prompts in "
    "the same order and the same start, otherwise Welch's. An arm supports the claim if it differs in that direction "
    "from every rival and from every control of the study (uniform, random, shuffled credit: they ignore what the "
    "tokens are); an arm of signed credit cannot without the control shuffled. It contradicts the claim if it differs "
    "in the opposite direction from some rival. It makes no difference that matters if it is shown to be neither "
    "worse than any rival, nor better than the best of rivals and controls, by as much as the margin, which the "
    "parameters state before the run (two one-sided tests). At equal KL all this must hold at the low KL that every "
    "run reaches and at the KL where the fastest arm ends, as far as the others were trained on to it. A p is the "
    "largest of the tests that an answer needs. Supported and contradicted share one error rate over all arms and "
    "claims of a dataset, and no difference has its own (Holm's correction for each). An open question has error rates "
    "of its own. A study may be looked at twice: the first look, with "
    f"fewer than {SECOND_LOOK} seeds, tests at {LEVELS[0]:g}; the second and last, with {SECOND_LOOK} or more, at "
    f"{LEVELS[1]:g}; together {ALPHA:g}. A claim is supported if at least one arm supports it; contradicted if no arm "
    "does, none is undecided, and one contradicts it; without a difference that matters if that holds for every arm; "
    "and otherwise undecided. One seed decides nothing. Intervals are at 95 %, each for itself."
)


def level(seeds: int) -> float:
    """The level of all tests of a study together, by how many seeds it has."""
    return LEVELS[seeds >= SECOND_LOOK]


@dataclass(frozen=True)
class Comparison:
    """One difference of an arm from a rival or a control; None where the runs do not have it."""

    rival: str
    is_control: bool
    measure: str
    kl: float | None  # where it was taken; None: after equal updates
    difference: Difference | None

    def p(self, sign: int) -> float:
        """Two-sided p of no difference; 1 unless it has this sign."""
        d = self.difference
        return d.p if d and d.mean * sign > 0 else 1.0

    def p_less(self, sign: int, margin: float) -> float:
        """One-sided p of a difference, counted in the direction of `sign`, of at least `margin`."""
        d = self.difference
        return 1.0 if d is None else d.p_below(margin) if sign > 0 else d.p_above(-margin)


@dataclass(frozen=True)
class Case:
    """The evidence of one arm on one question. p-values are corrected over all cases of the dataset by `decide`."""

    arm: str
    comparisons: tuple[Comparison, ...]
    wanted: int  # the sign of the difference that supports the claim
    margin: float  # in the unit of the differences
    p_differs: float = 1.0
    p_equal: float = 1.0
    tests: int = 1  # how many cases they were corrected for
    verdict: str = UNDECIDED

    def _by_name(self, controls: bool) -> list[list[Comparison]]:
        """The comparisons with each rival; with `controls` also those with each control that is known."""
        names = dict.fromkeys(c.rival for c in self.comparisons if controls or not c.is_control)
        groups = [[c for c in self.comparisons if c.rival == name] for name in names]
        return [group for group in groups if not group[0].is_control or all(c.difference for c in group)]

    @property
    def supports(self) -> float:
        """p that the arm differs in the wanted direction from every rival and control."""
        return max(c.p(self.wanted) for c in self.comparisons)

    @property
    def opposes(self) -> float:
        """p that the arm differs in the opposite direction from at least one rival (Bonferroni)."""
        rivals = [max(c.p(-self.wanted) for c in group) for group in self._by_name(controls=False)]
        return min(1.0, len(rivals) * min(rivals))

    @property
    def equals(self) -> float:
        """p that the arm is not worse than any rival, and not better than some rival or control (Bonferroni), by as
        much as the margin."""
        rivals, everyone = self._by_name(controls=False), self._by_name(controls=True)
        worse = max(c.p_less(-self.wanted, self.margin) for group in rivals for c in group)
        return min(1.0, max(worse, len(everyone) * min(map(self._no_better, everyone))))

    def _no_better(self, group: Sequence[Comparison]) -> float:
        """p that the arm is not better than one rival or control by as much as the margin."""
        return max(c.p_less(self.wanted, self.margin) for c in group)

    @property
    def nearest(self) -> tuple[Comparison, ...]:
        """The comparisons with the rival or control that the arm is least better than."""
        return tuple(min(self._by_name(controls=True), key=self._no_better))

    @property
    def differs(self) -> float:
        """Uncorrected p of the likelier direction."""
        return min(self.supports, self.opposes)

    @property
    def seeds(self) -> int:
        """Seeds of the comparison with the fewest."""
        return min((d.seeds for d in self._known), default=0)

    @property
    def has_interval(self) -> bool:
        return any(d.known for d in self._known)

    @property
    def _known(self) -> list[Difference]:
        return [c.difference for c in self.comparisons if c.difference]

    def seeds_to_decide(self) -> tuple[float, float]:
        """How many seeds would show a difference, and how many that there is none that matters, with a chance of 0.8,
        were differences and spread as measured; infinite where these differences cannot. At Holm's first step."""

        def share(seeds: int) -> float:
            return level(seeds) / self.tests

        def needed(d: Difference | None, sign: int) -> float:
            return seeds_needed(d, share) if d and d.mean * sign > 0 else math.inf

        rivals = self._by_name(controls=False)
        up = max(needed(c.difference, self.wanted) for c in self.comparisons)
        down = min(max(needed(c.difference, -self.wanted) for c in group) for group in rivals)
        within = [self._seeds_within(group, share) for group in self._by_name(controls=True)]
        return min(up, down), min(within, default=math.inf)

    def _seeds_within(self, group: Sequence[Comparison], share) -> float:
        return max(seeds_needed(c.difference, share, self.margin) if c.difference else math.inf for c in group)


def decide(cases: Sequence[Case], seeds: int) -> list[Case]:
    """All cases of a dataset with their verdicts, by `RULE`; `seeds` of the study, which tell the look.

    A difference that is significant and within the margin is one that does not matter.
    """
    tested = [case for case in cases if case.has_interval]
    differs = dict(zip(map(id, tested), holm([case.differs for case in tested])))
    equal = dict(zip(map(id, tested), holm([case.equals for case in tested])))
    decided = []
    for case in cases:
        p, same = differs.get(id(case), 1.0), equal.get(id(case), 1.0)
        direction = SUPPORTED if case.supports < case.opposes else CONTRADICTED
        verdict = NO_DIFFERENCE if same < level(seeds) else direction if p < level(seeds) else UNDECIDED
        decided.append(replace(case, p_differs=p, p_equal=same, tests=len(tested), verdict=verdict))
    return decided


def overall(verdicts: Sequence[str]) -> str:
    """The verdict on a claim from those of its arms: that some arm does as it says."""
    if SUPPORTED in verdicts:
        return SUPPORTED
    if not verdicts or UNDECIDED in verdicts:
        return UNDECIDED
    return CONTRADICTED if CONTRADICTED in verdicts else NO_DIFFERENCE
