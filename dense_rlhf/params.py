"""Every parameter of a study, typed and strict: YAML in, one flat dictionary for each notebook out, and back.

`ppo: {lr: 1.0e-4}` in a study's YAML is `ppo.lr` on the command line and `ppo_lr` in a notebook's parameters cell.
This module imports nothing heavy, so that a wrong parameter is refused at once.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from dense_rlhf.types import InputError, RewardShape, check_removal

LEARNED = "learned"
DTYPES = ("float32", "bfloat16")
PLAYERS = ("tokens", "words", "sentences")
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
    dtype: str = "float32"  # float32 or bfloat16: the weights of the frozen reference

    def __post_init__(self):
        _check_dtype("policy.dtype", self.dtype)


@dataclass(frozen=True)
class RewardParams:
    """The proxy reward model: a small transformer trained here, or a finished one from the hub."""

    name: str = "scratch"  # scratch, or the hub id or folder of a sequence classifier with one output
    revision: str | None = None
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
    temperature: float = 1.0

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
        return RewardShape(self.sources, even if self.is_learned else self.weights, self.normalise, self.temperature)


@dataclass(frozen=True)
class PPOParams:
    """One policy's training."""

    updates: int = 24
    rollouts: int = 64  # responses an update
    max_new_tokens: int = 24
    temperature: float = 1.0
    epochs: int = 1  # passes over each batch of rollouts
    minibatch: int = 32  # responses an optimiser step
    lr: float = 1e-4  # falls linearly to a tenth
    value_lr: float = 1e-3  # of the value head
    kl_coef: float = 0.05
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.2
    value_coef: float = 0.1
    max_grad_norm: float = 1.0
    missing_eos_penalty: float = 0.0
    whiten_rewards: bool = False
    micro_batch: int = 64  # responses a forward pass

    def __post_init__(self):
        for name in ("updates", "rollouts", "max_new_tokens", "epochs", "minibatch", "micro_batch", "temperature"):
            if not getattr(self, name) > 0:
                raise InputError(f"ppo.{name} is {getattr(self, name)}, wanted a number above 0")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"ppo.{name} is {getattr(self, name)}, wanted a number from 0 to 1")
        for name in ("lr", "value_lr", "clip", "value_clip", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"ppo.{name} is {getattr(self, name)}, wanted a number above 0")
        if self.rollouts % self.minibatch:
            raise InputError(f"ppo.rollouts is {self.rollouts}, wanted a multiple of ppo.minibatch = {self.minibatch}")


@dataclass(frozen=True)
class BOParams:
    """The outer loop."""

    trials: int = 25
    initial: int = 5  # quasi-random points before the model chooses
    updates: int = 10  # PPO updates a trial

    def __post_init__(self):
        if self.trials < 2 or self.initial < 2 or self.updates < 1:
            raise InputError(f"bo has trials {self.trials}, initial {self.initial}, updates {self.updates}; "
                             "wanted at least 2, 2 and 1")  # fmt: skip


@dataclass(frozen=True)
class EvaluationParams:
    """How policies are judged."""

    prompts: int = 300  # held-out prompts, one response each
    sst_path: str | None = None  # trees of the Stanford Sentiment Treebank, where there are some
    toxic_path: str | None = None  # a CSV of SemEval-2021 toxic spans, where there is one


@dataclass(frozen=True)
class RunParams:
    """What one notebook run is given."""

    arm: str = "sparse"
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

    def flat(self) -> dict[str, object]:
        """One level, `group_field`, plain YAML values: what papermill takes with `-f`."""
        plain: dict[str, object] = {"arm": self.arm, "seed": self.seed, "threads": self.threads}
        for group in GROUPS:
            for name, value in asdict(getattr(self, group)).items():
                plain[f"{group}_{name}"] = list(value) if isinstance(value, tuple) else value
        return plain

    @classmethod
    def from_flat(cls, names: Mapping[str, object]) -> RunParams:
        """Read back `flat()`; what is missing has its default.

        Pass a notebook's `globals()`: names that belong to no group are its own business, but `ppo_lrr = 1` is refused.
        """
        nested: dict[str, object] = {name: names[name] for name in ("arm", "seed", "threads") if name in names}
        for name, value in names.items():
            group, _, key = name.partition("_")
            if group in GROUPS and key and isinstance(value, PLAIN):
                nested.setdefault(group, {})[key] = value
        return parse(cls, nested, "")


GROUPS: dict[str, type] = {
    "data": DataParams, "policy": PolicyParams, "reward": RewardParams, "attribution": AttributionParams,
    "shape": ShapeParams, "ppo": PPOParams, "bo": BOParams, "evaluation": EvaluationParams,
}  # fmt: skip

NOTEBOOKS = ("01_reward_model", "02_attribution", "03_shaping", "04_ppo", "05_bayesian_optimisation", "06_comparison")
ABLATIONS = ("ablations/explainers",)  # run where a study names them


@dataclass(frozen=True)
class StudyParams:
    """A grid: datasets x arms x seeds, through the notebooks."""

    study: str
    arms: dict[str, ShapeParams]
    datasets: tuple[DataParams, ...]
    run: RunParams  # what all runs share
    seeds: tuple[int, ...] = (0,)
    notebooks: tuple[str, ...] = NOTEBOOKS
    workers: int = 1  # runs at a time; the cores are divided among them
    timeout_minutes: float = 240.0  # for one run


# ---------------------------------------------------------------------------------------------------- reading

STUDY_KEYS = ("study", "arms", "seeds", "notebooks", "workers", "timeout_minutes", "size", "sizes", *GROUPS)


def _kind(value: object) -> str:
    return {str: "text", bool: "yes/no", int: "a whole number", float: "a number", list: "a list", dict: "a mapping",
            type(None): "nothing"}.get(type(value), type(value).__name__)  # fmt: skip


def _cast(value: object, wanted: object, name: str) -> object:
    """`value` as the annotated type; the only conversions are whole numbers to numbers and lists to tuples."""
    options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    for option in options:
        if option is float and type(value) in (int, float):
            return float(value)
        if option in (int, str, bool, type(None)) and type(value) is option:
            return value
        if typing.get_origin(option) is tuple and isinstance(value, (list, tuple)):
            inner = typing.get_args(option)[0]
            return tuple(_cast(item, inner, f"{name}[{i}]") for i, item in enumerate(value))
    hint = ""
    if isinstance(value, str) and float in options:
        hint = "; YAML reads 1e-4 as text, write 1.0e-4"
    names = " or ".join(getattr(o, "__name__", None) or str(o) for o in options).replace("NoneType", "nothing")
    raise InputError(f"{name} is {value!r} ({_kind(value)}), wanted {names}{hint}")


def parse(cls: type, given: object, where: str):
    """Build the dataclass `cls` from a mapping. Raises `InputError` for unknown keys and wrong types."""
    if not isinstance(given, Mapping):
        raise InputError(f"{where or 'the file'} is {_kind(given)}, wanted a mapping of {cls.__name__}")
    hints = typing.get_type_hints(cls)
    prefix = f"{where}." if where else ""
    unknown = [key for key in given if key not in hints]
    if unknown:
        raise InputError(f"{prefix}{unknown[0]} is not a parameter; wanted one of {', '.join(hints)}")
    values = {}
    for key, value in given.items():
        is_group = isinstance(hints[key], type) and key in GROUPS
        values[key] = parse(hints[key], value, prefix + key) if is_group else _cast(value, hints[key], prefix + key)
    return cls(**values)


def _merge(base: dict, over: Mapping) -> dict:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def read_yaml(path: Path) -> dict:
    """A YAML mapping, safely; `InputError` for a missing or broken file."""
    import yaml

    if not path.is_file():
        raise InputError(f"no file at {path}; give the path of a study, such as params/reviews.yaml")
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds {_kind(value)}, wanted a mapping of parameters")
    return value


def _settings(pairs: typing.Iterable[str]) -> dict:
    """`["ppo.lr=0.1", "size=smoke"]` as nested mappings, values read as YAML."""
    import yaml

    nested: dict = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise InputError(f"--set {pair!r}: wanted key=value, such as ppo.lr=1.0e-4")
        try:
            value: object = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"--set {pair!r}: the value is not YAML") from error
        for part in reversed(key.split(".")):
            value = {part: value}
        nested = _merge(nested, value)
    return nested


def load_study(path: Path, settings: typing.Iterable[str] = ()) -> StudyParams:
    """Read a study: its YAML, then what its `sizes` hold for the chosen `size`, then `--set key=value`.

    Mappings merge, so `arms.shap=null` leaves one arm out and the others stay.
    Raises `InputError` in one line for anything that is not a parameter, of another type, or impossible.
    """
    given, over = read_yaml(path), _settings(settings)
    size = over.get("size", given.get("size", "full"))
    sizes = given.get("sizes", {})
    if size != "full" and size not in sizes:
        raise InputError(f"size is {size!r}, wanted one of {', '.join(['full', *sizes])}")
    merged = _merge(_merge(given, sizes.get(size) or {}), over)
    unknown = [key for key in merged if key not in STUDY_KEYS]
    if unknown:
        raise InputError(f"{unknown[0]} is not a parameter; wanted one of {', '.join(STUDY_KEYS)}")
    return _study(merged, path)


def _study(merged: dict, path: Path) -> StudyParams:
    datasets = merged.get("data", {})
    datasets = datasets if isinstance(datasets, list) else [datasets]
    parsed = tuple(parse(DataParams, one, "data") for one in datasets)
    groups = {name: merged[name] for name in GROUPS if name in merged and name != "data"}
    if "shape" in groups:
        raise InputError("shape belongs to an arm: write arms: {my-arm: {sources: [...], weights: [...]}}")
    arms = merged.get("arms", {"sparse": {}})
    if not isinstance(arms, Mapping) or not arms:
        raise InputError(f"arms is {_kind(arms)}, wanted a mapping of names to sources and weights")
    shapes = {}
    for name, arm in arms.items():
        if arm is None:  # a size can leave an arm out
            continue
        try:
            shapes[_name(name, "arms")] = parse(ShapeParams, arm, f"arms.{name}")
        except InputError as error:
            raise InputError(str(error).replace("shape.", f"arms.{name}.")) from error
    plain = {key: merged[key] for key in ("seeds", "notebooks", "workers", "timeout_minutes") if key in merged}
    hints = typing.get_type_hints(StudyParams)
    options = {key: _cast(value, hints[key], key) for key, value in plain.items()}
    study = StudyParams(_name(merged.get("study", path.stem), "study"), shapes, parsed,
                        parse(RunParams, groups, ""), **options)  # fmt: skip
    return _checked(study)


def _name(name: object, where: str) -> str:
    """A name that is safe as part of a file name."""
    if not isinstance(name, str) or not name or not all(c.isalnum() or c in "-_" for c in name) or not name.isascii():
        raise InputError(f"{where}: {name!r} is not a name; wanted letters, digits, - and _")
    return name


def _checked(study: StudyParams) -> StudyParams:
    if not study.arms:
        raise InputError("arms: all are left out, wanted at least one")
    if not study.seeds or len(set(study.seeds)) != len(study.seeds):
        raise InputError(f"seeds is {list(study.seeds)}, wanted at least one, none twice")
    if study.workers < 1 or not study.timeout_minutes > 0:
        raise InputError("workers and timeout_minutes must be above 0")
    known = NOTEBOOKS + ABLATIONS
    unknown = [n for n in study.notebooks if n not in known]
    if unknown:
        raise InputError(f"notebooks: {unknown[0]!r} is not one; wanted some of {', '.join(known)}")
    for data in study.datasets:
        if data.path is not None and not Path(data.path).is_file():
            raise InputError(f"data.path: no file at {data.path}; give the path of a file that exists")
    return replace(study, notebooks=tuple(n for n in known if n in study.notebooks))
