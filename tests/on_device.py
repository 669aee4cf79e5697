"""Tensors that tests make, on another device; those of the package are made where it makes them.

    DENSE_RLHF_TEST_DEVICE=cuda python -m pytest tests/ppo tests/attribution tests/models
    DENSE_RLHF_TEST_DEVICE=cpu:0 python -m pytest ...    where there is no card: `Pretended` refuses what one would

The second finds tensors on two devices, arrays of tensors on a card, and generators of another device.
"""

import sys
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

HERE = Path(__file__).parent
FACTORIES = {*_device_constructors(), torch.from_numpy}
TO_NUMPY = {torch.Tensor.numpy, torch.Tensor.__array__}
PRETENDED = torch.device("cpu:0")  # not equal to "cpu", where all tensors really are


class OnDevice(TorchFunctionMode):
    """What a file of tests asks of torch itself: new tensors go to `device`, arrays come from it.

    Where it draws with a generator of the CPU it draws there, so that every device sees the same numbers.
    """

    def __init__(self, device: str):
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        caller = Path(sys._getframe(1).f_code.co_filename)
        if HERE not in caller.parents and getattr(function, "__module__", "") != "torch.nn.init":
            return function(*args, **kwargs)
        if function in FACTORIES:
            given = kwargs.get("device")
            return function(*args, **kwargs) if given else function(*args, **kwargs).to(self.device)
        drawn = getattr(kwargs.get("generator"), "device", None)
        if function not in TO_NUMPY and drawn != torch.device("cpu"):
            return function(*args, **kwargs)
        first, at_home = (
            args[0] if args else kwargs.get("tensor"),
            lambda x: x.cpu() if isinstance(x, torch.Tensor) else x,
        )
        result = function(*map(at_home, args), **{name: at_home(x) for name, x in kwargs.items()})
        if function in TO_NUMPY:
            return result
        return first.data.copy_(result) if function.__name__.endswith("_") else result.to(self.device)


# ---------------------------------------------------------------------------------------------------- without a card

MIXED = {
    "copy_",
    "to",
    "__set__",
    "type_as",
    "__setitem__",
    "_has_compatible_shallow_copy_type",
}  # take tensors of two devices
INDEXED = {"__getitem__", "index_put_", "index_put"}  # and these indices of the CPU
BACK = {"tolist", "item", "cpu", "__bool__", "__int__", "__float__", "__index__", "__format__", "__repr__", "__len__"}


class Pretended(TorchFunctionMode):
    """Some tensors, marked, count as on a card: they say so, and what has one among its arguments is on it too.

    Raises where CUDA would: a tensor of either device in one operation, unless it is a number; an array of a tensor on
    the card; a draw there by a generator of the CPU. Knows Python's calls only, not what happens within torch.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        tensors = list(_tensors((args, kwargs)))
        there = [x for x in tensors if hasattr(x, "pretended")]
        if function == torch.Tensor.device.__get__:
            return PRETENDED if there else torch.device("cpu")
        if function == torch.Tensor.is_cuda.__get__:
            return bool(there)
        if there and function in TO_NUMPY:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        self._one_device(name, tensors, there, kwargs)
        target = _target(name, args, kwargs)
        made = function(*args, **kwargs)
        if name in ("to", "cpu") and target is not None and (target == PRETENDED) != bool(there):
            made = made.clone() if made is tensors[0] else made
        if name == "__set__" and len(tensors) == 2 and hasattr(args[1], "pretended"):
            args[0].pretended = True
        there = target == PRETENDED if target is not None else bool(there)
        for x in _tensors(made) if name not in ("__set__",) else ():
            if there and name not in BACK:
                x.pretended = True
            elif target is not None and hasattr(x, "pretended"):
                del x.pretended
        return made

    def _one_device(self, name, tensors, there, kwargs) -> None:
        others = [x for x in tensors if not hasattr(x, "pretended") and x.ndim]
        if there and others and name not in MIXED:
            if name not in INDEXED or not hasattr(tensors[0], "pretended"):
                raise RuntimeError(f"{name}: expected all tensors on one device, found two, cuda:0 and cpu")
        drawn = getattr(kwargs.get("generator"), "device", None)
        if there and drawn == torch.device("cpu"):
            raise RuntimeError(f"{name}: expected a generator of cuda:0, found one of the cpu")


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _target(name, args, kwargs):
    """The device that a call names, if it does."""
    if name == "cpu":
        return torch.device("cpu")
    given = [kwargs.get("device"), *(args[1:] if name == "to" else ())]
    for one in given:
        if isinstance(one, torch.Tensor):
            return one.device
        if isinstance(one, torch.device) or (isinstance(one, str) and one.partition(":")[0] in ("cpu", "cuda", "meta")):
            return torch.device(one)
    return None


def pretend() -> None:
    """From now on there seems to be a card, `cpu:0`."""
    from dense_rlhf.models import language_models

    made_of = torch.Tensor._make_subclass  # parameters, of a tensor

    def make_subclass(kind, data, *options):
        made = made_of(kind, data, *options)
        if hasattr(data, "pretended"):
            made.pretended = True
        return made

    torch.Tensor._make_subclass = make_subclass
    language_models.default_device = lambda: PRETENDED
    Pretended().__enter__()
