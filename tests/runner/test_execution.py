"""One run in an environment that nobody made for it: its places, its kernel, its children, its silence."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import papermill
import pytest
from checkout import command, make_checkout, write_notebook

from dense_rlhf.files import lock
from dense_rlhf.runner import execution
from dense_rlhf.runner.execution import HEARTBEAT, USED, Limits, cpu_seconds, launch, work
from dense_rlhf.runner.jobs import RUNNING, state
from dense_rlhf.types import InputError
from dense_rlhf.view.escape import scrub

TELLS = "import sys; print(sys.executable, 'é', globals().get('startup'))"
DETACHES = """import subprocess, sys, time
subprocess.run([sys.executable, '-c', '''
import os, subprocess
child = subprocess.Popen(['sleep', '300'], start_new_session=True, env={}, stdout=subprocess.DEVNULL)
open('child', 'w').write(str(child.pid))'''], start_new_session=True)"""

BURNS = """import subprocess, sys, time
subprocess.run([sys.executable, '-c', 'import time\\nwhile time.process_time() < 2: pass'])
begin = time.process_time()
while time.process_time() < begin + 1: pass"""


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A function that puts code into the notebook `n`; returns a run folder prepared for it, in a checkout."""
    make_checkout(tmp_path, {}, {})
    monkeypatch.chdir(tmp_path)

    def prepare(*cells):
        write_notebook(tmp_path / "notebooks" / "n.ipynb", *cells)
        folder = tmp_path / "runs" / "s" / "n"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "params.yaml").write_text("seed: 3\n")
        return folder

    return prepare


def foreign_jupyter(place: Path) -> dict[str, str]:
    """Jupyter's and IPython's settings of somebody else: another `python3`, a start-up file, no place to write."""
    spec, startup = place / "jupyter" / "kernels" / "python3", place / "ipython" / "profile_default" / "startup"
    for folder in (spec, startup):
        folder.mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps({"argv": ["false"], "display_name": "x", "language": "python"}))
    for file in (startup / "a.py", place / "startup.py"):
        file.write_text("startup = 'foreign'")
    return {
        "JUPYTER_PATH": str(place / "jupyter"),
        "JUPYTER_RUNTIME_DIR": "/proc/none",
        "IPYTHONDIR": str(place / "ipython"),
        "PYTHONSTARTUP": str(place / "startup.py"),
    }


def long_and_bare(place: Path) -> dict[str, str]:
    """A TMPDIR too long for a socket, no home, and a terminal and locale that know ASCII only."""
    folder = place / ("scratch-" * 12)
    folder.mkdir()
    bare = {"HOME": "/proc/none", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "TERM": "dumb"}
    return bare | {"TMPDIR": str(folder), "COLUMNS": "1"}


def test_a_notebook_keeps_no_secret(prepared, forked, monkeypatch):
    """Neither one that a cell prints, nor one in an error."""
    monkeypatch.setenv("DB_PASS", "hunter2-and-more")
    folder = prepared("import os; print(os.environ['DB_PASS'], os.getcwd())", "raise ValueError(os.environ['DB_PASS'])")
    assert launch("n", folder, Limits(1, 600))[0] == "failed"
    text = (folder / "notebook.ipynb").read_text()
    assert "hunter2" not in text and "⟨secret⟩" in text and os.getcwd() not in text and "ValueError" in text


@pytest.mark.parametrize("made", [foreign_jupyter, long_and_bare], ids=lambda made: made.__name__)
def test_a_run_owes_nothing_to_its_environment(made, prepared, tmp_path, monkeypatch):
    folder = prepared(TELLS)
    for name, value in made(tmp_path).items():
        monkeypatch.setenv(name, value)
    assert launch("n", folder, Limits(1, 600)) == ("ok", "")
    executed = json.loads((folder / "notebook.ipynb").read_text(encoding="utf-8"))
    printed = ["".join(o["text"]) for cell in executed["cells"] for o in cell.get("outputs", ())]
    assert printed == [scrub(f"{sys.executable} é None\n")]


def test_no_place_for_sockets_names_tmpdir(monkeypatch):
    monkeypatch.setattr(execution.tempfile, "gettempdir", lambda: "/proc/none")
    with pytest.raises(InputError, match="no place for a kernel's sockets /proc/none: .* set TMPDIR to a folder of at"):
        execution.kernel_folder()


def test_the_runs_own_limit_decides_how_long_a_kernel_may_take(prepared, monkeypatch):
    given = {}
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "PYTHONSTARTUP"):
        monkeypatch.setenv(name, "")

    def execute(*_, **more):
        given.update(more)
        return SimpleNamespace(cells=[])

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    execution.execute_notebook("n", prepared())
    assert min(given["start_timeout"], given["iopub_timeout"]) > 24 * 3600


def test_a_full_disk_is_named_where_a_log_could_not_be_written(tmp_path, monkeypatch):
    (tmp_path / "log.txt").touch()
    monkeypatch.setattr(execution.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    assert execution._last_line(tmp_path / "log.txt", 0).endswith(f"; the disk of {tmp_path} is full")


# ---------------------------------------------------------------------------------------------------- children


def gone(pid: int, seconds: float = 60.0) -> bool:
    until = time.monotonic() + seconds
    while (alive := Path(f"/proc/{pid}").exists()) and time.monotonic() < until:
        time.sleep(0.05)
    return not alive


@pytest.mark.parametrize("start", ["forked", "alone"])
def test_a_detached_child_ends_with_its_run(start, prepared, tmp_path, request):
    if start == "forked":
        request.getfixturevalue("forked")
    assert launch("n", prepared(DETACHES), Limits(1, 600)) == ("ok", "")
    assert gone(int((tmp_path / "child").read_text()), 0)


@pytest.mark.parametrize("start", ["forked", "alone"])
def test_the_cpu_of_all_of_a_runs_processes_is_counted(start, prepared, request):
    if start == "forked":
        request.getfixturevalue("forked")
    folder = prepared(BURNS)
    assert cpu_seconds(folder) is None
    begin = time.monotonic()
    assert launch("n", folder, Limits(1, 600)) == ("ok", "")
    assert 3 < cpu_seconds(folder) < 4 * (time.monotonic() - begin)
    assert cpu_seconds(folder) is None  # it is of the run that has just ended


def test_seconds_that_an_earlier_run_left_are_not_this_ones(tmp_path, monkeypatch):
    (tmp_path / USED).write_text("99")
    monkeypatch.setattr(execution, "_start", lambda *_: subprocess.Popen(["true"], start_new_session=True))
    assert launch("n", tmp_path, Limits(1, 60)) == ("ok", "") and cpu_seconds(tmp_path) is None


def test_a_detached_child_ends_with_its_runner(tmp_path):
    study = {"notebooks": ["01_reward_model"], "arms": {"a": {"sources": ["terminal"]}}}
    make_checkout(tmp_path, study, {"01_reward_model": (DETACHES, "time.sleep(300)")})
    runner = command(tmp_path, "run", "params/s.yaml")
    child = tmp_path / "child"
    until = time.monotonic() + 240
    while not (child.exists() and child.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    assert not gone(int(child.read_text()), 0)
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    assert gone(int(child.read_text()))


def test_a_stopped_kernel_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(execution, "BEAT", 0.02)
    child = subprocess.Popen(["sleep", "60"])
    execution._beating(tmp_path)(None, 4)
    os.utime(tmp_path / HEARTBEAT, (0, 0))
    try:
        until = time.monotonic() + 60
        while execution.heartbeat(tmp_path)["age"] > 60 and time.monotonic() < until:
            time.sleep(0.02)
        assert execution.heartbeat(tmp_path) == {"cell": 5, "age": pytest.approx(0, abs=60)}
        child.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
        with lock(tmp_path / RUNNING):
            answers, until = True, time.monotonic() + 60
            while answers and time.monotonic() < until:  # the last beat may be under way when the child is stopped
                os.utime(tmp_path / HEARTBEAT, (0, 0))
                time.sleep(0.2)
                answers = not state(tmp_path, "")[1].startswith("not answering: cell 5, last sign ")
            assert not answers
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"cell": "x"}', '{"cell": 1e999}', "\x00", None])
def test_any_heartbeat_can_be_read(text, tmp_path):
    (tmp_path / HEARTBEAT).mkdir() if text is None else (tmp_path / HEARTBEAT).write_text(text)
    assert execution.heartbeat(tmp_path) == {}


def test_a_clock_of_the_future_is_no_age(tmp_path):
    (tmp_path / HEARTBEAT).write_text('{"cell": 1}')
    os.utime(tmp_path / HEARTBEAT, (4e9, 4e9))
    assert execution.heartbeat(tmp_path) == {"cell": 1, "age": 0}


def test_our_own_message_is_the_reason(prepared, capfd, monkeypatch):
    monkeypatch.delenv(execution.PARENT, raising=False)
    monkeypatch.setattr(execution, "execute_notebook", lambda *_: (_ for _ in ()).throw(InputError("no such\nfilm")))
    assert work("n", prepared()) == 1 and capfd.readouterr().out == "no such film\n"
