"Type hints: every public parameter and result has one, and mypy, where it is installed, finds nothing."

import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ngc_etf

ROOT = Path(__file__).resolve().parent.parent
BOUND = ("self", "cls")


def functions(obj, name):
    "(name, function) of a public object: itself, or what a class of this package defines for its users."
    if inspect.isfunction(obj):
        yield name, obj
    if not inspect.isclass(obj):
        return
    for key in dir(obj):
        value = inspect.getattr_static(obj, key)
        f = inspect.unwrap(getattr(value, "fget", None) or getattr(value, "__func__", value))
        ours = inspect.isfunction(f) and f.__module__.startswith("ngc_etf") and f.__name__ != "<lambda>"
        if ours and (key in ("__init__", "__call__") or not key.startswith("_")):
            yield f"{name}.{key}", f


def gaps(f):
    "What lacks an annotation: parameters by name, and the result."
    signature = inspect.signature(f)
    for p in signature.parameters.values():
        if p.annotation is p.empty and p.name not in BOUND:
            yield p.name
    if signature.return_annotation is signature.empty and f.__name__ != "__init__":
        yield "the result"


@pytest.mark.parametrize("name", ngc_etf.__all__)
def test_public_names_have_complete_type_hints(name):
    try:
        obj = getattr(ngc_etf, name)
    except ImportError as e:
        pytest.skip(str(e))
    lacking = [f"{where}: {', '.join(found)}" for where, f in functions(obj, name) if (found := [*gaps(f)])]
    assert not lacking, lacking


def test_package_says_that_it_is_typed():
    assert (ROOT / "ngc_etf" / "py.typed").is_file()
    ignoring = [p.name for p in sorted((ROOT / "ngc_etf").glob("*.py")) if "type: ignore" in p.read_text("utf-8")]
    assert not ignoring


def test_exceptions_for_mypy_have_a_reason_and_spare_the_core():
    "Rooms below 11 are checked without any."
    text = (ROOT / ".ci" / "mypy.ini").read_text(encoding="utf-8")
    excepted = re.findall(r"(?m)^(.*)\n\[mypy-ngc_etf\.(\w+)\]", text)
    assert excepted and all(comment.startswith("# ") for comment, _ in excepted)
    assert {name for _, name in excepted} == {"experiment", "jobs"}


@pytest.mark.slow
def test_mypy_finds_nothing(tmp_path):
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed: pip install mypy")
    command = [sys.executable, "-m", "mypy", "--config-file", ".ci/mypy.ini", "--cache-dir", str(tmp_path)]
    done = subprocess.run([*command, "-p", "ngc_etf"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
