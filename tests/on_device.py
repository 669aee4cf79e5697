"""Tensors that tests make, on another device; those of the package are made where it makes them.

DENSE_RLHF_TEST_DEVICE=cuda python -m pytest tests/attribution/test_engine.py tests/models/test_policy.py
"""

import sys
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

HERE = str(Path(__file__).parent)
FACTORIES = {*_device_constructors(), torch.from_numpy}
TO_NUMPY = {torch.Tensor.numpy, torch.Tensor.__array__}


class OnDevice(TorchFunctionMode):
    """What a file of tests asks of torch itself: new tensors go to `device`, arrays come from it.

    Where it draws with a generator of the CPU it draws there, so that every device sees the same numbers.
    """

    def __init__(self, device: str):
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        caller = sys._getframe(1).f_code.co_filename.rpartition("/")[0]
        if caller != HERE and getattr(function, "__module__", "") != "torch.nn.init":
            return function(*args, **kwargs)
        if function in FACTORIES:
            given = kwargs.get("device")
            return function(*args, **kwargs) if given else function(*args, **kwargs).to(self.device)
        drawn = getattr(kwargs.get("generator"), "device", None)
        if function not in TO_NUMPY and drawn != torch.device("cpu"):
            return function(*args, **kwargs)
        result = function(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in args), **kwargs)
        if function in TO_NUMPY:
            return result
        return args[0].data.copy_(result) if function.__name__.endswith("_") else result.to(self.device)
