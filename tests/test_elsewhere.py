"Outside fastai: exchange of the last layer, timm, averages of weights, Lightning, exports. Each part is skipped where its package is absent."

import copy, logging, pickle, re, subprocess, sys
from pathlib import Path

import pytest, torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ngc_etf.heads import FixedETFHead, Head, NearestETFHead, StandardHead
from ngc_etf.simplex import centring
from ngc_etf.swap import last_linear, swap_head

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.filterwarnings("ignore")


def gap(head):
    "How far W is from a simplex ETF."
    W = head.weight.detach().double()
    return (W @ W.T - head.C / (head.C - 1) * centring(head.C, W.dtype)).abs().max().item()


def python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


# ---- imports


def test_nothing_is_imported_before_it_is_used():
    code = "import sys, ngc_etf.swap, ngc_etf.elsewhere; print(sorted({m.split('.')[0] for m in sys.modules} & {'fastai', 'timm', 'lightning', 'onnx', 'onnxruntime', 'onnxscript'}))"
    assert python(code).stdout.strip() == "[]"


@pytest.mark.parametrize(
    "package, extra, use",
    [
        ("lightning", "lightning", "e.ETFModule"),
        ("lightning", "lightning", "e.ETFCallback()"),
        ("onnxscript", "onnx", "e.to_onnx(NearestETFHead(4, 3), torch.zeros(2, 4), 'never.onnx')"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(package, extra, use):
    done = python(
        f"import sys; sys.modules['{package}'] = None; import torch, ngc_etf.elsewhere as e; from ngc_etf.heads import *; {use}"
    )
    assert (
        f"ImportError: this needs {package}, which is not installed: pip install 'ngc_etf[{extra}]'"
        in done.stderr
    )


def test_other_names_do_not_exist():
    import ngc_etf.elsewhere

    with pytest.raises(AttributeError, match="ETFModel"):
        ngc_etf.elsewhere.ETFModel


# ---- the exchange


class Odd(nn.Module):
    "Its classifier is registered first."

    def __init__(self):
        super().__init__()
        self.fc, self.body = nn.Linear(6, 3), nn.Sequential(nn.Linear(2, 6), nn.ReLU())

    def forward(self, x):
        return self.fc(self.body(x))


def test_a_classifier_is_named_or_not_found():
    with pytest.raises(ValueError, match=r"'body.1' is ReLU"):
        swap_head(Odd())
    model, head, said = swap_head(Odd(), at="fc")
    assert model.fc is head and "at 'fc'" in said and last_linear(model) == "fc"  # from now on it is found
    with pytest.raises(ValueError, match=r"at='top' names no layer of Odd; it has fc, body, body.0, body.1"):
        swap_head(Odd(), at="top")
    with pytest.raises(ValueError, match="'at the top' is ReLU"):
        swap_head(nn.ReLU())


def test_a_part_of_the_model_by_name():
    model = nn.ModuleDict({"student": Odd(), "teacher": nn.Sequential(nn.Linear(2, 5), nn.Linear(5, 3))})
    assert last_linear(model) == "teacher.1" and last_linear(model, at="student.fc") == "student.fc"
    _, head, _ = swap_head(model, at="student.fc")
    assert model["student"].fc is head and isinstance(model["teacher"][1], nn.Linear)


@pytest.mark.parametrize("d, C, project", [(3, 8, True), (8, 8, True), (9, 8, True), (9, 8, False)])
def test_projection_only_where_it_is_needed(d, C, project):
    model, head, said = swap_head(nn.Sequential(nn.Linear(2, d), nn.Linear(d, C)), project=project)
    assert ("projection" in said) == (d < C) and head.d == max(d, C)
    assert [tuple(p.shape) for p in model[1].parameters()] == ([(C, d)] if d < C else [])
    assert swap_head(model, project=True)[2] == ""
    x, y = torch.randn(16, 2), torch.arange(16) % C
    head.targets = y
    F.cross_entropy(model(x), y).backward()
    assert gap(head) < 1e-4 and all(p.grad.norm() > 0 for p in model.parameters())


# ---- timm

NETS = {
    "resnet18": "fc",
    "convnext_atto": "head.fc",
    "vit_tiny_patch16_224": "head",
    "mobilenetv3_small_050": "classifier",
    "regnety_002": "head.fc",
}


def create(name, **kw):
    timm = pytest.importorskip("timm", reason="the extra timm is not installed")
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, **({"img_size": 32} if "vit" in name else {}), **kw)


@pytest.mark.parametrize("name", NETS)
def test_timm(name):
    model, head, said = swap_head(create(name, num_classes=5))
    x, y = torch.randn(5, 3, 32, 32), torch.arange(5)
    assert model.get_submodule(NETS[name]) is head is model.get_classifier() and repr(NETS[name]) in said
    head.targets = y
    F.cross_entropy(model(x), y).backward()
    head.targets = None
    assert gap(head) < 1e-4 and all(
        p.grad is not None and p.grad.isfinite().all() for p in model.parameters()
    )
    with torch.no_grad():
        both, alone = model.eval()(x), model(x[:1])
    assert torch.allclose(both[:1], alone, atol=1e-4)
    assert swap_head(model) == (model, head, "")


def test_timm_with_another_number_of_classes_and_too_few_features():
    model, head, said = swap_head(create("vit_tiny_patch16_224"), C=200, project=True)
    assert (head.d, head.C, model.num_classes) == (200, 200, 200) and "behind a projection to 200" in said
    assert [tuple(p.shape) for p in model.head.parameters()] == [(200, 192)]
    assert model.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 200)
    with pytest.raises(ValueError, match="project=True inserts one"):
        swap_head(create("vit_tiny_patch16_224", num_classes=200))


@pytest.mark.parametrize("name, kind", [("deit_tiny_distilled_patch16_224", "tuple"), ("dla34", "Conv2d")])
def test_timm_classifiers_that_are_not_linear_are_refused(name, kind):
    with pytest.raises(ValueError, match=f"is {kind}.*at='"):
        swap_head(create(name))


def test_timm_inside_another_model_is_asked_as_well():
    outer = nn.ModuleDict({"net": create("deit_tiny_distilled_patch16_224"), "loss": nn.CrossEntropyLoss()})
    with pytest.raises(ValueError, match="is tuple"):
        swap_head(outer)  # not silently its second classifier
    assert last_linear(outer, at="net.head") == "net.head"
    assert last_linear(nn.Sequential(create("resnet18", num_classes=0), nn.Linear(512, 3))) == "1"


# ---- averages


def steps(model, averages, n=12):
    "Training steps that turn the classifier a good deal."
    opt, g = torch.optim.SGD(model.parameters(), 0.5), torch.Generator().manual_seed(0)
    for i in range(n):
        x, y = torch.randn(40, 6, generator=g), torch.randint(0, 4, (40,), generator=g)
        loss = F.cross_entropy(model[1](model[0](x), y), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        for avg in averages:
            getattr(avg, "update_parameters", getattr(avg, "update", None))(model)


def average(kind, model):
    if kind == "swa":
        return AveragedModel(model, use_buffers=True)
    utils = pytest.importorskip("timm.utils", reason="the extra timm is not installed")
    return getattr(utils, kind)(model, decay=0.8)


@pytest.mark.parametrize("kind", ["swa", "ModelEma", "ModelEmaV2", "ModelEmaV3"])
def test_the_average_of_classifiers_is_made_one_again(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), NearestETFHead(8, 4, start="haar"))
    avg = average(kind, model)
    steps(model, [avg])
    inner = avg.ema if kind == "ModelEma" else avg.module
    head = inner[1]
    broken, before = gap(head), head.U_prox.clone()
    assert broken > 1e-3
    inner.eval()
    assert gap(head) < 1e-5
    assert torch.allclose(head.bias, -head.weight @ head.means.global_mean.h_G, atol=1e-6)
    Q, _, Vh = torch.linalg.svd(before, full_matrices=False)
    assert torch.allclose(head.U_prox, Q @ Vh, atol=1e-5)  # the nearest orthonormal matrix to the average
    assert gap(model[1]) < 1e-4


# ---- Lightning


@pytest.fixture
def lightning():
    L = pytest.importorskip("lightning", reason="the extra lightning is not installed")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return L


torch.manual_seed(0)
Y = torch.arange(96) % 4
X = torch.stack([Y // 2, Y % 2], 1) * 4.0 - 2 + torch.randn(96, 2)
DATA = DataLoader(TensorDataset(X, Y), batch_size=16)


def body():
    return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 8), nn.BatchNorm1d(8))


def adam(params):
    return torch.optim.Adam(params, 1e-2)


def trainer(L, tmp_path, epochs, *cbs, **kw):
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=list(cbs),
        default_root_dir=tmp_path,
        **kw,
    )


def theirs(L, step=None, d=8):
    "A LightningModule that knows nothing of us."

    class Theirs(L.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net, self.loss, self.seen = (
                nn.Sequential(body(), nn.Linear(8, d), nn.Linear(d, 4)),
                nn.CrossEntropyLoss(),
                [],
            )

        def training_step(self, batch, i):
            if step is not None:
                step(self, i)
            x, y = batch.values() if isinstance(batch, dict) else batch
            loss = self.loss(self.net(x), y)
            self.seen.append(loss.item())
            return loss

        def validation_step(self, batch, i):
            self.right = (self.net(batch[0]).argmax(1) == batch[1]).float().mean()

        def configure_optimizers(self):
            return adam(self.parameters())

    return Theirs()


@pytest.mark.parametrize("kw", [{}, {"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}], ids=str)
def test_lightning_callback_continues_bit_for_bit(lightning, tmp_path, kw):
    from ngc_etf.elsewhere import ETFCallback

    etf = lambda: ETFCallback(verbose=False, solve_every=3 if "accumulate_grad_batches" in kw else 1)
    whole, part, rest = (theirs(lightning) for _ in range(3))
    trainer(lightning, tmp_path, 3, etf(), **kw).fit(whole, DATA)
    first = trainer(lightning, tmp_path, 1, etf(), **kw)
    first.fit(part, DATA)
    first.save_checkpoint(tmp_path / "one.ckpt")
    trainer(lightning, tmp_path, 3, etf(), **kw).fit(rest, DATA, DATA, ckpt_path=tmp_path / "one.ckpt")
    assert len(rest.seen) == 12 and rest.seen == whole.seen[6:]
    for k, v in whole.state_dict().items():
        assert torch.equal(v, rest.state_dict()[k]), k
    assert gap(rest.net[2]) < (1e-3 if "precision" in kw else 1e-4) and rest.right > 0.8
    assert [p.name for p in tmp_path.iterdir()] == ["one.ckpt"]


def test_lightning_module_is_kept_whole_in_checkpoint_and_pickle(lightning, tmp_path):
    from ngc_etf.elsewhere import ETFModule

    torch.manual_seed(0)
    model = ETFModule(body(), NearestETFHead(8, 4), adam)
    run = trainer(lightning, tmp_path, 6)
    run.fit(model, DATA)
    run.save_checkpoint(tmp_path / "m.ckpt")
    told = run.validate(model, DATA, verbose=False)[0]
    assert told["valid_top1"] > 0.9
    want = model.eval()(X)
    back = ETFModule.load_from_checkpoint(tmp_path / "m.ckpt", body=body(), head=NearestETFHead(8, 4))
    for other in (back, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(other.eval()(X), want)
    assert torch.equal(
        torch.cat(run.predict(model, DataLoader(X, batch_size=16))), torch.cat(run.predict(model, DATA))
    )
    assert type(model).__qualname__ == "ETFModule" and isinstance(model, lightning.LightningModule)


class Named(Dataset):
    def __len__(self):
        return len(Y)

    def __getitem__(self, i):
        return {"x": X[i], "y": Y[i]}


def test_lightning_labels_projection_and_refusals(lightning, tmp_path, capsys):
    from ngc_etf.elsewhere import ETFCallback

    narrow, named = theirs(lightning, d=3), DataLoader(Named(), batch_size=16)
    trainer(lightning, tmp_path, 1, ETFCallback(project=True, labels=lambda batch: batch["y"])).fit(
        narrow, named
    )
    assert (
        "at 'net.2' became NearestETFHead(C=4) behind a projection to 4 dimensions" in capsys.readouterr().out
    )
    weights = {tuple(p.shape) for g in narrow.optimizers().param_groups for p in g["params"]}
    assert (4, 3) in weights and narrow.net[2][1].targets is None
    with pytest.raises(ValueError, match=r"a batch must be \(x, y\), got dict.*labels=lambda"):
        trainer(lightning, tmp_path, 1, ETFCallback(verbose=False)).fit(theirs(lightning), named)
    with pytest.raises(ValueError, match="project=True inserts one"):
        trainer(lightning, tmp_path, 1, ETFCallback()).fit(theirs(lightning, d=3), DATA)
    with pytest.raises(ValueError, match="a head and delta"):
        ETFCallback(NearestETFHead(8, 4), delta=0.1)


def test_lightning_labels_are_taken_back_after_an_error(lightning, tmp_path):
    from ngc_etf.elsewhere import ETFCallback

    def step(self, i):
        assert self.net[2].targets is not None
        if i == 2:
            raise RuntimeError("their own")

    model = theirs(lightning, step)
    with pytest.raises(RuntimeError, match="their own"):
        trainer(lightning, tmp_path, 1, ETFCallback(verbose=False)).fit(model, DATA)
    assert model.net[2].targets is None


# ---- leaving

HEADS = {
    "standard": lambda d, C: StandardHead(d, C),
    "no-norm": lambda d, C: StandardHead(d, C, normalise=False),
    "fixed": lambda d, C: FixedETFHead(d, C, "haar"),
    "nearest": lambda d, C: NearestETFHead(d, C, tau=3.0),
}
SOLVERS = {"svd", "linalg", "eigh", "eig", "polar", "qr", "cholesky", "inverse", "solve"}


def trained(kind, d=8, project=False):
    "Body and head after some steps, and what it says at evaluation."
    torch.manual_seed(0)
    model, head, _ = swap_head(
        nn.Sequential(body(), nn.Linear(8, d), nn.Linear(d, 4)), HEADS[kind], project=project
    )
    opt = adam(model.parameters())
    for _ in range(5):
        head.targets = Y
        loss = F.cross_entropy(model(X), Y)
        opt.zero_grad()
        loss.backward()
        opt.step()
    head.targets = None
    return model, model.eval()(X).detach()


def words(ops):
    return {w for op in ops for w in re.split(r"[^a-z]+", op.lower())}


@pytest.mark.parametrize("kind", HEADS)
def test_plain_copy_torch_export_and_torchscript(kind):
    from ngc_etf.elsewhere import plain

    model, want = trained(kind)
    model.train()
    bare = plain(model)
    assert model.training and not any(isinstance(m, Head) for m in bare.modules()) and not bare.training
    assert {type(m).__module__.split(".")[0] for m in bare.modules()} == {"torch"}
    assert torch.allclose(bare(X), want, atol=1e-5)
    exported = torch.export.export(bare, (X[:8],), dynamic_shapes=({0: torch.export.Dim("N", min=1)},))
    script = torch.jit.trace(bare, X[:8])
    for f in (exported.module(), script):
        for n in (1, 7, 96):
            assert torch.allclose(f(X[:n]), want[:n], atol=1e-5)
    assert not SOLVERS & words(str(n.target) for n in exported.graph.nodes if n.op == "call_function")
    assert not SOLVERS & words(n.kind() for n in script.inlined_graph.nodes())
    kept, traced = (
        torch.export.export(model.eval(), (X[:8],), dynamic_shapes=({0: torch.export.Dim("N", min=1)},)),
        torch.jit.trace(model, X[:8]),
    )
    for f in (kept.module(), traced):
        assert torch.allclose(f(X[:7]), want[:7], atol=1e-5)  # the head itself
    assert not (SOLVERS - {"linalg"}) & words(
        [str(n.target) for n in kept.graph.nodes] + [n.kind() for n in traced.inlined_graph.nodes()]
    )  # linalg_vector_norm


@pytest.mark.parametrize(
    "kind, d, project", [("nearest", 8, False), ("nearest", 3, True), ("no-norm", 8, False)]
)
def test_onnx(tmp_path, kind, d, project):
    onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    from ngc_etf.elsewhere import to_onnx

    model, want = trained(kind, d, project)
    to_onnx(model, X[:8], tmp_path / "m.onnx")
    session = runtime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for n in (1, 7, 96):
        assert torch.allclose(
            torch.tensor(session.run(["logits"], {"x": X[:n].numpy()})[0]), want[:n], atol=1e-5
        )
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert graph.node and not SOLVERS & words(n.op_type for n in graph.node)


def test_onnx_of_an_image_network(tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    from ngc_etf.elsewhere import to_onnx

    model, head, _ = swap_head(create("mobilenetv3_small_050", num_classes=6))
    x = torch.randn(6, 3, 32, 32)
    head.targets = torch.arange(6)
    with torch.no_grad():
        model(x)
    head.targets = None
    with torch.no_grad():
        want = model.eval()(x)
    to_onnx(model, x[:2], tmp_path / "m.onnx")
    session = runtime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert torch.allclose(torch.tensor(session.run(None, {"x": x.numpy()})[0]), want, atol=1e-4)
