"""What an edit of the code repeats: trainings only where it can change their numbers, pages where it changes a page."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

STUDY = ROOT / "params" / "reviews.yaml"
FINISH = """
import json
from pathlib import Path
from dense_rlhf.config.study import load_study
from dense_rlhf.runner import jobs, plan

study = load_study(Path("params/reviews.yaml"))
for job in (every := plan.expand(study)):
    folder = plan.runs_folder(study) / job.name
    jobs.prepare(job, folder, plan.threads_of(job, every, study.workers))
    (folder / "metrics.json").write_text(json.dumps({"shape": {"weights": [0.5, 0.5]}, "step_size": 5e-4}))
    jobs.finish(job, folder, "ok", "", 0.0)
"""

PREPARE = """
from pathlib import Path
from dense_rlhf.config.study import load_study
from dense_rlhf.runner import jobs, plan

study = load_study(Path("params/reviews.yaml"))
every = plan.expand(study)
job = next(job for job in every if job.name == "04_ppo-shap-seed0")
assert jobs.prepare(job, plan.runs_folder(study) / job.name, plan.threads_of(job, every, study.workers)) == "pending"
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout in which every run of the default study is finished, as far as records tell."""
    root = tmp_path_factory.mktemp("keys") / "checkout"
    for name in ("dense_rlhf", "notebooks", "params", "locks"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    python(root, "-c", FINISH)
    return root


def python(root, *arguments):
    environment = os.environ | {"PYTHONPATH": str(root), "DENSE_RLHF_CACHE": str(root / "cache")}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True).stdout


def planned(root):
    """What each run would do, `cached`, `render` or `run`, by its name."""
    lines = python(root, "-m", "dense_rlhf", "run", "params/reviews.yaml", "--dry-run").splitlines()[:-1]
    return {line.split()[1].rstrip(":"): line.split()[0] for line in lines}


@pytest.fixture
def edited(checkout):
    """Change a file for the time of a test, and say what would run then."""
    before = {}

    def edit(name, change):
        path = checkout / name
        before[path] = path.read_text() if path.exists() else None
        path.parent.mkdir(exist_ok=True)
        path.write_text(change(before[path] or ""))
        return planned(checkout)

    yield edit
    for path, text in before.items():
        path.unlink() if text is None else path.write_text(text)


def with_code(text):
    return text + "\nADDED = 1\n"


def with_words(text):
    """Another docstring, and a comment."""
    return text.replace('"""', '"""Other words. ', 1) + "\n# a comment\n"


def test_a_finished_study_is_cached(checkout):
    assert set(planned(checkout).values()) == {"cached"}


@pytest.mark.parametrize(
    "name", ["training/inner_loop.py", "ppo/losses.py", "attribution/engine.py", "view/figures.py"]
)
def test_words_repeat_nothing(edited, name):
    assert set(edited(f"dense_rlhf/{name}", with_words).values()) == {"cached"}


@pytest.mark.parametrize("name", ["report/page.py", "report/write.py", "__main__.py"])
def test_code_that_no_notebook_needs_repeats_nothing(edited, name):
    assert set(edited(f"dense_rlhf/{name}", with_code).values()) == {"cached"}


@pytest.mark.parametrize("name", ["view/figures.py", "view/template/parts.html.j2", "evaluation/arms.py"])
def test_code_that_only_shows_renders_again_and_trains_nothing(edited, name):
    acts = edited(f"dense_rlhf/{name}", with_code)
    assert "run" not in acts.values() and acts["04_ppo-shap-seed0"] == "render"


@pytest.mark.parametrize(
    "name", ["ppo/losses.py", "training/inner_loop.py", "attribution/internals.py", "shaping/rewards.py", "masked.py"]
)
def test_code_that_decides_a_training_repeats_it(edited, name):
    acts = edited(f"dense_rlhf/{name}", with_code)
    assert all(act == "run" for job, act in acts.items() if job.startswith(("04_ppo", "05_bayesian")))


def test_a_notebooks_code_renders_it_again_and_what_reads_it(edited):
    acts = edited("notebooks/04_ppo.ipynb", lambda text: text.replace('"source": [', '"source": [\n    "1\\n",', 3))
    assert acts["04_ppo-shap-seed0"] == acts["06_comparison"] == "render" and acts["02_attribution"] == "cached"


def test_hidden_folders_hold_no_source(edited):
    assert set(edited("dense_rlhf/ppo/.ipynb_checkpoints/losses-checkpoint.py", with_code).values()) == {"cached"}


def test_a_run_that_is_rendered_again_keeps_its_training_and_one_that_changed_does_not(edited, checkout):
    kept = checkout / "runs" / "reviews" / "04_ppo-shap-seed0" / "checkpoint-000024"
    for name, stays in (("view/figures.py", True), ("ppo/losses.py", False)):
        kept.mkdir(exist_ok=True)
        edited(f"dense_rlhf/{name}", with_code)
        python(checkout, "-c", PREPARE)
        assert kept.exists() == stays
