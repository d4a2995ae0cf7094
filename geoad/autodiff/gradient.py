"""Differentials: grad, value_and_grad, riemannian_grad."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from geoad import transport
from geoad.autodiff.inputs import as_point, plain_home
from geoad.charts import Chart, Point, flat_reference, same_manifold, section_between, station
from geoad.fields.metric import FormField
from geoad.fields.scalar import ScalarField, require_point
from geoad.kernels import derivatives, products
from geoad.params import Blocks
from geoad.tensors import Covector, Vector, reference_metric

__all__ = ["grad", "riemannian_grad", "value_and_grad"]

Argnums = int | tuple[int, ...]


class Differential:
    """dL as a covector field; with ``with_value`` also the value."""

    def __init__(self, field: ScalarField, with_value: bool = False) -> None:
        self.field, self.with_value = field, with_value
        self.chart = field.chart

    def __call__(self, p: Point) -> Any:
        field = self.field.local(require_point(p, self.field.home, "a differential"))
        home = field.home
        here = p.to(home)

        def at(x: Blocks) -> tuple[Tensor, Blocks]:
            return derivatives.value_and_gradient(field.parts(), x)

        value, slope = products.batched(at, len(here.batch_shape))(here.blocks)
        covector = Covector(home, slope, here).to(p.chart)
        return (covector, value) if self.with_value else covector


def grad(fn: Any, argnums: Argnums = 0, has_aux: bool = False) -> Callable[..., Any]:
    r"""The differential :math:`\omega_i = \partial L/\partial\theta^i`, a `Covector`.

    ``grad(L)(p)`` for a `ScalarField` L, or drop-in for ``torch.func.grad``: ``grad(fn, argnums, has_aux)(p, *args)`` with any
    callable of plain components in the reference chart, where p is a `Point` in any chart or plain numbers (a tensor or a dict,
    which are then a point of their own reference chart). The differential comes out in the chart of p, at p.

    It is not a direction: a step needs a metric, see `riemannian_grad`.

    >>> import torch, geoad
    >>> w = geoad.grad(lambda x: (x ** 2).sum())(torch.tensor([1.0, 2.0]))
    >>> w.components
    tensor([2., 4.])
    """
    if isinstance(fn, ScalarField):
        return Differential(fn)
    return _drop_in(fn, argnums, has_aux, with_value=False)


def value_and_grad(fn: Any, argnums: Argnums = 0, has_aux: bool = False) -> Callable[..., Any]:
    """As `grad`, but returns (value, differential); with ``has_aux`` ((value, aux), differential).

    >>> import torch, geoad
    >>> value, w = geoad.value_and_grad(lambda x: (x ** 2).sum())(torch.tensor([1.0, 2.0]))
    >>> value
    tensor(5.)
    """
    if isinstance(fn, ScalarField):
        both = Differential(fn, with_value=True)
        return lambda p: both(p)[::-1]
    return _drop_in(fn, argnums, has_aux, with_value=True)


def _drop_in(fn: Callable[..., Any], argnums: Argnums, has_aux: bool, with_value: bool) -> Callable[..., Any]:
    chosen = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    def differential(*args: Any, **kwargs: Any) -> Any:
        points = {i % len(args): as_point(args[i]) for i in chosen}
        plain = list(args)
        for i, point in points.items():
            plain[i] = point.to(plain_home(point)).components
        slopes, (value, aux) = _gradient(fn, chosen, has_aux)(*plain, **kwargs)
        typed = tuple(_covector(points[i % len(args)], slope) for i, slope in zip(chosen, slopes, strict=True))
        result: Any = typed[0] if isinstance(argnums, int) else typed
        extra = (value, aux) if has_aux else value
        if with_value:
            return extra, result
        return (result, aux) if has_aux else result

    return differential


def _gradient(fn: Callable[..., Any], chosen: Sequence[int], has_aux: bool) -> Callable[..., Any]:
    def with_value(*args: Any, **kwargs: Any) -> tuple[Tensor, tuple[Tensor, Any]]:
        result = fn(*args, **kwargs)
        value, aux = result if has_aux else (result, ())
        checked = derivatives.require_scalar(value)
        return checked, (checked, aux)

    def differential(*args: Any, **kwargs: Any) -> Any:
        def partial(these: tuple[Any, ...]) -> tuple[Tensor, tuple[Tensor, Any]]:
            plain = list(args)
            for i, each in zip(chosen, these, strict=True):
                plain[i] = each
            return with_value(*plain, **kwargs)

        return products.gradient(partial, tuple(args[i] for i in chosen))

    return differential


def _covector(point: Point, components: Any) -> Covector:
    home = plain_home(point)
    return Covector(home, home.pack(components), point.to(home)).to(point.chart)


def _default_home(point: Point) -> Chart:
    root = flat_reference(point.chart, "the gradient without a metric", "geoad.riemannian_grad(L, metric)")
    return station(root, point.chart)


def riemannian_grad(fn: Any, metric: FormField | None = None) -> Callable[..., Vector]:
    """The Riemannian gradient G⁻¹dL, a `Vector`: the direction of steepest ascent with respect to a metric field.

    Default: the Euclidean metric of the reference chart, moved along: the gradient of gradient descent, in every chart.
    `fn` is a `ScalarField` or a callable of plain components, ``riemannian_grad(fn, metric)(p, *args)``.
    """
    differential = grad(fn)

    def gradient(p: Any, *args: Any, **kwargs: Any) -> Vector:
        point = as_point(p)
        # everything is computed where the metric is, and the result moves once
        home = _default_home(point) if metric is None else metric.home_at(point)
        section = section_between(point.chart, home) if same_manifold(home, point.chart) else None
        if section is not None:  # a choice of one of many points
            raise transport.refusal(f"a gradient with a metric of '{home.name}'", section, along=False)
        slope = differential(point.to(home) if same_manifold(home, point.chart) else point, *args, **kwargs)
        here = reference_metric(slope) if metric is None else metric(slope.at)
        return here.sharp(slope).to(point.chart)

    return gradient
