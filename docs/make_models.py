"""Writes the table of docs/models.md: which way each derivative of each model of the zoo is taken.

Run ``python docs/make_models.py``; with ``--check`` it only says whether the page is up to date. The text around the table is
written by hand.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tables import refresh

import geoad
from geoad.curvature import Fisher
from geoad.kernels import ladder
from geoad.kernels.jacobians import sample_jacobian
from geoad.testing import zoo

COLUMNS = ("gradient", "J v", "w J", "Hessian v", "GGN v", "each sample")
BEST = dict(zip(COLUMNS, ("reverse", "forward", "reverse", "autograd", "forward", "vmap"), strict=True))
SHORT = {"autograd": "torch.autograd", "reverse": "reverse", "loop": "loop", "forward": "forward", "apart": "J v and w J apart"}
KINDS = {
    "gradient": "gradient",
    "J v": "jvp",
    "w J": "vjp",
    "Hessian v": "hessian",
    "GGN v": "product",
    "each sample": "samples",
}


def ways(name: str, dtype: torch.dtype) -> list[str]:
    """For each column how the derivative was taken: "✓" for the best way, else what it took."""
    model = zoo.build(name, dtype=dtype)
    geo = model.geo()
    theta, p = geo.reference, geo.point()
    v = theta.vector({key: torch.ones_like(block) for key, block in p.blocks.items()}, at=p)
    L, F = model.field(geo), Fisher(geo, model.data, model.likelihood)

    def outputs(components: object) -> torch.Tensor:
        return geo.evaluate(theta.pack(components), model.inputs)

    products: dict[str, Callable[[], object]] = {
        "gradient": lambda: geoad.grad(L)(p),
        "J v": lambda: geoad.pushforward(outputs, v),
        "w J": lambda: geoad.vjp(outputs, p)[1](torch.ones_like(outputs(p.components))),
        "Hessian v": lambda: geoad.hessian(L)(p).mv(v),
        "GGN v": lambda: F(p).mv(v),
        "each sample": lambda: sample_jacobian(geo.evaluate, theta.layout, p.blocks, model.inputs),
    }
    return [cell(column, products[column]) for column in COLUMNS]


def cell(column: str, product: Callable[[], object]) -> str:
    """One cell of the table."""
    with ladder.watched() as seen:
        try:
            product()
        except geoad.UnsupportedModuleError:
            return "refused"
    outcome = next(each for each in seen if each.path == (KINDS[column],))
    took = [*([] if outcome.way == BEST[column] else [SHORT[outcome.way]]), *outcome.fixes]
    return "✓" + (f" {', '.join(took)}" if took else "")


def table() -> str:
    """All models; a second row where float32 is taken another way."""
    lines = ["| model | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    for name in zoo.NAMES:
        double, single = ways(name, torch.float64), ways(name, torch.float32)
        lines.append(f"| {name} | " + " | ".join(double) + " |")
        if single != double:
            lines.append(f"| {name}, float32 | " + " | ".join(single) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(refresh(__file__, table))
