"Data: real on-disk formats, damaged files, grids of the sampler, fastai and resuming."

import tempfile
import copy
import gzip
import pickle
import struct
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F
from torchvision import transforms as T

from ngc_etf.catalogue import DATASETS
from ngc_etf.augment import Augment, augment_rates
from ngc_etf.batches import BatchLoader, StratifiedBatchSampler, loaders
from ngc_etf.folders import FolderData, folder_loaders
from ngc_etf.data import balanced_labels, image_data, long_tail


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
    data = image_data(name, tmp_path)
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


def test_pixels_are_where_torchvision_puts_them(tmp_path, monkeypatch):
    "The same files through torchvision's own classes, their hashes looked away from."
    from torchvision import datasets as tvd

    for name in WRITERS:
        WRITERS[name](tmp_path)
    for name in ("cifar10", "cifar100", "stl10", "fashion-mnist"):
        cls = DATASETS[name].source
        if hasattr(cls, "_check_integrity"):
            monkeypatch.setattr(cls, "_check_integrity", lambda self: True)
        if hasattr(cls, "_load_meta"):
            monkeypatch.setattr(cls, "_load_meta", lambda self: None)
        data = image_data(name, tmp_path)
        for ours, theirs in zip(
            (data.train, data.test),
            (
                cls(tmp_path, **({"split": s} if cls is tvd.STL10 else {"train": s == "train"}))
                for s in ("train", "test")
            ),
        ):
            for i in (0, 7, 19):
                pic, label = theirs[i]
                assert torch.equal(T.PILToTensor()(pic), ours[0][i]) and int(label) == ours[1][i]


@pytest.mark.parametrize("name", list(WRITERS))
def test_absent_files(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="--download to the ngc_train command") as e:
        image_data(name, tmp_path / "none")
    assert str(tmp_path / "none" / DATASETS[name].folder) in str(e.value)
    WRITERS[name](tmp_path)
    gone = DATASETS[name].files[-1]
    (tmp_path / DATASETS[name].folder / gone).unlink()
    with pytest.raises(FileNotFoundError, match=f": {gone} not found in"):
        image_data(name, tmp_path)


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
        image_data(name, tmp_path)


def test_labels_out_of_range(tmp_path):
    (folder := write_stl(tmp_path))
    (np.arange(20) % 11).astype(np.uint8).tofile(folder / "train_y.bin")
    with pytest.raises(ValueError, match="labels from -1 to 9 where 0 to 9"):
        image_data("stl10", tmp_path)


def test_unknown_name():
    with pytest.raises(ValueError, match="unknown data set name='svhn'; known: digits, cifar10"):
        image_data("svhn")


def test_download_goes_through_torchvision_with_its_hash(tmp_path, monkeypatch):
    import ngc_etf.data as m

    calls = []

    def fake(url, root, filename, md5):
        calls.append((url, filename, md5))
        write_stl(root)

    monkeypatch.setattr(m, "download_and_extract_archive", fake)
    assert len(image_data("stl10", tmp_path, download=True).train[0]) == 20
    assert len(calls) == 1 and calls[0][1] == "stl10_binary.tar.gz" and len(calls[0][2]) == 32


# the sampler ---------------------------------------------------------------------------------------------------------


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
    if len(y) < world:
        return
    ranks = [list(StratifiedBatchSampler(y, batch_size, shuffle, seed, r, world)) for r in range(world)]
    n = len(StratifiedBatchSampler(y, batch_size, world_size=world))
    assert all(len(r) == n for r in ranks)
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


# augmentation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size,ch", [((32, 32), 3), ((96, 96), 3), ((8, 8), 1), ((9, 14), 2)])
def test_statistics_of_torchvision(size, ch):
    "Mean and standard deviation at every pixel over many draws agree with torchvision's pipeline, within sampling error."
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


def test_augment_reproduces_and_refuses():
    x = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    a = Augment((0.5,) * 3, (0.5,) * 3, 2, True, rotate=15)
    one, two, three = (a(x, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, three)
    with pytest.raises(ValueError, match="pad=-1"):
        Augment((0,), (1,), pad=-1)


def test_rates_are_measured():
    r = augment_rates(size=16, batch=32, seconds=0.05, cores=0)
    assert min(r.values()) > 0


# fastai --------------------------------------------------------------------------------------------------------------


def learner(dls, width=10):
    import fastai.callback.progress
    import fastai.callback.schedule
    from fastai.learner import Learner

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
    data = image_data("digits")
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
    x, y = image_data("digits").train
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


def test_valid_loader_is_in_order_and_plain():
    data = image_data("digits")
    dls = loaders(data, 100)
    assert len(dls.valid) == 4 and torch.equal(torch.cat([y for _, y in dls.valid]), data.test[1])
    x = torch.cat([x for x, _ in dls.valid])
    torch.testing.assert_close(x, (data.test[0] / 255 - data.mean[0]) / data.std[0])
    assert torch.equal(torch.cat([y for _, y in dls[2]]), data.train[1])


def test_plain_shuffling_is_a_switch():
    data = image_data("digits")
    spread = [
        max(
            (y.bincount(minlength=10).max() - y.bincount(minlength=10).min()).item()
            for _, y in loaders(data, 100, stratified=s).train
        )
        for s in (True, False)
    ]
    assert spread[0] <= 2 < spread[1]


def test_long_tail():
    y = image_data("digits").train[1]
    for kind in ("exponential", "step"):
        keep = long_tail(y, 50, kind)
        n = y[keep].bincount()
        assert (n.diff() <= 0).all() and abs(n[0] / n[-1] - 50) < 5 and len(set(keep.tolist())) == len(keep)
        assert not torch.equal(keep, long_tail(y, 50, kind, seed=1))
    with pytest.raises(ValueError, match="factor=0"):
        long_tail(y, 0)
    with pytest.raises(ValueError, match="kind='linear'"):
        long_tail(y, kind="linear")


# folders -------------------------------------------------------------------------------------------------------------


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
