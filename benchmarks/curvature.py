"""Curvature matrices against plain ``torch.func``: time, peak memory, and agreement, in one run.

The dense exact Fisher matrix of a softmax MLP 64-100-10 on the 1797 handwritten digits of scikit-learn (d = 7510), float32, one
thread. Plain: ``vmap`` of ``jacrev`` in chunks, J multiplied out. Run: ``python benchmarks/curvature.py``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from harness import machine, paired
from sklearn.datasets import load_digits
from torch import Tensor

import geoad


class Setting:
    """The network, the data, and the candidates."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.x = torch.tensor(load_digits().data / 16, dtype=torch.float32)
        self.geo = geoad.GeoModule(torch.nn.Sequential(torch.nn.Linear(64, 100), torch.nn.ReLU(), torch.nn.Linear(100, 10)))
        self.candidates: dict[str, Callable[[], Tensor]] = {"geoad": self.ours, "vmap(jacrev)": self.plain}

    def ours(self) -> Tensor:
        return geoad.curvature.Fisher(self.geo, self.x, representation="dense")(self.geo.point()).to_dense()

    def plain(self) -> Tensor:
        net, theta = self.geo.wrapped, {name: p.detach() for name, p in self.geo.named_parameters()}

        def single(parameters: dict[str, Tensor], sample: Tensor) -> tuple[Tensor, Tensor]:
            f = torch.func.functional_call(net, parameters, (sample[None],))[0]
            return f, f

        jacobians = torch.func.vmap(torch.func.jacrev(single, has_aux=True), (None, 0))
        total = torch.zeros(7510, 7510)
        for chunk in self.x.split(256):
            rows, f = jacobians(theta, chunk)
            j = torch.cat([block.flatten(2) for block in rows.values()], -1)
            p = f.softmax(-1)
            bent = p[..., None] * (j - (p[..., None] * j).sum(1, keepdim=True))
            total.addmm_(j.flatten(0, 1).T, bent.flatten(0, 1))
        return total / len(self.x)


def peak(name: str) -> float:
    """The memory (MB) that one call adds to a fresh process, in which a small call came before."""
    words = [sys.executable, __file__, "--peak", name]
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def measure_peak(name: str) -> None:
    setting = Setting()
    whole, setting.x = setting.x, setting.x[:2]
    if name == "geoad":
        geoad.curvature.Fisher(setting.geo, setting.x, representation="implicit")(setting.geo.point())
    before = high_water()
    setting.x = whole
    setting.candidates[name]()
    print(high_water() - before)


def high_water() -> float:
    """The largest memory of this process so far, in MB. (``ru_maxrss`` counts that of the process which started this one.)"""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        measure_peak(arguments.peak)
        return
    setting = Setting()
    ours, plain = setting.ours(), setting.plain()
    error = float((ours - plain).norm() / plain.norm())
    del ours, plain
    timings = paired(setting.candidates, rounds=arguments.rounds, warmup=1)
    ratio = timings["vmap(jacrev)"].ratio(timings["geoad"])
    print(machine())
    print("\n| what | geoad, s | vmap(jacrev), s | ratio | geoad, MB | vmap(jacrev), MB | difference |")
    print("|---|---|---|---|---|---|---|")
    seconds = f"{timings['geoad'].median:.2f} | {timings['vmap(jacrev)'].median:.2f} | {ratio:.1f} ×"
    memory = f"{peak('geoad'):.0f} | {peak('vmap(jacrev)'):.0f}"
    print(f"| dense exact Fisher, MLP 64-100-10, 1797 digits | {seconds} | {memory} | {error:.0e} |")


if __name__ == "__main__":
    main()
