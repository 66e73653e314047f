"""Builds what is generated from the notebooks besides the package.

project.py docs             the site, into _docs
project.py readme           README.md, from nbs/index.ipynb
project.py names            ngc_etf/__init__.py, from the modules' own lists of public names
project.py readme --check   only says whether README.md is in step; likewise names --check
"""

import argparse
import ast
import builtins
import contextlib
import html
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from urllib.parse import unquote

import yaml

ROOT = Path(__file__).resolve().parent.parent
FONT = "STIXTwoMath-Regular.ttf"
CSS = f"""@font-face {{ font-family: "STIX Two Math"; src: url("{FONT}"); }}
math {{ font-family: "STIX Two Math", math; font-size: 1.05em; }}
math[display="block"] {{ margin: 1em 0; overflow-x: auto; overflow-y: hidden; }}
html body #quarto-content.quarto-container {{ --sd-body-width: min(62rem, 70vw); }}
pre, pre code {{ font-size: .82rem; }}
@media (min-width: 992px) and (max-width: 1560px) {{  /* lines of 110 characters fit */
  html body #quarto-content.quarto-container {{ --sd-sidebar-width: 230px; --sd-margin-width: 180px; }}
  pre, pre code {{ font-size: .72rem; }}
}}
.sidebar-menu-container {{ font-variant-numeric: tabular-nums; }}
div.sourceCode > pre.sourceCode:not(.cell-code) {{ padding: .6rem .9rem; }}
table.dataframe {{ font-size: .85rem; border: 0; }}
table.dataframe :is(td, th) {{ padding: .1rem .6rem; border: 0; text-align: right; white-space: nowrap; }}
"""
API = "api.md"  # the page of public names, written here


ACCENTS = {  # as they come, and as wide as their letter: short bars and short tildes look alike
    '<mo stretchy="false">\u00af</mo>': '<mo stretchy="true">\u203e</mo>',  # bar
    '<mo stretchy="true">\u0332</mo>': '<mo stretchy="true">\u203e</mo>',  # overline
    '<mo stretchy="false">\u02dc</mo>': '<mo stretchy="true">~</mo>',  # tilde
}


class Problem(Exception):
    "Something a reader of the site would stumble over; its text is the one line shown."


def listed(config):
    "Every notebook named anywhere in the sidebar of `_quarto.yml`."

    def walk(x):
        if isinstance(x, str):
            return [x] if x.endswith(".ipynb") else []
        return [p for v in (x.values() if isinstance(x, dict) else x) for p in walk(v)]

    return walk(config["website"]["sidebar"]["contents"])


def notebooks(root=ROOT):
    "Every notebook of the book, its path relative to `nbs/`, in the order of file names."
    found = (p.relative_to(root / "nbs") for p in (root / "nbs").rglob("*.ipynb"))
    return sorted(p.as_posix() for p in found if ".ipynb_checkpoints" not in p.parts)


def out_name(notebook):
    "nbdev's name for a page: in the notebook's folder, without the chapter number."
    path = Path(notebook)
    return path.with_name(re.sub(r"^\d+[a-z]?_", "", path.stem) + ".html").as_posix()


def numbered(notebook, title):
    "A page's line in the sidebar: the chapter's number before its title."
    number = re.match(r"\d+[a-z]?(?=_)", Path(notebook).name)
    return f"{number[0]}\u2002{title}" if number else title


def check_listed(root):
    "The pages of the sidebar, which must be exactly the notebooks."
    pages = listed(yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8")))
    there = set(notebooks(root))
    if missing := [p for p in pages if p not in there]:
        raise Problem(f"_quarto.yml lists pages that do not exist: {', '.join(missing)}")
    names = [out_name(p) for p in pages]
    if double := sorted({name for name in names if names.count(name) > 1}):
        raise Problem(f"two notebooks would be one page: {', '.join(double)}")
    if unlisted := sorted(there - set(pages)):
        raise Problem(f"notebooks that _quarto.yml does not list: {', '.join(unlisted)}")
    return pages


# ---- the site


def rename_pages(proc, pages):
    "Name the processed notebooks as nbdev links to them; smalldocs does not read `output-file`."
    names = {p: out_name(p).replace(".html", ".ipynb") for p in pages}
    for old, new in names.items():
        (proc / old).rename(proc / new)
    for page in names.values():
        s = (proc / page).read_text(encoding="utf-8")
        for old, new in names.items():
            s = re.sub(rf"(?<![\w-]){re.escape(Path(old).name)}", Path(new).name, s)
        s = re.sub(r'^\s*"output-file: [^\n]*\n|^\s*html-math-method:[^\n]*\n', "", s, flags=re.M)
        (proc / page).write_text(s, encoding="utf-8")


def title_of(notebook):
    "The title in a notebook's front matter."
    first = json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]["source"]
    return yaml.safe_load("".join(first).strip().strip("-"))["title"]


def write_sidebar(proc):
    "The site's configuration, with pages under their new names and the chapters' numbers in the sidebar."
    f = proc / "_quarto.yml"
    config = yaml.safe_load(f.read_text(encoding="utf-8"))
    config["format"]["html"].pop("html-math-method", None)  # the equations are set here

    def line(x):
        if isinstance(x, dict):
            return x | {"contents": [line(v) for v in x["contents"]]} if "contents" in x else x
        if not x.endswith(".ipynb"):
            return x
        page = out_name(x).replace(".html", ".ipynb")
        return {"text": numbered(x, title_of(proc / page)), "href": page}

    sidebar = config["website"]["sidebar"]
    sidebar["contents"] = [line(x) for x in sidebar["contents"]]
    f.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")


def mathml(page, s):
    "The page with every equation as MathML, which browsers set by themselves: no script, no network."
    from math_core import LatexError, LatexToMathML

    convert = LatexToMathML(annotation=True, fancy_error=False).convert_with_local_state

    def one(m):
        kind, tex = m[1], html.unescape(m[2])
        tex = re.sub(r"^\\[(\[]|\\[)\]]$", "", tex).strip()
        tex = re.sub(r"\\\\\[[\d.]+(?:pt|em|ex)\]", r"\\\\", tex)  # it knows no distances
        if r"\tag" in tex:
            tex = rf"\begin{{equation}}{tex}\end{{equation}}"
        try:
            math = convert(tex, displaystyle=kind == "display")
        except LatexError as e:
            raise Problem(f"{page}: cannot set the equation {tex!r}: {e}") from None
        for narrow, wide in ACCENTS.items():
            math = math.replace(narrow, wide)
        return f'<span class="math {kind}">{math}</span>'

    s = re.sub(r'<span class="math (inline|display)">(.*?)</span>', one, s, flags=re.S)
    return re.sub(r'<(link|script)[^>]*\bkatex@[^>]*>(</script>)?\s*', "", s)


def check_page(out, s, name):
    "Raise unless the page stands alone: equations set, nothing loaded from elsewhere, no broken link."
    if re.search(r'<span class="math [^"]*">(?!\s*<math)', s):
        raise Problem(f"{name}: an equation was left as TeX")
    if m := re.search(r'<(?:script|img|link|iframe)\b[^>]*\b(?:src|href)="(?:https?:)?//[^"]*"', s):
        raise Problem(f"{name}: loads from the network: {m[0]}")
    text = re.sub(r"<(head|script|style|pre|code|math)\b.*?</\1>", "", s, flags=re.S)
    if re.search(r"\]\(https?://", re.sub(r"<script\b.*?</script>", "", s, flags=re.S)):
        raise Problem(f"{name}: a link was left as text")
    if m := re.search(r"\$[^$<>\n]{0,80}\\[a-zA-Z]+|\\(?:frac|mathbf|lVert|tilde|bar|top)\b", text):
        raise Problem(f"{name}: TeX outside an equation (in a heading write Unicode): {m[0]!r}")
    for link, anchor in set(re.findall(r'\b(?:href|src)="([^"#?:]*)(?:#([^"?]*))?"', s)):
        f = (out / name).parent / link if link else out / name
        if not f.exists():
            raise Problem(f"{name}: broken link {link}")
        if (
            anchor
            and f.suffix == ".html"
            and f'id="{html.unescape(unquote(anchor))}"' not in f.read_text(encoding="utf-8")
        ):
            raise Problem(f"{name}: broken link {link}#{anchor}")


def check_code(notebook, s, name):
    "Raise unless every line that the notebook exports can be read on its page."
    shown = {" ".join(line.split()) for line in html.unescape(re.sub(r"<[^>]+>", "", s)).splitlines()}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] != "code" or not re.match(r"#\|\s*exports?\b", text):
            continue
        for line in text.splitlines():
            if line.strip() and not line.startswith("#|") and " ".join(line.split()) not in shown:
                raise Problem(f"{name}: exported code that a reader does not see: {line.strip()!r}")


# ---- the page of public names

API_HEAD = """---
title: Public names
description: Every name of the package, and the page that says what it takes, gives and refuses.
---

Each name is imported from the package itself, `from ngc_etf import nearest_etf`, and loads only what it
needs. A name's link leads to its entry: shapes, units, errors and the equation are there, and around it the
lessons that use it. After the name come its parameters, those with a default in brackets.
"""


def parameters(obj):
    "A callable's parameters in short: those that must be given, then in brackets those that may."
    try:
        found = inspect.signature(obj).parameters.values()
    except (TypeError, ValueError):
        return ""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    names = [(stars.get(p.kind, "") + p.name, p.kind in stars or p.default is not p.empty) for p in found]
    must = ", ".join(n for n, free in names if not free)
    may = ", ".join(n for n, free in names if free)
    return f"({must}{', ' if must and may else ''}{f'[{may}]' if may else ''})"


def one_line(obj, name, source):
    "What a public name is, in one line: its docstring's first, or a constant's comment or content."
    if callable(obj):
        doc = (inspect.getdoc(obj) or "").split("\n")[0]
        if not doc:
            raise Problem(f"{name} has no docstring")
        return doc
    comment = re.search(rf"^{name}\s*=.*?#\s*(.+)$", source, flags=re.M)
    if comment:
        return comment[1]
    if isinstance(obj, (dict, tuple)) and all(isinstance(k, str) for k in obj):
        more = "" if len(obj) <= 12 else f", ... ({len(obj)} in all)"
        return ", ".join([*obj][:12]) + more
    return f"{type(obj).__name__} of {len(obj)}"


def entries(notebook):
    "The names that have an entry on a page: what nbdev's show_doc made a heading of."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    shown = ["".join(o.get("data", {}).get("text/markdown", "")) for c in cells for o in c.get("outputs", [])]
    return re.findall(r"^### (\w+)$", "\n".join(shown), flags=re.M)


def api_text(root, proc, pages):
    "The page of public names as Markdown, from the package and the processed notebooks."
    import ngc_etf

    home = {}
    for p in pages:
        first = "".join(json.loads((root / "nbs" / p).read_text(encoding="utf-8"))["cells"][0]["source"])
        if module := re.search(r"^#\|\s*default_exp\s+(\w+)", first, flags=re.M):
            home[module[1]] = p
    parts = [API_HEAD]
    for module, names in public_names(root).items():
        if not names:
            continue
        page = out_name(home[module])
        notebook = proc / page.replace(".html", ".ipynb")
        source = (root / "ngc_etf" / f"{module}.py").read_text(encoding="utf-8")
        parts.append(f"\n## {title_of(notebook)}\n\n[`ngc_etf.{module}`]({page})\n")
        for name in names:
            obj = getattr(ngc_etf, name)
            anchor = f"#{name.lower()}" if name in entries(notebook) else ""
            takes = f" `{parameters(obj)}`" if callable(obj) and parameters(obj) else ""
            says = html.escape(one_line(obj, name, source))
            parts.append(f"- [**{name}**]({page}{anchor}){takes}<br>{says}")
    return "\n".join(parts) + "\n"


# ---- the whole site


def stand_alone(out, online):
    "Pages that need neither network nor script for their equations, and link to each other, not to a host."
    # where nbdev links a symbol to; a site that is read offline links to itself
    link = rf"\[`([^`\]]+)`\]\({re.escape(online)}[^)]*\)"  # in a signature's comments links stay text
    private = r'<a href="[^"#]*#_\w+">(<code>.*?</code>)</a>'  # a helper has no entry to lead to
    pages = {}
    for f in sorted(out.rglob("*.html")):
        name = f.relative_to(out).as_posix()
        up = "../" * name.count("/")
        page = re.sub(link, r"`\1`", mathml(name, f.read_text(encoding="utf-8")))
        page = re.sub(private, r"\1", page.replace(f'href="{online}', f'href="{up}'))
        head = f'<link rel="icon" href="data:,"><link rel="stylesheet" href="{up}site.css"></head>'
        pages[name] = page.replace("</head>", head, 1)
    for name, page in methods_to_classes(out, pages).items():
        (out / name).write_text(page, encoding="utf-8")
        pages[name] = page
    return pages


def methods_to_classes(out, pages):
    "The pages, with links to a method that has no entry of its own made links to its class."
    found = {(out / name).resolve(): set(re.findall(r'\bid="([^"]+)"', s)) for name, s in pages.items()}

    def linked(name, page):
        def one(m):
            ids = found.get(((out / name).parent / m[1]).resolve(), ())
            return m[0] if m[2] in ids or m[3] not in ids else f'href="{m[1]}#{m[3]}"'

        return re.sub(r'href="([^"#:?]*\.html)#((\w+)\.\w+)"', one, page)

    return {name: linked(name, page) for name, page in pages.items()}


def name_types(root):
    """Make the names that modules import for type checkers alone known to nbdev, which evaluates annotations.

    The pages are made by spawned processes, which read this file as `__mp_main__`.
    """
    for path in sorted((root / "ngc_etf").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
                with contextlib.suppress(ImportError):
                    exec(compile(ast.Module(node.body, []), str(path), "exec"), vars(builtins))


def docs(root=ROOT):
    "Build the site into `_docs`."
    import ziamath  # for its font alone, so that equations look the same on every system
    from nbdev.config import get_config
    from nbdev.serve import proc_nbs

    pages, proc, out = check_listed(root), root / "_proc", root / "_docs"
    os.environ["PYTHONWARNINGS"] = (
        "ignore:Found cells containing imports"  # a seed beside the imports is welcome
    )
    proc_nbs(str(root / "nbs"), force=True, n_workers=2)
    rename_pages(proc, pages)
    write_sidebar(proc)
    (proc / API).write_text(api_text(root, proc, pages), encoding="utf-8")
    command = [sys.executable, "-m", "smalldocs.cli", "render", "--strict", "--quiet", str(proc)]
    subprocess.run(command, check=True)
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(proc / "_docs", out)
    for f in out.rglob("*.css"):
        css = f.read_text(encoding="utf-8")
        f.write_text(re.sub(r"@import\s+url\([^)]*//[^)]*\);", "", css), encoding="utf-8")
    (out / "site.css").write_text(CSS)
    shutil.copy(Path(ziamath.__file__).parent / "fonts" / FONT, out)
    if missing := [p for p in pages if not (out / out_name(p)).exists()]:
        raise Problem(f"no page was made of {', '.join(missing)}")
    online = get_config(cfg_name="settings.ini", path=root)
    done = stand_alone(out, f"{online.doc_host}{online.doc_baseurl}/")
    for name, s in done.items():
        check_page(out, s, name)
    for p in pages:
        check_code(root / "nbs" / p, done[out_name(p)], out_name(p))
    print(f"{len(done)} pages: {out / 'index.html'}")


# ---- README.md


def chapters(root=ROOT):
    "The list of the book's parts and chapters for README.md, which has no sidebar: lines of 110 characters."
    config = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))
    lines = ["## Chapters", ""]

    def part(section):
        inner = [x for x in section["contents"] if isinstance(x, dict)]
        pages = [x for x in section["contents"] if isinstance(x, str) and x.endswith(".ipynb")]
        line = f"- **{section['section']}**:"
        for i, page in enumerate(pages):
            title = first_line(root / "nbs" / page)
            word = f"[{numbered(page, title)}](nbs/{page})" + ("," if i < len(pages) - 1 else "")
            if len(line) + len(word) < 109:
                line += f" {word}"
            else:
                lines.append(line)
                line = f"  {word}"
        lines.append(line)
        for section in inner:
            part(section)

    for x in config["website"]["sidebar"]["contents"]:
        if isinstance(x, dict):
            part(x)
    return "\n".join(lines)


def first_line(notebook):
    "The title of a notebook that nbdev has not processed."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    text = next("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return text.splitlines()[0].removeprefix("# ")


def readme_text(root=ROOT):
    "README.md as `nbs/index.ipynb` has it, with links and pictures that work from the top of the repository."
    from execnb.nbio import read_nb
    from nbconvert import MarkdownExporter
    from nbdev.process import NBProcessor
    from nbdev.processors import FilterDefaults, add_links
    import nbformat

    nb = read_nb(root / "nbs" / "index.ipynb")
    NBProcessor(nb=nb, procs=[p for p in FilterDefaults().base_procs() if p is not add_links]).process()
    front = yaml.safe_load("".join(nb.cells[0].source).strip().strip("-"))
    cells = [
        {k: v for k, v in c.items() if k in ("cell_type", "metadata", "source", "outputs", "execution_count")}
        for c in nb.cells[1:]
    ]
    for c in cells:
        c["source"] = re.sub(r"^#\|.*\n?", "", "".join(c["source"]), flags=re.M)
    python = {"language_info": {"name": "python"}}  # the language of the code boxes
    body, res = MarkdownExporter().from_notebook_node(
        nbformat.reads(
            json.dumps({"cells": cells, "metadata": python, "nbformat": 4, "nbformat_minor": 4}), as_version=4
        )
    )
    if res["outputs"]:
        where = "save it under nbs/images and link it"
        raise Problem(f"nbs/index.ipynb stores a picture in an output; GitHub shows only files: {where}")
    s = f"# {front['title']}\n\n> {front['description']}\n\n{body}"
    s = re.sub(r"(\]\(|src=\")(?=(?:images/|[\w./-]+\.ipynb))", r"\1nbs/", s)
    s = s.replace("<!-- chapters -->", chapters(root)).replace('"../results"', '"results"')
    for link in re.findall(r"(?:\]\(|src=\")(nbs/[^)\"#]+)", s):
        if not (root / link).exists():
            raise Problem(f"README.md would link to {link}, which does not exist")
    return re.sub(r"[ \t]+$", "", re.sub(r"\n{3,}", "\n\n", s), flags=re.M).strip() + "\n"


def readme(root=ROOT, check=False):
    "Write README.md, or with `check` only compare."
    new, f = readme_text(root), root / "README.md"
    if not check:
        f.write_text(new, encoding="utf-8")
    elif f.read_text(encoding="utf-8") != new:
        raise Problem("README.md is not what nbs/index.ipynb says: run `python .ci/project.py readme`")


# ---- ngc_etf/__init__.py

INIT = '''"""{about}"""

# AUTOGENERATED! DO NOT EDIT! `python .ci/project.py names` writes it from each module's __all__.

__version__ = "{version}"

import importlib

_MODULES = {{
{modules}
}}
_HOME = {{name: module for module, names in _MODULES.items() for name in names.split()}}
__all__ = [*_HOME]


def __getattr__(name):
    "A public name, from the module that is its home; nothing is imported before it is asked for."
    if name not in _HOME:
        raise AttributeError(f"module 'ngc_etf' has no attribute {{name!r}}")
    return getattr(importlib.import_module(f"ngc_etf.{{_HOME[name]}}"), name)


def __dir__():
    return sorted([*globals(), *_HOME])
'''


def public_names(root=ROOT):
    "{module: its public names}, in the order of the chapters."
    found = {}
    for path in sorted((root / "nbs").glob("*.ipynb")):
        first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        module = re.search(r"^#\|\s*default_exp\s+(\w+)", first, flags=re.M)
        if module is None:
            continue
        tree = ast.parse((root / "ngc_etf" / f"{module[1]}.py").read_text(encoding="utf-8"))
        assigned = [n for n in tree.body if isinstance(n, ast.Assign)]
        values = [n.value for n in assigned if ast.unparse(n.targets[0]) == "__all__"]
        found[module[1]] = ast.literal_eval(values[0]) if values else []
    return found


def init_text(root=ROOT):
    "ngc_etf/__init__.py as it should be; a `Problem` where a name has two homes, or is a module's."
    config = ConfigParser(delimiters=["="])
    config.read(root / "settings.ini", encoding="utf-8")
    found, seen = public_names(root), {}
    for module, names in found.items():
        for name in names:
            if name in found:
                raise Problem(f"{name}, public in {module}, is also a module's name, which would hide it")
            if name in seen:
                raise Problem(f"{name} is public in {seen[name]} and in {module}")
            seen[name] = module
    modules = "\n".join(f'    "{m}": "{" ".join(names)}",' for m, names in found.items() if names)
    about = config["DEFAULT"]["description"]
    return INIT.format(about=about, version=config["DEFAULT"]["version"], modules=modules)


def names(root=ROOT, check=False):
    "Write ngc_etf/__init__.py, or with `check` only compare."
    new, f = init_text(root), root / "ngc_etf" / "__init__.py"
    if not check:
        f.write_text(new, encoding="utf-8")
    elif f.read_text(encoding="utf-8") != new:
        raise Problem("ngc_etf/__init__.py does not list the public names: run `python .ci/project.py names`")


if __name__ == "__mp_main__":
    name_types(ROOT)

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["docs", "names", "readme"])
    p.add_argument("--check", action="store_true", help="with readme: compare, write nothing")
    a = p.parse_args()
    os.chdir(ROOT)  # nbdev finds settings.ini from here
    sys.path.insert(0, str(ROOT))
    try:
        if a.what == "docs":
            docs()
        else:
            {"readme": readme, "names": names}[a.what](check=a.check)
    except (Problem, OSError, subprocess.CalledProcessError) as e:
        sys.exit(f"{a.what}: {e}")
