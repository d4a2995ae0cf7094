"""GeoModule: any network as a manifold, and an ordinary nn.Module in every chart."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import geoad
from geoad import maps
from geoad.errors import BasePointError, ChartDomainError, ChartMismatchError, GeometryError, UnsupportedModuleError


class Raw(nn.Module):
    """Parameters on the root, in lists and dicts, a scalar one, and private names."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self._hidden = nn.Linear(4, 4)
        self.items = nn.ParameterList([torch.randn(4), torch.randn(4)])
        self.named = nn.ParameterDict({"a": torch.randn(4), "b": torch.randn(())})
        self.deep = nn.ModuleDict({"one": nn.ModuleDict({"two": nn.Linear(4, 3)})})

    def forward(self, x: Tensor) -> Tensor:
        h = self.scale * torch.tanh(x @ self.weight.T) + self.items[0] * self.items[1]
        h = self._hidden(h) + self.named["a"] * self.named["b"]
        return self.deep["one"]["two"](h)


class Twice(nn.Module):
    """A module that is used twice, under two names, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.again = self.first
        self.embed = nn.Linear(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = nn.Parameter(torch.randn(5, 3))
        self.tail = nn.Linear(3, 5, bias=False)
        self.tail.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(torch.tanh(self.again(torch.tanh(self.first(x)))))
        return self.head(h) * self.tail(torch.tanh(h))


class Names(nn.Module):
    """Children with the names of the wrapper's attributes."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("net", "chart", "loss", "reference", "point", "grad", "wrapped", "coordinates", "evaluate"):
            self._modules[name] = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = torch.tanh(child(x))
        return x


class WithNet(nn.Module):
    """The commonest of these names."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
        self.module = nn.Linear(2, 2)

    def forward(self, x: Tensor, *, gain: float = 1.0) -> Tensor:
        return gain * self.module(self.net(x))


def conv() -> nn.Module:
    net = nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Flatten(), nn.Linear(9, 2)
    )
    net(torch.randn(20, 5))  # running statistics
    return net.eval()


def normed() -> nn.Module:
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    parametrizations.weight_norm(net[0])
    parametrizations.orthogonal(net[2])
    return net


def frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    net[0].requires_grad_(False)
    return net


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(5, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x.unsqueeze(1))[0][:, 0]


NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)),
    "one parameter": lambda: nn.Linear(5, 1, bias=False),
    "raw": Raw,
    "twice": Twice,
    "names": Names,
    "net": WithNet,
    "conv": conv,
    "parametrized": normed,
    "frozen": frozen,
    "lstm": Recurrent,
    "attention": lambda: nn.TransformerEncoderLayer(5, 1, 8, dropout=0.0, batch_first=True),
}
RECIPES: dict[str, Callable[[], Any]] = {
    "asinh": maps.Asinh,
    "coupling": lambda: maps.Coupling(generator=torch.Generator().manual_seed(1)),
    "learnable": lambda: maps.Scale(2.0, learnable=True),
}
every_net = pytest.mark.parametrize("net", NETS.values(), ids=NETS)
every_map = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
X = torch.linspace(-1.0, 1.0, 30, dtype=torch.float64).reshape(6, 5)


def chart_of(geo: geoad.GeoModule, recipe: Callable[[], Any]) -> geoad.Chart:
    return geo.reference.reparametrize(recipe(), name="psi").target


def in_psi(net: nn.Module, recipe: Callable[[], Any] = maps.Asinh) -> geoad.GeoModule:
    geo = geoad.GeoModule(net)
    return geo.to(chart_of(geo, recipe))


# -- evaluation -------------------------------------------------------------------------------------------------------


@every_net
@every_map
def test_same_function_gradients_and_round_trip(net: Callable[[], nn.Module], recipe: Callable[[], Any]) -> None:
    plain = net()
    geo = geoad.GeoModule(copy.deepcopy(plain))
    names = [name for name, p in plain.named_parameters() if p.requires_grad]
    assert [*geo.chart.layout] == names
    before = {name: p.detach().clone() for name, p in geo.named_parameters()}
    wanted = plain(X)
    wanted.square().sum().backward()
    assert torch.equal(geo(X), wanted)
    psi = chart_of(geo, recipe)
    geo.to(psi)
    assert geo.chart is psi
    assert [name for name, _ in geo.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert torch.equal(geo(X), wanted)
    with torch.no_grad():
        assert torch.equal(geo(X), wanted)
    with torch.inference_mode():
        assert torch.equal(geo(X), wanted)
    geo(X).square().sum().backward()
    slope = geoad.GeoModule(plain).grad
    for name, leaf in geo.named_parameters():
        assert leaf.is_leaf
        assert leaf.requires_grad == (name in names)
    geo.to(geo.reference)  # the gradient moves along, bit for bit
    for name, leaf in geo.named_parameters():
        assert torch.equal(leaf, before[name])
        if name in names:
            assert torch.equal(leaf.grad, slope.components[name])
    assert torch.equal(geo(X), wanted)


@every_net
@every_map
def test_functional_call_in_any_chart(net: Callable[[], nn.Module], recipe: Callable[[], Any]) -> None:
    geo = in_psi(net(), recipe)
    if isinstance(geo.wrapped, Twice):  # functional_call leaves its tensors behind in a module that is used twice
        assert torch.equal(functional_call(geo, dict(geo.named_parameters()), (X,)), geo(X))
        return
    if isinstance(geo.wrapped, Names):
        with pytest.raises(TypeError, match="chart"):
            functional_call(geo, dict(geo.named_parameters()), X)
        return
    wanted = geo(X)
    coordinates = {name: p.detach().clone() for name, p in geo.named_parameters()}
    torch.testing.assert_close(functional_call(geo, coordinates, (X,)), wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(functional_call(geo, dict(geo.named_parameters()), (X,)), wanted)
    assert torch.equal(geo(X), wanted)
    wanted.square().sum().backward()
    slopes = torch.func.grad(lambda p: functional_call(geo, p, (X,)).square().sum())(coordinates)
    for name, leaf in geo.named_parameters():
        if leaf.requires_grad:
            torch.testing.assert_close(slopes[name], leaf.grad, rtol=1e-9, atol=1e-11)
    moved = {name: block + 0.01 for name, block in coordinates.items()}
    other = in_psi(copy.deepcopy(geo).to(geo.reference).wrapped, recipe)
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.copy_(moved[name])
    torch.testing.assert_close(functional_call(geo, moved, (X,)), other(X), rtol=1e-12, atol=1e-12)


def test_a_child_called_net_is_the_child() -> None:
    geo = geoad.GeoModule(WithNet())
    assert geo.net is geo.wrapped.net  # type: ignore[union-attr]
    assert torch.equal(geo(X, gain=2.0), 2 * geo(X))
    geo = in_psi(WithNet())
    assert torch.equal(geo(X, gain=2.0), 2 * geo(X))


@every_map
def test_second_derivatives(recipe: Callable[[], Any]) -> None:
    geo = in_psi(nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1)), recipe)
    leaves = dict(geo.named_parameters())
    direction = {name: torch.ones_like(p) for name, p in leaves.items()}

    def energy(p: dict[str, Tensor]) -> Tensor:
        return functional_call(geo, p, (X,)).square().sum()

    slopes = torch.autograd.grad(geo(X).square().sum(), list(leaves.values()), create_graph=True)
    products = torch.autograd.grad(sum(s.sum() for s in slopes), list(leaves.values()))
    coordinates = {name: p.detach() for name, p in leaves.items()}
    wanted = torch.func.jvp(torch.func.grad(energy), (coordinates,), (direction,))[1]
    for name, product in zip(leaves, products, strict=True):
        torch.testing.assert_close(product, wanted[name], rtol=1e-9, atol=1e-10)


@every_map
def test_under_torch_func(recipe: Callable[[], Any]) -> None:
    plain = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1))
    geo = in_psi(copy.deepcopy(plain), recipe)
    torch.testing.assert_close(torch.func.vmap(geo)(X), plain(X), rtol=1e-12, atol=1e-12)
    torch.func.vmap(geo)(X).sum().backward()
    theirs = copy.deepcopy(geo)
    theirs(X).sum().backward()
    for ours, other in zip(geo.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-10, atol=1e-12)
    ours = torch.func.grad(lambda x: geo(x).sum())(X)
    torch.testing.assert_close(ours, torch.func.grad(lambda x: plain(x).sum())(X), rtol=1e-10, atol=1e-12)
    batched = torch.func.vmap(lambda p: functional_call(geo, p, (X,)))(
        {n: torch.stack([p, p]) for n, p in geo.named_parameters()}
    )
    torch.testing.assert_close(batched[1], plain(X), rtol=1e-12, atol=1e-12)


# torch hides this warning of its own, but not where warnings are errors
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compile_gives_the_same_values() -> None:
    geo = in_psi(nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1)))
    wanted = geo(X)
    wanted.sum().backward()
    slopes = [p.grad.clone() for p in geo.parameters()]
    geo.zero_grad()
    compiled = torch.compile(geo, backend="eager")
    torch.testing.assert_close(compiled(X), wanted)
    compiled(X).sum().backward()
    for p, slope in zip(geo.parameters(), slopes, strict=True):
        torch.testing.assert_close(p.grad, slope)
    direct = torch.compile(geo.wrapped, backend="eager")
    with pytest.raises(GeometryError, match="called directly"):
        direct(X)


def test_autocast_and_hooks() -> None:
    plain = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1)).float()
    geo = in_psi(copy.deepcopy(plain))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(geo(X.float()), plain(X.float()))
    seen: list[str] = []
    geo.wrapped[0].register_forward_hook(lambda *_: seen.append("child"))
    geo.wrapped.register_forward_hook(lambda *_: seen.append("root"))
    geo.register_forward_hook(lambda *_: seen.append("geo"))
    geo(X.float())
    assert seen == ["child", "root", "geo"]


# -- charts and points ------------------------------------------------------------------------------------------------


def test_chains_of_charts_come_back_bit_for_bit() -> None:
    geo = geoad.GeoModule(NETS["mlp"]())
    theta = {name: p.detach().clone() for name, p in geo.named_parameters()}
    first = chart_of(geo, maps.Asinh)
    second = first.reparametrize(maps.Affine(generator=torch.Generator().manual_seed(0))).target
    third = chart_of(geo, RECIPES["coupling"])
    wanted = geo(X)
    for chart in (first, second, third, second, geo.reference, third, first):
        assert torch.equal(geo.to(chart)(X), wanted)
    assert all(torch.equal(p, theta[name]) for name, p in geo.to(geo.reference).named_parameters())


def test_a_reparametrization_and_a_dtype_may_be_given_together() -> None:
    geo = geoad.GeoModule(NETS["mlp"]())
    phi = geo.reference.reparametrize(maps.Asinh())
    geo.to(phi)
    assert geo.chart is phi.target
    geo.to(geo.reference, torch.float32)
    assert geo.point().dtype == torch.float32
    with pytest.raises(ChartMismatchError):
        geo.to(geoad.GeoModule(NETS["mlp"]()).reference)


def test_leaving_the_domain_changes_nothing() -> None:
    geo = in_psi(NETS["mlp"]())
    before = {name: (p, p.detach().clone()) for name, p in geo.named_parameters()}
    geo(X).sum().backward()
    with pytest.raises(ChartDomainError):
        geo.to(geo.reference.reparametrize(maps.Log()))
    assert geo.chart.name == "psi"
    for name, p in geo.named_parameters():
        assert p is before[name][0]
        assert torch.equal(p, before[name][1])
        assert p.grad is not None


def test_point_is_a_copy_and_the_same_until_values_change() -> None:
    geo = in_psi(NETS["mlp"]())
    p = geo.point()
    assert geo.point() is p
    assert p.chart is geo.chart
    theta = p.to(geo.reference)
    weight = geo.wrapped[0].weight
    with torch.no_grad():
        weight.add_(1.0)
    q = geo.point()
    assert q is not p
    assert torch.equal(q.components["0.weight"], p.components["0.weight"] + 1.0)
    weight.data[0, 0] = 0.25  # leaves no trace in the version counter
    assert geo.point() is not q
    assert geo.point().components["0.weight"][0, 0] == 0.25
    geo.to(geo.reference)
    r = geo.point()
    geo.wrapped[0].weight.data.zero_()
    assert r.components["0.weight"].abs().sum() > 0
    assert geo.point() is not r
    assert theta.to(p.chart) is p
    with torch.inference_mode():
        s = geo.to(p.chart).point()
    assert not any(block.is_inference() for block in s.components.values())


def test_theta_follows_edits_of_psi() -> None:
    geo = in_psi(NETS["mlp"]())
    leaves = dict(geo.named_parameters())
    geo(X)  # the node is cached
    leaves["0.bias"].data.fill_(0.5)
    wanted = copy.deepcopy(geo).to(geo.reference)
    torch.testing.assert_close(wanted.wrapped[0].bias, torch.full((4,), 0.5).sinh())
    assert torch.equal(geo(X), wanted.wrapped(X))
    optimizer = torch.optim.Adam(geo.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        geo(X).square().sum().backward()
        optimizer.step()
    for name, p in geo.named_parameters():
        torch.testing.assert_close(geo.stored_parameters()[name].asinh(), p, rtol=1e-14, atol=1e-14)
    geo.wrapped[0].bias.data.fill_(float("inf"))
    with pytest.raises(ChartDomainError, match="the module's parameters"):
        geo(X)


def test_parameters_that_are_replaced_are_taken_over() -> None:
    for geo in (geoad.GeoModule(NETS["mlp"]()), in_psi(NETS["mlp"]())):
        geo.wrapped[0].bias = nn.Parameter(torch.full((4,), 0.1))
        assert torch.equal(geo.point().components["0.bias"], torch.full((4,), 0.1))
        geo(X).sum().backward()
        assert geo.wrapped[0].bias.grad is not None
        geo.wrapped[0].bias = nn.Parameter(torch.zeros(7))
        with pytest.raises(GeometryError, match="was replaced by one of shape"):
            geo.point()
    tied = geoad.GeoModule(Twice())
    tied.wrapped.head.weight = nn.Parameter(torch.zeros(5, 3))
    with pytest.raises(GeometryError, match="replaced under one of its names"):
        tied.point()
    geo = geoad.GeoModule(NETS["mlp"]())
    parametrize.register_parametrization(geo.wrapped[0], "weight", nn.Tanh())
    with pytest.raises(GeometryError, match="removed from its module"):
        geo.point()


def test_learnable_maps_get_gradients_and_make_points_stale() -> None:
    geo = geoad.GeoModule(NETS["mlp"]())
    phi = geo.reference.reparametrize(maps.Scale(2.0, learnable=True))
    geo.to(phi)
    assert {id(p) for p in geo.parameters()}.isdisjoint({id(p) for p in phi.parameters()})
    p = geo.point()
    geo(X).sum().backward()
    assert all(each.grad is not None for each in phi.parameters())
    logs = next(phi.parameters())
    theta = geo.stored_parameters()["0.weight"].detach().clone()
    wanted = -(geoad.grad(geo.scalar_field(lambda net: net(X).sum()))(p.to(geo.reference)).components["0.weight"] * theta).sum()
    torch.testing.assert_close(logs.grad.sum(), wanted, rtol=1e-10, atol=1e-12)
    out = geo(X)
    torch.optim.SGD(phi.parameters(), lr=0.1).step()
    with pytest.raises(BasePointError):
        p.to(geo.reference)
    with pytest.raises(BasePointError, match="learnable map changed"):
        out.sum().backward()
    assert geo.point() is not p
    torch.testing.assert_close(geo.stored_parameters()["0.weight"] * logs.exp(), geo.wrapped[0].weight)


def test_geo_grad_is_typed() -> None:
    geo = in_psi(NETS["mlp"]())
    with pytest.raises(GeometryError, match="no gradient yet"):
        _ = geo.grad
    geo(X).square().mean().backward()
    L = geo.loss(lambda out: out.square().mean(), X)
    torch.testing.assert_close(geo.grad.ravel(), geoad.grad(L)(geo.point()).ravel(), rtol=1e-12, atol=1e-14)


def test_requires_grad_can_be_switched() -> None:
    geo = in_psi(NETS["mlp"]())
    geo.wrapped[0].weight.requires_grad_(False)
    geo(X).sum().backward()
    assert geo.wrapped[0].weight.grad is None
    assert geo.wrapped[2].weight.grad is not None
    geo.to(geo.reference)
    assert [p.requires_grad for p in geo.parameters()] == [False, True, True, True]
    geo.requires_grad_(False).to(chart_of(geo, maps.Asinh))
    assert not geo(X).requires_grad
    geo.requires_grad_()
    assert geo(X).requires_grad


# -- what is refused --------------------------------------------------------------------------------------------------


@every_net
def test_psi_numbers_are_never_weights(net: Callable[[], nn.Module]) -> None:
    geo = in_psi(net())
    inner = geo.wrapped
    with pytest.raises(GeometryError, match="called directly"):
        inner(X)
    with pytest.raises(GeometryError, match=r"geo\.state_dict\(\)"):
        inner.state_dict()
    with pytest.raises(GeometryError, match=r"geo\.load_state_dict\(\)"):
        inner.load_state_dict({})
    for child in inner.children():
        if next(child.parameters(), None) is None or not next(child.parameters()).requires_grad:
            continue
        with pytest.raises(GeometryError, match=r"state dict of the bare network"):
            child.state_dict()
        if isinstance(child, nn.Linear):
            with pytest.raises(GeometryError, match="called directly"):
                child(torch.zeros(1, child.in_features))
    geo(X)
    geo.to(geo.reference)
    inner(X)
    inner.load_state_dict(inner.state_dict())
    assert not inner._forward_pre_hooks
    assert not inner._state_dict_pre_hooks


def test_a_partial_functional_call_of_the_bare_network_is_refused() -> None:
    geo = in_psi(NETS["mlp"]())
    with pytest.raises(GeometryError, match="called directly"):
        functional_call(geo.wrapped, {"0.weight": torch.zeros(4, 5)}, (X,))
    weights = {name: p.detach() for name, p in geo.stored_parameters().items()}
    assert torch.equal(functional_call(geo.wrapped, weights, (X,)), geo(X))


def test_selection_of_coordinates() -> None:
    def names(params: Any) -> list[str]:
        return [*geoad.GeoModule(NETS["mlp"](), params=params).chart.layout]

    assert names("*.weight") == ["0.weight", "2.weight"]
    assert names(["2.*", "0.bias"]) == ["0.bias", "2.weight", "2.bias"]
    assert names(lambda name, p: p.ndim == 1) == ["0.bias", "2.bias"]
    assert [*geoad.GeoModule(Twice(), params="tail.weight").chart.layout] == ["head.weight"]
    assert [*geoad.GeoModule(Twice(), params="again.*").chart.layout] == ["first.weight", "first.bias"]
    with pytest.raises(GeometryError, match=r"matches no parameter.*0\.weight"):
        names("weight")
    with pytest.raises(GeometryError, match="no parameter is selected"):
        names(lambda name, p: False)
    with pytest.raises(GeometryError, match="no parameter is selected"):
        geoad.GeoModule(nn.Tanh())
    with pytest.raises(GeometryError, match="already"):
        geoad.GeoModule(geoad.GeoModule(NETS["mlp"]()))
    with pytest.raises(GeometryError, match=r"nn\.Module"):
        geoad.GeoModule(torch.tanh)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModuleError, match="lazy"):
        geoad.GeoModule(nn.LazyLinear(3))
    with pytest.raises(GeometryError, match="real floating point"):
        geoad.GeoModule(nn.Linear(2, 2, dtype=torch.complex64))
    geo = geoad.GeoModule(NETS["mlp"](), params="0.*")
    geo.to(chart_of(geo, maps.Asinh))
    geo(X).sum().backward()
    assert geo.wrapped[2].weight.grad is not None  # a constant of the manifold, but still a parameter of the net
    assert isinstance(geo.wrapped[2].weight, nn.Parameter)


# -- state dicts and copies -------------------------------------------------------------------------------------------


@every_net
@every_map
def test_state_dicts_in_any_chart(net: Callable[[], nn.Module], recipe: Callable[[], Any], tmp_path: Any) -> None:
    source = in_psi(net(), recipe)
    wanted = source(X)
    state = source.state_dict()
    for name, p in source.named_parameters():
        assert torch.equal(state[name], p)
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    for target in (geoad.GeoModule(net()), in_psi(net(), recipe), in_psi(net(), RECIPES["asinh"]), copy.deepcopy(source)):
        assert not target.load_state_dict(loaded).missing_keys
        assert torch.equal(target(X), wanted)
        theta = target.stored_parameters()
        assert all(torch.equal(block, theta[name]) for name, block in source.stored_parameters().items())
    for name, p in target.named_parameters():  # the copy is in the same chart: the coordinates are the very same
        assert torch.equal(p, state[name])
    plain = net()
    state = plain.state_dict()
    for target in (geoad.GeoModule(net()), in_psi(net(), recipe)):
        leaves = dict(target.named_parameters())
        target.load_state_dict(state)  # strict
        assert all(p is leaves[name] for name, p in target.named_parameters())
        assert torch.equal(target(X), plain(X))
        assert all(
            torch.equal(block, dict(plain.named_parameters())[name]) for name, block in target.stored_parameters().items()
        )
    with pytest.raises(RuntimeError, match="_geoad"):
        plain.load_state_dict(source.state_dict())
    assert plain.state_dict().keys() == geoad.GeoModule(plain).state_dict().keys()


def test_psi_that_an_optimizer_wrote_survives_a_round_trip() -> None:
    geo = in_psi(NETS["mlp"]())
    with torch.no_grad():
        for p in geo.parameters():
            p.add_(0.123)
    twin = copy.deepcopy(geo)
    state = {name: value.clone() if isinstance(value, Tensor) else value for name, value in geo.state_dict().items()}
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    twin.load_state_dict(state)
    assert all(torch.equal(p, state[name]) for name, p in twin.named_parameters())
    assert torch.equal(twin(X), geo(X))


def test_partial_and_assigned_and_wrong_state_dicts() -> None:
    plain = NETS["mlp"]()
    for recipe in RECIPES.values():
        geo = in_psi(NETS["mlp"](), recipe)
        old = {name: p.detach().clone() for name, p in geo.stored_parameters().items()}
        result = geo.load_state_dict({"0.weight": plain[0].weight}, strict=False)
        assert sorted(result.missing_keys) == ["0.bias", "2.bias", "2.weight"]
        assert torch.equal(geo.stored_parameters()["0.weight"], plain[0].weight)
        assert torch.equal(geo.stored_parameters()["2.weight"], old["2.weight"])
        assert torch.equal(copy.deepcopy(geo).to(geo.reference).wrapped(X), geo(X))
        geo.load_state_dict(copy.deepcopy(plain).float().state_dict(), assign=True)
        assert {p.dtype for p in geo.parameters()} == {torch.float32}
        assert torch.equal(geo(X.float()), copy.deepcopy(plain).float()(X.float()))
        with pytest.raises(RuntimeError, match="size mismatch"):
            geo.load_state_dict(nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)).state_dict())
        geo(X.float())
        with pytest.raises(RuntimeError, match="Missing key"):
            geo.load_state_dict({})
        geo(X.float())
        assert geo.chart.name == "psi"
    with pytest.raises(GeometryError, match="that geoad did not write"):
        geo.load_state_dict({**plain.state_dict(), "_geoad": 3})


def test_loading_a_point_outside_the_domain_changes_nothing() -> None:
    net = nn.Linear(2, 2, bias=False)
    nn.init.constant_(net.weight, 0.5)
    geo = in_psi(net, maps.Log)
    before = geo(torch.eye(2))
    with pytest.raises(ChartDomainError):
        geo.load_state_dict({"weight": -torch.ones(2, 2)})
    assert torch.equal(geo(torch.eye(2)), before)
    with pytest.raises(GeometryError, match="called directly"):
        net(torch.eye(2))
    assert torch.equal(geo.wrapped.weight, torch.full((2, 2), 0.5).log())


FRESH = """
import sys, torch, geoad
torch.set_default_dtype(torch.float64)
state, x, wanted = torch.load(sys.argv[1], weights_only=True)
geo = geoad.GeoModule(torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)))
geo.to(geo.reference.reparametrize(geoad.maps.Coupling(generator=torch.Generator().manual_seed(7))))
geo.load_state_dict(state)
assert torch.equal(geo(x), wanted)
whole = torch.load(sys.argv[2], weights_only=False)
assert torch.equal(whole(x), wanted) and whole.chart.name == "psi"
assert torch.equal(whole.to(whole.reference).wrapped(x), wanted)
"""


def test_a_fresh_process(tmp_path: Any) -> None:
    geo = in_psi(NETS["mlp"]())
    torch.save((geo.state_dict(), X, geo(X).detach()), tmp_path / "state.pt")
    torch.save(geo, tmp_path / "geo.pt")
    arguments = [sys.executable, "-c", FRESH, str(tmp_path / "state.pt"), str(tmp_path / "geo.pt")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@every_net
@every_map
def test_copies_are_independent(net: Callable[[], nn.Module], recipe: Callable[[], Any]) -> None:
    geo = in_psi(net(), recipe)
    geo(X).sum().backward()
    wanted = geo(X).detach()
    copies = [copy.deepcopy(geo)]
    if not any(map(parametrize.is_parametrized, geo.modules())):  # torch does not pickle these
        copies.append(pickle.loads(pickle.dumps(geo)))
    for twin in copies:
        assert torch.equal(twin(X), wanted)
        optimizer = geoad.optim.Invariant(twin, torch.optim.SGD, lr=0.1)
        twin(X).square().sum().backward()
        optimizer.step()
        assert not torch.equal(twin(X), wanted)
        assert torch.equal(geo(X), wanted)
        with pytest.raises(GeometryError, match="called directly"):
            twin.wrapped(X)
        assert torch.equal(twin(X), twin.to(twin.reference).wrapped(X))
    assert torch.equal(geo.to(geo.reference).wrapped(X), wanted)


def test_copies_of_a_learnable_chart_go_apart() -> None:
    geo = in_psi(NETS["mlp"](), RECIPES["learnable"])
    twin = copy.deepcopy(geo)
    psi = geo.chart
    assert twin.chart == psi
    with torch.no_grad():
        next(psi.parent.parameters()).add_(1.0)
    assert twin.chart != psi
    wanted = twin(X)
    assert torch.equal(twin.to(psi)(X), wanted)
    assert torch.equal(twin.to(twin.reference).wrapped(X), wanted)


# -- as part of torch -------------------------------------------------------------------------------------------------


def test_inside_another_module() -> None:
    class Parent(nn.Module):
        def __init__(self, geo: geoad.GeoModule) -> None:
            super().__init__()
            self.geo = geo
            self.tail = nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.tail(self.geo(x))

    parent = Parent(in_psi(NETS["mlp"]()))
    names = [name for name, _ in parent.named_parameters()]
    assert names == ["geo.0.weight", "geo.0.bias", "geo.2.weight", "geo.2.bias", "tail.weight", "tail.bias"]
    wanted = parent(X)
    state = copy.deepcopy(parent.state_dict())
    optimizer = torch.optim.SGD(parent.parameters(), lr=0.1)
    wanted.sum().backward()
    optimizer.step()
    assert not torch.equal(parent(X), wanted)
    parent.load_state_dict(state)
    assert torch.equal(parent(X), wanted)
    parent.geo.to(parent.geo.reference)
    parent.load_state_dict(state)
    assert torch.equal(parent(X), wanted)
    coordinates = dict(parent.named_parameters())
    assert torch.equal(functional_call(parent, coordinates, (X,)), wanted)
    parent.geo.to(chart_of(parent.geo, maps.Asinh))
    parent.float()
    assert parent(X.float()).dtype == torch.float32
    parent.eval()
    assert not parent.geo.wrapped[0].training
    assert not parent.geo.training


def test_buffers_train_and_eval() -> None:
    net = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    plain = copy.deepcopy(net)
    geo = in_psi(net, RECIPES["coupling"])
    for module in (geo, plain):
        torch.manual_seed(0)
        module.train()
        module(X)
        module.eval()
    assert torch.equal(geo(X), plain(X))
    assert torch.equal(dict(geo.named_buffers())["1.running_mean"], plain[1].running_mean)
    geo.train()
    kept = net[1].running_mean.clone()
    L = geo.loss(lambda out: out.square().mean(), X)
    with pytest.raises(geoad.UnsupportedModuleError, match="Dropout"):
        geoad.grad(L)(geo.point())
    net[2].eval()
    geoad.grad(L)(geo.point())  # a function of the point: running statistics stay
    assert torch.equal(net[1].running_mean, kept)
    assert net[1].num_batches_tracked == 1
    root = geoad.GeoModule(nn.BatchNorm1d(5))
    root.load_state_dict(nn.BatchNorm1d(5).state_dict())
    assert root.state_dict()._metadata[""]["version"] == 2


@every_map
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(recipe: Callable[[], Any], dtype: torch.dtype) -> None:
    plain = NETS["mlp"]()
    geo = in_psi(copy.deepcopy(plain), recipe)
    phi = geo.chart.parent
    buffers = [b.clone() for b in phi.buffers()]
    assert geo.to(dtype) is geo
    assert {p.dtype for p in geo.parameters()} == {dtype}
    assert {p.dtype for p in phi.parameters()} <= {dtype}
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(phi.buffers(), buffers, strict=True))
    assert torch.equal(geo(X.to(dtype)), copy.deepcopy(plain).to(dtype)(X.to(dtype)))
    geo(X.to(dtype)).sum().backward()
    geo.to(geo.reference)
    for name, p in geo.named_parameters():
        assert torch.equal(p, dict(plain.named_parameters())[name].to(dtype))


def test_a_conversion_that_leaves_the_domain_is_refused() -> None:
    net = nn.Linear(2, 2, bias=False)
    nn.init.constant_(net.weight, 1e-30)
    geo = in_psi(net, maps.Exp)
    geo.to(geo.reference.reparametrize(maps.Scale(1e-30)).target)
    tiny = geo.reference.reparametrize(maps.Compose(maps.Exp(), maps.Scale(1e-30))).target
    geo.to(tiny)
    with pytest.raises(ChartDomainError, match=r"converted to torch\.float16"):
        geo.half()
    assert geo.point().dtype == torch.float64


def test_the_bare_network_may_be_converted() -> None:
    geo = in_psi(NETS["mlp"]())
    wanted = geo(X)
    geo.wrapped.float()
    assert {p.dtype for p in geo.parameters()} == {torch.float32}
    torch.testing.assert_close(geo(X.float()), wanted.float(), rtol=1e-5, atol=1e-5)
    geo.to(geo.reference)
    assert {p.dtype for p in geo.parameters()} == {torch.float32}


def test_averaged_models() -> None:
    geo = in_psi(NETS["mlp"]())
    for averaged in (AveragedModel(geo), AveragedModel(geo, multi_avg_fn=get_ema_multi_avg_fn(0.9))):
        averaged.update_parameters(geo)
        torch.testing.assert_close(averaged(X), geo(X))
        with torch.no_grad():
            for p in geo.parameters():
                p.add_(0.1)
        averaged.update_parameters(geo)
        assert not torch.equal(averaged(X), geo(X))
        module = averaged.module
        assert torch.equal(module(X), copy.deepcopy(module).to(module.reference).wrapped(X))


def test_zero_grad_and_init() -> None:
    geo = in_psi(NETS["mlp"]())
    geo(X).sum().backward()
    geo.zero_grad()
    assert all(p.grad is None for p in geo.parameters())
    with torch.no_grad():
        for p in geo.parameters():
            nn.init.zeros_(p)
    assert torch.equal(geo(X), torch.zeros(6, 2))
    assert "chart='psi'" in repr(geo)


def test_a_graph_does_not_keep_anything_alive() -> None:
    import gc
    import weakref

    geo = in_psi(NETS["mlp"]())
    geo(X).sum().backward()
    alive = weakref.ref(geo.wrapped)
    leaf = weakref.ref(next(geo.parameters()))
    del geo
    gc.collect()
    assert alive() is None
    assert leaf() is None


# -- evaluation for fields --------------------------------------------------------------------------------------------


def test_forward_for_mappings() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(5, 3)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
            return {"logits": self.body(x if mask is None else x * mask)}

    geo = geoad.GeoModule(Model(), forward=lambda net, batch: net(batch["x"], mask=batch["mask"])["logits"])
    batch = {"x": X, "mask": (X > 0).double(), "labels": torch.tensor([0, 1, 2, 0, 1, 2])}
    L = geo.loss(F.cross_entropy, batch)
    wanted = F.cross_entropy(geo.wrapped.body(X * batch["mask"]), batch["labels"])
    torch.testing.assert_close(L(geo.point()), wanted)
    geo.to(chart_of(geo, RECIPES["coupling"]))
    torch.testing.assert_close(L(geo.point()), wanted)


def test_scalar_fields_see_the_network_in_the_reference_chart() -> None:
    geo = in_psi(NETS["mlp"]())
    norm = geo.scalar_field(lambda net: sum(p.square().sum() for p in net.parameters()))
    out = geo.scalar_field(lambda net: net(X).sum())
    through = geo.scalar_field(lambda net: geo(X).sum())  # the wrapper knows that weights are in place
    p = geo.point()
    theta = geo.stored_parameters()
    torch.testing.assert_close(norm(p), sum(t.square().sum() for t in theta.values()))
    torch.testing.assert_close(out(p), geo(X).sum())
    assert torch.equal(through(p), out(p))
    assert torch.equal(geoad.grad(through)(p).ravel(), geoad.grad(out)(p).ravel())
    assert torch.equal(geo(X).sum(), out(p))
