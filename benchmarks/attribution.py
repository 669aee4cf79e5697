"""Explaining a batch of responses: ours, shap, lime and captum in one run. One JSON object a line.

    python benchmarks/attribution.py [--quick] [--model reviews|smollm2|both] > benchmarks/attribution.jsonl
    python benchmarks/attribution.py --memory      peak memory of 512 prompts of 96 tokens with responses of 256

Real reviews, cut into a prompt and a response. Every peer gets the same value function: a coalition is a text of its
own, tokens dropped, sorted by length and batched within the same token budget; the peer decides which coalitions to
score, and how many at once. Measured, with ratio = peer / ours (above 1 is in our favour):

    equal    seconds a response for the same coalitions, whose values agree
    default  seconds a response to a mean rank correlation of 0.9 with large-budget Shapley values, ours at its cheapest
             design that reaches it, the peer at its defaults, whose correlation is `rho`
    best     the same, the peer at its cheapest budget that reaches it; ratio null where none does
    peak     our floating-point operations a second as a share of the machine's matrix product (`ratio`)
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from scipy.stats import spearmanr
from torch.utils.flop_counter import FlopCounterMode

from dense_rlhf.attribution import attribute, coalitions
from dense_rlhf.attribution.coalitions import Design
from dense_rlhf.attribution.engine import coalition_scores
from dense_rlhf.attribution.parity import lime_values, plain_scores, shap_values
from dense_rlhf.config.params import AttributionParams, DataParams, PolicyParams, RewardParams
from dense_rlhf.data import load_data
from dense_rlhf.models.language_models import load_policy
from dense_rlhf.models.reward_model import RewardModel
from dense_rlhf.models.train_reward_model import load_reward_model
from dense_rlhf.runs import provenance
from dense_rlhf.types import Reading, Rollout

Peer = Callable[[Callable, int, int], np.ndarray]  # value function, players, budget -> values
SEED = 0

# ---------------------------------------------------------------------------------------------------- peers


def balanced_tree(k: int) -> np.ndarray:
    """scipy's form of a balanced tree over k leaves, cut as `coalitions.owen` cuts."""
    rows = []

    def build(start: int, n: int) -> tuple[int, int]:
        if n == 1:
            return start, 1
        (left, a), (right, b) = build(start, n // 2), build(start + n // 2, n - n // 2)
        rows.append([left, right, float(a + b), float(a + b)])
        return k + len(rows) - 1, a + b

    build(0, k)
    return np.array(rows)


def shap_partition(scores: Callable, k: int, evaluations: int) -> np.ndarray:
    import shap

    masker = shap.maskers.Partition(np.zeros((1, k)), clustering=balanced_tree(k))
    explainer = shap.PartitionExplainer(scores, masker)
    return explainer(np.ones((1, k)), max_evals=evaluations, silent=True).values[0]


def shap_kernel(scores: Callable, k: int, samples: int) -> np.ndarray:
    import shap

    np.random.seed(SEED)
    explainer = shap.KernelExplainer(scores, np.zeros((1, k)))
    return explainer.shap_values(np.ones((1, k)), nsamples=samples, l1_reg=False, silent=True)[0]


def captum_sampling(scores: Callable, k: int, permutations: int) -> np.ndarray:
    from captum.attr import ShapleyValueSampling

    torch.manual_seed(SEED)
    method = ShapleyValueSampling(lambda bits: torch.from_numpy(scores(bits.numpy())))
    return method.attribute(torch.ones(1, k), n_samples=permutations)[0].numpy()


def captum_design(k: int, permutations: int) -> Design:
    """The coalitions and the sums of captum's ShapleyValueSampling: every permutation once, forwards."""
    torch.manual_seed(SEED)
    masks, operator = [], np.zeros((k, permutations * (k + 1)))
    for p in range(permutations):
        order, keep = torch.randperm(k).tolist(), np.zeros(k, bool)
        masks.append(keep.copy())
        for n, player in enumerate(order):
            keep[player] = True
            masks.append(keep.copy())
            operator[player, p * (k + 1) + n : p * (k + 1) + n + 2] += np.array([-1, 1]) / permutations
    return coalitions.merged_design(np.array(masks), operator)


PEERS: dict[str, tuple[Peer, Callable[[int, int], Design], int, tuple[int, ...]]] = {
    # peer, the same coalitions with us, its default budget for 24 players, budgets to try
    "shap permutation": (
        partial(shap_values, seed=SEED),
        lambda k, b: coalitions.permutation_shap(k, b, SEED),
        10,
        (1, 2, 4),
    ),
    "shap partition": (shap_partition, lambda k, b: coalitions.owen(k), 500, (100, 200, 10**6)),
    "shap kernel": (shap_kernel, lambda k, b: coalitions.kernel_shap(k, b, SEED), 2096, (96, 192, 384, 768)),
    "lime": (
        partial(lime_values, seed=SEED),
        lambda k, b: coalitions.ridge_lime(k, b, SEED),
        5000,
        (50, 100, 200, 500, 1000),
    ),
    "captum sampling": (captum_sampling, captum_design, 25, (1, 2, 4, 8)),
}
EQUAL = {"shap permutation": 1, "shap partition": 10**6, "shap kernel": 192, "lime": 200, "captum sampling": 2}
OURS = {
    f"shap, {p} permutation{'s' * (p > 1)}": lambda k, p=p: coalitions.permutation_shap(k, p, SEED)
    for p in (1, 2, 3, 4, 8)
}
OURS |= {f"leverage, {n} k": lambda k, n=n: coalitions.leverage_shap(k, n * k, SEED) for n in (4, 8)}
REFERENCE_PERMUTATIONS, WANTED_RHO = 100, 0.9

# ---------------------------------------------------------------------------------------------------- measuring


def seconds(work: Callable, *arguments) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def timed(repeats: int, work: Callable, *arguments) -> tuple[float, np.ndarray]:
    """Median seconds, and the last result."""
    results = []
    taken = [seconds(lambda: results.append(work(*arguments))) for _ in range(repeats)]
    return statistics.median(taken), results[-1]


def line(measure: str, case: str, peer: str, ours: float, theirs: float | None, **more) -> None:
    head = dict(benchmark=f"attribution/{measure}", case=case, peer=peer)
    ratio = more.pop("ratio", theirs and theirs / ours)
    body = dict(ratio=ratio and round(ratio, 2), unit="s", repeats=more.pop("repeats"))
    print(json.dumps(head | body | dict(ours=round(ours, 6), theirs=theirs and round(theirs, 6)) | more), flush=True)


def explain(reward_model: RewardModel, readings: list[Reading], design: Design) -> np.ndarray:
    """Our values (B, k)."""
    scores = coalition_scores(reward_model, readings, [design.masks.numpy()] * len(readings))
    return (torch.stack(scores).double() @ design.operator.T).numpy()


def explain_by(peer: Peer, reward_model: RewardModel, readings: list[Reading], k: int, budget: int) -> np.ndarray:
    return np.stack([peer(plain_scores(reward_model, reading), k, budget) for reading in readings])


def equal(reward_model: RewardModel, readings: list[Reading], case: str, few: int, repeats: int, peers: dict) -> None:
    """Seconds a response at equal coalitions; stops where the values differ."""
    k = len(readings[0].response)
    for name, budget in peers.items():
        peer, design, *_ = PEERS[name]
        ours = (explain, reward_model, readings, design(k, budget))
        theirs = (explain_by, peer, reward_model, readings[:few], k, budget)
        values = [side[0](*side[1:]) for side in (ours, theirs)]
        apart = float(np.abs(values[0][:few] - values[1]).max() / np.abs(values[1]).max())
        if not apart < 1e-3:
            raise SystemExit(f"{case}, {name}: values differ by {apart:.1e} of the largest")
        pairs = [(seconds(*ours) / len(readings), seconds(*theirs) / few) for _ in range(repeats)]
        own, other = (statistics.median(column) for column in zip(*pairs))
        ratio, coalitions = statistics.median(b / a for a, b in pairs), len(ours[-1].masks)
        line("equal", case, name, own, other, ratio=ratio, repeats=repeats, coalitions=coalitions, apart=apart)


def agreement(values: np.ndarray, reference: np.ndarray) -> float:
    """Mean over responses of Spearman's rank correlation."""
    return float(np.mean([spearmanr(a, b).statistic for a, b in zip(values, reference)]))


def cheapest_of_ours(reward_model, readings, reference, repeats: int) -> tuple[str, float, float]:
    """Our fastest design that agrees: its name, seconds a response, rank correlation."""
    k, enough = len(readings[0].response), []
    for name, design in OURS.items():
        taken, values = timed(repeats, explain, reward_model, readings, design(k))
        if (rho := agreement(values, reference)) >= WANTED_RHO:
            enough.append((taken / len(readings), name, rho))
    taken, name, rho = min(enough)
    return name, taken, rho


def to_agree(reward_model: RewardModel, readings: list[Reading], case: str, few: int, repeats: int) -> None:
    """Seconds a response until the values rank tokens like large-budget Shapley values."""
    k = len(readings[0].response)
    reference = explain(reward_model, readings, coalitions.permutation_shap(k, REFERENCE_PERMUTATIONS, SEED + 1))
    ours, own, own_rho = cheapest_of_ours(reward_model, readings, reference, repeats)
    more = dict(repeats=repeats, our_design=ours, our_rho=round(own_rho, 3))
    for name, (peer, _, default, budgets) in PEERS.items():
        tried = {}  # budget -> seconds a response, rank correlation
        for budget in (*budgets, default):
            taken, values = timed(repeats, explain_by, peer, reward_model, readings[:few], k, budget)
            tried[budget] = taken / few, agreement(values, reference[:few])
        taken, rho = tried[default]
        line("default", case, name, own, taken, rho=round(rho, 3), budget=default, **more)
        enough = [(taken, budget, rho) for budget, (taken, rho) in tried.items() if rho >= WANTED_RHO]
        taken, budget, rho = min(enough, default=(None, None, max(rho for _, rho in tried.values())))
        line("best", case, name, own, taken, rho=round(rho, 3), budget=budget, **more)


def peak(reward_model: RewardModel, readings: list[Reading], case: str, repeats: int) -> None:
    """Our operations a second as a share of the machine's matrix product."""
    k, n = len(readings[0].response), 1536
    design, square = coalitions.permutation_shap(k, 1, SEED), torch.randn(n, n)
    with FlopCounterMode(display=False) as counter:
        explain(reward_model, readings, design)
    own, _ = timed(repeats, explain, reward_model, readings, design)
    product, _ = timed(9, torch.matmul, square, square)
    ours, most = counter.get_total_flops() / own, 2 * n**3 / product
    speeds = dict(gflops=round(ours / 1e9, 1), peak_gflops=round(most / 1e9, 1))
    line("peak", case, "matrix product", own / len(readings), product, ratio=ours / most, repeats=repeats, **speeds)


# ---------------------------------------------------------------------------------------------------- cases


def cut_reviews(P: int, T: int, number: int, tokenizer) -> list[Reading]:
    """Real reviews of at least P + T tokens, cut there."""
    texts = (example.text for example in load_data(DataParams()).gold)
    encoded = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    long = (ids for ids in encoded if len(ids) >= P + T)
    return [Reading(tuple(ids[:P]), tuple(ids[P : P + T])) for ids, _ in zip(long, range(number))]


def proxy() -> RewardModel:
    data, policy = load_data(DataParams()), load_policy(PolicyParams())
    return load_reward_model(data.reward, policy.tokenizer, RewardParams(), data.revision)


def smollm2() -> RewardModel:
    """SmolLM2-135M as a classifier with an untrained head: its speed is that of any reward model of its size."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    policy = load_policy(PolicyParams(name="smollm2"))
    config = AutoConfig.for_model(**policy.model.config.to_dict() | {"num_labels": 1})
    torch.manual_seed(SEED)
    model = AutoModelForSequenceClassification.from_config(config)
    model.base_model.load_state_dict(policy.model.base_model.state_dict())
    return RewardModel(model.float().eval(), policy.tokenizer)


def cases(model: str, quick: bool) -> Iterator[tuple[int, int, int, int, int, dict]]:
    """prompt, response, batch, responses of a peer, repeats, peers."""
    if quick:
        yield 24, 24, 64, 2, 3, EQUAL
    elif model == "smollm2":
        for P in (6, 24, 96):
            yield P, 24, 4, 1, 3, {"shap permutation": 1}
    else:
        for T, batch, few in ((24, 64, 8), (64, 64, 4), (256, 16, 1)):
            peers = EQUAL if T == 24 else EQUAL | {"shap kernel": 8 * T, "lime": 500}
            peers = {name: budget for name, budget in peers.items() if T < 256 or name != "shap partition"}
            for P in (6, 24, 96):
                yield P, T, batch, few, 5 if T == 24 else 3, peers


def memory(reward_model: RewardModel) -> None:
    """Explain 512 responses of 256 tokens at the default budget: seconds, and the most memory this process has held."""
    rng, B, P, T = np.random.default_rng(SEED), 512, 96, 256
    queries, responses = (torch.from_numpy(rng.integers(2, len(reward_model.tokenizer), (B, n))) for n in (P, T))
    real, mask = (torch.ones(B, n, dtype=torch.bool) for n in (P, T))
    rollout = Rollout(queries, real, responses, mask, torch.zeros(B), ~mask[:, 0], *torch.zeros(3, B, T))
    taken = seconds(attribute, reward_model, rollout, ["shap"], AttributionParams())
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    head = dict(benchmark="attribution/memory", case="reviews, prompt 96, response 256, batch 512", unit="GiB")
    print(json.dumps(head | dict(ours=round(most, 2), seconds=round(taken, 1))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="end within a minute")
    parser.add_argument("--model", choices=("reviews", "smollm2", "both"), default="both")
    parser.add_argument("--memory", action="store_true", help="measure memory only")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.memory:
        return memory(proxy())
    print(json.dumps({"benchmark": "attribution/run", "threads": torch.get_num_threads(), **provenance()}), flush=True)
    names = ("reviews",) if arguments.quick else ("reviews", "smollm2")
    for name in [n for n in names if arguments.model in (n, "both")]:
        reward_model = proxy() if name == "reviews" else smollm2()
        for P, T, batch, few, repeats, peers in cases(name, arguments.quick):
            readings = cut_reviews(P, T, batch, reward_model.tokenizer)
            case = f"{name}, prompt {P}, response {T}, batch {len(readings)}"
            equal(reward_model, readings, case, few, repeats, peers)
            if name == "reviews" and T == 24 and not arguments.quick:
                to_agree(reward_model, readings, case, few, 3)
            peak(reward_model, readings, case, repeats)


if __name__ == "__main__":
    main()
