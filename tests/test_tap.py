"""The tap, Jacobians in layer structure, and dense matrices contracted class by class, against ``vmap`` + ``jacrev``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import geoad
from geoad.kernels.gram import GramSum
from geoad.kernels.jacobians import sample_jacobian
from geoad.kernels.layered import Factored, block_jacobians, plan_of
from geoad.kernels.tap import Tap


class Twice(nn.Module):
    """A layer used twice, a weight used in functional code, raw and unused parameters, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(4, 4), nn.Linear(4, 3, bias=False)
        self.norm = nn.LayerNorm(4)
        self.raw, self.unused = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.a(torch.tanh(self.a(x)))) * self.raw
        return self.c(h) + F.linear(x, self.c.weight)


class Product(nn.Module):
    """A weight that is also multiplied: its layers may not be used alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + x @ self.a.weight.T.sin()


class Across(nn.Module):
    """Linear on sequences that come with the positions in front, as many as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.q(x.transpose(0, 1))).mean(0))


class Recurrent(nn.Module):
    """vmap cannot batch a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


def _tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
    net[2].weight = net[0].weight
    return net


def _single() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 1), nn.Tanh(), nn.Linear(1, 3))


NETWORKS: dict[str, tuple[Any, tuple[int, ...], set[str]]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)),
        (7, 4),
        {"0.weight", "0.bias", "2.weight", "2.bias"},
    ),
    "in place": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)),
        (7, 4),
        {"0.weight", "2.bias"},
    ),
    "twice": (Twice, (7, 4), {"a.weight", "a.bias", "c.weight"}),
    "product": (Product, (7, 4), {"a.bias"}),
    "sequence": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3)), (7, 3, 4), {"0.weight"}),
    "across": (Across, (5, 5, 4), {"q.weight", "q.bias", "o.weight", "o.bias"}),
    "tied": (_tied, (7, 4), {"0.weight", "0.bias", "2.bias", "3.weight"}),
    "one unit": (_single, (7, 4), {"0.weight", "0.bias"}),
    "conv": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)), (4, 1, 4, 4), {"2.weight", "2.bias"}),
    "outputs": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Unflatten(1, (2, 3))), (5, 4), {"0.weight", "0.bias"}),
    "recurrent": (Recurrent, (4, 2, 4), {"head.weight", "head.bias"}),
}


def _case(kind: str) -> tuple[geoad.GeoModule, Any, Tensor, set[str]]:
    torch.manual_seed(0)
    make, shape, covered = NETWORKS[kind]
    geo = geoad.GeoModule(make())
    return geo, geo.point().blocks, torch.randn(shape), covered


@pytest.mark.parametrize("kind", list(NETWORKS))
def test_jacobians_agree_with_vmap_and_jacrev(kind: str) -> None:
    geo, x, inputs, covered = _case(kind)
    layout = geo.reference.layout
    plan = plan_of(geo.evaluate, x, inputs[:1])
    assert covered <= plan.covered
    assert set(plan.others) == set(x) - plan.covered
    f, found = block_jacobians(geo.evaluate, layout, x, inputs, plan)
    value, jacobian = sample_jacobian(geo.evaluate, layout, x, inputs)
    torch.testing.assert_close(f, value)
    dense = torch.cat([found[n].dense() if isinstance(found[n], Factored) else found[n] for n in layout], -1)  # pyright: ignore
    torch.testing.assert_close(dense, jacobian.reshape(dense.shape), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", list(NETWORKS))
def test_sums_agree_with_the_product_of_jacobians(kind: str) -> None:
    geo, x, inputs, _ = _case(kind)
    layout = geo.reference.layout
    plan = plan_of(geo.evaluate, x, inputs[:1])
    f, jacobian = sample_jacobian(geo.evaluate, layout, x, inputs)
    flat = jacobian.reshape(len(f), -1, layout.dim)
    classes = flat.shape[1]
    a = torch.randn(len(f), classes, classes)
    a = a + a.mT
    total = GramSum(layout)
    for rows in (slice(0, 3), slice(3, None)):
        _, found = block_jacobians(geo.evaluate, layout, x, inputs[rows], plan)
        total.add(found, lambda t, rows=rows: a[rows] @ t)
    expected = torch.einsum("nci,ncd,ndj->ij", flat, a, flat)
    torch.testing.assert_close(total.matrix(), expected, rtol=1e-11, atol=1e-11)


class Mixed(nn.Module):
    """Layers that compute in another precision than the parameters have."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.b(torch.tanh(self.a(x))).float()


def test_mixed_precision_is_that_of_the_network() -> None:
    torch.manual_seed(0)
    geo, inputs = geoad.GeoModule(Mixed().float()), torch.randn(6, 4, dtype=torch.float32)
    x, layout = geo.point().blocks, geo.reference.layout
    f, found = block_jacobians(geo.evaluate, layout, x, inputs, plan_of(geo.evaluate, x, inputs[:1]))
    value, jacobian = sample_jacobian(geo.evaluate, layout, x, inputs)
    assert torch.equal(f, value)
    dense = torch.cat([found[n].dense() if isinstance(found[n], Factored) else found[n] for n in layout], -1)  # pyright: ignore
    assert dense.dtype == torch.float32
    torch.testing.assert_close(dense, jacobian.reshape(dense.shape), rtol=2e-2, atol=2e-2)
    matrix = geoad.curvature.Fisher(geo, inputs, representation="dense")(geo.point()).to_dense()
    assert matrix.dtype == torch.float32
    assert bool(matrix.isfinite().all())


def test_a_parameter_that_is_looked_at_stays_covered_and_one_that_is_used_does_not() -> None:
    w, b, x = torch.randn(3, 4), torch.randn(3), torch.randn(2, 4)
    with Tap({id(w): "w", id(b): "b"}) as tap:
        assert w.shape[0] == 3
        assert w.dtype == b.dtype
        y = F.linear(x, w, b)
        z = b + y
    assert [use.weight for use in tap.uses] == ["w"]
    assert list(tap.others) == ["b"]
    assert torch.equal(z, b + F.linear(x, w, b))


def test_an_unused_parameter_has_zero_rows_and_is_listed() -> None:
    geo, x, inputs, _ = _case("twice")
    plan = plan_of(geo.evaluate, x, inputs[:1])
    assert plan.others["unused"] == []
    matrix = geoad.curvature.Fisher(geo, inputs, representation="dense")(geo.point()).to_dense()
    place = geo.reference.layout.offsets()["unused"]
    assert not bool(matrix[place].any())
    assert not bool(matrix[:, place].any())


@pytest.mark.parametrize("kind", list(NETWORKS))
@pytest.mark.parametrize("likelihood", ["categorical", geoad.curvature.Gaussian(torch.tensor([1.0, 2.0, 0.5]))])
def test_dense_fishers_are_those_of_their_products(kind: str, likelihood: Any) -> None:
    geo, _, inputs, _ = _case(kind)
    p = geo.point()
    dense = geoad.curvature.Fisher(geo, inputs, likelihood, representation="dense")(p)
    implicit = geoad.curvature.Fisher(geo, inputs, likelihood, representation="implicit")(p)
    for seed in range(3):
        v = geo.reference.vector(torch.randn(geo.reference.dim, generator=torch.Generator().manual_seed(seed)), at=p)
        torch.testing.assert_close(dense.mv(v).ravel(), implicit.mv(v).ravel(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("memory", [1, 1 << 12, 1 << 28])
def test_memory_bounds_the_chunks_and_changes_nothing(memory: int) -> None:
    geo, _, inputs, _ = _case("mlp")
    whole = geoad.curvature.Fisher(geo, inputs, representation="dense")(geo.point()).to_dense()
    parts = geoad.curvature.Fisher(geo, inputs, representation="dense", max_memory=memory)(geo.point()).to_dense()
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=1e-15)


def test_a_dense_fisher_at_several_points_and_in_another_chart() -> None:
    geo, _, inputs, _ = _case("mlp")
    psi = geo.reference.reparametrize(geoad.maps.Asinh(), name="psi").target
    p = geo.point()
    here = geoad.curvature.Fisher(geo, inputs, representation="dense")
    there = geoad.curvature.Fisher(geo, inputs, representation="dense", chart=psi)
    torch.testing.assert_close(here(p.to(psi)).to_dense(), there(p.to(psi)).to_dense(), rtol=1e-11, atol=1e-13)
    step = geo.reference.vector(torch.ones(geo.reference.dim), at=p)
    batch = p.retract(step, torch.tensor([0.0, 0.1]))
    torch.testing.assert_close(here(batch).to_dense()[1], here(p.retract(step, 0.1)).to_dense(), rtol=1e-12, atol=1e-14)
