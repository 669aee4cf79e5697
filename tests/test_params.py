"""Parameters: strict, typed, the same from YAML, command line and notebook."""

import pytest
import yaml

from dense_rlhf.__main__ import main
from dense_rlhf.params import NOTEBOOKS, RunParams, ShapeParams, load_study
from dense_rlhf.runs import repository_root
from dense_rlhf.strict import parse
from dense_rlhf.types import InputError

STUDY = {"study": "x", "arms": {"sparse": {"sources": ["terminal"], "weights": [1.0]}}, "ppo": {"updates": 3}}


@pytest.fixture
def study_file(tmp_path):
    def write(**changes):
        path = tmp_path / "x.yaml"
        path.write_text(yaml.safe_dump(STUDY | changes))
        return path

    return write


def test_flat_goes_round_trip_through_yaml():
    params = RunParams(shape=ShapeParams(("shap", "terminal"), (0.25, 0.75), "signed"), seed=7)
    assert RunParams.from_flat(yaml.safe_load(yaml.safe_dump(params.flat()))) == params


def test_notebook_globals_may_hold_other_things_but_no_misspelt_parameter():
    assert RunParams.from_flat({"ppo_updates": 5, "policy_fn": print, "x": 1}).ppo.updates == 5
    with pytest.raises(InputError, match="ppo.updaets is not a parameter"):
        RunParams.from_flat({"ppo_updaets": 5})


@pytest.mark.parametrize("settings, message", [
    (["ppo.lrr=1"], "ppo.lrr is not a parameter"),
    (["ppo.lr=1e-4"], "ppo.lr is '1e-4' (text), wanted float; YAML reads 1e-4 as text"),
    (["ppo.updates=2.5"], "ppo.updates is 2.5 (a number), wanted int"),
    (["ppo.updates=true"], "ppo.updates is True (yes/no), wanted int"),
    (["ppo.rollouts=33"], "multiple of ppo.minibatch"),
    (["ppo=3"], "ppo is a whole number, wanted a mapping"),
    (["arms.sparse.weights=[0.5]"], "arms.sparse.weights is [0.5], wanted non-negative numbers that sum to 1"),
    (["arms.sparse.weights=[-1.0, 2.0]"], "arms.sparse.weights has 2 numbers for 1 sources"),
    (["arms.sparse.weights=learned"], "arms.sparse.weights is 'learned' for one source"),
    (["arms.sparse.normalise=soft"], "arms.sparse.normalise is 'soft'"),
    (["arms.sparse.sources=[nope]"], "'nope' is not known"),
    (["arms=null"], "arms is nothing"),
    (["arms.sparse=null"], "arms: all are left out"),
    (["data.name=nope"], "data.name is 'nope'"),
    (["data.path=nowhere.jsonl"], "no file at nowhere.jsonl"),
    (["attribution.rationale_path=nowhere.jsonl"], "attribution.rationale_path: no file at nowhere.jsonl"),
    (["size=huge"], "size is 'huge'"),
    (["seeds=[]"], "seeds is []"),
    (["seeds=[1, 1]"], "none twice"),
    (["notebooks=[99]"], "notebooks[0] is 99"),
    (["notebooks=[other]"], "'other' is not one"),
    (["study=../../etc"], "'../../etc' is not a name"),
    (["shape.temperature=2.0"], "shape belongs to an arm"),
    (["nonsense"], "wanted key=value"),
    (["ppo.lr={"], "the value is not YAML"),
    (["workers=0"], "must be above 0"),
    (["bo.trials=1"], "wanted at least 2, 2 and 1"),
])  # fmt: skip
def test_bad_input_is_one_line_exit_2_and_starts_nothing(study_file, capsys, settings, message):
    before = {p.name for p in (repository_root() / "runs").glob("*")}
    options = [part for setting in settings for part in ("--set", setting)]
    assert main(["run", str(study_file()), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert {p.name for p in (repository_root() / "runs").glob("*")} == before


@pytest.mark.parametrize("text, message", [
    ("a: [", "is not YAML"), ("- 1", "holds a list"), ("!!python/object/apply:os.system [ls]", "is not YAML"),
])  # fmt: skip
def test_bad_files(tmp_path, capsys, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    assert main(["run", str(tmp_path / "bad.yaml")]) == 2
    assert message in capsys.readouterr().err


def test_missing_study(capsys):
    assert main(["run", "params/none.yaml"]) == 2
    assert "no file at params/none.yaml" in capsys.readouterr().err


def test_size_then_set(study_file):
    path = study_file(sizes={"smoke": {"ppo": {"updates": 1, "rollouts": 32}}})
    assert load_study(path).run.ppo.updates == 3
    small = load_study(path, ["size=smoke", "ppo.rollouts=64"])
    assert (small.run.ppo.updates, small.run.ppo.rollouts) == (1, 64)


def test_whole_numbers_are_numbers_and_nothing_else_is_converted():
    assert parse(RunParams, {"ppo": {"kl_coef": 1}}, "").ppo.kl_coef == 1.0
    with pytest.raises(InputError):
        parse(RunParams, {"seed": "1"}, "")


@pytest.mark.parametrize("path", sorted((repository_root() / "params").rglob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_studies_parse_at_every_size(path):
    given = yaml.safe_load(path.read_text())
    if "arms" not in given:
        pytest.skip("parameters of one notebook")
    for size in ("full", *given.get("sizes", {})):
        study = load_study(path, [f"size={size}"])
        assert study.study == path.stem and set(study.notebooks) <= set(NOTEBOOKS)
