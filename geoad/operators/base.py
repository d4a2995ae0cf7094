"""Linear operators on dicts of blocks. They know nothing of charts or variance.

The abstract contract is a matrix-vector product; everything else (`to_dense`, `solve`, `logdet`, `trace`, `inverse`,
`add`, `scale`) is a free function that dispatches on the class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from geoad.params import Blocks, Layout, add, detach, first, insert_axes, map_blocks, scale

__all__ = ["Dense", "Detached", "Diagonal", "Implicit", "LinearOperator", "Multiple", "Product", "Sum", "Transpose"]


class LinearOperator(ABC):
    """A square linear map on the components of one layout.

    Attributes:
        layout: names and shapes of the blocks.
        symmetric: the matrix is known to be symmetric.
        definite: the matrix is known to be symmetric positive definite.
        materialised: it is made of stored numbers, and holds on to no function.
    """

    layout: Layout
    symmetric: bool = False
    definite: bool = False
    materialised: ClassVar[bool] = False
    structured: ClassVar[bool] = False
    """Of a class with closed forms of its own; the others are done without dispatch, which torch.compile does not trace."""
    made_of: ClassVar[tuple[str, ...]] = ()
    """The attributes that hold its numbers: tensors, blocks, other operators, containers of them."""
    said: ClassVar[tuple[str, ...]] = ()
    """The attributes that say the rest: flags and arrangements."""

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

    def held(self) -> dict[str, Any]:
        """What `made_of` names."""
        return {name: getattr(self, name) for name in self.made_of}

    @classmethod
    def remade(cls, layout: Layout, held: Mapping[str, Any], said: Mapping[str, Any]) -> Self:
        """The operator of this class with these numbers; see `held`."""
        make: Any = cls
        return make(layout, **held, **said)

    def __repr__(self) -> str:
        flags = "".join(f", {word}" for word in ("symmetric", "definite") if getattr(self, word))
        return f"{type(self).__name__}(dim={self.dim}{flags}, {str(self.like.dtype).removeprefix('torch.')})"


class Dense(LinearOperator):
    """A stored matrix of shape (*batch, d, d), in the raveled order of the layout."""

    made_of = ("matrix",)
    said = ("symmetric", "definite")
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

    made_of = ("factor",)
    said = ("definite",)
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

    made_of = ("entries",)
    said = ("definite",)
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

    made_of = ("factors", "operators")
    said = ("definite", "symmetric")

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

    @property
    def materialised(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """All terms are."""
        return all(term.materialised for _, term in self.terms)

    @property
    def factors(self) -> list[float | Tensor]:
        """The c_i."""
        return [factor for factor, _ in self.terms]

    @property
    def operators(self) -> list[LinearOperator]:
        """The A_i."""
        return [term for _, term in self.terms]

    @classmethod
    def remade(cls, layout: Layout, held: Mapping[str, Any], said: Mapping[str, Any]) -> Self:
        return cls(list(zip(held["factors"], held["operators"], strict=True)), **said)

    def _combine(self, products: list[Blocks]) -> Blocks:
        total = self._times(self.terms[0][0], products[0])
        for (factor, _), product in zip(self.terms[1:], products[1:], strict=True):
            total = add(self._times(factor, product), total)
        return total

    def _times(self, factor: float | Tensor, product: Blocks) -> Blocks:
        """The multiple, with a factor for each element of a batch if it has axes."""
        if not isinstance(factor, Tensor) or factor.ndim == 0:
            return scale(factor, product)
        return {name: insert_axes(factor, factor.ndim, len(shape)) * product[name] for name, shape in self.layout.items()}

    def mv(self, v: Blocks) -> Blocks:
        return self._combine([term.mv(v) for _, term in self.terms])

    def rmv(self, w: Blocks) -> Blocks:
        return self._combine([term.rmv(w) for _, term in self.terms])


class Product(LinearOperator):
    """A B."""

    made_of = ("left", "right")

    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        self.layout = left.layout
        self.left = left
        self.right = right

    @property
    def like(self) -> Tensor:
        return self.left.like

    @classmethod
    def remade(cls, layout: Layout, held: Mapping[str, Any], said: Mapping[str, Any]) -> Self:
        make: Any = cls
        return make(**held, **said)

    def mv(self, v: Blocks) -> Blocks:
        return self.left.mv(self.right.mv(v))

    def rmv(self, w: Blocks) -> Blocks:
        return self.right.rmv(self.left.rmv(w))


class Transpose(LinearOperator):
    """Aᵀ."""

    made_of = ("operator",)

    def __init__(self, operator: LinearOperator) -> None:
        self.layout = operator.layout
        self.operator = operator

    @property
    def like(self) -> Tensor:
        return self.operator.like

    @classmethod
    def remade(cls, layout: Layout, held: Mapping[str, Any], said: Mapping[str, Any]) -> Self:
        make: Any = cls
        return make(**held, **said)

    def mv(self, v: Blocks) -> Blocks:
        return self.operator.rmv(v)

    def rmv(self, w: Blocks) -> Blocks:
        return self.operator.mv(w)


class Detached(LinearOperator):
    """An operator whose products are cut from the autograd graph."""

    made_of = ("operator",)

    def __init__(self, operator: LinearOperator) -> None:
        self.layout = operator.layout
        self.operator = operator
        self.symmetric = operator.symmetric
        self.definite = operator.definite

    @property
    def like(self) -> Tensor:
        return self.operator.like.detach()

    @classmethod
    def remade(cls, layout: Layout, held: Mapping[str, Any], said: Mapping[str, Any]) -> Self:
        make: Any = cls
        return make(**held, **said)

    def mv(self, v: Blocks) -> Blocks:
        return detach(self.operator.mv(v))

    def rmv(self, w: Blocks) -> Blocks:
        return detach(self.operator.rmv(w))
