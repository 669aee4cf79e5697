"""The ablations, executed at smoke size through the runner that users call, and what they leave behind."""

import json

import pytest
from conftest import RATIONALES
from whole_runs import check_pages, run_study

from dense_rlhf.attribution import SOURCES
from dense_rlhf.bayesopt.ledger import trials
from dense_rlhf.config.params import PolicyParams
from dense_rlhf.files import read_ledger
from dense_rlhf.models.language_models import load_policy
from dense_rlhf.report.results_claims import ASKED_BY


@pytest.fixture(scope="module")
def small(few_reviews, tmp_path_factory):
    """Settings of all ablations: a tenth of the reviews, and the lowest of the policy's layers without the others."""
    folder, language_model = tmp_path_factory.mktemp("policy"), load_policy(PolicyParams())
    trunk = language_model.model.base_model
    trunk.layers, trunk.config.num_hidden_layers = trunk.layers[:1], 1
    language_model.model.save_pretrained(folder)
    language_model.tokenizer.save_pretrained(folder)
    return f"data.path={few_reviews}", f"policy.name={folder}"


def executed(name, *settings):
    """A fixture: what the ablation leaves, run whole."""

    @pytest.fixture(scope="module")
    def study(small):
        return run_study(f"params/ablations/{name}.yaml", f"pytest_{name}", *small, *settings)

    return study


contextual, dimension, baselines, settings = map(executed, ("contextual", "dimension", "baselines", "ppo"))
human = executed("human", f"attribution.rationale_path={RATIONALES}")
labels = executed(
    "reward_model", "notebooks=[04_ppo, 06_comparison]", *(f"arms.{a}=null" for a in ("sparse", "uniform", "shuffled"))
)


@pytest.fixture(scope="module")
def explainers(small, tmp_path_factory):
    """The ablation, with a few words that people marked."""
    folder = tmp_path_factory.mktemp("labels")
    (folder / "trees.txt").write_text("(3 (2 a) (3 (4 good) (2 film)))\n(1 (2 a) (1 (0 bad) (2 film)))\n")
    (folder / "toxic.csv").write_text('spans,text\n"[2, 3, 4]",a bad film\n"[0, 1, 2, 3, 4]",awful film\n')
    return run_study(
        "params/ablations/explainers.yaml",
        "pytest_explainers",
        *small,
        f"evaluation.sst_path={folder}/trees.txt",
        f"evaluation.toxic_path={folder}/toxic.csv",
    )


@pytest.fixture(scope="module")
def unseen(small, tmp_path_factory):
    """The notebook with one checkpoint: the policy with all its layers."""
    folder, language_model = tmp_path_factory.mktemp("checkpoints") / "whole" / "policy", load_policy(PolicyParams())
    language_model.model.save_pretrained(folder)
    language_model.tokenizer.save_pretrained(folder)
    return run_study("params/unseen_questions.yaml", "pytest_unseen", *small, f"downstream.checkpoints=[{folder}]")


def test_checkpoints_are_judged_on_questions_from_elsewhere(unseen):
    runs, reports = unseen
    check_pages(runs, reports)
    run = runs["13_unseen_questions"]
    gains, judged = run.load_json("metrics.json")["gains"], run.load_table("judged")
    assert set(judged["checkpoint"]) == {"reference", "whole"} and len(judged) == 2 * 2 * judged["question"].nunique()
    means = judged.groupby("checkpoint")[["proxy", "gold", "second"]].mean()
    apart = means.loc["whole"] - means.loc["reference"]
    assert {judge: interval["mean"] for judge, interval in gains["whole"].items()} == pytest.approx(apart.to_dict())


def test_each_setting_has_its_own_reward_model_and_comparison(labels):
    runs, reports = labels
    names = ("labels-1", "labels-10")
    taught = {name: runs[f"{name}-04_ppo-shap-signed-seed0"].load_json("metrics.json") for name in names}
    assert taught["labels-1"]["revisions"]["reward"] != taught["labels-10"]["revisions"]["reward"]
    for name in names:
        beside = runs[f"{name}-06_comparison"].load_json("metrics.json")
        judged = runs[f"{name}-04_ppo-shap-signed-seed0"].load_table(beside["table"])
        assert beside["gold"]["shap-signed"] == pytest.approx(judged["gold"].mean()) and len(beside["gold"]) == 2
        assert (reports / f"comparison-reviews-{name}.html").exists()
    index = (reports / "index.html").read_text()
    assert index.index("Gold of shap-signed over reference") < index.index(": labels-1 ") < index.index("; labels-10 ")


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
    assert metrics["trainings"] == len(lines) == len({json.loads(line)["key"] for line in lines}) == 17
    assert metrics["blind"] == ["rloo", "grpo"] and max(metrics["coincide"].values()) < 1e-3
    seen = run.load_table("seen").set_index("estimator").filter(like="largest difference")
    assert (seen.loc[["rloo", "grpo"]] < 1e-4).all(axis=None) and (seen.drop(["rloo", "grpo"]) > 0.1).all(axis=None)
    gain = {method: both[0]["mean"] for method, both in metrics["density"].items()}
    assert abs(gain["rloo"]) < 1e-6 and abs(gain["grpo"]) < 1e-6 and gain["rloo_to_go"] != 0 != gain["ppo"]
    assert {"reference", "ppo", "dpo", "best_of_n"} < set(run.load_table("results")["method"])


@pytest.mark.parametrize("study", ["settings", "baselines", "dimension"])
def test_what_results_say_that_a_study_would_answer_it_answers(study, request):
    run = next(iter(request.getfixturevalue(study)[0].values()))
    rows = run.load_json("metrics.json")["answers"]
    asked = ASKED_BY[run.record()["notebook"].removeprefix("ablations/")]
    assert list(dict.fromkeys(row["question"] for row in rows)) == asked


def test_contextual_weights_are_searched_beside_static_ones_and_trained_again(contextual):
    run = contextual[0]["contextual"]
    metrics, results = run.load_json("metrics.json"), run.load_table("results").set_index("arm")
    assert {"reference", "sparse", "uniform", "shap-signed", "static", "contextual", "mirrored"} == set(results.index)
    tried = {size: trials(run.path / name / "trials.jsonl") for name, size in (("static", 2), ("contextual", 3))}
    assert all(len(tries) == 6 and {len(t["point"]) for t in tries} == {size} for size, tries in tried.items())
    fresh = {line["seed"] for line in read_ledger(run.file("trainings.jsonl"))}
    assert not fresh & {t["seed"] for tries in tried.values() for t in tries} and set(metrics["slopes"]) == {"position"}
    low = metrics["gain"]["static"]["proxy"]["low"]  # null where one seed has no interval
    assert metrics["real"] <= metrics["told_apart"] == (low is not None and low > 0)
    asked = [(answer["at"], answer["verdict"]) for answer in metrics["answers"]]
    assert asked == [("equal updates", "undecided"), ("equal KL", "undecided")]  # by one seed


def test_trials_are_counted_against_sources_on_known_functions(dimension):
    run = dimension[0]["dimension"]
    metrics, searches = run.load_json("metrics.json"), read_ledger(run.file("searches.jsonl"))
    assert len(searches) == len({line["key"] for line in searches}) == 14  # two by three strategies, flat by gp
    assert {line["strategy"] for line in searches if line["landscape"] == "flat"} == {"gp"}
    assert {method: set(by_size) for method, by_size in metrics["needed"].items()} == {
        method: {"2", "3"} for method in ("gp", "sobol", "gp on sobol")
    }
    rows = run.load_table("searches")
    powers = rows[(rows["landscape"] == "powers") & (rows["method"] == "gp")].groupby("d")["regret"].mean()
    assert {int(d): at["mean"] for d, at in metrics["regret"]["gp"].items()} == pytest.approx(dict(powers))
    (answer,) = metrics["answers"]
    assert answer["verdict"] == "undecided" and "3 sources" in answer["why"] and "1 function," in answer["why"]
    assert metrics["group"] == "reported" and set(run.load_table("calibration")["group"]) == {"reported", "tuning"}


def test_more_sources_are_searched_and_trained_again(dimension):
    run = dimension[0]["more_sources"]
    metrics = run.load_json("metrics.json")
    for d in (2, 3):
        tried = trials(run.path / f"{d}_sources" / "trials.jsonl")
        assert len(tried) == 6 and {len(t["weights"]) for t in tried} == {d} == {len(t["sources"]) for t in tried}
        assert len(metrics["weights"][f"{d} sources"]) == d and metrics["kind"][f"{d} sources"]
    fresh = {line["seed"] for line in read_ledger(run.file("trainings.jsonl"))}
    assert not fresh & {t["seed"] for t in tried} and set(metrics["loss"]) == {"3 sources"}


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


@pytest.mark.parametrize("study", ["explainers", "settings", "baselines", "contextual", "human", "dimension", "labels"])
def test_reports_open_without_a_network(study, request):
    check_pages(*request.getfixturevalue(study))
