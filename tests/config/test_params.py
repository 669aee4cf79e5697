"""Parameters: strict, typed, the same from YAML, command line and notebook."""

import re
from dataclasses import replace

import pytest
import yaml

from dense_rlhf.__main__ import main
from dense_rlhf.config.params import ABLATIONS, BENCHMARKS, NOTEBOOKS, BOParams, RunParams, ShapeParams
from dense_rlhf.config.strict import parse
from dense_rlhf.config.study import load_study
from dense_rlhf.runs import workspace
from dense_rlhf.types import InputError, RewardShape

STUDY = {
    "study": "x",
    "arms": {"sparse": {"sources": ["terminal"], "weights": [1.0]}},
    "ppo": {"updates": 3},
    "bo": {"updates": 3},
}


TRIED = "step_sizes=[1.0e-4, 2.0e-4]"
LEARNS = "{sources: [shap, terminal], weights: learned}"


@pytest.fixture
def study_file(tmp_path):
    def write(**changes):
        path = tmp_path / "x.yaml"
        path.write_text(yaml.safe_dump(STUDY | changes))
        return path

    return write


def test_flat_goes_round_trip_through_yaml():
    shape = ShapeParams(("shap", "terminal"), (0.25, 0.75), "signed", (0.1, 2.0), ("position",), ((1.0,), (0.0,)))
    params = RunParams(shape=shape, bo=BOParams(features=("length",), initial=0), seed=7, threads=3)
    assert RunParams.from_flat(yaml.safe_load(yaml.safe_dump(params.flat()))) == params
    assert params.shape.reward_shape() == RewardShape(**vars(shape))
    learned = replace(shape, weights="learned").reward_shape()
    assert learned == RewardShape(**vars(shape) | {"weights": (0.5, 0.5)})


def test_threads_are_a_parameter_of_the_study(study_file):
    assert load_study(study_file(threads=3)).run.threads == 3 and load_study(study_file()).run.threads is None


def test_notebook_globals_may_hold_other_things_but_no_misspelt_parameter():
    assert RunParams.from_flat({"ppo_updates": 5, "policy_fn": print, "x": 1}).ppo.updates == 5
    with pytest.raises(InputError, match="ppo.updaets is not a parameter"):
        RunParams.from_flat({"ppo_updaets": 5})


@pytest.mark.parametrize(
    "settings, message",
    [
        (["ppo.lrr=1"], "ppo.lrr is not a parameter"),
        (["ppo.lr=nan"], "ppo.lr is nan, wanted a finite number"),
        (["ppo.updates=2.5"], "ppo.updates is 2.5 (a number), wanted a whole number of at least 1"),
        (["ppo.updates=true"], "ppo.updates is True (yes/no), wanted a whole number of at least 1"),
        (["ppo.rollouts=33"], "multiple of ppo.minibatch"),
        (["ppo=3"], "ppo is a whole number, wanted a mapping"),
        (["arms.sparse.weights=[0.5]"], "arms.sparse.weights is [0.5], wanted non-negative numbers that sum to 1"),
        (["arms.sparse.weights=[-1.0, 2.0]"], "arms.sparse.weights has 2 numbers for 1 sources"),
        (["arms.sparse.weights=learned"], "arms.sparse.weights is 'learned' for one source"),
        (["arms.sparse.normalise=soft"], "arms.sparse.normalise is 'soft'"),
        (["arms.sparse.sources=[nope]"], "'nope' is not known"),
        (["arms=null"], "arms is nothing"),
        (["arms.sparse=null"], "arms: all are left out"),
        (["data.name=nope"], "data.name: 'nope' is not known, wanted reviews, "),
        (["data.path=nowhere.jsonl"], "data.path: no file at /"),
        (["attribution.rationale_path=nowhere.jsonl"], "attribution.rationale_path: no file at /"),
        (["size=huge"], "size is 'huge'"),
        (["seeds=[]"], "seeds is []"),
        (["seeds=[1, 1]"], "none twice"),
        (["notebooks=[99]"], "notebooks[0] is 99"),
        (["notebooks=[other]"], "notebooks[0] is 'other', wanted one of 01_reward_model, "),
        (["study=../../etc"], "'../../etc' is not a name"),
        (["shape.temperature=2.0"], "shape belongs to an arm"),
        (["settings=3"], "settings is a whole number, wanted a mapping of names"),
        (["settings.a=1"], "settings.a is a whole number, wanted a mapping of parameters"),
        (["settings={a: null}"], "settings: all are left out"),
        (["settings={a/b: {ppo: {lr: 0.1}}}"], "settings: 'a/b' is not a name"),
        (["settings.a.data.name=reviews"], "settings.a.data is nothing that a setting changes; wanted one of policy, "),
        (["settings.a.ppo.lrr=1"], "settings.a.ppo.lrr is not a parameter"),
        (
            ["settings.a.ppo.rollouts=33"],
            "settings.a.ppo.rollouts is 33, wanted a multiple of settings.a.ppo.minibatch",
        ),
        (["settings.a.reward.steps=-1"], "settings.a.reward.steps is -1, wanted a whole number of at least 0"),
        (["settings.a.evaluation.sst_path=nowhere"], "evaluation.sst_path: no file at /"),
        (["settings.a.bo.features=[nope]"], "bo.features: 'nope' is not known"),
        (["reward.labels=0"], "reward.labels is 0, wanted a number above 0 and of at most 1"),
        (["reward.labels=1.5"], "reward.labels is 1.5, wanted a number above 0 and of at most 1"),
        (
            ["reward.labels=0.1", "reward.name=some/model"],
            "reward.labels is 0.1 for 'some/model', which is already trained",
        ),
        (["nonsense"], "wanted key=value"),
        (["ppo.lr={"], "the value is not YAML"),
        (["workers=0"], "workers is 0, wanted a whole number of at least 1"),
        (["threads=0"], "threads is 0, wanted a whole number of at least 1, or nothing"),
        (["threads=two"], "threads is 'two' (text), wanted a whole number of at least 1, or nothing"),
        (["bo.trials=1"], "bo.trials is 1, wanted a whole number of at least 2"),
        (["bo.initial=-1"], "bo.initial is -1, wanted a whole number of at least 0"),
        (["bo.initial=1", "bo.anchors=false"], "bo.initial is 1, wanted at least 2"),
        (["bo.updates=0"], "bo.updates is 0, wanted a whole number of at least 1"),
        (["bo.updates=3", "bo.stop_early=true"], "bo.updates is 3, wanted at least 4"),
        ([f"arms.bo={LEARNS}", "bo.updates=4"], "bo.updates is 4, wanted at most ppo.updates = 3"),
        (
            ["step_sizes=[0.1, 0.2]"],
            "step_sizes is [0.1, 0.2], wanted two or more that differ, among them ppo.lr = 0.0001",
        ),
        (["step_sizes=[1.0e-4]"], "step_sizes is [0.0001], wanted two or more"),
        (["step_sizes=[1.0e-4, 1.0e-4]"], "wanted two or more that differ"),
        (["step_sizes=[1.0e-4, -1.0]"], "step_sizes[1] is -1.0, wanted a number above 0"),
        ([TRIED, "notebooks=[04_ppo]"], "notebooks must name 04_ppo and 11_step_size"),
        ([TRIED, "seeds=[0, 500]"], "seeds: 500 chooses the step sizes"),
        (["common_step=true"], "common_step is true without step_sizes"),
        (["longer={sprase: 9}"], "longer.sprase is no arm of the study; did you mean sparse?"),
        (["longer={sparse: 3}"], "longer.sparse is 3, wanted more than ppo.updates = 3"),
        (["redraws=[prxy]"], "redraws[0] is 'prxy', wanted one of proxy, explainer, search; did you mean proxy?"),
        (["redraws=[proxy]", "reward.name=some/model"], "redraws names proxy, but 'some/model' is trained already"),
        (["bo.replicates=0"], "bo.replicates is 0, wanted a whole number of at least 1"),
        (["bo.kl_weight=-0.1"], "bo.kl_weight is -0.1, wanted a number of at least 0"),
        (["bo.kl_weight=.nan"], "bo.kl_weight is nan, wanted a finite number"),
        (["bo.kl_weight=.inf"], "bo.kl_weight is inf, wanted a finite number"),
        (["bo.strategy=grid"], "bo.strategy is 'grid', wanted one of gp, "),
        (["bo.objective=loss"], "bo.objective is 'loss', wanted one of proxy, gold, penalised"),
        (["bo.temperature=free"], "bo.temperature is 'free', wanted one of fixed, shared, each"),
        (["bo.temperature=0.5"], "bo.temperature is 0.5, wanted one of fixed, shared, each"),
        (["bo.temperature_low=0"], "bo.temperature_low is 0, wanted a number above 0"),
        (["bo.temperature_high=0.01"], "temperature_low is 0.01, wanted less than bo.temperature_high = 0.01"),
        (["bo.temperature_high=.inf"], "bo.temperature_high is inf, wanted a finite number"),
        (["bo.slope=0"], "bo.slope is 0, wanted a number above 0"),
        (["bo.features=[position, position]"], "bo.features names a feature twice"),
        (["bo.features=[nope]"], "bo.features: 'nope' is not known, wanted some of position, "),
        (
            ["bo.temperature=each", f"arms.bo={LEARNS}", "arms.bo.normalise=signed"],
            "normalise 'signed', which has none",
        ),
        ([f"arms.bo={LEARNS}", "seeds=[3, 2003]"], "seeds: 2003 is a trial's of the search for arms.bo"),
        (
            ["arms.sparse.temperature=[0.5, 1.0]"],
            "arms.sparse.temperature is (0.5, 1.0), wanted a number above 0, or 1 of",
        ),
        (["arms.sparse.features=[position]"], "arms.sparse.slopes is [], wanted a row for each of 1 sources"),
        (["arms.sparse.features=[nope]", "arms.sparse.slopes=[[1.0]]"], "arms.sparse.features: 'nope' is not known"),
    ],
)
def test_bad_input_is_one_line_exit_2_and_starts_nothing(study_file, capsys, settings, message):
    before = {p.name for p in (workspace() / "runs").glob("*")}
    options = [part for setting in settings for part in ("--set", setting)]
    assert main(["run", str(study_file()), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert {p.name for p in (workspace() / "runs").glob("*")} == before


@pytest.mark.parametrize(
    "text, message",
    [("a: [", "is not YAML"), ("- 1", "holds a list"), ("!!python/object/apply:os.system [ls]", "is not YAML")],
)
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


def test_a_setting_changes_what_it_names_and_a_size_can_leave_it_out(study_file):
    settings = {"low": {"ppo": {"lr": 0.5}}, "high": {"ppo": {"lr": 2.0}, "reward": {"labels": 0.1}}}
    path = study_file(settings=settings, sizes={"smoke": {"settings": {"high": None}, "ppo": {"updates": 1}}})
    high, low = load_study(path).comparisons
    assert (low.setting, low.ppo.lr, low.ppo.updates, low.reward.labels) == ("low", 0.5, 3, 1.0)
    assert (high.setting, high.ppo.lr, high.where, high.reward.labels) == ("high", 2.0, "reviews-high", 0.1)
    assert [(run.setting, run.ppo.updates) for run in load_study(path, ["size=smoke"]).comparisons] == [("low", 1)]
    (plain,) = load_study(path, ["settings=null"]).comparisons
    assert (plain.where, plain.setting, plain.ppo) == ("reviews", "", load_study(study_file()).run.ppo)
    assert RunParams.from_flat(yaml.safe_load(yaml.safe_dump(high.flat()))) == high


STUDIES = [
    path for path in sorted((workspace() / "params").rglob("*.yaml")) if "study" in yaml.safe_load(path.read_text())
]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_can_be_planned_at_every_size(path, capsys):
    for size in ("full", *yaml.safe_load(path.read_text()).get("sizes", {})):
        study = load_study(path, [f"size={size}"])
        assert study.study.startswith(path.stem) and set(study.notebooks) <= set(NOTEBOOKS + ABLATIONS + BENCHMARKS)
        assert main(["run", str(path), "--set", f"size={size}", "--dry-run"]) == 0
        assert "nothing was started" in capsys.readouterr().out


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_no_signed_arm_stands_without_its_sizes_on_the_wrong_tokens(path):
    """Where arms are compared: `shuffled` has the sizes and signs of `shap`, signed."""
    study = load_study(path)
    signed = {name for name, shape in study.arms.items() if shape.normalise == "signed"}
    assert not signed or any(study.arms[name].sources == ("shuffled",) for name in signed)


def test_every_ablation_has_a_smallest_size_and_says_how_long_it_takes():
    ablations = [path for path in STUDIES if path.parent.name == "ablations"]
    assert len(ablations) > 10
    for path in ablations:
        assert "smoke" in yaml.safe_load(path.read_text())["sizes"], path
        assert re.search(r"^# .*(minutes|hour)", path.read_text(), re.M), path
