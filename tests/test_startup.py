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


@pytest.mark.parametrize("module", ["catalogue", "experiment", "machine", "command"])
def test_names_and_numbers_need_python_alone(module):
    assert imported(f"import ngc_etf.{module}") == ([], "")


@pytest.mark.parametrize("module", ["rows", "suite"])
def test_rows_are_read_without_torch(module):
    assert imported(f"import ngc_etf.{module}") == (["pandas"], "")


def command(*argv):
    return f"""
from ngc_etf.command import train_main
try:
    train_main({list(argv)!r})
except SystemExit as e:
    assert not e.code, e.code
"""


def test_help_and_list_import_nothing_heavy():
    assert imported(command("--help")) == ([], "")
    assert imported(command("--list")) == ([], "")


def test_the_list_of_what_is_done_imports_no_torch(tmp_path):
    found, said = imported(command("--list", "--suite", "table1", "--out", str(tmp_path)))
    assert found == ["pandas"] and said == ""


def test_a_run_speaks_of_nobodys_future(tmp_path):
    "No FutureWarning, of whatever library, and no bar where there is no terminal."
    found, said = imported(
        command("--experiment", "ufm-10", "--epochs", "2", "--device", "cpu", "--out", str(tmp_path))
    )
    assert said == "" and "torch" in found
