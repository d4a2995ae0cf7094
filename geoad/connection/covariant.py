"""Covariant derivatives of tensor fields."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from geoad.charts import Chart, Point, same_manifold
from geoad.connection.levi_civita import LeviCivita, near
from geoad.errors import BasePointError, ChartMismatchError, GeometryError, VarianceError
from geoad.fields.metric import FormField
from geoad.fields.scalar import ScalarField
from geoad.kernels import products
from geoad.params import Blocks
from geoad.tensors import Axis, Density, LogDensity, TypedTensor, build, describe
from geoad.tensors.general import as_general

__all__ = ["CovariantDerivative", "covariant_derivative"]


class CovariantDerivative:
    """The tensor field ∇T; see `covariant_derivative`."""

    def __init__(self, field: Callable[[Point], Any], metric: FormField | None, chunk_size: int | None) -> None:
        self.field = field
        self.connection = LeviCivita(metric, "a covariant derivative")
        self.chunk_size = chunk_size

    def __repr__(self) -> str:
        return f"CovariantDerivative({self.field!r}, {self.connection.metric!r})"

    def __call__(self, p: Point) -> Any:
        connection = self.connection.local(p)
        here = connection.place(p)
        home = here.chart
        axes: list[Axis] = []

        def at(x: Blocks) -> Tensor:
            data, axes[:] = self._at(connection, Point(home, x))
            return data

        for _ in here.batch_shape:
            at = torch.func.vmap(at)
        return _typed(at(here.blocks), axes, here).to(p.chart)

    def _at(self, connection: LeviCivita, here: Point) -> tuple[Tensor, list[Axis]]:
        """The dense components of ∇T at a single point of the home chart, and their axes."""
        home = here.chart
        value = self.field(here)  # outside of the transform below: here values are checked
        data, axes, weight = _numbers(value, here)

        def components(x: Tensor) -> Tensor:
            q = Point(home, home.layout.unravel(x))
            return _numbers(self.field(q), q)[0]

        slope = _forward_jacobian(components, here.ravel(), self.chunk_size)
        own = [axis.chart == home for axis in axes]
        if (any(own) or weight) and not connection.flat:
            symbols = connection.symbols(home, here.blocks)
            slope = slope + _connection_terms(symbols, data, axes, own, weight)
        return slope, [*axes, Axis(home, False, home.dim)]


def _forward_jacobian(fn: Callable[[Tensor], Tensor], x: Tensor, chunk_size: int | None) -> Tensor:
    """The derivative of `fn`, the new axis last."""
    eye = torch.eye(x.numel(), dtype=x.dtype, device=x.device)
    # not out_dims=-1: torch 2.13 gives nonsense for a negative axis if the output does not depend on the input
    columns: Tensor = products.mapped(lambda e: products.jvp(fn, x, e)[1], eye, chunk_size)
    return columns.movedim(0, -1)


def _connection_terms(symbols: Tensor, data: Tensor, axes: list[Axis], own: list[bool], weight: float) -> Tensor:
    """Γ^a_km T^m for every upper index a, -Γ^m_ka T_m for every lower one, -w Γ^i_ik for the logarithm of a density."""
    total = data.new_zeros(*data.shape, symbols.shape[-1])
    if weight:
        total = total - weight * torch.einsum("iik->k", symbols)
    for position, (axis, mine) in enumerate(zip(axes, own, strict=True)):
        if not mine:
            continue
        last = data.movedim(position - len(axes), -1)
        term = torch.einsum("...m,akm->...ak" if axis.up else "...m,mka->...ak", last, symbols)
        term = term if axis.up else -term
        total = total + term.movedim(-2, position - len(axes) - 1)
    return total


def _numbers(value: Any, here: Point) -> tuple[Tensor, list[Axis], float]:
    """Dense components in the chart of `here`, axes and (for the logarithm of a density) weight of the value of a field."""
    home = here.chart
    if isinstance(value, Tensor) and value.ndim == 0:
        return value, [], 0.0
    if isinstance(value, Density) or not isinstance(value, TypedTensor):
        raise VarianceError(_not_a_field(value))
    if not same_manifold(value.chart, home):
        raise ChartMismatchError(
            f"the tensor field was asked at a point of the manifold of chart '{home.reference.name}' and returned "
            f"{describe(value)}, which lives on that of '{value.chart.reference.name}'. A field gives tensors at the point it "
            "is asked at."
        )
    moved = value.to(home)
    if not near(moved.at, here):
        raise BasePointError(
            f"the tensor field was asked at one point and returned {describe(value)} at another. Its derivative would be that "
            "of a constant; build the value at the point that is passed in: lambda p: chart.vector(..., at=p)."
        )
    if isinstance(moved, LogDensity):
        return moved.value, [], moved.weight
    general = as_general(moved)
    return general.data, list(general.axes), 0.0


def _not_a_field(value: Any) -> str:
    if isinstance(value, Density):
        return (
            f"the covariant derivative of a {describe(value)} is a covector with a density weight, which has no class here. "
            "Take the logarithm: covariant_derivative(lambda p: rho(p).log(), metric) is the covector ∇ρ/ρ."
        )
    return (
        f"a tensor field must return a typed tensor or a 0-dimensional tensor, found {describe(value)}. The derivative of "
        "plain components is not a tensor. Give the value its type, chart.vector(x, at=p); for a map into a space use "
        "geoad.jacobian."
    )


def _typed(data: Tensor, axes: list[Axis], here: Point) -> Any:
    """The object with these components; a (0,2) result knows whether it is symmetric."""
    home: Chart = here.chart
    if len(axes) == 2 and all(axis.chart == home and not axis.up for axis in axes):
        return home.form(data, at=here)
    return build(data, axes, here)


def covariant_derivative(
    field: Callable[[Point], Any], metric: FormField | None = None, *, chunk_size: int | None = 64
) -> CovariantDerivative:
    r"""The covariant derivative :math:`\nabla_k T` of a tensor field; the new lower index k comes **last**.

    .. math:: \nabla_k T^{a}{}_{b} = \partial_k T^{a}{}_{b} + \Gamma^a_{km} T^{m}{}_{b} - \Gamma^m_{kb} T^{a}{}_{m}

    The plain derivative of the components of a tensor is not a tensor; this is. It is computed densely in the home chart of the
    metric, by forward mode, and seen in the chart of the point. It nests: ``covariant_derivative(geoad.hessian(L, G), G)`` is
    the third covariant derivative.

    Args:
        field: a tensor field, any function ``Point -> typed tensor``: ``geoad.grad(L)``, ``geoad.riemannian_grad(L, G)``, a
            metric field, ``geoad.hessian(L)``, ``lambda p: chart.vector(fn(p.to(chart).components), at=p)``; or a function (a
            `ScalarField`, or one that returns 0-dimensional tensors), whose derivative is the differential; or the logarithm of
            a density.
        metric: the metric field whose Levi-Civita connection is meant. Default: the flat connection of the reference chart.
        chunk_size: how many directions are differentiated at a time; None for all.

    Returns:
        A tensor field: a function of a `Point` (in any chart; batches as well). Of a function it gives a `Covector`, of a
        covector ∇_k ω_a a `Form`, of a vector ∇_k v^a an `Endomorphism` E^a_k (its trace is the divergence), else a
        `GeoTensor`. Frame and batch axes and axes of other spaces are carried along.

    Raises:
        VarianceError: the value of the field has no type, or `metric` is no metric field.
        BasePointError: the field returns a tensor at another point than it was asked at.
        GeometryError: the connection is needed in more than 256 coordinates.

    >>> import torch, geoad
    >>> polar = geoad.Chart({"x": (2,)}, name="polar")
    >>> G = polar.metric_field(lambda x: torch.diag(torch.stack([torch.ones_like(x[0]), x[0] ** 2])))
    >>> outward = lambda p: polar.vector(torch.stack([p.components[0], torch.zeros(())]), at=p)
    >>> p = polar.point(torch.tensor([2.0, 0.5]))
    >>> geoad.covariant_derivative(outward, G)(p).components    # the identity: its divergence is 2
    tensor([[1., 0.],
            [0., 1.]])
    """
    if isinstance(field, TypedTensor) or not callable(field):
        raise VarianceError(
            f"a covariant derivative is taken of a tensor field, found {describe(field)}. The value at one point has no "
            "derivative; pass the function that gives it at every point, for instance geoad.grad(L) instead of "
            "geoad.grad(L)(p)."
        )
    if chunk_size is not None and chunk_size < 1:
        raise GeometryError(f"chunk_size= must be at least 1 or None, found {chunk_size}.")
    if isinstance(field, ScalarField) and metric is not None and not same_manifold(metric.home, field.home):
        raise ChartMismatchError(
            f"the function lives on the manifold of chart '{field.home.reference.name}', the metric on that of "
            f"'{metric.home.reference.name}'. Use a metric on the same manifold."
        )
    return CovariantDerivative(field, metric, chunk_size)
