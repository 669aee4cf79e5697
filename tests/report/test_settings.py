"""The settings of a study compared in its index: each arm against the baseline of its own setting."""

from types import SimpleNamespace

import made_study
import pytest
from bs4 import BeautifulSoup
from conftest import ROOT

from dense_rlhf.config.study import load_study
from dense_rlhf.evaluation.claims import Claim
from dense_rlhf.evaluation.findings import findings
from dense_rlhf.report.settings import in_order, settings_html
from dense_rlhf.runs import finished_runs

KL = ROOT / "params" / "ablations" / "kl.yaml"


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two settings of the study, in one of which signed SHAP gains more, and one run of another dataset."""
    root, arms = tmp_path_factory.mktemp("settings"), {arm: made_study.ARMS[arm] for arm in ("sparse", "shap-signed")}
    sources, gold, kl, seconds = arms["shap-signed"]
    better = arms | {"shap-signed": (sources, gold + 2, kl, seconds)}
    made_study.policies(root, "kl", ("reviews-kl-default",), arms=arms)
    made_study.policies(root, "kl", ("reviews-kl-free",), arms=better)
    made_study.policies(root, "kl", ("elsewhere",), arms=arms)
    return in_order(findings(finished_runs(root / "runs" / "kl"), list(arms)), load_study(KL).comparisons)


def test_settings_stand_in_the_order_of_the_study(compared):
    assert [f.dataset for f in compared] == ["reviews-kl-free", "reviews-kl-default", "elsewhere"]


def test_each_arm_is_held_against_the_baseline_of_its_own_setting(compared):
    page = BeautifulSoup(settings_html(compared, load_study(KL).comparisons), "html.parser")
    at_updates, at_kl = (figure.svg["aria-label"] for figure in page.find_all("figure"))
    for line, field in ((at_updates, "gain"), (at_kl, "gain_at_kl")):
        assert ". Gold of shap-signed over sparse" in line and "elsewhere" not in line
        for name, f in zip(("kl-free", "kl-default"), compared):
            assert f"{name} {getattr(f.arms['shap-signed'], field)}" in line
    rows = [[cell.text for cell in row.find_all(["td", "th"])] for row in page.table.find_all("tr")]
    assert [row[0] for row in rows[1:]] == ["kl-free"] * 3 + ["kl-default"] * 3
    assert [row[1] for row in rows[1:]] == ["reference", "sparse", "shap-signed"] * 2
    gains = [float(row[4].split()[0]) for row in rows if row[1] == "shap-signed"]
    assert gains[0] - gains[1] == pytest.approx(2, abs=0.4)


def test_what_the_settings_answer_comes_first_and_is_escaped(compared):
    claim = Claim("", "Does <b>more</b> help?", "equal KL", "undecided", "<script>")
    page = BeautifulSoup(settings_html(compared, load_study(KL).comparisons, [("made", claim)]), "html.parser")
    shown = [claim.text, "equal KL, made", claim.verdict, claim.why]
    assert [cell.text for cell in page.table.tbody.find_all(["th", "td"])] == shown
    assert not page.find("script")


def test_several_datasets_are_named_and_no_settings_are_nothing(compared):
    runs = load_study(KL, ["data=[{name: reviews}, {name: hh_rlhf}]"]).comparisons
    assert "reviews-kl-free" in settings_html(compared, runs)
    assert settings_html(compared, load_study(KL, ["settings=null"]).comparisons) == ""
    assert (
        settings_html([], load_study(KL).comparisons)
        == settings_html(
            compared, [SimpleNamespace(setting="other", where="reviews-other", data=SimpleNamespace(name="reviews"))]
        )
        == ""
    )
