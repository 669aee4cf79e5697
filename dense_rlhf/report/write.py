"""Reports that open from disk with no network: a page a run, comparisons, an index a study and one over all studies.

Templates escape everything that a model or a dataset wrote (`view.html`), HTML that a notebook displays passes
`sanitise`, and the page's Content-Security-Policy, which allows no scripts, is the last wall.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from dense_rlhf.config.params import ABLATIONS, BENCHMARKS
from dense_rlhf.config.study import StudyParams
from dense_rlhf.evaluation.findings import findings
from dense_rlhf.evaluation.open_questions import answers
from dense_rlhf.evaluation.results import Finding
from dense_rlhf.files import content_key, file_sha256, read_json, write_json, write_text
from dense_rlhf.report import pages_key
from dense_rlhf.report.comparison import ablation_page, across_html, dataset_page
from dense_rlhf.report.index import QUESTION, overview, study_index, summary
from dense_rlhf.report.notebook_page import notebook_body
from dense_rlhf.report.page import FILES, draw, footer, made_from, page
from dense_rlhf.report.pictures import thumbnail
from dense_rlhf.report.settings import in_order, settings_html
from dense_rlhf.runs import GOOD, RunFolder, workspace
from dense_rlhf.types import InputError, one_line
from dense_rlhf.view.escape import scrubbed
from dense_rlhf.view.html import part

if TYPE_CHECKING:
    from markupsafe import Markup

ALL = ("all studies", "../index.html")
MANY = 16  # pages of a release from which on all cores draw them


@dataclass(frozen=True)
class Place:
    """Where runs are read and pages are written."""

    root: Path  # runs/ is in it; paths below it become relative on pages
    reports: Path
    released: bool = False  # pages that others get: they neither lead to files of runs, nor depend on unseen code

    def runs(self, study: str) -> Path:
        return self.root / "runs" / study

    def files_of(self, run: RunFolder) -> list[str]:
        return [] if self.released else files_of(run)


def here() -> Place:
    """The workspace's own."""
    return Place(workspace(), workspace() / "reports")


def warned(run: RunFolder, in_full: bool) -> Markup:
    """The warnings of a training, each name once: when it first appeared, how often, and `in_full` its text."""
    by_name: dict[str, list[dict]] = {}
    for warning in run.load_json("metrics.json").get("warnings") or ():
        by_name.setdefault(str(warning.get("name")), []).append(warning)
    return draw("warned", by_name, in_full)


def write_run_page(record: dict, run: RunFolder, target: Path, place: Place) -> bool:
    """Render one run, unless its page is up to date; False where it has no notebook."""
    notebook = run.file("notebook.ipynb")
    if not notebook.exists():
        return False
    known = {key: value for key, value in record.items() if key not in ("status", "artefacts")}
    parts = [file_sha256(notebook), str(known), record["status"] in GOOD, pages_key()]
    key = "" if place.released else content_key(parts)
    if key and made_from(target) == key:
        return True
    study, (body, contents) = run.path.parent.name, notebook_body(notebook)
    files = draw("files", study, run.path.name, place.files_of(run))
    content = draw("run_page", record, warned(run, in_full=True), body, files), contents
    foot, trail = footer(record, run.parameters()), [ALL, (study, "index.html")]
    write_text(target, page(record["job"], content, foot, trail, key, place.root))
    return True


def files_of(run: RunFolder) -> list[str]:
    """The files of a run that a reader may want: notebook, parameters, metrics, log and tables."""
    tables = sorted(path.name for path in run.path.glob("*.csv")) if run.path.exists() else []
    return [name for name in (*FILES, *tables) if run.file(name).exists()]


def write_reports(study: StudyParams, records: list[dict]) -> Path:
    """Write a page a run, the comparisons and the indexes; returns the study's. A page that cannot be rendered is
    listed as such. Raises `InputError` for a study without runs."""
    if not records:
        raise InputError("a study without runs has no report")
    place = here()
    write_study(study, records, place)
    write_overview(place)
    return place.reports / study.study / "index.html"


def write_study(study: StudyParams, records: list[dict], place: Place) -> list[Finding]:
    """Write all pages of a study, and `summary.json` for the index over all studies; returns what they say."""
    folder = place.reports / study.study
    runs = {record["job"]: RunFolder(place.runs(study.study) / record["job"]) for record in records}
    lost: list[str] = []
    compared = _comparisons(study, records, runs, place, lost)
    pages, notes, broken = _run_pages(records, runs, place)
    lost = broken + lost
    listed = [r | {"page": pages.get(r["job"]), "files": place.files_of(runs[r["job"]])} for r in records]
    facts = summary(study.study, study.seeds, listed, compared, lost)
    facts |= {"remark": study.remark} if place.released else {"pages": pages_key()}
    pictures = {job: thumbnail(runs[job].file("notebook.ipynb")) for job in _pictured(records, pages)}
    side_by_side = settings_html(compared, study.comparisons, answers(study.study, compared)) or across_html(compared)
    content = study_index(facts, pictures, notes, side_by_side)
    body = page(study.study, content, _footer(records, study.seeds), [ALL], root=place.root)
    write_text(folder / "index.html", body)
    write_json(folder / "summary.json", scrubbed(facts, place.root), sealed=True)
    return compared


def _run_pages(
    records: list[dict], runs: dict[str, RunFolder], place: Place
) -> tuple[dict[str, str], dict[str, Markup], list[str]]:
    """The page of each run by job, its warnings in short, and what could not be rendered."""
    paged = _paged(records) if place.released else {record["job"] for record in records}
    jobs = [(record, runs[record["job"]], place) for record in records if record["job"] in paged]
    if place.released and len(jobs) >= MANY:  # a process that only renders: no thread of its own is cut off by forks
        first = _run_page(*jobs[0])  # what it imports and compiles is there before the forks
        with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
            drawn = [first, *pool.map(_run_page, *zip(*jobs[1:]), chunksize=4)]
    else:
        drawn = [_run_page(*job) for job in jobs]
    whole = {record["job"]: one for (record, *_), one in zip(jobs, drawn)}
    pages = {job: name for job, (name, _, _) in whole.items() if name}
    notes = {job: whole[job][1] if job in whole else warned(run, in_full=False) for job, run in runs.items()}
    return pages, notes, [text for _, _, text in drawn if text]


def _paged(records: Sequence[Mapping]) -> set[str]:
    """The runs that have a page in a release: of trainings that differ in nothing but the seed, the first."""
    first: dict[tuple, Mapping] = {}
    for record in sorted(records, key=lambda record: record.get("seed") or 0):
        alike = ("dataset", "arm", "regime") if record["notebook"] == "04_ppo" else ("job",)
        first.setdefault(tuple(record.get(key) for key in alike), record)
    return {record["job"] for record in first.values()}


def _run_page(record: dict, run: RunFolder, place: Place) -> tuple[str, Markup | str, str]:
    """The name of a run's page if it has one, its warnings in short, and why it could not be rendered if so."""
    job, note = record["job"], ""
    try:
        note = warned(run, in_full=False)
        there = write_run_page(record, run, place.reports / run.path.parent.name / f"{job}.html", place)
        return f"{job}.html" * there, note, ""
    except Exception as error:  # one broken notebook must not cost the other pages
        return "", note, f"{job}: {type(error).__name__}: {error}"


def _comparisons(
    study: StudyParams, records: list[dict], runs: Mapping[str, RunFolder], place: Place, lost: list[str]
) -> list[Finding]:
    """Write the page of each dataset and each ablation; returns what the datasets say, and adds to `lost`."""
    compared: list[Finding] = []
    done = [record for record in records if record["status"] in GOOD]
    try:
        compared = findings([runs[record["job"]] for record in done], list(study.arms))
    except Exception as error:  # tables that cannot be read: the rest of the report stands
        lost.append(f"comparison: {type(error).__name__}: {error}")
    pages = {f.dataset: partial(dataset_page, study.study, f) for f in compared}
    tables = [record["job"] for record in done if record["notebook"] in ABLATIONS + BENCHMARKS]
    pages |= {job: partial(ablation_page, study.study, runs[job]) for job in tables}
    foot, trail = _footer(records, study.seeds), [ALL, (study.study, "index.html")]
    for name, content in pages.items():
        target = place.reports / study.study / f"comparison-{name}.html"
        try:
            write_text(target, page(f"comparison: {name}", content(), foot, trail, root=place.root))
        except Exception as error:  # of one run's tables
            lost.append(f"comparison of {name}: {type(error).__name__}: {error}")
    return in_order(compared, study.comparisons)


def _pictured(records: list[dict], pages: dict[str, str], most: int = 24) -> list[str]:
    return [r["job"] for r in records if r["job"] in pages and r["notebook"] != "04_ppo"][:most]


def _footer(records: list[dict], seeds: Sequence[int]) -> Markup:
    newest = max(records, key=lambda record: record.get("started") or 0)
    return footer(newest | {"job": f"{len(records)} runs, last {newest['job']}"}, seeds=seeds)


def write_overview(place: Place, names: Sequence[str] = ()) -> Path:
    """Write `index.html` over every study with a `summary.json` that can be drawn, or over those of these `names`."""
    folder, studies, pictures, lost = place.reports, [], {}, []
    for path in sorted(folder.glob("[!.]*/summary.json")):
        if names and path.parent.name not in names:
            continue
        try:
            facts = read_json(path) | {"study": path.parent.name}
            overview([facts | {"commit": str(facts["commit"])}], {})
            pictures[facts["study"]] = _last_picture(place, facts)
            studies.append(facts)
        except Exception as error:  # damaged, or of another version: it must not cost the other studies
            lost.append(path.parent.name)
            reason = one_line(f"{type(error).__name__}: {error}"[:200])
            print(f"{path.relative_to(folder.parent)} is left out ({reason}); report its study again", file=sys.stderr)
    commits = ", ".join(sorted({str(study["commit"]) for study in studies}))
    about = f"{len(studies)} studies, made from commits {commits}" + f"; damaged: {', '.join(lost)}" * bool(lost)
    body = overview(studies, pictures)
    write_text(folder / "index.html", page(QUESTION, body, part("paragraph", about), root=place.root))
    return folder / "index.html"


def _last_picture(place: Place, study: Mapping) -> Markup | str:
    jobs = [run["job"] for run in study["runs"] if run["page"] and run["notebook"] != "04_ppo"]
    notebooks = (place.runs(study["study"]) / job / "notebook.ipynb" for job in reversed(jobs))
    return next(filter(None, map(thumbnail, notebooks)), "")
