"""The values that flow through a study refuse what does not fit."""

from dataclasses import replace

import pytest
import torch

from dense_rlhf.types import Attribution, InputError, RewardShape, Rollout


def tiny_rollout(**changes) -> Rollout:
    B, P, T = 3, 2, 4
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    fields = {
        "queries": torch.ones(B, P, dtype=torch.long),
        "query_mask": torch.ones(B, P, dtype=torch.bool),
        "responses": torch.ones(B, T, dtype=torch.long),
        "mask": mask,
        "logprobs": torch.zeros(B, T),
        "ref_logprobs": torch.zeros(B, T),
        "values": torch.zeros(B, T),
        "scores": torch.zeros(B),
        "ended": torch.tensor([True, False, True]),
    }
    return Rollout(**fields | changes)


def test_players_leave_out_the_eos_only_of_ended_responses():
    wanted = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    assert torch.equal(tiny_rollout().players, wanted)


@pytest.mark.parametrize("name", ["query_mask", "logprobs", "ref_logprobs", "values", "mask"])
def test_rollout_names_the_field_of_another_shape(name):
    with pytest.raises(InputError, match=name):
        tiny_rollout(**{name: getattr(tiny_rollout(), name)[:, :1]})


@pytest.mark.parametrize("name", ["scores", "ended", "queries"])
def test_rollout_refuses_another_batch_size(name):
    with pytest.raises(InputError):
        tiny_rollout(**{name: getattr(tiny_rollout(), name)[:2]})


@pytest.mark.parametrize("row", [[0, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]], ids=["left-padded", "with a hole", "empty"])
def test_rollout_refuses_a_mask_that_is_not_right_padded(row):
    mask = tiny_rollout().mask.clone()
    mask[1] = torch.tensor(row).bool()
    with pytest.raises(InputError, match="mask"):
        tiny_rollout(mask=mask)


def test_rollout_refuses_queries_that_are_not_left_padded():
    query_mask = tiny_rollout().query_mask.clone()
    query_mask[1] = torch.tensor([1, 0]).bool()
    with pytest.raises(InputError, match="padded on the left only"):
        tiny_rollout(query_mask=query_mask)


def test_a_response_to_nothing_can_be_explained_but_not_read_by_a_policy():
    nothing = tiny_rollout(query_mask=torch.zeros(3, 2, dtype=torch.bool))
    with pytest.raises(InputError, match="a prompt has no tokens"):
        nothing.rows()


def test_rollout_refuses_a_mask_that_is_not_boolean():
    with pytest.raises(InputError, match="boolean"):
        tiny_rollout(mask=tiny_rollout().mask.long())


def test_values_are_frozen():
    with pytest.raises(AttributeError):
        tiny_rollout().scores = torch.ones(3)


def test_attribution_checks_shapes():
    good = Attribution("x", torch.zeros(2, 3), torch.zeros(2), torch.zeros(2), 0, 0)
    with pytest.raises(InputError, match="credit"):
        replace(good, credit=torch.zeros(2))
    for name in ("baseline", "gap"):
        with pytest.raises(InputError, match=name):
            replace(good, **{name: torch.zeros(3)})


@pytest.mark.parametrize(
    "weights",
    [(0.5, 0.6), (1.5, -0.5), (float("nan"), 1.0), (1.0,), (0.2, 0.3, 0.5), (None, 1.0), ("1", 0.0), (True, 0)],
)
def test_shape_refuses_weights_off_the_simplex(weights):
    with pytest.raises(InputError, match="shape.weights"):
        RewardShape(("shap", "terminal"), weights)


def test_a_weight_that_rounding_left_just_below_zero_is_zero():
    shape = RewardShape(("shap", "terminal", "lime"), (1.0, -1e-17, 0.0))
    assert shape.weighted == ("shap",)
    with pytest.raises(InputError, match="sum to 1, to 1e-06"):
        replace(shape, weights=(1.00001, -1e-5, 0.0))


@pytest.mark.parametrize(
    "change, word",
    [
        ({"normalise": "l2"}, "normalise"),
        ({"sources": ("a", "a")}, "sources names a source twice"),
        *(
            ({"temperature": t}, "shape.temperature is .* or 2 of them")
            for t in (0.0, float("nan"), float("inf"), (), (1.0,), (1.0, 0.0), (1.0, 1.0, 1.0))
        ),
        ({"features": ("p", "p"), "slopes": ((1.0, 1.0),) * 2}, "features names a feature twice"),
        *(
            ({"features": ("p", "q"), "slopes": slopes}, "shape.slopes is .* each of 2 sources, .* each of 2 features")
            for slopes in (
                (),
                ((1.0, 1.0),),
                ((1.0, 1.0), (1.0,)),
                ((1.0, 1.0), (1.0, float("nan"))),
                ((1.0, 1.0), (float("inf"), 1.0)),
                ((1.0, 1.0),) * 3,
            )
        ),
        ({"slopes": ((1.0,), (1.0,))}, "none without features"),
    ],
)
def test_shape_refuses(change, word):
    good = RewardShape(("shap", "terminal"), (0.25, 0.75))
    with pytest.raises(InputError, match=word):
        replace(good, **change)


def test_a_shape_depends_on_context_where_slopes_of_weighted_sources_differ():
    good = RewardShape(("shap", "terminal"), (0.0, 1.0), "softmax", (1.0, 2.0), ("p", "q"), ((0.0, 0.0), (0.0, -1.0)))
    mixed, alike = replace(good, weights=(0.5, 0.5)), ((0.0, -1.0),) * 2
    assert mixed.is_contextual and not good.is_contextual and not replace(mixed, slopes=alike).is_contextual
    assert good.weighted == ("terminal",) and good.temperature_of("terminal") == 2
    assert replace(good, temperature=3.0).temperature_of("another") == 3
