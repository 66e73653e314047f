"""The polar factor as an operator of torch: every transform, every order, every device, every driver."""

import subprocess
import sys
import warnings
from copy import deepcopy

import pytest
import torch
import torch._dynamo.testing
import torch.autograd.forward_ad as forward_ad
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.library import opcheck

from ngc_etf import lapack
from ngc_etf.adjoint import vjp_one_cholesky
from ngc_etf.heads import FixedETFHead, NearestETFHead, StandardHead
from ngc_etf.implicit import ddn_jacobian, lagrange_multipliers
from ngc_etf.nearest import nearest_etf
from ngc_etf.procrustes import _derivative, _polar, polar
from ngc_etf.simplex import haar_direction, standard_etf

F64 = torch.float64
CLOSED = ["auto", "svd", "gram", "newton_schulz"]
SPECTRA = {
    "spread": [3.0, 1.0, 0.3],
    "clustered": [1.0, 1.0 + 1e-7, 1.0 - 1e-7],
    "repeated": [1.0, 1.0, 1.0],
    "two_repeated": [2.0, 2.0, 0.5],
}


def haar(d, C, seed=1):
    return haar_direction(d, C, torch.Generator().manual_seed(seed), dtype=F64)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def matrix(spectrum, d=5):
    s = torch.tensor(SPECTRA[spectrum], dtype=F64)
    return haar(d, 3) * s @ haar(3, 3, 2).T


def means(d, C, seed=0):
    H = randn(d, C, seed=seed)
    H = H - H.mean(1, keepdim=True)
    return H / H.norm()


def cubes(P):
    return (polar(P) ** 3).sum()


# ---- derivatives


@pytest.mark.parametrize("d", [3, 5])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("solver", CLOSED)
def test_first_and_second_derivative(solver, spectrum, d):
    P = matrix(spectrum, d).requires_grad_()
    assert gradcheck(lambda P: polar(P, solver), P, check_forward_ad=True, check_batched_grad=d == 3)
    assert gradgradcheck(lambda P: polar(P, solver), P, check_fwd_over_rev=True)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_every_order_of_forward_and_reverse(spectrum):
    P, v, t = matrix(spectrum), randn(5, 3), 1e-5
    assert torch.allclose(jvp(polar, (P,), (v,))[1], vjp(polar, P)[1](v)[0], atol=1e-12)
    second = [a(b(cubes))(P) for a in (jacrev, jacfwd) for b in (jacrev, jacfwd)]
    difference = (grad(cubes)(P + t * v) - grad(cubes)(P - t * v)) / (2 * t)
    for H in second:
        assert ((H * v).sum((-2, -1)) - difference).abs().max() < 1e-6
    third = [a(b(c(cubes)))(P) for a in (jacrev, jacfwd) for b in (jacrev, jacfwd) for c in (jacrev, jacfwd)]
    difference = (hessian(cubes)(P + t * v) - hessian(cubes)(P - t * v)) / (2 * t)
    for T in third:
        assert ((T * v).sum((-2, -1)) - difference).norm() < 1e-6 * difference.norm()


def test_second_order_term_is_there_though_the_gradient_of_U_is_a_constant():
    "What was lost in silence: v is a constant, so a gradient on detached numbers has no graph."
    P, w = matrix("spread").requires_grad_(), randn(5, 3)
    (g,) = torch.autograd.grad((polar(P) * w).sum(), P, create_graph=True)
    assert g.requires_grad
    (second,) = torch.autograd.grad((g**2).sum(), P)
    t, v = 1e-6, randn(5, 3, seed=1)

    def steepness(P):
        return (grad(lambda P: (polar(P) * w).sum())(P) ** 2).sum()

    difference = (steepness(P.detach() + t * v) - steepness(P.detach() - t * v)) / (2 * t)
    assert abs((second * v).sum() - difference) < 1e-6 * difference.abs()


def test_second_derivative_through_nearest_etf():
    H, U_prox = means(6, 3).requires_grad_(), haar(6, 3)
    assert gradgradcheck(lambda H: nearest_etf(H, U_prox, 0.1), H)
    collapsed = (U_prox @ standard_etf(3, F64)).requires_grad_()
    assert gradgradcheck(lambda H: nearest_etf(H, U_prox, 0.1), collapsed)


@pytest.mark.parametrize("solver", CLOSED + ["trust_region"])
def test_jacrev_is_proposition_1(solver):
    H, U_prox = means(6, 4), haar(6, 4)
    dense = ddn_jacobian(H, nearest_etf(H, U_prox, 0.1), U_prox, 0.1)
    jacobian = jacrev(lambda H: nearest_etf(H, U_prox, 0.1, solver))(H)
    assert (jacobian.reshape(24, 24) - dense).abs().max() < 1e-8
    forward = jacfwd(lambda H: nearest_etf(H, U_prox, 0.1, solver))(H)
    assert (forward.reshape(24, 24) - dense).abs().max() < 1e-8


def test_null_directions_get_no_gradient():
    "Absent classes, problem (6): the direction that was completed from the start is arbitrary."
    H = means(8, 4)
    H[:, 3] = 0
    for X in (H, 0 * H):
        X = X.clone().requires_grad_()
        nearest_etf(X).backward(randn(8, 4))
        assert X.grad.isfinite().all()
    assert X.grad.abs().max() == 0


def test_under_autocast_the_second_derivative_is_exact_too():
    P, v = matrix("spread").float(), randn(5, 3).float()
    plain = hessian(cubes)(P)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(hessian(cubes)(P), plain)
        assert torch.equal(jvp(polar, (P,), (v,))[1], jvp(polar, (P,), (v,))[1])


# ---- batches


@pytest.mark.parametrize("Head", [StandardHead, FixedETFHead, NearestETFHead])
def test_forward_mode_through_a_head_in_training(Head):
    head, y, t = Head(6, 3).double(), torch.arange(9) % 3, 1e-6
    h, v = randn(9, 6), randn(9, 6, seed=1)
    head(randn(9, 6, seed=2), y)
    ahead, behind = deepcopy(head)(h + t * v, y), deepcopy(head)(h - t * v, y)
    with forward_ad.dual_level():
        along_v = forward_ad.unpack_dual(head(forward_ad.make_dual(h, v), y)).tangent
        torch.testing.assert_close(along_v, (ahead - behind) / (2 * t), atol=1e-6, rtol=1e-5)
    head(h, y)  # no tangent stays behind in the state


@pytest.mark.parametrize("solver", CLOSED)
def test_batches(solver):
    P = torch.stack([matrix(k) for k in SPECTRA])
    loop = torch.stack([polar(X, solver) for X in P])
    assert torch.allclose(polar(P, solver), loop, atol=1e-13)
    assert torch.allclose(polar(P.reshape(2, 2, 5, 3), solver), loop.reshape(2, 2, 5, 3), atol=1e-13)
    assert torch.allclose(vmap(lambda P: polar(P, solver))(P), loop, atol=1e-13)
    moved = vmap(lambda P: polar(P, solver), in_dims=2, out_dims=1)(P.movedim(0, 2))
    assert torch.allclose(moved, loop.movedim(0, 1), atol=1e-13)
    nested = vmap(vmap(grad(lambda P: (polar(P, solver) ** 3).sum())))(P.reshape(2, 2, 5, 3))
    assert torch.allclose(nested.reshape(4, 5, 3), torch.stack([grad(cubes)(X) for X in P]), atol=1e-11)


@pytest.mark.parametrize("solver", CLOSED)
def test_a_batch_of_none(solver):
    "No matrix, no warning: nothing has failed."
    P = torch.zeros(0, 5, 3, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        U = polar(P, solver)
        grad = torch.autograd.grad(U.sum(), P)[0]
    assert U.shape == grad.shape == (0, 5, 3)


def test_vmap_over_one_argument_and_a_gradient_outside():
    H, U_prox = torch.stack([means(6, 3, k) for k in range(3)]), haar(6, 3)
    for kw in (dict(), dict(start=U_prox)):
        near = None if kw else U_prox
        loop = torch.stack([nearest_etf(X, near, 0.1, **kw) for X in H])
        assert torch.allclose(vmap(lambda X: nearest_etf(X, near, 0.1, **kw))(H), loop, atol=1e-13)
    X = means(6, 3).requires_grad_()
    four = vmap(lambda c: nearest_etf(X * c, U_prox))(torch.ones(4, dtype=F64))
    (inner,) = torch.autograd.grad(four.sum(), X)
    (outer,) = torch.autograd.grad(4 * nearest_etf(X, U_prox).sum(), X)
    assert torch.allclose(inner, outer, atol=1e-12)
    several = torch.stack([haar(6, 3, k) for k in range(3)])
    loop = torch.stack([nearest_etf(H[0], U, 0.1) for U in several])
    assert torch.allclose(vmap(lambda U: nearest_etf(H[0], U, 0.1))(several), loop, atol=1e-13)


def test_problem_6_in_batches():
    P = torch.stack([matrix("spread"), 0 * matrix("spread")])
    P = P - P.mean(-1, keepdim=True)
    start = haar(5, 3, 4)
    U = _polar(P, "complete", start, True)[0]
    for X, Y in zip(P, U):
        assert torch.equal(Y, _polar(X, "complete", start, True)[0])


# ---- torch's own examinations


@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3)])
@pytest.mark.parametrize("solver", CLOSED + ["complete", "given"])
def test_opcheck(solver, shape):
    P = randn(*shape).requires_grad_()
    start = haar(5, 3).expand(shape).contiguous() if solver in ("complete", "given") else None
    opcheck(_polar, (P, solver, start, True))
    U, s, V = _polar(P, solver, start, True)
    opcheck(_derivative, (P, U, s, V, randn(*shape).requires_grad_()), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("solver", CLOSED)
def test_meta(solver):
    H = torch.empty(64, 10, device="meta", requires_grad=True)
    U = nearest_etf(H, torch.empty(64, 10, device="meta"), solver=solver)
    U.sum().backward()
    assert H.grad.shape == U.shape == (64, 10) and H.grad.is_meta
    assert nearest_etf(H).is_meta
    assert polar(torch.empty(3, 64, 10, device="meta", dtype=torch.bfloat16)).dtype == torch.float32


def test_refusals():
    with pytest.raises(ValueError, match="P must be real, got torch.complex64"):
        polar(torch.zeros(4, 2, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"or a batch \(\.\.\., d, C\), got shape \(3, 2, 4\)"):
        polar(torch.zeros(3, 2, 4))
    bad, U_prox = randn(2, 4, 2), haar(4, 2)
    bad[1, 0, 0] = float("inf")
    for call in (polar, vmap(polar), grad(cubes)):
        with pytest.raises(ValueError, match="P has 1 non-finite entries of 16"):
            call(bad)
    with pytest.raises(ValueError, match="P has 2 non-finite entries of 16"):
        vmap(lambda H: nearest_etf(H, U_prox))(bad)


# ---- compiled


def steps(function, n=5):
    "The graphs that n steps with new numbers need, and whether they equal eager's."
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for seed in range(n):
        X, Y = means(8, 4, seed).requires_grad_(), means(8, 4, seed).requires_grad_()
        compiled(X).backward()
        function(Y).backward()
        assert torch.allclose(X.grad, Y.grad, atol=1e-13)
    return counter.frame_count


@pytest.mark.parametrize("solver", CLOSED + ["trust_region"])
def test_compiled_forward_and_backward(solver):
    v, U_prox = randn(8, 4), haar(8, 4)
    assert steps(lambda H: (nearest_etf(H, U_prox, 0.1, solver) * v).sum()) == 1
    assert steps(lambda H: (nearest_etf(H, solver=solver) @ standard_etf(4, F64) * v).sum()) == 1
    if solver != "trust_region":
        assert steps(lambda H: (polar(H + U_prox, solver) * v).sum()) == 1


def test_compiled_transforms():
    torch._dynamo.reset()
    P = torch.stack([matrix("spread"), matrix("repeated")])
    for f, X in ((grad(cubes), P[0]), (hessian(cubes), P[0]), (vmap(grad(cubes)), P)):
        compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(X), f(X), atol=1e-12)


def test_compiled_refuses_what_is_not_finite():
    torch._dynamo.reset()
    U_prox = haar(8, 4)
    compiled = torch.compile(lambda H: nearest_etf(H, U_prox), backend="aot_eager", fullgraph=True)
    compiled(means(8, 4))
    with pytest.raises(ValueError, match="P has .* non-finite entries"):
        compiled(means(8, 4) / 0)


@pytest.mark.slow
def test_compiled_by_inductor():
    torch._dynamo.reset()
    v, U_prox = randn(8, 4), haar(8, 4)

    def f(H):
        return (nearest_etf(H, U_prox, 0.1) * v).sum()

    X, Y = means(8, 4).requires_grad_(), means(8, 4).requires_grad_()
    torch.compile(f, fullgraph=True)(X).backward()
    f(Y).backward()
    assert torch.allclose(X.grad, Y.grad, atol=1e-13)


# ---- drivers that lie


def lie(kind, driver):
    "A driver that fails in one of three ways."

    def lying(*args, **kwargs):
        answer = driver(*args, **kwargs)
        if kind == "raises":
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        several = isinstance(answer, tuple)
        if kind == "NaN":
            return tuple(X * torch.nan for X in answer) if several else answer * torch.nan
        return (*answer[:-1], answer[-1].flip(-1)) if several else answer.flip(-1)

    return lying


@pytest.mark.parametrize("kind", ["NaN", "wrong", "raises"])
@pytest.mark.parametrize("driver", ["svd", "eigh", "qr"])
def test_a_lying_driver_changes_no_answer(monkeypatch, driver, kind):
    "Through both problems and every solver, forward and backward."
    H, U_prox, v = means(12, 4), haar(12, 4), randn(12, 4)
    H[:, 2:] = 0  # two classes are absent

    def everything():
        results = []
        for solver in CLOSED:
            X = H.clone().requires_grad_()
            U = nearest_etf(X, U_prox, 0.1, solver)
            results += [U.detach(), *torch.autograd.grad((U * v).sum(), X)]
        X = H.clone().requires_grad_()
        U = nearest_etf(X, start=U_prox)
        return results + [U.detach(), *torch.autograd.grad((U @ standard_etf(4, F64) * v).sum(), X)]

    expected = everything()
    monkeypatch.setattr(lapack, "_warned", set())
    monkeypatch.setattr(torch.linalg, driver, lie(kind, getattr(torch.linalg, driver)))
    with pytest.warns(RuntimeWarning, match=f"torch.linalg.{driver} failed"):
        got = everything()
    for a, b in zip(got, expected):
        assert (a - b).abs().max() < 1e-10
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # each route warns once
        everything()


@pytest.mark.parametrize("kind", ["NaN", "wrong", "raises"])
@pytest.mark.parametrize("driver", ["solve", "qr", "cholesky"])
def test_a_lying_driver_in_the_dense_chapter(monkeypatch, driver, kind):
    H, U_prox, v = means(6, 3), haar(6, 3), randn(6, 3)
    U = nearest_etf(H, U_prox, 0.1)
    gradient = vjp_one_cholesky(H, U, U_prox, 0.1, v)
    jacobian = ddn_jacobian(H, U, U_prox, 0.1, via="multipliers")
    monkeypatch.setattr(lapack, "_warned", set())
    monkeypatch.setattr(torch.linalg, driver, lie(kind, getattr(torch.linalg, driver)))
    with pytest.warns(RuntimeWarning, match=f"torch.linalg.{driver} failed"):
        lagrange_multipliers(H, U, U_prox, 0.1)
        assert (ddn_jacobian(H, U, U_prox, 0.1, via="multipliers") - jacobian).abs().max() < 1e-10
        assert (vjp_one_cholesky(H, U, U_prox, 0.1, v) - gradient).abs().max() < 1e-10


FIRST_STEP = """
import warnings, torch
from ngc_etf.nearest import nearest_etf
warnings.simplefilter("error")
torch.set_num_threads(2)
h = torch.relu(torch.randn(256, 2048, generator=torch.Generator().manual_seed(0)))
y = torch.cat([torch.arange(250), torch.arange(6)])
H = torch.zeros(1000, 2048).index_add(0, y, h - h.mean(0)).T
H = (H / H.norm()).requires_grad_()
U = nearest_etf(H.detach())
assert (U.T @ U - torch.eye(1000)).abs().max() < 1e-5
nearest_etf(H, U).sum().backward()
assert H.grad.isfinite().all()
"""


@pytest.mark.slow
def test_first_step_with_most_classes_absent():
    "1000 classes of which 250 are present, two threads: MKL's gesdd returned NaN without an error here."
    subprocess.run([sys.executable, "-c", FIRST_STEP], check=True)
