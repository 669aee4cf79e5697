"""Our own surface, for `benchmarks/bayesopt.py`: policies trained on reviews at mixtures of four sources.

Searched among the mixtures of `dense_rlhf.bayesopt.surfaces` for the highest value. An observation is a mixture's mean
plus normal noise of the sd that another seed of one training makes. The noise of that mean is part of the truth.
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
        self.compositions, _, means = surface.layout
        sd = means.std()
        self.value_of = (means - means.mean()) / sd
        Experiment.__init__(self, name, self.compositions.shape[1], float(sd / surface.noise), seed)
