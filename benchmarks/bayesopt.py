"""The search for weights: ours next to its peers on functions whose best is known. One JSON object a line.

    python benchmarks/bayesopt.py [--quick] [--group tuning reported measured] [--target interior face] [--d 4]
                                  [--snr 1] [--peer random tpe] [--seeds 20] [--ax-seeds 3] [--trials 30] [--jobs 1]
                                  > benchmarks/bayesopt.jsonl

Three groups of functions on the simplex, of standard deviation 1, another function for each seed, seen through normal
noise of sd 1 / `snr`:

    tuning    settings of our search may have been chosen by them (`dense_rlhf.bayesopt.known_functions`)
    reported  none was (`dense_rlhf.bayesopt.reported_functions`)
    measured  two tables of real mixtures (`measured_mixtures.py`) and our own surface (`measured_surface.py`), with
              their own noise, searched among the measured

A seed's function and its noise, trial by trial, are the same for every method. A method that can use the standard error
of an observation is given it. Regret is of the noise-free function, in its sd:

    inference  at the point that is handed over
    simple     at the best point that was tried, which nobody knows
    flat       share of seeds in which a winner is claimed where there is none; no peer has a verdict: `theirs` is null
    stopping   the same trials of ours under a rule of when to stop (`stopping_rules.py`), asked after every second one:
               mean regret where the rule stops, at the end if it never does; `stopped` is the share of seeds in which
               it does, `after` the median trials of those, `within` the share of those whose regret is then at most a
               quarter of the noise's sd, each for our rule and for the peer's
    proposal   median seconds of a proposal after 100 trials, one thread, d = 4

`ours` and `theirs` are medians over seeds (`repeats`), ratio is theirs / ours (null where ours is 0); `difference` is
the mean of theirs less ours of the same seed, `interval` its 95 % bootstrap interval over seeds. A line of
`bayesopt/functions` counts a group's functions by inference regret: `halved` where our median is at most half of the
peer's, `not_above` where it is not above it, `better` and `worse` where the interval lies on one side of 0. One of
`bayesopt/calibration` has the mean regret that our audits expected and the true one: ratio is true / expected, `early`
means fewer than four trials a number of a point.

    ours          `Search` as it comes
    gp on sobol   Sobol points; our model's incumbent, so our lead over it comes from choosing the points
    nei           `Search` with one Gaussian process and log noisy expected improvement after 5 Sobol points, as in the
                  paper (arXiv 2504.16272)
    the others    `simplex_peers.py`; Ax takes some 30 seconds a search and so has the first `--ax-seeds` seeds only

Each search is a line of a journal in the cache, by all that it depends on: a benchmark that was cut short goes on, and
a change of our model repeats no peer. `--no-ours` only fills the journal.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import simplex_peers as peers
from measured_mixtures import MEASURED, MeasuredExperiment
from measured_surface import SURFACES, SurfaceExperiment
from stopping_rules import RULES, stops

from dense_rlhf.bayesopt import audit
from dense_rlhf.bayesopt.known_functions import TUNING
from dense_rlhf.bayesopt.known_searches import Experiment
from dense_rlhf.bayesopt.reported_functions import REPORTED
from dense_rlhf.bayesopt.search import Search
from dense_rlhf.bayesopt.space import Point, Space
from dense_rlhf.files import Journal, cache_root, content_key
from dense_rlhf.fingerprint import code_key
from dense_rlhf.runs import provenance
from dense_rlhf.statistics import bootstrap

GROUPS = {"tuning": tuple(TUNING), "reported": tuple(REPORTED), "measured": (*MEASURED, *SURFACES)}
TARGETS = [name for names in GROUPS.values() for name in names]
TIMED_AT = 100
JUDGED = range(8, 1000, 2)  # trials after which the audit and other rules are asked, and after the last
SDS, SHARE = "sd of the function", "share of seeds"
UNITS = {"inference": SDS, "simple": SDS, "stopping": SDS, "flat": SHARE, "proposal": "s"}

# ---------------------------------------------------------------------------------------------------- a search


def real(target: str, seed: int) -> MeasuredExperiment:
    return (SurfaceExperiment if target in SURFACES else MeasuredExperiment)(target, seed)


@dataclass(frozen=True)
class Case:
    target: str
    d: int
    snr: float
    trials: int

    @property
    def name(self) -> str:
        return f"{self.target}, d {self.d}, snr {self.snr:.3g}, {self.trials} trials"

    def experiment(self, seed: int) -> Experiment:
        if self.target in GROUPS["measured"]:
            return real(self.target, seed)
        return Experiment(self.target, self.d, self.snr, seed)


def searched(experiment: Experiment, strategy: str = "gp", **start) -> Search:
    among = experiment.among if isinstance(experiment, MeasuredExperiment) else None
    return Search(Space(experiment.d), strategy, seed=experiment.seed, among=among, **start)


def ours(experiment: Experiment, trials: int) -> tuple[Point, dict]:
    """The incumbent, and what the audit and the other rules say on the way."""
    search, names, rows = searched(experiment), [f"source {i}" for i in range(experiment.d)], []
    for n in range(1, trials + 1):
        experiment.run(search, n)
        if n in JUDGED or n == trials:
            verdict = audit.verdict(search, names)
            row = {"n": n, "regret": experiment.regret(search.incumbent()[0]), "expected": verdict.regret.expected}
            rows.append(row | {"claimed": verdict.winner, "stops": stops(search, verdict)})
    return search.incumbent()[0], {"rows": rows}


def gp_on_sobol(experiment: Experiment, trials: int) -> Point:
    return experiment.run(searched(experiment, "sobol", initial=0, anchors=False), trials).incumbent()[0]


def nei(experiment: Experiment, trials: int) -> Point:
    return experiment.run(searched(experiment, "nei", initial=5, anchors=False), trials).incumbent()[0]


OURS: dict[str, Callable] = {"ours": ours, "gp on sobol": gp_on_sobol, "nei": nei}
METHODS = OURS | peers.PEERS


def quiet() -> None:
    """Libraries' warnings and logs are no answer."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


@cache
def code(method: str) -> str:
    """Hash of the code that makes a method's result, with the function that it searches; imports are not followed."""
    here, package = Path(__file__).parent, Path(audit.__file__).parent
    if method not in OURS:
        return content_key([code_key(ast.parse(Path(peers.__file__).read_text())), peers.REQUIREMENTS])
    files = [package / name for name in ("search.py", "surrogate.py", "space.py")]
    if method == "ours":
        files += [package / "audit.py", here / "stopping_rules.py", here / "measured_mixtures.py"]
    calls = [inspect.getsource(of) for of in (OURS[method], searched)]
    return content_key([[code_key(ast.parse(file.read_text())) for file in files], calls])


def key(case: Case, method: str, seed: int) -> str:
    """Of a result: the method, its code, and what it can see of the function: noisy values at 16 fixed points."""
    experiment = case.experiment(seed)
    seen = [round(experiment(point), 9) for point in Space(experiment.d).sobol(16, 1)]
    return content_key([method, case.trials, seed, seen, np.round(experiment.truth.best, 6).tolist(), code(method)])


@cache
def journal(path: Path) -> Journal:
    return Journal(path)


def result(path: Path, case: Case, method: str, seed: int) -> dict:
    """Regrets of one method on one seed, from the journal at `path` where they are known."""
    quiet()
    return journal(path).get_or_make(key(case, method, seed), partial(run, case, method, seed))


def run(case: Case, method: str, seed: int) -> dict:
    experiment, start = case.experiment(seed), time.perf_counter()
    handed_over = METHODS[method](experiment, case.trials)
    point, more = handed_over if method == "ours" else (handed_over, {})
    simple = min(experiment.regret(tried) for tried in experiment.points)
    about = asdict(case) | {"method": method, "seed": seed, "seconds": round(time.perf_counter() - start, 2)}
    return about | {"inference": experiment.regret(point), "simple": simple} | more


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


def compare(case: Case, peer: str, own: list[dict], theirs: list[dict]) -> dict[str, bool]:
    """A line of each regret; how the peer's inference regret stands to ours."""
    stands = {}
    for measure in ("inference", "simple"):
        a, b = (np.array([regrets[measure] for regrets in side]) for side in (own[: len(theirs)], theirs))
        gap = bootstrap(b - a)
        more = {"difference": round(gap.mean, 4), "interval": [round(gap.low, 4), round(gap.high, 4)]}
        mine, his = float(np.median(a)), float(np.median(b))
        line(measure, case.name, peer, len(a), mine, his, **more)
        half = mine <= his / 2
        stands[measure] = {"halved": half, "not_above": mine <= his, "better": gap.low > 0, "worse": gap.high < 0}
    return stands["inference"]


def compare_rules(case: Case, own: list[dict], noise: float) -> None:
    """When each rule stops our searches of a case, and how good their answer is then."""
    ends = {rule: [stopped(of["rows"], rule) for of in own] for rule in RULES}
    mean = {rule: float(np.mean([row["regret"] for row, _ in rows])) for rule, rows in ends.items()}
    about = {rule: described(rows, noise) for rule, rows in ends.items()}
    for rule in RULES[1:]:
        more = {name: [about["ours"][name], about[rule][name]] for name in about[rule]}
        line("stopping", case.name, rule, len(own), mean["ours"], mean[rule], **more)


def stopped(rows: list[dict], rule: str) -> tuple[dict, bool]:
    """The row at which a rule stops, and whether it does; else the last."""
    return next(((row, True) for row in rows if row["stops"][rule]), (rows[-1], False))


def described(ends: list[tuple[dict, bool]], noise: float) -> dict[str, float | None]:
    rows = [row for row, does_stop in ends if does_stop]
    within = [row["regret"] <= noise / 4 for row in rows]
    more = [statistics.median(row["n"] for row in rows), round(statistics.mean(within), 2)] if rows else [None, None]
    return {"stopped": round(len(rows) / len(ends), 2), "after": more[0], "within": more[1]}


def judge(case: Case, names: list[str], seeds: dict[str, range], results: Callable) -> tuple[list[dict], dict]:
    """All methods on all seeds, each peer's lines as soon as it is through; our results, and how each peer stands.

    On a flat function only ours is asked.
    """
    flat = case.target == "flat"
    asked = {name: results(case, name, seeds[name]) for name in names if not flat or name == "ours"}
    own, stands = list(asked.pop("ours", ())), {}
    for name, theirs in asked.items():
        theirs = list(theirs)
        if own and theirs:
            stands[name] = compare(case, name, own, theirs)
    if own and flat:
        line("flat", case.name, None, len(own), float(np.mean([of["rows"][-1]["claimed"] for of in own])), None)
    elif own:
        compare_rules(case, own, 1 / case.experiment(0).snr)
    return own, stands


def sum_up(judged: dict[Case, tuple[list[dict], dict]]) -> None:
    """Lines by group, d and snr: how many functions stand how to each peer, and the expected and true regret."""
    stands, audits = [], []
    for case, (own, by_peer) in judged.items():
        group = next(group for group, names in GROUPS.items() if case.target in names)
        about = {"group": group, "d": case.d, "snr": "own" if group == "measured" else case.snr}
        stands += [about | {"peer": peer} | how for peer, how in by_peer.items()]
        rows = [row for of in own for row in of["rows"] if case.target != "flat"]
        audits += [about | {"early": row["n"] < audit.EARLIEST * case.d} | row for row in rows]
    for measure, rows, more in (("functions", stands, "peer"), ("calibration", audits, "early")):
        for about, of in pd.DataFrame(rows).groupby(["group", "d", "snr", more], sort=False) if rows else ():
            named = dict(zip(("group", "d", "snr", more), about)) | {
                "functions" if more == "peer" else "audits": len(of)
            }
            numbers = of[["halved", "not_above", "better", "worse"]].sum() if more == "peer" else means(of)
            print(json.dumps({"benchmark": f"bayesopt/{measure}"} | named | dict(numbers), default=int), flush=True)


def means(audits: pd.DataFrame) -> dict[str, float]:
    expected, regret = audits["expected"].mean(), audits["regret"].mean()
    return {"expected": round(expected, 4), "true": round(regret, 4), "ratio": round(regret / expected, 2)}


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
        client, experiment = peers.ax_client(d, 0, n + repeats, walk), Experiment("ridge", d, 1.0, 0)
        for point in Space(d).sobol(n, 0):
            _, number = client.attach_trial({f"w{i}": w for i, w in enumerate(point)})
            client.complete_trial(number, {"value": (experiment(point), 1.0)})
        for _ in range(repeats):
            start = time.perf_counter()
            weights, number = client.get_next_trial()
            yield time.perf_counter() - start
            client.complete_trial(number, {"value": (experiment(tuple(weights.values())), 1.0)})

    def of_tpe() -> Iterator[float]:
        study, experiment = peers.tpe_study(0), Experiment("ridge", d, 1.0, 0)
        for _ in range(n + repeats):
            start = time.perf_counter()
            asked = study.ask()
            point = peers.tpe_point(asked, d)
            if len(experiment.values) >= n:
                yield time.perf_counter() - start
            study.tell(asked, experiment(point))

    return {
        "ours": of_search,
        "ax": lambda: of_ax(None),
        "ax, short walk": lambda: of_ax(peers.SHORT_WALK),
        "tpe": of_tpe,
    }


def propose(method: str, d: int, n: int, repeats: int) -> list[float]:
    quiet()
    return list(proposals(d, n, repeats)[method]())


def time_proposals(names: list[str], n: int, repeats: int, pool: ProcessPoolExecutor) -> None:
    own = pool.submit(propose, "ours", 4, n, repeats).result()
    for name in proposals(4, n, repeats):
        if name.split(",")[0] in names:
            theirs = pool.submit(propose, name, 4, n, repeats).result()
            ends = statistics.median(own), statistics.median(theirs)
            line("proposal", f"d 4 after {n} trials", name, repeats, *ends, slowest=round(max(own), 3))


# ---------------------------------------------------------------------------------------------------- all of it


def start_worker(folder: str) -> None:
    """One thread; peers come after this environment's own packages."""
    import torch

    torch.set_num_threads(1)
    sys.path.append(folder)


def selected() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="end within a minute: d 3, 2 seeds, 12 trials")
    parser.add_argument("--group", nargs="+", default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--target", nargs="+", default=TARGETS, choices=TARGETS, metavar="FUNCTION")
    parser.add_argument("--d", type=int, nargs="+", default=[3, 4, 6])
    parser.add_argument("--snr", type=float, nargs="+", default=[2.0, 1.0, 0.5])
    parser.add_argument("--peer", nargs="*", default=list(METHODS)[1:], choices=list(METHODS)[1:])
    parser.add_argument("--ours", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--ax-seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0, help="to develop on others than those reported")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--timed-at", type=int, default=TIMED_AT, help="trials before a timed proposal; 0: no timing")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--journal", type=Path, default=cache_root() / "benchmarks" / "bayesopt.jsonl")
    asked = parser.parse_args()
    if asked.quick:
        quick = dict(
            d=[3], snr=[1.0], target=["interior", "powers", "flat"], seeds=2, ax_seeds=1, trials=12, timed_at=0
        )
        vars(asked).update(quick)
    return asked


def cases(asked: argparse.Namespace) -> Iterator[Case]:
    wanted = [name for group in asked.group for name in GROUPS[group] if name in asked.target]
    for snr in asked.snr:
        for d in asked.d:
            yield from (Case(name, d, snr, asked.trials) for name in wanted if name not in GROUPS["measured"])
    for name in wanted:
        if name in GROUPS["measured"]:
            experiment = real(name, 0)
            yield Case(name, experiment.d, experiment.snr, asked.trials)


def main() -> None:
    asked = selected()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers
    folder = str(peers.wheels()) if {"ax", "tpe"} & set(asked.peer) else ""
    names = ["ours"] * asked.ours + asked.peer
    seeds = {name: range(asked.first_seed, asked.first_seed + asked.seeds) for name in names}
    ran = {"benchmark": "bayesopt/run", "threads": 1, "jobs": asked.jobs, "seeds": [asked.first_seed, asked.seeds]}
    print(json.dumps(ran | {"peers": peers.REQUIREMENTS} | provenance()), flush=True)
    context = get_context("spawn")
    if asked.timed_at and asked.ours:
        with ProcessPoolExecutor(1, context, start_worker, (folder,)) as alone:
            time_proposals(asked.peer, asked.timed_at, 10, alone)
    with ProcessPoolExecutor(asked.jobs, context, start_worker, (folder,)) as pool:

        def results(case: Case, name: str, seeds: range) -> Iterator[dict]:
            return pool.map(partial(result, asked.journal, case, name), seeds)

        seeds["ax"] = range(asked.first_seed, asked.first_seed + min(asked.ax_seeds, asked.seeds))
        sum_up({case: judge(case, names, seeds, results) for case in cases(asked)})


if __name__ == "__main__":
    main()
