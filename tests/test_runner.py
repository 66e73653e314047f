"The runner around a run: suites, folders, clusters, trackers, dry runs, processes, full disks, versions."

import importlib.util, json, os, re, shutil, subprocess, sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from ngc_etf import rows as rows_module
from ngc_etf import estimates
from ngc_etf.command import named_cells, train_main, train_parser
from ngc_etf.estimates import estimate
from ngc_etf.known import get_experiment, suite_cells
from ngc_etf.rows import Rows
from ngc_etf.runner import run
from ngc_etf.suite import to_do
from ngc_etf.team import SharedBatchNorm
from test_data import tree

TRAIN = "from ngc_etf.command import train_main; train_main()"
QUIET = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def rows_of(folder, stem):
    return pd.read_csv(folder / f"{stem}.csv").drop(columns="seconds")


def refused(*argv):
    with pytest.raises(SystemExit) as e:
        train_main([str(a) for a in argv])
    assert "\n" not in str(e.value.code)
    return str(e.value.code)


# folders of images


@pytest.fixture
def birds(tmp_path):
    tree(tmp_path / "data" / "birds", C=4, n=6)
    return tmp_path


def birds_command(tmp_path, out, *more):
    return [
        "--experiment",
        "folder:birds",
        "--net",
        "resnet18",
        "--size",
        "16",
        "--epochs",
        "2",
        "--batch-size",
        "12",
        "--precision",
        "fp32",
        "--device",
        "cpu",
        "--data",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path / out),
        *more,
    ]


def test_any_folder_with_any_number_of_workers(birds):
    for workers in ("0", "2"):
        train_main(birds_command(birds, workers, "--workers", workers))
    one, two = (rows_of(birds / w, "birds-resnet18/nearest-s0") for w in ("0", "2"))
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    about = json.loads((birds / "0" / "birds-resnet18" / "nearest-s0.json").read_text())
    assert about["C"] == 4 and about["experiment"]["data"] == "folder:birds" and about["format"] == 1


def test_folder_complaints(birds):
    (birds / "data" / "birds" / "train" / "n0001" / "3.jpeg").write_bytes(b"\xff\xd8\xff not a picture")
    for workers in ("0", "2"):
        says = refused(*birds_command(birds, "out", "--workers", workers))
        assert "3.jpeg cannot be read" in says and says.startswith("ngc_train: image ")
    assert not list((birds / "out").rglob("*.csv"))
    assert "expected one sub-folder a class" in refused(
        "--experiment", "folder:fish", "--data", birds / "data", "--out", birds / "out"
    )
    assert "expected one sub-folder a class" in refused(
        "--experiment", "imagenet-resnet50", "--data", birds / "data", "--out", birds / "out"
    )
    assert "unknown network name='resnet19'" in refused(*birds_command(birds, "out", "--net", "resnet19"))


# suites

SUITE = ["--suite", "demo", "--method", "fixed", "--seeds", "2", "--epochs", "2", "--device", "cpu"]


def test_a_failing_cell_stops_no_other(tmp_path, capsys):
    (blocked := tmp_path / "digits-net").mkdir()
    (blocked / "fixed-s0.json").write_text("{")
    says = refused(*SUITE, "--out", tmp_path)
    assert says == "ngc_train: 1 cells failed: digits-net/fixed-s0; the same command tries them again"
    said = capsys.readouterr()
    assert (
        "digits-net/fixed-s0 failed: " in said.err
        and "fixed-s0.json is damaged" in said.err
        and said.out.count("epoch 2") == 5
    )
    assert sorted(p.stem for p in tmp_path.rglob("fixed-s?.csv")) == ["fixed-s0"] * 2 + ["fixed-s1"] * 3
    (blocked / "fixed-s0.json").unlink()
    train_main([*SUITE, "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "5 of 6 cells are done already" in said and "[1/1] digits-net/fixed-s0: epoch 2" in said
    train_main([*SUITE, "--out", str(tmp_path), "--list"])
    assert "6 of 6 done" in capsys.readouterr().out


def test_the_most_advanced_comes_first(tmp_path):
    cells = suite_cells("demo", epochs=4)
    for exp, epoch in ((cells[2], 1), (cells[5], 3)):
        rows = Rows(exp, tmp_path)
        rows.append(epoch, train_loss=1.0)
        rows.save()
    assert [e.stem for e in to_do(cells, tmp_path)][:3] == [cells[5].stem, cells[2].stem, cells[0].stem]


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--suite", "demo", "--seeds", "0"], "--seeds N, at least 1"),
        (["--experiment", "ufm-10", "--seeds", "2"], "goes with --suite"),
        (["--suite", "demo", "--method", "fixed-haar"], "it has standard, fixed, nearest"),
        (["--suite", "demo", "--method", "best"], "nearest-no-ddn, got 'best'"),
        (["--experiment", "digits-net", "--net", "resnet18"], "only folder:PATH"),
        (["--experiment", "digits-net", "--sampler", "x"], "stratified, authors, got 'x'"),
        (["--experiment", "digits-net", "--tail", "0.5"], "tail must be at least 1"),
        (["--experiment", "digits-net", "--device", "cuda:99"], "cuda:99"),
        (["--experiment", "digits-net", "--device", "gpu"], "cpu, cuda or cuda:N, got 'gpu'"),
        (["--experiment", "digits-net", "--tracker", "x"], "tensorboard, wandb, got 'x'"),
        (["--experiment", "ufm-10", "--tracker", "tensorboard"], "free features are one batch"),
        (["--experiment", "ufm-10", "--compile"], "free features are one batch"),
        (["--experiment", "ufm-10", "--cluster", "grid"], "local, slurm, got 'grid'"),
        (
            ["--experiment", "ufm-10", "--cluster", "local", "--cluster-options", "a"],
            "KEY=VALUE pairs, got a",
        ),
    ],
)
def test_refusals(argv, says, tmp_path):
    assert says in refused(*argv, "--out", tmp_path) and not list(tmp_path.rglob("*.csv"))


def test_the_switches_reach_the_description():
    args = train_parser().parse_args(
        ["--experiment", "digits-net", "--sampler", "authors", "--tail", "10", "--method", "fixed"]
    )
    (exp,) = named_cells(args)
    assert (exp.sampler, exp.tail, exp.stratified) == ("authors", 10.0, False)


# what lies in the folder already


def test_committed_rows_are_still_valid():
    "Written before the fields sampler, tail and size were born."
    rows = Rows(get_experiment("ufm-10"), Path(__file__).parent.parent / "results")
    assert "sampler" not in json.loads(rows.json.read_text())["experiment"] and rows.done


@pytest.mark.parametrize("change", [{"format": 2}, {"experiment": {"colour": 1}}])
def test_a_folder_of_another_version(change, tmp_path):
    rows = run(get_experiment("ufm-10", epochs=3), tmp_path, progress=False)
    about = json.loads(rows.json.read_text())
    rows.json.write_text(
        json.dumps(about | change | {"experiment": about["experiment"] | change.get("experiment", {})})
    )
    before = rows.csv.read_bytes()
    says = refused("--experiment", "ufm-10", "--epochs", "3", "--out", tmp_path)
    assert (
        f"{rows.json} belongs to a results folder of another version" in says
        and "reads format 1" in says
        and rows.csv.read_bytes() == before
    )


def test_a_checkpoint_of_another_configuration(tmp_path):
    rows = Rows(get_experiment("digits-net", epochs=3, gain=2.0), tmp_path)
    rows.checkpoint(epoch=1)
    says = refused("--experiment", "digits-net", "--epochs", "3", "--out", tmp_path, "--device", "cpu")
    assert "another configuration ({'gain': 2.0})" in says and rows.ckpt.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("suffix", [".csv", ".ckpt"])
def test_a_full_disk(suffix, tmp_path, monkeypatch):
    "In the third epoch the disk is full: the file is named, the rows so far are whole, and the run goes on."
    exp, replace, count = get_experiment("digits-net", epochs=3, method="fixed"), rows_module._write_whole, []
    whole = run(exp, tmp_path / "whole", progress=False)

    def full(path, write):
        count.extend([1] * (path.suffixes == [suffix]))
        if path.suffixes == [suffix] and len(count) == 3:
            path.with_name(path.name + ".part").symlink_to("/dev/full")
        replace(path, write)

    monkeypatch.setattr(rows_module, "_write_whole", full)
    says = refused(
        "--experiment",
        "digits-net",
        "--epochs",
        "3",
        "--method",
        "fixed",
        "--out",
        tmp_path / "full",
        "--device",
        "cpu",
    )
    rows = Rows(exp, tmp_path / "full")
    assert (
        f"{rows.csv.with_suffix(suffix)} could not be written" in says
        and "No space left" in says
        and "intact" in says
    )
    assert (
        rows.epoch == {".csv": 2, ".ckpt": 3}[suffix]
        and rows.ckpt.exists()
        and not list(tmp_path.rglob("*.part"))
    )
    run(exp, tmp_path / "full", progress=False)
    pd.testing.assert_frame_equal(
        *(pd.read_csv(r.csv).drop(columns="seconds") for r in (whole, rows)), check_exact=True
    )


# clusters, trackers, dry runs, compiling


def test_two_cells_on_the_local_cluster(tmp_path, capsys):
    pytest.importorskip("submitit")
    train_main(
        [
            *SUITE[:5],
            "1",
            *SUITE[6:],
            "--out",
            str(tmp_path),
            "--cluster",
            "local",
            "--cluster-options",
            "timeout_min=10",
        ]
    )
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*-s0.csv")) == [
        "clusters-100/fixed-s0.csv",
        "digits-net/fixed-s0.csv",
        "ufm-10-short/fixed-s0.csv",
    ]
    said = capsys.readouterr().out
    assert "[3/3] digits-net/fixed-s0: job" in said and "ufm-10-short/fixed-s0: epoch 2" in said


def test_the_cluster_complains(tmp_path, monkeypatch):
    if importlib.util.find_spec("submitit"):
        assert "does not take this" in refused(
            *SUITE, "--out", tmp_path, "--cluster", "local", "--cluster-options", "colour=3"
        )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "needs the package submitit: pip install submitit" in refused(
        *SUITE, "--out", tmp_path, "--cluster", "local"
    )
    assert "tracker 'wandb' is not installed: pip install wandb" in refused(
        "--experiment", "digits-net", "--tracker", "wandb", "--out", tmp_path
    )


def test_tensorboard_gets_the_rows(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = run(get_experiment("digits-net", epochs=2), tmp_path, progress=False, tracker="tensorboard")
    events = EventAccumulator(str(rows.csv.with_suffix(".tensorboard")))
    events.Reload()
    table = pd.read_csv(rows.csv)
    for k in ("train_top1", "test_top1", "nc1"):
        assert [e.value for e in events.Scalars(k)] == pytest.approx(table[k].tolist(), rel=1e-5)
    assert len(events.Scalars("train_loss")) >= 2 * 23


def test_dry_runs_need_no_data(tmp_path, capsys):
    train_main(
        [
            "--suite",
            "demo",
            "--dry-run",
            "--device",
            "cpu",
            "--data",
            str(tmp_path / "none"),
            "--out",
            str(tmp_path),
        ]
    )
    train_main(
        [
            "--experiment",
            "stl10-vgg13",
            "--batch-size",
            "4",
            "--epochs",
            "1",
            "--dry-run",
            "--device",
            "cpu",
            "--data",
            str(tmp_path / "none"),
            "--out",
            str(tmp_path),
        ]
    )
    said = capsys.readouterr().out
    assert said.count("nearest-s0") == 4 and "images/s" in said and not list(tmp_path.rglob("*"))


def test_a_suite_says_how_long_it_will_take(tmp_path, capsys):
    "Before it starts; the rows are those of a run without it, and what cannot be timed does not stop it."
    command = ["--suite", "long-tail", "--method", "nearest", "--device", "cpu", "--precision", "fp32"]
    with pytest.raises(SystemExit):  # the second cell's data are absent
        train_main([*command, "--epochs", "2", "--out", str(tmp_path), "--data", str(tmp_path / "none")])
    said = capsys.readouterr().out.splitlines()
    assert re.match(r"2 cells: about [\d.]+ (seconds|minutes|hours) on this machine", said[0])
    exp = get_experiment("digits-net-lt", epochs=2)
    alone = run(exp, tmp_path / "alone", device="cpu", progress=False)
    one, two = (pd.read_csv(r.csv).drop(columns="seconds") for r in (alone, Rows(exp, tmp_path)))
    pd.testing.assert_frame_equal(one, two, check_exact=True)


def test_a_forecast_counts_what_is_left(tmp_path, monkeypatch):
    "Cells that cannot be timed are left out by number; an advanced cell counts for its rest only."
    monkeypatch.setattr(estimates, "_seconds_each", lambda exp, *a: None if exp.large else (1.0, 0.0))
    cells = suite_cells("table1", methods=["fixed"], epochs=1, at=(), every=10**6)
    assert "1 of 7 cells are not in it" in estimates.forecast(cells, tmp_path)
    assert estimates.forecast(cells[-1:], tmp_path).startswith("no estimate")
    exp = get_experiment("digits-net", epochs=10, method="fixed", at=(), every=10**6)
    assert estimates.forecast([exp], tmp_path).startswith("about 4 hours")
    rows = Rows(exp, tmp_path)
    rows.append(9, train_loss=1.0)
    rows.save()
    assert estimates.forecast([exp], tmp_path).startswith("about 24 minutes")


def test_an_estimate_follows_the_sizes():
    short, long = (
        estimate(get_experiment("digits-net", epochs=e, every=10**6, batch_size=32), device="cpu", n=1)
        for e in (100, 10000)
    )
    assert long["hours"] > 10 * short["hours"] and short["GB"] > 0.05


def test_compile_complains(tmp_path, monkeypatch):
    from torch._dynamo.exc import Unsupported

    def no(self, *a, **k):
        raise Unsupported("no compiler in sight")

    monkeypatch.setattr(nn.Module, "compile", no)
    assert (
        "torch.compile does not work here (Unsupported: no compiler in sight): leave --compile out"
        in refused("--experiment", "digits-net", "--compile", "--out", tmp_path, "--device", "cpu")
    )


@pytest.mark.slow
def test_compiled_rows_agree(tmp_path):
    "Compiling changes the rounding and is noted; the rows of a gentle epoch agree to a thousandth."
    one, two = (
        run(
            get_experiment("digits-net", epochs=1, gain=0.1),
            tmp_path / str(c),
            device="cpu",
            progress=False,
            compile=c,
        )
        for c in (False, True)
    )
    assert json.loads(two.json.read_text())["environment"]["compiled"] == "network"
    a, b = (pd.read_csv(r.csv) for r in (one, two))
    assert a.train_loss[0] == pytest.approx(b.train_loss[0], rel=1e-3)


# several processes


def torchrun(n, *argv, code=TRAIN):
    launch = (
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(n),
            "--no-python",
        ]
        if n > 1
        else []
    )
    return subprocess.run(
        [*launch, sys.executable, "-c", code, *map(str, argv)], env=QUIET, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "method",
    [
        "nearest",
        pytest.param("standard", marks=pytest.mark.slow),
        pytest.param("fixed", marks=pytest.mark.slow),
    ],
)
def test_two_processes_write_the_rows_of_one(method, tmp_path):
    """BatchNorm, class means, gradients and metrics are the whole batch's: rows agree to 1e-5 after 46 steps.

    In float64, for with gain 10 the training amplifies float32's rounding until it shows in the second digit.
    """
    argv = ["--experiment", "digits-net", "--method", method, "--epochs", "2", "--device", "cpu", "--out"]
    done = [
        torchrun(
            n, *argv, tmp_path / str(n), code="import torch; torch.set_default_dtype(torch.float64);" + TRAIN
        )
        for n in (1, 2)
    ]
    assert [d.returncode for d in done] == [0, 0], done[1].stderr
    assert (
        done[1].stdout.count("epoch 2") == 1 and "it/s" not in done[1].stderr
    )  # one process speaks, and no bar where there is no terminal
    one, two = (rows_of(tmp_path / n, f"digits-net/{method}-s0") for n in "12")
    pd.testing.assert_frame_equal(one, two, rtol=1e-5, atol=1e-9)
    assert (
        json.loads((tmp_path / "2" / "digits-net" / f"{method}-s0.json").read_text())["environment"][
            "processes"
        ]
        == 2
    )
    margins = [pd.read_csv(tmp_path / n / "digits-net" / f"{method}-s0.margins.csv") for n in "12"]
    pd.testing.assert_frame_equal(*margins, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_processes_refuse(tmp_path):
    assert (
        "free features are one batch"
        in torchrun(2, "--experiment", "ufm-10", "--device", "cpu", "--out", tmp_path).stderr
    )
    assert (
        "multiple of the number of processes, got 63 and 2"
        in torchrun(
            2, "--experiment", "digits-net", "--batch-size", "63", "--device", "cpu", "--out", tmp_path
        ).stderr
    )


def test_shared_batch_norm_is_batch_norm(tmp_path):
    "With one process it is torch's own: output, gradient and running statistics."
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ours, theirs = SharedBatchNorm(3, affine=False), nn.BatchNorm2d(3, affine=False)
        for _ in range(3):
            x = torch.randn(5, 3, 4, 6) * 2 + 1
            a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
            za, zb = ours(a), theirs(b)
            w = torch.randn_like(za)
            (za * w).sum().backward()
            (zb * w).sum().backward()
            torch.testing.assert_close(za, zb, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5)
        for k, v in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[k], v)
        with pytest.raises(ValueError, match="two values a channel"):
            ours(torch.randn(1, 3))
        assert ours.running_var.isfinite().all()
    finally:
        dist.destroy_process_group()


# whose data


def test_a_run_belongs_to_its_data(tmp_path):
    "Another tree of the same name is refused, also half-way, and a class that was added is noticed."
    for name, C in (("A", 3), ("B", 2)):
        tree(tmp_path / name / "set", C=C, n=4)

    def command(root, *more):
        few = [
            "--net",
            "resnet18",
            "--size",
            "16",
            "--epochs",
            "2",
            "--batch-size",
            "8",
            "--precision",
            "fp32",
        ]
        return [
            "--experiment",
            "folder:set",
            *few,
            "--workers",
            "0",
            "--device",
            "cpu",
            "--method",
            "standard",
            "--data",
            str(tmp_path / root),
            "--out",
            str(tmp_path / "out"),
            *more,
        ]

    train_main(command("A"))
    says = refused(*command("B"))
    assert "is of a run on other data (" in says and "was 3, is 2" in says and "--again" in says
    rows = Rows(get_experiment("folder:set", net="resnet18"), tmp_path / "out")
    assert json.loads((rows.csv.parent / "standard-s0.json").read_text(encoding="utf-8"))["data"]
    train_main(command("A"))  # as it was: nothing to do
    shutil.copytree(tmp_path / "A" / "set" / "train" / "n0000", tmp_path / "A" / "set" / "train" / "n0009")
    shutil.copytree(tmp_path / "A" / "set" / "val" / "n0000", tmp_path / "A" / "set" / "val" / "n0009")
    assert "other data" in refused(*command("A"))
    train_main(command("B", "--again"))
    shutil.rmtree(tmp_path / "B")
    train_main(command("B"))  # done, and there is nothing to compare it with


@pytest.mark.parametrize("path", [".", "./", "../set", "set/../../set"])
def test_a_folder_has_one_name(path, tmp_path):
    (tmp_path / "set" / "set").mkdir(parents=True)
    exp = get_experiment(f"folder:{path}", root=tmp_path / "set")
    assert exp.stem == "set-resnet50/nearest-s0"


# precision


def test_auto_precision_is_settled_once(tmp_path, monkeypatch):
    "By measurement before the first step; a run already begun keeps what it has."
    import ngc_etf.runner as runner

    exp = get_experiment("fashion-mnist-resnet18", precision="auto")
    monkeypatch.setattr(runner, "_is_sound", lambda *a: True)
    for speed, precision in ((2.0, "bf16"), (0.01, "fp32")):
        monkeypatch.setattr(runner, "bf16_speed", lambda device: speed)
        assert runner.settle_precision(exp, tmp_path / precision).precision == precision
    rows = Rows(get_experiment("fashion-mnist-resnet18", precision="bf16"), tmp_path)
    rows.append(1, train_loss=1.0)
    rows.save()
    assert runner.settle_precision(exp, tmp_path).precision == "bf16"
    assert not Rows(exp, tmp_path).other
    rows.csv.unlink(), rows.json.unlink()
    rows.checkpoint(epoch=1)
    assert runner.settle_precision(exp, tmp_path).precision == "bf16"
    small = get_experiment("digits-net", precision="auto")
    monkeypatch.setattr(runner, "bf16_speed", lambda device: 2.0)
    assert runner.settle_precision(small, tmp_path).precision == "fp32"
    monkeypatch.setattr(runner, "_is_sound", lambda *a: False)
    assert runner.settle_precision(exp, tmp_path / "unsound").precision == "fp32"


def test_slow_bf16_is_said_with_the_measured_ratio(tmp_path, monkeypatch):
    monkeypatch.setattr("ngc_etf.runner.bf16_speed", lambda device: 1 / 200)
    exp = get_experiment("digits-net", epochs=1, precision="bf16")
    with pytest.warns(UserWarning, match="takes 200.0 times as long as in fp32") as said:
        run(exp, tmp_path, device="cpu", progress=False)
    assert len([w for w in said if "times as long" in str(w.message)]) == 1


# where the sources come from


def test_provenance_is_ours_or_none(tmp_path, monkeypatch):
    "In this clone the commit; without metadata no exception; and it is asked before the first step."
    from ngc_etf import machine

    found = machine.provenance()
    assert len(found["sources"]) == 12
    copy = tmp_path / "theirs" / "ngc_etf"
    shutil.copytree(Path(machine.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for args in (
        ["init", "-q"],
        ["add", "-A"],
        ["-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "x"],
    ):
        subprocess.run(["git", *args], cwd=copy.parent, check=True)
    assert machine.provenance(copy)["commit"] and not machine.provenance(copy)["changed"]
    (copy / "suite.py").write_text("changed", encoding="utf-8")
    assert machine.provenance(copy)["changed"]
    subprocess.run(["git", "rm", "-rq", "--cached", "ngc_etf"], cwd=copy.parent, check=True)
    assert (
        machine.provenance(copy)["commit"] == "" and machine.provenance(copy)["sources"] != found["sources"]
    )
    monkeypatch.setattr(
        machine, "version", lambda name: (_ for _ in ()).throw(machine.PackageNotFoundError(name))
    )
    assert machine._version("ngc_etf") and machine._version("torch") is None


# the questions of the evidence


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw", "schedule": "onecycle", "lr": 0.01},
        {"optimizer": "sgd", "lr": 0.1},
        {"alpha": "cumulative", "start": "haar", "scale_free": True, "solve_first": False},
    ],
)
def test_variants_run_and_resume(changes, tmp_path, monkeypatch):
    "Cut after the first epoch, a variant ends in the rows of an unbroken run."
    for name in ("ufm-10", "clusters-100"):
        exp = get_experiment(name, epochs=3, tag="variant", **changes)
        whole = run(exp, tmp_path / "whole", device="cpu", progress=False)
        checkpoint, late = Rows.checkpoint, []

        def cut(self, **state):
            checkpoint(self, **state)
            if state["epoch"] == 1 and not late:
                late.append(1)
                raise KeyboardInterrupt

        monkeypatch.setattr(Rows, "checkpoint", cut)
        monkeypatch.setattr("ngc_etf.loops._PAUSE", 0.0)  # of free features, every iteration is a long one
        with pytest.raises(KeyboardInterrupt):
            run(exp, tmp_path / "cut", device="cpu", progress=False)
        monkeypatch.setattr(Rows, "checkpoint", checkpoint)
        rows = run(exp, tmp_path / "cut", device="cpu", progress=False)
        one, two = (pd.read_csv(r.csv).drop(columns="seconds") for r in (whole, rows))
        pd.testing.assert_frame_equal(one, two, check_exact=True)
        assert rows.stored()["name"] == f"{name}-variant"


BUDGET = ["--experiment", "digits-net", "--epochs", "3", "--device", "cpu", "--budget", "1h", "--out"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "An unbroken run on images."
    folder = tmp_path_factory.mktemp("whole")
    train_main([*BUDGET, str(folder)])
    return folder


@pytest.mark.parametrize("when", [0, 23, 40])
def test_a_budget_costs_no_row(when, whole, tmp_path, monkeypatch, capsys):
    "Stopped in the first batch, after the first epoch or within the second, and given again: the same rows."
    asked = []

    def late(deadline, ahead=0.0):
        asked.append(deadline)
        return len(asked) == when + 1

    with monkeypatch.context() as m:
        m.setattr("ngc_etf.loops._late", late)
        train_main([*BUDGET, str(tmp_path)])
    assert "out of time" in capsys.readouterr().out and len(asked) == when + 1
    rows = Rows(get_experiment("digits-net", epochs=3), tmp_path)
    assert not rows.done and rows.epoch == (when + 1) // 24 and not rows.lock.exists()
    train_main([*BUDGET, str(tmp_path)])
    one, two = (rows_of(folder, "digits-net/nearest-s0") for folder in (whole, tmp_path))
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    one, two = (Rows(rows.exp, folder).margins.read_bytes() for folder in (whole, tmp_path))
    assert one == two


def test_where_the_compiler_refuses_the_head_the_body_is_compiled(tmp_path, monkeypatch):
    "With a message, noted beside the rows, and with the rows of the body alone."
    from ngc_etf.step import Network

    monkeypatch.setattr(nn.Module, "compile", lambda self, *a, **k: None)  # what follows needs no compiler

    def no(self, *a, **k):
        raise RuntimeError("data-dependent branch\nat some line")

    monkeypatch.setattr(Network, "compile", no)
    exp = get_experiment("digits-net", epochs=1)
    with pytest.warns(
        UserWarning, match="does not take the head .RuntimeError: data-dependent branch.: the body"
    ):
        rows = run(exp, tmp_path / "body", device="cpu", progress=False, compile=True)
    assert json.loads(rows.json.read_text(encoding="utf-8"))["environment"]["compiled"] == "body"
    plain = run(exp, tmp_path / "plain", device="cpu", progress=False)
    one, two = (pd.read_csv(r.csv).drop(columns="seconds") for r in (rows, plain))
    pd.testing.assert_frame_equal(one, two, check_exact=True)  # the trial has left no trace


def test_again_takes_nothing_away_before_the_data_are_there(tmp_path):
    "A run that is done keeps its rows when it is asked for again without its data, or beside a live one."
    exp = get_experiment("cifar10-resnet18", epochs=1)
    rows = Rows(exp, tmp_path / "out")
    rows.csv.parent.mkdir(parents=True)
    rows.csv.write_text("precious\n")
    with pytest.raises(FileNotFoundError, match="not found"):
        run(exp, tmp_path / "out", tmp_path / "nowhere", again=True, progress=False)
    digits = get_experiment("digits-net", epochs=1)
    held = Rows(digits, tmp_path / "out")
    held.csv.parent.mkdir(parents=True)
    held.csv.write_text("precious\n")
    with held.locked(), pytest.raises(ValueError, match="another process"):
        run(digits, tmp_path / "out", again=True, progress=False)
    assert rows.csv.read_text() == held.csv.read_text() == "precious\n"
