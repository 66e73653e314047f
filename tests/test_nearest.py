"""The grid behind chapter 03: solvers x shapes x dtypes x conditions, with SciPy as the outside reference."""

import inspect
import subprocess
import sys
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings, strategies as st
from threadpoolctl import threadpool_limits

from ngc_etf import lapack, procrustes, replay, solvers
from ngc_etf.means import ValueCheck
from ngc_etf.nearest import SOLVERS, nearest_etf
from ngc_etf.procrustes import polar, polar_vjp
from ngc_etf.proximal import procrustes_target, trust_region
from ngc_etf.simplex import canonical_direction, haar_direction, standard_etf

F64 = torch.float64
CLOSED = [s for s in SOLVERS if s != "trust_region" and (s != "polar" or hasattr(torch.linalg, "polar"))]
SHAPES = [(2, 2), (5, 2), (3, 3), (12, 3), (20, 20), (64, 10), (512, 10), (130, 100)]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    "Small problems: torch's and NumPy's threads would only get into each other's way."
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(n)


def haar(d, C, seed=1):
    return haar_direction(d, C, torch.Generator().manual_seed(seed), dtype=F64)


def means(d, C, condition="random", seed=0):
    "Class means of unit norm under one of the conditions that training meets."
    g = torch.Generator().manual_seed(seed)
    H = torch.randn(d, C, generator=g, dtype=F64)
    if condition == "collapsed":
        H = haar(d, C, seed + 7) @ standard_etf(C, F64)
    if condition == "near_collapse":
        H = haar(d, C, seed + 7) @ standard_etf(C, F64) + 1e-7 * H
    if condition == "absent":
        H[:, C // 2 :] = 0
    if condition == "coincide":
        H = H[:, :1].expand(d, C).clone()
    if condition == "zero":
        return 0 * H
    H = H - H.mean(1, keepdim=True)
    return H / H.norm().clamp(min=1e-300) if condition != "coincide" else 0 * H


CONDITIONS = ["random", "collapsed", "near_collapse", "absent", "coincide", "zero"]


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("solver", CLOSED)
def test_against_scipy(solver, shape, condition):
    H, U_prox = means(*shape, condition), haar(*shape)
    for delta in (1e-3, 1.0):
        P = (2 * H @ standard_etf(shape[1], F64) + delta * U_prox).numpy()
        s = np.linalg.svd(P, compute_uv=False)
        U = nearest_etf(H, U_prox, delta, solver)
        kappa = s[0] / s[-1]
        assert (U.T @ U - torch.eye(shape[1])).abs().max() < 1e-12 + 1e-14 * kappa
        np.testing.assert_allclose(U, scipy.linalg.polar(P)[0], atol=1e-14 * max(kappa, 10) ** 1.5)


@pytest.mark.parametrize("condition", ["random", "collapsed", "near_collapse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("solver", CLOSED)
def test_low_precision(solver, dtype, condition):
    for shape in ((5, 2), (64, 10), (130, 100)):
        H, U_prox = means(*shape, condition).to(dtype), haar(*shape).to(dtype)
        U = nearest_etf(H, U_prox, 0.1, solver)
        assert U.dtype == torch.float32
        assert (U.T @ U - torch.eye(shape[1])).abs().max() < 1e-5
        reference = nearest_etf(H.double(), U_prox.double(), 0.1, "svd")
        s = torch.linalg.svdvals(procrustes_target(H.double(), U_prox.double(), 0.1))
        assert (U - reference).abs().max() < 1e-6 * s[0] / s[-1] + 1e-5


@pytest.mark.parametrize("shape", [(12, 3), (64, 10), (6, 5)], ids=str)
@pytest.mark.parametrize("delta", [1e-3, 1e-1, 10.0])
@pytest.mark.parametrize("seed", range(3))
def test_trust_region_agrees(shape, delta, seed):
    H, U_prox = means(*shape, seed=seed), haar(*shape, seed + 10)
    U = trust_region(
        H, U_prox, delta, iterations=30 if shape[0] > 2 * shape[1] else 300
    )  # a cold start with d = C + 1 needs more than the paper's 30
    assert (U - nearest_etf(H, U_prox, delta)).norm() < 1e-6


def test_ill_conditioned_gram_is_refused():
    "A condition number that the Gram route cannot carry goes to the SVD and stays exact."
    s = torch.logspace(0, -9, 6, dtype=F64)
    Q, V = haar(30, 6, 2), haar(6, 6, 3)
    U = polar((Q * s) @ V.T, "gram")
    assert (U - Q @ V.T).abs().max() < 1e-6
    assert (U.T @ U - torch.eye(6)).abs().max() < 1e-13


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_problem_6_is_deterministic(shape, condition):
    "Of all minimisers the one nearest to the start: the limit of (7)."
    H, C = means(*shape, condition), shape[1]
    for start in (None, haar(*shape, 4)):
        U = nearest_etf(H, start=start)
        assert torch.equal(U, nearest_etf(H, start=start))
        assert (U.T @ U - torch.eye(C)).abs().max() < 1e-12
        P = procrustes_target(H)
        s = torch.linalg.svdvals(P)
        assert abs((U * P).sum() - s.sum()) < 1e-12  # it is a minimiser
        near = canonical_direction(*shape, dtype=F64) if start is None else start
        nearby = nearest_etf(H, near, 1e-9, "svd")
        assert (U * near).sum() > (nearby * near).sum() - 1e-4  # and none is nearer


def test_problem_6_where_the_start_lies_in_the_means_span():
    "The start's remaining part vanishes: still orthonormal, still a minimiser."
    H = torch.tensor([[1.0, -1.0], [1.0, -1.0], [0.0, 0.0]], dtype=F64) / 2
    U = nearest_etf(H, start=torch.tensor([[1.0, 0], [0, 1], [0, 0]], dtype=F64))
    assert (U.T @ U - torch.eye(2)).abs().max() < 1e-14
    assert abs((U * procrustes_target(H)).sum() - torch.linalg.svdvals(procrustes_target(H)).sum()) < 1e-14


problems = st.tuples(st.integers(2, 9), st.integers(0, 12), st.integers(0, 10**6), st.floats(1e-2, 10.0))


@given(problems)
@settings(max_examples=40, deadline=None)
def test_equivariance(problem):
    "Rotations of the features, permutations of the classes, a common scale of H and delta: all pass through."
    C, more, seed, delta = problem
    d = C + more
    H, U_prox, Q = means(d, C, seed=seed), haar(d, C, seed), haar(d, d, seed + 1)
    order = torch.randperm(C, generator=torch.Generator().manual_seed(seed))
    s = torch.linalg.svdvals(procrustes_target(H, U_prox, delta))
    tol = 1e-12 * (s[0] / s[-1]).item()
    U = nearest_etf(H, U_prox, delta)
    assert (nearest_etf(Q @ H, Q @ U_prox, delta) - Q @ U).abs().max() < tol
    assert (nearest_etf(H[:, order], U_prox[:, order], delta) - U[:, order]).abs().max() < tol
    assert (nearest_etf(3 * H, U_prox, 3 * delta) - U).abs().max() < tol


@given(problems)
@settings(max_examples=30, deadline=None)
def test_never_beaten(problem):
    C, more, seed, delta = problem
    d = C + more
    H, U_prox = means(d, C, seed=seed), haar(d, C, seed)
    P, U = procrustes_target(H, U_prox, delta), nearest_etf(H, U_prox, delta)
    for k in range(5):
        rival = polar(
            U + 0.1**k * torch.randn(d, C, dtype=F64, generator=torch.Generator().manual_seed(seed + k)),
            "svd",
        )
        assert (rival * P).sum() <= (U * P).sum() + 1e-12


@given(problems)
@settings(max_examples=20, deadline=None)
def test_fixed_point(problem):
    C, more, seed, delta = problem
    U = haar(C + more, C, seed)
    assert (nearest_etf(U @ standard_etf(C, F64), U, delta) - U).abs().max() < 1e-12 / delta


@pytest.mark.parametrize("solver", [s for s in CLOSED])
@pytest.mark.parametrize("condition", ["random", "collapsed", "absent"])
def test_gradcheck(solver, condition):
    for shape in ((5, 2), (4, 4), (7, 3)):
        H, U_prox = means(*shape, condition), haar(*shape)
        assert torch.autograd.gradcheck(lambda H: nearest_etf(H, U_prox, 0.1, solver), H.requires_grad_())


def test_gradient_of_problem_6():
    M = standard_etf(3, F64)
    assert torch.autograd.gradcheck(lambda H: nearest_etf(H) @ M, means(7, 3).requires_grad_())


@pytest.mark.parametrize(
    "s",
    [
        [1.0, 1.0, 1.0],
        [1.0, 1.0, 0.0],
        [1.0, 1e-17, 0.0],
        [0.0, 0.0, 0.0],
        [1e-30, 1e-30, 1e-30],
        [1e20, 1.0, 1e-20],
    ],
)
def test_adjoint_is_finite(s):
    v = torch.randn(6, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    assert polar_vjp(haar(6, 3), torch.tensor(s, dtype=F64), haar(3, 3, 2), v).isfinite().all()


@pytest.mark.parametrize("dtype,tol", [(torch.float32, 1e-4), (F64, 1e-10)])
def test_products_only_adjoint(dtype, tol):
    "The GPU's backward pass, on the CPU."
    for kappa in (1.0, 20.0, 1000.0):
        s = torch.logspace(0, -np.log10(kappa), 8, dtype=F64)
        U, V = haar(30, 8), haar(8, 8, 2)
        v = torch.randn(30, 8, dtype=F64, generator=torch.Generator().manual_seed(0))
        expected = polar_vjp(U, s, V, v)
        got = procrustes._polar_vjp_products(U.to(dtype), ((V * s) @ V.T).to(dtype), v.to(dtype))
        assert (got - expected).norm() / expected.norm() < tol * max(1, kappa / 10)
    assert (
        procrustes._polar_vjp_products(
            U, 0 * (V @ V.T) + torch.diag(torch.tensor([1.0] * 7 + [0.0], dtype=F64)), v
        )
        .isfinite()
        .all()
    )


@pytest.mark.parametrize("dtype,kappas", [(torch.float32, (1e4, 1e5, 1e6)), (F64, (1e6, 1e8, 1e10))])
@pytest.mark.parametrize("C", [3, 200])
def test_products_only_adjoint_at_a_large_condition(dtype, kappas, C):
    "The error is that of rounding, times the condition number, however many classes there are."
    U, V = haar(C + 20, C).to(dtype), haar(C, C, 2)
    v = torch.randn(C + 20, C, dtype=F64, generator=torch.Generator().manual_seed(0)).to(dtype)
    for kappa in kappas:
        s = torch.ones(C, dtype=F64)
        s[-2:] = 1 / kappa
        S = ((V * s) @ V.T).to(dtype)
        S = (S + S.T) / 2
        expected = polar_vjp(U.double(), *torch.linalg.eigh(S.double()), v.double())
        got = procrustes._polar_vjp_products(U, S, v)
        assert (got - expected).norm() / expected.norm() < 10 * kappa * torch.finfo(dtype).eps


@pytest.mark.parametrize("solver", CLOSED)
def test_gradient_of_a_square_frame(solver):
    "For d = C nothing lies outside the span of U: the smallest singular value costs no digit."
    s = torch.tensor([1.0, 0.5, 1e-4], dtype=F64)
    P, v = (haar(3, 3) * s @ haar(3, 3, 2).T).float(), haar(3, 3, 3)
    Q, s, Vh = torch.linalg.svd(P.double())
    K = Q.T @ v @ Vh.T
    expected = Q @ ((K - K.T) / (s[:, None] + s)) @ Vh
    X = P.clone().requires_grad_()
    grad = torch.autograd.grad((polar(X, solver) * v.float()).sum(), X)[0]
    assert (grad - expected).norm() / expected.norm() < 1e-5
    U = Q @ Vh
    products = procrustes._polar_vjp_products(U.float(), (U.T @ P.double()).float(), v.float())
    assert (products - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("dtype,kappa,tol", [(torch.float32, 1e3, 1e-3), (F64, 1e6, 1e-8)])
def test_newton_schulz_fixed_schedule(monkeypatch, dtype, kappa, tol):
    "The number of steps fixed in advance is enough, without looking at the device."
    monkeypatch.setattr(solvers, "_deferred", lambda P: True)
    s = torch.logspace(0, -np.log10(kappa), 8, dtype=F64)
    Q, V = haar(40, 8), haar(8, 8, 2)
    U = solvers._newton_schulz(((Q * s) @ V.T).to(dtype))[0]
    assert (U - Q @ V.T).abs().max() < tol
    assert (U.T @ U - torch.eye(8)).abs().max() < tol


def test_autocast_forward_and_backward():
    H, U_prox = means(64, 10).float(), haar(64, 10).float()

    def both():
        X = H.clone().requires_grad_()
        U = nearest_etf(X, U_prox)
        U.backward(H)
        return U, X.grad

    plain = both()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = both()
    assert all(torch.equal(a, b) for a, b in zip(plain, cast))


def test_matmul_precision_is_kept_and_restored():
    H, U_prox = means(64, 10).float(), haar(64, 10).float()
    plain, seen = nearest_etf(H, U_prox), []
    torch.set_float32_matmul_precision("medium")
    try:
        solve = solvers._SOLVE["svd"]
        solvers._SOLVE["svd"] = lambda P: (
            seen.extend(m.fp32_precision for m in solvers._matmuls()),
            solve(P),
        )[1]
        nearest_etf(H, U_prox, solver="svd")
        assert torch.equal(nearest_etf(H, U_prox), plain)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        solvers._SOLVE["svd"] = solve
        torch.set_float32_matmul_precision("highest")
    assert set(seen) <= {"ieee"}


def test_small_problems_restore_threads():
    n = 2
    torch.set_num_threads(n)
    nearest_etf(means(12, 3), haar(12, 3))
    with pytest.raises(ValueError, match="non-finite"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nearest_etf(means(12, 3) * float("nan"), haar(12, 3), validate=False)
    assert torch.get_num_threads() == n
    torch.set_num_threads(1)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_non_contiguous(layout):
    H, U_prox = means(12, 3), haar(12, 3)
    X = dict(
        transposed=lambda: H.T.contiguous().T,
        strided=lambda: torch.stack([H, H], 1)[:, 0],
        expanded=lambda: H[:, :1].expand(12, 3),
    )[layout]()
    assert not X.is_contiguous()
    torch.testing.assert_close(
        nearest_etf(X, U_prox), nearest_etf(X.contiguous(), U_prox), atol=1e-12, rtol=0
    )


def test_inputs_are_not_changed():
    H, U_prox = means(12, 3), haar(12, 3)
    for solver in SOLVERS:
        if solver in CLOSED + ["trust_region"]:
            nearest_etf(H, U_prox, solver=solver)
    assert torch.equal(H, means(12, 3)) and torch.equal(U_prox, haar(12, 3))


def test_no_gradient_to_U_prox():
    U_prox = haar(12, 3).requires_grad_()
    assert not nearest_etf(means(12, 3), U_prox).requires_grad
    assert not nearest_etf(means(12, 3), start=U_prox).requires_grad


def failing(*a, **k):
    raise torch.linalg.LinAlgError("the algorithm failed to converge")


@pytest.mark.parametrize("solver", ["svd", "gram"])
def test_fallback_warns_once(monkeypatch, solver):
    H, U_prox = means(12, 3), haar(12, 3)
    expected = nearest_etf(H, U_prox, 0.1)
    monkeypatch.setattr(lapack, "_warned", set())
    monkeypatch.setattr(torch.linalg, dict(svd="svd", gram="eigh")[solver], failing)
    with pytest.warns(RuntimeWarning, match=f"by torch.linalg.{dict(svd='svd', gram='eigh')[solver]} failed"):
        nearest_etf(H, U_prox, 0.1, solver)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (nearest_etf(H, U_prox, 0.1, solver) - expected).abs().max() < 1e-11
    assert (
        f"{dict(svd='the SVD, torch.linalg.svd', gram='the eigendecomposition, torch.linalg.eigh')[solver]}"
        in lapack._warned
    )


def test_a_non_finite_result_is_no_answer(monkeypatch):
    H, U_prox = means(12, 3), haar(12, 3)
    monkeypatch.setattr(lapack, "_warned", set())
    monkeypatch.setitem(solvers._SOLVE, "svd", lambda P: (P * float("nan"), None, None))
    with pytest.warns(RuntimeWarning, match="non-finite result"):
        U = nearest_etf(H, U_prox, solver="svd")
    assert U.isfinite().all()


def test_out_of_memory_is_not_swallowed(monkeypatch):
    def oom(P):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setitem(solvers._SOLVE, "svd", oom)
    with pytest.raises(torch.OutOfMemoryError):
        nearest_etf(means(12, 3), haar(12, 3), solver="svd")


def test_nobody_can():
    with pytest.raises(ValueError, match="non-finite"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        polar(torch.full((4, 2), float("nan")))


class Played(ValueCheck):
    "Late verdicts without a GPU; they arrive when `done`."

    done = True

    def __call__(self, ok, message, then=None):
        self.pending.append((ok, self, message, then))

    def query(self):
        return self.done


def test_late_verdict_on_the_input(monkeypatch):
    "The logic of a GPU's checks: nothing is read at the call, the verdict comes later."
    monkeypatch.setattr(solvers, "_deferred", lambda P: True)
    monkeypatch.setattr(solvers, "_late", Played())
    H, U_prox = means(12, 3), haar(12, 3)
    good = nearest_etf(H, U_prox, solver="newton_schulz")
    assert (good - nearest_etf(H, U_prox, solver="svd")).abs().max() < 1e-10
    bad = H.clone()
    bad[0, 0] = float("inf")
    nearest_etf(bad, U_prox, solver="newton_schulz")
    with pytest.raises(ValueError, match=r"in an earlier batch, H \(or U_prox\) had non-finite entries"):
        nearest_etf(H, U_prox)
    solvers._late.raise_late()  # a NaN is no reason to give the solver up
    assert solvers._AUTO["cuda"] == "newton_schulz"
    nearest_etf(bad, U_prox, solver="newton_schulz", validate=False)
    nearest_etf(H, U_prox, solver="newton_schulz")


def test_late_verdict_on_the_result_switches_auto(monkeypatch):
    late = Played()
    late.done = False
    monkeypatch.setattr(solvers, "_late", late)
    monkeypatch.setattr(solvers, "_AUTO", dict(solvers._AUTO))
    monkeypatch.setattr(lapack, "_warned", set())
    solvers._check_result(haar(12, 3), 2 * haar(12, 3))
    late.raise_late()
    assert len(late.pending) == 1 and solvers._AUTO["cuda"] == "newton_schulz"
    late.done = True
    with pytest.warns(RuntimeWarning, match="had not converged"):
        late.raise_late()
    assert not late.pending and solvers._AUTO["cuda"] == "gram"


def test_newton_schulz_says_when_it_did_not_converge():
    P = haar(8, 3) * torch.tensor([1.0, 1.0, 0.0], dtype=F64)
    with pytest.raises(RuntimeError, match="did not converge"):
        solvers._newton_schulz(P)


H, U_PROX = means(20, 5), haar(20, 5)
REFUSED = [
    (lambda: nearest_etf(H[0], U_PROX), r"H must be \(d, C\), got shape \(5,\)"),
    (lambda: nearest_etf(H.T, U_PROX.T), "d=5 and C=20"),
    (lambda: nearest_etf(H[:, :1], U_PROX[:, :1]), "C=1"),
    (lambda: nearest_etf(H, U_PROX[:-1]), r"U_prox must have H's shape \(20, 5\), got \(19, 5\)"),
    (lambda: nearest_etf(H, start=U_PROX[:-1]), "start must have H's shape"),
    (lambda: nearest_etf(H.long(), U_PROX), "H must be floating-point, got torch.int64"),
    (lambda: nearest_etf(H, U_PROX.to(torch.complex64)), "U_prox must be floating-point"),
    (lambda: nearest_etf(H, U_PROX.to("meta")), "U_prox must be on H's device cpu, got meta"),
    (lambda: nearest_etf(H, U_PROX, 0.0), "delta must be positive and finite, got delta=0.0"),
    (lambda: nearest_etf(H, U_PROX, -1.0), "delta=-1.0"),
    (lambda: nearest_etf(H, U_PROX, float("nan")), "delta=nan"),
    (lambda: nearest_etf(H, U_PROX, solver="qr"), "solver must be one of auto, svd.*got 'qr'"),
    (lambda: nearest_etf(H / 0, U_PROX), "H has .* non-finite entries of 100"),
    (lambda: nearest_etf(H, U_PROX * float("nan")), "U_prox has 100 non-finite entries"),
    (lambda: nearest_etf(H, start=U_PROX * float("nan")), "start has 100 non-finite entries"),
    (lambda: nearest_etf(H / 0, U_PROX, solver="trust_region"), "H has .*non-finite entries"),
    (lambda: trust_region(H, U_PROX / 0), "U_prox has non-finite entries"),
    (lambda: trust_region(H, start=U_PROX / 0), "start has non-finite entries"),
    (lambda: polar(H.T), "P must be .* d >= C"),
    (lambda: polar(H, "trust_region"), "got 'trust_region'"),
]


@pytest.mark.parametrize("call,message", REFUSED, ids=[m for _, m in REFUSED])
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_imports_torch_and_numpy_only():
    "pymanopt and SciPy are for the trust region and for failing drivers; fastai is for chapters below."
    others = "{'fastai', 'torchvision', 'pymanopt', 'scipy', 'matplotlib', 'pandas'}"
    code = f"import sys, ngc_etf.nearest, ngc_etf.adjoint; sys.exit(bool({others} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
def test_large_float32():
    H, U_prox = means(2048, 1000).float(), haar(2048, 1000).float()
    reference = nearest_etf(H.double(), U_prox.double(), solver="svd")
    for solver in ("gram", "svd", "newton_schulz"):
        U = nearest_etf(H, U_prox, solver=solver)
        assert (U - reference).norm() < 1e-3
        assert (U.T @ U - torch.eye(1000)).abs().max() < 1e-5


def test_a_recording_is_made_aside_and_leaves_the_stream_as_it_was(monkeypatch):
    "torch's own signatures without its GPU: what is called, on which stream, in which order."
    log, streams = [], ["default"]

    class Stream:
        def __init__(self, device=None, priority=0):
            self.device, self.name = device, "aside"

    default = Stream("cuda:0")
    default.name = "default"

    @contextmanager
    def on(stream):
        streams.append(stream.name)
        yield
        streams.pop()

    @contextmanager
    def graph(cuda_graph, pool=None, stream=None, capture_error_mode="global"):
        log.append((stream.name, stream.device, capture_error_mode, streams[-1]))
        yield

    assert {"stream", "capture_error_mode"} <= {*inspect.signature(torch.cuda.graph.__init__).parameters}
    for name, fake in {"Stream": Stream, "stream": on, "graph": graph, "CUDAGraph": object}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: default)
    X = torch.randn(4, 3)
    _, (given,), result = replay._recording(lambda x: x @ x.T, (X,))
    assert log == [("aside", "cuda:0", "thread_local", "default")] and streams == ["default"]
    assert torch.equal(given, X) and given is not X and torch.equal(result, X @ X.T)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(512, 10), (2048, 100)])
def test_a_recording_is_the_same_to_the_last_bit(size, dtype):
    "Solver and gradient launched one by one, then replayed; a result that was kept is not written over."
    H, U_prox = (X.to("cuda", dtype) for X in (means(*size), haar(*size)))
    H.requires_grad_()
    results = []
    for _ in range(5):
        U = nearest_etf(H, U_prox)
        results.append((U.detach(), torch.autograd.grad(U.sum(), H)[0]))
    recorded = [v for f in (solvers._whole_schedule, procrustes._by_products) for v in f.known.values()]
    assert sum(not isinstance(v, int) for v in recorded) >= 2
    nearest_etf(-H.detach(), U_prox)
    assert all(torch.equal(a, b) for later in results[1:] for a, b in zip(results[0], later))
