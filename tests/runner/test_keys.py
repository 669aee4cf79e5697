"""What an edit of the code repeats: trainings only where it can change their numbers, pages where it changes a page."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from dense_rlhf.config.study import load_study

POLICY = f"04_ppo-shap-seed{load_study(ROOT / 'params' / 'reviews.yaml').seeds[0]}"
FINISH = """
import json
from pathlib import Path
from dense_rlhf.config.study import load_study
from dense_rlhf.runner import jobs, plan

study = load_study(Path("params/reviews.yaml"))
for job in (every := plan.expand(study)):
    folder = plan.runs_folder(study) / job.name
    jobs.prepare(job, folder, plan.threads_of(every, study.workers))
    (folder / "metrics.json").write_text(json.dumps({"shape": {"weights": [0.5, 0.5]}, "step_size": 5e-4}))
    jobs.finish(job, folder, "ok", "", 0.0)
"""

PREPARE = f"""
from pathlib import Path
from dense_rlhf.config.study import load_study
from dense_rlhf.runner import jobs, plan

study = load_study(Path("params/reviews.yaml"))
every = plan.expand(study)
job = next(job for job in every if job.name == "{POLICY}")
assert jobs.prepare(job, plan.runs_folder(study) / job.name, plan.threads_of(every, study.workers)) == "pending"
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


def planned(root, *options):
    """What each run would do, `cached`, `render` or `run`, by its name."""
    lines = python(root, "-m", "dense_rlhf", "run", "params/reviews.yaml", "--dry-run", *options).splitlines()[:-1]
    return {line.split()[1].rstrip(":"): line.split()[0] for line in lines}


def test_a_study_goes_on_from_its_record_on_another_machine(checkout):
    """Of the runs that the record holds none is run again, the others are; what is there already stays."""
    before = (whole := checkout / "runs" / "reviews").rename(checkout / "before")
    try:
        for name in (kept := {POLICY, "11_step_size-shap"}):
            shutil.copytree(before / name, whole / name)
        python(checkout, "-m", "dense_rlhf", "record", "params/reviews.yaml", "--anyway")
        shutil.rmtree(whole)
        assert set(planned(checkout).values()) == {"run"}
        again = planned(checkout, "--from", "results")
        assert {name for name, what in again.items() if what == "cached"} == kept
        (whole / POLICY / "metrics.json").write_text("{}")
        assert planned(checkout, "--from", "results")[POLICY] == "run"
    finally:
        shutil.rmtree(whole)
        before.rename(whole)


@pytest.fixture
def edited(checkout):
    """Change files for the time of a test, and say what would run then."""
    before = {}

    def edit(change, *names):
        for name in names:
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


def test_words_repeat_nothing(edited):
    names = "training/inner_loop", "ppo/losses", "attribution/engine", "view/figures"
    assert set(edited(with_words, *(f"dense_rlhf/{name}.py" for name in names)).values()) == {"cached"}


def test_code_that_no_notebook_needs_repeats_nothing(edited):
    names = "report/page", "report/write", "__main__"
    assert set(edited(with_code, *(f"dense_rlhf/{name}.py" for name in names)).values()) == {"cached"}


@pytest.mark.parametrize("name", ["view/figures.py", "view/template/parts.html.j2", "evaluation/arms.py"])
def test_code_that_only_shows_renders_again_and_trains_nothing(edited, name):
    acts = edited(with_code, f"dense_rlhf/{name}")
    assert "run" not in acts.values() and acts[POLICY] == "render"


@pytest.mark.parametrize(
    "name",
    ["ppo/losses.py", "training/inner_loop.py", "attribution/internals.py", "shaping/rewards.py", "shaping/masked.py"],
)
def test_code_that_decides_a_training_repeats_it(edited, name):
    acts = edited(with_code, f"dense_rlhf/{name}")
    assert all(act == "run" for job, act in acts.items() if job.startswith(("04_ppo", "05_bayesian")))


def test_a_notebooks_code_renders_it_again_and_what_reads_it(edited):
    acts = edited(lambda text: text.replace('"source": [', '"source": [\n    "1\\n",', 3), "notebooks/04_ppo.ipynb")
    assert acts[POLICY] == acts["06_comparison"] == "render" and acts["02_attribution"] == "cached"


def test_hidden_folders_hold_no_source(edited):
    assert set(edited(with_code, "dense_rlhf/ppo/.ipynb_checkpoints/losses-checkpoint.py").values()) == {"cached"}


def test_a_run_that_is_rendered_again_keeps_its_training_and_one_that_changed_does_not(edited, checkout):
    kept = checkout / "runs" / "reviews" / POLICY / "checkpoint-000024"
    for name, stays in (("view/figures.py", True), ("ppo/losses.py", False)):
        kept.mkdir(exist_ok=True)
        edited(with_code, f"dense_rlhf/{name}")
        python(checkout, "-c", PREPARE)
        assert kept.exists() == stays
