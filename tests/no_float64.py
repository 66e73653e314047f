"""An accelerator without float64, as Apple's GPUs are, emulated; run as a script it tries the solvers there.

Its tensors say that they are on a device of the kind "apple". The work is done on the CPU.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from ngc_etf import procrustes
from ngc_etf.nearest import nearest_etf
from ngc_etf.procrustes import _derivative, _polar, polar
from ngc_etf.proximal import procrustes_target
from ngc_etf.simplex import haar_direction, standard_etf

KERNELS = {_polar: procrustes._polar_kernel, _derivative: procrustes._derivative_kernel}


class Apple(torch.Tensor):
    "A tensor on the emulated device."

    @staticmethod
    def __new__(cls, inner):
        if inner.dtype == torch.float64:
            raise TypeError("Cannot convert an apple Tensor to float64 dtype: the device has none")
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), dtype=inner.dtype, device="apple"
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return on_apple(func, args, kwargs or {})


def on_apple(func, args, kwargs):
    "Run func on the inner tensors; the result is on the device that is named, or else on the arguments'."
    if func in KERNELS:
        with Factories():  # a mode is off while it handles a call
            return KERNELS[func](*args, **kwargs)
    named = kwargs.get("device")
    if named is None:
        there = any(isinstance(x, Apple) for x in tree_leaves((args, kwargs)))
    else:
        there = torch.device(named).type == "apple"
        kwargs = kwargs | {"device": "cpu"}
    args, kwargs = tree_map_only(Apple, lambda x: x.inner, (args, kwargs))
    result = func(*args, **kwargs)
    return tree_map_only(torch.Tensor, Apple, result) if there else result


class Factories(TorchDispatchMode):
    "Factories on the device, and copies to it: calls none of whose arguments is there yet."

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.to.device:
            func, kwargs = torch.ops.aten._to_copy.default, dict(device=args[1], dtype=args[2])
            args = args[:1]
        if torch.device(kwargs.get("device") or "cpu").type == "apple":
            return on_apple(func, args, kwargs)
        return func(*args, **kwargs)


def on_both(solver, H, U_prox, v):
    "(on the device, on the CPU) of each result: the solution of (7), that of (6), the derivative."
    P = procrustes_target(H, U_prox, 0.1)
    here = [nearest_etf(H, U_prox, 0.1, solver), nearest_etf(H, start=U_prox)]
    here.append(_derivative(P, *_polar(P, solver, None, True), v))
    with Factories(), torch.no_grad():
        H, U_prox, v, P = (Apple(X) for X in (H, U_prox, v, P))
        there = [nearest_etf(H, U_prox, 0.1, solver), nearest_etf(H, start=U_prox)]
        there.append(_derivative(P, *_polar(P, solver, None, True), v))
        assert polar(there[0]).device.type == "apple"
    assert all(type(X) is Apple and X.device.type == "apple" for X in there)
    return [(X.inner, Y) for X, Y in zip(there, here)]


def main():
    _setup_privateuseone_for_python_backend("apple")
    g = torch.Generator().manual_seed(0)
    H = torch.randn(12, 4, generator=g)
    H[:, 3] = 0  # an absent class
    U_prox, v = haar_direction(12, 4, g), torch.randn(12, 4, generator=g)
    try:
        Apple(H).double()
        raise AssertionError("the emulated device took a float64")
    except TypeError:
        pass
    with Factories(), torch.no_grad():
        U = haar_direction(12, 4, dtype=torch.float32, device="apple")
    assert U.device.type == "apple" and (U.inner.T @ U.inner - torch.eye(4)).abs().max() < 1e-5
    collapsed = U_prox @ standard_etf(4)
    for solver in ("auto", "svd", "gram", "newton_schulz"):
        for means in (H / H.norm(), collapsed):
            for there, here in on_both(solver, means, U_prox, v):
                assert (there - here).abs().max() < 1e-4 * max(1, here.abs().max()), solver


if __name__ == "__main__":
    main()
