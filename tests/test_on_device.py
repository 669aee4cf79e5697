"""Tests on another device: what a test makes is there, and what a card would refuse is found without one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from on_device import PRETENDED, OnDevice, Pretended

TESTS = Path(__file__).parent
pytestmark = pytest.mark.skipif("DENSE_RLHF_TEST_DEVICE" in __import__("os").environ, reason="they set the device")


@pytest.mark.parametrize("file, device", [("test_a.py", "meta"), ("ppo/test_a.py", "meta"), ("/elsewhere/b.py", "cpu")])
def test_what_files_of_tests_make_is_there_in_whatever_folder(file, device):
    made = {"torch": torch}
    with OnDevice("meta"):
        exec(compile("x = torch.zeros(2)\ny = torch.tensor([1.0], device='cpu')", TESTS / file, "exec"), made)
    assert (made["x"].device.type, made["y"].device.type) == (device, "cpu")


def on_card(*shape):
    return torch.arange(6.0).reshape(shape).to("cpu:0")


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x + torch.ones(2, 3),
        lambda x: torch.cat([x, torch.ones(2, 3)]),
        lambda x: torch.ones(2, 3).index_select(0, x[:, 0].long()),
        lambda x: torch.ones(6)[x.long()],
        lambda x: torch.nn.Linear(3, 2)(x),
        lambda x: x.numpy(),
        lambda x: np.asarray(x),
        lambda x: x.normal_(generator=torch.Generator()),
        lambda x: torch.equal(x, torch.ones(2, 3)),
        lambda x: (x.detach().view(-1)[1:] * 2).square() - x.cpu().view(-1)[1:],
    ],
)
def test_what_a_card_refuses_is_refused(act):
    with Pretended(), pytest.raises((RuntimeError, TypeError), match="cuda"):
        act(on_card(2, 3))


def test_what_a_card_does_is_done():
    with Pretended():
        x = on_card(2, 3).requires_grad_()
        model = torch.nn.Linear(3, 2).to(x.device)
        model(x * torch.tensor(2.0)).sum().backward()  # a number may be anywhere
        made = (x.grad, next(model.parameters()).grad, x[torch.tensor([0])], torch.zeros(2, device=x.device), x.data)
        assert {one.device for one in made} == {PRETENDED} and x.cpu().device == torch.device("cpu") != PRETENDED
        assert x.detach().cpu().numpy().shape == (2, 3) and x.sum().item() == 15 and x.tolist()[0][1] == 1
        torch.ones(2, 3).copy_(x), x.detach().copy_(torch.ones(2, 3))  # copies cross over


@pytest.mark.parametrize("draw", [torch.nn.init.normal_, torch.Tensor.normal_, torch.nn.init.uniform_])
def test_a_generator_of_the_cpu_draws_the_same_numbers_for_every_device(draw):
    wanted = draw(torch.zeros(4), generator=torch.Generator().manual_seed(0))
    with Pretended(), OnDevice("cpu:0"):
        there = torch.zeros(4)
        draw(there, generator=torch.Generator().manual_seed(0))
        assert there.device == PRETENDED
        there = there.cpu()
    assert torch.equal(there, wanted)
