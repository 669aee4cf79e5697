"""What does the surface that a search on reviews sees look like? Trainings at points of the simplex, with other seeds.

    python benchmarks/surface.py [--repeats 3] [--minutes 60] [--runs runs/sources/05_*] > benchmarks/surface.jsonl

A training is a trial of a search in all but its point: the updates of `TRIAL` from the reference, with a seed of its
own, judged on the same held-out prompts. The points are each of four sources alone and all alike, Sobol points, and
mixtures of the first two. Trainings are lines of a journal in the cache, so what was cut short goes on. `--runs` adds
trials of searches of the same size, at the points that were planned: those that a model chose show the top alone.
All are written to `dense_rlhf/bayesopt/surfaces.csv`; without either option that table is read, which takes a minute.
Then, of each surface, a line of

    signal      sd between points over the sd of one observation, 95 % interval; `noise`, that sd; `prompts`, its part
                that is chance of prompts and responses (root mean squared standard error; of the proxy)
    surrogate   of each kind of Gaussian process of our search, and of all together (`ensemble`): the share of the kind
                by evidence; Q^2 of points that are left out, with hyperparameters held; `gain`, nats a point over the
                same prediction by the mean of the others, with its 95 % bootstrap interval over points; `length`, the
                posterior of a length-scale (median and 95 %), in weights
    resembles   posterior shares of the known functions and of two tables of real mixtures (`measured_mixtures.py`), by
                group and the likeliest kinds (`dense_rlhf.bayesopt.surfaces.resemblance`)
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import permutations, product, takewhile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from measured_mixtures import MEASURED
from measured_mixtures import table as mixtures_of
from scipy.stats import norm

from dense_rlhf.bayesopt import ledger, surfaces, surrogate
from dense_rlhf.bayesopt.known_functions import TUNING
from dense_rlhf.bayesopt.ledger import Ledger, trial_seed
from dense_rlhf.bayesopt.search import Search
from dense_rlhf.bayesopt.space import Point, Space
from dense_rlhf.bayesopt.surfaces import SOURCES, Surface
from dense_rlhf.config.params import RunParams
from dense_rlhf.files import Journal, cache_root, content_key
from dense_rlhf.runs import provenance
from dense_rlhf.statistics import bootstrap
from dense_rlhf.training.inner_loop import Recipe, training_key
from dense_rlhf.training.outer_loop import Objective, Trials, search_space, shape_at
from dense_rlhf.training.task import load_task
from dense_rlhf.types import InputError, RewardShape

TRIAL = {"ppo_updates": 10, "ppo_rollouts": 32, "ppo_minibatch": 16, "ppo_lr": 5e-4, "bo_updates": 6}
TRIAL |= {"evaluation_prompts": 128}  # of `params/reviews.yaml` with half the batch and half the prompts
NORMALISERS = "signed", "softmax"
MEASURES = "proxy", "gold", "kl", "standard_error"
EDGE, DRAWN = 5, 20  # mixtures of the first two sources; Sobol points
ROUNDS = 2048  # functions of each known kind


# ---------------------------------------------------------------------------------------------------- trainings


def points() -> list[Point]:
    space, shares = Space(len(SOURCES)), np.arange(1, EDGE + 1) / (EDGE + 1)
    return space.anchors() + space.sobol(DRAWN, 0) + [(1 - w, w, 0.0, 0.0) for w in shares.tolist()]


def trainings(repeats: int, path: Path, params: RunParams) -> Iterator[dict]:
    """A row a training: normalise, point, replicate, seed, proxy, gold, kl and the proxy's standard error.

    Repeats of anchors come first, for they alone show the noise; then all points once, and again.
    """
    task, journal, places = load_task(params), Journal(path), points()
    objective = Objective.of(params.bo, task.data.validation_prompts[: params.evaluation.prompts])
    anchors = len(SOURCES) + 1
    order = sorted(product(range(len(places)), range(repeats)), key=lambda at: (at[0] >= anchors, at[1], at[0]))
    for normalise in NORMALISERS:
        recipe = replace(Recipe.of(params), shape=RewardShape(SOURCES, (0.25,) * 4, normalise))
        with tempfile.TemporaryDirectory() as folder:
            empty = partial(Search, search_space(recipe.shape, params.bo))
            trials = Trials(task, recipe, params.bo, objective, Ledger(Path(folder) / "trials.jsonl", empty, 1, 0))
            for n, replicate in order:
                seed = trial_seed(0, replicate * len(places) + n)
                about = {"normalise": normalise, "point": places[n], "seed": seed}
                shaped = replace(recipe, shape=shape_at(recipe.shape, params.bo, places[n]), seed=seed)
                key = content_key([training_key(task, shaped), params.bo.updates, list(map(str, objective.prompts))])
                yield journal.get_or_make(key, partial(trained, trials, about))


def trained(trials: Trials, about: dict) -> dict:
    event, _ = trials.run({"trial": 0} | about)
    print(about, file=sys.stderr, flush=True)
    return about | {name: float(event[name]) for name in MEASURES}


def searched(run: Path) -> list[dict]:
    """A row for each planned trial of a search, as `trainings`. Raises `InputError` for trials of another size."""
    params = RunParams.read(run / "params.yaml")
    if other := [name for name, value in TRIAL.items() if params.flat()[name] != value]:
        raise InputError(f"{run}: {', '.join(other)} differ from {TRIAL}, wanted trials of that size")
    shape, bo = params.shape.reward_shape(), params.bo
    planned = len(Search(search_space(shape, bo), bo.strategy, bo.initial, bo.anchors, bo.replicates).start)
    rows = []
    for row in ledger.trials(run / "trials.jsonl")[:planned]:
        if row["status"] == "observed":
            weights = dict(zip(row["sources"], row["weights"]))
            about = {"normalise": shape.normalise, "point": [weights.get(name, 0.0) for name in SOURCES]}
            rows.append(about | {name: row[name] for name in ("seed", *MEASURES)})
    return rows


def tabulated(rows: list[dict]) -> pd.DataFrame:
    """Without what was trained twice: the same point and seed give the same policy."""
    weights = [dict(zip(SOURCES, np.round(row["point"], 9))) for row in rows]
    columns = "normalise", "seed", *MEASURES
    table = pd.DataFrame([w | {name: row[name] for name in columns} for row, w in zip(rows, weights)])
    return table.drop_duplicates(["normalise", *SOURCES, "seed"]).round(dict.fromkeys(MEASURES, 5))


# ---------------------------------------------------------------------------------------------------- their looks


def signal(surface: Surface, errors: pd.Series) -> dict:
    ratio, prompts = surfaces.signal_to_noise(surface), float(np.sqrt(np.square(errors).mean()))
    return {"ratio": rounded(ratio), "noise": round(surface.noise, 4), "prompts": round(prompts, 4)}


def rounded(interval) -> list[float]:
    return [round(x, 3) for x in (interval.mean, interval.low, interval.high)]


def fitted(surface: Surface, kind: str | None) -> surrogate.Ensemble:
    """The search's model of the points' means, of one kind of kernel if that is named."""
    prior = {name: share if kind in (name, None) else 0 for name, share in surrogate.KINDS.items()}
    points, counts, means = surface.layout
    X, Y, noise = (torch.tensor(x).double() for x in (points, means[:, None], surface.noise**2 / counts[:, None]))
    with patch.dict(surrogate.KINDS, prior):
        return surrogate.Ensemble(X, Y, noise, 0)


def surrogates(surface: Surface) -> Iterator[dict]:
    """How each kind predicts left-out points, next to the mean of the others."""
    y = surface.layout.means
    others = (y.sum() - y) / (len(y) - 1)
    level = norm.logpdf(y, others, (y - others).std())
    for kind, share in (fitted(surface, None).kinds() | {"ensemble": 1.0}).items():
        model = fitted(surface, None if kind == "ensemble" else kind)
        mean, variance = model.leave_one_out()
        gain = norm.logpdf(y, mean, np.sqrt(variance)) - level
        q2 = 1 - np.square(y - mean).sum() / np.square(y - others).sum()
        row = {"kind": kind, "share": round(share, 2), "q2": round(float(q2), 3), "gain": rounded(bootstrap(gain))}
        if kind == "rough in weights":
            lengths = surrogate._parts(model.z, model.X.shape[1])[2].mean(-1).ravel().numpy()
            row["length"] = np.quantile(lengths, [0.5, 0.025, 0.975]).round(2).tolist()
        yield row


def shapes(at: np.ndarray) -> dict[str, np.ndarray]:
    """Values at points of known functions and, of four sources, of the tables of mixtures, their parts in any order."""
    known = dict(surfaces.known_shapes(at, ROUNDS))
    for name in MEASURED if at.shape[1] == 4 else ():
        mixtures, values, _ = mixtures_of(name)
        near = [np.linalg.norm(at[:, None] - mixtures[:, order], axis=-1).argmin(1) for order in permutations(range(4))]
        known[name] = values[np.array(near)]
    return known


def resembles(surface: Surface) -> dict:
    shares = surfaces.resemblance(surface, shapes(surface.layout.points))
    groups = {"tuning": 0.0, "reported": 0.0, "measured": 0.0}
    for name, share in shares.items():
        groups["tuning" if name in TUNING else "measured" if name in MEASURED else "reported"] += share
    likeliest = sorted(shares, key=lambda name: -shares[name])[:4]
    return {name: round(share, 3) for name, share in (groups | {name: shares[name] for name in likeliest}).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=0, help="trainings of each point")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which no further training begins")
    parser.add_argument("--runs", type=Path, nargs="*", default=(), help="folders of searches")
    parser.add_argument("--journal", type=Path, default=cache_root() / "benchmarks" / "surface.jsonl")
    asked, end = parser.parse_args(), time.monotonic()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if asked.repeats or asked.runs:
        made = trainings(asked.repeats, asked.journal, RunParams.from_flat(TRIAL | {"threads": 1}))
        rows = list(takewhile(lambda _: time.monotonic() < end + 60 * asked.minutes, made))
        tabulated(rows + sum(map(searched, asked.runs), [])).to_csv(surfaces.MEASURED, index=False)
    table = pd.read_csv(surfaces.MEASURED)
    print(json.dumps({"benchmark": "surface/run", "trial": TRIAL, "trainings": len(table)} | provenance()), flush=True)
    for name, surface in surfaces.measured(table).items():
        about = {"surface": name, "points": len(surface.layout.points), "trainings": len(surface.values)}
        errors = table.loc[table["normalise"] == name.split(", ")[1], "standard_error"]
        lines = [("signal", signal(surface, errors)), *(("surrogate", row) for row in surrogates(surface))]
        for measure, row in [*lines, ("resembles", resembles(surface))]:
            print(json.dumps({"benchmark": f"surface/{measure}"} | about | row), flush=True)


if __name__ == "__main__":
    main()
