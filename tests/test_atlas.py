"""Atlases: domains, transitions, fields on overlaps, curves that cross from chart to chart."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
from typing import Any, ClassVar

import pytest
import torch
from connection_cases import close
from torch import Tensor

import geoad
from geoad import maps
from geoad.charts import singles
from geoad.errors import (
    BasePointError,
    ChartDomainError,
    ChartMismatchError,
    GeometryError,
    VarianceError,
)
from geoad.maps.domain import Domain
from geoad.testing import DiffeomorphismConformance

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


# -- the maps ------------------------------------------------------------------------------------------------------------


class TestPolarPlane(DiffeomorphismConformance):
    layout: ClassVar = {"x": (3, 2)}

    def make(self) -> maps.PolarPlane:
        return maps.PolarPlane(0.3, centre=(0.02, -0.01))

    def outside(self) -> list[dict[str, Tensor]]:
        cut = torch.tensor([0.02 + math.cos(0.3), -0.01 + math.sin(0.3)])
        centre = torch.tensor([0.02, -0.01])
        far = torch.ones(2, 2)
        return [{"x": torch.cat([each[None], -far])} for each in (cut, centre)]


class TestInversion(DiffeomorphismConformance):
    layout: ClassVar = {"x": (2, 2)}

    def make(self) -> maps.Inversion:
        return maps.Inversion(1.5)

    def outside(self) -> list[dict[str, Tensor]]:
        return [{"x": torch.zeros(2, 2)}, {"x": torch.full((2, 2), 1e200)}]


class TestWrap(DiffeomorphismConformance):
    layout: ClassVar = {"x": (3,)}

    def make(self) -> maps.Wrap:
        return maps.Wrap(start=-math.pi, into=torch.tensor([0.0, -math.pi, -0.05]))

    def outside(self) -> list[dict[str, Tensor]]:
        return [{"x": torch.tensor([0.0, 1.0, 1.0])}, {"x": torch.tensor([1.0, 4.0, 1.0])}]


class TestFunctions(DiffeomorphismConformance):
    layout: ClassVar = {"x": (2,), "y": (2,)}

    def make(self) -> maps.Functions:
        return maps.Functions(shear, unshear, {"x < 5": small}, {"x < 5": small})

    def outside(self) -> list[dict[str, Tensor]]:
        return [{"x": torch.full((2,), 6.0), "y": torch.zeros(2)}]


def shear(c: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"x": c["x"], "y": c["y"] + c["x"] ** 2}


def unshear(c: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"x": c["x"], "y": c["y"] - c["x"] ** 2}


def small(c: dict[str, Tensor]) -> Tensor:
    return c["x"] < 5


def test_the_cut_of_the_plane_is_where_it_is_said() -> None:
    xy = geoad.Chart((2,), name="xy")
    for cut in (math.pi, 2 * math.pi, 0.5, -7.0):
        polar = xy.reparametrize(maps.PolarPlane(cut), name="polar").target
        p = xy.point(torch.tensor([0.3, -0.7]))
        radius, angle = p.to(polar).components
        close(radius, p.components.norm())
        close(angle.cos() * radius, p.components[0])
        assert cut - 2 * math.pi < float(angle) < cut
        with pytest.raises(ChartDomainError, match=r"chart 'polar'.*the angle needs"):
            polar.point(torch.tensor([1.0, cut + 0.1]))
    with pytest.raises(ChartDomainError, match=r"chart 'polar'.*lies on the cut"):
        xy.point(torch.tensor([-1.0, 0.0])).to(xy.reparametrize(maps.PolarPlane(), name="polar").target)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: maps.PolarPlane(math.inf), "finite angle"),
        (lambda: maps.PolarPlane(centre=(0.0, 0.0, 0.0)), "two numbers"),
        (lambda: maps.PolarPlane().bind(geoad.params.Layout({"x": (3,)})), "Polar coordinates of longer vectors"),
        (lambda: maps.Inversion(0.0), "radius > 0"),
        (lambda: maps.Wrap(period=-1.0), "period"),
        (lambda: maps.Wrap(into=torch.zeros(2)).bind(geoad.params.Layout({"x": (3,)})), "each entry|Each entry"),
        (lambda: maps.Functions(1, abs), "must be a function"),  # type: ignore[arg-type]
        (lambda: maps.Functions(str, str).bind(geoad.params.Layout({"x": (3,)})).forward({"x": torch.ones(3)}), "returned str"),
    ],
)
def test_maps_refuse(make: Any, words: str) -> None:
    with pytest.raises(GeometryError, match=words):
        make()


# -- domains -------------------------------------------------------------------------------------------------------------


def half_plane() -> geoad.Chart:
    return geoad.Chart((2,), name="half plane", domain={"y > 0": lambda x: x[1] > 0})


def test_points_outside_are_refused() -> None:
    chart = half_plane()
    p = chart.point(torch.tensor([1.0, 2.0]))
    with pytest.raises(ChartDomainError, match=r"outside the domain of chart 'half plane': y > 0"):
        chart.point(torch.tensor([1.0, 0.0]))
    with pytest.raises(ChartDomainError, match=r"point 1 of 3 lies outside the domain of chart 'half plane': y > 0"):
        chart.point(torch.tensor([[1.0, 1.0], [0.0, -1.0], [0.0, 1.0]]))
    down = chart.vector(torch.tensor([0.0, -3.0]), at=p)
    with pytest.raises(ChartDomainError, match="y > 0"):
        p.retract(down)
    close(p.retract(down, 0.5).components, torch.tensor([1.0, 0.5]))
    with pytest.raises(ChartDomainError, match="y > 0"):
        geoad.interpolate(p, chart.point(torch.tensor([0.0, 1.0])), 3.0)
    euclidean, bent = geoad.metrics.Euclidean(chart), chart.metric_field(lambda x: x[1].exp() * torch.eye(2))
    for metric in (None, euclidean, bent):
        with pytest.raises(ChartDomainError, match="y > 0"):
            geoad.geodesic(metric, p, down, 3.0, steps=8)
    with pytest.raises(ChartDomainError, match="y > 0"):
        geoad.flow(lambda q: chart.vector(torch.tensor([0.0, -1.0]), at=q), p, 3.0, steps=8)
    psi = chart.reparametrize(maps.Sinh(), name="psi").target
    with pytest.raises(ChartDomainError, match="half plane"):
        psi.point(torch.tensor([1.0, -2.0]))
    # values cannot be read inside of a transform
    assert torch.func.vmap(lambda x: chart.point(x).components[1])(torch.ones(3, 2)).shape == (3,)


def test_a_part_of_the_image_of_a_map() -> None:
    xy = geoad.Chart((2,), name="xy")
    sector = xy.reparametrize(maps.PolarPlane(), "sector", domain={"|φ| < 1": lambda x: x[1].abs() < 1}).target
    assert sector.point(torch.tensor([1.0, 0.5])).to(xy).to(sector).chart is sector
    for raises in (lambda: sector.point(torch.tensor([1.0, 1.5])), lambda: xy.point(torch.tensor([0.0, 1.0])).to(sector)):
        with pytest.raises(ChartDomainError, match=r"chart 'sector'.*\|φ\| < 1"):
            raises()
    batch = xy.point(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]]))
    with pytest.raises(ChartDomainError, match=r"2 of 3 points, number 1 for instance: \|φ\| < 1"):
        batch.to(sector)


def test_predicates() -> None:
    x = torch.tensor([1.0, -1.0])

    def positive(x: Tensor) -> Tensor:
        return x > 0

    assert Domain(positive).violated(x) == "positive (violated by 1 of 2 entries)"
    assert Domain({"a": lambda x: True, "b": lambda x: None, "c": lambda x: torch.tensor(True)}).violated(x) is None
    assert Domain({"a": lambda x: "some words"}).violated(x) == "some words"
    assert Domain({"a": lambda x: False}).violated(x) == "a"
    with pytest.raises(GeometryError, match="not a function"):
        geoad.Chart((2,), domain={"a": True})  # type: ignore[dict-item]
    named = geoad.Chart({"mu": (), "sigma": ()}, name="normal", domain={"sigma > 0": lambda c: c["sigma"] > 0})
    with pytest.raises(ChartDomainError, match="sigma > 0"):
        named.point({"mu": 0.0, "sigma": -1.0})


# -- construction --------------------------------------------------------------------------------------------------------


def pair_of_charts() -> tuple[geoad.Chart, geoad.Chart]:
    return geoad.Chart((2,), name="north"), geoad.Chart((2,), name="south")


def test_an_atlas_refuses() -> None:
    north, south = pair_of_charts()
    polar = north.reparametrize(maps.Sinh()).target
    inversion = maps.Inversion()
    cases: list[tuple[Any, Any, str]] = [
        ([], {}, "at least one chart"),
        ([north, "south"], {}, "found str"),
        ([north, polar], {}, "belongs to the tree"),
        ([north, geoad.Chart((3,), name="x")], {}, "same names and shapes"),
        ([north, geoad.Chart((2,), name="north")], {}, "called 'north'"),
        ([north, south], {}, "no transitions lead"),
        ([north, south], {("north", "east"): inversion}, "no chart 'east'"),
        ([north, south], {(north, south): inversion, (south, north): inversion}, "given twice"),
        ([north, south], {(north, north): inversion}, "leads nowhere"),
        ([north, south], {(north, south): maps.Scale(2.0, learnable=True)}, "learnable"),
    ]
    for charts, transitions, words in cases:
        with pytest.raises(GeometryError, match=words):
            geoad.Atlas(charts, transitions)
    assert north.atlas is None  # a refused atlas leaves no trace
    atlas = geoad.Atlas([north, south], {("north", "south"): inversion}, name="sphere")
    assert repr(atlas) == "Atlas('sphere', dim=2, charts=['north', 'south'])"
    assert north.atlas is atlas and polar.atlas is atlas
    with pytest.raises(GeometryError, match="belongs to the atlas 'sphere'"):
        geoad.Atlas([north], {})
    with pytest.raises(ChartMismatchError, match="different manifolds"):
        north.point(torch.ones(2)).to(geoad.Chart((2,)))
    with pytest.raises(ChartMismatchError, match="different manifolds"):
        north.point(torch.ones(2)).to(geoad.atlases.Sphere(2).chart("north"))
    for make in (geoad.atlases.Sphere, geoad.atlases.Torus, geoad.atlases.ProjectiveSpace):
        with pytest.raises(GeometryError, match="dimension"):
            make(0)
    with pytest.raises(GeometryError, match="radius"):
        geoad.atlases.Sphere(2, -1.0)


def test_points_have_one_token_in_all_charts() -> None:
    sphere = geoad.atlases.Sphere(2)
    north, south = sphere.charts
    p = north.point(torch.tensor([0.6, -0.8]) * 2)
    assert p.to(south).to(north) is p
    assert p.to(south) is p.to(south)
    close(p.to(south).components, torch.tensor([0.3, -0.4]))
    phi = sphere.transition("north", "south")
    assert phi(p) is p.to(south)
    assert sphere.transition("south", "north") is phi.inverse
    assert sphere.charts_at(p) == [south, north]
    assert sphere.best(p) is p.to(south)
    with pytest.raises(ChartDomainError, match=r"chart 'south'.*must not be zero.*charts_at"):
        north.point(torch.zeros(2)).to(south)
    with pytest.raises(ChartDomainError, match=r"2 of 4 points, number 1"):
        north.point(torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0]])).to(south)
    assert sphere.charts_at(north.point(torch.zeros(2))) == [north]


# -- the law table -------------------------------------------------------------------------------------------------------


def jacobian_of_inversion(x: Tensor) -> Tensor:
    result: Any = torch.func.jacfwd(lambda x: x / (x @ x))(x)
    return result


def test_every_object_moves_by_its_law() -> None:
    torch.manual_seed(0)
    sphere = geoad.atlases.Sphere(3)
    north, south = sphere.charts
    x = torch.tensor([0.7, -0.4, 0.9])
    p = north.point(x)
    j = jacobian_of_inversion(x)
    k = torch.linalg.inv(j)
    a, b = torch.randn(3, 3), torch.randn(3, 3)
    positive = a @ a.mT + torch.eye(3)
    u, w = torch.randn(3), torch.randn(3)
    close(north.vector(u, at=p).to(south).components, j @ u)
    close(north.covector(w, at=p).to(south).components, k.mT @ w)
    close(north.form(b, at=p).to(south).to_dense(), k.mT @ b @ k)
    close(north.metric(positive, at=p).to(south).to_dense(), k.mT @ positive @ k)
    close(north.cometric(positive, at=p).to(south).to_dense(), j @ positive @ j.mT)
    close(north.endomorphism(b, at=p).to(south).to_dense(), j @ b @ k)
    t = torch.randn(3, 3, 3)
    typed = torch.einsum("ij,k->ijk", north.form(b, at=p), north.vector(u, at=p))
    close(typed.to(south).to_dense(), torch.einsum("ij,k->ijk", k.mT @ b @ k, j @ u))
    density = north.metric(positive, at=p).det()
    close(density.to(south).value, torch.linalg.det(positive) * torch.linalg.det(k) ** 2)
    close(density.log().to(south).value, density.to(south).value.log())
    del t
    # back in the same numbers, and in float32
    close(north.vector(u, at=p).to(south).to(north).components, u)
    single = north.vector(u, at=p).to(torch.float32).to(south).components
    assert single.dtype == torch.float32
    close(single.double(), j @ u, 1e-5)


def test_invariants_are_the_same_in_both_charts() -> None:
    torch.manual_seed(1)
    sphere = geoad.atlases.Sphere(2)
    north, south = sphere.charts
    metric = sphere.metric
    for x in torch.randn(3, 2):
        p = north.point(x)
        q = p.to(south)
        v, w = north.vector(torch.randn(2), at=p), north.covector(torch.randn(2), at=p)
        h = north.form(torch.randn(2, 2), at=p)
        h = 0.5 * (h + h.mT)
        close(w(v), w.to(south)(v.to(south)))
        close(metric(p).norm(v), metric(q).norm(v.to(south)))
        e = metric(p).inverse() @ h
        moved = metric(q).inverse() @ h.to(south)
        close(e.trace(), moved.trace())
        close(e.det(), moved.det())
        close(e.eigenvalues(), moved.eigenvalues())
        close(geoad.eigh(h, metric=metric(p))[0], geoad.eigh(h.to(south), metric=metric(q))[0])
        close((h.slogdet()[1] - metric(p).logdet()).exp(), (h.to(south).slogdet()[1] - metric(q).logdet()).exp())
        with pytest.raises(ChartMismatchError, match="Move one of them first"):
            v + v.to(south)


def test_trees_hang_off_every_chart() -> None:
    sphere = geoad.atlases.Sphere(2)
    north, south = sphere.charts
    a = north.reparametrize(maps.Sinh(), name="a").target
    b = south.reparametrize(maps.PolarPlane(), name="b").target.reparametrize(maps.Asinh(), name="c").target
    p = a.point(torch.tensor([0.5, 1.5]))
    v = a.vector(torch.tensor([0.3, -0.2]), at=p)
    x = p.to(north).components
    there = v.to(b)
    assert there.chart is b
    close(p.to(b).to(south).components, x / (x @ x))
    close(there.to(south).components, jacobian_of_inversion(x) @ v.to(north).components)
    close(sphere.metric(p).norm(v), sphere.metric(p.to(b)).norm(there))
    assert p.to(b).to(a) is p


# -- the cocycle property ------------------------------------------------------------------------------------------------


def test_cocycle() -> None:
    torch.manual_seed(0)
    for atlas in (
        geoad.atlases.Sphere(3),
        geoad.atlases.ProjectiveSpace(2),
        geoad.atlases.Torus(2),
        geoad.atlases.PuncturedPlane(),
    ):
        points = atlas.charts[0].point(0.3 + torch.rand(2, atlas.dim))
        assert atlas.check_cocycle(points) < 1e-13
        assert atlas.check_cocycle([points[0].to(atlas.charts[-1])]) < 1e-13
        single = atlas.charts[0].point(torch.full((atlas.dim,), 0.7, dtype=torch.float32))
        assert atlas.check_cocycle(single) < 1e-5
    space = geoad.atlases.ProjectiveSpace(2)
    assert space.check_cocycle([]) == 0.0


class Wrong(maps.Inversion):
    def push_block(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return v


def projective(**wrong: Any) -> geoad.Atlas:
    """RP² with one transition replaced."""
    charts = [geoad.Chart((2,), name=str(i)) for i in range(3)]
    given = {
        "01": (lambda x: torch.stack([1 / x[0], x[1] / x[0]]), lambda y: torch.stack([1 / y[0], y[1] / y[0]])),
        "02": (lambda x: torch.stack([1 / x[1], x[0] / x[1]]), lambda y: torch.stack([y[1] / y[0], 1 / y[0]])),
        "12": (lambda x: torch.stack([x[0] / x[1], 1 / x[1]]), lambda y: torch.stack([y[0] / y[1], 1 / y[1]])),
    } | wrong
    return geoad.Atlas(charts, {(name[0], name[1]): pair for name, pair in given.items()}, name="RP2")


def test_a_wrong_transition_is_caught() -> None:
    right = projective()
    x = torch.tensor([0.5, -1.5])
    p = right.chart("0").point(x)
    assert right.check_cocycle(p) < 1e-14
    close(p.to(right.chart("2")).components, torch.tensor([1 / -1.5, 0.5 / -1.5]))
    # a diffeomorphism with its inverse, but another one: only three charts together show it
    turned = (lambda x: torch.stack([-1 / x[1], x[0] / x[1]]), lambda y: torch.stack([-y[1] / y[0], -1 / y[0]]))
    wrong = projective(**{"02": turned})
    with pytest.raises(GeometryError, match=r"two transitions do not make the third, '0' -> '1' -> '2'"):
        wrong.check_cocycle(wrong.chart("0").point(x))
    # an inverse that is none
    lost = (lambda x: torch.stack([1 / x[0], x[1] / x[0]]), lambda y: torch.stack([1 / y[0], y[1]]))
    wrong = projective(**{"01": lost})
    with pytest.raises(GeometryError, match="there and back is not the identity"):
        wrong.check_cocycle(wrong.chart("0").point(x))
    # Jacobian products that are not those of the map
    north, south = pair_of_charts()
    atlas = geoad.Atlas([north, south], {(north, south): Wrong()})
    with pytest.raises(GeometryError, match="Jacobian products are not the derivative"):
        atlas.check_cocycle(north.point(x))


def ring() -> geoad.Atlas:
    """Four arcs of the circle, each joined to its neighbours only."""
    names = "abcd"
    domain = {"|angle| < 1.3": lambda x: x.abs() < 1.3}
    charts = [geoad.Chart((1,), name=name, domain=domain) for name in names]
    quarter = math.pi / 2

    def turn(x: Tensor) -> Tensor:
        return x - quarter

    def back(x: Tensor) -> Tensor:
        return x + quarter

    pairs = zip(names, names[1:] + names[:1], strict=True)
    return geoad.Atlas(charts, dict.fromkeys(pairs, (turn, back)), name="ring")


def test_detours() -> None:
    atlas = ring()
    a, b, c, _ = atlas.charts
    p = a.point(torch.tensor([1.2]))  # lies in a and b only
    assert atlas.charts_at(p) == [a, b]
    with pytest.raises(ChartMismatchError, match="no direct transition"):
        atlas.transition(a, c)
    with pytest.raises(ChartDomainError, match=r"chart 'c'.*1.3"):
        p.to(c)
    # three wide arcs, a and c joined through b only
    wide = [geoad.Chart((1,), name=name) for name in "abc"]
    chain = geoad.Atlas(wide, {("a", "b"): maps.Scale(2.0), ("b", "c"): maps.Scale(3.0)})
    q = wide[0].point(torch.tensor([1.0]))
    close(q.to(wide[2]).components, torch.tensor([6.0]))
    close(wide[0].vector(torch.tensor([1.0]), at=q).to(wide[2]).components, torch.tensor([6.0]))
    assert chain.check_cocycle(q) < 1e-14


def test_of_two_detours_the_one_is_taken_that_contains_the_point() -> None:
    square = [geoad.Chart((1,), name=name) for name in ("start", "end")]
    left = geoad.Chart((1,), name="left", domain={"x < 0": lambda x: x < 0})
    right = geoad.Chart((1,), name="right", domain={"x > 0": lambda x: x > 0})
    ways = {("start", "left"): maps.Identity(), ("left", "end"): maps.Identity()}
    ways |= {("start", "right"): maps.Identity(), ("right", "end"): maps.Identity()}
    atlas = geoad.Atlas([*square, left, right], ways)
    for x in (-1.0, 1.0):
        p = square[0].point(torch.tensor([x]))
        v = square[0].vector(torch.tensor([2.0]), at=p)
        w = square[0].covector(torch.tensor([2.0]), at=p)
        close(p.to(square[1]).components, torch.tensor([x]))
        close(w.to(square[1])(v.to(square[1])), torch.tensor(4.0))
        assert {chart.name for chart in atlas.charts_at(p)} == {"start", "end", "left" if x < 0 else "right"}
    f = square[1].scalar_field(lambda x: x[0])
    close(f(square[0].point(torch.ones(1))), torch.tensor(1.0))
    with pytest.raises(ChartMismatchError, match="several ways"):
        f.in_home(square[0])
    # a longer way, if the shortest does not contain the point
    low, high = (geoad.Chart((1,), name=name, domain={"x > 2": lambda x: x > 2}) for name in ("low", "high"))
    ends = [geoad.Chart((1,), name=name) for name in ("first", "last")]
    near = geoad.Chart((1,), name="near", domain={"x < 2": lambda x: x < 2})
    pairs = [("first", "near"), ("near", "last"), ("first", "low"), ("low", "high"), ("high", "last")]
    geoad.Atlas([*ends, near, low, high], dict.fromkeys(pairs, maps.Scale(1.0)))
    for x in (1.0, 3.0):
        close(ends[0].point(torch.tensor([x])).to(ends[1]).components, torch.tensor([x]))
    with pytest.raises(ChartDomainError, match="x < 0"):
        square[0].point(torch.tensor([[-1.0], [1.0]])).to(square[1])


# -- fields --------------------------------------------------------------------------------------------------------------


def height(sphere: geoad.atlases.Sphere) -> Any:
    """The last coordinate of the surrounding space."""
    return sphere.scalar_field({"north": lambda x: (1 - x @ x) / (1 + x @ x), "south": lambda x: (x @ x - 1) / (x @ x + 1)})


def rough_function(sphere: geoad.atlases.Sphere) -> Any:
    """A function without symmetry, through the embedding."""

    def fn(y: Tensor) -> Tensor:
        return y[0] * y[2] + (2 * y[1] + y[2]).sin()

    return sphere.scalar_field({chart: lambda x, c=chart: fn(sphere._embedding(c, x)) for chart in sphere.charts})


def rough_metric(sphere: geoad.atlases.Sphere) -> Any:
    """The pull-back of a metric of the surrounding space."""
    ambient = sphere.ambient.metric_field(lambda y: torch.eye(3) + torch.outer(y.sin(), y.sin()))
    fields = {c: geoad.metrics.Pullback(lambda x, c=c: sphere._embedding(c, x), ambient, c) for c in sphere.charts}
    return sphere.metric_field(fields)


def test_fields_are_one_on_the_overlap() -> None:
    sphere = geoad.atlases.Sphere(2)
    north, south = sphere.charts
    points = north.point(torch.tensor([[0.5, 1.0], [-2.0, 0.1], [0.7, 0.7]]))
    assert rough_function(sphere).check_compatible(points) < 1e-14
    assert rough_metric(sphere).check_compatible([points[0], points[1].to(south)]) < 1e-13
    assert sphere.metric.check_compatible(points) < 1e-14
    wrong = sphere.scalar_field({north: lambda x: x[0], south: lambda x: x[0]})
    with pytest.raises(GeometryError, match="are not one field"):
        wrong.check_compatible(points)
    for refuse, words in (
        (lambda: sphere.scalar_field({}), "at least one chart"),
        (lambda: sphere.scalar_field(lambda x: x), "found function"),
        (lambda: sphere.scalar_field({"east": lambda x: x}), "no chart 'east'"),
        (lambda: sphere.metric_field({north: geoad.metrics.Euclidean(south)}), "computed in chart 'south'"),
    ):
        with pytest.raises(GeometryError, match=words):
            refuse()


def test_derivatives_agree_across_charts() -> None:
    sphere = geoad.atlases.Sphere(2)
    north, south = sphere.charts
    f, metric = rough_function(sphere), rough_metric(sphere)
    x = torch.tensor([0.8, -0.7])
    p = north.point(x)
    q = p.to(south)
    close(f(p), f(q))
    # independently: plain torch.func in the other chart
    close(geoad.grad(f)(q).components, torch.func.grad(f.function(south))(q.components))
    close(geoad.grad(f)(p).to(south).components, geoad.grad(f)(q).components)
    close(geoad.riemannian_grad(f, metric)(p).to(south).components, geoad.riemannian_grad(f, metric)(q).components)
    close(geoad.hessian(f, metric)(p).to(south).to_dense(), geoad.hessian(f, metric)(q).to_dense())
    close(geoad.christoffel(metric)(p).to(south).components, geoad.christoffel(metric)(q).components)
    second = geoad.covariant_derivative(geoad.grad(f), metric)
    close(second(p).to(south).to_dense(), second(q).to_dense())
    close(second(q).to_dense(), geoad.hessian(f, metric)(q).to_dense())
    value, slope = geoad.value_and_grad(f)(q)
    close(value, f(p))
    assert slope.chart is south
    # a batch
    batch = north.point(torch.tensor([[0.5, 1.0], [-2.0, 0.1]]))
    close(geoad.grad(f)(batch).to(south).components, geoad.grad(f)(batch.to(south)).components)
    close(geoad.hessian(f, metric)(batch)[1].to_dense(), geoad.hessian(f, metric)(batch[1]).to_dense())
    close(metric(batch)[0].to_dense(), metric(batch[0]).to_dense())


def test_the_hessian_of_the_height_is_closed() -> None:
    """On the unit sphere the height h has the Hessian -h G, and its gradient has the length² 1 - h²."""
    sphere = geoad.atlases.Sphere(2, radius=1.0)
    h, metric = height(sphere), sphere.metric
    for name in ("north", "south"):
        p = sphere.chart(name).point(torch.tensor([0.3, 1.2]))
        close(geoad.hessian(h, metric)(p).to_dense(), -h(p) * metric(p).to_dense())
        close(metric(p).norm(geoad.riemannian_grad(h, metric)(p)) ** 2, 1 - h(p) ** 2)
    # the round metric is the induced one
    big = geoad.atlases.Sphere(2, radius=2.5)
    p = big.chart("north").point(torch.tensor([0.3, 1.2]))
    j: Any = torch.func.jacfwd(lambda x: big._embedding(p.chart, x))(p.components)
    close(big.metric(p).to_dense(), j.mT @ j)


def test_algebra_of_fields() -> None:
    sphere = geoad.atlases.Sphere(2)
    north, south = sphere.charts
    f, h = rough_function(sphere), height(sphere)
    only = north.scalar_field(lambda x: x[0] ** 2)
    p = north.point(torch.tensor([0.5, 1.0]))
    for q in (p, p.to(south)):
        a, b, c = f(q), h(q), only(q)
        combined = [
            (f + h, a + b), (f - 2.0, a - 2), (2.0 - f, 2 - a), (3 * f * h, 3 * a * b), (f / h, a / b), (-f, -a), (f**2, a**2),
            (h.map(torch.exp), b.exp()),
            (1 / h, 1 / b), (f + only, a + c), (only + f, a + c), (only * h, c * b), (f / 4, a / 4),
        ]  # fmt: skip
        for field, value in combined:
            close(field(q), value)
            close(geoad.grad(field)(q).to(north).components, geoad.grad(field)(p).components)
        close(f.to(south)(q), a)
    metric, other = sphere.metric, rough_metric(sphere)
    total = metric + 0.5 * other
    close(total(p).to_dense(), metric(p).to_dense() + 0.5 * other(p).to_dense())
    close(total(p.to(south)).to(north).to_dense(), total(p).to_dense())
    assert type((metric - other)(p)) is geoad.Form
    close((f.map(torch.exp) * metric)(p).to_dense(), f(p).exp() * metric(p).to_dense())
    close(geoad.hessian(f, total)(p.to(south)).to(north).to_dense(), geoad.hessian(f, total)(p).to_dense())
    apart = north.metric_field(lambda x: torch.eye(2)) + south.metric_field(lambda x: torch.eye(2))
    k = jacobian_of_inversion(p.components)
    close(apart(p).to_dense(), torch.eye(2) + k.mT @ k)
    with pytest.raises(GeometryError, match=r"field\.local\(p\)"):
        metric.product({"x": torch.ones(2)}, {"x": torch.ones(2)})
    with pytest.raises(GeometryError, match=r"field\.local\(p\)"):
        list(f.parts())


def test_a_field_of_one_chart_works_where_that_covers() -> None:
    sphere = geoad.atlases.Sphere(2)
    north, south = sphere.charts
    pole = south.point(torch.zeros(2))
    inside = south.point(torch.tensor([0.5, 0.0]))
    f, metric = north.scalar_field(lambda x: x[0]), sphere.metric
    part = sphere.scalar_field({north: lambda x: x[0]})
    close(f(inside), torch.tensor(2.0))
    close(part(inside), torch.tensor(2.0))
    close(geoad.hessian(f, metric)(inside).to(north).to_dense(), geoad.hessian(f, metric)(inside.to(north)).to_dense())
    for ask in (
        lambda: f(pole), lambda: part(pole), lambda: (part + height(sphere))(pole), lambda: (f + height(sphere))(pole),
        lambda: geoad.grad(f)(pole), lambda: geoad.grad(part)(pole), lambda: geoad.hessian(f, metric)(pole),
        lambda: part(south.point(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))),
        lambda: north.metric_field(lambda x: torch.eye(2))(pole),
    ):  # fmt: skip
        with pytest.raises(ChartDomainError):
            ask()
    with pytest.raises(ChartDomainError, match="none of which contains the point"):
        part(pole)
    other = geoad.atlases.Sphere(2)
    with pytest.raises(ChartMismatchError, match="another manifold"):
        part(other.chart("north").point(torch.ones(2)))


@pytest.mark.parametrize(
    "chart", [geoad.Chart((2,), name="xy"), geoad.atlases.Sphere(2).chart("north")], ids=["chart", "atlas"]
)
def test_fields_of_other_manifolds_are_refused(chart: geoad.Chart) -> None:
    sphere = geoad.atlases.Sphere(2)
    h, metric = height(sphere), sphere.metric
    p = chart.point(torch.ones(2))
    v = chart.vector(torch.ones(2), at=p)
    for ask in (
        lambda: h(p), lambda: metric(p), lambda: geoad.riemannian_grad(h, metric)(p), lambda: geoad.christoffel(metric)(p),
        lambda: geoad.geodesic(metric, p, v), lambda: geoad.parallel_transport(metric, lambda s: p, v, steps=2),
        lambda: h + chart.scalar_field(lambda x: x[0]), lambda: metric + geoad.metrics.Euclidean(chart),
        lambda: geoad.hessian(h, geoad.metrics.Euclidean(chart)), lambda: geoad.covariant_derivative(h, metric)(p),
        lambda: geoad.flow(geoad.riemannian_grad(h, metric), p),
    ):  # fmt: skip
        with pytest.raises(ChartMismatchError):
            ask()


def test_products_of_fields() -> None:
    sphere = geoad.atlases.Sphere(2)
    north, south = sphere.charts
    h = height(sphere)
    p = south.point(torch.tensor([0.5, 1.0]))
    v = south.vector(torch.tensor([1.0, -2.0]), at=p)
    value, slope = geoad.jvp(h, (p,), (v,))
    close(value, h(p))
    close(slope, geoad.grad(h)(p)(v))
    close(geoad.vjp(h, p)[1](torch.tensor(2.0)).components, 2 * geoad.grad(h)(p).components)
    phi = sphere.transition(north, south)
    close(geoad.pushforward(phi, v.to(north)).components, v.components)
    close(geoad.jacobian(phi)(p).components, jacobian_of_inversion(p.to(north).components))
    close(geoad.pullback(phi, h)(p), h(p))
    geoad.testing.assert_equivariant(geoad.riemannian_grad(h, sphere.metric), p)
    # inside of transforms
    xs = torch.randn(3, 2)
    close(torch.func.vmap(lambda x: h(north.point(x)))(xs), h(north.point(xs)))
    one = sphere.scalar_field({south: lambda x: (x @ x - 1) / (x @ x + 1)})
    close(torch.func.vmap(lambda x: one(north.point(x)))(xs), h(north.point(xs)))
    close(torch.func.grad(lambda x: one(north.point(x)))(xs[0]), geoad.grad(h)(north.point(xs[0])).components)


def test_charts_of_named_blocks() -> None:
    """The plane in polar coordinates again, with dicts of numbers."""
    domains: list[Any] = [{"r > 0": lambda c: c["r"] > 0, "cut": lambda c: c["a"].abs() < math.pi}]
    domains.append({"r > 0": lambda c: c["r"] > 0, "cut": lambda c: (c["a"] > 0) & (c["a"] < 2 * math.pi)})
    a, b = (geoad.Chart({"r": (), "a": ()}, name=name, domain=domain) for name, domain in zip("ab", domains, strict=True))
    atlas = geoad.Atlas([a, b], {(a, b): {"a": maps.Wrap()}}, name="plane")

    def euclidean(c: Any) -> Tensor:
        return torch.diag(torch.stack([torch.ones_like(c["r"]), c["r"] ** 2]))

    metric = atlas.metric_field({a: euclidean, b: euclidean})
    p = a.point({"r": 1.0, "a": 3.0})
    q, u = geoad.geodesic(metric, p, a.vector({"r": -0.1, "a": 0.8}, at=p), 1.0, steps=20, return_velocity=True)
    assert q.chart is a  # without margins a chart is left only where it ends, and the result comes back to that of the start
    start = torch.tensor([math.cos(3.0), math.sin(3.0)])
    velocity = -0.1 * start + 0.8 * torch.tensor([-math.sin(3.0), math.cos(3.0)])
    found = q.components
    close(torch.stack([found["r"] * found["a"].cos(), found["r"] * found["a"].sin()]), start + velocity, 1e-6)
    close(metric(q).norm(u), velocity.norm(), 1e-6)
    assert atlas.check_cocycle([p, q]) < 1e-14


def test_a_circle_of_latitude_below_a_chart_of_the_sphere() -> None:
    """An immersion into one chart: metrics, gradients and geodesics are those of the circle of radius sin 1."""
    sphere = geoad.atlases.Sphere(2)
    north, south = sphere.charts
    radius = math.tan(0.5)
    around = maps.Immersion(lambda a: radius * torch.cat([a.cos(), a.sin()]), (1,), lambda y: torch.atan2(y[1:], y[:1]))
    chart = north.reparametrize(around, name="circle").target
    p = chart.point(torch.tensor([0.3]))
    v = chart.vector(torch.tensor([2.0]), at=p)
    metric = sphere.metric
    close(metric(p).to_dense(), torch.tensor([[math.sin(1.0) ** 2]]))
    close(geoad.geodesic(metric, p, v, 0.5, steps=4).components, torch.tensor([1.3]))
    f = sphere.scalar_field({"north": lambda x: x[0], "south": lambda x: x[0] / (x @ x)})
    close(geoad.riemannian_grad(f, metric)(p).components, torch.tensor([-radius * math.sin(0.3) / math.sin(1.0) ** 2]))
    close(geoad.hessian(f, metric)(p).to_dense(), torch.tensor([[-radius * math.cos(0.3)]]))
    close(geoad.grad(f)(p.to(south)).to(chart).components, geoad.grad(f)(p).components)
    close(metric(p.to(south)).norm(v.to(south)), metric(p).norm(v))


# -- what has no default --------------------------------------------------------------------------------------------------


def test_what_needs_a_reference_chart_asks_for_a_metric() -> None:
    sphere = geoad.atlases.Sphere(2)
    north = sphere.chart("north")
    p = north.point(torch.tensor([0.5, 1.0]))
    v = north.vector(torch.ones(2), at=p)
    f, metric = height(sphere), sphere.metric
    for ask, words in (
        (lambda: geoad.riemannian_grad(f)(p), r"riemannian_grad\(L, metric\)"),
        (lambda: geoad.hessian(f), r"hessian\(L, metric\)"),
        (lambda: p.retract(v), r"geoad\.geodesic\(metric, p, v"),
        (lambda: p.log(p), "atlas 'S2' of the charts 'north', 'south'"),
        (lambda: geoad.interpolate(p, p, 0.5), r"geodesic\(metric"),
        (lambda: geoad.geodesic(None, p, v), "pass a metric field"),
        (lambda: geoad.christoffel()(p), "pass a metric field"),
        (lambda: geoad.parallel_transport(None, [p, p], v), "pass a metric field"),
        (lambda: geoad.covariant_derivative(geoad.grad(f))(p), "pass a metric field"),
        (lambda: metric(p).solve(geoad.grad(f)(p), damping=0.1), "another_metric"),
        (lambda: geoad.grad(lambda x: x.sum())(p), r"scalar_field\(\{chart: fn"),
        (lambda: geoad.jacobian(lambda x: x)(p), r"scalar_field\(\{chart: fn"),
        (lambda: geoad.hessian(lambda x: x.sum())(p), r"scalar_field\(\{chart: fn"),
        (lambda: geoad.metrics.Pullback(lambda x: x, geoad.metrics.Euclidean(geoad.Chart((2,))))(p), r"chart="),
    ):
        with pytest.raises(GeometryError, match=words):
            ask()


# -- geodesics -----------------------------------------------------------------------------------------------------------


def arrow(sphere: geoad.atlases.Sphere, v: geoad.Vector) -> Tensor:
    """A vector in the surrounding space."""
    return torch.func.jvp(lambda x: sphere._embedding(v.chart, x), (v.at.ravel(),), (v.ravel(),))[1]


def great_circle(sphere: geoad.atlases.Sphere, v: geoad.Vector, time: float) -> Tensor:
    y, w = sphere.embed(v.at), arrow(sphere, v)
    angle = w.norm() * time
    return y * angle.cos() + w / w.norm() * angle.sin()


def test_great_circles_through_both_poles() -> None:
    sphere = geoad.atlases.Sphere(2)
    north, south = sphere.charts
    metric = sphere.metric
    pole = north.point(torch.zeros(2))
    v = north.vector(torch.tensor([0.3, 0.4]), at=pole)  # the length is 1
    times = [math.pi / 4, math.pi, 1.5 * math.pi, -2.0]
    found = geoad.geodesic(metric, pole, v, times, steps=60, return_velocity=True)
    assert [point.chart.name for point, _ in found] == ["north", "south", "north", "south"]
    for time, (point, velocity) in zip(times, found, strict=True):
        close(sphere.embed(point), great_circle(sphere, v, time), 8e-6)  # measured: 4e-6, and 3e-7 with twice the steps
        close(metric(point).norm(velocity), metric(pole).norm(v), 1e-6)
    close(found[1][0].components, torch.zeros(2), 8e-6)  # the south pole
    back = geoad.geodesic(metric, *found[1], -math.pi, chart=north, steps=40)
    close(back.components, pole.components, 1e-5)
    asked = geoad.geodesic(metric, pole, v, math.pi / 4, steps=20, chart=south)
    assert asked.chart is south
    with pytest.raises(ChartDomainError):
        geoad.geodesic(
            metric, south.point(torch.zeros(2)), south.vector(torch.zeros(2), at=south.point(torch.zeros(2))), chart=north
        )


def test_every_chart_starts_the_same_geodesic() -> None:
    sphere = geoad.atlases.Sphere(2)
    north, south = sphere.charts
    psi = north.reparametrize(maps.Sinh(), name="psi").target
    p = north.point(torch.tensor([0.9, 0.2]))
    v = north.vector(torch.tensor([2.0, 1.0]), at=p)
    exact = great_circle(sphere, v, 1.0)
    for chart in (north, south, psi):
        end = geoad.geodesic(sphere.metric, p.to(chart), v.to(chart), steps=24)
        close(sphere.embed(end), exact, 1e-5)
    # the sum of fields, and the pull-back of the surrounding metric, have the same connection
    end = geoad.geodesic(sphere.metric + 2.0 * sphere.metric, p, v, steps=16)
    close(sphere.embed(end), exact, 5e-5)


def test_order_does_not_suffer_from_crossing() -> None:
    sphere = geoad.atlases.Sphere(2)
    p = sphere.chart("north").point(torch.tensor([0.3, 0.1]))
    v = p.chart.vector(torch.tensor([1.0, -1.5]), at=p)
    exact = great_circle(sphere, v, 1.0)
    errors = [float((sphere.embed(geoad.geodesic(sphere.metric, p, v, steps=n)) - exact).norm()) for n in (10, 20, 40)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) > 3.5


def test_batches_go_their_own_ways() -> None:
    sphere = geoad.atlases.Sphere(2)
    north = sphere.chart("north")
    starts = north.point(torch.tensor([[0.1, 0.0], [0.5, 0.5]]))
    v = north.vector(torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[0.5, 0.5], [1.0, 0.0]]]), at=starts)
    ends, velocities = geoad.geodesic(sphere.metric, starts, v, 0.8, steps=8, return_velocity=True)
    assert ends.batch_shape == (2, 2) == velocities.batch_shape
    for i, j in ((0, 1), (1, 0)):
        one = geoad.geodesic(sphere.metric, starts[i], v[i, j], 0.8, steps=8, chart=ends.chart)
        close(ends[i, j].components, one.components, 1e-12)
    # ends at both poles have no common chart
    both = north.point(torch.zeros(2, 2))
    half = north.vector(torch.tensor([[0.0, 0.0], [0.5, 0.0]]), at=both)
    with pytest.raises(ChartDomainError):
        geoad.geodesic(sphere.metric, both, half, math.pi, steps=24, chart=sphere.chart("south"))
    empty = geoad.geodesic(sphere.metric, starts[:0], v[:0, 0], 0.8)
    assert empty.batch_shape == (0,)


def test_derivatives_of_a_crossing_geodesic() -> None:
    sphere = geoad.atlases.Sphere(2)
    north, south = sphere.charts
    p = north.point(torch.tensor([0.2, 0.1]))
    x = torch.tensor([0.8, 0.9])

    def end(v: Tensor) -> Tensor:
        return geoad.geodesic(sphere.metric, p, north.vector(v, at=p), 1.5, steps=12, chart=south).components

    du = torch.tensor([0.3, -0.5])
    forward = torch.func.jvp(end, (x,), (du,))[1]
    step = 1e-5
    close(forward, (end(x + step * du) - end(x - step * du)) / (2 * step), 1e-7)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(end(leaf)[0], leaf)
    close(slope @ du, forward[0], 1e-9)
    with pytest.raises(GeometryError, match="inside of vmap"):
        torch.func.vmap(end)(torch.ones(2, 2))


def test_domains_alone_make_a_curve_cross() -> None:
    """Without margins a chart is left where it ends: inside of transforms as well, and the curve ends where all charts do."""
    a, b = (geoad.Chart((1,), name=name, domain={"|x| < 2": lambda x: x.abs() < 2}) for name in "ab")
    atlas = geoad.Atlas([a, b], {(a, b): (lambda x: x - 1.5, lambda y: y + 1.5)}, name="interval")
    metric = atlas.metric_field({a: geoad.metrics.Euclidean(a), b: lambda x: torch.eye(1)})
    p = a.point(torch.tensor([0.5]))

    def end(v: Tensor) -> Tensor:
        return geoad.geodesic(metric, p, a.vector(v, at=p), steps=10).components

    v = torch.tensor([2.5])
    assert geoad.geodesic(metric, p, a.vector(v, at=p), steps=10).chart is b
    for value, slope in (torch.func.jvp(end, (v,), (torch.ones(1),)), (end(v), torch.func.jacrev(end)(v)[0])):
        close(value, torch.tensor([1.5]))
        close(slope, torch.tensor([1.0]))
    with pytest.raises(ChartDomainError, match="leaves every chart of the atlas 'interval'"):
        end(torch.tensor([4.0]))
    with pytest.raises(ChartDomainError, match="leaves every chart"):
        torch.func.jacrev(end)(torch.tensor([4.0]))


def test_adaptive_integrators_cross_too() -> None:
    pytest.importorskip("scipy")
    sphere = geoad.atlases.Sphere(2)
    p = sphere.chart("north").point(torch.tensor([0.2, 0.1]))
    v = p.chart.vector(torch.tensor([1.5, 0.5]), at=p)
    end = geoad.geodesic(sphere.metric, p, v, 1.0, steps=4, method="scipy")
    close(sphere.embed(end), great_circle(sphere, v, 1.0), 1e-8)


def test_a_torus_is_wound_around_exactly() -> None:
    torus = geoad.atlases.Torus(2)
    a = torus.charts[0]
    p = a.point(torch.tensor([1.0, -2.0]))
    v = a.vector(torch.tensor([3.0, 7.0]), at=p)
    end, velocity = geoad.geodesic(torus.metric, p, v, 2.0, steps=16, return_velocity=True)
    close(torus.embed(end), torus._embedding(a, torch.tensor([7.0, 12.0])))
    close(velocity.components, v.components)
    with pytest.raises(ChartDomainError, match="leaves every chart"):  # steps longer than the charts
        geoad.geodesic(torus.metric, p, v, 2.0, steps=1)
    circle = geoad.atlases.Torus(1)
    q = circle.chart("b").point(torch.tensor([5.0]))
    close(circle.embed(q), torch.tensor([math.cos(5.0), math.sin(5.0)]))
    with pytest.raises(ChartDomainError, match="each angle lies between its cuts"):
        circle.chart("a").point(torch.tensor([4.0]))


def test_lines_of_projective_space_close_after_pi() -> None:
    space = geoad.atlases.ProjectiveSpace(2)
    p = space.point(torch.tensor([0.3, -0.5, 1.0]))
    direction = p.chart.vector(torch.tensor([1.0, 0.4]), at=p)
    v = direction / space.metric(p).norm(direction)
    errors = [
        float((geoad.geodesic(space.metric, p, v, math.pi, steps=n).to(p.chart).components - p.components).norm())
        for n in (20, 40)
    ]
    assert errors[1] < 1e-4 and math.log2(errors[0] / errors[1]) > 3.5
    assert space.metric.check_compatible(p) < 1e-13
    for wrong in (torch.zeros(3), torch.ones(2)):
        with pytest.raises(ChartDomainError, match="line through a vector"):
            space.point(wrong)


def test_straight_lines_across_the_cut() -> None:
    plane = geoad.atlases.PuncturedPlane()
    left, right = plane.charts
    p = left.point(torch.tensor([1.0, 3.0]))
    xy = plane.embed(p)
    v = left.vector(torch.tensor([-0.1, 0.8]), at=p)
    w: Any = torch.func.jvp(lambda x: plane._embedding(left, x), (p.ravel(),), (v.ravel(),))[1]
    end = geoad.geodesic(plane.metric, p, v, 1.0, steps=24)
    assert float(xy[1] * (xy + w)[1]) < 0  # the cut lies between
    assert end.chart is right
    close(plane.embed(end), xy + w, 1e-6)
    # a single chart ends at its cut
    alone = left.metric_field(lambda x: torch.diag(torch.stack([torch.ones_like(x[0]), x[0] ** 2])))
    with pytest.raises(ChartDomainError, match=r"chart 'left'.*-π < φ < π"):
        geoad.geodesic(alone, p, v, 1.0, steps=40)


# -- flows ---------------------------------------------------------------------------------------------------------------


def test_the_gradient_flow_of_the_height() -> None:
    """From near the north pole to near the south pole: h(t) = tanh(artanh h(0) - t), the longitude stays."""
    sphere = geoad.atlases.Sphere(2)
    h = height(sphere)
    down = geoad.riemannian_grad(-h, sphere.metric)
    p = sphere.point(torch.tensor([0.06, -0.08, 1.0]))
    times = [1.0, 3.0, 6.0]
    for time, q in zip(times, geoad.flow(down, p, times, steps=60), strict=True):
        close(h(q), torch.tanh(torch.atanh(h(p)) - time), 1e-5)
        y = sphere.embed(q)
        close(y[1] / y[0], torch.tensor(-0.08 / 0.06), 1e-9)
        assert q.chart.name == ("north" if float(h(q)) > -0.34 else "south")
    batch = p.chart.point(torch.stack([p.components, 2 * p.components]))
    both = geoad.flow(down, batch, 1.0, steps=10)
    close(both[0].components, geoad.flow(down, p, 1.0, steps=10).components)


def test_a_rotation_crosses_the_cut() -> None:
    plane = geoad.atlases.PuncturedPlane()
    left = plane.chart("left")

    def spin(p: geoad.Point) -> geoad.Vector:
        return p.chart.vector(torch.tensor([0.0, 1.0]), at=p)

    p = left.point(torch.tensor([2.0, 0.5]))
    end = geoad.flow(spin, p, 20.0, steps=40)
    close(plane.embed(end), 2 * torch.tensor([math.cos(20.5), math.sin(20.5)]))


def test_flows_on_other_manifolds_are_the_same_in_every_chart() -> None:
    theta = geoad.Chart((2,), name="theta")
    psi = theta.reparametrize(maps.Sinh(), name="psi").target
    matrix = torch.tensor([[0.0, 1.0], [-1.0, -0.2]])

    def field(p: geoad.Point) -> geoad.Vector:
        return theta.vector(p.to(theta).components @ matrix.mT, at=p.to(theta))

    p = theta.point(torch.tensor([0.5, -0.3]))
    end = geoad.flow(field, p, 1.5, steps=50)
    close(end.components, torch.linalg.matrix_exp(1.5 * matrix) @ p.components, 1e-8)
    there = geoad.flow(field, p.to(psi), 1.5, steps=50)
    assert there.chart is psi
    close(there.to(theta).components, end.components)
    batch = theta.point(torch.randn(3, 2))
    close(geoad.flow(field, batch, 1.5, steps=50)[1].components, geoad.flow(field, batch[1], 1.5, steps=50).components)
    listed = geoad.flow(field, p, [-1.0, 0.0], steps=50, chart=psi)
    close(listed[0].to(theta).components, torch.linalg.matrix_exp(-matrix) @ p.components, 1e-8)
    assert listed[1].chart is psi
    for wrong, error, words in (
        (lambda p: theta.covector(torch.ones(2), at=p), VarianceError, "Covector"),
        (lambda p: torch.ones(2), VarianceError, "plain tensor"),
        (lambda p: theta.vector(torch.ones(2), at=theta.point(torch.ones(2))), BasePointError, "at another"),
    ):
        with pytest.raises(error, match=words):
            geoad.flow(wrong, p)  # type: ignore[arg-type]
    with pytest.raises(ChartMismatchError, match="starts at a Point"):
        geoad.flow(field, torch.ones(2))  # type: ignore[arg-type]


# -- parallel transport --------------------------------------------------------------------------------------------------


def circle(sphere: geoad.atlases.Sphere, axis: Tensor, opening: float) -> Any:
    """The circle of points at the angle `opening` from an axis, as a curve, each point in the chart that is nearer."""
    axis = axis / axis.norm()
    a = torch.linalg.cross(axis, torch.tensor([0.1, 0.7, -0.3]))
    a = a / a.norm()
    b = torch.linalg.cross(axis, a)

    def curve(s: Tensor) -> geoad.Point:
        angle = 2 * math.pi * s
        return sphere.point(axis * math.cos(opening) + math.sin(opening) * (a * angle.cos() + b * angle.sin()))

    return curve


@pytest.mark.parametrize("axis", [[0.0, 0.0, 1.0], [1.0, 0.2, 0.1]])
def test_holonomy_is_the_area_inside(axis: list[float]) -> None:
    """Around a circle of latitude a vector turns by 2π (1 - cos φ); a tilted one runs through both charts."""
    sphere = geoad.atlases.Sphere(2)
    opening = 1.1
    curve = circle(sphere, torch.tensor(axis), opening)
    start = curve(torch.tensor(0.0))
    v = start.chart.vector(torch.tensor([1.0, 0.3]), at=start)
    metric = sphere.metric(start)
    coarse, end = (geoad.parallel_transport(sphere.metric, curve, v, steps=n) for n in (20, 40))
    assert end.chart is v.chart
    errors = [float((metric.norm(each.carry(to=start, chart=start.chart)) - metric.norm(v)).abs()) for each in (coarse, end)]
    assert errors[1] < 2e-5
    assert errors[1] < 1e-6 or math.log2(errors[0] / errors[1]) > 3.3  # along a circle of latitude nearly exact
    a, b = arrow(sphere, v), arrow(sphere, end)
    normal = sphere.embed(start)
    turned = torch.atan2(normal @ torch.linalg.cross(a, b), a @ b)
    wanted = 2 * math.pi * (1 - math.cos(opening))
    close(turned.cos(), torch.tensor(math.cos(wanted)), 2e-5)
    close(turned.sin(), torch.tensor(math.sin(wanted)), 2e-5)


def test_transport_keeps_contractions_across_charts() -> None:
    sphere = geoad.atlases.Sphere(2)
    # the velocity of a great circle is parallel
    great = circle(sphere, torch.tensor([1.0, 0.1, 0.1]), math.pi / 2)
    start = great(torch.tensor(0.0))

    def velocity(s: float) -> geoad.Vector:
        def components(s: Tensor) -> Tensor:
            return great(s).to(chart).components

        chart = great(torch.tensor(s)).chart
        u: Any = torch.func.jvp(components, (torch.tensor(s),), (torch.tensor(1.0),))[1]
        return chart.vector(u, at=great(torch.tensor(s)))

    end = geoad.parallel_transport(sphere.metric, lambda s: great(0.4 * s), velocity(0.0), steps=24)
    wanted = velocity(0.4)
    close(arrow(sphere, end), arrow(sphere, wanted), 1e-4)
    with pytest.raises(GeometryError, match="function of s"):
        geoad.parallel_transport(sphere.metric, [start, start], velocity(0.0))
    curve = circle(sphere, torch.tensor([1.0, 0.0, 0.3]), 0.9)
    start = curve(torch.tensor(0.0))
    v, w = start.chart.vector(torch.tensor([1.0, -2.0]), at=start), start.chart.covector(torch.tensor([0.5, 1.0]), at=start)
    g = sphere.metric(start)

    def half(s: Tensor) -> geoad.Point:
        return curve(0.5 * s)

    v2, w2 = (geoad.parallel_transport(sphere.metric, half, each, steps=24) for each in (v, w))
    close(w2(v2.carry(to=w2.at, chart=v2.chart)), w(v), 1e-5)
    metrics = [geoad.parallel_transport(sphere.metric, half, g, steps=n) for n in (10, 20)]
    errors = [float((each.to_dense() - sphere.metric(each.at).to_dense()).abs().max()) for each in metrics]
    assert errors[1] < 2e-4 and math.log2(errors[0] / errors[1]) > 3.5  # the metric is parallel
    with pytest.raises(BasePointError):
        geoad.parallel_transport(sphere.metric, lambda s: curve(0.5 * s + 0.2), v, steps=4)


# -- copies and files ----------------------------------------------------------------------------------------------------


def test_pickle_and_deepcopy() -> None:
    for atlas in (
        geoad.atlases.Sphere(2),
        geoad.atlases.Torus(2),
        geoad.atlases.ProjectiveSpace(2),
        geoad.atlases.PuncturedPlane(),
    ):
        a, b = atlas.charts[0], atlas.charts[-1]
        p = a.point(torch.tensor([0.8, 0.6]))
        v = a.vector(torch.tensor([1.0, 2.0]), at=p)
        assert copy.deepcopy(atlas) is atlas
        q, w, twin, metric = pickle.loads(pickle.dumps((p, v, atlas, atlas.metric)))
        assert q.chart == a and q.chart.atlas is twin
        close(q.to(twin.charts[-1]).components, p.to(b).components)
        close(w.to(b).components, v.to(b).components)  # charts are equal by their identity
        close(metric(q).norm(w), atlas.metric(p).norm(v))
        fresh = pickle.loads(pickle.dumps(a.point(torch.tensor([0.8, 0.6]))))
        close(fresh.to(fresh.chart.atlas.charts[-1]).components, p.to(b).components)
        assert twin.check_cocycle(q) < 1e-13


def test_saving() -> None:
    sphere = geoad.atlases.Sphere(2)
    north, south = sphere.charts
    psi = south.reparametrize(maps.Sinh(), name="psi").target
    p = north.point(torch.tensor([0.8, 0.6]))
    things = [p, p.to(psi), north.vector(torch.ones(2), at=p).to(psi), sphere.metric(p).to(south)]
    for thing in things:
        file = io.BytesIO()
        geoad.save(thing, file)
        file.seek(0)
        again = geoad.load(file, north)
        assert again.chart is thing.chart
        numbers = (lambda each: each.to_dense()) if isinstance(thing, geoad.Metric) else (lambda each: each.ravel())
        close(numbers(again), numbers(thing))
    with pytest.raises(ChartMismatchError, match="not among the charts"):
        geoad.from_state(geoad.to_state(p))  # an atlas is not made anew of a single point
    with pytest.raises(ChartMismatchError):
        geoad.from_state(geoad.to_state(half_plane().point(torch.ones(2))))


def test_single_precision() -> None:
    sphere = geoad.atlases.Sphere(2)
    x = torch.tensor([0.2, 0.1], dtype=torch.float32)
    p = sphere.chart("north").point(x)
    v = p.chart.vector(torch.tensor([1.0, -1.5], dtype=torch.float32), at=p)
    end = geoad.geodesic(sphere.metric, p, v, 1.2, steps=20)
    assert end.dtype == torch.float32 and end.chart.name == "south"
    close(sphere.embed(end).double(), great_circle(sphere, v, 1.2).double(), 1e-4)
    h = height(sphere)
    assert geoad.hessian(h, sphere.metric)(p).dtype == torch.float32
    torus = geoad.atlases.Torus(1)
    q = torus.chart("a").point(torch.tensor([-1.0], dtype=torch.float32))
    assert q.to(torus.chart("b")).dtype == torch.float32
    assert singles(q.blocks, q.chart)[0]["x"].shape == (1,)


def test_embedding_and_points() -> None:
    sphere = geoad.atlases.Sphere(2, radius=2.0)
    for y in ([0.0, 0.0, 2.0], [0.0, 0.0, -2.0], [1.0, -3.0, 0.5], [1.0, 1.0, -0.1]):
        arrow = torch.tensor(y)
        close(sphere.embed(sphere.point(arrow)), 2 * arrow / arrow.norm())
    batch = sphere.chart("south").point(torch.randn(3, 2))
    assert sphere.embed(batch).shape == (3, 3)
    close(sphere.embed(batch[1]), sphere.embed(batch)[1])
    with pytest.raises(GeometryError, match="3 numbers"):
        sphere.point(torch.ones(2))
    with pytest.raises(ChartDomainError, match="no direction"):
        sphere.point(torch.zeros(3))
