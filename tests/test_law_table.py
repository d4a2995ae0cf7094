"""The law table of the maps that cannot be undone, entry by entry: what moves, what moves only if it can, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from map_cases import IMMERSIONS, SMOOTH, SUBMERSIONS, Setting, close, dense, loss, normal, refused

import geoad
from geoad.errors import ChartDomainError, NotADiffeomorphismError
from geoad.transport import rule

# for each object: from θ to ψ, from ψ to θ
TABLE = {
    "submersion": {
        "point": ("always", "always"),
        "vector": ("always", "always"),
        "function": ("always", "if"),
        "covector": ("always", "if"),
        "form": ("always", "if"),
        "metric": ("always", "if"),
        "metric field": ("always", "if"),
        "(0,3)": ("always", "if"),
        "cometric": ("always", "always"),
        "(3,0)": ("always", "always"),
        "endomorphism": ("always", "if"),
        "transpose": ("always", "if"),
        "(1,2)": ("always", "if"),
        "density": ("never", "never"),
        "log-density": ("never", "never"),
    },
    "immersion": {
        "point": ("if", "always"),
        "vector": ("if", "always"),
        "function": ("always", "never"),
        "covector": ("always", "never"),
        "form": ("always", "never"),
        "metric": ("always", "never"),
        "metric field": ("always", "never"),
        "(0,3)": ("always", "never"),
        "cometric": ("if", "always"),
        "(3,0)": ("if", "always"),
        "endomorphism": ("never", "never"),
        "transpose": ("never", "never"),
        "(1,2)": ("never", "never"),
        "density": ("never", "never"),
        "log-density": ("never", "never"),
    },
    "smooth": {
        "point": ("never", "always"),
        "vector": ("never", "always"),
        "function": ("always", "never"),
        "covector": ("always", "never"),
        "form": ("always", "never"),
        "metric": ("always", "never"),
        "metric field": ("always", "never"),
        "(0,3)": ("always", "never"),
        "cometric": ("never", "always"),
        "(3,0)": ("never", "always"),
        "endomorphism": ("never", "never"),
        "transpose": ("never", "never"),
        "(1,2)": ("never", "never"),
        "density": ("never", "never"),
        "log-density": ("never", "never"),
    },
}

CASES = {"submersion": SUBMERSIONS["bent"], "immersion": IMMERSIONS["sphere"], "smooth": SMOOTH["outer product"]}

entries = pytest.mark.parametrize(
    ("law", "what", "along"), [(law, what, along) for law, table in TABLE.items() for what in table for along in (True, False)]
)


class Side:
    """Objects with random numbers in one of the two charts."""

    def __init__(self, chart: geoad.Chart, at: geoad.Point) -> None:
        self.chart, self.at = chart, at

    def make(self, what: str, seed: int = 0) -> Any:
        chart, at, d = self.chart, self.at, self.chart.dim
        half = normal(seed, d, d) / d**0.5
        v, w = (make(chart.layout.unravel(normal(seed + i, d)), at=at) for i, make in ((1, chart.vector), (2, chart.covector)))
        match what:
            case "point":
                return chart.point(at.components)
            case "vector":
                return v
            case "covector":
                return w
            case "form":
                return chart.form(half, at=at)
            case "metric":
                return chart.metric(half @ half.mT + torch.eye(d), at=at)
            case "cometric":
                return chart.cometric(half @ half.mT + torch.eye(d), at=at)
            case "endomorphism":
                return chart.endomorphism(half, at=at)
            case "transpose":
                return chart.endomorphism(half, at=at).mT
            case "(0,3)":
                return torch.einsum("i,j,k->ijk", w, w, w)
            case "(3,0)":
                return torch.einsum("i,j,k->ijk", v, v, v)
            case "(1,2)":
                return torch.einsum("i,j,k->ijk", v, w, w)
            case "density":
                return self.make("metric", seed).det() ** 0.5
            case "log-density":
                return self.make("metric", seed).logdet()
            case "function":
                return chart.scalar_field(lambda x: loss(chart.layout.ravel(chart.pack(x))))
            case _:
                return geoad.metrics.Euclidean(chart)

    def again(self, thing: Any) -> Any:
        """The object made anew of its numbers in this chart: it does not know where it came from."""
        chart, at = self.chart, self.at
        match thing:
            case geoad.Point():
                return chart.point(thing.components)
            case geoad.Vector():
                return chart.vector(thing.components, at=at)
            case geoad.Covector():
                return chart.covector(thing.components, at=at)
            case geoad.Form() | geoad.HorizontalMetric():
                return chart.form(thing.to_dense(), at=at)
            case geoad.Cometric():
                return chart.cometric(thing.to_dense(), at=at)
            case geoad.Endomorphism():
                return chart.endomorphism(thing.to_dense(), at=at)
            case geoad.tensors.DualEndomorphism():
                return chart.endomorphism(thing.mT.to_dense(), at=at).mT
            case _:
                return geoad.GeoTensor(dense(thing), thing.axes, at)


def moved(thing: Any, end: Side) -> Any:
    """The object in the other chart; fields are evaluated there."""
    if callable(thing) and hasattr(thing, "home") and not hasattr(thing, "at"):
        return thing.to(end.chart)(end.at)
    return thing.to(end.chart)


@entries
def test_entry(law: str, what: str, along: bool) -> None:
    s = Setting(CASES[law])
    theta, psi = Side(s.theta, s.p), Side(s.psi, s.q)
    start, end = (theta, psi) if along else (psi, theta)
    verdict = TABLE[law][what][0 if along else 1]
    generic = start.make(what)
    if what == "point":
        _point(verdict, generic, start, end)
    elif verdict == "always":
        moved(generic, end)
    else:
        with refused():
            moved(generic, end)
    if verdict == "if" and what in ("function", "metric field"):
        _basic_field(what, s)
    elif verdict == "if" and what != "point":
        there = end.make(what, 7)
        special = start.again(there.to(start.chart))
        found = special.to(end.chart)
        assert close(_numbers(found), _numbers(there), 1e-7)


def _numbers(thing: Any) -> torch.Tensor:
    return thing.to_dense() if hasattr(thing, "to_dense") else thing.ravel() if hasattr(thing, "ravel") else dense(thing)


def _point(verdict: str, p: geoad.Point, start: Side, end: Side) -> None:
    if verdict == "always":
        assert p.to(end.chart).chart == end.chart
    elif verdict == "if":
        assert close(p.to(end.chart).ravel(), end.at.ravel(), 1e-9)
        with pytest.raises(ChartDomainError, match=f"'{end.chart.name}'"):
            start.chart.point(start.chart.layout.unravel(p.ravel() + normal(3, start.chart.dim))).to(end.chart)
    else:
        with pytest.raises(NotADiffeomorphismError, match="a point has no law"):
            p.to(end.chart)


def _basic_field(what: str, s: Setting) -> None:
    """A function, or a form, that was given in ψ but belongs to θ."""
    if what == "function":
        basic = s.psi.scalar_field(lambda y: loss(CASES["submersion"].plain(y)))
        assert close(basic.to(s.theta)(s.p), loss(s.x))
        return
    pulled = s.psi.metric_field(lambda y: CASES["submersion"].jacobian(y).mT @ CASES["submersion"].jacobian(y))
    assert close(pulled(s.p).to_dense(), torch.eye(s.d), 1e-8)


@entries
def test_the_table_in_code_is_this_one(law: Any, what: str, along: bool) -> None:
    indices = {
        "vector": (1, 0),
        "covector": (0, 1),
        "form": (0, 2),
        "metric": (0, 2),
        "cometric": (2, 0),
        "endomorphism": (1, 1),
        "transpose": (1, 1),
        "(0,3)": (0, 3),
        "(3,0)": (3, 0),
        "(1,2)": (1, 2),
    }
    if what in indices:
        assert rule(law, along, *indices[what]) == TABLE[law][what][0 if along else 1]


@pytest.mark.parametrize("what", TABLE["submersion"])
def test_everything_moves_both_ways_under_a_change_of_coordinates(what: str) -> None:
    theta = geoad.Chart({"x": (3,)}, "theta")
    psi = theta.reparametrize(geoad.maps.Sinh(), "psi").target
    p = theta.point(normal(1, 3))
    for start, end in ((theta, psi), (psi, theta)):
        moved(Side(start, p.to(start)).make(what), Side(end, p.to(end)))


@pytest.mark.parametrize("law", CASES)
def test_sections_move_points_only(law: str) -> None:
    """Nothing is differentiated along a section, which is only a choice; the map itself has its derivative."""
    s = Setting(CASES[law])
    theta, psi = Side(s.theta, s.p), Side(s.psi, s.q)
    for ask in (
        lambda: geoad.jacobian(s.phi)(s.p),
        lambda: geoad.pushforward(s.phi, theta.make("vector")),
        lambda: geoad.pullback(s.phi, psi.make("covector"), at=s.p),
        lambda: geoad.pullback(s.phi, psi.make("form"), at=s.p),
        lambda: geoad.pullback(s.phi, geoad.metrics.Euclidean(s.psi)),
        lambda: geoad.metrics.Pullback(s.phi, geoad.metrics.Euclidean(s.psi)),
    ):
        with refused(".*section"):
            ask()
    back = s.phi.inverse
    assert close(geoad.jacobian(back)(s.q).components.reshape(s.d, s.dim), s.jacobian)
    u, w = psi.make("vector"), theta.make("covector")
    assert close(geoad.pushforward(back, u).ravel(), s.jacobian @ u.ravel())
    assert close(geoad.pullback(back, w, at=s.q).ravel(), s.jacobian.mT @ w.ravel())
    pulled = geoad.metrics.Pullback(back, geoad.metrics.Euclidean(s.theta))
    assert close(pulled(s.q).to_dense(), s.jacobian.mT @ s.jacobian)
