"""Maps that cannot be undone, each beside a plain function that says the same, and dense linear algebra to compare with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import geoad
from geoad import maps
from geoad.errors import NotADiffeomorphismError

Plain = Callable[[Tensor], Tensor]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """A recipe on some blocks, and the same map θ = f(ψ) on raveled numbers, written without geoad."""

    law: str
    shapes: dict[str, tuple[int, ...]]
    recipe: Callable[[], Any]
    plain: Plain
    dim: int
    psi: Callable[[int], Tensor] | None = None
    total: Callable[[Tensor], Tensor] | None = None
    """The matrix M of the metric on ψ in which lifts are horizontal; None for the identity."""

    def bound(self) -> tuple[geoad.Chart, geoad.Reparametrization]:
        theta = geoad.Chart(self.shapes, "theta")
        return theta, theta.reparametrize(self.recipe(), "psi")

    def numbers(self, seed: int) -> Tensor:
        """Raveled ψ."""
        return normal(100 + seed, self.dim) if self.psi is None else self.psi(seed)

    def jacobian(self, y: Tensor) -> Tensor:
        return torch.func.jacrev(self.plain)(y)

    def mass(self, y: Tensor) -> Tensor:
        return torch.eye(self.dim, dtype=y.dtype) if self.total is None else self.total(y)

    def lift(self, y: Tensor) -> Tensor:
        """H = M⁻¹ Jᵀ (J M⁻¹ Jᵀ)⁻¹."""
        j = self.jacobian(y)
        lowered = torch.linalg.solve(self.mass(y), j.mT)
        return lowered @ torch.linalg.inv(j @ lowered)


def split(y: Tensor, *shapes: tuple[int, ...]) -> list[Tensor]:
    parts = y.split([torch.Size(shape).numel() for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def null_space(j: Tensor) -> Tensor:
    """An orthonormal basis of ker J, by the singular value decomposition."""
    rank = int(torch.linalg.matrix_rank(j))
    return torch.linalg.svd(j).Vh[rank:].mT


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> bool:
    """Equal up to `tolerance` of the larger one."""
    return a.shape == b.shape and bool((a - b).abs().amax() <= tolerance * max(1.0, float(b.abs().amax())))


class Setting:
    """A case that is bound, at a point ψ (not on the section of a submersion), with the matrices of linear algebra."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.theta, self.phi = case.bound()
        self.psi, self.map = self.phi.target, self.phi.map
        self.y = case.numbers(seed)
        self.x = case.plain(self.y)
        self.q = self.psi.point(self.psi.layout.unravel(self.y))
        self.p = self.q.to(self.theta)
        self.jacobian = case.jacobian(self.y)
        self.lift = case.lift(self.y) if case.law == "submersion" else torch.linalg.pinv(self.jacobian)
        self.mass = case.mass(self.y)
        self.d, self.dim = self.jacobian.shape
        """The dimensions of θ and ψ."""

    def matrix(self, product: Any, start: geoad.Chart, end: geoad.Chart) -> Tensor:
        """The matrix of one of the four products."""
        x, y = self.p.blocks, self.q.blocks
        rows = [end.layout.ravel(product(x, y, start.layout.unravel(e))) for e in torch.eye(start.dim)]
        return torch.stack(rows, -1)

    def vector(self, seed: int) -> geoad.Vector:
        return self.theta.vector(self.theta.layout.unravel(normal(seed, self.d)), at=self.p)

    def covector(self, seed: int) -> geoad.Covector:
        return self.theta.covector(self.theta.layout.unravel(normal(seed, self.d)), at=self.p)

    def spd(self, seed: int, d: int | None = None) -> Tensor:
        half = normal(seed, d or self.d, d or self.d)
        return half @ half.mT / (d or self.d) + torch.eye(d or self.d)

    def field(self) -> geoad.fields.ScalarField:
        """The function `loss` on θ."""
        return self.theta.scalar_field(lambda x: loss(self.theta.layout.ravel(self.theta.pack(x))))


def dense(T: Any) -> Tensor:
    """The components with one axis for each index, of the size of the chart."""
    numbers = T.components
    if not isinstance(numbers, Tensor):
        return T.to_dense()
    return numbers.reshape(tuple(axis.size for axis in T.axes))


def loss(x: Tensor) -> Tensor:
    return (x.sin() * torch.linspace(1, 2, len(x), dtype=x.dtype)).sum() + 0.25 * (x**4).sum() + x.prod()


def refused(what: str = "") -> Any:
    """The refusal of an object without a law: an error that names both charts."""
    return pytest.raises(NotADiffeomorphismError, match=rf"(?s)(?=.*'theta')(?=.*'psi'){what}")


# -- submersions -------------------------------------------------------------------------------------------------------


def weight_norm(shape: tuple[int, ...], dim: int | None) -> Plain:
    axes = [i for i in range(len(shape)) if dim is None or i != dim % len(shape)]
    scale = () if dim is None else tuple(n if i == dim % len(shape) else 1 for i, n in enumerate(shape))

    def plain(y: Tensor) -> Tensor:
        g, v = split(y, scale, shape)
        return (g * v / v.pow(2).sum(axes, keepdim=True).sqrt()).flatten()

    return plain


def product(m: int, k: int, n: int) -> Plain:
    def plain(y: Tensor) -> Tensor:
        u, v = split(y, (m, k), (k, n))
        return (u @ v).flatten()

    return plain


A = normal(1, 3, 7)
B = normal(2, 3, 7)
M7 = (lambda half: half @ half.mT / 7 + torch.eye(7, dtype=torch.float64))(normal(3, 7, 7))


def straight(y: Tensor) -> Tensor:
    return A.to(y) @ y


def bent(y: Tensor) -> Tensor:
    return A.to(y) @ y + 0.2 * torch.sin(B.to(y) @ y)


def bent_mass(y: Tensor) -> Tensor:
    return M7 + torch.diag(0.5 * torch.sin(y) ** 2)


def least_squares(x: Tensor) -> Tensor:
    """A section of the linear map A."""
    return torch.linalg.pinv(A) @ x


def solved(x: Tensor) -> Tensor:
    """A section of `bent`, by Newton's method."""
    y = least_squares(x)
    for _ in range(30):
        y = y + torch.linalg.pinv(torch.func.jacrev(bent)(y)) @ (x - bent(y))
    return y


def above_mass(y: Tensor) -> Tensor:
    """The Euclidean metric of (g, v) seen in ψ = asinh(g, v)."""
    return torch.diag(torch.cosh(y) ** 2)


def wn_of_product(y: Tensor) -> Tensor:
    g, u, v = split(y, (2, 1), (2, 3), (3, 3))
    w = u @ v
    return (g * w / w.norm(dim=1, keepdim=True)).flatten()


def wn_of_product_mass(y: Tensor) -> Tensor:
    """Horizontal lifts one after the other are orthogonal to all vertical directions in this metric."""

    def middle(y: Tensor) -> Tensor:
        g, u, v = split(y, (2, 1), (2, 3), (3, 3))
        return torch.cat([g.flatten(), (u @ v).flatten()])

    j = torch.func.jacrev(middle)(y)
    vertical = torch.eye(len(y), dtype=y.dtype) - torch.linalg.pinv(j) @ j
    return j.mT @ j + vertical


SUBMERSIONS: dict[str, Case] = {
    "weight norm": Case("submersion", {"w": (3, 4)}, maps.WeightNorm, weight_norm((3, 4), 0), 15),
    "weight norm of columns": Case("submersion", {"w": (3, 4)}, lambda: maps.WeightNorm(1), weight_norm((3, 4), 1), 16),
    "weight norm of a block": Case("submersion", {"w": (3, 2)}, lambda: maps.WeightNorm(None), weight_norm((3, 2), None), 7),
    "weight norm of a convolution": Case("submersion", {"w": (2, 2, 1, 3)}, maps.WeightNorm, weight_norm((2, 2, 1, 3), 0), 14),
    "weight norm of an axis in the middle": Case(
        "submersion", {"w": (2, 3, 2)}, lambda: maps.WeightNorm(-2), weight_norm((2, 3, 2), 1), 15
    ),
    "weight norm, weighted": Case(
        "submersion",
        {"w": (2, 3)},
        lambda: maps.WeightNorm(metric={"g": 3.0, "v": torch.tensor([[1.0, 2.0, 3.0], [2.0, 1.0, 0.5]])}),
        weight_norm((2, 3), 0),
        8,
        total=lambda y: torch.diag(torch.tensor([3.0, 3.0, 1.0, 2.0, 3.0, 2.0, 1.0, 0.5], dtype=y.dtype)),
    ),
    "factors, wide": Case("submersion", {"w": (3, 4)}, lambda: maps.Factorization(3), product(3, 3, 4), 21),
    "factors, tall": Case("submersion", {"w": (4, 2)}, lambda: maps.Factorization(3), product(4, 3, 2), 18),
    "factors, square": Case("submersion", {"w": (3, 3)}, lambda: maps.Factorization(3), product(3, 3, 3), 18),
    "factors, many": Case("submersion", {"w": (2, 3)}, lambda: maps.Factorization(5), product(2, 5, 3), 25),
    "factors of a convolution": Case("submersion", {"w": (2, 2, 1, 2)}, lambda: maps.Factorization(2), product(2, 2, 4), 12),
    "factors, weighted": Case(
        "submersion",
        {"w": (2, 3)},
        lambda: maps.Factorization(2, metric={"u": 2.0, "v": 0.25}),
        product(2, 2, 3),
        10,
        total=lambda y: torch.diag(torch.tensor([2.0] * 4 + [0.25] * 6, dtype=y.dtype)),
    ),
    "factors, entries weighted": Case(
        "submersion",
        {"w": (2, 2)},
        lambda: maps.Factorization(2, metric={"u": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "v": 1.0}),
        product(2, 2, 2),
        8,
        total=lambda y: torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0, 1.0, 1.0, 1.0, 1.0], dtype=y.dtype)),
    ),
    "linear": Case("submersion", {"x": (3,)}, lambda: maps.Submersion(straight, least_squares, (7,)), straight, 7),
    "bent": Case("submersion", {"x": (3,)}, lambda: maps.Submersion(bent, solved, (7,)), bent, 7),
    "bent, in a metric": Case(
        "submersion", {"x": (3,)}, lambda: maps.Submersion(bent, solved, (7,), metric=bent_mass), bent, 7, total=bent_mass
    ),
    "a diffeomorphism below": Case(
        "submersion",
        {"w": (2, 3)},
        lambda: maps.Compose(maps.Sinh(), maps.WeightNorm()),
        lambda y: torch.asinh(weight_norm((2, 3), 0)(y)),
        8,
    ),
    "a diffeomorphism above": Case(
        "submersion",
        {"w": (2, 3)},
        lambda: maps.Compose(maps.WeightNorm(), maps.Asinh()),
        lambda y: weight_norm((2, 3), 0)(torch.sinh(y)),
        8,
        total=above_mass,
    ),
    "two submersions": Case(
        "submersion",
        {"w": (2, 3)},
        lambda: maps.Compose(maps.WeightNorm(), {"w_v": maps.Factorization(3)}),
        wn_of_product,
        17,
        total=wn_of_product_mass,
    ),
    "patterns": Case(
        "submersion",
        {"w": (2, 3), "b": (2,), "c": (2,)},
        lambda: {"w": maps.WeightNorm(), "b": maps.Scale(2.0)},
        lambda y: torch.cat([weight_norm((2, 3), 0)(y[:8]), y[8:10] / 2, y[10:]]),
        12,
    ),
}

# -- immersions --------------------------------------------------------------------------------------------------------

BASIS = normal(4, 8, 3)
FRAME = torch.linalg.qr(BASIS).Q
OFFSET = {"w": normal(5, 2, 3), "b": normal(6, 2)}
FLAT_OFFSET = torch.cat([OFFSET["w"].flatten(), OFFSET["b"]])
C = normal(7, 6, 2)
D = normal(8, 6, 2)
WB = {"w": (2, 3), "b": (2,)}


def curved(z: Tensor) -> Tensor:
    return C.to(z) @ z + 0.3 * torch.sin(D.to(z) @ z)


def located(x: Tensor) -> Tensor:
    z = torch.linalg.pinv(C.to(x)) @ x
    for _ in range(40):
        z = z + torch.linalg.pinv(torch.func.jacrev(curved)(z)) @ (x - curved(z))
    return z


def sphere(y: Tensor) -> Tensor:
    a, b = y
    return torch.stack([a.sin() * b.cos(), a.sin() * b.sin(), a.cos()])


def sphere_angles(x: Tensor) -> Tensor:
    return torch.stack([torch.atan2((x[0] ** 2 + x[1] ** 2).sqrt(), x[2]), torch.atan2(x[1], x[0])])


IMMERSIONS: dict[str, Case] = {
    "subspace": Case("immersion", WB, lambda: maps.Subspace(BASIS, OFFSET), lambda y: FLAT_OFFSET + BASIS @ y, 3),
    "subspace through 0": Case("immersion", WB, lambda: maps.Subspace(FRAME), lambda y: FRAME @ y, 3),
    "subspace, by block": Case(
        "immersion",
        WB,
        lambda: maps.Subspace({"w": BASIS[:6].reshape(2, 3, 3), "b": BASIS[6:]}, OFFSET),
        lambda y: FLAT_OFFSET + BASIS @ y,
        3,
    ),
    "frozen": Case(
        "immersion",
        WB,
        lambda: {"w": maps.Frozen(OFFSET)},
        lambda y: torch.cat([FLAT_OFFSET[:6], y]),
        2,
    ),
    "frozen and curved": Case(
        "immersion",
        WB,
        lambda: {"b": maps.Frozen(OFFSET), "w": maps.Asinh()},
        lambda y: torch.cat([torch.sinh(y), FLAT_OFFSET[6:]]),
        6,
    ),
    "tied": Case(
        "immersion",
        {"a": (2, 2), "b": (3,), "c": (2, 2), "d": (2, 2)},
        maps.Tied,
        lambda y: torch.cat([y[:4], y[4:], y[:4], y[:4]]),
        7,
    ),
    "curved": Case("immersion", {"x": (6,)}, lambda: maps.Immersion(curved, (2,), located), curved, 2),
    "sphere": Case(
        "immersion",
        {"x": (3,)},
        lambda: maps.Immersion(sphere, (2,), sphere_angles),
        sphere,
        2,
        psi=lambda seed: torch.tensor([0.9, 0.4], dtype=torch.float64) + 0.3 * torch.sin(normal(seed, 2)),
    ),
    "a diffeomorphism below": Case(
        "immersion",
        WB,
        lambda: maps.Compose(maps.Sinh(), maps.Subspace(BASIS, OFFSET)),
        lambda y: torch.asinh(FLAT_OFFSET + BASIS @ y),
        3,
    ),
    "a diffeomorphism above": Case(
        "immersion",
        WB,
        lambda: maps.Compose(maps.Subspace(BASIS, OFFSET), maps.Asinh()),
        lambda y: FLAT_OFFSET + BASIS @ torch.sinh(y),
        3,
    ),
    "two immersions": Case(
        "immersion",
        WB,
        lambda: maps.Compose(maps.Subspace(BASIS, OFFSET), maps.Immersion(sphere, (2,), sphere_angles)),
        lambda y: FLAT_OFFSET + BASIS @ sphere(y),
        2,
        psi=lambda seed: torch.tensor([0.9, 0.4], dtype=torch.float64) + 0.3 * torch.sin(normal(seed, 2)),
    ),
}

# -- smooth maps -------------------------------------------------------------------------------------------------------


def lora(m: int, r: int, n: int, base: Tensor, factor: float) -> Plain:
    def plain(y: Tensor) -> Tensor:
        a, b = split(y, (r, n), (m, r))
        return base.flatten() + factor * (b @ a).flatten()

    return plain


W0 = normal(9, 6, 5)
CONV0 = normal(10, 3, 2, 2, 1)

SMOOTH: dict[str, Case] = {
    "lora": Case("smooth", {"w": (6, 5)}, lambda: maps.LoRA(2, 4.0, base={"w": W0}), lora(6, 2, 5, W0, 2.0), 22),
    "lora of a convolution": Case(
        "smooth", {"w": (3, 2, 2, 1)}, lambda: maps.LoRA(2, base={"w": CONV0}), lora(3, 2, 4, CONV0, 1.0), 14
    ),
    "factors of deficient rank": Case("smooth", {"w": (6, 5)}, lambda: maps.Factorization(3), product(6, 3, 5), 33),
    "a submersion and an immersion": Case(
        "smooth",
        WB,
        lambda: {"w": maps.WeightNorm(), "b": maps.Frozen(OFFSET)},
        lambda y: torch.cat([weight_norm((2, 3), 0)(y), FLAT_OFFSET[6:]]),
        8,
    ),
    "outer product": Case(
        "smooth",
        {"w": (2, 3)},
        lambda: maps.SmoothMap(lambda y: torch.outer(y["a"], y["b"]), {"a": (2,), "b": (3,)}),
        lambda y: torch.outer(y[:2], y[2:]).flatten(),
        5,
    ),
}

ALL: dict[str, Case] = {
    f"{case.law}: {name}": case for table in (SUBMERSIONS, IMMERSIONS, SMOOTH) for name, case in table.items()
}
