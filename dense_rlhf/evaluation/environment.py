"""Environments of their own, in the cache, for packages that cannot share ours; they run as subprocesses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from dense_rlhf.files import cache_root, cached_folder, content_key, file_sha256
from dense_rlhf.types import InputError

PYTHON = Path("venv", "bin", "python")


def place(kind: str, lock: Path) -> Path:
    """Where the Python is of the environment that `lock` describes, made or not."""
    return cache_root() / kind / content_key(_key(lock)) / PYTHON


def python(kind: str, lock: Path, advice: str, options: tuple[str, ...] = ()) -> Path:
    """The Python of the environment that `lock` describes, made by pip with `options` on first use.

    Raises `InputError`, which ends in `advice`, if pip cannot make it.
    """

    def build(folder: Path) -> None:
        venv, pip = folder / "venv", [sys.executable, "-m", "pip", "--quiet", "--python"]
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
        install = [*pip, str(folder / PYTHON), "install", *options, "--requirement", str(lock)]
        done = subprocess.run(install, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or "no reason was given").splitlines()[-1]
            raise InputError(
                f"pip could not install {lock.name}: {reason}. Check the connection to the package index, {advice}"
            )

    return cached_folder(kind, _key(lock), build) / PYTHON


def _key(lock: Path) -> dict[str, str]:
    return {"lock": file_sha256(lock), "python": sys.version.split()[0]}
