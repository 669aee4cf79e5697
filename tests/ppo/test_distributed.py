"""Several processes make the update of one, on CPU through gloo; under NCCL the same code was never run."""

import json
import os
import sys

import pytest
from one_of_several import KINDS, leave
from safetensors.torch import load_file
from torch import allclose
from torch.distributed import TCPStore
from whole_runs import command


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What two processes left, and what this one does alone."""
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # the meeting place that torchrun makes
    torchrun = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    torchrun |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    torchrun |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    ranks = [
        command(two, two / f"{rank}.txt", "one_of_several", str(two), **torchrun, RANK=rank, LOCAL_RANK=rank)
        for rank in "01"
    ]
    leave(one)
    assert [rank.wait() for rank in ranks] == [0, 0], [path.read_text()[-3000:] for path in two.glob("?.txt")]
    return two, one


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_make_the_update_of_one(kind, both):
    """Weights and metrics after two updates of two epochs of three mini-batches, with a restart between them."""
    weights, wanted = (load_file(folder / f"{kind}.safetensors") for folder in both)
    assert weights.keys() == wanted.keys() and len(weights) > 3
    for name in wanted:
        assert allclose(weights[name], wanted[name], atol=1e-5), name
    for theirs, ours in zip(*(json.loads((folder / f"{kind}.json").read_text()) for folder in both)):
        assert theirs == pytest.approx(ours, abs=1e-5, rel=1e-4)
