"""The search for weights: ours beside its peers on functions whose best is known. One JSON object a line.

    python benchmarks/bayesopt.py [--quick] [--d 4] [--snr 1] [--target interior face] [--peer random tpe]
                                  [--seeds 20] [--trials 30] [--jobs 2] > benchmarks/bayesopt.jsonl

Functions on the simplex with standard deviation 1 (`dense_rlhf.landscapes`), another for each seed, seen through normal
noise of sd 1 / `snr`. A seed's function and its noise, trial by trial, are the same for everyone. Whoever can use the
standard error of an observation is told it: ours, gp on sobol, and ax. Regret is of the noise-free function, in its sd:

    inference  at the point that is handed over
    simple     at the best point that was tried, which nobody knows
    flat       share of seeds in which a winner is claimed where there is none; no peer has a verdict: `theirs` is null
    proposal   median seconds of a proposal after 100 trials, one thread, d = 4

`ours` and `theirs` are medians over seeds (`repeats`), ratio is theirs / ours (null where ours is 0); `difference` is
the mean of theirs less ours of the same seed, `interval` its 95 % bootstrap interval over seeds.

    ours          `Search` as it comes: anchors, pairs, ensemble of Gaussian processes, incumbent
    random        Dirichlet(1); hands over the best observation
    sobol         Sobol points on the simplex; best observation
    gp on sobol   the same points; our model's incumbent, so what is left of our lead is due to choosing the points
    uniform       equal weights, no trial
    ax            ax-platform, Ax's own choice of strategy (Sobol points, then a Gaussian process and log noisy expected
                  improvement) under the equality constraint; hands over the tried point of the highest posterior mean,
                  without its fallback to raw data. Its walk over the simplex, most of its time, burns in for 500 steps
                  and takes 4 to each of its 1,024 starting points, not 10,000 and 32; `proposal` has both
    tpe           optuna's TPESampler, multivariate, on d exponentials scaled to sum to one; best observation
Peers come from pip into the user's cache, without what they depend on where this environment has it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from dense_rlhf.bayesopt import audit
from dense_rlhf.bayesopt.known_functions import LANDSCAPES, Landscape, landscape
from dense_rlhf.bayesopt.search import Search
from dense_rlhf.bayesopt.space import Point, Space
from dense_rlhf.files import cached_folder
from dense_rlhf.runs import provenance

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
TIMED_AT = 100

# ---------------------------------------------------------------------------------------------------- a run


@dataclass(frozen=True)
class Case:
    target: str
    d: int
    snr: float
    trials: int

    @property
    def name(self) -> str:
        return f"{self.target}, d {self.d}, snr {self.snr:g}, {self.trials} trials"


@dataclass
class Trial:
    """What a method sees: weights in, a noisy value out, `trials` times."""

    case: Case
    seed: int
    points: list[Point] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    @cached_property
    def truth(self) -> Landscape:
        return landscape(self.case.target, self.case.d, self.seed)

    @property
    def noise(self) -> float:
        return 1 / self.case.snr

    @cached_property
    def stream(self) -> np.ndarray:
        return self.noise * np.random.default_rng([self.seed, 7]).standard_normal(self.case.trials)

    def __call__(self, point: Point) -> float:
        """One evaluation at a point of the simplex."""
        self.values.append(float(self.truth.function(np.array(point)) + self.stream[len(self.values)]))
        self.points.append(tuple(point))
        return self.values[-1]

    def best_observed(self) -> Point:
        return self.points[int(np.argmax(self.values))]


def searched(trial: Trial, search: Search) -> Search:
    for _ in range(trial.case.trials):
        point = search.suggest()
        search.observe(point, trial(point), trial.noise)
    return search


def ours(trial: Trial) -> tuple[Point, bool | None]:
    """The incumbent, and whether the audit claims a winner (asked only where there is none)."""
    search = searched(trial, Search(Space(trial.case.d), seed=trial.seed))
    names = [f"source {i}" for i in range(trial.case.d)]
    claimed = audit.verdict(search, names).winner if trial.case.target == "flat" else None
    return search.incumbent()[0], claimed


def drawn(trial: Trial, strategy: str) -> Search:
    return searched(trial, Search(Space(trial.case.d), strategy, initial=0, anchors=False, seed=trial.seed))


def random(trial: Trial) -> Point:
    drawn(trial, "random")
    return trial.best_observed()


def sobol(trial: Trial) -> Point:
    drawn(trial, "sobol")
    return trial.best_observed()


def gp_on_sobol(trial: Trial) -> Point:
    return drawn(trial, "sobol").incumbent()[0]


def uniform(trial: Trial) -> Point:
    trial.points.append((1 / trial.case.d,) * trial.case.d)
    return trial.points[0]


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


def ax(trial: Trial) -> Point:
    from ax.adapter.registry import Generators

    client = ax_client(trial.case.d, trial.seed, trial.case.trials)
    for _ in range(trial.case.trials):
        weights, number = client.get_next_trial()
        point = np.clip(list(weights.values()), 0, 1)
        client.complete_trial(number, {"value": (trial(tuple(point / point.sum())), trial.noise)})
    model = Generators.BOTORCH_MODULAR(experiment=client.experiment, data=client.experiment.lookup_data())
    best = np.clip(list(model.model_best_point()[0].parameters.values()), 0, 1)
    return tuple(best / best.sum())


def tpe_study(seed: int):
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(multivariate=True, seed=seed))


def tpe_point(asked, d: int) -> Point:
    """Uniform on the simplex where the d numbers are uniform."""
    exponentials = -np.log([asked.suggest_float(f"u{i}", 1e-6, 1 - 1e-6) for i in range(d)])
    return tuple((exponentials / exponentials.sum()).tolist())


def tpe(trial: Trial) -> Point:
    study = tpe_study(trial.seed)
    for _ in range(trial.case.trials):
        asked = study.ask()
        study.tell(asked, trial(tpe_point(asked, trial.case.d)))
    return trial.best_observed()


PEERS: dict[str, Callable[[Trial], Point]] = {
    "random": random,
    "sobol": sobol,
    "gp on sobol": gp_on_sobol,
    "uniform": uniform,
    "ax": ax,
    "tpe": tpe,
}


def run(case: Case, method: str, seed: int) -> dict:
    """Regrets of one method on one seed."""
    quiet()
    trial = Trial(case, seed)
    point, claimed = ours(trial) if method == "ours" else (PEERS[method](trial), None)
    regrets = trial.truth.regret(np.array(trial.points))
    return {
        "inference": max(float(trial.truth.regret(point)), 0.0),
        "simple": max(float(regrets.min()), 0.0),
        "claimed": claimed,
    }


# ---------------------------------------------------------------------------------------------------- a case


def line(
    measure: str, case: str, peer: str | None, unit: str, repeats: int, own: float, theirs: float | None, **more
) -> None:
    ratio = None if theirs is None or own == 0 else round(theirs / own, 2)
    found = {
        "ratio": ratio,
        "unit": unit,
        "repeats": repeats,
        "ours": round(own, 4),
        "theirs": None if theirs is None else round(theirs, 4),
    }
    print(json.dumps({"benchmark": f"bayesopt/{measure}", "case": case, "peer": peer} | found | more), flush=True)


def compare(case: Case, peer: str, own: list[dict], theirs: list[dict]) -> None:
    for measure in ("inference", "simple"):
        a, b = (np.array([one[measure] for one in side]) for side in (own, theirs))
        means = np.random.default_rng(0).choice(b - a, (2000, len(a))).mean(1)
        line(
            measure,
            case.name,
            peer,
            "sd of the function",
            len(a),
            float(np.median(a)),
            float(np.median(b)),
            difference=round(float((b - a).mean()), 4),
            interval=[round(float(end), 4) for end in np.quantile(means, [0.025, 0.975])],
        )


def judge(case: Case, peers: list[str], seeds: range, pool: ProcessPoolExecutor) -> None:
    """All methods on all seeds; each peer's lines as soon as it is through. On a flat function only ours is asked."""
    if case.target == "flat":
        peers = []
    asked = {name: [pool.submit(run, case, name, seed) for seed in seeds] for name in ["ours", *peers]}
    own = [one.result() for one in asked["ours"]]
    for name in peers:
        compare(case, name, own, [one.result() for one in asked[name]])
    if case.target == "flat":
        line("flat", case.name, None, "share of seeds", len(own), float(np.mean([one["claimed"] for one in own])), None)


# ---------------------------------------------------------------------------------------------------- seconds


def proposals(d: int, n: int, repeats: int) -> dict[str, Callable[[], Iterator[float]]]:
    """Seconds of `repeats` proposals after `n` noisy trials, an observation after each, by method."""
    case = Case("ridge", d, 1.0, n + repeats)

    def of_search() -> Iterator[float]:
        search, trial = Search(Space(d)), Trial(case, 0)
        for point in Space(d).sobol(n, 0):
            search.observe(point, trial(point), trial.noise)
        for _ in range(repeats):
            start = time.perf_counter()
            point = search.suggest()
            yield time.perf_counter() - start
            search.observe(point, trial(point), trial.noise)

    def of_ax(walk: dict | None) -> Iterator[float]:
        client, trial = ax_client(d, 0, n + repeats, walk), Trial(case, 0)
        for point in Space(d).sobol(n, 0):
            _, number = client.attach_trial({f"w{i}": w for i, w in enumerate(point)})
            client.complete_trial(number, {"value": (trial(point), trial.noise)})
        for _ in range(repeats):
            start = time.perf_counter()
            weights, number = client.get_next_trial()
            yield time.perf_counter() - start
            client.complete_trial(number, {"value": (trial(tuple(weights.values())), trial.noise)})

    def of_tpe() -> Iterator[float]:
        study, trial = tpe_study(0), Trial(case, 0)
        for _ in range(n + repeats):
            start = time.perf_counter()
            asked = study.ask()
            point = tpe_point(asked, d)
            if len(trial.values) >= n:
                yield time.perf_counter() - start
            study.tell(asked, trial(point))

    return {"ours": of_search, "ax": lambda: of_ax(None), "ax, short walk": lambda: of_ax(SHORT_WALK), "tpe": of_tpe}


def propose(method: str, d: int, n: int, repeats: int) -> list[float]:
    quiet()
    return list(proposals(d, n, repeats)[method]())


def time_proposals(peers: list[str], n: int, repeats: int, pool: ProcessPoolExecutor) -> None:
    own = pool.submit(propose, "ours", 4, n, repeats).result()
    for name in proposals(4, n, repeats):
        if name.split(",")[0] in peers:
            theirs = pool.submit(propose, name, 4, n, repeats).result()
            line(
                "proposal",
                f"d 4 after {n} trials",
                name,
                "s",
                repeats,
                statistics.median(own),
                statistics.median(theirs),
                slowest=round(max(own), 3),
            )


# ---------------------------------------------------------------------------------------------------- all of it


def peers_folder() -> Path:
    """The peers, without what they depend on."""

    def build(folder: Path) -> None:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *REQUIREMENTS]
        subprocess.run(pip, check=True, stdout=sys.stderr)

    return cached_folder("peers", {"requirements": REQUIREMENTS}, build)


def start_worker(folder: str) -> None:
    """One thread; peers behind this environment's own packages."""
    import torch

    torch.set_num_threads(1)
    sys.path.append(folder)


def quiet() -> None:
    """Libraries' warnings and logs are no answer."""
    import logging

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def selected() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="end within a minute: d 3, 2 seeds, 12 trials")
    parser.add_argument("--d", type=int, nargs="+", default=[3, 4, 6])
    parser.add_argument("--snr", type=float, nargs="+", default=[2.0, 1.0, 0.5])
    parser.add_argument("--target", nargs="+", default=list(LANDSCAPES), choices=list(LANDSCAPES))
    parser.add_argument("--peer", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0, help="to develop on others than those reported")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--timed-at", type=int, default=TIMED_AT, help="trials before a timed proposal; 0: no timing")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    asked = parser.parse_args()
    if asked.quick:
        vars(asked).update(d=[3], snr=[1.0], target=["interior", "flat"], seeds=2, trials=12, timed_at=20)
    return asked


def main() -> None:
    asked = selected()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers
    folder = str(peers_folder()) if {"ax", "tpe"} & set(asked.peer) else ""
    seeds = range(asked.first_seed, asked.first_seed + asked.seeds)
    print(
        json.dumps(
            {
                "benchmark": "bayesopt/run",
                "threads": 1,
                "jobs": asked.jobs,
                "seeds": [seeds[0], seeds[-1]],
                "peers": REQUIREMENTS,
                **provenance(),
            }
        ),
        flush=True,
    )
    context = get_context("spawn")
    if asked.timed_at:
        with ProcessPoolExecutor(1, context, start_worker, (folder,)) as alone:
            time_proposals(asked.peer, asked.timed_at, 3 if asked.quick else 10, alone)
    with ProcessPoolExecutor(asked.jobs, context, start_worker, (folder,)) as pool:
        for snr, d, target in product(asked.snr, asked.d, asked.target):
            judge(Case(target, d, snr, asked.trials), asked.peer, seeds, pool)


if __name__ == "__main__":
    main()
