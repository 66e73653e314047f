"The commands as a shell sees them: exit status, one line of complaint, nothing half-written."

import os, signal, subprocess, sys, time
import pandas as pd
import pytest

from ngc_etf.experiment import EXPERIMENTS, METHODS, get_experiment
from ngc_etf.rows import Rows
from ngc_etf.runner import run
from ngc_etf.rows import load_rows
from ngc_etf.report import report_main
from ngc_etf.command import train_main


def shell(code, *argv, **kw):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, env=env, **kw)


TRAIN = "from ngc_etf.command import train_main; train_main()"


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path):
    done = shell(
        TRAIN,
        "--experiment",
        "cifar10-resnet18",
        "--data",
        str(tmp_path / "none"),
        "--out",
        str(tmp_path / "results"),
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        done.stderr.strip().splitlines()[-1].startswith("ngc_train: data set 'cifar10'")
        and "--download" in done.stderr
    )
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--experiment", "nothing"], "cifar10-resnet18"),
        (["--experiment", "ufm-10", "--method", "x"], "nearest-no-ddn"),
        (["--suite", "x"], "demo"),
        (["--experiment", "ufm-10", "--epochs", "0"], "at least 1, got 0"),
        (["--experiment", "ufm-10", "--delta", "0"], "delta must be positive"),
        (["--experiment", "ufm-10", "--precision", "fp8"], "bf16"),
        (["--experiment", "ufm-10", "--seed", "-1"], "seed"),
        ([], "either --experiment or --suite"),
    ],
)
def test_refusals(argv, says, tmp_path):
    with pytest.raises(SystemExit) as e:
        train_main([*argv, "--out", str(tmp_path)])
    assert says in str(e.value.code) and str(e.value.code).startswith("ngc_train: ")
    assert not list(tmp_path.rglob("*.csv"))


def test_damaged_rows_are_named(tmp_path):
    rows = run(get_experiment("ufm-10", epochs=3), tmp_path, progress=False)
    report_main(["--rows", str(tmp_path), "--check"])
    rows.csv.write_text(rows.csv.read_text()[:-25].rsplit(",", 6)[0])
    with pytest.raises(SystemExit) as e:
        report_main(["--rows", str(tmp_path), "--check"])
    assert "nearest-s0.csv is damaged" in str(e.value.code)


def test_damaged_checkpoint_is_named(tmp_path):
    exp = get_experiment("ufm-10", epochs=3)
    rows = Rows(exp, tmp_path)
    rows.ckpt.parent.mkdir(parents=True)
    rows.ckpt.write_bytes(b"not a checkpoint")
    with pytest.raises(SystemExit) as e:
        train_main(["--experiment", "ufm-10", "--epochs", "3", "--out", str(tmp_path)])
    assert str(rows.ckpt) in str(e.value.code) and "--again" in str(e.value.code)


def test_every_known_experiment_is_described():
    for e in EXPERIMENTS.values():
        for method in METHODS:
            assert get_experiment(e.name, method=method).method == method


@pytest.mark.slow
def test_killed_runs_end_in_the_same_rows(tmp_path):
    "SIGKILL at ten moments of a digits run: started again each time, it ends in the rows of an unbroken run."
    argv = ["--experiment", "digits-net", "--epochs", "5", "--out"]
    assert shell(TRAIN, *argv, str(tmp_path / "whole")).returncode == 0
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    for wait in [4 + 0.7 * i for i in range(10)]:
        p = subprocess.Popen(
            [sys.executable, "-c", TRAIN, *argv, str(tmp_path / "cut")],
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(wait)
        p.send_signal(signal.SIGKILL)
        p.wait()
    assert shell(TRAIN, *argv, str(tmp_path / "cut")).returncode == 0
    whole, cut = (load_rows(tmp_path / d)[0].drop(columns="seconds") for d in ("whole", "cut"))
    pd.testing.assert_frame_equal(whole, cut, check_exact=True)


@pytest.mark.parametrize("suffix, text", [(".json", "{}"), (".json", "{"), (".csv", "a\n")])
def test_damaged_result_files_are_named(suffix, text, tmp_path):
    rows = run(get_experiment("ufm-10", epochs=3), tmp_path, progress=False)
    damaged = rows.csv.with_suffix(suffix)
    damaged.write_text(text)
    with pytest.raises(SystemExit) as e:
        train_main(["--experiment", "ufm-10", "--epochs", "3", "--out", str(tmp_path)])
    assert f"{damaged} is damaged" in str(e.value.code) and damaged.read_text() == text
