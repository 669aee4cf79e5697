"""Pages are safe and whole: hostile text is escaped, nothing is fetched, figures carry alt text."""

import re
from types import SimpleNamespace

import made_study
import nbformat
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from hypothesis import given
from hypothesis import strategies as st

from dense_rlhf.__main__ import _reports
from dense_rlhf.files import write_json
from dense_rlhf.report import write as report
from dense_rlhf.report.notebook_page import notebook_body
from dense_rlhf.report.page import page as whole_page
from dense_rlhf.runs import RunFolder
from dense_rlhf.view import display
from dense_rlhf.view.escape import esc

HOSTILE = [
    '"><img src=x onerror=alert(1)>',
    "</script><script>alert(1)</script>",
    "$\\href{javascript:alert(1)}{x}$",
    "nul\x00 rtl\u202e zero\u200bwidth",
    "[x](javascript:alert(1))",
    "'\"&<>",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(text):
    frame = pd.DataFrame({text: [text]})
    pages = [
        display.table(frame, text).data,
        display.text_table({text: text}).data,
        display.note(text).data,
        display.heatmaps([text], {text: [1.0]}, text).data,
        display.check(text, True).data,
    ]
    for page in pages:
        tags = set(re.findall(r"<\s*/?\s*([a-zA-Z]+)", page))
        assert tags <= {"table", "caption", "thead", "tbody", "tr", "th", "td", "code", "p", "strong", "span"}
        assert not re.search(r"<[^>]*\son\w+\s*=", page)
        assert not any(c in page for c in "\x00\u202e\u200b")


@given(st.text(max_size=200))
def test_escaping_leaves_no_markup(text):
    assert not re.search(r"[<>\"']", esc(text))


def test_executed_notebook_page(tmp_path):
    v4 = nbformat.v4
    outputs = [
        v4.new_output("stream", name="stdout", text=HOSTILE[1]),
        v4.new_output(
            "display_data",
            {"image/png": "iVBORw0KGgo=", "text/plain": "x"},
            metadata={"image/png": {"alt": 'a "quoted" <alt>'}},
        ),
        v4.new_output("execute_result", {"text/html": "<table><tr><td>kept</td></tr></table>"}, execution_count=1),
        v4.new_output("display_data", {"application/javascript": "alert(2)", "text/vnd.mermaid": "graph"}),
        v4.new_output("error", ename="E", evalue=HOSTILE[0], traceback=[HOSTILE[0]]),
    ]
    notebook = v4.new_notebook(
        cells=[
            v4.new_markdown_cell("# T\n\n## One $a_t$\n\nText $$\\sum_i w_i$$ and $\\bad{$"),
            v4.new_code_cell(HOSTILE[1], outputs=outputs),
        ]
    )
    nbformat.write(notebook, tmp_path / "n.ipynb")
    made = whole_page("t", notebook_body(tmp_path / "n.ipynb"), "f")
    assert "<script" not in made and "<img src=x" not in made and "alert(2)" not in made
    assert "kept" in made and "<math" in made and "Content-Security-Policy" in made
    assert [image["alt"] for image in BeautifulSoup(made, "html.parser").find_all("img")] == ['a "quoted" <alt>']
    assert '<a href="#One' in made and "<details" in made
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", made)


def test_heatmap_wants_a_value_for_each_token():
    with pytest.raises(ValueError):
        display.heat(["a", "b"], [1.0])


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study of two PPO runs, `calm` without and `wild` with warnings; returns index and page of the wild one."""
    from dense_rlhf.config.study import load_study
    from dense_rlhf.runs import RunFolder, workspace

    study = load_study(workspace() / "params" / "reviews.yaml", ["study=s"])
    monkeypatch.setattr(report, "workspace", lambda: tmp_path)

    def write(warnings):
        records = []
        for arm in ("calm", "wild"):
            run = RunFolder(tmp_path / "runs" / "s" / f"04_ppo-{arm}-seed0")
            run.save_metrics({"gold": 1.0} | ({"warnings": warnings} if arm == "wild" else {}))
            nbformat.write(nbformat.v4.new_notebook(), run.file("notebook.ipynb"))
            records.append(
                {
                    "job": run.path.name,
                    "notebook": "04_ppo",
                    "arm": arm,
                    "seed": 0,
                    "dataset": "reviews",
                    "status": "failed",
                    "error": "",
                    "seconds": 1.0,
                    "started": 0,
                }
            )
        index = report.write_reports(study, records)
        return index.read_text(), (index.parent / "04_ppo-wild-seed0.html").read_text()

    return write


def test_warnings_stand_beside_their_run(study):
    index, page = study(
        [
            {"update": 3, "name": "KLBlowUp", "text": "KL is 41 nats"},
            {"update": 4, "name": "KLBlowUp", "text": "KL is 50 nats"},
            {"update": 9, "name": "EntropyCollapse", "text": "entropy is 0.01"},
        ]
    )
    cells = BeautifulSoup(index, "html.parser").select_one(".view").find_all("td")
    assert [[item.text for item in cell.find_all("li")] for cell in cells] == [
        [],
        ["KLBlowUp, update 3 and 1 more", "EntropyCollapse, update 9"],
    ]
    lines = [item.text for item in BeautifulSoup(page, "html.parser").select(".warned li")]
    assert lines == ["KLBlowUp, update 3 and 1 more: KL is 41 nats", "EntropyCollapse, update 9: entropy is 0.01"]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_warnings_stay_text(study, text):
    pages = study([{"update": text, "name": text, "text": text}])
    for page in pages:
        inside = BeautifulSoup(page, "html.parser").select_one(".warned li")
        assert not inside.find_all() and len(inside.text) > len(text)
        assert "<script" not in page and "<img" not in page and not any(c in page for c in "\x00\u202e\u200b")


@pytest.mark.parametrize("warnings", [[], None])
def test_a_healthy_run_has_no_column(study, warnings):
    assert all("class='warned'" not in page for page in study(warnings))


def test_nothing_under_reports_tells_a_secret_or_a_place(tmp_path, monkeypatch):
    monkeypatch.setenv("DB_PASS", "hunter2-and-more")
    for name in ("notebooks", "params"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    secrets = (
        "hunter2-and-more",
        f"{tmp_path}/x.csv",
        "see /" + "home/ada/x",
        "hf_" + "aB3" * 12,
        "C:\\Users\\Some Body\\x",
    )
    records = made_study.broken(tmp_path, "told", secrets)
    report.write_reports(made_study.Study("told", {}, (0,)), records)
    for path in [path for path in (tmp_path / "reports").rglob("*") if path.is_file()]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(?s).{0,40}(?:hunter2|home/ada|Body).{20}|" + re.escape(str(tmp_path)), text), path
    assert "⟨secret⟩" in str(RunFolder(tmp_path / "reports" / "told").load_json("summary.json"))


def test_pages_of_finished_runs_are_drawn_again_by_other_code_only(tmp_path, monkeypatch):
    for name in ("notebooks", "params"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    cached = [record | {"status": "cached"} for record in made_study.ablation(tmp_path, "ablated")]
    given = made_study.Study("ablated", {}, (0,)), [SimpleNamespace(name="ppo")], cached
    index = _reports(*given)
    index.write_text("kept")
    assert _reports(*given).read_text() == "kept"
    summary = RunFolder(index.parent).load_json("summary.json")
    write_json(index.parent / "summary.json", summary | {"pages": "of older code"})
    assert _reports(*given).read_text() != "kept"
    assert RunFolder(index.parent).load_json("summary.json") == summary


NO_SUMMARY = (b"", b"{", b"\xff\x00", b"[]", b"null", b"{}", b'{"study": "x", "runs": 3}', b'{"a": ' * 10_000)


def test_what_is_damaged_costs_no_other_page(study, tmp_path, capsys):
    """Neither other studies' summaries nor one run's metrics."""
    for i, content in enumerate(NO_SUMMARY):
        (tmp_path / "reports" / f"damaged{i}").mkdir(parents=True)
        (tmp_path / "reports" / f"damaged{i}" / "summary.json").write_bytes(content)
    (tmp_path / "reports" / "damaged" / "summary.json").mkdir(parents=True)
    index, _ = study([])
    lines, overview = capsys.readouterr().err, (tmp_path / "reports" / "index.html").read_text()
    assert lines.count("\n") == lines.count("summary.json is left out") == len(NO_SUMMARY) + 1
    assert 'href="s/index.html"' in overview and "1 studies" in overview and "damaged: damaged, damaged0, " in overview
    for page in (tmp_path / "reports" / "s").glob("04*"):
        page.unlink()
    records = [made_study.record(f"04_ppo-{arm}-seed0", "04_ppo", arm=arm, status="failed") for arm in ("calm", "wild")]
    (tmp_path / "runs" / "s" / "04_ppo-calm-seed0" / "metrics.json").write_text("[]")
    report.write_reports(made_study.Study("s", {}, (0,)), records)
    assert [path.name for path in (tmp_path / "reports" / "s").glob("04*")] == ["04_ppo-wild-seed0.html"]
    assert "metrics.json is damaged" in (tmp_path / "reports" / "s" / "index.html").read_text()
