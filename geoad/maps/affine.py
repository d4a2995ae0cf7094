"""Affine changes of coordinates: one dense matrix for all blocks, or a left and a right factor for each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self, cast

import torch
from torch import Tensor, nn

from geoad.errors import GeometryError
from geoad.maps.base import Diffeomorphism
from geoad.maps.numbers import Numbers, draw, given_numbers
from geoad.params import Blocks, Layout

__all__ = ["Affine", "LayerAffine"]

Factors = Tensor | Mapping[str, Tensor]


class _Square(Numbers):
    """An invertible matrix A, factorised once (anew at each use if it is learnable)."""

    matrix: Tensor
    lu: Tensor
    pivots: Tensor

    def __init__(self, matrix: Tensor, learnable: bool) -> None:
        super().__init__()
        self.learns = learnable
        if learnable:
            self.matrix = nn.Parameter(matrix)
        else:
            self.register_buffer("matrix", matrix)
            lu, pivots = torch.linalg.lu_factor(matrix)
            self.register_buffer("lu", lu)
            self.register_buffer("pivots", pivots)

    def times(self, x: Tensor, transpose: bool = False) -> Tensor:
        """A x or Aᵀ x, for x of shape (*, n, k)."""
        matrix = self.constant("matrix", x)
        return (matrix.mT if transpose else matrix) @ x

    def solve(self, x: Tensor, transpose: bool = False) -> Tensor:
        """A⁻¹ x or A⁻ᵀ x, for x of shape (*, n, k)."""
        if self.learns:
            matrix = self.constant("matrix", x)
            return torch.linalg.solve(matrix.mT if transpose else matrix, x)
        pivots = self.pivots.to(x.device)
        return torch.linalg.lu_solve(self.constant("lu", x), pivots, x, adjoint=transpose)

    def log_abs_det(self, like: Tensor) -> Tensor:
        """log |det A|."""
        if self.learns:
            return torch.linalg.slogdet(self.constant("matrix", like)).logabsdet
        return self.constant("lu", like).diagonal().abs().log().sum()


def _well_conditioned(generator: torch.Generator | None, size: int) -> Tensor:
    """I + G/(4 √n): singular values between about 1/2 and 3/2 at any size, no structure."""
    if size == 1:
        return (draw(generator, 1, 1) / 4).exp()
    return torch.eye(size, dtype=torch.float64, device="cpu") + draw(generator, size, size) / (4 * math.sqrt(size))


def _require_regular(matrix: Tensor, given: Tensor, what: str) -> None:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise GeometryError(
            f"{what} has shape {tuple(matrix.shape)}. A change of coordinates needs as many new numbers as old ones; "
            "pass a square matrix, or use an Immersion or a Submersion to change the number of coordinates."
        )
    dtype = given.dtype if given.is_floating_point() else torch.float64
    inverse, info = torch.linalg.inv_ex(matrix)
    norms = torch.linalg.matrix_norm(matrix, 1) * torch.linalg.matrix_norm(inverse, 1)
    reciprocal = 0.0 if int(info) or not bool(norms.isfinite()) else 1 / float(norms)
    if reciprocal < len(matrix) * torch.finfo(dtype).eps:
        raise GeometryError(
            f"{what} is singular: its reciprocal condition number is {reciprocal:.2g} in {dtype}. Different points "
            "would get the same coordinates; pass a regular matrix, or use an Immersion to forget coordinates."
        )


class Affine(Diffeomorphism):
    """ψ = A θ + c on all matched blocks together, raveled and concatenated in the order of the chart.

    With no argument A = I + G/(4 √d) with a Gaussian matrix G and a Gaussian c/10 are drawn: well-conditioned at any
    size. Once something is given, a matrix that is not given is the identity and a shift that is not given is 0.

    The matrix takes 8 d² bytes twice (200 MB each for d = 5000) and a factorisation of d³: over ``limit`` coordinates
    the map is refused, never replaced. ``per_layer=True`` (or left=, right=) asks for `LayerAffine`, whose cost is that
    of a few layers.

    Args:
        matrix: A, shape (d, d); refused if singular.
        shift: c, a number or d numbers.
        left, right, per_layer: bind a `LayerAffine` with these factors instead.
        learnable: make A and c parameters of the bound map.
        limit: the largest d.

    >>> import torch, geoad
    >>> chart = geoad.Chart({"x": (2,)}, name="x")
    >>> affine = geoad.maps.Affine(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), shift=1.0)
    >>> chart.point(torch.tensor([1.0, 2.0])).to(chart.reparametrize(affine).target).components
    tensor([5., 3.])
    """

    linear = True
    shift: Tensor

    def __init__(
        self,
        matrix: Tensor | None = None,
        shift: Tensor | float | None = None,
        *,
        left: Factors | None = None,
        right: Factors | None = None,
        per_layer: bool = False,
        generator: torch.Generator | None = None,
        learnable: bool = False,
        limit: int = 6000,
    ) -> None:
        super().__init__()
        self._layers: LayerAffine | None = None
        if per_layer or left is not None or right is not None:
            if matrix is not None or shift is not None:
                raise GeometryError(
                    "Affine was given a matrix or shift for all blocks together and factors for each layer as well. "
                    "Only one of both can be meant; compose two maps: maps.Compose(Affine(A, c), LayerAffine(Q, P))."
                )
            self._layers = LayerAffine(left, right, generator=generator, learnable=learnable)
        self._draws = matrix is None and shift is None
        self._matrix = None if matrix is None else given_numbers(matrix, "matrix= of Affine")
        self._shift = None if shift is None else given_numbers(shift, "shift= of Affine")
        if self._matrix is not None:
            _require_regular(self._matrix, torch.as_tensor(matrix), "matrix= of Affine")
        self._learns = learnable
        self.generator = generator
        self.limit = limit

    def bind(self, layout: Layout) -> Self:
        """A bound `Affine`, or the bound `LayerAffine` that was asked for."""
        if self._layers is not None:
            return cast(Self, self._layers.bind(layout))
        return super().bind(layout)

    def prepare(self, layout: Layout) -> None:
        d = layout.dim
        if d > self.limit:
            raise GeometryError(
                f"Affine was asked for a dense matrix on {d} coordinates ({len(layout)} blocks), over its limit of "
                f"{self.limit}. It would take {16 * d * d / 2**30:.1f} GiB and a factorisation of d³; use the form for "
                "each layer, maps.Affine(per_layer=True), or raise limit=."
            )
        if self._matrix is not None and len(self._matrix) != d:
            raise GeometryError(
                f"Affine has a matrix of shape {tuple(self._matrix.shape)}, the matched blocks {list(layout.names)} "
                f"have {d} coordinates together. Pass a ({d}, {d}) matrix, or select the blocks by a pattern."
            )
        if self._shift is not None and self._shift.shape not in ((), (1,), (d,)):
            raise GeometryError(
                f"Affine has a shift of shape {tuple(self._shift.shape)}, the matched blocks {list(layout.names)} have "
                f"{d} coordinates together. Pass one number or {d} of them."
            )
        matrix, shift = self._matrix, self._shift
        if matrix is None:
            matrix = _well_conditioned(self.generator, d) if self._draws else torch.eye(d, dtype=torch.float64, device="cpu")
        if shift is None:
            shift = draw(self.generator, d) / 10 if self._draws else matrix.new_zeros(d)
        self._matrix = self._shift = None
        self.square = _Square(matrix, self._learns)
        shift = shift.expand(d).clone()
        if self._learns:
            self.shift = nn.Parameter(shift)
        else:
            self.register_buffer("shift", shift)

    def _apply_to(self, blocks: Blocks, inverse: bool, transpose: bool) -> Blocks:
        layout = self.bound_layout()
        column = layout.ravel(blocks).unsqueeze(-1)
        image = self.square.solve(column, transpose) if inverse else self.square.times(column, transpose)
        return layout.unravel(image.squeeze(-1))

    def forward(self, x: Blocks) -> Blocks:
        layout = self.bound_layout()
        vector = layout.ravel(x)
        return layout.unravel(self.square.times(vector.unsqueeze(-1)).squeeze(-1) + self.constant("shift", vector))

    def invert(self, y: Blocks) -> Blocks:
        layout = self.bound_layout()
        vector = layout.ravel(y)
        return layout.unravel(self.square.solve((vector - self.constant("shift", vector)).unsqueeze(-1)).squeeze(-1))

    def push(self, x: Blocks, y: Blocks, v: Blocks) -> Blocks:
        return self._apply_to(v, False, False)

    def pull(self, x: Blocks, y: Blocks, w: Blocks) -> Blocks:
        return self._apply_to(w, False, True)

    def push_inverse(self, x: Blocks, y: Blocks, v: Blocks) -> Blocks:
        return self._apply_to(v, True, False)

    def pull_inverse(self, x: Blocks, y: Blocks, w: Blocks) -> Blocks:
        return self._apply_to(w, True, True)

    def log_abs_det(self, x: Blocks, y: Blocks) -> Tensor:
        return self.square.log_abs_det(next(iter(x.values())))


class LayerAffine(Diffeomorphism):
    r"""W ↦ Q W P and b ↦ Q b for each layer, the maps under which Kronecker factors stay Kronecker factors.

    A layer is a block ``<layer>.weight`` with its ``<layer>.bias`` (or bare ``weight`` and ``bias``). Q acts on the
    first axis of the weight, P on all other axes taken together (convolutions too). A block with one axis that is no
    layer's bias is mapped by a Q of its own, and so is a scalar.

    Args:
        left: Q, one matrix for all layers or a mapping from layer names to matrices.
        right: P, likewise. With neither given both are drawn for each layer, I + G/(4 √n). Otherwise what is not given
            is the identity.
        learnable: make the factors parameters of the bound map.
        limit: the largest n for which a factor (n, n) is made.
    """

    linear = True
    blockwise = True

    def __init__(
        self,
        left: Factors | None = None,
        right: Factors | None = None,
        *,
        generator: torch.Generator | None = None,
        learnable: bool = False,
        limit: int = 6000,
    ) -> None:
        super().__init__()
        self.generator = generator
        self.limit = limit
        self._learns = learnable
        self._draws = left is None and right is None
        self._left = _given_factors(left, "left= of LayerAffine")
        self._right = _given_factors(right, "right= of LayerAffine")
        self.squares = nn.ModuleDict()

    def prepare(self, layout: Layout) -> None:
        # name of a block -> keys of its factors in self.squares ("" for the identity), and the shape as a matrix
        self._keys: dict[str, tuple[str, str]] = {}
        self._matrix: dict[str, tuple[int, int]] = {}
        owners = {name: _owner(name, layout) for name in layout.names}
        layers = {name: name.rpartition(".")[0] for name in layout.names}
        for given, side in ((self._left, "left"), (self._right, "right")):
            unknown = sorted(set(given) - set(layers.values()) - {"*"})
            if unknown:
                raise GeometryError(
                    f"LayerAffine got {side} factors for the layers {unknown}, but the matched blocks "
                    f"{list(layout.names)} belong to the layers {sorted(set(layers.values()))}. Mend the names."
                )
        # weights come first, so that their factors are there when the biases ask for them
        for name in sorted(layout.names, key=lambda each: owners[each] != each):
            shape = layout[name]
            rows = shape[0] if shape else 1
            self._matrix[name] = (rows, shape[1:].numel())
            if owners[name] != name:
                self._keys[name] = (self._keys[owners[name]][0], "")
                continue
            left = self._make(self._left, layers[name], name, rows, "left")
            right = self._make(self._right, layers[name], name, shape[1:].numel(), "right") if len(shape) > 1 else ""
            self._keys[name] = (left, right)
        self._left = self._right = {}

    def _make(self, given: dict[str, Tensor], layer: str, name: str, size: int, side: str) -> str:
        matrix = given.get(layer, given.get("*"))
        if matrix is None and not self._draws:
            return ""
        if matrix is not None and len(matrix) != size:
            raise GeometryError(
                f"LayerAffine has a {side} factor of shape {tuple(matrix.shape)} for block '{name}', which needs one "
                f"of shape ({size}, {size}). Pass a mapping from layer names to factors that fit, or select the blocks "
                "by a pattern."
            )
        if matrix is None:
            if size > self.limit:
                raise GeometryError(
                    f"LayerAffine was asked for a {side} factor with {size} rows for block '{name}', over its limit of "
                    f"{self.limit}. It would take {16 * size * size / 2**30:.1f} GiB; use maps.Householder, which "
                    "costs a few passes over the block, or raise limit=."
                )
            matrix = _well_conditioned(self.generator, size)
        key = f"{side} {name}".replace(".", "/")
        self.squares[key] = _Square(matrix, self._learns)
        return key

    def factors(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """Q and P of the block `name`, None for the identity."""
        found = [self._square(key) for key in self._keys[name]]
        left, right = (None if square is None else square.matrix for square in found)
        return left, right

    def _square(self, key: str) -> _Square | None:
        return cast(_Square, self.squares[key]) if key else None

    def _apply_to(self, blocks: Blocks, inverse: bool, transpose: bool) -> Blocks:
        return {name: self._apply_block(name, block, inverse, transpose) for name, block in blocks.items()}

    def _apply_block(self, name: str, block: Tensor, inverse: bool, transpose: bool) -> Tensor:
        left, right = (self._square(key) for key in self._keys[name])
        batch = block.shape[: block.ndim - len(self.bound_layout()[name])]
        matrix = block.reshape(*batch, *self._matrix[name])
        if left is not None:
            matrix = left.solve(matrix, transpose) if inverse else left.times(matrix, transpose)
        if right is not None:  # W P = (Pᵀ Wᵀ)ᵀ
            flipped = right.solve(matrix.mT, not transpose) if inverse else right.times(matrix.mT, not transpose)
            matrix = flipped.mT
        return matrix.reshape(block.shape)

    def forward(self, x: Blocks) -> Blocks:
        return self._apply_to(x, False, False)

    def invert(self, y: Blocks) -> Blocks:
        return self._apply_to(y, True, False)

    def push(self, x: Blocks, y: Blocks, v: Blocks) -> Blocks:
        return self._apply_to(v, False, False)

    def pull(self, x: Blocks, y: Blocks, w: Blocks) -> Blocks:
        return self._apply_to(w, False, True)

    def push_inverse(self, x: Blocks, y: Blocks, v: Blocks) -> Blocks:
        return self._apply_to(v, True, False)

    def pull_inverse(self, x: Blocks, y: Blocks, w: Blocks) -> Blocks:
        return self._apply_to(w, True, True)

    def log_abs_det(self, x: Blocks, y: Blocks) -> Tensor:
        like = next(iter(x.values()))
        logs = like.new_zeros(())
        for name, (left, right) in self._keys.items():
            rows, columns = self._matrix[name]
            for square, times in ((self._square(left), columns), (self._square(right), rows)):
                if square is not None:
                    logs = logs + times * square.log_abs_det(like)
        return logs


def _given_factors(given: Factors | None, what: str) -> dict[str, Tensor]:
    """Factors by layer; "*" stands for every layer."""
    if given is None:
        return {}
    mapping = dict(given) if isinstance(given, Mapping) else {"*": given}
    factors = {layer: given_numbers(matrix, what) for layer, matrix in mapping.items()}
    for layer, matrix in factors.items():
        _require_regular(matrix, torch.as_tensor(mapping[layer]), f"{what}, layer '{layer}',")
    return factors


def _owner(name: str, layout: Layout) -> str:
    """The weight that the bias `name` belongs to, else `name`."""
    layer, dot, last = name.rpartition(".")
    weight = f"{layer}{dot}weight"
    if last == "bias" and weight in layout and layout[weight][:1] == layout[name]:
        return weight
    return name
