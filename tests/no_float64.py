"""The solvers on an emulated accelerator without float64, as Apple's GPUs are.

A script, run in a process of its own: a kind of device is registered once and for all.
"""

import emulated
import torch
from emulated import KIND, There, elsewhere

from ngc_etf.nearest import nearest_etf
from ngc_etf.procrustes import _derivative, _polar, polar
from ngc_etf.proximal import procrustes_target
from ngc_etf.simplex import haar_direction, standard_etf


def on_both(solver, H, U_prox, v):
    "(on the device, on the CPU) of each result: the solution of (7), that of (6), the derivative."
    P = procrustes_target(H, U_prox, 0.1)
    here = [nearest_etf(H, U_prox, 0.1, solver), nearest_etf(H, start=U_prox)]
    here.append(_derivative(P, *_polar(P, solver, None, True), v))
    with elsewhere(), torch.no_grad():
        H, U_prox, v, P = (There(X) for X in (H, U_prox, v, P))
        there = [nearest_etf(H, U_prox, 0.1, solver), nearest_etf(H, start=U_prox)]
        there.append(_derivative(P, *_polar(P, solver, None, True), v))
        assert polar(there[0]).device.type == KIND
    assert all(type(X) is There and X.device.type == KIND for X in there)
    return [(X.inner, Y) for X, Y in zip(there, here)]


def main():
    emulated.begin(float64=False)
    g = torch.Generator().manual_seed(0)
    H = torch.randn(12, 4, generator=g)
    H[:, 3] = 0  # an absent class
    U_prox, v = haar_direction(12, 4, g), torch.randn(12, 4, generator=g)
    try:
        There(H).double()
        raise AssertionError("the emulated device took a float64")
    except TypeError:
        pass
    with elsewhere(), torch.no_grad():
        U = haar_direction(12, 4, dtype=torch.float32, device=KIND)
    assert U.device.type == KIND and (U.inner.T @ U.inner - torch.eye(4)).abs().max() < 1e-5
    collapsed = U_prox @ standard_etf(4)
    for solver in ("auto", "svd", "gram", "newton_schulz"):
        for means in (H / H.norm(), collapsed):
            for there, here in on_both(solver, means, U_prox, v):
                assert (there - here).abs().max() < 1e-4 * max(1, here.abs().max()), solver


if __name__ == "__main__":
    main()
