"""A quarter of an hour of one card, used to the full: `python benchmarks/gpu.py --quarter`.

Configurations in order of what their figures are worth. After each round its configuration's file is written whole,
so that a kill loses one round at most; a configuration that this code has finished on this card is not run again; one
that would not end in time is left out; an error ends its own configuration only. Nothing is asked of a network.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import gpu_records as records
import torch
from card import (
    DEVICE,
    PAD,
    SHAPES,
    clocked,
    one_update,
    random_model,
    random_queries,
    random_readings,
    random_scorer,
    run_params,
    training,
)
from transformers import AutoModelForCausalLM

from dense_rlhf.attribution.coalitions import permutation_shap
from dense_rlhf.attribution.engine import coalition_scores
from dense_rlhf.fingerprint import source_key
from dense_rlhf.ppo.sampling import SAMPLERS, Sampling
from dense_rlhf.runner import timing
from dense_rlhf.runs import provenance

ROOT = Path(__file__).parent.parent
RESERVE = 5  # seconds kept back to write files


class OutOfTime(BaseException):
    """The limit of the whole script; no configuration catches it."""


Round = dict[str, list[float]]  # step: seconds, GiB


@dataclass(frozen=True)
class Configuration:
    """What is measured: a name for its file, facts for a reader, and rounds of it, the first of which warms up.

    `start` makes what the rounds need and returns the facts that it counted, with the function of one round.
    """

    name: str
    title: str
    start: Callable[[], tuple[dict, Callable[[], Round]]]
    rounds: int  # besides the first
    seconds: float  # about what it takes on a card


@dataclass(frozen=True)
class Size:
    """Lengths of what is measured."""

    B: int
    P: int
    T: int
    small: str  # names in `SHAPES`
    large: str


QUARTER, TOY = Size(64, 128, 128, "135M", "1B"), Size(4, 8, 8, "tiny", "tiny")


# ---------------------------------------------------------------------------------------------------- measures


def whole_step(
    size: Size, shapes: tuple[str, str], policy: dict, micro: int, sampler: str = "captured"
) -> tuple[dict, Callable[[], Round]]:
    """One update by its steps: a policy of one shape learns what a reward model of another explains."""
    batch = dict(rollouts=size.B, minibatch=max(size.B // 2, micro), micro_batch=micro, max_new_tokens=size.T)
    params = run_params(policy, sampler=sampler, **batch)
    learner, reference, reward_model, models = training(*shapes, params)
    queries = random_queries(shapes[0], size.B, size.P)
    works = timing.time(models, params, size.P, ["shap"])
    counted = {"flops": timing.model_flops(works), "tokens": size.B * (size.P + size.T), **batch}

    def measure() -> Round:
        return {
            step: list(pair) for step, pair in one_update(learner, reference, reward_model, queries, params).items()
        }

    return counted, measure


def sampling(size: Size, sampler: str) -> tuple[dict, Callable[[], Round]]:
    """Responses of full length by one sampler; prompts have another width each time, as in a study."""
    lm, queries = random_model(AutoModelForCausalLM, size.small), random_queries(size.small, size.B, size.P)
    widths = iter(range(size.P, 0, -1))

    def measure() -> Round:
        few, generator = queries[:, -next(widths) :], torch.Generator().manual_seed(0)
        settings = torch.ones_like(few, dtype=torch.bool), Sampling(size.T, 1.0, (-1,), PAD), generator
        return {"sample": list(clocked(partial(SAMPLERS[sampler], lm, few, *settings))[:2])}

    return {"tokens": size.B * size.T}, measure


def same_tokens(size: Size) -> tuple[dict, Callable[[], Round]]:
    """The captured steps against the plain loop in float32, with rows that end: raises where a token differs."""
    lm, queries = random_model(AutoModelForCausalLM, size.small).float(), random_queries(size.small, size.B, size.P)
    ends = tuple(range(2, 2 + SHAPES[size.small]["vocab_size"] // 32))
    mask = torch.arange(size.P, device=DEVICE) >= torch.arange(size.B, device=DEVICE)[:, None] % (size.P // 2)

    def measure() -> Round:
        settings = queries, mask, Sampling(size.T, 1.0, ends, PAD)
        drawn = [SAMPLERS[name](lm, *settings, torch.Generator().manual_seed(0)) for name in ("cache", "captured")]
        differ = (drawn[0].responses != drawn[1].responses).sum().item()
        if differ:
            raise AssertionError(f"{differ} of {drawn[0].mask.sum().item()} tokens differ from the plain loop's")
        return {"sample": list(clocked(partial(SAMPLERS["captured"], lm, *settings, torch.Generator()))[:2])}

    return {"tokens": size.B * size.T}, measure


def explaining(size: Size, shape: str, budget: int) -> tuple[dict, Callable[[], Round]]:
    """One permutation and its reverse of every response, in batches of `budget` tokens."""
    reward_model = replace(random_scorer(shape), token_budget=budget)
    readings, masks = random_readings(shape, size.B, size.P, size.T), permutation_shap(size.T, 1, 0).masks.numpy()
    act = partial(coalition_scores, reward_model, readings, [masks] * size.B)
    return {"tokens": size.B * size.T, "token_budget": budget}, lambda: {"explain": list(clocked(act)[:2])}


def command(words: list[str], limit: float) -> tuple[dict, Callable[[], Round]]:
    """A process of its own: its seconds; raises with the end of what it wrote where it fails."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "DENSE_RLHF_TEST_DEVICE": DEVICE.type}

    def measure() -> Round:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            text, _ = process.communicate(timeout=limit)
        finally:
            process.kill()
        if process.returncode:
            raise RuntimeError(text[-2000:])
        return {"command": [time.perf_counter() - start, 0.0]}

    return {"command": " ".join(words)}, measure


def configurations(size: Size) -> Iterator[Configuration]:
    """All that runs in this process, the most valuable first."""
    small, shape = size.small, f"{size.B} x ({size.P} + {size.T})"
    yield Configuration(
        "same-tokens", f"{small} float32, `captured` draws the plain loop's tokens", partial(same_tokens, size), 1, 25
    )
    yield _sampler(size, "captured", 5, 15)
    yield _sampler(size, "cache", 2, 20)
    yield from _steps(size)
    for budget in (16384, 65536, 262144):
        title = f"{small} explains, {shape}, {budget:,} tokens at once"
        yield Configuration(f"explain-{budget}", title, partial(explaining, size, small, budget), 3, 12)
    yield _sampler(size, "generate", 3, 110)
    yield from _steps(size, "cache", "-cache")


def _sampler(size: Size, name: str, rounds: int, seconds: float) -> Configuration:
    title = f"{size.small} samples by `{name}`, {size.B} x ({size.P} + {size.T})"
    return Configuration(f"sample-{name}", title, partial(sampling, size, name), rounds, seconds)


def _steps(size: Size, sampler: str = "captured", suffix: str = "") -> Iterator[Configuration]:
    """Whole updates; with our plain loop only those that it was first measured in."""
    small, large, few = size.small, size.large, size.B // 4
    every, lora = ({}, "all weights"), ({"lora_rank": 32}, "LoRA")
    kinds = [("135m-all", small, small, every, few, 25), ("1b-lora", large, small, lora, few, 30)]
    if sampler == "captured":
        kinds += [("1b-all", large, large, every, few, 60), ("135m-all-micro", small, small, every, size.B, 25)]
        kinds += [("1b-lora-micro", large, small, lora, size.B, 30)]
    for name, shape, scorer, (policy, learns), micro, seconds in kinds:
        lengths = f"{size.B} x ({size.P} + {size.T}), micro-batch {micro}, `{sampler}`"
        start = partial(whole_step, size, (shape, scorer), policy, micro, sampler)
        title = f"{shape} {learns}, {scorer} explained, {lengths}"
        yield Configuration(f"step-{name}{suffix}", title, start, 4, seconds)


def commands(toy: bool) -> Iterator[Configuration]:
    """Tests on the card, and three arms of a study."""
    tests = ["tests/ppo/test_losses.py"] if toy else ["tests/ppo", "tests/models/test_policy.py", "tests/attribution"]
    pytest = ["-m", "pytest", *tests, "-p", "no:cacheprovider", "--tb=line"]
    yield Configuration("tests", f"tests on the card: {' '.join(tests)}", partial(command, pytest, 240), 0, 150)
    for arm in () if toy else ("sparse", "shap", "shap-signed"):
        words = ["-m", "dense_rlhf", "train", "params/reviews.yaml", "--arm", arm, "--seed", "5"]
        yield Configuration(f"reviews-{arm}", f"`reviews`, arm {arm}, seed 5", partial(command, words, 120), 0, 60)


# ---------------------------------------------------------------------------------------------------- the script


def card() -> str:
    return torch.cuda.get_device_name(0) if DEVICE.type == "cuda" else "CPU"


def run(folder: Path, minutes: float, toy: bool) -> int:
    """Measure what is missing in `folder` within `minutes`; 1 where a configuration failed."""
    ends, failed = time.monotonic() + 60 * minutes - RESERVE, []
    signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, max(1, 60 * minutes - RESERVE))
    say("run", **provenance())
    every = announced(folder, toy)
    try:
        for order, one in enumerate(every):
            left = ends - time.monotonic()
            if not toy and one.seconds > left:
                say("left out", name=one.name, seconds_left=round(left))
            elif not measured(one, order, folder):
                failed.append(one.name)
    except OutOfTime:
        say("out of time")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    say("end", failed=failed)
    return bool(failed)


def announced(folder: Path, toy: bool) -> list[Configuration]:
    """All configurations; a file is made of each that has none, so that the table has its row."""
    every = [*configurations(TOY if toy else QUARTER), *commands(toy)]
    for order, one in enumerate(every):
        if not (path := folder / f"{one.name}.json").exists():
            records.write(path, {"configuration": {"order": order, "title": one.title}, "runs": []})
    return every


def _stop(*_) -> None:
    raise OutOfTime


def measured(one: Configuration, order: int, folder: Path) -> bool:
    """Add this run's rounds to the configuration's file, one by one; false where it ended with an error."""
    path = folder / f"{one.name}.json"
    record, key = records.read(path), source_key("dense_rlhf.runner.train", "dense_rlhf.runner.timing")
    mine = {"card": card(), "code": key}
    earlier = [run for run in record["runs"] if not mine.items() <= run.items() or run["complete"]]
    if any(mine.items() <= run.items() for run in earlier):
        say("known", name=one.name)
        return True
    about = {name: value for name, value in provenance().items() if name in ("commit", "python", "versions", "gpu")}
    run = mine | about | {"complete": False, "rounds": []}
    record |= {"configuration": {"order": order, "title": one.title}, "runs": [*earlier, run]}
    try:
        counted, measure = one.start()
        record["configuration"] |= counted | {"peak_flops": timing.vendor_peak(card())}
        for n in range(one.rounds + 1):
            made = measure()
            say("round", name=one.name, n=n, **{step: pair[0] for step, pair in made.items()})
            if n == 0:
                run["first"] = made  # with what is made once: graphs, kernels, an optimiser's state
            if n or not one.rounds:
                run["rounds"].append(made)
                run["figures"] = records.figures(record["configuration"], run["rounds"])
            run["complete"] = n == one.rounds
            records.write(path, record)
    except Exception as error:  # whatever it is, the next configuration is worth its time
        run["error"] = f"{type(error).__name__}: {error}"[:2000]
        records.write(path, record)
        say("failed", name=one.name, error=run["error"])
        return False
    finally:
        measure = None
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
    return True


def say(what: str, **more) -> None:
    print(json.dumps({"quarter": what} | more), flush=True)
