"""What a learner keeps from update to update, the signs that it goes wrong, and numbers that are none."""

import copy
import math
import resource
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from dense_rlhf import ppo
from dense_rlhf.attribution import attribute
from dense_rlhf.config.params import AttributionParams, PPOParams
from dense_rlhf.models.policy import PolicyWithValue
from dense_rlhf.ppo.learner import keep_freed_memory
from dense_rlhf.ppo.warnings import SIGNS, EntropyCollapse, KLBlowUp, diagnose
from dense_rlhf.types import InputError, Rollout

PARAMS = PPOParams(updates=4, rollouts=6, max_new_tokens=8, minibatch=3, epochs=2, lr=1e-2)


def bare(kl_coef=0.1):
    """A learner of nothing: its own numbers only."""
    return ppo.Learner(None, None, None, None, kl_coef)


def noise_like(mask):
    return torch.randn(mask.shape, generator=torch.Generator().manual_seed(0)).masked_fill(~mask, 0)


# ---------------------------------------------------------------------------------------------------- KL estimators


@st.composite
def categorical_pairs(draw):
    """Logits of two categorical distributions over the same 2 to 6 outcomes, float64."""
    size, logits = draw(st.integers(2, 6)), st.floats(-3, 3)
    return [torch.tensor(draw(st.lists(logits, min_size=size, max_size=size)), dtype=torch.float64) for _ in range(2)]


@given(categorical_pairs())
def test_k1_and_k3_have_the_kl_for_expectation_and_k2_and_k3_are_never_negative(pair):
    p, q = (F.log_softmax(logits, -1) for logits in pair)
    kl = F.kl_div(q, p, log_target=True, reduction="sum").item()
    k1, k2, k3 = (ppo.kl_estimate(p, q, name) for name in ("k1", "k2", "k3"))
    assert (p.exp() @ k1).item() == pytest.approx(kl, abs=1e-12)
    assert (p.exp() @ k3).item() == pytest.approx(kl, abs=1e-12)
    assert k3.min() >= -1e-15 and k2.min() >= 0
    torch.testing.assert_close(k2, k1**2 / 2)


def test_by_sampling_k1_and_k3_find_the_kl_and_k3_with_less_spread():
    p, q = (F.log_softmax(torch.tensor(logits, dtype=torch.float64), -1) for logits in ([0.0, 1, 2], [0.3, 1, 1.7]))
    drawn = torch.multinomial(p.exp(), 100_000, replacement=True, generator=torch.Generator().manual_seed(0))
    kl, spread = (p.exp() @ (p - q)).item(), {}
    for name in ("k1", "k3"):
        estimate = ppo.kl_estimate(p[drawn], q[drawn], name)
        assert abs(estimate.mean().item() - kl) < 4 * estimate.std().item() / math.sqrt(len(drawn))
        spread[name] = estimate.std().item()
    assert spread["k3"] < 0.2 * spread["k1"]
    k2 = ppo.kl_estimate(p[drawn], q[drawn], "k2").mean().item()
    assert k2 == pytest.approx(kl, rel=0.1) and (p.exp() @ ((p - q) ** 2) / 2).item() != pytest.approx(kl, rel=1e-3)


@given(categorical_pairs())
def test_as_a_reward_only_k1_has_the_gradient_of_the_kl(pair):
    logits, q = pair[0].requires_grad_(), F.log_softmax(pair[1], -1)
    (wanted,) = torch.autograd.grad(F.kl_div(q, F.log_softmax(logits, -1), log_target=True, reduction="sum"), logits)

    def by_policy_gradient(name):
        p = F.log_softmax(logits, -1)
        reward = ppo.kl_estimate(p, q, name).detach()
        return torch.autograd.grad((p.exp().detach() * reward * p).sum(), logits)[0]

    torch.testing.assert_close(by_policy_gradient("k1"), wanted, atol=1e-12, rtol=0)
    if (torch.log_softmax(logits, -1) - q).abs().max() > 0.5:
        assert not torch.allclose(by_policy_gradient("k3"), wanted, atol=1e-4)


# ---------------------------------------------------------------------------------------------------- adaptive KL


@given(st.floats(-5, 100), st.floats(0.1, 50), st.floats(10, 1e5), st.integers(1, 512), st.floats(1e-3, 1))
def test_the_coefficient_follows_the_formula_of_ziegler(kl, target, horizon, rollouts, kl_coef):
    params = replace(PARAMS, rollouts=rollouts, minibatch=1, kl_target=target, kl_horizon=horizon)
    learner = bare(kl_coef)
    learner.follow_kl(kl, params)
    assert learner.kl_coef == pytest.approx(kl_coef * (1 + np.clip(kl / target - 1, -0.2, 0.2) * rollouts / horizon))


def test_without_a_target_the_coefficient_stays():
    learner = bare()
    learner.follow_kl(1e6, PARAMS)
    assert learner.kl_coef == 0.1


@pytest.mark.parametrize("start", [0.001, 10.0], ids=["too weak", "too strong"])
def test_in_a_closed_loop_the_kl_arrives_at_its_target(start):
    """The KL is that of a policy at its optimum: it falls with the square of the coefficient."""
    params, learner = replace(PARAMS, rollouts=64, minibatch=64, kl_target=6.0, kl_horizon=640.0), bare(start)
    path = []
    for _ in range(1000):
        path.append(0.5 / learner.kl_coef**2)
        learner.follow_kl(path[-1], params)
    assert abs(path[0] / 6 - 1) > 0.9 and path[-1] == pytest.approx(6, rel=1e-3)
    steps = np.diff(np.log(path))
    assert np.abs(steps).max() < 0.05  # no jump, however far from the target


def test_the_coefficient_of_the_learner_goes_into_the_reward(rollout):
    nothing = torch.zeros(rollout.mask.shape)
    for coefficient in (0.0, 0.7):
        rewards = ppo.token_rewards(rollout, nothing, replace(PARAMS, kl_coef=9.0), coefficient)
        torch.testing.assert_close(rewards, -coefficient * (rollout.logprobs - rollout.ref_logprobs))


# ---------------------------------------------------------------------------------------------------- reward scale

batches_of_scores = st.lists(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=9), min_size=1, max_size=6)


def paid(learner, rows, scores, params):
    """What tokens that are shaped to `rows` are paid where the policy is the reference, and the share clipped."""
    shape = torch.tensor(rows).shape
    nothing, mask = torch.zeros(shape), torch.ones(shape, dtype=torch.bool)
    rollout = Rollout(nothing.long(), mask, nothing.long(), mask, scores, mask[:, 0], nothing, nothing, nothing)
    rewards, logged = learner.pay(rollout, torch.tensor(rows), params)
    return rewards, logged["rewards_clipped"]


@given(batches_of_scores, st.sampled_from([0.0, 1e4]))
def test_rewards_are_divided_by_the_spread_of_all_scores_so_far(batches, shift):
    params, learner, so_far = replace(PARAMS, scale_rewards=True), bare(), []
    for batch in batches:
        so_far += [score + shift for score in batch]
        unit = learner.unit(torch.tensor(so_far[-len(batch) :], dtype=torch.float64), params)
        spread = np.std(so_far, ddof=1) if len(so_far) > 1 else 0.0
        assert learner.moments[0] == len(so_far) and learner.moments[1] == pytest.approx(np.mean(so_far), abs=1e-6)
        if spread > 1e-3:
            assert unit == pytest.approx(spread, rel=1e-4)
        assert 0 < unit < math.inf


@pytest.mark.parametrize("scores", [[2.0], [3.0, 3.0, 3.0]], ids=["one score", "equal scores"])
def test_without_spread_rewards_stay_as_they_are(scores):
    assert bare().unit(torch.tensor(scores), replace(PARAMS, scale_rewards=True)) == 1


def test_what_is_not_asked_for_is_not_done():
    learner, rows = bare(), [[50.0, -3.0], [0.0, 1.0]]
    rewards, cut = paid(learner, rows, torch.tensor([1.0, 5.0]), PARAMS)
    assert rewards.tolist() == rows and cut == 0 and learner.moments == [0, 0, 0]


def test_clipping_bounds_both_signs_and_says_which_share_of_the_rewards_it_cut():
    params = replace(PARAMS, clip_rewards=1.0)
    rewards, cut = paid(bare(), [[3.0, -0.5, 0.0, 0.0], [-7.0, 1.0, 0.5, 0.0]], torch.zeros(2), params)
    assert rewards.tolist() == [[1.0, -0.5, 0.0, 0.0], [-1.0, 1.0, 0.5, 0.0]]
    assert cut == pytest.approx(2 / 5)  # of those that are not zero: a sparse reward has many zeros
    assert paid(bare(), [[0.0] * 3] * 2, torch.zeros(2), params)[1] == 0


def test_clipping_comes_after_scaling():
    both = replace(PARAMS, scale_rewards=True, clip_rewards=1.0)
    scores = torch.tensor([-10.0, 10.0])  # of standard deviation 14.1
    rewards, cut = paid(bare(), [[7.0], [-70.0]], scores, both)
    assert rewards.tolist() == [[pytest.approx(7 / scores.std().item())], [-1.0]] and cut == 0.5


# ---------------------------------------------------------------------------------------------------- signs


def row(update, kl=1.0, length=10.0, entropy=4.0):
    return {"update": update, "kl": kl, "length": length, "entropy": entropy}


def test_every_sign_is_named_once_with_its_first_update():
    history = [row(0), row(1), row(2, entropy=0.39), row(3, kl=11.0), row(4, kl=30.0, entropy=0.1), row(5)]
    signs = diagnose(history)
    assert [(sign.update, sign.name, sign.kind) for sign in signs] == [
        (2, "EntropyCollapse", EntropyCollapse),
        (3, "KLBlowUp", KLBlowUp),
    ]
    assert "1.10 nats a token" in signs[1].text and "10% of the first" in signs[0].text
    assert all("raise ppo.kl_coef or lower ppo.lr" in sign.text for sign in signs)
    assert {sign.kind for sign in signs} == set(SIGNS)


@pytest.mark.parametrize(
    "history",
    [[], [row(0)], [row(0), row(1, kl=10.0, entropy=0.4)], [row(0, entropy=0.0), row(1, entropy=0.0)]],
    ids=["nothing", "one update", "on the bounds", "never any entropy"],
)
def test_a_healthy_history_has_no_sign(history):
    assert diagnose(history) == []


def test_a_longer_history_keeps_the_signs_of_its_beginning():
    history = [row(0), row(1, kl=20.0), row(2), row(3, entropy=0.1)]
    assert diagnose(history[:2]) == diagnose(history)[:1] and len(diagnose(history)) == 2


# ---------------------------------------------------------------------------------------------------- not finite


@pytest.fixture
def learner(policy):
    return ppo.make_learner(policy, PARAMS, seed=0)


def state(learner):
    optimizer, schedule = learner.optimizer.state_dict(), learner.schedule.state_dict()
    return copy.deepcopy((learner.policy.state_dict(), optimizer["state"], schedule, learner.generator.get_state()))


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list | tuple) else a == b


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_raises_before_anything_has_changed(number, learner, rollout):
    ppo.update(learner, rollout, noise_like(rollout.mask), PARAMS)
    before, rewards = state(learner), noise_like(rollout.mask)
    rewards[2, 0] = number
    with pytest.raises(ppo.Diverged, match="not finite: reward; lower ppo.lr or look at the rewards") as raised:
        ppo.update(learner, rollout, rewards, PARAMS)
    assert raised.value.rollout is rollout and not math.isfinite(raised.value.metrics["reward"])
    assert same(before, state(learner))
    assert isinstance(raised.value, ValueError)
    ppo.update(learner, rollout, noise_like(rollout.mask), PARAMS)
    assert all(p.isfinite().all() for p in learner.policy.parameters())


def spoil_old_logprobs(learner, rollout):
    return replace(rollout, logprobs=rollout.logprobs - 1e3)  # a ratio beyond float32


def spoil_values(learner, rollout):
    return replace(rollout, values=rollout.values.masked_fill(rollout.mask, math.inf))


def spoil_gradient(learner, rollout):
    learner.policy.lm.lm_head.weight.register_hook(lambda gradient: gradient * math.nan)
    return rollout


@pytest.mark.parametrize(
    "spoil, names",
    [
        (spoil_old_logprobs, {"policy_loss", "ratio_error", "grad_norm"}),
        (spoil_values, {"policy_loss", "value_loss"}),
        (spoil_gradient, {"grad_norm"}),
    ],
)
def test_a_loss_or_gradient_that_is_not_finite_is_named_and_reaches_no_weight(spoil, names, learner, rollout):
    """The generator has drawn the order of the epoch by then; weights, moments and schedule are as they were."""
    ppo.update(learner, rollout, noise_like(rollout.mask), PARAMS)
    before, spoilt = state(learner), spoil(learner, rollout)
    with pytest.raises(ppo.Diverged) as raised:
        ppo.update(learner, spoilt, noise_like(rollout.mask), PARAMS)
    bad = {name for name, value in raised.value.metrics.items() if not math.isfinite(value)}
    assert names <= bad and all(name in str(raised.value) for name in bad)
    if spoil is spoil_gradient:
        assert bad == {"grad_norm"}
    assert same(before[:3], state(learner)[:3])
    assert all(p.grad is None for p in learner.policy.parameters())


def test_steps_before_the_one_that_diverged_remain(policy, rollout):
    """Each is a whole and finite step; a training that diverged stops and is not resumed from here."""
    learner, seen = ppo.make_learner(policy, PARAMS, seed=0), []

    def third_is_bad(gradient):
        seen.append(1)
        return gradient * (math.nan if len(seen) == 3 else 1)

    policy.lm.lm_head.weight.register_hook(third_is_bad)
    steps = []
    learner.optimizer.register_step_post_hook(lambda *_: steps.append(copy.deepcopy(policy.state_dict())))
    with pytest.raises(ppo.Diverged, match="grad_norm"):
        ppo.update(learner, rollout, noise_like(rollout.mask), PARAMS)
    assert len(steps) == 2 and same(steps[-1], policy.state_dict())
    assert all(weight.isfinite().all() for weight in policy.state_dict().values())


def test_metrics_that_are_finite_are_not_blamed(rollout):
    error = ppo.Diverged({"a": 1.0, "b": math.inf, "c": math.nan}, rollout)
    assert "finite: b, c;" in str(error) and str(ppo.Diverged({"b": math.nan}, rollout, "said")) == "said"


SHORT = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.00 GiB "
    "is free. Including non-PyTorch memory, this process has 78.00 GiB memory in use."
)


@pytest.mark.parametrize(
    "step, field",
    [
        ("the policy learns", "ppo.micro_batch"),
        ("coalitions are scored", "reward.token_budget"),
        ("attention explains", "reward.token_budget"),
    ],
)
def test_too_little_memory_names_what_to_lower(step, field, learner, reward_model, rollout, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError(SHORT)

    monkeypatch.setattr(learner.policy.lm.model.layers[0], "forward", full)
    monkeypatch.setattr(reward_model.model.model.layers[0], "forward", full)
    acts = {
        "the policy learns": lambda: ppo.update(learner, rollout, noise_like(rollout.mask), PARAMS),
        "coalitions are scored": lambda: attribute(reward_model, rollout, ["shap"], AttributionParams()),
        "attention explains": lambda: attribute(reward_model, rollout, ["attention"], AttributionParams()),
    }
    wanted = f"while {step}: Tried to allocate 20.00 GiB; GPU 0 has .* 1.00 GiB is free. Lower {field}, or see .*check"
    with pytest.raises(InputError, match=wanted):
        acts[step]()


# ---------------------------------------------------------------------------------------------------- rates


def test_the_value_head_alone_has_its_own_rate(policy, reference):
    separate = PolicyWithValue(policy.lm, critic="separate", value_trunk=copy.deepcopy(reference.lm.model))
    for made in (policy, separate):
        trunk, head = ppo.make_learner(made, replace(PARAMS, value_lr=0.5), 0).optimizer.param_groups
        assert (trunk["lr"], head["lr"]) == (PARAMS.lr, 0.5)
        assert set(map(id, head["params"])) == set(map(id, made.value_head.parameters()))
        rest = {id(p) for p in made.parameters() if p.requires_grad} - set(map(id, head["params"]))
        assert set(map(id, trunk["params"])) == rest


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_used_again():
    def new_pages():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.empty(2**18).fill_(1) for _ in range(32)]  # 32 MiB, which would be given back at once
        del blocks
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    keep_freed_memory()
    assert min(new_pages() for _ in range(3)) < 200  # of 8192
