"""The grid behind chapter 04: Proposition 1, its stages and its identities over sizes and conditions."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.autograd.functional import jacobian

from ngc_etf.implicit import (
    _contract,
    _hessian_block,
    commutation_matrix,
    constraint_jacobian,
    ddn_jacobian,
    elimination_matrix,
    lagrange_multipliers,
    objective,
    objective_gradient,
    rvec,
    rvech,
    sigma,
)
from ngc_etf.adjoint import ddn_vjp, scale_free_delta, vjp_dense_constraints, vjp_one_cholesky
from ngc_etf.nearest import nearest_etf
from ngc_etf.proximal import procrustes_target
from ngc_etf.simplex import haar_direction, standard_etf

F64 = torch.float64
SHAPES = [(2, 2), (3, 2), (4, 4), (7, 3), (10, 5)]
CONDITIONS = ["random", "collapsed", "absent"]


def problem(d, C, condition="random", delta=0.1, seed=0):
    g = torch.Generator().manual_seed(seed)
    H, U_prox, v = (
        torch.randn(d, C, generator=g, dtype=F64),
        haar_direction(d, C, g, F64),
        torch.randn(d, C, generator=g, dtype=F64),
    )
    if condition == "collapsed":
        H = U_prox @ standard_etf(C, F64)
    if condition == "absent":
        H[:, C // 2 + 1 :] = 0
    H = H - H.mean(1, keepdim=True)
    H = H / H.norm()
    return H, nearest_etf(H, U_prox, delta, "svd"), U_prox, v


def kron(A, B):
    "torch.kron of some torch versions refuses unusual strides."
    return torch.einsum("ij,kl->ikjl", A, B).reshape(len(A) * len(B), -1)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_vectorisation(m, n, r, q):
    g = torch.Generator().manual_seed(m + 10 * n + 100 * r + 1000 * q)
    A, B, X = (torch.randn(*s, generator=g, dtype=F64) for s in ((m, n), (r, q), (n, r)))
    torch.testing.assert_close(rvec(A @ X @ B), kron(A, B.T) @ rvec(X))  # (22)
    assert torch.equal(commutation_matrix(m, n, F64) @ rvec(A.T), rvec(A))  # (25)
    K = commutation_matrix(r, m, F64) @ kron(A, B) @ commutation_matrix(n, q, F64)
    torch.testing.assert_close(K, kron(B, A))
    S = A.T @ A
    assert torch.equal(elimination_matrix(n, F64) @ rvec(S), rvech(S))  # (26)
    assert torch.equal(rvech(S), torch.cat([S[i, i:] for i in range(n)]))


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_multipliers(shape, condition):
    (d, C), delta = shape, 0.1
    H, U, U_prox, _ = problem(d, C, condition)
    A, lam, Sig = (
        constraint_jacobian(U),
        lagrange_multipliers(H, U, U_prox, delta),
        sigma(H, U, U_prox, delta),
    )
    assert torch.linalg.matrix_rank(A) == C * (C + 1) // 2
    f_U = jacobian(lambda U: objective(H, U, U_prox, delta), U)
    torch.testing.assert_close(objective_gradient(H, U, U_prox, delta), f_U)
    torch.testing.assert_close(lam @ A, rvec(f_U), atol=1e-12, rtol=0)
    torch.testing.assert_close(_contract(lam, C), Sig, atol=1e-10, rtol=0)
    torch.testing.assert_close(U @ Sig, f_U, atol=1e-12, rtol=0)
    torch.testing.assert_close(
        _hessian_block(H, delta) - Sig, U.T @ procrustes_target(H, U_prox, delta), atol=1e-13, rtol=0
    )


@pytest.mark.parametrize("delta", [1e-2, 0.1, 10.0])
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_proposition_1_and_its_stages(shape, condition, delta):
    d, C = shape
    H, U, U_prox, v = problem(d, C, condition, delta)
    P = procrustes_target(H, U_prox, delta)
    tol = 1e-13 * torch.linalg.cond(P).item() ** 2 + 1e-12
    D = ddn_jacobian(H, U, U_prox, delta)
    size = D.abs().max().item() + 1
    torch.testing.assert_close(
        ddn_jacobian(H, U, U_prox, delta, via="multipliers"), D, atol=tol * size, rtol=0
    )
    dense = (rvec(v) @ D).reshape(d, C)
    X = H.clone().requires_grad_()
    nearest_etf(X, U_prox, delta, "svd").backward(v)
    for grad in (
        X.grad,
        *(f(H, U, U_prox, delta, v) for f in (vjp_dense_constraints, vjp_one_cholesky, ddn_vjp)),
    ):
        torch.testing.assert_close(grad, dense, atol=tol * size * v.norm().item(), rtol=0)


@pytest.mark.parametrize("shape", [(4, 4), (7, 3)], ids=str)
def test_proposition_1_is_the_solvers_derivative(shape):
    (d, C), t = shape, 1e-5
    H, U, U_prox, _ = problem(d, C)
    D = ddn_jacobian(H, U, U_prox, 0.1)
    for k in range(d * C):
        E = torch.zeros(d * C, dtype=F64)
        E[k] = t
        E = E.reshape(d, C)
        difference = (nearest_etf(H + E, U_prox, 0.1) - nearest_etf(H - E, U_prox, 0.1)) / (2 * t)
        assert (rvec(difference) - D[:, k]).abs().max() < 1e-6


def test_float32_and_device_follow_the_input():
    H, U, U_prox, v = (X.float() for X in problem(7, 3))
    for out in (
        ddn_jacobian(H, U, U_prox, 0.1),
        ddn_vjp(H, U, U_prox, 0.1, v),
        lagrange_multipliers(H, U, U_prox, 0.1),
        sigma(H, U, U_prox, 0.1),
    ):
        assert out.dtype == torch.float32 and out.isfinite().all()


def test_ddn_vjp_is_exact_under_autocast_and_on_its_own_device():
    H, U, U_prox, v = (X.float() for X in problem(7, 3))
    want = ddn_vjp(H, U, U_prox, 0.1, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ddn_vjp(H, U, U_prox, 0.1, v), want)
    with torch.device("meta"):
        assert torch.equal(ddn_vjp(H, U, U_prox, 0.1, v), want)


def test_double_precision_is_not_lost():
    "Constants such as M̃ are made in the input's precision."
    H, U, U_prox, v = problem(40, 6, delta=1e-3)
    torch.testing.assert_close(
        vjp_dense_constraints(H, U, U_prox, 1e-3, v), ddn_vjp(H, U, U_prox, 1e-3, v), atol=1e-9, rtol=0
    )


def test_scale_free_delta():
    for C in (2, 10, 1000):
        assert abs(scale_free_delta(C, 0.3) * (C - 1) / 2 - 0.3) < 1e-15


H, U, U_PROX, V = problem(7, 3)
REFUSED = [
    (lambda: rvech(H), r"A must be square, got shape \(7, 3\)"),
    (lambda: commutation_matrix(0, 3), "m and n must be positive, got m=0, n=3"),
    (lambda: elimination_matrix(0), "n must be positive, got n=0"),
    (lambda: sigma(H[0], U, U_PROX), r"H must be \(d, C\)"),
    (lambda: sigma(H.T, U.T, U_PROX.T), "d=3 and C=7"),
    (lambda: sigma(H, U[:-1], U_PROX), r"U must have H's shape \(7, 3\), got \(6, 3\)"),
    (lambda: lagrange_multipliers(H, U, None), "U_prox must have H's shape .* got None"),
    (lambda: ddn_jacobian(H, U, U_PROX, 0.0), "delta must be positive and finite, got delta=0.0"),
    (lambda: ddn_jacobian(H, U, U_PROX, via="lambda"), "via must be 'sigma' or 'multipliers', got 'lambda'"),
    (lambda: ddn_vjp(H, U, U_PROX, 0.1, V.T), r"v must have H's shape \(7, 3\), got \(3, 7\)"),
    (lambda: scale_free_delta(1), "C=1"),
    (lambda: scale_free_delta(10, 0.0), "strength must be positive and finite, got strength=0.0"),
]


@pytest.mark.parametrize("call,message", REFUSED, ids=[m for _, m in REFUSED])
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
