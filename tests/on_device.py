"""Whole trainings on an emulated device, against the same on the CPU: nothing is left behind on the host.

A script, run in a process of its own: a kind of device is registered once and for all.
"""

import copy
import tempfile
from functools import partial
from unittest.mock import patch

import emulated
import pandas as pd
import torch
import torch.nn.functional as F
from emulated import KIND, elsewhere, reads
from fastai.callback.core import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ngc_etf
from ngc_etf import loops, runner

C, D, N = 5, 16, 40
DEVICE = f"{KIND}:0"


def body():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, D, bias=False), nn.ReLU())


def train(head, device):
    "Loss and logits after four steps, and how often the last one read something back from the device."
    net, head = body().to(device), copy.deepcopy(head).to(device)
    h, y = torch.randn(N, D, generator=torch.Generator().manual_seed(1)), torch.arange(N) % C
    h, y = h.to(device), y.to(device)
    opt = ngc_etf.AGD([*net.parameters(), *head.parameters()])
    for _ in range(4):
        reads.clear()
        loss = F.cross_entropy(head(net(h), y), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
    stalls = len(reads)
    head.eval()
    z, linear = head(net(h)), head.to_linear()
    assert torch.allclose(linear(head.features(net(h))).cpu(), z.cpu(), atol=1e-5)
    head.load_state_dict(copy.deepcopy(head).cpu().state_dict())
    assert linear.weight.device.type == head.weight.device.type == z.device.type == torch.device(device).type
    return [loss.item(), *z.detach().cpu().flatten().tolist()], stalls


def heads():
    for cls, kw in [
        (ngc_etf.StandardHead, {}),
        (ngc_etf.StandardHead, {"normalise": False}),
        (ngc_etf.FixedETFHead, {"direction": "haar"}),
        *[(ngc_etf.NearestETFHead, {"solver": s}) for s in ("auto", "svd", "gram", "newton_schulz")],
        (ngc_etf.NearestETFHead, {"ddn_grad": False, "lag": True}),
        (ngc_etf.NearestETFHead, {"alpha": "cumulative", "solve_every": 2}),
        (ngc_etf.NearestETFHead, {"start": "haar", "validate": False}),
    ]:
        head = cls(D, C, **kw)
        here, there = train(head, "cpu")[0], train(head, DEVICE)
        assert torch.allclose(torch.tensor(here), torch.tensor(there[0]), atol=1e-3), (cls, kw)
        assert there[1] <= (0 if kw.get("validate") is False else 2), (cls, kw, there[1])


def measures():
    h, y = torch.randn(N, D), torch.arange(N) % C
    net = nn.Sequential(*body(), nn.Linear(D, C))
    batches = DataLoader(TensorDataset(h, y), 10)
    here = ngc_etf.measure_collapse(net, batches)
    there = ngc_etf.measure_collapse(net.to(DEVICE), batches)
    assert all(abs(there[k] - v) < 1e-4 * max(1, abs(v)) for k, v in here.items())
    z = torch.randn(N, C)
    for loss in (ngc_etf.ntce, ngc_etf.nonl):
        assert (loss(z.to(DEVICE), y.to(DEVICE)).cpu() - loss(z, y)).abs() < 1e-5
    model, head, _ = ngc_etf.swap_head(net)
    assert head.weight.device.type == KIND
    refused = 0
    for _ in range(2):
        try:
            head(h.to(DEVICE), (y + 1).to(DEVICE))
        except ValueError:
            refused += 1
    assert refused


class Stalls(Callback):
    "Counts what a training step after the first reads back, to the end of what fastai records."
    order = 100
    most = 0

    def before_batch(self):
        reads.clear()

    def after_batch(self):
        if self.training and self.train_iter > 1:
            self.most = max(self.most, len(reads))


def watched(callback, *args):
    "Images, trained with one callback more."
    *first, cbs, rank, world_size, deadline = args
    loops._run_images(*first, [*cbs, callback], rank, world_size, deadline)


def runs():
    "Rows of the runner, of methods whose steps are nearly the same on both kinds of device."
    for name, kw in [
        ("ufm-10", {"epochs": 4, "method": "nearest"}),
        ("ufm-10", {"epochs": 4, "method": "standard"}),
        ("digits-net", {"epochs": 1, "method": "fixed", "tail": 10}),
        ("digits-net", {"epochs": 1, "method": "standard", "optimizer": "adamw", "loss": "ntce", "tag": "n"}),
    ]:
        exp, rows, stalls = ngc_etf.get_experiment(name, precision="fp32", **kw), [], Stalls()
        for device in ("cpu", DEVICE):
            with tempfile.TemporaryDirectory() as out:
                with patch.object(runner, "_run_images", partial(watched, stalls)):
                    ngc_etf.run(exp, out, device=device, progress=False)
                rows.append(pd.read_csv(f"{out}/{exp.stem}.csv").drop(columns=["seconds"]))
        pd.testing.assert_frame_equal(*rows, rtol=1e-3, atol=1e-5)
        assert stalls.most <= 1, "a step reads back more than the check of its labels"


if __name__ == "__main__":
    emulated.begin()
    with elsewhere(), patch.object(runner, "on_device", str):
        heads()
        measures()
        runs()
