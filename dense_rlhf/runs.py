"""The workspace of a study, and a run's folder in it: what a notebook writes and later notebooks and reports read.

runs/STUDY/JOB/  params.yaml  inputs.json  notebook.ipynb  metrics.json  *.csv  log.txt
                 run.json (written last, by the runner)
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from dense_rlhf import __version__
from dense_rlhf.config.parse import read_yaml
from dense_rlhf.files import content_key, file_sha256, finite, naming, read_json, settled_sha256, write_json, write_text
from dense_rlhf.fingerprint import PACKAGE
from dense_rlhf.types import InputError

if TYPE_CHECKING:
    import pandas as pd

CODE = (PACKAGE.name, "notebooks", "locks", "pyproject.toml")  # what a run depends on, with its parameters
STUDY_FOLDERS = ("notebooks", "params")  # what makes a folder a workspace
README = f"""A study with dense-rlhf {__version__}: each of notebooks/ asks one question, each of params/ is a study.
`dense-rlhf run params/reviews.yaml` runs one; its runs are kept in runs/, its pages open at reports/index.html.
"""
GOOD = ("ok", "cached")  # states of a run that left what it should
RECORDED = ("ok", "stale", "failed", "timeout", "killed", "cancelled")  # states that a record can have
RECORD = dict.fromkeys(("job", "notebook", "dataset", "arm", "status", "error", "key", "training_key"), str)
RECORD |= {"seed": int, "seconds": float, "cpu_seconds": float, "started": float, "artefacts": dict, "folders": list}
INPUTS = dict.fromkeys(("notebook", "source", "training", "locks"), str)
INPUTS |= dict.fromkeys(("parameters", "files", "upstream", "shown"), dict)
PACKAGES = ("torch", "transformers", "trl", "shap", "lime", "botorch", "papermill", "numpy", "pandas")


@dataclass(frozen=True)
class RunFolder:
    """One run's files; names stay inside the folder."""

    path: Path

    def file(self, name: str) -> Path:
        """The path of one file of this run. Raises `InputError` for a name that leads elsewhere."""
        if not _is_name(name):
            raise InputError(f"{name!r} is not a file name; a run writes into its own folder only")
        return self.path / name

    def save_table(self, name: str, table: pd.DataFrame) -> None:
        write_text(self.file(f"{name}.csv"), table.to_csv(index=False))

    def load_table(self, name: str) -> pd.DataFrame:
        import pandas as pd

        path = self._unaltered(f"{name}.csv")
        try:
            return pd.read_csv(path, keep_default_na=True)
        except ValueError as error:  # pandas' own, and of bytes that are no text
            raise InputError(f"{path} is no table ({' '.join(str(error).split())}); run it again") from error

    def _unaltered(self, name: str) -> Path:
        """The path of a file. Raises `InputError` if it is not as this run, if it finished, left it."""
        path, record = self.file(name), {} if name == "run.json" else self.record()
        wanted = record.get("artefacts", {}).get(name)
        if record.get("status") == "ok" and wanted and _sha256(path) != wanted:
            raise InputError(f"{path} is missing or altered since its run; run the study again")
        return path

    def parameters(self) -> dict:
        """The flat parameters in `params.yaml`, as they were written; empty where there are none that can be read."""
        try:
            path = self.file("params.yaml")
            return dict(_parameters(path, file_sha256(path) if path.is_file() else ""))
        except InputError:
            return {}

    def save_metrics(self, metrics: Mapping[str, object] = MappingProxyType({}), /, **more: object) -> None:
        """Write `metrics.json`; intervals become mappings, numbers that are not finite null."""
        write_json(self.file("metrics.json"), finite(dict(metrics) | more))

    def load_json(self, name: str) -> dict:
        """A JSON file of this run, empty where it is not there. Raises `InputError` for a damaged one."""
        return read_json(self._unaltered(name))

    def record(self) -> dict:
        """What `run.json` says; empty for a run that did not finish: it is missing, damaged, or of another folder."""
        found = {"job": self.path.name, "error": "", "seconds": 0.0, "started": 0.0, "artefacts": {}}
        found |= self._typed("run.json", RECORD)
        known = {"notebook", "dataset"} <= found.keys() and found.get("status") in RECORDED
        files = all(isinstance(sha, str) and _is_name(name) for name, sha in found["artefacts"].items())
        return found if known and files and found["job"] == self.path.name else {}

    def inputs(self) -> dict:
        """What the run depended on, as `inputs.json` says; empty where that is missing or damaged."""
        found = self._typed("inputs.json", INPUTS)
        return found if "parameters" in found else {}

    def _typed(self, name: str, kinds: Mapping[str, type]) -> dict:
        """A JSON file of this run if each value that it has is of its kind; else empty."""
        with suppress(InputError):
            found = self.load_json(name)
            if all(_is_a(found[key], kind) for key, kind in kinds.items() if key in found):
                return found
        return {}


@lru_cache(maxsize=1000)
def _parameters(path: Path, sha256: str) -> dict:
    return read_yaml(path)  # which takes longer than all else that a report reads


def _is_name(name: str) -> bool:
    return Path(name).name == name and not name.startswith(".")


def _is_a(value: object, kind: type) -> bool:
    """Whether JSON's `value` is of a kind; a float is a number of seconds that a calendar has."""
    if kind is float:
        return isinstance(value, int | float) and 0 <= value < 1e11
    return isinstance(value, kind)


def _is_study(folder: Path) -> bool:
    return all((folder / name).is_dir() for name in STUDY_FOLDERS)


def workspace() -> Path:
    """The folder of the user's study: the nearest at or above the current one with notebooks/ and params/, else the
    checkout of this package. All that a study writes goes there: runs/ and reports/.

    Raises `InputError` where there is neither; the installed package is never a workspace.
    """
    here = Path.cwd()
    for folder in (here, *here.parents, PACKAGE.parent):
        if _is_study(folder) and PACKAGE not in (folder, *folder.parents):
            return folder
    raise InputError("no notebooks/ and params/ here or above; run `dense-rlhf new FOLDER`, then work in it")


def stages() -> Path:
    """The folder of what all runs of the workspace share, by content: trainings, and policies' judged answers."""
    return workspace() / "runs" / ".stages"


def shipped(name: str) -> Path:
    """A file or folder of this repository: from the checkout, else the copy that setup.py put into the wheel."""
    return (PACKAGE.parent if _is_study(PACKAGE.parent) else PACKAGE / "shipped") / name


def lay_out(folder: Path) -> None:
    """Begin a study in `folder`: notebooks, parameters and a README. Raises `InputError` where it holds something."""
    with naming(folder, "written"):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder} exists and is not empty; name a new folder")
        try:
            for name in STUDY_FOLDERS:
                shutil.copytree(shipped(name), folder / name, ignore=shutil.ignore_patterns(".*"))
            write_text(folder / "README.md", README)
        except (OSError, InputError):  # half of it would stand in the way of another try
            for name in STUDY_FOLDERS:
                shutil.rmtree(folder / name, ignore_errors=True)
            raise


def python_path() -> str:
    """PYTHONPATH for a process that is to run this very package, from a checkout or as it is installed."""
    checkout = str(PACKAGE.parent) if _is_study(PACKAGE.parent) else None
    return os.pathsep.join(filter(None, [checkout, os.environ.get("PYTHONPATH")]))


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def environment_key() -> str:
    """Hash of the workspace's locks/*.txt; where it has none, of the installed versions of `PACKAGES`."""
    locks = sorted((workspace() / "locks").glob("*.txt"))
    return content_key([file_sha256(path) for path in locks] or _versions())


def open_run(folder: str | None, notebook: str, threads: int | None = None) -> RunFolder:
    """The folder that the runner chose, or `runs/interactive/NOTEBOOK` when a notebook is played by hand.

    Holds torch to `threads` where given: sums in another order would end in other samples. Raises `InputError` for the
    folder of a finished run, which only the runner may replace.
    """
    if folder and RunFolder(Path(folder)).record().get("status") in ("ok", "stale"):
        raise InputError(f"run_dir is {folder}, a finished run; leave run_dir out to play in runs/interactive")
    if threads:
        import torch

        torch.set_num_threads(threads)
    path = Path(folder) if folder else workspace() / "runs" / "interactive" / notebook
    with naming(path, "written"):
        path.mkdir(parents=True, exist_ok=True)
    return RunFolder(path)


def commit() -> str:
    """The commit of the package's checkout, with `+changes` where a file that runs depend on differs; else its release,
    or `unknown`. Results and pages that are not committed yet change no run."""
    if not _is_study(PACKAGE.parent):
        return f"release {__version__}"
    git = ["git", "-C", str(PACKAGE.parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = [*git, "status", "--porcelain", "--", *CODE]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changed.strip() else "")


def _processor() -> str | None:
    """The processor's name, where Linux gives one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


@cache
def _installed_gpus() -> tuple[tuple[str, str, str], ...]:
    """Index, UUID and name of each GPU that nvidia-smi lists."""
    if shutil.which("nvidia-smi") is None:
        return ()
    query = ["nvidia-smi", "--query-gpu=index,uuid,name", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    return tuple(tuple(line.split(", ", 2)) for line in lines if line.count(", ") >= 2)


def gpus() -> dict[str, str]:
    """The name of each GPU that CUDA would see, by what CUDA_VISIBLE_DEVICES may call it; CUDA is not loaded."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return {index: name for index, _, name in _installed_gpus()}
    wanted = [gpu.strip() for gpu in chosen.split(",") if gpu.strip()]
    names = {key: name for index, uuid, name in _installed_gpus() for key in (index, uuid)} if wanted else {}
    return {gpu: names.get(gpu, "unknown GPU") for gpu in wanted}


def provenance() -> dict[str, object]:
    """What would be needed to run it again: commit, Python, versions, hardware."""
    return {
        "commit": commit(),
        "python": sys.version.split()[0],
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "processor": _processor(),
        "gpu": ", ".join(f"{number} x {name}" for name, number in Counter(gpus().values()).items()) or None,
        "versions": _versions(),
    }


def artefacts(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a finished run, except `run.json` itself and the log."""
    files = (p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith("."))
    return {p.name: file_sha256(p) for p in files if p.name not in ("run.json", "log.txt")}


def altered(folder: Path, record: dict) -> list[str]:
    """The artefacts of a finished run that are missing or have other bytes than its record says."""
    return [name for name, sha in record.get("artefacts", {}).items() if _sha256(folder / name) != sha]


def _sha256(path: Path) -> str | None:
    """`settled_sha256`; None of what is no file, or cannot be read."""
    with suppress(OSError):
        return settled_sha256(path) if path.is_file() else None


def finished_runs(study: Path) -> list[RunFolder]:
    """The folders under `study` whose `run.json` says ok, in order of name. Raises `InputError` where none is."""
    folders = [RunFolder(path.parent) for path in sorted(study.glob("[!.]*/run.json"))]
    done = [folder for folder in folders if folder.record().get("status") == "ok"]
    if not done:
        raise InputError(f"no finished run under {study}; run the study first")
    return done


def histories(runs: list[RunFolder], table: str = "history") -> pd.DataFrame:
    """Training metrics (or `seconds`) of all policies among `runs`, a row an update, with columns arm and seed."""
    import pandas as pd

    records = [(run, run.record()) for run in runs]
    return pd.concat(
        [
            run.load_table(table).assign(arm=record["arm"], seed=record["seed"])
            for run, record in records
            if record.get("notebook") == "04_ppo"
        ],
        ignore_index=True,
    )
