"""JupyterLab itself, once: sliders of notebook 02 are made there, one is moved, the heat-map changes."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest
from chromium import launched
from conftest import ROOT
from whole_runs import server

from dense_rlhf.runner.kernels import SERVER

SMALL = {
    "reward_steps": 30,
    "ppo_rollouts": 16,
    "ppo_minibatch": 16,
    "ppo_max_new_tokens": 8,
    "evaluation_prompts": 16,
    "attribution_lime_samples": 16,
}
NEEDED = ("run_dir = None", "open_run(", "load_task(", "explore(")  # cells; `test_notebooks` runs all of them
KERNEL = """import os, sys
from dense_rlhf.runner.kernels import Forked
del os.environ['JPY_PARENT_PID']  # the parent of a fork is another
fork = Forked(['ipykernel_launcher', '-f', sys.argv[1]], dict(os.environ), os.getcwd(), [1], lambda: False)
sys.exit(fork.wait())"""
TRACKER = "lab/settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings"


@pytest.fixture
def browser():
    with launched() as chromium:
        yield chromium


@pytest.fixture
def lab(tmp_path, few_reviews):
    """A server over a folder that holds what the sliders of notebook 02 need, at smoke size; its address."""
    notebook = nbformat.read(ROOT / "notebooks" / "02_attribution.ipynb", 4)
    notebook.cells = [cell for cell in notebook.cells if any(part in cell.source for part in NEEDED)]
    values = SMALL | {"run_dir": str(tmp_path / "run"), "data_path": str(few_reviews)}
    notebook.cells[0].source += "".join(f"\n{name} = {value!r}" for name, value in values.items())
    notebook.cells[-1].source = notebook.cells[-1].source.replace(", row)", ")")
    nbformat.write(notebook, tmp_path / "02_attribution.ipynb")
    settings = tmp_path / TRACKER
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"windowingMode": "none"}))  # all cells are in the page
    spec = tmp_path / "data" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    argv = [sys.executable, "-c", KERNEL, "{connection_file}"]  # preloaded
    spec.write_text(json.dumps({"argv": argv, "display_name": "Python 3 (ipykernel)", "language": "python"}))
    places = {f"JUPYTER_{name}_DIR": str(tmp_path / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    places |= {"JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "lab" / "settings"), "PYTHONPATH": str(ROOT), SERVER: server()}
    options = [
        "--no-browser",
        "--allow-root",
        "--port=0",
        f"--ServerApp.root_dir={tmp_path}",
        "--ServerApp.token=t",
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.news_url=",
        "--LabApp.extension_manager=readonly",
    ]
    with open(tmp_path / "lab.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            stdout=log,
            stderr=log,
            env=os.environ | places,
            cwd=tmp_path,
        )
    yield address(tmp_path, process)
    process.terminate()
    process.wait(120)


def address(folder, server, seconds=90):
    """Where the server says that it listens, once it answers."""
    start = time.monotonic()
    while time.monotonic() - start < seconds and server.poll() is None:
        for path in (folder / "runtime").glob("jpserver-*.json"):
            url = json.loads(path.read_text() or "{}").get("url")
            if url and urllib.request.urlopen(f"{url}api/status?token=t").status == 200:
                return url
        time.sleep(0.2)
    pytest.fail((folder / "lab.log").read_text()[-2000:])


def test_a_slider_moves_the_heat_map(browser, lab):
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.goto(f"{lab}lab/tree/02_attribution.ipynb?token=t")
    page.locator(".jp-NotebookPanel .jp-CodeCell").first.wait_for(timeout=90_000)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=90_000)
    first = page.locator(".jp-CodeCell .jp-InputPrompt").first
    for _ in range(60):  # what is asked before the kernel answers is lost
        page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
        page.wait_for_timeout(1000)
        if first.inner_text() not in ("[ ]:", ""):
            break
    view = page.locator(".widget-html-content table")
    error = page.locator("[data-mime-type='application/vnd.jupyter.error']")
    for awaited in (view, page.locator(".jp-CodeCell").last.locator(".jp-OutputArea-output")):
        awaited.or_(error).first.wait_for(timeout=300_000)
        assert not error.all_inner_texts()
    before = view.inner_html()
    handle = page.locator(".widget-slider", has_text="temperature").locator("[role=slider]")
    handle.focus()
    for _ in range(10):
        handle.press("ArrowLeft")
    arrived = "() => /softmax at 0.1(?![0-9])/.test(document.querySelector('.widget-html-content table').innerText)"
    page.wait_for_function(arrived)
    after = view.inner_html()
    colours = [re.findall(r"background: ?rgba[^;\"]*", html) for html in (before, after)]
    assert colours[0] != colours[1] and len(colours[0]) == len(colours[1]) > 0
    assert page.locator(".widget-html-content mjx-container").count() == 0, "no token is typeset as math"
