"""A flat subspace of the parameters: few coordinates for many weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from geoad.errors import GeometryError
from geoad.maps.anchor import anchored, plain
from geoad.maps.immersion import Immersion
from geoad.maps.numbers import draw, given_numbers
from geoad.params import Blocks, Layout

__all__ = ["Subspace"]


class Subspace(Immersion):
    r"""θ = θ₀ + B z: an affine subspace of all matched blocks at once; an immersion with one block of coordinates z.

    With B = QR, Q orthonormal: :math:`J = B`, :math:`J^+ v = R^{-1}Q^\top v`. A θ is in the domain if it lies in the
    subspace, to rounding.

    Args:
        basis: k, for a random subspace of that dimension; or B: a (d, k) matrix over the raveled blocks, or a dict name ->
            tensor of shape (\*shape of the block, k).
        offset: θ₀: a point of any chart of the manifold, or a dict name -> tensor; 0 by default.
        generator: where a random basis is drawn.
        orthonormal: make the columns of a *random* basis orthonormal, so that the induced Euclidean metric is the identity;
            else they are Gaussian with entries of variance 1/d. A basis that is given is taken as it is.
        name: the name of the block z.

    Raises:
        GeometryError: the basis does not fit the blocks, or its columns depend on each other.
        NotADiffeomorphismError: more columns than coordinates.

    >>> import torch, geoad
    >>> chart = geoad.Chart({"w": (2, 3), "b": (2,)}, name="wb")
    >>> p = chart.point({"w": torch.ones(2, 3), "b": torch.zeros(2)})
    >>> psi = chart.reparametrize(geoad.maps.Subspace(3, offset=p), name="random subspace").target
    >>> psi, psi.point(torch.zeros(3)).to(chart).components
    (Chart('random subspace', dim=3, from 'wb'), {'w': tensor([[1., 1., 1.],
            [1., 1., 1.]]), 'b': tensor([0., 0.])})

    Source: Li, Farkhoor, Liu & Yosinski, Measuring the Intrinsic Dimension of Objective Landscapes (2018).
    """

    linear = True

    def __init__(
        self,
        basis: Any,
        offset: Any = None,
        *,
        generator: torch.Generator | None = None,
        orthonormal: bool = True,
        name: str = "z",
    ) -> None:
        super().__init__(joint=True)
        if isinstance(basis, bool) or (isinstance(basis, int) and basis < 1):
            raise GeometryError(f"Subspace needs at least one dimension, found {basis!r}. Pass k ≥ 1, or a matrix (d, k).")
        self.basis: Any = plain(basis)
        self.base = plain(offset)
        self.generator = generator
        self.orthonormal = orthonormal
        self.name = name

    def extra_repr(self) -> str:
        dim = self.basis if isinstance(self.basis, int) else self.columns
        return f"{dim}, name={self.name!r}"

    @property
    def columns(self) -> int:
        """k, the dimension of the subspace."""
        basis = self.basis
        if basis is None:
            return int(self.get_buffer("triangle").shape[-1])
        if isinstance(basis, Mapping):
            basis = next(iter(cast("Mapping[str, Any]", basis).values()), torch.empty(0, device="cpu"))
        return basis if isinstance(basis, int) else int(torch.as_tensor(basis).shape[-1])

    def part_shapes(self, shape: Any) -> dict[str, tuple[int, ...]]:
        return {self.name: (self.columns,)}

    def prepare_parts(self, layout: Layout) -> None:
        frame, triangle = torch.linalg.qr(self._matrix(layout))
        if isinstance(self.basis, int) and self.orthonormal:
            triangle = torch.eye(self.columns, dtype=frame.dtype, device=frame.device)
        spectrum = torch.linalg.svdvals(triangle)
        if not bool(spectrum[-1] > max(frame.shape) * torch.finfo(frame.dtype).eps * spectrum[0]):
            raise GeometryError(
                f"the {self.columns} columns of the basis of Subspace depend on each other (singular values from "
                f"{float(spectrum[0]):.3g} down to {float(spectrum[-1]):.3g}), so z would not be coordinates. Drop the "
                "superfluous columns; torch.linalg.qr finds them."
            )
        self.register_buffer("frame", frame)
        self.register_buffer("triangle", triangle)
        eye = torch.eye(self.columns, dtype=triangle.dtype, device=triangle.device)
        self.register_buffer("inverse", torch.linalg.solve_triangular(triangle, eye, upper=True))
        offset = None if self.base is None else anchored(self.base, layout, "Subspace", "its offset")
        zeros = torch.zeros(layout.dim, dtype=torch.float64, device=frame.device)
        self.register_buffer("offset", zeros if offset is None else layout.ravel(offset).clone())
        self.basis = self.base = None

    def _matrix(self, layout: Layout) -> Tensor:
        """B, (d, k), in the order of the layout."""
        if isinstance(self.basis, int):
            return draw(self.generator, layout.dim, self.basis) / layout.dim**0.5
        if isinstance(self.basis, Mapping):
            return _stacked(cast("Mapping[str, Any]", self.basis), layout, self.columns)
        basis = given_numbers(self.basis, "the basis of a subspace")
        if basis.ndim != 2 or basis.shape[0] != layout.dim:
            raise GeometryError(
                f"the basis of Subspace has shape {tuple(basis.shape)}, but the blocks {list(layout.names)} have {layout.dim} "
                f"coordinates. Pass a matrix ({layout.dim}, k), or a dict name -> (*shape, k)."
            )
        return basis

    # -- the map -------------------------------------------------------------------------------------------------------

    def _spanned(self, z: Tensor) -> Tensor:
        return self.constant("frame", z) @ (self.constant("triangle", z) @ z)

    def _coordinates(self, flat: Tensor) -> Tensor:
        """The least squares solution z of B z = flat."""
        return self.constant("inverse", flat) @ (self.constant("frame", flat).mT @ flat)

    def inverse_value(self, y: dict[str, Tensor]) -> Blocks:
        z = y[self.name]
        return self.bound_layout().unravel(self.constant("offset", z) + self._spanned(z))

    def value(self, x: Blocks) -> dict[str, Tensor]:
        flat = self.bound_layout().ravel(x)
        return {self.name: self._coordinates(flat - self.constant("offset", flat))}

    def bad_domain(self, x: Blocks) -> str | None:
        flat = self.bound_layout().ravel(x)
        offset = self.constant("offset", flat)
        apart = flat - offset
        distance = (apart - self._spanned(self._coordinates(apart))).norm()
        if bool(distance <= 100 * torch.finfo(flat.dtype).eps * (flat.norm() + offset.norm())):
            return None
        return f"θ must lie in the subspace of dimension {self.columns}, but its distance from it is {float(distance):.6g}"

    # -- products ------------------------------------------------------------------------------------------------------

    def push_block(self, x: Blocks, y: Any, v: Blocks) -> dict[str, Tensor]:
        return {self.name: self._coordinates(self.bound_layout().ravel(v))}

    def pull_block(self, x: Blocks, y: Any, w: dict[str, Tensor]) -> Blocks:
        z = w[self.name]
        return self.bound_layout().unravel(self.constant("frame", z) @ (self.constant("inverse", z).mT @ z))

    def push_inverse_block(self, x: Blocks, y: Any, v: dict[str, Tensor]) -> Blocks:
        return self.bound_layout().unravel(self._spanned(v[self.name]))

    def pull_inverse_block(self, x: Blocks, y: Any, w: Blocks) -> dict[str, Tensor]:
        flat = self.bound_layout().ravel(w)
        return {self.name: self.constant("triangle", flat).mT @ (self.constant("frame", flat).mT @ flat)}


def _stacked(basis: Mapping[str, Any], layout: Layout, columns: int) -> Tensor:
    """The rows of all blocks, (d, k)."""
    rows: list[Tensor] = []
    for name, shape in layout.items():
        block = given_numbers(basis[name], f"the basis of a subspace, '{name}',") if name in basis else None
        if block is None or block.shape != (*shape, columns):
            found = "nothing" if block is None else f"shape {tuple(block.shape)}"
            raise GeometryError(
                f"the basis of Subspace needs a tensor of shape {(*shape, columns)} for block '{name}', found {found}. A dict "
                f"gives all matched blocks, {list(layout.names)}, with the columns in the last axis."
            )
        rows.append(block.reshape(shape.numel(), columns))
    return torch.cat(rows)
