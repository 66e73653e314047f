"Every (data set, network, method) of Tables 1 and 2: two tiny steps from real formats, unbroken and resumed."

import copy, os, shutil, time
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from ngc_etf.known import SUITES, get_experiment
from ngc_etf.models import body
from ngc_etf.rows import Rows
from ngc_etf.runner import run
from test_data import write_cifar, write_stl

CELLS = list(dict.fromkeys(SUITES["table1"] + SUITES["table2"]))
SPENT = {}


def write_imagenet(root, C=1000, side=12):
    "train/ and val/, a thousand folders named as WordNet has them, one JPEG in each."
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for c in range(C):
            (folder := root / "imagenet" / split / f"n{c:08d}").mkdir(parents=True)
            Image.fromarray(rng.integers(0, 256, (side, side + 2, 3), dtype=np.uint8)).save(
                folder / f"n{c:08d}_1.JPEG"
            )


@pytest.fixture(scope="module", autouse=True)
def two_cores():
    threads = torch.get_num_threads()
    torch.set_num_threads(min(2, os.cpu_count()))
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_cifar(root, 10, n=10)
    write_cifar(root, 100, n=100)
    write_stl(root, n=10)
    write_imagenet(root)
    return root


@cache
def built(name, **given):
    return body(name, **given)


def copied(name, **given):
    "The network as `body` makes it, whose unused first weights are drawn once only: AGD draws its own."
    net, d = built(name, **given)
    return copy.deepcopy(net), d


def keep_first_checkpoint(monkeypatch, folder):
    "The checkpoint of the first epoch goes to another folder, as a kill after it would have left it."
    whole = Rows.checkpoint

    def checkpoint(self, **state):
        whole(self, **state)
        if state["epoch"] == 1:
            (target := Rows(self.exp, folder).ckpt).parent.mkdir(parents=True)
            shutil.copy(self.ckpt, target)

    monkeypatch.setattr(Rows, "checkpoint", checkpoint)


def test_the_tables_have_their_cells():
    assert (
        len(CELLS) == 7 * 3 + 1
        and len({e for e, _ in CELLS}) == 7
        and ("imagenet-resnet50", "nearest-no-ddn") in CELLS
    )


def one(name, method):
    "A cell as a parameter; each network and data set is tried with one method, the others are slow tests."
    return pytest.param(name, method, marks=[] if method == "nearest" else pytest.mark.slow)


@pytest.mark.parametrize("name, method", [one(*cell) for cell in CELLS], ids=lambda v: v)
def test_cell_runs_and_resumes(name, method, root, tmp_path, monkeypatch):
    begun = time.process_time()
    exp = get_experiment(name, method=method, epochs=2, batch_size=1000, at=(), every=10, size=8)
    monkeypatch.setattr("ngc_etf.step.body", copied)
    keep_first_checkpoint(monkeypatch, tmp_path / "cut")
    whole = run(exp, tmp_path / "whole", root, device="cpu", progress=False, workers=0)
    cut = Rows(exp, tmp_path / "cut")
    assert cut.ckpt.exists() and not cut.csv.exists()
    resumed = run(exp, tmp_path / "cut", root, device="cpu", progress=False, workers=0)
    one, two = (pd.read_csv(r.csv) for r in (whole, resumed))
    assert one.epoch.tolist() == [2] and np.isfinite(one.drop(columns=["experiment", "method"])).all(
        axis=None
    )
    pd.testing.assert_frame_equal(one.drop(columns="seconds"), two.drop(columns="seconds"), check_exact=True)
    assert whole.margins.read_bytes() == resumed.margins.read_bytes()
    assert (
        f'"C": {dict(cifar10=10, cifar100=100, stl10=10, imagenet=1000)[exp.data]},' in whole.json.read_text()
    )
    assert whole.done and resumed.done and not cut.ckpt.exists() and not cut.lock.exists()
    SPENT[name, method] = time.process_time() - begun


@pytest.mark.slow
def test_all_cells_within_three_minutes():
    "Three minutes on two cores, in processor time; other work can double it, hence a slow test."
    if set(SPENT) != set(CELLS):
        pytest.skip("counts only when all cells have run")
    assert sum(SPENT.values()) < 2 * 180, sorted(SPENT.items(), key=lambda x: -x[1])[:5]
