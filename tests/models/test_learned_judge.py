"""The second judge: taught when asked, by labels of its own, without disturbing the training that asks."""

import pytest
import torch

from dense_rlhf.config.params import RewardParams
from dense_rlhf.models.language_models import LanguageModel
from dense_rlhf.models.learned_judge import LearnedJudge
from dense_rlhf.types import LabelledText, PreferencePair

GOOD, BAD = "the film was good and the cast was great", "a bad plot and a worse ending, it was awful"
TEXTS, NO_PROMPTS = [GOOD, BAD, "", GOOD], ["one", "two", "three", "four"]  # which a judge of labels does not read
EXAMPLES = [LabelledText(text, label) for text, label in ((GOOD, 1), (BAD, 0))]


@pytest.fixture
def judge(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setenv("DENSE_RLHF_CACHE", str(tmp_path))
    return LearnedJudge(EXAMPLES, tokenizer, "r0", RewardParams(steps=15, hidden=16, layers=1, seed=1))


def test_it_learns_what_people_like_once_and_reads_it_back(judge, monkeypatch):
    scores = judge.scores(NO_PROMPTS, TEXTS)
    assert scores[0] > 0 > scores[1] and scores[0] == pytest.approx(scores[3])
    monkeypatch.setattr("dense_rlhf.models.train_reward_model.train_on_labels", None)
    again = LearnedJudge(judge.examples, judge.policy, judge.data_revision, judge.params)
    assert again.scores(NO_PROMPTS, TEXTS) == scores


def test_other_labels_are_another_judge(judge):
    turned = LearnedJudge([LabelledText(e.text, 1 - e.label) for e in EXAMPLES], judge.policy, "r0", judge.params)
    assert turned.model.revision != judge.model.revision
    assert turned.scores([""], [GOOD])[0] < 0 < judge.scores([""], [GOOD])[0]


def test_teaching_it_within_a_training_changes_no_random_number(judge):
    torch.manual_seed(3)
    undisturbed = torch.rand(4)
    torch.manual_seed(3)
    judge.scores([""], [GOOD])
    assert torch.equal(torch.rand(4), undisturbed)


def test_a_judge_of_pairs_reads_each_text_as_a_reply_to_its_prompt(tokenizer, reference, monkeypatch, tmp_path):
    monkeypatch.setenv("DENSE_RLHF_CACHE", str(tmp_path))
    pairs = [PreferencePair("a film", "good", "bad"), PreferencePair("a plot", "bad", "good")] * 4
    params = RewardParams(name="policy", layers=1, steps=40, batch=8, lr=1e-2, window=64)
    judge = LearnedJudge(pairs, LanguageModel(reference.lm, tokenizer, "m0"), "r0", params)
    good, bad, bad_plot, good_plot = judge.scores(["a film", "a film", "a plot", "a plot"], ["good", "bad"] * 2)
    assert good > bad and bad_plot < good_plot
    with pytest.raises(ValueError):
        judge.scores(["a film"], ["good", "bad"])
