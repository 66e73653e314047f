"The heads in the loops people really use: resume, copies, averaging, half precision, export, bad input."

import copy, io, pickle
import pytest, torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import ngc_etf.procrustes as procrustes
from ngc_etf.heads import FixedETFHead, NearestETFHead, StandardHead

N, D, C = 24, 16, 6
HEADS = [StandardHead, FixedETFHead, NearestETFHead]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def off_etf(W):
    return (W @ W.T - C / (C - 1) * (torch.eye(C) - 1 / C)).abs().max().item()


class Net(nn.Module):
    def __init__(self, head=None):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, D), nn.BatchNorm1d(D), nn.ReLU())
        self.head = head or NearestETFHead(D, C)

    def forward(self, x, y=None):
        return self.head(self.body(x), y)


def batches(steps=6):
    return [
        (torch.randn(N, 8), torch.randperm(N) % (C - 1 if i < 2 else C)) for i in range(steps)
    ]  # one class comes late


def step(net, opt, x, y):
    loss = F.cross_entropy(net(x, y), y)
    opt.zero_grad()
    loss.backward()
    opt.step()
    return loss.item()


def fresh(Head, **kw):
    net = Net(Head(D, C, **kw))
    return net, torch.optim.Adam(net.parameters(), 1e-2)


@pytest.mark.parametrize(
    "Head, kw",
    [
        (StandardHead, {}),
        (FixedETFHead, {}),
        (NearestETFHead, {}),
        (NearestETFHead, dict(solve_every=3, alpha=0.2)),
    ],
)
def test_resume_at_every_step(Head, kw):
    data, files, losses = batches(), [], []
    net, opt = fresh(Head, **kw)
    for x, y in data:
        file = io.BytesIO()
        torch.save({"model": net.state_dict(), "opt": opt.state_dict()}, file)
        files.append(file)
        losses.append(step(net, opt, x, y))
    for i, file in enumerate(files):
        torch.manual_seed(100 + i)
        net, opt = fresh(Head, **kw)
        saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        net.load_state_dict(saved["model"])
        opt.load_state_dict(saved["opt"])
        assert [step(net, opt, x, y) for x, y in data[i:]] == losses[i:]


def test_going_back_in_the_same_head():
    "lr_find's way: train on, then load_state_dict into the very same object."
    data = batches()
    net, opt = fresh(NearestETFHead, solve_every=2)
    before = copy.deepcopy(net.state_dict()), copy.deepcopy(opt.state_dict())
    first = [step(net, opt, x, y) for x, y in data[:5]]
    net.load_state_dict(before[0])
    opt.load_state_dict(before[1])
    assert [step(net, opt, x, y) for x, y in data[:5]] == first


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("Head", HEADS)
def test_copies_around_the_backward_pass(copier, Head):
    data = batches()
    net, opt = fresh(Head)
    for x, y in data[:2]:
        step(net, opt, x, y)
    loss = F.cross_entropy(net(*data[2]), data[2][1])
    early = copier(net)
    loss.backward()
    late = copier(net)
    x, y = data[3]
    z = net(x, y)
    assert torch.equal(early(x, y), z) and torch.equal(late(x, y), z)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_schedule_of_solves(k):
    net, opt = fresh(NearestETFHead, solve_every=k)
    for i, (x, y) in enumerate(batches(7)):
        W, t = net.head.weight.clone(), net.head.means.t.item()
        net(x, y)
        assert torch.equal(W, net.head.weight) == (i % k != 0) and net.head.means.t == t + 1


@pytest.mark.parametrize("bad", [0, -1, 1.5, "2", None])
def test_solve_every_is_checked(bad):
    with pytest.raises(ValueError, match="solve_every must be a whole number"):
        NearestETFHead(D, C, solve_every=bad)


@pytest.mark.parametrize(
    "kw",
    [
        dict(use_buffers=True),
        dict(use_buffers=False),
        dict(use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
        dict(use_buffers=True, avg_fn=lambda old, new, n: old + (new - old) / (n + 1)),
    ],
)
def test_weight_averaging(kw):
    net, opt = fresh(NearestETFHead)
    data, averaged = batches(8), AveragedModel(net, **kw)
    for x, y in data:
        step(net, opt, x, y)
        averaged.update_parameters(net)
    head = averaged.module.head
    if kw["use_buffers"]:
        assert off_etf(head.weight) > 1e-4  # an average of ETFs is none
    update_bn([x for x, _ in data], averaged)  # in training mode, without labels: leaves the head alone
    state = copy.deepcopy(head.state_dict())
    averaged.eval()
    assert off_etf(head.weight) < 1e-5 and head.is_etf()
    assert torch.allclose(head.bias, -head.weight @ head.means.global_mean.h_G, atol=1e-5)
    assert not kw["use_buffers"] == torch.equal(state["W"], head.weight)
    once = head.weight.clone()
    averaged.train()
    averaged.eval()
    assert torch.equal(once, head.weight)  # and once is enough


def test_update_bn_and_probes_leave_no_trace():
    net, opt = fresh(NearestETFHead)
    for x, y in batches(3):
        step(net, opt, x, y)
    state, running = copy.deepcopy(net.head.state_dict()), net.body[1].running_mean.clone()
    update_bn([x for x, _ in batches(2)], net)
    assert not torch.equal(running, net.body[1].running_mean)
    for k, v in net.head.state_dict().items():
        assert torch.equal(v, state[k]), k
    with pytest.raises(ValueError, match="needs the labels"):
        net.train()(batches(1)[0][0])


def test_eval_leaves_a_trained_head_alone():
    net, opt = fresh(NearestETFHead)
    for x, y in batches(4):
        step(net, opt, x, y)
        state = copy.deepcopy(net.head.state_dict())
        net.eval()
        net.train()
        for k, v in net.head.state_dict().items():
            assert torch.equal(v, state[k]), k


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ddn_grad", [True, False])
def test_autocast_and_loss_scaler(dtype, ddn_grad):
    net, opt = fresh(NearestETFHead, ddn_grad=ddn_grad)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    for x, y in batches():
        with torch.autocast("cpu", dtype):
            z = net(x, y)
            loss = F.cross_entropy(z.float(), y)
        opt.zero_grad()
        scaler.scale(loss).backward()
        assert z.dtype == dtype and net.head.weight.dtype == torch.float32 and off_etf(net.head.weight) < 1e-5
        assert all(p.grad.isfinite().all() for p in net.parameters())
        scaler.step(opt)
        scaler.update()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_cast_to_half_keeps_the_state_in_float32(dtype):
    head = NearestETFHead(D, C).to(dtype)
    for i in range(4):
        assert head(torch.randn(N, D).to(dtype), torch.arange(N) % C).dtype == dtype
    assert {v.dtype for v in head.state_dict().values()} == {torch.float32, torch.int64} and off_etf(
        head.weight
    ) < 1e-5
    assert head.eval()(torch.randn(2, D).to(dtype)).dtype == dtype
    assert NearestETFHead(D, C).double().weight.dtype == torch.float64


@pytest.mark.parametrize("Head", HEADS)
def test_leaving_python(Head):
    head = Head(D, C)
    head(torch.randn(N, D), torch.arange(N) % C)
    head.eval()
    for strict in (True, False):
        program = torch.export.export(
            head, (torch.randn(4, D),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=strict
        )
        x = torch.randn(9, D)
        assert torch.allclose(program.module()(x), head(x), atol=1e-6)
        assert not [
            n
            for n in program.graph.nodes
            if n.op == "call_function" and ("svd" in str(n.target) or "eigh" in str(n.target))
        ]
    traced = torch.jit.trace(head, torch.randn(4, D))
    assert torch.allclose(traced(x), head(x), atol=1e-6) and "svd" not in str(traced.inlined_graph)


BAD = [
    (torch.zeros(N, D + 1), None, r"features must have shape \(N, 16\), got \(24, 17\)"),
    (torch.zeros(N, D, 1), None, "shape"),
    (torch.zeros(0, D), None, "N=0"),
    (torch.zeros(N, D, dtype=torch.long), None, "floating point"),
    (torch.full((N, D), torch.nan), None, "non-finite"),
    (torch.randn(N, D).index_fill(0, torch.tensor(3), torch.inf), None, "non-finite"),
    (None, torch.full((N,), C), "must lie in 0..5, got 6 to 6"),
    (None, torch.full((N,), -1), "got -1 to -1"),
    (None, torch.zeros(N), "integers"),
    (None, torch.zeros(N, dtype=torch.bool), "integers"),
    (None, torch.zeros(N - 1, dtype=torch.long), r"shape \(24,\)"),
    (None, torch.zeros(N, C - 1), r"\(24, 6\)"),
    (None, torch.full((N, C), -1.0), "not negative"),
    (None, torch.full((N, C), torch.nan), "finite"),
]


@pytest.mark.parametrize("h, y, says", BAD)
def test_bad_batches_are_named_and_leave_no_trace(h, y, says):
    head = NearestETFHead(D, C)
    head(torch.randn(N, D), torch.arange(N) % C)
    state = copy.deepcopy(head.state_dict())
    h, y = torch.randn(N, D) if h is None else h, torch.arange(len(h)) % C if y is None else y
    with pytest.raises(ValueError, match=says):
        head(h, y)
    for k, v in head.state_dict().items():
        assert torch.equal(v, state[k]), k
    head(torch.randn(N, D), torch.arange(N) % C)
    assert head.means.steps() == head.means.t == 2


@pytest.mark.parametrize("Head", [FixedETFHead, NearestETFHead])
def test_too_few_dimensions(Head):
    with pytest.raises(ValueError, match=r"d=5 and C=6.*nn.Linear\(5, 6\).*NearestETF\(project=True\)"):
        Head(5, C)


@pytest.mark.parametrize("Head", HEADS)
@pytest.mark.parametrize("shape", [(D, C + 1), (D + 1, C)])
def test_a_state_of_another_shape_is_refused_whole(Head, shape):
    net, other = Net(Head(D, C)).head, Head(*shape)
    state = copy.deepcopy(net.state_dict())
    for strict in (True, False):
        with pytest.raises(ValueError, match="W is .* there and .* here"):
            net.load_state_dict(other.state_dict(), strict=strict)
    for k, v in net.state_dict().items():
        assert torch.equal(v, state[k]), k


@pytest.mark.parametrize("solve_every", [1, 2])
def test_two_forwards_before_the_backwards(solve_every):
    grads = []
    for together in (True, False):
        head, losses = NearestETFHead(D, C, solve_every=solve_every), []
        hs = [
            torch.randn(N, D, generator=torch.Generator().manual_seed(i), requires_grad=True)
            for i in range(3)
        ]
        for h in hs:
            losses.append(F.cross_entropy(head(h, torch.arange(N) % C), torch.arange(N) % C))
            if not together:
                losses[-1].backward()
        if together:
            [l.backward() for l in losses]
        grads.append([h.grad for h in hs])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_long_tails():
    "Counts that fall by a factor of 100: W stays an ETF, also where the rarest class comes late."
    net, opt = fresh(NearestETFHead)
    p = 100.0 ** (-torch.arange(C) / (C - 1))
    centres = torch.randn(C, 8)
    losses = []
    for _ in range(150):
        y = torch.multinomial(p, N, replacement=True)
        losses.append(step(net, opt, centres[y] + 0.3 * torch.randn(N, 8), y))
        assert off_etf(net.head.weight) < 1e-5
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


class NothingIsRead(torch.utils._python_dispatch.TorchDispatchMode):
    "Fails where the host reads a number out of a tensor: on a GPU that would stall the step."

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("solve_every", [1, 2])
@pytest.mark.parametrize("ddn_grad", [True, False])
def test_no_host_synchronisation_in_the_step(solve_every, ddn_grad, monkeypatch):
    "A GPU's path through the step, taken on the CPU: its solver and adjoint, its checks left out."
    monkeypatch.setattr(procrustes, "_deferred", lambda P: True)
    monkeypatch.setattr(procrustes, "_spectrum", lambda P, U: ((U.mT @ P + P.mT @ U) / 2, None))
    monkeypatch.setattr(
        procrustes, "polar_vjp", lambda U, S, V, v: procrustes._polar_vjp_products(U, S, v)
    )
    head = NearestETFHead(
        D, C, ddn_grad=ddn_grad, solve_every=solve_every, solver="newton_schulz", validate=False
    )
    y = torch.arange(N) % C
    head(torch.randn(N, D), y)  # the first step reads the step number, once
    for _ in range(3):
        h = torch.randn(N, D, requires_grad=True)
        with NothingIsRead():
            F.cross_entropy(head(h, y), y).backward()
        assert h.grad.isfinite().all() and off_etf(head.weight) < 1e-5
    head.load_state_dict(head.state_dict())
    with pytest.raises(AssertionError, match="the host waits"), NothingIsRead():
        head(h, y)  # and it does see a reading
