"""The notebooks of the story, executed at smoke size through the runner that users call, and what they leave behind."""

import ast
import gzip
import json
import re

import nbformat
import pytest
from conftest import ROOT, reviews_file
from whole_runs import check_pages, command, make_workspace, run_study

from dense_rlhf.bayesopt.ledger import trials
from dense_rlhf.config.params import NOTEBOOKS
from dense_rlhf.runs import RunFolder

AUDIT = "12_reward_model_audit"  # of the study's own reward model
PATHS = sorted((ROOT / "notebooks").rglob("*.ipynb"))


@pytest.fixture(scope="module")
def reviews(few_reviews):
    left_out = [f"arms.{arm}=null" for arm in ("uniform", "shuffled", "shap", "shap-signed")]
    notebooks = f"notebooks=[{', '.join((*NOTEBOOKS, AUDIT))}]"
    return run_study("params/reviews.yaml", "pytest_reviews", f"data.path={few_reviews}", notebooks, *left_out)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pairs that any reader tells apart, in the form of HH-RLHF."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl.gz"
    start = "\n\nHuman: What do you think of film number {}?\n\nAssistant: "
    with gzip.open(path, "wt") as file:
        for i in range(400):
            sides = {
                "chosen": start.format(i) + "It is a wonderful film, I loved it.",
                "rejected": start.format(i) + "It is a terrible film, I hated it.",
            }
            file.write(json.dumps(sides) + "\n")
    return run_study(
        "params/hh_rlhf.yaml",
        "pytest_pairs",
        f"data.path={path}",
        "policy.name=tiny",
        "policy.trainable_layers=2",
        "policy.dtype=float32",
        "reward.steps=30",
        "workers=2",
        "ppo.updates=2",
        "ppo.max_new_tokens=8",
        "arms.sparse=null",
        "evaluation.prompts=8",
        "notebooks=[01_reward_model, 04_ppo]",
    )


def test_all_notebooks_of_the_study_ran_and_say_so(reviews):
    runs, _ = reviews
    assert {run.load_json("run.json")["notebook"] for run in runs.values()} == {*NOTEBOOKS, AUDIT}
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
    sources = [source for kind in ("finds", "weak", "nothing") for source in explained[kind]]
    assert len(sources) == len(set(sources)) and {"shap", "attention", "shuffled", "random"} <= set(sources)
    shaping = runs["03_shaping"].load_json("metrics.json")
    assert shaping["residual"] < 1e-4 and max(shaping["regret"].values()) < 1e-9
    assert shaping["settles"]["uniform"]["share"] == 0 < shaping["settles"]["Shapley"]["lost"]
    search = runs["05_bayesian_optimisation-bo-shap"]
    metrics = search.load_json("metrics.json")
    assert abs(sum(metrics["weights"]) - 1) < 1e-6 and metrics["shape"]["weights"] == metrics["weights"]
    assert {trial["status"] for trial in trials(search.file("trials.jsonl"))} == {"observed"}
    assert metrics["winner"] <= (metrics["p"] < 0.05) == (metrics["verdict"] != "cannot be told apart")
    assert len(metrics["checks"]) == 5 and set(metrics["probabilities"]) > {"equal weights", "shap alone"}


def test_four_notebooks_compare_the_finished_policies(reviews):
    runs, _ = reviews
    names = "06_comparison", "07_overoptimisation", "08_critic", "09_verdicts"
    compared, exploited, critic, verdicts = (runs[name].load_json("metrics.json") for name in names)
    assert set(compared["gold"]) == {"reference", "sparse", "bo-shap"} and exploited["gold_peaks"] == 0
    assert set(exploited["gains"]) == {"proxy", "gold", "second", "distinct", "repetition"}
    assert set(critic["value_loss"]) == set(critic["seconds"]) == {"sparse", "bo-shap"}
    assert {row["key"] for row in verdicts["claims"]} == {"1a", "1b", "2", "3", "4a", "4b", "4c", "5", "6"}
    saved = {"arms": "06_comparison", "laws": "07_overoptimisation", "verdicts": "09_verdicts", "claims": "09_verdicts"}
    assert all(runs[name].file(f"{table}.csv").exists() for table, name in saved.items())


def test_an_audit_says_what_the_reward_model_likes(reviews):
    run = reviews[0][AUDIT]
    metrics, words = run.load_json("metrics.json"), run.load_table("words")
    assert set(words["piece"]) == set(metrics["words"]) and len(words) == 16 and words["texts"].min() >= 8
    assert sum(metrics["variance"][f"{third} third"]["mean"] for third in ("first", "middle", "last")) == pytest.approx(
        1
    )
    assert {"length", "format", "position", "politeness", "all but words"} < set(metrics["predicted"])
    assert all(interval["low"] < interval["mean"] < interval["high"] for interval in metrics["words"].values())
    assert set(metrics["agreement"]) == {"VADER, the model's", "VADER, shuffled"}


def test_policies_leave_history_and_judgements(reviews):
    runs, _ = reviews
    for arm in ("sparse", "bo-shap"):
        run = runs[f"04_ppo-{arm}-seed0"]
        history, judged = run.load_table("history"), run.load_table("test")
        assert (history["first_ratio_error"] < 1e-4).all() and abs(history["kl"].iloc[0]) < 1e-4
        assert {"proxy", "gold", "value_loss", "explained_variance", "entropy"} <= set(history)
        assert {"proxy", "gold", "kl", "reference_gold", "win", "win_lc"} <= set(judged) and len(judged) == 16
        trained, metrics = run.load_json("trained.json"), run.load_json("metrics.json")
        assert trained["updates"] == len(history) and trained["read"] in (0, len(history)) and trained["seconds"] > 0
        assert metrics["revisions"].keys() == {"data", "policy", "reward"} and metrics["warnings"] == []


def test_same_parameters_give_the_same_metrics(reviews, tmp_path):
    """Plain papermill with the run's own parameters file repeats it."""
    runs, _ = reviews
    run = runs["04_ppo-sparse-seed0"]
    parameters = ["-f", str(run.file("params.yaml")), "-p", "run_dir", str(tmp_path)]
    where = make_workspace()  # where nothing was trained yet
    papermill = "papermill", "notebooks/04_ppo.ipynb", str(tmp_path / "out.ipynb"), *parameters, "-k", "python3"
    assert command(where, tmp_path / "log.txt", *papermill).wait() == 0, (tmp_path / "log.txt").read_text()
    again = RunFolder(tmp_path)
    for name in ("history.csv", "test.csv", "metrics.json"):
        assert again.file(name).read_bytes() == run.file(name).read_bytes(), name


def test_preference_pairs_go_the_same_way(pairs):
    runs, _ = pairs
    metrics = runs["01_reward_model"].load_json("metrics.json")
    assert metrics["proxy_accuracy"] > 0.9 and metrics["gold_accuracy"] > 0.9
    assert runs["04_ppo-shap-signed-seed0"].load_table("test")["kl"].notna().all()


@pytest.mark.parametrize("study", ["reviews", "pairs"])
def test_reports_open_without_a_network(study, request):
    check_pages(*request.getfixturevalue(study))


def test_tiny_language_model_notebook(tmp_path):
    data, folder = reviews_file(tmp_path / "reviews.csv", every=100), tmp_path / "lm"
    values = {"language_model_steps": 2, "language_model_batch": 4, "data_path": str(data), "folder": str(folder)}
    (tmp_path / "params.yaml").write_text(json.dumps(values))
    execute = "dense_rlhf", "execute", "00_tiny_language_model", str(tmp_path)
    assert command(make_workspace(), tmp_path / "log.txt", *execute).wait() == 0, (tmp_path / "log.txt").read_text()
    recipe = json.loads((folder / "recipe.json").read_text())
    assert recipe["held_out_loss"] < 9 and (folder / "model.safetensors").exists()


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_notebook_form(path):
    notebook = nbformat.read(path, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "outputs must be stripped"
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
    assert max(len(line) for cell in notebook.cells for line in cell.source.splitlines()) <= 120
    words = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    text = "".join(words)
    assert text.startswith("# ") and sum(line.startswith("# ") for cell in words for line in cell.splitlines()) == 1
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids) and notebook.metadata.kernelspec.name == "python3"
    source = "".join(cell.source for cell in code)
    assert not re.search(r"^\s*[%!]|plt\.show|savefig|display\((?:HTML|Markdown)\(", source, re.M), "our helpers show"
    described = re.findall(r"figures\.show\((?:[^()]|\([^()]*\))*?alt=", source)
    assert source.count("figures.show(") == len(described), "a figure without words"
    assert all(part in text for part in ("**Question.**", "**Expectation.**", "## What we learned"))


SHOWN = "table|text_table|check|note|parameters|heatmaps|response_heatmaps|explore|show"


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_cells_are_short_and_end_in_what_they_show(path):
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    for cell in (cell for cell in cells if "parameters" not in cell.metadata.get("tags", [])):
        body = [part for part in ast.parse(cell.source).body if not isinstance(part, (ast.Import, ast.ImportFrom))]
        start, end = (body[0].lineno, body[-1].end_lineno) if body else (1, 0)
        lines = [line for line in cell.source.splitlines()[start - 1 : end] if line.strip()]
        assert len(lines) <= 14, cell.source
        assert re.search(rf"\b({SHOWN})\(", ast.unparse(body[-1])), cell.source
