"""What is in results/ is whole, and comes from code that is in this history."""

import math
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

from dense_rlhf.__main__ import main
from dense_rlhf.files import read_json
from dense_rlhf.report import write
from dense_rlhf.report.index import rank
from dense_rlhf.report.page import footer
from dense_rlhf.report.record import MANIFEST, check_record

RECORDS = sorted(path.parent for path in (ROOT / "results").glob(f"[!.]*/{MANIFEST}"))
DRAWN = 20  # pages of runs that are drawn again, besides the first of each notebook, however many are released


def git(*words):
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)


@pytest.mark.parametrize("folder", RECORDS, ids=lambda folder: folder.name)
def test_a_released_record_is_whole_and_of_committed_code(folder):
    check_record(folder)
    manifest = read_json(folder / MANIFEST)
    assert not manifest["not_committed"]
    if git("rev-parse", "--is-shallow-repository").stdout.strip() == "false":
        commits = {run["commit"] for run in manifest["runs"].values()}
        assert not [commit for commit in commits if git("merge-base", "--is-ancestor", commit, "HEAD").returncode]


def test_released_studies_are_in_results_md():
    text = (ROOT / "RESULTS.md").read_text() if RECORDS else ""
    assert all(f"[{folder.name}](reports/{folder.name}/index.html)" in text for folder in RECORDS)


def test_the_table_of_larger_models_is_the_scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import scale

    assert f"| {' | '.join(scale.row(scale.ONE))} |\n" in (ROOT / "docs" / "scale.md").read_text()


def pages_to_draw():
    """Study and job of the first run of each notebook, and of `DRAWN` runs from all studies, of those with a page."""
    runs = {
        (folder.name, job): run["notebook"]
        for folder in RECORDS
        for job, run in read_json(folder / MANIFEST)["runs"].items()
        if (ROOT / "reports" / folder.name / f"{job}.html").exists()
    }
    firsts = {notebook: run for run, notebook in reversed(runs.items())}
    return {*firsts.values(), *list(runs)[:: math.ceil(len(runs) / DRAWN)]}


@pytest.mark.skipif(not RECORDS, reason="nothing is released")
def test_released_pages_are_what_the_records_give_today(tmp_path, capsys, monkeypatch):
    """Byte for byte all that compares runs, and some of the runs' own pages; the others end with what the record says.

    If not, `dense-rlhf report --from results/` renders them again.
    """
    draw, chosen, kept = write._run_page, pages_to_draw(), {}

    def drawn_or_read(record, run, place):
        study, job = run.path.parent.name, record["job"]
        if (study, job) in chosen:
            return draw(record, run, place)
        name = Path("reports", study, f"{job}.html")
        kept[name] = str(footer(record, run.parameters())) in (ROOT / name).read_text()
        return name.name, write.warned(run, in_full=False), ""

    monkeypatch.setattr(write, "_run_page", drawn_or_read)
    monkeypatch.setattr(write, "MANY", math.inf)  # all in this process
    assert main(["report", "--from", str(ROOT / "results"), "--to", str(tmp_path)]) == 0, capsys.readouterr().err
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    same = kept | {name: (ROOT / name).read_bytes() == (tmp_path / name).read_bytes() for name in made}
    assert not sorted(str(name) for name, is_same in same.items() if not is_same and name.name != "summary.json")
    released = {path.relative_to(ROOT) for folder in RECORDS for path in (ROOT / "reports" / folder.name).iterdir()}
    assert released <= same.keys() and Path("RESULTS.md") in made


@pytest.mark.skipif(not RECORDS, reason="nothing is released")
def test_the_index_and_results_begin_with_the_main_studies():
    index, results = ((ROOT / name).read_text() for name in ("reports/index.html", "RESULTS.md"))
    for place in (
        lambda name: index.index(f'href="{name}/'),
        lambda name: results.index(f"](reports/{name}/index.html)"),
    ):
        ranks = [rank(one.name) for one in sorted(RECORDS, key=lambda one: place(one.name))]
        assert ranks == sorted(ranks)
