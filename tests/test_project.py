"The project is in step with its notebooks: exports, README, cleanliness, layering, public names."

import ast
import importlib
import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

import ngc_etf

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("project", ROOT / ".ci" / "project.py")
project = importlib.util.module_from_spec(spec)
spec.loader.exec_module(project)
NOTEBOOKS = [ROOT / "nbs" / name for name in project.notebooks()]

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def cells(path, kind="code"):
    return [
        "".join(c["source"])
        for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if c["cell_type"] == kind
    ]


def directives(src):
    return re.findall(r"^#\|\s*(\w+:?)\s*(\S*)", src, flags=re.M)


def exported(src):
    return any(d.rstrip(":") in ("export", "exporti", "exports") for d, _ in directives(src))


def python(src):
    "The cell's syntax tree, without magics."
    return ast.parse(re.sub(r"^[%!].*$", "", src, flags=re.M))


# ---- generated files


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    "A copy of the notebooks, exported and cleaned by nbdev's own commands."
    top = tmp_path_factory.mktemp("fresh")
    for name in ("settings.ini", "setup.py", "_quarto.yml"):
        shutil.copy(ROOT / name, top)
    shutil.copytree(ROOT / "nbs", top / "nbs", symlinks=True)
    (top / "ngc_etf").mkdir()
    (top / "ngc_etf" / "__init__.py").write_text("")
    code = (
        "from nbdev.clean import nbdev_clean; from nbdev.doclinks import nbdev_export; "
        "nbdev_export.__wrapped__(); nbdev_clean.__wrapped__()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=top, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return top


def test_package_is_what_the_notebooks_export(fresh):
    ours, theirs = (
        {p.name: p.read_text(encoding="utf-8") for p in (top / "ngc_etf").glob("*.py")}
        for top in (ROOT, fresh)
    )
    ours.pop("__init__.py")  # that one is `project.names`'
    theirs.pop("__init__.py")
    assert sorted(ours) == sorted(theirs), (
        "a module without a notebook, or a notebook not exported: run nbdev_export"
    )
    assert [n for n in ours if ours[n] != theirs[n]] == [], (
        "edited by hand, or a notebook not exported: run nbdev_export"
    )


def test_notebooks_are_clean(fresh):
    dirty = [p for p in NOTEBOOKS if p.read_bytes() != (fresh / p.relative_to(ROOT)).read_bytes()]
    assert dirty == [], "run nbdev_clean"


def test_public_names_are_listed():
    project.names(ROOT, check=True)


def test_lines_are_plain():
    check = [sys.executable, ROOT / ".ci" / "plain.py"]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_is_the_index():
    project.readme(ROOT, check=True)


def test_readme_reads_raw_and_on_github():
    "Lines of 110 characters at most, and code of 90, as wide as GitHub's boxes; every chapter is linked."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```\w*\n(.*?)```", text, flags=re.S)
    code = [line for block in blocks for line in block.splitlines()]
    code += re.findall(r"^ {4}(.*)$", text, flags=re.M)
    assert [line for line in text.splitlines() if len(line) > 110] == []
    assert [line for line in code if len(line) > 90] == []
    assert [p for p in project.notebooks() if p != "index.ipynb" and f"(nbs/{p})" not in text] == []


def test_the_sidebar_has_its_sections():
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    top = [x["section"] for x in config["website"]["sidebar"]["contents"] if isinstance(x, dict)]
    assert top == ["Start here", "The book", "The evidence", "The paper, corrected", "API"]


def test_every_notebook_is_in_the_sidebar():
    project.check_listed(ROOT)


# ---- the site's builder


def test_a_missing_page_and_a_forgotten_one_are_named(tmp_path):
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs" / "02_forgotten.ipynb").touch()
    (tmp_path / "_quarto.yml").write_text(
        "website: {sidebar: {contents: [index.ipynb, {section: A, contents: [01_missing.ipynb]}]}}"
    )
    with pytest.raises(project.Problem, match="do not exist: index.ipynb, 01_missing.ipynb"):
        project.check_listed(tmp_path)
    for name in ("index", "01_missing"):
        (tmp_path / "nbs" / f"{name}.ipynb").touch()
    with pytest.raises(project.Problem, match="does not list: 02_forgotten.ipynb"):
        project.check_listed(tmp_path)


def test_equations_become_mathml_or_an_error():
    inline, display = r"\(a &lt; \tilde H, \bar H\)", r"\[x \tag{6}\]"
    page = '<link href="https://cdn/katex@1/katex.css">'
    page += f'<span class="math inline">{inline}</span> <span class="math display">{display}</span>'
    out = project.mathml("p.html", page)
    assert out.count("<math") == 2 and "&lt;" in out and "(6)" in out and "katex" not in out
    assert '<mo stretchy="true">~</mo>' in out and '<mo stretchy="true">\u203e</mo>' in out
    lines = r"\[\begin{aligned} a &= b \\[4pt] c &= d \end{aligned}\]"
    assert "4pt" not in project.mathml("p.html", f'<span class="math display">{lines}</span>')
    with pytest.raises(project.Problem, match=r"p.html.*\\nonsense"):
        project.mathml("p.html", r'<span class="math inline">\(\nonsense\)</span>')


@pytest.mark.parametrize(
    "text, complaint",
    [
        ('<span class="math inline">x^2</span>', "left as TeX"),
        ('<script src="https://cdn/x.js"></script>', "from the network"),
        (r"<p>$ \frac12 $</p>", "TeX outside"),
        ('<a href="gone.html">x</a>', "broken link gone.html"),
        ('<a href="#gone">x</a>', "broken link #gone"),
    ],
)
def test_a_page_that_does_not_stand_alone(tmp_path, text, complaint):
    (tmp_path / "p.html").write_text(text)
    with pytest.raises(project.Problem, match=complaint):
        project.check_page(tmp_path, text, "p.html")


def test_a_method_without_an_entry_leads_to_its_class(tmp_path):
    pages = {"a.html": '<h3 id="net"></h3><h3 id="net.fit"></h3>', "t/b.html": ""}
    for anchor in ("net.fit", "net.forward", "other.forward"):
        pages["t/b.html"] += f'<a href="../a.html#{anchor}">x</a>'
    done = project.methods_to_classes(tmp_path, pages)["t/b.html"]
    assert re.findall(r"#([\w.]+)", done) == ["net.fit", "net", "other.forward"]


@pytest.mark.slow
def test_the_site_builds():
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "project.py", "docs"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert all((ROOT / "_docs" / project.out_name(p)).exists() for p in project.notebooks())
    api = (ROOT / "_docs" / "api.html").read_text(encoding="utf-8")
    assert [name for name in ngc_etf.__all__ if f"<strong>{name}</strong>" not in api] == []


# ---- notebooks


@each_notebook
def test_notebook_is_small(path):
    assert path.stat().st_size <= 200 * 1024


@each_notebook
def test_notebook_follows_the_rules(path):
    for src in cells(path):
        assert not any(d == "eval:" and v.lower() == "false" for d, v in directives(src)), (
            f"`eval: false`:\n{src}"
        )
        if exported(src):
            assert not any(
                isinstance(n, ast.ImportFrom) and n.names[0].name == "*" for n in ast.walk(python(src))
            ), f"star import:\n{src}"


@each_notebook
def test_import_cells_hold_imports_and_seeds_only(path):
    "nbdev runs any cell with an import when it builds the site, and runs few others: mixed cells fail there."
    for src in cells(path):
        body, imports = python(src).body, (ast.Import, ast.ImportFrom)
        if not any(isinstance(n, imports) for b in body for n in ([b] if exported(src) else ast.walk(b))):
            continue
        other = [ast.unparse(n) for n in body if not isinstance(n, imports)]
        assert all(re.fullmatch(r"[\w.]+seed\(\d+\)", o) for o in other), (
            f"imports and other code in one cell:\n{src}"
        )


@each_notebook
def test_title_cell_holds_title_and_description_only(path):
    "nbdev makes the page's front matter of that cell and drops whatever else it holds."
    assert re.fullmatch(r"# \S[^\n]*(\n+> \S[^\n]*)?\s*", cells(path, "markdown")[0]), (
        "move the rest into a cell of its own"
    )


@each_notebook
def test_an_exporting_notebook_asserts(path):
    code = cells(path)
    if any(exported(src) for src in code):
        assert any(
            re.search(r"^\s*(assert\b|test_\w+\()", src, flags=re.M) for src in code if not exported(src)
        )


@each_notebook
def test_links_between_notebooks_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", "\n".join(cells(path, "markdown")))
    assert [x for x in links if x.endswith((".ipynb", ".png")) and not (path.parent / x).exists()] == []


# ---- the package


def chapters():
    "Module name -> chapter number, from `default_exp`."
    found = {}
    for p in NOTEBOOKS:
        for src in cells(p):
            for m in re.findall(r"^#\|\s*default_exp\s+(\w+)", src, flags=re.M):
                found[m] = p.stem.split("_")[0]
    return found


def test_modules_import_from_lower_chapters_only():
    number, seen = chapters(), 0
    for name, n in number.items():
        for node in ast.walk(ast.parse((ROOT / "ngc_etf" / f"{name}.py").read_text(encoding="utf-8"))):
            if not isinstance(node, (ast.Import, ast.ImportFrom)):
                continue
            if isinstance(node, ast.Import):
                used = [a.name for a in node.names]
            else:
                used = (
                    ["ngc_etf." + node.module if node.level else node.module]
                    if node.module
                    else ["ngc_etf." + a.name for a in node.names]
                )
            for m in (u.split(".")[1] for u in used if u.startswith("ngc_etf.")):
                seen += 1
                assert number[m] < n, f"{name} (chapter {n}) imports {m} (chapter {number[m]})"
    assert seen > 5


def test_heads_do_not_import_fastai():
    code = "import sys, ngc_etf.heads; print(*(m for m in sys.modules if m.split('.')[0] == 'fastai'))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        == ""
    )


PUBLIC = """
simplex_etf(C, d=None, U=None, alpha=1., dtype=None, device=None)
standard_etf(C, dtype=None, device=None)
canonical_direction(d, C)
haar_direction(d, C, generator=None)
centred_means(h, y, C)
RunningMeans(d, C)
RunningMeans.forward(self, h, y)
nearest_etf(H, U_prox=None, delta=1e-3, solver="auto")
rvec(A)
rvech(A)
commutation_matrix(m, n)
elimination_matrix(n)
lagrange_multipliers(H, U, U_prox, delta)
sigma(H, U, U_prox, delta)
ddn_jacobian(H, U, U_prox, delta, via="sigma")
ddn_vjp(H, U, U_prox, delta, v)
StandardHead(d, C, tau=5., normalise=True)
FixedETFHead(d, C, direction="canonical", tau=5.)
NearestETFHead(d, C, delta=1e-3, tau=5., ddn_grad=True, solver="auto", start="canonical")
StandardHead.forward(self, h, y=None)
FixedETFHead.forward(self, h, y=None)
NearestETFHead.forward(self, h, y=None)
StandardHead.to_linear(self)
FixedETFHead.to_linear(self)
NearestETFHead.to_linear(self)
nc1(h, y, C)
nc2(W)
nc3(W, H_bar)
nc4(h, y, W, b)
equinorm_gap(W, H_bar)
cosine_margins(h, y, W)
cross_entropy_floor(C, tau)
NeuralCollapse(C, d)
NeuralCollapse.update(self, h, y)
NeuralCollapse.compute(self, W=None, b=None)
AGD(params, gain=1.)
AGD.init_weights(self)
StratifiedBatchSampler(y, batch_size)
NearestETF()
CollapseRecorder()
ntce(z, y)
nonl(z, y)
polar(P)
swap_head(model, head=None, at="", C=None, project=False)
last_linear(model, at="")
plain(model)
to_onnx(model, x, path)
feed_labels(model)
measure_collapse(model, loader, at="")
""".split("\n")[1:-1]


@pytest.mark.parametrize("line", PUBLIC, ids=lambda s: s.split("(")[0])
def test_public_names_and_parameters(line):
    "Names stay, and parameters' names, order and defaults; more may follow, with defaults."
    obj = ngc_etf
    for n in line.split("(")[0].split("."):
        obj = getattr(obj, n)
    want = ast.parse(f"def f({line.split('(', 1)[1]}: pass").body[0].args
    have = list(inspect.signature(obj).parameters.values())
    assert [p.name for p in have[: len(want.args)]] == [a.arg for a in want.args]
    for p, default in zip(have[len(want.args) - len(want.defaults) :], want.defaults):
        assert p.default == ast.literal_eval(default), p
    for p in have[len(want.args) :]:
        assert p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD), (
            f"{p.name} has no default"
        )


def test_solvers_are_named():
    assert {"svd", "trust_region"} <= set(ngc_etf.SOLVERS)


def test_every_public_name_is_found_where_it_is_said_to_be():
    for name in ngc_etf.__all__:
        assert getattr(ngc_etf, name) is not None
    assert set(ngc_etf.__all__) <= set(dir(ngc_etf))
    with pytest.raises(AttributeError, match="no attribute 'nearest_eft'"):
        ngc_etf.nearest_eft


def test_public_names_are_few_and_these():
    "A name that comes or goes is a decision: `python .ci/project.py names` shows it, and this list keeps it."
    found = project.public_names(ROOT)
    assert {m: len(names) for m, names in found.items() if len(names) > 10} == {}
    snapshot = (ROOT / "tests" / "public_names.txt").read_text(encoding="utf-8")
    assert snapshot == "".join(f"{m}: {' '.join(sorted(names))}\n" for m, names in found.items() if names)


def test_importing_the_package_loads_nothing():
    code = "import sys, ngc_etf; dir(ngc_etf); print(*{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "fastai", "pandas"} & set(done.stdout.split())


def test_commands_lead_to_functions():
    cfg = ConfigParser(delimiters=["="])
    cfg.read(ROOT / "settings.ini", encoding="utf-8")
    scripts = dict(s.split("=") for s in cfg["DEFAULT"]["console_scripts"].split())
    assert set(scripts) == {"ngc_train", "ngc_report", "ngc_cost"}
    for target in scripts.values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))


# ---- nothing of one machine in the files


def test_no_path_of_one_machine():
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")[:-1]
    machine = re.compile(r"(?<![\w.~$}*])/(?:work|tmp|root|home|mnt|opt)/\w|site-packages|[A-Z]:\\Users")
    found = []
    for f in files:
        if (ROOT / f).is_symlink() or not (ROOT / f).exists():
            continue
        try:
            text = (ROOT / f).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        text = re.sub(r'"image/png": "[^"]*"', "", text)
        found += [f"{f}: {m[0]}" for m in machine.finditer(text) if f != "tests/test_project.py"]
    assert len(files) > 10 and found == []
