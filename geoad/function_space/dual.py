"""Damped solves with curvature matrices of low rank, in the space of the rows: the Woodbury identity by kernels."""

from __future__ import annotations

import copy
from typing import Any, Self, TypeGuard

import torch
from torch import Tensor

from geoad.charts import Point, same_manifold
from geoad.curvature.network import NetworkCurvature
from geoad.errors import ChartMismatchError, GeometryError, SingularMetricError, StructureNotPreservedError, VarianceError
from geoad.fields import FormField, SumField
from geoad.function_space.forms import many
from geoad.function_space.rows import CurvatureRows
from geoad.metrics import Euclidean
from geoad.operators import LinearOperator
from geoad.params import Blocks, Layout, axpy, is_wrapped, scale, sub
from geoad.tangent.inverse import groups_of, sharp_of
from geoad.tensors import Covector, Form, Metric, Vector, describe
from geoad.tensors.base import require_same_place

__all__ = ["DualSolver", "dual_solve"]


class DualSolver:
    r"""(F + λG)⁻¹ at a point for F = Jᵀ A J, factorised in the space of the rows of J.

    With a root A = S D Sᵀ (D = 1, or signs ±1 where A is indefinite) and the rows U = Sᵀ J,

    .. math:: (\lambda G + U^\top D U)^{-1}\omega = \tfrac1\lambda \big(G^{-1}\omega
              - G^{-1} U^\top (\lambda D + U G^{-1} U^\top)^{-1} U G^{-1}\omega\big).

    A is never inverted: it is singular for logits, and where classes have probability zero. The matrix in the middle has N·K
    rows: N samples with the K columns of the root (c - 1 for classes, 1 for one label of a Monte-Carlo or an empirical Fisher).
    It is made from what went in and what came back of every layer; U, with its N·K·d numbers, is stored nowhere if the layers
    have structure, and products with it are one jvp or vjp of the network. A factor of (N·K)² numbers remains, so it is worth
    while up to some thousands of rows. The result is exact, and the same in every chart.

    A sum of fields is taken apart: those with rows (Fisher and Gauss-Newton matrices over data, in an exact representation)
    give U, with their factors; all others (metrics, priors, KFAC, ...) take the place of λG, together with λG if λ > 0. That
    rest must have an inverse, and is solved with in its own structure.

    Over data that are shared out among processes (`geoad.distributed.shard`) every process makes the inner products of its own
    rows with those of all, keeps the whole matrix, and gets the same solutions.

    For an MLP 64-256-256-10 (d = 85,002) on one thread, float32: 256 digits (2304 rows) take 0.36 s to make and 0.04 s for
    each solve; a ``LowRank`` Fisher plus a multiple of the metric, which stores the rows (747 MiB), takes 20 s and 0.56 s.

    Args:
        field: a Fisher or Gauss-Newton field, whose representation does not matter as long as it stands for the exact matrix;
            or a sum with such fields.
        p: the point.
        damping: λ ≥ 0; λ > 0 unless the field is a sum with a positive definite rest.
        metric: G, a metric field with a solve. Default: the reference metric.
        max_memory: bytes for intermediate results and for what products at the point share.
        refinements: steps of iterative refinement: two products with F more for each. The identity subtracts two large numbers
            where λ is small beside F.

    Attributes:
        gram: the inner products U G⁻¹ Uᵀ, (N·K, N·K).
        at: the point.

    Raises:
        StructureNotPreservedError: the field stands for another matrix (a diagonal, KFAC, ...), or has no rows.
        SingularMetricError: λ is too small for the precision, or the matrix (or G) is singular.
        GeometryError: λ is not positive, or more rows than there is memory for their inner products.

    >>> import torch, geoad
    >>> geo = geoad.GeoModule(torch.nn.Linear(20, 3).double())
    >>> x, y = torch.randn(4, 20, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    >>> p, F = geo.point(), geoad.curvature.Fisher(geo, x)
    >>> slope = geoad.grad(geo.loss(torch.nn.functional.cross_entropy, (x, y)))(p)
    >>> dual = geoad.DualSolver(F, p, damping=0.1)
    >>> dual.size, torch.allclose(dual.solve(slope).ravel(), F(p).solve(slope, damping=0.1).ravel())
    (8, True)
    >>> prior = geoad.metrics.Diagonal(geo.reference, 0.1)
    >>> geoad.DualSolver(F + prior, p).solve(slope).ravel().allclose(dual.solve(slope).ravel())
    True
    """

    def __init__(
        self,
        field: FormField,
        p: Point,
        damping: float | Tensor = 0.0,
        metric: FormField | None = None,
        *,
        max_memory: int = 1 << 30,
        refinements: int = 1,
    ) -> None:
        terms, rest = _taken_apart(field)
        if not isinstance(p, Point) or not all(same_manifold(p.chart, each.geo.reference) for _, each in terms):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ChartMismatchError(
                f"a dual solve takes place at a point of the network, found {describe(p)}. Pass geo.point()."
            )
        if p.batch_shape:
            raise GeometryError(
                f"a dual solve was asked for at a batch of points, {tuple(p.batch_shape)}; its matrix is that of one. "
                "Go through them: [geoad.DualSolver(field, q, damping) for q in p]."
            )
        self.at, self.refinements = p, refinements
        self.home = p.to(p.chart.ground)
        _require_field(metric)
        self.damping, self.metric = _base(rest, damping, Euclidean(terms[0][1].geo.reference) if metric is None else metric)
        self._summed = bool(rest)
        held = _Held(self.metric, p)
        self._flat: Form = held(self.home)
        self._sharp = sharp_of(held, p, self.home.chart)
        self._rows = CurvatureRows(terms, p, groups_of(held, p, self.home.chart), max_memory)
        self._factor = self._factorised(self.damping)

    def __repr__(self) -> str:
        return f"DualSolver({self.size} rows, dim={self.home.chart.dim}, damping={float(self.damping):.4g})"

    @property
    def gram(self) -> Tensor:
        """U G⁻¹ Uᵀ (N·K, N·K), K fastest."""
        return self._rows.gram

    @property
    def size(self) -> int:
        """N·K, the number of rows."""
        return self._rows.size

    def damped(self, damping: float | Tensor) -> Self:
        """The same with another λ, from the same inner products: the price of a factorisation.

        >>> import torch, geoad
        >>> geo = geoad.GeoModule(torch.nn.Linear(20, 3))
        >>> dual = geoad.DualSolver(geoad.curvature.Fisher(geo, torch.randn(4, 20)), geo.point(), damping=0.1)
        >>> dual.damped(1.0)
        DualSolver(8 rows, dim=63, damping=1)
        """
        if self._summed:
            raise GeometryError(
                "the solver was made of a sum of fields, whose rest stands in the inner products of the rows; another damping "
                "needs other ones. Make a new one: geoad.DualSolver(field, p, damping)."
            )
        _require_positive(damping)
        twin = copy.copy(self)
        twin.damping, twin._factor = damping, self._factorised(damping)
        return twin

    def _factorised(self, damping: float | Tensor) -> tuple[Any, ...]:
        """A factorisation of λD + K."""
        kernel, signs = self.gram, self._rows.signs
        eye = torch.ones_like(kernel[0]) if signs is None else signs.to(kernel.dtype)
        matrix = kernel + torch.diag_embed(damping * eye)
        if not bool(matrix.isfinite().all()):
            raise GeometryError(
                "the inner products of the rows are not finite. Check data, parameters and damping for NaN and overflow."
            )
        if signs is None and isinstance(self._flat, Metric):
            lower, info = torch.linalg.cholesky_ex(matrix)
            if bool(info == 0):
                return "cholesky", lower
        else:
            lu, pivots, info = torch.linalg.lu_factor_ex(matrix)
            if bool(info == 0):
                return "lu", lu, pivots
        raise _too_small(damping, kernel, "λ cannot be told from zero")

    # -- products ------------------------------------------------------------------------------------------------------------

    def _product(self, v: Blocks) -> Blocks:
        """(F + λG) v."""
        return axpy(self.damping, many(self._flat.operator, v), self._rows.product(v))

    def _within(self, z: Tensor) -> Tensor:
        """(λD + U G⁻¹ Uᵀ)⁻¹ z."""
        kind, *factor = self._factor
        columns = z.to(self.gram.dtype).unsqueeze(-1) if z.ndim == 1 else z.to(self.gram.dtype).reshape(-1, z.shape[-1]).mT
        found = torch.cholesky_solve(columns, factor[0]) if kind == "cholesky" else torch.linalg.lu_solve(*factor, columns)
        return found.mT.reshape(z.shape).to(z.dtype)

    def _once(self, w: Blocks) -> Blocks:
        a = self._sharp(w)
        correction = self._sharp(self._rows.pull(self._within(self._rows.push(a))))
        return scale(1 / self.damping, sub(a, correction))

    # -- what is asked for ---------------------------------------------------------------------------------------------------

    def solve(self, w: Covector) -> Vector:
        """v with (F + λG) v = ω, in the chart of ω; batch axes lead.

        Raises:
            VarianceError: ω is no covector.
            BasePointError: it lives at another point.
            SingularMetricError: the refinement does not converge, for λ is too small for the precision.
        """
        if not isinstance(w, Covector):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise VarianceError(
                f"(F + λG) v = ω has a covector on the right, found {describe(w)}. Pass the differential geoad.grad(L)(p)."
            )
        here = w.to(self.at.chart)
        require_same_place(here, Vector(self.at.chart, self.at.blocks, self.at), "solve")
        right = here.to(self.home.chart).blocks
        v = self._once(right)
        for i in range(self.refinements):
            step = self._once(sub(right, self._product(v)))
            if i == 0:
                self._require_convergence(right, v, step)
            v = axpy(1.0, v, step)
        return Vector(self.home.chart, v, self.home).to(w.chart)

    def _require_convergence(self, right: Blocks, v: Blocks, step: Blocks) -> None:
        """The first step of the refinement tells how wrong the solution was: each step makes that so many times smaller."""
        if is_wrapped(v):
            return
        layout: Layout = self.home.chart.layout
        size, change = (layout.ravel(each).detach().double().norm(dim=-1) for each in (v, step))
        if not bool((change <= _CONVERGED * size).all()):
            if not bool(layout.ravel(right).isfinite().all()):
                raise GeometryError(
                    "the right-hand side holds numbers that are not finite, so there is no solution. Look at the loss and the "
                    "data it was differentiated on."
                )
            wrong = float((change / size).max())
            raise _too_small(self.damping, self.gram, f"the solution is wrong by a part of {wrong:.2g} of its size")

    def logdet(self) -> Tensor:
        """log det(F + λG) - log det(λG) = log det(1 + D U G⁻¹ Uᵀ / λ), an invariant number.

        Raises:
            SingularMetricError: F + λG has a negative determinant.
        """
        signs = self._rows.signs
        bent = self.gram if signs is None else signs.unsqueeze(-1) * self.gram
        found: Any = torch.linalg.slogdet(torch.eye(self.size, dtype=bent.dtype, device=bent.device) + bent / self.damping)
        if not bool(found.sign > 0):
            raise SingularMetricError(
                "F + λG has a determinant that is not positive, so it has no logarithm. Increase the damping."
            )
        return found.logabsdet


class _Held(FormField):
    """A field whose value at one point is computed once."""

    def __init__(self, field: FormField, p: Point) -> None:
        local = field.local(p)
        super().__init__(local.home)
        self.value_class = local.value_class
        self.value = local.operator(p.to(local.home).blocks)

    def operator(self, x: Blocks) -> LinearOperator:
        return self.value


_CONVERGED = 0.1
"""A first step of refinement that is larger, beside the solution, says that rounding has the upper hand."""


def dual_solve(
    field: FormField, p: Point, w: Covector, damping: float | Tensor = 0.0, metric: FormField | None = None, **options: Any
) -> Vector:
    """v with (F + λG) v = ω through the inner products of the rows of F, exactly: one step of damped natural gradient.

    For several right-hand sides at one point keep the `DualSolver`; arguments and errors are described there.

    >>> import torch, geoad
    >>> geo = geoad.GeoModule(torch.nn.Linear(20, 3).double())
    >>> x, y = torch.randn(4, 20, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    >>> L, F = geo.loss(torch.nn.functional.cross_entropy, (x, y)), geoad.curvature.Fisher(geo, x)
    >>> p = geo.point()
    >>> geoad.dual_solve(F, p, geoad.grad(L)(p), damping=0.1)
    Vector('theta', dim=63, float64, cpu)
    """
    return DualSolver(field, p, damping, metric, **options).solve(w)


# -- what is given -------------------------------------------------------------------------------------------------------------


def _taken_apart(field: Any) -> tuple[list[tuple[float, NetworkCurvature]], list[tuple[float | Tensor, FormField]]]:
    """The terms of a sum that have rows, and the others."""
    if not isinstance(field, FormField):
        raise StructureNotPreservedError(
            f"a dual solve needs a matrix JᵀAJ of a network over data, found {type(field).__name__}. Pass a Fisher or GGN "
            "field, or a sum with one; they are the fields themselves, not their values field(p)."
        )
    given = field.terms if isinstance(field, SumField) else [(1.0, field)]
    terms = [(float(factor), each) for factor, each in given if _has_rows(each) and float(factor) != 0]
    rest = [(factor, each) for factor, each in given if not _has_rows(each)]
    if terms:
        return terms, rest
    imposed = [each.structure for _, each in rest if isinstance(each, NetworkCurvature)]
    if imposed:
        raise StructureNotPreservedError(
            f"a dual solve is exact, but the field stands for an approximation, {imposed[0]}. Solve with its value, "
            "field(p).solve(w, damping=...), or build the field with representation='implicit'."
        )
    raise StructureNotPreservedError(
        f"a dual solve needs a matrix JᵀAJ of a network over data, found {field!r}. Pass a Fisher or GGN field, or a sum with "
        "one; metrics and Hessians have no rows: use field(p).solve(w, damping=...)."
    )


def _has_rows(field: FormField) -> TypeGuard[NetworkCurvature]:
    return isinstance(field, NetworkCurvature) and not field.structure.imposed


def _base(
    rest: list[tuple[float | Tensor, FormField]], damping: float | Tensor, metric: FormField
) -> tuple[float | Tensor, FormField]:
    """(λ, G) for the part of the matrix that has no rows."""
    if not rest:
        _require_positive(damping)
        return damping, metric
    if bool(torch.as_tensor(damping) < 0):
        raise GeometryError(
            f"damping must be at least 0, got {float(damping):g}. Subtract a metric explicitly: field - lam * G."
        )
    return 1.0, SumField([*rest, (damping, metric)] if float(damping) > 0 else rest)


def _require_field(metric: Any) -> None:
    if not (metric is None or isinstance(metric, FormField)):
        raise VarianceError(
            f"the metric of a dual solve is a field, found {describe(metric)}. Pass the field itself, such as "
            "geoad.metrics.Euclidean(geo.reference), not its value at a point."
        )


def _require_positive(damping: float | Tensor) -> None:
    if not bool(damping > 0):
        raise GeometryError(
            f"damping={float(damping):g}: without a positive multiple of the metric the matrix has rank N·K at most and no "
            "inverse. Pass damping > 0, add a positive definite field, or solve by the dense matrix."
        )


def _too_small(damping: float | Tensor, kernel: Tensor, found: str) -> SingularMetricError:
    return SingularMetricError(
        f"λ = {float(damping):.3g} is too small beside the matrix (its largest diagonal entry among the rows is "
        f"{float(kernel.diagonal().max()):.3g}) in {kernel.dtype}: {found}. Increase the damping, or use float64."
    )
