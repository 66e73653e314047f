"fastai: the callback in vision_learner and tabular_learner, export, freezing, mixing, precision, processes."

import itertools
import os
import socket
import warnings
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import minimum  # the module patches Learner with fine_tune and lr_find
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, TrainEvalCallback, load_learner
from fastai.losses import CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.metrics import accuracy
from fastai.optimizer import OptimWrapper
from fastai.tabular.all import CategoryBlock, TabularDataLoaders, tabular_learner
from fastai.torch_core import TensorCategory, TensorImage, set_seed
from fastai.vision.data import ImageDataLoaders
from fastai.vision.learner import vision_learner
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader as TorchLoader
from torch.utils.data import RandomSampler, TensorDataset
from torchvision.models import resnet18

from ngc_etf.agd import AGD
from ngc_etf.callback import CollapseRecorder, NearestETF
from ngc_etf.heads import Head, NearestETFHead
from ngc_etf.losses import nonl, ntce
from ngc_etf.means import centred_means
from ngc_etf.metrics import cdnv, cosine_margins, nc1, nc4
from ngc_etf.simplex import centring
from ngc_etf.streaming import NeuralCollapse

C = 4
pytestmark = pytest.mark.filterwarnings("ignore")


def assert_etf(W, eps=1e-4):
    assert (W.double() @ W.double().T - C / (C - 1) * centring(C, torch.float64)).abs().max() < eps


def quiet(learn):
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *a: None
    return learn


# ---- a batch by hand


def test_fastais_own_tensor_types_meet_every_function():
    "`dls.one_batch()` outside of a Learner; torch refuses to mix the labels' class and the images'."
    h, y = torch.randn(12, 6), torch.arange(12) % C
    images, labels = h.as_subclass(TensorImage), y.as_subclass(TensorCategory)

    def answers(h, y):
        torch.manual_seed(0)
        W = torch.randn(C, 6)
        yield from (nc1(h, y, C), nc4(h, y, W), cosine_margins(h, y, W), cdnv(h, y, C))
        yield from (ntce(h[:, :C], y), nonl(h[:, :C], y), centred_means(h, y, C)[0])
        metric = NeuralCollapse(C, 6)
        metric.update(h, y)
        yield metric.compute()["nc1"]
        yield NearestETFHead(6, C)(h, y).detach()

    for got, want in zip(answers(images, labels), answers(h, y)):
        assert torch.equal(got.as_subclass(torch.Tensor), want)


# ---- images in folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Four classes of twelve tiny pictures, one colour each."
    top, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    colours = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [180, 180, 60]])
    for c, i in itertools.product(range(C), range(12)):
        (top / f"class{c}").mkdir(exist_ok=True)
        Image.fromarray((colours[c] + rng.integers(-40, 40, (16, 16, 3))).astype(np.uint8)).save(
            top / f"class{c}" / f"{i}.png"
        )
    return top


def vision(folder, path, *cbs, loss=None, **kw):
    set_seed(0)
    dls = ImageDataLoaders.from_folder(folder, valid_pct=0.25, seed=0, bs=12, num_workers=0, device="cpu")
    return quiet(
        vision_learner(
            dls,
            resnet18,
            pretrained=False,
            normalize=False,
            cbs=[NearestETF(verbose=False), *cbs],
            metrics=accuracy,
            path=path,
            loss_func=loss,
            **kw,
        )
    )


def test_vision_learner_predicts_and_is_exported(folder, tmp_path):
    learn = vision(folder, tmp_path)
    learn.fit(2, 3e-3)
    loss, acc = learn.validate()
    preds, targs = learn.get_preds()
    assert preds.shape == (12, C) and torch.allclose(preds.sum(1), torch.ones(12), atol=1e-5)
    assert (preds.argmax(1) == targs).float().mean().item() == pytest.approx(acc)
    picture = folder / "class1" / "3.png"
    label, index, probs = learn.predict(picture)
    assert label == learn.dls.vocab[index] == learn.dls.vocab[probs.argmax()]
    assert_etf(learn.etf.weight)
    learn.export()
    loaded = quiet(load_learner(tmp_path / "export.pkl"))
    again = loaded.predict(picture)
    assert again[0] == label and torch.equal(again[2], probs)
    assert torch.equal(
        loaded.get_preds(dl=loaded.dls.test_dl(sorted(folder.glob("*/*.png"))))[0],
        learn.get_preds(dl=learn.dls.test_dl(sorted(folder.glob("*/*.png"))))[0],
    )
    assert loaded.etf.targets is None


@pytest.mark.parametrize("whole", [True, False])
def test_timm_in_fastai(folder, tmp_path, whole):
    "As fastai's body with fastai's head, and as a whole network with a classifier of its own."
    timm = pytest.importorskip("timm", reason="the extra timm is not installed")
    set_seed(0)
    dls = ImageDataLoaders.from_folder(folder, valid_pct=0.25, seed=0, bs=12, num_workers=0, device="cpu")
    name, etf = "mobilenetv3_small_050", NearestETF(verbose=False)
    if whole:
        learn = Learner(
            dls, timm.create_model(name, num_classes=C), CrossEntropyLossFlat(), cbs=etf, path=tmp_path
        )
    else:
        learn = vision_learner(dls, name, pretrained=False, normalize=False, cbs=etf, path=tmp_path)
    quiet(learn).fit(1, 1e-3)
    assert_etf(learn.etf.weight)
    assert learn.etf is (learn.model.get_classifier() if whole else learn.model[1][-1])


class Watch(Callback):
    "Which parameters moved in each fit?"

    def __init__(self):
        self.moved = []

    def before_fit(self):
        self.start = {n: p.detach().clone() for n, p in self.learn.model.named_parameters()}

    def after_fit(self):
        self.moved.append({n for n, p in self.learn.model.named_parameters() if (p != self.start[n]).any()})


def bare_head():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, C))


def convolutions(names, model):
    return {n for n in names if model.get_parameter(n).ndim == 4}


@pytest.mark.parametrize("mended", [True, False])
def test_fine_tune_trains_the_body_in_both_phases(folder, tmp_path, monkeypatch, mended):
    "The head alone in its group: without the mend phase one moves nothing but BatchNorms."
    if not mended:
        monkeypatch.setattr("ngc_etf.callback._regroup", lambda learn: "")
    learn = vision(folder, tmp_path, Watch(), custom_head=bare_head())
    full = [len(list(g)) > 0 for g in learn.splitter(learn.model)]
    assert full == ([False, True, True] if mended else [True, True, False])
    learn.fine_tune(1, 1e-2)
    one, two = (convolutions(m, learn.model) for m in learn.watch.moved)
    assert bool(one) == mended and two == convolutions(
        [n for n, _ in learn.model.named_parameters()], learn.model
    )
    if mended:
        assert all(n.startswith(("0.6", "0.7")) for n in one)  # the middle group, not the first


def test_fine_tune_with_a_head_that_trains_itself_is_left_alone(folder, tmp_path):
    learn = vision(
        folder, tmp_path, Watch()
    )  # fastai's own head: BatchNorms and a hidden layer before the classifier
    learn.fine_tune(1, 1e-2)
    one, two = learn.watch.moved
    assert not convolutions(one, learn.model) and "1.4.weight" in one and convolutions(two, learn.model)


class Mixed(Callback):
    "What the head was given, beside what the mixing callback says."

    order = NearestETF.order + 0.1

    def __init__(self):
        self.pairs = []

    def before_batch(self):
        if not self.training:
            return
        mix = next(cb for cb in self.learn.cbs if isinstance(cb, (MixUp, CutMix)))
        lam = torch.as_tensor(mix.lam).reshape(-1).expand(len(self.yb[0]))
        want = torch.zeros(len(lam), C)
        for i, (a, b, l) in enumerate(zip(self.yb[0].tolist(), mix.yb1[0].tolist(), lam.tolist())):
            want[i, a] += l
            want[i, b] += 1 - l
        self.pairs.append((self.learn.etf.targets.clone(), want))


@pytest.mark.parametrize("Mix", [MixUp, CutMix])
@pytest.mark.parametrize("Loss", [CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat])
def test_mixing_and_label_smoothing(folder, tmp_path, Mix, Loss):
    learn = vision(folder, tmp_path, Mix(1.0), Mixed(), loss=Loss(), custom_head=bare_head())
    learn.fit(1, 1e-3)
    assert len(learn.mixed.pairs) == 3
    for got, want in learn.mixed.pairs:
        assert type(got) is torch.Tensor and torch.allclose(got, want, atol=1e-6)
    assert any(((w > 0) & (w < 1)).any() for _, w in learn.mixed.pairs)
    assert_etf(learn.etf.weight)
    assert learn.etf.targets is None and all(p.isfinite().all() for p in learn.model.parameters())


# ---- clouds in the plane


def cloud(n=64, seed=0):
    y = torch.arange(n) % C
    return list(
        zip(
            torch.stack([y // 2, y % 2], 1) * 4.0
            - 2
            + torch.randn(n, 2, generator=torch.Generator().manual_seed(seed)),
            y,
        )
    )


def net(d=16, **kw):
    return nn.Sequential(nn.Linear(2, 32, **kw), nn.ReLU(), nn.Linear(32, d, **kw), nn.Linear(d, C))


class Losses(Callback):
    def __init__(self):
        self.seen = []

    def after_batch(self):
        if self.training:
            self.seen.append(self.learn.loss.item())


def learner(path, *cbs, model=None, etf=True, **kw):
    torch.manual_seed(0)
    dls = DataLoaders(DataLoader(cloud(), bs=16), DataLoader(cloud(seed=1), bs=16))
    cbs = [*([NearestETF(verbose=False)] if etf else []), *cbs]
    return quiet(
        Learner(dls, model or net(), CrossEntropyLossFlat(), metrics=accuracy, cbs=cbs, path=path, **kw)
    )


def test_a_saved_run_continues_bit_for_bit(tmp_path):
    build = lambda: learner(
        tmp_path,
        Losses(),
        model=nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, C)),
    )
    whole = build()
    whole.fit(2, 1e-2)
    whole.save("cut")
    whole.losses.seen.clear()
    whole.fit(2, 1e-2)
    rest = build()
    for p in rest.model.parameters():
        nn.init.normal_(p)  # nothing survives but the file
    rest.load("cut")
    rest.fit(2, 1e-2)
    assert len(rest.losses.seen) == 8 and rest.losses.seen == whole.losses.seen
    for k, v in whole.model.state_dict().items():
        assert torch.equal(v, rest.model.state_dict()[k]), k


@pytest.mark.parametrize("fitted", [False, True])
def test_lr_find_leaves_no_trace(tmp_path, fitted):
    searched, alone = (learner(tmp_path / n, Losses()) for n in "ab")
    if fitted:
        searched.fit(1, 1e-2)
        alone.fit(1, 1e-2)
    searched.lr_find(num_it=12, show_plot=False, suggest_funcs=minimum)
    searched.losses.seen.clear()
    alone.losses.seen.clear()
    for l in (searched, alone):
        l.fit(2, 1e-2)
    assert searched.losses.seen == alone.losses.seen
    for k, v in alone.model.state_dict().items():
        assert torch.equal(v, searched.model.state_dict()[k]), k
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("k", [1, 2])
def test_a_micro_batch_is_a_batch_and_solve_every_spares_solves(tmp_path, monkeypatch, k):
    from ngc_etf import solving

    solves, solve = [], solving.nearest_etf
    monkeypatch.setattr(
        solving,
        "nearest_etf",
        lambda H, U_prox=None, *a, **kw: solves.append(U_prox is None) or solve(H, U_prox, *a, **kw),
    )
    learn = learner(
        tmp_path, NearestETF(solve_every=k, verbose=False), GradientAccumulation(32), Losses(), etf=False
    )
    before = learn.model[0].weight.clone()
    learn.fit(3, 1e-2)
    assert learn.etf.means.t == 12 == len(learn.losses.seen)  # micro-batches of 16
    assert solves.count(True) == 1 and solves.count(False) == 12 // k  # problem (6) once, then (7)
    assert (learn.model[0].weight != before).any()


def test_late_swap_keeps_hyperparameters_and_frozen_groups(tmp_path):
    split = lambda m: [list(m[0].parameters()), list(m[2:].parameters())]
    learn = learner(tmp_path, Watch(), etf=False, splitter=split)
    learn.freeze()  # makes the optimiser
    learn.fit(1, slice(1e-3, 1e-2), wd=0.02, cbs=NearestETF(verbose=False))
    assert [(h["lr"], h["wd"]) for h in learn.opt.hypers] == [
        (1e-3, 0.02),
        (1e-2, 0.02),
    ] and learn.opt.frozen_idx == 1
    assert learn.watch.moved[-1] == {"2.weight", "2.bias"}


@pytest.mark.parametrize("late", [False, True])
def test_projection_is_trained_by_agd(tmp_path, late):
    learn = learner(
        tmp_path, Watch(), etf=False, model=net(3, bias=False), opt_func=partial(OptimWrapper, opt=AGD)
    )
    if late:
        learn.model[3] = nn.Linear(3, C, bias=False)
        learn.create_opt()
    learn.to_etf(project=True, verbose=False)
    learn.fit(12, 1.0)
    assert learn.watch.moved == [{"0.weight", "2.weight", "3.0.weight"}]
    assert learn.model[3][0].weight.shape == (C, 3)
    assert learn.validate()[1] > 0.7  # 0.87 at least for five seeds, one thread and two
    assert_etf(learn.etf.weight)


def test_frozen_torch_optimiser_with_an_empty_group(tmp_path, capsys):
    split = lambda m: [list(m[0].parameters()), list(m[2].parameters()), list(m[3].parameters())]
    learn = learner(
        tmp_path,
        NearestETF(),
        Watch(),
        etf=False,
        splitter=split,
        opt_func=partial(OptimWrapper, opt=torch.optim.AdamW),
    )
    learn.freeze()
    learn.fit(1, 1e-2)
    assert learn.watch.moved == [{"2.weight", "2.bias"}]
    assert "the last of 3 parameter groups held the classifier alone" in capsys.readouterr().out
    learn.unfreeze()
    learn.fit(1, 1e-2)
    assert learn.watch.moved[1] == {"0.weight", "0.bias", "2.weight", "2.bias"}


@pytest.mark.parametrize("when", ["before", "late", "by hand"])
def test_the_body_gets_the_rate_of_the_last_group(tmp_path, when):
    split = lambda m: [list(m[:3].parameters()), list(m[3].parameters())]
    model = net()
    if when == "by hand":
        model[3] = NearestETFHead(model[3].in_features, C)
    cbs = [NearestETF(verbose=False)]
    early = () if when == "late" else cbs
    learn = learner(tmp_path, Watch(), *early, etf=False, model=model, splitter=split)
    learn.create_opt()
    learn.fit(1, slice(1e-2), cbs=cbs if when == "late" else None)
    rates = [(h["lr"], len(g)) for h, g in zip(learn.opt.hypers, learn.opt.param_lists)]
    assert rates == [(1e-3, 0), (1e-2, 4)]
    assert learn.watch.moved == [{"0.weight", "0.bias", "2.weight", "2.bias"}]
    learn.freeze()
    assert learn.opt.frozen_idx == 1 and len(learn.opt.param_lists[1]) == 4


def test_a_head_that_is_not_used_is_reported_once(tmp_path, capsys):
    learn = learner(tmp_path, NearestETF(tau=5.0, verbose=False), etf=False)
    learn.to_etf(tau=10.0)
    stays = "NearestETFHead(tau=5.0) at '3', stays; NearestETFHead(tau=10.0) was not used"
    assert stays in capsys.readouterr().out and learn.etf.tau == 5.0
    learn.fit(2, 1e-2)
    learn.fit(1, 1e-2, cbs=NearestETF(tau=5.0))
    learn.fit(1, 1e-2, cbs=NearestETF())
    assert capsys.readouterr().out == "" and learn.etf.means.t == 16
    with pytest.raises(ValueError, match="cannot be put there"):
        learn.to_etf(NearestETFHead(learn.etf.d, C))


@pytest.mark.parametrize("own", ["loader", "sampler", None])
def test_own_generators_of_torchs_loaders_are_left_alone(tmp_path, own):
    data = TensorDataset(*(torch.stack(column) for column in zip(*cloud())))

    def weights(*cbs):
        g = torch.Generator().manual_seed(1)
        how = {"loader": dict(shuffle=True, generator=g), None: dict(shuffle=True)}
        how["sampler"] = dict(sampler=RandomSampler(data, generator=g))
        torch.manual_seed(0)
        learn = learner(tmp_path, *cbs, etf=False, model=net())
        if not cbs or isinstance(cbs[0], CollapseRecorder):
            learn.model[3] = NearestETFHead(learn.model[3].in_features, C)
        learn.dls = DataLoaders(TorchLoader(data, 16, **how[own]), TorchLoader(data, 16))
        set_seed(0)
        learn.add_cb(NearestETF(verbose=False))
        learn.fit(2, 1e-2)
        return learn.etf.weight

    plain = weights()
    for cb in (Watch(), CollapseRecorder(every=1)):  # with the first a look at the data finds the layer
        assert torch.equal(weights(cb), plain)


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="to_etf"):
        learner(tmp_path, etf=False).etf
    with pytest.raises(ValueError, match="project=True inserts one"):
        learner(tmp_path, model=net(3))
    with pytest.raises(ValueError, match="'1' is ReLU.*at='"):
        learner(tmp_path, model=nn.Sequential(nn.Linear(2, 4), nn.ReLU()))
    with pytest.raises(ValueError, match="distrib_ctx"):
        learner(tmp_path, model=nn.DataParallel(net())).fit(1)
    with pytest.raises(ValueError, match="a head and delta"):
        NearestETF(NearestETFHead(4, 4), delta=0.1)
    two = learner(tmp_path)
    two.dls = DataLoaders(*[DataLoader([(x, y, y) for x, y in cloud()], bs=16)] * 2)
    two.dls.n_inp = 1
    with pytest.raises(ValueError, match="one target tensor a batch, got 2"):
        two.fit(1)


# ---- which layer, how many classes, which labels


class TwoTasks(nn.Module):
    "Logits by fc; rot is registered last."

    def __init__(self, both=False):
        super().__init__()
        self.body, self.fc, self.rot = (
            nn.Sequential(nn.Linear(2, 8), nn.ReLU()),
            nn.Linear(8, C),
            nn.Linear(8, 3),
        )
        self.both = both

    def forward(self, x):
        h = self.body(x)
        return (self.fc(h), h) if self.both else self.fc(h)


def two_tasks(path, **kw):
    "A fit with shuffled batches."
    set_seed(0)
    learn = learner(path, NearestETF(verbose=False, **kw), Losses(), model=TwoTasks(), etf=False)
    learn.dls = DataLoaders(DataLoader(cloud(), bs=16, shuffle=True), learn.dls.valid)
    learn.fit(2, 1e-2)
    return learn


def test_the_layer_that_makes_the_output(tmp_path):
    looked, named = two_tasks(tmp_path), two_tasks(tmp_path, at="fc")
    assert isinstance(looked.model.fc, Head) and isinstance(looked.model.rot, nn.Linear)
    assert looked.losses.seen == named.losses.seen and looked.etf is looked.model.fc


def test_the_look_uses_up_no_batch_and_no_random_number(tmp_path):
    def order(look):
        set_seed(0)
        learn = learner(tmp_path, etf=False, model=TwoTasks())
        learn.dls = DataLoaders(DataLoader(cloud(), bs=16, shuffle=True), learn.dls.valid)
        if look:
            learn.to_etf(verbose=False)
        else:
            learn.to_etf(verbose=False, at="fc", head=NearestETFHead(8, C))
        return [x for x, _ in learn.dls.train]

    assert all(torch.equal(a, b) for a, b in zip(order(True), order(False)))


def test_a_model_that_does_not_run_on_the_batch_is_swapped_by_its_structure(tmp_path):
    class Doubled(Callback):
        "The model takes another input than the loader gives."

        def before_batch(self):
            self.learn.xb = (torch.cat([self.xb[0], self.xb[0]], 1),)

    learn = learner(tmp_path, Doubled(), model=nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, C)))
    learn.fit(1, 1e-2)
    assert_etf(learn.etf.weight)


def test_classes_are_those_of_the_data(folder, tmp_path):
    dls = ImageDataLoaders.from_folder(folder, valid_pct=0.25, seed=0, bs=12, num_workers=0, device="cpu")
    model = lambda C: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 8), nn.Linear(8, C))
    wide = Learner(dls, model(6), CrossEntropyLossFlat(), path=tmp_path)
    with pytest.raises(ValueError, match="at '3' has C=6, the data 4 classes"):
        wide.to_etf()
    assert wide.to_etf(C=4, verbose=False).etf.C == 4
    loose = Learner(dls, model(6), CrossEntropyLossFlat(), cbs=NearestETF(verbose=False, C=6), path=tmp_path)
    assert loose.etf.C == 6


def test_tabular_labels_of_shape_N_1(tmp_path):
    x, y = (torch.stack(column).numpy() for column in zip(*cloud()))
    frame = pd.DataFrame({"a": x[:, 0], "b": x[:, 1], "kind": [f"class{c}" for c in y]})
    dls = TabularDataLoaders.from_df(
        frame, cont_names=["a", "b"], y_names="kind", y_block=CategoryBlock(), bs=16, valid_idx=range(48, 64)
    )
    assert dls.one_batch()[-1].shape == (16, 1)
    learn = quiet(tabular_learner(dls, layers=[8], cbs=NearestETF(verbose=False), path=tmp_path))
    learn.add_cb(CollapseRecorder(every=1))
    learn.fit(1, 1e-2)
    assert_etf(learn.etf.weight)
    assert learn.etf.means.t == 3 and "test_nc1" in learn.collapse_recorder.rows[0]


@pytest.mark.parametrize("etf", [True, False])
def test_recorder_without_validation_and_with_more_than_logits(tmp_path, etf):
    recorder = CollapseRecorder(every=1, classifier="" if etf else "fc")
    learn = learner(tmp_path, recorder, model=TwoTasks(both=True), etf=etf)
    learn.dls = DataLoaders(DataLoader(cloud(), bs=16), DataLoader([], bs=16))
    learn.loss_func, learn.metrics = (lambda out, y: F.cross_entropy(out[0], y)), []
    learn.fit(2, 1e-2)
    assert [row["epoch"] for row in recorder.rows] == [1, 2]
    assert "nc1" in recorder.rows[0] and not any(k.startswith("test_") for k in recorder.rows[0])
    assert (recorder.rows[1]["nc2"] < 1e-5) == etf
    with torch.no_grad():
        z = torch.cat([learn.model.eval()(x)[0] for x, _ in learn.dls.train])
    y = torch.cat([y for _, y in learn.dls.train])
    assert recorder.rows[1]["train_loss"] == pytest.approx(F.cross_entropy(z, y).item(), abs=1e-5)
    drawn = learn.collapse_recorder.plot(names=("loss", "margin"))
    assert drawn[0].lines[0].get_ydata().tolist() == [row["train_loss"] for row in recorder.rows]
    assert len(drawn[1].lines) == 1 + etf  # a head says how many classes there are, and so the limit
    plt.close("all")


def test_a_recorder_without_rows_has_no_picture(tmp_path):
    learn = learner(tmp_path, CollapseRecorder(every=1))
    with pytest.raises(ValueError, match="rows must hold at least one row"):
        learn.collapse_recorder.plot()


def test_one_loader_alone(tmp_path):
    recorder = CollapseRecorder(every=1)
    learn = learner(tmp_path, recorder)
    learn.dls = DataLoaders(learn.dls.train)
    assert "nc1" in recorder.measure()


# ---- half precision


class OnTheCPU(MixedPrecision):
    "fastai's autocast and loss scaler are for CUDA and switch themselves off elsewhere; these are the CPU's."

    def before_fit(self):
        half = torch.float16 if self.amp_mode.value == "fp16" else torch.bfloat16
        self.autocast, self.scales = torch.autocast("cpu", dtype=half), []
        self.learn.scaler = torch.amp.GradScaler("cpu", enabled=half == torch.float16)


class Grads(Callback):
    order = MixedPrecision.order + 1

    def __init__(self):
        self.finite, self.dtypes = [], set()

    def before_step(self):
        self.finite.append(all(p.grad.isfinite().all() for p in self.learn.model.parameters()))


@pytest.mark.parametrize("mode", ["fp16", "bf16"])
def test_half_precision(tmp_path, mode):
    learn, dtypes = learner(tmp_path, OnTheCPU(mode), Grads()), set()
    learn.etf.register_forward_hook(
        lambda m, args, z: dtypes.add((args[0].dtype, z.dtype)) if m.training else None
    )
    learn.fit(12, 1e-2)
    half = getattr(torch, dict(fp16="float16", bf16="bfloat16")[mode])
    assert dtypes == {(half, half)}
    assert len(learn.grads.finite) > 40 and all(learn.grads.finite)  # of 48 steps
    assert_etf(learn.etf.weight, 1e-3)
    assert learn.etf.weight.dtype == torch.float32
    assert learn.validate()[1] > 0.7  # 0.90 at least for five seeds, one thread and two


@pytest.mark.parametrize("mode", ["to_fp16", "to_bf16"])
def test_fastai_precision_without_a_gpu_is_float32(tmp_path, mode):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    half, full = getattr(learner(tmp_path, Losses()), mode)(), learner(tmp_path, Losses())
    for l in (half, full):
        l.fit(1, 1e-2)
    assert half.losses.seen == full.losses.seen
    assert_etf(half.etf.weight, 1e-3)


# ---- order; several processes


def test_order_among_the_callbacks(tmp_path):
    pytest.importorskip("accelerate")
    from fastai.distributed import DistributedTrainer

    trainer = Callback()
    trainer.order = DistributedTrainer.order
    for cbs in itertools.islice(
        itertools.permutations(
            [NearestETF(verbose=False), MixUp(), GradientAccumulation(32), MixedPrecision(), trainer]
        ),
        0,
        120,
        17,
    ):
        learn = learner(tmp_path, *cbs, etf=False)
        order = [
            type(cb)
            for cb in learn.cbs.sorted("order")
            if type(cb)
            in (TrainEvalCallback, MixUp, GradientAccumulation, MixedPrecision, NearestETF, Callback)
        ]
        assert order == [TrainEvalCallback, MixUp, GradientAccumulation, MixedPrecision, NearestETF, Callback]


def _process(rank, port, folder):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        ACCELERATE_USE_CPU="true",
    )
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    from fastai.distributed import DistributedDL

    def broadcast(self, t, src):  # fastai's own sends the indices over CUDA
        t = torch.tensor(t)
        torch.distributed.broadcast(t, src)
        return t.tolist()

    DistributedDL._broadcast = broadcast
    learn = learner(folder, etf=False)
    with learn.distrib_ctx(sync_bn=False, cpu=True):
        learn.fit(2, 1e-2, cbs=NearestETF(verbose=False, delta=0.1))
    torch.save(learn.model.state_dict(), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_of_distrib_ctx_are_one(tmp_path):
    "The callback comes with fit, the hardest order: exchange before DDP wraps. One process agrees with two."
    pytest.importorskip("accelerate")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_process, (port, tmp_path), nprocs=2)
    a, b = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    data = cloud()
    joined = [data[i] for s in (0, 16) for half in (0, 32) for i in range(half + s, half + s + 16)]
    one = learner(tmp_path, etf=False)
    one.dls = DataLoaders(DataLoader(joined, bs=32), DataLoader(cloud(seed=1), bs=16))
    one.fit(2, 1e-2, cbs=NearestETF(verbose=False, delta=0.1))
    for k, v in one.model.state_dict().items():
        assert torch.allclose(v, a[k], atol=1e-5), k
    assert_etf(a["3.W"])
