"""The second judge: taught when asked, by labels of its own, without disturbing the training that asks."""

import pytest
import torch

from dense_rlhf.models import learned_judge
from dense_rlhf.models.learned_judge import LearnedJudge
from dense_rlhf.types import LabelledText

GOOD, BAD = "the film was good and the cast was great", "a bad plot and a worse ending, it was awful"
EXAMPLES = [LabelledText(text, label) for text, label in ((GOOD, 1), (BAD, 0))]


@pytest.fixture
def judge(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setenv("DENSE_RLHF_CACHE", str(tmp_path))
    monkeypatch.setitem(learned_judge.SHAPE, "hidden", 16)
    return LearnedJudge(EXAMPLES, tokenizer, "r0", steps=15)


def test_it_learns_what_people_like_once_and_reads_it_back(judge, monkeypatch):
    scores = judge.scores([GOOD, BAD, "", GOOD])
    assert scores[0] > 0 > scores[1] and scores[0] == pytest.approx(scores[3])
    monkeypatch.setattr("dense_rlhf.models.train_reward_model.train_on_labels", None)
    again = LearnedJudge(judge.examples, judge.tokenizer, judge.data_revision, judge.steps)
    assert again.scores([GOOD, BAD, "", GOOD]) == scores


def test_other_labels_are_another_judge(judge):
    turned = LearnedJudge([LabelledText(e.text, 1 - e.label) for e in EXAMPLES], judge.tokenizer, "r0", judge.steps)
    assert turned.model.revision != judge.model.revision
    assert turned.scores([GOOD])[0] < 0 < judge.scores([GOOD])[0]


def test_teaching_it_within_a_training_changes_no_random_number(judge):
    torch.manual_seed(3)
    undisturbed = torch.rand(4)
    torch.manual_seed(3)
    judge.scores([GOOD])
    assert torch.equal(torch.rand(4), undisturbed)
