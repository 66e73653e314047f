"Two and four gloo processes: equal to each other exactly, and to one process on the joined batch to 1e-5."

import socket
import pytest, torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ngc_etf.heads as heads
from ngc_etf.heads import FixedETFHead, NearestETFHead
from ngc_etf.simplex import haar_direction

D, C, STEPS = 12, 5, 4


class Net(nn.Module):
    def __init__(self, Kind, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(8, D, bias=False), Kind(D, C)
        self.to(dtype)

    def forward(self, x, y):
        return self.head(self.body(x), y)


def batches(sizes, dtype, late):
    "For each step a list of one (x, y) a rank; class 4 lives on the last rank only, class 3 where it is late comes in the third step."
    g = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        out = []
        for rank, n in enumerate(sizes):
            y = torch.randint(0, 3 if late and step < 2 else 4, (n,), generator=g)
            if rank == len(sizes) - 1:
                y[0] = 4
            if rank == 0 and not late:
                y[:4] = torch.arange(4)
            out.append((torch.randn(n, 8, generator=g, dtype=dtype), y))
        yield out


def train(net, steps, model=None, lr=0.1):
    "Losses' gradients at each step, with a plain SGD step between."
    model, opt, grads = model or net, torch.optim.SGD(net.parameters(), lr), []
    for x, y in steps:
        opt.zero_grad()
        F.cross_entropy(model(x, y), y).backward()
        grads.append(net.body.weight.grad.clone())
        opt.step()
    return grads


def same_everywhere(rank):
    pass


def another_device(rank):
    "Rank 1 says that it is another device, and rounds (here: errs) accordingly."
    heads._hardware = lambda device: f"device {rank}"
    solve = heads.nearest_etf

    def perturbed(*args, **kw):
        U = solve(*args, **kw)
        if rank == 1:
            U.data.add_(1e-6)
        return U

    heads.nearest_etf = perturbed


def worker(rank, sizes, port, kind, dtype, late, lr, setup, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=len(sizes))
    setup(rank)
    net = Net(kind, dtype)
    grads = train(
        net,
        [b[rank] for b in batches(sizes, dtype, late)],
        DistributedDataParallel(net, broadcast_buffers=False),
        lr,
    )
    torch.save(
        {"state": net.state_dict(), "grads": grads, "mixed": getattr(net.head, "_mixed", None)},
        f"{out}/{rank}.pt",
    )
    dist.destroy_process_group()


def run(sizes, kind, out, dtype=torch.float64, late=True, lr=0.1, setup=same_everywhere):
    torch.set_num_threads(1)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(
        worker, (sizes, port, kind, dtype, late, lr, setup, str(out)), nprocs=len(sizes), start_method="fork"
    )
    return [torch.load(f"{out}/{r}.pt") for r in range(len(sizes))]


def joined(sizes, dtype, late):
    return [tuple(map(torch.cat, zip(*b))) for b in batches(sizes, dtype, late)]


def identical(ranks):
    for other in ranks[1:]:
        for k, v in ranks[0]["state"].items():
            assert torch.equal(v, other["state"][k]), k


def close(mine, theirs, atol):
    "Means, W, b and the rest of the state, but for the hidden part of U that W does not show (U_prox in float32)."
    for k, v in mine.items():
        if v.dtype == torch.float32 and k.endswith("U_prox"):
            continue
        assert torch.allclose(v.double(), theirs[k].double(), rtol=0, atol=atol), (
            k,
            (v.double() - theirs[k].double()).abs().max(),
        )


@pytest.mark.parametrize("sizes", [(16, 16), pytest.param((8, 8, 8, 8), marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kind, dtype, late, atol",
    [
        (NearestETFHead, torch.float64, True, 1e-5),
        (FixedETFHead, torch.float64, True, 1e-5),
        (NearestETFHead, torch.float32, False, 1e-5),
        (NearestETFHead, torch.float32, True, 1e-4),
    ],
)  # a class unseen: directions known to eps/delta only (chapter 05)
def test_processes_agree_with_one(sizes, kind, dtype, late, atol, tmp_path):
    ranks = run(sizes, kind, tmp_path, dtype, late)
    one = Net(kind, dtype)
    grads = train(one, joined(sizes, dtype, late))
    identical(ranks)
    close(one.state_dict(), ranks[0]["state"], atol)
    for mine, theirs in zip(grads, ranks[0]["grads"]):
        assert torch.allclose(mine, theirs, rtol=0, atol=atol), (mine - theirs).abs().max()


@pytest.mark.parametrize("dtype, late", [(torch.float64, True), (torch.float32, False)])
def test_uneven_batches_agree_on_the_classifier(dtype, late, tmp_path):
    "Uneven shards: every rank counts each of its samples once, so means, W and b are those of the joined batch (the gradients, which DDP averages by rank, are not)."
    sizes = (5, 11)
    ranks = run(sizes, NearestETFHead, tmp_path, dtype, late, lr=0.0)
    identical(ranks)
    one = Net(NearestETFHead, dtype)
    train(one, joined(sizes, dtype, late), lr=0.0)
    close(one.state_dict(), ranks[0]["state"], 1e-5)
    assert ranks[0]["state"]["head.means.seen"].sum() == STEPS * sum(sizes)


@pytest.mark.parametrize("kind", [NearestETFHead])
def test_other_hardware_takes_rank_0s_direction(kind, tmp_path):
    "Where the devices differ U is broadcast: the ranks agree to the bit although one of them rounds otherwise, and the gradient is still the adjoint's."
    sizes = (16, 16)
    alike, mixed = (
        run(sizes, kind, tmp_path, setup=setup, lr=0.0) for setup in (same_everywhere, another_device)
    )
    assert [r["mixed"] for r in alike + mixed] == [False, False, True, True]
    identical(mixed)
    close(alike[0]["state"], mixed[0]["state"], 1e-12)
    for mine, theirs in zip(alike[0]["grads"], mixed[0]["grads"]):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-5) and mine.norm() > 1e-3


def haar(d, C):
    return NearestETFHead(
        d,
        C,
        start=haar_direction(
            d, C, generator=torch.Generator().manual_seed(dist.get_rank() if dist.is_initialized() else 0)
        ),
    )


def test_a_start_of_its_own_on_each_rank(tmp_path):
    "Each process draws another Haar direction: all take that of rank 0, and equal one process that starts there."
    sizes = (16, 16)
    ranks = run(sizes, haar, tmp_path)
    identical(ranks)
    one = Net(haar, torch.float64)
    train(one, joined(sizes, torch.float64, True))
    close(one.state_dict(), ranks[0]["state"], 1e-5)
