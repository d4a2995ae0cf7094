"""geoad.testing: the strategies draw what they promise, and every assertion fails when it has to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import geoad
from geoad import maps
from geoad.charts import Point
from geoad.errors import GeometryError
from geoad.maps.base import BlockMap, Diffeomorphism, Map
from geoad.params import Blocks, Layout
from geoad.testing import (
    DiffeomorphismConformance,
    SmallNetwork,
    assert_equivariant,
    assert_invariant,
    condition,
    standard_charts,
    strategies,
)
from geoad.testing.networks import NETWORKS, build
from geoad.testing.recipes import RECIPES, applicable, generic_blocks

# -- the strategies --------------------------------------------------------------------------------------------------------


@given(st.data())
def test_charts_and_points(data: st.DataObject) -> None:
    theta = data.draw(strategies.charts(max_blocks=3, max_dim=12))
    assert theta.parent is None and 1 <= theta.dim <= 12 and len(theta.layout) <= 3
    phi = data.draw(strategies.reparametrizations(theta))
    p = data.draw(strategies.points(phi.target))
    assert p.chart is phi.target and p.dtype == torch.float64
    phi.target.check_domain(p.blocks)
    x = p.to(theta).ravel()
    assert float((phi.target.point(p.components).to(theta).ravel() - x).norm()) < 1e-9
    batch = data.draw(strategies.points(theta, batch_shape=(2, 3)))
    assert batch.batch_shape == (2, 3)


@given(st.data())
def test_reparametrizations_are_defined_and_well_conditioned(data: st.DataObject) -> None:
    p = data.draw(strategies.points(data.draw(strategies.charts())))
    psi = data.draw(strategies.reparametrizations(p.chart, at=p, max_condition=50)).target
    assert condition(psi, p) <= 50
    further = data.draw(strategies.reparametrizations(psi, at=p, max_maps=2)).target
    assert condition(further.parent, p) <= 1e3  # pyright: ignore[reportArgumentType]
    assert torch.allclose(p.to(further).to(p.chart).ravel(), p.ravel())
    maps_of = data.draw(strategies.recipes(p.chart))
    assert isinstance(maps_of, (Map, Mapping))


@given(st.data())
def test_tensors_have_the_right_type(data: st.DataObject) -> None:
    theta = data.draw(strategies.charts())
    psi = data.draw(strategies.reparametrizations(theta)).target
    p = data.draw(strategies.points(data.draw(st.sampled_from([theta, psi]))))
    wanted: list[tuple[Callable[..., Any], tuple[int, int]]] = [
        (strategies.vectors, (1, 0)),
        (strategies.covectors, (0, 1)),
        (strategies.forms, (0, 2)),
        (strategies.metrics, (0, 2)),
        (strategies.cometrics, (2, 0)),
        (strategies.endomorphisms, (1, 1)),
    ]
    for strategy, kind in wanted:
        tensor = data.draw(strategy(p))
        assert tensor.type == kind and tensor.chart is p.chart and tensor.at is p and tensor.dtype == torch.float64
    assert float(torch.linalg.cond(data.draw(strategies.metrics(p)).to_dense())) < 100
    symmetric = data.draw(strategies.forms(p, symmetric=True)).to_dense()
    assert torch.equal(symmetric, symmetric.mT)
    field = data.draw(strategies.metric_fields(p.chart))
    assert isinstance(field(p), geoad.Metric)
    assert float(torch.linalg.eigvalsh(field(p).to_dense()).min()) > 0.1


@given(strategies.small_networks())
def test_small_networks(net: SmallNetwork) -> None:
    assert net.name in NETWORKS
    p = net.geo.point()
    assert p.chart.dim <= 24 and p.dtype == torch.float64 and bool((p.ravel() != 0).all())
    assert net.geo(net.inputs).shape == (5, 2) and net.values.shape == (5, 2)
    assert torch.equal(net.geo(net.inputs), net.bare(net.inputs))
    assert bool(geoad.grad(net.loss())(p).ravel().isfinite().all())


def test_small_networks_are_what_they_are_called() -> None:
    made = {name: build(name) for name in NETWORKS}
    assert len(dict(made["tied"].bare.named_parameters(remove_duplicate=False))) > len(list(made["tied"].bare.parameters()))
    assert "0.weight" not in made["frozen"].geo.reference.layout
    assert {shape.numel() for shape in made["raw"].geo.reference.layout.values()} >= {1, 2, 3, 6}
    assert any(len(shape) == 0 for shape in made["raw"].geo.reference.layout.values())
    assert list(made["buffers"].bare.buffers()) and not made["buffers"].geo.training
    again = build("conv", 5), build("conv", 5)
    assert torch.equal(again[0].geo.point().ravel(), again[1].geo.point().ravel())
    assert torch.equal(again[0].inputs, again[1].inputs)


def test_every_kind_is_drawn() -> None:
    """Charts without axes, several blocks, joint and pattern-wise recipes all turn up."""
    quick = settings(max_examples=1000, database=None, derandomize=True, phases=[Phase.generate])
    find(strategies.charts(), lambda chart: any(len(shape) == 0 for shape in chart.layout.values()), settings=quick)
    find(strategies.charts(), lambda chart: len(chart.layout) == 3, settings=quick)
    find(strategies.charts(), lambda chart: chart.dim == 1, settings=quick)
    layout = build("mlp").geo.reference.layout
    for kind in (maps.Coupling, maps.Compose, maps.Inverse, maps.Rescale, maps.Polar, dict):
        find(strategies.recipes(layout), lambda recipe, kind=kind: isinstance(recipe, kind), settings=quick)


def test_condition() -> None:
    x = geoad.Chart({"x": (2,)}, "x")
    p = x.point(torch.ones(2))
    phi = x.reparametrize(maps.Scale(torch.tensor([1.0, 8.0])))
    again = phi.target.reparametrize(maps.Scale(torch.tensor([1.0, 0.5])))
    assert condition(phi, p) == condition(phi.target, p) == condition(phi.map, p.blocks) == 8.0
    assert condition(again, p) == 2.0 and condition(again.target, p) == 4.0
    assert condition(phi.inverse, p) == 8.0
    with pytest.raises(GeometryError, match=r"bare map and a Point.*p\.blocks"):
        condition(phi.map, p)


def test_standard_charts() -> None:
    theta = build("conv").geo.reference
    p = theta.point(generic_blocks(theta.layout, 0))
    charts = standard_charts(theta)
    assert set(charts) == {"orthogonal", "scale", "layers", "affine", "asinh", "softplus", "coupling"}
    assert all(condition(chart, p) < 100 for chart in charts.values())
    assert "coupling" not in standard_charts(geoad.Chart({"s": ()}, "s"))


# -- assert_invariant ------------------------------------------------------------------------------------------------------


@pytest.fixture
def net() -> SmallNetwork:
    return build("mlp")


def posterior(net: SmallNetwork) -> geoad.ScalarField:
    """The loss and a prior, whose Hessian is not singular."""
    return net.loss() + net.geo.scalar_field(lambda bare: sum((w**2).sum() for w in bare.parameters()))


def raw_hessian(net: SmallNetwork, p: Point) -> Tensor:
    """The autograd Hessian in the chart's own coordinates."""
    fn = posterior(net).function(p.chart)
    second: Any = torch.func.hessian(lambda z: fn(p.chart.layout.unravel(z)))(p.ravel())
    return second


def raw_gradient(net: SmallNetwork, p: Point) -> Tensor:
    return geoad.grad(net.loss())(p).ravel()


def raw_fisher(net: SmallNetwork, p: Point) -> Tensor:
    """The diagonal of the Fisher matrix in the chart's own coordinates."""
    return geoad.curvature.Fisher(net.geo, net.inputs)(p).to_dense().diagonal()


NAIVE: dict[str, tuple[Callable[[SmallNetwork, Point], Any], str]] = {
    "trace of the autograd Hessian": (lambda net, p: raw_hessian(net, p).trace(), "own coordinates"),
    "largest eigenvalue": (lambda net, p: torch.linalg.eigvalsh(raw_hessian(net, p)).max(), "own coordinates"),
    "gradient norm": (lambda net, p: raw_gradient(net, p).norm(), "orthogonal changes of coordinates but not a scaling"),
    "diagonal Fisher": (
        lambda net, p: (raw_gradient(net, p) ** 2 / raw_fisher(net, p)).sum(),
        "survives scalings but not maps that mix",
    ),
    "plain second derivative": (
        lambda net, p: raw_gradient(net, p) @ torch.linalg.solve(raw_hessian(net, p), raw_gradient(net, p)),
        "survives affine changes of coordinates but not curved",
    ),
    "damping": (
        lambda net, p: (
            raw_gradient(net, p)
            @ torch.linalg.solve(
                geoad.curvature.Fisher(net.geo, net.inputs)(p).to_dense() + torch.eye(p.chart.dim), raw_gradient(net, p)
            )
        ),
        "damping λI",
    ),
    "one number in a dict": (lambda net, p: {"loss": net.loss()(p), "x": [p.ravel().sum()]}, r"result\['x'\]\[0\]"),
}


@pytest.mark.parametrize("name", NAIVE)
def test_naive_numbers_are_caught(net: SmallNetwork, name: str) -> None:
    fn, words = NAIVE[name]
    with pytest.raises(AssertionError, match=words) as caught:
        assert_invariant(lambda p: fn(net, p), net.geo.point())
    text = str(caught.value)
    assert "depends on the chart" in text and "reference chart:" in text and "chart '" in text


GOOD: dict[str, Callable[[SmallNetwork, Point], Any]] = {
    "loss": lambda net, p: net.loss()(p),
    "trace": lambda net, p: geoad.metrics.Euclidean(net.geo.reference)(p).trace(geoad.hessian(net.loss())(p)),
    "eigenvalues": lambda net, p: geoad.eigh(
        geoad.hessian(net.loss())(p), metric=geoad.metrics.Euclidean(net.geo.reference)(p)
    )[0],
    "gradient norm": lambda net, p: geoad.metrics.Euclidean(net.geo.reference)(p).norm(geoad.grad(net.loss())(p)),
    "damped decrement": lambda net, p: geoad.grad(net.loss())(p)(
        geoad.curvature.Fisher(net.geo, net.inputs)(p).solve(geoad.grad(net.loss())(p), damping=0.1)
    ),
    "a nest": lambda net, p: {"a": (net.loss()(p), [1, "text", None]), "b": float(net.loss()(p)), "c": p.ravel().numel()},
}


@pytest.mark.parametrize("name", GOOD)
def test_geoad_numbers_pass(net: SmallNetwork, name: str) -> None:
    assert_invariant(lambda p: GOOD[name](net, p), net.geo.point())


def test_module_is_copied_and_moved(net: SmallNetwork) -> None:
    """With a GeoModule the function gets a copy in each chart, which it may train."""
    before, seen = net.geo.point().ravel().clone(), []

    def train(geo: geoad.GeoModule) -> Tensor:
        seen.append(geo.chart.name)
        optimizer = geoad.optim.Invariant(geo, torch.optim.SGD, lr=0.1)
        functional.cross_entropy(geo(net.inputs), net.targets).backward()
        optimizer.step()
        return geo(net.inputs)

    assert_invariant(train, net.geo)
    assert seen[0] == "theta" and set(standard_charts(net.geo.reference)) <= set(seen)
    assert torch.equal(net.geo.point().ravel(), before) and net.geo.chart is net.geo.reference

    def naive(geo: geoad.GeoModule) -> Tensor:
        optimizer = torch.optim.SGD(geo.parameters(), lr=0.1)
        functional.cross_entropy(geo(net.inputs), net.targets).backward()
        optimizer.step()
        return geo(net.inputs)

    with pytest.raises(AssertionError, match="gradient step of the chart's own coordinates"):
        assert_invariant(naive, net.geo)
    assert torch.equal(net.geo.point().ravel(), before)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_can_be_looked_at(name: str) -> None:
    net = build(name)
    assert_invariant(lambda geo: geo(net.inputs), net.geo, charts=[maps.Asinh(), {"*": maps.Scale(2.0)}])


def test_charts_and_arguments(net: SmallNetwork) -> None:
    theta = net.geo.reference
    fn: Callable[[Any], Any] = lambda p: p.ravel().norm()  # noqa: E731
    assert_invariant(fn, theta, charts=maps.Orthogonal())
    assert_invariant(fn, theta, charts={"turned": maps.Householder(), "permuted": maps.Permutation()})
    with pytest.raises(AssertionError, match=r"chart 'bigger'.*differ by"):
        assert_invariant(fn, theta, charts=[maps.Orthogonal(), theta.reparametrize(maps.Scale(2.0), "bigger")])
    assert_invariant(fn, net.geo.point().to(theta.reparametrize(maps.Asinh()).target), charts=[maps.Permutation()])
    with pytest.raises(GeometryError, match="charts= is empty"):
        assert_invariant(fn, theta, charts=[])
    with pytest.raises(GeometryError, match="of another manifold"):
        assert_invariant(fn, theta, charts=[geoad.Chart({"x": (2,)}, "x")])
    with pytest.raises(GeometryError, match="a GeoModule, a Point or a Chart, found Sequential"):
        assert_invariant(fn, net.bare)  # pyright: ignore[reportArgumentType]
    with pytest.raises(GeometryError, match=r"assert_equivariant.*invariant of it"):
        assert_invariant(geoad.grad(net.loss()), net.geo.point())
    with pytest.raises(GeometryError, match="holds no numbers"):
        assert_invariant(lambda p: net.loss(), net.geo.point())


def test_messages_and_special_values(net: SmallNetwork) -> None:
    p = net.geo.point()
    with pytest.raises(AssertionError, match="nans, which agree with nothing"):
        assert_invariant(lambda p: torch.nan, p)
    assert_invariant(lambda p: [-math.inf, 3], p)
    with pytest.raises(AssertionError, match="infinite where the other is not"):
        assert_invariant(lambda p: 1.0 if p.chart is net.geo.reference else math.inf, p)
    with pytest.raises(AssertionError, match="shapes are"):
        assert_invariant(lambda p: torch.ones(2 if p.chart is net.geo.reference else 3), p)
    with pytest.raises(AssertionError, match="built differently"):
        assert_invariant(lambda p: {p.chart.name: 1}, p)
    with pytest.raises(AssertionError, match="not equal"):
        assert_invariant(lambda p: p.chart.name, p)
    with pytest.raises(ZeroDivisionError) as raised:
        assert_invariant(lambda p: 1 / 0, p)
    assert "in the reference chart" in "".join(raised.value.__notes__)
    with pytest.raises(AssertionError, match=r"not float64.*\.double\(\)"):
        assert_invariant(lambda p: p.ravel().norm(), p.to(torch.float32))
    assert_invariant(lambda p: net.loss()(p) + 1e-9 * p.ravel().norm(), p, rtol=1e-6)


def test_random_state_is_the_same_in_every_chart(net: SmallNetwork) -> None:
    state = torch.random.get_rng_state()
    assert_invariant(lambda p: torch.randn(3) * net.loss()(p), net.geo.point())
    assert torch.equal(torch.random.get_rng_state(), state)


# -- assert_equivariant ----------------------------------------------------------------------------------------------------


def test_equivariance_of_geoad(net: SmallNetwork) -> None:
    L, theta = net.loss(), net.geo.reference
    G = geoad.curvature.Fisher(net.geo, net.inputs) + 0.1 * geoad.metrics.Euclidean(theta)

    def everything(p: Point) -> dict[str, Any]:
        gradient = geoad.riemannian_grad(L, G)(p)
        return {
            "point": p.retract(gradient, -0.1),
            "covector": geoad.grad(L)(p),
            "forms": [geoad.hessian(L)(p), G(p), G(p).inverse()],
            "endomorphism": G(p).inverse() @ geoad.hessian(L)(p),
            "density": G(p).logdet(),
            "symbols": geoad.christoffel(G)(p),
            "value": L(p),
        }

    assert_equivariant(everything, net.geo.point(), charts={"affine": maps.Affine(), "coupling": maps.Coupling()})


def test_naive_objects_are_caught(net: SmallNetwork) -> None:
    L = net.loss()
    naive: dict[str, Callable[[Point], Any]] = {
        "gradient as a direction": lambda p: p.chart.vector(geoad.grad(L)(p).components, at=p),
        "Hessian as a form": lambda p: p.chart.form(raw_hessian(net, p), at=p),
        "identity as a metric": lambda p: p.chart.metric(torch.eye(p.chart.dim), at=p),
        "diagonal Fisher": lambda p: p.chart.form(raw_fisher(net, p).diag(), at=p),
        "raw step": lambda p: p.chart.point(p.ravel() - 0.1 * raw_gradient(net, p)),
        "plain tensors": lambda p: geoad.grad(L)(p).components,
    }
    for name, fn in naive.items():
        with pytest.raises(AssertionError, match="not the same object in every chart"):
            assert_equivariant(fn, net.geo.point())
            pytest.fail(name)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_steps(net: SmallNetwork, optimizer: type[torch.optim.Optimizer]) -> None:
    """A module among the results stands for its point: raw steps are caught, invariant ones pass."""

    def step(geo: geoad.GeoModule, make: Callable[[geoad.GeoModule], torch.optim.Optimizer]) -> geoad.GeoModule:
        made = make(geo)
        functional.cross_entropy(geo(net.inputs), net.targets).backward()
        made.step()
        return geo

    assert_equivariant(lambda geo: step(geo, lambda g: geoad.optim.Invariant(g, optimizer, lr=0.01)), net.geo)
    with pytest.raises(AssertionError):
        assert_equivariant(lambda geo: step(geo, lambda g: optimizer(g.parameters(), lr=0.01)), net.geo)


def test_a_result_at_another_point_is_caught(net: SmallNetwork) -> None:
    """Components agree, base points do not."""

    def drifting(p: Point) -> Any:
        away = p if p.chart is net.geo.reference else p.retract(geoad.riemannian_grad(net.loss())(p), 0.1)
        return geoad.metrics.Euclidean(net.geo.reference)(away)

    with pytest.raises(AssertionError, match=r"result\.at"):
        assert_equivariant(drifting, net.geo.point())


# -- the conformance suite -------------------------------------------------------------------------------------------------


class Shear(Diffeomorphism):
    """ψ_x = x, ψ_y = y + x²: a map as a user writes it, with nothing but the two directions."""

    def forward(self, x: Blocks) -> Blocks:
        return {"x": x["x"], "y": x["y"] + x["x"] ** 2}

    def invert(self, y: Blocks) -> Blocks:
        return {"x": y["x"], "y": y["y"] - y["x"] ** 2}


class Cube(BlockMap):
    """ψ = x³ for x ≠ 0."""

    def value(self, x: Tensor) -> Tensor:
        return x**3

    def inverse_value(self, y: Tensor) -> Tensor:
        return y.sign() * y.abs().pow(1 / 3)

    def bad_domain(self, x: Tensor) -> str | None:
        inside = (x != 0) & (x**3).isfinite() & (x**3 != 0)
        return None if bool(inside.all()) else "no entry may be 0, infinite or nan"

    def bad_image(self, y: Tensor) -> str | None:
        return None if bool((y != 0).all()) else "no entry may be 0"


class TestShear(DiffeomorphismConformance):
    layout: ClassVar[Mapping[str, Sequence[int]]] = {"x": (3,), "y": (3,)}

    def make(self) -> Diffeomorphism:
        return Shear()

    def test_domain(self) -> None:
        """x² overflows at 1e200, and the map does not say so."""
        with pytest.raises(AssertionError, match="forward is not finite"):
            super().test_domain()


class TestCube(DiffeomorphismConformance):
    layout: ClassVar[Mapping[str, Sequence[int]]] = {"x": (2, 3)}

    def make(self) -> Diffeomorphism:
        return Cube()

    def outside(self) -> Sequence[Blocks]:
        return [{"x": torch.zeros(2, 3)}, {"x": torch.tensor([[1.0, 2.0, 0.0], [1.0, 1.0, 1.0]])}]


class _Own(DiffeomorphismConformance):
    """The maps of geoad, through the suite for other people's maps."""

    layout: ClassVar[Mapping[str, Sequence[int]]] = {"0.weight": (3, 2), "0.bias": (3,), "2.weight": (2, 3)}

    def __init__(self, name: str) -> None:
        self.name = name
        if name not in applicable(Layout(self.layout)):
            self.layout = {"2.bias": (2,)}  # pyright: ignore[reportAttributeAccessIssue]

    def make(self) -> Map:
        recipe = RECIPES[self.name](torch.Generator().manual_seed(1))
        return recipe if isinstance(recipe, Map) and recipe.joint else maps.Compose(recipe)


@pytest.mark.parametrize("name", RECIPES)
def test_own_maps_conform(name: str) -> None:
    _Own(name).run()


class WrongInverse(Cube):
    def inverse_value(self, y: Tensor) -> Tensor:
        return y.abs().pow(1 / 3)


class WrongProduct(Cube):
    def push_block(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return 2 * x**2 * v


class WrongTranspose(Shear):
    def pull_inverse(self, x: Blocks, y: Blocks, w: Blocks) -> Blocks:
        return self.push_inverse(x, y, w)


class WrongVolume(Cube):
    def log_abs_det_block(self, x: Tensor, y: Tensor) -> Tensor:
        return (2 * x**2).log().sum()


class NoDomain(Cube):
    def bad_domain(self, x: Tensor) -> str | None:
        return None


class Linear(Cube):
    linear = True


class Diagonal(Shear):
    elementwise = True


class Blocked(Shear):
    blockwise = True


class Permuted(Shear):
    monomial = True


class Doubled(Cube):
    def value(self, x: Tensor) -> Tensor:
        return (x**3).double()


class Renamed(Shear):
    def forward(self, x: Blocks) -> Blocks:
        return {"y": x["y"] + x["x"] ** 2, "x": x["x"]}


class Drifting(Cube):
    """Other numbers in every binding, without a generator."""

    def prepare_block(self, shape: torch.Size) -> None:
        self.shift = float(torch.rand(()))

    def value(self, x: Tensor) -> Tensor:
        return x**3 + self.shift

    def inverse_value(self, y: Tensor) -> Tensor:
        return super().inverse_value(y - self.shift)


class Forgetful(Cube):
    def bind(self, layout: Layout) -> Any:
        self.layout = None
        return super().bind(layout)


class NotBatched(Cube):
    def value(self, x: Tensor) -> Tensor:
        return x**3 if float(x.flatten()[0]) > 5 else x * x * x


class Kinked(Cube):
    """The inverse is right, the second derivative is broken."""

    def push_block(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return 3 * x**2 * v + (x - x.detach()).abs().sqrt()


WRONG: list[tuple[type[Diffeomorphism], str, str]] = [
    (WrongInverse, "test_inverse", r"invert\(forward\(x\)\) is not x"),
    (WrongProduct, "test_products", "push is not J v"),
    (WrongTranspose, "test_products", "pull_inverse is not J"),
    (WrongVolume, "test_log_abs_det", "slogdet of the Jacobian of forward"),
    (NoDomain, "test_domain", "accepts a point of outside"),
    (Linear, "test_flags", "linear=True"),
    (Diagonal, "test_flags", "elementwise=True"),
    (Blocked, "test_flags", "blockwise=True"),
    (Permuted, "test_flags", "monomial=True"),
    (Doubled, "test_precision", "not float32"),
    (Renamed, "test_inverse", "forward returns the blocks"),
    (Drifting, "test_copies", "a copy of the map has other values"),
    (Forgetful, "test_copies", "can be bound again"),
    (Kinked, "test_transforms", "derivative of push is not finite"),
    (NoDomain, "test_chart", "got coordinates in the chart"),
]


def suite(cls: type[Diffeomorphism]) -> DiffeomorphismConformance:
    model = TestShear if issubclass(cls, Shear) else TestCube

    class Suite(model):  # pyright: ignore[reportGeneralTypeIssues]
        def make(self) -> Diffeomorphism:
            return cls()

    return Suite()


@pytest.mark.parametrize(("cls", "method", "words"), WRONG, ids=[f"{cls.__name__}-{method}" for cls, method, _ in WRONG])
def test_wrong_maps_are_caught(cls: type[Diffeomorphism], method: str, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        getattr(suite(cls), method)()


def test_a_map_that_vmap_cannot_batch_is_caught() -> None:
    with pytest.raises(RuntimeError, match="vmap"):
        suite(NotBatched).test_transforms()


# -- wrong use ------------------------------------------------------------------------------------------------------------


def test_conformance_needs_two_things() -> None:
    with pytest.raises(TypeError, match="make"):
        DiffeomorphismConformance()  # pyright: ignore[reportAbstractUsage]


class _WrongInverse(geoad.maps.BlockMap):
    """ψ = 2θ + 1 with an inverse that forgets the 1."""

    def value(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x + 1

    def inverse_value(self, y: torch.Tensor) -> torch.Tensor:
        return y / 2


def test_a_wrong_inverse_is_found_before_anything_is_compared() -> None:
    x = geoad.Chart({"x": (2,)}, name="x")
    p = x.point(torch.tensor([1.0, 2.0]))
    with pytest.raises(geoad.NotADiffeomorphismError, match="do not undo one another"):
        geoad.testing.assert_invariant(lambda p: 1.0, p, charts=[_WrongInverse()])


def test_a_function_of_a_point_is_tested_on_a_module() -> None:
    geo = geoad.GeoModule(torch.nn.Linear(3, 2))
    data = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    loss = geo.loss(torch.nn.functional.cross_entropy, data)
    geoad.testing.assert_invariant(lambda p: loss(p.retract(-0.1 * geoad.riemannian_grad(loss)(p))), geo)
    with pytest.raises(geoad.VarianceError, match="with respect to which metric"):
        geoad.testing.assert_invariant(lambda p: geoad.hessian(loss)(p).trace(), geo)
    with pytest.raises(geoad.GeometryError, match="assert_equivariant"):
        geoad.testing.assert_invariant(lambda p: geoad.grad(loss)(p), geo)


def test_elementwise_maps_need_two_functions_only() -> None:
    class Wave(geoad.maps.Elementwise):
        def value(self, x: torch.Tensor) -> torch.Tensor:
            return x + 0.5 * x.sin()

    x = geoad.Chart({"x": (2,)}, name="x")
    p = x.point(torch.tensor([1.0, 2.0]))
    psi = x.reparametrize(Wave()).target
    v = x.vector(torch.ones(2), at=p)
    assert torch.allclose(v.to(psi).components, 1 + 0.5 * p.components.cos(), rtol=1e-14)
    with pytest.raises(geoad.GeometryError, match="no method `inverse_value`"):
        psi.point(p.to(psi).components).to(x)
