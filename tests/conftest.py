"""The processes of tests: what each has in its environment, which files come first, the server that they share."""

import gc
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HANDS_OUT = "PYTEST_XDIST_WORKER" not in os.environ and "-n" in sys.argv  # this process starts others, and runs no test

if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # before any import of torch: a core each, or their threads fight
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker[2:]) % len(cores)]})
    sys.modules.setdefault("rfc3987_syntax", None)  # jsonschema can do without it, and is a second faster
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # what tests start compiles the package once, and not each time
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any import of huggingface_hub: unit tests use no network
os.environ["NUMBA_DISABLE_JIT"] = "1"  # shap would compile for longer than it then runs on a few tokens
os.environ["DENSE_RLHF_SERVER"] = ""  # no study of a test starts a server; whole runs share one, `whole_runs.server`

if not HANDS_OUT:
    gc.disable()  # until all is imported, which stays: to look it through again and again takes seconds
    from hypothesis import settings
    from stand_ins import *  # noqa: F403  fixtures, and what tests import from here

    os.fsync = lambda file: None  # no test cuts the power; what tests start waits for the disk as ever
    settings.register_profile("tests", deadline=None, max_examples=30, derandomize=True, database=None)
    settings.load_profile("tests")

LONGEST = """
    ablations notebooks inner_loop lab browser results outer_loop environment escape engine architectures baselines
    search findings attribution live grid jobs kernels claims benchmarks policy plan text_spans examples audit faults
    """.split()


def pytest_collection_modifyitems(items):
    """The files that take longest are handed out first, so that no worker ends with one."""
    rank = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def pytest_configure():
    if HANDS_OUT:
        from whole_runs import SHARED_SERVER, start_server

        os.environ[SHARED_SERVER] = start_server()


@pytest.fixture
def forked(monkeypatch):
    """Runs that the test starts are forks of the server that all tests share."""
    from whole_runs import server

    monkeypatch.setenv("DENSE_RLHF_SERVER", server())
