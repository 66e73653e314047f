"AGD where it meets other software: fastai, dtypes, checkpoints."

import importlib
import tempfile
import copy
from functools import partial
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from ngc_etf.agd import AGD


def tiny(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3, bias=False)
    ).to(dtype)


def data(n=24, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, 8, 8, generator=g).to(dtype), torch.arange(n) % 3


def learner(opt_func, net):
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    importlib.import_module("fastai.callback.progress")  # gives the Learner its no_bar
    from fastai.learner import Learner

    x, y = data()
    dl = DataLoader(list(zip(x, y)), bs=8)
    return Learner(
        DataLoaders(dl, dl), net, loss_func=F.cross_entropy, opt_func=opt_func, path=tempfile.mkdtemp()
    )


@pytest.mark.parametrize("opt_func", ["plain", "mapped"])
def test_fastai_trains_the_same_as_a_torch_loop(opt_func):
    from fastai.optimizer import OptimWrapper

    net, ref = tiny(), tiny()
    plain = opt_func == "plain"
    func = (
        partial(OptimWrapper, opt=AGD, gain=3.0)
        if plain
        else partial(OptimWrapper, opt=AGD, hp_map={"gain": "lr"})
    )
    learn = learner(func, net)
    with learn.no_bar(), learn.no_logging():
        learn.fit(3, lr=1e-4 if plain else 3.0)
    opt, (x, y) = AGD(ref.parameters(), gain=3.0), data()
    for _ in range(3):
        for i in range(0, 24, 8):
            opt.zero_grad()
            F.cross_entropy(ref(x[i : i + 8]), y[i : i + 8]).backward()
            opt.step()
    for p, q in zip(net.parameters(), ref.parameters()):
        torch.testing.assert_close(p, q)


def test_bare_wrapper_and_checkpoint(tmp_path):
    from fastai.optimizer import OptimWrapper

    learn = learner(partial(OptimWrapper, opt=AGD), tiny())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    learn.path = tmp_path
    learn.save("one", with_opt=True)
    before = copy.deepcopy(learn.model.state_dict())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    assert any(not torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
    learn.load("one", with_opt=True)
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())


@pytest.mark.parametrize("dtype,tol", [(torch.float64, 1e-12), (torch.bfloat16, 0.02)])
def test_dtypes_agree_with_float32(dtype, tol):
    outs = []
    for dt in (torch.float64, dtype):
        p = nn.Parameter(torch.ones(6, 4, 3, 3, dtype=dt))
        p.grad = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0)).to(dt)
        AGD([p], gain=2.0).step()
        assert p.dtype == dt
        outs.append(p.detach().double())
    torch.testing.assert_close(outs[1], outs[0], atol=tol, rtol=tol)


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-30, 1e15])
def test_extreme_gradients_stay_finite(size):
    p = nn.Parameter(torch.ones(4, 4))
    p.grad = torch.full((4, 4), size)
    AGD([p], gain=10.0).step()
    assert p.isfinite().all()
    assert (p - 1).norm() <= 10 * 0.5 * torch.log1p(torch.tensor(4e15)) + 1


def test_memory_layout_does_not_matter():
    p = nn.Parameter(torch.randn(8, 4, 3, 3))
    q = nn.Parameter(p.detach().clone(memory_format=torch.channels_last))
    p.grad = torch.randn(8, 4, 3, 3)
    q.grad = p.grad.clone(memory_format=torch.channels_last)
    AGD([p]).step()
    AGD([q]).step()
    torch.testing.assert_close(p, q)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_by_default_starts_orthogonal(dtype):
    torch.set_default_dtype(dtype)
    try:
        p = nn.Parameter(torch.zeros(6, 4))
        AGD([p]).init_weights(torch.Generator().manual_seed(0))
    finally:
        torch.set_default_dtype(torch.float32)
    p = p.detach().float()
    torch.testing.assert_close(p.T @ p, 1.5 * torch.eye(4), atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    "net", [nn.Linear(3, 2), nn.Conv2d(2, 2, 3, bias=True), nn.BatchNorm2d(4), nn.Conv1d(2, 2, 3, bias=False)]
)
def test_refuses_what_is_no_linear_map(net):
    with pytest.raises(ValueError, match=r"got a parameter of shape \(.*build the network without biases"):
        AGD(net.parameters())


def test_a_bias_unfrozen_later_is_refused_too():
    net = nn.Linear(3, 2)
    net.bias.requires_grad_(False)
    opt = AGD(net.parameters())
    net.bias.requires_grad_(True)
    net(torch.ones(1, 3)).sum().backward()
    before = net.weight.detach().clone()
    with pytest.raises(ValueError, match="shape \\(2,\\)"):
        opt.step()
    assert torch.equal(before, net.weight)


@pytest.mark.parametrize("gain", [0, -1.0, float("inf"), float("nan")])
def test_gain_must_be_positive(gain):
    with pytest.raises(ValueError, match="gain="):
        AGD(tiny().parameters(), gain=gain)
