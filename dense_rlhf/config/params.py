"""Every parameter of a study, typed and strict: YAML in, one flat dictionary for each notebook out, and back.

`ppo: {lr: 1.0e-4}` in a study's YAML is `ppo.lr` on the command line and `ppo_lr` in a notebook's parameters cell.
The comment on a field describes it in the JSON schema. This module imports nothing heavy, so that a wrong parameter is
refused at once.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Literal, get_type_hints

from dense_rlhf.config.benchmarks import DownstreamParams, JudgeParams
from dense_rlhf.config.parse import parameter_cells, read_yaml
from dense_rlhf.config.strict import (
    Count,
    Flag,
    Label,
    Many,
    Model,
    Part,
    Place,
    Positive,
    Real,
    Several,
    Share,
    Size,
    Some,
    Text,
    Whole,
    params,
    parse,
)
from dense_rlhf.types import NORMALISERS, InputError, RewardShape, check_removal, did_you_mean, nearest

LEARNED, DRAWN = "learned", "drawn"  # weights: by the search's model, or the best of as many at random
REGIMES = ("own", "common-step", "longer")
STRATEGIES = ("gp", "saas", "additive", "nei", "random", "sobol")
OBJECTIVES = ("proxy", "gold", "penalised")
TEMPERATURES = ("fixed", "shared", "each")
TUNING = ("interior", "vertex", "face", "ridge", "tent", "flat")
REPORTED = """matern powers bump two_peaks scarcest saturating spike step log_ratio rippled one_source exclusive
              tempered""".split()  # no setting of the search was chosen by these
LANDSCAPES = (*TUNING, *REPORTED)
PLAIN = (bool, int, float, str, list, tuple, type(None))  # what a parameters cell can hold

Dtype = Literal["float32", "bfloat16"]


@params("data")
class DataParams:
    """Which dataset and how its prompts are cut."""

    name: Text = "reviews"  # a registered dataset, or my_module:my_loader
    path: Place | None = None  # a local file, in place of the hub
    revision: Text | None = None  # branch, tag or commit on the hub; the commit it resolves to is recorded
    split: Text | None = None  # the hub's split; by default the dataset's own
    encoding: Text = "utf-8"  # of a local file of text
    text: Text = "text"  # reviews: the column of texts
    label: Text = "label"  # reviews: the column of labels
    labels: Many[Label] = ()  # reviews: which mean bad and good; by default 0 and 1, or names
    separator: Text | None = None  # reviews: of columns; by default a comma, in .tsv a tab
    prompt_words: Count = 8  # reviews: a prompt is the first words of a review
    max_prompt_chars: Count = 2000  # longer prompts are left out and counted
    called: Text | None = None  # its name in runs and pages, where a study has two of one name

    def __post_init__(self):
        try:
            io.TextIOWrapper(io.BytesIO(), encoding=self.encoding)
        except (LookupError, ValueError) as error:
            wanted = "wanted a text encoding that Python knows, such as utf-8 or cp1252"
            raise InputError(f"data.encoding is {self.encoding!r}, {wanted}") from error
        if self.separator is not None and (len(self.separator) != 1 or self.separator in '"\r\n'):
            raise InputError(f"data.separator is {self.separator!r}, wanted one character, such as ; or a tab")
        if self.labels and len({str(label).strip().casefold() for label in self.labels}) * len(self.labels) != 4:
            raise InputError(f"data.labels is {list(self.labels)}, wanted two that differ: which means bad, which good")

    @property
    def short_name(self) -> str:
        """The name as a part of file names: of `my_module:my_loader` the function's."""
        return self.called or self.name.rpartition(":")[2]


@params("policy")
class PolicyParams:
    """Which language model to fine-tune, and how much of it."""

    name: Model = "tiny"  # tiny, smollm2, a hub id or a local folder
    revision: Text | None = None  # of a hub id; the commit it resolves to is recorded
    trainable_layers: Count | None = None  # only the last n layers learn; by default all parameters
    dtype: Dtype = "float32"  # bfloat16: frozen weights and arithmetic; weights that learn stay float32
    critic: Literal["shared", "detached", "separate"] = "shared"  # detached: no gradient into the trunk; separate: own
    value_start: Literal["zero", "score"] = "zero"  # score: a shared or detached head starts by predicting the score
    lora_rank: Count | None = None  # adapters of this rank learn in place of the weights; by default none
    lora_alpha: Size = 32.0  # adapters are scaled by alpha / rank


@params("reward")
class RewardParams:
    """The proxy reward model: a small transformer trained here, or a finished one from the hub."""

    name: Model = "scratch"  # scratch, policy (its first layers, trained on), or a classifier's hub id or folder
    revision: Text | None = None  # of a hub id; the commit it resolves to is recorded
    labels: Part = 1.0  # trained here: the share of the human labels, or pairs, to learn from
    hidden: Count = 64  # scratch: width of the model
    layers: Count = 2  # scratch, policy
    heads: Count = 4  # scratch: attention heads
    steps: Whole = 500  # trained here: of its training
    batch: Count = 96  # trained here: examples a step
    lr: Size = 3e-3  # trained here: learning rate
    window: Count = 48  # labels: tokens of a training snippet; pairs: the most tokens of a dialogue
    max_drop: Share = 0.6  # labels: each snippet loses a uniform share of its tokens, up to this
    seed: Whole = 0  # trained here: of its weights and batches; a study adds the run's where it redraws the proxy
    token_budget: Count | None = None  # tokens in one forward pass; by default set by the device
    dtype: Dtype = "float32"  # of the weights when it scores and explains
    output: Whole | None = None  # which output is the score, from 0, of a finished model that has several
    pair: Flag = False  # a finished model reads prompt and response as two segments, tokenizer(prompt, response)
    dpo_steps: Whole = 0  # log_ratio: steps of DPO on the proxy's own preferences; 0 trains none
    dpo_beta: Positive = 0.1  # log_ratio: how strongly DPO holds its policy to the reference

    def __post_init__(self):
        if self.labels < 1 and not self.trained_here:
            raise InputError(
                f"reward.labels is {self.labels} for {self.name!r}, which is already trained; wanted 1, or "
                "reward.name 'scratch' or 'policy'"
            )

    @property
    def trained_here(self) -> bool:
        """Whether the study trains it, on its own labels or pairs."""
        return self.name in ("scratch", "policy")


@params("attribution")
class AttributionParams:
    """Budgets and conventions of explaining a response of k players."""

    permutations: Count = 2  # shap: 2 k - 2 evaluations each, and the two ends
    samples_per_token: Count = 4  # gaussian, kernel, leverage: evaluations = this times k
    lime_samples: Count = 64  # lime: evaluations
    owen_depth: Whole | None = None  # levels of the tree; by default all, at about 2 k^2 / 3 evaluations
    ig_steps: Count = 16  # integrated gradients
    removal: Text = "drop"  # drop, attention_mask, or replace:TOKEN
    players: Literal["tokens", "words", "sentences"] = "tokens"  # are removed together and share their credit evenly
    rationale_path: Place | None = None  # rationale: a file of texts in which people marked words
    seed: Whole = 0  # of permutations and samples; a study adds the run's where it redraws the explainer

    def __post_init__(self):
        check_removal(self.removal)


@params("shape")
class ShapeParams:
    """An arm: sources, their weights (`learned` and `drawn` leave them to the outer loop), and the normalisation."""

    sources: Some[Text] = ("terminal",)  # registered sources, or my_module:my_source
    weights: Many[Real] | Literal["learned", "drawn"] = (1.0,)  # one a source, which sum to 1
    normalise: Literal[NORMALISERS] = "softmax"  # how each source's credit becomes shares of the score
    temperature: Real | Many[Real] = 1.0  # of softmax; or a list, one a source
    features: Many[Text] = ()  # of tokens, that the weights depend on
    slopes: Many[Many[Real]] = ()  # a row a source, a number a feature

    def __post_init__(self):
        if self.is_learned and len(self.sources) < 2:
            raise InputError(f"shape.weights is {self.weights!r} for one source; wanted at least two sources")
        self.reward_shape()

    @property
    def is_learned(self) -> bool:
        return self.weights in (LEARNED, DRAWN)

    def reward_shape(self) -> RewardShape:
        """The shape; with equal weights while they are still to be learned."""
        even = (1 / len(self.sources),) * len(self.sources)
        return RewardShape(**vars(self) | ({"weights": even} if self.is_learned else {}))


@params("ppo")
class PPOParams:
    """One policy's training."""

    updates: Count = 24  # of the policy
    rollouts: Count = 64  # responses an update
    max_new_tokens: Count = 24  # of a response
    temperature: Positive = 1.0  # of sampling
    sampler: Literal["cache", "captured", "generate"] = "cache"  # our loop; in CUDA graphs; transformers', compiled
    epochs: Count = 1  # passes over each batch of rollouts
    minibatch: Count = 32  # responses an optimiser step
    lr: Positive = 1e-4  # falls linearly to a tenth
    value_lr: Positive = 1e-3  # of the value head
    kl_coef: Size = 0.05  # only the initial value if kl_target is given
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"  # of the penalty: k1 is unbiased, also in gradient; others vary less
    kl_target: Positive | None = None  # nats a response; kl_coef then follows it
    kl_horizon: Positive = 10_000.0  # responses in which kl_coef can change by a fifth
    gamma: Share = 1.0  # discount a token
    lam: Share = 0.95  # lambda of GAE
    clip: Positive = 0.2  # of the probability ratio, either side of 1
    value_clip: Positive = 0.2  # of a value's change within an update
    value_coef: Size = 0.1  # of the value loss in the loss
    max_grad_norm: Positive = 1.0  # longer gradients are shortened to it
    missing_eos_penalty: Size = 0.0  # taken off the last reward of a response without EOS
    whiten_rewards: Flag = False  # divide their deviations from the batch's mean by their sd
    scale_rewards: Flag = False  # divide by the running standard deviation of the scores
    clip_rewards: Positive | None = None  # bound on a token's shaped reward, either sign; the share clipped is logged
    micro_batch: Count = 16  # responses of similar length in a forward pass, in each process
    checkpoint_every: Count = 10  # updates; an interrupted training resumes from there

    def __post_init__(self):
        if self.kl_target is not None and not self.kl_coef > 0:
            raise InputError(f"ppo.kl_coef is {self.kl_coef}, wanted a number above 0, which ppo.kl_target multiplies")
        if self.rollouts % self.minibatch:
            raise InputError(f"ppo.rollouts is {self.rollouts}, wanted a multiple of ppo.minibatch = {self.minibatch}")


@params("bo")
class BOParams:
    """The outer loop."""

    trials: Several = 25  # mixtures that are tried
    initial: Whole = 5  # quasi-random points after the anchors, before the model chooses
    updates: Count = 10  # a trial's: the first of ppo.updates, on the same schedule
    anchors: Flag | None = None  # start with each source alone and all in equal parts; by default all but nei do
    replicates: Count = 1  # trials of each anchor, which show how much another seed changes
    strategy: Literal[STRATEGIES] = "gp"  # how the next trial is chosen
    objective: Literal[OBJECTIVES] = "proxy"  # of held-out responses; penalised: proxy less kl_weight times the KL
    kl_weight: Size = 0.1  # proxy's sd a nat
    stop_early: Flag = False  # halfway, once earlier trials show that the halfway score predicts the final one
    temperature: Literal[TEMPERATURES] = "fixed"  # the arm's; or searched: shared by all sources, or one each
    temperature_low: Positive = 0.01  # temperatures are searched from this
    temperature_high: Positive = 1.0  # to this
    signs: Flag = False  # search also whether credit keeps its sign: signed against softmax
    features: Many[Text] = ()  # of tokens; their slopes in the weights are searched, in place of the arm's
    slope: Positive = 2.0  # slopes are searched from minus this to this

    def __post_init__(self):
        if self.initial < 2 and (self.anchors is False or self.anchors is None and self.strategy == "nei"):
            raise InputError(f"bo.initial is {self.initial}, wanted at least 2 where a search starts without anchors")
        if self.updates < 4 and self.stop_early:
            raise InputError(f"bo.updates is {self.updates}, wanted at least 4 where bo.stop_early is true")
        low, high = self.temperature_low, self.temperature_high
        if low >= high:
            raise InputError(f"bo.temperature_low is {low}, wanted less than bo.temperature_high = {high}")
        if len(set(self.features)) != len(self.features):
            raise InputError(f"bo.features names a feature twice: {list(self.features)}")

    def check(self, shape: ShapeParams | RewardShape) -> None:
        """Raise `InputError` where numbers are searched that change nothing in this shape."""
        if self.temperature != "fixed" and not self.signs and shape.normalise != "softmax":
            raise InputError(
                f"bo.temperature is {self.temperature!r} for an arm with normalise {shape.normalise!r}, "
                "which has none; wanted 'fixed', or normalise 'softmax'"
            )


@params("evaluation")
class EvaluationParams:
    """How policies are evaluated."""

    prompts: Count = 300  # held-out prompts, one response each
    margin: Positive = 0.1  # differences within it do not matter: log-odds of gold, or a share of the value loss
    seeds: Count = 3  # trainings of each arm, in ablations that train
    sst_path: Place | None = None  # trees of the Stanford Sentiment Treebank, if available
    toxic_path: Place | None = None  # a CSV of SemEval-2021 toxic spans, if available
    texts: Count = 1000  # the audit: of a dataset's test split, at most
    rival_path: Place | None = None  # the audit: folder of a second reward model; by default the gold judge
    rival_output: Whole | None = None  # the audit: which output of that model is its score, where it has several
    rival_pair: Flag = False  # the audit: that model reads prompt and response as two segments


@params("dimension")
class DimensionParams:
    """The ablations that ask how many trials more sources need: on known functions, then on reviews."""

    d: Many[Several] = (2, 3, 4, 5, 6, 7, 8)  # numbers of weights of the known functions
    trials: Several = 100  # of each search of a known function
    seeds: Count = 3  # of each search of a known function
    rival_trials: Several = 40  # at most, of saas, additive and nei, which are not the question
    rival_seeds: Whole = 1  # likewise
    landscapes: Many[Literal[LANDSCAPES]] = TUNING  # known functions
    strategies: Many[Literal[STRATEGIES]] = STRATEGIES  # that search them
    snr: Many[Positive] = (1.0,)  # sd of the function over sd of an observation's noise
    goal: Positive = 0.25  # regret that is low enough, in sd of the function
    sources: Many[Text] = ("shap", "terminal", "lime", "attention")  # on reviews: the first 2, 3, ... are mixed
    normalise: Literal[NORMALISERS] = "signed"  # on reviews: what their credit is normalised by

    def __post_init__(self):
        for name, is_enough, wanted in (
            ("d", len(set(self.d)) > 1, "two different numbers"),
            ("landscapes", set(self.landscapes) - {"flat"}, "one that is not flat"),
            ("strategies", "gp" in self.strategies, "gp, and others to compare it with"),
            ("sources", len(set(self.sources)) > 2, "at least 3"),
            ("snr", self.snr, "at least one number"),
        ):
            if not is_enough:
                raise InputError(f"dimension.{name} is {list(getattr(self, name))}, wanted {wanted}")


@params("")
class RunParams:
    """What one notebook run is given."""

    arm: Text = "sparse"
    setting: Text = ""  # the study's name for what it varies; empty if it varies nothing
    regime: Literal[REGIMES] = "own"  # the arm's own step size; shown with it: the common one, or more updates
    seed: Whole = 0
    step_sizes: Many[Positive] = ()  # of which notebook 11 chooses the arm's
    threads: Count | None = None  # of torch; by default the runner's share. Another number rounds differently
    data: DataParams = DataParams()
    policy: PolicyParams = PolicyParams()
    reward: RewardParams = RewardParams()
    attribution: AttributionParams = AttributionParams()
    shape: ShapeParams = ShapeParams()
    ppo: PPOParams = PPOParams()
    bo: BOParams = BOParams()
    evaluation: EvaluationParams = EvaluationParams()
    dimension: DimensionParams = DimensionParams()
    judge: JudgeParams = JudgeParams()
    downstream: DownstreamParams = DownstreamParams()

    @property
    def where(self) -> str:
        """What arms are compared within: the dataset, and the setting if there is one."""
        regime = "" if self.regime == "own" else self.regime
        return "-".join(filter(None, (self.data.short_name, self.setting, regime)))

    def flat(self) -> dict[str, object]:
        """One level, `group_field`, plain YAML values: what papermill takes with `-f`."""
        plain: dict[str, object] = {name: _lists(getattr(self, name)) for name in SINGLE}
        for group in GROUPS:
            for name, value in asdict(getattr(self, group)).items():
                plain[f"{group}_{name}"] = _lists(value)
        return plain

    @classmethod
    def from_flat(cls, names: Mapping[str, object]) -> RunParams:
        """Read back `flat()`; parameters that are missing have their defaults.

        Pass a notebook's `globals()`: names that belong to no group are ignored, but `ppo_lrr = 1` is refused, and
        so is any unknown name that the parameters cell or papermill assigns.
        """
        _check_assigned(names)
        nested: dict[str, object] = {name: names[name] for name in SINGLE if name in names}
        for name, value in names.items():
            group, _, key = name.partition("_")
            if group in GROUPS and key and isinstance(value, PLAIN):
                nested.setdefault(group, {})[key] = value
        return parse(cls, nested)

    @classmethod
    def read(cls, path: Path) -> RunParams:
        """The parameters in a run's `params.yaml`. Raises `InputError` where they are not readable."""
        return cls.from_flat(read_yaml(path))


def _check_assigned(names: Mapping[str, object]) -> None:
    """Raise `InputError` for what a notebook was given and would not heed: a group in one, or an unknown name."""
    own, passed = parameter_cells(names.get("In", ()))
    groups = {name: value for name, value in names.items() if name in GROUPS and isinstance(value, Mapping)}
    for name, value in (groups | own | passed).items():
        if isinstance(value, Mapping):
            flat = ", ".join(f"{name}_{key}" for key in value) if name in GROUPS else "a plain value"
            raise InputError(f"{name} is a mapping, and a notebook's parameters are flat: give {flat}")
        is_own = name in own and not nearest(name, FLAT, 0.85)  # of a notebook of the user's
        if name not in (*FLAT, "run_dir", "study_dir") and not is_own:
            raise InputError(f"{name} is not a parameter{did_you_mean(name, FLAT)}")


def _lists(value: object) -> object:
    return [_lists(item) for item in value] if isinstance(value, tuple) else value


GROUPS: dict[str, type] = {name: hint for name, hint in get_type_hints(RunParams).items() if is_dataclass(hint)}
SINGLE = ("arm", "setting", "regime", "seed", "step_sizes", "threads")
FLAT = (*SINGLE, *(f"{group}_{field.name}" for group, cls in GROUPS.items() for field in fields(cls)))

NOTEBOOKS = (
    *("01_reward_model", "02_attribution", "03_shaping", "04_one_update", "04_ppo", "05_bayesian_optimisation"),
    *("06_comparison", "07_overoptimisation", "08_critic", "09_verdicts", "11_step_size"),
)
UNSEEN = "13_unseen_questions"  # wants `downstream.mt_bench_path`
ABLATIONS = (  # run where a study names them
    *("ablations/explainers", "ablations/ppo", "ablations/baselines", "ablations/contextual", "ablations/human"),
    *("ablations/dimension", "ablations/more_sources", "12_reward_model_audit", UNSEEN),
)
BENCHMARKS = ("10_downstream",)  # likewise; they ask a judge over the network
