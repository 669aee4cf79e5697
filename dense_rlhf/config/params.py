"""Every parameter of a study, typed and strict: YAML in, one flat dictionary for each notebook out, and back.

`ppo: {lr: 1.0e-4}` in a study's YAML is `ppo.lr` on the command line and `ppo_lr` in a notebook's parameters cell.
This module imports nothing heavy, so that a wrong parameter is refused at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from dense_rlhf.config.judging import DownstreamParams, JudgeParams
from dense_rlhf.config.parse import parse
from dense_rlhf.types import InputError, RewardShape, check_removal

LEARNED = "learned"
DTYPES = ("float32", "bfloat16")
CRITICS = ("shared", "detached", "separate")
VALUE_STARTS = ("zero", "score")
KL_ESTIMATORS = ("k1", "k2", "k3")
SAMPLERS = ("cache", "generate", "vllm")
PLAYERS = ("tokens", "words", "sentences")
STRATEGIES = ("gp", "saas", "additive", "nei", "random", "sobol")
OBJECTIVES = ("proxy", "gold", "penalised")
TEMPERATURES = ("fixed", "shared", "each")
LANDSCAPES = ("interior", "vertex", "face", "ridge", "tent", "flat")
PLAIN = (bool, int, float, str, list, tuple, type(None))  # what a parameters cell can hold


@dataclass(frozen=True)
class DataParams:
    """Which dataset and how its prompts are cut."""

    name: str = "reviews"
    path: str | None = None  # a local file, where there is no hub
    revision: str | None = None  # branch, tag or commit on the hub; what it resolves to is recorded
    split: str | None = None  # the hub's split; the dataset's own default where none is given
    prompt_words: int = 8  # reviews: a prompt is the first words of a review
    max_prompt_chars: int = 2000  # longer prompts are left out and counted


def _check_dtype(name: str, dtype: str) -> None:
    if dtype not in DTYPES:
        raise InputError(f"{name} is {dtype!r}, wanted one of {', '.join(DTYPES)}")


@dataclass(frozen=True)
class PolicyParams:
    """Which language model to fine-tune, and how much of it."""

    name: str = "tiny"  # tiny, smollm2, a hub id or a local folder
    revision: str | None = None  # of a hub id; what it resolves to is recorded
    trainable_layers: int | None = None  # only the last n layers learn; all parameters where none is given
    dtype: str = "float32"  # float32; or bfloat16: frozen weights and arithmetic, learning weights stay float32

    critic: str = "shared"  # shared: a head on the policy's trunk; detached: no gradient into it; separate: its own
    value_start: str = "zero"  # zero; or score: a shared or detached head starts by saying the score so far
    lora_rank: int | None = None  # adapters of this rank learn in place of the weights; none where none is given
    lora_alpha: float = 32.0  # adapters are scaled by alpha / rank

    def __post_init__(self):
        _check_dtype("policy.dtype", self.dtype)
        for name, known in (("critic", CRITICS), ("value_start", VALUE_STARTS)):
            if getattr(self, name) not in known:
                raise InputError(f"policy.{name} is {getattr(self, name)!r}, wanted one of {', '.join(known)}")
        for name in ("trainable_layers", "lora_rank"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"policy.{name} is {getattr(self, name)}, wanted at least 1, or nothing")


@dataclass(frozen=True)
class RewardParams:
    """The proxy reward model: a small transformer trained here, or a finished one from the hub."""

    name: str = "scratch"  # scratch, or the hub id or folder of a sequence classifier with one output
    revision: str | None = None
    labels: float = 1.0  # scratch: the share of the people's labels, or pairs, that it learns from
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    steps: int = 500
    batch: int = 96
    lr: float = 3e-3
    window: int = 48  # labels: tokens of a training snippet; pairs: the most tokens of a dialogue
    max_drop: float = 0.6  # labels: each snippet loses a uniform share of its tokens, up to this
    token_budget: int | None = None  # tokens in one forward pass; by device where none is given
    dtype: str = "float32"  # float32 or bfloat16: the weights when it scores and explains
    dpo_steps: int = 0  # log_ratio: steps of DPO on the proxy's own preferences; none where 0
    dpo_beta: float = 0.1  # log_ratio: how strongly DPO holds its policy to the reference

    def __post_init__(self):
        _check_dtype("reward.dtype", self.dtype)
        if not 0 < self.labels <= 1:
            raise InputError(f"reward.labels is {self.labels}, wanted a share above 0, at most 1")
        if self.labels < 1 and self.name != "scratch":
            raise InputError(
                f"reward.labels is {self.labels} for {self.name!r}, which is finished; wanted 1, or "
                "reward.name 'scratch'"
            )
        if self.dpo_steps < 0 or not 0 < self.dpo_beta < math.inf:
            raise InputError(f"reward.dpo_steps, dpo_beta: {self.dpo_steps}, {self.dpo_beta}; wanted 0 or more, over 0")


@dataclass(frozen=True)
class AttributionParams:
    """Budgets and conventions of explaining a response of k players."""

    permutations: int = 2  # shap: 2 k - 1 evaluations each
    samples_per_token: int = 4  # kernel, leverage: evaluations = this times k
    lime_samples: int = 64
    owen_depth: int | None = None  # levels of the tree; all where none is given, at about 2 k^2 / 3 evaluations
    ig_steps: int = 16  # integrated gradients
    removal: str = "drop"  # drop, attention_mask, or replace:TOKEN
    players: str = "tokens"  # tokens, words or sentences: what is removed together and shares its credit evenly
    rationale_path: str | None = None  # rationale: a file of texts in which people marked words
    seed: int = 0

    def __post_init__(self):
        for name in ("permutations", "samples_per_token", "lime_samples", "ig_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"attribution.{name} is {getattr(self, name)}, wanted at least 1")
        check_removal(self.removal)
        if self.players not in PLAYERS:
            raise InputError(f"attribution.players is {self.players!r}, wanted one of {', '.join(PLAYERS)}")


@dataclass(frozen=True)
class ShapeParams:
    """An arm: sources, their weights (the word `learned` leaves them to the outer loop), and the normalisation."""

    sources: tuple[str, ...] = ("terminal",)
    weights: tuple[float, ...] | str = (1.0,)
    normalise: str = "softmax"
    temperature: float | tuple[float, ...] = 1.0  # of softmax; or a list, one a source
    features: tuple[str, ...] = ()  # of tokens, that the weights depend on
    slopes: tuple[tuple[float, ...], ...] = ()  # a row a source, a number a feature

    def __post_init__(self):
        if self.is_learned:
            if len(self.sources) < 2:
                raise InputError("shape.weights is 'learned' for one source; wanted at least two sources")
        elif isinstance(self.weights, str):
            raise InputError(f"shape.weights is {self.weights!r}, wanted a list of numbers or the word '{LEARNED}'")
        self.reward_shape()

    @property
    def is_learned(self) -> bool:
        return self.weights == LEARNED

    def reward_shape(self) -> RewardShape:
        """The shape; even weights where they are still to be learned."""
        even = (1 / len(self.sources),) * len(self.sources)
        return RewardShape(
            self.sources,
            even if self.is_learned else self.weights,
            self.normalise,
            self.temperature,
            self.features,
            self.slopes,
        )


@dataclass(frozen=True)
class PPOParams:
    """One policy's training."""

    updates: int = 24
    rollouts: int = 64  # responses an update
    max_new_tokens: int = 24
    temperature: float = 1.0
    sampler: str = "cache"  # cache: our loop; generate: transformers' own, compiled on CUDA; vllm: the extra
    epochs: int = 1  # passes over each batch of rollouts
    minibatch: int = 32  # responses an optimiser step
    lr: float = 1e-4  # falls linearly to a tenth
    value_lr: float = 1e-3  # of the value head
    kl_coef: float = 0.05  # where it starts, if kl_target is given
    kl_estimator: str = "k1"  # of the penalty: k1 is unbiased, also in gradient; k2 and k3 vary less
    kl_target: float | None = None  # nats a response; kl_coef then follows it
    kl_horizon: float = 10_000.0  # responses in which kl_coef can change by a factor of about e
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.2
    value_coef: float = 0.1
    max_grad_norm: float = 1.0
    missing_eos_penalty: float = 0.0
    whiten_rewards: bool = False
    scale_rewards: bool = False  # divide by the running standard deviation of the scores
    clip_rewards: float | None = None  # the most a token's shaped reward may be, either sign; the share cut is logged
    micro_batch: int = 16  # responses of similar length in a forward pass, in each process
    checkpoint_every: int = 10  # updates; a training that was cut short goes on from there

    def __post_init__(self):
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"ppo.{name} is {getattr(self, name)}, wanted a number from 0 to 1")
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"ppo.{name} is {value}, wanted a number above 0")
        for name in ("kl_coef", "missing_eos_penalty", "value_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"ppo.{name} is {getattr(self, name)}, wanted 0 or more")
        for name, known in (("kl_estimator", KL_ESTIMATORS), ("sampler", SAMPLERS)):
            if getattr(self, name) not in known:
                raise InputError(f"ppo.{name} is {getattr(self, name)!r}, wanted one of {', '.join(known)}")
        if self.kl_target is not None and not self.kl_coef > 0:
            raise InputError(f"ppo.kl_coef is {self.kl_coef}, wanted a number above 0, which ppo.kl_target multiplies")
        if self.rollouts % self.minibatch:
            raise InputError(f"ppo.rollouts is {self.rollouts}, wanted a multiple of ppo.minibatch = {self.minibatch}")


POSITIVE = (
    "updates",
    "rollouts",
    "max_new_tokens",
    "epochs",
    "minibatch",
    "micro_batch",
    "checkpoint_every",
    "temperature",
    "lr",
    "value_lr",
    "clip",
    "value_clip",
    "max_grad_norm",
    "kl_target",
    "kl_horizon",
    "clip_rewards",
)


@dataclass(frozen=True)
class BOParams:
    """The outer loop."""

    trials: int = 25
    initial: int = 5  # quasi-random points before the model chooses, behind the anchors
    updates: int = 10  # PPO updates a trial
    anchors: bool = True  # start with each source alone and with all in equal parts
    replicates: int = 1  # trials of each anchor, which tell how much another seed changes
    strategy: str = "gp"
    objective: str = "proxy"  # proxy; gold; or penalised: proxy less kl_weight times the KL, of held-out responses
    kl_weight: float = 0.1  # proxy's sd a nat
    stop_early: bool = False  # halfway, where trials so far show that halfway foretells the end
    temperature: str = "fixed"  # fixed: the arm's; or searched, shared: one for all sources, each: one a source
    temperature_low: float = 0.01
    temperature_high: float = 1.0
    signs: bool = False  # search also whether credit keeps its sign: signed against softmax
    features: tuple[str, ...] = ()  # of tokens, whose slopes in the weights are searched, in place of the arm's
    slope: float = 2.0  # slopes are searched from minus this to this

    def __post_init__(self):
        least = {
            "trials": 2,
            "initial": 0 if self.anchors else 2,
            "updates": 4 if self.stop_early else 1,
            "replicates": 1,
            "kl_weight": 0,
        }
        for name, low in least.items():
            if not low <= getattr(self, name) < math.inf:
                raise InputError(f"bo.{name} is {getattr(self, name)}, wanted at least {low}")
        for name, known in (("strategy", STRATEGIES), ("objective", OBJECTIVES), ("temperature", TEMPERATURES)):
            if getattr(self, name) not in known:
                raise InputError(f"bo.{name} is {getattr(self, name)!r}, wanted one of {', '.join(known)}")
        low, high = self.temperature_low, self.temperature_high
        if not 0 < low < high < math.inf:
            raise InputError(f"bo.temperature_low, temperature_high: {low}, {high}; wanted numbers above 0, rising")
        if not 0 < self.slope < math.inf:
            raise InputError(f"bo.slope is {self.slope}, wanted a number above 0")
        if len(set(self.features)) != len(self.features):
            raise InputError(f"bo.features names a feature twice: {list(self.features)}")

    def check(self, shape: ShapeParams | RewardShape) -> None:
        """Raise `InputError` where numbers are searched that change nothing in this shape."""
        if self.temperature != "fixed" and not self.signs and shape.normalise != "softmax":
            raise InputError(
                f"bo.temperature is {self.temperature!r} for an arm with normalise {shape.normalise!r}, "
                "which has none; wanted 'fixed', or normalise 'softmax'"
            )


@dataclass(frozen=True)
class EvaluationParams:
    """How policies are judged."""

    prompts: int = 300  # held-out prompts, one response each
    seeds: int = 3  # trainings of each arm, in ablations that train
    sst_path: str | None = None  # trees of the Stanford Sentiment Treebank, where there are some
    toxic_path: str | None = None  # a CSV of SemEval-2021 toxic spans, where there is one


@dataclass(frozen=True)
class DimensionParams:
    """The ablation that asks how many trials more sources need."""

    d: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)  # numbers of weights of the synthetic searches
    trials: int = 100  # of each
    seeds: int = 3  # of each
    rival_trials: int = 40  # at most, of saas, additive and nei, which are beside the question
    rival_seeds: int = 1
    landscapes: tuple[str, ...] = LANDSCAPES
    strategies: tuple[str, ...] = STRATEGIES
    snr: tuple[float, ...] = (1.0,)  # sd of the function over sd of an observation's noise
    goal: float = 0.25  # regret that is low enough, in sd of the function
    sources: tuple[str, ...] = ("shap", "terminal", "lime", "attention")  # of the real searches: the first 2, 3, ...
    normalise: str = "signed"  # and what their credit is normalised by

    def __post_init__(self):
        for name, known in (("landscapes", LANDSCAPES), ("strategies", STRATEGIES)):
            if unknown := [word for word in getattr(self, name) if word not in known]:
                raise InputError(f"dimension.{name}: {unknown[0]!r} is not one; wanted some of {', '.join(known)}")
        if len(set(self.d)) < 2 or min(self.d) < 2 or self.trials < 2:
            raise InputError(f"dimension.d, trials: {list(self.d)}, {self.trials}; wanted two or more, from 2")
        if not set(self.landscapes) - {"flat"}:
            raise InputError(f"dimension.landscapes is {list(self.landscapes)}, wanted one that is not flat")
        if "gp" not in self.strategies:
            raise InputError(f"dimension.strategies is {list(self.strategies)}, wanted gp, and others beside it")
        if len(set(self.sources)) < 3:
            raise InputError(f"dimension.sources is {list(self.sources)}, wanted at least 3")
        if self.rival_trials < 2 or self.rival_seeds < 0:
            raise InputError(
                f"dimension.rival_trials, rival_seeds: {self.rival_trials}, {self.rival_seeds}; wanted at least 2 and 0"
            )
        if self.seeds < 1 or not self.goal > 0 or not min(self.snr, default=0) > 0:
            raise InputError(f"dimension.seeds, goal, snr: {self.seeds}, {self.goal}, {self.snr}; wanted above 0")


@dataclass(frozen=True)
class RunParams:
    """What one notebook run is given."""

    arm: str = "sparse"
    setting: str = ""  # the study's name for what it varies; empty where it varies nothing
    seed: int = 0
    threads: int | None = None  # of torch; the runner fills in its share. Another number rounds differently
    data: DataParams = field(default_factory=DataParams)
    policy: PolicyParams = field(default_factory=PolicyParams)
    reward: RewardParams = field(default_factory=RewardParams)
    attribution: AttributionParams = field(default_factory=AttributionParams)
    shape: ShapeParams = field(default_factory=ShapeParams)
    ppo: PPOParams = field(default_factory=PPOParams)
    bo: BOParams = field(default_factory=BOParams)
    evaluation: EvaluationParams = field(default_factory=EvaluationParams)
    dimension: DimensionParams = field(default_factory=DimensionParams)
    judge: JudgeParams = field(default_factory=JudgeParams)
    downstream: DownstreamParams = field(default_factory=DownstreamParams)

    @property
    def where(self) -> str:
        """What arms are compared within: the dataset, and the setting where there is one."""
        return "-".join(filter(None, (self.data.name, self.setting)))

    def flat(self) -> dict[str, object]:
        """One level, `group_field`, plain YAML values: what papermill takes with `-f`."""
        plain: dict[str, object] = {name: getattr(self, name) for name in SINGLE}
        for group in GROUPS:
            for name, value in asdict(getattr(self, group)).items():
                plain[f"{group}_{name}"] = _lists(value)
        return plain

    @classmethod
    def from_flat(cls, names: Mapping[str, object]) -> RunParams:
        """Read back `flat()`; what is missing has its default.

        Pass a notebook's `globals()`: names that belong to no group are its own business, but `ppo_lrr = 1` is refused.
        """
        nested: dict[str, object] = {name: names[name] for name in SINGLE if name in names}
        for name, value in names.items():
            group, _, key = name.partition("_")
            if group in GROUPS and key and isinstance(value, PLAIN):
                nested.setdefault(group, {})[key] = value
        return parse(cls, nested, "")


def _lists(value: object) -> object:
    return [_lists(item) for item in value] if isinstance(value, tuple) else value


SINGLE = ("arm", "setting", "seed", "threads")
GROUPS: dict[str, type] = {
    "data": DataParams,
    "policy": PolicyParams,
    "reward": RewardParams,
    "attribution": AttributionParams,
    "shape": ShapeParams,
    "ppo": PPOParams,
    "bo": BOParams,
    "evaluation": EvaluationParams,
    "dimension": DimensionParams,
    "judge": JudgeParams,
    "downstream": DownstreamParams,
}

NOTEBOOKS = (
    *("01_reward_model", "02_attribution", "03_shaping", "04_ppo", "05_bayesian_optimisation"),
    *("06_comparison", "07_overoptimisation", "08_critic", "09_verdicts"),
)
ABLATIONS = (
    "ablations/explainers",
    "ablations/ppo",
    "ablations/baselines",
    "ablations/contextual",
    "ablations/human",
    "ablations/dimension",
    "ablations/more_sources",
)  # run where a study names them
BENCHMARKS = ("10_downstream",)  # likewise; they ask a judge over the network
