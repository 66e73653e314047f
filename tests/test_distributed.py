"Two and four gloo processes: equal to each other exactly, and to one process on the joined batch to 1e-5."
import copy, os, socket
import pytest, torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ngc_etf.heads import FixedETFHead, NearestETFHead

D, C, STEPS = 12, 5, 4


class Net(nn.Module):
    def __init__(self, Kind):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(8, D, bias=False), Kind(D, C)
        self.double()  # an absent class leaves singular values of size delta, and float32 noise is divided by them

    def forward(self, x, y): return self.head(self.body(x), y)


def batches(sizes):
    "For each step a list of one (x, y) a rank; class 4 lives on the last rank only, class 3 comes in the third step."
    g = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        out = []
        for rank, n in enumerate(sizes):
            y = torch.randint(0, 3 if step < 2 else 4, (n,), generator=g)
            if rank == len(sizes) - 1: y[0] = 4
            out.append((torch.randn(n, 8, generator=g, dtype=torch.float64), y))
        yield out


def train(net, steps, model=None):
    "Losses' gradients at each step, with a plain SGD step between."
    model, opt, grads = model or net, torch.optim.SGD(net.parameters(), .1), []
    for x, y in steps:
        opt.zero_grad()
        F.cross_entropy(model(x, y), y).backward()
        grads.append(net.body.weight.grad.clone()); opt.step()
    return grads


def worker(rank, sizes, port, kind, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=len(sizes))
    net = Net(kind)
    grads = train(net, [b[rank] for b in batches(sizes)], DistributedDataParallel(net, broadcast_buffers=False))
    torch.save({"state": net.state_dict(), "grads": grads}, f"{out}/{rank}.pt")
    dist.destroy_process_group()


def run(sizes, kind, out):
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    mp.start_processes(worker, (sizes, port, kind, str(out)), nprocs=len(sizes), start_method="fork")
    return [torch.load(f"{out}/{r}.pt") for r in range(len(sizes))]


@pytest.mark.parametrize("sizes", [(16, 16), pytest.param((8, 8, 8, 8), marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [NearestETFHead, FixedETFHead])
def test_processes_agree_with_one(sizes, kind, tmp_path):
    torch.set_num_threads(1)
    ranks = run(sizes, kind, tmp_path)
    one = Net(kind)
    grads = train(one, [tuple(map(torch.cat, zip(*b))) for b in batches(sizes)])
    for other in ranks[1:]:
        for k, v in ranks[0]["state"].items(): assert torch.equal(v, other["state"][k]), k
    for k, v in one.state_dict().items(): assert torch.allclose(v.double(), ranks[0]["state"][k].double(), atol=1e-5), k
    for mine, theirs in zip(grads, ranks[0]["grads"]): assert torch.allclose(mine, theirs, atol=1e-5)


def test_uneven_batches_agree_on_the_classifier(tmp_path):
    "Uneven shards: every rank counts each of its samples once, so means, W and b are those of the joined batch."
    torch.set_num_threads(1)
    sizes = (5, 11)
    states = [r["state"] for r in run(sizes, NearestETFHead, tmp_path)]
    for k, v in states[0].items(): assert torch.equal(v, states[1][k]), k
    assert states[0]["head.means.seen"].sum() == STEPS * sum(sizes)
