"""Orthogonal mixing of a block: by a few reflections, or by an orthogonal matrix."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from geoad.errors import GeometryError
from geoad.maps.base import BlockMap
from geoad.maps.numbers import draw, given_numbers

__all__ = ["Householder", "Orthogonal"]

Side = Literal["left", "right", "all"]


class _Mixing(BlockMap):
    """ψ = Q θ with an orthogonal Q along an axis of the block; `mix` applies Q or Qᵀ to vectors on axis -2."""

    linear = True

    def __init__(self, side: Side, generator: torch.Generator | None) -> None:
        super().__init__()
        if side not in ("left", "right", "all"):
            raise GeometryError(
                f"{type(self).__name__} was asked to act from side {side!r}; the sides are 'left' (W -> Q W, mixes "
                "outputs), 'right' (W -> W Qᵀ, mixes inputs) and 'all' (the raveled block). Q must fit that axis; pass "
                "side= one of them."
            )
        self.side = side
        self.generator = generator

    def prepare_block(self, shape: torch.Size) -> None:
        if len(shape) <= 1 or self.side == "all":
            self._matrix = (shape.numel(), 1)
        else:
            self._matrix = (shape[0], shape[1:].numel())
        self._rows = self.side == "right" and len(shape) > 1
        self.prepare_mixing(self._matrix[1] if self._rows else self._matrix[0])

    def prepare_mixing(self, size: int) -> None:
        """Hook of `bind`: Q acts on vectors of length `size`."""
        raise NotImplementedError

    def mix(self, vectors: Tensor, transpose: bool) -> Tensor:
        """Q or Qᵀ times vectors of shape (*, size, many)."""
        raise NotImplementedError

    def _mixed(self, block: Tensor, transpose: bool) -> Tensor:
        matrix = block.reshape(*block.shape[: block.ndim - len(self.shape)], *self._matrix)
        mixed = self.mix(matrix.mT, transpose).mT if self._rows else self.mix(matrix, transpose)
        return mixed.reshape(block.shape)

    def value(self, x: Tensor) -> Tensor:
        return self._mixed(x, False)

    def inverse_value(self, y: Tensor) -> Tensor:
        return self._mixed(y, True)

    def push_block(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return self._mixed(v, False)

    def pull_block(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return self._mixed(w, True)

    def push_inverse_block(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return self._mixed(v, True)

    def pull_inverse_block(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return self._mixed(w, False)

    def log_abs_det_block(self, x: Tensor, y: Tensor) -> Tensor:
        return x.new_zeros(())


class Householder(_Mixing):
    r"""ψ = Q θ with :math:`Q = H_1 H_2 \cdots H_k`, reflections :math:`H_i = I - 2 v_i v_i^\top / |v_i|^2`.

    Costs O(k) passes over the block: Q is kept in the compact form :math:`I - V T V^\top` with unit columns V and the
    upper triangular :math:`T^{-1} = \operatorname{striu}(V^\top V) + I/2`.

    Args:
        reflections: k.
        side: ``"left"``: W ↦ Q W along the first axis (mixes outputs). ``"right"``: W ↦ W Qᵀ, every row is multiplied
            by Q, all axes behind the first taken together (mixes inputs). ``"all"``: Q acts on the raveled block.
            Blocks with one axis or none are one vector in any case.
        vectors: the reflection vectors as rows of a (k, n) tensor, of any length but 0; drawn if None.
        learnable: make the vectors an ``nn.Parameter`` of the bound map.

    >>> import torch, geoad
    >>> chart = geoad.Chart({"x": (2,)}, name="x")
    >>> mirror = geoad.maps.Householder(vectors=torch.tensor([[1.0, -1.0]]))
    >>> chart.point(torch.tensor([1.0, 2.0])).to(chart.reparametrize(mirror).target).components
    tensor([2., 1.])
    """

    vectors: Tensor
    columns: Tensor
    middle: Tensor

    def __init__(
        self,
        reflections: int = 4,
        side: Side = "left",
        *,
        vectors: Tensor | None = None,
        generator: torch.Generator | None = None,
        learnable: bool = False,
    ) -> None:
        super().__init__(side, generator)
        self._given = None if vectors is None else torch.atleast_2d(given_numbers(vectors, "vectors= of Householder"))
        if self._given is not None and (self._given.ndim != 2 or bool((self._given == 0).all(-1).any())):
            raise GeometryError(
                f"Householder got reflection vectors of shape {tuple(self._given.shape)}, "
                f"{int((self._given == 0).all(-1).sum())} of them zero. A zero vector has no mirror; pass a (k, n) "
                "tensor of rows that are not zero."
            )
        self.reflections = int(reflections) if self._given is None else self._given.shape[0]
        if self.reflections < 1:
            raise GeometryError(
                f"Householder needs at least one reflection, got {reflections}. None is the identity: use maps.Identity()."
            )
        self._learns = learnable

    def extra_repr(self) -> str:
        return f"reflections={self.reflections}, side='{self.side}'"

    def prepare_mixing(self, size: int) -> None:
        vectors = draw(self.generator, self.reflections, size) if self._given is None else self._given
        if vectors.shape[-1] != size:
            raise GeometryError(
                f"Householder has reflection vectors of length {vectors.shape[-1]}, but block '{self.name}' of shape "
                f"{tuple(self.shape)} has vectors of length {size} on side '{self.side}'. Pass vectors of that length, "
                "or select the blocks by a pattern."
            )
        self._given = None
        if self._learns:
            self.vectors = nn.Parameter(vectors)
        else:
            columns, middle = _compact(vectors)
            self.register_buffer("columns", columns)
            self.register_buffer("middle", middle)

    def mix(self, vectors: Tensor, transpose: bool) -> Tensor:
        if self._learns:
            columns, middle = _compact(self.constant("vectors", vectors))
        else:
            columns, middle = self.constant("columns", vectors), self.constant("middle", vectors)
        return vectors - columns @ ((middle.mT if transpose else middle) @ (columns.mT @ vectors))


def _compact(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """V (n, k) and T (k, k) of the product of reflections I - V T Vᵀ."""
    columns = (vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)).mT
    one = torch.eye(columns.shape[-1], dtype=vectors.dtype, device=vectors.device)
    inverse = (columns.mT @ columns).triu(1) + 0.5 * one
    return columns, torch.linalg.solve_triangular(inverse, one, upper=True)


class Orthogonal(_Mixing):
    """ψ = Q θ with an orthogonal matrix Q along an axis of each block.

    Args:
        matrix: Q, orthogonal to the precision it is given in; a rotation or reflection drawn uniformly (Haar) if None.
        side: as in `Householder`.
        limit: the largest n for which a matrix (n, n) is made.

    >>> import torch, geoad
    >>> chart = geoad.Chart({"x": (2,)}, name="x")
    >>> quarter = geoad.maps.Orthogonal(torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
    >>> chart.point(torch.tensor([1.0, 2.0])).to(chart.reparametrize(quarter).target).components
    tensor([-2.,  1.])
    """

    matrix: Tensor

    def __init__(
        self,
        matrix: Tensor | None = None,
        side: Side = "left",
        *,
        generator: torch.Generator | None = None,
        limit: int = 4096,
    ) -> None:
        super().__init__(side, generator)
        self.limit = limit
        self._given: Tensor | None = None
        if matrix is not None:
            self._given = given_numbers(matrix, "matrix= of Orthogonal")
            _require_orthogonal(self._given, matrix)

    def extra_repr(self) -> str:
        return f"side='{self.side}'"

    def prepare_mixing(self, size: int) -> None:
        if self._given is not None and self._given.shape[0] != size:
            raise GeometryError(
                f"Orthogonal has a matrix of shape {tuple(self._given.shape)}, but block '{self.name}' of shape "
                f"{tuple(self.shape)} has vectors of length {size} on side '{self.side}'. Pass a matrix of that size, "
                "or select the blocks by a pattern."
            )
        if self._given is None and size > self.limit:
            raise GeometryError(
                f"Orthogonal was asked for a matrix with {size} rows (block '{self.name}', side '{self.side}'), over "
                f"the limit of {self.limit}. It would take {8 * size * size / 2**30:.1f} GiB; use maps.Householder, "
                "which costs a few passes over the block, or raise limit=."
            )
        matrix = self._given
        if matrix is None:
            q, r = torch.linalg.qr(draw(self.generator, size, size))
            matrix = q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
        self._given = None
        self.register_buffer("matrix", matrix)

    def mix(self, vectors: Tensor, transpose: bool) -> Tensor:
        matrix = self.constant("matrix", vectors)
        return (matrix.mT if transpose else matrix) @ vectors


def _require_orthogonal(matrix: Tensor, given: Any) -> None:
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    off = float((matrix.mT @ matrix - eye).abs().max()) if square else float("nan")
    dtype = given.dtype if isinstance(given, Tensor) and given.is_floating_point() else torch.float64
    if not square or off > 100 * torch.finfo(dtype).eps * max(1, len(matrix)) ** 0.5:
        raise GeometryError(
            f"Orthogonal needs a square matrix with QᵀQ = I, got shape {tuple(matrix.shape)} with |QᵀQ - I| = "
            f"{off:.2g}. Its inverse would not be its transpose; orthogonalise it with torch.linalg.qr(matrix).Q, or "
            "use maps.Affine."
        )
