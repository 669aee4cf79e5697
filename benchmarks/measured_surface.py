"""Our own surface, for `benchmarks/bayesopt.py`: policies trained on reviews at 30 mixtures of four sources.

Searched among these mixtures for the highest value (`dense_rlhf.bayesopt.surfaces`). An observation is the mixture's
mean plus normal noise of the sd that another seed of one training makes. The noise of that mean is part of the truth.
"""

from __future__ import annotations

from measured_mixtures import MeasuredExperiment

from dense_rlhf.bayesopt.known_searches import Experiment
from dense_rlhf.bayesopt.surfaces import measured

SURFACES = "proxy, signed, 4 sources", "gold, signed, 4 sources"


class SurfaceExperiment(MeasuredExperiment):
    """A search among the points of one of `SURFACES`; `d` and `snr` are the surface's."""

    def __init__(self, name: str, seed: int):
        surface = measured()[name]
        self.compositions, sd = surface.points, surface.means.std()
        self.value_of = (surface.means - surface.means.mean()) / sd
        Experiment.__init__(self, name, self.compositions.shape[1], sd / surface.noise, seed)
