"Figures, tables, claims and report on invented rows, which are never shown: damage, files, verdicts."

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ngc_etf.claims import (
    _constant_rate,
    _convergence,
    _decaying_alpha,
    _more_at_the_margin,
    _stable_start,
)
from ngc_etf.data import load_data, with_long_tail
from ngc_etf.experiment import Experiment
from ngc_etf.figures import curve, panels, save_figure
from ngc_etf.floor import cross_entropy_floor
from ngc_etf.judgement import CLAIMS, judge, sentences
from ngc_etf.known import EXPERIMENTS, get_experiment
from ngc_etf.outcomes import coverage, floor_of, summary, sweep_table
from ngc_etf.reading import check_rows, load_rows
from ngc_etf.render import as_markdown
from ngc_etf.report import report_main, write_tables
from ngc_etf.rules import read_evidence
from ngc_etf.tables import _TITLES, PAPER, _compared, _verdict, accuracy_table, verdict_table

ROOT = Path(__file__).resolve().parent.parent


def store(folder, exp, epochs=None, top1=0.5, C=10, **changes):
    "A run's rows, margins and description as the runner writes them; `changes` of the description alone."
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
        json.dumps({"experiment": exp.as_json | changes, "C": C, "environment": {}})
    )
    return folder / f"{exp.stem}.csv"


def fails(*argv):
    with pytest.raises(SystemExit) as e:
        report_main([*map(str, argv)])
    return str(e.value.code)


def test_the_papers_numbers_are_those_of_its_prose():
    "Figures that the paper's issue lists apart from its tables: medians at epoch 50, train."
    prose = {
        "cifar10-resnet18": (87.42, 86.89, 88.71),
        "cifar10-vgg13": (93.59, 76.66, 95.69),
        "cifar100-resnet50": (58.47, 63.93, 72.15),
        "cifar100-vgg13": (82.00, 81.14, 88.39),
        "stl10-resnet50": (83.86, 86.76, 93.54),
        "stl10-vgg13": (82.66, 83.60, 90.14),
        "imagenet-resnet50": (58.35, 70.44, 74.09),
    }
    assert {e: tuple(PAPER["train", e, m, 50].median for m in _compared(e)) for e in _TITLES} == prose


def test_a_whole_row_with_five_seeds(tmp_path):
    for m, shift in (("standard", 0.0), ("fixed", -0.02), ("nearest", 0.02)):
        for seed in range(5):
            store(
                tmp_path,
                get_experiment("cifar10-resnet18", method=m, seed=seed),
                top1=0.8 + shift + 0.001 * seed,
            )
    rows, _, about = load_rows(tmp_path)
    table1 = accuracy_table(rows, about, "train")
    ours = table1.set_index(["data set/network", "method"])["epoch 50, ours"]["CIFAR10/ResNet18"]
    assert str(ours["nearest"]) == "82.20 [82.0, 82.4] (5)" and str(ours["fixed"]) == "78.20 [78.0, 78.4] (5)"
    verdicts = verdict_table(rows, about).set_index("data set/network").loc["CIFAR10/ResNet18"]
    assert verdicts["train 50"] == "nearest > standard > fixed; as in the paper (seeds: 5)"
    assert verdicts["train 200"] == "nearest > standard > fixed; paper: nearest > fixed > standard (seeds: 5)"
    assert check_rows(tmp_path) == []


def test_imagenet_stands_beside_the_head_without_its_gradient(tmp_path):
    name = "imagenet-resnet50"
    for method, top1 in (("nearest", 0.9), ("nearest-no-ddn", 0.8)):
        store(tmp_path, get_experiment(name, method=method, epochs=50), top1=top1, C=1000)
    rows, _, about = load_rows(tmp_path)
    table = accuracy_table(rows, about, "train").set_index(["data set/network", "method"])
    table = table.loc["ImageNet/ResNet50"]
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
    table2 = accuracy_table(rows, about, "test").query("`data set/network` == 'CIFAR10/VGG13'")
    assert [c is None for c in table2["epoch 50, ours"]] == [False, True, True]
    assert [c is None for c in table2["epoch 200, ours"]] == [True] * 3
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
    printed = capsys.readouterr().out
    assert all(f"\n{name}: " in printed for name in ("digits-net", "digits-net-lt", "folder"))
    figures = sorted(f.name for f in (tmp_path / "figures").iterdir())
    assert figures == [f"{n}.{e}" for n in ("digits-net-lt", "digits-net", "folder") for e in ("png", "svg")]
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
        (empty, "is damaged: it is empty"),
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
    message = fails("--rows", tmp_path, "--check")
    assert "4 complaints" in message and all(
        w in message
        for w in ("a line is cut", "double rows in", "both hold digits-net/nearest-s0", "missing in")
    )


def test_reading_names_the_first_of_many(tmp_path):
    "A folder copied into itself holds every run twice; nobody reads four hundred sentences."
    for seed in range(7):
        store(tmp_path / "rows", get_experiment("digits-net", epochs=10, seed=seed))
    shutil.copytree(tmp_path / "rows", tmp_path / "copy")
    with pytest.raises(ValueError, match=r"double rows.*; and 2 more$") as e:
        load_rows(tmp_path)
    assert str(e.value).count("both hold") == 5


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
        __import__("ngc_etf.known", fromlist=["SUITES"]).SUITES,
        "small",
        [("digits-net", "fixed"), ("digits-net", "nearest", 2)],
    )
    store(tmp_path, get_experiment("digits-net", method="fixed", epochs=EXPERIMENTS["digits-net"].epochs))
    store(tmp_path, get_experiment("digits-net", method="nearest", seed=1, epochs=10))
    beyond = "missing for suite small: digits-net/nearest-s1 beyond epoch 10 of 30"
    absent = "missing for suite small: digits-net/nearest-s0"
    assert sorted(check_rows(tmp_path, "small")) == [absent, beyond]
    assert "missing for suite small: digits-net/fixed-s1" in check_rows(tmp_path, "small", seeds=2)
    message = fails("--rows", tmp_path, "--check", "--suite", "small")
    assert message.startswith("ngc_report: 2 complaint") and "nearest-s1" in message
    assert "suite must be one of" in fails("--rows", tmp_path, "--check", "--suite", "none")
    assert "--seeds N, at least 1, goes with --suite" in fails("--rows", tmp_path, "--check", "--seeds", "2")


def test_runs_that_do_not_belong_together(tmp_path):
    store(tmp_path, get_experiment("digits-net", method="fixed", epochs=3))
    store(tmp_path, get_experiment("digits-net", method="nearest", epochs=3, tau=3.0))
    assert "the runs of digits-net do not belong together" in fails(
        "--rows", tmp_path, "--out", tmp_path / "out"
    )


def test_tables_are_well_formed(tmp_path):
    store(tmp_path, get_experiment("stl10-vgg13", method="standard", epochs=50))
    files = write_tables(tmp_path / "tables", read_evidence(tmp_path))
    names = ("claims", "table1", "table2", "leaders", "table3", "figures", "coverage")
    assert sorted(f.name for f in files) == sorted(f"{n}.{e}" for n in names for e in ("md", "tex", "html"))
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
            assert text.count("<table") == text.count("</table>") <= 1
            assert text.count("<tr") == text.count("</tr>")


def test_no_verdict_without_rows():
    paper = {m: PAPER["train", "imagenet-resnet50", m, 50] for m in _compared("imagenet-resnet50")}
    assert _verdict(paper | {"nearest-no-ddn": None}, paper) == "no verdict: not run: nearest-no-ddn"
    assert _verdict(paper, paper) == "nearest-no-ddn > fixed > standard; as in the paper (seeds: 5)"


# ---- figures


def test_a_single_epoch_has_a_table_and_no_panels(tmp_path):
    for method in ("standard", "nearest"):
        store(tmp_path, get_experiment("cifar10-vgg13", method=method), epochs=[1])
    report_main(["--rows", str(tmp_path), "--out", str(tmp_path / "out"), "--figures", str(tmp_path / "f")])
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "<figure>" not in page and "Not run: fixed." in page and not (tmp_path / "f").exists()


def test_what_was_not_run_is_said_in_words():
    ax = curve(pd.DataFrame(columns=["method", "seed", "epoch", "nc1"]), "epoch", "nc1")
    assert [t.get_text() for t in ax.texts] == ["not run"]


def test_what_runs_did_not_write_down_is_not_called_not_run(tmp_path):
    "Rows of an older program have fewer columns, and not every run keeps its margins."
    for seed in range(2):
        store(tmp_path, get_experiment("digits-net", seed=seed), epochs=[1, 2])
    rows = load_rows(tmp_path)[0].drop(columns="nc1")
    fig = panels(rows, pd.DataFrame(columns=["method", "seed", "margin"]), 10)
    words = {ax.get_title(): [t.get_text() for t in ax.texts] for ax in fig.axes}
    assert words["(c) margins at the end"] == words["(d) NC1"] == ["not recorded"]
    assert words["(a) cross-entropy"] == []


def test_sweeps_of_one_field_are_told_apart(tmp_path):
    for tau, delta in itertools.product((5.0, 10.0), (1e-3, 1e-2)):
        changes = {"tau": tau, "delta": delta, "tag": f"{tau}-{delta}"}
        store(tmp_path, get_experiment("ufm-10", **changes), epochs=[1, 2])
    store(tmp_path, get_experiment("digits-net"), epochs=[1, 2])
    store(tmp_path, get_experiment("digits-net", delta=0.1, tag="b"), epochs=[1, 2])
    rows, _, about = load_rows(tmp_path)
    rows.loc[rows.experiment.str.startswith("ufm"), "test_top1"] = np.nan  # free features have no test set
    table = sweep_table(rows, about, "delta").set_index("data")
    assert {*table.loc["ufm-10", "with"]} == {"tau=5.0", "tau=10.0"}
    assert {*table.loc["digits", "with"]} == {"-"}
    assert "not run" not in as_markdown(table.reset_index())


def test_lines_are_medians_and_bands_ranges(tmp_path):
    for seed, top1 in enumerate((0.2, 0.9, 0.4)):
        store(tmp_path, get_experiment("digits-net", seed=seed, epochs=10), top1=top1)
    ax = curve(load_rows(tmp_path)[0], "epoch", "train_top1")
    assert set(ax.lines[0].get_ydata()) == {0.4}
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == 0.2 and band.max() == 0.9


def test_letters_are_legible_and_clear_of_each_other(tmp_path):
    store(tmp_path, get_experiment("cifar10-resnet18", epochs=12))
    rows, margins, _ = load_rows(tmp_path)
    fig = panels(rows, margins, 10, 0.05)
    fig.canvas.draw()
    assert len(fig.axes) == 8
    titles = [ax.title for ax in fig.axes]
    labels = [t for ax in fig.axes for t in (ax.xaxis.label, *ax.get_xticklabels()) if t.get_text()]
    assert {t.get_fontsize() for t in titles + labels} == {8.0}
    boxes = [label.get_window_extent() for label in labels]
    assert not any(title.get_window_extent().overlaps(box) for title in titles for box in boxes)
    svg, png = save_figure(fig, tmp_path / "panels")
    assert svg.suffix == ".svg" and png.stat().st_size < 100_000


@pytest.mark.parametrize(
    "name, method, floor",
    [
        ("ufm-10", "nearest", cross_entropy_floor(10)),
        ("ufm-100", "standard", cross_entropy_floor(100)),
        ("cifar10-resnet18", "fixed", cross_entropy_floor(10, relu=True)),
        ("cifar10-resnet18", "standard-no-norm", None),
    ],
)
def test_the_floor_is_that_of_the_cell(name, method, floor):
    exp = get_experiment(name, method=method)
    assert floor_of({"experiment": exp.as_json, "C": 100 if name == "ufm-100" else 10}) == floor


def test_a_long_tail_has_a_floor_of_its_own():
    methods = ("standard", "nearest", "fixed-haar", "fixed")
    exps = {m: get_experiment("cifar10-resnet18-lt", method=m).as_json for m in methods}
    floors = {m: floor_of({"experiment": exp, "C": 10}) for m, exp in exps.items()}
    assert floors["standard"] < floors["nearest"] == floors["fixed-haar"] < floors["fixed"]
    assert floors["fixed"] != cross_entropy_floor(10, relu=True)


def test_no_floor_lies_above_what_a_run_reached():
    "The nearest head turns its ETF, and behind a ReLU got below the floor of the canonical direction."
    evidence = read_evidence(ROOT / "results")
    last = evidence.rows.groupby(["experiment", "method", "seed"], as_index=False).last()
    for run in last.itertuples():
        floor = floor_of(evidence.about[f"{run.experiment}/{run.method}-s{run.seed}"])
        assert floor is None or run.train_loss > floor * (1 - 1e-6), run


@pytest.mark.parametrize("name, C", [("digits-net-lt", 10), ("clusters-50", 50)])
def test_the_floor_of_a_tail_counts_the_samples_that_are_there(name, C):
    exp = get_experiment(name, tail=100.0, method="fixed")
    y = with_long_tail(load_data(exp.data), 100).train[1]
    want = cross_entropy_floor(C, relu=True, counts=y.bincount().tolist())
    assert floor_of({"experiment": exp.as_json, "C": C}) == pytest.approx(want, rel=1e-8)


# ---- outcomes and claims


def test_loss_and_its_distance_to_the_floor(tmp_path):
    store(tmp_path, get_experiment("ufm-10", epochs=10))
    store(tmp_path, get_experiment("ufm-10", method="standard-no-norm", epochs=10))
    rows, _, about = load_rows(tmp_path)
    table = summary(rows, about).set_index("method")["loss − floor"]
    assert table["standard-no-norm"] == "no floor"
    assert float(table["nearest"]) == pytest.approx(0.1 - cross_entropy_floor(10), rel=0.05)


def sweep(folder, field, paces):
    "Runs of UFM-10 that differ in one field; each value with the epoch at which it reaches 99%."
    for value, pace in paces.items():
        for seed in range(3):
            exp = get_experiment("ufm-10", tag=f"{field}-{value}", seed=seed, epochs=20, **{field: value})
            top1 = np.where(np.arange(1, 21) < pace, 0.5, 1.0)
            store(folder, exp, top1=top1)


def test_a_sweep_is_found_by_its_descriptions(tmp_path):
    sweep(tmp_path, "delta", {1e-5: 4, 1e-3: 4, 1e-1: 6})
    rows, _, about = load_rows(tmp_path)
    table = sweep_table(rows, about, "delta")
    assert list(table.delta) == [1e-5, 1e-3, 1e-1] and list(table.seeds) == [3] * 3
    assert list(table["epochs to 99% train"]) == ["4", "4", "6"]
    assert sweep_table(rows, about, "tau").empty


@pytest.mark.parametrize("field", ["solve_first", "lag", "project"])
def test_switches_have_their_sweeps_in_the_report(tmp_path, field):
    sweep(tmp_path / "rows", field, {False: 4, True: 6})
    write_tables(tmp_path / "tables", read_evidence(tmp_path / "rows"))
    text = (tmp_path / "tables" / f"{field}.md").read_text()
    assert text.startswith(f"**Sweep: {field}.** Runs that differ in {field} alone.")


@pytest.mark.parametrize("slow, outcome", [(6, "holds"), (12, "fails")])
def test_robust_in_delta(tmp_path, slow, outcome):
    sweep(tmp_path, "delta", {1e-5: 4, 1e-3: 4, 1e-1: slow})
    verdicts = judge(read_evidence(tmp_path)).set_index("claim")
    assert verdicts.verdict["robust in δ"] == outcome and verdicts.seeds["robust in δ"] == 3


def test_a_constant_that_ends_higher_is_better(tmp_path):
    "By more than a point of test accuracy, although no sooner at the line."
    for value, pace in (("paper", 5), (0.1, 9)):
        for seed in range(3):
            exp = get_experiment("digits-net", tag=f"alpha-{value}", seed=seed, epochs=20, alpha=value)
            top1 = np.where(np.arange(1, 21) < pace, 0.5, 1.0)
            store(tmp_path, exp, top1=top1)
    evidence = read_evidence(tmp_path)
    assert _decaying_alpha(evidence).outcome == "holds"
    better = evidence.rows.experiment.str.contains("0.1").map({False: 0.80, True: 0.83})
    verdict = _decaying_alpha(evidence._replace(rows=evidence.rows.assign(test_top1=better)))
    assert verdict.outcome == "fails" and "+3 points" in verdict.words
    untested = evidence.rows.assign(test_top1=np.nan)  # as free features have it beside images
    assert _decaying_alpha(evidence._replace(rows=untested)).outcome == "holds"
    without = evidence.rows.drop(columns="test_top1")
    assert _decaying_alpha(evidence._replace(rows=without)).outcome == "holds"


@pytest.mark.parametrize("constant, outcome", [(9, "holds"), (3, "fails"), (5, "untested")])
def test_decaying_alpha(tmp_path, constant, outcome):
    "Where every value arrives at the same epoch there is nothing to judge."
    sweep(tmp_path, "alpha", {"paper": 5, 0.1: constant})
    assert _decaying_alpha(read_evidence(tmp_path)).outcome == outcome


def free_features(folder, paces, seeds=3):
    "Three heads on free features: {size: epochs to 99% of standard, fixed and nearest}."
    for name, epochs in paces.items():
        for method, pace in zip(("standard", "fixed", "nearest"), epochs):
            for seed in range(1 if name == "ufm-1000" else seeds):
                top1 = np.where(np.arange(1, 21) < pace, 0.5, 1.0)
                exp = get_experiment(name, method=method, seed=seed, epochs=20)
                store(folder, exp, top1=top1, C=int(name.split("-")[1]))


THREE_SIZES = {"ufm-10": (4, 2, 1), "ufm-100": (8, 3, 1), "ufm-200": (12, 6, 2)}


@pytest.mark.parametrize(
    "change, outcome",
    [
        ({}, "holds"),
        ({"ufm-200": (12, 6, 3)}, "fails"),  # three times as many
        ({"ufm-200": (12, 6, 99)}, "fails"),  # never
        ({"ufm-200": (99, 6, 2)}, "holds"),  # a rival never
        ({"ufm-200": (12, 4, 2)}, "fails"),  # a rival grows no more
        ({"ufm-100": (8, 3, 3), "ufm-200": (12, 6, 1)}, "fails"),  # slower in between
        ({"ufm-1000": (15, 9, 15)}, "holds"),  # one seed: named, not counted
    ],
)
def test_constant_rate(tmp_path, change, outcome):
    free_features(tmp_path, THREE_SIZES | change)
    verdict = _constant_rate(read_evidence(tmp_path))
    assert verdict.outcome == outcome and verdict.seeds == 3
    named = "not counted, epochs in ufm-1000 (seeds: 1): standard 15, fixed 9, nearest 15"
    assert (named in verdict.words) == ("ufm-1000" in change)


def test_constant_rate_needs_three_sizes_of_three_seeds(tmp_path):
    free_features(tmp_path / "two", {n: THREE_SIZES[n] for n in ("ufm-10", "ufm-100")})
    assert _constant_rate(read_evidence(tmp_path / "two")).outcome == "untested"
    free_features(tmp_path / "thin", THREE_SIZES, seeds=2)
    verdict = _constant_rate(read_evidence(tmp_path / "thin"))
    assert verdict.outcome == "untested" and "the most is 2 in ufm-10 to ufm-200" in verdict.words


def starts(folder, widths):
    "Evidence of {(data, start, solve first): spread of the losses, seeds}."
    spread, first = {}, {}
    for (data, start, solve), (width, seeds) in widths.items():
        for seed in range(seeds):
            tag = f"{start}-{solve}"
            exp = get_experiment(data, tag=tag, seed=seed, epochs=30, start=start)
            store(folder, exp, C=int(data.split("-")[1]))
            spread[exp.name], first[exp.stem] = width, solve
    evidence = read_evidence(folder)
    for stem, solve in first.items():
        evidence.about[stem]["experiment"]["solve_first"] = solve
    evidence.rows["train_loss"] += evidence.rows.seed * evidence.rows.experiment.map(spread)
    return evidence


@pytest.mark.parametrize("without, outcome", [(0.02, "holds"), (0.0105, "fails"), (0.005, "fails")])
def test_solving_6_first_is_the_more_stable(tmp_path, without, outcome):
    pair = {("ufm-10", "canonical", False): (without, 5), ("ufm-10", "canonical", True): (0.01, 5)}
    verdict = _stable_start(starts(tmp_path, pair))
    assert verdict.outcome == outcome and verdict.seeds == 5


def test_either_start_and_every_size_counts(tmp_path):
    "And a range over five seeds is not held against one over three."
    widths = {
        ("ufm-10", "canonical", False): (0.02, 5),
        ("ufm-10", "canonical", True): (0.01, 3),
        ("ufm-10", "haar", False): (0.01, 3),
        ("ufm-10", "haar", True): (0.01, 5),
        ("ufm-100", "canonical", False): (0.03, 3),
        ("ufm-100", "canonical", True): (0.01, 3),
    }
    verdict = _stable_start(starts(tmp_path, widths))
    assert verdict.outcome == "fails" and verdict.effect == pytest.approx(2) and verdict.seeds == 3
    assert verdict.words.endswith("(median of 3 experiments); not so in ufm-10 start=haar")


def test_without_such_runs_the_start_is_untested(tmp_path):
    one = {("ufm-10", "canonical", True): (0.01, 5), ("ufm-10", "haar", True): (0.01, 5)}
    assert _stable_start(starts(tmp_path, one)).outcome == "untested"


def three_heads(folder, nearest, seeds=3, name="cifar10-resnet18"):
    "Runs of three methods; the nearest head reaches 99% at the epoch given, the others at epoch 6."
    for method, pace in (("standard", 6), ("fixed", 6), ("nearest", nearest)):
        for seed in range(seeds):
            top1 = np.where(np.arange(1, 11) < pace, 0.5 + 0.01 * seed * pace, 1.0)
            store(folder, get_experiment(name, method=method, seed=seed, epochs=10), top1=top1)


@pytest.mark.parametrize("nearest, outcome", [(2, "holds"), (6, "untested"), (9, "fails")])
def test_faster_convergence(tmp_path, nearest, outcome):
    "A tie is evidence for neither."
    three_heads(tmp_path, nearest)
    evidence = read_evidence(tmp_path)
    verdicts = judge(evidence).set_index("claim")
    assert verdicts.verdict["faster convergence"] == outcome
    line = ("holds", "fails", "untested").index(outcome) + 1
    assert "faster convergence" in sentences(evidence, verdicts.reset_index())[line]


def test_a_projection_is_not_the_papers_setting(tmp_path):
    three_heads(tmp_path, 9, name="clusters-100-narrow")
    assert _convergence(read_evidence(tmp_path)).outcome == "untested"


@pytest.mark.parametrize(
    "without, outcome",
    [
        ((0.5, 0.2, 0.9), "untested"),  # medians 40 points apart, but two seeds of three level
        ((0.1, 0.1, 1.0), "untested"),  # two seeds gain, one loses
        ((0.4, 0.2, 0.8), "holds"),
        ((0.6, 1.0, 1.0), "fails"),
    ],
)
def test_more_at_the_margin_is_asked_within_each_seed(without, outcome, tmp_path):
    shares = {"nearest-no-ddn": without, "nearest": (0.5, 0.9, 0.9)}
    for method, ends in shares.items():
        for seed in range(3):
            store(tmp_path, get_experiment("cifar10-resnet18", method=method, seed=seed, epochs=4))
    evidence = read_evidence(tmp_path)
    cuts = {(m, s): round(100 * share) for m, ends in shares.items() for s, share in enumerate(ends)}
    frames = [
        pd.DataFrame({"method": m, "seed": s, "rank": range(100), "margin": [10 / 9] * n + [0.0] * (100 - n)})
        for (m, s), n in cuts.items()
    ]
    margins = pd.concat(frames).assign(experiment="cifar10-resnet18")
    verdict = _more_at_the_margin(evidence._replace(margins=margins))
    assert verdict.outcome == outcome
    assert ("level in cifar10-resnet18" in verdict.words) == (outcome == "untested")


@pytest.mark.parametrize(
    "seeds, words",
    [
        ({"standard": 1}, "1 run of 1 experiment, with 1 seed"),
        ({"standard": 2}, "2 runs of 1 experiment, with 2 seeds"),
        ({"standard": 1, "nearest": 2}, "3 runs of 1 experiment, with 1 to 2 seeds"),
    ],
)
def test_one_is_singular(tmp_path, seeds, words):
    for method, number in seeds.items():
        for seed in range(number):
            store(tmp_path, get_experiment("ufm-10", method=method, seed=seed, epochs=10))
    evidence = read_evidence(tmp_path)
    verdicts = judge(evidence)
    need = "a verdict needs 3, and no cell of Tables 1 and 2 has any"
    assert sentences(evidence, verdicts)[-1] == f"The rows are those of {words}; {need}."
    one = verdicts.assign(verdict=["untested"] + ["holds"] * (len(verdicts) - 1))
    assert sentences(evidence, one)[0].endswith("; 1 is untested.")


def test_too_few_seeds_are_untested_in_words(tmp_path):
    three_heads(tmp_path, 2, seeds=2)
    verdicts = judge(read_evidence(tmp_path)).set_index("claim")
    assert set(verdicts.verdict) == {"untested"} and len(verdicts) == len(CLAIMS) == 13
    assert "the most is 2 in cifar10-resnet18" in verdicts["what the rows say"]["faster convergence"]
    assert all(words.startswith("untested: it needs ") for words in verdicts["what the rows say"])


def test_cost_rows_are_read_beside_the_others(tmp_path):
    store(tmp_path, get_experiment("digits-net", epochs=3))
    cost = tmp_path / "cost"
    cost.mkdir()
    times = {"standard": 2.0, "nearest": 2.02, "nearest, paper": 2.1}
    lines = [{"method": m, "step": k, "forward_ms": t} for m, t in times.items() for k in range(1, 7)]
    frame = pd.DataFrame(lines)
    frame.loc[frame.step == 1, "forward_ms"] = 50.0  # the first steps do not count
    frame = frame.assign(cell="digits-net", backward_ms=4.0)
    frame.to_csv(cost / "methods-some-machine.csv", index=False)
    evidence = read_evidence(tmp_path)
    price = judge(evidence).set_index("claim").loc["price of a step"]
    words = price["what the rows say"]
    assert price.verdict == "holds" and "1.05 times" in words and "closed form 1.01 times" in words
    report_main(["--rows", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "The time of a step: digits-net" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


# ---- the command


def test_the_command_needs_neither_torch_nor_matplotlib_to_begin():
    heavy = "{'torch', 'torchvision', 'fastai', 'matplotlib', 'seaborn', 'scipy', 'sklearn'}"
    code = f"import sys, ngc_etf.report; print(sorted({heavy} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_runs_without_torchvision_and_fastai_and_without_warnings(tmp_path):
    store(tmp_path, get_experiment("digits-net", epochs=3))
    code = (
        "import sys; from ngc_etf.report import report_main; report_main(sys.argv[1:]); "
        "print(sorted({'torchvision', 'fastai'} & {*sys.modules}))"
    )
    arguments = ["--rows", str(tmp_path), "--out", str(tmp_path / "out")]
    run = [sys.executable, "-W", "always::FutureWarning", "-c", code, *arguments]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]") and "FutureWarning" not in done.stderr


def test_the_page_stands_alone(tmp_path):
    three_heads(tmp_path, 2)
    report_main(["--rows", str(tmp_path), "--out", str(tmp_path / "out")])
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert page.index("measurable claims") < page.index("<figure>")
    assert "://" not in page and "prefers-color-scheme: dark" in page and "@media print" in page
    assert page.count("Not run: ") >= 2
