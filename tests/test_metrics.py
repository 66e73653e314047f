"""The metrics on grids, on two processes, and against a second implementation: what would be dull to read."""

import copy
import math
import pickle
import subprocess
import sys
from collections import namedtuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from sklearn.neighbors import NearestCentroid
from torch import nn
from torchmetrics import MetricCollection

from ngc_etf import evaluation as E
from ngc_etf import metrics as M
from ngc_etf import solvers as P
from ngc_etf import streaming as S
from ngc_etf.evaluation import measure_collapse
from ngc_etf.floor import _best_margins, cross_entropy_bound, cross_entropy_floor
from ngc_etf.heads import NearestETFHead, StandardHead
from ngc_etf.means import _centre
from ngc_etf.simplex import haar_direction, simplex_etf
from ngc_etf.streaming import NeuralCollapse


def data(C, d, N, seed=0, skip=()):
    "Unequal counts, every class but those in `skip` at least once."
    g = torch.Generator().manual_seed(seed)
    keep = torch.tensor([c for c in range(C) if c not in skip])
    y = torch.cat(
        [keep, keep[torch.multinomial(torch.arange(1.0, len(keep) + 1), N - len(keep), True, generator=g)]]
    )
    h = (
        torch.randn(N, d, generator=g, dtype=torch.float64)
        + torch.randn(C, d, generator=g, dtype=torch.float64)[y]
        + 1
    )
    return (
        h,
        y,
        torch.randn(C, d, generator=g, dtype=torch.float64),
        torch.randn(C, generator=g, dtype=torch.float64),
    )


def plain(h, y, W, b):
    "Eqs. 10-16 by loops in NumPy."
    h, y, W, b = (t.numpy() for t in (h, y, W, b))
    C, N = len(W), len(h)
    mu, mu_G = np.stack([h[y == c].mean(0) for c in range(C)]), h.mean(0)
    S_W = sum(np.outer(x - mu[c], x - mu[c]) for x, c in zip(h, y)) / N
    S_B = sum(np.outer(m - mu_G, m - mu_G) for m in mu) / C
    etf = (np.eye(C) - 1 / C) / np.sqrt(C - 1)
    apart = lambda A: np.linalg.norm(A / np.linalg.norm(A) - etf)
    vary = lambda x: x.std(ddof=1) / x.mean()
    cos = (h - mu_G) @ (W - W.mean(0)).T
    cos /= np.linalg.norm(h - mu_G, axis=1)[:, None] * np.linalg.norm(W - W.mean(0), axis=1)
    margins = np.array([r[c] - np.delete(r, c).max() for r, c in zip(cos, y)])
    var = [((h[y == c] - mu[c]) ** 2).sum(1).mean() for c in range(C)]
    return {
        "nc1": np.trace(S_W @ np.linalg.pinv(S_B, rcond=1e-12)) / C,
        "nc2": apart(W @ W.T),
        "nc3": apart(W @ (mu - mu_G).T),
        "nc4": ((h @ W.T + b).argmax(1) != NearestCentroid().fit(h, y).predict(h)).mean(),
        "equinorm": abs(vary(np.linalg.norm(W, axis=1)) - vary(np.linalg.norm(mu - mu_G, axis=1))),
        "margin": margins.mean(),
        "margin_min": margins.min(),
        "bias_gap": np.linalg.norm(W @ mu_G + b),
        "cdnv": np.mean(
            [(var[i] + var[j]) / 2 / ((mu[i] - mu[j]) ** 2).sum() for i in range(C) for j in range(i)]
        ),
    }


def close(got, want, tol=1e-9):
    for k, v in want.items():
        assert math.isclose(float(got[k]), float(v), rel_tol=tol, abs_tol=tol), (k, float(got[k]), float(v))


def fill(metric, h, y, size, W=None, b=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    for _ in range(1 if W is None else 2):
        for i in torch.randperm(len(h), generator=g).split(size):
            metric.update(h[i], y[i])
        if W is not None and not metric.judging:
            metric.judge(W, b)
    return metric


@pytest.mark.parametrize(
    "C,d,N", [(2, 2, 20), (2, 30, 9), (5, 4, 60), (7, 3, 90), (10, 40, 300), (30, 64, 100)]
)
def test_functions_against_numpy(C, d, N):
    h, y, W, b = data(C, d, N)
    H_bar = _centre(*M._batch_means(h, y, C))[0]
    margins = M.cosine_margins(h, y, W)
    got = {
        "nc1": M.nc1(h, y, C),
        "nc2": M.nc2(W),
        "nc3": M.nc3(W, H_bar),
        "nc4": M.nc4(h, y, W, b),
        "equinorm": M.equinorm_gap(W, H_bar),
        "margin": margins.mean(),
        "margin_min": margins.min(),
        "cdnv": M.cdnv(h, y, C),
    }
    want = plain(h, y, W, b)
    close(got, {k: want[k] for k in got})


@pytest.mark.parametrize("C,d,N", [(2, 2, 20), (7, 3, 90), (10, 40, 300)])
@pytest.mark.parametrize("size", [1, 13, 10_000])
@pytest.mark.parametrize("seed", [0, 1])
def test_streaming_is_batch(C, d, N, size, seed):
    h, y, W, b = data(C, d, N, seed)
    close(fill(NeuralCollapse(C, d), h, y, size, W, b, seed).compute(), plain(h, y, W, b))


@pytest.mark.parametrize("dtype,tol", [(torch.float32, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, 5e-2)])
def test_feature_dtypes(dtype, tol):
    "Features of any floating type; the answer is float64 and differs by the features' own rounding."
    h, y, W, b = data(6, 20, 300)
    out = fill(NeuralCollapse(6, 20), h.to(dtype), y, 50).compute(W.to(dtype))
    assert all(v.dtype == torch.float64 for v in out.values())
    assert M.nc1(h.to(dtype), y, 6).dtype == torch.float64
    close(out, {k: plain(h, y, W, b)[k] for k in ("nc1", "nc2", "nc3", "equinorm", "cdnv")}, tol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 40, 2000])
def test_shift_of_1000(dtype, size):
    h, y, *_ = data(8, 24, 2000)
    h = h.float()
    far = fill(NeuralCollapse(8, 24, dtype=dtype), h + 1000, y, size).compute()
    true = M.nc1(h, y, 8)
    assert abs(far["nc1"] / true - 1) < 0.02


def test_float32_states_under_autocast():
    h, y, W, b = data(6, 20, 300)
    with torch.autocast("cpu", torch.bfloat16):
        out = fill(NeuralCollapse(6, 20, dtype=torch.float32), h.float(), y, 50).compute(W.float())
    close(out, {k: plain(h, y, W, b)[k] for k in ("nc1", "nc2", "nc3", "cdnv")}, 1e-4)


def test_absent_classes():
    C, d, skip = 8, 12, (2, 5)
    h, y, W, b = data(C, d, 150, skip=skip)
    keep = [c for c in range(C) if c not in skip]
    small = torch.tensor([keep.index(c) if c in keep else -1 for c in range(C)])[y]
    out, ref = fill(NeuralCollapse(C, d), h, y, 20, W, b).compute(), plain(h, small, W[keep], b[keep])
    close(out, {k: ref[k] for k in ("nc1", "cdnv")})
    close({"nc1": M.nc1(h, y, C), "cdnv": M.cdnv(h, y, C)}, {k: ref[k] for k in ("nc1", "cdnv")})
    H_bar = _centre(*M._batch_means(h, y, C))[0]
    assert (H_bar[:, list(skip)] == 0).all()
    close(out, {"nc3": M.nc3(W, H_bar)})
    nearest = torch.tensor(keep)[NearestCentroid().fit(h.numpy(), small.numpy()).predict(h.numpy())]
    close(out, {"nc4": ((h @ W.T + b).argmax(1) != nearest).double().mean()})
    cols = H_bar[:, keep].norm(dim=0)
    rows = W.norm(dim=1)
    close(out, {"equinorm": (rows.std() / rows.mean() - cols.std() / cols.mean()).abs()})


def test_never_one_scatter_a_class():
    "ImageNet's states: one d x d matrix, about 50 MB whatever the number of samples; and they pickle."
    m = NeuralCollapse(1000, 2048)
    assert sum(t.numel() * t.element_size() for t in m.metric_state.values()) < 51e6
    small = fill(NeuralCollapse(4, 6), *data(4, 6, 30)[:2], 7)
    copy = pickle.loads(pickle.dumps(small))
    close(copy.compute(), small.compute())
    small.reset()
    assert small.count.sum() == 0 and not small.update_called


def test_forward_and_merge_and_state_dict():
    h, y, W, b = data(5, 9, 80)
    whole, parts = fill(NeuralCollapse(5, 9), h, y, 80), [NeuralCollapse(5, 9, bins=10) for _ in range(3)]
    for i in range(3):
        parts[i](h[i::3], y[i::3])
        n, means, *_ = whole._moments()
        parts[i].judge(W, b, means, _centre(means, n)[1])
    for p, i in zip(parts, range(3)):
        p.update(h[i::3], y[i::3])
    parts[0].merge_state(parts[1])
    parts[0].merge_state(parts[2].metric_state)
    assert parts[0].count.sum() == 160 and parts[0].tally[0] == 80
    close(parts[0].compute(), plain(h, y, W, b))
    assert parts[0].compute()["margin_hist"].sum() == 80


class Share(list):
    "A loader that gives out one process's share of the batches."

    world_size = 2


def _network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 6))


def _shares():
    "One process has three batches, the other a small one; and a second split in which one has nothing."
    h, y, *_ = data(6, 10, 150)
    h = h.float()
    batches = [(h[i : i + 40], y[i : i + 40]) for i in range(0, 120, 40)]
    rest = [(h[120:], y[120:])]
    return [(batches, rest), (batches + rest, [])]


def _rank(rank, world, path, queue):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    h, y, W, b = data(6, 10, 150)
    h, y = (h[:40], y[:40]) if rank == 0 else (h[40:], y[40:])
    m = fill(NeuralCollapse(6, 10, bins=8), h, y, 16, W, b)
    out = m.compute()
    local = m.count.sum().item()  # back to this rank's own samples afterwards
    m.sync()
    rule = m.rule_means.shape, m.rule_W.tolist()
    m.unsync()
    empty = NeuralCollapse(6, 10)
    with pytest.raises(ValueError, match="at least one sample"):
        empty.judge(W)
    with pytest.raises(ValueError, match="at least one sample"):
        empty.compute()
    empty.update(h, y)
    assert empty.count.shape == (6,), "a refusal during a synchronisation leaves the states as they were"
    evaluations = [
        measure_collapse(_network(), Share(split[rank]), margins=margins, store=store)
        for split in _shares()
        for margins, store in ((True, 0), (False, 2000), (False, 2**30))
    ]
    alone = measure_collapse(_network(), _shares()[0][rank][:1])  # no world_size: this process's own
    out = {k: v.tolist() for k, v in out.items()}
    queue.put((rank, out, local, M.nc1(h, y, 6).item(), rule, pickle.dumps(evaluations), alone))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_rank, (2, tmp_path / "store", queue), nprocs=2)
    one, two = sorted(queue.get() for _ in range(2))
    _, a, n0, nc1_0, rule, evaluations, alone = one
    assert a == two[1] and (n0, two[2]) == (40, 110)
    h, y, W, bias = data(6, 10, 150)
    close(a, plain(h, y, W, bias))
    assert sum(a["margin_hist"]) == 150
    assert math.isclose(nc1_0, M.nc1(h[:40], y[:40], 6).item()), "the functions stay on their own process"
    assert rule == ((6, 10), W.tolist()), "a rule that is synchronised stays one rule"

    whole = measure_collapse(_network(), [(h.float(), y)], margins=True)
    for mine, theirs in zip(pickle.loads(evaluations), pickle.loads(two[5])):
        each, other = mine.pop("margins", None), theirs.pop("margins", None)
        assert mine == theirs
        close(mine, {k: whole[k] for k in mine}, 1e-6)
        assert each is None or torch.equal(each, other)
        assert each is None or torch.allclose(each, whole["margins"], atol=1e-6)
    close(alone, measure_collapse(_network(), _shares()[0][0][:1]))


def test_cross_checks_with_the_means_chapter():
    from ngc_etf.means import centred_means

    h, y, *_ = data(6, 10, 90, skip=(3,))
    for ours, theirs in zip(_centre(*M._batch_means(h, y, 6)), centred_means(h, y, 6)):
        assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("C,d", [(2, 2), (10, 512), (100, 128)])
def test_collapse_scores_its_ideal(C, d):
    W = simplex_etf(
        C, U=haar_direction(d, C, torch.Generator().manual_seed(C), dtype=torch.float64)
    ).T.contiguous()
    y = torch.arange(3 * C) % C
    h = 5 * W[y] + 7
    out = fill(NeuralCollapse(C, d), h, y, 11, W, -W @ torch.full((d,), 7.0).double()).compute()
    ideal = {
        "nc1": 0,
        "nc2": 0,
        "nc3": 0,
        "nc4": 0,
        "equinorm": 0,
        "cdnv": 0,
        "bias_gap": 0,
        "margin": C / (C - 1),
        "margin_min": C / (C - 1),
        "cos_means": -1 / (C - 1),
        "cos_weights": -1 / (C - 1),
        "rank_means": C - 1,
        "rank_weights": C - 1,
        "cos_means_std": 0,
        "cos_weights_std": 0,
    }
    assert set(out) == set(ideal)
    close(out, ideal, 1e-7)


# ---- what is refused, and how


def _refusals():
    "(name, call, message), one a line."
    h, y, W, b = data(6, 16, 200)
    means = M._batch_means(h, y, 6)[0]
    H_bar = _centre(means, torch.bincount(y).double())[0]
    bad = h.clone()
    bad[3, 2] = math.nan
    fed = NeuralCollapse(6, 16)
    soft = F.one_hot(y, 6).double()
    return [
        ("h of one dimension", lambda: M.nc1(h[0], y, 6), "h must have shape (any, any), got (16,)"),
        ("nan in h", lambda: M.nc1(bad, y, 6), "h must be finite, got 1 entries"),
        ("too few labels", lambda: M.nc1(h, y[:5], 6), "labels must have shape (200,)"),
        ("label too large", lambda: M.nc1(h, y, 5), "labels must lie in 0..4, got 0 to 5"),
        ("float labels", lambda: M.nc1(h, y.double(), 6), "labels must be integers, got torch.float64"),
        ("soft labels", lambda: M.nc1(h, soft, 6), "got soft labels"),
        ("no sample", lambda: M.nc1(h[:0], y[:0], 6), "N=0"),
        ("label below 0", lambda: M.cdnv(h, y - 1, 6), "got -1 to 4"),
        ("one class", lambda: M.nc1(h, y * 0, 1), "at least 2 classes, got C=1"),
        ("W of one dimension", lambda: M.nc2(W[0]), "W must have shape (any, any)"),
        ("H_bar transposed", lambda: M.nc3(W, W), "H_bar must have shape (16, 6), got (6, 16)"),
        ("W too narrow", lambda: M.nc4(h, y, W[:, :3], b), "h must have shape (any, 3), got (200, 16)"),
        ("b too short", lambda: M.nc4(h, y, W, b[:2]), "b must have shape (6,), got (2,)"),
        ("means transposed", lambda: M.nc4(h, y, W, means=W.T), "means must have shape (6, 16)"),
        ("h_G of two dimensions", lambda: M.cosine_margins(h, y, W, h), "h_G must have shape (16,)"),
        ("W not finite", lambda: M.equinorm_gap(W / 0, H_bar), "W must be finite"),
        ("A of one dimension", lambda: M.pair_cosines(h[0]), "A must have shape"),
        (
            "update, h too narrow",
            lambda: fed.update(h[:, :3], y),
            "h must have shape (any, 16), got (200, 3)",
        ),
        ("update, label too large", lambda: fed.update(h, y + 1), "labels must lie in 0..5, got 1 to 6"),
        ("judge before update", lambda: fed.judge(W), "call update first"),
        ("means alone", lambda: fed.judge(W, means=means), "got only means"),
        ("d = 0", lambda: NeuralCollapse(6, 0), "d=0"),
        ("bins < 0", lambda: NeuralCollapse(6, 16, bins=-1), "bins=-1"),
        ("d not whole", lambda: NeuralCollapse(6, 16.0), "d must be a whole number, got d=16.0"),
        ("C not whole", lambda: NeuralCollapse("6", 16), "C must be a whole number, got C='6'"),
        ("states too coarse", lambda: NeuralCollapse(6, 16, dtype=torch.bfloat16), "got torch.bfloat16"),
    ]


@pytest.mark.parametrize("name,call,message", _refusals(), ids=[r[0] for r in _refusals()])
def test_bad_input_is_named(name, call, message):
    with pytest.raises(ValueError) as e:
        call()
    assert message in str(e.value)


def test_a_refused_batch_leaves_no_trace():
    h, y, W, b = data(6, 16, 60)
    m = fill(NeuralCollapse(6, 16), h, y, 20, W, b)
    before = {k: v.clone() for k, v in m.metric_state.items()}
    bad = h.clone()
    bad[0, 0] = math.inf
    for call, args in ((m.update, (bad, y)), (m.update, (h, y - 1)), (m.judge, (W[:3],))):
        with pytest.raises(ValueError):
            call(*args)
    assert all(torch.equal(before[k], v) for k, v in m.metric_state.items())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("wide", [False, True])
def test_labels_that_a_loss_accepts(dtype, wide):
    h, y, W, b = data(6, 16, 60)
    other = y.to(dtype)[:, None] if wide else y.to(dtype)
    assert torch.equal(M.nc1(h, other, 6), M.nc1(h, y, 6))
    assert torch.equal(M.cosine_margins(h, other, W), M.cosine_margins(h, y, W))
    for validate in (True, False):
        close(fill(NeuralCollapse(6, 16, validate=validate), h, other, 20, W, b).compute(), plain(h, y, W, b))


# ---- the rule of judge is a state


def test_the_rule_is_pickled_saved_and_reset():
    h, y, W, b = data(6, 16, 90)
    m = fill(NeuralCollapse(6, 16, bins=5), h, y, 30, W, b)
    want = m.compute()
    m.persistent(True)
    loaded = NeuralCollapse(6, 16, bins=5)
    loaded.load_state_dict(m.state_dict())
    for other in (pickle.loads(pickle.dumps(m)), copy.deepcopy(m), m.clone(), loaded):
        assert other.judging
        assert all(torch.equal(v, m.metric_state[k]) for k, v in other.metric_state.items())
        other.update(h, y)
        assert other.tally[0] == 180 and other.count.sum() == 90
        assert torch.equal(other.compute()["nc4"], want["nc4"])
        other.reset()
        assert not other.judging and other.tally[0] == 0
        with pytest.raises(ValueError, match="call judge first"):
            other.margins(h, y)
    given = NeuralCollapse(6, 16)
    given.judge(W, b, M._batch_means(h, y, 6)[0], h.mean(0))
    given.persistent(True)
    loaded = NeuralCollapse(6, 16)
    loaded.load_state_dict(given.state_dict())
    loaded.update(h, y)
    assert loaded.count.sum() == 90, "with given means a batch is judged and counted"
    close(loaded.compute(), plain(h, y, W, b))


def test_a_collection_keeps_two_metrics_apart():
    "torchmetrics updates only one of the metrics whose states are equal after the first batch."
    h, y, W, b = data(6, 16, 90)
    V, c = W.flip(0), b.flip(0)
    means, h_G = M._batch_means(h, y, 6)[0], h.mean(0)
    late = MetricCollection({"a": NeuralCollapse(6, 16), "b": NeuralCollapse(6, 16)})
    late.update(h, y)
    early, same = late.clone(), late.clone()
    early.reset()
    for name, rule in (("a", (W, b)), ("b", (V, c))):
        late[name].judge(*rule)
        early[name].judge(*rule, means, h_G)
    late.update(h, y)
    early.update(h[:40], y[:40])
    early.update(h[40:], y[40:])
    same["a"].judge(W, b)
    same["b"].judge(W, b)
    same.update(h, y)
    same["b"].judge(V, c)
    same.update(h, y)
    for both in (late, early, same):
        close(both["a"].compute(), plain(h, y, W, b))
        close(both["b"].compute(), plain(h, y, V, c))
    assert len(late.compute()) == 2 * len(late["a"].compute())


def test_merging_takes_one_rule():
    h, y, W, b = data(6, 16, 90)
    a, other = (fill(NeuralCollapse(6, 16), h, y, 30, V, b) for V in (W, W.flip(0)))
    before = {k: v.clone() for k, v in a.metric_state.items()}
    with pytest.raises(ValueError, match="one rule, got two"):
        a.merge_state(other)
    assert all(torch.equal(before[k], v) for k, v in a.metric_state.items())
    fresh = NeuralCollapse(6, 16)
    fresh.merge_state(a)
    close(fresh.compute(), plain(h, y, W, b))


@pytest.mark.parametrize(
    "C,d,options,state",
    [
        (7, 16, {}, r"count of shape \(6,\) and \(7,\)"),
        (6, 15, {}, r"mean of shape \(6, 16\) and \(6, 15\)"),
        (6, 16, {"scatter": False}, r"scatter of shape \(16, 16\) and \(0, 0\)"),
        (6, 16, {"bins": 5}, r"margin_hist of shape \(0,\) and \(5,\)"),
    ],
)
@pytest.mark.parametrize("judged", [False, True])
def test_merging_takes_one_kind(C, d, options, state, judged):
    h, y, W, b = data(6, 16, 60)
    ours = fill(NeuralCollapse(6, 16), h, y, 30, *((W, b) if judged else ()))
    before = {k: v.clone() for k, v in ours.metric_state.items()}
    for theirs in (NeuralCollapse(C, d, **options), NeuralCollapse(C, d, **options).metric_state):
        with pytest.raises(ValueError, match=f"the same C, d, bins and scatter, got states {state}"):
            ours.merge_state(theirs)
    with pytest.raises(ValueError, match="must have a state count, got none"):
        ours.merge_state({})
    assert all(torch.equal(before[k], v) for k, v in ours.metric_state.items())


@pytest.mark.parametrize("C,d", [(2, 16), (6, 16), (6, 4)])
@pytest.mark.parametrize("offset", [0, 10, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_given_means_give_nc1_without_the_scatter(C, d, offset, dtype):
    h, y, W, b = data(C, d, 200)
    m = NeuralCollapse(C, d, scatter=False)
    m.judge(W, b, (M._batch_means(h, y, C)[0] + offset).to(dtype), (h.mean(0) + offset).to(dtype))
    m.update(h + offset, y)
    tol = 1e-9 if dtype == torch.float64 else 1e-5 * (10 + offset)
    assert math.isclose(m.compute()["nc1"], M.nc1(h, y, C), rel_tol=tol)


def test_another_classifier_is_not_given_the_verdicts_of_the_judged_one():
    h, y, W, b = data(6, 16, 90)
    V, c = W.flip(0), b.flip(0)
    m = fill(NeuralCollapse(6, 16, bins=5), h, y, 30, W, b)
    fresh = fill(NeuralCollapse(6, 16, bins=5), h, y, 30)
    whole = m.compute()
    for args in ((V, c), (V,), (W,), (W, c), (W.float(), b)):
        got, want = m.compute(*args), fresh.compute(*args)
        assert set(got) == set(want)
        close(got, want)
    assert "nc4" not in m.compute(b=c)
    assert set(m.compute(W.clone().requires_grad_(), b)) == set(whole)
    lean = fill(NeuralCollapse(6, 16, scatter=False), h, y, 30, W, b)
    close({"nc1": lean.compute(V, c)["nc1"]}, {"nc1": whole["nc1"]})


def test_a_device_without_float64(monkeypatch):
    "Everything that is computed in float64 is then computed on the CPU, and states are float32."
    want = M.nc2(data(6, 16, 90)[2])
    for module in (P, S, E):
        monkeypatch.setattr(module, "_has_float64", lambda kind: False)
    h, y, W, b = data(6, 16, 90)
    moved = []
    real = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: moved.append(t.shape) or real(t))
    assert torch.equal(M.nc2(W), want) and moved == [W.shape]
    monkeypatch.undo()
    for module in (S, E):
        monkeypatch.setattr(module, "_has_float64", lambda kind: False)
    m = fill(NeuralCollapse(6, 16, dtype=torch.float32), h.float(), y, 30, W.float(), b.float())
    assert all(v.dtype == torch.float32 for v in m.metric_state.values())
    close(m.compute(), plain(h, y, W, b), 1e-4)
    out = measure_collapse(_network(), [(h[:, :10].float(), y)])
    monkeypatch.undo()
    close(out, measure_collapse(_network(), [(h[:, :10].float(), y)]), 1e-4)


# ---- measure_collapse


class Returns(nn.Module):
    "A network whose output is made by `wrap`."

    def __init__(self, net, wrap):
        super().__init__()
        self.net, self.wrap = net, wrap

    def forward(self, *x):
        return self.wrap(self.net(x[0]))


Output = namedtuple("Output", "logits hidden")
OUTPUTS = {
    "tensor": lambda z: z,
    "tuple": lambda z: (z, None),
    "dict": lambda z: {"logits": z},
    "object": lambda z: Output(z, z),
}


def _images():
    h, y, *_ = data(6, 10, 150)
    return h.float(), y


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("last", ["linear", "standard", "nearest"])
def test_measure_collapse_is_the_functions(output, last):
    x, y = _images()
    net = _network()
    if last != "linear":
        net[2] = {"standard": StandardHead, "nearest": NearestETFHead}[last](8, 6)
        net(x) if last == "standard" else net[2](net[:2](x), y)
    net[0].eval()
    modes = [m.training for m in net.modules()]
    model = Returns(net, OUTPUTS[output])
    out = measure_collapse(model, [(x[i : i + 64], y[i : i + 64]) for i in range(0, 150, 64)], margins=True)
    assert [m.training for m in net.modules()] == modes
    assert not net[2]._forward_hooks and not net[2]._forward_pre_hooks
    net.eval()
    with torch.no_grad():
        f, z = net[:2](x), net(x)
        f = f if last == "linear" else net[2].features(f)
    W, b = net[2].weight.detach(), net[2].bias.detach()
    close(out, plain(f.double(), y, W.double(), b.double()), 1e-5)
    close(out, {"loss": F.cross_entropy(z, y), "top1": (z.argmax(1) == y).double().mean()}, 1e-6)
    assert torch.allclose(out["margins"], M.cosine_margins(f, y, W).sort().values)
    assert all(isinstance(v, float) for k, v in out.items() if k != "margins")


def test_inputs_may_be_nested_and_loaders_endless_in_length():
    x, y = _images()
    Pair = namedtuple("Pair", "left right")

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = _network()

        def forward(self, a, b):
            assert b is None
            return self.net(a["pair"].left[0] + a["pair"].right)

    batches = ((({"pair": Pair([x[i]], 0 * x[i])}), None, y[i]) for i in torch.arange(150).split(40))
    close(measure_collapse(Nested(), batches), measure_collapse(_network(), [(x, y)]), 1e-6)


class Backwards(nn.Module):
    "Registers its classifier first, and another layer last."

    def __init__(self):
        super().__init__()
        self.fc, self.body, self.aux = nn.Linear(8, 6), nn.Linear(10, 8), nn.Linear(8, 6)

    def forward(self, x):
        return self.fc(self.body(x).relu())


def test_the_classifier_is_the_layer_that_makes_the_output():
    x, y = _images()
    net = Backwards()
    out = measure_collapse(net, [(x, y)])
    close(out, {"nc2": M.nc2(net.fc.weight), "nc1": M.nc1(net.body(x).relu(), y, 6)}, 1e-6)


def test_the_classifier_is_named():
    x, y = _images()
    net = nn.ModuleDict({"fc": nn.Linear(10, 6), "aux": nn.Linear(10, 6)})

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = net

        def forward(self, x):
            return self.parts["fc"](x), self.parts["aux"](x)

    for name in ("fc", "aux"):
        out = measure_collapse(Two(), [(x, y)], at=f"parts.{name}")
        close(out, {"nc2": M.nc2(net[name].weight), "loss": F.cross_entropy(net[name](x), y).item()}, 1e-6)
    with pytest.raises(ValueError, match="at="):
        measure_collapse(Two(), [(x, y)], at="nowhere")


@pytest.mark.parametrize("y", ["column", "int32", "soft"])
def test_labels_of_a_loader(y):
    x, hard = _images()
    soft = 0.1 / 6 + 0.9 * F.one_hot(hard, 6).float()
    other = {"column": hard[:, None], "int32": hard.int(), "soft": soft}[y]
    out, want = (measure_collapse(_network(), [(x, labels)]) for labels in (other, hard))
    loss = out.pop("loss")
    close(out, {k: want[k] for k in out})
    close(
        {"loss": loss}, {"loss": F.cross_entropy(_network()(x), soft if y == "soft" else hard).item()}, 1e-6
    )


class Adapter(nn.Module):
    "A linear layer and a correction of low rank; its `weight`, if any, is that of the layer alone."

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.lora_A = base, nn.Linear(base.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class WithWeight(Adapter):
    weight = property(lambda self: self.base_layer.weight)


@pytest.mark.parametrize("kind", [Adapter, WithWeight])
@pytest.mark.parametrize("bias", [True, False])
def test_an_adapter_is_measured_with_its_correction(kind, bias):
    x, y = _images()
    body = _network()[:2]
    layer = kind(nn.Linear(8, 6, bias=bias))
    W = (layer.base_layer.weight + layer.lora_B.weight @ layer.lora_A.weight).detach()
    merged = nn.Linear(8, 6)
    merged.weight.data, merged.bias.data = W, layer.base_layer.bias.data if bias else torch.zeros(6)
    out, want = (measure_collapse(nn.Sequential(*body, m), [(x, y)]) for m in (layer, merged))
    close(out, want, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_softmax_behind_the_classifier_is_seen_through(dtype):
    x, y = _images()
    net = _network().to(dtype)
    out = measure_collapse(nn.Sequential(*net, nn.Softmax(1)), [(x.to(dtype), y)], at="2")
    close(out, measure_collapse(net, [(x.to(dtype), y)]), 1e-6)


def test_features_are_those_that_the_classifier_saw():
    x, y = _images()

    class Reuses(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = _network()

        def forward(self, x):
            h = self.net[:2](x)
            z = self.net[2](h)
            h.zero_()
            return z

    close(measure_collapse(Reuses(), [(x, y)]), measure_collapse(_network(), [(x, y)]), 1e-6)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(10, 6)

    def forward(self, x):
        return self.fc(x) + self.fc(-x)


@pytest.mark.parametrize(
    "model,loader,message",
    [
        (_network, lambda x, y: [], "loader must hold at least one batch"),
        (_network, lambda x, y: [{"x": x, "y": y}], "a batch must be a tuple"),
        (_network, lambda x, y: [x], "a batch must be a tuple"),
        (_network, lambda x, y: [(x, y + 1)], "labels must lie in 0..5"),
        (_network, lambda x, y: [(x, y[:3])], "labels must have shape"),
        (_network, lambda x, y: [(x / 0, y)], "h must be finite"),
        (Twice, lambda x, y: [(x, y)], "got 2 calls"),
        (
            lambda: Returns(_network(), lambda z: z[:, :3]),
            lambda x, y: [(x, y)],
            "the logits must have shape",
        ),
    ],
)
def test_what_measure_collapse_refuses_leaves_the_model_alone(model, loader, message):
    model = model()
    with pytest.raises(ValueError, match=message):
        measure_collapse(model, loader(*_images()), at={Twice: "fc", Returns: "net.2"}.get(type(model), ""))
    assert all(m.training and not m._forward_hooks for m in model.modules())


def test_hooks_are_called_in_compiled_models():
    x, y = _images()
    want = measure_collapse(_network(), [(x, y)])
    whole = torch.compile(_network(), backend="eager")
    inside = _network()
    inside.compile(backend="eager")
    layer = _network()
    layer[2].compile(backend="eager")
    for model in (whole, inside, layer):
        model.eval()
        model(x)
        close(measure_collapse(model, [(x, y)]), want, 1e-6)
        name = {whole: "_orig_mod.2"}.get(model, "2")
        close(measure_collapse(model, [(x, y)], at=name), want, 1e-6)
        assert not model.training


def test_complex_numbers_are_refused():
    W = torch.randn(3, 4) + 1j
    with pytest.raises(ValueError, match="W must be real, got torch.complex64"):
        M.nc2(W)
    with pytest.raises(ValueError, match="h must be real"):
        M.nc1(W, torch.arange(3), 3)


# ---- the floor of the loss


@pytest.mark.parametrize("C", [2, 3, 10, 100])
@pytest.mark.parametrize("relu", [False, True])
def test_floor_is_attained(C, relu):
    "The collapsed set of either kind sits on its floor; random unit rows and features lie above."
    W = simplex_etf(C, dtype=torch.float64).T
    h = 5 * (torch.eye(C, dtype=torch.float64) if relu else W)
    floor = cross_entropy_floor(C, 5.0, relu=relu)
    loss = lambda h, W: torch.nn.functional.cross_entropy(h @ W.T, torch.arange(C)).item()
    assert math.isclose(loss(h, W), floor, rel_tol=1e-12)
    for seed in range(20):
        torch.manual_seed(seed)
        near = W + 0.1 * torch.randn_like(W) * (seed > 9)
        x = h + torch.randn_like(h) * 10.0 ** -(seed % 10)
        x = 5 * torch.nn.functional.normalize(x.abs() if relu else x)
        assert loss(x, torch.nn.functional.normalize(near)) >= floor - 1e-12


@pytest.mark.parametrize("C", [2, 3, 10, 50])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("factor", [2, 100])
def test_floor_of_a_long_tail(C, relu, factor):
    "No features, near the optimum or far from it, get below the floor of Eq. 8 or the bound of all."
    counts = [factor ** (-c / (C - 1)) for c in range(C)]
    floor = cross_entropy_floor(C, relu=relu, counts=counts)
    bound = cross_entropy_bound(C, relu=relu, counts=counts)
    assert bound < floor
    assert bound < cross_entropy_floor(C, relu=relu)
    shares = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    W = simplex_etf(C, dtype=torch.float64).T

    def loss(h, W, b):
        return (shares @ F.cross_entropy(h @ W.T + b, torch.arange(C), reduction="none")).item()

    for seed in range(20):
        torch.manual_seed(seed)
        h = torch.eye(C, dtype=torch.float64) + torch.randn(C, C, dtype=torch.float64) * 10.0 ** -(seed % 5)
        h = 5 * F.normalize(h.abs() if relu else h)
        V = F.normalize(W + 0.1 * torch.randn_like(W))
        b = torch.randn(C, dtype=torch.float64) * 10.0 ** -(seed % 4)
        assert loss(h, W, -W @ (shares @ h)) >= floor - 1e-12
        assert loss(h, V, b) >= bound - 1e-12
    assert math.isclose(cross_entropy_floor(C, relu=relu, counts=[7] * C), cross_entropy_floor(C, relu=relu))
    assert math.isclose(cross_entropy_bound(C, relu=relu), cross_entropy_floor(C, relu=relu), rel_tol=1e-9)
    order = torch.randperm(C).tolist()
    assert math.isclose(
        cross_entropy_floor(C, relu=relu, counts=[counts[i] for i in order]), floor, rel_tol=1e-8
    )


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("tau", [20.0, 30.0, 100.0, 300.0])
def test_a_tiny_floor_keeps_its_digits(tau, relu):
    "Two classes: each has as its margin twice the span of the features, times the other's share."
    span = tau * (math.sqrt(2) if relu else 2)
    for factor in (1.001, 2, 50):
        q = 1 / (1 + factor)
        p = 1 - q
        want = p * math.log1p(math.exp(-2 * span * q)) + q * math.log1p(math.exp(-2 * span * p))
        got = cross_entropy_floor(2, tau, relu, [factor, 1])
        assert math.isclose(got, want, rel_tol=1e-8)
    many = cross_entropy_floor(10, tau, relu, [2 ** (-c / 9) for c in range(10)])
    assert 0 < many < 1e-6
    assert many > cross_entropy_floor(10, tau, relu)


@pytest.mark.parametrize("C", [3, 10, 40])
@pytest.mark.parametrize("tau", [5.0, 30.0, 100.0])
@pytest.mark.parametrize("factor", [1e4, 1e6, 1e9])
def test_the_floor_of_one_class_that_is_nearly_all(C, tau, factor):
    "The rare classes are alike: by symmetry one angle, between them and the frequent class, is all there is."
    W = simplex_etf(C, dtype=torch.float64).numpy()  # symmetric
    across = W[1:] - W[1:] @ W[0][:, None] * W[0]
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    shares = np.array([factor] + [1.0] * (C - 1)) / (factor + C - 1)

    def loss(angle):
        h = tau * np.concatenate([W[:1], np.cos(angle) * W[:1] + np.sin(angle) * across])
        z = (h - shares @ h) @ W
        return shares @ np.array([np.logaddexp.reduce(row - row[c]) for c, row in enumerate(z)])

    best = minimize_scalar(loss, bounds=(0.0, np.pi), method="bounded", options={"xatol": 1e-12}).fun
    counts = [factor] + [1] * (C - 1)
    assert math.isclose(cross_entropy_floor(C, tau, counts=counts), best, rel_tol=1e-8)


@pytest.mark.parametrize("C", [2, 3, 10, 100, 1000])
@pytest.mark.parametrize("factor", [1, 1 + 1e-9, 2, 100, 10_000])
@pytest.mark.parametrize("tau", [0.5, 5.0, 50.0])
@pytest.mark.filterwarnings("error")
def test_the_bound_shares_out_the_whole_sum(C, factor, tau):
    counts = np.array([factor ** (-c / (C - 1)) for c in range(C)])
    shares = counts / counts.sum()
    best = C * tau * C / (C - 1)
    margins = _best_margins(best, shares)
    assert math.isclose(margins.sum(), best, rel_tol=1e-9)
    cost = shares / (1 + np.exp(margins) / (C - 1))  # Lagrange: the same for every class
    assert np.allclose(cost, cost[0], rtol=1e-8, atol=0)
    if factor == 1:
        floor = cross_entropy_floor(C, tau)
        assert math.isclose(cross_entropy_bound(C, tau), floor, rel_tol=1e-9)


@pytest.mark.parametrize("function", [cross_entropy_floor, cross_entropy_bound])
@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(C=1), "C=1"),
        (dict(C=10, tau=0), "tau=0"),
        (dict(C=10, tau=math.inf), "tau=inf"),
        (dict(C=3, counts=[1, 2]), "counts must hold 3 positive numbers"),
        (dict(C=3, counts=[1, 2, 0]), "counts must hold 3 positive numbers"),
        (dict(C=2, counts=[1, math.nan]), "counts must hold 2 positive numbers"),
    ],
)
def test_floor_names_bad_input(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(**arguments)


def test_the_floor_needs_no_torch():
    code = "import sys, ngc_etf.floor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
