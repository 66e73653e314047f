"""Chapter 06 on grids, on two processes, and against a second implementation: what would be dull to read in the notebook."""

import math
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sklearn.neighbors import NearestCentroid

from ngc_etf import metrics as M
from ngc_etf.simplex import haar_direction, simplex_etf


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
        if W is not None and metric._rule is None:
            metric.judge(W, b)
    return metric


@pytest.mark.parametrize(
    "C,d,N", [(2, 2, 20), (2, 30, 9), (5, 4, 60), (7, 3, 90), (10, 40, 300), (30, 64, 100)]
)
def test_functions_against_numpy(C, d, N):
    h, y, W, b = data(C, d, N)
    H_bar = M._centre(*M._class_means(h, y, C))[0]
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
    close(fill(M.NeuralCollapse(C, d), h, y, size, W, b, seed).compute(), plain(h, y, W, b))


@pytest.mark.parametrize("dtype,tol", [(torch.float32, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, 5e-2)])
def test_feature_dtypes(dtype, tol):
    "Features of any floating type; the answer is float64 and differs by the features' own rounding."
    h, y, W, b = data(6, 20, 300)
    out = fill(M.NeuralCollapse(6, 20), h.to(dtype), y, 50).compute(W.to(dtype))
    assert all(v.dtype == torch.float64 for v in out.values())
    assert M.nc1(h.to(dtype), y, 6).dtype == torch.float64
    close(out, {k: plain(h, y, W, b)[k] for k in ("nc1", "nc2", "nc3", "equinorm", "cdnv")}, tol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 40, 2000])
def test_shift_of_1000(dtype, size):
    h, y, *_ = data(8, 24, 2000)
    h = h.float()
    far = fill(M.NeuralCollapse(8, 24, dtype=dtype), h + 1000, y, size).compute()
    true = M.nc1(h, y, 8)
    assert abs(far["nc1"] / true - 1) < 0.02


def test_float32_states_under_autocast():
    h, y, W, b = data(6, 20, 300)
    with torch.autocast("cpu", torch.bfloat16):
        out = fill(M.NeuralCollapse(6, 20, dtype=torch.float32), h.float(), y, 50).compute(W.float())
    close(out, {k: plain(h, y, W, b)[k] for k in ("nc1", "nc2", "nc3", "cdnv")}, 1e-4)


def test_absent_classes():
    C, d, skip = 8, 12, (2, 5)
    h, y, W, b = data(C, d, 150, skip=skip)
    keep = [c for c in range(C) if c not in skip]
    small = torch.tensor([keep.index(c) if c in keep else -1 for c in range(C)])[y]
    out, ref = fill(M.NeuralCollapse(C, d), h, y, 20, W, b).compute(), plain(h, small, W[keep], b[keep])
    close(out, {k: ref[k] for k in ("nc1", "cdnv")})
    close({"nc1": M.nc1(h, y, C), "cdnv": M.cdnv(h, y, C)}, {k: ref[k] for k in ("nc1", "cdnv")})
    H_bar = M._centre(*M._class_means(h, y, C))[0]
    assert (H_bar[:, list(skip)] == 0).all()
    close(out, {"nc3": M.nc3(W, H_bar)})
    nearest = torch.tensor(keep)[NearestCentroid().fit(h.numpy(), small.numpy()).predict(h.numpy())]
    close(out, {"nc4": ((h @ W.T + b).argmax(1) != nearest).double().mean()})
    cols = H_bar[:, keep].norm(dim=0)
    rows = W.norm(dim=1)
    close(out, {"equinorm": (rows.std() / rows.mean() - cols.std() / cols.mean()).abs()})


@pytest.mark.parametrize("C", [2, 3, 10, 100])
@pytest.mark.parametrize("relu", [False, True])
def test_floor_is_attained(C, relu):
    "The collapsed set of either kind sits on its floor; random unit rows and features, never negative or free, lie above."
    W = simplex_etf(C, dtype=torch.float64).T
    h = 5 * (torch.eye(C, dtype=torch.float64) if relu else W)
    floor = M.cross_entropy_floor(C, 5.0, relu=relu)
    loss = lambda h, W: torch.nn.functional.cross_entropy(h @ W.T, torch.arange(C)).item()
    assert math.isclose(loss(h, W), floor, rel_tol=1e-12)
    for seed in range(20):
        torch.manual_seed(seed)
        near = W + 0.1 * torch.randn_like(W) * (seed > 9)
        x = h + torch.randn_like(h) * 10.0 ** -(seed % 10)
        x = 5 * torch.nn.functional.normalize(x.abs() if relu else x)
        assert loss(x, torch.nn.functional.normalize(near)) >= floor - 1e-12


def test_never_one_scatter_a_class():
    "ImageNet's states: one d x d matrix, about 50 MB whatever the number of samples; and they pickle."
    m = M.NeuralCollapse(1000, 2048)
    assert sum(t.numel() * t.element_size() for t in m.metric_state.values()) < 51e6
    small = fill(M.NeuralCollapse(4, 6), *data(4, 6, 30)[:2], 7)
    copy = pickle.loads(pickle.dumps(small))
    close(copy.compute(), small.compute())
    small.reset()
    assert small.count.sum() == 0 and not small.update_called


def test_forward_and_merge_and_state_dict():
    h, y, W, b = data(5, 9, 80)
    whole, parts = fill(M.NeuralCollapse(5, 9), h, y, 80), [M.NeuralCollapse(5, 9, bins=10) for _ in range(3)]
    for i in range(3):
        parts[i](h[i::3], y[i::3])
        parts[i].judge(W, b, *(lambda n, m, *_: (m, M._centre(m, n)[1]))(*whole._moments()))
    for p, i in zip(parts, range(3)):
        p.update(h[i::3], y[i::3])
    parts[0].merge_state(parts[1])
    parts[0].merge_state(parts[2].metric_state)
    assert parts[0].count.sum() == 160 and parts[0].tally[0] == 80
    close(parts[0].compute(), plain(h, y, W, b))
    assert parts[0].compute()["margin_hist"].sum() == 80


def _rank(rank, world, path, queue):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    h, y, W, b = data(6, 10, 150)
    h, y = (h[:40], y[:40]) if rank == 0 else (h[40:], y[40:])
    m = fill(M.NeuralCollapse(6, 10, bins=8), h, y, 16, W, b)
    out = m.compute()
    local = m.count.sum().item()  # back to this rank's own samples afterwards
    queue.put((rank, {k: v.tolist() for k, v in out.items()}, local, M.nc1(h, y, 6).item()))
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_rank, (2, tmp_path / "store", queue), nprocs=2)
    (_, a, n0, nc1_0), (_, b, n1, nc1_1) = sorted(queue.get() for _ in range(2))
    assert a == b and (n0, n1) == (40, 110)
    h, y, W, bias = data(6, 10, 150)
    close(a, plain(h, y, W, bias))
    assert sum(a["margin_hist"]) == 150
    assert math.isclose(nc1_0, M.nc1(h[:40], y[:40], 6).item()), "the functions stay on their own process"


def test_cross_checks_with_the_means_chapter():
    from ngc_etf.means import centred_means

    h, y, *_ = data(6, 10, 90, skip=(3,))
    for ours, theirs in zip(M._centre(*M._class_means(h, y, 6)), centred_means(h, y, 6)):
        assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("C,d", [(2, 2), (10, 512), (100, 128)])
def test_collapse_scores_its_ideal(C, d):
    W = simplex_etf(
        C, U=haar_direction(d, C, torch.Generator().manual_seed(C), dtype=torch.float64)
    ).T.contiguous()
    y = torch.arange(3 * C) % C
    h = 5 * W[y] + 7
    out = fill(M.NeuralCollapse(C, d), h, y, 11, W, -W @ torch.full((d,), 7.0).double()).compute()
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
