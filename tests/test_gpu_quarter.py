"""The script that uses a quarter of an hour of a card: nothing measured is lost, and what is known is not run again."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_records as records  # noqa: E402
import quarter  # noqa: E402


def configuration(rounds, name="one", tokens=100):
    """Rounds that were measured somewhere: seconds of two steps, or an exception to raise."""
    todo = iter(rounds)

    def measure():
        made = next(todo)
        if isinstance(made, BaseException):
            raise made
        return {"sample": [made, 1.0], "explain": [1.0, 2.5]}

    return quarter.Configuration(
        name, "a title", lambda: ({"tokens": tokens, "flops": 1e9}, measure), len(rounds) - 1, 1
    )


def runs(folder, name="one"):
    return json.loads((folder / f"{name}.json").read_text())["runs"]


def test_the_first_round_warms_up_and_the_others_are_averaged(tmp_path, capsys):
    assert quarter.measured(configuration([9.0, 1.0, 3.0]), 0, tmp_path)
    [run] = runs(tmp_path)
    made = run["figures"]
    assert run["complete"] and run["first"]["sample"] == [9.0, 1.0] and len(run["rounds"]) == 2
    assert made["seconds"] == {"sample": [2.0, pytest.approx(2**0.5, rel=1e-3)], "explain": [1.0, 0.0]}
    assert made["step_seconds"][0] == 3.0 and made["peak_gib"] == 2.5
    assert made["tokens_per_second"][0] == (100 / 2 + 100 / 4) / 2 and made["over_sparse"][0] == pytest.approx(
        5 / 3, 1e-3
    )
    assert made["mfu"][0] == pytest.approx(1e9 * (1 / 2 + 1 / 4) / 2 / 100e9)
    assert [json.loads(one)["n"] for one in capsys.readouterr().out.splitlines()] == [0, 1, 2]


def test_what_is_finished_is_not_run_again_and_what_is_not_is(tmp_path, monkeypatch):
    broken = configuration([1.0, 2.0, RuntimeError("out of memory | at\nlast")])
    assert not quarter.measured(broken, 0, tmp_path)
    [run] = runs(tmp_path)
    assert not run["complete"] and len(run["rounds"]) == 1 and "out of memory" in run["error"]
    assert quarter.measured(configuration([1.0, 2.0]), 0, tmp_path)
    assert [run["complete"] for run in runs(tmp_path)] == [True]  # in the place of the broken one
    assert quarter.measured(configuration([AssertionError("asked again")]), 0, tmp_path)
    monkeypatch.setattr(quarter, "source_key", lambda *_: "another code")
    assert quarter.measured(configuration([1.0, 5.0]), 0, tmp_path)
    assert [run["code"] == "another code" for run in runs(tmp_path)] == [False, True]


def test_the_end_of_the_time_loses_no_round(tmp_path):
    with pytest.raises(quarter.OutOfTime):
        quarter.measured(configuration([1.0, 2.0, quarter.OutOfTime(), 1.0]), 0, tmp_path)
    [run] = runs(tmp_path)
    assert len(run["rounds"]) == 1 and not run["complete"] and run["figures"]["seconds"]["sample"] == [2.0, None]


def test_a_later_run_that_is_slower_by_more_than_a_twentieth_is_marked():
    speeds = [("H200", 1.0), ("A100", 3.0), ("H200", 1.04), ("H200", 1.06), ("A100", 2.0)]
    made = [{"card": card, "figures": {"step_seconds": [seconds, None]}} for card, seconds in speeds]
    assert [worse for _, worse in records.marked([*made, {"card": "H200", "error": "none"}])] == [False] * 3 + [
        True,
        False,
    ]


def test_the_table_says_what_no_card_has_filled(tmp_path, monkeypatch):
    quarter.measured(configuration([1.0, 1.0]), 1, tmp_path)
    monkeypatch.setattr(quarter, "source_key", lambda *_: "later")
    quarter.measured(configuration([1.0, 3.0, 3.0]), 1, tmp_path)
    quarter.measured(configuration([RuntimeError("a | b")], "two"), 2, tmp_path)
    records.write(tmp_path / "three.json", {"configuration": {"order": 3, "title": "three"}, "runs": []})
    page = tmp_path / "page.md"
    page.write_text(f"before\n{records.START}old{records.END}\nafter\n")
    records.main(tmp_path, page)
    rows = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")][2:]
    assert rows[0][1:3] == ["CPU", "25 ± 0"] and rows[0][4] == "3 ± 0" and "**slower by more than 5%" in rows[0][-1]
    assert set(rows[1][1:-1]) == set(rows[2][1:-1]) == {"not run"} and "a \\| b" in " | ".join(rows[1])
    assert page.read_text().startswith("before\n") and page.read_text().endswith("\nafter\n")


def test_the_page_has_the_table_of_the_committed_files(tmp_path):
    page = tmp_path / "gpu.md"
    page.write_text((ROOT / "docs" / "gpu.md").read_text())
    records.main(page=page)
    assert page.read_text() == (ROOT / "docs" / "gpu.md").read_text()


@pytest.mark.parametrize("name", ["same-tokens", "sample-captured", "step-1b-lora", "explain-16384"])
def test_a_configuration_runs_at_a_toy_size(name, tmp_path):
    every = {one.name: one for one in quarter.announced(tmp_path, toy=True)}
    assert quarter.measured(every[name], 0, tmp_path) and runs(tmp_path, name)[0]["complete"]
    assert {path.stem for path in tmp_path.glob("*.json")} == set(every)
