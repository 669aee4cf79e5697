"""Bayesian optimisation on the simplex. It knows vectors and floats, and nothing of what they mean."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import numpy as np

from dense_rlhf.types import InputError, check_simplex


@dataclass
class SimplexSearch:
    """Maximise a noisy function of d weights on the simplex: `suggest`, evaluate, `observe`, repeat.

    The first `initial` points are scrambled Sobol on the simplex; then a Gaussian process and log noisy expected
    improvement (Ament et al., 2023; Letham et al., 2019). Its noise is the pooled standard error where every
    observation came with one, else inferred. Same seed and observations give the same suggestion, so a search is
    resumed by observing its record again.
    """

    d: int
    initial: int = 5
    seed: int = 0
    weights: list[tuple[float, ...]] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    errors: list[float | None] = field(default_factory=list)

    def __post_init__(self):
        if self.d < 2:
            raise InputError(f"a search over {self.d} weight has nothing to choose; wanted at least 2 sources")

    def observe(self, weights: tuple[float, ...], value: float, error: float | None = None) -> None:
        """Record one evaluation and, where known, its standard error.

        Raises `InputError` off the simplex, for a value that is not finite, or an error that is not above zero.
        """
        check_simplex("observed weights", weights, self.d)
        if not np.isfinite(value):
            raise InputError(f"observed value is {value}, wanted a finite number")
        if error is not None and not 0 < error < np.inf:
            raise InputError(f"observed standard error is {error}, wanted a finite number above 0, or None")
        self.errors.append(error)
        self.weights.append(tuple(weights))
        self.values.append(float(value))

    def suggest(self) -> tuple[float, ...]:
        """The weights to try next."""
        n = len(self.values)
        return self._sobol()[n] if n < self.initial else self._most_promising()

    def incumbent(self) -> tuple[tuple[float, ...], float, float]:
        """The evaluated weights with the highest posterior mean, that mean, and its standard deviation.

        Not the best observed value, which rewards lucky noise. Wants at least two observations.
        """
        mean, sd = self.posterior(self.weights)
        best = int(mean.argmax())
        return self.weights[best], float(mean[best]), float(sd[best])

    def posterior(self, points: list[tuple[float, ...]]) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (N,) of the noise-free function at `points` (N, d)."""
        import torch

        model = self._model()
        with torch.no_grad():
            found = model.posterior(torch.tensor(points, dtype=torch.float64))
            return found.mean.squeeze(-1).numpy(), found.variance.squeeze(-1).sqrt().numpy()

    def _sobol(self) -> list[tuple[float, ...]]:
        import torch
        from botorch.utils.sampling import sample_simplex

        points = sample_simplex(self.d, self.initial, qmc=True, seed=self.seed, dtype=torch.float64)
        return [tuple(point) for point in (points / points.sum(-1, keepdim=True)).tolist()]

    def _model(self):
        import torch
        from botorch.fit import fit_gpytorch_mll
        from botorch.models import SingleTaskGP
        from botorch.models.utils.gpytorch_modules import get_gaussian_likelihood_with_gamma_prior
        from gpytorch.mlls import ExactMarginalLogLikelihood

        if len(self.values) < 2:
            raise InputError(f"{len(self.values)} observations cannot fit a model; wanted at least 2")
        X = torch.tensor(self.weights, dtype=torch.float64)
        Y = torch.tensor(self.values, dtype=torch.float64)[:, None]
        if None in self.errors:  # the default noise prior expects far quieter functions than a reward after PPO
            model = SingleTaskGP(X, Y, likelihood=get_gaussian_likelihood_with_gamma_prior())
        else:  # left to itself, a model of a dozen points takes their noise for signal
            model = SingleTaskGP(X, Y, train_Yvar=torch.full_like(Y, np.mean(np.square(self.errors))))
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        return model

    def _most_promising(self) -> tuple[float, ...]:
        import torch
        from botorch.acquisition.logei import qLogNoisyExpectedImprovement
        from botorch.optim import optimize_acqf
        from botorch.sampling import SobolQMCNormalSampler

        seed = self.seed * 1000 + len(self.values)
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numerical chatter of the inner optimiser
            torch.manual_seed(seed)
            X = torch.tensor(self.weights, dtype=torch.float64)
            sampler = SobolQMCNormalSampler(torch.Size([128]), seed=seed)
            acquisition = qLogNoisyExpectedImprovement(self._model(), X, sampler=sampler, prune_baseline=True)
            one = torch.ones(self.d, dtype=torch.float64)
            candidate, _ = optimize_acqf(
                acquisition, bounds=torch.stack([0 * one, one]), q=1, num_restarts=8, raw_samples=128,
                equality_constraints=[(torch.arange(self.d), one, 1.0)], options={"seed": seed, "n_burnin": 200},
            )  # fmt: skip
        point = candidate[0].clamp(0, 1)
        return tuple((point / point.sum()).tolist())
