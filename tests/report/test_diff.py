"""Two runs or studies differ in the parameters and results that are named, and in no other."""

import shutil

import pandas as pd
import pytest
import recorded

from dense_rlhf.__main__ import main
from dense_rlhf.files import write_json
from dense_rlhf.report.diff import differences
from dense_rlhf.report.record import write_record
from dense_rlhf.runs import RunFolder, artefacts
from dense_rlhf.types import InputError

JOB = "reviews-04_ppo-sparse-seed0"


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    root = tmp_path_factory.mktemp("once")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        write_record(*recorded.study(root, seeds=(0,)), root / "results")
    return root


@pytest.fixture
def study(once, tmp_path):
    """A study, its record, and a copy of the study."""
    runs = once / "runs" / "made"
    return runs, once / "results" / "made", shutil.copytree(runs, tmp_path / "copy")


def settle(run):
    """As if the run had left its files so."""
    write_json(run.file("run.json"), run.load_json("run.json") | {"artefacts": artefacts(run.path)})


def test_a_study_its_record_and_its_copy_are_the_same(study, capsys):
    runs, record, copy = study
    assert differences(runs, record) == differences(record, copy) == differences(runs / JOB, copy / JOB) == []
    assert main(["diff", str(runs), str(record)]) == 0 and "are the same" in capsys.readouterr().out


def test_each_difference_is_a_row(study, capsys):
    runs, record, copy = study
    run = RunFolder(copy / JOB)
    run.file("params.yaml").write_text(run.file("params.yaml").read_text() + "ppo_lr: 0.5\n")
    write_json(
        run.file("metrics.json"),
        {"warnings": [], "gold": {"mean": 2.0}, "seconds": 9, "update_cost": 2.0, "revisions": {"data": "x"}},
    )
    test = pd.read_csv(run.file("test.csv"))
    test = test.assign(ms=1.5)
    test.assign(gold=test["gold"].where(test.index != 3, 7.5)).to_csv(run.file("test.csv"), index=False)
    (copy / JOB / "seconds.csv").write_text("update\n1\n")
    settle(run)
    shutil.rmtree(copy / "ppo")
    rows = differences(record, copy)
    assert ("ppo", "run", "present", "missing") in rows and len(rows) == 4
    assert (JOB, "parameter ppo_lr", "0.0001", "0.5") in rows and (JOB, "gold.mean", "–", "2.0") in rows
    assert (JOB, "test.csv, gold, 1 of 60 rows, first in 3", str(test["gold"][3]), "7.5") in rows
    assert main(["diff", str(record), str(copy)]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)


def test_tables_of_other_lengths_and_missing_ones_are_rows(study):
    runs, _, copy = study
    run = RunFolder(copy / JOB)
    run.file("test.csv").unlink()
    pd.read_csv(run.file("history.csv"))[:3].to_csv(run.file("history.csv"), index=False)
    settle(run)
    assert differences(runs / JOB, copy / JOB) == [
        (JOB, "history.csv", "20 rows", "3 rows"),
        (JOB, "test.csv", "present", "missing"),
    ]


def test_a_run_and_a_study_are_not_of_a_kind(study, tmp_path):
    runs, _, copy = study
    with pytest.raises(InputError, match="two of a kind"):
        differences(runs / JOB, copy)
    with pytest.raises(InputError, match="has no metrics.json"):
        differences(runs, tmp_path / "nothing")
