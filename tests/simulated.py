"""A device that is called cuda and computes on the CPU: what runs on it runs as on a GPU, but for the arithmetic.

As there, tensors of both devices in one operation are an error. What makes the host wait for the device is counted, and
an error where it is forbidden. Storage is shared and viewed as ever, so what is written in place is seen where it would
be. Captures are not simulated.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
# The host reads a value, or the shape of a result.
WAITS = {aten.item, aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.allclose, aten.nonzero, aten.bincount}
WAITS |= {aten.masked_select, aten._unique2, aten.unique_consecutive, aten.repeat_interleave}
READS = {Tensor.item, Tensor.tolist, Tensor.__int__, Tensor.__float__, Tensor.__bool__, Tensor.__index__}
INDEXING = {Tensor.__getitem__, Tensor.__setitem__}
COPIES = {Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.copy_}


class OnDevice(Tensor):
    """`data`, a tensor of the CPU, as one of the device. Without `simulated` nothing can be done with it."""

    @staticmethod
    def __new__(cls, data: Tensor):
        layout = dict(strides=data.stride(), storage_offset=data.storage_offset(), dtype=data.dtype)
        made = Tensor._make_wrapper_subclass(cls, data.shape, **layout, device=CUDA)
        made.inner = data
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} did not run on the simulated device")


def inner(leaf):
    return leaf.inner if isinstance(leaf, OnDevice) else leaf


def is_device(leaf) -> bool:
    return isinstance(leaf, torch.device) or (isinstance(leaf, str) and leaf in ("cuda", "cpu"))


class Device(TorchFunctionMode):
    """waits: how often the host waited, by what made it wait. While it is `forbidden` to, that is an error."""

    def __init__(self):
        super().__init__()
        self.waits, self.forbidden = Counter(), False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (Tensor.device.__get__, Tensor.is_cuda.__get__):
            there = isinstance(args[0], OnDevice)
            return there if function == Tensor.is_cuda.__get__ else (CUDA if there else CPU)
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        ours = [leaf for leaf in tensors if isinstance(leaf, OnDevice)]
        strangers = [leaf for leaf in tensors if not isinstance(leaf, OnDevice) and leaf.dim()]
        there, kwargs = bool(ours), dict(kwargs)
        named = [torch.device(leaf) for leaf in leaves if is_device(leaf)]
        if function in COPIES:
            there = self.copied(function, named, args, kwargs)
        elif named:
            there = named[0].type == "cuda"
            if function is torch.tensor and there:
                self.wait("a copy to the device")
        if function in INDEXING and strangers and isinstance(args[0], OnDevice):
            assert function == Tensor.__getitem__ or not any(leaf is args[-1] for leaf in strangers), (
                "a value on the cpu"
            )
            self.wait("an index on the cpu")
        elif function in INDEXING and any(leaf.dtype == torch.bool or not leaf.dim() for leaf in ours[1:]):
            self.wait("a mask or a number as index")
        elif function not in COPIES:
            assert not (ours and strangers), f"{function.__name__} of tensors on cuda and on the cpu"
        pinned = kwargs.pop("pin_memory", False)
        args, kwargs = tree_map(lambda leaf: CPU if is_device(leaf) else inner(leaf), (args, kwargs))
        if function in READS and ours:
            self.wait(function.__name__)
            return function(*args)
        with Waiting(self) if ours else nullcontext():
            out = function(*args, **kwargs)
        known = {id(leaf.inner): leaf for leaf in ours}  # what is done in place returns the tensor that it got

        def outer(leaf):
            return known[id(leaf)] if id(leaf) in known else OnDevice(leaf) if isinstance(leaf, Tensor) else leaf

        if isinstance(out, Tensor) and pinned:
            out.pinned = True
        return tree_map(outer, out) if there else out

    def copied(self, function, named: list[torch.device], args, kwargs) -> bool:
        """Whether the result is on the device. The host waits unless pinned memory is copied without blocking."""
        if function is Tensor.copy_:
            target, source = (isinstance(tensor, OnDevice) for tensor in args[:2])
            host = args[0] if source else args[1]
            free = (kwargs.get("non_blocking") or args[2:] == (True,)) and getattr(host, "pinned", False)
        else:
            source, free = isinstance(args[0], OnDevice), False
            target = function is Tensor.cuda or (function is not Tensor.cpu and source)
            target = named[0].type == "cuda" if named else target
        if source != target and not free:
            self.wait("a copy to the device" if target else "a copy to the host")
        return target

    def wait(self, what: str) -> None:
        assert not self.forbidden, f"the host waits for the device: {what}"
        self.waits[what] += 1


class Waiting(TorchDispatchMode):
    """Notices what waits inside of one function."""

    def __init__(self, device: Device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in WAITS:
            self.device.wait(str(function.overloadpacket))
        return function(*args, **(kwargs or {}))


class Event:
    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


@contextmanager
def simulated() -> Iterator[Device]:
    with patch("torch.cuda.Event", Event), Device() as device:
        yield device


def moved(model: nn.Module) -> nn.Module:
    """The model, on the simulated device."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(OnDevice(parameter.detach()), requires_grad=False))
    return model
