"""The record of a study: all that its pages are rendered from, in few bytes, for a repository or an archive.

    results/STUDY/  manifest.json  study-HASH.tar.xz  seed0-HASH.tar.xz ...

An archive holds run folders, file by file as in runs/STUDY/ without weights and logs, so that what reads runs reads
records. Policies of one seed lie together, for they share prompts and code; a new seed is a new archive.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dense_rlhf.config.params import RunParams
from dense_rlhf.files import content_key, file_sha256, lock, naming, read_json, to_disk, write_json
from dense_rlhf.report.redact import redacted, scrubbed_file
from dense_rlhf.runs import RunFolder, altered, workspace
from dense_rlhf.types import InputError
from dense_rlhf.view.escape import scrubbed

if TYPE_CHECKING:
    from dense_rlhf.config.study import StudyParams

MANIFEST = "manifest.json"
KEPT = (".csv", ".json", ".jsonl", ".yaml", ".ipynb")  # endings of what is recorded of a run
LICENSED = ("reviews",)  # datasets whose texts a record may hold; of others the licence is unclear
CLEAN = re.compile(r"[0-9a-f]{40}|release \S+")  # provenance of committed code
LARGEST = 2**30  # bytes of an archive's files
ABOUT = ("notebook", "dataset", "arm", "seed", "key", "training_key", "commit")  # of a run, in the manifest
PLACE = "study_dir"  # a parameter that says where, not what; the notebooks that have it only compare runs

Files = dict[str, bytes]  # a run's files by name


@dataclass(frozen=True)
class Compared:
    """A dataset in a setting, within which arms are compared."""

    where: str
    setting: str


@dataclass(frozen=True)
class Outline:
    """What pages read of a study, as of `StudyParams`; `command` repeats it."""

    study: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    comparisons: tuple[Compared, ...]
    command: str = ""
    remark: str = ""  # what a reader of the numbers must know, in words of whoever records

    @classmethod
    def of(cls, study: StudyParams, command: str, remark: str = "") -> Outline:
        compared = tuple(Compared(run.where, run.setting) for run in study.comparisons)
        return cls(study.study, tuple(study.arms), tuple(study.seeds), compared, command, remark)

    def __or__(self, other: Outline) -> Outline:
        """This study with what an earlier record of it has besides."""
        both = {
            name: tuple(dict.fromkeys((*getattr(self, name), *getattr(other, name))))
            for name in ("arms", "comparisons")
        }
        own = dict(command=self.command, remark=self.remark or other.remark)
        return Outline(self.study, seeds=tuple(sorted({*self.seeds, *other.seeds})), **own, **both)


@dataclass(frozen=True)
class Record:
    """A study's recorded runs, by job."""

    outline: Outline
    runs: Mapping[str, Files]
    manifest: Mapping

    def write_runs(self, root: Path) -> Path:
        """Write the run folders that are not there yet below `root`/runs, as they were; returns the study's folder."""
        folder = root / "runs" / self.outline.study
        for job, files in self.runs.items():
            with naming(folder / job, "written"):
                if not (folder / job).exists():
                    (folder / job).mkdir(parents=True)
                    for name, content in files.items():
                        (folder / job / name).write_bytes(content)
        return folder


# ---------------------------------------------------------------------------------------------------- writing


def write_record(outline: Outline, runs: Sequence[RunFolder], to: Path, anyway: bool = False) -> Path:
    """Record finished runs in `to`/STUDY, with those that are recorded there already; returns that folder.

    A reader sees the record before or after, nothing between. Raises `InputError` for runs of code that was not
    committed, unless `anyway`; for files that are not as their run left them; and where a recorded run has other
    parameters.
    """
    names = [run.path.name for run in runs if not CLEAN.fullmatch(str(run.record().get("commit")))]
    if names and not anyway:
        raise InputError(
            f"{len(names)} runs come from code that was not committed: {', '.join(names[:5])}"
            f"{', ...' * (len(names) > 5)}; commit, and run them again, or record them --anyway"
        )
    folder = to / outline.study
    with lock(to / f".{outline.study}.lock"):
        old = read_record(folder) if (folder / MANIFEST).exists() else Record(outline, {}, {"files": {}})
        fresh = {run.path.name: _recorded(run) for run in runs}
        for job in sorted(fresh.keys() & old.runs.keys()):
            _check_same_parameters(folder, job, fresh[job], old.runs[job])
        kept = {job: files for job, files in old.runs.items() if job not in fresh}
        whole = Record(outline | old.outline, fresh | kept, old.manifest)
        _write(folder, whole, {job for job in fresh if fresh[job] != old.runs.get(job)})
    return folder


def _recorded(run: RunFolder) -> Files:
    """What is recorded of a run: its files without secrets and places, and without texts of unclear licence."""
    record = run.record()
    if names := altered(run.path, record):
        raise InputError(f"{run.path / names[0]} is missing or altered since its run; run the study again")
    names = [name for name in sorted(record["artefacts"]) if Path(name).suffix in KEPT]
    files = {name: scrubbed_file(run.file(name)) for name in names}
    if not _is_licensed(run.parameters()):
        files = {name: redacted(name, content) for name, content in files.items()}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    facts = scrubbed(record | {"artefacts": hashes, "folders": []})
    return files | {"run.json": json.dumps(facts | {"hash": content_key(facts)}, indent=1).encode()}


def _is_licensed(flat: Mapping) -> bool:
    """Whether a run with these parameters shows only texts that may be published: of no file of the user's own."""
    own = any(value for name, value in flat.items() if name.endswith("_path"))
    return PLACE in flat or flat.get("data_name") in LICENSED and not own


def _check_same_parameters(folder: Path, job: str, fresh: Files, old: Files) -> None:
    given, kept = (_parameters(files) for files in (fresh, old))
    if names := sorted(name for name in given.keys() | kept.keys() if given.get(name) != kept.get(name)):
        raise InputError(
            f"{folder} has {job} with other parameters ({', '.join(names[:5])}); a record holds one study: record "
            "this one under another name (--set study=NAME), or move the old record away"
        )


def _parameters(files: Files) -> dict:
    import yaml

    return complete(yaml.safe_load(files.get("params.yaml", b"")) or {})


def complete(flat: Mapping) -> dict:
    """A run's parameters without its place; one that was added to the project since has its default."""
    return RunParams().flat() | {name: value for name, value in flat.items() if name != PLACE}


def _facts(files: Files) -> dict:
    return json.loads(files["run.json"])


def _archive_of(files: Files) -> str:
    facts = _facts(files)
    return f"seed{facts['seed']}" if facts["notebook"] == "04_ppo" else "study"


def _write(folder: Path, record: Record, changed: set[str]) -> None:
    """Write the archives that hold a changed run, then the manifest, which names them; remove those of before."""
    groups: dict[str, dict[str, Files]] = {}
    for job, files in record.runs.items():
        groups.setdefault(_archive_of(files), {})[job] = files
    hashes = dict(record.manifest["files"])
    for group, runs in groups.items():
        before = [name for name in hashes if name.rpartition("-")[0] == group]
        if before and not changed & runs.keys():
            continue
        content = _packed(runs)
        sha = hashlib.sha256(content).hexdigest()
        _write_bytes(folder / f"{group}-{sha[:8]}.tar.xz", content)
        hashes = {name: kept for name, kept in hashes.items() if name not in before} | {
            f"{group}-{sha[:8]}.tar.xz": sha
        }
    facts = {job: _facts(files) for job, files in record.runs.items()}
    manifest = asdict(record.outline) | {"files": dict(sorted(hashes.items()))}
    manifest["not_committed"] = [job for job, of in facts.items() if not CLEAN.fullmatch(str(of.get("commit")))]
    manifest["runs"] = {job: {name: of.get(name) for name in ABOUT} for job, of in facts.items()}
    write_json(folder / MANIFEST, scrubbed(manifest, workspace()), sealed=True)
    for path in folder.glob("*.tar.xz"):
        if path.name not in hashes:
            path.unlink()


def _packed(runs: Mapping[str, Files]) -> bytes:
    """The files of some runs in a compressed archive, equal for equal files; alike files lie together."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, job in sorted((name, job) for job, files in runs.items() for name in files):
            about = tarfile.TarInfo(f"{job}/{name}")
            about.size = len(runs[job][name])
            tar.addfile(about, io.BytesIO(runs[job][name]))
    return lzma.compress(buffer.getvalue())


def _write_bytes(path: Path, content: bytes) -> None:
    draft = path.with_name(f".{path.name}")
    with naming(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(content)
        to_disk(draft)
        os.replace(draft, path)


# ---------------------------------------------------------------------------------------------------- reading


def records(results: Path) -> list[Path]:
    """The folders of the records in `results`, or that folder itself. Raises `InputError` where there is none."""
    if (results / MANIFEST).is_file():
        return [results]
    if folders := sorted(path.parent for path in results.glob(f"[!.]*/{MANIFEST}")):
        return folders
    raise InputError(f"no record in {results}; `dense-rlhf record params/reviews.yaml` writes one of finished runs")


def read_record(folder: Path) -> Record:
    """The record in a folder, all hashes checked. Raises `InputError`, which names the file, for a damaged one."""
    check_record(folder)
    manifest, runs = read_json(folder / MANIFEST), {}
    for name in manifest["files"]:
        for job, files in _unpacked(folder / name).items():
            runs.setdefault(job, {}).update(files)
    if sorted(runs) != sorted(manifest["runs"]) or any("run.json" not in files for files in runs.values()):
        raise InputError(
            f"{folder / MANIFEST} does not name the runs that its archives hold; take the whole record anew"
        )
    runs = {job: runs[job] for job in manifest["runs"]}
    compared = tuple(Compared(one["where"], one["setting"]) for one in manifest["comparisons"])
    arms, seeds = tuple(manifest["arms"]), tuple(manifest["seeds"])
    command, remark = str(manifest["command"]), str(manifest.get("remark", ""))
    return Record(Outline(folder.name, arms, seeds, compared, command, remark), runs, manifest)


def restore_runs(results: Path, study: str) -> None:
    """Write the recorded runs of a study into the workspace, from where it goes on. Raises `InputError` without one."""
    known = {folder.name: folder for folder in records(results)}
    if study not in known:
        raise InputError(f"{results} has no record of {study}, but of {', '.join(known)}")
    read_record(known[study]).write_runs(workspace())


def _is_manifest(given: Mapping) -> bool:
    kinds = {"files": dict, "runs": dict, "command": str}
    each = {"arms": str, "seeds": int, "comparisons": dict, "not_committed": str}
    return (
        all(isinstance(given.get(name), kind) for name, kind in kinds.items())
        and all(isinstance(given.get(name), list) for name in each)
        and all(isinstance(one, kind) for name, kind in each.items() for one in given[name])
        and all(isinstance(one.get(name), str) for one in given["comparisons"] for name in ("where", "setting"))
    )


def check_record(folder: Path) -> None:
    """Raise `InputError`, which names the file, unless a record's files are those that were written."""
    manifest = read_json(folder / MANIFEST)
    if not _is_manifest(manifest):
        raise InputError(f"{folder / MANIFEST} is not the manifest of a record; take it anew")
    for name, sha in manifest["files"].items():
        path = RunFolder(folder).file(name)
        with naming(path, "read"):
            if not path.is_file() or file_sha256(path) != sha:
                raise InputError(
                    f"{path} is missing or not as it was recorded; take it anew, or record the study again"
                )


def _unpacked(archive: Path) -> dict[str, Files]:
    """The files of an archive, by job and name. Raises `InputError` for names that lead elsewhere, and a huge one."""
    runs: dict[str, Files] = {}
    room = LARGEST
    with naming(archive, "read"):
        try:
            with tarfile.open(archive, "r:xz") as tar:
                for member in tar:
                    job, _, name = member.name.partition("/")
                    room -= member.size
                    if not member.isfile() or room < 0:
                        raise InputError(f"{archive} holds {member.name!r}, which no record has; take it anew")
                    path = RunFolder(RunFolder(archive.parent).file(job)).file(name)
                    runs.setdefault(path.parent.name, {})[path.name] = tar.extractfile(member).read()
        except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
            raise InputError(f"{archive} cannot be unpacked ({error}); take it anew") from error
    return runs
