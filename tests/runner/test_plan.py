"""Names are unique and places are the user's: what is planned, where it is kept, and what is never touched."""

import os
import subprocess
import sys
import time

import pytest
import yaml
from checkout import ROOT, make_checkout, slowness, write_notebook

from dense_rlhf.__main__ import main
from dense_rlhf.config.study import RESERVED, load_study
from dense_rlhf.evaluation.findings import findings
from dense_rlhf.files import write_json
from dense_rlhf.runner import grid, jobs, plan, train
from dense_rlhf.runs import RunFolder, finished_runs, open_run
from dense_rlhf.statistics import t_interval
from dense_rlhf.types import InputError

ONE = "04_ppo-sparse-seed0"
TWO = "data=[{name: hh_rlhf, called: %s}, {name: hh_rlhf, called: %s}]"


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A checkout whose runs write a number at once, without a kernel."""
    monkeypatch.chdir(tmp_path)

    def launch(notebook, folder, limits, stop, keep):
        flat = RunFolder(folder).parameters()
        RunFolder(folder).save_metrics({"lr": flat["ppo_lr"]})
        return "ok", ""

    monkeypatch.setattr(jobs, "launch", launch)
    monkeypatch.setattr("dense_rlhf.report.write.write_reports", lambda *_: tmp_path / "index.html")
    arms = {"sparse": {"sources": ["terminal"]}, "uniform": {"sources": ["uniform"]}}
    made = {"arms": arms, "notebooks": ["04_ppo", "06_comparison"], "threads": 1}
    return make_checkout(tmp_path, made, dict.fromkeys(made["notebooks"], ("x = 1",)))


def statuses(study, *settings, **options):
    return {one["job"]: one["status"] for one in grid.run_grid(load_study(study, settings), **options)}


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---------------------------------------------------------------------------------------------------- names


def test_datasets_of_one_name_want_names_of_their_own(study):
    with pytest.raises(InputError, match="data names hh_rlhf, hh_rlhf, .* called: helpful"):
        load_study(study, ["data=[{name: hh_rlhf}, {name: hh_rlhf}]"])
    names = [job.name for job in plan.expand(load_study(study, [TWO % ("kind", "safe")]))]
    assert f"kind-{ONE}" in names and f"safe-{ONE}" in names and len(set(names)) == len(names) == 6


def test_names_that_meet_are_refused_and_nothing_waits_for_them(study):
    settings = [TWO % ("a", "a-b"), "settings={b-c: {ppo: {lr: 0.5}}, c: {ppo: {lr: 0.1}}}"]
    with pytest.raises(InputError, match="two runs would be called a-b-c-0"):
        grid.run_grid(load_study(study, settings))


@pytest.mark.parametrize("name", [*RESERVED, "-a", "a/b", "a.b", "ä", "", "x" * 61, "a\n"])
def test_a_study_has_a_name_that_is_free_and_fit_for_a_folder(study, name):
    study.write_text(yaml.safe_dump({"study": name}))
    with pytest.raises(InputError, match="^study: "):
        load_study(study)


@pytest.mark.parametrize(
    "setting",
    [
        "data.called=../x",
        f"data.called={'x' * 61}",
        f"arms={{{'x' * 300}: {{sources: [shap]}}}}",
        "settings={a b: {ppo: {lr: 0.1}}}",
    ],
)
def test_other_names_too(study, setting):
    with pytest.raises(InputError, match="is not a name; wanted letters, digits, - and _, 60 at most"):
        load_study(study, [setting])


def test_trained_policies_of_two_studies_share_no_folder(study):
    a, b = (load_study(study, [f"study={name}"]) for name in ("a-b", "a"))
    assert train.train_folder(a, "c", 0).path != train.train_folder(b, "b-c", 0).path


def test_a_study_of_too_many_runs_is_refused_at_once(study):
    start = time.process_time()
    with pytest.raises(InputError, match="the study has 10,002 runs, wanted 5,000 at most"):
        plan.expand(load_study(study, [f"seeds={list(range(5000))}"]))
    assert time.process_time() - start < 4


def test_an_arm_that_is_misspelt_is_refused_before_anything_is_imported(study):
    with pytest.raises(InputError, match="arms.unifrom is no arm of the study, and has no sources; did you mean unif"):
        load_study(study, ["arms.unifrom.normalise=signed"])
    with pytest.raises(InputError, match="--arm is 'unifrom', wanted one of sparse, uniform; did you mean uniform?"):
        train.train(load_study(study), "unifrom", 0)
    code = (
        "import sys; from dense_rlhf.__main__ import main; code = main(sys.argv[1:]); assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train", str(study), "--arm", "unifrom"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "did you mean uniform?" in done.stderr


@pytest.mark.parametrize(
    "setting, hint",
    [
        ("ppo.updaets=3", "updates"),
        ("pop.updates=3", "ppo"),
        ("lr=3", "reward.lr or ppo.lr"),
        ("ppo_lr=3", "ppo.lr"),
        ("notebooks=[04_pop]", "04_ppo"),
        ("size=ful", "full"),
        ("arms.sparse.sources=[terminl]", "terminal"),
        ("data.name=reveiws", "reviews"),
        ("arms.sparse.normalise=sofmax", "softmax"),
        ("bo.features=[postion]", "position"),
        ("policy.critic=Shared", "shared"),
    ],
)
def test_whatever_name_is_misspelt_the_nearest_is_told(study, setting, hint, capsys):
    assert main(["run", str(study), "--dry-run", "--set", setting]) == 2
    assert f"; did you mean {hint}?\n" in capsys.readouterr().err


def test_keys_are_printed_so_that_a_terminal_obeys_nothing(study, capsys):
    assert main(["run", str(study), "--set", "\x1b[31mppo\u202e.lr=3"]) == 2
    assert capsys.readouterr().err.startswith("error: \\x1b[31mppo\\u202e is not a parameter")


# ---------------------------------------------------------------------------------------------------- variants


def test_settings_make_a_variant_whose_name_does_not_depend_on_their_order():
    def name(*settings):
        return load_study(ROOT / "params" / "reviews.yaml", settings).study

    assert name() == name("workers=3", "timeout_minutes=9") == name("size=full") == "reviews"
    assert name("size=smoke", "study=mine") == "mine"
    assert name("size=smoke").startswith("reviews-size-smoke-")
    assert name("ppo.clip=1.0", "ppo.lam=0.5") == name("ppo.lam=0.5", "ppo.clip=1.0") != name("ppo.lam=0.5")
    assert name("ppo.clip=0.5") == name("ppo.clip=0.1", "ppo.clip=0.5") != name("ppo.clip=5.0")
    assert name("arms={}", "arms.x.sources=[shap]") != name("arms.x.sources=[shap]")


def test_a_variant_leaves_the_finished_study_as_it_is(study, tmp_path):
    statuses(study)
    before = contents(tmp_path / "runs")
    made = load_study(study, ["ppo.lr=0.5"])
    assert set(statuses(study, "ppo.lr=0.5").values()) == {"ok"}
    assert RunFolder(plan.runs_folder(made) / ONE).load_json("metrics.json") == {"lr": 0.5}
    assert {path: data for path, data in contents(tmp_path / "runs").items() if made.study not in path.parts} == before
    assert set(statuses(study).values()) == {"cached"}


def test_settings_under_the_name_of_a_finished_study_want_force(study, tmp_path, capsys):
    assert main(["run", str(study)]) == 0
    before = contents(tmp_path / "runs")
    again = ["run", str(study), "--set", "study=s", "--set", "ppo.lr=0.5"]
    assert main(again) == 2
    assert f"runs/s/{ONE} is finished, with other parameters" in capsys.readouterr().err
    assert contents(tmp_path / "runs") == before
    assert main([*again, "--force"]) == 0 and RunFolder(tmp_path / "runs/s" / ONE).parameters()["ppo_lr"] == 0.5


# ---------------------------------------------------------------------------------------------------- step sizes

STEPS = ["step_sizes=[1.0e-4, 0.5]", "notebooks=[04_ppo, 05_bayesian_optimisation, 06_comparison, 11_step_size]"]
LEARNED = "arms.bo={sources: [shap, terminal], weights: learned}"


@pytest.fixture
def stepping(study, tmp_path, monkeypatch):
    """Runs that write at once: a search leaves weights, notebook 11 a step size, a policy what it was given."""
    runs = []

    def launch(notebook, folder, limits, stop, keep):
        runs.append(folder.name)
        flat = RunFolder(folder).parameters()
        learned = {"shape": {"weights": [0.25, 0.75]}} if notebook[:2] == "05" else {}
        RunFolder(folder).save_metrics(learned, lr=flat["ppo_lr"], step_size=0.5, weights=flat["shape_weights"])
        return "ok", ""

    monkeypatch.setattr(jobs, "launch", launch)
    for name in ("05_bayesian_optimisation", "11_step_size"):
        write_notebook(tmp_path / "notebooks" / f"{name}.ipynb", "x = 1")
    return study, runs


def metrics(tmp_path, name):
    return RunFolder(tmp_path / "runs" / "s" / name).load_json("metrics.json")


def test_every_arm_takes_the_step_size_that_was_chosen_for_it_and_the_common_one_stands_beside(stepping, tmp_path):
    study, runs = stepping
    asked = (*STEPS, "common_step=true", LEARNED, "study=s")
    assert set(statuses(study, *asked).values()) == {"ok"}
    for arm in ("sparse", "uniform", "bo"):
        own, common = (metrics(tmp_path, f"04_ppo-{arm}-{regime}seed0") for regime in ("", "common-step-"))
        assert (own["lr"], common["lr"]) == (0.5, 1e-4)
        record = RunFolder(tmp_path / "runs" / "s" / f"04_ppo-{arm}-common-step-seed0").record()
        assert (record["dataset"], record["regime"]) == ("reviews-common-step", "common-step")
        tried = RunFolder(tmp_path / "runs" / "s" / f"11_step_size-{arm}").parameters()
        assert tried["step_sizes"] == [1e-4, 0.5] and tried["seed"] == 500 and tried["ppo_lr"] == 1e-4
    assert metrics(tmp_path, "11_step_size-bo")["weights"] == [0.25, 0.75]  # what was learned, before the step
    assert metrics(tmp_path, "04_ppo-bo-common-step-seed0")["weights"] == [0.25, 0.75]
    assert set(statuses(study, *asked).values()) == {"cached"}
    runs.clear()
    statuses(study, "step_sizes=[1.0e-4, 0.5, 0.7]", *asked[1:])
    assert "11_step_size-bo" in runs and "04_ppo-bo-seed0" in runs and not any("common-step" in name for name in runs)


def test_another_step_size_trains_again_and_none_cancels(stepping, tmp_path, monkeypatch):
    study, runs = stepping
    statuses(study, *STEPS, "study=s")
    write = jobs.launch

    def otherwise(notebook, folder, *rest):
        done = write(notebook, folder, *rest)
        if folder.name == "11_step_size-sparse":
            RunFolder(folder).save_metrics({"step_size": 1e-4})
        return ("failed", "x") if folder.name == "11_step_size-uniform" else done

    monkeypatch.setattr(jobs, "launch", otherwise)
    runs.clear()
    names = [job.name for job in plan.expand(load_study(study, [*STEPS, "study=s"]))]
    made = statuses(study, *STEPS, "study=s", force=True, names=[name for name in names if name[:2] == "11"])
    assert made == {"11_step_size-sparse": "ok", "11_step_size-uniform": "failed"}
    made = statuses(study, *STEPS, "study=s", names=[name for name in names if name[:2] == "04"])
    assert made == {ONE: "ok", "04_ppo-uniform-seed0": "cancelled"} and metrics(tmp_path, ONE)["lr"] == 1e-4


def test_longer_trainings_have_more_updates_and_the_arms_own_step_size(stepping, tmp_path):
    study, _ = stepping
    statuses(study, *STEPS, "longer={sparse: 72}", "study=s")
    flat = RunFolder(tmp_path / "runs" / "s" / "04_ppo-sparse-longer-seed0").parameters()
    assert (flat["ppo_updates"], flat["ppo_lr"], flat["regime"]) == (72, 0.5, "longer")
    assert RunFolder(tmp_path / "runs" / "s" / ONE).parameters()["ppo_updates"] == 24
    assert not (tmp_path / "runs" / "s" / "04_ppo-uniform-longer-seed0").exists()


def test_drawn_weights_are_the_best_of_as_many_at_random(stepping):
    study, _ = stepping
    arms = "arms.drawn={sources: [shap, terminal], weights: drawn}"
    searches = {
        job.params.arm: job.params.bo
        for job in plan.expand(load_study(study, [*STEPS, LEARNED, arms]))
        if job.notebook == "05_bayesian_optimisation"
    }
    assert (searches["bo"].strategy, searches["drawn"].strategy) == ("gp", "random")
    assert searches["bo"].trials == searches["drawn"].trials


def test_the_updates_of_a_plan_are_those_of_policies_searches_and_step_sizes(stepping):
    asked = [*STEPS, LEARNED, "common_step=true", "longer={sparse: 72}", "seeds=[0, 1]", "bo.trials=8", "bo.updates=6"]
    total = sum(map(plan.updates_of, plan.expand(load_study(stepping[0], asked))))
    assert total == 2 * (3 * 2 * 24 + 72) + 8 * 6 + 3 * 2 * 24


def test_the_default_study_begins_with_both_learned_judges_and_ends_with_the_comparison():
    every = plan.expand(load_study(ROOT / "params" / "reviews.yaml"))
    first, second = every[:2]
    assert (first.notebook, second.notebook) == ("01_reward_model", "04_one_update")
    assert not plan.awaits(first, every) and not plan.awaits(second, every)
    assert all(plan.awaits(job, every) >= {first.name, second.name} for job in every[2:])
    order = list(dict.fromkeys(job.notebook for job in every))
    assert order.index("04_ppo") < order.index("02_attribution") < order.index("06_comparison")


def test_all_runs_have_as_many_threads_so_that_what_one_trained_the_others_read(stepping, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(4))
    every = plan.expand(load_study(stepping[0], [*STEPS, LEARNED]))
    assert len({job.stage for job in every if plan.updates_of(job)}) == 3
    assert plan.threads_of(every, 4) == 1 and plan.threads_of(every, 1) == 4
    assert plan.threads_of(every[:1], 8) == 4  # of one run alone all are its own
    assert plan.threads_of(every, 8) == 1


# ---------------------------------------------------------------------------------------------------- seeds


def test_a_seed_draws_what_the_study_says_and_arms_of_one_seed_share_it(stepping):
    study, _ = stepping
    given = [*STEPS[1:], LEARNED, "seeds=[3, 4]", "reward.seed=10"]
    for redraws in ([], ["explainer"], ["proxy", "explainer", "search"]):
        every = plan.expand(load_study(study, [*given, f"redraws={redraws}"]))
        for job in [job for job in every if job.notebook == "04_ppo"]:
            seed = job.params.seed
            assert job.params.reward.seed == 10 + seed * ("proxy" in redraws)
            assert job.params.attribution.seed == seed * ("explainer" in redraws)
            search = {one.name: one for one in every}.get(job.weights_from)
            assert search is None or search.params.seed == (seed if "search" in redraws else 3)
        assert sum(job.notebook[:2] == "05" for job in every) == (2 if "search" in redraws else 1)


@pytest.mark.parametrize("redraws, spread", [("[]", 0.0), ("[explainer]", 10), ("[proxy]", 100), ("[search]", 1000)])
def test_what_is_redrawn_is_in_the_intervals_and_what_is_not_is_not(stepping, tmp_path, monkeypatch, redraws, spread):
    """Planted: gold is 10 times the explainer's seed, 100 times the proxy's, 1000 times the search's."""
    study, _ = stepping

    def launch(notebook, folder, limits, stop, keep):
        run, flat = RunFolder(folder), RunFolder(folder).parameters()
        weight = 0.5 + flat["seed"] / 1000
        run.save_metrics({"shape": {"weights": [weight, 1 - weight]}, "step_size": 0.5})
        gold = 10 * flat["attribution_seed"] + 100 * flat["reward_seed"]
        gold += 1e6 * (flat["shape_weights"][0] - 0.5) if flat["arm"] == "bo" and notebook[:2] == "04" else 0
        run.file("evaluation.csv").write_text(
            "gold,proxy,kl,win,reference_gold,reference_proxy\n" + f"{gold},1,1,1,0,0\n" * 2
        )
        return "ok", ""

    monkeypatch.setattr(jobs, "launch", launch)
    statuses(study, *STEPS[1:], LEARNED, "seeds=[1, 2, 3]", f"redraws={redraws}", "study=s")
    (made,) = findings(finished_runs(tmp_path / "runs" / "s"))
    wanted = t_interval([spread * seed for seed in (1, 2, 3)])
    gold = made.arms["bo"].gold
    assert gold.high - gold.low == pytest.approx(wanted.high - wanted.low, abs=1e-6)


# ---------------------------------------------------------------------------------------------------- places


def test_paths_are_absolute_from_where_the_user_is(study, tmp_path, monkeypatch):
    for name in ("elsewhere/model", "elsewhere/data", "home"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "elsewhere" / "data" / "a.csv").write_text("text,label\n")
    (tmp_path / "home" / "m #1.csv").write_text("text,label\n")
    given = ["data.path=data/a.csv", "reward.name=model", "policy.name=./model", "downstream.checkpoints=[model, a/b]"]
    read = load_study(study, [*given, "evaluation.toxic_path=~/m #1.csv"])
    monkeypatch.chdir(tmp_path)
    (job, *_) = plan.expand(read)
    there = str(tmp_path / "elsewhere")
    assert job.params.data.path == f"{there}/data/a.csv"
    assert job.params.reward.name == job.params.policy.name == f"{there}/model"
    assert job.params.downstream.checkpoints == (f"{there}/model", "a/b")
    assert job.params.evaluation.toxic_path == str(tmp_path / "home" / "m #1.csv")
    assert set(plan.inputs(job, job.params.flat(), tmp_path)["files"]) >= {"data_path", "evaluation_toxic_path"}


@pytest.mark.parametrize("group", ["reward", "policy"])
@pytest.mark.parametrize("name", ["./nothing", "~/nothing", "/nothing", "nothing/", "x" * 300])
def test_a_model_that_is_no_folder_is_refused_at_once(study, group, name):
    with pytest.raises(InputError, match=f"^{group}.name is .*, and there is no such folder"):
        load_study(study, [f"{group}.name={name}"])


@pytest.mark.parametrize("path", ["x" * 300, "a/" * 3000, "a\0b", ".", "''"])
def test_a_path_that_is_no_file_is_refused_at_once(study, path):
    with pytest.raises(InputError, match="data.path|control characters"):
        load_study(study, [f"data.path={path}"])
    with pytest.raises(InputError, match="no file at"):
        load_study(study.parent / path.strip("'."))


def test_a_file_that_cannot_be_read_is_refused_at_planning(study, tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("text,label\n")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match="data.path: .*a.csv cannot be read"):
        load_study(study, ["data.path=a.csv"])


def foreign(folder, kind):
    """The folder of a run as somebody else left it."""
    folder.parent.mkdir(parents=True)
    mine = folder.parent.parent / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    if kind == "link":
        folder.symlink_to(mine)
    elif kind == "file":
        folder.write_text("years")
    else:
        folder.mkdir()
        (folder / "thesis.txt").write_text("years")


@pytest.mark.parametrize("kind", ["link", "file", "folder"])
def test_a_place_of_somebody_elses_is_left_alone_and_blocks_one_run(study, tmp_path, kind):
    folder = tmp_path / "runs" / "s" / ONE
    foreign(folder, kind)
    before = contents(tmp_path / "runs")
    for force in (False, True):
        assert statuses(study, force=force) == {ONE: "failed", "04_ppo-uniform-seed0": "ok", "06_comparison": "ok"}
    after = contents(tmp_path / "runs")
    assert {path: after.get(path) for path in before} == before
    assert folder.is_symlink() == (kind == "link")


def test_a_file_that_came_after_the_run_is_not_removed(study, tmp_path, monkeypatch):
    statuses(study)
    note = tmp_path / "runs" / "s" / ONE / "note.txt"
    note.write_text("mine")
    assert set(statuses(study).values()) == {"cached"}
    made = grid.run_grid(load_study(study), force=True, names=[ONE])
    assert made[0]["status"] == "failed" and "holds note.txt, which its run did not write" in made[0]["error"]
    note.unlink()
    assert statuses(study, force=True, names=[ONE]) == {ONE: "ok"}


def test_emptying_that_was_cut_short_is_done_again(study, tmp_path, monkeypatch):
    statuses(study)
    folder = tmp_path / "runs" / "s" / ONE
    (folder / "run.json").unlink()
    write_json(folder / "inputs.json", {})  # as `prepare` leaves it, killed at work
    assert statuses(study)[ONE] == "ok"


@pytest.mark.parametrize("text", [None, "", "{}", "[]", '{"cells": [1]}', '{"cells": [{"cell_type": "code"}]}'])
def test_a_notebook_that_cannot_be_read_fails_its_own_runs_alone(study, tmp_path, text):
    path = tmp_path / "notebooks" / "06_comparison.ipynb"
    path.unlink() if text is None else path.write_text(text)
    made = {one["job"]: one for one in grid.run_grid(load_study(study))}
    assert made[ONE]["status"] == "ok" and "06_comparison.ipynb is no notebook" in made["06_comparison"]["error"]


# ---------------------------------------------------------------------------------------------------- by hand


def test_a_finished_run_is_never_altered_by_hand(study, tmp_path):
    statuses(study)
    for name, reads in ((ONE, False), ("06_comparison", True)):
        flat = RunFolder(tmp_path / "runs" / "s" / name).parameters()
        assert flat.get("run_dir") is None and ("study_dir" in flat) == reads
    assert open_run(None, "04_ppo").path == tmp_path / "runs" / "interactive" / "04_ppo"
    with pytest.raises(InputError, match="a finished run; leave run_dir out"):
        open_run(str(tmp_path / "runs" / "s" / ONE), "04_ppo")


def test_a_cell_of_parameters_is_played_with_and_no_part_of_a_run(study, tmp_path):
    statuses(study)
    path = tmp_path / "notebooks" / "04_ppo.ipynb"
    path.write_text(path.read_text().replace("seed = 0", "seed = 7"))
    assert set(statuses(study).values()) == {"cached"}


def test_a_trained_policy_is_not_replaced_by_one_of_other_parameters(study, tmp_path):
    read = load_study(study)
    run = train.train_folder(read, "sparse", 0)
    flat = train.one_run(read, "sparse", 0).flat()
    write_json(run.file("run.json"), {"status": "ok", "params": flat | {"ppo_lr": 0.5}})
    with pytest.raises(InputError, match="holds a policy of other parameters .ppo_lr 0.5 -> 0.0001.; move it away"):
        train.train(read, "sparse", 0)


def test_the_list_has_studies_alone(study, tmp_path, capsys):
    for name in (".ipynb_checkpoints/s-checkpoint", ".hidden", "accelerate/ddp", "broken"):
        path = tmp_path / "params" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text("a: [" if name == "broken" else study.read_text() if name[0] == "." else "distributed: true\n")
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert "params/s.yaml" in out and "params/broken.yaml" in out and "cannot be read" in out
    assert "checkpoint" not in out and "hidden" not in out and "ddp" not in out


def test_lab_opens_copies_and_keeps_what_was_changed_there(tmp_path):
    for name in ("Makefile", "pyproject.toml", "setup.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    for name, text in (
        ("notebooks/a.ipynb", "old"),
        ("locks/cpu.txt", ""),
        ("locks/common.txt", ""),
        ("bin/jupyter", '#!/bin/sh\necho "$@"\n'),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "bin/jupyter").chmod(0o755)
    (tmp_path / "ready").touch()
    command = ["make", "--no-print-directory", "lab", "BIN=bin", "READY=ready"]
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout.endswith("lab --notebook-dir play\n")
        (tmp_path / "play/a.ipynb").write_text("new")
    assert (tmp_path / "notebooks/a.ipynb").read_text() == "old" and (tmp_path / "play/a.ipynb").read_text() == "new"


def test_help_plan_state_and_list_answer_within_two_seconds(study):
    def seconds(words):
        start = time.monotonic()
        done = subprocess.run([sys.executable, "-m", "dense_rlhf", *words], capture_output=True, text=True)
        assert done.returncode in (0, 1) and not done.stderr, words
        return time.monotonic() - start

    for words in (["--help"], ["run", str(study), "--dry-run"], ["status", str(study)], ["list"], ["params"]):
        assert any(seconds(words) < 2 * slowness() for _ in range(3)), words  # others may keep this machine busy
