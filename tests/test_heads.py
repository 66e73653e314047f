"The heads in the loops people really use: resume, copies, averaging, half precision, export, bad input."

import copy
import io
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import ngc_etf.heads as heads
import ngc_etf.procrustes as procrustes
import ngc_etf.solvers as solvers
from ngc_etf.heads import FixedETFHead, NearestETFHead, StandardHead
from ngc_etf.nearest import nearest_etf
from ngc_etf.simplex import haar_direction

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


def step(net, opt, x, y, labels=None):
    loss = F.cross_entropy(net(x, y), y if labels is None else labels)
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


@pytest.mark.parametrize("kw", [{}, dict(use_buffers=True)], ids=str)
def test_an_average_begun_in_the_middle_takes_no_labels_along(kw):
    "SWA begins late, with a copy of the model; `update_bn` must not count the labels laid down then."
    net, opt = fresh(NearestETFHead)
    for i, (x, y) in enumerate(batches(8)):
        net.head.targets = y
        step(net, opt, x, None, y)
        if i == 3:
            averaged = AveragedModel(net, **kw)
        elif i > 3:
            averaged.update_parameters(net)
    averaged.eval()
    before = copy.deepcopy(averaged.module.head.state_dict())
    update_bn([x for x, _ in batches(4)], averaged)
    assert averaged.module.head.targets is None and net.head.targets is not None
    for k, v in averaged.module.head.state_dict().items():
        assert torch.equal(v, before[k]), k


GIVEN = haar_direction(D, C, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "Head, kw",
    [
        (StandardHead, {}),
        (StandardHead, dict(project_first=False)),
        (FixedETFHead, {}),
        (FixedETFHead, dict(direction="haar")),
        (FixedETFHead, dict(direction=GIVEN)),
        (NearestETFHead, {}),
        (NearestETFHead, dict(start="haar", solve_every=2)),
        (NearestETFHead, dict(start=GIVEN, lag=True)),
    ],
    ids=str,
)
def test_a_loop_over_folds_makes_a_head_new(Head, kw):
    "The usual loop calls `reset_parameters` of each layer. State and training are those of a new head."
    data = [(torch.randn(N, D), y) for _, y in batches()]
    torch.manual_seed(1)
    head = Head(D, C, **kw)
    state = copy.deepcopy(head.state_dict())
    outputs = [head(h, y) for h, y in data]
    torch.manual_seed(1)
    for layer in head.modules():
        layer.reset_parameters()
    for k, v in head.state_dict().items():
        assert torch.equal(v, state[k]), k
    assert all(torch.equal(head(h, y), z) for (h, y), z in zip(data, outputs))


def test_a_given_start_is_kept_whatever_becomes_of_it():
    other = NearestETFHead(D, C, start="haar")
    head = NearestETFHead(D, C, start=other.U_prox)
    first = head.U_prox.clone()
    other(torch.randn(N, D), torch.arange(N) % C)  # moves its U_prox
    head.reset_parameters()
    assert torch.equal(head.U_prox, first) and not torch.equal(other.U_prox, first)
    assert torch.equal(copy.deepcopy(head)._start, first)


def test_memory_that_nobody_has_written_is_refused():
    "A model made on the meta device, given memory, and loaded from a file without its head."
    head, y = NearestETFHead(D, C).to("meta").to_empty(device="cpu"), torch.arange(N) % C
    for wrong in (dict(t=-5), dict(t=3), dict(seen=-1.0), dict(H_bar=1e20), dict(H_bar=torch.nan)):
        head.reset_parameters()
        for name, value in wrong.items():
            getattr(head.means, name).fill_(value)
        before = copy.deepcopy(head.state_dict())
        with pytest.raises(ValueError, match="reset_parameters"):
            head(torch.randn(N, D), y)
        for k, v in head.state_dict().items():
            assert torch.equal(v.nan_to_num(), before[k].nan_to_num()), k
    head.reset_parameters()
    head(torch.randn(N, D), y)
    assert off_etf(head.weight) < 1e-5 and head.means.t == 1
    back = NearestETFHead(D, C, tau=1e-3)  # a state of another tau is a state
    back.load_state_dict(head.state_dict())
    back(torch.randn(N, D), y)


@pytest.mark.parametrize(
    "change", [lambda W: W.mul_(0.01), nn.init.kaiming_normal_, lambda W: W.fill_(torch.nan)]
)
def test_a_fixed_classifier_that_is_no_etf_is_refused(change):
    "What a recipe of fine-tuning does to a last layer, or memory that nobody has written."
    head, y = FixedETFHead(D, C, direction="haar"), torch.arange(N) % C
    change(head.weight)
    for _ in range(2):
        with pytest.raises(ValueError, match="reset_parameters"):
            head(torch.randn(N, D), y)
    assert head.global_mean.t == 0
    head.reset_parameters()
    head(torch.randn(N, D), y)
    half, state = FixedETFHead(D, C), head.state_dict()
    half.load_state_dict({k: v.bfloat16() if v.is_floating_point() else v for k, v in state.items()})
    half(torch.randn(N, D), y)  # rounded, but one


@pytest.mark.parametrize("Head", HEADS)
def test_buffers_cast_behind_torchs_back_are_widened(Head):
    "FSDP's `buffer_dtype` casts memory, and no module hears of it; an average in bfloat16 soon stands still."
    ours, theirs = Head(D, C), Head(D, C)
    theirs.load_state_dict(ours.state_dict())
    y = torch.arange(N) % C
    for b in theirs.buffers():
        b.data = b.data.bfloat16() if b.is_floating_point() else b.data
    for _ in range(3):
        h = torch.randn(N, D)
        z = ours(h, y)
        assert torch.allclose(theirs(h, y), z, atol=0.1)
    assert all(b.dtype in (torch.float32, torch.int64) for b in theirs.buffers())
    if Head is NearestETFHead:
        assert off_etf(theirs.weight) < 1e-5 and torch.allclose(theirs.means.H_bar, ours.means.H_bar)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_schedule_of_solves(k):
    net, opt = fresh(NearestETFHead, solve_every=k)
    for i, (x, y) in enumerate(batches(7)):
        W, t = net.head.weight.clone(), net.head.means.t.item()
        net(x, y)
        assert torch.equal(W, net.head.weight) == (i % k != 0) and net.head.means.t == t + 1


@pytest.mark.parametrize("N", [64, 1000, 20_000])
@pytest.mark.parametrize("seed", range(5))
def test_features_all_alike_leave_the_start_in_batches_of_any_size(N, seed):
    "A class sum in float32 is off by more than a rounding where the class is large."
    g = torch.Generator().manual_seed(seed)
    head, y = NearestETFHead(8, 3), (3 * torch.rand(N, generator=g) ** 4).long()
    row, W = torch.randn(8, generator=g).requires_grad_(), head.W.clone()
    F.cross_entropy(head(row.expand(N, 8), y), y).backward()
    assert torch.allclose(head.W, W, atol=1e-6)
    assert row.grad.norm() < 1e-3


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_features_norm_is_tau_whatever_torchs_default(default, dtype):
    "In training as at evaluation, to the rounding of the head's own type."
    head = StandardHead(5, 3, tau=0.3).to(dtype)
    h = torch.randn(7, 5, dtype=dtype)
    torch.set_default_dtype(default)
    try:
        norms = [head.train(mode).features(h).norm(dim=1) for mode in (True, False)]
    finally:
        torch.set_default_dtype(torch.float32)
    for norm in norms:
        assert norm.dtype == dtype
        assert (norm - 0.3).abs().max() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("Head", HEADS)
@pytest.mark.parametrize("shape", [(D,), (2, 3, D), (2, 3, 4, D)])
def test_features_of_any_shape_have_the_gradient_of_their_rows(Head, shape):
    head, h = Head(D, C), torch.randn(shape)

    def gradient(h):
        leaf = h.clone().requires_grad_()
        return torch.autograd.grad(head.features(leaf).pow(3).sum(), leaf)[0]

    assert torch.allclose(gradient(h), gradient(h.reshape(-1, D)).reshape(shape), atol=1e-5)


@pytest.fixture
def bfloat16_by_default():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("start", ["canonical", "haar", "given"])
def test_a_head_made_and_trained_in_bfloat16_is_the_one_of_float32(bfloat16_by_default, start):
    torch.set_default_dtype(torch.float32)
    U = haar_direction(D, C)
    data = [(torch.randn(N, D), torch.randperm(N) % C) for _ in range(12)]

    def train():
        torch.manual_seed(1)
        head = NearestETFHead(D, C, start=U if start == "given" else start)
        for h, y in data:
            head(h, y)
        return head.state_dict()

    want = train()
    torch.set_default_dtype(torch.bfloat16)
    got = train()
    assert all(v.dtype == want[k].dtype and torch.equal(v, want[k]) for k, v in got.items())


@pytest.mark.parametrize("Head", HEADS)
def test_states_in_half_precision_are_kept_in_float32(bfloat16_by_default, Head):
    head = Head(D, C)
    dtypes = {k: v.dtype for k, v in head.state_dict().items()}
    assert set(dtypes.values()) <= {torch.float32, torch.int64}
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in head.state_dict().items()}
    kept = dict(half)
    for assign in (False, True):
        other = Head(D, C)
        other.load_state_dict(half, assign=assign)
        assert {k: v.dtype for k, v in other.state_dict().items()} == dtypes
    assert all(half[k] is kept[k] for k in half)  # the caller's own


@pytest.mark.parametrize(
    "name, bad, allowed",
    [
        ("tau", float("inf"), "positive and finite"),
        ("tau", float("nan"), "positive and finite"),
        ("tau", "5", "positive and finite"),
        ("delta", float("inf"), "positive and finite"),
        ("delta", "x", "positive and finite"),
        ("delta", None, "positive and finite"),
        ("d", 16.0, "a whole number"),
        ("C", "6", "a whole number"),
        ("start", [1], "canonical, haar"),
        ("start", 1, "canonical, haar"),
    ],
)
def test_options_are_named_with_what_is_allowed(name, bad, allowed):
    for Head in HEADS if name in ("tau", "d", "C") else [NearestETFHead]:
        with pytest.raises(ValueError, match=f"(?s)must be.*{allowed}.*got.*{re.escape(repr(bad))}"):
            Head(**({"d": D, "C": C} | {name: bad}))


@pytest.mark.parametrize("Head", HEADS)
def test_replicas_of_data_parallel_are_refused(Head):
    h, y = torch.randn(N, D), torch.arange(N) % C
    head = Head(D, C)
    replica = head._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        replica(h, y)
    replica._parameters = {k: p.detach() for k, p in head.named_parameters()}  # as torch hands them out
    replica.training = False
    assert replica(h).shape == (N, C)  # to predict is no harm


def test_a_part_of_a_state_is_refused_and_nothing_at_all_is_not():
    head = NearestETFHead(D, C)
    state = head.state_dict()
    part = {k: v for k, v in state.items() if k != "W"}
    for strict in (True, False):
        with pytest.raises(ValueError, match="W is missing there"):
            head.load_state_dict(part, strict=strict)
    assert set(head.load_state_dict({}, strict=False).missing_keys) == set(state)


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
            sum(losses).backward()
        grads.append([h.grad for h in hs])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_long_tails():
    "Counts that fall by a factor of 100: W stays an ETF, also where the rarest class comes late."
    net, opt = fresh(NearestETFHead)
    p = 100.0 ** (-torch.arange(C) / (C - 1))
    centres = torch.randn(C, 8)

    def draw(n):
        y = torch.multinomial(p, n, replacement=True)
        return centres[y] + 0.3 * torch.randn(n, 8), y

    def held_out():
        with torch.no_grad():
            loss = F.cross_entropy(net.eval()(x), y).item()
        net.train()
        return loss

    x, y = draw(4000)
    before = held_out()
    for _ in range(150):
        step(net, opt, *draw(N))
        assert off_etf(net.head.weight) < 1e-5
    assert held_out() < before / 2  # a sixth at most, for five seeds on one thread and on two


GIVEN = [  # heads whose W carries no gradient at the second step
    (FixedETFHead, {}),
    (FixedETFHead, dict(detach_mean=True)),
    (NearestETFHead, dict(ddn_grad=False)),
    (NearestETFHead, dict(solve_every=2)),
    (NearestETFHead, dict(lag=True)),
]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("Head, kw", GIVEN)
def test_the_gradient_about_the_mean_is_the_chain_rules(Head, kw, soft, monkeypatch):
    "The short backward pass of a given W, against autograd's way through the means; once and twice."
    y = torch.arange(N) % C
    y = torch.softmax(torch.randn(N, C).double(), 1) if soft else y
    h = torch.randn(2, N, D, dtype=torch.float64)

    def second_step(short):
        if not short:
            monkeypatch.setattr(heads, "_mean_is_plain", lambda y: False)
        head = Head(D, C, **kw).double()
        head(h[0], y)
        leaf = h[1].clone().requires_grad_()
        loss = F.cross_entropy(head(leaf, y), y)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), leaf)
        return loss.detach(), gradient.detach(), second

    for short, long in zip(second_step(True), second_step(False)):
        assert torch.allclose(short, long, rtol=0, atol=1e-13)


@pytest.mark.parametrize("Head, kw", GIVEN)
def test_transforms_see_no_function_of_ours(Head, kw):
    "Where torch.func is at work the short backward pass steps aside, and the gradient is the same."
    y = torch.arange(N) % C
    h, v = (torch.randn(N, k, dtype=torch.float64) for k in (D, C))
    leaf = h.clone().requires_grad_()
    (expected,) = torch.autograd.grad((Head(D, C, **kw).double()(leaf, y) * v).sum(), leaf)
    head = Head(D, C, **kw).double()

    def step(h):
        state = {name: buffer.clone() for name, buffer in head.state_dict().items()}
        return torch.func.functional_call(head, state, (h, y))

    got = torch.func.vjp(step, h)[1](v)[0]
    assert torch.allclose(got, expected, rtol=0, atol=1e-13)


class NothingIsRead(torch.utils._python_dispatch.TorchDispatchMode):
    "Fails where the host reads a number out of a tensor: on a GPU that would stall the step."

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("solve_every", [1, 2])
@pytest.mark.parametrize("ddn_grad", [True, False])
def test_no_host_synchronisation_in_the_step(solve_every, ddn_grad, monkeypatch):
    "A GPU's path through the step, taken on the CPU: its solver and adjoint, its checks left out."
    monkeypatch.setattr(solvers, "_deferred", lambda P: True)
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


def call_checkpointed(reentrant):
    def call(net, *args):
        return checkpoint(net, *args, use_reentrant=reentrant)

    return call


def call_plainly(net, *args):
    return net(*args)


CHECKPOINTS = [call_checkpointed(False), call_checkpointed(True)]


def train_in_parts(make, call, parts, order, targets=False, steps=4):
    "Gradients at each of four optimiser steps over `parts` micro-batches, and the state at the end."
    torch.manual_seed(0)
    net = make()
    opt, g, grads = torch.optim.SGD(net.parameters(), 0.1), torch.Generator().manual_seed(1), []
    for step in range(steps):
        opt.zero_grad()
        torch.manual_seed(step)  # the dropout's
        losses = []
        for _ in range(parts):
            x = torch.randn(N, 8, generator=g, requires_grad=True)
            y = torch.randperm(N, generator=g) % (C - 1 if step < 2 else C)
            net.head.targets = y if targets else None
            z = call(net, x) if targets else call(net, x, y)
            net.head.targets = None
            losses.append(F.cross_entropy(z, y))
            if order == "each":
                losses.pop().backward()
        if order == "sum":
            sum(losses).backward()
        for loss in losses if order == "in turn" else []:
            loss.backward()
        grads.append([p.grad.clone() for p in net.parameters()])
        opt.step()
    return grads, net.state_dict()


class Dropping(Net):
    "Without BatchNorm, whose own statistics a checkpoint counts twice; with dropout."

    def __init__(self, head):
        super().__init__(head)
        self.body = nn.Sequential(nn.Linear(8, D), nn.ReLU(), nn.Dropout(0.3))


@pytest.mark.parametrize("call", CHECKPOINTS, ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("parts, order", [(1, "each"), (3, "each"), (3, "sum"), (3, "in turn")])
@pytest.mark.parametrize(
    "Head, kw",
    [
        (StandardHead, {}),
        (FixedETFHead, {}),
        (NearestETFHead, {}),
        (NearestETFHead, dict(solve_every=3)),
        (NearestETFHead, dict(lag=True)),
    ],
)
def test_activation_checkpointing(Head, kw, parts, order, call):
    "One step for one micro-batch, gradients and state those of the plain run to the bit."

    def make():
        return Dropping(Head(D, C, **kw))

    grads, state = train_in_parts(make, call_plainly, parts, order)
    again, other = train_in_parts(make, call, parts, order, targets=order == "sum")
    for mine, theirs in zip(grads, again):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs))
    assert all(torch.equal(v, other[k]) for k, v in state.items())


@pytest.mark.parametrize("call", CHECKPOINTS, ids=["not reentrant", "reentrant"])
def test_two_equal_batches_cannot_be_told_apart(call):
    net = Dropping(NearestETFHead(D, C)).train()
    net.body[2].p = 0.0
    x, y = torch.randn(N, 8, requires_grad=True), torch.arange(N) % C
    losses = [F.cross_entropy(call(net, x, y), y) for _ in range(2)]
    with pytest.raises(RuntimeError, match="call backward\\(\\) after each forward pass"):
        sum(losses).backward()
    net = Dropping(NearestETFHead(D, C))
    for _ in range(2):  # one after the other is no question
        F.cross_entropy(call(net, x, y), y).backward()


def test_other_features_in_the_repetition_are_refused():
    "A checkpoint that forgets dropout's random state."
    net, y = Dropping(NearestETFHead(D, C)), torch.arange(N) % C
    x = torch.randn(N, 8, requires_grad=True)
    z = checkpoint(net, x, y, use_reentrant=False, preserve_rng_state=False)
    with pytest.raises(RuntimeError, match="keep preserve_rng_state=True"):
        F.cross_entropy(z, y).backward()


class Elsewhere(torch.autograd.Function):
    "Somebody else's checkpoint."

    @staticmethod
    def forward(ctx, net, x, y):
        ctx.net, ctx.y = net, y
        ctx.save_for_backward(x)
        return net(x, y)

    @staticmethod
    def backward(ctx, g):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.net(x, ctx.y).backward(g)
        return None, x.grad, None


def test_a_foreign_checkpoint_is_refused():
    net, y = Net(), torch.arange(N) % C
    z = Elsewhere.apply(net, torch.randn(N, 8, requires_grad=True), y)
    with pytest.raises(RuntimeError, match="not torch.utils.checkpoint"):
        F.cross_entropy(z, y).backward()


def test_checkpoints_leave_nothing_behind():
    "Notes of passes go with their graphs, are not copied, and not saved."
    net, y = Dropping(NearestETFHead(D, C)), torch.arange(N) % C
    for reentrant in (False, True):
        for _ in range(3):
            x = torch.randn(N, 8, requires_grad=True)
            z = checkpoint(net, x, y, use_reentrant=reentrant)
            F.cross_entropy(z, y).backward()
    assert len(net.head._passes.kept) <= 1
    assert not copy.deepcopy(net).head._passes.kept
    net(torch.randn(N, 8), y)
    with torch.autograd.graph.save_on_cpu():  # hooked for another reason: no note outlives the graph
        net(torch.randn(N, 8), y)
    assert not [ref for ref in net.head._passes.refs if ref() and ref() not in net.head._passes.kept]


def test_double_backward_through_a_head():
    "With create_graph=True the second order is that of finite differences (U_prox, an earlier W, held)."
    head, y = NearestETFHead(8, 3, delta=0.1).double(), torch.arange(9) % 3
    head(torch.randn(9, 8, dtype=torch.float64), y)
    state = copy.deepcopy(head.state_dict())

    def gradient(h):
        head.load_state_dict(state)
        return torch.autograd.grad(F.cross_entropy(head(h, y), y), h, create_graph=True)[0]

    h = torch.randn(9, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gradient, h)


@pytest.mark.parametrize("start", ["canonical", "haar", "given"])
def test_safetensors_round_trip(start, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors comes with timm")
    if start == "given":
        start = torch.linalg.qr(torch.randn(D, C))[0].T.contiguous().T
    head = NearestETFHead(D, C, start=start)
    safetensors.save_file(head.state_dict(), tmp_path / "start.safetensors")
    head(torch.randn(N, D), torch.arange(N) % C)
    assert all(b.is_contiguous() for b in head.buffers())
    safetensors.save_file(head.state_dict(), tmp_path / "head.safetensors")
    other = NearestETFHead(D, C)
    other.load_state_dict(safetensors.load_file(tmp_path / "head.safetensors"))
    for k, v in head.state_dict().items():
        assert torch.equal(v, other.state_dict()[k])


@pytest.mark.parametrize("Head", HEADS)
def test_a_state_of_the_former_names_loads(Head):
    net = Net(Head(D, C))
    for x, y in batches(3):
        net(x, y)
    former = {
        k.replace("head.W", "head.weight").replace("head.b", "head.bias"): v
        for k, v in net.state_dict().items()
    }
    other = Net(Head(D, C))
    other.load_state_dict(former)
    for k, v in net.state_dict().items():
        assert torch.equal(v, other.state_dict()[k]), k
    assert "head.weight" in former  # and the caller's dictionary is as it was


@pytest.mark.parametrize("Head", HEADS)
def test_a_heads_state_is_not_a_linear_layers(Head):
    plain, net = Net(nn.Identity()), Net(Head(D, C))
    plain.head = nn.Linear(D, C)
    before = copy.deepcopy(plain.head.state_dict())
    answer = plain.load_state_dict(net.state_dict(), strict=False)
    assert {"head.weight", "head.bias"} <= set(answer.missing_keys) and "head.W" in answer.unexpected_keys
    assert all(torch.equal(v, before[k]) for k, v in plain.head.state_dict().items())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        plain.load_state_dict(net.state_dict())


def test_a_linear_layers_state_is_refused_with_the_way_out():
    plain, net = Net(nn.Identity()), Net()
    plain.head = nn.Linear(D, C)
    with pytest.raises(RuntimeError, match="(?s)nn.Linear, for a NearestETFHead.*swap_head.*plain"):
        net.load_state_dict(plain.state_dict())
    W = net.head.weight.clone()
    answer = net.load_state_dict(plain.state_dict(), strict=False)
    assert "head.weight" in answer.unexpected_keys and torch.equal(net.head.weight, W)


def behind(head):
    head.U_prox.data.mul_(0.9)


def average(head):
    for buffer in head.buffers():
        if buffer.is_floating_point():
            buffer.mul_(0.9)


@pytest.mark.parametrize("change", [None, "load", behind, average, copy.deepcopy, "pickle", "inference"])
def test_eval_looks_only_after_foreign_changes(change, monkeypatch):
    looks = []
    is_etf = NearestETFHead.is_etf
    monkeypatch.setattr(NearestETFHead, "is_etf", lambda self: looks.append(1) or is_etf(self))
    with torch.inference_mode(change == "inference"):
        head = NearestETFHead(D, C)
        if change != "inference":
            head(torch.randn(N, D), torch.arange(N) % C)
    if change == "load":
        head.load_state_dict(NearestETFHead(D, C).state_dict())
    elif change == "pickle":
        head = pickle.loads(pickle.dumps(head))
    elif callable(change):
        head = change(head) or head
    head.eval()
    assert len(looks) == (change is not None)
    assert off_etf(head.weight) < 1e-5
    head.train()
    head.eval()
    assert len(looks) == (2 if change == "inference" else change is not None)


def test_eval_is_cheap_at_imagenets_size():
    "A thousand classes: less than a tenth of the whole look's products (milliseconds are in ngc_cost)."
    head, flops = NearestETFHead(2048, 1000, solver="svd"), {}
    for name, call in {"eval": head.eval, "is_etf": head.is_etf}.items():
        head.train()
        with FlopCounterMode(display=False) as counter:
            call()
        flops[name] = counter.get_total_flops()
    assert flops["eval"] < flops["is_etf"] / 10 and flops["is_etf"] > 1e9


@pytest.mark.parametrize("Head", HEADS)
def test_on_no_device(Head):
    head, h = Head(D, C).to("meta"), torch.empty(N, D, device="meta")
    y = torch.empty(N, device="meta", dtype=torch.int64)
    assert head.eval()(h).shape == (N, C)
    assert head.train()(h).shape == (N, C) if Head is not NearestETFHead else True
    assert head.to_linear().weight.is_meta
    with torch.device("meta"):
        assert Head(D, C)(h, y).shape == (N, C)


class NoFloat64(torch.utils._python_dispatch.TorchDispatchMode):
    "A device without float64, as Apple's GPUs are."

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float64:
                raise TypeError(f"this device has no float64: {func}")
        return result


@pytest.mark.parametrize("Head", HEADS)
def test_a_device_without_float64(Head, monkeypatch):
    monkeypatch.setattr(solvers, "_wide", lambda X: X)  # there: the CPU's float64
    with NoFloat64():
        head, y = Head(D, C), torch.arange(N) % C
        for _ in range(3):
            h = torch.randn(N, D, requires_grad=True)
            F.cross_entropy(head(h, y), y).backward()
        if Head is NearestETFHead:
            head.U_prox.mul_(0.9)
            assert not head.is_etf()
        head.eval()
        assert head(h).isfinite().all()
        with pytest.raises(TypeError, match="no float64"):
            h.double()  # and it does see it
    if Head is NearestETFHead:
        assert off_etf(head.weight) < 1e-4


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32, torch.int16, torch.int64])
@pytest.mark.parametrize("shape", [(N,), (N, 1)])
def test_labels_of_any_integer_type(kind, shape):
    h, y = torch.randn(N, D), torch.arange(N) % C
    heads = [NearestETFHead(D, C) for _ in range(2)]
    a, b = heads[0](h, y), heads[1](h, y.to(kind).reshape(shape))
    assert torch.equal(a, b)


def test_multi_hot_labels_leave_no_trace():
    head, hot = NearestETFHead(D, C), F.one_hot(torch.arange(N) % C, C).float()
    for y in (2 * hot, 0 * hot, hot + hot.roll(1, 1)):
        state = copy.deepcopy(head.state_dict())
        with pytest.raises(ValueError, match="sum to 1"):
            head(torch.randn(N, D), y)
        assert all(torch.equal(v, state[k]) for k, v in head.state_dict().items())


def test_lag_uses_earlier_batches_only():
    late, prompt = NearestETFHead(D, C, lag=True, start="haar"), NearestETFHead(D, C)
    prompt.load_state_dict(late.state_dict())
    y = torch.arange(N) % C
    for _ in range(4):
        h, before = torch.randn(N, D, requires_grad=True), late.weight.clone()
        x = late.features(h)
        z = late(h, y)
        expected = F.linear(x - x.mean(0), before)
        assert torch.allclose(z, expected, atol=1e-5)
        grads = [torch.autograd.grad(F.cross_entropy(logits, y), h)[0] for logits in (z, expected)]
        assert torch.allclose(*grads, atol=1e-6)  # no stream through the solution
        prompt(h, y)
        assert torch.allclose(late.weight, prompt.weight, atol=1e-6)  # ready for the next batch


@pytest.mark.parametrize("lag", [False, True])
@pytest.mark.parametrize("ddn_grad", [False, True])
def test_solve_first_off_takes_the_start_as_the_first_proximal_direction(lag, ddn_grad):
    y, h = torch.arange(N) % C, torch.randn(N, D)
    how = dict(delta=0.5, start=haar_direction(D, C), lag=lag, ddn_grad=ddn_grad)
    heads = {b: NearestETFHead(D, C, solve_first=b, **how) for b in (True, False)}
    start = how["start"]
    means = copy.deepcopy(heads[True].means)
    for solve_first, head in heads.items():
        x = head.features(h)
        H = copy.deepcopy(means)(x, y)[0]
        prox = nearest_etf(H, start=start) if solve_first else start
        leaf = h.clone().requires_grad_()
        head(leaf, y).square().sum().backward()
        assert torch.allclose(head.U_prox, nearest_etf(H, prox, 0.5), atol=1e-6)
        assert leaf.grad.isfinite().all()
    assert not torch.allclose(heads[True].U_prox, heads[False].U_prox, atol=1e-3)


def test_solve_first_matters_at_the_first_step_only():
    "A head loaded after its first step goes on the same way, whatever the switch says."
    heads = [NearestETFHead(D, C, delta=0.5, solve_first=solve_first) for solve_first in (True, False)]
    y = torch.arange(N) % C
    heads[0](torch.randn(N, D), y)
    heads[1].load_state_dict(heads[0].state_dict())
    for _ in range(3):
        h = torch.randn(N, D)
        assert torch.equal(heads[0](h, y), heads[1](h, y))


def test_the_authors_fixed_head_detaches_the_mean():
    y, grads = torch.arange(N) % C, []
    h = torch.randn(N, D)
    for cut in (False, True):
        head, leaf = FixedETFHead(D, C, detach_mean=cut), h.clone().requires_grad_()
        x = head.features(leaf)
        mean = x.mean(0)
        expected = F.linear(x - (mean.detach() if cut else mean), head.weight)
        z = head(leaf, y)
        assert torch.allclose(z, expected, atol=1e-5)
        pair = [torch.autograd.grad(F.cross_entropy(logits, y), leaf)[0] for logits in (z, expected)]
        assert torch.allclose(*pair, atol=1e-6)
        grads.append(pair[0])
    assert not torch.allclose(*grads, atol=1e-4)


def test_the_authors_standard_head_projects_after_the_first_step():
    head, h = StandardHead(D, C, project_first=False), torch.randn(N, D)
    with torch.no_grad():
        head.weight.mul_(3)
    raw = head.weight.detach().clone()
    head.train()
    assert torch.allclose(head(h), F.linear(head.features(h), raw), atol=1e-5)
    assert torch.allclose(head(h), F.linear(head.features(h), F.normalize(raw)), atol=1e-5)
    assert torch.allclose(head.weight.norm(dim=1), torch.ones(C))


def test_the_authors_standard_head_continues_from_a_state():
    h, y, heads = torch.randn(N, D), torch.arange(N) % C, []
    for cut in (False, True):
        torch.manual_seed(0)
        head = StandardHead(D, C, project_first=False)
        for step in range(4):
            if cut and step == 2:
                state, head = head.state_dict(), StandardHead(D, C, project_first=False)
                head.load_state_dict(state)
            loss = F.cross_entropy(head(h), y)
            with torch.no_grad():
                head.weight.sub_(torch.autograd.grad(loss, head.weight)[0])  # off the sphere
        heads.append(head)
    assert torch.equal(*(head.weight for head in heads))


HEAVY = "pymanopt scipy fastai torchvision matplotlib pandas seaborn sklearn torchmetrics PIL".split()


def test_importing_a_head_imports_torch_and_numpy_only():
    code = (
        "import sys, torch, numpy; before = set(sys.modules); from ngc_etf import NearestETFHead; "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not set(HEAVY) & set(out.split()), out


@pytest.mark.parametrize("Head", HEADS)
def test_functional_calls(Head):
    "Buffers given from outside, as torch.func does it: steps are counted there, not in the head."
    head, body, y = Head(D, C), nn.Linear(8, D), torch.arange(N) % C
    x, state = torch.randn(N, 8), dict(head.named_parameters()) | dict(head.named_buffers())
    parameters = dict(body.named_parameters())

    def loss(parameters):
        h = torch.func.functional_call(body, parameters, (x,))
        copies = {name: value.clone() for name, value in state.items()}
        return F.cross_entropy(torch.func.functional_call(head, copies, (h, y)), y)

    grads = [torch.func.grad(loss)(parameters) for _ in range(2)][1]
    F.cross_entropy(head(body(x), y), y).backward()
    for name, p in body.named_parameters():
        assert torch.allclose(grads[name], p.grad, atol=1e-6)


def test_labels_in_a_list_are_named():
    h, y = torch.randn(6, 5), [0, 1, 2, 0, 1, 2]
    with pytest.raises(TypeError, match="labels must be a tensor, got list"):
        NearestETFHead(5, 3)(h, y)
    FixedETFHead(5, 3)(h, y)  # which needs none


def test_a_whole_number_of_numpys_is_one():
    a, b = NearestETFHead(5, 3, solve_every=np.int64(2)), NearestETFHead(5, 3, solve_every=2)
    assert repr(a) == repr(b)
    y = torch.arange(6) % 3
    for h in torch.randn(3, 6, 5):
        assert torch.equal(a(h, y), b(h, y))


@pytest.mark.parametrize("options", [{}, {"normalise": False}, {"project_first": False}])
@pytest.mark.parametrize("size", [1.0, 2.0])
def test_torch_func_trains_a_standard_head(options, size):
    "With the parameters as they are, by sample and for several heads at once; nothing is changed in place."
    def make():
        torch.manual_seed(0)
        head = StandardHead(D, C, **options)
        head.W.data.mul_(size)
        return head

    def loss(parameters, h, y):
        return F.cross_entropy(torch.func.functional_call(head, parameters, (h,)), y)

    h, y = torch.randn(N, D), torch.arange(N) % C
    head, plain = make(), make()
    parameters, before = dict(head.named_parameters()), head.W.clone()
    F.cross_entropy(plain(h), y).backward()
    got = torch.func.grad(loss)(parameters, h, y)["W"]
    assert torch.allclose(got, plain.W.grad, atol=1e-6) and torch.equal(head.W, before)

    head = make()
    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, h[:, None], y[:, None])["W"]
    assert torch.allclose(each.mean(0), plain.W.grad, atol=1e-6)

    head = make()
    stacked, buffers = torch.func.stack_module_state([make(), make()])
    z = torch.func.vmap(lambda *state: torch.func.functional_call(head, state, (h,)))(stacked, buffers)
    assert torch.allclose(z[1], make()(h), atol=1e-5)


@pytest.mark.parametrize("Head", HEADS)
def test_a_state_is_loaded_where_torch_swaps_tensors(Head):
    head, y = Head(D, C), torch.arange(N) % C
    h = torch.randn(N, D)
    head(h, y)
    state = copy.deepcopy(head.state_dict())
    head(2 * h + 1, y)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        head.load_state_dict(state)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    for name, value in head.state_dict().items():
        assert torch.equal(value, state[name])
    head(h, y)
