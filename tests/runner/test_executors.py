"""Runs on a Ray cluster and through submitit; both are extras, and skipped where they are not installed."""

import json
import signal
import sys
import time
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from checkout import JUDGED, command, make_checkout
from kill_runs import processes

from dense_rlhf.runner.executors import executor
from dense_rlhf.types import InputError

STUDY = {
    "notebooks": ["04_ppo"],
    "seeds": [0, 1, 2],
    "workers": 2,
    "threads": 1,
    "arms": {"a": {"sources": ["terminal"]}},
}
# each attempt leaves a mark; the first of seed 1 waits for a file `go`
CELLS = (
    "import json, os, pathlib, time\nhome = pathlib.Path(run_dir)",
    "with open(home.parent / f'{seed}.attempts', 'a') as file: file.write('x')\n"
    "slow = (home.parent / f'{seed}.attempts').read_text() == 'x' and seed == 1\n"
    "while slow and not (home.parent / 'go').exists(): time.sleep(0.2)",
    "found = {'seed': seed, 'gpus': os.environ.get('CUDA_VISIBLE_DEVICES')}\n"
    "(home / 'metrics.json').write_text(json.dumps(found))\n" + JUDGED,
)
with_ray = pytest.mark.skipif(not find_spec("ray"), reason="the extra is not installed: pip install 'dense-rlhf[ray]'")
with_slurm = pytest.mark.skipif(
    not find_spec("submitit"), reason="the extra is not installed: pip install 'dense-rlhf[slurm]'"
)


@pytest.fixture
def checkout(tmp_path):
    make_checkout(tmp_path, STUDY, {"04_ppo": CELLS})
    return tmp_path


def attempts(folder) -> dict[str, int]:
    return {path.stem: len(path.read_text()) for path in folder.glob("runs/s/*.attempts")}


def ended(folder) -> dict[str, str]:
    return {path.parent.name[-1]: json.loads(path.read_text())["status"] for path in folder.glob("runs/s/*/run.json")}


def until(condition, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@with_ray
def test_a_ray_cluster_loses_one_of_two_nodes_and_no_run(checkout, monkeypatch):
    """The run on the lost node is tried again on the other; finished runs stay; a GPU each."""
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False} | small)
    nodes = [cluster.add_node(num_cpus=1, num_gpus=1, **small) for _ in range(2)]
    try:
        cluster.wait_for_nodes()
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        runner = command(checkout, "run", "params/s.yaml", "--executor", "ray", "--gpus", "1")
        until(lambda: attempts(checkout).get("1") == 1 and ended(checkout).get("0") == "ok")
        cluster.remove_node(next(node for node in nodes if runs_on(node, checkout)), allow_graceful=False)
        printed = runner.communicate(timeout=300)[0]
        assert runner.returncode == 0, printed
        assert ended(checkout) == dict.fromkeys("012", "ok") and attempts(checkout) == {"0": 1, "1": 2, "2": 1}, printed
    finally:
        cluster.shutdown()
    for seed in "012":
        metrics = json.loads((checkout / "runs" / "s" / f"04_ppo-a-seed{seed}" / "metrics.json").read_text())
        assert metrics == {"seed": int(seed), "gpus": "0"}


def test_a_cluster_that_cannot_start_is_one_line(monkeypatch):
    def init(**_):
        raise OSError("AF_UNIX path length cannot exceed 107 bytes")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=init))
    with pytest.raises(InputError, match="--executor ray cannot start: OSError: AF_UNIX path length"):
        executor("ray", 1, 1, None, 10, "logs")


def runs_on(node, checkout) -> bool:
    """Whether the slow run is a descendant of this node's raylet."""
    worker = next(process for process in processes(checkout, "dense-worker") if process.cmdline()[-1].endswith("seed1"))
    return node.all_processes["raylet"][0].process.pid in {parent.pid for parent in worker.parents()}


@with_slurm
def test_submitit_jobs_outlive_their_runner_and_nothing_runs_twice(checkout):
    """A runner that is killed leaves its jobs to the scheduler; the next one waits for them."""
    options = ("run", "params/s.yaml", "--executor", "slurm")
    runner = command(checkout, *options)
    until(lambda: attempts(checkout).get("1") == 1 and ended(checkout).get("0") == "ok")
    runner.send_signal(signal.SIGKILL)
    runner.wait()  # its jobs hold its output open
    again = command(checkout, *options)
    assert any("waiting for 04_ppo-a-seed1, which process" in line for line in again.stdout)
    (checkout / "runs" / "s" / "go").touch()
    printed = again.communicate(timeout=240)[0]
    assert again.returncode == 0 and "2 cached" in printed, printed
    assert ended(checkout) == dict.fromkeys("012", "ok") and attempts(checkout) == {"0": 1, "1": 1, "2": 1}, printed


@with_slurm
def test_an_interrupt_cancels_submitted_jobs(checkout):
    runner = command(checkout, "run", "params/s.yaml", "--executor", "slurm", "--only", "*seed1")
    until(lambda: attempts(checkout).get("1") == 1)
    runner.send_signal(signal.SIGINT)
    assert "interrupted" in runner.communicate(timeout=60)[0] and runner.returncode == 130
    until(lambda: not processes(checkout, "dense-"), 60)
    assert ended(checkout).get("1") in ("cancelled", "killed", None)
