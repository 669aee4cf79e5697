"""Read a study: its YAML, the size that is asked for, and settings on top; strict, one line of error.

It imports nothing heavy, as `params`.
"""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, fields, replace
from functools import reduce
from operator import attrgetter
from pathlib import Path

from pydantic import TypeAdapter

from dense_rlhf.config.params import (
    ABLATIONS,
    BENCHMARKS,
    GROUPS,
    NOTEBOOKS,
    UNSEEN,
    DataParams,
    RunParams,
    ShapeParams,
)
from dense_rlhf.config.parse import merge, parse_settings, read_yaml
from dense_rlhf.config.strict import (
    Count,
    Flag,
    Many,
    Positive,
    Some,
    Text,
    Whole,
    described,
    kind,
    listed,
    params,
    parse,
    shown,
)
from dense_rlhf.files import content_key
from dense_rlhf.types import InputError, did_you_mean

KNOWN = NOTEBOOKS + ABLATIONS + BENCHMARKS  # in the order in which they run
OPTIONS = ("seeds", "redraws", "step_sizes", "common_step", "longer", "notebooks", "workers", "timeout_minutes")
STUDY_KEYS = ("study", "arms", "settings", *OPTIONS, "threads", "size", "sizes", *GROUPS)
VARIED = tuple(name for name in GROUPS if name not in ("data", "shape"))  # what a setting can change
PLACES = ("study", "workers", "timeout_minutes")  # what changes no run; any other setting makes a variant of the study
RESERVED = ("interactive", "train")  # folders of runs/ that are no study's
LONGEST = 60  # characters of a name
FILES = "data.path attribution.rationale_path evaluation.sst_path evaluation.toxic_path downstream.alpaca_path".split()


@params("")
class StudyParams:
    """A grid: datasets x settings x arms x seeds, through the notebooks."""

    study: Text  # the name of its folder in runs/ and reports/; by default the file's
    arms: dict[str, ShapeParams]
    datasets: Many[DataParams]
    run: RunParams  # what all runs share
    seeds: Many[Whole] = (0,)  # of the policies' trainings
    redraws: Many[typing.Literal["proxy", "explainer", "search"]] = ("explainer",)  # by each seed, as PPO always is
    step_sizes: Many[Positive] = ()  # each arm takes its best of them, ppo.lr among them; none: all have ppo.lr
    common_step: Flag = False  # train every arm at ppo.lr too, to be shown as well
    longer: dict[str, Count] = field(default_factory=dict)  # arms that are also trained for so many updates
    notebooks: Some[typing.Literal[KNOWN]] = NOTEBOOKS  # that run
    workers: Count = 1  # runs at a time; the cores are divided among them
    timeout_minutes: Positive = 240.0  # for one run
    settings: dict[str, RunParams] = field(default_factory=dict)  # by name: `run` with other parameters

    def __post_init__(self):
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise InputError(f"seeds is {shown(list(self.seeds))}, wanted at least one, none twice")
        for run in self.comparisons:
            for shape in [shape for shape in self.arms.values() if shape.is_learned]:
                run.bo.check(shape)
            self._check_updates(run)
            self._check_steps(run)
        if "proxy" in self.redraws and not self.run.reward.trained_here:
            raise InputError(f"redraws names proxy, but {self.run.reward.name!r} is trained already; leave it out")

    def _check_steps(self, run: RunParams) -> None:
        sizes, wanted = self.step_sizes, {"04_ppo", "11_step_size"}
        if sizes and (len(set(sizes)) != len(sizes) or len(sizes) < 2 or run.ppo.lr not in sizes):
            need = f"wanted two or more that differ, among them ppo.lr = {run.ppo.lr:g}, the common one"
            raise InputError(f"step_sizes is {list(sizes)}, {need}")
        if sizes and not wanted <= set(self.notebooks):
            raise InputError("step_sizes are tried in a notebook: notebooks must name 04_ppo and 11_step_size")
        if self.common_step and not sizes:
            raise InputError("common_step is true without step_sizes: ppo.lr is every arm's own; leave it out")

    def _check_updates(self, run: RunParams) -> None:
        whole, learns = run.ppo.updates, any(shape.is_learned for shape in self.arms.values())
        if learns and run.bo.updates > whole:
            need = f"wanted at most ppo.updates = {whole}: a trial is the first part of a training"
            raise InputError(f"bo.updates is {run.bo.updates}, {need}")
        for arm, updates in self.longer.items():
            if arm not in self.arms:
                raise InputError(f"longer.{arm} is no arm of the study{did_you_mean(arm, self.arms)}")
            if updates <= whole:
                raise InputError(f"longer.{arm} is {updates}, wanted more than ppo.updates = {whole}")

    @property
    def comparisons(self) -> list[RunParams]:
        """What the runs share that are compared: each dataset in each setting."""
        settings = self.settings or {"": self.run}
        return [replace(run, data=data, setting=name) for data in self.datasets for name, run in settings.items()]


def load_study(path: Path, settings: typing.Iterable[str] = ()) -> StudyParams:
    """Read a study: its YAML, then what its `sizes` hold for the chosen `size`, then `--set key=value`.

    Mappings merge, so `arms.shap=null` leaves one arm out and the others stay, and `arms={}` clears them. What
    `settings` hold comes last. A study that is changed by `--set` is a variant: its name tells it from the file's own,
    unless `study` gives one. Raises `InputError` in one line for anything that is not a parameter, of another type, or
    impossible.
    """
    given, over = read_yaml(path), parse_settings(settings)
    size = next((one["size"] for one in reversed(over) if "size" in one), given.get("size", "full"))
    sizes = given.get("sizes", {})
    if not isinstance(sizes, Mapping) or not all(isinstance(one, Mapping) for one in sizes.values()):
        raise InputError(f"sizes is {shown(sizes)}, wanted a mapping of names to mappings of parameters")
    if not isinstance(size, str):
        raise InputError(f"size is {shown(size)} ({kind(size)}), wanted a name")
    if size != "full" and size not in sizes:
        known = ["full", *map(str, sizes)]
        raise InputError(f"size is {shown(size)}, wanted one of {', '.join(known)}{did_you_mean(size, known)}")
    merged = reduce(merge, [given, sizes.get(size, {}), *over])
    _check_keys(merged, STUDY_KEYS, "{} is not a parameter")
    _check_arms(merged.get("arms"), given.get("arms", {"sparse": {}}))
    study = _checked(_study(merged, path))
    over = [one for one in over if one != {"size": given.get("size", "full")}]
    return replace(study, study=study.study + _variant(over))


def _variant(over: Sequence[Mapping]) -> str:
    """What settings add to the name of a study: their text, shortened, and a hash of it; empty where no run changes."""
    told: dict[str, object] = {}
    for key, value in (leaf for one in over for leaf in _leaves(one)):
        told = {k: v for k, v in told.items() if k != key and not k.startswith(f"{key}.")} | {key: value}
    changed = {key: told[key] for key in sorted(told) if key not in PLACES}
    if "study" in told or not changed:
        return ""
    text = re.sub("[^A-Za-z0-9]+", "-", "-".join(f"{key}-{value}" for key, value in changed.items()))
    return f"-{text[:40].strip('-')}-{content_key(changed)[:6]}"


def _leaves(nested: Mapping, where: str = "") -> Iterator[tuple[str, object]]:
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{where}{key}.")
        else:
            yield f"{where}{key}", value


def _check_keys(given: Mapping, known: typing.Iterable[str], problem: str) -> None:
    if unknown := [key for key in given if key not in known]:
        key = str(unknown[0])[:LONGEST]
        meant = [f"{group}.{one.name}" for group in GROUPS if group in known for one in fields(GROUPS[group])]
        meant = [name for name in meant if key in (name.partition(".")[2], name.replace(".", "_"))]
        hint = f"; did you mean {' or '.join(meant[:2])}?" if meant else did_you_mean(key, known)
        raise InputError(f"{problem.format(key)}; wanted one of {', '.join(known)}{hint}")


def _check_arms(arms: object, given: object) -> None:
    """Raise `InputError` for an arm that is changed or left out, and that no YAML describes."""
    if isinstance(arms, Mapping) and isinstance(given, Mapping):
        for name, arm in arms.items():
            if name not in given and (arm is None or isinstance(arm, Mapping) and "sources" not in arm):
                hint = did_you_mean(name, map(str, given))
                raise InputError(f"arms.{str(name)[:LONGEST]} is no arm of the study, and has no sources{hint}")


def _study(merged: dict, path: Path) -> StudyParams:
    if "shape" in merged:
        raise InputError("shape belongs to an arm: write arms: {my-arm: {sources: [...], weights: [...]}}")
    datasets = merged.get("data", {})
    datasets = datasets if isinstance(datasets, list) else [datasets]
    groups = {name: merged[name] for name in (*VARIED, "threads") if name in merged}
    arms = _by_name(merged.get("arms", {"sparse": {}}), "arms", "sources and weights")
    settings = _by_name(merged.get("settings") or {}, "settings", "mappings of parameters")
    for name, changed in settings.items():
        _check_keys(changed, VARIED, f"settings.{name}.{{}} is nothing that a setting changes")
    return parse(
        StudyParams,
        {
            "study": _name(merged.get("study", path.stem), "study"),
            "arms": {name: parse(ShapeParams, arm, f"arms.{name}") for name, arm in arms.items()},
            "datasets": [parse(DataParams, one, "data") for one in datasets],
            "run": parse(RunParams, groups),
            "settings": {n: parse(RunParams, merge(groups, over), f"settings.{n}") for n, over in settings.items()},
        }
        | {key: merged[key] for key in OPTIONS if key in merged},
    )


def _by_name(given: object, where: str, what: str) -> dict[str, Mapping]:
    """Arms or settings by their names, without those that a size leaves out."""
    if not isinstance(given, Mapping):
        raise InputError(f"{where} is {kind(given)}, wanted a mapping of names to {what}")
    kept = {_name(name, where): value for name, value in given.items() if value is not None}
    for name, value in kept.items():
        if not isinstance(value, Mapping):
            raise InputError(f"{where}.{name} is {kind(value)}, wanted a mapping of parameters")
    if not kept and (given or where == "arms"):
        raise InputError(f"{where}: all are left out, wanted at least one")
    return kept


def _name(name: object, where: str) -> str:
    """A name that is safe as part of a file name."""
    if not isinstance(name, str) or not re.fullmatch(rf"[A-Za-z0-9_][A-Za-z0-9_-]{{0,{LONGEST - 1}}}", name):
        wanted = f"wanted letters, digits, - and _, {LONGEST} at most"
        what = shown(name) if isinstance(name, str) else f"{shown(name)} ({kind(name)})"
        raise InputError(f"{where}: {what} is not a name; {wanted}")
    if where == "study" and name in RESERVED:
        raise InputError(f"study: {name} is the name of a folder for other runs; wanted another")
    return name


def _checked(study: StudyParams) -> StudyParams:
    """The study with its notebooks in order. Raises `InputError` for a file or folder that does not exist."""
    names = [_name(data.called, "data.called") if data.called else data.short_name for data in study.datasets]
    if not names or len(set(names)) != len(names):
        hint = "; tell them apart: data: [{name: ..., called: helpful}, ...]" if names else ""
        raise InputError(f"data names {', '.join(names) or 'nothing'}, wanted datasets of different names{hint}")
    for run in study.comparisons:
        for name in FILES:
            path = attrgetter(name)(run)
            if path is not None and not os.path.isfile(path):
                raise InputError(f"{name}: no file at {path}; give the path of a file that exists")
            if path is not None and not os.access(path, os.R_OK):
                raise InputError(f"{name}: {path} cannot be read; change its permissions")
        folder = run.downstream.mt_bench_path
        if folder and not os.path.isdir(folder):
            raise InputError(f"downstream.mt_bench_path: no folder at {folder}; give one with MT-Bench's files")
        if not folder and UNSEEN in study.notebooks:
            raise InputError(f"downstream.mt_bench_path: {UNSEEN} wants questions; give a folder with question.jsonl")
    return replace(study, notebooks=tuple(name for name in KNOWN if name in study.notebooks))


def studies(folder: Path) -> dict[str, str]:
    """The studies under `folder`/params by their path in it, each with the first line of its comment."""
    found = {}
    for path in sorted((folder / "params").rglob("*.yaml")):
        place = path.relative_to(folder)
        try:
            is_study = not any(part.startswith(".") for part in place.parts) and set(read_yaml(path)) & set(STUDY_KEYS)
        except InputError as error:
            found[str(place)] = f"cannot be read: {error}"
            continue
        if is_study:
            first = path.read_text(encoding="utf-8").partition("\n")[0]
            found[str(place)] = first.lstrip("# ") if first.startswith("#") else ""
    return found


def parameters(name: str = "") -> dict[str, tuple[str, object, str]]:
    """What each parameter admits, in words, its default and its meaning: all, those of a group, or one.

    Raises `InputError` for an unknown name.
    """
    whole = listed(StudyParams, ("study", *OPTIONS)) | listed(RunParams, ("threads",))
    for group, cls in GROUPS.items():
        where = "arms.NAME" if group == "shape" else group
        whole |= {f"{where}.{key}": about for key, about in listed(cls).items()}
    plain = {key.removeprefix("arms.NAME.").replace(".", "_"): key for key in whole} | {key: key for key in whole}
    group = "arms.NAME" if name == "shape" else name
    wanted = {key: whole[key] for key in whole if key.startswith(f"{group}." if group else "")}
    wanted = wanted or ({plain[name]: whole[plain[name]]} if name in plain else {})
    if not wanted:
        known = [*GROUPS, "arms", *plain]
        raise InputError(f"{shown(name)} is no parameter and no group{did_you_mean(name, known)}")
    return wanted


def schema() -> dict:
    """The JSON schema of a study's YAML file, for editors; a field's comment is its description."""
    whole = TypeAdapter(StudyParams).json_schema()
    types, own = whole["$defs"], whole["properties"]
    for cls in (*GROUPS.values(), RunParams, StudyParams):
        properties = own if cls is StudyParams else types[cls.__name__]["properties"]
        for name, text in described(cls).items():
            properties[name]["description"] = text
    run = types.pop("RunParams")["properties"]
    for node in run.values():
        node.pop("default", None)  # of a whole group; its fields have theirs
    data, arm = run["data"], run["shape"]

    def by_name(value: dict) -> dict:
        return {"type": ["object", "null"], "additionalProperties": {"anyOf": [value, {"type": "null"}]}}

    def mapping(properties: dict) -> dict:
        return {"type": "object", "additionalProperties": False, "properties": properties}

    properties = {name: own[name] for name in ("study", *OPTIONS)} | {name: run[name] for name in (*VARIED, "threads")}
    properties |= {
        "data": {"anyOf": [data, {"type": "array", "items": data}]},
        "arms": by_name(arm),
        "settings": by_name(mapping({name: run[name] for name in VARIED})),
        "size": {"type": "string", "description": "full, or one of the names in sizes"},
        "sizes": {"type": "object", "additionalProperties": {"$ref": "#"}},
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$defs": types} | mapping(properties)
