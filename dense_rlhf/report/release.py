"""What is published of recorded studies: their pages and `RESULTS.md`, rendered from records alone, and one archive."""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from dense_rlhf.files import naming
from dense_rlhf.report.record import check_record, read_record, records
from dense_rlhf.report.results_claims import Study
from dense_rlhf.report.results_page import write_results
from dense_rlhf.report.write import Place, write_overview, write_study
from dense_rlhf.runs import RunFolder
from dense_rlhf.types import InputError

EPOCH = (1980, 1, 1, 0, 0, 0)  # of every file in an archive, so that equal files make equal archives
SUMS = "SHA256SUMS"


def render(results: Path, to: Path) -> Path:
    """Render every page of the records in `results`, and `RESULTS.md`, into `to`; returns the latter.

    Nothing is computed, and nothing but the records is read. Raises `InputError` for a damaged one before anything is
    written.
    """
    taken = {folder.name: read_record(folder) for folder in records(results)}
    studies = []
    with TemporaryDirectory() as root:
        place = Place(Path(root), to / "reports", released=True)
        for name, record in taken.items():
            folder = record.write_runs(Path(root))
            runs = [RunFolder(folder / job) for job in record.runs]
            if broken := [run.path.name for run in runs if run.record().get("status") != "ok"]:
                raise InputError(f"{results}: {name} holds {broken[0]}, which is no finished run; take the record anew")
            shutil.rmtree(place.reports / name, ignore_errors=True)
            compared = write_study(record.outline, [run.record() for run in runs], place)
            studies.append(Study(record.outline, runs, compared, record.manifest["not_committed"]))
        write_overview(place, list(taken))
        return write_results(studies, to)


def write_archive(results: Path, target: Path) -> Path:
    """Put the records in `results` into one zip, with the hash of each file; equal records make an equal zip.

    Raises `InputError` for a damaged record, and for a file that is there already.
    """
    if target.exists():
        raise InputError(f"{target} exists; name a new file")
    files: dict[str, bytes] = {}
    for folder in records(results):
        check_record(folder)
        files |= {f"{folder.name}/{path.name}": path.read_bytes() for path in sorted(folder.glob("[!.]*"))}
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items()]
    draft = target.with_name(f".{target.name}")
    with naming(target, "written"):
        try:
            with zipfile.ZipFile(draft, "w") as archive:
                for name, content in {SUMS: "".join(lines).encode(), **files}.items():
                    archive.writestr(zipfile.ZipInfo(f"results/{name}", EPOCH), content)
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)
    return target
