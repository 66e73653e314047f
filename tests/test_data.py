"Data: real on-disk formats, damaged files, grids of the sampler, fastai and resuming."

import copy
import gzip
import json
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F
from torchvision import transforms as T

from ngc_etf.augment import Augment, augment_rates
from ngc_etf.batches import BatchLoader, StratifiedBatchSampler, loaders
from ngc_etf.catalogue import DATASETS, find_data
from ngc_etf.data import balanced_labels, fingerprint, load_data, long_tail, with_long_tail
from ngc_etf.folders import FolderData, folder_data, folder_loaders


def rng():
    return np.random.default_rng(0)


def write_cifar(root, C, n=40):
    "CIFAR-10 or -100 in miniature: pickled dictionaries of rows of 3072 bytes."
    folder = root / ("cifar-10-batches-py" if C == 10 else "cifar-100-python")
    folder.mkdir(parents=True)
    files = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if C == 10 else ["train", "test"]
    for f in files:
        labels = (np.arange(n) % C).tolist()
        entry = {
            "data": rng().integers(0, 256, (n, 3072), dtype=np.uint8),
            ("labels" if C == 10 else "fine_labels"): labels,
            "filenames": ["x"] * n,
        }
        (folder / f).write_bytes(pickle.dumps(entry, protocol=2))
    return folder


def write_stl(root, n=20):
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    for s in ("train", "test"):
        rng().integers(0, 256, (n, 3, 96, 96), dtype=np.uint8).tofile(folder / f"{s}_X.bin")
        (np.arange(n) % 10 + 1).astype(np.uint8).tofile(folder / f"{s}_y.bin")
    return folder


def write_fashion(root, n=20):
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for s in ("train", "t10k"):
        (folder / f"{s}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 2051, n, 28, 28) + rng().integers(0, 256, n * 784, dtype=np.uint8).tobytes()
        )
        (folder / f"{s}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 2049, n) + (np.arange(n) % 10).astype(np.uint8).tobytes()
        )
    return folder


WRITERS = {
    "cifar10": lambda r: write_cifar(r, 10),
    "cifar100": lambda r: write_cifar(r, 100),
    "stl10": write_stl,
    "fashion-mnist": write_fashion,
}


@pytest.mark.parametrize(
    "name,shape",
    [
        ("cifar10", (200, 3, 32, 32)),
        ("cifar100", (40, 3, 32, 32)),
        ("stl10", (20, 3, 96, 96)),
        ("fashion-mnist", (20, 1, 28, 28)),
    ],
)
def test_reads_the_real_formats(tmp_path, name, shape):
    WRITERS[name](tmp_path)
    data = load_data(name, tmp_path)
    (x, y), (x_test, y_test) = data.train, data.test
    assert (
        tuple(x.shape) == shape
        and x.dtype == torch.uint8
        and y.dtype == torch.int64
        and len(x) == len(y)
        and len(x_test) == len(y_test)
    )
    assert torch.equal(y[:10], torch.arange(10)) and len(data.mean) == len(data.std) == shape[1]
    xb, yb = next(iter(loaders(data, 16).train))
    assert xb.shape[1:] == shape[1:] and xb.dtype == torch.float32 and xb.isfinite().all()


@pytest.mark.parametrize("name", list(WRITERS))
def test_pixels_are_where_torchvision_puts_them(tmp_path, monkeypatch, name):
    "The same files through torchvision's own class, their hashes looked away from."
    from torchvision import datasets

    WRITERS[name](tmp_path)
    cls = getattr(datasets, DATASETS[name].source)
    monkeypatch.setattr(cls, "_check_integrity", lambda self: True, raising=False)
    monkeypatch.setattr(cls, "_load_meta", lambda self: None, raising=False)
    data = load_data(name, tmp_path)
    for split in ("train", "test"):
        which = {"split": split} if name == "stl10" else {"train": split == "train"}
        theirs = cls(tmp_path, **which)
        x, y = getattr(data, split)
        assert len(theirs) == len(x)
        for i in (0, 7, 19):
            pic, label = theirs[i]
            assert torch.equal(T.PILToTensor()(pic), x[i]) and int(label) == y[i]


@pytest.mark.parametrize("name", list(WRITERS))
def test_absent_files(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="--download to the ngc_train command") as e:
        load_data(name, tmp_path / "none")
    assert str(tmp_path / "none" / DATASETS[name].folder) in str(e.value)
    WRITERS[name](tmp_path)
    gone = DATASETS[name].files[-1]
    (tmp_path / DATASETS[name].folder / gone).unlink()
    with pytest.raises(FileNotFoundError, match=f": {gone} not found in"):
        load_data(name, tmp_path)


@pytest.mark.parametrize("name", list(WRITERS))
@pytest.mark.parametrize("how", ["truncated", "empty", "another"])
def test_damaged_files(tmp_path, name, how):
    folder = WRITERS[name](tmp_path)
    file = folder / DATASETS[name].files[0]
    whole = file.read_bytes()
    file.write_bytes(
        {"truncated": whole[: len(whole) // 2], "empty": b"", "another": gzip.compress(b"not this")}[how]
    )
    with pytest.raises(ValueError, match=f"data set '{name}': a file in .* is damaged or of another format"):
        load_data(name, tmp_path)


def test_labels_out_of_range(tmp_path):
    (folder := write_stl(tmp_path))
    (np.arange(20) % 11).astype(np.uint8).tofile(folder / "train_y.bin")
    with pytest.raises(ValueError, match="labels from -1 to 9 where 0 to 9"):
        load_data("stl10", tmp_path)


class Evil:
    "Unpickled by Python's own reader, it would make a file."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_pickle_that_calls_is_refused_before_it_does(tmp_path, name):
    folder, made = WRITERS[name](tmp_path), tmp_path / "made"
    file = folder / DATASETS[name].files[0]
    for evil in (Evil(str(made)), {"data": Evil(str(made)), "labels": [0]}):
        file.write_bytes(pickle.dumps(evil))
        with pytest.raises(ValueError, match=r"damaged .*it would call (_io|io)\.open"):
            load_data(name, tmp_path)
    assert not made.exists()


def test_unknown_name():
    with pytest.raises(ValueError, match="unknown data set name='svhn'; known: digits, cifar10"):
        load_data("svhn")


def test_download_goes_through_torchvision_with_its_hash(tmp_path, monkeypatch):
    from torchvision.datasets import utils

    calls = []

    def fake(url, root, filename, md5):
        calls.append((url, filename, md5))
        write_stl(root)

    monkeypatch.setattr(utils, "download_and_extract_archive", fake)
    assert len(load_data("stl10", tmp_path, download=True).train[0]) == 20
    assert len(calls) == 1 and calls[0][1] == "stl10_binary.tar.gz" and len(calls[0][2]) == 32


# clusters and fingerprints ------------------------------------------------------------------------


def test_clusters_do_not_depend_on_any_seed():
    torch.manual_seed(1)
    np.random.seed(1)
    one = load_data("clusters-100")
    torch.manual_seed(2)
    np.random.seed(2)
    two = load_data("clusters-100")
    assert fingerprint(one) == fingerprint(two)
    (x, y), (x_test, y_test) = one.train, one.test
    assert x.shape == (12_000, 48) and x_test.shape == (4_000, 48) and x.dtype == torch.float32
    assert (y.bincount() == 120).all() and (y_test.bincount() == 40).all()
    assert x.std().item() == pytest.approx(0.8, abs=0.05)


def test_clusters_are_the_same_on_every_machine():
    "NumPy's frozen stream, rounded: these bytes were written down elsewhere."
    assert fingerprint(load_data("clusters-100"))["hash"] == "1702dfbc655b2f4b7331c36c6b992816"


def test_the_dials_of_clusters():
    noisy, calm = load_data("clusters-30"), load_data("clusters-30-0.8")
    assert noisy.C == calm.C == 30
    for c in range(30):
        near, far = (d.train[0][d.train[1] == c] for d in (calm, noisy))
        assert near.var(0).mean() < far.var(0).mean()
        assert F.cosine_similarity(near.mean(0), far.mean(0), 0) > 0.8  # the same classes
    uneven = load_data("clusters-7").train[1].bincount()
    assert uneven.max() - uneven.min() <= 1


NO_CLUSTERS = ["clusters", "clusters-1", "clusters-4001", "clusters-10-0", "clusters-10-x"]


@pytest.mark.parametrize("name", NO_CLUSTERS)
def test_clusters_that_do_not_exist(name):
    for find in (find_data, load_data):
        with pytest.raises(ValueError, match=f"name='{name}'; known: digits.*clusters-C-NOISE"):
            find(name)


def test_vectors_pass_the_loaders_as_they_are():
    data = with_long_tail(load_data("clusters-10"), 20)
    dls = loaders(data, 100, rotate=10.0)
    for loader, (x, y) in zip((dls[2], dls.valid), (data.train, data.test)):
        batches = list(loader)
        assert torch.equal(torch.cat([b[0] for b in batches]), x)
        assert torch.equal(torch.cat([b[1] for b in batches]), y)
    x, y = next(iter(dls.train))
    assert x.shape == (len(y), 48) and (y.bincount(minlength=10) > 0).all()
    shares = [next(iter(loaders(data, 50, rank=r, world_size=2).train)) for r in range(2)]
    assert sum(len(y) for _, y in shares) == len(next(iter(loaders(data, 100).train))[1])


def test_fingerprints_of_data_in_memory(tmp_path):
    write_cifar(tmp_path, 10)
    data = load_data("cifar10", tmp_path)
    seen = fingerprint(data)
    assert seen["C"] == 10 and seen["train"] == 200 and seen["test"] == 40 and seen["shape"] == [3, 32, 32]
    assert json.loads(json.dumps(seen)) == seen and fingerprint(load_data("cifar10", tmp_path)) == seen
    data.test[0][3, 0, 0, 0] += 1
    assert fingerprint(data)["hash"] != seen["hash"]
    assert fingerprint(with_long_tail(data, 2)) != fingerprint(data)


def test_data_and_folders_do_without_torchvision():
    code = """
import sys, ngc_etf.augment, ngc_etf.data, ngc_etf.models
ngc_etf.data.load_data("clusters-10")
ngc_etf.models.body("mlp")
ngc_etf.models.body("digits")
print({"torchvision", "sklearn", "scipy", "fastai"} & set(sys.modules))
import ngc_etf.folders
print("torchvision" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["set()", "False"]


# the sampler --------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=8),
    st.integers(1, 20),
    st.integers(1, 4),
    st.integers(0, 3),
    st.booleans(),
)
def test_sampler_properties(counts, batch_size, world, seed, shuffle):
    y = np.repeat(np.arange(len(counts)), counts)
    smallest = len(y) // -(-len(y) // (batch_size * world))
    if smallest < world:
        with pytest.raises(ValueError, match="too few|ranks get none, take a larger batch_size"):
            StratifiedBatchSampler(y, batch_size, world_size=world)
        return
    ranks = [list(StratifiedBatchSampler(y, batch_size, shuffle, seed, r, world)) for r in range(world)]
    n = len(StratifiedBatchSampler(y, batch_size, world_size=world))
    assert all(len(r) == n for r in ranks)
    assert all(b for r in ranks for b in r)
    batches = [sum((r[b] for r in ranks), []) for b in range(n)]
    assert sorted(sum(batches, [])) == list(range(len(y)))  # nothing dropped, nothing twice
    assert all(len(b) <= batch_size for r in ranks for b in r)
    assert len({len(b) for b in batches}) <= 2 and max(map(len, batches)) - min(map(len, batches)) <= 1
    for c, k in enumerate(counts):
        assert {(y[b] == c).sum() for b in batches} <= {
            k // n,
            -(-k // n),
        }  # every class wherever its count permits
    for b in range(n):  # and each rank gets its share of each class
        for c in range(len(counts)):
            share = [(y[r[b]] == c).sum() for r in ranks]
            assert max(share) - min(share) <= 1


def test_drop_last():
    y = np.arange(103) % 7
    s = StratifiedBatchSampler(y, 10, drop_last=True)
    one, two = list(s), list(s)
    assert len(s) == 10 and all(len(b) == 10 and len(set(b)) == 10 for b in one)
    assert len(set(sum(one, []))) == 100 and set(sum(one, [])) != set(sum(two, []))
    with pytest.raises(ValueError, match="9 samples are too few for one batch of 10"):
        StratifiedBatchSampler(y[:9], 10, drop_last=True)


def test_epochs_differ_and_set_epoch_repeats():
    y = balanced_labels(10, 300)
    s = StratifiedBatchSampler(y, 32, seed=3)
    a, b = list(s), list(s)
    assert a != b
    s.set_epoch(0)
    assert list(s) == a
    s.set_epoch(1)
    assert list(s) == b
    assert list(StratifiedBatchSampler(y, 32, seed=4)) != a
    fixed = StratifiedBatchSampler(y, 32, shuffle=False)
    assert list(fixed) == list(fixed)


@pytest.mark.parametrize("cut", range(0, 11))
def test_resume_anywhere(cut):
    y = balanced_labels(10, 320)
    a, b = (StratifiedBatchSampler(y, 32, seed=5) for _ in range(2))
    list(a)
    it = iter(a)
    for _ in range(min(cut, 10)):
        next(it)
    state = pickle.loads(pickle.dumps(a.state_dict()))
    b.load_state_dict(state)
    rest = list(it) if cut < 10 else []
    if cut < 10:
        assert list(b) == rest
    assert list(b) == list(a)


@pytest.mark.parametrize(
    "bad,match",
    [
        (dict(batch_size=0), "batch_size=0"),
        (dict(batch_size=3.0), "batch_size=3.0"),
        (dict(rank=2, world_size=2), "rank=2, world_size=2"),
        (dict(world_size=0), "world_size=0"),
        (dict(y=[]), "at least one label"),
        (dict(y=[0, -1]), "minimum -1"),
        (dict(y=[0.5, 1.0]), "float64"),
        (dict(y=[[0, 1]]), r"shape \(1, 2\)"),
        (dict(y=[0], world_size=2), "1 samples are too few"),
    ],
)
def test_sampler_refuses(bad, match):
    with pytest.raises(ValueError, match=match):
        StratifiedBatchSampler(**(dict(y=[0, 1, 0, 1], batch_size=2) | bad))


@pytest.mark.parametrize("C", [2**15 - 1, 2**15, 2**15 + 1])
def test_as_many_classes_as_sixteen_bits_count(C):
    batches = [*StratifiedBatchSampler(np.arange(C), 10_000)]
    assert sorted(i for batch in batches for i in batch) == [*range(C)]


def test_imagenet_sized_labels_take_seconds_at_most():
    y = torch.randint(1000, (1_281_167,))
    start = time.perf_counter()
    s = StratifiedBatchSampler(y, 256)
    assert sum(map(len, s)) == len(y) and len(s) == 5005
    assert time.perf_counter() - start < 10  # 0.1 s on an idle core; the limit allows for a very busy one


def test_works_in_torch_dataloader():
    ds = torch.utils.data.TensorDataset(torch.arange(60.0), torch.arange(60) % 6)
    dl = torch.utils.data.DataLoader(ds, batch_sampler=StratifiedBatchSampler(ds.tensors[1], 12))
    assert all((y.bincount(minlength=6) == 2).all() for _, y in dl) and len(dl) == 5


# augmentation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size,ch", [((32, 32), 3), ((96, 96), 3), ((8, 8), 1), ((9, 14), 2)])
def test_statistics_of_torchvision(size, ch):
    "Mean and variance at every pixel over many draws agree with torchvision's, within sampling error."
    pic, n = (
        torch.randint(256, (ch, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
        600,
    )
    torch.manual_seed(1)
    pipe = T.Compose(
        [
            T.RandomCrop(size, padding=2),
            T.RandomHorizontalFlip(),
            T.ConvertImageDtype(torch.float32),
            T.Normalize((0.4,) * ch, (0.3,) * ch),
        ]
    )
    theirs = torch.stack([pipe(pic) for _ in range(n)])
    ours = Augment((0.4,) * ch, (0.3,) * ch, 2, True)(
        pic.expand(n, -1, -1, -1), torch.Generator().manual_seed(2)
    )
    z = (theirs.mean(0) - ours.mean(0)) / ((theirs.var(0) + ours.var(0)) / n).sqrt().clamp(min=1e-6)
    assert z.abs().max() < 6 and z.square().mean() < 1.6


@pytest.mark.parametrize(
    "mean, std, x, says",
    [
        ((0.5,) * 3, (0.5,) * 3, torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "ch=3 channels.*uint8 .2, 1"),
        ((0.5,), (0.5,), torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "ch=1 channels.*uint8 .2, 3"),
        ((0.5,), (0.5,), torch.rand(2, 1, 8, 8), "uint8 images .*got torch.float32"),
        ((0.5,), (0.5,), torch.zeros(1, 8, 8, dtype=torch.uint8), "uint8 images"),
        ((0.5,), (0.0,), None, r"std above 0; got mean=\(0.5,\), std=\(0.0,\)"),
        ((0.5,), (float("nan"),), None, "std above 0"),
        ((0.5,), (0.5, 0.5), None, "a number a channel each"),
    ],
)
def test_augment_refuses_what_torch_would_not(mean, std, x, says):
    with pytest.raises(ValueError, match=says):
        Augment(mean, std)(x)


def test_augment_reproduces_and_refuses():
    x = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    a = Augment((0.5,) * 3, (0.5,) * 3, 2, True, rotate=15)
    one, two, three = (a(x, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, three)
    with pytest.raises(ValueError, match="pad=-1"):
        Augment((0,), (1,), pad=-1)


def test_rates_wait_for_the_device_that_computes(monkeypatch):
    "And not for the first GPU, which is what torch means where nothing is named."
    waited = []
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append(device))
    augment_rates(size=8, batch=8, seconds=0.01, cores=0)
    assert {*waited} == {torch.device("cpu")}


def test_rates_are_measured():
    r = augment_rates(size=16, batch=32, seconds=0.05, cores=0)
    assert min(r.values()) > 0


# fastai -------------------------------------------------------------------------------------------


def learner(dls, width=10):
    from fastai.callback.schedule import Learner  # with lr_find and no_bar

    torch.manual_seed(0)
    return Learner(
        dls,
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, width)),
        loss_func=F.cross_entropy,
        lr=0.01,
        path=tempfile.mkdtemp(),
    )


def quiet(learn, n):
    with learn.no_bar(), learn.no_logging():
        learn.fit(n)


def test_lr_find_and_fit():
    data = load_data("digits")
    learn = learner(loaders(data, 64))
    before = copy.deepcopy(learn.model.state_dict())
    with learn.no_bar(), learn.no_logging():
        found = learn.lr_find(show_plot=False, num_it=30)
    assert found.valley > 0 and all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
    quiet(learn, 4)
    pred, y = learn.get_preds(ds_idx=0)
    assert torch.equal(y, data.train[1]) and (pred.argmax(1) == y).float().mean() > 0.9


@pytest.mark.parametrize("cut", [0, 5, 12])
def test_exact_resume_in_the_middle_of_an_epoch(cut):
    aug = Augment((0.3,), (0.4,), pad=1, flip=True)
    x, y = load_data("digits").train
    make = lambda: BatchLoader(x, y, 64, StratifiedBatchSampler(y, 64, seed=2), aug, seed=9)
    one, two = make(), make()
    list(one)
    it = iter(one)
    for _ in range(cut):
        next(it)
    two.load_state_dict(pickle.loads(pickle.dumps(one.state_dict())))
    rest = list(it)
    again = list(two)
    assert len(again) == len(rest) == 23 - cut
    for (a, b), (c, d) in zip(rest + list(one), again + list(two)):
        assert torch.equal(a, c) and torch.equal(b, d)


def test_a_loader_refuses_what_does_not_fit():
    x, y = torch.zeros(10, 4), torch.arange(10)
    with pytest.raises(ValueError, match="4 samples, 10 labels"):
        BatchLoader(x[:4], y, 3)
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size={size}"):
            BatchLoader(x, y, size)


def test_valid_loader_is_in_order_and_plain():
    data = load_data("digits")
    dls = loaders(data, 100)
    assert len(dls.valid) == 4 and torch.equal(torch.cat([y for _, y in dls.valid]), data.test[1])
    x = torch.cat([x for x, _ in dls.valid])
    torch.testing.assert_close(x, (data.test[0] / 255 - data.mean[0]) / data.std[0])
    assert torch.equal(torch.cat([y for _, y in dls[2]]), data.train[1])


def test_plain_shuffling_is_a_switch():
    data = load_data("digits")
    spread = [
        max(
            (y.bincount(minlength=10).max() - y.bincount(minlength=10).min()).item()
            for _, y in loaders(data, 100, stratified=s).train
        )
        for s in (True, False)
    ]
    assert spread[0] <= 2 < spread[1]


def test_long_tail():
    y = load_data("digits").train[1]
    for kind in ("exponential", "step"):
        keep = long_tail(y, 50, kind)
        n = y[keep].bincount()
        assert (n.diff() <= 0).all() and abs(n[0] / n[-1] - 50) < 5 and len(set(keep.tolist())) == len(keep)
        assert not torch.equal(keep, long_tail(y, 50, kind, seed=1))
    with pytest.raises(ValueError, match="factor=0"):
        long_tail(y, 0)
    with pytest.raises(ValueError, match="factor=nan"):
        long_tail(y, float("nan"))
    with pytest.raises(ValueError, match="kind='linear'"):
        long_tail(y, kind="linear")


@pytest.mark.parametrize("C", [0, -2, 6])
def test_balanced_labels_need_a_class_and_a_sample_of_each(C):
    with pytest.raises(ValueError, match=f"C={C}"):
        balanced_labels(C, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_long_tail_does_not_depend_on_the_default_dtype(dtype):
    y = balanced_labels(100, 54_000)
    want = {kind: long_tail(y, 256, kind) for kind in ("exponential", "step")}
    torch.set_default_dtype(dtype)
    try:
        for kind, kept in want.items():
            assert torch.equal(long_tail(y, 256, kind), kept)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_draw_of_augmented_images_does_not_depend_on_the_default_dtype(dtype):
    x = torch.arange(2 * 3 * 8 * 8).reshape(2, 3, 8, 8).to(torch.uint8)
    augment = Augment((0.4, 0.5, 0.6), (0.2, 0.2, 0.3), 2, True, 10.0)
    want = augment(x, torch.Generator().manual_seed(0))
    torch.set_default_dtype(dtype)
    try:
        got = augment(x, torch.Generator().manual_seed(0))
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == dtype and torch.allclose(got.float(), want, atol=0.05)


def test_data_is_made_on_the_cpu_whatever_the_default_device():
    y = balanced_labels(10, 500)
    want, x = long_tail(y), load_data("clusters-10").train[0]
    torch.set_default_device("meta")
    try:
        assert torch.equal(long_tail(y), want) and torch.equal(long_tail(y.tolist()), want)
        assert torch.equal(load_data("clusters-10").train[0], x)
    finally:
        torch.set_default_device(None)


# folders ------------------------------------------------------------------------------------------


def tree(root, C=3, n=4):
    from PIL import Image

    for split in ("train", "val"):
        for c in range(C):
            (folder := root / split / f"n{c:04d}").mkdir(parents=True, exist_ok=True)
            for i in range(n):
                Image.fromarray(rng().integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(
                    folder / f"{i}.jpeg"
                )
    return FolderData(root, size=24, resize=28)


@pytest.mark.parametrize("cores, workers", [(1, 1), (2, 2), (4, 4), (64, 4)])
def test_no_more_workers_than_cores(tmp_path, monkeypatch, cores, workers):
    "The default asks for no more than torch advises; a number is taken as it is."
    tree(tmp_path, n=2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    data = FolderData(tmp_path, size=24, resize=28)
    assert folder_loaders(data, 6).train.workers == workers
    assert folder_loaders(data, 6, workers=3).train.workers == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sum(len(y) for _, y in folder_loaders(data, 6).valid) == 6
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert folder_loaders(data, 6).train.workers == workers


def test_folder_through_workers(tmp_path):
    data = tree(tmp_path)
    for workers in (0, 2):
        dls = folder_loaders(data, 6, workers=workers)
        got = [(x.shape, y.bincount().tolist()) for x, y in dls.train]
        assert got == [((6, 3, 24, 24), [2, 2, 2])] * 2
        assert torch.cat([y for _, y in dls.valid]).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    with pytest.raises(FileNotFoundError, match="one sub-folder a class"):
        folder_loaders(FolderData(tmp_path / "none"))
    (tmp_path / "val" / "n0002").rename(tmp_path / "val" / "other")
    with pytest.raises(ValueError, match="different classes"):
        folder_loaders(data)


def same_batches(one, two):
    one, two = list(one), list(two)
    return len(one) == len(two) and all(torch.equal(a, b) for p, q in zip(one, two) for a, b in zip(p, q))


@pytest.mark.parametrize("cut", [1, 3, 7])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_tree_is_resumed_in_mid_epoch_with_the_batches_not_delivered(tmp_path, cut, workers):
    "Whatever the workers have fetched ahead; before the cut and after it, bit for bit."
    data = tree(tmp_path, C=2, n=8)
    make = lambda workers: folder_loaders(data, 2, workers=workers, seed=3).train
    straight, run, resumed = make(0), make(workers), make(workers)
    list(run), list(straight)  # one epoch
    whole, second = list(straight), straight.state_dict()
    it = iter(run)
    head = [next(it) for _ in range(cut)]
    state = pickle.loads(pickle.dumps(run.state_dict()))
    assert state["sampler"] == {"epoch": 1, "batch": cut}
    resumed.load_state_dict(state)
    assert set(resumed.state_dict()) == set(state)
    assert same_batches(head, whole[:cut])
    assert same_batches(resumed, whole[cut:])
    assert same_batches(it, whole[cut:])
    for loader in (run, resumed):
        assert loader.state_dict()["sampler"] == second["sampler"] and "places" not in loader.state_dict()
        assert torch.equal(loader.state_dict()["generator"], second["generator"])
    third = list(straight)
    assert same_batches(run, third) and same_batches(resumed, third)


def test_an_epoch_given_up_is_dealt_again_with_workers_as_without(tmp_path):
    "Though the workers have fetched the rest of it."
    data = tree(tmp_path, C=2, n=8)
    plain, ahead = (folder_loaders(data, 4, workers=w).train for w in (0, 2))
    for loader in (plain, ahead):
        it = iter(loader)
        next(it), next(it)
    assert plain.state_dict()["sampler"] == ahead.state_dict()["sampler"] == {"epoch": 0, "batch": 2}
    assert same_batches(plain, ahead)


def save(folder, array, name, **kwargs):
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    pic = array if isinstance(array, Image.Image) else Image.fromarray(array)
    pic.save(folder / name, **kwargs)
    return folder / name


def shown(root):
    "The images of both halves as tensors, in order; resized by nothing."
    data = FolderData(root, size=16, resize=16)
    return [x for half in ("train", "val") for x, _ in data.split(half)]


RAMP = np.linspace(0, 255, 256).astype(np.uint8).reshape(16, 16)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.tiff", "a.pgm"])
def test_sixteen_bits_are_scaled(tmp_path, name):
    for half in ("train", "val"):
        save(tmp_path / half / "c", RAMP.astype(np.uint16) * 257, name)
    for x in shown(tmp_path):
        assert torch.equal(x, torch.from_numpy(RAMP).expand(3, 16, 16))


def test_sixteen_bits_are_rounded_to_the_nearest(tmp_path):
    values = np.array([0, 128, 129, 385, 386, 30000, 65407, 65535], dtype=np.uint16)
    path = save(tmp_path / "train" / "c", np.repeat(values, 32).reshape(16, 16), "a.png")
    x = FolderData(tmp_path, 16, 16).split("train")[0][0][0].flatten()[::32]
    assert x.tolist() == [round(v / 257) for v in values.tolist()], path


def test_twelve_bits_reach_white(tmp_path):
    "A TIFF that says it has 12 bits a sample: three bytes hold two pixels."
    v = np.arange(256, dtype=np.int64) * 4095 // 255
    a, b = v[::2], v[1::2]
    packed = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], 1).astype(np.uint8).tobytes()
    tags = [(256, 16), (257, 16), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 16)]
    tags += [(279, len(packed))]
    folder = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", t, 4, 1, n) for t, n in tags)
    raw = b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + folder + b"\0" * 4
    (tmp_path / "train" / "c").mkdir(parents=True)
    (tmp_path / "train" / "c" / "a.tif").write_bytes(raw)
    x = FolderData(tmp_path, 16, 16).split("train")[0][0][0].flatten()
    assert (x.int() - torch.arange(256)).abs().max() <= 1 and x[0] == 0 and x[-1] == 255


@pytest.mark.parametrize("kind,words", [(np.int32, "32-bit integers"), (np.float32, "floats")])
@pytest.mark.parametrize("workers", [0, 1])
def test_pixels_without_a_range_are_refused_by_name(tmp_path, kind, words, workers):
    data = tree(tmp_path)
    path = save(tmp_path / "val" / "n0001", RAMP.astype(kind), "odd.tif")
    with pytest.raises(ValueError) as e:
        list(folder_loaders(data, 6, workers=workers).valid)
    assert str(path) in str(e.value) and words in str(e.value) and "\n" not in str(e.value)


def big_text(path):
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    Image.fromarray(RAMP).save(path, pnginfo=info)


def bomb(path):
    "A PNG that claims to be 50,000 pixels wide and high."
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


DAMAGE = {
    "bomb.png": bomb,
    "text.png": big_text,
    "empty.jpg": lambda path: path.write_bytes(b""),
    "page.jpg": lambda path: path.write_text("<html>404</html>"),
    "cut.jpeg": lambda path: path.write_bytes((path.parent / "0.jpeg").read_bytes()[:-200]),
    "cut.png": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0"),
    "gone.png": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("name", list(DAMAGE))
@pytest.mark.parametrize("workers", [0, 1])
def test_whatever_is_wrong_the_file_is_named_in_one_line(tmp_path, name, workers):
    data = tree(tmp_path, C=2, n=2)
    path = tmp_path / "train" / "n0001" / name
    DAMAGE[name](path)
    with pytest.raises(ValueError) as e:
        list(folder_loaders(data, 4, workers=workers).train)
    message = str(e.value)
    assert message.startswith(f"image {path} cannot be read (") and "\n" not in message
    assert message.endswith("): fetch or convert it again, or take it away")


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "1", "P"])
def test_other_modes_are_shown_in_colour(tmp_path, mode):
    from PIL import Image

    pic = Image.fromarray(np.stack([RAMP, RAMP[::-1], RAMP.T], 2))
    pic = pic.quantize(64) if mode == "P" else pic.convert(mode)
    ending = "tif" if mode in ("CMYK", "YCbCr") else "png"
    kwargs = {"transparency": 3} if mode == "P" else {}
    for half in ("train", "val"):
        path = save(tmp_path / half / "c", pic, f"a.{ending}", **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = shown(tmp_path)[0]
    theirs = Image.open(path)
    theirs = (theirs.convert("RGBA") if mode == "P" else theirs).convert("RGB")
    assert torch.equal(x, torch.from_numpy(np.array(theirs)).permute(2, 0, 1))


def test_a_turned_photograph_is_turned_upright(tmp_path):
    from PIL import Image

    exif, pic = Image.Exif(), Image.fromarray(RAMP).convert("RGB")
    exif[274] = 6
    for half, more in (("train", {"exif": exif}), ("val", {})):
        save(tmp_path / half / "c", pic, "a.png", **more)
    turned, plain = shown(tmp_path)
    assert torch.equal(turned, plain.rot90(-1, (1, 2)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_tiff_is_turned_once(tmp_path, orientation):
    "Pillow turns it when it loads the pixels; a second turn would undo or double the first."
    from PIL import Image, ImageOps

    exif = Image.Exif()
    exif[274] = orientation
    for half, pixels in (("train", RAMP), ("val", RAMP.astype(np.uint16) * 257)):
        path = save(tmp_path / half / "c", pixels, "a.tif", exif=exif)
    lying = Image.fromarray(RAMP)
    lying.getexif()[274] = orientation
    upright = torch.from_numpy(np.array(ImageOps.exif_transpose(lying)))
    for x in shown(tmp_path):
        assert torch.equal(x, upright.expand(3, 16, 16)), path


def test_sixteen_bits_may_count_from_white_to_black(tmp_path):
    for half in ("train", "val"):
        save(tmp_path / half / "c", (255 - RAMP.astype(np.uint16)) * 257, "a.tif", tiffinfo={262: 0})
    assert torch.equal(shown(tmp_path)[0][0], torch.from_numpy(RAMP))


def test_a_damaged_note_about_the_camera_does_no_harm(tmp_path):
    for half in ("train", "val"):
        save(tmp_path / half / "c", RAMP, "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(shown(tmp_path)[0][0], torch.from_numpy(RAMP))


def test_hidden_names_are_no_classes_and_no_images(tmp_path):
    data = tree(tmp_path)
    before = data.fingerprint()
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "train" / "n0000" / "._0.jpeg").write_bytes(b"Mac OS X")
    (tmp_path / "val" / ".DS_Store").write_bytes(b"")
    assert data.C == 3 and len(data.split("train")) == 12 and data.fingerprint() == before
    assert sum(len(y) for _, y in folder_loaders(data, 6, workers=0).train) == 12


def test_order_is_that_of_torchvision(tmp_path):
    from torchvision.datasets import ImageFolder

    for name in ("b/2.png", "b/10.png", "a/x/1.png", "a/x-y/0.png", "a/z.JPG", "a/0.bmp", "a/x/.0/no.png"):
        save((tmp_path / "train" / name).parent, RAMP, (tmp_path / "train" / name).name)
    images = FolderData(tmp_path, 16, 16).split("train")
    theirs = [s for s in ImageFolder(tmp_path / "train").samples if "no.png" not in s[0]]
    assert list(zip(images.paths, images.targets)) == theirs


def test_a_class_without_images_is_named(tmp_path):
    data = tree(tmp_path)
    (tmp_path / "train" / "n0009").mkdir()
    with pytest.raises(FileNotFoundError, match="no images of n0009 below"):
        data.split("train")
    (tmp_path / "none" / "train").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="expected one for each class"):
        FolderData(tmp_path / "none").split("train")


def test_fingerprints_of_trees(tmp_path):
    one, two = tree(tmp_path / "one"), tree(tmp_path / "two")
    seen = fingerprint(one)
    assert seen == fingerprint(two) and json.loads(json.dumps(seen)) == seen
    assert seen["C"] == 3 and seen["train"] == seen["test"] == 12
    assert seen["classes"]["n0001"] == {"train": 4, "val": 4}
    changes = [
        lambda root: (root / "val" / "n0000" / "0.jpeg").rename(root / "val" / "n0000" / "9.jpeg"),
        lambda root: (root / "val" / "n0000" / "1.jpeg").write_bytes(b"shorter"),
        lambda root: (root / "train" / "n0002").rename(root / "train" / "n0003"),
    ]
    for change in changes:
        before = fingerprint(two)
        change(tmp_path / "two")
        assert fingerprint(two)["hash"] != before["hash"]
    assert set(fingerprint(two)["classes"]) == {"n0000", "n0001", "n0002", "n0003"}


def test_a_link_that_leads_nowhere_is_named_by_the_fingerprint(tmp_path):
    data = tree(tmp_path)
    path = tmp_path / "val" / "n0001" / "gone.png"
    path.symlink_to("nowhere")
    says = f"image {path} cannot be read .it is a link to a file that is not there.: fetch it again"
    with pytest.raises(FileNotFoundError, match=says) as e:
        fingerprint(data)
    assert str(e.value).endswith("or take it away")


def test_a_tree_by_name(tmp_path, monkeypatch):
    tree(tmp_path / "set")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    ways = [("set", "."), (".", "set"), ("~/set", "none"), (f"{tmp_path}/set", "none"), ("set/../set/", "~")]
    named = [folder_data(f"folder:{path}", root) for path, root in ways]
    assert {d.root for d in named} == {tmp_path / "set"} and named[0].C == 3
    for name in ("folder:", "folder:  ", "set"):
        with pytest.raises(ValueError, match="imagenet or folder:PATH"):
            folder_data(name, tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no image folder {tmp_path}/imagenet: .* fetched by hand"):
        folder_data("imagenet", tmp_path)


def test_an_absent_tree_is_named_with_its_layout(tmp_path):
    data = folder_data("folder:mine", tmp_path)
    for half in ("train", "val"):
        with pytest.raises(FileNotFoundError) as e:
            data.folder(half)
        assert str(e.value) == (
            f"no image folder {tmp_path}/mine/{half}: expected one sub-folder a class below {tmp_path}/mine, "
            "train/CLASS/*.jpg and val/CLASS/*.jpg"
        )
