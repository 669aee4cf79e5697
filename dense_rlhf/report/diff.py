"""In which parameters and results two runs, or the runs of two studies, differ."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from dense_rlhf.report.record import MANIFEST, complete, read_record
from dense_rlhf.runs import RunFolder
from dense_rlhf.types import InputError

ASIDE = ("seconds", "update_cost", "revisions", "processor", "commit")  # in the name of what is no result: times, names
COLUMNS = ("prompt", "ms")  # that are no results: prompts, of which a record may keep hashes, and times
HEAD = ("run", "what", "first", "second")
Row = tuple[str, str, str, str]


def differences(first: Path, second: Path) -> list[Row]:
    """A row (`HEAD`) for each parameter and result that differs; times, revisions and code are no results.

    Both are run folders, or both studies: folders of runs, or records. Raises `InputError` for anything else.
    """
    with _runs(first) as ours, _runs(second) as theirs:
        if ("" in ours) != ("" in theirs):
            raise InputError(f"{first} and {second} are a run and a study; give two of a kind")
        rows: list[Row] = []
        for job in dict.fromkeys((*ours, *theirs)):
            if job in ours and job in theirs:
                rows += _of_runs(job or second.name, ours[job], theirs[job])
            else:
                rows.append((job, "run", *("present" if job in side else "missing" for side in (ours, theirs))))
        return rows


@contextmanager
def _runs(path: Path) -> Iterator[dict[str, RunFolder]]:
    """The runs of a study or of its record, by job; a single run has no name."""
    with TemporaryDirectory() as root:
        if (path / MANIFEST).exists():
            path = read_record(path).write_runs(Path(root))
        studied = {one.parent.name: RunFolder(one.parent) for one in sorted(path.glob("[!.]*/metrics.json"))}
        if not studied and not (path / "metrics.json").exists():
            raise InputError(f"{path} is neither a run's folder, nor a study's, nor a record; it has no metrics.json")
        yield studied or {"": RunFolder(path)}


def _of_runs(job: str, ours: RunFolder, theirs: RunFolder) -> list[Row]:
    first, second = (_values(run) for run in (ours, theirs))
    rows = [
        (job, name, str(first.get(name, "–")), str(second.get(name, "–")))
        for name in dict.fromkeys((*first, *second))
        if first.get(name, "–") != second.get(name, "–")
    ]
    tables = dict.fromkeys(path.name for run in (ours, theirs) for path in sorted(run.path.glob("*.csv")))
    return rows + [row for name in tables for row in _of_tables(job, name, ours, theirs)]


def _values(run: RunFolder) -> dict[str, object]:
    """Parameters, but for where the run lies, and metrics, by name."""
    flat = {f"parameter {name}": value for name, value in complete(run.parameters()).items()}
    return flat | _leaves(run.load_json("metrics.json"))


def _leaves(value: object, name: str = "") -> dict[str, object]:
    """Every leaf of nested JSON by its dotted name, without what is no result."""
    if any(part in name for part in ASIDE):
        return {}
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {
            k: leaf for key, item in items for k, leaf in _leaves(item, f"{name}.{key}" if name else str(key)).items()
        }
    return {name: value}


def _of_tables(job: str, name: str, ours: RunFolder, theirs: RunFolder) -> list[Row]:
    """A row for each column of a table that differs, with its first differing values."""
    if any(part in name for part in ASIDE):
        return []
    there = [run.file(name).exists() for run in (ours, theirs)]
    if not all(there):
        return [(job, name, *("present" if one else "missing" for one in there))]
    first, second = sides = [run.load_table(Path(name).stem).map(str) for run in (ours, theirs)]
    if len(first) != len(second):
        return [(job, name, *(f"{len(side)} rows" for side in sides))]
    rows: list[Row] = []
    for column in dict.fromkeys((*first, *second)):
        if column in COLUMNS or any(part in column for part in ASIDE):
            continue
        if column not in first or column not in second:
            rows.append((job, f"{name}, {column}", *("present" if column in side else "missing" for side in sides)))
        elif len(at := (first[column] != second[column]).to_numpy().nonzero()[0]):
            values = (side[column].iloc[at[0]][:40] for side in sides)
            rows.append((job, f"{name}, {column}, {len(at)} of {len(first)} rows, first in {at[0]}", *values))
    return rows
