"""Gaussian processes that model a noisy function of mixtures, at points with numbers from 0 to 1."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP, map_saas
from botorch.models.transforms import Standardize
from botorch.models.utils.gpytorch_modules import get_gaussian_likelihood_with_gamma_prior
from botorch.posteriors.fully_bayesian import GaussianMixturePosterior
from gpytorch.kernels import Kernel, RBFKernel, ScaleKernel
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.priors import LogNormalPrior
from torch import Tensor

MEMBERS = 16  # posterior draws of the hyperparameters in an ensemble
CANDIDATES = 512  # prior draws from which they start
SLICES = 8  # slice-sampling steps of each
DTYPE = torch.float64
JITTER = 1e-6  # of the values' variance


class Ensemble(SingleTaskGP):
    """Quadratic mixture models (Scheffe, 1958) of two kinds, averaged over draws of their hyperparameters.

        all sources count alike, and deviations are smooth    k(x, y) = a (x . y)^2 + b exp(-sum((x - y)^2 / 2 l^2))
        a few directions carry everything                     k(x, y) = a (Lx . Ly)^2 + b

    Both kinds are equally likely a priori; log a, log b, log l and the entries of L are normal, for values of variance
    1, and so is the noise's log variance if no `variance` (N, 1) of the values Y (N, 1) is given. `MEMBERS` posterior
    draws keep the uncertainty that a single best fit would hide. The second kind can represent a peak between two
    sources that fail alone; the first, peaks that no quadratic form has.
    """

    _is_ensemble = True
    _supports_batched_models = False

    def __init__(self, X: Tensor, Y: Tensor, variance: Tensor | None, seed: int):
        scale = Standardize(1)
        y, known = scale(Y, variance)
        mean, sd = _prior(X.shape[-1], known is None)

        def noise(theta: Tensor) -> Tensor:  # (R, N)
            return theta[:, -1:].exp().expand(-1, len(X)) if known is None else known[:, 0].expand(len(theta), -1)

        def fit(z: Tensor) -> Tensor:
            theta = mean + sd * z
            return _log_likelihood(_covariance(theta, X, X), noise(theta), y[:, 0])

        theta = mean + sd * posterior_draws(fit, len(mean), seed)
        super().__init__(
            X.expand(MEMBERS, -1, -1),
            Y.expand(MEMBERS, -1, -1),
            noise(theta)[..., None] * scale.stdvs**2,
            covar_module=_Drawn(theta),
            outcome_transform=Standardize(1, batch_shape=torch.Size([MEMBERS])),
        )
        self.eval()

    def posterior(self, X: Tensor, *args, **kwargs) -> GaussianMixturePosterior:
        """The mixture of all members' posteriors at points (..., q, d)."""
        return GaussianMixturePosterior(super().posterior(X.unsqueeze(-3), *args, **kwargs).distribution)


class _Drawn(Kernel):
    """The kernel of `Ensemble`, one for each row of `theta`."""

    def __init__(self, theta: Tensor):
        super().__init__(batch_shape=theta.shape[:1])
        self.register_buffer("theta", theta)

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **_) -> Tensor:
        covariance = _covariance(self.theta, x1, x2)
        return covariance.diagonal(dim1=-2, dim2=-1) if diag else covariance


def _prior(d: int, noisy: bool) -> tuple[Tensor, Tensor]:
    """Prior mean and sd of: kind (by sign), log a, log b, log l (d), L (d x d) and, if `noisy`, log noise variance."""
    rows = [*[(0.0, 1.0)] * 3, *[(0.0, 0.7)] * d, *[(0.0, 0.55)] * d**2, *[(-1.0, 2.0)] * noisy]
    mean, sd = torch.tensor(rows, dtype=DTYPE).T
    return mean, sd


def _covariance(theta: Tensor, x1: Tensor, x2: Tensor) -> Tensor:
    """(R, N, M): the kernel of each row of `theta` (R, P) between points (N, d) and (M, d)."""
    d = x1.shape[-1]
    few = theta[:, :1] > 0
    a, b = theta[:, 1:3, None, None].exp().unbind(1)
    form = torch.where(few[..., None], theta[:, 3 + d : 3 + d + d * d].reshape(-1, d, d), torch.eye(d, dtype=DTYPE)).mT
    closeness = torch.where(few, 0.0, (-theta[:, 3 : 3 + d]).exp())[:, None]
    z1, z2 = x1 * closeness, x2 * closeness
    squares = z1.square().sum(-1)[..., None] + z2.square().sum(-1)[..., None, :] - 2 * z1 @ z2.mT
    smooth = squares.clamp_(min=0).mul_(-0.5).exp_().mul_(b)
    return ((x1 @ form) @ (x2 @ form).mT).square_().mul_(a).add_(smooth)


def _log_likelihood(covariance: Tensor, noise: Tensor, y: Tensor) -> Tensor:
    """(R,) of values (N,) under each covariance (R, N, N) and noise variance (R, N), up to a constant."""
    factor, failed = torch.linalg.cholesky_ex(covariance + torch.diag_embed(noise + JITTER))
    white = torch.linalg.solve_triangular(factor, y.expand(len(factor), -1)[..., None], upper=False)
    likelihood = -0.5 * white.square().sum((1, 2)) - factor.diagonal(dim1=1, dim2=2).log().sum(1)
    return torch.where(failed > 0, -math.inf, likelihood.nan_to_num(-math.inf))


def posterior_draws(log_likelihood: Callable[[Tensor], Tensor], size: int, seed: int) -> Tensor:
    """Draws (MEMBERS, size) of a standard normal prior times a likelihood, a function of (R, size) to (R,).

    Prior draws are chosen by their likelihood, then moved by elliptical slice sampling (Murray, Adams & MacKay, 2010),
    which has no step size to tune. They depend on `seed` alone; torch's global generator is not used.
    """
    g = torch.Generator().manual_seed(seed)
    normal, uniform = partial(torch.randn, generator=g, dtype=DTYPE), partial(torch.rand, generator=g, dtype=DTYPE)
    z = normal(CANDIDATES, size)
    value = torch.cat([log_likelihood(part) for part in z.split(128)])
    chosen = torch.multinomial((value - value.max()).exp(), MEMBERS, True, generator=g)
    z, value = z[chosen], value[chosen]
    for _ in range(SLICES):
        old, other, level = z.clone(), normal(MEMBERS, size), value + uniform(MEMBERS).log()
        angle, moving = 2 * math.pi * uniform(MEMBERS), torch.arange(MEMBERS)
        low, high = angle - 2 * math.pi, angle
        while len(moving):
            z[moving] = (old * angle.cos()[:, None] + other * angle.sin()[:, None])[moving]
            value[moving] = log_likelihood(z[moving])
            moving = moving[value[moving] <= level[moving]]
            low, high = torch.where(angle < 0, angle, low), torch.where(angle < 0, high, angle)
            angle = low + uniform(MEMBERS) * (high - low)
    return z


def plain(X: Tensor, Y: Tensor, variance: Tensor | None, seed: int) -> SingleTaskGP:
    """One smooth kernel with a length-scale for each number, its hyperparameters by MAP.

    The priors' modes, exp(mu - sigma^2), are 1: length-scales from 1, the range of a weight, up to where a source
    hardly matters (botorch's default expects some 4 sqrt(d)), and a scale near the variance of the values.
    """
    smooth = RBFKernel(ard_num_dims=X.shape[-1], lengthscale_prior=LogNormalPrior(0.49, 0.7))
    kernel = ScaleKernel(smooth, outputscale_prior=LogNormalPrior(1.0, 1.0))
    smooth.lengthscale, kernel.outputscale = 1.0, 1.0
    # the default noise prior expects far quieter functions than a reward after PPO
    likelihood = get_gaussian_likelihood_with_gamma_prior() if variance is None else None
    return _fitted(SingleTaskGP(X, Y, variance, likelihood=likelihood, covar_module=kernel))


def sparse(name: str, X: Tensor, Y: Tensor, variance: Tensor | None, seed: int) -> SingleTaskGP:
    """For many weights of which few matter: MAP under sparsity priors on length-scales (Eriksson & Jankowiak, 2021)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the priors' scales are drawn
        return _fitted(getattr(map_saas, name)(X, Y, variance))


def _fitted(model: SingleTaskGP) -> SingleTaskGP:
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    return model


MODELS: dict[str, Callable[..., SingleTaskGP]] = {
    "nei": plain,
    "saas": partial(sparse, "EnsembleMapSaasSingleTaskGP"),
    "additive": partial(sparse, "AdditiveMapSaasSingleTaskGP"),
}  # by strategy; every other strategy has an `Ensemble`
