"""What is in results/ is whole, and comes from code that is in this history."""

import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

from dense_rlhf.__main__ import main
from dense_rlhf.files import read_json
from dense_rlhf.report.index import rank
from dense_rlhf.report.record import MANIFEST, check_record

RECORDS = sorted(path.parent for path in (ROOT / "results").glob(f"[!.]*/{MANIFEST}"))


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
    assert all(f"| [{folder.name}](reports/{folder.name}/index.html) |" in text for folder in RECORDS)


def test_the_table_of_larger_models_is_the_scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import scale

    assert f"| {' | '.join(scale.row(scale.ONE))} |\n" in (ROOT / "docs" / "scale.md").read_text()


@pytest.mark.skipif(not RECORDS, reason="nothing is released")
def test_released_pages_are_what_the_records_give_today(tmp_path, capsys):
    """If not, `dense-rlhf report --from results/` renders them again."""
    assert main(["report", "--from", str(ROOT / "results"), "--to", str(tmp_path)]) == 0, capsys.readouterr().err
    made = [
        path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file() and path.name != "summary.json"
    ]
    assert Path("RESULTS.md") in made and len(made) > 50
    assert not [str(name) for name in made if (ROOT / name).read_bytes() != (tmp_path / name).read_bytes()]


@pytest.mark.skipif(not RECORDS, reason="nothing is released")
def test_the_index_and_results_begin_with_the_main_studies():
    index, results = ((ROOT / name).read_text() for name in ("reports/index.html", "RESULTS.md"))
    for place in (lambda name: index.index(f'href="{name}/'), lambda name: results.index(f"\n| [{name}](")):
        ranks = [rank(one.name) for one in sorted(RECORDS, key=lambda one: place(one.name))]
        assert ranks == sorted(ranks)
