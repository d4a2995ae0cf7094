"""The named types with two indices: Form, Metric, Cometric, Endomorphism."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geoad import operators as ops
from geoad.charts import Chart, makers
from geoad.errors import GeometryError, SingularMetricError, VarianceError
from geoad.operators import CG, LinearOperator
from geoad.params import is_wrapped, register_pytree
from geoad.tensors.base import TypedTensor, describe, require_same_place
from geoad.tensors.densities import Density, LogDensity
from geoad.tensors.pairing import evaluate
from geoad.tensors.rank1 import Covector, Rank1, Vector, require_at
from geoad.tensors.rank2 import CLASSES, Rank2

__all__ = ["Cometric", "Endomorphism", "Form", "Metric", "reference_metric"]


class _Bilinear(Rank2):
    """Two indices of the same variance."""

    __slots__ = ()

    def __call__(self, u: Rank1, v: Rank1) -> Tensor:
        """B(u, v) = uᵀ B v, an invariant scalar."""
        return evaluate(self, u, v)

    def slogdet(self) -> tuple[Tensor, LogDensity]:
        """The sign and the logarithm of |det B|, a `LogDensity` of weight 2 (of weight -2 for upper indices)."""
        sign, logabsdet = ops.slogdet(self.op)
        here = self.at.to(self.home)
        return sign, LogDensity(self.home, logabsdet, self._det_weight(), here).to(self.chart)

    def logdet(self) -> LogDensity:
        """log det B, a `LogDensity`: only differences like B.logdet() - G.logdet() are numbers. -inf if B is singular."""
        sign, result = self.slogdet()
        if not is_wrapped({"": sign}) and bool((sign < 0).any()):
            raise SingularMetricError(
                f"the determinant of this {describe(self)} is negative, so its logarithm is not real. At a saddle point use "
                ".slogdet(), which gives the sign and log |det|; for a posterior check that the point is a minimum."
            )
        return result

    def det(self) -> Density:
        """det B, a `Density` of weight 2 (of weight -2 for upper indices): it moves by |det J⁻¹|^weight."""
        sign, logabsdet = ops.slogdet(self.op)
        here = self.at.to(self.home)
        return Density(self.home, sign * logabsdet.exp(), self._det_weight(), here).to(self.chart)

    def _det_weight(self) -> float:
        return -2 if self.ups[0] else 2

    def _no_metric(self, what: str) -> VarianceError:
        kind = "(2,0)" if self.ups[0] else "(0,2)"
        return VarianceError(
            f"{what} of a {describe(self)}, a {kind} tensor: with respect to which metric? The number depends on the chart unless "
            f"a metric turns it into an endomorphism first. Say G.trace(B), geoad.eigh(B, metric=G), or "
            "(G.inverse() @ B).trace() / .eigenvalues() / .det()."
        )

    def trace(self, *_: Any) -> Any:
        """Refused: needs a metric."""
        raise self._no_metric("the trace")

    def eigenvalues(self, k: int | None = None, which: str = "largest") -> Any:
        """Refused: needs a metric."""
        raise self._no_metric("the eigenvalues")


class Form(_Bilinear):
    """A bilinear form B_ij: a Hessian, a Gauss-Newton matrix, the second moment of gradients. Type (0,2)."""

    __slots__ = ()
    kind = (False, False)

    def solve(self, w: Covector, damping: float | Tensor = 0.0, *, method: CG | None = None) -> Vector:
        """v with (B + λ R) v = ω, where R is the *reference* metric (it moves along, so λ means the same in every chart).

        Raises:
            SingularMetricError: no unique solution; for a `Metric` also if it is not positive definite.
        """
        if getattr(w, "type", None) != (0, 1):
            raise VarianceError(
                f"cannot solve with {describe(self)} for {describe(w)}: B v = ω has a covector on the right. Pass the "
                "differential geoad.grad(L)(p); for a vector use B.mv(v)."
            )
        require_same_place(self, w, "solve")
        form = self.damped(damping)
        positive = isinstance(self, Metric)
        right = w.to(form.home)
        extra = len(right.batch_shape) - len(form.batch_shape)
        solution = _solve_batch(form.op, right, extra, positive, method)
        return Vector(form.home, solution, right.at).to(self.chart)

    def damped(self, damping: float | Tensor) -> Any:
        """B + λ · reference metric."""
        if isinstance(damping, (int, float)) and damping == 0:
            return self
        if isinstance(damping, (int, float)) and damping < 0:
            raise GeometryError(f"damping must be at least 0, got {damping}. Subtract a metric explicitly: B - lam * G.")
        return self + damping * reference_metric(self)

    def inverse(self, damping: float | Tensor = 0.0) -> Any:
        """The (2,0) tensor B⁻¹ (with damping: (B + λ R)⁻¹)."""
        form = self.damped(damping)
        return form._like(ops.inverse(form.op, positive=isinstance(self, Metric)), cls=Cometric)


def _solve_batch(op: LinearOperator, right: Rank1, extra: int, positive: bool, method: CG | None) -> Any:
    if extra <= 0 or isinstance(op, (ops.Diagonal, ops.Multiple)):
        return ops.solve(op, right.blocks, positive=positive, method=method)
    layout, flat = right.chart.layout, right.ravel()
    rows = flat.reshape(-1, layout.dim)
    if not isinstance(op, ops.Dense) and op.dim <= ops.DENSE_LIMIT:
        op = ops.densify(op)
    solved = [layout.ravel(ops.solve(op, layout.unravel(row), positive=positive, method=method)) for row in rows]
    return layout.unravel(torch.stack(solved).reshape(flat.shape))


class Metric(Form):
    """A Riemannian metric at a point: a symmetric, positive (semi)definite `Form`. Type (0,2).

    Fisher and Gauss-Newton metrics are often only semidefinite; `sharp` and `solve` then raise `SingularMetricError`.
    """

    __slots__ = ()

    def flat(self, v: Vector) -> Covector:
        """The covector G(v, ·)."""
        return self.mv(v)

    def sharp(self, w: Covector, damping: float | Tensor = 0.0) -> Vector:
        """The vector G⁻¹ω: the gradient that belongs to the differential ω."""
        return self.solve(w, damping)

    def norm(self, v: Rank1) -> Tensor:
        """√G(v, v); for a covector √G⁻¹(ω, ω)."""
        if isinstance(v, Covector):
            return v(self.sharp(v)).clamp_min(0).sqrt()
        return self(v, v).clamp_min(0).sqrt()

    def trace(self, form: Any = None, *_: Any) -> Tensor:
        """tr G⁻¹B of a form B: the trace with respect to this metric, an invariant scalar."""
        if not isinstance(form, Form):
            raise self._no_metric("the trace")
        return (self.inverse() @ form).trace()


class Cometric(_Bilinear):
    """A (2,0) tensor C^ij: an inverse metric, a posterior covariance. Moves by J C Jᵀ."""

    __slots__ = ()
    kind = (True, True)

    def inverse(self) -> Any:
        """The (0,2) tensor C⁻¹."""
        return self._like(ops.inverse(self.op), cls=Metric if self.op.definite else Form)

    def norm(self, w: Covector) -> Tensor:
        """√C(ω, ω)."""
        return self(w, w).clamp_min(0).sqrt()


class Endomorphism(Rank2):
    """A linear map E^i_j of the tangent space, e.g. E = G⁻¹H. Type (1,1); trace, det and eigenvalues are invariant."""

    __slots__ = ()
    kind = (True, False)

    def __call__(self, v: Vector) -> Vector:
        """E v."""
        return self.mv(v)

    def trace(self) -> Tensor:
        """tr E, a scalar."""
        return ops.trace(self.op)

    def det(self) -> Tensor:
        """det E, a scalar."""
        sign, logabsdet = ops.slogdet(self.op)
        return sign * logabsdet.exp()

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """(sign, log |det E|), scalars."""
        return ops.slogdet(self.op)

    def logdet(self) -> Tensor:
        """log det E, a scalar; nan if the determinant is negative."""
        sign, logabsdet = ops.slogdet(self.op)
        return torch.where(sign < 0, torch.full_like(logabsdet, torch.nan), logabsdet)

    def eigenvalues(self, k: int | None = None, which: str = "largest") -> Tensor:
        """Eigenvalues, descending (``which`` = "largest", "smallest" or "magnitude"); the first k only if `k` is given.

        Real for E = G⁻¹B with a symmetric form B, else complex in general.
        """
        return ops.eigvals(self.op, k, which)

    def inverse(self) -> Any:
        """E⁻¹."""
        return self._like(ops.inverse(self.op))

    def solve(self, v: Vector) -> Vector:
        """x with E x = v."""
        if getattr(v, "type", None) != (1, 0):
            raise VarianceError(
                f"cannot solve with {describe(self)} for {describe(v)}: E x = v has a Vector on both sides. Use metric.sharp on a "
                "covector first."
            )
        require_same_place(self, v, "solve")
        right = v.to(self.home)
        return Vector(self.home, ops.solve(self.op, right.blocks), right.at).to(self.chart)


CLASSES.update({(False, False): Form, (True, True): Cometric, (True, False): Endomorphism})


def reference_metric(tensor: TypedTensor) -> Metric:
    """The Euclidean metric of the reference chart, at the point and in the chart of `tensor`."""
    home = tensor.chart.reference
    one = torch.ones((), dtype=tensor.dtype, device=tensor.device)
    return Metric(tensor.chart, ops.Multiple(home.layout, one, definite=True), tensor.at, home=home)


def as_operator(chart: Chart, components: Any, what: str, *, definite: bool = False, symmetric: bool = True) -> LinearOperator:
    """User components of a two-index object: operator, (d, d) matrix, (*s, *s) tensor or nested dicts [row][column]."""
    layout = chart.layout
    if isinstance(components, LinearOperator):
        return components
    if isinstance(components, dict):
        rows = [torch.cat([_cell(components, r, c, layout[r].numel(), layout[c].numel(), what) for c in layout], -1) for r in layout]  # fmt: skip
        matrix = torch.cat(rows, -2)
    else:
        matrix = torch.as_tensor(components)
        square = layout[layout.names[0]] if len(layout) == 1 else torch.Size([layout.dim])
        is_matrix = not square and matrix.shape[-2:] == (1, 1)  # of a block without axes: not a batch of numbers
        if not is_matrix and matrix.ndim >= 2 * len(square) and matrix.shape[matrix.ndim - 2 * len(square) :] == (*square, *square):
            matrix = matrix.reshape(*matrix.shape[: matrix.ndim - 2 * len(square)], layout.dim, layout.dim)
    if matrix.ndim < 2 or matrix.shape[-2:] != (layout.dim, layout.dim):
        raise GeometryError(
            f"{what} in chart '{chart.name}' needs a ({layout.dim}, {layout.dim}) matrix, found shape {tuple(matrix.shape)}. Rows and "
            f"columns run over the blocks {list(layout.names)} in this order; nested dicts [row][column] work as well."
        )
    if not matrix.is_floating_point():
        matrix = matrix.to(torch.get_default_dtype())
    if not is_wrapped({"": matrix}):
        tolerance = 1e3 * torch.finfo(matrix.dtype).eps * float(matrix.detach().abs().max())
        is_symmetric = bool(((matrix - matrix.mT).abs() <= tolerance).all())
    else:
        is_symmetric = definite
    return ops.Dense(layout, matrix, symmetric=symmetric and is_symmetric, definite=definite)


def _cell(nested: dict[str, Any], row: str, column: str, height: int, width: int, what: str) -> Tensor:
    try:
        return nested[row][column].reshape(height, width)
    except (KeyError, RuntimeError) as error:
        raise GeometryError(
            f"{what}: the entry [{row!r}][{column!r}] is missing or has the wrong shape (wanted {height} × {width} numbers). Give "
            "nested dicts [row][column] with an entry for each pair of blocks."
        ) from error


def _make_form(chart: Chart, components: Any, *, at: Any) -> Form:
    return Form(chart, as_operator(chart, components, "a Form"), require_at(chart, at, "a Form"))


def _make_metric(chart: Chart, components: Any, *, at: Any) -> Metric:
    base = require_at(chart, at, "a Metric")
    op = as_operator(chart, components, "a Metric")
    if not op.symmetric and not is_wrapped({"": op.like}):
        raise GeometryError(
            f"a metric in chart '{chart.name}' must be symmetric, found a matrix that is not. An inner product does not depend on "
            "the order of its arguments; symmetrise it, 0.5 * (M + M.mT), or make a form: chart.form(m, at=p)."
        )
    ops.inverse(op, positive=True)  # raises SingularMetricError if it is not positive definite
    op.definite = True
    return Metric(chart, op, base)


def _make_cometric(chart: Chart, components: Any, *, at: Any) -> Cometric:
    return Cometric(chart, as_operator(chart, components, "a Cometric"), require_at(chart, at, "a Cometric"))


def _make_endomorphism(chart: Chart, components: Any, *, at: Any) -> Endomorphism:
    op = as_operator(chart, components, "an Endomorphism", symmetric=False)
    return Endomorphism(chart, op, require_at(chart, at, "an Endomorphism"))


makers.update(form=_make_form, metric=_make_metric, cometric=_make_cometric, endomorphism=_make_endomorphism)


def _flatten(tensor: Rank2) -> tuple[list[Any], Any]:
    """The matrix is the leaf; matrix-free objects are made dense, and refuse above a size."""
    ops.require_small(tensor.op, "crossing the border of a transform with a matrix-free object")
    op = ops.densify(tensor.op)
    moving = is_wrapped(tensor.at.blocks) or bool(tensor.at.batch_shape)
    context = (tensor.chart, tensor.home, tensor.ups, op.symmetric, op.definite, None if moving else tensor.at)
    return ([op.matrix, tensor.at] if moving else [op.matrix]), context


def _unflatten(cls: type[Rank2]) -> Any:
    def build(children: list[Any], context: Any) -> Rank2:
        chart, home, ups, symmetric, definite, at = context
        op = ops.Dense(home.layout, children[0], symmetric=symmetric, definite=definite)
        return cls(chart, op, at if at is not None else children[1], home=home, ups=ups)

    return build


for _cls in (Rank2, Form, Metric, Cometric, Endomorphism):
    register_pytree(_cls, _flatten, _unflatten(_cls))
