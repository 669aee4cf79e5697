"""A checkout with made-up notebooks, that the command line takes for the real one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).parents[3]
PARAMETERS = "arm = 'x'; seed = 0; run_dir = '.'"
JUDGED = """pathlib.Path(run_dir, 'evaluation.csv').write_text(
    'gold,proxy,kl,win,reference_gold,reference_proxy\\n1,1,1,1,0,0\\n2,2,2,1,0,0\\n')"""  # what reports read
WRITES = (
    """
found = {'lr': ppo_lr, 'seed': seed, 'shape': {'weights': [0.5, 0.5]}}
pathlib.Path(run_dir, 'metrics.json').write_text(json.dumps(found))
"""
    + JUDGED
)


def write_notebook(path: Path, *sources: str) -> None:
    """A notebook whose first cell, of parameters, is followed by these."""
    cells = [nbformat.v4.new_code_cell(source) for source in (PARAMETERS, *sources)]
    cells[0].metadata["tags"] = ["parameters"]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)


def make_checkout(folder: Path, study: dict, notebooks: dict[str, tuple[str, ...]]) -> Path:
    """Write params/s.yaml and the notebooks beside a link to the package; returns the study's path."""
    for name in ("notebooks", "params", "locks"):
        (folder / name).mkdir(parents=True)
    (folder / "dense_rlhf").symlink_to(ROOT / "dense_rlhf")
    for name, sources in notebooks.items():
        write_notebook(folder / "notebooks" / f"{name}.ipynb", *sources)
    (folder / "params" / "s.yaml").write_text(yaml.safe_dump({"study": "s"} | study))
    return folder / "params" / "s.yaml"


# `python -m dense_rlhf` without pages, which take longer than made-up notebooks
PAGELESS = """import sys, types
sys.modules["dense_rlhf.report.write"] = types.SimpleNamespace(write_reports=lambda *_: "no page")
from dense_rlhf.__main__ import main
sys.exit(main(sys.argv[1:]))"""


def command(folder: Path, *arguments: str, code: str = PAGELESS) -> subprocess.Popen:
    """The command line in the checkout, its output to be read; it heeds Ctrl-C also where tests run behind a `&`."""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def slowness() -> float:
    """How much slower this machine is now than one that imports pydantic in a fifth of a second."""
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", "import pydantic.dataclasses"], check=True)
    return max(1, (time.monotonic() - start) / 0.2)
