"""Christoffel symbols: the numbers of a connection at a point, with their own law."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from geoad.charts import Chart, Point, Reparametrization
from geoad.connection import affine_law
from geoad.connection.levi_civita import LeviCivita
from geoad.errors import GeometryError, VarianceError
from geoad.fields.metric import FormField
from geoad.params import is_wrapped, register_pytree
from geoad.tensors import Axis, GeoTensor, TypedTensor, describe, require_same_place

__all__ = ["Christoffel", "christoffel"]


class Christoffel:
    r"""The symbols :math:`\Gamma^k_{ij}` of a connection at a point, stored as ``[k, i, j]``. Not a tensor.

    ``.to(chart)`` moves them by the affine law of `geoad.connection.affine_law`: even the zero symbols of a flat connection do
    not stay zero in curved coordinates. Connections have no algebra but one: the difference of two is a tensor of type (1,2),
    and a connection plus such a tensor is a connection.

    Attributes:
        chart: the chart of the symbols.
        at: the base point.
        data: the symbols, shape (*batch, d, d, d), each axis raveled in the order of the chart.
    """

    __slots__ = ("__weakref__", "at", "chart", "data")

    chart: Chart
    at: Point
    data: Tensor

    __array_ufunc__ = None

    def __init__(self, chart: Chart, data: Tensor, at: Point) -> None:
        for name, value in (("chart", chart), ("data", data), ("at", at)):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise GeometryError(
            f"cannot set '{name}': Christoffel symbols are frozen, so that they stay those of their point and chart. Compute "
            "them anew with geoad.christoffel(metric)(p)."
        )

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)

    # -- numbers -------------------------------------------------------------------------------------------------------

    @property
    def components(self) -> Tensor:
        """The plain symbols Γ[k, i, j] in the chart, shape (*batch, d, d, d)."""
        return self.data

    def to_dense(self) -> Tensor:
        """The same as `components`."""
        return self.data

    ravel = to_dense

    @property
    def batch_shape(self) -> torch.Size:
        """The shape of the leading axes."""
        return self.data.shape[:-3]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the symbols."""
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        """The device of the symbols."""
        return self.data.device

    def __repr__(self) -> str:
        batch = f", batch={tuple(self.batch_shape)}" if self.batch_shape else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"Christoffel('{self.chart.name}', dim={self.chart.dim}{batch}, {dtype}, {self.device})"

    def __getitem__(self, index: Any) -> Christoffel:
        """Index into the batch axes."""
        if not self.batch_shape:
            raise VarianceError(
                "cannot index the symbols of a single point: its axes are coordinates, and picking one depends on the chart. "
                "Use .components[k, i, j] for the plain numbers."
            )
        return Christoffel(self.chart, self.data[index], self.at[index])

    # -- moving --------------------------------------------------------------------------------------------------------

    def to(self, target: Any = None, *, dtype: torch.dtype | None = None, device: Any = None) -> Christoffel:
        """The same connection in another chart (by the affine law), dtype or device."""
        if isinstance(target, Chart):
            if target is self.chart:
                return self
            self.at.check_fresh()
            return Christoffel(target, affine_law.moved(self.data, self.at, target), self.at.to(target))
        if isinstance(target, Reparametrization):
            return target(self)
        at = self.at.to(target, dtype=dtype, device=device)
        return Christoffel(self.chart, self.data.to(device=at.device, dtype=at.dtype), at)

    def detach(self) -> Christoffel:
        """Cut from the autograd graph."""
        return Christoffel(self.chart, self.data.detach(), self.at)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Christoffel, (self.chart, self.data, self.at)

    # -- the one algebra -------------------------------------------------------------------------------------------------

    def _typed(self) -> GeoTensor:
        d = self.chart.dim
        return GeoTensor(self.data, [Axis(self.chart, up, d) for up in (True, False, False)], self.at)

    def __sub__(self, other: Any) -> Any:
        if isinstance(other, Christoffel):
            mine, theirs = self._typed(), other._typed()
            require_same_place(mine, theirs, "subtract the Christoffel symbols of")
            return mine - theirs
        return self._shifted(other, -1.0)

    def __add__(self, other: Any) -> Christoffel:
        return self._shifted(other, 1.0)

    def _shifted(self, other: Any, sign: float) -> Christoffel:
        mine = self._typed()
        axes = [(axis.up, axis.chart is None) for axis in other.axes] if isinstance(other, TypedTensor) else None
        if not isinstance(other, GeoTensor) or axes != [(True, False), (False, False), (False, False)]:
            raise VarianceError(
                f"cannot combine Christoffel symbols with {describe(other)}. A connection is not a tensor: it moves by an "
                "affine law with second derivatives of the chart. Two of them subtract to a tensor of type (1,2) [^,_,_], "
                "and such a tensor can be added; everything else needs .components."
            )
        require_same_place(mine, other, "add")
        return Christoffel(self.chart, self.data + sign * other.data, self.at)

    def _refuse(self, *_: Any) -> NoReturn:
        raise VarianceError(
            "Christoffel symbols have no tensor algebra: a multiple or a contraction of them has no law under a change of "
            "chart (they vanish in some charts and not in others). Use geoad.covariant_derivative(T, metric), geoad.geodesic "
            "or geoad.hessian(L, metric), which use them; Γ1 - Γ2 is a tensor; .components gives the plain numbers."
        )

    __radd__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __neg__ = __matmul__ = __rmatmul__ = __pow__ = _refuse
    __abs__ = __float__ = __bool__ = __call__ = _refuse

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        self._refuse()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise VarianceError(
            f"torch.{getattr(func, '__name__', func)} does not act on Christoffel symbols: they are not a tensor and have no "
            "law but their own. Use .components for the plain numbers."
        )


def christoffel(metric: FormField | None = None) -> Callable[[Point], Christoffel]:
    r"""The Christoffel symbols of the Levi-Civita connection of a metric field.

    .. math:: \Gamma^k_{ij} = \tfrac12 G^{kl}(\partial_i G_{jl} + \partial_j G_{il} - \partial_l G_{ij})

    Computed in the home chart of the metric field and moved to the chart of the point by the affine law. They are dense (d³
    numbers): for small manifolds. `geodesic`, `parallel_transport` and `geoad.hessian` do without them.

    Args:
        metric: a metric field. Default: the flat reference metric, whose symbols are zero in the reference chart and
            :math:`-\partial^2\psi/\partial\theta\partial\theta` (on :math:`J^{-1}` twice) in a chart ψ.

    Returns:
        A function of a `Point` (in any chart; batches as well) that gives the `Christoffel` symbols in its chart, [k, i, j] of
        shape (*batch, d, d, d).

    Raises:
        VarianceError: `metric` is no metric field.
        ChartMismatchError: the point belongs to another manifold than the metric.
        SingularMetricError: the metric is singular at the point.
        GeometryError: more than 256 coordinates.

    Source: Kristiadi et al. (2023), eq. (7).

    >>> import torch, geoad
    >>> polar = geoad.Chart({"x": (2,)}, name="polar")
    >>> G = polar.metric_field(lambda x: torch.diag(torch.stack([torch.ones_like(x[0]), x[0] ** 2])))
    >>> symbols = geoad.christoffel(G)(polar.point(torch.tensor([2.0, 0.5]))).components
    >>> symbols[0, 1, 1], symbols[1, 0, 1]
    (tensor(-2.), tensor(0.5000))
    """
    connection = LeviCivita(metric, "the Christoffel symbols")

    def symbols(p: Point) -> Christoffel:
        local = connection.local(p)
        here = local.place(p)
        return Christoffel(here.chart, local.symbols(here.chart, here.blocks), here).to(p.chart)

    return symbols


def _flatten(symbols: Christoffel) -> tuple[list[Any], Any]:
    if is_wrapped(symbols.at.blocks) or symbols.at.batch_shape:
        return [symbols.data, symbols.at], (symbols.chart, None)
    return [symbols.data], (symbols.chart, symbols.at)


register_pytree(
    Christoffel,
    _flatten,
    lambda children, context: Christoffel(context[0], children[0], context[1] if context[1] is not None else children[1]),
)
