"""PPO: ours against the PPOTrainer of TRL 1.12.0, the last one, in one run. One JSON object a line.

    python benchmarks/ppo.py [--quick] [--only updates|rewards] > benchmarks/ppo.jsonl

Same 4.2M-parameter policy and reward model, same prompts in the same order, 64 responses of at most 24 tokens, two
passes over each batch as one mini-batch of four micro-batches, the same AdamW and rates. A process each, with the
threads and the cores of this one; they take turns, an update at a time. TRL comes from pip into the user's cache,
transformers and the rest are this environment's.

Ours: a value head on the policy's trunk, which TRL lacks (`shared`, started as a probe of the reward model); the
separate critic that TRL has (`separate`); credit by SHAP on every token, which TRL lacks too (`shap`, shared).
TRL's critic starts as the reward model, a quarter as wide as the policy and the proxy's whole knowledge; or (`large`)
it is a model of 4.2M parameters like all others, a copy of the policy.

    update   seconds an update, its parts, and response tokens a second
    memory   most memory that the process has held, MiB; `start` is what it had held before its first update
    reward   mean score on held-out prompts after equal rollouts, sd of the untrained policy's scores. Here ratio is
             ours / peer; `difference` has a 95% interval over seeds; `kl` is to the untrained policy, nats a response
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor, nn

from dense_rlhf import ppo
from dense_rlhf.config.params import AttributionParams, PolicyParams, PPOParams, RunParams
from dense_rlhf.files import cached_folder
from dense_rlhf.models.policy import PolicyWithValue
from dense_rlhf.ppo import sampling
from dense_rlhf.runs import provenance
from dense_rlhf.training.evaluate import evaluate
from dense_rlhf.training.inner_loop import Recipe, Session, train_policy
from dense_rlhf.training.task import Task, load_task
from dense_rlhf.types import RewardShape

REQUIREMENT = "trl==1.12.0"
PEERS = {"trl": "trl 1.12.0", "large": "trl 1.12.0, large critic"}
SOURCES = {"shared": "terminal", "separate": "terminal", "shap": "shap"}  # the sides of ours: where credit comes from
PAIRS = (("shared", "large"), ("shared", "trl"), ("separate", "trl"), ("shap", "large"))
JUDGED = (("shared", "large"), ("shared", "trl"), ("separate", "trl"))
QUICK = (("shared", "large"), ("separate", "trl"))
PARAMS = PPOParams(updates=24, rollouts=64, max_new_tokens=24, epochs=2, minibatch=64, micro_batch=16)
WARM = 1  # update that is not counted

# ---------------------------------------------------------------------------------------------------- a process


class Turns:
    """A training that waits for a line before each update and answers with its seconds."""

    def __init__(self, answer: Callable[[dict], None]):
        self.answer, self.parts, self.tokens = answer, {}, 0.0

    def __call__(self, steps: Iterable) -> Iterator:
        for step in steps:
            start = self.begin()
            yield step
            self.end(start)

    def begin(self) -> float:
        if not sys.stdin.readline():
            raise SystemExit
        return time.perf_counter()

    def end(self, start: float) -> None:
        seconds = time.perf_counter() - start
        self.answer({"seconds": seconds, "tokens": self.tokens, "peak": peak_memory()} | self.parts)


def peak_memory() -> float:
    """MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def ours(task: Task, params: PPOParams, seed: int, source: str, turns: Callable = iter) -> PolicyWithValue:
    """The package's own training loop."""
    draw, drawing = sampling.sample, [0.0]

    def timed(*arguments):
        start = time.perf_counter()
        drawn = draw(*arguments)
        drawing[0] = time.perf_counter() - start
        return drawn

    def watch(row: dict) -> None:
        turns.tokens = row["length"] * params.rollouts
        turns.parts = {
            "sample": drawing[0],
            "score": row["sample"] - drawing[0],
            "explain": row["explain"],
            "update": row["learn"],
        }

    sampling.SAMPLERS["cache"] = timed
    recipe = Recipe(RewardShape((source,), (1.0,)), params, AttributionParams(), seed)
    return train_policy(task, recipe, Session(turns, watch if turns is not iter else None)).policy


class Scorer(nn.Module):
    """Our reward model as TRL wants one: a backbone and a head, the score at every position."""

    base_model_prefix = "backbone"

    def __init__(self, task: Task):
        super().__init__()
        self.task, self.score = task, nn.Identity()

    def backbone(self, input_ids: Tensor, attention_mask: Tensor, **_) -> SimpleNamespace:
        eos, model = self.task.tokenizer.eos_token_id, self.task.reward_model
        texts = [ids[keep].tolist() for ids, keep in zip(input_ids, attention_mask)]
        scores = model.calibrate(model.outputs([ids[:-1] if ids[-1] == eos else ids for ids in texts]))
        return SimpleNamespace(hidden_states=[scores[:, None, None].expand(*input_ids.shape, 1)])


def value_model(policy: PolicyWithValue) -> nn.Module:
    """The policy's own critic as a classifier."""
    from transformers import LlamaForSequenceClassification

    config = copy.deepcopy(policy.value_trunk.config)
    config.num_labels = 1
    model = LlamaForSequenceClassification(config)
    model.model, model.score = policy.value_trunk, policy.value_head
    return model


def trl(task: Task, params: PPOParams, seed: int, peer: str, turns: Callable = iter) -> PolicyWithValue:
    """TRL's PPOTrainer with our reward model, the separate critic, our optimizer and our order of prompts."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl.experimental.ppo import PPOTrainer

    policy = task.fresh_policy()
    if peer == "large":
        policy = PolicyWithValue(policy.lm, critic="separate", value_trunk=copy.deepcopy(policy.lm.base_model))
    learner = ppo.make_learner(policy, params, seed)
    nothing = Dataset.from_dict({"input_ids": [[0]] * params.rollouts})
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            trl_config(params, seed, folder),
            task.tokenizer,
            policy.lm,
            task.reference.lm,
            Scorer(task),
            nothing,
            value_model(policy),
            optimizers=(learner.optimizer, learner.schedule),
        )
        trainer.remove_callback(PrinterCallback)
        batches = sampling.prompt_batches(task.data.train_prompts, params.rollouts, seed)
        trainer.dataloader = ({"input_ids": sampling.encode_prompts(batch, task.tokenizer)[0]} for batch in batches)
        take_turns(trainer, turns)
        trainer.train()
    return policy.eval()


def trl_config(params: PPOParams, seed: int, folder: str):
    from trl.experimental.ppo import PPOConfig

    return PPOConfig(
        folder,
        total_episodes=params.updates * params.rollouts,
        num_ppo_epochs=params.epochs,
        num_mini_batches=1,
        per_device_train_batch_size=params.micro_batch,
        stop_token="eos",
        gradient_accumulation_steps=params.rollouts // params.micro_batch,
        local_rollout_forward_batch_size=params.rollouts,
        response_length=params.max_new_tokens,
        seed=seed,
        temperature=params.temperature,
        kl_coef=params.kl_coef,
        gamma=params.gamma,
        lam=params.lam,
        cliprange=params.clip,
        cliprange_value=params.value_clip,
        vf_coef=params.value_coef,
        num_sample_generations=0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


def take_turns(trainer, turns: Callable) -> None:
    """Clocks in what PPOTrainer calls: generation begins an update, whitened advantages end its scoring."""
    from trl.experimental.ppo import ppo_trainer

    if turns is iter:
        return
    generate, whiten, clock = ppo_trainer.batch_generation, ppo_trainer.masked_whiten, []

    def generation(*arguments):
        if clock:
            turns.parts |= {"explain": 0.0, "update": time.perf_counter() - clock[2]}
            turns.end(clock[0])
        clock[:] = [turns.begin()]
        found = generate(*arguments)
        clock.append(time.perf_counter())
        return found

    def whitening(values: Tensor, mask: Tensor, **options) -> Tensor:
        found = whiten(values, mask, **options)
        clock.append(time.perf_counter())
        turns.tokens, turns.parts = mask.sum().item(), {"sample": clock[1] - clock[0], "score": clock[2] - clock[1]}
        return found

    ppo_trainer.batch_generation, ppo_trainer.masked_whiten = generation, whitening


def the_task(critic: str, params: PPOParams) -> Task:
    return load_task(RunParams(policy=PolicyParams(critic=critic, value_start="score"), ppo=params))


def work(side: str, updates: int, seeds: int) -> None:
    """Be one side: an update at a time, or (`seeds` above 0) trained and judged once a seed."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(value: dict) -> None:
        print(json.dumps(value), file=channel, flush=True)

    warnings.simplefilter("ignore")
    params, train = replace(PARAMS, updates=updates), trl if side in PEERS else ours
    critic, what = "separate" if side in ("trl", "separate") else "shared", SOURCES.get(side, side)
    task = the_task(critic, params)
    answer({"start": peak_memory()})
    if not seeds:
        train(task, params, 0, what, Turns(answer))
    for seed in range(seeds):
        judged = evaluate(task, train(task, params, seed, what), task.data.validation_prompts[:256], params, seed=0)
        means = judged[["proxy", "kl", "gold"]].mean()
        answer({"score": float(means["proxy"]), "kl": float(means["kl"]), "gold": float(means["gold"])})


# ---------------------------------------------------------------------------------------------------- all of them


def trl_folder() -> Path:
    """TRL alone, without what it depends on."""

    def build(folder: Path) -> None:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), REQUIREMENT]
        subprocess.run(pip, check=True, stdout=sys.stderr)

    return cached_folder("peers", {"requirement": REQUIREMENT}, build)


class Side:
    """A process that trains; asked by `next`."""

    def __init__(self, name: str, updates: int, seeds: int = 0, threads: int = 0):
        paths = [str(trl_folder())] * (name in PEERS) + [str(Path(__file__).parent.parent)]
        more = {
            "PYTHONPATH": os.pathsep.join(paths),
            "HF_HUB_OFFLINE": "1",
            "TRL_EXPERIMENTAL_SILENCE": "1",
            "OMP_NUM_THREADS": str(threads or torch.get_num_threads()),
        }
        command = [sys.executable, __file__, "--side", name, "--updates", str(updates), "--seeds", str(seeds)]
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=os.environ | more
        )

    def listen(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise SystemExit(self.errors.read()[-2000:])
        return json.loads(line)

    def update(self) -> dict:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.listen()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def line(
    measure: str, case: str, peer: str, ratio: float, unit: str, repeats: int, own: float, theirs: float, **more
) -> None:
    found = {
        "ratio": round(ratio, 2),
        "unit": unit,
        "repeats": repeats,
        "ours": round(own, 4),
        "theirs": round(theirs, 4),
    }
    print(json.dumps({"benchmark": f"ppo/{measure}", "case": case, "peer": PEERS[peer]} | found | more), flush=True)


def rounded(values: dict[str, float], digits: int = 3) -> dict[str, float]:
    return {name: round(value, digits) for name, value in values.items()}


def updates(pairs: tuple, repeats: int) -> None:
    """Seconds and memory: every side makes an update in turn, each round begun by another."""
    names, rounds, sides, start = list(dict.fromkeys(name for pair in pairs for name in pair)), [], {}, {}
    for name in names:  # one after another, or their threads fight
        sides[name] = Side(name, repeats + WARM + 1)
        start[name] = sides[name].listen()["start"]
    for i in range(repeats + WARM):
        order = names[i % len(names) :] + names[: i % len(names)]
        rounds.append({name: sides[name].update() for name in order})
    for side in sides.values():
        side.close()
    for name, peer in pairs:
        seconds(name, peer, [(found[name], found[peer]) for found in rounds[WARM:]])
        most = [rounds[-1][side]["peak"] for side in (name, peer)]
        line(
            "memory",
            name,
            peer,
            most[1] / most[0],
            "MiB",
            1,
            *most,
            our_start=round(start[name]),
            their_start=round(start[peer]),
        )


def seconds(name: str, peer: str, pairs: list[tuple[dict, dict]]) -> None:
    own, theirs = ({key: statistics.median(one[key] for one in side) for key in side[0]} for side in zip(*pairs))
    parts = {
        f"{who}_parts": rounded({key: side[key] for key in ("sample", "score", "explain", "update")})
        for who, side in (("our", own), ("their", theirs))
    }
    speed = {
        f"{who}_tokens_a_second": round(statistics.median(one["tokens"] / one["seconds"] for one in side))
        for who, side in zip(("our", "their"), zip(*pairs))
    }
    ratio = statistics.median(b["seconds"] / a["seconds"] for a, b in pairs)
    line("update", name, peer, ratio, "s", len(pairs), own["seconds"], theirs["seconds"], **parts, **speed)


def rewards(pairs: tuple, seeds: int) -> None:
    """Scores after equal rollouts, all sides at the same time, a thread each: nothing is timed."""
    names = dict.fromkeys(name for pair in pairs for name in pair)
    sides = {name: Side(name, PARAMS.updates, seeds, threads=1) for name in names}
    found = {name: [side.listen() for _ in range(seeds + 1)][1:] for name, side in sides.items()}
    means = {name: {key: float(np.mean([one[key] for one in some])) for key in some[0]} for name, some in found.items()}
    for name, peer in pairs:
        apart = np.array([a["score"] - b["score"] for a, b in zip(found[name], found[peer])])
        mean, half = apart.mean(), student.ppf(0.975, seeds - 1) * apart.std(ddof=1) / seeds**0.5
        own, theirs = means[name], means[peer]
        line(
            "reward",
            name,
            peer,
            own["score"] / theirs["score"],
            "sd",
            seeds,
            own["score"],
            theirs["score"],
            difference=round(mean, 3),
            interval=[round(mean - half, 3), round(mean + half, 3)],
            our=rounded(own),
            their=rounded(theirs),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="end within a minute: no rewards")
    parser.add_argument("--only", choices=("updates", "rewards"), help="one part of it")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--updates", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seeds", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        return work(arguments.side, arguments.updates, arguments.seeds)
    the_task("shared", PARAMS)  # what all sides read from the cache is made once
    print(json.dumps({"benchmark": "ppo/run", "threads": torch.get_num_threads(), **provenance()}), flush=True)
    if arguments.only != "rewards":
        updates(*(QUICK, 2) if arguments.quick else (PAIRS, 15))
    if arguments.only != "updates" and not arguments.quick:
        rewards(JUDGED, 5)


if __name__ == "__main__":
    main()
