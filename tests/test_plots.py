"Pictures of collapse: what they draw, what they refuse, and that nobody's style is touched."

import subprocess
import sys

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from ngc_etf.plots import line_style, plot_collapse, plot_gram, plot_margins
from ngc_etf.simplex import simplex_etf

ROWS = [
    {"epoch": 1, "nc1": 2.0, "test_nc1": 3.0, "margin": 0.1, "train_loss": 2.0, "train_top1": 0.5},
    {"epoch": 5, "nc1": 0.5, "test_nc1": 1.0, "margin": 0.9, "train_loss": 0.1, "train_top1": 0.9},
]


@pytest.fixture(autouse=True)
def closed():
    before = dict(plt.rcParams)
    yield
    assert dict(plt.rcParams) == before
    plt.close("all")


def repeated(method, seed, factor):
    "The rows as a run's, with its method and seed, NC1 times a factor."
    return pd.DataFrame(ROWS).assign(experiment="one", method=method, seed=seed, nc1=lambda f: factor * f.nc1)


def test_the_module_imports_no_matplotlib():
    code = "import sys, ngc_etf.plots; print('matplotlib' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_list_and_a_table_draw_the_same():
    for rows in (ROWS, tuple(ROWS), pd.DataFrame(ROWS)):
        axes = plot_collapse(rows, C=4)
        assert [a.get_ylabel() for a in axes] == ["NC1", "mean cosine margin"]
        assert [list(line.get_ydata()) for line in axes[0].lines] == [[2.0, 0.5], [3.0, 1.0]]
        assert axes[1].lines[-1].get_ydata()[0] == 4 / 3
        assert [t.get_text() for t in axes[0].get_legend().get_texts()] == ["train", "test", "at collapse"]


def test_loss_and_accuracy_by_their_short_names():
    axes = plot_collapse(ROWS, names=["loss", "top1", "train_loss"])
    assert [list(a.lines[0].get_ydata()) for a in axes] == [[2.0, 0.1], [0.5, 0.9], [2.0, 0.1]]
    assert axes[0].get_yscale() == "log" and axes[1].get_yscale() == "linear"


def test_seeds_give_a_median_with_a_band_and_methods_their_looks():
    rows = [repeated("nearest", seed, factor) for seed, factor in enumerate((1, 2, 4))]
    ax = plot_collapse(pd.concat([*rows, repeated("mine", 0, 1)]), names="nc1")
    assert list(ax.lines[0].get_ydata()) == [4.0, 1.0] and len(ax.collections) == 1
    assert ax.lines[0].get_color() == line_style("nearest")["color"]
    assert ax.lines[1].get_color() not in (line_style("mine")["color"], ax.lines[0].get_color())


def test_several_methods_of_which_only_the_test_set_was_measured():
    rows = pd.concat([repeated(m, 0, 1) for m in ("nearest", "fixed")]).drop(columns="nc1")
    axes = plot_collapse(rows)
    assert [a.get_ylabel() for a in axes] == ["NC1", "mean cosine margin"]
    assert [list(line.get_ydata()) for line in axes[0].lines] == [[3.0, 1.0]] * 2
    assert axes[0].get_yscale() == "log"
    labels = [t.get_text() for t in axes[0].get_legend().get_texts()]
    assert labels == ["nearest, test", "fixed, test", "nearest", "fixed"]


@pytest.mark.parametrize("top, named", [(1e3, False), (1e2, False), (20.0, True)])
def test_powers_of_ten_alone_are_named_over_two_decades(top, named):
    "Nor when one looks closer, where matplotlib would name 6x10^-1 and its neighbours."
    rows = [{"epoch": e, "nc1": v} for e, v in ((1, top), (1000, 0.5))]
    ax = plot_collapse(rows, names="nc1")
    ax.set_ylim(0.3, 0.9)
    ax.set_xlim(200, 900)
    ax.figure.canvas.draw()
    for axis in (ax.xaxis, ax.yaxis):
        assert axis.get_scale() == "log" and not any(t.get_text() for t in axis.get_ticklabels(minor=True))
    assert bool([t for t in ax.get_yticklabels() if t.get_text() == "0.5"]) == named


def test_values_that_no_logarithm_has():
    rows = [{"epoch": e, "nc1": v, "nc2": 0.0} for e, v in enumerate((np.inf, np.nan, 1.0, 0.0), 1)]
    ax = plot_collapse(rows)
    ax[0].figure.canvas.draw()
    assert ax[0].get_yscale() == "log" and ax[1].get_yscale() == "linear"


def test_axes_in_and_out():
    _, grid = plt.subplots(2, 1)
    out = plot_collapse(ROWS, ax=grid)
    assert list(out) == list(grid)
    _, ax = plt.subplots()
    assert plot_margins([0.1], ax=ax) is ax and plot_gram(M.T, ax=ax) is ax


M = simplex_etf(4, 6)
TWO = pd.concat([repeated("nearest", 0, 1), repeated("nearest", 0, 1).assign(experiment="two")])


@pytest.mark.parametrize(
    "draw, message",
    [
        (lambda: plot_collapse(3), "rows must be a DataFrame or a list of dicts, got int"),
        (lambda: plot_collapse([1, 2]), "rows must be a DataFrame or a list of dicts, got list"),
        (lambda: plot_collapse([]), "rows must hold at least one row, got none"),
        (lambda: plot_collapse([{"nc1": 1.0}]), r"rows must have a column 'epoch', got \['nc1'\]"),
        (lambda: plot_collapse(TWO), "rows must be of one experiment, got one, two"),
        (
            lambda: plot_collapse(ROWS, names="nc9"),
            "names must be metrics of the rows, got nc9; there are epoch, nc1",
        ),
        (lambda: plot_collapse([{"epoch": 1}]), "names must be metrics of the rows, got nc1"),
        (lambda: plot_collapse(ROWS, names=()), "names must be metrics of the rows, got none"),
        (lambda: plot_collapse(ROWS, C=1), "C=1"),
        (
            lambda: plot_collapse(ROWS, ax=plt.gca()),
            r"ax must be 2 matplotlib Axes \(nc1, margin\), got Axes of 1",
        ),
        (
            lambda: plot_collapse(ROWS, names="nc1", ax="left"),
            r"ax must be 1 matplotlib Axes \(nc1\), got str of 1",
        ),
        (lambda: plot_margins([]), "margins must hold at least one sample, got N=0"),
        (lambda: plot_margins(torch.ones(2, 2)), r"margins must have shape \(any,\), got \(2, 2\)"),
        (lambda: plot_margins([0.0, 7.0]), r"margins must lie in \[-2, 2\], got one of 7"),
        (lambda: plot_margins([0.0, float("nan")]), "margins must be finite, got 1 entries"),
        (lambda: plot_margins([0.0], C=1), "C=1"),
        (lambda: plot_gram(torch.ones(4)), r"W must have shape \(any, any\), got \(4,\)"),
        (lambda: plot_gram(torch.ones(1, 4)), "C=1"),
        (lambda: plot_gram(M.T, ax=3), "ax must be a matplotlib Axes, got int of 1"),
    ],
)
def test_refused_by_name(draw, message):
    before = plt.get_fignums()
    with pytest.raises(ValueError, match=message):
        draw()
    assert len(plt.get_fignums()) <= len(before) + 1  # no half-drawn figures but the one of plt.gca()


def test_margins_are_sorted_and_reach_the_line():
    ax = plot_margins(torch.tensor([1.0, -1.0, 0.5], requires_grad=True), C=3, label="mine")
    assert list(ax.lines[0].get_ydata()) == [-1.0, 0.5, 1.0]
    assert np.allclose(ax.lines[0].get_xdata(), [1 / 6, 1 / 2, 5 / 6])
    assert ax.lines[1].get_ydata()[0] == 1.5 and ax.lines[0].get_label() == "mine"


def test_gram_of_an_etf_with_one_dead_row():
    W = (3 * M.T).clone()
    W[3] = 0
    ax = plot_gram(W.requires_grad_())
    shown = np.asarray(ax.images[0].get_array().filled(np.nan))
    assert np.allclose(shown[:3, :3], np.eye(3) * 4 / 3 - 1 / 3, atol=1e-6) and np.isnan(shown[3]).all()
    assert any(np.allclose(line.get_ydata(), -1 / 3) for line in ax.images[0].colorbar.ax.lines)
