"""Other searches of the simplex, for `benchmarks/bayesopt.py`. A peer spends `trials` and returns what it hands over.

    random      Dirichlet(1); hands over the best observation
    sobol       Sobol points on the simplex; best observation
    uniform     equal weights, no trial
    tpe         optuna's TPESampler, multivariate, on d exponentials scaled to sum to one; best observation
    ax          ax-platform, Ax's own choice of strategy (Sobol points, then a Gaussian process and log noisy expected
                improvement) under the equality constraint; hands over the tried point of the highest posterior mean,
                without its fallback to raw data. Its walk over the simplex, most of its time, burns in for 500 steps
                and takes 4 to each of its 1,024 starting points, not 10,000 and 32
    alpha-gabo  Bayesian optimisation in the simplex's information geometry after Pavesi, Candelieri & Jaquier (2026):
                square roots of weights lie on a sphere, where a Matern 5/2 kernel is a series of harmonics (Borovitskiy
                et al., 2020) and where log noisy expected improvement is climbed; 2 (d + 1) Sobol points first; hands
                over the tried point of the highest posterior mean. A new implementation from the paper's abstract and
                sources named there, with botorch's optimiser in place of the paper's geodesic ones
The last two are told the standard error of an observation.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from gpytorch.kernels import Kernel
from gpytorch.priors import GammaPrior

from dense_rlhf.bayesopt.known_searches import Experiment
from dense_rlhf.bayesopt.space import Point, Space
from dense_rlhf.files import cached_folder

REQUIREMENTS = (
    "ax-platform==1.3.1",
    "plotly==7.1.0",
    "narwhals==2.29.0",
    "graphviz==0.21",
    "sqlalchemy==2.1.9",
    "optuna==5.0.0",
    "colorlog==6.12.0",
    "alembic==1.20.1",
    "Mako==1.4.3",
)
SHORT_WALK = {"n_burnin": 500, "n_thinning": 4}
HARMONICS = 20  # of the Matern kernel's series on the sphere; at a length-scale of 0.5 the rest is below 1 %


def wheels() -> Path:
    """A folder with tpe and ax from pip, without what they depend on where this environment has it."""

    def build(folder: Path) -> None:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *REQUIREMENTS]
        subprocess.run(pip, check=True, stdout=sys.stderr)

    return cached_folder("peers", {"requirements": REQUIREMENTS}, build)


# ---------------------------------------------------------------------------------------------------- without a model


def random(experiment: Experiment, trials: int) -> Point:
    rng = np.random.default_rng([experiment.seed, 11])
    for _ in range(trials):
        experiment(tuple(rng.dirichlet(np.ones(experiment.d)).tolist()))
    return experiment.best_observed()


def sobol(experiment: Experiment, trials: int) -> Point:
    for point in Space(experiment.d).sobol(trials, experiment.seed):
        experiment(point)
    return experiment.best_observed()


def uniform(experiment: Experiment, trials: int) -> Point:
    experiment.points.append((1 / experiment.d,) * experiment.d)
    return experiment.points[0]


# ---------------------------------------------------------------------------------------------------- tpe


def tpe_study(seed: int):
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(multivariate=True, seed=seed))


def tpe_point(asked, d: int) -> Point:
    """Uniform on the simplex where the d numbers are uniform."""
    exponentials = -np.log([asked.suggest_float(f"u{i}", 1e-6, 1 - 1e-6) for i in range(d)])
    return tuple((exponentials / exponentials.sum()).tolist())


def tpe(experiment: Experiment, trials: int) -> Point:
    study = tpe_study(experiment.seed)
    for _ in range(trials):
        asked = study.ask()
        study.tell(asked, experiment(tpe_point(asked, experiment.d)))
    return experiment.best_observed()


# ---------------------------------------------------------------------------------------------------- ax


def ax_client(d: int, seed: int, trials: int, walk: dict | None = SHORT_WALK):
    """Ax with d weights that sum to one; `walk` None is its default."""
    from ax.service.ax_client import AxClient, ObjectiveProperties

    names = [f"w{i}" for i in range(d)]
    client = AxClient(random_seed=seed, verbose_logging=False)
    client.create_experiment(
        [{"name": name, "type": "range", "bounds": [0.0, 1.0], "value_type": "float"} for name in names],
        objectives={"value": ObjectiveProperties(minimize=False)},
        parameter_constraints=[f"{' + '.join(names)} == 1"],
        choose_generation_strategy_kwargs={"num_trials": trials},
    )
    if walk:
        options = {"model_gen_options": {"optimizer_kwargs": {"options": walk}}}
        client.generation_strategy._nodes[-1].generator_specs[0].generator_gen_kwargs |= options
    return client


def ax(experiment: Experiment, trials: int) -> Point:
    from ax.adapter.registry import Generators

    client = ax_client(experiment.d, experiment.seed, trials)
    for _ in range(trials):
        weights, number = client.get_next_trial()
        point = np.clip(list(weights.values()), 0, 1)
        client.complete_trial(number, {"value": (experiment(tuple(point / point.sum())), 1 / experiment.snr)})
    model = Generators.BOTORCH_MODULAR(experiment=client.experiment, data=client.experiment.lookup_data())
    best = np.clip(list(model.model_best_point()[0].parameters.values()), 0, 1)
    return tuple(best / best.sum())


# ---------------------------------------------------------------------------------------------------- alpha-gabo


class SphereMatern(Kernel):
    """Matern 5/2 on the unit sphere of R^d, between points (..., d) of any length, which are scaled to it; k(x, x) = 1.

    sum_n dim_n (5 / l^2 + n (n + D - 1))^-(5/2 + D/2) G_n(cos angle), D = d - 1, where dim_n counts the harmonics of
    degree n and G_n is their zonal polynomial (Gegenbauer, by its recursion) with G_n(1) = 1.
    """

    has_lengthscale = True

    def forward(self, x1: torch.Tensor, x2: torch.Tensor, diag: bool = False, **_) -> torch.Tensor:
        x1, x2 = (x / x.norm(dim=-1, keepdim=True).clamp_min(1e-9) for x in (x1, x2))
        cosine = (x1 * x2).sum(-1) if diag else x1 @ x2.mT
        D = x1.shape[-1] - 1
        length = self.lengthscale[..., 0] if diag else self.lengthscale
        before, zonal, dim, total, norm = torch.zeros_like(cosine), torch.ones_like(cosine), 1.0, 0.0, 0.0
        for n in range(HARMONICS):
            share = dim * (5 / length**2 + n * (n + D - 1)) ** -(2.5 + D / 2)
            total, norm = total + share * zonal, norm + share
            before, zonal = zonal, ((2 * n + D - 1) * cosine * zonal - n * before) / (n + D - 1 or 1)
            if n == 0:
                zonal = cosine
            dim = dim * (2 * n + D + 1) * (n + D - 1) / ((2 * n + D - 1) * (n + 1)) if n or D > 1 else 2.0
        return total / norm


def alpha_gabo(experiment: Experiment, trials: int) -> Point:
    from botorch.acquisition.logei import qLogNoisyExpectedImprovement
    from botorch.optim import optimize_acqf

    d, seed = experiment.d, experiment.seed
    for point in Space(d).sobol(min(2 * (d + 1), trials), seed):
        experiment(point)
    bounds = torch.tensor([[0.0] * d, [1.0] * d], dtype=torch.float64)
    torch.manual_seed(seed)
    while len(experiment.values) < trials:
        model, roots = sphere_model(experiment)
        acquisition = qLogNoisyExpectedImprovement(model, roots, prune_baseline=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            top, _ = optimize_acqf(acquisition, bounds, 1, num_restarts=4, raw_samples=128, options={"maxiter": 40})
        weights = top[0].square().numpy()
        experiment(tuple((weights / weights.sum()).tolist()))
    model, roots = sphere_model(experiment)
    with torch.no_grad():
        return experiment.points[int(model.posterior(roots).mean.argmax())]


def sphere_model(experiment: Experiment):
    """The Gaussian process of all observations, and the square roots (N, d) of their points."""
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.transforms import Standardize
    from gpytorch.kernels import ScaleKernel
    from gpytorch.mlls import ExactMarginalLogLikelihood

    roots = torch.tensor(experiment.points, dtype=torch.float64).sqrt()
    values = torch.tensor(experiment.values, dtype=torch.float64)[:, None]
    kernel = ScaleKernel(SphereMatern(lengthscale_prior=GammaPrior(3.0, 6.0)), outputscale_prior=GammaPrior(2.0, 0.15))
    variance = torch.full_like(values, experiment.snr**-2)
    model = SingleTaskGP(roots, values, variance, covar_module=kernel, outcome_transform=Standardize(1))
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    return model, roots


PEERS: dict[str, Callable[[Experiment, int], Point]] = {
    "random": random,
    "sobol": sobol,
    "uniform": uniform,
    "tpe": tpe,
    "alpha-gabo": alpha_gabo,
    "ax": ax,
}
