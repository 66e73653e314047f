"The map of the paper names every equation, figure and table; chapters depend on earlier ones only."

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))  # the tutorials, in a folder of their own, export nothing
MAP = ROOT / "nbs" / "00_notation.ipynb"
LINK = re.compile(r"\]\(([^)#\s]+\.ipynb)(?:#[^)]*)?\)")


def cells(path, kind):
    "The sources of a notebook's cells of one kind."
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in found if c["cell_type"] == kind]


def rows(heading):
    "(first column, last column) of the table below a heading of the map."
    (cell,) = (c for c in cells(MAP, "markdown") if c.startswith(heading))
    lines = [line.strip("|").split(" | ") for line in cell.splitlines() if line.startswith("|")]
    return [(line[0].strip(), line[-1].strip()) for line in lines[2:]]


def numbers(text, kind):
    "The numbers that follow `kind` (Eq, Fig, Table) in a text: 'Figs. 2, 3; Table 3' holds figures 2 and 3."
    found = re.findall(rf"\b{kind}s?\.? ((?:\d+(?:, )?)+)", text)
    return [int(n) for run in found for n in re.findall(r"\d+", run)]


def equations():
    return [(f"Eq. {first}", last) for first, last in rows("## The map: equations")]


def figures():
    return rows("## The map: figures and tables")


@pytest.mark.parametrize(
    "table, kind, last", [(equations, "Eq", 49), (figures, "Fig", 18), (figures, "Table", 3)]
)
def test_every_item_of_the_paper_is_in_the_map(table, kind, last):
    assert sorted(n for first, _ in table() for n in numbers(first, kind)) == list(range(1, last + 1))


def test_every_line_of_the_map_leads_to_a_chapter_that_exists():
    for first, last in (*equations(), *figures(), *rows("## The map: what has no number")):
        links = LINK.findall(last)
        assert links, f"no link for {first}"
        assert [x for x in links if not (MAP.parent / x).exists()] == []


def test_a_chapter_of_the_map_speaks_of_its_equations():
    "One of the chapters that the map names for an equation mentions it by its number."
    silent = []
    for first, last in equations():
        texts = []
        for link in LINK.findall(last):
            path = MAP.parent / link
            texts += cells(path, "markdown") + cells(path, "code")
        told = set(mentioned("\n".join(texts)))
        silent += [n for n in numbers(first, "Eq") if n not in told]
    assert silent == []


NUMBERED = re.compile(r"\b(?:Eqs?\.|[Ee]quations?)[\s~]*((?:\d+(?:\s*(?:-|–|,|and|,\s*and)\s*)?)+)")
IN_BRACKETS = re.compile(r"\((\d\d)\)|[Pp]roblem \((\d)\)|\\tag\{(\d+)\}")


def mentioned(text):
    "Numbers of equations in running text: 'Eqs. 20-23, 32', 'Equation 28', 'the sum (36)', 'problem (7)'."
    for run in NUMBERED.findall(text):
        yield from expand(run)
    for found in IN_BRACKETS.findall(text):
        yield from (int(n) for n in found if n)


def expand(run):
    "'20-23, 32' -> 20, 21, 22, 23, 32."
    for first, last in re.findall(r"(\d+)(?:\s*[-–]\s*(\d+))?", run):
        yield from range(int(first), int(last or first) + 1)


def test_the_order_of_reading_is_the_order_of_dependence():
    "A module imports only from modules whose notebooks come earlier by file name."
    place = {}
    for i, path in enumerate(NOTEBOOKS):
        for source in cells(path, "code"):
            for module in re.findall(r"^#\|\s*default_exp\s+(\w+)", source, flags=re.M):
                place[module] = i
    wrong = []
    for module, i in place.items():
        tree = ast.parse((ROOT / "ngc_etf" / f"{module}.py").read_text(encoding="utf-8"))
        wrong += [f"{module} imports {m}" for m in imported(tree) if place.get(m, -1) >= i]
    assert len(place) > 20 and wrong == []


def imported(tree):
    "The modules of this package that a module imports, anywhere in its text."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = f"ngc_etf.{node.module or ''}".rstrip(".") if node.level else node.module
            names = [base] if base != "ngc_etf" else [f"ngc_etf.{name.name}" for name in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("ngc_etf."))


LAST = [i for i, path in enumerate(NOTEBOOKS) if path.stem == "91_deviations"][0]  # leads back to the map


@pytest.mark.parametrize("i", range(LAST))
def test_next_is_the_next_chapter(i):
    "A chapter that says what comes next means the one that does."
    ends = [c for c in cells(NOTEBOOKS[i], "markdown") if "**Next" in c]
    assert [LINK.findall(c.split("**Next")[1])[0] for c in ends] in ([], [NOTEBOOKS[i + 1].name])
