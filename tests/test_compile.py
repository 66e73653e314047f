"Heads under torch.compile: one graph a mode, the eager head's numbers, no recompilation, no warning."

import copy
import warnings

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ngc_etf.heads import FixedETFHead, NearestETFHead, StandardHead
from test_heads import step

N, D, C = 24, 16, 6


class Net(nn.Module):
    def __init__(self, head, repeated=None):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, D), nn.ReLU())
        self.head = head
        self.repeated = repeated  # what activation checkpointing repeats: "body", "all" or nothing

    def logits(self, x, y):
        return self.head(self.body(x), y)

    def forward(self, x, y=None):
        if self.repeated == "all":
            return checkpoint(self.logits, x, y, use_reentrant=False)
        if self.repeated == "body":
            return self.head(checkpoint(self.body, x, use_reentrant=False), y)
        return self.logits(x, y)


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


class Graphs:
    "A back end that counts the graphs and runs them as they are."

    def __init__(self):
        self.n = 0

    def __call__(self, graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        self.n += 1
        return aot_eager(graph, inputs)


def batches(steps):
    """Clusters with a class that comes after a third of the steps.

    There is something to learn in them. On noise a change of 1e-8 in the weights parts two eager runs by
    1e-2 in 200 steps.
    """
    centres = torch.randn(C, 8, generator=torch.Generator().manual_seed(7))
    g = torch.Generator().manual_seed(1)
    for i in range(steps):
        y = torch.randperm(N, generator=g) % (C - 1 if 3 * i < steps else C)
        yield centres[y] + 0.5 * torch.randn(N, 8, generator=g), y


def compare(head, steps, backend, switch=()):
    "Losses of an eager and a compiled twin, largest difference of the logits at evaluation, the twins."
    eager = Net(head)
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    opts = [torch.optim.SGD(net.parameters(), 0.1) for net in (eager, twin)]
    losses, apart = [], 0.0
    for i, (x, y) in enumerate(batches(steps)):
        losses.append([step(net, opt, x, y) for net, opt in zip((eager, compiled), opts)])
        if i not in switch:
            continue
        eager.eval()
        compiled.eval()
        apart = max(apart, (eager(x) - compiled(x)).abs().max().item())
        eager.train()
        compiled.train()
    return torch.tensor(losses), apart, eager, twin


KINDS = [
    (NearestETFHead, {}, 200),
    (NearestETFHead, dict(solve_every=4), 200),
    (StandardHead, {}, 20),
    (FixedETFHead, {}, 20),
    (FixedETFHead, dict(detach_mean=True), 20),
    (NearestETFHead, dict(ddn_grad=False), 20),
    (NearestETFHead, dict(lag=True), 20),
    (NearestETFHead, dict(solve_first=False, delta=0.5), 20),
    (NearestETFHead, dict(alpha=0.2, validate=False, start="haar"), 20),
]


@pytest.mark.parametrize("Head, kw, steps", KINDS)
def test_many_steps(Head, kw, steps):
    "Losses to 5e-5, while a class is unseen as well; train and eval switch back and forth."
    graphs = Graphs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses, apart, eager, twin = compare(Head(D, C, **kw), steps, graphs, switch=(5, steps // 2))
    assert (losses[:, 0] - losses[:, 1]).abs().max() < 5e-5 and apart < 1e-3
    assert graphs.n == 2  # training and evaluation
    for name, value in eager.state_dict().items():
        if value.dtype == torch.int64:
            assert torch.equal(value, twin.state_dict()[name]), name


def test_the_second_step_is_already_compiled():
    graphs, seen = Graphs(), []
    compiled = torch.compile(Net(NearestETFHead(D, C)), fullgraph=True, backend=graphs)
    for x, y in batches(4):
        compiled(x, y)
        seen.append(graphs.n)
    assert seen == [1, 1, 1, 1]


def test_float64_to_rounding():
    losses, apart, eager, twin = compare(NearestETFHead(D, C, solve_every=3), 30, Graphs())
    eager, twin = (copy.deepcopy(eager).double() for _ in range(2))
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for x, y in batches(9):
        assert torch.allclose(eager(x.double(), y), compiled(x.double(), y), rtol=0, atol=1e-9)
    for name, value in eager.state_dict().items():
        assert torch.allclose(value, twin.state_dict()[name], rtol=0, atol=1e-9), name


@pytest.mark.parametrize("kw", [{}, dict(solve_every=2)])
def test_gradients(kw):
    "Both streams, at a step that solves and at one that holds."
    eager = NearestETFHead(D, C, **kw).double()
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend="aot_eager")
    y = torch.arange(N) % C
    for _ in range(4):
        h = torch.randn(N, D, dtype=torch.float64)
        leaves = [h.clone().requires_grad_() for _ in range(2)]
        for head, leaf in zip((eager, compiled), leaves):
            F.cross_entropy(head(leaf, y), y).backward()
        assert torch.allclose(leaves[0].grad, leaves[1].grad, rtol=0, atol=1e-10)


def test_the_operator():
    "torch's own checks of a custom operator: schema, shapes without values, autograd."
    H, done = torch.randn(D, C, dtype=torch.float64, requires_grad=True), torch.tensor(4)
    U_prox = torch.eye(D, C, dtype=torch.float64)
    for every in (1, 3):
        args = (H / H.norm(), U_prox, done, 1e-1, every, "auto")
        torch.library.opcheck(torch.ops.ngc_etf.solve_or_hold.default, args)
    torch.library.opcheck(torch.ops.ngc_etf.once.default, (U_prox,))

    def solve(H):
        return torch.ops.ngc_etf.solve_or_hold(H, U_prox, done, 1e-1, 1, "auto")[0]

    assert torch.autograd.gradcheck(solve, (H / H.norm()).detach().requires_grad_())


def test_eager_and_compiled_steps_mix():
    "The step number and the seal of eval() hold on, whoever made the step."
    eager, twin = (NearestETFHead(D, C, solve_every=2) for _ in range(2))
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for i in range(6):
        h, y = torch.randn(N, D), torch.arange(N) % C
        which = twin if i in (2, 3) else compiled
        assert torch.allclose(eager(h, y), which(h, y), rtol=0, atol=1e-4)
        if i == 4:
            twin.eval()
            assert twin.is_etf()
            twin.train()
    assert twin.means.t == 6


def test_resuming_a_compiled_head():
    head = NearestETFHead(D, C)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    data = [(torch.randn(N, D), torch.arange(N) % C) for _ in range(6)]
    states = []
    for h, y in data:
        states.append(copy.deepcopy(head.state_dict()))
        last = compiled(h, y)
    head.load_state_dict(states[3])
    for h, y in data[3:]:
        again = compiled(h, y)
    assert torch.equal(again, last) and head.means.t == 6
    head.load_state_dict(states[0])
    assert torch.equal(compiled(*data[0]), NearestETFHead(D, C)(*data[0]))


def test_labels_through_targets():
    eager, twin = (NearestETFHead(D, C) for _ in range(2))
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for i in range(4):
        h, y = torch.randn(N, D), torch.randperm(N) % C
        twin.targets = y
        assert torch.allclose(eager(h, y), compiled(h), rtol=0, atol=1e-4)
        twin.targets = None
    assert twin.means.t == 4


@pytest.mark.parametrize("y", [torch.full((N,), C), torch.full((N,), -1)])
def test_bad_labels_are_refused(y):
    head = NearestETFHead(D, C)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    good = torch.arange(N) % C
    compiled(torch.randn(N, D), good)
    state = copy.deepcopy(head.state_dict())
    with pytest.raises(ValueError, match="must lie in 0..5"):
        compiled(torch.randn(N, D), y)
    for name, value in head.state_dict().items():
        assert torch.equal(value, state[name]), name
    compiled(torch.randn(N, D), good)


@pytest.mark.parametrize("repeated", ["body", "all"])
def test_a_checkpoint_inside(repeated):
    "The compiler sees it: one step for one batch, and the plain run's gradient."
    torch.manual_seed(0)
    plain, other = Net(NearestETFHead(D, C)), Net(NearestETFHead(D, C), repeated)
    other.load_state_dict(plain.state_dict())
    compiled = torch.compile(other, fullgraph=repeated == "body", backend="aot_eager")
    for x, y in batches(4):
        for net in (plain, compiled):
            net.zero_grad()
            F.cross_entropy(net(x, y), y).backward()
        grads = [net.body[0].weight.grad for net in (plain, other)]
        assert torch.allclose(*grads, rtol=0, atol=1e-4)
    assert other.head.means.t == 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_outside_is_refused(reentrant):
    compiled = torch.compile(Net(NearestETFHead(D, C)), backend="aot_eager")
    x, y = torch.randn(N, 8, requires_grad=True), torch.arange(N) % C
    z = checkpoint(compiled, x, y, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="put the checkpoint inside the compiled model"):
        F.cross_entropy(z, y).backward()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_autocast(kind):
    eager, twin = (Net(NearestETFHead(D, C)) for _ in range(2))
    twin.load_state_dict(eager.state_dict())
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for x, y in batches(3):
        with torch.autocast("cpu", kind):
            a, b = eager(x, y), compiled(x, y)
        assert b.dtype == kind and torch.allclose(a, b, rtol=0, atol=0.05)
    assert twin.head.is_etf()


@pytest.mark.slow
@pytest.mark.parametrize("kw", [{}, dict(solve_every=4)])
def test_machine_code(kw):
    "The same through inductor."
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module=r"torch\._(dynamo|inductor).*")
        losses, apart, eager, twin = compare(NearestETFHead(D, C, **kw), 60, "inductor", switch=(30,))
    assert (losses[:, 0] - losses[:, 1]).abs().max() < 1e-5 and apart < 1e-3
    stats = torch._dynamo.utils.counters["stats"]
    assert stats["unique_graphs"] == 2 and twin.head.means.t == 60


@pytest.mark.cuda
@pytest.mark.parametrize("kw", [{}, dict(solve_every=4)])
def test_cuda_graphs(kw):
    "mode='reduce-overhead': the first step asks the host; later ones, solved each time, run as CUDA graphs."
    eager = Net(NearestETFHead(D, C, **kw)).cuda()
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, mode="reduce-overhead")
    opts = [torch.optim.SGD(net.parameters(), 0.1) for net in (eager, twin)]
    for x, y in batches(20):
        losses = []
        for net, opt in zip((eager, compiled), opts):
            torch.compiler.cudagraph_mark_step_begin()
            losses.append(step(net, opt, x.cuda(), y.cuda()))
        assert abs(losses[0] - losses[1]) < 1e-4
    assert twin.head.means.t == 20 and twin.head.is_etf()
