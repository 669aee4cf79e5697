"""The token-reward server next to direct calls of `dense_rewards`, in turns. One JSON object a line.

    OMP_NUM_THREADS=1 python benchmarks/server.py [--quick] > benchmarks/server.jsonl

throughput  seconds for 64 responses that were not known from before; ratio = direct / server, by the clock and in CPU
            seconds of both processes
latency     ms of a request with one response, by how many clients ask at once
memory      MiB of the server's process, before and after requests that are as large as may be

The model has the default study's size and random weights, and its rewards are signed Shapley values.
"""

from __future__ import annotations

import argparse
import json
import os
import re
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


def throughput(direct: Scorer, client: RewardClient, process: psutil.Process, repeats: int) -> None:
    """A batch by one client, and one response by each of as many clients."""
    with ThreadPoolExecutor(BATCH) as pool:

        def each(prompts, responses):
            return list(pool.map(lambda row: client([row[0]], [row[1]])[0], zip(prompts, responses)))

        def own(prompts, responses):
            return dense_rewards(direct, prompts, responses, SHAPE)

        for case, ask in (("1 client, batch 64", client), ("64 clients, batch 1", each)):
            rounds, batches = [], batches_of(client)
            for n in range(repeats + 1):
                request = fresh(BATCH)
                taken = {act: clocked(act, request, process) for act in ((ask, own) if n % 2 else (own, ask))}
                rounds.append((taken[ask], taken[own]))
            rounds = rounds[1:]  # the first is a warm-up
            ours, theirs = (statistics.median(pair[k][0] for pair in rounds) for k in (0, 1))
            line(
                "throughput",
                case,
                peer="direct, batch 64",
                ratio=statistics.median(b[0] / a[0] for a, b in rounds),
                unit="s",
                repeats=repeats,
                ours=ours,
                theirs=theirs,
                cpu_ratio=statistics.median(b[1] / a[1] for a, b in rounds),
                responses_a_batch=BATCH * (repeats + 1) / (batches_of(client) - batches),
                apart=max(float(np.abs(x - y).max()) for a, b in rounds for x, y in zip(a[2], b[2])),
            )


def clocked(act, request, process: psutil.Process) -> tuple[float, float, list[np.ndarray]]:
    """Seconds by the clock, CPU seconds of this process and the server's, and the rewards."""

    def cpu() -> float:
        return time.process_time() + sum(process.cpu_times()[:2])

    start, spent = time.perf_counter(), cpu()
    rewards = act(*request)
    return time.perf_counter() - start, cpu() - spent, rewards


def batches_of(client: RewardClient) -> float:
    return float(re.search(r"^dense_rlhf_batches_total (.+)$", client._send("GET", "/metrics").decode(), re.M)[1])


def latency(client: RewardClient, clients: int, requests: int) -> None:
    def ask(row):
        start = time.perf_counter()
        client([row[0]], [row[1]])
        return 1e3 * (time.perf_counter() - start)

    rows, started = list(zip(*fresh(requests))), time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        ms = list(pool.map(ask, rows))
    rate = requests / (time.perf_counter() - started)
    p50, p99 = map(float, np.percentile(ms, [50, 99]))
    case = f"{clients} client{'s' * (clients > 1)}"
    line("latency", case, unit="ms", p50=p50, p99=p99, requests=requests, responses_a_second=rate)


def memory(client: RewardClient, process: psutil.Process, responses: int, rounds: int) -> None:
    """Clients that ask at once for more than may wait, so that some are told to come back."""
    mib = [process.memory_info().rss / 2**20]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(rounds):
            list(pool.map(lambda request: client(*request), [fresh(responses, 2) for _ in range(8)]))
            mib.append(process.memory_info().rss / 2**20)
    first, *after = map(round, mib)
    line("memory", f"8 clients, {responses} responses each", unit="MiB", before=first, after_each_round=after)


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
            load = round(os.getloadavg()[0], 1)  # of this machine, by others too
            about = {"benchmark": "server/run", "threads": torch.get_num_threads(), "load": load} | provenance()
            print(json.dumps(about), flush=True)
            throughput(Scorer(model, tokenizer), client, process, 2 if quick else 9)
            for clients, requests in ((1, 60), (8, 240), (64, 640)):
                latency(client, clients, requests // 6 if quick else requests)
            memory(client, process, 128 if quick else 1024, 1 if quick else 3)


if __name__ == "__main__":
    main()
