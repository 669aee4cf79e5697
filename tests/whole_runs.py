"""Whole studies at smoke size, through the runner that users call, and what every one of their pages must be."""

import atexit
import os
import re
import tempfile
from functools import cache
from pathlib import Path

from bs4 import BeautifulSoup
from conftest import ROOT

from dense_rlhf.runner.execution import preloaded
from dense_rlhf.runner.kernels import SERVER, Forked
from dense_rlhf.runs import RunFolder, python_path

SHARED_SERVER = "DENSE_RLHF_TEST_SERVER"  # its path, where the process that hands out tests has started it
_WORKSPACES = []  # are removed when the tests end


def make_workspace() -> Path:
    """A folder that holds the notebooks and studies of the checkout, and none of its runs."""
    _WORKSPACES.append(tempfile.TemporaryDirectory(prefix="drl-tests-"))
    folder = Path(_WORKSPACES[-1].name)
    for name in ("notebooks", "params", "locks"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def start_server() -> str:
    """The path of a server, still importing, that ends with this process."""
    started = preloaded()
    atexit.register(started.end)
    return started.path


@cache
def server() -> str:
    """The path of the one server of all processes of tests, from which whole runs are forked, when it has imported."""
    path = os.environ.get(SHARED_SERVER) or start_server()
    with open(os.devnull, "w") as nothing:  # or the limit of the first run is spent on waiting
        Forked(["this"], os.environ | {SERVER: path}, "/", [nothing.fileno()], lambda: False).wait()
    return path


def command(folder, log, *arguments, **environment):
    """`python -m` with these arguments in `folder`, preloaded; what it prints is in `log`."""
    environment = os.environ | {"PYTHONPATH": python_path(), SERVER: server()} | environment
    with open(log, "w") as file:
        return Forked(arguments, environment, str(folder), [file.fileno()], lambda: False)


def run_study(file, name, *settings):
    """Run a study at smoke size under another name: its run folders by job, and its folder of reports."""
    folder = make_workspace()
    log, settings = folder / "log.txt", ("size=smoke", f"study={name}", "threads=1", *settings)
    options = [part for setting in settings for part in ("--set", setting)]
    assert command(folder, log, "dense_rlhf", "run", file, *options).wait() == 0, log.read_text()
    return {path.name: RunFolder(path) for path in (folder / "runs" / name).iterdir()}, folder / "reports" / name


def check_pages(runs, reports):
    """A page a run, at least one comparison and an index, which open without a network or scripts."""
    pages = {path.name: path.read_text() for path in reports.glob("*.html")}
    comparisons = {name for name in pages if name.startswith("comparison-")}
    assert comparisons and set(pages) - comparisons == {f"{job}.html" for job in runs} | {"index.html"}
    for name, page in pages.items():
        assert "<script" not in page and "default-src 'none'" in page, name
        assert not re.search(r"(?:src|href)\s*=\s*[\"'](?:https?:)?//|@import|url\(", page), name
        assert all(image.get("alt", "").strip() for image in BeautifulSoup(page, "html.parser").find_all("img")), name
        assert len(page) < 2_000_000, name
    for job in runs:
        assert f"{job}.html" in pages["index.html"]
