"""What YAML takes in silence and nobody means, and files that would never be read to their end."""

import time

import pytest

from dense_rlhf.config.params import FLAT, RunParams
from dense_rlhf.config.parse import merge, parse_settings, read_yaml
from dense_rlhf.config.study import load_study, parameters
from dense_rlhf.types import InputError

STUDY = "arms: {sparse: {sources: [terminal]}, shap: {sources: [shap]}}\nppo: {updates: 3}\n"


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(STUDY)
    return tmp_path / "s.yaml"


@pytest.mark.parametrize(
    "text, value",
    [
        ("my data #1/hh.jsonl", "my data #1/hh.jsonl"),
        ("#1.csv", "#1.csv"),
        ("'my data #1.csv'", "my data #1.csv"),
        ("2024-01-01", "2024-01-01"),
        ("a=b", "a=b"),
        ("", None),
        ("0.5", 0.5),
    ],
)
def test_a_setting_is_one_value_without_comments(text, value):
    assert parse_settings([f"data.path={text}"]) == [{"data": {"path": value}}]


@pytest.mark.parametrize(
    "text, message",
    [
        ("'a' # b", "'# b' follows the value"),
        ("[1] # b", "'# b' follows the value"),
        ("[old] data.csv", "text with signs that YAML reads goes in quotes"),
        ("010", "'010' is no number by tens"),
        ("1:30", "'1:30' is no number by tens"),
        ("0x10", "'0x10' is no number by tens"),
        ("&a [*a]", "an alias stands within itself"),
    ],
)
def test_a_setting_that_yaml_would_change_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_settings([f"key={text}"])


def test_a_key_of_many_parts_is_refused():
    with pytest.raises(InputError, match="the key has 3001 parts, wanted 10 at most"):
        parse_settings(["a" + ".a" * 3000 + "=1"])


LAUGHS = "b0: &b0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"b{i + 1}: &b{i + 1} [{', '.join([f'*b{i}'] * 9)}]\n" for i in range(9)
)
MERGES = "b0: &b0 {x: 1}\n" + "".join(
    f"b{i + 1}: &b{i + 1} {{<<: [{', '.join([f'*b{i}'] * 9)}], y{i}: 1}}\n" for i in range(8)
)


@pytest.mark.parametrize(
    "text, message",
    [
        (LAUGHS, "values, wanted 10000 at most"),
        (MERGES, "values, wanted 10000 at most"),
        (f"seeds: {list(range(12_000))}", "values, wanted 10000 at most"),
        (f"seeds: {list(range(333_000))}", "bytes, wanted a file of parameters"),
        ("arms:\n" + "".join(f"  a{i}: {{}}\n" for i in range(40_000)), "bytes, wanted a file of parameters"),
        ("sizes: &a {smoke: *a}", "an alias stands within itself"),
        ("sizes: {smoke: &a {ppo: [*a]}}", "an alias stands within itself"),
        ("a: " + "[" * 3000, "is not YAML"),
    ],
    ids=["aliases", "merge keys", "seeds", "many seeds", "arms", "cycle", "cycle in a list", "depth"],
)
def test_a_file_that_is_too_much_is_refused_at_once(study, text, message):
    study.write_text(text)
    start = time.process_time()
    with pytest.raises(InputError, match=message):
        load_study(study)
    assert time.process_time() - start < 4


def test_an_empty_mapping_clears_and_settings_come_in_their_order(study):
    assert merge({"a": {"b": 1}, "c": 2}, {"a": {}}) == {"a": {}, "c": 2}
    assert list(load_study(study, ["arms={}", "arms.mine.sources=[uniform]"]).arms) == ["mine"]
    with pytest.raises(InputError, match="arms: all are left out"):
        load_study(study, ["arms.mine.sources=[uniform]", "arms={}"])


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", ".1e-3", "+1e-4"])
def test_a_number_is_one_wherever_it_comes_from(study, text):
    assert load_study(study, [f"ppo.lr={text}"]).run.ppo.lr == 1e-4
    study.write_text(STUDY + f"reward: {{lr: {text}}}\n")
    assert load_study(study).run.reward.lr == 1e-4
    assert RunParams.from_flat({"ppo_lr": text}).ppo.lr == 1e-4


def test_text_that_looks_like_a_number_stays_text(study):
    assert load_study(study, ["data.revision=12e567"]).datasets[0].revision == "12e567"


@pytest.mark.parametrize(
    "name, meant", [("reveiws", "reviews"), ("reviews.yaml", "reviews"), ("params/reviews.yml", "reviews")]
)
def test_a_study_that_is_not_there_is_guessed(study, name, meant):
    (study.parent / "params").mkdir()
    study.rename(study.parent / "params" / f"{meant}.yaml")
    with pytest.raises(InputError, match=f"no file at .*; did you mean params/{meant}.yaml?"):
        read_yaml(study.parent.relative_to(study.parent) / name)


# ---------------------------------------------------------------------------------------------------- notebooks

OWN = "seed = 0\nppo_updates = 12\nrun_dir = None\n"
IMPORTS = "import numpy\nfrom dense_rlhf import ppo"


@pytest.mark.parametrize(
    "cell, message",
    [
        ('# Parameters\nppo = {"lr": 0.0001}\n', "ppo is a mapping, and .* flat: give ppo_lr$"),
        ('# Parameters\nppo_lr = {"a": 1}\n', "ppo_lr is a mapping"),
        ("# Parameters\npop_lr = 0.1\n", "pop_lr is not a parameter; did you mean ppo_lr?"),
        ("# Parameters\nlearning = 0.1\n", "learning is not a parameter"),
        ("seed = 0\npp_updates = 12\nrun_dir = None", "pp_updates is not a parameter; did you mean ppo_updates?"),
    ],
)
def test_what_a_notebook_would_not_heed_is_refused(cell, message):
    names = {"ppo": pytest, "In": ["", OWN, cell, IMPORTS]}
    with pytest.raises(InputError, match=message):
        RunParams.from_flat(names)


def test_a_notebook_may_have_parameters_of_its_own():
    cells = ["", OWN + "my_threshold = 3\n", "# Parameters\nmy_threshold = 4\nppo_lr = 0.5\nstudy_dir = 'x'\n", "x = 1"]
    assert RunParams.from_flat({"In": cells, "ppo_lr": 0.5, "my_threshold": 4}).ppo.lr == 0.5


def test_a_group_in_one_is_refused_also_without_a_notebook():
    with pytest.raises(InputError, match="give ppo_lr, ppo_updates$"):
        RunParams.from_flat({"ppo": {"lr": 0.1, "updates": 2}})


def test_an_input_error_is_one_visible_line_in_a_notebook():
    from IPython.core.interactiveshell import InteractiveShell

    assert InputError("a\x1b[31m\n b")._render_traceback_() == ["InputError: a\\x1b[31m b"]
    shown = []
    shell = InteractiveShell()
    shell._showtraceback = lambda kind, value, lines: shown.extend(lines)
    shell.run_cell("from dense_rlhf.types import InputError\nraise InputError('ppo.lr is 0')")
    assert shown == ["InputError: ppo.lr is 0"]


# ---------------------------------------------------------------------------------------------------- the list


def test_every_parameter_is_listed_with_meaning_bounds_and_default():
    listed = parameters()
    assert all(wanted and meaning for wanted, _, meaning in listed.values())
    assert len(listed) >= len(FLAT) - 3  # arm, setting and seed are the study's
    assert listed["ppo.lr"] == ("a number above 0", 1e-4, "falls linearly to a tenth")
    assert parameters("ppo_lr") == parameters("ppo.lr") == {"ppo.lr": listed["ppo.lr"]}
    assert parameters("shape") == parameters("arms.NAME")
    assert set(parameters("arms.NAME")) == {name for name in listed if name.startswith("arms.")}
    with pytest.raises(InputError, match="'polcy' is no parameter and no group; did you mean policy?"):
        parameters("polcy")
