"""Eight representations of one Fisher matrix on handwritten digits: what each gets right, and what it costs.

For every representation: the relative error of trace, of vᵀFv and of the damped natural gradient against the exact matrix, the
numbers it stores, and the time to build it; all in the reference chart, and once more in a chart in which every weight went
through asinh, where the natural gradient is the same vector.

Run: python examples/curvature_digits.py [--samples 600]
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import geoad
from geoad import operators as ops
from geoad.curvature import Fisher
from geoad.metrics import Euclidean

NAMES = ("dense", "low_rank", "block_diagonal", "ekfac", "kfac", "quasi_diagonal", "diagonal", "implicit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, default=120)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    digits = load_digits()
    x = torch.tensor(digits.images[: arguments.samples] / 16).unsqueeze(1)
    y = torch.tensor(digits.target[: arguments.samples])
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2),
        nn.Tanh(),
        nn.Conv2d(4, 6, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(24, 16),
        nn.Tanh(),
        nn.Linear(16, 10),
    )
    for _ in range(30):  # a few steps, so that the classes differ
        gradients = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
        with torch.no_grad():
            for parameter, g in zip(net.parameters(), gradients, strict=True):
                parameter -= 0.3 * g
    geo = geoad.GeoModule(net)
    theta, p = geo.reference, geo.point()
    psi = theta.reparametrize(geoad.maps.Asinh(), name="psi").target
    slope = geoad.grad(geo.loss(F.cross_entropy, (x, y)))(p)
    v = theta.vector(torch.randn(theta.dim), at=p)
    damping = 1e-2

    exact = Fisher(geo, x, representation="dense")(p)
    trace, form = float(ops.trace(exact.operator)), float(exact(v, v))
    step = exact.solve(slope, damping=damping)
    print(f"{sum(q.numel() for q in net.parameters())} parameters, {len(x)} samples\n")
    print(f"{'representation':15} {'trace':>8} {'vᵀFv':>8} {'step':>8} {'in ψ':>8} {'numbers':>9} {'seconds':>8}")
    for name in NAMES:
        field = Fisher(geo, x, representation=name)
        start = time.perf_counter()
        value = field(p)
        seconds = time.perf_counter() - start
        found = (field + damping * Euclidean(theta))(p).sharp(slope) if name != "quasi_diagonal" else value.solve(slope, 1.0)
        moved = field(p.to(psi)).solve(slope.to(psi), damping=damping if name != "quasi_diagonal" else 1.0).to(theta)
        errors = [
            abs(float(ops.trace(value.operator)) / trace - 1),
            abs(float(value(v, v)) / form - 1),
            float((found - step).ravel().norm() / step.ravel().norm()),
            float((moved - found).ravel().norm() / found.ravel().norm()),
        ]
        print(f"{name:15} {' '.join(f'{e:8.1e}' for e in errors)} {stored(value.operator):9d} {seconds:8.3f}")
    print(
        "\nThe columns are relative errors; 'in ψ' compares the steps of the two charts. (A quasi-diagonal matrix need not be"
    )
    print("positive: its step is taken with damping 1.)")


def stored(op: ops.LinearOperator) -> int:
    """How many numbers a representation stores."""
    count = 0

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += tensor.numel()
        return tensor

    ops.map_numbers(op, counted)
    return count


if __name__ == "__main__":
    main()
