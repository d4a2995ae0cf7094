"""Linear operators on dicts of blocks. They know nothing of charts or variance.

The abstract contract is a matrix-vector product; everything else (`to_dense`, `solve`, `logdet`, `trace`, `inverse`,
`add`, `scale`) is a free function that dispatches on the class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from geoad.params import Blocks, Layout, axpy, detach, first, insert_axes, map_blocks, scale

__all__ = ["Dense", "Detached", "Diagonal", "Implicit", "LinearOperator", "Multiple", "Product", "Sum", "Transpose"]


class LinearOperator(ABC):
    """A square linear map on the components of one layout.

    Attributes:
        layout: names and shapes of the blocks.
        symmetric: the matrix is known to be symmetric.
        definite: the matrix is known to be symmetric positive definite.
    """

    layout: Layout
    symmetric: bool = False
    definite: bool = False
    materialised: ClassVar[bool] = False

    @abstractmethod
    def mv(self, v: Blocks) -> Blocks:
        """A v."""

    @abstractmethod
    def rmv(self, w: Blocks) -> Blocks:
        """Aᵀ w."""

    @property
    def dim(self) -> int:
        """d, where the matrix is d × d."""
        return self.layout.dim

    @property
    @abstractmethod
    def like(self) -> Tensor:
        """A tensor of the dtype and device of the operator."""

    def __repr__(self) -> str:
        flags = "".join(f", {word}" for word in ("symmetric", "definite") if getattr(self, word))
        return f"{type(self).__name__}(dim={self.dim}{flags}, {str(self.like.dtype).removeprefix('torch.')})"


class Dense(LinearOperator):
    """A stored matrix of shape (*batch, d, d), in the raveled order of the layout."""

    materialised = True

    def __init__(self, layout: Layout, matrix: Tensor, *, symmetric: bool = False, definite: bool = False) -> None:
        self.layout = layout
        self.matrix = matrix
        self.symmetric = symmetric or definite
        self.definite = definite
        self.factor: object = None  # a factorisation that `solve` keeps

    @property
    def like(self) -> Tensor:
        return self.matrix

    def mv(self, v: Blocks) -> Blocks:
        return self.layout.unravel(_matrix_vector(self.matrix, self.layout.ravel(v)))

    def rmv(self, w: Blocks) -> Blocks:
        return self.layout.unravel(_matrix_vector(self.matrix.mT, self.layout.ravel(w)))


def _matrix_vector(matrix: Tensor, flat: Tensor) -> Tensor:
    """A v for raveled v; batch axes broadcast."""
    if flat.ndim == 1:
        return matrix @ flat
    if matrix.ndim == 2:
        return flat @ matrix.mT
    return (matrix @ flat.unsqueeze(-1)).squeeze(-1)


class Multiple(LinearOperator):
    """c · I; one factor for each element of a batch."""

    symmetric = True
    materialised = True

    def __init__(self, layout: Layout, factor: Tensor, *, definite: bool = False) -> None:
        self.layout = layout
        self.factor = factor
        self.definite = definite

    @property
    def like(self) -> Tensor:
        return self.factor

    def mv(self, v: Blocks) -> Blocks:
        factor = self.factor.to(first(v).dtype)
        if factor.ndim == 0:
            return scale(factor, v)
        return {name: insert_axes(factor, factor.ndim, len(shape)) * v[name] for name, shape in self.layout.items()}

    def rmv(self, w: Blocks) -> Blocks:
        return self.mv(w)

    def entries(self) -> Blocks:
        """The diagonal, as blocks (views of the factor)."""
        factor, batch = self.factor, self.factor.shape
        return {
            name: insert_axes(factor, factor.ndim, len(shape)).expand((*batch, *shape)) for name, shape in self.layout.items()
        }


class Diagonal(LinearOperator):
    """diag(entries)."""

    symmetric = True
    materialised = True

    def __init__(self, layout: Layout, entries: Blocks, *, definite: bool = False) -> None:
        self.layout = layout
        self.entries = entries
        self.definite = definite

    @property
    def like(self) -> Tensor:
        return first(self.entries)

    def mv(self, v: Blocks) -> Blocks:
        return map_blocks(torch.mul, self.entries, v)

    def rmv(self, w: Blocks) -> Blocks:
        return self.mv(w)


class Implicit(LinearOperator):
    """An operator that is known by its products only. Subclasses give `mv` (and `rmv` if not symmetric).

    ``x`` is the point it was made at: it tells dtype and device.
    """

    def __init__(self, layout: Layout, x: Blocks, *, symmetric: bool = True, definite: bool = False) -> None:
        self.layout = layout
        self.x = x
        self.symmetric = symmetric or definite
        self.definite = definite

    @property
    def like(self) -> Tensor:
        return first(self.x)

    def rmv(self, w: Blocks) -> Blocks:
        if self.symmetric:
            return self.mv(w)
        # the transpose of a linear map is its vjp
        return torch.func.vjp(self.mv, w)[1](w)[0]


class Sum(LinearOperator):
    """Σ c_i A_i."""

    def __init__(
        self, terms: list[tuple[float | Tensor, LinearOperator]], *, definite: bool = False, symmetric: bool = False
    ) -> None:
        self.layout = terms[0][1].layout
        self.terms = terms
        self.symmetric = symmetric or all(term.symmetric for _, term in terms)
        self.definite = definite

    @property
    def like(self) -> Tensor:
        return self.terms[0][1].like

    def _combine(self, products: list[Blocks]) -> Blocks:
        total = scale(self.terms[0][0], products[0])
        for (factor, _), product in zip(self.terms[1:], products[1:], strict=True):
            total = axpy(factor, product, total)
        return total

    def mv(self, v: Blocks) -> Blocks:
        return self._combine([term.mv(v) for _, term in self.terms])

    def rmv(self, w: Blocks) -> Blocks:
        return self._combine([term.rmv(w) for _, term in self.terms])


class Product(LinearOperator):
    """A B."""

    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        self.layout = left.layout
        self.left = left
        self.right = right

    @property
    def like(self) -> Tensor:
        return self.left.like

    def mv(self, v: Blocks) -> Blocks:
        return self.left.mv(self.right.mv(v))

    def rmv(self, w: Blocks) -> Blocks:
        return self.right.rmv(self.left.rmv(w))


class Transpose(LinearOperator):
    """Aᵀ."""

    def __init__(self, operator: LinearOperator) -> None:
        self.layout = operator.layout
        self.operator = operator

    @property
    def like(self) -> Tensor:
        return self.operator.like

    def mv(self, v: Blocks) -> Blocks:
        return self.operator.rmv(v)

    def rmv(self, w: Blocks) -> Blocks:
        return self.operator.mv(w)


class Detached(LinearOperator):
    """An operator whose products are cut from the autograd graph."""

    def __init__(self, operator: LinearOperator) -> None:
        self.layout = operator.layout
        self.operator = operator
        self.symmetric = operator.symmetric
        self.definite = operator.definite

    @property
    def like(self) -> Tensor:
        return self.operator.like.detach()

    def mv(self, v: Blocks) -> Blocks:
        return detach(self.operator.mv(v))

    def rmv(self, w: Blocks) -> Blocks:
        return detach(self.operator.rmv(w))
