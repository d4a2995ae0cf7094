"""What the drop-in forms accept as the differentiable argument: a Point in any chart, or plain numbers."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from geoad.charts import Chart, Point, flat_reference
from geoad.errors import GeometryError, VarianceError
from geoad.params import Layout
from geoad.tensors.base import TypedTensor, describe

__all__ = ["as_point", "output_space", "plain_chart", "plain_home"]


@functools.lru_cache(maxsize=1024)
def _chart_of(layout: Layout, plain: bool) -> Chart:
    shapes = ",".join(f"{name}:{tuple(shape)}" for name, shape in layout.items())
    return Chart(layout, "plain", plain=plain, uid=f"plain/{plain}/{shapes}")


def plain_chart(x: Any) -> Chart:
    """The reference chart of plain numbers: one for each structure (names and shapes)."""
    if isinstance(x, Tensor):
        return _chart_of(Layout({"x": x.shape}), True)
    if isinstance(x, Mapping) and x and all(isinstance(value, Tensor) for value in cast("Mapping[Any, Any]", x).values()):
        tensors = cast("Mapping[str, Tensor]", x)
        return _chart_of(Layout({name: tensor.shape for name, tensor in tensors.items()}), False)
    if isinstance(x, TypedTensor):
        raise VarianceError(
            f"derivatives are taken with respect to a point, found {describe(x)}. A Point is the only differentiable "
            "argument; pass p, "
            "or T.components for plain numbers in a chart of their own."
        )
    raise GeometryError(
        f"cannot differentiate with respect to {type(x).__name__}: pass a Point, a tensor, or a dict of tensors (name "
        "-> tensor)."
    )


def as_point(x: Any) -> Point:
    """A `Point` as it is; plain numbers as a point of their own reference chart."""
    return x if isinstance(x, Point) else plain_chart(x).point(x)


def plain_home(p: Point) -> Chart:
    """The chart in which plain functions take their components: the reference chart of p; on an atlas there is none."""
    what = "a function of plain components"
    return flat_reference(p.chart, what, "atlas.scalar_field({chart: fn, ...}), or chart.scalar_field(fn) in one of them")


_spaces: weakref.WeakKeyDictionary[Any, dict[torch.Size, Chart]] = weakref.WeakKeyDictionary()


def output_space(fn: Callable[..., Any], shape: torch.Size) -> Chart:
    """The output space of `fn`, a space of its own: the same chart for the same function and shape of its value."""
    try:
        known = _spaces.setdefault(fn, {})
    except TypeError:  # not hashable or not weakly referable
        known = {}
    if shape not in known:
        known[shape] = Chart({"out": shape}, f"out({getattr(fn, '__name__', type(fn).__name__)})")
    return known[shape]
