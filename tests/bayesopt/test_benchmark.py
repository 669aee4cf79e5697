"""What `benchmarks/bayesopt.py` compares with: the peers' kernel against its series, and rules of when to stop."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import comb, eval_gegenbauer

from dense_rlhf.bayesopt.known_searches import Experiment
from dense_rlhf.bayesopt.search import Search
from dense_rlhf.bayesopt.space import Space

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    sys.path.append(BENCHMARKS)
    yield
    sys.path.remove(BENCHMARKS)


@pytest.mark.parametrize("d", [3, 4, 6])
def test_the_kernel_on_the_sphere_is_its_series_of_harmonics(d):
    from simplex_peers import HARMONICS, SphereMatern

    kernel, D = SphereMatern().double(), d - 1
    kernel.lengthscale = 0.4
    points = torch.rand(20, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cosine = np.clip((lambda x: x @ x.T)((points / points.norm(dim=1, keepdim=True)).numpy()), -1, 1)
    total, norm = 0.0, 0.0
    for n in range(HARMONICS):
        harmonics = comb(n + D, D) - (comb(n - 2 + D, D) if n > 1 else 0)
        share = harmonics * (5 / 0.4**2 + n * (n + D - 1)) ** -(2.5 + D / 2)
        alpha = (D - 1) / 2
        total, norm = total + share * eval_gegenbauer(n, alpha, cosine) / eval_gegenbauer(n, alpha, 1.0), norm + share
    with torch.no_grad():
        covariance = kernel(points).to_dense().numpy()
        np.testing.assert_allclose(covariance, total / norm, atol=1e-6)
        np.testing.assert_allclose(kernel(points, diag=True), 1)
    assert np.linalg.eigvalsh(covariance).min() > -1e-10


def test_peers_spend_their_trials_on_the_simplex_and_hand_over_a_tried_point():
    from simplex_peers import alpha_gabo, random, sobol

    for peer in (random, sobol, alpha_gabo):
        experiment = Experiment("face", 3, 2.0, 1)
        assert peer(experiment, 9) in experiment.points and len(experiment.points) == 9
        np.testing.assert_allclose(np.sum(experiment.points, 1), 1)


def test_rules_stop_where_the_posterior_leaves_no_regret():
    from stopping_rules import bounds, probable

    search = Search(Space(2), "random")
    for n in range(8):
        search.observe((n / 7, 1 - n / 7), float(n % 2), 0.5)
    sure, unsure = 1e-4 * np.eye(3), np.eye(3)
    mean = np.array([2.0, 0.0, 0.0])
    assert bounds(mean, np.sqrt(sure.diagonal()), 2, search) and not bounds(mean, np.ones(3), 2, search)
    assert probable(mean, sure, 2, 0.1) and not probable(mean, unsure, 2, 0.1)
    assert not probable(mean[::-1], sure, 2, 0.1)  # the best is a point that was not tried
    short = Search(Space(2), "random", points=search.points[:4], values=search.values[:4], errors=search.errors[:4])
    assert not bounds(mean, np.sqrt(sure.diagonal()), 2, short)


def test_measured_mixtures_are_searched_among_what_was_measured(tmp_path, monkeypatch):
    import measured_mixtures

    (tmp_path / "config.json").write_text('{"default_goal": "minimize"}')
    (tmp_path / "data.csv").write_text("1,0,0,0,5\n0,1,0,0,1\n0,1,0,0,3\n0,0,1,0,4\n0.1,0.2,0.3,0.4,6\n")
    monkeypatch.setattr(measured_mixtures, "wheel_member", lambda wheel, sha, member: tmp_path / Path(member).name)
    measured_mixtures.table.cache_clear()
    experiment = measured_mixtures.MeasuredExperiment("photo_wf3", 0)
    means = np.array([5, 2, 4, 6])  # the second composition was measured twice
    assert experiment.snr == pytest.approx(np.std(means) / np.sqrt(2))  # 1 and 3, one degree of freedom
    assert experiment.truth.best == (0, 1, 0, 0) and experiment.regret((0, 0.9, 0.1, 0)) == 0
    assert experiment.regret((0.9, 0, 0.1, 0)) == pytest.approx(3 / np.std(means))
    values = [experiment((0.05, 0.9, 0.05, 0)) for _ in range(2)]
    assert experiment.points == [(0, 1, 0, 0)] * 2 and values[0] != values[1]
    measured_mixtures.table.cache_clear()
