"The commands as a shell sees them: exit status, one line of complaint, nothing half-written."

import inspect, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import pandas as pd
import pytest

from ngc_etf.command import train_main, train_parser
from ngc_etf.experiment import METHODS
from ngc_etf.known import EXPERIMENTS, get_experiment
from ngc_etf.reading import load_rows
from ngc_etf.report import report_main
from ngc_etf.rows import Rows
from ngc_etf.runner import run


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
        (["--experiment", "ufm-10", "--seed", str(2**63)], "seed must lie in 0..2^63-1"),
        (["--experiment", "digits-net", "--tail", "nan"], "tail must be at least 1, finite"),
        (["--experiment", "digits-net", "--tail", "inf"], "tail must be at least 1, finite"),
        (["--experiment", "ufm-10", "--device", "mps"], "cpu, cuda or cuda:N, got 'mps'"),
        (["--experiment", "ufm-10", "--alpha", ""], "alpha must be paper"),
        (["--experiment", "ufm-10", "--budget", ""], "--budget takes a time"),
        (["--experiment", "ufm-10", "--workers", "-1"], "--workers must not be negative"),
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


@pytest.mark.parametrize(
    "suffix, text",
    [(".json", "{}"), (".json", "{"), (".csv", "a\n"), (".csv", "epoch,train_loss\n1,0.5\n2,0.2"),
     (".json", '{"experiment": {}, "format": "1"}')],
)
def test_damaged_result_files_are_named(suffix, text, tmp_path):
    rows = run(get_experiment("ufm-10", epochs=3), tmp_path, progress=False)
    damaged = rows.csv.with_suffix(suffix)
    damaged.write_text(text)
    with pytest.raises(SystemExit) as e:
        train_main(["--experiment", "ufm-10", "--epochs", "3", "--out", str(tmp_path)])
    assert f"{damaged} is damaged" in str(e.value.code) and damaged.read_text() == text


# errors, signals, terminals


def digits(*more):
    return ["--experiment", "digits-net", "--epochs", "3", "--method", "fixed", "--device", "cpu", *more]


def test_the_default_of_workers_is_told_by_the_loaders():
    assert train_parser().parse_args([]).workers is None
    assert inspect.signature(run).parameters["workers"].default is None
    words = " ".join(train_parser().format_help().split())
    assert "(default: 4, or one a core where the cores that this process may use are fewer)" in words


def test_an_error_inside_a_step_is_one_sentence(tmp_path, monkeypatch):
    "Of any type; what was there before stays, and --traceback shows where it came from."
    from torch.optim import Optimizer

    from ngc_etf.agd import AGD

    step, count = AGD.step, []

    def fails(self, *a, **k):
        count.append(1)
        if len(count) == 30:  # in the second epoch
            raise RuntimeError("no solver could find the polar factor\nat some place")
        return step(self, *a, **k)

    monkeypatch.setattr(AGD, "step", fails)
    with pytest.raises(SystemExit) as e:
        train_main([*digits("--out", str(tmp_path))])
    says = "ngc_train: RuntimeError: no solver could find the polar factor"
    assert says in str(e.value.code) or "no solver" in str(e.value.code)
    assert "\n" not in str(e.value.code) and issubclass(AGD, Optimizer)
    rows = Rows(get_experiment("digits-net", epochs=3, method="fixed"), tmp_path)
    assert rows.epoch == 1 and rows.last_checkpoint()["epoch"] == 1 and not rows.lock.exists()
    count.clear()
    with pytest.raises(RuntimeError, match="no solver"):
        count.extend([1] * 20)
        train_main([*digits("--out", str(tmp_path), "--traceback")])
    monkeypatch.setattr(AGD, "step", step)
    train_main([*digits("--out", str(tmp_path))])
    assert Rows(rows.exp, tmp_path).done


@pytest.mark.parametrize("where", ["torch.save", "pandas.DataFrame.to_csv", "ngc_etf.step.AGD.step"])
def test_an_interrupt_ends_a_suite_with_status_130(where, tmp_path, monkeypatch, capsys):
    "Wherever it comes, the next cell is not begun, and the files are whole."
    import importlib

    module, _, name = where.rpartition(".")
    if module.count(".") and module.split(".")[-1][0].isupper():
        module, _, owner = module.rpartition(".")
        target = getattr(importlib.import_module(module), owner)
    else:
        target = importlib.import_module(module)
    original, count = getattr(target, name), []

    def interrupted(*a, **k):
        count.append(1)
        if len(count) == 3:
            if name == "save":
                a[1].write(b"half a checkpoint")
                try:
                    raise KeyboardInterrupt
                except KeyboardInterrupt:  # as torch's writer does
                    raise RuntimeError("unexpected pos 128 vs 22")
            raise KeyboardInterrupt
        return original(*a, **k)

    monkeypatch.setattr(target, name, interrupted)
    suite = [
        "--suite",
        "long-tail",
        "--method",
        "fixed",
        "--epochs",
        "4",
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    with pytest.raises(SystemExit) as e:
        train_main(suite)
    assert e.value.code == 130
    said = capsys.readouterr()
    assert "stopped; the same command goes on" in said.err and "could not be written" not in said.err
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("*.lock"))
    assert not (tmp_path / "cifar10-resnet18-lt").exists()
    rows = Rows(get_experiment("digits-net-lt", epochs=4, method="fixed"), tmp_path)
    if rows.ckpt.exists():
        assert rows.last_checkpoint()["epoch"] >= 1


def test_a_cut_run_that_began_anew_goes_on_without_again(tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("ngc_etf.step.AGD.step", interrupted)
    with pytest.raises(SystemExit):
        train_main(digits("--out", str(tmp_path), "--again"))
    assert "the same command without --again goes on from the last epoch" in capsys.readouterr().err


def test_a_run_that_another_process_has_ended_meanwhile_is_left_alone(tmp_path, monkeypatch):
    exp = get_experiment("digits-net", epochs=1, method="fixed")
    ended = run(exp, tmp_path / "other", progress=False, device="cpu")

    def slow_look(*args):
        shutil.copytree(tmp_path / "other", tmp_path / "here", dirs_exist_ok=True)

    monkeypatch.setattr("ngc_etf.runner._warn_if_slow", slow_look)
    rows = run(exp, tmp_path / "here", progress=False, device="cpu")
    assert rows.csv.read_bytes() == ended.csv.read_bytes()


def test_a_run_of_one_epoch_that_is_cut_before_its_margins_is_not_done(tmp_path, monkeypatch):
    exp = get_experiment("digits-net", epochs=1, method="fixed")

    def cut(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("ngc_etf.loops.save_margins", cut)
        with pytest.raises(KeyboardInterrupt):
            run(exp, tmp_path, progress=False, device="cpu")
    rows = run(exp, tmp_path, progress=False, device="cpu")
    assert rows.done and rows.margins.exists()


@pytest.mark.slow
def test_ctrl_c_as_a_shell_sends_it(tmp_path):
    argv = ["--experiment", "ufm-10", "--device", "cpu", "--out", str(tmp_path)]
    p = subprocess.Popen([sys.executable, "-c", TRAIN, *argv], stderr=subprocess.PIPE, text=True)
    ckpt = Rows(get_experiment("ufm-10"), tmp_path).ckpt
    while not ckpt.exists() and p.poll() is None:
        time.sleep(0.05)
    p.send_signal(signal.SIGINT)
    assert "stopped; the same command goes on" in p.communicate()[1] and p.returncode == 130
    assert ckpt.exists()


def test_sigterm_ends_a_run_politely(tmp_path, monkeypatch, capsys):
    "Status 143 and one sentence; the last checkpoint is whole, and the signal means again what it meant."
    from ngc_etf.agd import AGD

    step, count = AGD.step, []

    def stopped(self, *a, **k):
        count.append(1)
        if len(count) == 30:  # in the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *a, **k)

    monkeypatch.setattr(AGD, "step", stopped)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as e:
        train_main([*digits("--out", str(tmp_path))])
    assert e.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1] == "ngc_train: stopped; the same command goes on from the last epoch"
    rows = Rows(get_experiment("digits-net", epochs=3, method="fixed"), tmp_path)
    assert rows.epoch == 1 and rows.last_checkpoint()["epoch"] == 1
    assert not rows.lock.exists() and not list(tmp_path.rglob("*.part"))
    monkeypatch.setattr(AGD, "step", step)
    train_main([*digits("--out", str(tmp_path))])
    assert rows.done


def children(parent):
    "The processes that a process has started."
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's list of children")
@pytest.mark.parametrize(
    "sent, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, -1), (signal.SIGKILL, -9)]
)
def test_no_child_outlives_its_parent(sent, status, tmp_path):
    "However the parent ends; the children leave whole files, and the same command goes on."
    argv = ["--suite", "demo", "--method", "fixed", "--seeds", "1", "--epochs", "2000", "--device", "cpu"]
    argv += ["--jobs", "2", "--out", str(tmp_path)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    p = subprocess.Popen([sys.executable, "-c", TRAIN, *argv], env=env, stderr=subprocess.PIPE, text=True)
    while len(list(tmp_path.rglob("*.lock"))) < 2 and p.poll() is None:
        time.sleep(0.1)
    time.sleep(1)
    started = children(p.pid)
    assert len(started) == 2 and p.poll() is None
    p.send_signal(sent)
    said = p.communicate()[1]
    assert p.returncode == status
    if status > 0:  # the parent has waited
        assert not any(map(is_alive, started)) and "stopped; the same command goes on" in said
    end = time.time() + 60
    while any(map(is_alive, started)) and time.time() < end:
        time.sleep(0.1)
    assert not any(map(is_alive, started))
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("*.lock"))
    for path in tmp_path.rglob("*.ckpt"):
        exp = get_experiment(path.parent.name, method="fixed", epochs=2000)
        assert Rows(exp, tmp_path).last_checkpoint()["epoch"] >= 1


def test_a_terminal_that_cannot_show_it(tmp_path):
    "Names outside the terminal's alphabet are replaced; the run is whole, and so is its list."
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii", "PYTHONWARNINGS": "ignore"}
    argv = [
        "--experiment",
        "ufm-10",
        "--epochs",
        "2",
        "--device",
        "cpu",
        "--tag",
        "größe",
        "--out",
        str(tmp_path / "ö"),
    ]
    done = subprocess.run([sys.executable, "-c", TRAIN, *argv], env=env, capture_output=True)
    assert done.returncode == 0 and b"gr??e/nearest-s0: epoch 2" in done.stdout, done.stderr
    assert (tmp_path / "ö" / "ufm-10-größe" / "nearest-s0.csv").exists()


# budgets and jobs


def test_a_budget_stops_in_time_and_the_next_call_goes_on(tmp_path, capsys):
    argv = [
        "--suite",
        "long-tail",
        "--method",
        "fixed",
        "--epochs",
        "2000",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    begun = time.time()
    train_main([*argv, "--budget", "4s"])
    assert time.time() - begun < 30
    said = capsys.readouterr().out
    assert "the time of 4s is over: 2 of 2 cells are left, next digits-net-lt/fixed-s0" in said
    rows = Rows(get_experiment("digits-net-lt", epochs=2000, method="fixed"), tmp_path)
    epoch = rows.epoch
    train_main([*argv, "--budget", "4s"])
    assert rows.epoch >= epoch and rows.epoch > 0 and not rows.lock.exists()


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--experiment", "ufm-10", "--budget", "soon"], "such as 8m, 90s or 1h30m, got 'soon'"),
        (["--experiment", "ufm-10", "--jobs", "2"], "--jobs N, at least 1, goes with --suite"),
        (["--suite", "demo", "--jobs", "0"], "--jobs N, at least 1"),
        (["--suite", "demo", "--jobs", "2", "--cluster", "slurm"], "--budget and --jobs do not go with"),
        (["--experiment", "ufm-10", "--budget", "8m", "--cluster", "local"], "give timeout_min to"),
        (["--experiment", "ufm-10", "--cluster-options", "gpus_per_node=1"], "goes with --cluster"),
    ],
)
def test_what_does_not_go_together_is_refused(argv, says, tmp_path):
    with pytest.raises(SystemExit) as e:
        train_main([*argv, "--out", str(tmp_path)])
    assert says in str(e.value.code)


@pytest.mark.slow
def test_jobs_write_the_rows_of_one_after_the_other(tmp_path, capsys):
    "Several at once, one of which fails; the rows are those of a suite that runs alone."
    argv = ["--suite", "demo", "--epochs", "2", "--seeds", "1", "--device", "cpu", "--precision", "fp32"]
    (tmp_path / "two" / "digits-net").mkdir(parents=True)
    (tmp_path / "two" / "digits-net" / "fixed-s0.json").write_text("{", encoding="utf-8")
    with pytest.raises(SystemExit) as e:
        train_main([*argv, "--out", str(tmp_path / "two"), "--jobs", "2"])
    assert "1 cells failed: digits-net/fixed-s0" in str(e.value.code)
    said = capsys.readouterr()
    assert "[9/9]" in said.out + said.err and "fixed-s0.json is damaged" in said.err
    (tmp_path / "two" / "digits-net" / "fixed-s0.json").unlink()
    train_main([*argv, "--out", str(tmp_path / "two"), "--jobs", "2"])
    train_main([*argv, "--out", str(tmp_path / "one")])
    one, two = (load_rows(tmp_path / d)[0].drop(columns="seconds") for d in ("one", "two"))
    pd.testing.assert_frame_equal(one, two, check_exact=True)
