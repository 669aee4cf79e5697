"""Sources and datasets of one's own, named in a study's YAML by a Python path."""

import sys

import pytest

from dense_rlhf.attribution.sources import attribute
from dense_rlhf.config.params import AttributionParams
from dense_rlhf.config.parse import module_file, named
from dense_rlhf.config.study import load_study
from dense_rlhf.data import load_data
from dense_rlhf.runner.plan import expand
from dense_rlhf.types import InputError

MODULE = """
from dense_rlhf.attribution.sources import uniform
from dense_rlhf.data import DATASETS

def load_mine(params, rows=None):
    return DATASETS["reviews"](params, rows)

def my_source(reward_model, rollout, params):
    return uniform(reward_model, rollout, params)

NUMBER = 3
"""
STUDY = """
data: [{name: "my_own:load_mine"}, {name: reviews}]
arms: {own: {sources: ["my_own:my_source", terminal], weights: [0.5, 0.5]}}
notebooks: [04_ppo, 06_comparison]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a module of one's own and a study that names it."""
    (tmp_path / "my_own.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("raise RuntimeError('two\\nlines')")
    (tmp_path / "s.yaml").write_text(STUDY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("my_own", "broken"):
        sys.modules.pop(name, None)


def test_a_study_names_a_dataset_and_a_source_by_their_python_path(folder):
    jobs = expand(load_study(folder / "s.yaml"))
    assert [job.name for job in jobs] == [
        *("load_mine-04_ppo-own-seed0", "reviews-04_ppo-own-seed0"),
        *("load_mine-06_comparison", "reviews-06_comparison"),
    ]
    assert jobs[0].params.where == "load_mine" and jobs[0].params.data.name == "my_own:load_mine"
    assert load_data(jobs[0].params.data).train_prompts


def test_its_source_explains(folder, reward_model, rollout):
    attributions = attribute(reward_model, rollout, ["my_own:my_source", "uniform"], AttributionParams())
    assert attributions["my_own:my_source"].credit.equal(attributions["uniform"].credit)


def test_its_file_is_known(folder):
    assert module_file("my_own:my_source") == folder / "my_own.py"
    assert module_file("shap") is None and module_file("no_such_module:f") is None


@pytest.mark.parametrize(
    "name, message",
    [
        ("reveiws", "data.name: 'reveiws' is not known, wanted reviews, .*; did you mean reviews?"),
        ("no_such:load", "data.name: cannot import 'no_such:load'"),
        ("my_own:laod", "data.name: cannot import 'my_own:laod'"),
        ("my_own:NUMBER", "data.name: 'my_own:NUMBER' is a whole number, wanted a function"),
        ("broken:load", "data.name: cannot import 'broken:load' .RuntimeError: two lines"),
        (":load", "data.name: cannot import ':load'"),
        ("my_own:", "data.name: cannot import 'my_own:'"),
    ],
)
def test_what_cannot_be_imported_is_refused_in_one_line(folder, name, message):
    with pytest.raises(InputError, match=message) as error:
        named({"reviews": load_data}, name, "data.name")
    assert "\n" not in str(error.value)


def test_two_datasets_of_one_name_are_refused(folder):
    with pytest.raises(InputError, match="data names load_mine, load_mine, wanted datasets of different names"):
        load_study(folder / "s.yaml", ["data=[{name: 'my_own:load_mine'}, {name: 'other:load_mine'}]"])
