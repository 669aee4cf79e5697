"""Damaged state, places that cannot be written, outputs that nobody reads, and the short form of the script of kills.

`python tests/runner/faults/kill_runs.py 50` is the long form.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import make_checkout
from kill_runs import TARGETS, kill_runs

from dense_rlhf import files
from dense_rlhf.__main__ import main
from dense_rlhf.runner import jobs
from dense_rlhf.runs import RunFolder, finished_runs

STUDY = {"notebooks": ["01_reward_model", "04_ppo"], "arms": {"a": {"sources": ["terminal"]}}, "seeds": [0, 1]}
BAD, GOOD, OTHER = "04_ppo-a-seed0", "04_ppo-a-seed1", "01_reward_model"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished study whose notebooks were not executed: a run that starts is ok at once."""

    def launch(notebook, folder, *_):
        RunFolder(folder).save_metrics(gold=1.0)
        return "ok", ""

    place = tmp_path_factory.mktemp("finished") / "c"
    make_checkout(place, STUDY, dict.fromkeys(STUDY["notebooks"], ("x = 1",)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(jobs, "launch", launch)
        patch.setattr(jobs, "provenance", dict)
        patch.setattr("dense_rlhf.runner.grid.check_data", lambda _: None)
        assert main(["run", "params/s.yaml"]) == 0
        yield place


@pytest.fixture
def folder(finished, tmp_path, monkeypatch):
    """The runs of a copy of it, in which the command line works."""
    shutil.copytree(finished, tmp_path / "c", symlinks=True)
    monkeypatch.chdir(tmp_path / "c")
    return tmp_path / "c" / "runs" / "s"


def said(capsys, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([arguments[0], "params/s.yaml", *arguments[1:]])
    return code, *capsys.readouterr()


RECORD = {"job": BAD, "notebook": "04_ppo", "dataset": "reviews", "status": "ok"}
NOT_JSON = (b"", b"{", b'{"status": "ok", "key": ', b"\x89PNG\r\n\x00\xff", b"[]", b"null", b"3", b"[" * 50_000)
NO_RECORD = (
    {},
    {"status": "ok"},
    RECORD | {"status": "splendid"},
    RECORD | {"status": None},
    RECORD | {"artefacts": ["metrics.json"]},
    RECORD | {"artefacts": {"../x": "0"}},
    RECORD | {"artefacts": {"x": 0}},
    RECORD | {"seconds": "long"},
    RECORD | {"started": 1e300},
    RECORD | {"error": []},
    RECORD | {"job": GOOD},
)
NO_INPUTS = ({}, {"parameters": []}, {"parameters": {}, "files": 3}, {"source": "x"})
DAMAGES = [("run.json", content) for content in (*NOT_JSON, *(json.dumps(one).encode() for one in NO_RECORD))]
DAMAGES += [("inputs.json", content) for content in (*NOT_JSON, *(json.dumps(one).encode() for one in NO_INPUTS))]


def test_what_is_no_record_is_read_as_none(folder):
    for name, content in DAMAGES:
        run = RunFolder(folder / BAD)
        good = run.file(name).read_bytes()
        assert run.record()["status"] == "ok" and run.inputs()["source"]
        run.file(name).write_bytes(content)
        assert (run.record() if name == "run.json" else run.inputs()) == {}, content[:60]
        assert [run.path.name for run in finished_runs(folder)].count(BAD) == (name == "inputs.json")
        run.file(name).write_bytes(good)


@pytest.mark.parametrize("name, content", [*DAMAGES[:2], DAMAGES[11], *DAMAGES[-3:]], ids=repr)
def test_a_damaged_record_is_a_run_that_did_not_finish(name, content, folder, capsys):
    (folder / BAD / name).write_bytes(content)
    code, out, err = said(capsys, "status")
    why = "did not finish" if name == "run.json" else "new"
    assert code == 1 and err == "" and f"{BAD}: {why}" in out and f"ok        {GOOD}" in out
    code, out, _ = said(capsys, "run", "--dry-run")
    assert code == 0 and f"run     {BAD}" in out and f"cached  {GOOD}" in out
    assert said(capsys, "report")[0] == 0
    code, out, _ = said(capsys, "run")
    assert code == 0 and "1 ok, 2 cached" in out
    assert said(capsys, "status")[0] == 0


def directory(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def dangling(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("nowhere")


@pytest.mark.parametrize("name", ["run.json", ".running", ".lock", ".heartbeat", "params.yaml"])
def test_a_folder_in_a_files_place_is_named_and_costs_one_run(name, folder, capsys):
    (folder / BAD / "metrics.json").write_text("{}")
    directory(folder / BAD / name)
    code, out, err = said(capsys, "status")
    assert code == 1 and err == "" and BAD in out and f"ok        {GOOD}" in out
    assert said(capsys, "run", "--dry-run")[0] == said(capsys, "report")[0] == 0
    code, out, err = said(capsys, "run")
    assert code == 1 and "1 failed, 2 cached" in out.replace("2 cached, 1 failed", "1 failed, 2 cached")
    assert f"{folder / BAD / name} cannot be" in out and "Is a directory; move away what stands in its place" in out


@pytest.mark.parametrize("name", ["run.json", "inputs.json", ".heartbeat"])
def test_a_link_to_nowhere_is_written_over(name, folder, capsys):
    dangling(folder / BAD / name)
    assert said(capsys, "status")[0] in (0, 1)
    assert said(capsys, "run")[0] == said(capsys, "status")[0] == 0


@pytest.mark.parametrize("stand", [lambda path: path.write_text(""), dangling], ids=["file", "link"])
@pytest.mark.parametrize("where", [f"runs/s/{BAD}", "runs/s", "runs"])
def test_a_file_in_a_folders_place_is_named(where, stand, folder, capsys):
    place = folder.parent.parent / where
    shutil.rmtree(place)
    stand(place)
    for command in (["status"], ["run", "--dry-run"], ["report"], ["run"]):
        code, out, err = said(capsys, *command)
        assert code in (0, 1, 2) and err.count("\n") <= 1
    assert code and where in out + err and ("move it away" in out + err or "move away what" in out + err)
    assert (f"ok        {GOOD}" in said(capsys, "status")[1]) == (BAD in where)


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"cells": 3}', '{"cells": [{}]}', "{}"])
def test_a_notebook_that_cannot_be_read_is_named(content, folder, capsys):
    source = folder.parent.parent / "notebooks" / "01_reward_model.ipynb"
    source.unlink()
    if content is not None:
        source.write_text(content)
    for command in (["status"], ["run", "--dry-run"], ["run"]):
        code, out, err = said(capsys, *command)
        assert f"{source} is no notebook" in out and err.count("\n") <= 1, (command, err)
    assert code == 1 and "2 cached" in out and said(capsys, "report")[0] == 0


def test_what_is_not_the_runners_is_no_run(folder, capsys):
    """Folders of somebody else's, hidden ones, and copies of a run under another name."""
    for name in ("foreign", ".hidden", "copy"):
        shutil.copytree(folder / GOOD, folder / name)
    (folder / "foreign" / "run.json").write_text("")
    (folder / "file").write_text("")
    dangling(folder / "link")
    assert [run.path.name for run in finished_runs(folder)] == [OTHER, BAD, GOOD]
    for command in (["status"], ["run", "--dry-run"], ["report"], ["run"]):
        assert said(capsys, *command)[0] == 0
    assert json.loads((folder / ".hidden" / "run.json").read_text())["status"] == "ok"


@pytest.mark.parametrize("number, way", [(errno.ENOSPC, "make room"), (errno.EROFS, "choose a place")])
def test_what_cannot_be_written_is_one_line_for_each_run(number, way, folder, capsys, monkeypatch):
    """A full disk, and one that is read-only."""
    (folder / BAD / "metrics.json").write_text("{}")
    before = sorted(folder.rglob("*"))

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as context:
        context.setattr(files.os, "fsync", refuse)
        code, out, err = said(capsys, "run")
        assert code == 1 and err.count("\n") == 1 and way in err and "Traceback" not in out + err
        assert f"failed: {BAD}\n  {folder / BAD}" in out and os.strerror(number) in out and way in out
        assert said(capsys, "status")[0] == 1
    assert set(folder.rglob("*")) - set(before) == set(), "a file that was begun is removed"
    assert said(capsys, "run")[0] == 0


def test_runs_may_lie_behind_a_link_and_in_the_future(folder, capsys, tmp_path):
    shutil.move(folder.parent, tmp_path / "elsewhere")
    folder.parent.symlink_to(tmp_path / "elsewhere")
    for path in folder.rglob("*"):
        os.utime(path, (4e9, 4e9))
    assert said(capsys, "status")[0] == said(capsys, "run")[0] == 0
    assert "3 cached" in said(capsys, "run")[1]


def test_a_process_of_the_same_number_holds_no_run(folder, capsys):
    """What `.running` says counts only while it is locked."""
    (folder / BAD / ".running").write_text(json.dumps({"host": os.uname().nodename, "pid": os.getpid(), "since": 0}))
    assert said(capsys, "status")[0] == 0


# ---------------------------------------------------------------------------------------------------- the output


FULL = "error: standard output cannot be written: No space left on device\n"


@pytest.mark.parametrize(
    "line, code, message",
    [
        ("status params/s.yaml | true", 141, ""),
        ("status params/s.yaml > /dev/full", 2, FULL),
        ("--help > /dev/full", 2, FULL),
        ("status params/s.yaml >&- <&-", 0, ""),
    ],
)
def test_an_output_that_cannot_be_written(line, code, message, folder):
    command = f"set -o pipefail; {sys.executable} -m dense_rlhf {line}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, message)


def test_kills_lose_nothing_and_nothing_unfinished_is_called_ok(forked):
    hits, wrong = kill_runs(len(TARGETS))
    assert hits >= len(TARGETS) and wrong == []
