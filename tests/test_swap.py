"Which layer makes the output, and its exchange: traces, structure, torchvision, timm, adapters, lazy layers."

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import parametrizations
from torchvision.models.feature_extraction import create_feature_extractor

from ngc_etf.classifier import last_linear
from ngc_etf.elsewhere import plain
from ngc_etf.heads import FixedETFHead, Head, NearestETFHead, StandardHead
from ngc_etf.simplex import centring
from ngc_etf.swap import _swap_for_data, swap_head

pytestmark = pytest.mark.filterwarnings("ignore")
D, C = 8, 3
X = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))


def gap(head):
    "How far W is from a simplex ETF."
    W = head.weight.detach().double()
    return (W @ W.T - head.C / (head.C - 1) * centring(head.C, W.dtype)).abs().max().item()


class Net(nn.Module):
    "Layers by name, in the order in which they are registered; `use` says what the forward makes of them."

    def __init__(self, use=lambda m, h: m.fc(h), **layers):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, D), nn.ReLU())
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.use = use

    def forward(self, x):
        return self.use(self, self.body(x))


class LoRA(nn.Module):
    def __init__(self, base, r=2, names=("base_layer", "lora_A", "lora_B")):
        super().__init__()
        self.names = names
        factors = nn.Linear(base.in_features, r, bias=False), nn.Linear(r, base.out_features, bias=False)
        for name, layer in zip(names, (base, *factors)):
            self.add_module(name, layer)

    def forward(self, x):
        base, A, B = (getattr(self, n) for n in self.names)
        return base(x) + B(A(x))


def fc(C=C):
    return nn.Linear(D, C)


# ---- registered last, or used last


def test_the_layer_that_is_used_not_the_one_registered_last():
    model = Net(fc=fc(), rot=fc(4))
    assert last_linear(model, example=X) == "fc"
    with pytest.raises(ValueError, match=r"fc \(d=8, C=3\), rot \(d=8, C=4\); give a batch"):
        swap_head(model)
    assert not any(isinstance(m, Head) for m in model.modules())  # as before the call
    model, head, message = swap_head(model, example=X)
    assert model.fc is head and "at 'fc'" in message and isinstance(model.rot, nn.Linear)
    assert last_linear(model) == "fc" and swap_head(model, example=X)[2] == ""


@pytest.mark.parametrize("name", ["fc", "rot"])
def test_a_name_overrules_what_is_seen(name):
    model = Net(fc=fc(), rot=fc(4))
    assert last_linear(model, at=name, example=X) == name
    assert last_linear(model, at="body.0", example=X) == "body.0"


@pytest.mark.parametrize(
    "use",
    [
        lambda m, h: m.fc(h).double(),
        lambda m, h: m.fc(h).bfloat16().float(),
        lambda m, h: m.fc(h)[:, :, None],
        lambda m, h: m.fc(h).log_softmax(1),
        lambda m, h: 2.5 * m.fc(h),
        lambda m, h: (m.fc(h), h),
        lambda m, h: (h, m.fc(h)),
        lambda m, h: (m.rot(h), m.fc(m.rot(h).relu())),  # features by a linear layer, returned as well
        lambda m, h: {"rot": m.rot(h), "logits": m.fc(h)},
        lambda m, h: SimpleNamespace(aux=m.rot(h), logits=m.fc(h)),
        lambda m, h: {"loss": None, "out": m.fc(h)},
        lambda m, h: (m.fc(h), m.rot(h)),  # the first of two
        lambda m, h: (m.rot(h), m.fc(h))[1],
    ],
    ids=range(13),
)
def test_what_becomes_of_the_output(use):
    model = Net(use, fc=fc(D), rot=fc(D))
    if "bfloat16" in use.__code__.co_names:
        model.fc.weight.data.fill_(0.5)
        model.fc.bias.data.zero_()
        model.body[0].weight.data.zero_()
        model.body[0].bias.data.fill_(0.25)  # exact in either type
    assert last_linear(model, example=X) == "fc"


@pytest.mark.parametrize(
    "use",
    [
        lambda m, h: m.fc(h).relu(),
        lambda m, h: F.relu(m.fc(h), inplace=True),
        lambda m, h: m.fc(h) + m.rot(h),
        lambda m, h: m.fc(h)[:, :2],
        lambda m, h: F.linear(h, m.fc.weight),
    ],
    ids=range(5),
)
def test_an_output_that_no_layer_makes_is_refused(use):
    model = Net(use, rot=fc(), fc=fc())
    model.fc.bias.data.copy_(torch.tensor([-9.0, 9.0, 0.0]))  # so that a ReLU has something to cut off
    with pytest.raises(ValueError, match=r"no linear layer makes the output of Net.*rot \(d=8, C=3\), fc"):
        last_linear(model, example=X)


def test_the_look_leaves_no_trace():
    model = Net(lambda m, h: m.fc(m.drop(m.norm(h))), norm=nn.BatchNorm1d(D), drop=nn.Dropout(), fc=fc())
    model.norm.eval()
    model.fc.weight.requires_grad_(False)
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [m.training for m in model.modules()]
    last_linear(model, example=X)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match="does not run through Net"):
        last_linear(model, example=torch.randn(5, 7))
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks for m in model.modules())
    with torch.inference_mode():
        assert last_linear(model, example=X.clone()) == "fc"


def test_kinds_of_examples():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.z = nn.Linear(2, D), nn.Linear(2, D), nn.Linear(D, C)

        def forward(self, x, other=None):
            return self.z(self.a(x) + self.b(x if other is None else other))

    model = Two()
    for example in (X, (X, X), {"x": X}, {"x": X, "other": X}, (X.double(), X)):
        assert last_linear(model, example=example) == "z"
    assert last_linear(model.half(), example=X) == "z"
    assert last_linear(torch.compile(Net(rot=fc(), fc=fc())), example=X) == "_orig_mod.fc"
    inside = Net(rot=fc(), fc=fc())
    inside.compile(backend="eager")
    inside(X)
    assert last_linear(inside, example=X) == "fc"


# ---- adapters, lazy layers, parts


def test_an_adapter_is_exchanged_as_a_whole():
    for example in (None, X):
        model, head, message = swap_head(nn.Sequential(nn.Linear(2, D), LoRA(fc())), example=example)
        assert model[1] is head and (head.d, head.C) == (D, C) and message.startswith("LoRA(d=8, C=3)")
    inside = Net(fc=fc(), blocks=LoRA(nn.Linear(D, D)), use=lambda m, h: m.fc(m.blocks(h)))
    assert last_linear(inside, example=X) == "fc"
    with pytest.raises(ValueError, match=r"fc \(d=8, C=3\), blocks \(d=8, C=8\)"):
        last_linear(inside)


@pytest.mark.parametrize("r", [2, C])
def test_a_correction_by_other_names_is_refused_with_an_example(r):
    model = nn.Sequential(nn.Linear(2, D), LoRA(fc(), r, names=("base", "down", "up")))
    with pytest.raises(ValueError, match="no linear layer makes the output"):
        swap_head(model, example=X)


def test_saved_modules_of_peft_are_two_candidates():
    "As peft's `ModulesToSaveWrapper`: the original is kept beside the trained copy."
    wrapper = Net(lambda m, h: m.modules_to_save["default"](h), original_module=fc())
    wrapper.modules_to_save = nn.ModuleDict({"default": fc()})
    with pytest.raises(ValueError, match="original_module.*modules_to_save.default"):
        last_linear(wrapper)
    assert last_linear(wrapper, example=X) == "modules_to_save.default"


def test_lazy_layers_are_told_their_size_or_refused():
    lazy = lambda: nn.Sequential(nn.LazyLinear(D), nn.ReLU(), nn.LazyLinear(C))
    with pytest.raises(ValueError, match="does not know its input dimension yet: give a batch of inputs"):
        swap_head(lazy())
    assert swap_head(lazy(), example=X)[1].d == D
    assert swap_head(lazy(), at="2", example=X)[1].d == D
    assert swap_head(nn.LazyLinear(C), example=torch.randn(4, D))[1].d == D


def test_parametrised_layers_and_attention():
    normed = nn.Sequential(nn.Linear(2, D), parametrizations.weight_norm(fc()))
    assert last_linear(normed) == last_linear(normed, example=X) == "1"
    attends = nn.Sequential(nn.Linear(2, D), nn.MultiheadAttention(D, 2))
    with pytest.raises(ValueError, match="its linear layers are 0"):
        last_linear(attends)


def test_several_heads_are_several_candidates():
    model = Net(fc=NearestETFHead(D, C), rot=NearestETFHead(D, 4))
    assert last_linear(model, example=X) == "fc"
    with pytest.raises(ValueError, match="fc .*, rot "):
        last_linear(model)


@pytest.mark.parametrize("first", ["backbone", "fc"])
@pytest.mark.parametrize("use", [lambda m, h: m.backbone[1](h), lambda m, h: m.fc(h)])
@pytest.mark.parametrize("example", [None, X])
@pytest.mark.parametrize("classes", [None, 5])
def test_a_layer_of_two_names_is_exchanged_under_both(first, use, example, classes):
    layer = nn.Linear(D, C)
    parts = {"backbone": nn.Sequential(nn.Identity(), layer), "fc": layer}
    model = Net(use, **(parts if first == "backbone" else dict(reversed(parts.items()))))
    model, head, _ = swap_head(model, C=classes, example=example)
    assert model.backbone[1] is model.fc is head
    head.targets = torch.arange(len(X)) % C
    model(X)
    assert head.means.steps() == 1
    bare = plain(model)
    assert not any(isinstance(m, Head) for m in bare.modules())
    assert torch.allclose(bare(X), model.eval()(X), atol=1e-5)


def test_a_part_is_watched_while_the_whole_runs():
    inner = Net(lambda m, h: m.out(h), out=fc(D), rot=fc(4))
    outer = Net(lambda m, h: m.fc(m.inner(h[:, :2]).relu()), inner=inner, fc=fc())
    assert last_linear(outer, at="inner", example=X) == "inner.out"
    assert last_linear(outer, example=X) == "fc"


# ---- structure


class Odd(nn.Module):
    "Its classifier is registered first."

    def __init__(self):
        super().__init__()
        self.fc, self.body = nn.Linear(6, 3), nn.Sequential(nn.Linear(2, 6), nn.ReLU())

    def forward(self, x):
        return self.fc(self.body(x))


def test_a_classifier_is_named_or_not_found():
    with pytest.raises(ValueError, match=r"'body.1' is ReLU.*its linear layers are fc \(d=6, C=3\), body.0"):
        swap_head(Odd())
    assert last_linear(Odd(), example=X) == "fc"
    model, head, message = swap_head(Odd(), at="fc")
    assert model.fc is head and "at 'fc'" in message and last_linear(model) == "fc"  # from now on it is found
    with pytest.raises(ValueError, match=r"at='top' names no layer of Odd; it has fc, body, body.0, body.1"):
        swap_head(Odd(), at="top")
    with pytest.raises(ValueError, match="'at the top' is ReLU"):
        swap_head(nn.ReLU())


def test_a_part_of_the_model_by_name():
    model = nn.ModuleDict({"student": Odd(), "teacher": nn.Sequential(nn.Linear(2, 5), nn.Linear(5, 3))})
    assert last_linear(model) == "teacher.1" and last_linear(model, at="student.fc") == "student.fc"
    _, head, _ = swap_head(model, at="student.fc")
    assert model["student"].fc is head and isinstance(model["teacher"][1], nn.Linear)
    pair = nn.ModuleDict({n: nn.Sequential(nn.Linear(2, 5), nn.Linear(5, 3)) for n in ("student", "teacher")})
    with pytest.raises(ValueError, match="student.1 .*, teacher.1 "):
        last_linear(pair)
    assert last_linear(pair, at="student") == "student.1"


class TimmLikeLoss(nn.Module):
    def forward(self, z, y):
        return F.cross_entropy(z, y)


def test_losses_and_metrics_are_passed_over():
    from torchmetrics import MetricCollection
    from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

    last = {
        "loss": nn.CrossEntropyLoss(),
        "criterion": TimmLikeLoss(),
        "smoothed": type("LabelSmoothingCrossEntropy", (TimmLikeLoss,), {})(),
        "accuracy": MulticlassAccuracy(C),
        "all": MetricCollection([MulticlassAccuracy(C), MulticlassF1Score(C)]),
        "drop": nn.Dropout(),
        "nothing": nn.Sequential(),
    }
    for name, layer in last.items():
        model = Net(fc=fc(), **{name: layer})
        assert last_linear(model) == "fc", name
    holder = nn.ModuleDict({"net": Net(fc=fc(), rot=fc()), **last})  # has no forward of its own
    assert last_linear(holder, example=X) == "net.fc"


@pytest.mark.parametrize(
    "layers, found",
    [
        ({"fc1": (D, 6), "fc2": (6, 5), "fc3": (5, C)}, "fc3"),
        ({"fc1": (D, D), "fc2": (D, D), "fc3": (D, C)}, "fc3"),
        ({"embed": (D, 6), "out": (6, C)}, "out"),
        ({"aux": (D, 4), "fc": (D, C)}, "fc"),
        ({"fc": (D, C), "aux": (D, 4)}, None),
        ({"main": (D, C), "other": (D, C)}, None),
        ({"hidden": (D, D), "out": (D, C)}, None),  # in a row, or side by side?
        ({"fc": (D, C), "head": (D, C)}, None),
        ({"classifier": (D, C), "aux_classifier": (D, C)}, None),
    ],
    ids=str,
)
def test_without_an_example_two_answers_are_none(layers, found):
    model = Net(**{name: nn.Linear(*size) for name, size in layers.items()})
    if found is not None:
        assert last_linear(model) == found
        return
    with pytest.raises(ValueError, match="several layers of Net may be its classifier"):
        last_linear(model)


@pytest.mark.parametrize(
    "name, found",
    [
        ("alexnet", "classifier.6"),
        ("convnext_tiny", "classifier.2"),
        ("densenet121", "classifier"),
        ("googlenet", "fc"),
        ("maxvit_t", "classifier.5"),
        ("mobilenet_v3_small", "classifier.3"),
        ("resnet18", "fc"),
        ("shufflenet_v2_x0_5", "fc"),
        ("swin_t", "head"),
        ("vit_b_16", "heads.head"),
        ("squeezenet1_1", None),
    ],
)
def test_torchvision_by_structure(name, found):
    with torch.device("meta"):
        kw = {"init_weights": False} if name == "googlenet" else {}
        model = torchvision.models.get_model(name, weights=None, num_classes=7, **kw)
    if found is None:
        with pytest.raises(ValueError, match="is AdaptiveAvgPool2d"):
            last_linear(model)
    else:
        assert last_linear(model) == found


def test_torchvision_draws_a_head_as_one_node():
    "In both modes, and it is the model's own head: labels and state are where they were."
    model, head, _ = swap_head(torchvision.models.resnet18(num_classes=4))
    extractor = create_feature_extractor(model, {"flatten": "features", "fc": "logits"})
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    head.targets = y
    out = extractor.train()(x)
    head.targets = None
    F.cross_entropy(out["logits"], y).backward()
    assert head.means.t == 1 and model.conv1.weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert torch.allclose(extractor.eval()(x)["logits"], model.eval()(x), atol=1e-5)
    assert "alpha='paper'" in repr(head) and "solve_every=1" in repr(head)


def test_an_auxiliary_classifier_is_not_taken():
    model = torchvision.models.googlenet(weights=None, num_classes=7, init_weights=False, aux_logits=True)
    images = torch.randn(2, 3, 64, 64)
    assert last_linear(model, example=images) == last_linear(model) == "fc"
    assert last_linear(model, at="aux1") == "aux1.fc2"
    assert model.training


# ---- the exchange


def test_a_head_that_stays_is_named_beside_the_one_that_was_not_used():
    model, head, _ = swap_head(nn.Sequential(nn.Linear(2, D), nn.Linear(D, C)), StandardHead)
    before = torch.get_rng_state()
    for other in (partial(NearestETFHead, start="haar"), FixedETFHead, partial(StandardHead, tau=9.0)):
        same, kept, message = swap_head(model, other)
        assert kept is head and "StandardHead(" in message and "stays;" in message
    assert "StandardHead(tau=5.0) at '1', stays; StandardHead(tau=9.0) was not used" in message
    assert torch.equal(before, torch.get_rng_state())  # what was made to compare is forgotten
    for same in (None, head, StandardHead, partial(StandardHead, tau=5.0)):
        assert swap_head(model, same) == (model, head, "")
    with pytest.raises(ValueError, match=r"already, StandardHead\(\) at '1', so NearestETFHead\(\) cannot"):
        swap_head(model, NearestETFHead(D, C))
    assert model[1] is head


@pytest.mark.parametrize("inner", [False, True])
def test_transformers_models_learn_their_number_of_classes(inner):
    model = Net(fc=fc(2))
    model.config, model.num_labels = SimpleNamespace(num_labels=2), 2
    other = Net(fc=fc(2))
    other.num_labels = 2
    whole = Net(lambda m, h: m.a(h[:, :2]), a=model, b=other) if inner else model
    swap_head(whole, at="a.fc" if inner else "fc", C=5)
    assert (model.config.num_labels, model.num_labels, other.num_labels) == (5, 5, 2)


@pytest.mark.parametrize("d, C, project", [(3, 8, True), (8, 8, True), (9, 8, True), (9, 8, False)])
def test_projection_only_where_it_is_needed(d, C, project):
    model, head, message = swap_head(nn.Sequential(nn.Linear(2, d), nn.Linear(d, C)), project=project)
    assert ("projection" in message) == (d < C) and head.d == max(d, C)
    assert [tuple(p.shape) for p in model[1].parameters()] == ([(C, d)] if d < C else [])
    assert swap_head(model, project=True)[2] == ""
    x, y = torch.randn(16, 2), torch.arange(16) % C
    head.targets = y
    F.cross_entropy(model(x), y).backward()
    assert gap(head) < 1e-4 and all(p.grad.norm() > 0 for p in model.parameters())


def test_classes_are_compared_with_the_data():
    def swap(C, classes, model=None, example=X):
        model = model or Net(fc=fc(), rot=fc(4))
        return _swap_for_data(model, None, "", C, False, lambda: (example, classes))

    assert swap(None, 3)[1].C == swap(None, None)[1].C == 3
    with pytest.raises(ValueError, match="at 'fc' has C=3, the data 4 classes.*C=4 say"):
        swap(None, 4)
    assert swap(4, 4)[1].C == 4
    assert swap(5, 4)[1].C == 5  # whoever says so
    with pytest.raises(ValueError, match="several layers of Net"):
        swap(None, 3, example="what the model does not take")
    again, head, _ = swap(None, 3)
    assert _swap_for_data(again, None, "", None, False, pytest.fail)[1] is head  # no look at the data


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
    model = create(name, num_classes=5)
    x, y = torch.randn(5, 3, 32, 32), torch.arange(5)
    assert last_linear(model, example=x) == NETS[name]
    model, head, message = swap_head(model)
    assert model.get_submodule(NETS[name]) is head is model.get_classifier() and repr(NETS[name]) in message
    head.targets = y
    F.cross_entropy(model(x), y).backward()
    head.targets = None
    assert gap(head) < 1e-4
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        both, alone = model.eval()(x), model(x[:1])
    assert torch.allclose(both[:1], alone, atol=1e-4)
    assert swap_head(model) == (model, head, "")


def test_timm_with_another_number_of_classes_and_too_few_features():
    model, head, message = swap_head(create("vit_tiny_patch16_224"), C=200, project=True)
    assert (head.d, head.C, model.num_classes) == (200, 200, 200)
    assert "behind a projection to 200" in message
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


@pytest.mark.parametrize("name", ["DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"])
def test_inside_a_wrapper_that_knows_the_parameters_nothing_is_exchanged(name):
    "Theirs would train the projection on each process for itself, and say nothing."
    Wrapper = type(name, (nn.Module,), {"forward": lambda self, x: self.module(x)})
    wrapped = Wrapper()
    wrapped.module = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4))
    before = [*wrapped.modules()]
    for model in (wrapped, nn.Sequential(wrapped)):
        with pytest.raises(ValueError, match=f"is inside {name}.*exchange the layer first"):
            swap_head(model, project=True)
    assert [*wrapped.modules()] == before
    _, head, _ = swap_head(wrapped.module, project=True)
    assert swap_head(wrapped) == (wrapped, head, "")  # what is there already may stay
