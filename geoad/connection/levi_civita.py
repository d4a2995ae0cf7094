r"""The Levi-Civita connection of a metric field as plain numbers in the home chart of that field.

Leading axes of points are batch axes. Products come from `geoad.connection.products`, under ``vmap`` over the batch; the solve
with the metric is done outside of it, so that a singular metric is seen (inside a transform no value can be looked at).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geoad import operators as ops
from geoad.charts import Chart, Point, flat_reference, over_batch, same_manifold, station
from geoad.connection.products import contracted, first_kind
from geoad.errors import ChartMismatchError, GeometryError, VarianceError
from geoad.fields.metric import FormField, require_connection
from geoad.fields.scalar import require_point
from geoad.kernels.products import mapped
from geoad.metrics import Euclidean
from geoad.operators import CG
from geoad.params import Blocks, Layout, first, is_wrapped, zeros_like
from geoad.tensors import Metric

__all__ = ["SYMBOLS_LIMIT", "LeviCivita", "near"]

SYMBOLS_LIMIT = 256
"""Above this number of coordinates d the d³ Christoffel symbols are refused (256³ float64 numbers are 0.13 GB)."""

_CHUNK = 256


class LeviCivita:
    r"""The connection with :math:`\nabla G = 0` and without torsion; for ``metric=None`` the flat one of the reference chart.

    Args:
        metric: a metric field, or None.
        what: what it is needed for, for messages.
        solver: how G⁻¹ is applied; default: as the operators of the field do it (a factorisation where the size allows).

    Raises:
        VarianceError: `metric` is no metric field.
    """

    def __init__(self, metric: FormField | None, what: str, solver: CG | None = None) -> None:
        if metric is not None and not isinstance(metric, FormField):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise VarianceError(
                f"{what} needs a metric field, found {type(metric).__name__}. A connection is made of derivatives of the "
                "metric, so its value at one point is not enough. Pass for instance geoad.metrics.Euclidean(chart), "
                "chart.metric_field(fn) or a curvature field; None means the flat reference metric."
            )
        if metric is not None and not issubclass(metric.value_class, Metric):
            raise VarianceError(
                f"{what} needs a metric field, found a field of forms that may be indefinite ({metric!r}), for instance a "
                "difference of metrics. Such a form defines no lengths, and its inverse may not exist. Use sums with "
                "positive coefficients."
            )
        self.metric = metric
        self.what = what
        self.solver = solver

    @property
    def flat(self) -> bool:
        """The symbols vanish in the home chart."""
        return self.metric is None or self.metric.constant

    def local(self, p: Point) -> LeviCivita:
        """The connection as it is computed at p: of the local field on an atlas, of the induced metric below an immersion."""
        metric = self.metric
        if not isinstance(p, Point):  # pyright: ignore[reportUnnecessaryIsInstance]
            return self  # `place` raises
        if metric is None:
            root = self._flat(p.chart)
            if station(root, p.chart) is root:
                return self
            metric = Euclidean(root)
        local = metric.local(require_point(p, metric.home, self.what))
        if local is self.metric:
            return self
        require_connection(local, self.what)
        return LeviCivita(local, self.what, self.solver)

    def home(self, chart: Chart) -> Chart:
        """The chart to compute in, for objects in `chart`."""
        if self.metric is None:
            return self._flat(chart)
        if not same_manifold(self.metric.home, chart):
            raise ChartMismatchError(
                f"{self.what} was asked on the manifold of chart '{chart.reference.name}', but the metric field lives on that "
                f"of '{self.metric.home.reference.name}'. The metric of another manifold has nothing to say here; use one on "
                "the same manifold."
            )
        return self.metric.home

    def place(self, p: Any) -> Point:
        """The point `p` in the chart to compute in."""
        if self.metric is not None:
            return require_point(p, self.metric.home, self.what).to(self.metric.home)
        if not isinstance(p, Point):
            raise ChartMismatchError(
                f"{self.what} is evaluated at a Point, found {type(p).__name__}. Plain numbers have no chart, so it is not "
                "known which point they mean. Pass geo.point() or chart.point(components)."
            )
        return p.to(self._flat(p.chart))

    def _flat(self, chart: Chart) -> Chart:
        return flat_reference(chart, f"{self.what} without a metric", "pass a metric field")

    # -- products ------------------------------------------------------------------------------------------------------

    def lowered(self, x: Blocks, u: Blocks, v: Blocks) -> Blocks:
        """Γ_{k;ij} u^i v^j, with the batch axes of x in front of all three."""
        field = self._field()
        same = u is v

        def product(y: Blocks, a: Blocks, b: Blocks) -> Blocks:
            return first_kind(field, y, a, a if same else b)

        return over_batch(product, len(field.home.layout.batch_shape(x)), x, u, v)

    def contracted(self, x: Blocks, v: Blocks, w: Blocks) -> Blocks:
        """w^k Γ_{k;ij} v^i, with the batch axes of x in front of all three."""
        field = self._field()
        return over_batch(lambda y, a, b: contracted(field, y, a, b), len(field.home.layout.batch_shape(x)), x, v, w)

    def raised(self, x: Blocks, w: Blocks) -> Blocks:
        """G(x)⁻¹ w; w may have further batch axes behind those of x.

        Raises:
            SingularMetricError: the metric is not positive definite at x.
        """
        field = self._field()
        layout = field.home.layout
        points = len(layout.batch_shape(x))
        extra = len(layout.batch_shape(w)) - points
        if points == 0 and extra == 0:
            return ops.solve(field.operator(x), w, positive=True, method=self.solver)
        if layout.dim > ops.DENSE_LIMIT:
            raise GeometryError(
                f"{self.what} of a batch solves with a matrix of size {layout.dim}, which is above the limit of "
                f"{ops.DENSE_LIMIT}. Go through the batch one by one: single solves are matrix-free."
            )
        matrix = over_batch(lambda y: {"": ops.to_dense(field.operator(y))}, points, x)[""]
        for _ in range(extra):
            matrix = matrix.unsqueeze(points)
        return ops.solve(ops.Dense(layout, matrix, symmetric=True), w, positive=True)

    def acceleration(self, x: Blocks, v: Blocks) -> Blocks:
        """-Γ^k_ij v^i v^j, the second derivative of the coordinates along a geodesic."""
        if self.flat:
            return zeros_like(v)
        bent = self.raised(x, self.lowered(x, v, v))
        return {name: -block for name, block in bent.items()}

    # -- dense ---------------------------------------------------------------------------------------------------------

    def along(self, x: Blocks, u: Blocks) -> Tensor:
        """The matrix A^k_j = Γ^k_ij u^i, shape (*batch, d, d)."""
        field = self._field()
        layout = field.home.layout

        def rows(y: Blocks, a: Blocks) -> Blocks:
            def row(e: Tensor) -> Tensor:
                return layout.ravel(first_kind(field, y, a, layout.unravel(e)))

            return {"": mapped(row, _eye(layout, first(y)), _CHUNK)}

        lowered = over_batch(rows, len(layout.batch_shape(x)), x, u)[""]
        return layout.ravel(self.raised(x, layout.unravel(lowered))).mT

    def symbols(self, home: Chart, x: Blocks) -> Tensor:
        """Γ^k_ij as a tensor (*batch, d, d, d) in the order [k, i, j], exactly symmetric in i and j."""
        layout = home.layout
        d, batch = layout.dim, layout.batch_shape(x)
        if d > SYMBOLS_LIMIT:
            raise GeometryError(
                f"{self.what} in {d} coordinates needs {d}³ Christoffel symbols; the limit is {SYMBOLS_LIMIT}³. Use what does "
                "not form them: geoad.hessian(L, metric), geoad.geodesic, geoad.parallel_transport of vectors and covectors."
            )
        if self.flat:
            return first(x).new_zeros(*batch, d, d, d)
        field = self._field()
        i, j = torch.triu_indices(d, d, device=first(x).device)

        def pairs(y: Blocks) -> Blocks:
            eye = _eye(layout, first(y))

            def pair(u: Tensor, v: Tensor) -> Tensor:
                return layout.ravel(first_kind(field, y, layout.unravel(u), layout.unravel(v)))

            return {"": mapped(lambda two: pair(*two), (eye[i], eye[j]), _CHUNK)}

        lowered = over_batch(pairs, len(batch), x)[""]
        upper = layout.ravel(self.raised(x, layout.unravel(lowered)))
        where = torch.empty(d, d, dtype=torch.long, device=i.device)
        where[i, j] = where[j, i] = torch.arange(len(i), device=i.device)
        return upper[..., where, :].movedim(-1, -3)

    def _field(self) -> FormField:
        assert self.metric is not None
        return self.metric


def _eye(layout: Layout, like: Tensor) -> Tensor:
    return torch.eye(layout.dim, dtype=like.dtype, device=like.device)


def near(p: Point, q: Point) -> bool:
    """True if two points of one chart agree up to rounding: for points that were computed on different ways.

    Inside transforms values cannot be read; then it is taken for granted.
    """
    if p is q or p.token is q.token or is_wrapped(p.blocks) or is_wrapped(q.blocks):
        return True
    a, b = p.ravel().detach(), q.ravel().detach()
    if a.shape != b.shape or a.device != b.device:
        return False
    tolerance = 1e3 * max(torch.finfo(a.dtype).eps, torch.finfo(b.dtype).eps)
    return bool(((a - b).abs() <= tolerance * (1 + a.abs().amax(-1, keepdim=True))).all())
