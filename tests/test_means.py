"Class means and their moving average: labels of every kind, errors that leave no trace, one graph."

import copy

import pytest
import torch
import torch._dynamo.testing

from ngc_etf.means import ValueCheck, _centre, _label_faults, as_labels, centred_means
from ngc_etf.running import RunningGlobalMean, RunningMeans
from test_heads import NoFloat64

N, d, C = 12, 5, 4


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(N, d), torch.arange(N) % 3


def state(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def assert_same(module, before):
    for k, v in module.state_dict().items():
        assert torch.equal(v, before[k]), k


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("shape", [(N,), (N, 1)], ids=str)
def test_integers_of_any_type_are_labels(batch, dtype, shape):
    h, y = batch
    given = y.to(dtype).reshape(shape)
    assert torch.equal(as_labels(given, N, C), y)
    for ours, plain in zip(centred_means(h, given, C), centred_means(h, y, C)):
        assert torch.equal(ours, plain)


WRONG = {
    "negative": (lambda y: y - 1, "labels must lie in 0..3, got -1 to 1"),
    "too large": (lambda y: y + 2, "labels must lie in 0..3, got 2 to 4"),
    "overflow": (lambda y: torch.full_like(y, 2**63, dtype=torch.uint64), "labels must lie in 0..3"),
    "bool": (lambda y: y > 0, "integers, got torch.bool"),
    "complex": (lambda y: y.to(torch.complex64), "integers, got torch.complex64"),
    "float": (lambda y: y.float(), "integers, got torch.float32"),
    "short": (lambda y: y[:-1], r"shape \(12,\) or \(12, 1\), got \(11,\)"),
    "one-hot integers": (lambda y: torch.eye(C, dtype=torch.int64)[y], r"got \(12, 4\)"),
    "transposed": (lambda y: y[None], r"got \(1, 12\)"),
    "float column": (lambda y: y.float()[:, None], r"soft labels must have shape \(12, 4\), got \(12, 1\)"),
    "no mass": (lambda y: torch.zeros(N, C), "sum to 1"),
    "one row without mass": (lambda y: torch.eye(C)[y] * (torch.arange(N) > 0)[:, None], "sum to 1"),
    "multi-hot": (lambda y: torch.eye(C)[y] + torch.eye(C)[3], "sum to 1"),
    "halved": (lambda y: torch.eye(C)[y] / 2, "sum to 1"),
    "nan": (lambda y: torch.eye(C)[y] * torch.nan, "finite and not negative"),
    "negative share": (lambda y: 2 * torch.eye(C)[y] - 0.25, "finite and not negative"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_labels_are_refused_before_any_state_changes(batch, wrong):
    h, y = batch
    change, message = WRONG[wrong]
    means = RunningMeans(d, C)
    means(h, y)
    before = state(means)
    with pytest.raises(ValueError, match=message):
        means(h, change(y))
    assert_same(means, before)
    with pytest.raises(ValueError, match=message):
        centred_means(h, change(y), C)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rounded_mixtures_sum_to_one(dtype):
    torch.manual_seed(0)
    lam = torch.rand(500, 1)
    one_hot = torch.eye(C)[torch.randint(C, (2, 500))]
    y = (lam.to(dtype) * one_hot[0].to(dtype) + (1 - lam).to(dtype) * one_hot[1].to(dtype)) * 0.9 + 0.1 / C
    assert all(ok for ok, _ in _label_faults(y, C))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_leave_no_trace(batch, value):
    h, y = batch
    bad = h.clone()
    bad[3, 2] = value
    means, mean = RunningMeans(d, C), RunningGlobalMean(d)
    for module, args in ((means, (y,)), (mean, ())):
        module(h, *args)
        before = state(module)
        with pytest.raises(ValueError, match="non-finite"):
            module(bad, *args)
        assert_same(module, before)


def test_a_large_common_offset_costs_no_digits():
    torch.manual_seed(0)
    means, counts = torch.randn(C, d, dtype=torch.float64), torch.tensor([3.0, 0.0, 1.0, 5.0])
    exact, h_G = _centre(means, counts.double())
    shifted, h_G_shifted = _centre((means + 2.0**20).float(), counts)
    rounded = _centre((means + 2.0**20).float().double(), counts.double())[0]
    assert (shifted - rounded).abs().max() < 1e-6  # what rounding the input costs is not ours
    assert (shifted - exact).abs().max() < 0.2
    torch.testing.assert_close(h_G_shifted, (h_G + 2.0**20).float())


def test_a_number_of_classes_is_a_whole_number(batch):
    h, y = batch
    with pytest.raises(ValueError, match="C must be a whole number, got C=4.0"):
        centred_means(h, y, 4.0)
    with pytest.raises(ValueError, match="d must be a whole number, got d=2.5"):
        RunningMeans(2.5, 4)
    assert centred_means(h, y, y.max() + 1)[2].sum() == len(y)


@pytest.mark.parametrize("classes", [10, 300, 1000])
def test_equal_features_have_no_direction(classes):
    "Classes of unequal size have means that differ by rounding, however many they are."
    g = torch.Generator().manual_seed(0)
    y = torch.randint(classes, (20 * classes,), generator=g)
    h = torch.rand(64, generator=g).expand(len(y), 64).clone().requires_grad_()
    H = RunningMeans(64, classes)(h, y)[0]
    assert H.norm() == 0
    assert torch.autograd.grad(H.sum(), h)[0].norm() == 0


# ---- as on a GPU: verdicts arrive later, and the step goes on without them


class Event:
    "Of a device that has finished nothing until the host waits for it."

    def query(self):
        return False

    def synchronize(self):
        pass


class LateCheck(ValueCheck):
    def __call__(self, ok, message, then=None):
        self.pending.append((ok, Event(), message, then))
        return ok


class NothingIsRead(torch.utils._python_dispatch.TorchDispatchMode):
    "Fails where the host reads a number out of a tensor: on a GPU that would stall the step."

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def step(monkeypatch):
    "A step in which nothing may be read, and no numbers for the messages, as on a GPU."

    def run(module, *args):
        with monkeypatch.context() as m, NothingIsRead():
            m.setattr(torch.compiler, "is_compiling", lambda: True)
            return module(*args)

    return run


@pytest.fixture
def late():
    means = RunningMeans(d, C)
    means.check = LateCheck()
    return means


def test_a_good_batch_is_the_same_and_nothing_is_read(batch, late, step):
    h, y = batch
    plain = RunningMeans(d, C)
    for labels in (y, torch.eye(C)[y], y.roll(1)):
        for mine, theirs in zip(step(late, h, labels), plain(h, labels)):
            assert torch.equal(mine, theirs)
    assert_same(late, plain.state_dict())
    late.eval()


BAD = {
    "labels": (lambda h, y: (h, y + 2), "in an earlier batch, labels must lie in 0..3"),
    "features": (lambda h, y: (h / 0, y), "in an earlier batch, features have non-finite"),
    "multi-hot": (lambda h, y: (h, torch.ones(N, C)), "in an earlier batch, soft labels must sum to 1"),
    "nan": (lambda h, y: (h, torch.eye(C)[y] * torch.nan), "in an earlier batch, soft labels must be finite"),
}


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_batch_counts_as_empty_and_is_told_later(batch, late, step, bad, begun):
    h, y = batch
    change, message = BAD[bad]
    if begun:
        late(h, y)
    before = state(late)
    features, labels = change(h, y)
    features = features.clone().requires_grad_()
    H, h_G = step(late, features, labels)
    (grad,) = torch.autograd.grad(H.sum() + h_G.sum(), features)
    assert H.isfinite().all() and h_G.isfinite().all() and grad.isfinite().all()
    assert_same(late, before)
    with pytest.raises(ValueError, match=message):
        late.eval()


def test_a_late_global_mean(batch, step):
    h, _ = batch
    mean, plain = RunningGlobalMean(d), RunningGlobalMean(d)
    mean.check = LateCheck()
    for features in (h / 0, h, h / 0, h + 1):
        assert step(mean, features).isfinite().all()
    plain(h)
    plain(h + 1)
    assert_same(mean, plain.state_dict())
    with pytest.raises(ValueError, match="in an earlier batch, features"):
        mean.check.raise_late(wait=True)


# ---- torch.compile


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("alpha", ["paper", "cumulative", 0.3])
def test_one_graph_for_all_steps(alpha, fresh_compiler):
    "No recompilation as steps go by, classes come late, labels turn soft only once; equal to eager."
    torch.manual_seed(0)
    eager = RunningMeans(d, C, alpha)
    traced = copy.deepcopy(eager)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(traced, backend=counter, fullgraph=True)
    for t in range(30):
        h = torch.randn(N, d, requires_grad=True)
        y = torch.randint(C if t > 10 else 2, (N,))
        grads = []
        for means in (eager, step):
            H, h_G = means(h, y)
            grads += torch.autograd.grad((H * torch.arange(C)).sum() + h_G.square().sum(), h)
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1
    for k, v in eager.state_dict().items():
        torch.testing.assert_close(v, traced.state_dict()[k], rtol=1e-6, atol=1e-7)
    assert traced.t == 30


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_wrong_values_are_refused_in_a_compiled_graph(batch, backend, fresh_compiler):
    h, y = batch
    means = RunningMeans(d, C)
    step = torch.compile(means, backend=backend, fullgraph=True)
    step(h, y)
    before = state(means)
    with pytest.raises(ValueError, match="labels must lie in 0..3"):
        step(h, y + 2)
    with pytest.raises(ValueError, match="non-finite"):
        step(h / 0, y)
    with pytest.raises(ValueError, match="sum to 1"):
        step(h, torch.ones(N, C))
    assert_same(means, before)
    step(h, y)
    assert means.t == 2


def test_the_global_mean_is_one_graph(batch, fresh_compiler):
    h, _ = batch
    mean, plain = RunningGlobalMean(d), RunningGlobalMean(d)
    step = torch.compile(mean, backend="aot_eager", fullgraph=True)
    for k in range(12):
        torch.testing.assert_close(step(h + k), plain(h + k))
    torch.testing.assert_close(mean.h_G, plain.h_G)
    with pytest.raises(ValueError, match="non-finite"):
        step(h / 0)


# ---- devices


def test_float64_is_not_needed(batch):
    h, y = batch
    means = RunningMeans(d, C)
    with NoFloat64():
        for _ in range(3):
            means(h.requires_grad_(), y)[0].sum().backward()
        means.eval()(h, y)
        RunningGlobalMean(d)(h)


def test_meta_device(batch):
    h, y = batch
    means = RunningMeans(d, C).to("meta")
    H, h_G = means(h.to("meta"), y.to("meta"))
    assert (H.shape, h_G.shape, H.device.type) == ((d, C), (d,), "meta")


@pytest.mark.parametrize("alpha", ["paper", "cumulative", 0.3])
def test_a_state_moved_to_float64_is_averaged_in_float64(alpha):
    "Eq. 9's weights, whatever the type that the state was made in."
    g = torch.Generator().manual_seed(0)
    batches = [torch.randn(6, 4, generator=g, dtype=torch.float64) for _ in range(3)]
    y = torch.arange(6) % 3
    means, want = RunningMeans(4, 3, alpha).double(), 0.0
    weights = {"paper": (1, 2 / 3, 1 / 2), "cumulative": (1, 1 / 2, 1 / 3), 0.3: (1, 0.3, 0.3)}
    for h, w in zip(batches, weights[alpha]):
        means(h, y)
        want = (1 - w) * want + w * centred_means(h, y, 3)[0]
    assert torch.allclose(means.H_bar, want, rtol=0, atol=1e-15)
