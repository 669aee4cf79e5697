"""The run folder: what a notebook leaves behind, and what a later notebook or report reads.

runs/STUDY/JOB/  params.yaml  inputs.json  notebook.ipynb  metrics.json  *.csv  log.txt
                 run.json (last, by the runner)
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from dense_rlhf.files import file_sha256, finite, settled_sha256, write_json, write_text
from dense_rlhf.fingerprint import PACKAGE
from dense_rlhf.types import InputError

if TYPE_CHECKING:
    import pandas as pd

PACKAGES = ("torch", "transformers", "trl", "shap", "lime", "botorch", "papermill", "numpy", "pandas")


@dataclass(frozen=True)
class RunFolder:
    """One run's files; names stay inside the folder."""

    path: Path

    def file(self, name: str) -> Path:
        """The path of one file of this run. Raises `InputError` for a name that leads elsewhere."""
        if Path(name).name != name or name.startswith("."):
            raise InputError(f"{name!r} is not a file name; a run writes into its own folder only")
        return self.path / name

    def save_table(self, name: str, table: pd.DataFrame) -> None:
        write_text(self.file(f"{name}.csv"), table.to_csv(index=False))

    def load_table(self, name: str) -> pd.DataFrame:
        import pandas as pd

        return pd.read_csv(self.file(f"{name}.csv"), keep_default_na=True)

    def save_metrics(self, metrics: Mapping[str, object] = MappingProxyType({}), /, **more: object) -> None:
        """Write `metrics.json`; intervals become mappings, numbers that are not finite null."""
        write_json(self.file("metrics.json"), finite(dict(metrics) | more))

    def load_json(self, name: str) -> dict:
        """A JSON file of this run, empty where it is not there."""
        path = self.file(name)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def repository_root() -> Path:
    """The checkout that holds notebooks/, params/ and runs/."""
    return PACKAGE.parent


def python_path() -> str:
    """PYTHONPATH for another process that is to run this very package."""
    return os.pathsep.join(filter(None, [str(repository_root()), os.environ.get("PYTHONPATH")]))


def open_run(folder: str | None, notebook: str, threads: int | None = None) -> RunFolder:
    """The folder that the runner chose, or `runs/interactive/NOTEBOOK` when a notebook is played by hand.

    Holds torch to `threads` where given: sums in another order would end in other samples.
    """
    if threads:
        import torch

        torch.set_num_threads(threads)
    path = Path(folder) if folder else repository_root() / "runs" / "interactive" / notebook
    path.mkdir(parents=True, exist_ok=True)
    return RunFolder(path)


def commit() -> str:
    """The checkout's commit, with `+changes` where files differ from it; `unknown` outside git."""
    git = ["git", "-C", str(repository_root())]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changed.strip() else "")


def _processor() -> str | None:
    """The processor's name, where Linux gives one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


@cache
def _gpu() -> str | None:
    """Number and names of the GPUs that CUDA would see, found without loading it; None without any."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shutil.which("nvidia-smi") is None or chosen == "":
        return None
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", *([f"--id={chosen}"] if chosen else [])]
    done = subprocess.run(query, capture_output=True, text=True)
    names = Counter(done.stdout.splitlines()) if done.returncode == 0 else {}
    return ", ".join(f"{number} x {name}" for name, number in names.items()) or None


def provenance() -> dict[str, object]:
    """What would be needed to run it again: commit, Python, versions, hardware."""
    return {
        "commit": commit(),
        "python": sys.version.split()[0],
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "processor": _processor(),
        "gpu": _gpu(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def artefacts(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a finished run, except `run.json` itself and the log."""
    files = (p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith("."))
    return {p.name: file_sha256(p) for p in files if p.name not in ("run.json", "log.txt")}


def altered(folder: Path, record: dict) -> list[str]:
    """The artefacts of a finished run that are missing or have other bytes than its record says."""
    files = {folder / name: sha for name, sha in record.get("artefacts", {}).items()}
    return [path.name for path, sha in files.items() if not path.is_file() or settled_sha256(path) != sha]


def finished_runs(study: Path) -> list[RunFolder]:
    """The folders under `study` whose `run.json` says ok, in order of name. Raises `InputError` where none is."""
    folders = [RunFolder(path.parent) for path in sorted(study.glob("*/run.json"))]
    done = [folder for folder in folders if folder.load_json("run.json").get("status") == "ok"]
    if not done:
        raise InputError(f"no finished run under {study}; run the study first")
    return done


def histories(runs: list[RunFolder], table: str = "history") -> pd.DataFrame:
    """Training metrics (or `seconds`) of all policies among `runs`, a row an update, with columns arm and seed."""
    import pandas as pd

    records = [(run, run.load_json("run.json")) for run in runs]
    return pd.concat(
        [
            run.load_table(table).assign(arm=record["arm"], seed=record["seed"])
            for run, record in records
            if record.get("notebook") == "04_ppo"
        ],
        ignore_index=True,
    )
