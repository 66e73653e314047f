"The package as a stranger gets it: a wheel, installed in an empty environment, used from another folder."

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


def run(*command, cwd, **more):
    "What a command prints; its complaint where it fails."
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | more
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    "A copy of what git knows here and a package is made of."
    top = tmp_path_factory.mktemp("source")
    wanted = ("ngc_etf", "settings.ini", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
    for name in filter(None, run("git", "ls-files", "-z", *wanted, cwd=ROOT).split("\0")):
        if (ROOT / name).exists():
            (top / name).parent.mkdir(parents=True, exist_ok=True)
            (top / name).write_bytes((ROOT / name).read_bytes())
    return top


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    "A wheel, built from the copy."
    out = tmp_path_factory.mktemp("wheel")
    options = ("-q", "--no-deps", "--no-build-isolation", "-w", out)
    run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=source)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def stranger(wheel, tmp_path_factory):
    "An environment that holds the wheel and sees the packages of this one, but not this checkout."
    home = tmp_path_factory.mktemp("stranger")
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = Path(run(python, "-c", code, cwd=home).strip())
    (site / "present.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", wheel, cwd=home)
    return home


def test_the_wheel_holds_the_package_and_its_types(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {f"ngc_etf/{p.name}" for p in (ROOT / "ngc_etf").glob("*.py")}
    assert modules <= set(names) and "ngc_etf/py.typed" in names
    assert not [n for n in names if n.startswith(("tests/", "nbs/", "results/"))]


def test_twine_takes_wheel_and_source(source, tmp_path):
    "Both archives are built, and their metadata and README can be shown by an index."
    for tool in ("build", "twine"):
        pytest.importorskip(tool, reason=f"{tool} is not installed; the extra dev brings it")
    run(sys.executable, "-m", "build", "-q", "--no-isolation", "-o", tmp_path, source, cwd=source)
    made = sorted(tmp_path.iterdir())
    assert [p.suffix for p in made] == [".whl", ".gz"]
    run(sys.executable, "-m", "twine", "check", "--strict", *made, cwd=tmp_path)
    with tarfile.open(made[1]) as archive:  # tests need the notebooks, which lie in the repository
        assert not [n for n in archive.getnames() if "/tests" in n or n.endswith(".ipynb")]
    metadata = next(n for n in zipfile.ZipFile(made[0]).namelist() if n.endswith("/METADATA"))
    text = zipfile.ZipFile(made[0]).read(metadata).decode()
    assert "Programming Language :: Python :: 3.11" in text and "](nbs/" not in text


def test_a_stranger_trains_and_reports(stranger, tmp_path):
    bin, work = stranger / "bin", tmp_path / "work"
    work.mkdir()
    run("git", "init", "-q", cwd=work)  # somebody else's repository, of which rows must not speak
    where = run(bin / "python", "-c", "import ngc_etf; print(ngc_etf.__file__)", cwd=work)
    assert Path(where.strip()).is_relative_to(stranger)
    run(bin / "ngc_train", "--experiment", "ufm-10", "--epochs", "5", "--out", "rows", cwd=work)
    run(bin / "ngc_report", "--rows", "rows", "--out", "report", cwd=work)
    assert (work / "report" / "index.html").stat().st_size > 10_000
    about = json.loads((work / "rows" / "ufm-10" / "nearest-s0.json").read_text())
    assert about["environment"]["versions"]["ngc_etf"]
