"""Real measurements on the simplex, for `benchmarks/bayesopt.py`: photodegradation of blends of four polymers.

Two tables of Langner et al. (2020), as Olympus (Haese et al., 2021) packs them in the wheel `olymp`, MIT licence:
1,040 measurements of 1,020 compositions, 19 of them measured more than once. Searched among the measured compositions
for the least degradation: a proposal becomes the nearest of them, which may have been tried before. An observation is
the composition's mean in the table plus normal noise of the sd within repeated compositions, pooled. In units of the
table's sd, the noise is 0.21 (photo_pce10) and 0.27 (photo_wf3); the table's own noise is part of the truth.
"""

from __future__ import annotations

import json
from functools import cached_property, lru_cache

import numpy as np

from dense_rlhf.bayesopt.known_functions import Landscape
from dense_rlhf.bayesopt.known_searches import Experiment
from dense_rlhf.bayesopt.space import Point
from dense_rlhf.files import wheel_member

WHEEL = "olymp==0.0.1b0", "d9aed9fd153c17631e343ea4f0524066398baae0ae1fe208b0d8f456d66142b4"
MEASURED = ("photo_pce10", "photo_wf3")


@lru_cache
def table(name: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Compositions (N, 4), their mean value (N,), the higher the better, in sd of the table, and the noise's sd."""
    folder = f"olympus/datasets/dataset_{name}"
    goal = json.loads(wheel_member(*WHEEL, f"{folder}/config.json").read_text())["default_goal"]
    rows = np.loadtxt(wheel_member(*WHEEL, f"{folder}/data.csv"), delimiter=",")
    points, place, counts = np.unique(rows[:, :4].round(6), axis=0, return_inverse=True, return_counts=True)
    values = {"minimize": -1, "maximize": 1}[goal] * rows[:, 4]
    mean = np.bincount(place, values) / counts
    noise = np.sqrt(np.square(values - mean[place]).sum() / (len(rows) - len(points)))
    return points / points.sum(1, keepdims=True), (mean - mean.mean()) / mean.std(), float(noise / mean.std())


class MeasuredExperiment(Experiment):
    """A search among the compositions of a table; `d` and `snr` are the table's."""

    def __init__(self, name: str, seed: int):
        self.compositions, self.value_of, noise = table(name)
        super().__init__(name, self.compositions.shape[1], 1 / noise, seed)

    @cached_property
    def truth(self) -> Landscape:
        best = tuple(self.compositions[self.value_of.argmax()].tolist())
        return Landscape(self.landscape, best, lambda w: self.value_of[self._nearest(w)])

    def _nearest(self, weights: np.ndarray) -> np.ndarray:
        return np.linalg.norm(np.asarray(weights)[..., None, :] - self.compositions, axis=-1).argmin(-1)

    @property
    def among(self) -> list[Point]:
        return [tuple(row) for row in self.compositions.tolist()]

    def __call__(self, point: Point) -> float:
        return super().__call__(tuple(self.compositions[self._nearest(point)].tolist()))
