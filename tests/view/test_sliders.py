"""The sliders' view: it pays what PPO would be paid, in text that stays text."""

import re
import sys

import pytest
import torch
from bs4 import BeautifulSoup

from dense_rlhf.attribution import attribute
from dense_rlhf.config.params import AttributionParams
from dense_rlhf.shaping.rewards import shape_rewards
from dense_rlhf.types import RewardShape
from dense_rlhf.view import sliders
from dense_rlhf.view.sliders import Explorer, mixture


@pytest.fixture(scope="module")
def explorer(rollout, reward_model, tokenizer):
    sources = ["shap", "lime", "terminal", "uniform"]
    return Explorer(rollout, attribute(reward_model, rollout, sources, AttributionParams()), tokenizer)


def titles(html):
    """The numbers of the last line of a heat-map."""
    rows = BeautifulSoup(html, "html.parser").find_all("tr")
    return [float(span["title"]) for span in rows[-1].find_all("span")]


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("normalise", ["softmax", "signed"])
def test_the_view_shows_the_rewards(explorer, weight, normalise):
    row = int(explorer.rollout.mask.sum(-1).argmax())
    html = explorer.view(row, "shap", "lime", weight, 0.3, normalise)
    shape = RewardShape(("shap", "lime"), (weight, 1 - weight), normalise, 0.3)
    wanted = shape_rewards(explorer.rollout, explorer.attributions, shape)[row][explorer.rollout.mask[row]]
    assert titles(html) == pytest.approx(wanted.tolist(), abs=1e-3)
    assert sum(titles(html)) == pytest.approx(explorer.rollout.scores[row].item(), abs=1e-2)


def test_settings_stand_beside_each_other_on_one_scale(explorer):
    soup = BeautifulSoup(explorer.multiples(0), "html.parser")
    labels = [row.th.text for row in soup.find_all("tr")]
    assert len(labels) == len(set(labels)) >= 9 and "signed" in labels[-1] and soup.caption
    depths = [[float(m) for m in re.findall(r"([\d.]+)\)", str(row))] for row in soup.find_all("tr")]
    assert max(map(max, depths)) == 0.8 and min(map(max, depths)) < 0.8


def test_the_same_source_twice_is_one():
    assert mixture("shap", "shap", 0.3, 1.0, "softmax") == RewardShape(("shap",), (1.0,))
    assert mixture("shap", "lime", 1.0, 2.0, "softmax") == RewardShape(("shap",), (1.0,), "softmax", 2.0)


def test_a_slider_redraws(explorer):
    box = explorer.widget(0)
    controls = {control.description: control for control in box.children[0].children}
    shown, seen = box.children[1], set()
    moves = {"weight": 0.9, "temperature": 0.05, "source": "uniform", "normalise": "signed", "response": 1}
    for name, value in moves.items():
        controls[name].value = value
        seen.add(shown.value)
    assert len(seen) == 5


@pytest.mark.parametrize("live, installed, kind", [(True, True, "VBox"), (True, False, "HTML"), (False, True, "HTML")])
def test_it_falls_back_to_what_needs_no_frontend(explorer, live, installed, kind, monkeypatch):
    monkeypatch.setattr("dense_rlhf.view.sliders.is_live", lambda: live)
    if not installed:
        monkeypatch.setitem(sys.modules, "ipywidgets", None)
    shown = []
    monkeypatch.setattr("dense_rlhf.view.sliders.display", shown.append)
    sliders.explore(explorer.rollout, explorer.attributions, explorer.tokenizer, "shap", "lime")
    assert [type(one).__name__ for one in shown] == [kind]


def test_hostile_tokens_stay_text(explorer):
    class Hostile:
        def decode(self, ids):
            return "<img src=x onerror=alert(1)>\u202e"

    html = Explorer(explorer.rollout, explorer.attributions, Hostile()).view(0, "shap", "lime", 0.5, 1.0, "softmax")
    assert "<img" not in html and "\u202e" not in html and torch.isfinite(torch.tensor(titles(html))).all()
