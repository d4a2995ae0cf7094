"""compile=True: the same numbers as without, at every point, and never those of another network.

Most cases run what was noted as it is (``noted``); the last one compiles it.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import geoad
from geoad.curvature import GGN, KFAC, Fisher, OutputMatrix
from geoad.errors import GeometryError

pytestmark = pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")


def noted(graph: Any, given: list[Tensor]) -> Any:
    return graph


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))


def norm() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x, x, x, need_weights=False)[0].mean(1))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (5,)),
    "conv": (conv, (1, 4, 4)),
    "norm": (norm, (5,)),
    "attention": (Attention, (3, 4)),
}


def pair(net: nn.Module, data: Any, cls: type = Fisher, **options: Any) -> tuple[geoad.GeoModule, Any, Any]:
    """(the network, a compiled field, the same uncompiled)."""
    geo = geoad.GeoModule(net.double())
    made = []
    for compiled in (True, False):
        source = {"generator": torch.Generator().manual_seed(1)} if options.get("kind") == "mc" else {}
        made.append(cls(geo, data, compile=compiled, **{"representation": "diagonal", **options, **source}))
    made[0].chunks.backend = noted
    return geo, *made


def samples(shape: tuple[int, ...], count: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=source, dtype=torch.float64), torch.randint(3, (count,), generator=source)


def error(geo: geoad.GeoModule, compiled: Any, plain: Any) -> float:
    p = geo.point()
    left, right = compiled(p).to_dense(), plain(p).to_dense()
    return float((left - right).abs().max() / right.abs().max())


def move(geo: geoad.GeoModule) -> None:
    with torch.no_grad():
        for parameter in geo.parameters():
            parameter.add_(0.1 * torch.sin(torch.arange(parameter.numel(), dtype=torch.float64)).view_as(parameter))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


MIX = {"*.weight": "diagonal", "*": "diagonal"}


@pytest.mark.parametrize(("name", "representation"), [*((name, "diagonal") for name in NETS), ("mlp", MIX)], ids=str)
def test_the_same_numbers_at_every_point(name: str, representation: Any) -> None:
    make, shape = NETS[name]
    geo, compiled, plain = pair(make(), samples(shape), representation=representation)
    for _ in range(2):
        assert error(geo, compiled, plain) < 1e-12
        move(geo)
    assert compiled.chunks.count == 1


INDEFINITE = torch.diag(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))

KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "mc": (Fisher, {"kind": "mc", "samples": 2}),
    "empirical": (Fisher, {"kind": "empirical"}),
    "covariance": (Fisher, {"kind": "covariance"}),
    "sum": (Fisher, {"reduction": "sum"}),
    "bernoulli": (Fisher, {"likelihood": "bernoulli"}),
    "ggn": (GGN, {"loss": nn.functional.cross_entropy}),
    "signed": (GGN, {"likelihood": OutputMatrix(lambda f, y: INDEFINITE.expand(len(f), 3, 3), positive=False)}),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds(name: str) -> None:
    cls, options = KINDS[name]
    geo, compiled, plain = pair(mlp(), samples((5,)), cls, **options)
    for _ in range(2):
        assert error(geo, compiled, plain) < 1e-12
        move(geo)
    assert compiled.chunks.count == 1


@pytest.mark.parametrize("sizes", [(64, 64, 5), (3, 50, 64), (333,), (1,)], ids=str)
def test_chunks_have_one_size(sizes: tuple[int, ...]) -> None:
    geo, compiled, plain = pair(mlp(), [samples((5,), n, i) for i, n in enumerate(sizes)])
    assert error(geo, compiled, plain) < 1e-12
    first = compiled.chunks.count
    assert first <= 2
    assert error(geo, compiled, plain) < 1e-12
    assert compiled.chunks.count == first


def test_other_labels_are_other_arguments() -> None:
    geo, compiled, plain = pair(mlp(), samples((5,)), kind="mc")
    assert error(geo, compiled, plain) < 1e-12
    before = compiled(geo.point()).to_dense()
    compiled.resample()
    plain.seed = compiled.seed
    assert error(geo, compiled, plain) < 1e-12
    assert compiled.chunks.count == 1
    assert not torch.allclose(before, plain(geo.point()).to_dense())


def test_in_another_chart() -> None:
    geo = geoad.GeoModule(mlp().double())
    psi = geo.reference.reparametrize(geoad.maps.Asinh(), name="psi").target
    x, _ = samples((5,))
    compiled, plain = (Fisher(geo, x, representation="diagonal", chart=psi, compile=each) for each in (True, False))
    compiled.chunks.backend = noted
    assert error(geo, compiled, plain) < 1e-12


# -- nothing stale -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def changing() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double().eval()
    net[2].requires_grad_(False)
    return net


def scale_frozen(net: Any) -> None:
    net[2].weight.data.mul_(2)


def swap_numbers(net: Any) -> None:
    net[2].weight.data = torch.ones(4, 4, dtype=torch.float64)


def other_buffer(net: Any) -> None:
    net[3].running_mean = torch.ones(4, dtype=torch.float64)


def buffer_in_place(net: Any) -> None:
    net[3].running_mean.add_(1)


def add_hook(net: Any) -> None:
    net[1].register_forward_hook(lambda module, given, out: 2 * out)


def add_outer_hook(net: Any) -> None:
    net.register_forward_hook(lambda module, given, out: 2 * out)


def other_activation(net: Any) -> None:
    net[1] = nn.Sigmoid()


def other_option(net: Any) -> None:
    net[3].eps = 0.5


def other_forward(net: Any) -> None:
    net[1].forward = torch.sin


@pytest.mark.parametrize(
    "change",
    [
        scale_frozen,
        swap_numbers,
        other_buffer,
        buffer_in_place,
        add_hook,
        add_outer_hook,
        other_activation,
        other_option,
        other_forward,
    ],
    ids=lambda each: each.__name__,
)
def test_nothing_is_stale(changing: nn.Sequential, change: Callable[[Any], None]) -> None:
    geo, compiled, plain = pair(changing, samples((5,)))
    assert error(geo, compiled, plain) < 1e-12
    before = plain(geo.point()).to_dense()
    change(changing)
    assert error(geo, compiled, plain) < 1e-12
    assert not torch.allclose(before, plain(geo.point()).to_dense())
    # values are arguments, whatever they are kept in
    assert compiled.chunks.count == (1 if change in (scale_frozen, swap_numbers, buffer_in_place) else 2)


def test_products_at_a_point_are_not_stale_either(changing: nn.Sequential) -> None:
    geo = geoad.GeoModule(changing)
    data, p = samples((5,)), geo.point()
    for change in (add_outer_hook, other_activation, other_forward):
        kept = Fisher(geo, data)(p).operator
        v = {name: torch.ones_like(block) for name, block in p.blocks.items()}
        for _ in range(3):
            kept.mv(v)
        change(changing)
        fresh = Fisher(geo, data)(p).operator.mv(v)
        assert all(torch.allclose(found, fresh[name], atol=1e-12) for name, found in kept.mv(v).items())


def test_what_changes_each_time_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geoad.curvature.compiled._COMPILED", 6)
    geo, compiled, _ = pair(mlp(), samples((5,)))
    net: Any = geo.wrapped
    with pytest.raises(GeometryError, match="6 functions were compiled for one field"):
        for i in range(10):
            net.step = i
            compiled(geo.point())


def test_a_copy_compiles_for_itself() -> None:
    geo, compiled, _ = pair(mlp(), samples((5,)))
    compiled(geo.point())
    assert copy.deepcopy(compiled).chunks.count == 0


# -- refusals ----------------------------------------------------------------------------------------------------------------


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        return z if float(z.detach().sum()) < 1e9 else -z


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * float(self.scale)


@pytest.mark.parametrize(("make", "cause"), [(Branching, "one by one"), (Reading, "values of a tensor decide")])
def test_what_cannot_be_traced_raises_and_spoils_nothing(make: Callable[[], nn.Module], cause: str) -> None:
    geo, compiled, plain = pair(make(), samples((5,)))
    before = plain(geo.point()).to_dense()
    with pytest.raises(GeometryError, match=f"compile=True.*{cause}.*compile=False"):
        compiled(geo.point())
    assert torch.equal(plain(geo.point()).to_dense(), before)


def test_wrong_values_are_found() -> None:
    x, y = samples((5,))
    geo, compiled, _ = pair(mlp(), (x, y), kind="empirical")
    compiled(geo.point())
    y[3] = 5
    with pytest.raises(GeometryError, match="labels must lie between"):
        compiled(geo.point())
    y[3] = 0
    x[2] = float("nan")
    with pytest.raises(GeometryError, match="not finite"):
        compiled(geo.point())


@pytest.mark.parametrize(
    "representation",
    ["dense", "block_diagonal", "kfac", "ekfac", "quasi_diagonal", "low_rank", "implicit", {"*.bias": "diagonal", "*": KFAC()}],
    ids=str,
)
def test_other_representations_are_refused(representation: Any) -> None:
    with pytest.raises(GeometryError, match="compile=True is not offered"):
        Fisher(geoad.GeoModule(mlp()), samples((5,))[0].float(), representation=representation, compile=True)


def test_derivatives_are_refused() -> None:
    geo, compiled, _ = pair(mlp(), samples((5,)))
    with pytest.raises(GeometryError, match="compile=False"):
        geoad.christoffel(compiled)(geo.point())


def test_without_a_compiler() -> None:
    geo, compiled, plain = pair(mlp(), samples((5,)))

    def broken(graph: Any, given: list[Tensor]) -> Any:
        raise RuntimeError("No working C++ compiler found")

    compiled.chunks.backend = broken
    with pytest.raises(GeometryError, match=r"No working C\+\+ compiler found.*compile=False"):
        compiled(geo.point())
    compiled.chunks.backend = noted
    assert error(geo, compiled, plain) < 1e-12


# -- compiled ----------------------------------------------------------------------------------------------------------------


def test_compiled_for_real() -> None:
    geo = geoad.GeoModule(nn.Linear(5, 3).float())
    x = samples((5,), 12)[0].float()
    compiled, plain = (Fisher(geo, x, representation="diagonal", compile=each) for each in (True, False))
    for _ in range(2):
        assert error(geo, compiled, plain) < 1e-5
        with torch.no_grad():
            geo.wrapped.weight.mul_(1.5)
    assert compiled.chunks.count == 1
