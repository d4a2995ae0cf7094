"""`maps.from_parametrized`: the kind of map of each parametrization, its laws, and what is refused."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import geoad
from geoad import maps
from geoad.errors import ChartDomainError, GeometryError, NotADiffeomorphismError, UnsupportedModuleError
from geoad.maps.base import Map
from geoad.maps.select import bind
from geoad.params import Blocks, Layout

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),  # of torch, for householder products
]


class Exp(nn.Module):
    """Positive weights."""

    def forward(self, x: Tensor) -> Tensor:
        return x.exp()

    def right_inverse(self, w: Tensor) -> Tensor:
        return w.log()


class Square(nn.Module):
    """Two ψ for each weight."""

    def forward(self, x: Tensor) -> Tensor:
        return x.square()

    def right_inverse(self, w: Tensor) -> Tensor:
        return w.sqrt()


class Mixing(nn.Module):
    """sinh(Q x), with a fixed Q."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("q", torch.eye(size) + 0.3 * torch.ones(size, size).tril())

    def forward(self, x: Tensor) -> Tensor:
        return (self.q @ x).sinh()

    def right_inverse(self, w: Tensor) -> Tensor:
        return torch.linalg.inv(self.q) @ w.asinh()


class Shifted(nn.Module):
    """Onto all weights, but nobody says how to come back."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * x.sum()


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT

    def right_inverse(self, w: Tensor) -> Tensor:
        return w.triu()


class LowRank(nn.Module):
    """W + B A with trained A, B."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(1, 3)), nn.Parameter(torch.zeros(4, 1))

    def forward(self, w: Tensor) -> Tensor:
        return w + self.b @ self.a

    def right_inverse(self, w: Tensor) -> Tensor:
        return w - self.b @ self.a


class Product(nn.Module):
    """U V of full rank."""

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        return u @ v

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        u, s, v = torch.linalg.svd(w, full_matrices=False)
        return u * s, v


def layer(*modules: nn.Module, inputs: int = 3, positive: bool = False) -> nn.Module:
    made = nn.Linear(inputs, 4)
    if positive:
        made.weight.data.abs_().add_(0.2)
    for module in modules:
        parametrize.register_parametrization(made, "weight", module)
    return made


def frozen_lora() -> nn.Module:
    made: Any = layer(LowRank())
    made.parametrizations.weight.original.requires_grad_(False)
    return made


def old_style(dim: int | None = 0) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.nn.utils.weight_norm(nn.Linear(3, 4), dim=dim)  # pyright: ignore
    made.weight_g.data *= 2
    made.weight_v.data *= 3
    return made


P = parametrizations
CASES: dict[str, tuple[Callable[[], nn.Module], str, dict[str, tuple[int, ...]]]] = {
    "weight norm": (lambda: P.weight_norm(nn.Linear(3, 4)), "submersion", {"_g": (4, 1), "_v": (4, 3)}),
    "weight norm of all": (lambda: P.weight_norm(nn.Linear(3, 4), dim=None), "submersion", {"_g": (), "_v": (4, 3)}),  # pyright: ignore
    "weight norm of columns": (lambda: P.weight_norm(nn.Linear(3, 4), dim=1), "submersion", {"_g": (1, 3), "_v": (4, 3)}),
    "weight norm, old": (old_style, "submersion", {"_g": (4, 1), "_v": (4, 3)}),
    "weight norm, old, of all": (lambda: old_style(None), "submersion", {"_g": (), "_v": (4, 3)}),
    "orthogonal": (lambda: P.orthogonal(nn.Linear(4, 4)), "immersion", {"": (6,)}),
    "orthogonal, wide": (lambda: P.orthogonal(nn.Linear(5, 3), orthogonal_map="cayley"), "immersion", {"": (9,)}),
    "orthogonal, householder": (lambda: P.orthogonal(nn.Linear(3, 5)), "immersion", {"": (9,)}),
    "orthogonal, no base": (lambda: P.orthogonal(nn.Linear(3, 5), use_trivialization=False), "immersion", {"": (9,)}),
    "spectral norm": (lambda: P.spectral_norm(nn.Linear(3, 4)).eval(), "smooth", {"": (4, 3)}),
    "exp": (lambda: layer(Exp(), positive=True), "elementwise", {"": (4, 3)}),
    "square": (lambda: layer(Square(), positive=True), "elementwise", {"": (4, 3)}),
    "mixing": (lambda: layer(Mixing(4)), "diffeomorphism", {"": (4, 3)}),
    "chain": (lambda: layer(Mixing(4), Mixing(4)), "diffeomorphism", {"": (4, 3)}),
    "symmetric": (lambda: layer(Symmetric(), inputs=4), "immersion", {"": (10,)}),
    "low rank update": (lambda: layer(LowRank()), "submersion", {"_original": (4, 3), "_0_a": (1, 3), "_0_b": (4, 1)}),
    "low rank update of a constant": (frozen_lora, "smooth", {"_0_a": (1, 3), "_0_b": (4, 1)}),
    "product": (lambda: layer(Product()), "submersion", {"_original0": (4, 3), "_original1": (3, 3)}),
}


def network(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    made: Any = CASES[name][0]()
    return nn.Sequential(made, nn.Tanh(), nn.Linear(made.out_features, 2)).double().train(made.training), torch.randn(
        5, made.in_features, dtype=torch.float64
    )


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert actual.shape == expected.shape
    gap = (actual.detach() - expected.detach()).norm()
    assert float(gap) <= tolerance * max(float(expected.detach().norm()), 1e-3)


def effective(net: nn.Module) -> Blocks:
    made: Any = net
    return {"0.weight": made[0].weight.detach(), "0.bias": made[0].bias.detach(), "2.weight": made[2].weight.detach()}


@pytest.mark.parametrize("name", CASES)
def test_kind_network_and_components(name: str) -> None:
    net, inputs = network(name)
    _, kind, blocks = CASES[name]
    before = net(inputs)
    found = maps.from_parametrized(net)
    assert found.kinds == {"0.weight": kind} and list(found) == ["0.weight"] and len(found) == 1
    assert isinstance(found["0.weight"], Map) and kind in repr(found)
    assert {
        key.removeprefix("0.weight"): tuple(value.shape) for key, value in found.components.items() if "0.weight" in key
    } == blocks
    assert not parametrize.is_parametrized(found.network) and type(found.network[0]) is nn.Linear  # pyright: ignore
    close(found.network(inputs), before, 1e-14)
    assert torch.equal(net(inputs), before), "the network itself was changed"
    theta = dict(found.network.named_parameters())
    for key, value in effective(net).items():
        assert theta[key].requires_grad and theta[key].is_leaf
        close(theta[key], value, 1e-14)


@pytest.mark.parametrize("name", CASES)
def test_laws(name: str) -> None:
    """π(ψ) = θ at the original numbers, the section, and all products against the dense Jacobian of π."""
    net, _ = network(name)
    found = maps.from_parametrized(net)
    theta = {key: value.detach() for key, value in found.network.named_parameters()}
    layout = Layout({key: value.shape for key, value in theta.items()})
    m = bind(found, layout)
    psi = Layout(m.image_shapes)
    assert not m.learnable and m.outside_domain(theta) is None
    y = {key: found.components[key] for key in psi}
    assert m.outside_image(y) is None
    close(layout.ravel(m.invert(y)), layout.ravel(theta), 1e-14)
    close(layout.ravel(m.invert(m.forward(theta))), layout.ravel(theta), 1e-12)
    jacobian: Any = torch.func.jacrev(lambda v: layout.ravel(m.invert(psi.unravel(v))))(psi.ravel(y))
    draws = torch.Generator().manual_seed(1)
    v = torch.randn(psi.dim, generator=draws, dtype=torch.float64)
    w = torch.randn(layout.dim, generator=draws, dtype=torch.float64)
    close(layout.ravel(m.push_inverse(theta, y, psi.unravel(v))), jacobian @ v)
    close(psi.ravel(m.pull_inverse(theta, y, layout.unravel(w))), jacobian.mT @ w)
    if m.law in ("submersion", "diffeomorphism"):
        plus = torch.linalg.pinv(jacobian)
        close(psi.ravel(m.push(theta, y, layout.unravel(w))), plus @ w)
        close(layout.ravel(m.pull(theta, y, psi.unravel(v))), plus.mT @ v)
    if m.law == "diffeomorphism":
        close(m.log_abs_det(theta, y), -torch.linalg.slogdet(jacobian).logabsdet)
    if m.law == "immersion":
        assert int(torch.linalg.matrix_rank(jacobian)) == psi.dim
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert torch.equal(layout.ravel(twin.invert(y)), layout.ravel(m.invert(y)))
    single = m.invert({key: value.float() for key, value in y.items()})
    assert all(block.dtype == torch.float32 for block in single.values())
    close(layout.ravel(single).double(), layout.ravel(theta), 1e-5)
    many = torch.func.vmap(m.invert)({key: torch.stack([value, 1.01 * value]) for key, value in y.items()})
    close(many["0.weight"][0], theta["0.weight"], 1e-13)


@pytest.mark.parametrize("name", CASES)
def test_the_network_in_its_original_coordinates(name: str) -> None:
    """geo.to(psi) at the original point: the same function, and the gradients that torch has."""
    net, inputs = network(name)
    found = maps.from_parametrized(net)
    geo = geoad.GeoModule(found.network)
    psi = geo.reference.reparametrize(found, name="psi").target
    q = psi.point(found.components)
    loss = geo.loss(F.mse_loss, (inputs, torch.zeros(5, 2, dtype=torch.float64)))
    slope = geoad.grad(loss)(q).components
    F.mse_loss(net(inputs), torch.zeros(5, 2, dtype=torch.float64)).backward()
    made: Any = net
    expected = {key: p.grad for key, p in made[0].named_parameters() if p.grad is not None}
    numbers = torch.cat([value.flatten() for key, value in slope.items() if key.startswith("0.weight")])
    theirs = torch.cat([g.flatten() for key, g in expected.items() if "weight" in key])
    assert float(numbers.norm()) == pytest.approx(float(theirs.norm()), rel=1e-10)
    close(slope["0.bias"], expected["bias"], 1e-12)
    geo.to(psi).set_point(q)
    assert all(torch.equal(p, found.components[key]) for key, p in geo.named_parameters())
    close(geo(inputs), net(inputs), 1e-13)


def test_training_in_weight_norm_coordinates_is_that_of_torch() -> None:
    """Steps of SGD on (g, v) in the chart are those on the parametrized network."""
    net, inputs = network("weight norm")
    found = maps.from_parametrized(net)
    geo = geoad.GeoModule(found.network)
    psi = geo.reference.reparametrize(found, name="gv").target
    geo.to(psi).set_point(psi.point(found.components))
    target = torch.randn(5, 2, dtype=torch.float64)
    for module in (net, geo):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            F.mse_loss(module(inputs), target).backward()
            optimizer.step()
    close(geo(inputs), net(inputs), 1e-12)
    theirs: Any = net
    close(dict(geo.named_parameters())["0.weight_v"], theirs[0].parametrizations.weight.original1, 1e-12)


def test_points_off_the_image_are_refused() -> None:
    found = maps.from_parametrized(network("orthogonal")[0])
    geo = geoad.GeoModule(found.network)
    psi = geo.reference.reparametrize(found, name="skew").target
    p = geo.point()
    close(p.to(psi).blocks["0.weight"], found.components["0.weight"], 1e-12)
    rotated = dict(p.blocks)
    turn = torch.linalg.matrix_exp(0.3 * torch.tensor([[0.0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 2], [0, 0, -2, 0]]).double())
    rotated["0.weight"] = turn @ p.blocks["0.weight"]
    there = geo.reference.point(rotated)
    close(there.to(psi).to(geo.reference).ravel(), there.ravel(), 1e-12)
    close(psi.point(there.to(psi).components).to(geo.reference).ravel(), there.ravel(), 1e-11)
    with pytest.raises(ChartDomainError, match="must be able to make"):
        geo.reference.point({**rotated, "0.weight": 2 * rotated["0.weight"]}).to(psi)
    with pytest.raises(NotADiffeomorphismError):
        geoad.riemannian_grad(geo.scalar_field(lambda net: net[0].weight.sum()))(p).to(psi)
    exp = maps.from_parametrized(network("exp")[0])
    positive = geoad.GeoModule(exp.network)
    log = positive.reference.reparametrize(exp, name="log").target
    blocks = dict(positive.point().blocks)
    with pytest.raises(ChartDomainError, match="must be able to make"):
        positive.reference.point({**blocks, "0.weight": -blocks["0.weight"]}).to(log)
    square = maps.from_parametrized(network("square")[0])
    geo = geoad.GeoModule(square.network)
    root = geo.reference.reparametrize(square, name="root").target
    with pytest.raises(ChartDomainError, match="right_inverse finds"):
        root.point({**square.components, "0.weight": -square.components["0.weight"]})


def test_choice_of_tensors_and_kinds() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(P.weight_norm(nn.Linear(3, 4)), P.orthogonal(nn.Linear(4, 4)), layer(Mixing(4), inputs=4)).double()
    inputs = torch.randn(2, 3, dtype=torch.float64)
    before = net(inputs)
    found = maps.from_parametrized(net, "[02].*", kind={"2.*": "submersion"})
    assert found.kinds == {"0.weight": "submersion", "2.weight": "submersion"}
    assert parametrize.is_parametrized(found.network[1]) and not parametrize.is_parametrized(found.network[0])  # pyright: ignore
    close(found.network(inputs), before, 1e-14)
    assert torch.equal(net(inputs), before)
    everything = maps.from_parametrized(net, kind="smooth")
    assert set(everything.kinds.values()) == {"smooth"} and everything.components["1.weight"].shape == (4, 4)
    assert maps.from_parametrized(nn.Sequential(*net[1:]), ["0.weight"]).kinds == {"0.weight": "immersion"}
    both: Any = P.weight_norm(nn.Linear(3, 4).double())
    parametrize.register_parametrization(both, "bias", Mixing(4).double())
    part = maps.from_parametrized(both, "weight").network
    assert parametrize.is_parametrized(part, "bias") and not parametrize.is_parametrized(part, "weight")
    close(part(inputs), both(inputs), 1e-14)
    assert parametrize.is_parametrized(both, "weight")


def test_weights_that_are_cached_or_tied_elsewhere() -> None:
    net, inputs = network("mixing")
    with parametrize.cached():
        before = net(inputs)
        found = maps.from_parametrized(net)
        close(found.network(inputs), before, 1e-14)
    tied: Any = nn.Sequential(P.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3), nn.Linear(3, 3)).double()
    tied[2].weight = tied[1].weight
    plain = maps.from_parametrized(tied).network
    assert plain[2].weight is plain[1].weight  # pyright: ignore
    shared = nn.Sequential(tied[0], nn.Tanh(), tied[0])
    assert list(maps.from_parametrized(shared)) == ["0.weight"]
    empty = maps.from_parametrized(nn.Sequential(P.weight_norm(nn.Linear(3, 4)), _frozen()))
    assert list(empty) == ["0.weight"]


def _frozen() -> nn.Module:
    return P.weight_norm(nn.Linear(4, 4)).requires_grad_(False)


def test_large_elementwise_parametrizations_need_no_matrix() -> None:
    big = nn.Linear(400, 300)
    big.weight.data.abs_().add_(0.1)
    parametrize.register_parametrization(big, "weight", Exp())
    found = maps.from_parametrized(big)
    assert found.kinds == {"weight": "elementwise"} and isinstance(found["weight"], maps.Elementwise)
    mixed = nn.Linear(60, 50)
    parametrize.register_parametrization(mixed, "weight", Mixing(50))
    with pytest.raises(GeometryError, match="cannot be found out at this size"):
        maps.from_parametrized(mixed)
    assert maps.from_parametrized(mixed, kind="diffeomorphism").kinds == {"weight": "diffeomorphism"}
    with pytest.raises(NotADiffeomorphismError, match="kind='immersion'"):
        maps.from_parametrized(mixed, kind="immersion")


@pytest.mark.parametrize("make", [Exp, lambda: Mixing(4)])
def test_right_inverses_without_gradients(make: Callable[[], Any]) -> None:
    """As torch writes its own: what cannot be differentiated is sharpened by Newton's method."""

    module = make().double()

    class Quiet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

        @torch.no_grad()
        def right_inverse(self, w: Tensor) -> Tensor:
            return self.inner.right_inverse(w)

    net: Any = layer(Quiet(), positive=True)
    m = bind(maps.from_parametrized(net, "weight")["weight"], Layout({"weight": (4, 3)}))
    assert m.law == "diffeomorphism"
    x = {"weight": net.weight.detach()}
    expected: Any = torch.func.jacrev(module.right_inverse)(x["weight"])
    found: Any = torch.func.jacrev(lambda w: m.forward({"weight": w})["weight"])(x["weight"])
    close(found, expected)
    second: Any = torch.func.hessian(lambda w: m.forward({"weight": w})["weight"].sin().sum())(x["weight"])
    close(second, torch.func.hessian(lambda w: module.right_inverse(w).sin().sum())(x["weight"]), 1e-8)


# -- what is refused -----------------------------------------------------------------------------------------------------------


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


class Cut(nn.Module):
    """Its gradient is not that of its value."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.detach() ** 2


def shared() -> nn.Module:
    made: Any = nn.Sequential(P.weight_norm(nn.Linear(3, 3)), P.weight_norm(nn.Linear(3, 3)))
    made[1].parametrizations.weight.original1 = made[0].parametrizations.weight.original1
    return made


def old_spectral() -> nn.Module:
    return nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(3, 3)))


REFUSED: list[tuple[Callable[[], Any], type[GeometryError], str]] = [
    (lambda: maps.from_parametrized(nn.Linear(2, 2)), GeometryError, r"parametrized tensors are \[\]"),
    (lambda: maps.from_parametrized(layer(Exp(), positive=True), "bias"), GeometryError, r"\['weight'\]"),
    (lambda: maps.from_parametrized(layer(Shifted())), GeometryError, "Give the module a right_inverse"),
    (
        lambda: maps.from_parametrized(layer(Shifted()), kind="submersion"),
        NotADiffeomorphismError,
        "rank of its Jacobian is 12",
    ),
    (lambda: maps.from_parametrized(layer(LowRank()), kind="diffeomorphism"), NotADiffeomorphismError, "12 numbers of 19"),
    (lambda: maps.from_parametrized(layer(Product()), kind="immersion"), NotADiffeomorphismError, "12 numbers of 21"),
    (lambda: maps.from_parametrized(layer(Exp(), positive=True), kind="bijection"), GeometryError, "no kind 'bijection'"),
    (lambda: maps.from_parametrized(layer(Random())), UnsupportedModuleError, "another weight"),
    (lambda: maps.from_parametrized(layer(Cut())), UnsupportedModuleError, "cuts off gradients"),
    (lambda: maps.from_parametrized(P.spectral_norm(nn.Linear(3, 4))), UnsupportedModuleError, r"net\.eval\(\)"),
    (lambda: maps.from_parametrized(P.orthogonal(nn.Linear(3, 5)), kind="smooth"), UnsupportedModuleError, "orthogonal_map="),
    (lambda: maps.from_parametrized(shared()), UnsupportedModuleError, "shares a trained tensor"),
    (lambda: maps.from_parametrized(old_spectral()), UnsupportedModuleError, "spectral norm of the old style"),
    (
        lambda: maps.from_parametrized(P.orthogonal(nn.Linear(3, 3, dtype=torch.complex128), orthogonal_map="cayley")),
        GeometryError,
        "not real",
    ),
]


@pytest.mark.parametrize(("make", "error", "words"), REFUSED)
def test_refused(make: Callable[[], Any], error: type[GeometryError], words: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(error, match=words):
        make()
