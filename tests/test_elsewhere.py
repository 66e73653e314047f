"Outside fastai: Hugging Face, averages of weights, Lightning, exports; each is skipped without its package."

import copy
import logging
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ngc_etf.heads import FixedETFHead, Head, NearestETFHead, StandardHead
from ngc_etf.simplex import centring
from ngc_etf.swap import swap_head

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
    late = {
        "fastai",
        "timm",
        "lightning",
        "transformers",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "torchmetrics",
    }
    modules = "ngc_etf.swap, ngc_etf.lightning, ngc_etf.elsewhere as e"
    code = f"import sys, {modules}; found = {late} & set(sys.modules); "
    assert python(code + "print(sorted(found), e.__all__)").stdout.startswith("[] ['feed_labels'")


@pytest.mark.parametrize(
    "package, extra, use",
    [
        ("lightning", "lightning", "l.ETFModule"),
        ("lightning", "lightning", "l.ETFCallback()"),
        ("onnxscript", "onnx", "e.to_onnx(NearestETFHead(4, 3), torch.zeros(2, 4), 'never.onnx')"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(package, extra, use):
    modules = "torch, ngc_etf.elsewhere as e, ngc_etf.lightning as l"
    imports = f"import {modules}; from ngc_etf.heads import NearestETFHead"
    done = python(f"import sys; sys.modules['{package}'] = None; {imports}; {use}")
    message = f"this needs {package}, which is not installed: pip install 'ngc_etf[{extra}]'"
    assert f"ImportError: {message}" in done.stderr


def test_other_names_do_not_exist():
    import ngc_etf.lightning

    with pytest.raises(AttributeError, match="ETFModel"):
        ngc_etf.lightning.ETFModel


def create(name, **kw):
    timm = pytest.importorskip("timm", reason="the extra timm is not installed")
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, **kw)


# ---- Hugging Face


class Caller(nn.Module):
    "As transformers write their models: labels are an argument, the loss is computed inside."

    def __init__(self):
        super().__init__()
        self.body, self.classifier = nn.Linear(2, 8), nn.Linear(8, 4)
        self.seen = []

    def forward(self, pixel_values=None, labels=None, fail=False, **kwargs):
        logits = self.classifier(self.body(pixel_values))
        if fail:
            raise RuntimeError("their own")
        return {"loss": None if labels is None else F.cross_entropy(logits, labels), "logits": logits}


@pytest.fixture
def fed():
    from ngc_etf.elsewhere import feed_labels

    torch.manual_seed(0)
    model, head, _ = swap_head(Caller())
    return model, head, feed_labels(model)


def test_labels_by_name_or_by_place_are_given_and_taken_back(fed):
    model, head, feed = fed
    model(pixel_values=X, labels=Y)
    model(X, Y)
    assert head.means.t == 2 and head.targets is None and gap(head) < 1e-4
    with pytest.raises(RuntimeError, match="their own"):
        model(X, Y, fail=True)
    assert head.targets is None
    with pytest.raises(ValueError, match="needs the labels"):
        model(X)
    model.eval()(X)
    feed.remove()
    with pytest.raises(ValueError, match="needs the labels"):
        model.train()(X, Y)
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_labels_laid_down_by_a_loop_that_keeps_them_from_the_model(fed):
    "Label smoothing in `Trainer`, or a loss of one's own: the labels never reach `forward`."
    model, head, _ = fed
    for step in range(2):
        head.targets = Y
        logits = model(X, labels=None)["logits"]
        F.cross_entropy(logits, Y, label_smoothing=0.1).backward()
        assert head.targets is None and head.means.t == step + 1
    head.targets = torch.zeros_like(Y)
    model(X, Y)  # labels that do reach it come first
    assert torch.equal(head.means.seen, 3 * torch.bincount(Y).float())


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_a_copy_of_a_fed_model_feeds_its_own_head(fed, copied):
    model, head, feed = fed
    twin = copied(model)
    twin(X, Y)
    assert twin.classifier.means.t == 1 and head.means.t == 0
    twin._forward_pre_hooks[next(iter(twin._forward_pre_hooks))].__self__.remove()
    with pytest.raises(ValueError, match="needs the labels"):
        twin(X, Y)
    model(X, Y)
    assert head.means.t == 1


def test_fed_models_under_wrappers(fed):
    class Wrapper(nn.Module):
        "As DistributedDataParallel calls what it wraps."

        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *inputs, **kwargs):
            return self.module(*inputs, **kwargs)

    from ngc_etf.elsewhere import feed_labels

    model, head, feed = fed
    model.classifier = Wrapper(model.classifier)  # a part is wrapped after it was fed
    Wrapper(model)(X, labels=Y)
    assert head.means.t == 1 and head.targets is None
    feed.remove()
    outer = Wrapper(model)
    feed_labels(outer)
    outer(X, labels=Y)
    assert head.means.t == 2 and head.targets is None
    torch.compile(model, backend="eager")  # hooks are attributes of the module: nothing to refuse


def test_feeding_is_refused_where_it_cannot_work(fed):
    from ngc_etf.elsewhere import feed_labels, plain

    model, head, _ = fed
    with pytest.raises(
        ValueError, match="name='labels' is no argument of Sequential.forward, which takes input"
    ):
        feed_labels(nn.Sequential(NearestETFHead(2, 2)))
    with pytest.raises(ValueError, match="needs the head of Caller, which has 0: call swap_head first"):
        feed_labels(Caller())
    with pytest.raises(ValueError, match="which has 2"):
        feed_labels(nn.Sequential(NearestETFHead(2, 2), NearestETFHead(2, 2)))
    bare = plain(model)
    assert not bare._forward_pre_hooks and not bare._forward_hooks and model._forward_pre_hooks
    assert torch.allclose(bare(X)["logits"], model.eval()(X)["logits"], atol=1e-5)


@pytest.fixture(scope="module")
def vit():
    "A vision transformer of two small blocks, and how to build one."
    hf = pytest.importorskip("transformers", reason="the extra hf is not installed")
    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    size = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    config = hf.ViTConfig(image_size=8, patch_size=4, num_labels=4, **size)

    def build():
        torch.manual_seed(0)
        return hf.ViTForImageClassification(config)

    return hf, build


def test_trainer_needs_nothing_else(vit, tmp_path):
    from ngc_etf.elsewhere import feed_labels

    hf, build = vit
    model, head, message = swap_head(build(), example={"pixel_values": torch.randn(2, 3, 8, 8)})
    feed_labels(model)
    assert "at 'classifier'" in message
    pictures = [{"pixel_values": torch.randn(3, 8, 8), "labels": i % 4} for i in range(24)]
    how = hf.TrainingArguments(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        use_cpu=True,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        logging_steps=100,
    )
    trainer = hf.Trainer(model, how, train_dataset=pictures, eval_dataset=pictures[:8])
    trainer.train()
    t = head.means.t.item()
    assert t == 6  # 2, 1, 2, 1: an epoch has three micro-batches
    assert gap(head) < 1e-4 and head.targets is None
    assert "eval_loss" in trainer.evaluate() and head.means.t == t
    resumed, other, _ = swap_head(build())
    feed_labels(resumed)
    again = hf.Trainer(resumed, how, train_dataset=pictures)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))  # nothing left to do
    for k, v in head.state_dict().items():  # the head's; Trainer itself misses renamed layers of the body
        assert torch.equal(v, other.state_dict()[k]), k
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert other.means.t == t and gap(other) < 1e-4


@pytest.mark.parametrize("before", [1, 2])
def test_another_number_of_classes_reaches_the_loss(vit, before):
    from ngc_etf.elsewhere import feed_labels

    hf, build = vit
    config = hf.ViTConfig(**(build().config.to_diff_dict() | {"num_labels": before}))
    model, head, _ = swap_head(hf.ViTForImageClassification(config), C=4)
    feed_labels(model)
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    out = model(pixel_values=x, labels=y)
    assert model.config.num_labels == model.num_labels == 4
    assert torch.allclose(out.loss, F.cross_entropy(out.logits, y))


def test_saved_with_its_head_and_loaded_after_the_exchange(vit, tmp_path):
    from ngc_etf.elsewhere import feed_labels

    hf, build = vit
    model, head, _ = swap_head(build(), lambda d, C: NearestETFHead(d, C, start="haar"))
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    head.targets = y
    model(x).logits.sum().backward()
    head.targets = None
    model.eval().save_pretrained(tmp_path)

    class ETFViTForImageClassification(hf.ViTForImageClassification):  # the loss goes by the class's name
        def __init__(self, config):
            super().__init__(config)
            swap_head(self)

    back, report = ETFViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(back.eval()(x).logits, model(x).logits) and back.classifier.means.t == 1
    feed_labels(back)
    back.train()(pixel_values=x, labels=y).loss.backward()
    assert back.classifier.means.t == 2
    _, report = hf.ViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert "classifier.U_prox" in report["unexpected_keys"]  # the library lists it


def test_accelerate(vit):
    accelerate = pytest.importorskip("accelerate", reason="the extra distributed is not installed")
    from ngc_etf.elsewhere import feed_labels

    model, head, _ = swap_head(vit[1]())
    feed_labels(model)
    accelerate.state.AcceleratorState._reset_state(True)  # of tests before this one
    engine = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 4
    model, opt, loader = engine.prepare(model, adam(model.parameters()), DataLoader(TensorDataset(x, y), 8))
    for images, labels in loader:
        engine.backward(model(pixel_values=images, labels=labels).loss)
        opt.step()
        opt.zero_grad()
    assert head.means.t == 2 and gap(head) < 1e-4 and head.targets is None


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
    from ngc_etf.lightning import ETFCallback

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
    assert gap(rest.net[2]) < (1e-3 if "precision" in kw else 1e-4)
    assert rest.right == (rest.eval().net(X).argmax(1) == Y)[-16:].float().mean()  # as validation saw it
    assert [p.name for p in tmp_path.iterdir()] == ["one.ckpt"]


def test_lightning_module_is_kept_whole_in_checkpoint_and_pickle(lightning, tmp_path):
    from ngc_etf.lightning import ETFModule

    torch.manual_seed(0)
    model = ETFModule(body(), NearestETFHead(8, 4), adam)
    run = trainer(lightning, tmp_path, 6)
    run.fit(model, DATA)
    run.save_checkpoint(tmp_path / "m.ckpt")
    top1 = run.validate(model, DATA, verbose=False)[0]["valid_top1"]
    want = model.eval()(X)
    assert top1 == pytest.approx((want.argmax(1) == Y).float().mean().item())
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
    from ngc_etf.lightning import ETFCallback

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


SPAWNED = """
import sys, torch, lightning as L
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from ngc_etf import ETFCallback, swap_head

class Theirs(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def training_step(self, batch, i):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)

if __name__ == "__main__":
    module = Theirs()
    data = DataLoader(TensorDataset(torch.randn(64, 8), torch.arange(64) % 4), batch_size=16)
    if sys.argv[1] == "swapped":
        swap_head(module)
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    run = L.Trainer(
        strategy="ddp_spawn", devices=1, accelerator="cpu", max_epochs=1, callbacks=[ETFCallback()],
        **dict.fromkeys(quiet, False))
    run.fit(module, data)
    print("steps:", module.net[-1].means.steps(), module.net[-1].is_etf())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "layer, says", [("linear", "exchange that before the fit"), ("swapped", "steps: 4 True")]
)
def test_lightning_trains_a_copy_in_another_process(lightning, tmp_path, layer, says):
    (tmp_path / "train.py").write_text(SPAWNED)
    command = [sys.executable, tmp_path / "train.py", layer]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert says in done.stdout + done.stderr and (done.returncode == 0) == (layer == "swapped"), done.stderr


def test_lightning_labels_are_taken_back_after_an_error(lightning, tmp_path):
    from ngc_etf.lightning import ETFCallback

    def step(self, i):
        assert self.net[2].targets is not None
        if i == 2:
            raise RuntimeError("their own")

    model = theirs(lightning, step)
    with pytest.raises(RuntimeError, match="their own"):
        trainer(lightning, tmp_path, 1, ETFCallback(verbose=False)).fit(model, DATA)
    assert model.net[2].targets is None


@pytest.mark.parametrize("kind", ["LearningRateFinder", "BatchSizeFinder", "Tuner"])
def test_searches_that_take_the_callbacks_away(lightning, tmp_path, kind):
    import lightning.pytorch.callbacks as known
    from lightning.pytorch.tuner import Tuner

    from ngc_etf.lightning import ETFCallback

    model = theirs(lightning)
    model.lr, model.batch_size = 1e-2, 8
    model.train_dataloader = lambda: DataLoader(TensorDataset(X, Y), model.batch_size)
    model.val_dataloader = model.train_dataloader
    options = {
        "LearningRateFinder": dict(num_training_steps=8, early_stop_threshold=None),
        "BatchSizeFinder": dict(max_trials=2, steps_per_trial=2),
    }
    search = [] if kind == "Tuner" else [getattr(known, kind)(**options[kind])]
    run = trainer(lightning, tmp_path, 1, ETFCallback(verbose=False), *search)
    if kind == "Tuner":
        Tuner(run).lr_find(model, num_training=8, early_stop_threshold=None)
        assert model.net[2].means.t == 0 and "training_step" not in vars(model)
    run.fit(model)
    assert model.net[2].means.t == len(model.train_dataloader()) and gap(model.net[2]) < 1e-4
    assert "training_step" not in vars(model) and model.net[2].targets is None


def test_lightning_labels_that_the_step_makes_itself(lightning, tmp_path):
    from ngc_etf.lightning import ETFCallback

    def step(self, i):
        self.net[2].targets = torch.full((16, 4), 0.25)

    model = theirs(lightning, step)
    trainer(lightning, tmp_path, 1, ETFCallback(verbose=False)).fit(model, DATA)
    assert torch.equal(model.net[2].means.seen, torch.full((4,), 24.0))


def test_a_second_callback_with_other_options_is_told(lightning, tmp_path, capsys):
    from ngc_etf.lightning import ETFCallback

    model, same = theirs(lightning), ETFCallback(tau=5.0)
    trainer(lightning, tmp_path, 1, same).fit(model, DATA)
    capsys.readouterr()
    for cb in (same, ETFCallback(tau=5.0), ETFCallback()):
        trainer(lightning, tmp_path, 1, cb).fit(model, DATA)
    assert capsys.readouterr().out == ""
    trainer(lightning, tmp_path, 1, ETFCallback(tau=9.0)).fit(model, DATA)
    assert "(tau=5.0) at 'net.2', stays; NearestETFHead(tau=9.0) was not used" in capsys.readouterr().out
    assert model.net[2].means.t == 30


# ---- Lightning's life cycle


def late(L, configure=True, metric_first=False):
    "A module that makes its layers in a hook, with a loss and a metric behind them."
    from torchmetrics.classification import MulticlassAccuracy

    def make(self, *args, **kwargs):
        if self.net is None:
            torch.manual_seed(0)
            self.net = nn.Sequential(body(), nn.Linear(8, 4))
            self.loss, self.accuracy = nn.CrossEntropyLoss(), MulticlassAccuracy(4)

    class Late(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = None

        def training_step(self, batch, i):
            return self.loss(self.net(batch[0]), batch[1])

        def validation_step(self, batch, i):
            self.accuracy(self.net(batch[0]), batch[1])

        test_step = validation_step

        def predict_step(self, batch, i):
            return self.net(batch[0])

        def configure_optimizers(self):
            return adam(self.parameters())

    setattr(Late, "configure_model" if configure else "setup", make)
    return Late()


def is_head(layer):
    return isinstance(layer, Head)


@pytest.mark.parametrize("configure", [True, False], ids=["configure_model", "setup"])
def test_layers_made_in_hooks_are_waited_for(lightning, tmp_path, configure):
    from ngc_etf.lightning import ETFCallback

    model = late(lightning, configure)
    trainer(lightning, tmp_path, 1, ETFCallback(verbose=False)).fit(model, DATA, DATA)
    assert is_head(model.net[1]) and gap(model.net[1]) < 1e-4 and model.net[1].means.t == 6
    assert not {"configure_model", "setup"} & set(vars(model))  # its own again
    trained = {id(p) for g in model.optimizers().param_groups for p in g["params"]}
    assert trained == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("order", [0, 1], ids=["average first", "head first"])
@pytest.mark.parametrize("kind", ["WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging"])
@pytest.mark.parametrize("make", ["theirs", "configure_model"])
def test_averages_in_either_order(lightning, tmp_path, order, kind, make):
    import lightning.pytorch.callbacks as known

    from ngc_etf.lightning import ETFCallback

    if not hasattr(known, kind):
        pytest.skip(f"this Lightning has no {kind}")
    model = theirs(lightning) if make == "theirs" else late(lightning)
    average = (
        getattr(known, kind)(1e-2, swa_epoch_start=1) if kind.startswith("Stoch") else getattr(known, kind)()
    )
    callbacks = [average, ETFCallback(verbose=False)]
    if kind.startswith("Stoch") and make != "theirs":
        pytest.skip("it copies a module that has no layers yet, with or without us")
    run = trainer(lightning, tmp_path, 3, *callbacks[:: 1 - 2 * order])
    run.fit(model, DATA, DATA)
    assert is_head(model.net[-1]) and gap(model.eval().net[-1]) < 1e-5
    assert torch.isfinite(model.net(X)).all()


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_outside_fit_a_classifier_stays(lightning, tmp_path, stage):
    from ngc_etf.lightning import ETFCallback

    model = late(lightning)
    trainer(lightning, tmp_path, 1).fit(model, DATA)
    before, logits = copy.deepcopy(model.state_dict()), model.eval().net(X)
    run = trainer(lightning, tmp_path, 1, ETFCallback(verbose=False))
    getattr(run, stage)(model, DATA)
    assert type(model.net[1]) is nn.Linear and torch.equal(model.net(X), logits)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    run.save_checkpoint(tmp_path / "linear.ckpt")
    again = late(lightning)
    getattr(run, stage)(again, DATA, ckpt_path=tmp_path / "linear.ckpt", weights_only=False)
    assert type(again.net[1]) is nn.Linear and torch.equal(again.eval().net(X), logits)
    assert not again._load_state_dict_pre_hooks


@pytest.mark.parametrize("d", [8, 3])
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_outside_fit_a_checkpoint_finds_its_head(lightning, tmp_path, stage, d):
    from ngc_etf.lightning import ETFCallback

    etf = lambda: ETFCallback(verbose=False, project=True)
    model = theirs(lightning, d=d)
    for name in ("test_step", "predict_step"):
        setattr(type(model), name, type(model).validation_step)
    run = trainer(lightning, tmp_path, 1, etf())
    run.fit(model, DATA)
    run.save_checkpoint(tmp_path / "head.ckpt")
    fresh = type(model)()
    getattr(trainer(lightning, tmp_path, 1, etf()), stage)(
        fresh, DATA, ckpt_path=tmp_path / "head.ckpt", weights_only=False
    )
    assert torch.equal(fresh.eval().net(X), model.eval().net(X))
    for k, v in model.state_dict().items():
        assert torch.equal(v, fresh.state_dict()[k]), k


class TwoTasks(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fc, self.rot = nn.Linear(2, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.body(x))


@pytest.mark.parametrize("source", ["loader", "module", "datamodule"])
def test_the_look_at_lightnings_data(lightning, tmp_path, source):
    "The layer that makes the logits, and no random number used up."
    from ngc_etf.lightning import ETFCallback

    def shuffled():
        return DataLoader(TensorDataset(X, Y), 16, shuffle=True, generator=torch.Generator().manual_seed(1))

    def fit(at):
        model = theirs(lightning)
        model.net = TwoTasks()
        torch.manual_seed(2)
        run, data = trainer(lightning, tmp_path, 1, ETFCallback(verbose=False, at=at)), {}
        if source == "loader":
            data = {"train_dataloaders": shuffled()}
        elif source == "module":
            type(model).train_dataloader = lambda self: shuffled()
        else:
            data = {"datamodule": type("D", (lightning.LightningDataModule,), {})()}
            data["datamodule"].train_dataloader = shuffled
        run.fit(model, **data)
        return model

    torch.manual_seed(0)
    seen = fit("")
    assert is_head(seen.net.fc) and not is_head(seen.net.rot)
    assert seen.seen != [] and len(seen.seen) == 6


def test_lightning_data_says_how_many_classes(lightning, tmp_path):
    from ngc_etf.lightning import ETFCallback

    class Data(lightning.LightningDataModule):
        num_classes = 3

        def train_dataloader(self):
            return DATA

    model = theirs(lightning)
    with pytest.raises(ValueError, match="at 'net.2' has C=4, the data 3 classes"):
        trainer(lightning, tmp_path, 1, ETFCallback(verbose=False)).fit(model, datamodule=Data())
    assert not any(is_head(m) for m in model.modules())
    trainer(lightning, tmp_path, 1, ETFCallback(verbose=False, C=4)).fit(model, datamodule=Data())
    assert is_head(model.net[2])


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
    free = ({0: torch.export.Dim("N", min=1)},)
    kept = torch.export.export(model.eval(), (X[:8],), dynamic_shapes=free)
    traced = torch.jit.trace(model, X[:8])
    for f in (kept.module(), traced):
        assert torch.allclose(f(X[:7]), want[:7], atol=1e-5)  # the head itself
    assert not (SOLVERS - {"linalg"}) & words(
        [str(n.target) for n in kept.graph.nodes] + [n.kind() for n in traced.inlined_graph.nodes()]
    )  # linalg_vector_norm


def test_keys_that_do_not_match_and_the_way_back():
    from ngc_etf.elsewhere import plain

    model, want = trained("nearest")
    state = model.state_dict()
    fresh = nn.Sequential(body(), nn.Linear(8, 8), nn.Linear(8, 4))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        fresh.load_state_dict(state)
    swapped, _, _ = swap_head(fresh, HEADS["nearest"])
    swapped.load_state_dict(state)
    assert torch.equal(swapped.eval()(X), want)
    other = plain(trained("nearest")[0])
    other.load_state_dict(plain(model).state_dict())
    assert torch.allclose(other(X), want, atol=1e-5)


def test_plain_of_several_heads():
    from ngc_etf.elsewhere import plain

    model = nn.ModuleDict({"a": NearestETFHead(8, 4), "b": nn.Sequential(StandardHead(8, 3))}).eval()
    bare = plain(model)
    h = torch.randn(5, 8)
    for name in "ab":
        assert torch.allclose(bare[name](h), model[name](h), atol=1e-5)
    assert not any(is_head(m) for m in bare.modules())


@pytest.mark.parametrize("Kind", [NearestETFHead, lambda d, C: StandardHead(d, C, normalise=False)])
def test_plain_of_a_model_that_hands_labels_on(Kind):
    from ngc_etf.elsewhere import plain

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), Kind(8, 4)

        def forward(self, x, y=None):
            return self.head(self.body(x), y)

    own, h, y = Own(), torch.randn(12, 8), torch.arange(12) % 4
    own(h, y)
    bare = plain(own, labels=True)
    assert not any(is_head(m) for m in bare.modules())
    for labels in (y, None):
        assert torch.allclose(bare(h, labels), own.eval()(h), atol=1e-5)
    exported = torch.export.export(bare, (h,))
    assert torch.allclose(exported.module()(h), own(h), atol=1e-5)
    with pytest.raises(TypeError):
        plain(own)(h, y)


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


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_body_of_another_precision_leaves_too(tmp_path, dtype, normalise):
    from ngc_etf.elsewhere import plain, to_onnx

    head = NearestETFHead(8, 4) if normalise else StandardHead(8, 4, normalise=False)
    model, x = nn.Sequential(nn.Linear(2, 8).to(dtype), head), X.to(dtype)
    model[1](model[0](x), Y)
    want, eps = model.eval()(x), 4 * torch.finfo(dtype).eps * 8
    for labels in (False, True):
        bare = plain(model, labels)
        assert bare(x).dtype == dtype and torch.allclose(bare(x), want, atol=eps, rtol=eps)
    if dtype != torch.float64:  # a head of float64 computes alone, and one in float32 with W of float32
        assert bare[1](torch.zeros(1, 8, dtype=dtype)).isfinite().all()
    bare = plain(model)
    assert not any(type(m).__module__.startswith("ngc_etf") for m in bare.modules())
    torch.save(bare, tmp_path / "bare.pt")
    code = f"import sys, torch; m = torch.load({str(tmp_path / 'bare.pt')!r}, weights_only=False); "
    code += f"print(m(torch.zeros(2, 2, dtype={dtype})).dtype, 'ngc_etf' in sys.modules)"
    assert python(code).stdout == f"{dtype} False\n"
    onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    to_onnx(model, x[:8], tmp_path / "m.onnx")
    onnx.checker.check_model(tmp_path / "m.onnx", full_check=True)
    if dtype == torch.bfloat16:  # ONNX Runtime has no such product on a CPU
        return
    session = runtime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    got = torch.tensor(session.run(["logits"], {"x": x[:7].numpy()})[0])
    assert got.dtype == dtype and torch.allclose(got, want[:7], atol=eps, rtol=eps)


@pytest.mark.slow
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
