"""What is believed of a noisy function of mixtures."""

import numpy as np
import torch

from dense_rlhf.bayesopt.surrogate import MEMBERS, Ensemble, plain, posterior_draws

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
    with torch.no_grad():
        found = model.posterior(X)
    mean = found.mixture_mean if hasattr(found, "mixture_mean") else found.mean
    return float((mean.reshape(-1) - wanted).square().mean().sqrt())


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


def test_a_member_is_the_gaussian_process_of_its_hyperparameters():
    """By numpy, from the formula in the docstring (Rasmussen & Williams, 2006, eqs. 2.23 and 2.24)."""
    X, Y, variance = observed(sharp, 9, 3, 3.0)
    there = torch.from_numpy(np.random.default_rng(1).dirichlet(np.ones(3), 5))
    model = Ensemble(X, Y, variance, 0)
    with torch.no_grad():
        found = model.posterior(there)
    x, z = X.numpy(), there.numpy()
    centre, scale = Y.mean().item(), Y.std().item()
    kinds = model.covar_module.theta[:, 0] > 0
    assert 0 < kinds.sum() < MEMBERS  # at this noise nine values leave both
    for i in (int(kinds.int().argmax()), int(kinds.int().argmin())):
        theta = model.covar_module.theta[i].numpy()
        (a, b), lengths, form = np.exp(theta[1:3]), np.exp(theta[3:6]), theta[6:].reshape(3, 3)

        def k(p, q, few=theta[0] > 0, a=a, b=b, lengths=lengths, form=form):
            if few:
                return a * ((p @ form.T) @ (q @ form.T).T) ** 2 + b
            apart = (((p[:, None] - q[None]) / lengths) ** 2).sum(-1)
            return a * (p @ q.T) ** 2 + b * np.exp(-apart / 2)

        noisy = k(x, x) + 3.0**2 / scale**2 * np.eye(9)
        mean = k(z, x) @ np.linalg.solve(noisy, (Y.numpy()[:, 0] - centre) / scale)
        covariance = k(z, z) - k(z, x) @ np.linalg.solve(noisy, k(x, z))
        np.testing.assert_allclose(found.mean[i, :, 0], centre + scale * mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.variance[i, :, 0], scale**2 * covariance.diagonal(), rtol=1e-3, atol=1e-5)


def test_noise_that_nobody_told_is_found():
    for sd in (0.05, 1.0):
        X, Y, _ = observed(sharp, 60, 3, sd)
        model = Ensemble(X, Y, None, 0)
        noise = float((model.likelihood.noise.mean() * Y.var()).detach())
        assert 0.6 * sd < noise**0.5 < 1.6 * sd


def test_few_and_noisy_values_leave_the_members_apart():
    X, Y, variance = observed(lambda X: 0 * X[:, 0], 6, 3, 1.0)
    with torch.no_grad():
        found = Ensemble(X, Y, variance, 0).posterior(X)
    assert float(found.mixture_mean.std()) < 2 * float(found.mixture_variance.sqrt().mean())
    assert float(found.mean.std(0).mean()) > 0.05
