"""An accelerator emulated on the CPU: its tensors say that they are elsewhere, and refuse to meet any other.

A process emulates one kind of device, named once and for all. What runs there runs inside `elsewhere()`.
"""

from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from ngc_etf import procrustes

KIND = "emulated"
KERNELS = {
    procrustes._polar: procrustes._polar_kernel,
    procrustes._derivative: procrustes._derivative_kernel,
}
COPY = torch.ops.aten.copy_.default
READ = torch.ops.aten._local_scalar_dense.default

has_float64 = True
reads = []  # what was copied to the host, or read by it


class There(torch.Tensor):
    "A tensor on the emulated device."

    @staticmethod
    def __new__(cls, inner):
        if inner.dtype == torch.float64 and not has_float64:
            raise TypeError("Cannot convert a tensor to float64 dtype: the device has none")
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=f"{KIND}:0",
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return call(func, args, kwargs or {})

    def as_subclass(self, cls):
        "It stays what it is: fastai would make its own kind of it."
        return self


def is_there(device):
    return device is not None and torch.device(device).type == KIND


def call(func, args, kwargs):
    "Run func on the inner tensors; the result is on the device that is named, or else the arguments'."
    if func in KERNELS:
        with Dispatch():  # a mode is off while it handles a call
            return KERNELS[func](*args, **kwargs)
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours = {id(x.inner): x for x in tensors if isinstance(x, There)}
    named = kwargs.get("device")
    there = bool(ours) if named is None else is_there(named)
    if func is COPY:
        there = isinstance(args[0], There)
    elif ours and any(x.dim() > 0 and not isinstance(x, There) for x in tensors):
        raise RuntimeError(f"{func}: some tensors are on the device and some are not")
    if ours and (func is READ or not there):
        reads.append(func)
    if named is not None:
        kwargs = kwargs | {"device": "cpu"}
    args, kwargs = tree_map_only(There, lambda x: x.inner, (args, kwargs))
    result = func(*args, **kwargs)
    return tree_map_only(torch.Tensor, lambda x: put(ours, x), result) if there else result


def put(ours, x):
    "x on the device; an argument that comes back, as in-place operations return one, is that argument."
    if isinstance(x, There):
        return x
    return ours[id(x)] if id(x) in ours else There(x)


class Dispatch(TorchDispatchMode):
    "Factories on the device, and copies to it: calls none of whose arguments is there yet."

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.to.device:
            func, kwargs = torch.ops.aten._to_copy.default, dict(device=args[1], dtype=args[2])
            args = args[:1]
        if is_there(kwargs.get("device")) or any(isinstance(x, There) for x in tree_leaves((args, kwargs))):
            return call(func, args, kwargs)
        return func(*args, **kwargs)


class Literals(TorchFunctionMode):
    "`torch.tensor(numbers, device=...)`: made on the host, then moved."

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and is_there(kwargs.get("device")):
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


class Backend(_DummyBackendModule):
    "What torch asks of a kind of device."

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def manual_seed_all(self, seed):
        "Its random numbers are the CPU's."

    def is_available(self):
        return True


def begin(float64=True):
    "Have torch know the kind of device."
    global has_float64
    has_float64 = float64
    _setup_privateuseone_for_python_backend(KIND, backend_module=Backend())


def exchanging(self, fn, recurse=True, apply=nn.Module._apply):
    "As in `nn.Module`, but parameters are exchanged, for their kind changes."
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return apply(self, fn, recurse)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@contextmanager
def elsewhere():
    "Where the device can be named."
    with Dispatch(), Literals(), patch.object(nn.Module, "_apply", exchanging):
        yield
