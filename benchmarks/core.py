"""What the types and the charts cost, in multiples of one plain ``torch.func`` call.

MLP 64-256-256-10 (d = 85 002), 512 samples, float32, one thread. Every typed call gets a fresh point in its chart, so
nothing is remembered from one round to the next. Run: ``python benchmarks/core.py``; it prints a Markdown table.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import Timing, machine, paired

import geoad

LIMITS = {"gradient": 1.6, "vector": 1.0, "covector": 1.0, "hvp": 1.3}


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = (64, 256, 256, 10)
    layers: list[torch.nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [torch.nn.Linear(a, b), torch.nn.Tanh()]
    return torch.nn.Sequential(*layers[:-1])


CHARTS: dict[str, Callable[[], Any]] = {
    "softplus": geoad.maps.Softplus,
    "asinh": geoad.maps.Asinh,
    "polar": lambda: {"*.weight": geoad.maps.Polar(), "*": geoad.maps.Identity()},
    "householder": geoad.maps.Householder,
}


class Setting:
    """One network, its loss, and plain references."""

    def __init__(self) -> None:
        self.net = network()
        self.x, self.y = torch.randn(512, 64), torch.randint(0, 10, (512,))
        self.geo = geoad.GeoModule(self.net)
        self.loss = self.geo.loss(F.cross_entropy, (self.x, self.y))
        self.theta = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        self.v = {name: torch.randn_like(p) for name, p in self.theta.items()}

    def plain_loss(self, theta: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(torch.func.functional_call(self.net, theta, (self.x,)), self.y)

    def plain_gradient(self) -> Any:
        return torch.func.grad(self.plain_loss)(self.theta)

    def plain_hvp(self) -> Any:
        return torch.func.jvp(torch.func.grad(self.plain_loss), (self.theta,), (self.v,))[1]

    def fresh(self, chart: geoad.Chart, blocks: dict[str, torch.Tensor]) -> geoad.Point:
        """A point with nothing remembered; the domain check is part of making it from foreign numbers, not of a gradient."""
        return geoad.Point(chart, blocks)


def rows(s: Setting, rounds: int) -> list[tuple[str, Timing, Timing, float]]:
    theta_chart = s.geo.reference
    plain: dict[str, Callable[[], Any]] = {"grad": s.plain_gradient, "hvp": s.plain_hvp}
    found: list[tuple[str, Timing, Timing, float]] = []
    differential, hessian = geoad.grad(s.loss), geoad.hessian(s.loss)

    jobs = {"typed": lambda: differential(s.fresh(theta_chart, s.theta)), "grad": plain["grad"]}
    t = paired(jobs, rounds=rounds)
    found.append(("typed gradient in θ", t["typed"], t["grad"], 1.05))
    p = s.geo.point()
    form, v = hessian(p), theta_chart.vector(s.v, at=p)
    t = paired({"typed": lambda: form.mv(v), "hvp": plain["hvp"]}, rounds=rounds)
    found.append(("Hessian-vector product in θ / plain", t["typed"], t["hvp"], 1.05))
    for name, recipe in CHARTS.items():
        psi = theta_chart.reparametrize(recipe(), name=name).target
        q = p.to(psi)
        blocks = q.blocks
        w = differential(p)
        moved, form_psi = v.to(psi), hessian(q)
        jobs = {
            "gradient": lambda psi=psi, blocks=blocks: differential(s.fresh(psi, blocks)),
            "vector": lambda psi=psi: v.to(psi),
            "covector": lambda psi=psi, w=w: w.to(psi),
            "grad": plain["grad"],
        }
        t = paired(jobs, rounds=rounds)
        found += [(f"gradient in {name}", t["gradient"], t["grad"], LIMITS["gradient"])]
        found += [(f"{kind} θ → {name}", t[kind], t["grad"], LIMITS[kind]) for kind in ("vector", "covector")]
        t = paired({"hvp": lambda f=form_psi, m=moved: f.mv(m), "plain": plain["hvp"]}, rounds=rounds)
        found.append((f"Hessian-vector product in {name} / plain", t["hvp"], t["plain"], LIMITS["hvp"]))
    return found


def overheads(rounds: int) -> list[tuple[str, float]]:
    """What a typed operation costs beyond the plain one, in µs, on 3 components."""
    chart = geoad.Chart({"x": (3,)}, name="x")
    p = chart.point(torch.randn(3))
    v, w = chart.vector(torch.randn(3), at=p), chart.covector(torch.randn(3), at=p)
    m = torch.eye(3)
    form = chart.form(m, at=p)
    a, b = torch.randn(3), torch.randn(3)
    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "v + v": (lambda: v + v, lambda: a + a),
        "2 v": (lambda: 2.0 * v, lambda: 2.0 * a),
        "w(v)": (lambda: w(v), lambda: a @ b),
        "G v": (lambda: form.mv(v), lambda: m @ a),
        "G(v, v)": (lambda: form(v, v), lambda: a @ (m @ a)),
        "einsum('ij,j->i', G, v)": (
            lambda: torch.einsum("ij,j->i", form, v),  # pyright: ignore
            lambda: torch.einsum("ij,j->i", m, a),
        ),
    }
    found: list[tuple[str, float]] = []
    for name, (typed, plain) in pairs.items():
        t = paired({"typed": typed, "plain": plain}, rounds=rounds, inner=2000)
        found.append((name, 1e6 * (t["typed"].median - t["plain"].median)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    s = Setting()
    print(f"{machine()}\n")
    print("| what | ms | plain ms | ratio | limit |\n|---|---|---|---|---|")
    for name, typed, plain, limit in rows(s, rounds):
        ratio = typed.ratio(plain)
        mark = "" if ratio <= limit else " **over**"
        print(f"| {name} | {1e3 * typed.median:.2f} | {1e3 * plain.median:.2f} | {ratio:.2f} | {limit:.2f}{mark} |")
    print("\n| typed operation (3 components) | overhead, µs | limit |\n|---|---|---|")
    for name, overhead in overheads(max(5, rounds // 4)):
        print(f"| {name} | {overhead:.1f} | 6{'' if overhead <= 6 else ' **over**'} |")


if __name__ == "__main__":
    main()
