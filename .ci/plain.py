"""Are the lines plain? One statement a line and a name for each idea; ruff adds the width and unused names.

plain.py [FILE ...]     notebooks and Python files; all of nbs, tests and .ci when none is named
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHORT = (ast.Raise, ast.Return, ast.Continue, ast.Break)  # may stand behind the colon of an `if`


def sources(path):
    "(name of the place, source, whether it is a notebook's cell) for each piece of code in a file."
    if path.suffix != ".ipynb":
        return [("", path.read_text(encoding="utf-8"), False)]
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [
        (f"cell {i}: ", "".join(c["source"]), True) for i, c in enumerate(cells) if c["cell_type"] == "code"
    ]
    return [(place, re.sub(r"(?m)^[%!].*$", "", s), nb) for place, s, nb in code]


def blocks(tree):
    "Every list of statements of a syntax tree, with the node that it belongs to and the field's name."
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            if isinstance(getattr(node, field, None), list):
                yield node, field, getattr(node, field)


def crowded(tree, text):
    "Lines that hold more than one statement, or a body behind a colon."
    lines = text.splitlines()
    for node, field, body in blocks(tree):
        for a, b in zip(body, body[1:]):
            if a.end_lineno == b.lineno:
                yield b.lineno, "two statements on one line"
        if not body or isinstance(node, (ast.Module, ast.Lambda, ast.IfExp)):
            continue
        head = lines[body[0].lineno - 1][: body[0].col_offset].strip()
        if head.endswith(":"):
            fine = (
                isinstance(node, ast.If) and field == "body" and isinstance(body[0], SHORT) and len(body) == 1
            )
            if not fine:
                yield body[0].lineno, "a body behind a colon"


def contorted(tree, notebook):
    "Constructions that say one thing and do another."
    last = tree.body[-1] if tree.body else None
    loops = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for x in (*node.args, *(k.value for k in node.keywords)):
                if isinstance(x, ast.NamedExpr):
                    yield x.lineno, "an argument passed by a walrus"
        if isinstance(node, ast.For) and any(isinstance(x, ast.Lambda) for x in ast.walk(node.iter)):
            yield node.lineno, "lambdas in the header of a for"
        if isinstance(node, ast.Expr) and isinstance(node.value, loops) and not (notebook and node is last):
            yield node.lineno, "a comprehension for its side effect"


def complaints(path):
    "Everything about a file's lines that is not plain."
    for place, text, notebook in sources(path):
        where = f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}: {place}"
        tree = ast.parse(text)
        for i, what in (*crowded(tree, text), *contorted(tree, notebook)):
            yield f"{where}{i}: {what}"


def files():
    "All notebooks and Python files that people write."
    found = [
        *ROOT.glob("nbs/**/*.ipynb"),
        *ROOT.glob("tests/*.py"),
        *ROOT.glob(".ci/*.py"),
        ROOT / "setup.py",
    ]
    return sorted(f for f in found if "_proc" not in f.parts and ".ipynb_checkpoints" not in f.parts)


def main(argv=None):
    "Print complaints and ruff's; the exit status is 1 where there are any."
    paths = [Path(a).resolve() for a in (sys.argv[1:] if argv is None else argv)] or files()
    said = [c for path in paths for c in complaints(path)]
    print("\n".join(said))
    ruff = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--config", ROOT / ".ci" / "ruff.toml", *paths]
    )
    return 1 if said or ruff.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
