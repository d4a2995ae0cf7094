"""Saving points and typed objects as plain tensors, which ``torch.load(weights_only=True)`` reads back.

A state is a dict of tensors, numbers, strings and lists. It names charts by uid, name and layout; reading it back needs a
chart of the manifold, for a change of coordinates is code and is not stored with the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from geoad import operators as ops
from geoad.charts import Chart, Point
from geoad.errors import ChartMismatchError, GeometryError
from geoad.operators import LinearOperator, numbers
from geoad.params import Blocks, Layout
from geoad.tensors.base import Axis, TypedTensor
from geoad.tensors.densities import Density, LogDensity
from geoad.tensors.forms import Cometric, DualEndomorphism, Endomorphism, Form, HorizontalMetric, Metric
from geoad.tensors.general import GeoTensor
from geoad.tensors.rank1 import Covector, Rank1, Vector
from geoad.tensors.rank2 import Rank2

__all__ = ["from_state", "load", "save", "to_state"]

State = dict[str, Any]

_VERSION = 1
_MARK = "geoad"
_KINDS: dict[str, Any] = {
    cls.__name__: cls
    for cls in (
        Vector,
        Covector,
        Form,
        Metric,
        HorizontalMetric,
        Cometric,
        Endomorphism,
        DualEndomorphism,
        GeoTensor,
        Density,
        LogDensity,
    )
}


# -- writing -----------------------------------------------------------------------------------------------------------


def to_state(thing: Point | TypedTensor) -> State:
    """A `Point` or typed object as a dict of tensors and primitives, for ``torch.save`` and ``torch.load(weights_only=True)``.

    Structured operators (diagonal, Kronecker, low-rank ...) keep their structure; matrix-free objects are stored as a matrix,
    and refused above `geoad.operators.DENSE_LIMIT` coordinates.

    >>> import torch, geoad
    >>> x = geoad.Chart({"x": (2,)}, name="x")
    >>> v = x.vector(torch.tensor([1.0, 2.0]), at=x.point(torch.zeros(2)))
    >>> geoad.from_state(geoad.to_state(v), x).components
    tensor([1., 2.])
    """
    if isinstance(thing, Point):
        return {_MARK: _VERSION, "kind": "Point", "point": _point_state(thing)}
    if not isinstance(thing, TypedTensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise GeometryError(
            f"to_state is for points and typed objects, found {type(thing).__name__}. Plain tensors are saved by "
            "torch.save; modules by "
            "geo.state_dict()."
        )
    state: State = {
        _MARK: _VERSION,
        "kind": type(thing).__name__,
        "chart": _chart_state(thing.chart),
        "at": _point_state(thing.at),
    }
    match thing:
        case Rank1():
            state["blocks"] = _plain(thing.blocks)
        case Rank2():
            home = thing.home
            if home != thing.chart:
                state["home"] = _chart_state(home)
                state["at_home"] = _point_state(thing.at.to(home))
            state["operator"] = _operator_state(thing.op)
        case GeoTensor():
            state["kind"] = "GeoTensor"  # of a Jacobian by its products the matrix is kept
            state["data"] = thing.data.detach()
            state["axes"] = [
                {"chart": None if axis.chart is None else _chart_state(axis.chart), "up": axis.up, "size": axis.size}
                for axis in thing.axes
            ]
        case Density() | LogDensity():
            state["value"] = thing.value.detach()
            state["weight"] = float(thing.weight)
            state["foreign"] = [{"chart": _chart_state(chart), "weight": float(w)} for chart, w in thing.foreign]
        case _:
            raise GeometryError(f"a {type(thing).__name__} has no stored form. Save its components and make it anew.")
    return state


def _plain(blocks: Blocks) -> Blocks:
    return {name: block.detach() for name, block in blocks.items()}


def _chart_state(chart: Chart) -> State:
    return {
        "uid": chart.uid,
        "name": chart.name,
        "names": list(chart.layout.names),
        "shapes": [list(shape) for shape in chart.layout.values()],
        "plain": chart.plain,
        "reference": chart.parent is None and chart.joined is None and chart.domain is None,
    }


def _point_state(point: Point) -> State:
    point.check_fresh()
    reference = point.to(point.chart.reference)
    return {"chart": _chart_state(point.chart), "blocks": _plain(point.blocks), "reference": _plain(reference.blocks)}


def _operator_state(op: LinearOperator) -> State:
    if not _keeps_structure(op):
        ops.require_small(op, "saving a matrix-free object")
        op = ops.densify(op)
    return numbers.state_of(op)


def _keeps_structure(op: LinearOperator) -> bool:
    """It is made of stored numbers of known classes."""
    inside = op.operator if isinstance(op, ops.Inverse) else op
    return numbers.is_plain(inside)


# -- reading -----------------------------------------------------------------------------------------------------------


def from_state(state: Mapping[str, Any], chart: Chart | Sequence[Chart] | None = None, *, strict: bool = False) -> Any:
    """The `Point` or typed object of a state.

    Args:
        state: what `to_state` returned.
        chart: a chart of the manifold (any one), or several for objects that live in more than one space. Charts are found by
            their uid; where it is not among them (another process made the network anew) by name and layout, and then it is
            checked that the change of coordinates gives the stored point the same reference coordinates. None: a
            free-standing reference chart is made anew.
        strict: accept charts by uid only.

    Raises:
        ChartMismatchError: no chart fits, or a chart of that name has other coordinates.
    """
    if state.get(_MARK) != _VERSION:
        raise GeometryError(
            f"this is not a state of geoad (marker {state.get(_MARK)!r}, expected {_VERSION}). Pass what geoad.to_state "
            "returned."
        )
    given = [] if chart is None else [chart] if isinstance(chart, Chart) else list(chart)
    reader = _Reader(given, strict)
    kind = state["kind"]
    if kind == "Point":
        return reader.point(state["point"])
    here = reader.chart(state["chart"])
    at = reader.point(state["at"])
    cls = _KINDS[kind]
    if issubclass(cls, Rank1):
        return cls(here, _in_order(state["blocks"], here.layout), at)
    if issubclass(cls, Rank2):
        home = here
        if "home" in state:
            home = reader.chart(state["home"])
            at = reader.point(state["at_home"], view=at).to(here)
        return cls(here, numbers.from_state(state["operator"], home.layout), at, home=home)
    if cls is GeoTensor:
        axes = [Axis(reader.chart(a["chart"], foreign=True) if a["chart"] else None, a["up"], a["size"]) for a in state["axes"]]
        return GeoTensor(state["data"], axes, at)
    foreign = tuple((reader.chart(each["chart"], foreign=True), each["weight"]) for each in state["foreign"])
    return cls(here, state["value"], state["weight"], at, foreign)


def _in_order(blocks: Mapping[str, Tensor], layout: Layout) -> Blocks:
    return {name: blocks[name] for name in layout.names}


def _roots(chart: Chart) -> tuple[Chart, ...]:
    """The reference chart, or the charts of the atlas."""
    return (chart.reference,) if chart.atlas is None else chart.atlas.charts


class _Reader:
    """Finds charts among those of the given manifolds."""

    def __init__(self, given: list[Chart], strict: bool) -> None:
        self.strict = strict
        self.known = [chart for each in given for root in _roots(each) for chart in root.descendants()]
        self.made: dict[str, Chart] = {}
        self.open = not given

    def chart(self, state: Mapping[str, Any], *, foreign: bool = False) -> Chart:
        """The chart that a state means; a reference chart of another space (`foreign`) is made anew."""
        for chart in self.known:
            if chart.uid == state["uid"]:
                return chart
        layout = Layout(dict(zip(state["names"], state["shapes"], strict=True)))
        alike = [chart for chart in self.known if chart.name == state["name"] and chart.layout == layout]
        if len(alike) == 1 and not self.strict:
            return alike[0]
        if state["reference"] and (self.open or foreign) and not alike:
            return self._make(state, layout)
        raise ChartMismatchError(
            f"the saved object is written in chart '{state['name']}' with {layout}, which is "
            + (f"{len(alike)} times " if alike else "not ")
            + f"among the charts {[chart.name for chart in self.known]}"
            + (" by its uid (strict=True)" if self.strict else "")
            + ". Its numbers mean nothing in other coordinates. Make the chart first, "
            "theta.reparametrize(..., name=...), and pass any chart of the manifold: geoad.from_state(state, chart)."
        )

    def _make(self, state: Mapping[str, Any], layout: Layout) -> Chart:
        if state["uid"] not in self.made:
            self.made[state["uid"]] = Chart(layout, state["name"], plain=state["plain"], uid=state["uid"])
        return self.made[state["uid"]]

    def point(self, state: Mapping[str, Any], *, view: Point | None = None) -> Point:
        """The point of a state; with `view` the same token, seen in another chart."""
        chart = self.chart(state["chart"])
        point = Point(chart, _in_order(state["blocks"], chart.layout), None if view is None else view.token)
        home = chart.reference
        if chart == home:
            return point
        stored = _in_order(state["reference"], home.layout)
        again = Point(chart, point.blocks).to(home)
        for name, block in stored.items():
            size = block.abs().max() if block.numel() else block.new_ones(())
            tolerance = 1e4 * torch.finfo(block.dtype).eps * float(size + 1)
            if not torch.allclose(again.blocks[name], block, rtol=0, atol=tolerance, equal_nan=True):
                raise ChartMismatchError(
                    f"chart '{chart.name}' has the name and layout of the chart of the saved object, but its map is "
                    "another one: the "
                    f"saved point has other coordinates in '{home.name}' (block '{name}'). Make the chart with the same "
                    "map, and load "
                    "the parameters of a learnable map first: phi.load_state_dict(...)."
                )
        Point(home, stored, point.token)  # the stored reference coordinates, bit for bit
        return point


# -- files -------------------------------------------------------------------------------------------------------------


def save(thing: Any, file: Any) -> None:
    """Write a point, a typed object, or nested dicts, lists and tuples of them (and of tensors and primitives) to a file."""
    torch.save(_encode(thing), file)


def load(file: Any, chart: Chart | Sequence[Chart] | None = None, *, strict: bool = False, map_location: Any = None) -> Any:
    """Read what `save` wrote, with ``torch.load(weights_only=True)``; see `from_state` for `chart` and `strict`."""
    return _decode(torch.load(file, map_location=map_location, weights_only=True), chart, strict)


def _encode(thing: Any) -> Any:
    if isinstance(thing, (Point, TypedTensor)):
        return to_state(thing)
    if isinstance(thing, Mapping):
        return {key: _encode(value) for key, value in cast("Mapping[Any, Any]", thing).items()}
    if isinstance(thing, (list, tuple)):
        return type(thing)(_encode(value) for value in cast("Sequence[Any]", thing))
    return thing


def _decode(thing: Any, chart: Any, strict: bool) -> Any:
    if isinstance(thing, dict):
        found = cast("dict[Any, Any]", thing)
        if found.get(_MARK) == _VERSION and "kind" in found:
            return from_state(found, chart, strict=strict)
        return {key: _decode(value, chart, strict) for key, value in found.items()}
    if isinstance(thing, (list, tuple)):
        return type(thing)(_decode(value, chart, strict) for value in cast("Sequence[Any]", thing))
    return thing
