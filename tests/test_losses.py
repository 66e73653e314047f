"NTCE and NONL: against their definitions, on several processes, at the edges."

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ngc_etf.heads import NearestETFHead, StandardHead
from ngc_etf.losses import nonl, ntce

LOSSES = [ntce, nonl]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def literal(loss, z, y):
    terms = []
    for i, c in enumerate(y):
        column = z[:, c] if loss is ntce else z[y != c, c]
        terms.append(column.logsumexp(0) - z[i, c])
    return torch.stack(terms).mean()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("N, C, present", [(1, 2, 2), (7, 3, 2), (40, 10, 10), (12, 30, 30)])
def test_the_definition(loss, N, C, present):
    z = torch.randn(N, C, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, present, (N,))
    if loss is nonl and len(y.unique()) == 1:
        assert loss(z, y) == 0
        return
    mine, theirs = loss(z, y), literal(loss, z, y)
    assert torch.allclose(mine, theirs, rtol=0, atol=1e-12)
    grads = [torch.autograd.grad(value, z)[0] for value in (mine, theirs)]
    assert torch.allclose(*grads, rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss):
    z = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 0, 1, 1, 2, 2, 2, 0])
    assert torch.autograd.gradcheck(lambda z: loss(z, y), z)
    assert torch.autograd.gradgradcheck(lambda z: loss(z, y), z)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_raised(loss, dtype):
    z, y = torch.randn(32, 4).to(dtype), torch.arange(32) % 4
    assert loss(z, y).dtype == torch.float32
    assert torch.allclose(loss(z, y), loss(z.float(), y))


@pytest.mark.parametrize("loss", LOSSES)
def test_extreme_logits(loss):
    y = torch.arange(12) % 4
    for scale in (1e-30, 1e30):
        z = (scale * torch.randn(12, 4)).requires_grad_()
        assert loss(z, y).isfinite()
        assert torch.autograd.grad(loss(z, y), z)[0].isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("classes", [1, 4])
def test_a_logit_that_is_not_finite_is_no_loss_of_zero(loss, wrong, classes):
    y = torch.arange(8) % classes
    row, entry = torch.randn(2, 8, 4)
    row[3] = wrong
    entry[3, y[3]] = wrong
    for z in (row, entry):
        assert not loss(z, y).isfinite()


@pytest.mark.parametrize("n", [1, 5])
def test_one_class_alone(n):
    z, y = torch.randn(n, 3, requires_grad=True), torch.full((n,), 1)
    assert nonl(z, y) == 0 and not torch.autograd.grad(nonl(z, y), z)[0].any()
    assert ntce(z, y).isfinite() and (ntce(z, y) > 0 if n > 1 else ntce(z, y) == 0)


BAD = [
    (torch.zeros(4), torch.zeros(4, dtype=torch.long), r"floating-point logits z \(N, C\)"),
    (torch.zeros(4, 3, dtype=torch.long), torch.zeros(4, dtype=torch.long), "floating-point"),
    (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), "N=0"),
    (torch.zeros(4, 3), torch.zeros(5, dtype=torch.long), r"labels must have shape \(4,\)"),
    (torch.zeros(4, 3), torch.full((4,), 3), "0..2, got 3 to 3"),
    (torch.zeros(4, 3), torch.full((4, 3), 1 / 3), "hard labels"),
    (torch.zeros(4, 3), torch.zeros(4), "integers"),
]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("z, y, says", BAD)
def test_bad_input(loss, z, y, says):
    with pytest.raises(ValueError, match=says):
        loss(z, y)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("Head", [NearestETFHead, StandardHead])
def test_any_head_meets_any_loss(loss, Head):
    head, h, y = Head(8, 3), torch.randn(12, 8, requires_grad=True), torch.arange(12) % 3
    loss(head(h, y), y).backward()
    assert h.grad.isfinite().all() and h.grad.norm() > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_compiled(loss):
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    z, y = torch.randn(12, 3, requires_grad=True), torch.arange(12) % 3
    assert torch.allclose(compiled(z, y), loss(z, y))
    assert torch.allclose(*(torch.autograd.grad(f(z, y), z)[0] for f in (compiled, loss)), atol=1e-6)


def batch(sizes):
    "One (x, y) a rank; the classes differ between the ranks, and the sizes may."
    g = torch.Generator().manual_seed(1)
    for rank, n in enumerate(sizes):
        yield torch.randn(n, 6, generator=g, dtype=torch.float64), (torch.arange(n) + rank) % (3 + rank)


def net():
    torch.manual_seed(0)
    return nn.Linear(6, 4).double()


def worker(rank, sizes, port, out):
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=len(sizes))
    x, y = list(batch(sizes))[rank]
    results = {}
    for loss in LOSSES:
        model = DistributedDataParallel(net())
        value = loss(model(x), y)
        value.backward()
        results[loss.__name__] = (value.detach(), model.module.weight.grad)
    torch.save(results, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("sizes", [(8, 8), (5, 11)])
def test_processes_share_one_batch(sizes, tmp_path):
    "Value and gradient under DDP are those of one process with all samples, uneven shards included."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(worker, (sizes, port, str(tmp_path)), nprocs=len(sizes), start_method="forkserver")
    x, y = (torch.cat(parts) for parts in zip(*batch(sizes)))
    for loss in LOSSES:
        one = net()
        value = loss(one(x), y)
        value.backward()
        for rank in range(len(sizes)):
            theirs, grad = torch.load(f"{tmp_path}/{rank}.pt")[loss.__name__]
            assert torch.allclose(theirs, value, rtol=0, atol=1e-12)
            assert torch.allclose(grad, one.weight.grad, rtol=0, atol=1e-12)
