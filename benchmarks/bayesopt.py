"""The search for weights: ours next to its peers on functions whose best is known. One JSON object a line.

    python benchmarks/bayesopt.py [--quick] [--d 4] [--snr 1] [--target interior face] [--peer random tpe]
                                  [--seeds 20] [--trials 30] [--jobs 2] > benchmarks/bayesopt.jsonl

Functions on the simplex with standard deviation 1 (`dense_rlhf.bayesopt.known_functions`), another for each seed, seen
through normal noise of sd 1 / `snr`. A seed's function and its noise, trial by trial, are the same for every method. A
method that can use the standard error of an observation is given it: ours, gp on sobol, and ax. Regret is of the
noise-free function, in its sd:

    inference  at the point that is handed over
    simple     at the best point that was tried, which nobody knows
    flat       share of seeds in which a winner is claimed where there is none; no peer has a verdict: `theirs` is null
    proposal   median seconds of a proposal after 100 trials, one thread, d = 4

`ours` and `theirs` are medians over seeds (`repeats`), ratio is theirs / ours (null where ours is 0); `difference` is
the mean of theirs less ours of the same seed, `interval` its 95 % bootstrap interval over seeds.

    ours          `Search` as it comes: anchors, pairs, ensemble of Gaussian processes, incumbent
    random        Dirichlet(1); hands over the best observation
    sobol         Sobol points on the simplex; best observation
    gp on sobol   the same points; our model's incumbent, so our lead over it comes from choosing the points
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
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from dense_rlhf.bayesopt import audit
from dense_rlhf.bayesopt.known_functions import LANDSCAPES
from dense_rlhf.bayesopt.known_searches import Experiment
from dense_rlhf.bayesopt.search import Search
from dense_rlhf.bayesopt.space import Point, Space
from dense_rlhf.files import cached_folder
from dense_rlhf.runs import provenance
from dense_rlhf.statistics import bootstrap

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
SDS, SHARE = "sd of the function", "share of seeds"
UNITS = {"inference": SDS, "simple": SDS, "flat": SHARE, "proposal": "s"}

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


def ours(experiment: Experiment, trials: int) -> tuple[Point, bool | None]:
    """The incumbent, and on a flat function whether the audit claims a winner."""
    search = experiment.run(Search(Space(experiment.d), seed=experiment.seed), trials)
    names = [f"source {i}" for i in range(experiment.d)]
    claimed = audit.verdict(search, names).winner if experiment.landscape == "flat" else None
    return search.incumbent()[0], claimed


def drawn(experiment: Experiment, trials: int, strategy: str) -> Search:
    space = Space(experiment.d)
    return experiment.run(Search(space, strategy, initial=0, anchors=False, seed=experiment.seed), trials)


def random(experiment: Experiment, trials: int) -> Point:
    drawn(experiment, trials, "random")
    return experiment.best_observed()


def sobol(experiment: Experiment, trials: int) -> Point:
    drawn(experiment, trials, "sobol")
    return experiment.best_observed()


def gp_on_sobol(experiment: Experiment, trials: int) -> Point:
    return drawn(experiment, trials, "sobol").incumbent()[0]


def uniform(experiment: Experiment, trials: int) -> Point:
    experiment.points.append((1 / experiment.d,) * experiment.d)
    return experiment.points[0]


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


PEERS: dict[str, Callable[[Experiment, int], Point]] = {
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
    experiment = Experiment(case.target, case.d, case.snr, seed)
    method = ours if method == "ours" else PEERS[method]
    handed_over = method(experiment, case.trials)
    point, claimed = handed_over if method is ours else (handed_over, None)
    simple = min(experiment.regret(tried) for tried in experiment.points)
    return {"inference": experiment.regret(point), "simple": simple, "claimed": claimed}


# ---------------------------------------------------------------------------------------------------- a case


def line(measure: str, case: str, peer: str | None, repeats: int, own: float, theirs: float | None, **more) -> None:
    found = {
        "benchmark": f"bayesopt/{measure}",
        "case": case,
        "peer": peer,
        "ratio": None if theirs is None or own == 0 else round(theirs / own, 2),
        "unit": UNITS[measure],
        "repeats": repeats,
        "ours": round(own, 4),
        "theirs": None if theirs is None else round(theirs, 4),
    }
    print(json.dumps(found | more), flush=True)


def compare(case: Case, peer: str, own: list[dict], theirs: list[dict]) -> None:
    for measure in ("inference", "simple"):
        a, b = (np.array([regrets[measure] for regrets in side]) for side in (own, theirs))
        gap = bootstrap(b - a)
        more = {"difference": round(gap.mean, 4), "interval": [round(gap.low, 4), round(gap.high, 4)]}
        line(measure, case.name, peer, len(a), float(np.median(a)), float(np.median(b)), **more)


def judge(case: Case, peers: list[str], seeds: range, pool: ProcessPoolExecutor) -> None:
    """All methods on all seeds; each peer's lines as soon as it is through. On a flat function only ours is asked."""
    if case.target == "flat":
        peers = []
    asked = {name: [pool.submit(run, case, name, seed) for seed in seeds] for name in ["ours", *peers]}
    own = [future.result() for future in asked["ours"]]
    for name in peers:
        compare(case, name, own, [future.result() for future in asked[name]])
    if case.target == "flat":
        line("flat", case.name, None, len(own), float(np.mean([regrets["claimed"] for regrets in own])), None)


# ---------------------------------------------------------------------------------------------------- seconds


def proposals(d: int, n: int, repeats: int) -> dict[str, Callable[[], Iterator[float]]]:
    """Seconds of `repeats` proposals after `n` noisy trials, an observation after each, by method."""

    def of_search() -> Iterator[float]:
        search, experiment = Search(Space(d)), Experiment("ridge", d, 1.0, 0)
        for point in Space(d).sobol(n, 0):
            search.observe(point, experiment(point), 1.0)
        for _ in range(repeats):
            start = time.perf_counter()
            point = search.suggest()
            yield time.perf_counter() - start
            search.observe(point, experiment(point), 1.0)

    def of_ax(walk: dict | None) -> Iterator[float]:
        client, experiment = ax_client(d, 0, n + repeats, walk), Experiment("ridge", d, 1.0, 0)
        for point in Space(d).sobol(n, 0):
            _, number = client.attach_trial({f"w{i}": w for i, w in enumerate(point)})
            client.complete_trial(number, {"value": (experiment(point), 1.0)})
        for _ in range(repeats):
            start = time.perf_counter()
            weights, number = client.get_next_trial()
            yield time.perf_counter() - start
            client.complete_trial(number, {"value": (experiment(tuple(weights.values())), 1.0)})

    def of_tpe() -> Iterator[float]:
        study, experiment = tpe_study(0), Experiment("ridge", d, 1.0, 0)
        for _ in range(n + repeats):
            start = time.perf_counter()
            asked = study.ask()
            point = tpe_point(asked, d)
            if len(experiment.values) >= n:
                yield time.perf_counter() - start
            study.tell(asked, experiment(point))

    return {"ours": of_search, "ax": lambda: of_ax(None), "ax, short walk": lambda: of_ax(SHORT_WALK), "tpe": of_tpe}


def propose(method: str, d: int, n: int, repeats: int) -> list[float]:
    quiet()
    return list(proposals(d, n, repeats)[method]())


def time_proposals(peers: list[str], n: int, repeats: int, pool: ProcessPoolExecutor) -> None:
    own = pool.submit(propose, "ours", 4, n, repeats).result()
    for name in proposals(4, n, repeats):
        if name.split(",")[0] in peers:
            theirs = pool.submit(propose, name, 4, n, repeats).result()
            ends = statistics.median(own), statistics.median(theirs)
            line("proposal", f"d 4 after {n} trials", name, repeats, *ends, slowest=round(max(own), 3))


# ---------------------------------------------------------------------------------------------------- all of it


def peers_folder() -> Path:
    """The peers, without what they depend on."""

    def build(folder: Path) -> None:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *REQUIREMENTS]
        subprocess.run(pip, check=True, stdout=sys.stderr)

    return cached_folder("peers", {"requirements": REQUIREMENTS}, build)


def start_worker(folder: str) -> None:
    """One thread; peers come after this environment's own packages."""
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
    ran = {"benchmark": "bayesopt/run", "threads": 1, "jobs": asked.jobs, "seeds": [seeds[0], seeds[-1]]}
    print(json.dumps(ran | {"peers": REQUIREMENTS} | provenance()), flush=True)
    context = get_context("spawn")
    if asked.timed_at:
        with ProcessPoolExecutor(1, context, start_worker, (folder,)) as alone:
            time_proposals(asked.peer, asked.timed_at, 3 if asked.quick else 10, alone)
    with ProcessPoolExecutor(asked.jobs, context, start_worker, (folder,)) as pool:
        for snr, d, target in product(asked.snr, asked.d, asked.target):
            judge(Case(target, d, snr, asked.trials), asked.peer, seeds, pool)


if __name__ == "__main__":
    main()
