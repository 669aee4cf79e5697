"""Every notebook, executed at smoke size through the runner that users call, and what it leaves behind."""

import gzip
import json
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from bs4 import BeautifulSoup
from conftest import RATIONALES

from dense_rlhf.attribution import SOURCES
from dense_rlhf.ledger import read_ledger, trials
from dense_rlhf.params import NOTEBOOKS
from dense_rlhf.runs import RunFolder, repository_root

ROOT = repository_root()
PATHS = sorted((ROOT / "notebooks").rglob("*.ipynb"))


def run_study(file, name, *settings):
    """Run a study at smoke size under another name: its run folders by job, and its folder of reports."""
    for kind in ("runs", "reports"):
        shutil.rmtree(ROOT / kind / name, ignore_errors=True)
    options = [part for setting in ("size=smoke", f"study={name}", *settings) for part in ("--set", setting)]
    command = [sys.executable, "-m", "dense_rlhf", "run", file, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.name: RunFolder(path) for path in (ROOT / "runs" / name).iterdir()}, ROOT / "reports" / name


@pytest.fixture(scope="module")
def reviews():
    left_out = [f"arms.{arm}=null" for arm in ("uniform", "shap", "shap-signed")]
    return run_study("params/reviews.yaml", "pytest_reviews", *left_out)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pairs that any reader tells apart, in the form of HH-RLHF."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl.gz"
    start = "\n\nHuman: What do you think of film number {}?\n\nAssistant: "
    with gzip.open(path, "wt") as file:
        for i in range(400):
            sides = {"chosen": start.format(i) + "It is a wonderful film, I loved it.",
                     "rejected": start.format(i) + "It is a terrible film, I hated it."}  # fmt: skip
            file.write(json.dumps(sides) + "\n")
    return run_study("params/hh_rlhf.yaml", "pytest_pairs", f"data.path={path}", "policy.name=tiny",
                     "policy.trainable_layers=2", "policy.dtype=float32", "reward.steps=30", "workers=2",
                     "ppo.updates=2", "ppo.max_new_tokens=8", "arms.sparse=null", "evaluation.prompts=8")  # fmt: skip


@pytest.fixture(scope="module")
def explainers(tmp_path_factory):
    """The ablation, with a few words that people marked."""
    folder = tmp_path_factory.mktemp("labels")
    (folder / "trees.txt").write_text("(3 (2 a) (3 (4 good) (2 film)))\n(1 (2 a) (1 (0 bad) (2 film)))\n")
    (folder / "toxic.csv").write_text('spans,text\n"[2, 3, 4]",a bad film\n"[0, 1, 2, 3, 4]",awful film\n')
    return run_study("params/ablations/explainers.yaml", "pytest_explainers",
                     f"evaluation.sst_path={folder}/trees.txt",
                     f"evaluation.toxic_path={folder}/toxic.csv")  # fmt: skip


@pytest.fixture(scope="module")
def contextual():
    return run_study("params/ablations/contextual.yaml", "pytest_contextual")


@pytest.fixture(scope="module")
def dimension():
    return run_study("params/ablations/dimension.yaml", "pytest_dimension")


@pytest.fixture(scope="module")
def human():
    return run_study("params/ablations/human.yaml", "pytest_human", f"attribution.rationale_path={RATIONALES}")


@pytest.fixture(scope="module")
def settings():
    return run_study("params/ablations/ppo.yaml", "pytest_ppo")


@pytest.fixture(scope="module")
def baselines():
    return run_study("params/ablations/baselines.yaml", "pytest_baselines")


def test_settings_of_ppo_are_compared_at_equal_updates_and_equal_kl(settings):
    run = settings[0]["ppo"]
    metrics, lines = run.load_json("metrics.json"), run.file("trainings.jsonl").read_text().splitlines()
    assert metrics["trainings"] == len(lines) == len({json.loads(line)["key"] for line in lines})
    assert {len(both) for both in metrics["gain"].values()} == {2} and len(metrics["gain"]) == 10
    agreement = run.load_table("agreement").groupby(["critic", "arm", "lam"])["agreement"].mean()
    assert agreement["none", "shap-signed", 0.0] > agreement["none", "uniform", 0.0]
    critics = run.load_table("critics").set_index("arm")
    assert (critics["none"] == 0).all() and critics.loc["sparse", "reward model"] > 0.5
    results = run.load_table("results").set_index(["setting", "arm"])
    assert {"sparse", "shap-signed", "shuffled", "uniform", "random"} == set(results.loc["default"].index)


def test_baselines_see_a_dense_reward_or_not(baselines):
    run = baselines[0]["baselines"]
    metrics, lines = run.load_json("metrics.json"), run.file("trainings.jsonl").read_text().splitlines()
    assert metrics["trainings"] == len(lines) == len({json.loads(line)["key"] for line in lines}) == 11
    assert metrics["blind"] == ["rloo", "grpo"] and max(metrics["coincide"].values()) < 1e-3
    seen = run.load_table("seen").set_index("estimator").filter(like="largest difference")
    assert (seen.loc[["rloo", "grpo"]] < 1e-4).all(axis=None) and (seen.drop(["rloo", "grpo"]) > 0.1).all(axis=None)
    gain = {method: both[0]["mean"] for method, both in metrics["density"].items()}
    assert abs(gain["rloo"]) < 1e-6 and abs(gain["grpo"]) < 1e-6 and gain["rloo_to_go"] != 0 != gain["ppo"]
    assert {"reference", "ppo", "dpo", "best_of_n"} < set(run.load_table("results")["method"])


def test_contextual_weights_are_searched_beside_static_ones_and_trained_again(contextual):
    run = contextual[0]["contextual"]
    metrics, results = run.load_json("metrics.json"), run.load_table("results").set_index("arm")
    assert {"reference", "sparse", "uniform", "shap-signed", "static", "contextual", "mirrored"} == set(results.index)
    tried = {size: trials(run.path / name / "trials.jsonl") for name, size in (("static", 2), ("contextual", 3))}
    assert all(len(found) == 6 and {len(t["point"]) for t in found} == {size} for size, found in tried.items())
    fresh = {line["seed"] for line in read_ledger(run.file("trainings.jsonl"))}
    assert not fresh & {t["seed"] for found in tried.values() for t in found} and set(metrics["slopes"]) == {"position"}
    assert metrics["real"] <= metrics["told_apart"] == (metrics["gain"]["static"]["proxy"]["low"] > 0)


def test_trials_are_counted_against_sources_on_known_functions_and_on_reviews(dimension):
    run = dimension[0]["dimension"]
    metrics, searches = run.load_json("metrics.json"), read_ledger(run.file("searches.jsonl"))
    assert len(searches) == len({line["key"] for line in searches}) == 8  # face by three strategies, flat by gp
    assert {line["strategy"] for line in searches if line["landscape"] == "flat"} == {"gp"}
    assert {method: set(by_size) for method, by_size in metrics["needed"].items()} == {
        method: {"2", "3"} for method in ("gp", "sobol", "gp on sobol")}  # fmt: skip
    found = run.load_table("searches")
    face = found[(found["landscape"] == "face") & (found["method"] == "gp")].groupby("d")["regret"].mean()
    assert {int(d): at["mean"] for d, at in metrics["regret"]["gp"].items()} == pytest.approx(dict(face))
    for d in (2, 3, 4):
        tried = trials(run.path / f"{d}_sources" / "trials.jsonl")
        assert len(tried) == 6 and {len(t["weights"]) for t in tried} == {d} == {len(t["sources"]) for t in tried}
        assert len(metrics["weights"][f"{d} sources"]) == d and metrics["kind"][f"{d} sources"]
    fresh = {line["seed"] for line in read_ledger(run.file("trainings.jsonl"))}
    assert not fresh & {t["seed"] for t in tried} and set(metrics["loss"]) == {"3 sources", "4 sources"}


def test_peoples_marks_are_trained_on_in_score_units(human):
    run = human[0]["human"]
    metrics, units = run.load_json("metrics.json"), run.load_table("units").set_index("source")
    assert set(units.index) == {"lexicon", "rationale"} == set(metrics["unit"])
    taught = {s for s, unit in metrics["unit"].items() if 0 < unit <= 1}
    people = taught | {f"shap + {s}" for s in taught}
    others = {"reference", "sparse", "uniform", "shuffled", "shap-signed"}
    assert set(run.load_table("results")["arm"]) == others | people and set(run.load_table("verdicts")["arm"]) == people
    assert set(metrics["left_out"]) == set(units.index) - taught
    assert metrics["agreement"]["shap-signed"]["low"] > 0 == metrics["agreement"]["uniform"]["mean"]


def test_explainers_are_weighed_against_their_cost_and_human_labels(explainers):
    run = explainers[0]["explainers"]
    quality, people = run.load_table("quality"), run.load_table("people")
    shap = quality[quality.source == "shap"]
    assert shap.evaluations.is_monotonic_increasing and shap.rho.iloc[-1] > 0.9
    assert set(quality.source) == set(SOURCES) - {"log_ratio", "rationale"} and (quality.ms >= 0).all()
    assert set(people.labels) == {"SST", "toxic spans"} and set(people.texts) == {2}
    assert run.load_json("metrics.json")["recommended"]["permutations"] >= 1


def test_all_notebooks_of_the_study_ran_and_say_so(reviews):
    runs, _ = reviews
    assert {run.load_json("run.json")["notebook"] for run in runs.values()} == set(NOTEBOOKS)
    for name, run in runs.items():
        record = run.load_json("run.json")
        assert record["status"] == "ok" and record["versions"]["torch"] and record["commit"], name
        assert {"metrics.json", "notebook.ipynb", "params.yaml"} <= set(record["artefacts"]), name


def test_what_the_notebooks_measured(reviews):
    runs, _ = reviews
    assert 0.6 < runs["01_reward_model"].load_json("metrics.json")["gold_accuracy"] < 1
    explained = runs["02_attribution"].load_json("metrics.json")
    assert max(explained["parity"].values()) < 1e-4
    assert {"shap", "owen", "prefix", "attention", "uniform", "shuffled"} <= set(explained["fresh_r2"])
    found = [source for kind in ("finds", "weak", "nothing") for source in explained[kind]]
    assert len(found) == len(set(found)) and {"shap", "attention", "shuffled", "random"} <= set(found)
    shaping = runs["03_shaping"].load_json("metrics.json")
    assert shaping["residual"] < 1e-4 and max(shaping["regret"].values()) < 1e-9
    search = runs["05_bayesian_optimisation-bo-shap"]
    metrics = search.load_json("metrics.json")
    assert abs(sum(metrics["weights"]) - 1) < 1e-6 and metrics["shape"]["weights"] == metrics["weights"]
    assert {trial["status"] for trial in trials(search.file("trials.jsonl"))} == {"observed"}
    assert metrics["winner"] == (metrics["p"] < 0.05) == (metrics["verdict"] != "cannot be told apart")
    assert len(metrics["checks"]) == 5 and set(metrics["probabilities"]) > {"equal weights", "shap alone"}
    assert set(runs["06_comparison"].load_json("metrics.json")["gold"]) == {"reference", "sparse", "bo-shap"}


def test_policies_leave_history_and_judgements(reviews):
    runs, _ = reviews
    for arm in ("sparse", "bo-shap"):
        run = runs[f"04_ppo-{arm}-seed0"]
        history, judged = run.load_table("history"), run.load_table("evaluation")
        assert (history["first_ratio_error"] < 1e-4).all() and abs(history["kl"].iloc[0]) < 1e-4
        assert {"proxy", "gold", "value_loss", "explained_variance", "entropy"} <= set(history)
        assert {"proxy", "gold", "kl", "reference_gold", "win"} <= set(judged) and len(judged) == 16
        metrics = run.load_json("metrics.json")
        assert metrics["revisions"].keys() == {"data", "policy", "reward"} and metrics["warnings"] == []


def test_same_parameters_give_the_same_metrics(reviews, tmp_path):
    """Plain papermill with the run's own parameters file repeats it."""
    runs, _ = reviews
    run = runs["04_ppo-sparse-seed0"]
    command = [sys.executable, "-m", "papermill", "notebooks/04_ppo.ipynb", str(tmp_path / "out.ipynb"), "-f",
               str(run.file("params.yaml")), "-p", "run_dir", str(tmp_path), "--no-progress-bar", "-k", "python3"]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    again = RunFolder(tmp_path)
    for name in ("history.csv", "evaluation.csv", "metrics.json"):
        assert again.file(name).read_bytes() == run.file(name).read_bytes(), name


def test_preference_pairs_go_the_same_way(pairs):
    runs, _ = pairs
    metrics = runs["01_reward_model"].load_json("metrics.json")
    assert metrics["proxy_accuracy"] > 0.9 and metrics["gold_accuracy"] > 0.9
    assert runs["04_ppo-shap-signed-seed0"].load_table("evaluation")["kl"].notna().all()


@pytest.mark.parametrize("study", ["reviews", "pairs", "explainers", "settings", "baselines", "contextual", "human",
                                   "dimension"])
def test_reports_open_without_a_network(study, request):
    runs, reports = request.getfixturevalue(study)
    pages = {path.name: path.read_text() for path in reports.glob("*.html")}
    beside = {name for name in pages if name.startswith("comparison-")}
    assert beside and set(pages) - beside == {f"{job}.html" for job in runs} | {"index.html"}
    for name, page in pages.items():
        assert "<script" not in page and "default-src 'none'" in page, name
        assert not re.search(r"(?:src|href)\s*=\s*[\"'](?:https?:)?//|@import|url\(", page), name
        assert all(image.get("alt", "").strip() for image in BeautifulSoup(page, "html.parser").find_all("img")), name
        assert len(page) < 2_000_000, name
    for job in runs:
        assert f"{job}.html" in pages["index.html"]


def test_tiny_language_model_notebook(tmp_path):
    notebook, folder = "notebooks/00_tiny_language_model.ipynb", str(tmp_path / "lm")
    values = {"language_model_steps": 2, "language_model_batch": 4, "folder": folder}
    options = [part for name, value in values.items() for part in ("-p", name, str(value))]
    command = [sys.executable, "-m", "papermill", notebook, str(tmp_path / "out.ipynb"), *options, "-k", "python3"]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    recipe = json.loads((tmp_path / "lm" / "recipe.json").read_text())
    assert recipe["held_out_loss"] < 9 and (tmp_path / "lm" / "model.safetensors").exists()


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_notebook_form(path):
    notebook = nbformat.read(path, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "outputs must be stripped"
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
    assert max(len(cell.source.splitlines()) for cell in code) <= 25
    assert max(len(line) for cell in code for line in cell.source.splitlines()) <= 250
    words = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    text = "".join(words)
    assert text.startswith("# ") and sum(line.startswith("# ") for cell in words for line in cell.splitlines()) == 1
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids) and notebook.metadata.kernelspec.name == "python3"
    source = "".join(cell.source for cell in code)
    assert not re.search(r"^\s*[%!]|plt\.show|savefig|display\((?:HTML|Markdown)\(", source, re.M), "our helpers show"
    described = re.findall(r"plots\.show\((?:[^()]|\([^()]*\))*?alt=", source)
    assert source.count("plots.show(") == len(described), "a figure without words"
    assert all(part in text for part in ("**Question.**", "**Expectation.**", "## What we learned"))
