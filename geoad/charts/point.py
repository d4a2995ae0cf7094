"""Points of a manifold: a token seen in a chart."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from geoad.charts.batches import blend, first_violation, over_batch, singles
from geoad.charts.chart import Chart, Components, makers
from geoad.charts.relations import flat_reference, path, same_manifold
from geoad.charts.reparametrization import Reparametrization
from geoad.errors import BasePointError, ChartDomainError, ChartMismatchError, GeometryError, VarianceError
from geoad.params import Blocks, equal, first, is_wrapped, map_blocks, register_pytree, sub
from geoad.repr import blocks_summary

if TYPE_CHECKING:
    from geoad.tensors import Vector

__all__ = ["Point", "interpolate", "same_point"]

_Key = tuple[Chart, torch.dtype, torch.device]


class _Token:
    """Which point it is: its coordinates in every chart they were asked for, and the living `Point` objects."""

    __slots__ = ("blocks", "traced", "views")

    def __init__(self) -> None:
        self.blocks: dict[_Key, Blocks] = {}
        #: Inside transforms: where a point was before it crossed a map that cannot be undone.
        self.traced: dict[_Key, Blocks] = {}
        self.views: weakref.WeakValueDictionary[_Key, Point] = weakref.WeakValueDictionary()


class Point:
    """A point of a manifold, seen in a chart. It has coordinates but no algebra; move it with `retract`.

    ``.to(chart)``, ``.to(dtype)``, ``.to(device)`` keep the token, so the results are the same point, and are remembered:
    ``p.to(psi) is p.to(psi)`` and ``p.to(psi).to(theta) is p``. Make one with ``chart.point(x)`` or ``geo.point()``.
    """

    __slots__ = ("__weakref__", "blocks", "chart", "stamp", "token")

    chart: Chart
    blocks: Blocks
    token: _Token
    stamp: int

    __array_ufunc__ = None
    __hash__ = object.__hash__

    def __init__(self, chart: Chart, blocks: Blocks, token: _Token | None = None) -> None:
        put = object.__setattr__
        put(self, "chart", chart)
        put(self, "blocks", blocks)
        put(self, "token", _Token() if token is None else token)
        put(self, "stamp", chart.stamp())
        if not is_wrapped(blocks):
            self.token.blocks[self._key()] = blocks
            self.token.views[self._key()] = self

    def __setattr__(self, name: str, value: object) -> None:
        raise GeometryError(
            f"cannot set '{name}': a Point is frozen, for typed tensors refer to it as their base point. Make a new one "
            "with chart.point(...) or p.retract(v)."
        )

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)

    def _key(self) -> _Key:
        block = first(self.blocks)
        return self.chart, block.dtype, block.device

    # -- what a user sees ----------------------------------------------------------------------------------------------

    @property
    def components(self) -> Components:
        """The coordinates, plain: a tensor for a free chart with one block, otherwise a dict."""
        return self.chart.unpack(self.blocks)

    def ravel(self) -> Tensor:
        """The coordinates as one tensor of shape (*batch, dim), in the order of the chart."""
        return self.chart.layout.ravel(self.blocks)

    @property
    def batch_shape(self) -> torch.Size:
        """The shape of the leading axes: () for a single point."""
        return self.chart.layout.batch_shape(self.blocks)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the (first block of the) coordinates."""
        return first(self.blocks).dtype

    @property
    def device(self) -> torch.device:
        """The device of the (first block of the) coordinates."""
        return first(self.blocks).device

    def __repr__(self) -> str:
        return f"Point('{self.chart.name}', {blocks_summary(self.blocks, self.chart.dim, tuple(self.batch_shape))})"

    def __getitem__(self, index: Any) -> Point:
        """Index into the batch axes."""
        if not self.batch_shape:
            raise VarianceError(
                "cannot index a single point: the axes of a point are its coordinates, and picking some of them depends on "
                "the chart. Use p.components for the plain numbers."
            )
        batch = len(self.batch_shape)
        picked = {name: block[index] for name, block in self.blocks.items()}
        lost = first(self.blocks).ndim - first(picked).ndim
        if lost > batch:
            raise VarianceError(
                f"the index reaches into the coordinates; this batch of points has {batch} batch axes. Use p.components."
            )
        return Point(self.chart, picked)

    # -- seeing it elsewhere ---------------------------------------------------------------------------------------------

    def check_fresh(self) -> None:
        """Raise `BasePointError` if a learnable map has changed since this point was made."""
        if self.stamp != 0 and self.stamp != self.chart.stamp():
            raise BasePointError(
                f"this point was made in chart '{self.chart.name}' before the parameters of its learnable map changed. The "
                "same coordinates now mean another point, so everything taken there is out of date. Keep points in chart "
                f"'{self.chart.reference.name}' across such changes, or make the point anew: geo.point() or chart.point(x)."
            )

    def to(self, target: Any = None, *, dtype: torch.dtype | None = None, device: Any = None) -> Point:
        """The same point in another chart, dtype or device.

        Raises:
            ChartMismatchError: the chart belongs to another manifold.
            ChartDomainError: the point has no coordinates in that chart.
            BasePointError: a learnable map on the way has changed since the point was made.
        """
        if isinstance(target, Chart):
            return self._to_chart(target)
        if isinstance(target, Reparametrization):
            return target(self)
        if isinstance(target, torch.dtype):
            dtype = target
        elif isinstance(target, Tensor):
            dtype, device = target.dtype, target.device
        elif target is not None:
            device = target
        dtype, device = dtype or self.dtype, torch.device(device) if device is not None else self.device
        return self._cast(dtype, device)

    def _cast(self, dtype: torch.dtype, device: torch.device) -> Point:
        if not dtype.is_floating_point:
            raise GeometryError(
                f"coordinates must be floating point numbers, asked for {dtype}. There are no derivatives in integers; use "
                "torch.float32, torch.float64 or torch.bfloat16."
            )
        if dtype == self.dtype and device == self.device:
            return self
        key = (self.chart, dtype, device)
        known = self._recall(key)
        if known is not None:
            return known
        return Point(self.chart, map_blocks(lambda b: b.to(device=device, dtype=dtype), self.blocks), self.token)

    def _recall(self, key: _Key) -> Point | None:
        if is_wrapped(self.blocks):
            traced = self.token.traced.get(key)
            return None if traced is None else Point(key[0], traced, self.token)
        view = self.token.views.get(key)
        if view is None and key in self.token.blocks:
            view = Point(key[0], self.token.blocks[key], self.token)
        if view is None or view.stamp not in (0, view.chart.stamp()) or _lost_gradients(self.blocks, view.blocks):
            return None
        return view

    def _to_chart(self, target: Chart) -> Point:
        if target is self.chart:
            return self
        self.check_fresh()
        point = self
        for phi, along in path(self.chart, target, self):
            point = point._step(phi, along)
        return point

    def _step(self, phi: Reparametrization, along: bool) -> Point:
        chart = phi.target if along else phi.source
        known = self._recall((chart, self.dtype, self.device))
        if known is not None:
            return known
        onward = along or phi.target.parent is None  # back down a tree nothing is left to check
        if onward:
            self._require_domain(phi, along)
        move = phi.map.forward if along else phi.map.invert
        blocks = over_batch(move, len(self.batch_shape), self.blocks)
        if phi.map.law != "diffeomorphism" and is_wrapped(self.blocks):
            self.token.traced[self._key()] = self.blocks
        if onward:
            self._require_in(chart, blocks)
        return Point(chart, blocks, self.token)

    def _require_domain(self, phi: Reparametrization, along: bool = True) -> None:
        if not is_wrapped(self.blocks):
            check, target = (phi.map.outside_domain, phi.target) if along else (phi.map.outside_image, phi.source)
            self._refuse(first_violation(check, self.blocks, self.chart), self.chart, target)

    def _require_in(self, chart: Chart, blocks: Blocks) -> None:
        """Raise if the new coordinates `blocks` lie outside of the domain that `chart` was given."""
        domain = chart.domain
        if domain is not None and not is_wrapped(blocks):
            condition = first_violation(lambda each: domain.violated(chart.unpack(each)), blocks, chart)
            self._refuse(condition, chart, chart)

    def _refuse(self, condition: str | None, where: Chart, target: Chart) -> None:
        if condition is None:
            return
        remedy = "choose another map, or leave these blocks out by name pattern"
        if self.chart.atlas is not None:
            remedy = "ask for a chart that contains it: chart.atlas.charts_at(p)"
        raise ChartDomainError(
            f"the point has no coordinates in chart '{target.name}': {condition} in chart '{where.name}'. Objects cannot be "
            f"moved to a chart at a point outside its domain; stay in '{self.chart.name}', or {remedy}."
        )

    # -- straight lines of the reference chart -----------------------------------------------------------------------------

    def retract(self, v: Vector, t: float | Tensor = 1.0) -> Point:
        """The point p + t v along the straight line of the reference chart, in the chart of p; a batch for several times t.

        The line is the same in every chart, so a step taken with it is invariant. `v` is a `Vector` at this point. In
        redundant coordinates (a `geoad.maps.Submersion`) the result is the point over the line that continues p in its
        fibre; below an immersion the line is that of ``chart.ground``. ``p.retract(v, 0)`` is p.
        """
        if getattr(v, "type", None) != (1, 0):
            raise VarianceError(
                f"a point moves along a vector, found {type(v).__name__}. A differential has no direction until a metric "
                "gives it one: use metric.sharp(covector), or geoad.riemannian_grad(L, metric)(p)."
            )
        if not same_point(self, v.at.to(self.chart)):
            raise BasePointError(
                "the vector lives at another point than the one to be moved. Tangent spaces of different points cannot be "
                "identified without saying how; use v.carry(to=p, chart=...)."
            )
        if isinstance(t, (int, float)) and t == 0:
            return self
        home = straight(self.chart, "p.retract(v)", _CURVE)
        start = self.to(home)
        moved = blend(t, home.layout, start.blocks, lambda s, block, step: block + s * step, v.to(home).blocks)
        return _landed(home, moved).followed_from(self)

    def followed_from(self, start: Point) -> Point:
        """This point in the chart of `start`, a point nearby, whose place in the fibres of redundant coordinates it keeps.

        Where all maps on the way are changes of coordinates this is ``self.to(start.chart)``.
        """
        point = self
        for phi, along in path(self.chart, start.chart):
            if along and phi.map.law == "submersion":
                before = start.to(phi.target).blocks
                point = point._continue(phi, before)
            else:
                point = point._step(phi, along)
        return point

    def _continue(self, phi: Reparametrization, before: Blocks) -> Point:
        """The ψ over this θ that continues the ψ `before`."""
        batch, layout = self.batch_shape, phi.target.layout
        spread = {name: before[name].expand((*batch, *shape)) for name, shape in layout.items()}
        self._require_domain(phi)
        return Point(phi.target, over_batch(phi.map.near, len(batch), self.blocks, spread), self.token)

    def log(self, other: Point) -> Vector:
        """The vector v at p with p.retract(v) = `other`, in the chart of p."""
        home = straight(self.chart, "p.log(q)", _CURVE)
        start, end = self.to(home), other.to(home)
        return makers["vector"](home, sub(end.blocks, start.blocks), at=start).to(self.chart)

    # -- what it refuses ---------------------------------------------------------------------------------------------------

    def _no_algebra(self, *_: object) -> Any:
        raise VarianceError(
            "points have no algebra: the sum of two points, or a point plus a gradient, depends on the chart. Move a point "
            "with p.retract(v, t) along a vector, compare two with p.log(q), mix them with geoad.interpolate(p, q, t)."
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __neg__ = _no_algebra
    __matmul__ = __rmatmul__ = __iadd__ = __isub__ = __pow__ = __abs__ = __float__ = _no_algebra

    def __array__(self, *_: Any, **__: Any) -> Any:
        self._no_algebra()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        raise VarianceError(
            f"torch.{name} does not act on a Point: its result would depend on the chart. Move points with p.retract(v, t); "
            "p.components gives the plain coordinates."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Point:
        """Points are frozen: the point itself."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        views = [(chart, blocks) for (chart, _, _), blocks in self.token.blocks.items()]
        return _restore, (self.chart, self.blocks, views)


def _restore(chart: Chart, blocks: Blocks, views: list[tuple[Chart, Blocks]]) -> Point:
    token = _Token()
    for other, theirs in views:
        token.blocks[(other, first(theirs).dtype, first(theirs).device)] = theirs
    return Point(chart, blocks, token)


def _lost_gradients(here: Blocks, there: Blocks) -> bool:
    """True if `there` was computed from `here` under no_grad or in inference mode, and its gradients are wanted now."""
    if not torch.is_grad_enabled():
        return False
    if any(block.requires_grad for block in here.values()) and not any(block.requires_grad for block in there.values()):
        return True
    return first(there).is_inference() and not first(here).is_inference()


def same_point(p: Point, q: Point) -> bool:
    """True if p and q are the same point of the manifold and the same batch; both must be in the same chart.

    The same token, or (eager mode) coordinates that agree bit for bit.
    """
    if p is q or p.token is q.token:
        return True
    if torch.compiler.is_compiling():
        return False
    return p.chart == q.chart and equal(p.blocks, q.blocks)


def interpolate(p: Point, q: Point, t: float | Tensor) -> Point:
    """The point (1 - t) p + t q on the straight line of the reference chart, in the chart of p; a batch for several times t.

    In redundant coordinates it is the point over that line that continues p in its fibre, also at t = 1.

    >>> import torch, geoad
    >>> xy = geoad.Chart({"x": (2,)}, name="xy")
    >>> p, q = xy.point(torch.zeros(2)), xy.point(torch.ones(2))
    >>> geoad.interpolate(p, q, 0.25).components
    tensor([0.2500, 0.2500])
    """
    home = straight(p.chart, "interpolate(p, q, t)", _CURVE)
    if not same_manifold(p.chart, q.chart):
        raise ChartMismatchError(
            f"the points belong to different manifolds (reference charts '{p.chart.reference.name}' and "
            f"'{q.chart.reference.name}'), so "
            "there is no line between them. Interpolate points of one manifold."
        )
    mixed = blend(t, home.layout, p.to(home).blocks, lambda s, a, b: torch.lerp(a, b, s), q.to(home).blocks)
    return _landed(home, mixed).followed_from(p)


_CURVE = "geoad.geodesic(metric, p, v, t)"


def straight(chart: Chart, what: str, remedy: str) -> Chart:
    """The chart whose straight lines points of `chart` move along, see `Chart.ground`."""
    home = chart.ground
    return flat_reference(home, what, remedy) if home.parent is None else home


def _landed(home: Chart, blocks: Blocks) -> Point:
    """The point where a straight line ends; raises if it has left the domain of the chart."""
    return Point(home, blocks) if home.domain is None else home.point(blocks)


def _make_point(chart: Chart, components: Any) -> Point:
    blocks = chart.pack(components, "a point")
    for name, block in blocks.items():
        if not block.is_floating_point():
            raise GeometryError(
                f"a point needs floating point coordinates, block '{name}' is {block.dtype}. There are no derivatives in "
                "integers; pass x.to(torch.float64)."
            )
    if chart.bounded and not is_wrapped(blocks):
        each = singles(blocks, chart)
        for i, single in enumerate(each):
            chart.check_domain(single, "the point" if len(each) == 1 else f"point {i} of {len(each)}")
    return Point(chart, blocks)


makers["point"] = _make_point

register_pytree(
    Point,
    lambda p: (list(p.blocks.values()), (p.chart, tuple(p.blocks))),
    lambda leaves, context: _unflatten(leaves, *context),
)


def _unflatten(leaves: list[Any], chart: Chart, names: tuple[str, ...]) -> Point:
    blocks = dict(zip(names, leaves, strict=True))
    if all(isinstance(leaf, Tensor) for leaf in leaves):
        return Point(chart, blocks)
    return _placeholder(chart, blocks)


def _placeholder(chart: Chart, blocks: dict[str, Any]) -> Point:
    """A point whose leaves are not tensors: pytree utilities put axis numbers and the like there."""
    point = object.__new__(Point)
    for name, value in (("chart", chart), ("blocks", blocks), ("token", _Token()), ("stamp", 0)):
        object.__setattr__(point, name, value)
    return point
