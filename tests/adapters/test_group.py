"""The group estimator: GRPO and RLOO where last tokens are paid, and a baseline that no action of a response moves."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dense_rlhf.adapters.group import group_to_go
from dense_rlhf.ppo import gae
from dense_rlhf.types import InputError


@st.composite
def groups_of_responses(draw):
    """Rewards and mask (B, T), and the prompt of each response, in any order."""
    names = draw(st.permutations("aaabb"))
    lengths = torch.tensor(draw(st.lists(st.integers(1, 6), min_size=5, max_size=5)))
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    seed = draw(st.integers(0, 1000))
    rewards = torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rewards.masked_fill(~mask, 0), mask, list(names)


def at_last(rewards, mask):
    """The same scores, paid at the last tokens."""
    last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
    return last * rewards.sum(-1, keepdim=True)


def others(names, i):
    return [j for j, name in enumerate(names) if name == names[i] and j != i]


@settings(max_examples=8)
@given(groups_of_responses())
def test_it_is_the_double_loop_of_its_equation(case):
    rewards, mask, names = case
    to_go = gae(rewards, torch.zeros_like(rewards), mask, 1.0, 1.0)
    advantages = group_to_go(rewards, mask, names, "leave_one_out")
    for i, t in mask.nonzero().tolist():
        ends = mask.sum(-1) - 1
        baseline = sum(to_go[j, min(t, int(ends[j]))] for j in others(names, i)) / len(others(names, i))
        assert advantages[i, t] == pytest.approx(float(to_go[i, t] - baseline), abs=1e-9)
    assert not advantages[~mask].any()


@settings(max_examples=8)
@given(groups_of_responses())
def test_of_sparse_rewards_it_is_grpo_and_rloo(case):
    rewards, mask, names = case
    paid, scores = at_last(rewards, mask), rewards.sum(-1)
    by_sd, by_others = group_to_go(paid, mask, names), group_to_go(paid, mask, names, "leave_one_out")
    plain = group_to_go(paid, mask, names, "none")
    for i in range(len(names)):
        rest = scores[others(names, i)]
        group = torch.cat([rest, scores[i : i + 1]])
        centred = scores[i] - group.mean()
        torch.testing.assert_close(by_sd[i], mask[i] * centred / (group.std() + 1e-6))
        torch.testing.assert_close(plain[i], mask[i] * centred)
        torch.testing.assert_close(by_others[i], mask[i] * (scores[i] - rest.mean()))


@settings(max_examples=8)
@given(groups_of_responses(), st.integers(0, 4))
def test_no_action_of_a_response_moves_its_baseline(case, i):
    rewards, mask, names = case
    changed = rewards.clone()
    changed[i] += mask[i] * 3.0
    gained = group_to_go(changed, mask, names, "leave_one_out") - group_to_go(rewards, mask, names, "leave_one_out")
    left = mask[i].flip(-1).cumsum(-1).flip(-1) * mask[i]
    torch.testing.assert_close(gained[i], (3.0 * left).to(gained))


@settings(max_examples=8)
@given(groups_of_responses(), st.lists(st.integers(0, 2), min_size=5, max_size=5))
def test_where_in_its_row_a_response_begins_changes_nothing(case, starts):
    """SkyRL has responses at the right."""
    rewards, mask, names = case

    def moved(x):
        wide = torch.nn.functional.pad(x, (0, 2))
        return torch.stack([row.roll(start) for row, start in zip(wide, starts)])

    torch.testing.assert_close(
        group_to_go(moved(rewards), moved(mask), names), moved(group_to_go(rewards, mask, names))
    )


def test_rewards_at_tokens_of_tools_count_for_what_led_to_them():
    """A trainer may pay a token that the policy did not write: verl pays the last one, whoever wrote it."""
    rewards = torch.tensor([[0.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
    assert group_to_go(rewards, mask, ["a", "a"], "none").tolist() == [[0.5, 0.5, 0], [-0.5, -0.5, 0]]


def test_a_response_that_is_masked_whole_is_no_part_of_its_group():
    rewards, mask = torch.tensor([[1.0, 2.0], [3.0, 1.0], [0.0, 0.0]]), torch.tensor([[1, 1], [1, 1], [0, 0]])
    advantages = group_to_go(rewards, mask, ["a"] * 3)
    torch.testing.assert_close(advantages[:2], group_to_go(rewards[:2], mask[:2], ["a"] * 2))
    assert not advantages[2].any()


def test_one_response_learns_nothing():
    assert group_to_go(torch.ones(1, 2), torch.ones(1, 2), ["a"]).tolist() == [[0, 0]]


@pytest.mark.parametrize("form", [torch.tensor, np.array])
def test_groups_may_be_an_array(form):
    rewards, mask = torch.arange(8.0).view(4, 2), torch.ones(4, 2)
    assert torch.equal(group_to_go(rewards, mask, form([3, 3, 5, 5])), group_to_go(rewards, mask, [3, 3, 5, 5]))


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match=r"rewards \(2, 3\), mask \(2, 3\), 1 groups"):
        group_to_go(torch.ones(2, 3), torch.ones(2, 3), ["a"])
    with pytest.raises(InputError, match="scale is 'std', wanted one of sd, leave_one_out, none"):
        group_to_go(torch.ones(2, 3), torch.ones(2, 3), ["a", "a"], "std")
    with pytest.raises(InputError, match="rewards are torch.int64, wanted floating point"):
        group_to_go(torch.ones(2, 3).long(), torch.ones(2, 3), ["a", "a"])
