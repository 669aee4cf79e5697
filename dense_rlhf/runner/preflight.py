"""A dry run that resolves everything except the weights: parameters, data, revisions, tokenizers, configs, costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import huggingface_hub
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dense_rlhf.attribution.sources import SOURCES, available
from dense_rlhf.config.params import RewardParams, RunParams
from dense_rlhf.config.study import StudyParams
from dense_rlhf.data import Dataset, load_data
from dense_rlhf.fingerprint import PACKAGE
from dense_rlhf.models.dialogue import Reader, prompt_ids
from dense_rlhf.models.language_models import bfloat16_slowdown, check_head, load_tokenizer, smollm2_folder
from dense_rlhf.models.reward_model import RewardModel, chosen_output, shares_tokens
from dense_rlhf.models.train_reward_model import fresh_classifier, pair_ids
from dense_rlhf.models.word_judge import check_words
from dense_rlhf.runner import cost, timing
from dense_rlhf.runner.plan import expand, updates_of
from dense_rlhf.types import InputError, PreferencePair, Prompt, one_line

ROWS = 1000  # of a hub dataset that are read
TRANSLATED = 20  # replies that are read in the reward model's tokens


class Report:
    """Says one line for each check and counts those that failed."""

    def __init__(self, say: Callable[[str], None]):
        self.say, self.failed = say, 0

    def line(self, kind: str, field: str, text: str) -> None:
        self.failed += kind == "FAIL"
        self.say(f"{kind:5s} {field:22s} {one_line(text)}")

    def ok(self, field: str, text: str) -> None:
        self.line("ok", field, text)

    def demand(self, holds: bool, field: str, good: str, bad: str) -> None:
        """One line, as `good` or as `bad`."""
        self.line(*(("ok", field, good) if holds else ("FAIL", field, bad)))

    def attempt(self, field: str, what: str, act: Callable):
        """What `act()` returns; or None, and a line with the error that it raises."""
        try:
            return act()
        except InputError as error:
            self.line("FAIL", field, str(error).removeprefix(f"{field}: "))
        except Exception as error:  # of transformers, peft, the hub: no common base class
            reason = " ".join(str(error).split()).partition(". ")[0][:200]
            self.line("FAIL", field, f"{what}: {type(error).__name__}: {reason}")


def check(study: StudyParams, say: Callable[[str], None], budget: bool = True) -> int:
    """Say for each thing that the study needs whether it is there; returns how many are not. Reads no weights."""
    report, run = Report(say), study.run
    if study.settings:
        report.line("note", "settings", f"checked without what these change: {', '.join(study.settings)}")
    _check_arithmetic(report, run)
    policy = read_policy(report, run)
    reward = read_reward(report, run.reward, policy)
    if reward and reward.model:
        _check_sources(report, study, reward)
    longest, typical = 0, 0.0
    for data in study.datasets:
        lengths = _check_data(report, replace(run, data=data), policy, reward)
        if lengths:
            longest, typical = max(longest, lengths[-1]), max(typical, sum(lengths) / len(lengths))
    if policy and longest:
        _check_positions(report, run, policy, reward, longest)
    if policy and reward and policy.model and reward.model and longest:
        models = report.attempt("policy", "what learns", lambda: cost.assemble(policy.model, reward.model, run))
        if models:
            _check_learning(report, run, models)
            if budget:
                _say_budget(report, study, models, longest, typical)
    else:
        report.line("skip", "budget", "needs the policy's and the reward model's configs and one dataset")
    return report.failed


def _check_arithmetic(report: Report, run: RunParams) -> None:
    """Say where the processor, for want of a GPU, has no arithmetic of its own for what a model computes in."""
    for field, dtype in (("policy.dtype", run.policy.dtype), ("reward.dtype", run.reward.dtype)):
        if dtype == "bfloat16" and not torch.cuda.is_available() and (times := bfloat16_slowdown()) > 1.5:
            slow = f"this processor takes {times:.0f} times as long in bfloat16 as in float32"
            report.line("note", field, f"{slow}, and there is no GPU; --set {field}=float32")


def refuse(study: StudyParams) -> None:
    """Raise `InputError` with what `check` finds wrong; its estimate of memory refuses nothing."""
    lines: list[str] = []
    check(study, lines.append, budget=False)
    failed = [" ".join(line.split()[1:]) for line in lines if line.startswith("FAIL")]
    if failed:
        more = f" (and {len(failed) - 1} more; see `dense-rlhf check`)" if failed[1:] else ""
        raise InputError(f"{failed[0].replace(' ', ': ', 1)}{more}")


# ---------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class EmptyModel:
    """A model without its weights; None for parts that could not be read."""

    tokenizer: PreTrainedTokenizerBase | None
    config: PreTrainedConfig | None
    model: PreTrainedModel | None  # on the meta device


def _resolve(report: Report, field: str, name: str, revision: str | None) -> dict[str, object]:
    """Say a hub id's commit and its weights' size; returns the arguments that read its other files at that commit."""
    if Path(name).is_dir():
        _check_weights(report, field, {path.name: path.stat().st_size for path in Path(name).iterdir()})
        return {}

    branch = revision or "main"

    def ask():
        try:
            return huggingface_hub.HfApi().model_info(name, revision=branch, files_metadata=True)
        except Exception as error:  # the hub's errors share no base class
            place = f"{name!r} at {branch} is no folder here, and not to be had from the hub ({type(error).__name__})"
            raise InputError(f"{place}; wanted a local folder or a hub id that is reachable") from error

    info = report.attempt(field, "its commit", ask)
    if info is None:
        return {"revision": branch, "local_files_only": True}
    report.ok(field, f"{name} at {branch} is commit {info.sha}")
    _check_weights(report, field, {file.rfilename: file.size or 0 for file in info.siblings})
    return {"revision": info.sha}


def _check_weights(report: Report, field: str, files: dict[str, int]) -> None:
    weights = {name: size for name, size in files.items() if name.endswith(".safetensors")}
    good = f"weights: {len(weights)} safetensors, {sum(weights.values()) / 1e9:.2f} GB"
    bad = f"has no .safetensors among {len(files)} files; other weights are never read"
    report.demand(bool(weights), field, good, bad)


def read_policy(report: Report, run: RunParams) -> EmptyModel:
    """The policy's tokenizer, config and empty model, with a line for each."""
    name, field = run.policy.name, "policy.name"
    shipped = {"tiny": lambda: PACKAGE / "models" / "tiny_policy", "smollm2": smollm2_folder}
    folder = report.attempt(field, "its files", shipped[name]) if name in shipped else None
    source = str(folder or name)
    at = _resolve(report, field, source, run.policy.revision)
    tokenizer = report.attempt(field, "its tokenizer", lambda: load_tokenizer(source, **at))
    config = report.attempt(field, "its config.json", lambda: AutoConfig.from_pretrained(source, **at))
    model = config and report.attempt(field, "its config.json", lambda: cost.empty_policy(config, run.policy.dtype))
    if tokenizer:
        _check_tokenizer(report, tokenizer, config)
    if model:
        model.config.pad_token_id = tokenizer.pad_token_id if tokenizer else 0
        size = f"{model.num_parameters():,} parameters, {config.num_hidden_layers} layers"
        report.ok(field, f"{config.model_type}, {size}")
    return EmptyModel(tokenizer, config, model)


def _check_tokenizer(report: Report, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig | None) -> None:
    field, eos = "policy.name", tokenizer.eos_token
    bad = "its tokenizer has no EOS, so no response could end; add one to its files"
    report.demand(eos is not None, field, f"ends with {eos!r}, pads with {tokenizer.pad_token!r}", bad)
    if config and len(tokenizer) > config.vocab_size:
        sizes = f"its tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}"
        report.line("FAIL", field, f"{sizes}; wanted files of one model")
    if "strftime_now" in str(tokenizer.chat_template):
        report.line("note", field, "its chat template writes today's date: prompts change from day to day")


def read_reward(report: Report, params: RewardParams, policy: EmptyModel) -> EmptyModel | None:
    """The reward model's tokenizer, config and empty model; None for one to be trained here, without a tokenizer."""
    field, name = "reward.name", params.name
    if params.trained_here:
        return _trained_here(report, params, policy) if policy.tokenizer and policy.model else None
    at = _resolve(report, field, name, params.revision)
    tokenizer = report.attempt(field, "its tokenizer", lambda: AutoTokenizer.from_pretrained(name, **at))
    config = report.attempt(field, "its config.json", lambda: AutoConfig.from_pretrained(name, **at))
    model = config and report.attempt(field, "its config.json", lambda: cost.empty_classifier(config, params.dtype))
    if model:
        report.attempt(field, "its outputs", lambda: chosen_output(model, params.output, "reward.output"))
        report.attempt(field, "its weights", lambda: check_head(model, name))
        report.ok(field, f"{config.model_type}, {model.num_parameters():,} parameters")
    return EmptyModel(tokenizer, config, model)


def _check_sources(report: Report, study: StudyParams, reward: EmptyModel) -> None:
    """Whether the reward model can give the credit that the arms ask of it."""
    able = set(available(RewardModel(reward.model, reward.tokenizer, suffix=()))) | {"log_ratio", "rationale"}
    asked = sorted({source for shape in study.arms.values() for source in shape.sources} & {*SOURCES} - able)
    bad = f"{', '.join(asked)} cannot be had of a {reward.config.model_type}; name other sources in arms"
    report.demand(not asked, "arms", "ask for sources that the reward model can give", bad)


def _trained_here(report: Report, params: RewardParams, policy: EmptyModel) -> EmptyModel:
    def build() -> PreTrainedModel:
        with torch.device("meta"):
            return fresh_classifier(params, policy.tokenizer, policy.model).to(getattr(torch, params.dtype))

    model = report.attempt("reward.name", "its layers", build)
    if model:
        report.ok("reward.name", f"{params.name}: {model.num_parameters():,} parameters, to be trained here")
    return EmptyModel(policy.tokenizer, model and model.config, model)


# ---------------------------------------------------------------------------------------------------- data


def _check_data(report: Report, run: RunParams, policy: EmptyModel, reward: EmptyModel | None) -> list[int]:
    """Say how many rows the loader kept; returns the prompts' lengths in tokens, shortest first."""
    data = report.attempt("data.name", "its rows", lambda: load_data(run.data, ROWS))
    if not data:
        return []
    left_out = {n.removeprefix("left out: "): number for n, number in data.counts.items() if n.startswith("left out: ")}
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in left_out.items())
    text = f"{data.counts.get('read', 0):,} rows read, {sum(left_out.values()):,} left out"
    report.ok("data.name", f"{data.name} at {data.revision}: {text}" + f": {reasons}" * bool(reasons))
    report.attempt("data.name", "the gold judge's words", lambda: check_words(data.gold))
    prompts = data.train_prompts
    if run.data.path or data.name == "reviews":  # else only the first rows were read
        bad = f"is {run.ppo.rollouts}, but there are {len(prompts)} training prompts; lower it"
        report.demand(len(prompts) >= run.ppo.rollouts, "ppo.rollouts", f"{len(prompts):,} training prompts", bad)
    if not policy.tokenizer:
        return []
    if run.data.path and run.reward.trained_here and data.is_pairwise:
        report.attempt("reward.window", "pairs", lambda: _check_window(report, run.reward, data, policy.tokenizer))
    if reward and reward.tokenizer:
        align = lambda: _check_alignment(report, run, data, policy, reward)  # noqa: E731
        report.attempt("reward.name", "reading the policy's text", align)
    measure = lambda: _check_prompts(report, prompts, policy.tokenizer)  # noqa: E731
    return report.attempt("policy.name", "rendering prompts", measure) or []


def _check_window(report: Report, params: RewardParams, data: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """Whether a batch of pairs is short enough for a reward model to be trained on."""
    short = (pair for pair in data.reward if max(map(len, pair_ids(pair, tokenizer))) <= params.window)
    found = len(list(islice(short, params.batch)))
    fits = f"{params.window} tokens hold {found} of {len(data.reward):,} pairs"
    bad = f"{fits}, wanted at least reward.batch = {params.batch}; raise the window"
    report.demand(found == params.batch, "reward.window", "holds the pairs of a batch", bad)


def _check_prompts(report: Report, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    lengths = sorted(map(len, prompt_ids(prompts, tokenizer)))
    at = {name: lengths[round(share * (len(lengths) - 1))] for name, share in QUANTILES.items()}
    how = "through its chat template" if tokenizer.chat_template else "as plain text"
    report.ok("data.max_prompt_chars", f"prompts {how}: " + ", ".join(f"{n} {v}" for n, v in at.items()) + " tokens")
    return lengths


QUANTILES = {"least": 0.0, "median": 0.5, "95 %": 0.95, "most": 1.0}


def _check_alignment(report: Report, run: RunParams, data: Dataset, policy: EmptyModel, reward: EmptyModel) -> None:
    """Whether the reward model can read the policy's text."""
    field = "reward.name"
    if reward.tokenizer is policy.tokenizer:
        report.ok(field, "reads the policy's tokens as they are")
        return
    reader = Reader(reward.tokenizer, run.reward.pair)
    for prompt, reply in _dialogues(data)[:TRANSLATED]:
        (query,) = prompt_ids([prompt], policy.tokenizer)
        reader.translate(
            policy.tokenizer, query, policy.tokenizer(reply, add_special_tokens=False)["input_ids"], prompt
        )
    report.ok(field, "reads prompt and response as text, in its own tokens and chat template")
    bad = "'separate' starts as the reward model and needs its tokens; take 'shared'"
    shared = run.policy.critic != "separate" or shares_tokens(policy.tokenizer, reward.tokenizer)
    report.demand(shared, "policy.critic", run.policy.critic, bad)


def _dialogues(data: Dataset) -> list[tuple[Prompt, str]]:
    if data.is_pairwise:
        return [(pair.prompt, pair.chosen) for pair in data.reward if isinstance(pair, PreferencePair)]
    return list(zip(data.train_prompts, [example.text for example in data.reward]))


def _check_positions(
    report: Report, run: RunParams, policy: EmptyModel, reward: EmptyModel | None, longest: int
) -> None:
    """Whether prompt and response fit what each model was trained for."""
    T, L = run.ppo.max_new_tokens, longest + run.ppo.max_new_tokens + 1
    for field, model in (("policy.name", policy), ("reward.name", reward)):
        if most := getattr(model and model.config, "max_position_embeddings", None):
            good = f"{most} positions for {L} tokens of prompt, response and EOS"
            need = f"the longest prompt and ppo.max_new_tokens = {T} need {L}; lower data.max_prompt_chars"
            report.demand(L <= most, field, good, f"has {most} positions, but {need}")


# ---------------------------------------------------------------------------------------------------- budget


def _check_learning(report: Report, run: RunParams, models: cost.Models) -> None:
    number = sum(p.numel() for p in models.policy.parameters() if p.requires_grad)
    adapted = sum(name.endswith("lora_A") for name, _ in models.policy.lm.named_modules())
    how = f"LoRA of rank {run.policy.lora_rank} on {adapted} linear maps" if run.policy.lora_rank else "weights"
    report.ok("policy", f"{number:,} numbers learn: {how}, critic {run.policy.critic}")


def _say_budget(report: Report, study: StudyParams, models: cost.Models, longest: int, typical: float) -> None:
    """Memory and time as tables; a failure where a visible GPU is smaller."""
    run, gpu = study.run, _gpu()
    tokens = run.reward.token_budget or (65536 if gpu or run.policy.dtype == "bfloat16" else 4096)
    needs = cost.memory(models, run, longest, tokens)
    report.say(f"\nmemory, at the longest prompt of {longest} tokens\n")
    for need in needs:
        report.say(f"  {need.when:8s} {need.what:32s} {need.bytes / 2**30:8.2f} GiB   {need.how}")
    total = cost.peak(needs) / 2**30
    report.say(f"  {'peak':8s} {'what is always there, and the largest step':43s}{total:6.2f} GiB")
    if gpu:
        has = f"{gpu[0]} has {gpu[1]:.1f} GiB"
        report.demand(total <= gpu[1], "memory", has, f"{has}; lower ppo.micro_batch or reward.token_budget")
    _say_time(report, study, models, typical)


def _gpu() -> tuple[str, float] | None:
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory / 2**30


def _say_time(report: Report, study: StudyParams, models: cost.Models, typical: float) -> None:
    """Seconds of each step of an update and hours of the study, on `timing.DEVICES`."""
    run, devices, hours, seen = study.run, timing.DEVICES, dict.fromkeys(timing.DEVICES, 0.0), set()
    report.say(f"\ntime of an update, at prompts of {typical:.0f} tokens and responses of {run.ppo.max_new_tokens}\n")
    report.say(f"  {'':32s}{'PFLOP':>10s}" + "".join(f"{device.name + ' s':>14s}" for device in devices))
    updates = Counter()
    for job in expand(study):
        updates[job.params.arm] += updates_of(job)
    for arm, shape in study.arms.items():
        steps = timing.time(models, run, typical, shape.sources)
        for device in devices:
            hours[device] += updates[arm] * sum(step.seconds(device) for step in steps) / 3600
        for step in steps:
            name = f"explain {' + '.join(shape.sources)}" if step.step == "explain" else step.step
            if name not in seen:
                seen.add(name)
                seconds = "".join(f"{step.seconds(device):14.1f}" for device in devices)
                report.say(f"  {name:32s}{step.flops / 1e15:10.4f}{seconds}")
    total = f"all {sum(updates.values()):,} updates of all arms"
    report.say(f"  {total:42s}" + "".join(f"{hour:12.1f} h" for hour in hours.values()))
    speeds = "; ".join(map(str, devices))
    report.say(f"  at the share of the vendor's numbers that one H200 reached, and a core's assumed: {speeds}")
