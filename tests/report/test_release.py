"""Pages and `RESULTS.md` come from records alone: the same each time, and the same as from the run folders."""

import errno
import hashlib
import json
import re
import shutil
import zipfile
from dataclasses import replace

import pytest
import recorded
from bs4 import BeautifulSoup

from dense_rlhf.__main__ import main
from dense_rlhf.evaluation.findings import findings
from dense_rlhf.evaluation.rule import NO_DIFFERENCE, SUPPORTED, UNDECIDED
from dense_rlhf.evaluation.words import LEADS, NEAREST
from dense_rlhf.report.index import overview
from dense_rlhf.report.page import footer, times
from dense_rlhf.report.record import write_record
from dense_rlhf.report.release import render, write_archive
from dense_rlhf.report.results_claims import ASKED_BY, MARKS, Study, _first, by_key, claims, marks, open_questions
from dense_rlhf.report.results_page import plain, write_results
from dense_rlhf.report.write import Place, write_overview, write_study
from dense_rlhf.types import InputError

HOSTILE = "<script>alert(1)</script> | [x](javascript:alert(1)) `a`"


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A study in `runs`, its record in `results`, and what is rendered of it beside."""
    root = tmp_path_factory.mktemp("released")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        outline, runs = recorded.study(root, texts=("a good film", HOSTILE))
        write_record(outline, runs, root / "results")
        render(root / "results", root)
    return root, outline, runs


def rendered(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_pages_are_the_same_twice_and_as_from_the_run_folders(released, tmp_path, monkeypatch):
    root, outline, runs = released
    pages = rendered(root / "reports")
    assert "made/reviews-04_ppo-shap-seed0.html" in pages and "made/comparison-ppo.html" in pages
    assert "made/reviews-04_ppo-shap-seed1.html" not in pages  # differs in nothing but the seed
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dense_rlhf.report.write.MANY", 2)  # by several processes this time
    render(root / "results", tmp_path / "again")
    assert rendered(tmp_path / "again") == {f"reports/{name}": page for name, page in pages.items()} | {
        "RESULTS.md": (root / "RESULTS.md").read_bytes()
    }
    place = Place(root, tmp_path / "direct", released=True)
    write_study(outline, [run.record() for run in runs], place)
    write_overview(place)
    direct = rendered(tmp_path / "direct")
    assert direct == {name: page for name, page in pages.items() if not name.endswith(".svg")}


def test_released_pages_are_small_and_lead_to_no_file_that_is_not_there(released):
    root = released[0]
    for path in (root / "reports").rglob("*.html"):
        text = path.read_text()
        assert len(text) < 500_000
        for target in re.findall(r"href=[\"']([^\"'#]+)", text):
            assert (path.parent / target).exists(), target


def test_results_hold_each_number_of_the_study_and_lead_to_its_keys(released):
    root, outline, runs = released
    text = (root / "RESULTS.md").read_text()
    assert "](reports/made/comparison-reviews.html)" in text and "](reports/made/comparison-ppo.html)" in text
    figures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert 3 <= len(figures) <= 5 and figures[0] == "reports/equal-updates.svg"
    for figure in figures:
        svg = (root / figure).read_text()
        assert svg.startswith("<svg xmlns=") and "currentColor" not in svg
    page = (root / "reports" / "made" / "index.html").read_text()
    assert all(run.record()["key"] in page for run in runs) and "](results/made/manifest.json)" in text
    finding = findings([run for run in runs if run.record()["notebook"] == "04_ppo"], list(outline.arms))[0]
    assert [arm for arm in outline.arms if f"\n| {arm} |" not in text] == [finding.baseline]
    assert f"\n| shap | {finding.arms['shap'].gain} |" in text
    assert "1b. Dense rewards speed learning" in text
    assert re.search(rf"\| 2 \| {len(runs)} \| .* \| \[{recorded.COMMIT[:7]}\]\(results/made/manifest.json\) \|", text)
    assert json.loads((root / "results/made/manifest.json").read_text())["command"] == outline.command
    assert len(text.split()) < 2000  # four pages


def test_results_answer_each_claim_and_each_open_question(released):
    text = (released[0] / "RESULTS.md").read_text()
    claims, rest = text.partition("## The claims")[2].split("## Open questions")
    assert all(f"\n| {key}" in claims for key in ("1a", "1b", "2", "3", "4a", "4b", "4c", "5", "6"))
    assert claims.count("| *not asked*. ") == 6 and claims.count("| *an identity*. ") == 1
    assert claims.count("\n| ") == 1 + 9  # the head, and a row for each
    assert "| Is it? | – | *undecided*. [made](reports/made/comparison-ppo.html): Too few seeds." in rest
    (unasked,) = [line for line in rest.splitlines() if line.startswith("Not asked yet: ")]
    for study, questions in ASKED_BY.items():
        assert all(f"{question} (params/ablations/{study}.yaml)" in unasked for question in questions)
    assert "\nNo study decides " in rest and "1b at equal KL (made: " in rest


def test_a_reason_is_cut_after_its_first_interval():
    why = "Of 0.5 less 0.1. Gold +0.1 [+0.0, +0.2] (10 seeds, p 0.1 after Holm). Were it so, 25 seeds would show."
    assert _first(why) == "Of 0.5 less 0.1. Gold +0.1 [+0.0, +0.2] (10 seeds, p 0.1)."
    for lead in (NEAREST, f"{LEADS[SUPPORTED]}, 1 of 1 arm", f"{LEADS[NO_DIFFERENCE]}, 2 of 3 arms"):
        assert _first(f"{lead}: {why[17:]}") == _first(why)[17:]
    assert _first("Too few seeds. More would tell.") == "Too few seeds. More would tell."


@pytest.fixture
def settings(released):
    """A study with three settings, all with the same numbers."""
    outline = replace(released[1], study="reward_model")
    finding = findings([run for run in released[2] if run.record()["notebook"] == "04_ppo"], list(outline.arms))[0]
    return Study(outline, [], [replace(finding, dataset=f"reviews-labels-{n}") for n in (1, 10, 100)])


def test_settings_answer_open_questions(settings):
    rows = [row for row in open_questions([settings]) if row["study"]]
    assert {row["key"] for row in rows} == {*ASKED_BY["reward_model"]}
    assert [row["page"][-13:-5] for row in rows] == ["labels-1", "labels-1", "abels-10", "abels-10"]
    assert [row["where"] for row in rows] == ["equal updates", "equal KL"] * 2


def test_a_verdict_counts_the_settings_that_came_to_it_and_each_has_its_marks(settings):
    rows = claims([settings])
    ((answer,),) = [row["at"]["equal updates"] for row in by_key(rows) if row["key"] == "1b"]
    assert answer["number"] == 3 and answer["study"] == "reviews-labels-1"
    for finding in settings.findings:
        (own,) = {marks(rows, settings.page(finding))["1b"]}
        assert [mark.rstrip("0123456789") for mark in own.split()] == [MARKS[UNDECIDED]] * 2
    assert not marks(rows, "reports/other.html")


def test_a_remark_stands_where_the_numbers_do_and_stays(released, tmp_path):
    _, outline, runs = released
    write_record(replace(outline, remark=f"Times are of a busy machine. {HOSTILE}"), runs, tmp_path / "results")
    write_record(outline, runs[:1], tmp_path / "results")
    render(tmp_path / "results", tmp_path)
    page, text = (tmp_path / name for name in ("reports/made/index.html", "RESULTS.md"))
    assert all("Times are of a busy machine." in path.read_text() for path in (page, text))
    assert all("<script>alert" not in path.read_text() for path in (page, text))


def test_the_index_shows_main_studies_in_full_and_others_in_a_line_that_unfolds(released):
    facts = json.loads((released[0] / "reports" / "made" / "summary.json").read_text())
    alone, both = (
        BeautifulSoup(str(overview(studies, {})[0]), "html.parser")
        for studies in ([facts], [facts, facts | {"study": "reviews"}])
    )
    line = facts["datasets"]["reviews"]["line"]
    assert [lead.text for lead in alone.select(".verdict > .lead")] == [line] and not alone.select("details.verdict")
    assert [lead.text for lead in both.select(".verdict > .lead")] == [line]
    (folded,) = both.select("details.verdict")
    assert folded.summary.text == f"made, reviews. {line}" and not folded.has_attr("open")
    assert folded.table and folded.select("a[href='made/comparison-reviews.html']")


def test_runs_of_code_that_was_not_committed_are_named_and_counted(released, tmp_path):
    _, outline, runs = released
    study = Study(
        outline, runs, findings([run for run in runs if "04_ppo" in run.path.name], list(outline.arms)), ["a"]
    )
    text = write_results([study], tmp_path).read_text()
    assert "\nOf made, 1 runs come from code that was not committed.\n" in text


def test_time_of_the_cpu_is_shown_where_every_run_knows_it():
    known, unknown = {"seconds": 200.0, "cpu_seconds": 50.0}, {"seconds": 100.0}
    assert times([known, known]) == "7 min, 2 min of the CPU"
    assert times([known, unknown]) == "5 min" and times([]) == "0 s"
    assert "3 min, 50 s of the CPU" in footer(known)


def test_tables_of_results_are_tables(released):
    """Below each head stands a line of as many columns."""
    lines = (released[0] / "RESULTS.md").read_text().splitlines()
    heads = [i for i, line in enumerate(lines) if line.startswith("| ") and not lines[i - 1].startswith("|")]
    assert len(heads) > 3
    for head in heads:
        assert lines[head + 1] == "|" + "---|" * (lines[head].count("|") - 1)


def test_a_study_that_is_not_recorded_is_not_mentioned(released):
    text = (released[0] / "RESULTS.md").read_text()
    assert not any(name in text for name in ("reviews_full", "smollm2", "hh_rlhf", "ultrafeedback"))


@pytest.mark.parametrize("text", [HOSTILE, "a\n# b", "x ⟨y⟩\u202e*z*"])
def test_text_is_no_markup(text):
    shown = plain(text)
    assert not re.search(r"<\w|\n|\u202e|(?<!\\)\||\]\(|`", shown)


@pytest.mark.parametrize("name", ["manifest.json", "seed0", "study"])
def test_a_damaged_record_is_one_line_and_nothing_is_written(name, released, tmp_path, capsys):
    shutil.copytree(released[0] / "results", tmp_path / "results")
    path = next((tmp_path / "results" / "made").glob(f"{name}*"))
    path.write_bytes(path.read_bytes()[:-2])
    assert main(["report", "--from", str(tmp_path / "results")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(path) in error
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_a_folder_without_records_is_refused(tmp_path):
    with pytest.raises(InputError, match="no record in"):
        render(tmp_path, tmp_path)


def test_report_wants_a_study_or_records(capsys):
    assert main(["report"]) == main(["report", "params/reviews.yaml", "--from", "results"]) == 2
    assert capsys.readouterr().err.count("wanted a study") == 2
    assert main(["report", "--from", ""]) == 2
    assert "no record in" in capsys.readouterr().err


def test_an_archive_that_finds_no_room_leaves_nothing(released, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(InputError, match="a.zip cannot be written: No space left .*; make room"):
        write_archive(released[0] / "results", tmp_path / "a.zip")
    assert not list(tmp_path.iterdir())


def test_an_archive_is_the_same_twice_and_holds_its_hashes(released, tmp_path):
    results = released[0] / "results"
    first, second = (write_archive(results, tmp_path / name) for name in ("a.zip", "b.zip"))
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        lines = archive.read("results/SHA256SUMS").decode().splitlines()
        assert sorted(archive.namelist()) == sorted(["results/SHA256SUMS", *(f"results/{n[66:]}" for n in lines)])
        for line in lines:
            assert hashlib.sha256(archive.read(f"results/{line[66:]}")).hexdigest() == line[:64]
        archive.extractall(tmp_path / "unpacked")
    assert rendered(tmp_path / "unpacked" / "results" / "made") == rendered(results / "made")
    with pytest.raises(InputError, match="exists"):
        write_archive(results, first)
