"""On a GPU: the numbers of the CPU, seconds and memory. One JSON object a line; exit code 1 where numbers differ.

    python benchmarks/gpu.py [--quick] [--only parity|explain|update|sampler] > benchmarks/gpu.jsonl
    python benchmarks/gpu.py --quarter [--minutes 14] [--to benchmarks/gpu]    a file a configuration: see quarter.py
    python benchmarks/gpu.py --quarter --toy                                   all of that at a toy size, anywhere

    parity   what float32 on the CPU computes of the same responses with the same weights: `apart` is the largest
             difference over the largest number (of weights: the norm of the difference over that of the change)
    explain  seconds a response for the same coalitions; ratio = peer / ours, as in benchmarks/attribution.py
    update   seconds and most GiB of each step of an update, next to what dense_rlhf/runner/cost.py computes
    sampler  seconds of transformers' own loop, compiled on a GPU, next to ours

All but parity has models of random weights: speed and memory do not depend on them. Where there is no GPU all runs on
the CPU; parity then says nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from card import (
    DEVICE,
    PAD,
    clocked,
    line,
    one_update,
    random_model,
    random_queries,
    random_readings,
    random_scorer,
    run_params,
    training,
)
from gpu_records import FOLDER
from torch import Tensor
from transformers import AutoModelForCausalLM

from dense_rlhf import ppo
from dense_rlhf.attribution import attribute
from dense_rlhf.attribution.coalitions import permutation_shap
from dense_rlhf.attribution.engine import coalition_scores
from dense_rlhf.attribution.parity import plain_scores, shap_values
from dense_rlhf.config.params import AttributionParams, PolicyParams, PPOParams, RewardParams
from dense_rlhf.models.language_models import load_policy
from dense_rlhf.models.policy import PolicyWithValue, trainable_copy
from dense_rlhf.models.reward_model import RewardModel
from dense_rlhf.models.train_reward_model import fresh_classifier
from dense_rlhf.ppo.checkpoint import learner_state, load_checkpoint, restore, save_checkpoint, save_policy
from dense_rlhf.ppo.rollout import appraise, scored
from dense_rlhf.ppo.sampling import SAMPLERS, Sampling, sample_responses
from dense_rlhf.runner import cost, timing
from dense_rlhf.runs import provenance
from dense_rlhf.shaping.rewards import shape_rewards
from dense_rlhf.types import InputError, RewardShape, Rollout

failed: list[str] = []


# ---------------------------------------------------------------------------------------------------- parity

PROMPTS = ["The film", "A plot that", "I loved the music of", "What a", "The cast", "Bad", "It is", "This story of"]
PPO, EXPLAIN = PPOParams(updates=4, rollouts=64, micro_batch=16), AttributionParams(permutations=2)
EXACT = (
    "shap",
    "owen",
    "kernel",
    "leverage",
    "lime",
    "leave_one_out",
    "prefix",
    "attention",
    "gradient_input",
    "integrated_gradients",
)
LEARNERS = {
    "all weights": {},
    "LoRA": {"lora_rank": 8},
    "last 2 layers": {"trainable_layers": 2},
    "separate critic": {"critic": "separate"},
    "detached critic": {"critic": "detached"},
}
CLOSE = 1e-4  # of float32, sums in another order


class Side:
    """The shipped policy, and a random reward model, on one device."""

    def __init__(self, device: torch.device | str, dtype: str = "float32", trainable_layers: int | None = None):
        loaded, self.device = load_policy(PolicyParams(dtype=dtype)), device
        self.tokenizer, draw = loaded.tokenizer, torch.Generator().manual_seed(0)
        reference = PolicyWithValue(loaded.model, trainable_layers, bf16=dtype == "bfloat16")
        classifier = fresh_classifier(RewardParams(), self.tokenizer).eval()
        with torch.no_grad():
            reference.value_head.weight.normal_(0, 0.1, generator=draw)
            for p in classifier.parameters():
                if p.dim() == 2:  # fresh weights hardly read their input
                    p.normal_(0, 0.15, generator=draw)
        self.reference = reference.requires_grad_(False).to(device)
        self.reward_model = RewardModel(classifier.to(device, getattr(torch, dtype)), self.tokenizer)

    def roll(self, seed: int = 0) -> Rollout:
        generator = torch.Generator().manual_seed(seed)
        prompts = PROMPTS * (PPO.rollouts // len(PROMPTS))
        responses = sample_responses(self.reference, prompts, self.tokenizer, PPO, generator)
        return appraise(self.reference, self.reference, scored(responses, self.reward_model), 1.0)

    def learner(self, start: dict[str, Tensor] | None = None, **policy) -> ppo.Learner:
        torch.manual_seed(0)
        made = trainable_copy(self.reference, PolicyParams(**policy), self.reward_model)
        made.load_state_dict(start or made.state_dict())  # adapters start at random, and each device draws its own
        return ppo.make_learner(made, PPO, seed=0)


def moved(rollout: Rollout, device: torch.device | str) -> Rollout:
    return replace(rollout, **{name: x.to(device) for name, x in rollout.tensors().items()})


def compare(case: str, wanted: Tensor, found: Tensor, most: float = CLOSE) -> None:
    judge(case, float((found.double().cpu() - wanted.double().cpu()).abs().max() / wanted.abs().max()), most)


def judge(case: str, apart: float, most: float, **more) -> None:
    """A line, and a failure where `apart` is above `most` or no number."""
    failed.extend([case] * (not apart <= most))
    line("parity", case, peer="float32, CPU", apart=apart, most=most, ok=apart <= most, **more)


def parity() -> None:
    cpu, gpu = Side("cpu"), Side(DEVICE)
    here, there = cpu.roll(), gpu.roll()
    judge("sampled tokens that differ", (here.responses != there.responses.cpu()).double().mean().item(), 0.05)
    carried = moved(here, DEVICE)
    again = appraise(gpu.reference, gpu.reference, carried, 1.0)
    compare("log-probabilities", here.logprobs, again.logprobs)
    compare("values", here.values, again.values)
    compare("scores", here.scores, gpu.reward_model.score(gpu.reward_model.readings(carried)))
    by = [attribute(side.reward_model, rollout, EXACT, EXPLAIN) for side, rollout in ((cpu, here), (gpu, carried))]
    for source, found in by[0].items():
        compare(f"credit of {source}", found.credit, by[1][source].credit, 10 * CLOSE)
    for kind in ("signed", "softmax"):
        shape = RewardShape(("shap", "lime"), (0.7, 0.3), kind)
        compare(f"rewards, {kind}", shape_rewards(here, by[0], shape), shape_rewards(carried, by[1], shape), 10 * CLOSE)
    rewards = shape_rewards(here, by[0], RewardShape(("shap",), (1.0,), "signed"))
    for name, policy in LEARNERS.items():
        update_parity(name, policy, here, rewards)
    checkpoints(cpu, gpu, here, rewards)
    same_again(gpu, carried, rewards.to(DEVICE))
    low_precision(here)
    if DEVICE.type == "cuda":
        memory_errors(gpu, carried, rewards.to(DEVICE))


def learned(learner: ppo.Learner) -> Tensor:
    return torch.cat([p.detach().double().cpu().flatten() for p in learner.policy.parameters() if p.requires_grad])


def improve(learner: ppo.Learner, side: Side, rollout: Rollout, rewards: Tensor) -> dict[str, float]:
    read = appraise(learner.policy, side.reference, moved(rollout, side.device), 1.0, PPO.micro_batch)
    return ppo.update(learner, read, ppo.token_rewards(read, rewards.to(side.device), PPO), PPO)


def update_parity(name: str, policy: dict, rollout: Rollout, rewards: Tensor) -> None:
    """One update on either device from the same weights: its metrics, and by how much the weights differ."""
    sides = [Side(device, trainable_layers=policy.get("trainable_layers")) for device in ("cpu", DEVICE)]
    learners = [sides[0].learner(**policy)]
    learners.append(sides[1].learner(learners[0].policy.state_dict(), **policy))
    before = learned(learners[0])
    logs = [improve(*both, rollout, rewards) for both in zip(learners, sides)]
    compare(f"metrics of an update, {name}", *(torch.tensor(list(log.values())) for log in logs), most=1e-3)
    change, other = (learned(learner) - before for learner in learners)
    judge(f"weights after an update, {name}", ((change - other).norm() / change.norm()).item(), 0.02)


def checkpoints(cpu: Side, gpu: Side, rollout: Rollout, rewards: Tensor) -> None:
    """A checkpoint of the GPU resumes there bit for bit, and on the CPU nearly so; its policy loads on the CPU."""
    original = gpu.learner()
    improve(original, gpu, rollout, rewards)
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), 1, *learner_state(original))
        resumed = {"GPU": gpu.learner(), "CPU": cpu.learner()}
        for learner, side in zip(resumed.values(), (gpu, cpu)):
            restore(learner, *load_checkpoint(Path(folder)))
            improve(learner, side, rollout, rewards)
    start, _ = learned(original), improve(original, gpu, rollout, rewards)
    for name, most in (("GPU", 0.0), ("CPU", 0.02)):
        apart = (learned(resumed[name]) - learned(original)).norm() / (learned(original) - start).norm()
        judge(f"update after a checkpoint of the GPU, on the {name}", apart.item(), most)
    with tempfile.TemporaryDirectory() as folder:
        save_policy(original.policy, gpu.tokenizer, Path(folder))
        read = AutoModelForCausalLM.from_pretrained(folder)
    weights = (torch.cat([p.detach().cpu().flatten() for p in lm.parameters()]) for lm in (original.policy.lm, read))
    compare("weights of a saved policy, read on the CPU", *weights, most=0.0)


def same_again(gpu: Side, rollout: Rollout, rewards: Tensor) -> None:
    """The same seed twice on one device: bits."""
    judge("responses, the same seed again", float((gpu.roll().responses != gpu.roll().responses).sum()), 0.0)
    first, again = (attribute(gpu.reward_model, rollout, ["shap"], EXPLAIN)["shap"].credit for _ in range(2))
    judge("credit, the same responses again", (first - again).abs().max().item(), 0.0)
    ends = []
    for _ in range(2):
        learner = gpu.learner()
        for _ in range(3):
            improve(learner, gpu, rollout, rewards)
        ends.append(learned(learner))
    judge("weights after three updates, the same seed again", (ends[0] - ends[1]).abs().max().item(), 0.0)


def low_precision(rollout: Rollout) -> None:
    """bfloat16 on the GPU: nats a token and standard deviations of the score away from float32."""
    gpu, carried = Side(DEVICE, "bfloat16"), moved(rollout, DEVICE)
    read = appraise(gpu.reference, gpu.reference, carried, 1.0)
    off = (read.logprobs.cpu() - rollout.logprobs)[rollout.mask].abs()
    judge("log-probabilities in bfloat16, mean nats a token", off.mean().item(), 0.05, largest=off.max().item())
    scores = gpu.reward_model.score(gpu.reward_model.readings(carried)).cpu()
    judge("scores in bfloat16, sd", ((scores - rollout.scores).std() / rollout.scores.std()).item(), 0.1)


def memory_errors(gpu: Side, rollout: Rollout, rewards: Tensor) -> None:
    """Too little memory ends in one line that names what to lower; with less of that it goes through."""
    learner, wide = gpu.learner(), replace(PPO, micro_batch=64, minibatch=64)
    torch.cuda.empty_cache()
    most = torch.cuda.memory_reserved() + 2**27
    torch.cuda.set_per_process_memory_fraction(most / torch.cuda.get_device_properties(0).total_memory)
    greedy, modest = (replace(gpu.reward_model, token_budget=number) for number in (2**22, 2**12))
    many = replace(EXPLAIN, permutations=8)
    for name, act in (
        ("reward.token_budget", lambda: attribute(greedy, rollout, ["shap"], many)),
        ("ppo.micro_batch", lambda: ppo.update(learner, rollout, rewards, wide)),
    ):
        try:
            act()
            said = "no error"
        except InputError as error:
            said = str(error)
        torch.cuda.empty_cache()
        judge(f"memory runs out: {name} is named", float(name not in said), 0.0, said=said)
    attribute(modest, rollout, ["shap"], many)  # raises where it does not
    torch.cuda.set_per_process_memory_fraction(1.0)


# ---------------------------------------------------------------------------------------------------- explain


def explain(shape: str, B: int, few: int, P: int, T: int, repeats: int) -> None:
    """One antithetic permutation of T tokens: ours for B responses, peers for `few` of them."""
    reward_model, readings = random_scorer(shape), random_readings(shape, B, P, T)
    masks = permutation_shap(T, 1, 0).masks.numpy()
    rows = [
        [*one.prompt, *(t for t, keep in zip(one.response, mask) if keep)] for one in readings[:few] for mask in masks
    ]
    sides = {
        "ours": (B, lambda: torch.cat(coalition_scores(reward_model, readings, [masks] * B))),
        "each coalition a text, all in one batch": (few, lambda: reward_model.calibrate(reward_model.outputs(rows))),
        "shap permutation": (1, lambda: shap_values(plain_scores(reward_model, readings[0]), T, 1, 0)),
    }
    found = {}
    for name, (number, act) in sides.items():
        scores = act()  # warm
        taken = [clocked(act)[:2] for _ in range(repeats)]
        found[name] = statistics.median(t for t, _ in taken) / number, max(most for _, most in taken), scores
    own, gib, scores = found.pop("ours")
    plain = found["each coalition a text, all in one batch"][2]
    apart = float((scores[: len(plain)] - plain).std() / plain.std())
    for name, (taken, most, _) in found.items():
        line(
            "explain",
            f"{shape}, prompt {P}, response {T}, batch {B}",
            peer=name,
            ratio=taken / own,
            unit="s",
            repeats=repeats,
            ours=own,
            theirs=taken,
            ours_gib=gib,
            theirs_gib=most,
            coalitions=len(masks),
            apart_sd=apart,
        )


# ---------------------------------------------------------------------------------------------------- update


def update(shape: str, reward_shape: str, name: str, policy: dict, B: int, P: int, T: int, repeats: int) -> None:
    """Each step of an update, in the order of a training; the first update is not counted."""
    params = run_params(policy, rollouts=B, minibatch=B // 2, micro_batch=B // 4, max_new_tokens=T)
    learner, reference, reward_model, models = training(shape, reward_shape, params)
    queries = random_queries(shape, B, P)
    rounds = [one_update(learner, reference, reward_model, queries, params) for _ in range(repeats + 1)][1:]
    needs, works = cost.memory(models, params, P, reward_model.budget), timing.time(models, params, P, ["shap"])
    always = sum(need.bytes for need in needs if need.when == "always")
    h100 = next(device for device in timing.DEVICES if device.name == "H100")
    for work in works:
        taken, gib = (statistics.median(one[work.step][i] for one in rounds) for i in (0, 1))
        said = (always + sum(need.bytes for need in needs if need.when == work.step)) / 2**30
        line(
            "update",
            f"{shape}, {name}, {reward_shape} explained, prompt {P}, response {T}, batch {B}",
            step=work.step,
            unit="s",
            repeats=repeats,
            ours=taken,
            said=work.seconds(h100),
            gib=gib,
            said_gib=said,
            always_gib=always / 2**30,
            tflops=work.flops / taken / 1e12,
        )


def sampler(shape: str, B: int, P: int, T: int, repeats: int) -> None:
    """Both samplers on prompts that are each time of another width, as in a study; the last round is compared."""
    lm = random_model(AutoModelForCausalLM, shape)
    queries = random_queries(shape, B, P)
    widths = [P - 5, P, *(P - 2 * i for i in range(1, repeats))]

    def seconds(name: str) -> list[float]:
        taken = []
        for few in (queries[:, -width:] for width in widths):
            mask, generator = torch.ones_like(few, dtype=torch.bool), torch.Generator().manual_seed(0)
            draw = partial(SAMPLERS[name], lm, few, mask, Sampling(T, 1.0, (-1,), PAD), generator)
            taken.append(round(clocked(draw)[0], 3))
        return taken

    ours, theirs = seconds("cache"), seconds("generate")
    line(
        "sampler",
        f"{shape}, prompt to {P}, response {T}, batch {B}",
        peer="generate",
        ratio=theirs[-1] / ours[-1],
        unit="s",
        repeats=1,
        ours=ours[-1],
        theirs=theirs[-1],
        our_rounds=ours,
        their_rounds=theirs,
    )


# ---------------------------------------------------------------------------------------------------- all


def peak() -> None:
    """Operations a second of a large product."""
    n = 8192 if DEVICE.type == "cuda" else 512
    square = torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16)
    taken = statistics.median(clocked(lambda: square @ square)[0] for _ in range(9))
    line("peak", f"matrix product of {n}, bfloat16", tflops=2 * n**3 / taken / 1e12)


def parts(quick: bool) -> dict[str, Callable]:
    sizes = {"P": 16, "T": 16, "repeats": 1} if quick else {"P": 128, "T": 128, "repeats": 3}
    B, few = (8, 2) if quick else (64, 4)
    models = ["tiny"] if quick else ["135M", "1B"]
    learners = {"all weights": {}, "LoRA": {"lora_rank": 32}}
    return {
        "parity": parity,
        "explain": lambda: [explain(shape, B, few, **sizes) for shape in models],
        "update": lambda: [
            update(shape, models[0], name, policy, B, **sizes)
            for shape, (name, policy) in zip((models[0], models[-1]), learners.items())
        ],
        "sampler": lambda: sampler(models[0], B, **sizes),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="end within a minute: tiny models")
    parser.add_argument("--only", action="append", choices=parts(True), help="some parts of it; repeatable")
    parser.add_argument("--quarter", action="store_true", help="use a quarter of an hour of a card: quarter.py")
    parser.add_argument("--toy", action="store_true", help="with --quarter: tiny models, into a temporary folder")
    parser.add_argument("--minutes", type=float, default=14.0, help="with --quarter: ends within them")
    parser.add_argument("--to", type=Path, default=FOLDER, help="with --quarter: the folder of the files")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.quarter:
        import quarter

        toy = arguments.toy
        if not toy and DEVICE.type == "cpu":
            parser.error("--quarter: there is no card here; --toy runs all of it on a CPU")
        return quarter.run(Path(tempfile.mkdtemp()) if toy else arguments.to, arguments.minutes, toy)
    line("run", DEVICE.type, **provenance())
    peak()
    for name, act in parts(arguments.quick).items():
        if name in (arguments.only or parts(True)):
            act()
    print("\n".join(f"differs: {case}" for case in failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
