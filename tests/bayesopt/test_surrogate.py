"""What is believed of a noisy function of mixtures."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.stats import norm

from dense_rlhf.bayesopt.surrogate import KINDS, MEMBERS, Ensemble, _covariance, _prior_variance, plain, posterior_draws

DTYPE = torch.float64


def observed(function, n, d, sd, seed=0):
    """Noisy values (n, 1) at uniform mixtures (n, d), and their variances."""
    rng = np.random.default_rng(seed)
    X = torch.from_numpy(rng.dirichlet(np.ones(d), n))
    Y = function(X)[:, None] + sd * torch.from_numpy(rng.standard_normal((n, 1)))
    return X, Y, torch.full((n, 1), sd**2, dtype=DTYPE)


def sharp(X):
    """Two of three sources help in one ratio only: a quadratic form that one direction carries."""
    return X[:, 0] + X[:, 1] - 8 * (X[:, 0] - 1.5 * X[:, 1]) ** 2


def error(model, X, wanted):
    mean, *_ = model.moments(X, X[:1])
    return float(np.sqrt(np.square(mean - wanted.numpy()).mean()))


def test_draws_have_the_moments_of_a_posterior_in_closed_form():
    """A standard normal prior and one observation 2 of x + y, of variance 0.25."""

    def likelihood(z):
        return -0.5 * (z.sum(1) - 2) ** 2 / 0.25

    draws = torch.cat([posterior_draws(likelihood, 2, seed) for seed in range(150)])
    precision = np.eye(2) + np.ones((2, 2)) / 0.25
    covariance = np.linalg.inv(precision)
    mean = covariance @ np.full(2, 2 / 0.25)
    np.testing.assert_allclose(draws.mean(0), mean, atol=0.05)
    np.testing.assert_allclose(torch.cov(draws.T), covariance, atol=0.06)


def test_draws_reach_what_few_of_the_prior_fit_and_none_fails():
    def narrow(z):  # within 0.02 of 2.5, where one of 3000 of the prior is; below 1 impossible
        return torch.where(z[:, 0] < 1, -torch.inf, -0.5 * ((z[:, 0] - 2.5) / 0.02) ** 2)

    draws = posterior_draws(narrow, 1, 0)
    assert draws.shape == (MEMBERS, 1) and (draws - 2.5).abs().max() < 0.1
    assert torch.equal(draws, posterior_draws(narrow, 1, 0)) and len(draws.unique()) > MEMBERS / 2


def test_a_quadratic_mixture_is_known_from_fewer_values_than_by_a_smooth_kernel_alone():
    X, Y, variance = observed(sharp, 14, 3, 0.1)
    there = torch.from_numpy(np.random.default_rng(1).dirichlet(np.ones(3), 200))
    ours, smooth = (error(model(X, Y, variance, 0), there, sharp(there)) for model in (Ensemble, plain))
    assert ours < 0.5 * smooth and ours < 0.15


def test_what_no_quadratic_form_says_is_believed_where_values_say_it():
    def wave(X):
        return torch.sin(9 * X[:, 0])

    X, Y, variance = observed(wave, 40, 2, 0.05)
    there = torch.from_numpy(np.linspace([0.05, 0.95], [0.95, 0.05], 50))
    assert error(Ensemble(X, Y, variance, 0), there, wave(there)) < 0.15


def kernel(z, p, q):
    """By numpy, from the formulas in the docstring of `Ensemble`; `z` is one of its rows for three weights."""
    shares = np.cumsum(list(KINDS.values())) / sum(KINDS.values())
    kind = list(KINDS)[int(np.searchsorted(shares, norm.cdf(z[0])))]
    a, b = np.exp(1.5 * z[1] - 1 if "rough" in kind else z[1]), np.exp(z[2])
    if kind == "few directions":
        form = 0.55 * z[7:16].reshape(3, 3)
        return a * ((p @ form.T) @ (q @ form.T).T) ** 2 + b
    change = {"rough in roots": np.sqrt, "rough in logarithms": lambda w: np.log(w + 0.03) / 2}.get(kind, np.array)
    lengths = 0.9 * np.exp(0.6 * z[3] + 0.4 * z[4:7])
    r = cdist(change(p) / lengths, change(q) / lengths)
    s = np.sqrt(5) * r
    rough = (1 + s + s**2 / 3) * np.exp(-s)
    return a * (p @ q.T) ** 2 + b * (np.exp(-(r**2) / 2) if kind == "smooth" else rough)


def test_each_kind_of_kernel_is_its_formula():
    z = torch.randn(60, 16, dtype=DTYPE, generator=torch.Generator().manual_seed(0))
    X, Z = (torch.from_numpy(np.random.default_rng(i).dirichlet(np.ones(3), n)) for i, n in ((0, 6), (1, 4)))
    ours = _covariance(z, X, Z)
    for i, row in enumerate(z.numpy()):
        np.testing.assert_allclose(ours[i], kernel(row, X.numpy(), Z.numpy()), rtol=1e-6)
    np.testing.assert_allclose(_prior_variance(z, X), _covariance(z, X, X).diagonal(dim1=1, dim2=2), rtol=1e-6)


def test_moments_are_those_of_the_mixture_of_the_members():
    """Of the Gaussian process of each row (Rasmussen & Williams, 2006, eqs. 2.23 and 2.24), by numpy."""
    X, Y, variance = observed(sharp, 9, 3, 3.0)
    there = torch.from_numpy(np.random.default_rng(1).dirichlet(np.ones(3), 5))
    model = Ensemble(X, Y, variance, 0)
    x, p, centre, scale = X.numpy(), there.numpy(), Y.mean().item(), Y.std().item()
    assert sum(share > 0 for share in model.kinds().values()) > 2  # at this noise nine values leave several
    means, covariances = [], []
    for z in model.z.numpy():
        noisy = kernel(z, x, x) + (3.0 / scale) ** 2 * np.eye(9)
        gain = np.linalg.solve(noisy, kernel(z, x, p)).T
        means.append(centre + gain @ (Y.numpy()[:, 0] - centre))
        covariances.append(scale**2 * (kernel(z, p, p) - gain @ kernel(z, x, p)))
    mean, covariance, variances = model.moments(there, there)
    whole = np.mean(covariances, 0) + np.cov(np.array(means).T, bias=True)
    np.testing.assert_allclose(mean, np.mean(means, 0), rtol=1e-4)
    np.testing.assert_allclose(covariance, whole, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(variances, whole.diagonal(), rtol=1e-3)
    np.testing.assert_allclose(model.means(there), means, rtol=1e-4)


def test_the_data_choose_the_kind():
    """A narrow peak speaks against the quadratic form of few directions, which a sharp ridge speaks for."""

    def peak(X):
        return 6 * torch.exp(-(X - 1 / 3).square().sum(-1) / 0.02)

    shares = [Ensemble(*observed(function, 40, 3, 0.3), 0).kinds() for function in (peak, sharp)]
    assert all(sum(share.values()) == pytest.approx(1) for share in shares)
    assert shares[0]["few directions"] < 0.05 and shares[1]["few directions"] > 0.6


def test_noise_is_estimated_where_it_is_not_known():
    for sd in (0.05, 1.0):
        X, Y, _ = observed(sharp, 60, 3, sd)
        assert 0.6 * sd < Ensemble(X, Y, None, 0).noise.mean() ** 0.5 < 1.6 * sd


def test_few_and_noisy_values_leave_the_members_apart():
    X, Y, variance = observed(lambda X: 0 * X[:, 0], 6, 3, 1.0)
    model = Ensemble(X, Y, variance, 0)
    mean, _, variances = model.moments(X, X)
    assert mean.std() < 2 * np.sqrt(variances).mean() and model.means(X).std(0).mean() > 0.05
