"""Runs that are forked from a server: what each has of its own, what ends with whom, and what happens without one."""

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from checkout import PAGELESS, command, make_checkout, write_notebook
from kill_runs import left_behind, processes

from dense_rlhf.runner import kernels
from dense_rlhf.runner.execution import Limits, _environment, kernel_folder, launch
from dense_rlhf.runner.kernels import SERVER, SINGLE, Forked, Server

LIGHT = ["ipykernel.kernelapp", "papermill", "nbclient", "numpy"]
PRELOADS_LITTLE = f"from dense_rlhf.runner import kernels\nkernels.PRELOADED[:] = {LIGHT}\n{PAGELESS}"
TELLS = """import json, os, random, sys, tempfile
loaded = [name for name in ('torch', 'transformers', 'seaborn') if name in sys.modules]
import numpy, threadpoolctl, torch
import own
told = {
    'loaded': loaded, 'own': own.VALUE, 'torch': torch.get_num_threads(), 'cuda': torch.cuda.is_initialized(),
    'blas': [pool['num_threads'] for pool in threadpoolctl.threadpool_info() if pool['user_api'] == 'blas'],
    'environment': {name: os.environ.get(name) for name in ('OMP_NUM_THREADS', 'CUDA_VISIBLE_DEVICES', 'MINE')},
    'places': [os.getcwd(), tempfile.gettempdir(), os.readlink('/proc/self/fd/0')],
    'numpy': numpy.random.random(), 'random': random.random(), 'drawn': torch.rand(1).item(),
    'files': sorted(os.path.basename(os.readlink(f'/proc/self/fd/{f}')) for f in os.listdir('/proc/self/fd')
                    if os.path.lexists(f'/proc/self/fd/{f}'))}
open(f'{run_dir}/told.json', 'w').write(json.dumps(told))"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with a notebook `n` and, in PYTHONPATH, a module `own`; returns its run's folder."""
    make_checkout(tmp_path, {}, {})
    (tmp_path / "path").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "s" / "n"
    folder.mkdir(parents=True)
    (folder / "params.yaml").write_text("seed: 3\n")
    return folder


@pytest.fixture
def light(monkeypatch):
    """A function that starts a server of few modules for the runs of this test."""
    started = []

    def start(*modules):
        started.append(Server(_environment(Limits(1, 0)), kernel_folder(), modules or LIGHT))
        monkeypatch.setenv(SERVER, started[-1].path)
        return started[-1].process

    yield start
    for server in started:
        server.end()


def told(folder, limits, value):
    """What a run says of itself, where the module `own` has this value."""
    Path("path/own.py").write_text(f"VALUE = {value!r}\n")
    assert launch("n", folder, limits) == ("ok", "")
    return json.loads((folder / "told.json").read_text())


def test_forked_runs_differ_from_others_only_in_what_was_loaded(checkout, forked, tmp_path, monkeypatch):
    """Code, environment, threads, places and seeds are each run's own; locks and sockets stay with the worker."""
    write_notebook(Path("notebooks/n.ipynb"), TELLS)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("MINE", "1")
    with open(tmp_path / "lock", "w") as lock:
        one = told(checkout, Limits(1, 600), "first")
        monkeypatch.setenv("MINE", "2")
        Path("notebooks/n.ipynb").touch()
        two = told(checkout, Limits(2, 600, gpus="6"), "second, longer")
        monkeypatch.setenv(SERVER, "")
        alone = told(checkout, Limits(2, 600, gpus="6"), "second, longer")
    assert lock.name and one["loaded"] == two["loaded"] == ["torch", "transformers", "seaborn"] and not alone["loaded"]
    assert (one["own"], two["own"]) == ("first", "second, longer") and (one["torch"], two["torch"]) == (1, 2)
    assert one["environment"] == {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": None, "MINE": "1"}
    assert set(one["blas"]) == {1} and set(two["blas"]) == {2} and not one["cuda"]
    assert all(one[name] != two[name] for name in ("numpy", "random", "drawn"))
    same = ("torch", "cuda", "environment", "own", "places")
    assert {name: two[name] for name in same} == {name: alone[name] for name in same}
    assert "server" not in "".join(two["files"]) and "log.txt" in two["files"]


def test_a_server_that_was_killed_takes_its_runs_and_is_missed_once(checkout, light, capfd):
    server = light()
    write_notebook(Path("notebooks/n.ipynb"), "import os, signal", f"os.kill({server.pid}, signal.SIGKILL); input()")
    assert launch("n", checkout, Limits(1, 600))[0] == "killed"
    assert not processes(Path.cwd(), "dense-worker") and not processes(Path.cwd(), "dense-kernel")
    write_notebook(Path("notebooks/n.ipynb"), "x = 1")
    capfd.readouterr()
    assert [launch("n", checkout, Limits(1, 600))[0] for _ in range(2)] == ["ok", "ok"]
    assert capfd.readouterr().err == (
        "runs are not preloaded any more: the server fails ([Errno 111] Connection refused)\n"
    )


def test_a_server_with_two_threads_forks_nothing(checkout, light, capfd, monkeypatch):
    Path("path/threaded.py").write_text("import threading\nthreading.Thread(target=threading.Event().wait).start()\n")
    light("threaded", "no_such_module")
    write_notebook(Path("notebooks/n.ipynb"), "x = 1")
    assert launch("n", checkout, Limits(1, 600)) == ("ok", "")
    assert "the server fails (2 threads run after the imports)" in capfd.readouterr().err


def test_what_is_stopped_while_the_server_imports_waits_no_longer(checkout, light, monkeypatch):
    Path("path/slow.py").write_text("import time\ntime.sleep(60)\n")
    light("slow")
    write_notebook(Path("notebooks/n.ipynb"), "x = 1")
    began = time.monotonic()
    assert launch("n", checkout, Limits(1, 0.2))[0] == "timeout" and time.monotonic() - began < 20


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_server_ends_with_its_runner(end, tmp_path, monkeypatch):
    monkeypatch.delenv(SERVER)
    study = {"notebooks": ["01_reward_model"], "arms": {"a": {"sources": ["terminal"]}}}
    make_checkout(tmp_path, study, {"01_reward_model": ("import time; time.sleep(300)",)})
    runner = command(tmp_path, "run", "params/s.yaml", code=PRELOADS_LITTLE)
    until = time.monotonic() + 240
    while not (forks := processes(tmp_path, "dense-kernel")) and time.monotonic() < until:
        time.sleep(0.05)
    (kernel,) = forks
    chain = kernel.parents()[:4]
    assert [one.name() for one in chain] == ["dense-worker", "dense-guard", "dense-keeper", "dense-server"]
    runner.send_signal(end)
    runner.communicate()
    assert left_behind(tmp_path) == [] and not psutil.wait_procs(chain, timeout=60)[1]


def test_a_server_knows_no_module_of_this_package(checkout, light):
    """It is run by its path, so that every run imports what is on disk."""
    assert not [name for name in kernels.PRELOADED if name.startswith("dense_rlhf")]
    light("json")
    code = "import sys; open(sys.argv[1], 'w').write(' '.join(sys.modules)); sys.exit('no')"
    Path("path/lists.py").write_text(code)
    with open("out", "w") as file:
        run = Forked(["lists", "modules"], os.environ | SINGLE, os.getcwd(), [file.fileno()], lambda: False)
    assert run.wait(120) == 1 and Path("out").read_text() == "no\n"
    assert "json" in (names := Path("modules").read_text().split()) and "dense_rlhf" not in names
