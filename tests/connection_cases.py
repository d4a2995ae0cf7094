"""Metrics, charts and closed forms that the tests of connections share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import geoad
from geoad import maps
from geoad.maps.select import Recipe


def close(a: Tensor, b: Tensor, tol: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def rough(x: Tensor) -> Tensor:
    """A metric without symmetries: M Mᵀ + diag(exp(x)) with M depending on x.

    No products with constants: in forward mode they cost torch 2.13 more than a millisecond each.
    """
    d = x.shape[0]
    m = x[:, None] @ torch.arange(1.0, d + 1, dtype=x.dtype).cos()[None, :] + x.sin()[:, None]
    return m @ m.mT + torch.diag(x.exp())


def sphere(x: Tensor) -> Tensor:
    """The unit sphere in colatitude and longitude."""
    return torch.diag(torch.stack([torch.ones_like(x[0]), x[0].sin() * x[0].sin()]))


def stereographic(x: Tensor) -> Tensor:
    """The unit sphere, projected from a pole."""
    return 4 / (1 + (x**2).sum()) ** 2 * torch.eye(2, dtype=x.dtype)


def gaussian(x: Tensor) -> Tensor:
    """The Fisher metric of N(mu, sigma) in (mu, sigma): a hyperbolic plane of curvature -1/2."""
    return torch.diag(torch.stack([x[1] ** -2, 2 * x[1] ** -2]))


def symbols_by_formula(matrix: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Γ[k, i, j] by the textbook formula in loops."""
    d = len(x)
    slope: Any = torch.func.jacfwd(matrix)(x)  # [i, j, l] = ∂_l G_ij
    inverse = torch.linalg.inv(matrix(x))
    result = torch.zeros(d, d, d)
    for k in range(d):
        for i in range(d):
            for j in range(d):
                for m in range(d):
                    result[k, i, j] += 0.5 * inverse[k, m] * (slope[j, m, i] + slope[i, m, j] - slope[i, j, m])
    return result


CHARTS: dict[str, Callable[[], Recipe]] = {
    "softplus": maps.Softplus,
    "sinh": maps.Sinh,
    "affine": maps.Affine,
    "polar": maps.Polar,
    "coupling": maps.Coupling,
    "orthogonal": maps.Orthogonal,
    "composed": lambda: maps.Compose(maps.Affine(), maps.Asinh(), maps.Polar()),
}


def pair(recipe: str, d: int = 3) -> tuple[geoad.Chart, geoad.Chart, geoad.Point]:
    """A chart, another one of the same manifold, and a point."""
    theta = geoad.Chart({"x": (d,)}, name="theta")
    torch.manual_seed(1)
    psi = theta.reparametrize(CHARTS[recipe](), name="psi").target
    return theta, psi, theta.point(0.4 + 0.3 * torch.arange(1.0, d + 1).cos())


def matrix_in(psi: geoad.Chart, matrix: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The components of a metric field in psi with plain torch.func: Kᵀ G(θ(ψ)) K."""
    assert psi.parent is not None
    bound = psi.parent.map

    def theta(y: Tensor) -> Tensor:
        return bound.invert({"x": y})["x"]

    def there(y: Tensor) -> Tensor:
        inverse: Any = torch.func.jacfwd(theta)(y)
        return inverse.mT @ matrix(theta(y)) @ inverse

    return there


def great_circle(x: Tensor, v: Tensor, time: float | Tensor) -> Tensor:
    """Colatitude and longitude on the great circle, by embedding the sphere."""

    def embed(a: Tensor) -> Tensor:
        return torch.stack([a[0].sin() * a[1].cos(), a[0].sin() * a[1].sin(), a[0].cos()])

    n, velocity = torch.func.jvp(embed, (x,), (v,))
    speed = velocity.norm()
    angle = speed * time
    q = n * torch.cos(angle) + velocity / speed * torch.sin(angle)
    return torch.stack([q[2].acos(), torch.atan2(q[1], q[0])])
