"What the commands import before they answer: modules are counted, not seconds."

import os
import subprocess
import sys

import pytest

HEAVY = {"torch", "torchvision", "fastai", "pandas", "sklearn", "scipy", "matplotlib", "pymanopt"}


def imported(code):
    "The heavy packages that a piece of code has imported, and what it wrote to standard error."
    end = f"import sys; print(*sorted({{m.split('.')[0] for m in sys.modules}} & {HEAVY!r}))"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    env.pop("PYTHONWARNINGS", None)
    done = subprocess.run([sys.executable, "-c", f"{code}\n{end}"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split(), done.stderr


@pytest.mark.parametrize(
    "module", ["catalogue", "experiment", "known", "machine", "files", "command", "cost"]
)
def test_names_and_numbers_need_python_alone(module):
    assert imported(f"import ngc_etf.{module}") == ([], "")


@pytest.mark.parametrize("module", ["rows", "suite", "jobs", "reading"])
def test_rows_are_read_without_torch(module):
    assert imported(f"import ngc_etf.{module}") == (["pandas"], "")


def command(*argv, main="command.train_main"):
    module, function = main.split(".")
    return f"""
from ngc_etf.{module} import {function}
try:
    {function}({list(argv)!r})
except SystemExit as e:
    assert not e.code, e.code
"""


def test_help_and_list_import_nothing_heavy():
    assert imported(command("--help")) == ([], "")
    assert imported(command("--list")) == ([], "")
    assert imported(command("--help", main="cost.cost_main")) == ([], "")
    assert imported(command("solver", "--help", main="cost.cost_main")) == ([], "")
    found, said = imported(command("--help", main="report.report_main"))
    assert found == ["pandas"] and said == ""


@pytest.mark.parametrize(
    "argv, unneeded",
    [
        (["solver", "--quick", "--rounds", "1"], {"fastai", "torchvision"}),
        (["memory", "--quick"], {"pymanopt"}),
        (["data", "--quick"], {"pymanopt"}),
    ],
)
def test_costs_are_taken_without_what_they_do_not_measure(argv, unneeded):
    "And no library speaks: no FutureWarning, no complaint of an absent GPU."
    found, said = imported(command(*argv, main="cost.cost_main"))
    assert not unneeded & {*found}
    assert said == ""


def test_the_list_of_what_is_done_imports_no_torch(tmp_path):
    found, said = imported(command("--list", "--suite", "table1", "--out", str(tmp_path)))
    assert found == ["pandas"] and said == ""


def test_a_run_speaks_of_nobodys_future(tmp_path):
    "No FutureWarning, of whatever library, and no bar where there is no terminal."
    found, said = imported(
        command("--experiment", "ufm-10", "--epochs", "2", "--device", "cpu", "--out", str(tmp_path))
    )
    assert said == "" and "torch" in found


@pytest.mark.parametrize("cores", [3, None])
def test_cores_are_counted_on_any_system(cores, monkeypatch):
    "macOS does not say which of them a process may use, and some systems do not count them at all."
    from ngc_etf import machine

    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert machine._cores() == (cores or 1)


@pytest.mark.parametrize("idle, passive", [(0.1, True), (0.9, False), (None, False)])
def test_threads_sleep_while_they_wait_on_a_busy_machine(idle, passive, monkeypatch):
    "Only there, only before torch is imported, and never against what the user has set."
    from ngc_etf import machine

    for name in ("OMP_WAIT_POLICY", "KMP_BLOCKTIME", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine, "_idle_share", lambda: idle)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    before = {k: os.environ.get(k) for k in machine._WAITING}
    try:
        machine._wait_passively()
        assert (os.environ.get("OMP_WAIT_POLICY") == "PASSIVE") == passive
        for k in machine._WAITING:
            os.environ.pop(k, None)
        monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
        machine._wait_passively()
        assert "OMP_WAIT_POLICY" not in os.environ
    finally:
        for k, v in before.items():
            os.environ.pop(k, None)
            if v is not None:
                os.environ[k] = v
