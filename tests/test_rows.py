"A run's files: committed ones are read, strangers left out, damage named, locks and data respected."

import errno
import json
import os
import shutil
import warnings
from pathlib import Path

import pandas as pd
import pytest

import ngc_etf.files as files_module
import ngc_etf.rows as rows_module
from ngc_etf.experiment import Experiment
from ngc_etf.known import get_experiment
from ngc_etf.reading import check_rows, load_rows, read_runs
from ngc_etf.rows import Rows

RESULTS = Path(__file__).parent.parent / "results"
RUNS = sorted(p for p in RESULTS.rglob("*.json") if p.with_suffix(".csv").exists())
UFM_RUNS = len(list((RESULTS / "ufm-10").glob("*.json")))


@pytest.mark.parametrize("folder", sorted({p.parent for p in RUNS}), ids=lambda p: p.name)
def test_every_committed_run_is_read(folder):
    "Whatever version wrote it, its description is one of today's."
    for path in (p for p in RUNS if p.parent == folder):
        config = rows_module.parse_config(json.loads(path.read_text(encoding="utf-8")), path)
        exp = Experiment(**config | {"at": tuple(config["at"])})
        rows = Rows(exp, folder.parent)
        assert rows.csv == path.with_suffix(".csv") and rows.stored() == exp.as_json and not rows.other
        assert rows.epoch > 0


def test_the_committed_results_are_whole():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows, margins, about = load_rows(RESULTS)
    assert len(about) == len(RUNS) > 40


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(RESULTS / "ufm-10", tmp_path / "ufm-10")
    return tmp_path


@pytest.mark.parametrize(
    "name, content",
    [
        ("notes.csv", b"name,value\na,1\n"),
        ("._fixed-s0.csv", b"\0\5\x16\7Mac OS X"),
        (".~lock.fixed-s0.csv#.csv", b",someone"),
        ("export.csv", "\ufeffexperiment;method;seed;epoch\r\nufm-10;fixed;0;1\r\n".encode()),
        ("latin.csv", "größe,wert\n1,2\n".encode("latin-1")),
        ("empty.csv", b""),
    ],
)
def test_strangers_are_left_out_with_a_note(folder, name, content):
    (folder / "ufm-10" / name).write_bytes(content)
    with pytest.warns(UserWarning, match="left out, for they are no rows of ngc_train") as said:
        rows, _, about = load_rows(folder)
    assert len(about) == UFM_RUNS and name in str(said[0].message)
    with pytest.warns(UserWarning):
        assert check_rows(folder) == []


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda b: b.replace(b",", b";"), "separated by ';', as a spreadsheet saves them"),
        (lambda b: b[:-10], "a line is cut (line "),
        (lambda b: b.replace(b"\n", b",\n", 3), "a line is cut"),
        (lambda b: b"", "it is empty"),
        (lambda b: b[:200] + b"\0" * 50 + b[250:], "zero bytes"),
        (lambda b: b"\xff\xfe" + b, "not text in UTF-8"),
        (lambda b: b.replace(b",1,", b",one,", 1), "epoch is not a number in every row"),
    ],
)
def test_our_own_damaged_rows_are_named_with_the_cause(folder, change, says):
    path = folder / "ufm-10" / "fixed-s0.csv"
    path.write_bytes(change(path.read_bytes()))
    runs, wrong = read_runs(folder)
    assert len(runs) == UFM_RUNS - 1 and len(wrong) == 1 and wrong[0].startswith(f"{path} is damaged: ")
    assert says in wrong[0], wrong[0]
    with pytest.raises(ValueError, match="is damaged"):
        load_rows(folder)


def test_line_ends_and_a_byte_order_mark_change_no_number(folder):
    before = load_rows(folder)[0]
    for path in (folder / "ufm-10").glob("fixed-*"):
        path.write_bytes("\ufeff".encode() + path.read_bytes().replace(b"\n", b"\r\n"))
    pd.testing.assert_frame_equal(load_rows(folder)[0], before, check_exact=True)


def test_rows_without_description_are_ours_and_named(folder):
    (folder / "ufm-10" / "fixed-s0.json").unlink()
    assert "no readable description beside it" in read_runs(folder)[1][0]


def test_other_alphabets(tmp_path):
    "Names that no ASCII holds, written and read in UTF-8 whatever the locale."
    exp = Experiment("vögel-鳥", "digits", "digits", epochs=1)
    rows = Rows(exp, tmp_path)
    rows.append(1, train_loss=0.5)
    rows.C = 10
    rows.save()
    assert rows.done and load_rows(tmp_path)[0].experiment.tolist() == ["vögel-鳥"]


@pytest.mark.parametrize("name", ["ENOSYS", "EOPNOTSUPP", "ENOLCK"])
def test_a_file_system_without_locks(name, tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    monkeypatch.setattr(files_module.fcntl, "flock", flock)
    rows = Rows(get_experiment("ufm-10"), tmp_path)
    with pytest.warns(UserWarning, match="cannot be locked on this file system .* without a lock"):
        with rows.locked():
            pass
    assert not rows.lock.exists()


def test_a_lock_says_who_holds_it(tmp_path):
    first, second = (Rows(get_experiment("ufm-10"), tmp_path) for _ in range(2))
    with first.locked():
        with pytest.raises(ValueError, match=f"locked by process {os.getpid()} on .* since 20") as e:
            with second.locked():
                pass
        assert "if that one is gone" in str(e.value) and first.lock.exists()
    assert not first.lock.exists()


def test_a_description_of_wrong_types_is_named(tmp_path):
    rows = Rows(Experiment("x", "digits", "digits", epochs=1), tmp_path)
    rows.append(1, train_loss=0.5)
    rows.C = 10
    rows.save()
    about = json.loads(rows.json.read_text())
    for change in ({"format": "1"}, {"C": None}, {"experiment": about["experiment"] | {"epochs": "2"}}):
        rows.json.write_text(json.dumps(about | change))
        assert any(str(rows.csv.with_suffix("")) in line for line in check_rows(tmp_path))


def test_other_sources_and_threads_are_told(tmp_path, monkeypatch):
    "A run that goes on elsewhere keeps both environments, and warns where the program has changed."
    exp = Experiment("x", "digits", "digits", epochs=3)
    first = Rows(exp, tmp_path)
    first.append(1, train_loss=0.5)
    first.save()
    first.checkpoint(epoch=1)
    now = rows_module.environment()
    monkeypatch.setattr(rows_module, "environment", lambda: now | {"sources": "other", "threads": 77})
    second = Rows(exp, tmp_path)
    second.resume()
    second.append(2, train_loss=0.4)
    with pytest.warns(UserWarning, match="epochs 1 to 1 were made by other sources"):
        second.save()
    second.append(3, train_loss=0.3)
    second.save()
    about = json.loads(second.json.read_text())
    assert about["environment"]["threads"] == 77
    assert [e["until"] for e in about["earlier"]] == [1]
    assert about["earlier"][0]["environment"]["sources"] == now["sources"]


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    rows = Rows(get_experiment("digits-net"), tmp_path)
    rows.data = {"C": 10, "hash": "a"}
    rows.checkpoint(epoch=1)
    again = Rows(rows.exp, tmp_path)
    again.data = {"C": 9, "hash": "b"}
    with pytest.raises(ValueError, match="C was 10, is 9; hash was a, is b.*--out.*--again"):
        again.resume()
