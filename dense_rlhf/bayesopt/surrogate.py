"""Gaussian processes that model a noisy function of mixtures, at points with numbers from 0 to 1."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

import numpy as np
import torch
from botorch.cross_validation import loo_cv
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP, map_saas
from botorch.models.utils.gpytorch_modules import get_gaussian_likelihood_with_gamma_prior
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import Tensor

MEMBERS = 24  # posterior draws of the hyperparameters in an ensemble
CANDIDATES = 768  # prior draws from which they start
PARTICLES, ENOUGH = 48, 24  # draws on the way, where few of the prior fit, and the effective ones among them
SLICES = 6  # slice-sampling steps of each
DTYPE = torch.float64
JITTER = 1e-6  # of the values' variance
LENGTH = 0.9  # prior median of a length-scale

KINDS = {  # of kernel in an ensemble, and how likely each is a priori
    "smooth": 2,
    "few directions": 2,
    "rough in weights": 1,
    "rough in roots": 1,
    "rough in logarithms": 1,
}
FEW, WEIGHTS, ROOTS, LOGARITHMS = range(1, len(KINDS))


class Surrogate(Protocol):
    """A model of a noisy function, fitted to values at N points; what it returns is in the unit of the values."""

    noise: np.ndarray  # (N,) variance of each observation about the function

    def moments(self, points: Tensor, among: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the noise-free function: means (P,) at `points`, covariances (P, A) with `among`, variances (P,)."""

    def means(self, points: Tensor) -> np.ndarray:
        """The mean (R, P) at `points` by each of R members, which count alike."""

    def leave_one_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance (N,) of each observation given all others; hyperparameters were fitted to it too."""


class Ensemble:
    """Gaussian processes of the five `KINDS` of kernel, averaged over draws of kind and hyperparameters.

        smooth            a (x . y)^2 + b exp(-r^2 / 2)    r^2 = sum_i ((x_i - y_i) / l_i)^2
        few directions    a (Lx . Ly)^2 + b                a quadratic mixture model (Scheffe, 1958) of low rank
        rough             a (x . y)^2 + b (1 + s + s^2 / 3) exp(-s), s = sqrt(5) r: Matern 5/2

    The rough kinds measure r in the weights, in their square roots (on the simplex the distance of Hellinger, whose
    sphere is the Fisher-Rao geometry) or in their logarithms, where ratios count. The data choose the form: the draws
    follow the posterior, in which a kind weighs as much as its evidence. log a, log b, log l and the entries of L are
    normal, for values of variance 1, and so is the noise's log variance if no `variance` (N, 1) of the values Y (N, 1)
    is given. `MEMBERS` draws keep the uncertainty that a single best fit would hide.
    """

    def __init__(self, X: Tensor, Y: Tensor, variance: Tensor | None, seed: int):
        spread = float(Y.std())
        self.X, self.centre, self.scale = X, float(Y.mean()), spread if spread > 1e-8 else 1.0
        y, d, unknown = (Y[:, 0] - self.centre) / self.scale, X.shape[-1], variance is None
        known = None if unknown else variance[:, 0] / self.scale**2

        def noise(z: Tensor) -> Tensor:  # (R, N)
            return (1.5 * z[:, -1:] - 1.5).exp().expand(-1, len(X)) if unknown else known.expand(len(z), -1)

        def fit(z: Tensor) -> Tensor:
            return _log_likelihood(_covariance(z, X, X), noise(z), y)

        self.z = posterior_draws(fit, 4 + d + d * d + unknown, seed)
        observed = noise(self.z)
        self.noise = observed.mean(0).numpy() * self.scale**2
        self.factor = torch.linalg.cholesky(_covariance(self.z, X, X) + torch.diag_embed(observed + JITTER))
        self.y = y.expand(MEMBERS, -1)[..., None]

    def moments(self, points: Tensor, among: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        white_y = self._whitened(self.y)
        white, others = (self._whitened(_covariance(self.z, self.X, x)) for x in (points, among))
        means, means_among = ((w.mT @ white_y)[..., 0] for w in (white, others))
        covariance = _covariance(self.z, points, among) - white.mT @ others
        variance = (_prior_variance(self.z, points) - white.square().sum(1)).clamp(min=0)
        mean = means.mean(0)
        apart, apart_among = means - mean, means_among - means_among.mean(0)
        covariance = covariance.mean(0) + apart.mT @ apart_among / MEMBERS
        variance = variance.mean(0) + apart.square().mean(0)
        square = self.scale**2
        return (mean * self.scale + self.centre).numpy(), (covariance * square).numpy(), (variance * square).numpy()

    def means(self, points: Tensor) -> np.ndarray:
        white = self._whitened(_covariance(self.z, self.X, points))
        return ((white.mT @ self._whitened(self.y))[..., 0] * self.scale + self.centre).numpy()

    def leave_one_out(self) -> tuple[np.ndarray, np.ndarray]:
        """In closed form (Rasmussen & Williams, 2006, eq. 5.12), for each member."""
        inverse = torch.cholesky_inverse(self.factor)
        variances = 1 / inverse.diagonal(dim1=1, dim2=2)
        means = (self.y - (inverse @ self.y) * variances[..., None])[..., 0]
        variance = variances.mean(0) + means.var(0, correction=0)
        return (means.mean(0) * self.scale + self.centre).numpy(), (variance * self.scale**2).numpy()

    def kinds(self) -> dict[str, float]:
        """The posterior share of each of `KINDS`."""
        counts = torch.bincount(_kind(self.z)[:, 0], minlength=len(KINDS)).double()
        return dict(zip(KINDS, (counts / MEMBERS).tolist()))

    def _whitened(self, x: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.factor, x, upper=False)


def _kind(z: Tensor) -> Tensor:
    """The kind (R, 1) of each row of `z`: where its first number, as a quantile, lies among the prior's shares."""
    shares = torch.tensor(list(KINDS.values()), dtype=DTYPE).cumsum(0)
    return torch.bucketize(torch.special.ndtr(z[:, :1].contiguous()), shares[:-1] / shares[-1])


def _parts(z: Tensor, d: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a and b (R, 1, 1), lengths (R, 1, d) and forms L (R, d, d) of the kernels of `z`."""
    kind = _kind(z)
    a = torch.where(kind >= WEIGHTS, 1.5 * z[:, 1:2] - 1, z[:, 1:2]).exp()
    length = LENGTH * (0.6 * z[:, 3:4] + 0.4 * z[:, 4 : 4 + d]).exp()
    drawn = 0.55 * z[:, 4 + d : 4 + d + d * d].reshape(-1, d, d)
    form = torch.where(kind[..., None] == FEW, drawn, torch.eye(d, dtype=DTYPE))
    return a[..., None], z[:, 2:3, None].exp(), length[:, None], form


def _covariance(z: Tensor, x1: Tensor, x2: Tensor) -> Tensor:
    """(R, N, M): a kernel for each row of standard normal `z` (R, P) between points (N, d) and (M, d).

    A row holds the kind, log a, log b, log l in common, log l of each number (d), L (d x d) and what the noise needs.
    """
    kind, (a, b, length, form) = _kind(z)[..., None], _parts(z, x1.shape[-1])
    quadratic = ((x1 @ form.mT) @ (x2 @ form.mT).mT).square_()
    s1, s2 = (_coordinates(kind, x) / length for x in (x1, x2))
    squares = s1.square().sum(-1)[..., None] + s2.square().sum(-1)[..., None, :] - 2 * s1 @ s2.mT
    s = (5 * squares.clamp_(min=0)).sqrt()
    matern = (1 + s + s.square() / 3) * (-s).exp_()
    closeness = torch.where(kind >= WEIGHTS, matern, squares.mul_(-0.5).exp_()).masked_fill_(kind == FEW, 1.0)
    return quadratic.mul_(a).add_(closeness.mul_(b))


def _prior_variance(z: Tensor, x: Tensor) -> Tensor:
    """(R, N): the diagonal of `_covariance` at points (N, d)."""
    a, b, _, form = _parts(z, x.shape[-1])
    return a[..., 0] * (x @ form.mT).square().sum(-1).square() + b[..., 0]


def _coordinates(kind: Tensor, x: Tensor) -> Tensor:
    """Points (N, d) in the coordinates of each kind (R, 1, 1): (R, N, d)."""
    roots, logarithms = x.clamp(min=0).sqrt(), (x.clamp(min=0) + 0.03).log() / 2
    return torch.where(kind == ROOTS, roots, torch.where(kind == LOGARITHMS, logarithms, x))


def _log_likelihood(covariance: Tensor, noise: Tensor, y: Tensor) -> Tensor:
    """(R,) of values (N,) under each covariance (R, N, N) and noise variance (R, N), up to a constant."""
    factor, failed = torch.linalg.cholesky_ex(covariance + torch.diag_embed(noise + JITTER))
    white = torch.linalg.solve_triangular(factor, y.expand(len(factor), -1)[..., None], upper=False)
    likelihood = -0.5 * white.square().sum((1, 2)) - factor.diagonal(dim1=1, dim2=2).log().sum(1)
    return torch.where(failed > 0, -math.inf, likelihood.nan_to_num(-math.inf))


def posterior_draws(log_likelihood: Callable[[Tensor], Tensor], size: int, seed: int) -> Tensor:
    """Draws (MEMBERS, size) of a standard normal prior times a likelihood, a function of (R, size) to (R,).

    Prior draws are chosen by their likelihood, then moved by elliptical slice sampling (Murray, Adams & MacKay, 2010),
    which has no step size to tune. Where too few of them fit, the likelihood is raised to powers that rise to 1, with
    a choice and moves at each (Del Moral, Doucet & Jasra, 2006). The draws depend on `seed` alone; torch's global
    generator is not used.
    """
    g = torch.Generator().manual_seed(seed)
    z, power = torch.randn(CANDIDATES, size, generator=g, dtype=DTYPE), 0.0
    value = torch.cat([log_likelihood(part) for part in z.split(128)])
    while (step := _step(value, 1 - power)) < 1 - power:
        chosen, power = _chosen(step * value, PARTICLES, g), power + step
        z, value = _moved(log_likelihood, power, z[chosen], value[chosen], g)
    chosen = _chosen(step * value, MEMBERS, g)
    z, value = z[chosen], value[chosen]
    for _ in range(SLICES):
        z, value = _moved(log_likelihood, 1.0, z, value, g)
    return z


def _chosen(log_weights: Tensor, n: int, g: torch.Generator) -> Tensor:
    return torch.multinomial((log_weights - log_weights.max()).exp(), n, True, generator=g)


def _step(value: Tensor, most: float) -> float:
    """The largest step of the power, up to `most`, that leaves `ENOUGH` effective draws."""
    steps = torch.cat([torch.tensor([most], dtype=DTYPE), most * torch.logspace(-0.1, -6, 60, dtype=DTYPE)])
    weights = (steps[:, None] * (value - value.max())).exp()
    effective = weights.sum(1).square() / weights.square().sum(1)
    return float(steps[int((effective >= ENOUGH).int().argmax())]) if (effective >= ENOUGH).any() else float(steps[-1])


def _moved(
    log_likelihood: Callable[[Tensor], Tensor], power: float, z: Tensor, value: Tensor, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Each row of `z` (R, size) moved by elliptical slice sampling, with its log-likelihood, which is raised."""
    uniform, old, z, value = partial(torch.rand, generator=g, dtype=DTYPE), z, z.clone(), value.clone()
    other = torch.randn(z.shape, generator=g, dtype=DTYPE)
    level = power * value + uniform(len(z)).log()
    angle, moving = 2 * math.pi * uniform(len(z)), torch.arange(len(z))
    low, high = angle - 2 * math.pi, angle
    while len(moving):
        z[moving] = (old * angle.cos()[:, None] + other * angle.sin()[:, None])[moving]
        value[moving] = log_likelihood(z[moving])
        moving = moving[power * value[moving] <= level[moving]]
        low, high = torch.where(angle < 0, angle, low), torch.where(angle < 0, high, angle)
        angle = low + uniform(len(z)) * (high - low)
    return z, value


class Process:
    """One of botorch's processes, fitted by maximum a posteriori."""

    def __init__(self, model: SingleTaskGP):
        self.model = fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model)).model
        variance = model.likelihood.noise * model.outcome_transform.stdvs.squeeze(-1) ** 2
        variance = variance.detach().numpy().reshape(-1, variance.shape[-1]).mean(0)
        self.noise = np.broadcast_to(variance, model.train_targets.shape[-1:])

    def moments(self, points: Tensor, among: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        n, both = len(points), torch.cat([points, among])
        with torch.no_grad():
            posterior = self.model.posterior(both)
            means = posterior.mean.reshape(-1, len(both)).numpy()
            covariance = posterior.distribution.covariance_matrix.reshape(-1, len(both), len(both)).numpy()
        apart = means - means.mean(0)
        joint = covariance.mean(0) + apart.T @ apart / len(means)
        return means.mean(0)[:n], joint[:n, n:], joint.diagonal()[:n]

    def means(self, points: Tensor) -> np.ndarray:
        with torch.no_grad():
            return self.model.posterior(points).mean.reshape(-1, len(points)).numpy()

    def leave_one_out(self) -> tuple[np.ndarray, np.ndarray]:
        posterior = loo_cv(self.model).posterior
        kind = "mixture_" if hasattr(posterior, "mixture_mean") else ""
        mean, variance = (getattr(posterior, kind + part).detach().numpy().ravel() for part in ("mean", "variance"))
        return mean, variance


def plain(X: Tensor, Y: Tensor, variance: Tensor | None, seed: int) -> Process:
    """botorch's own process and priors; where the noise is not known, a prior that admits more of it.

    The default noise prior expects far quieter functions than a reward after PPO.
    """
    likelihood = get_gaussian_likelihood_with_gamma_prior() if variance is None else None
    return Process(SingleTaskGP(X, Y, variance, likelihood=likelihood))


def sparse(name: str, X: Tensor, Y: Tensor, variance: Tensor | None, seed: int) -> Process:
    """For many weights of which few matter: MAP under sparsity priors on length-scales (Eriksson & Jankowiak, 2021)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the priors' scales are drawn
        return Process(getattr(map_saas, name)(X, Y, variance))


MODELS: dict[str, Callable[..., Surrogate]] = {
    "nei": plain,
    "saas": partial(sparse, "EnsembleMapSaasSingleTaskGP"),
    "additive": partial(sparse, "AdditiveMapSaasSingleTaskGP"),
}  # by strategy; every other strategy has an `Ensemble`
