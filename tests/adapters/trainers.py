"""verl, OpenRLHF and SkyRL in an environment of their own, 2 GB: `python tests/adapters/trainers.py` makes it."""

import importlib
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from dense_rlhf import ppo
from dense_rlhf.adapters.group import group_to_go
from dense_rlhf.evaluation import environment

HERE = Path(__file__).parent
LOCK = HERE / "trainers.txt"
OPTIONS = ("--no-deps", "--require-hashes", "--ignore-requires-python")  # the lock names all, and SkyRL asks for 3.12
GROUPS = ["a"] * 3 + ["b"] * 3
GAMMA, LAM, KL_COEF = 1.0, 0.95, 0.1


def batch() -> dict:
    """Two prompts of three ragged responses; token rewards, and the same scores paid at the last tokens."""
    rng = np.random.default_rng(0)
    lengths = [4, 2, 5, 3, 1, 6]
    texts = [rng.integers(10, 90, n).tolist() for n in lengths]
    dense, values = ([rng.normal(size=n).astype(np.float32) for n in lengths] for _ in range(2))
    kl = [0.1 * rng.normal(size=n) for n in lengths]
    sparse = [[0.0] * (len(row) - 1) + [float(row.sum())] for row in dense]
    numbers = {"dense": dense, "values": values, "kl": kl}
    numbers = {name: [row.tolist() for row in rows] for name, rows in numbers.items()} | {"sparse": sparse}
    settings = {"groups": GROUPS, "gamma": GAMMA, "lam": LAM, "kl_coef": KL_COEF}
    prompts = [[3, 4, 5]] * 3 + [[6, 7]] * 3
    return {"prompt_ids": prompts, "response_ids": texts} | numbers | settings


def asked(trainer: str) -> dict:
    """What `trainer`'s own code makes of `batch()`; skips where its environment is not made."""
    python = environment.place("trainers", LOCK)
    if not python.exists():
        pytest.skip("the trainers' environment is not made: python tests/adapters/trainers.py")
    settings = os.environ | {"PYTHONPATH": str(HERE.parent.parent), "OMP_NUM_THREADS": "1"}
    settings |= {"VERL_USE_EXTERNAL_MODULES": "dense_rlhf.adapters.verl"}
    command = [str(python), str(HERE / "in_trainers" / f"run_{trainer}.py")]
    done = subprocess.run(command, input=json.dumps(batch()), capture_output=True, text=True, env=settings)
    assert not done.returncode, done.stderr[-2000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer.pop("version") == re.search(f"^{trainer}==([^ ]+)", LOCK.read_text(), re.MULTILINE)[1]
    assert answer.pop("heavy") == []  # of our requirements, an adapter needs none that its trainer lacks
    return answer


def on_stand_ins(monkeypatch, adapter: str, **attributes: dict) -> ModuleType:
    """The adapter, imported where modules with these attributes stand in for its trainer's; "__" is a dot."""
    for path, names in attributes.items():
        module = ModuleType(path.replace("__", "."))
        vars(module).update(names, __path__=[])
        monkeypatch.setitem(sys.modules, module.__name__, module)
    importlib.import_module(f"dense_rlhf.adapters.{adapter}")
    return sys.modules.pop(f"dense_rlhf.adapters.{adapter}")


def padded(rows) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.float32) for row in rows], batch_first=True)


def mask() -> torch.Tensor:
    return padded([[1] * len(row) for row in batch()["dense"]]).bool()


def compared(ours: torch.Tensor, theirs) -> None:
    """Equal to 1e-5 at the tokens of responses; `theirs` padded to the right, or ragged."""
    theirs = padded(theirs)
    assert theirs.shape == ours.shape
    torch.testing.assert_close(theirs[mask()], ours[mask()], atol=1e-5, rtol=0)


def rewards(kind: str = "dense", kl_coef: float = 0.0) -> torch.Tensor:
    """(B, T), less the KL penalty."""
    return padded(batch()[kind]) - kl_coef * padded(batch()["kl"])


def gae(paid: torch.Tensor) -> torch.Tensor:
    return ppo.gae(paid, padded(batch()["values"]), mask(), GAMMA, LAM)


def to_go(paid: torch.Tensor) -> torch.Tensor:
    return ppo.gae(paid, torch.zeros_like(paid), mask(), 1.0, 1.0)


to_go_in_group = partial(group_to_go, mask=mask(), groups=GROUPS)

if __name__ == "__main__":
    print(environment.python("trainers", LOCK, "and that it has PyTorch's CPU build (locks/README.md)", OPTIONS))
