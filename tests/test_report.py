"The report and its tables on folders of invented rows: damage, other experiments' names, files in the three languages."

import json, re
import numpy as np
import pandas as pd
import pytest

from ngc_etf.experiment import EXPERIMENTS, Experiment, get_experiment
from ngc_etf.tables import PAPER, TITLES, accuracy_table, compared, coverage, order_verdict
from ngc_etf.report import all_tables, report_main, write_tables
from ngc_etf.rows import check_rows, load_rows


def store(folder, exp, epochs=None, top1=0.5, C=10, **told):
    "A run's rows, margins and description as the runner writes them; `told` changes the description alone."
    t = np.array(epochs if epochs is not None else [e for e in range(1, exp.epochs + 1) if exp.due(e)])
    base = folder / exp.stem
    base.parent.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame(
        {
            "experiment": exp.name,
            "method": exp.method,
            "seed": exp.seed,
            "epoch": t,
            "train_loss": 1 / t,
            "train_top1": top1,
            "nc1": 1.0,
            "nc3": 1.0,
            "equinorm": 1.0,
            "margin": 0.5,
            "test_loss": 1.0,
            "test_top1": top1 - 0.1,
        }
    )
    frame.to_csv(f"{base}.csv", index=False)
    pd.DataFrame(
        {
            "experiment": exp.name,
            "method": exp.method,
            "seed": exp.seed,
            "rank": range(5),
            "of": 5,
            "margin": 0.1,
        }
    ).to_csv(f"{base}.margins.csv", index=False)
    (folder / f"{exp.stem}.json").write_text(
        json.dumps({"experiment": exp.told | told, "C": C, "environment": {}})
    )
    return folder / f"{exp.stem}.csv"


def fails(*argv):
    with pytest.raises(SystemExit) as e:
        report_main([*map(str, argv)])
    return str(e.value.code)


def test_the_papers_numbers_are_those_of_its_prose():
    "Figures that the paper's issue lists apart from its tables: medians at epoch 50, train."
    said = {
        "cifar10-resnet18": (87.42, 86.89, 88.71),
        "cifar10-vgg13": (93.59, 76.66, 95.69),
        "cifar100-resnet50": (58.47, 63.93, 72.15),
        "cifar100-vgg13": (82.00, 81.14, 88.39),
        "stl10-resnet50": (83.86, 86.76, 93.54),
        "stl10-vgg13": (82.66, 83.60, 90.14),
        "imagenet-resnet50": (58.35, 70.44, 74.09),
    }
    assert {e: tuple(PAPER["train", e, m, 50].median for m in compared(e)) for e in TITLES} == said


def test_a_whole_row_with_five_seeds(tmp_path):
    for m, shift in (("standard", 0.0), ("fixed", -0.02), ("nearest", 0.02)):
        for seed in range(5):
            store(
                tmp_path, get_experiment("cifar10-resnet18", method=m, seed=seed), top1=0.8 + shift + 0.001 * seed
            )
    rows, _, about = load_rows(tmp_path)
    tables = all_tables(rows, about)
    ours = tables["table1"][2].set_index(["data set/network", "method"])["epoch 50, ours"]["CIFAR10/ResNet18"]
    assert str(ours["nearest"]) == "82.20 [82.0, 82.4] (5)" and str(ours["fixed"]) == "78.20 [78.0, 78.4] (5)"
    verdicts = tables["verdicts"][2].set_index("data set/network").loc["CIFAR10/ResNet18"]
    assert verdicts["train 50"] == "nearest > standard > fixed; as in the paper (seeds: 5)"
    assert verdicts["train 200"] == "nearest > standard > fixed; paper: nearest > fixed > standard (seeds: 5)"
    assert check_rows(tmp_path) == []


def test_imagenet_stands_beside_the_head_without_its_gradient(tmp_path):
    name = "imagenet-resnet50"
    for method, top1 in (("nearest", 0.9), ("nearest-no-ddn", 0.8)):
        store(tmp_path, Experiment(name, "digits", "resnet50", method=method, epochs=50), top1=top1, C=1000)
    table = (
        accuracy_table(load_rows(tmp_path)[0], "train")
        .set_index(["data set/network", "method"])
        .loc["ImageNet/ResNet50"]
    )
    assert list(table.index) == ["standard", "fixed", "nearest-no-ddn", "nearest"]
    assert (
        table["epoch 50, ours"]["nearest-no-ddn"].median == 80
        and table["epoch 50, paper"]["nearest-no-ddn"].median == 74.09
    )
    assert table["epoch 50, ours"]["nearest"].median == 90 and table["epoch 50, paper"]["nearest"] is None


def test_no_other_epoch_and_no_other_settings_stand_in(tmp_path):
    store(tmp_path, get_experiment("cifar10-vgg13", method="fixed"), epochs=[1, 49, 51, 199])
    store(tmp_path, get_experiment("cifar10-vgg13", method="nearest", tau=3.0))
    store(tmp_path, get_experiment("cifar10-vgg13", method="standard", precision="bf16", epochs=50))
    rows, _, about = load_rows(tmp_path)
    told = all_tables(rows, about)
    assert [
        c is None for c in told["table2"][2].query("`data set/network` == 'CIFAR10/VGG13'")["epoch 50, ours"]
    ] == [False, True, True]
    assert [
        c is None for c in told["table2"][2].query("`data set/network` == 'CIFAR10/VGG13'")["epoch 200, ours"]
    ] == [True] * 3
    listed = coverage(rows, about).set_index("method")
    assert listed["last epoch"].to_dict() == {
        "standard": "50 of 50",
        "fixed": "199 of 200",
        "nearest": "200 of 200",
    }
    assert (
        "left out" in listed["changed settings"]["nearest"]
        and listed["changed settings"]["standard"] == "epochs=50, precision=bf16"
    )


def test_other_experiments_and_stray_files(tmp_path, capsys):
    store(tmp_path / "a", Experiment("digits-net-lt", "digits", "digits", method="fixed", epochs=3))
    store(tmp_path / "b", Experiment("folder", "digits", "resnet18", method="standard", epochs=3), C=7)
    old = store(tmp_path, get_experiment("digits-net", epochs=3))
    about = json.loads(old.with_suffix(".json").read_text())
    for field in ("tau", "seed", "method", "clean"):
        del about["experiment"][field]  # a description from before these fields
    old.with_suffix(".json").write_text(json.dumps(about))
    for stray in (
        "digits-net/nearest-s0.ckpt",
        "digits-net/fixed-s0.csv.part",
        "digits-net/fixed-s0.ckpt.part",
        "notes.txt",
    ):
        (tmp_path / stray).write_bytes(b"\0not rows")
    report_main(
        [
            "--rows",
            str(tmp_path),
            "--out",
            str(tmp_path / "report"),
            "--tables",
            str(tmp_path / "tables"),
            "--figures",
            str(tmp_path / "figures"),
        ]
    )
    said = capsys.readouterr().out
    assert all(f"\n{name}: " in said for name in ("digits-net", "digits-net-lt", "folder"))
    assert sorted(f.name for f in (tmp_path / "figures").iterdir()) == [
        "digits-net-lt.png",
        "digits-net.png",
        "folder.png",
    ]
    page = (tmp_path / "report" / "index.html").read_text()
    assert (
        "No run here belongs to Tables 1 and 2" in page
        and "not a known experiment" in page
        and "://" not in page
    )
    assert "| folder | standard | 0 | 3 of 3 |" in (tmp_path / "tables" / "coverage.md").read_text()


def cut(text):
    return text[:-20]


def twice(text):
    return text + text.splitlines(True)[-1]


def hole(text):
    return "".join(l for i, l in enumerate(text.splitlines(True)) if i != 4)


def short(text):
    return "".join(text.splitlines(True)[:-2])


def other_seed(text):
    return text.replace("nearest,0", "nearest,1")


def empty(text):
    return ""


@pytest.mark.parametrize(
    "damage, says",
    [
        (cut, "is damaged: a line is cut"),
        (twice, "double rows in"),
        (hole, "missing in"),
        (short, "it ends at epoch 8 of 10"),
        (other_seed, "is damaged: its rows are not those of"),
        (empty, "cannot be read as rows"),
    ],
)
def test_check_names_each_kind(damage, says, tmp_path):
    path = store(tmp_path, get_experiment("digits-net", epochs=10))
    assert check_rows(tmp_path) == []
    path.write_text(damage(path.read_text()))
    (complaint,) = check_rows(tmp_path)
    assert says in complaint and str(path) in complaint
    assert complaint in fails("--rows", tmp_path, "--check")


def test_check_complains_about_all_at_once(tmp_path):
    paths = [
        store(tmp_path, get_experiment("digits-net", method=m, epochs=10))
        for m in ("standard", "fixed", "nearest")
    ]
    for path, damage in zip(paths, (cut, twice, hole)):
        path.write_text(damage(path.read_text()))
    (tmp_path / "copy").mkdir()
    for suffix in (".csv", ".json"):
        (tmp_path / "copy" / f"n{suffix}").write_text(paths[2].with_suffix(suffix).read_text())
    said = fails("--rows", tmp_path, "--check")
    assert "4 complaints" in said and all(
        w in said
        for w in ("a line is cut", "double rows in", "both hold digits-net/nearest-s0", "missing in")
    )


@pytest.mark.parametrize(
    "text", ["{", "{}", "[]", '{"experiment": {}, "C": 10}', '{"experiment": {"name": "digits-net"}}']
)
def test_damaged_descriptions_are_named(text, tmp_path):
    path = store(tmp_path, get_experiment("digits-net", epochs=3))
    path.with_suffix(".json").write_text(text)
    assert f"{path} has no readable description beside it" in fails(
        "--rows", tmp_path, "--out", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()


def test_a_description_of_another_version_is_said(tmp_path):
    store(tmp_path, get_experiment("digits-net", epochs=3), field_of_the_future=1)
    (complaint,) = check_rows(tmp_path)
    assert "another version" in complaint and "field_of_the_future" in complaint
    assert (
        complaint in fails("--rows", tmp_path, "--out", tmp_path / "out") and not (tmp_path / "out").exists()
    )


def test_a_description_that_is_none_is_said(tmp_path):
    store(tmp_path, get_experiment("digits-net", epochs=3), precision="fp3")
    (complaint,) = check_rows(tmp_path)
    assert "is not one of ours: precision must be one of" in complaint


def test_check_against_a_suite(tmp_path, monkeypatch):
    monkeypatch.setitem(
        __import__("ngc_etf.experiment", fromlist=["SUITES"]).SUITES,
        "small",
        [("digits-net", "fixed"), ("digits-net", "nearest", 3)],
    )
    store(tmp_path, get_experiment("digits-net", method="fixed", epochs=EXPERIMENTS["digits-net"].epochs))
    store(tmp_path, get_experiment("digits-net", method="nearest", seed=3, epochs=10))
    assert check_rows(tmp_path, "small") == [
        "missing for suite small: digits-net/nearest-s3 beyond epoch 10 of 30"
    ]
    assert "missing for suite small: digits-net/fixed-s1" in check_rows(tmp_path, "small", seeds=2)
    said = fails("--rows", tmp_path, "--check", "--suite", "small")
    assert said.startswith("ngc_report: 1 complaint") and "nearest-s3" in said
    assert "suite must be one of" in fails("--rows", tmp_path, "--check", "--suite", "none")


def test_runs_that_do_not_belong_together(tmp_path):
    store(tmp_path, get_experiment("digits-net", method="fixed", epochs=3))
    store(tmp_path, get_experiment("digits-net", method="nearest", epochs=3, tau=3.0))
    assert "the runs of digits-net do not belong together" in fails(
        "--rows", tmp_path, "--out", tmp_path / "out"
    )


def test_tables_are_well_formed(tmp_path):
    store(tmp_path, get_experiment("stl10-vgg13", method="standard", epochs=50))
    rows, _, about = load_rows(tmp_path)
    files = write_tables(rows, about, tmp_path / "tables")
    assert sorted(f.name for f in files) == sorted(
        f"{n}.{e}" for n in ("table1", "table2", "verdicts", "coverage") for e in ("md", "tex", "html")
    )
    for f in files:
        text = f.read_text()
        if f.suffix == ".tex":
            bare = re.sub(r"\\.", "", text)
            assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0
            assert [
                text.count(w)
                for w in (
                    r"\toprule",
                    r"\bottomrule",
                    r"\begin{table}",
                    r"\end{table}",
                    r"\begin{tabular}",
                    r"\end{tabular}",
                )
            ] == [1] * 6
        if f.suffix == ".md":
            assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
        if f.suffix == ".html":
            assert text.count("<table") == text.count("</table>") == 1 and text.count("<tr") == text.count(
                "</tr>"
            )


def test_no_verdict_without_rows():
    paper = {m: PAPER["train", "imagenet-resnet50", m, 50] for m in compared("imagenet-resnet50")}
    assert (
        order_verdict(paper | {"nearest-no-ddn": None}, paper) == "no verdict: missing rows of nearest-no-ddn"
    )
    assert order_verdict(paper, paper) == "nearest-no-ddn > fixed > standard; as in the paper (seeds: 5)"
