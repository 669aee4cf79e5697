"""The grid: what is expanded, what is run again, what survives a failure."""

import time
from dataclasses import replace
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
import yaml
from checkout import WRITES, make_checkout, write_notebook

from dense_rlhf.__main__ import main
from dense_rlhf.config.params import ShapeParams
from dense_rlhf.config.study import load_study
from dense_rlhf.files import append_line, lock
from dense_rlhf.runner import grid, jobs, plan
from dense_rlhf.runs import RunFolder, finished_runs, stages, workspace
from dense_rlhf.statistics import t_interval
from dense_rlhf.types import InputError

REVIEWS = workspace() / "params" / "reviews.yaml"


def test_expansion_is_datasets_times_arms_times_seeds_in_order():
    study = load_study(REVIEWS, ["data=[{name: reviews}, {name: hh_rlhf}]", "seeds=[3, 4, 5]"])
    planned = plan.expand(study)
    names = [job.name for job in planned]
    assert len(names) == len(set(names))
    assert sum("04_ppo" in name for name in names) == 2 * 6 * 3
    assert {job.params.seed for job in planned if job.notebook == "04_ppo"} == {3, 4, 5}
    stage = {job.name: job.stage for job in planned}
    for job in planned:
        if job.weights_from:
            assert stage[job.weights_from] < job.stage
        assert job.stage < stage[f"{job.params.data.name}-06_comparison"] or job.notebook in plan.COMPARING


def test_settings_are_compared_each_by_itself():
    study = load_study(REVIEWS, ["settings={low: {ppo: {kl_coef: 0.0}}, high: {ppo: {kl_coef: 1.0}}}", "seeds=[3]"])
    planned = {job.name: job for job in plan.expand(study)}
    assert len(planned) == 2 * len(plan.expand(load_study(REVIEWS, ["seeds=[3]"])))
    for setting, price in (("low", 0.0), ("high", 1.0)):
        comparison = planned[f"{setting}-06_comparison"]
        assert comparison.params.where == f"reviews-{setting}" and len(comparison.reads) == 6
        assert all(
            planned[name].params.ppo.kl_coef == price and planned[name].params.setting == setting
            for name in (*comparison.reads, f"{setting}-05_bayesian_optimisation-bo-shap")
        )
        assert planned[f"{setting}-04_ppo-bo-shap-seed3"].weights_from == f"{setting}-05_bayesian_optimisation-bo-shap"


def test_learned_weights_want_the_search():
    with pytest.raises(InputError, match="learns its weights"):
        plan.expand(load_study(REVIEWS, ["notebooks=[04_ppo]", "step_sizes=[]"]))


@pytest.fixture
def fake_repository(tmp_path, monkeypatch, forked):
    """A checkout whose one notebook fails for arm `bad` and writes its parameters otherwise."""
    cells = ("import json, pathlib\nif arm == 'bad': raise ValueError('<script>alert(1)</script>')", WRITES)
    make_checkout(
        tmp_path,
        {
            "notebooks": ["04_ppo"],
            "ppo": {"lr": 0.5},
            "arms": {"good": {"sources": ["uniform"]}, "bad": {"sources": ["terminal"]}},
        },
        dict.fromkeys(("04_ppo", "05_bayesian_optimisation"), cells),
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_failure_stops_nothing_else_and_is_told(fake_repository, capsys):
    assert main(["run", str(fake_repository / "params" / "s.yaml")]) == 1
    out = capsys.readouterr().out
    assert "ValueError" in out and "papermill notebooks/04_ppo.ipynb" in out
    runs = fake_repository / "runs" / "s"
    good, bad = RunFolder(runs / "04_ppo-good-seed0"), RunFolder(runs / "04_ppo-bad-seed0")
    assert good.load_json("run.json")["status"] == "ok" and good.load_json("metrics.json")["lr"] == 0.5
    assert bad.load_json("run.json")["status"] == "failed"
    assert "metrics.json" in good.load_json("run.json")["artefacts"]
    assert [run.path.name for run in finished_runs(runs)] == ["04_ppo-good-seed0"]
    flat = yaml.safe_load(good.file("params.yaml").read_text())
    assert all(not isinstance(value, dict) for value in flat.values()) and flat["ppo_lr"] == 0.5
    page = (fake_repository / "reports" / "s" / "index.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page
    failed_page = (fake_repository / "reports" / "s" / "04_ppo-bad-seed0.html").read_text()
    assert "<script>" not in failed_page and "ValueError" in failed_page


def test_a_finished_run_is_not_repeated_until_something_changes(fake_repository):
    path = fake_repository / "params" / "s.yaml"
    study = load_study(path, ["arms.bad=null"])
    first = grid.run_grid(study)
    assert [r["status"] for r in first] == ["ok"]
    assert [r["status"] for r in grid.run_grid(study)] == ["cached"]
    assert [r["status"] for r in grid.run_grid(load_study(path, ["arms.bad=null", "ppo.lr=0.25"]))] == ["ok"]


def test_a_run_without_end_is_stopped(fake_repository):
    write_notebook(fake_repository / "notebooks" / "04_ppo.ipynb", "import time; time.sleep(600)")
    study = load_study(fake_repository / "params" / "s.yaml", ["arms.bad=null", "timeout_minutes=0.04"])
    start = time.monotonic()
    assert [r["status"] for r in grid.run_grid(study)] == ["timeout"]
    assert time.monotonic() - start < 60


def test_learned_weights_reach_the_policy_as_plain_parameters(fake_repository):
    settings = [
        "study=s",
        "arms={bo: {sources: [shap, terminal], weights: learned}, good: null, bad: null}",
        "notebooks=[04_ppo, 05_bayesian_optimisation]",
    ]
    records = grid.run_grid(load_study(fake_repository / "params" / "s.yaml", settings))
    assert [r["status"] for r in records] == ["ok", "ok"]
    flat = yaml.safe_load((fake_repository / "runs" / "s" / "04_ppo-bo-seed0" / "params.yaml").read_text())
    assert flat["shape_weights"] == [0.5, 0.5]


def test_all_that_is_learned_reaches_the_policy(tmp_path):
    """A temperature a source, features and slopes too; the arm keeps what its search did not learn."""
    settings = ["arms={bo: {sources: [shap, terminal], weights: learned, temperature: 0.5}}"]
    job = next(job for job in plan.expand(load_study(REVIEWS, settings)) if job.weights_from and job.params.arm == "bo")
    shape = {
        "weights": [0.25, 0.75],
        "normalise": "signed",
        "temperature": [0.1, 2.0],
        "features": ["position"],
        "slopes": [[1.0], [0.0]],
    }
    RunFolder(tmp_path / job.weights_from).save_metrics({"shape": shape, "mean": 3.0})
    wanted = ("shap", "terminal"), (0.25, 0.75), "signed", (0.1, 2.0), ("position",), ((1.0,), (0.0,))
    assert plan.learned_params(job, tmp_path).shape == ShapeParams(*wanted)
    RunFolder(tmp_path / job.weights_from).save_metrics({"shape": {"weights": [0.25, 0.75]}})
    assert plan.learned_params(job, tmp_path).shape == replace(job.params.shape, weights=(0.25, 0.75))
    RunFolder(tmp_path / job.weights_from).save_metrics({"weights": [0.25, 0.75]})
    with pytest.raises(InputError, match="needs the weights of 05_bayesian_optimisation-bo, which did not finish"):
        plan.learned_params(job, tmp_path)


@pytest.fixture
def search_job():
    return next(job for job in plan.expand(load_study(REVIEWS)) if job.notebook.startswith("05"))


def test_a_search_goes_on_with_the_threads_that_it_began_with(search_job, tmp_path):
    """A machine with other cores, or mounted elsewhere, joins; other parameters, code or chosen threads start anew."""
    folder = tmp_path / "a" / search_job.name
    other = replace(search_job, params=replace(search_job.params, seed=9))
    chosen = replace(search_job, params=replace(search_job.params, threads=4))

    def threads():
        return yaml.safe_load((folder / "params.yaml").read_text())["threads"]

    for job, share, kept, wanted in (
        (search_job, 2, False, 2),
        (search_job, 5, True, 2),
        (other, 5, False, 5),
        (other, 2, True, 5),
        (chosen, 5, False, 4),
        (chosen, 5, True, 4),
    ):
        assert jobs.prepare(job, folder, share) == "pending"
        assert ((folder / "trials.jsonl").exists(), threads()) == (kept, wanted)
        (folder / "trials.jsonl").touch()
        (folder / "trials.d").mkdir(exist_ok=True)
    (tmp_path / "a").rename(tmp_path / "b")
    folder = tmp_path / "b" / search_job.name
    assert jobs.prepare(chosen, folder, 5) == "pending" and (folder / "trials.jsonl").exists()


def test_a_search_that_runs_is_not_emptied(search_job, tmp_path):
    folder = tmp_path / search_job.name
    assert jobs.prepare(search_job, folder, 1) == "pending"
    other = replace(search_job, params=replace(search_job.params, seed=9))
    with lock(folder / "trials.d" / "003.lock"):
        assert jobs.prepare(search_job, folder, 1) == "pending"
        with pytest.raises(InputError, match="has a search of other parameters or code that is running; end it first"):
            jobs.prepare(other, folder, 1)
    assert jobs.prepare(other, folder, 1) == "pending" and not (folder / "trials.d").exists()


def test_only_one_of_two_that_start_together_empties_the_folder(search_job, tmp_path):
    folder, results = tmp_path / search_job.name, []
    folder.mkdir()
    (folder / "inputs.json").write_text("{}")
    (folder / "left.txt").touch()
    with lock(folder / ".lock"):
        starts = [Thread(target=lambda: results.append(jobs.prepare(search_job, folder, 1))) for _ in range(2)]
        for start in starts:
            start.start()
        time.sleep(0.2)
        assert (folder / "left.txt").exists() and not results
    for start in starts:
        start.join(20)
    assert results == ["pending"] * 2
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "inputs.json", "params.yaml"]


def test_the_search_command_fills_the_ledger_that_the_notebook_looks_for(fake_repository, capsys, monkeypatch):
    """It prepares the notebook's own folder and searches there; the study then finds the ledger and goes on."""
    from dense_rlhf.runner import train

    def search_shape(task, recipe, bo, objective, ledger, progress):
        assert (task.name, bo.trials, recipe.seed, objective.prompts) == ("task", 7, 5, (0, 1, 2))
        assert recipe.shape.sources == ("shap", "terminal")
        for _ in progress(range(5, 7)):
            append_line(ledger, {"trial": 0})
        return replace(recipe.shape, weights=(0.25, 0.75)), None

    task = SimpleNamespace(name="task", data=SimpleNamespace(validation_prompts=list(range(9))))
    monkeypatch.setattr("dense_rlhf.training.task.load_task", lambda *_: task)
    monkeypatch.setattr("dense_rlhf.training.outer_loop.search_shape", search_shape)
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)
    settings = [
        "study=s",
        "arms={bo: {sources: [shap, terminal], weights: learned}, good: null, bad: null}",
        "seeds=[5]",
        "notebooks=[04_ppo, 05_bayesian_optimisation]",
        "bo.trials=7",
        "evaluation.prompts=3",
    ]
    study = str(fake_repository / "params" / "s.yaml")
    options = [part for setting in settings for part in ("--set", setting)]
    assert main(["search", study, "--arm", "bo", *options]) == 0
    out = capsys.readouterr().out
    assert "1 trials run here, of 2 open at the start" in out and "incumbent: shap 0.250, terminal 0.750" in out
    assert f"dense-rlhf run {study} --set study=s --set 'arms={{bo:" in out
    run = RunFolder(fake_repository / "runs" / "s" / "05_bayesian_optimisation-bo")
    wanted = load_study(Path(study), settings)
    first, *others = plan.expand(wanted)
    threads = plan.threads_of([first, *others], wanted.workers)
    assert jobs.prepare(first, run.path, threads) == "pending"
    assert first.name == run.path.name and len(run.file("trials.jsonl").read_text().splitlines()) == 2
    jobs.finish(first, run.path, "ok", "", 0.0)
    assert train.search(wanted, "bo")[1] is None, "the notebook has ended too"
    for arm, message in (("nope", "--arm is 'nope', wanted one of bo"), ("bo", "")):
        assert main(["search", study, "--arm", arm, *options]) == (2 if message else 0)
        assert message in capsys.readouterr().err
    assert main(["search", study, "--arm", "good"]) == 2
    assert "arms.good.weights are given, so there is nothing to learn; learned arms: none" in capsys.readouterr().err


def test_arms_that_left_the_study_leave_its_comparison(fake_repository):
    path = fake_repository / "params" / "s.yaml"
    grid.run_grid(load_study(path, ["study=s", "arms.bad=null"]))
    grid.run_grid(load_study(path, ["study=s", "arms={other: {sources: [uniform]}, good: null, bad: null}"]))
    runs = finished_runs(fake_repository / "runs" / "s")
    assert [run.path.name for run in runs] == ["04_ppo-other-seed0"]


def test_files_stay_in_the_run_folder(tmp_path):
    for name in ("../x", "/etc/passwd", "a/b", ".hidden"):
        with pytest.raises(InputError):
            RunFolder(tmp_path).file(name)


def test_metrics_hold_no_nan(tmp_path):
    RunFolder(tmp_path).save_metrics({"a": float("nan"), "b": [1.0, float("inf")]}, c={"arm": t_interval([2.0])})
    interval = {"mean": 2.0, "low": None, "high": None}
    assert RunFolder(tmp_path).load_json("metrics.json") == {"a": None, "b": [1.0, None], "c": {"arm": interval}}


@pytest.mark.parametrize("force", [False, True])
def test_force_forgets_what_runs_share(tmp_path, monkeypatch, force):
    make_checkout(tmp_path, {"study": "s", "arms": {"a": {"sources": ["terminal"]}}}, {})
    monkeypatch.chdir(tmp_path)
    (stages() / "training" / "key").mkdir(parents=True)
    grid.run_grid(load_study(tmp_path / "params" / "s.yaml"), executor=grid.Local(1), names=[], force=force)
    assert stages().exists() == (not force)
