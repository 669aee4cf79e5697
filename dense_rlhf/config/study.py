"""Read a study: its YAML, the size that is asked for, and settings on top; strict, one line of error.

It imports nothing heavy, as `params`.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path

from dense_rlhf.config.params import ABLATIONS, BENCHMARKS, GROUPS, NOTEBOOKS, DataParams, RunParams, ShapeParams
from dense_rlhf.config.parse import cast, check_numbers, kind, merge, parse, parse_settings, read_yaml, shown
from dense_rlhf.types import InputError

OPTIONS = ("seeds", "notebooks", "workers", "timeout_minutes")
STUDY_KEYS = ("study", "arms", "settings", *OPTIONS, "threads", "size", "sizes", *GROUPS)
VARIED = tuple(name for name in GROUPS if name not in ("data", "shape"))  # what a setting can change


@dataclass(frozen=True)
class StudyParams:
    """A grid: datasets x settings x arms x seeds, through the notebooks."""

    study: str
    arms: dict[str, ShapeParams]
    datasets: tuple[DataParams, ...]
    run: RunParams  # what all runs share
    seeds: tuple[int, ...] = (0,)
    notebooks: tuple[str, ...] = NOTEBOOKS
    workers: int = 1  # runs at a time; the cores are divided among them
    timeout_minutes: float = 240.0  # for one run
    settings: dict[str, RunParams] = field(default_factory=dict)  # by name: `run` with other parameters

    @property
    def comparisons(self) -> list[RunParams]:
        """What the runs share that are compared: each dataset in each setting."""
        settings = self.settings or {"": self.run}
        return [replace(run, data=data, setting=name) for data in self.datasets for name, run in settings.items()]


def load_study(path: Path, settings: typing.Iterable[str] = ()) -> StudyParams:
    """Read a study: its YAML, then what its `sizes` hold for the chosen `size`, then `--set key=value`.

    Mappings merge, so `arms.shap=null` leaves one arm out and the others stay. What `settings` hold comes last.
    Raises `InputError` in one line for anything that is not a parameter, of another type, or impossible.
    """
    given, over = read_yaml(path), parse_settings(settings)
    size = over.get("size", given.get("size", "full"))
    sizes = given.get("sizes", {})
    if not isinstance(sizes, Mapping) or not all(isinstance(one, Mapping) for one in sizes.values()):
        raise InputError(f"sizes is {shown(sizes)}, wanted a mapping of names to mappings of parameters")
    if not isinstance(size, str):
        raise InputError(f"size is {shown(size)} ({kind(size)}), wanted a name")
    if size != "full" and size not in sizes:
        raise InputError(f"size is {size!r}, wanted one of {', '.join(['full', *map(str, sizes)])}")
    merged = merge(merge(given, sizes.get(size, {})), over)
    unknown = [key for key in merged if key not in STUDY_KEYS]
    if unknown:
        raise InputError(f"{unknown[0]} is not a parameter; wanted one of {', '.join(STUDY_KEYS)}")
    return _study(merged, path)


def _study(merged: dict, path: Path) -> StudyParams:
    datasets = merged.get("data", {})
    datasets = datasets if isinstance(datasets, list) else [datasets]
    parsed = tuple(parse(DataParams, one, "data") for one in datasets)
    groups = {name: merged[name] for name in (*GROUPS, "threads") if name in merged and name != "data"}
    if "shape" in groups:
        raise InputError("shape belongs to an arm: write arms: {my-arm: {sources: [...], weights: [...]}}")
    arms = merged.get("arms", {"sparse": {}})
    if not isinstance(arms, Mapping) or not arms:
        raise InputError(f"arms is {kind(arms)}, wanted a mapping of names to sources and weights")
    shapes = {}
    for name, arm in arms.items():
        if arm is None:  # a size can leave an arm out
            continue
        try:
            shapes[_name(name, "arms")] = parse(ShapeParams, arm, f"arms.{name}")
        except InputError as error:
            raise InputError(str(error).replace("shape.", f"arms.{name}.")) from error
    plain = {key: merged[key] for key in OPTIONS if key in merged}
    hints = typing.get_type_hints(StudyParams)
    options = {key: cast(value, hints[key], key) for key, value in plain.items()}
    study = StudyParams(
        _name(merged.get("study", path.stem), "study"),
        shapes,
        parsed,
        parse(RunParams, groups, ""),
        settings=_settings(merged, groups),
        **options,
    )
    for name, value in options.items():
        check_numbers(name, value)
    return _checked(study)


def _settings(merged: dict, groups: dict) -> dict[str, RunParams]:
    """The parameters of each setting: those of the study, with what the setting changes."""
    given, found = merged.get("settings") or {}, {}
    if not isinstance(given, Mapping):
        raise InputError(f"settings is {kind(given)}, wanted a mapping of names to mappings of parameters")
    for name, changed in given.items():
        if changed is None:  # a size can leave a setting out
            continue
        where = f"settings.{_name(name, 'settings')}"
        if not isinstance(changed, Mapping):
            raise InputError(f"{where} is {kind(changed)}, wanted a mapping of parameters: {{ppo: {{lr: 0.1}}}}")
        if unknown := [key for key in changed if key not in VARIED]:
            raise InputError(f"{where}.{unknown[0]} is nothing that a setting changes; wanted {', '.join(VARIED)}")
        try:
            found[name] = parse(RunParams, merge(groups, changed), "")
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
    if given and not found:
        raise InputError("settings: all are left out, wanted at least one, or settings=null")
    return found


def _name(name: object, where: str) -> str:
    """A name that is safe as part of a file name."""
    if not isinstance(name, str) or not name or not all(c.isalnum() or c in "-_" for c in name) or not name.isascii():
        raise InputError(f"{where}: {shown(name)} is not a name; wanted letters, digits, - and _")
    return name


def _checked(study: StudyParams) -> StudyParams:
    if not study.arms:
        raise InputError("arms: all are left out, wanted at least one")
    if not study.seeds or len(set(study.seeds)) != len(study.seeds):
        raise InputError(f"seeds is {shown(list(study.seeds))}, wanted at least one, none twice")
    if not min(study.workers, study.timeout_minutes, math.inf if study.run.threads is None else study.run.threads) > 0:
        raise InputError("workers, threads and timeout_minutes must be above 0")
    _check_least(study)
    for shape in [shape for shape in study.arms.values() if shape.is_learned]:
        for run in study.comparisons:
            run.bo.check(shape)
    known = NOTEBOOKS + ABLATIONS + BENCHMARKS
    unknown = [n for n in study.notebooks if n not in known]
    if unknown:
        raise InputError(f"notebooks: {unknown[0]!r} is not one; wanted some of {', '.join(known)}")
    paths = [(name, attrgetter(name)(run)) for run in study.comparisons for name in PATHS]
    for name, path in paths:
        if path is not None and not Path(path).is_file():
            raise InputError(f"{name}: no file at {path}; give the path of a file that exists")
    for folder in filter(None, [run.downstream.mt_bench_path for run in study.comparisons]):
        if not Path(folder).is_dir():
            raise InputError(f"downstream.mt_bench_path: no folder at {folder}; give one with MT-Bench's files")
    return replace(study, notebooks=tuple(n for n in known if n in study.notebooks))


PATHS = (
    "data.path",
    "attribution.rationale_path",
    "evaluation.sst_path",
    "evaluation.toxic_path",
    "downstream.alpaca_path",
)
LEAST = {
    "data": {"prompt_words": 1, "max_prompt_chars": 1},
    "policy": {"lora_alpha": 0},
    "reward": {
        "hidden": 1,
        "layers": 1,
        "heads": 1,
        "steps": 0,
        "batch": 1,
        "lr": 0,
        "window": 1,
        "max_drop": 0,
        "token_budget": 1,
    },
    "attribution": {"owen_depth": 0, "seed": 0},
    "evaluation": {"prompts": 1, "seeds": 1},
}  # of numbers whose own groups do not say


def _check_least(study: StudyParams) -> None:
    """Raise `InputError` for a number below what it can be."""
    for group, params in [(name, getattr(run, name)) for run in study.comparisons for name in GROUPS]:
        for name, least in LEAST.get(group, {}).items():
            value = getattr(params, name)
            if value is not None and value < least:
                raise InputError(f"{group}.{name} is {value}, wanted at least {least}")
    if min(study.seeds) < 0:
        raise InputError(f"seeds is {shown(list(study.seeds))}, wanted none below 0")
    if most := [drop for run in study.comparisons if (drop := run.reward.max_drop) > 1]:
        raise InputError(f"reward.max_drop is {most[0]}, wanted a share from 0 to 1")
