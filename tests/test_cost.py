"The command `ngc_cost`: its rows, their file, its complaints; what is counted and what is timed."

import errno
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest
import torch

from ngc_etf import cost, kernels, memory, overhead, timings
from ngc_etf.catalogue import find_data
from ngc_etf.cost import cost_main
from ngc_etf.estimates import PeakMemory
from ngc_etf.figures import step_times
from ngc_etf.kernels import _dense_bytes, _exponent, peak_bytes, scaling_rows
from ngc_etf.known import get_experiment
from ngc_etf.machine import take_turns
from ngc_etf.memory import memory_rows
from ngc_etf.step import network
from ngc_etf.tables import _read_cost, memory_table
from ngc_etf.timings import _neighbours, busy_rows, methods_rows


def fails(*argv):
    with pytest.raises(SystemExit) as e:
        cost_main([*argv])
    return str(e.value.code)


def test_each_command_says_what_it_does(capsys):
    with pytest.raises(SystemExit):
        cost_main(["--help"])
    words = capsys.readouterr().out
    for name, (module, _) in cost._COMMANDS.items():
        assert name in words
        assert callable(getattr(import_module(f"ngc_etf.{module}"), f"{name}_rows"))
    assert len(cost._COMMANDS) == 9


def test_what_is_wrong_is_named():
    assert "rounds must be at least 1, got 0" in fails("memory", "--quick", "--rounds", "0")
    assert "experiment must be one of" in fails("methods", "--cells", "nonsense")
    if not torch.cuda.is_available():
        assert "torch sees no GPU here" in fails("solver", "--device", "cuda")
    assert "device must be cpu, cuda or cuda:N, got 'gpu'" in fails("solver", "--device", "gpu")
    for n in ("0", "-1"):
        assert f"threads must be at least 1, got {n}" in fails("memory", "--quick", "--threads", n)


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "device 'cuda:5' was asked for, but torch sees 1 GPUs here" in fails("data", "--device", "cuda:5")


def test_rows_carry_the_kind_of_machine_and_files_its_name(tmp_path, monkeypatch):
    row = {"cell": "ufm-10", "method": "nearest", "gb": 0.5, "dense_gb": 0.25}

    def counted(quick, device, rounds):
        "One row."
        return [row]

    monkeypatch.setattr(memory, "memory_rows", counted)
    cost_main(["memory", "--out", str(tmp_path / "cost")])
    (path,) = (tmp_path / "cost").iterdir()
    assert path.name.startswith("memory-") and path.suffix == ".csv"
    rows = _read_cost(tmp_path, "memory")
    assert {"cpu", "cores", "threads", "instructions", "torch", "gpu"} <= {*rows.columns}
    assert rows.torch[0] == torch.__version__ and rows.cores[0] == os.cpu_count()
    assert memory_table(rows).set_index("model")["nearest, ours"]["UFM-10"] == "0.5"
    other = rows.assign(gb=0.7)
    other.to_csv(tmp_path / "cost" / "memory-another-machine.csv", index=False)
    assert len(_read_cost(tmp_path, "memory")) == 2


def test_one_cell_measured_again_leaves_the_others(tmp_path, monkeypatch):
    ms = {"ufm-10": 1.0, "ufm-100": 2.0}

    def timed(quick, device, rounds, cells=tuple(ms)):
        "A row a cell."
        return [{"cell": cell, "method": "nearest", "forward_ms": ms[cell]} for cell in cells]

    monkeypatch.setattr(timings, "methods_rows", timed)
    cost_main(["methods", "--out", str(tmp_path)])
    ms["ufm-100"] = 3.0
    cost_main(["methods", "--cells", "ufm-100", "--out", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    assert pd.read_csv(path).set_index("cell").forward_ms.to_dict() == {"ufm-10": 1.0, "ufm-100": 3.0}


def test_a_full_disk_leaves_the_rows_that_were_there(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "memory_rows", lambda *a: [{"cell": "ufm-10", "gb": 0.5}])
    cost_main(["memory", "--out", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    before, write = path.read_text(), pd.DataFrame.to_csv

    def full(frame, file, **kwargs):
        "The first bytes still find room."
        write(frame[:0], file, **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    assert f"{path} could not be written" in fails("memory", "--out", str(tmp_path))
    assert path.read_text() == before and [*tmp_path.iterdir()] == [path]


def test_growth_is_fitted_over_d_and_over_C():
    assert _exponent([10, 20, 40], [3.0, 12.0, 48.0]) == pytest.approx(2)
    rows = pd.DataFrame(scaling_rows(quick=True, rounds=1))
    assert set(rows.along) == {"d", "C"} and set(rows.what) == {"forward", "backward", "product"}
    for (along, _), series in rows.groupby(["along", "what"]):
        fitted = _exponent(series[along], series.ms)
        assert len(series) == 3 and series.exponent.iloc[0] == pytest.approx(fitted)


def test_the_gradient_adds_next_to_no_memory():
    gb = pd.DataFrame(memory_rows(quick=True)).set_index(["cell", "method"]).gb.unstack()
    assert (gb["nearest"] <= 1.02 * gb["nearest-no-ddn"]).all()
    assert (gb["nearest"] <= 1.05 * gb["fixed"]).all()


@pytest.mark.parametrize("name", ["clusters-50-0.8", "fashion-mnist-mlp"])
def test_vectors_and_grey_images_are_counted_too(name):
    exp = get_experiment(name)
    C, d, batch, weights, kept = memory._parts(exp)
    assert (C, d, batch) == (find_data(exp.data).C, 256, 256)
    assert weights == sum(p.nbytes for p in network(exp, C).body.parameters())
    assert kept > 0


def test_the_dense_jacobian_is_a_quarter_of_the_papers_surplus():
    surplus = {"ufm-100": (100, 1024, 10.7 - 1.7), "ufm-200": (200, 1024, 70.3 - 1.8)}
    for C, d, gb in surplus.values():
        assert 3.5 < 1e9 * gb / _dense_bytes(d, C, 4) < 5


def test_peak_bytes_counts_what_lives_at_once():
    x = torch.zeros(1000, 100)
    assert peak_bytes(lambda: x + 1) == pytest.approx(x.nbytes, rel=0.01)
    assert peak_bytes(lambda: (x + 1) * (x + 2)) == pytest.approx(3 * x.nbytes, rel=0.01)


def test_a_gpu_is_timed_and_measured_by_its_own_name(monkeypatch):
    "And not the first one, which is what torch means where nothing is named."
    named = []
    values = {"synchronize": None, "reset_peak_memory_stats": None, "memory_allocated": 0}
    for name, value in {**values, "max_memory_allocated": 2**30, "mem_get_info": (5, 9)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device=None, value=value: named.append(device) or value)
    take_turns({"nothing": int}, 2, "cuda:1")
    with PeakMemory("cuda:1") as peak:
        pass
    assert peak.gigabytes == 1 and peak_bytes(int, "cuda:1") == 2**30
    assert timings._memory_at_hand("cuda:1") == 5
    assert len(named) == 10 and {*named} == {"cuda:1"}


def test_a_kernel_without_a_highest_memory(monkeypatch):
    "Sandboxes leave the line out; the peak of the whole process stands in."
    monkeypatch.setattr(Path, "read_text", lambda *a, **kw: "Name: python")
    with PeakMemory("cpu") as peak:
        pass
    assert peak.gigabytes > 0


def test_methods_of_a_cell_step_by_step(monkeypatch):
    monkeypatch.setattr(timings, "_dense_ms", lambda d, C, device: 1e6)
    rows = pd.DataFrame(methods_rows(quick=True, rounds=2))
    assert len(rows) == 8 and set(rows.step) == {1, 2}
    paper = rows[rows.method == "nearest, paper"]
    assert (paper.backward_ms >= 1e6).all() and (rows.backward_ms[rows.method == "nearest"] < 1e6).all()
    fig = step_times(rows, "ufm-10")
    assert [t.get_text() for t in fig.axes[1].get_xticklabels()][:2] == ["S/F", "S/B"]
    assert not fig.axes[0].texts


def test_a_jacobian_that_does_not_fit_is_not_built(monkeypatch):
    monkeypatch.setattr(timings, "_memory_at_hand", lambda device: 1e6)
    monkeypatch.setattr(timings, "_dense_backward_seconds", lambda *a: pytest.fail("built"))
    assert pd.isna(timings._dense_ms(512, 100, "cpu"))


def children():
    "How many busy processes this one has."
    ps = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args"], capture_output=True, text=True)
    return sum("getppid" in line for line in ps.stdout.splitlines())


def test_neighbours_end_with_the_block():
    with _neighbours(2):
        assert children() == 2
    assert children() == 0


def test_neighbours_end_with_their_parent():
    "Also where it is gone before they have begun: none is left spinning."
    spin = f"[sys.executable, '-c', {timings._SPIN!r}, str(os.getpid())]"
    code = f"import os, subprocess, sys; subprocess.Popen({spin}, stdout=2, stderr=subprocess.DEVNULL)"
    child = subprocess.Popen([sys.executable, "-c", code + ".pid"], stderr=subprocess.PIPE)
    child.communicate(timeout=30)  # ends when the last process that holds the pipe has ended


def test_busy_rows_leave_the_threads_as_they_were(monkeypatch):
    monkeypatch.setattr(timings, "_busy_calls", lambda device: {"nothing": int})
    before = torch.get_num_threads()
    rows = pd.DataFrame(busy_rows(quick=True, rounds=1))
    assert list(rows.with_threads) == [1, 2] and torch.get_num_threads() == before


def test_public_names_are_few():
    for module in (cost, kernels, memory, overhead, timings):
        assert len(module.__all__) <= 10
