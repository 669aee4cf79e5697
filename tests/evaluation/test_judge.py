"""What every judge answers, both orders of a comparison, and win rates."""

import numpy as np
import pytest
from conftest import SENTENCES

from dense_rlhf.evaluation.judge import gold_judge, pairwise, reward_judge, win_rate
from dense_rlhf.models.train_reward_model import proxy_correct
from dense_rlhf.models.word_judge import AdditiveJudge
from dense_rlhf.types import InputError, Message, PreferencePair

GOLD = gold_judge(AdditiveJudge("gold", {"good": 1.0, "great": 0.5, "bad": -1.0}))


class Fixed:
    """Answers what it is given, whoever is shown."""

    name = "fixed"

    def __init__(self, *answers):
        self.answers = iter(answers)

    def compare(self, instructions, first, second):
        return np.array(next(self.answers), float)


def both_orders(first, second):
    N = len(first)
    return pairwise(Fixed(first, second), ["?"] * N, ["x"] * N, ["y"] * N)


def test_win_rate_counts_a_tie_as_half():
    assert win_rate(np.array([2, 1, 1]), np.array([1, 1, 2])).tolist() == [1, 0.5, 0]


def test_win_rate_of_both_sides_sums_to_one():
    ours, theirs = np.random.default_rng(0).integers(3, size=(2, 50))
    assert np.allclose(win_rate(ours, theirs) + win_rate(theirs, ours), 1)


def test_win_rate_of_no_score_is_none():
    assert np.isnan(win_rate([np.nan, 1.0], [0.0, np.nan])).all()


def test_win_rate_refuses_other_prompts():
    with pytest.raises(InputError, match="3 responses against 2"):
        win_rate(np.zeros(3), np.zeros(2))


def test_a_judge_that_always_takes_the_first_has_all_the_bias_and_no_winner():
    judged = both_orders([1, 1, 1], [1, 1, 1])
    assert judged.position_bias == 0.5 and judged.win_rate == 0.5 and judged.ties == 1 and judged.consistent == 0


def test_a_judge_that_reads_has_no_bias():
    judged = both_orders([1, 0, 0.5], [0, 1, 0.5])
    assert judged.preference.tolist() == [1, 0, 0.5]
    assert judged.summary() == {
        "pairs": 3,
        "win_rate": 0.5,
        "ties": pytest.approx(1 / 3),
        "consistent": 1,
        "position_bias": 0,
        "failed": 0,
    }


def test_what_was_not_judged_in_both_orders_is_no_tie_and_counts_nowhere():
    judged = both_orders([1, np.nan, 1, np.nan], [0, 0, np.nan, np.nan])
    assert np.isnan(judged.preference).tolist() == [False, True, True, True]
    assert judged.failed == 3 and judged.win_rate == 1 and judged.ties == 0 and judged.consistent == 1
    nothing = both_orders([np.nan], [np.nan])
    assert nothing.failed == 1 and np.isnan(nothing.win_rate) and np.isnan(nothing.position_bias)


def test_a_scored_judge_needs_one_order():
    rng = np.random.default_rng(0)
    ours, theirs = ([SENTENCES[i] for i in rng.integers(4, size=20)] for _ in range(2))
    judged = pairwise(GOLD, ["?"] * 20, ours, theirs)
    assert judged.consistent == 1 and judged.position_bias == 0
    assert (judged.preference == 0.5).sum() >= sum(a == b for a, b in zip(ours, theirs)) > 0


def test_the_gold_judge_prefers_the_better_words():
    assert GOLD.compare(["the"] * 3, ["good", "bad", "so"], ["bad", "great", "film"]).tolist() == [1, 0, 0.5]


def test_a_reward_model_judges_as_it_is_measured_on_pairs(reward_model):
    dialogue = (Message("user", "How was it?"),)
    pairs = [PreferencePair(p, a, b) for p in ("the film", dialogue) for a in SENTENCES for b in SENTENCES if a != b]
    chosen, rejected = [p.chosen for p in pairs], [p.rejected for p in pairs]
    judged = reward_judge(reward_model).compare([p.prompt for p in pairs], chosen, rejected)
    assert 0 < judged.mean() < 1 and ((judged == 1) == proxy_correct(reward_model, pairs, window=100)).all()


@pytest.mark.parametrize("rows", [(["?"], ["a", "b"], ["a"]), (["?"], ["a"], []), ([], ["a"], ["a"])])
def test_lists_that_disagree_are_refused(rows):
    with pytest.raises(InputError, match="wanted one of each for every pair"):
        pairwise(GOLD, *rows)
