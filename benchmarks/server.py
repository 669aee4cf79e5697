"""The token-reward server next to direct calls of `dense_rewards`, in turns. One JSON object a line.

    OMP_NUM_THREADS=1 python benchmarks/server.py [--quick] > benchmarks/server.jsonl

throughput  seconds for the same number of responses, none known from before; ratio = direct / server
latency     ms of a request with one response, by how many clients ask at once
memory      MiB of the server's process, before and after requests that are as large as may be

The model has the default study's size and random weights, and its rewards are signed Shapley values.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import torch

from dense_rlhf.adapters import Scorer, dense_rewards
from dense_rlhf.adapters.client import RewardClient
from dense_rlhf.config.params import PolicyParams, RewardParams
from dense_rlhf.models.language_models import load_policy
from dense_rlhf.models.train_reward_model import fresh_classifier
from dense_rlhf.runs import provenance
from dense_rlhf.types import RewardShape

SHAPE = RewardShape(("shap",), (1.0,), "signed")
PROMPT, RESPONSE, BATCH = 6, 24, 64  # tokens, tokens, responses
draw = np.random.default_rng(0)


def line(measure: str, case: str, **more) -> None:
    rounded = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in more.items()}
    print(json.dumps({"benchmark": f"server/{measure}", "case": case} | rounded), flush=True)


def fresh(n: int, length: int = RESPONSE) -> tuple[np.ndarray, np.ndarray]:
    """Prompts and responses of random tokens, which nobody asked for before."""
    return draw.integers(5, 4000, (n, PROMPT)), draw.integers(5, 4000, (n, length))


@contextmanager
def serving(folder: Path):
    """The command in a process of its own: its client, and the process."""
    shape = ["--shape", "shap", "--normalise", "signed", "--port", "0"]
    command = [sys.executable, "-m", "dense_rlhf", "serve-rewards", str(folder), *shape]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield RewardClient(process.stdout.readline().split(" at ")[1].split()[0]), psutil.Process(process.pid)
    finally:
        process.terminate()
        assert process.wait() == 0


def throughput(direct: Scorer, client: RewardClient, repeats: int) -> None:
    """A batch by one client, and one response by each of as many clients."""
    with ThreadPoolExecutor(BATCH) as pool:

        def each(prompts, responses):
            return list(pool.map(lambda row: client([row[0]], [row[1]])[0], zip(prompts, responses)))

        for case, ask in (("1 client, batch 64", client), ("64 clients, batch 1", each)):
            taken, apart = [], 0.0
            for n in range(repeats + 1):
                request, seconds = fresh(BATCH), {}
                for act in (ask, direct_call(direct)) if n % 2 else (direct_call(direct), ask):
                    start = time.perf_counter()
                    rewards = act(*request)
                    seconds[act is ask] = time.perf_counter() - start, rewards
                apart = max(apart, max(np.abs(a - b).max() for a, b in zip(seconds[True][1], seconds[False][1])))
                taken.append((seconds[True][0], seconds[False][0]))
            ours, theirs = zip(*taken[1:])  # the first is a warm-up
            ratio = statistics.median(b / a for a, b in taken[1:])
            medians = {"ours": statistics.median(ours), "theirs": statistics.median(theirs)}
            line(
                "throughput",
                case,
                peer="direct, batch 64",
                ratio=ratio,
                unit="s",
                repeats=repeats,
                **medians,
                apart=float(apart),
            )


def direct_call(scorer: Scorer):
    return lambda prompts, responses: dense_rewards(scorer, prompts, responses, SHAPE)


def latency(client: RewardClient, requests: int) -> None:
    for clients in (1, 8, 64):

        def ask(row):
            start = time.perf_counter()
            client([row[0]], [row[1]])
            return 1e3 * (time.perf_counter() - start)

        with ThreadPoolExecutor(clients) as pool:
            rows = list(zip(*fresh(max(requests, 4 * clients))))
            started = time.perf_counter()
            ms = np.array(list(pool.map(ask, rows)))
            seconds = time.perf_counter() - started
        p50, p99 = np.percentile(ms, [50, 99])
        each = {"requests": len(ms), "responses_a_second": len(ms) / seconds}
        line("latency", f"{clients} clients", unit="ms", p50=float(p50), p99=float(p99), **each)


def memory(client: RewardClient, process: psutil.Process, rounds: int) -> None:
    """Many clients at once, each with as many responses as a request may have; most are told to come back."""
    mib = [process.memory_info().rss / 2**20]
    with ThreadPoolExecutor(16) as pool:
        for _ in range(rounds):
            list(pool.map(lambda request: client(*request), [fresh(1024, 4) for _ in range(16)]))
            mib.append(process.memory_info().rss / 2**20)
    line(
        "memory",
        "16 clients, 1024 responses each",
        unit="MiB",
        before=mib[0],
        after_each_round=[round(x) for x in mib[1:]],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repeats, within a minute")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    tokenizer = load_policy(PolicyParams()).tokenizer
    model = fresh_classifier(RewardParams(), tokenizer).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:  # fresh weights hardly read their input
                p.normal_(0, 0.15)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        with serving(Path(folder)) as (client, process):
            print(
                json.dumps({"benchmark": "server/run", "threads": torch.get_num_threads()} | provenance()), flush=True
            )
            throughput(Scorer(model, tokenizer), client, 2 if quick else 15)
            latency(client, 20 if quick else 400)
            memory(client, process, 1 if quick else 5)


if __name__ == "__main__":
    main()
