"""What surfaces are measured as: noise, signal, and which kind of function they are like."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy.stats import f_oneway

from dense_rlhf.bayesopt.known_functions import landscape
from dense_rlhf.bayesopt.space import Space
from dense_rlhf.bayesopt.surfaces import (
    MEASURED,
    SOURCES,
    Surface,
    known_shapes,
    measured,
    resemblance,
    signal_to_noise,
)
from dense_rlhf.types import InputError

POINTS = np.array(Space(3).anchors() + Space(3).sobol(16, 0))
OFTEN = [4] * 4 + [1] * 16  # anchors alone are repeated, as in searches
AT = np.repeat(POINTS, OFTEN, axis=0)


def observed(kind, seed, snr=1.0, at=AT):
    return Surface(
        at, landscape(kind, 3, seed).function(at) + np.random.default_rng(seed).standard_normal(len(at)) / snr
    )


@pytest.mark.parametrize("counts", [OFTEN, [2] * 20])
def test_the_interval_of_signal_to_noise_holds_the_truth_as_often_as_it_says(counts):
    rng, truth, at, holds = np.random.default_rng(0), 0.8, np.repeat(POINTS, counts, axis=0), 0
    for _ in range(200):
        effects = np.repeat(truth * rng.standard_normal(len(POINTS)), counts)
        ratio = signal_to_noise(Surface(at, effects + rng.standard_normal(len(at))))
        holds += ratio.low <= truth <= ratio.high
    assert 0.91 <= holds / 200 <= 0.985


def test_signal_is_seen_where_analysis_of_variance_sees_it():
    for kind, seed in product(("flat", "vertex"), range(20)):
        surface = observed(kind, seed, snr=0.7)
        groups = np.split(surface.values, np.cumsum(OFTEN)[:-1])
        assert (signal_to_noise(surface).low > 0) == (f_oneway(*groups).pvalue < 0.025)
        assert surface.noise**2 == pytest.approx(sum(((g - g.mean()) ** 2).sum() for g in groups) / 12)


@pytest.mark.parametrize("kind", ["vertex", "ridge", "powers", "exclusive", "flat"])
def test_a_function_resembles_its_own_kind(kind):
    surfaces = [observed(kind, seed, snr=2.0) for seed in (1001, 1002, 1003)]
    shares = [resemblance(surface, known_shapes(surface.layout.points, 256)) for surface in surfaces]
    assert all(sum(of.values()) == pytest.approx(1) for of in shares)
    mean = pd.DataFrame(shares).mean()
    assert mean.idxmax() == kind and mean[kind] > 0.15  # of 19 kinds


def test_units_zero_points_and_the_order_of_trainings_do_not_matter():
    surface, order = observed("face", 0), np.random.default_rng(0).permutation(len(AT))
    shapes = known_shapes(surface.layout.points, 64)
    other = Surface(AT[order], 40 + 7 * surface.values[order])
    assert resemblance(other, shapes) == pytest.approx(resemblance(surface, shapes))
    assert vars(signal_to_noise(other)) == pytest.approx(vars(signal_to_noise(surface)))


def test_surfaces_are_of_two_and_of_four_sources_where_points_are_repeated():
    points = [(1.0, 0, 0, 0), (0, 1.0, 0, 0), (0.5, 0.5, 0, 0), (0.25, 0.25, 0.25, 0.25), (1.0, 0, 0, 0)]
    rows = [dict(zip(SOURCES, p)) | {"normalise": "signed", "proxy": i, "gold": -i} for i, p in enumerate(points)]
    made = measured(pd.DataFrame(rows))
    assert list(made) == [f"{m}, signed, {d} sources" for d in (2, 4) for m in ("proxy", "gold")]
    points, counts, means = made["proxy, signed, 2 sources"].layout
    assert (points.tolist(), counts.tolist(), means.tolist()) == ([[0, 1], [0.5, 0.5], [1, 0]], [1, 1, 2], [1, 2, 2])
    assert not measured(pd.DataFrame(rows[:4]))


def test_without_repeats_nothing_is_known_of_noise():
    with pytest.raises(InputError, match="20 trainings at 20 points, wanted at least 3 points, and some of them"):
        Surface(POINTS, np.zeros(20))


def test_the_measured_surfaces_are_read():
    made = measured()
    assert made and all(np.isfinite(surface.values).all() for surface in made.values())
    for point in np.concatenate([surface.points for name, surface in made.items() if name.endswith("4 sources")]):
        Space(4).check(point.tolist())
    assert MEASURED.stat().st_size < 100_000
