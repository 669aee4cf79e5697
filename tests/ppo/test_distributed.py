"""Several processes make the update of one, on CPU through gloo; under NCCL the same code was never run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from one_of_several import KINDS, leave
from safetensors.torch import load_file

WORKER = Path(__file__).parent / "one_of_several.py"


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What two processes left, and what this one does alone."""
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command, env = [*torchrun, str(WORKER), str(two)], os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    leave(one)
    return two, one


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_make_the_update_of_one(kind, both):
    """Weights and metrics after two updates of two epochs of three mini-batches, with a restart between them."""
    weights, wanted = (load_file(folder / f"{kind}.safetensors") for folder in both)
    assert weights.keys() == wanted.keys() and len(weights) > 3
    for name in wanted:
        assert torch.allclose(weights[name], wanted[name], atol=1e-5), name
    for theirs, ours in zip(*(json.loads((folder / f"{kind}.json").read_text()) for folder in both)):
        assert theirs == pytest.approx(ours, abs=1e-5, rel=1e-4)
