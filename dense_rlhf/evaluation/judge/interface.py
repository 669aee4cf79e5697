"""The interface of a judge, and comparisons in both orders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dense_rlhf.types import InputError, Prompt


class Judge(Protocol):
    """Says which of two responses to an instruction is better."""

    name: str

    def compare(self, instructions: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        """(N,) in [0, 1]: the share by which `first` is preferred; 0.5 a tie, NaN where unjudged."""


class Grader(Protocol):
    """Says how good a response is."""

    name: str

    def grade(
        self, instructions: Sequence[Prompt], responses: Sequence[str], references: Sequence[str | None] | None = None
    ) -> np.ndarray:
        """(N,) from 1 to 10, NaN where unjudged. A reference is a correct answer to grade against."""


@dataclass(frozen=True)
class Pairwise:
    """Both orders of N pairs: (N,) shares by which ours is preferred, NaN where unjudged."""

    shown_first: np.ndarray
    shown_second: np.ndarray

    @property
    def preference(self) -> np.ndarray:
        """(N,) the mean of both orders; NaN where either is missing."""
        return (self.shown_first + self.shown_second) / 2

    @property
    def judged(self) -> np.ndarray:
        """(N,) bool: both orders have a judgement."""
        return ~np.isnan(self.preference)

    @property
    def failed(self) -> int:
        """Number of unjudged pairs, which the numbers below leave out."""
        return int((~self.judged).sum())

    @property
    def win_rate(self) -> float:
        """Mean preference over judged pairs; NaN without any."""
        return self._mean(self.preference)

    @property
    def ties(self) -> float:
        """Share of judged pairs in which neither is preferred, both orders taken together."""
        return self._mean(self.preference == 0.5)

    @property
    def consistent(self) -> float:
        """Share of judged pairs in which both orders name the same winner, or a tie."""
        return self._mean(np.sign(self.shown_first - 0.5) == np.sign(self.shown_second - 0.5))

    @property
    def position_bias(self) -> float:
        """What being shown first adds to a response's preference: 0 nothing, 0.5 everything, negative if it harms."""
        return self._mean((self.shown_first - self.shown_second) / 2)

    def summary(self) -> dict[str, float]:
        """These numbers by name, and how many pairs there are."""
        names = ("win_rate", "ties", "consistent", "position_bias", "failed")
        return {"pairs": len(self.judged)} | {name: getattr(self, name) for name in names}

    def _mean(self, values: np.ndarray) -> float:
        return float(values[self.judged].mean()) if self.judged.any() else float("nan")


def pairwise(judge: Judge, instructions: Sequence[Prompt], ours: Sequence[str], theirs: Sequence[str]) -> Pairwise:
    """Compare N pairs in both orders. Raises `InputError` for lengths that disagree."""
    first, second = judge.compare(instructions, ours, theirs), judge.compare(instructions, theirs, ours)
    return Pairwise(np.asarray(first, float), 1 - np.asarray(second, float))


def check_lengths(**lists: Sequence) -> None:
    """Raise `InputError` unless all have the same length."""
    if len(set(map(len, lists.values()))) > 1:
        given = ", ".join(f"{len(values)} {name}" for name, values in lists.items())
        raise InputError(f"{given}: wanted one of each for every pair")
