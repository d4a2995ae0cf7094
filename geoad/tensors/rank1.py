"""Vectors and covectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from geoad import transport
from geoad.charts import Chart, Components, Point, makers, same_manifold
from geoad.errors import BasePointError, ChartMismatchError, VarianceError
from geoad.params import Blocks, first, insert_axes, is_wrapped, map_blocks, register_pytree
from geoad.repr import blocks_summary
from geoad.tensors.base import HANDLERS, Axis, TypedTensor

__all__ = ["Covector", "Rank1", "Vector", "align", "require_at"]


class Rank1(TypedTensor):
    """What vectors and covectors share: one typed axis, stored as a dict of blocks."""

    __slots__ = ("blocks",)

    up: ClassVar[bool]
    blocks: Blocks

    def __init__(self, chart: Chart, blocks: Blocks, at: Point) -> None:
        put = object.__setattr__
        put(self, "chart", chart)
        put(self, "blocks", blocks)
        put(self, "at", at)

    @property
    def axes(self) -> tuple[Axis, ...]:
        return (Axis(self.chart, self.up, self.chart.dim),)

    @property
    def batch_shape(self) -> torch.Size:
        return self.chart.layout.batch_shape(self.blocks)

    @property
    def dtype(self) -> torch.dtype:
        return first(self.blocks).dtype

    @property
    def device(self) -> torch.device:
        return first(self.blocks).device

    @property
    def components(self) -> Components:
        """The plain components in the chart: a tensor for a free chart with one block, otherwise a dict."""
        return self.chart.unpack(self.blocks)

    def ravel(self) -> Tensor:
        """The components as one tensor of shape (*batch, dim), in the order of the chart."""
        return self.chart.layout.ravel(self.blocks)

    to_dense = ravel

    def __repr__(self) -> str:
        summary = blocks_summary(self.blocks, self.chart.dim, tuple(self.batch_shape))
        return f"{type(self).__name__}('{self.chart.name}', {summary})"

    def _to_chart(self, chart: Chart) -> Self:
        self.at.check_fresh()
        move = transport.vector if self.up else transport.covector
        return type(self)(chart, move(self.blocks, self.at, chart, checked=True), self.at.to(chart))

    def _cast(self, dtype: torch.dtype, device: torch.device) -> Self:
        blocks = map_blocks(lambda b: b.to(device=device, dtype=dtype), self.blocks)
        return type(self)(self.chart, blocks, self.at.to(dtype=dtype, device=device))

    def map_numbers(self, fn: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(self.chart, map_blocks(fn, self.blocks), self.at)

    def carry(self, *, to: Point, chart: Chart) -> Self:
        """The object at point `to` with the same components *in `chart`* (say which: another chart gives another object).

        With the reference chart this is parallel transport along any path by its flat connection. Running averages and
        momentum that go from one point to the next mean this, silently; here it is said.
        """
        here = self.to(chart)
        return type(self)(chart, here.blocks, to.to(chart)).to(to.chart)

    def __call__(self, other: Rank1) -> Tensor:
        """The pairing ω(v) = ω_i v^i, a plain scalar (or one for each element of the batch)."""
        if not isinstance(other, Rank1) or other.up == self.up:  # pyright: ignore[reportUnnecessaryIsInstance]
            partner = "a Vector" if not self.up else "a Covector"
            raise VarianceError(
                f"a {type(self).__name__} acts on {partner}, found {type(other).__name__}. The pairing of two objects of the "
                "same variance depends on the chart. Insert a metric: G(u, v) for vectors, G.inverse()(a, b) for covectors, "
                "or G.sharp / G.flat one of them."
            )
        return HANDLERS["pair"](self, other)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.chart, self.blocks, self.at)


class Vector(Rank1):
    """A tangent vector: a velocity, a step, a Riemannian gradient. Type (1,0); moves by J v.

    >>> import torch, geoad
    >>> x = geoad.Chart({"x": (2,)}, name="x")
    >>> p = x.point(torch.tensor([1.0, 2.0]))
    >>> v = x.vector(torch.tensor([1.0, 0.0]), at=p)
    >>> v.to(x.reparametrize(geoad.maps.Scale(3.0)).target).components
    tensor([3., 0.])
    """

    __slots__ = ()
    up = True


class Covector(Rank1):
    """A covector: the differential of a function. Type (0,1); moves by J⁻ᵀ ω.

    >>> import torch, geoad
    >>> x = geoad.Chart({"x": (2,)}, name="x")
    >>> p = x.point(torch.tensor([1.0, 2.0]))
    >>> w = x.covector(torch.tensor([6.0, 0.0]), at=p)
    >>> w.to(x.reparametrize(geoad.maps.Scale(3.0)).target).components
    tensor([2., 0.])
    """

    __slots__ = ()
    up = False


def require_at(chart: Chart, at: Any, what: str) -> Point:
    """The base point in `chart`, or an error if none was given."""
    if not isinstance(at, Point):
        raise BasePointError(
            f"{what} needs its base point: at= must be a Point, found {type(at).__name__}. Without it the object cannot "
            "be moved, "
            "for the Jacobian of a change of chart is taken there. Pass at=chart.point(x) or at=geo.point()."
        )
    if not same_manifold(at.chart, chart):
        raise ChartMismatchError(
            f"{what} in chart '{chart.name}' was given a base point in chart '{at.chart.name}' of another manifold. Make the "
            "point in the chart of the object, or in one related to it by reparametrize."
        )
    return at.to(chart)


def _maker(cls: type[Rank1]) -> Callable[..., Rank1]:
    def make(chart: Chart, components: Any, *, at: Any) -> Rank1:
        if isinstance(components, TypedTensor):
            raise VarianceError(
                f"{cls.__name__} components must be plain numbers, found a {type(components).__name__}. To reinterpret the "
                "numbers pass T.components; to convert use metric.sharp(covector) or metric.flat(vector)."
            )
        what = f"a {cls.__name__}"
        blocks, base = chart.pack(components, what), require_at(chart, at, what)
        if base.batch_shape:
            blocks = _over_points(chart, blocks, base, what)
        return cls(chart, blocks, base)

    return make


def _over_points(chart: Chart, blocks: Blocks, at: Point, what: str) -> Blocks:
    """The batch axes of the point come first; one object without any is the same at all of them."""
    points, batch = at.batch_shape, chart.layout.batch_shape(blocks)
    if not batch:
        return {name: block.expand((*points, *block.shape)) for name, block in blocks.items()}
    if batch[: len(points)] != points:
        raise BasePointError(
            f"{what} of batch shape {tuple(batch)} was given base points of batch shape {tuple(points)}: it is not clear "
            "which object "
            "lives at which point. The batch axes of the points come first, further ones behind; reshape the components, "
            "or pass a "
            "single point."
        )
    return blocks


def align(a: Rank1, b: Rank1) -> tuple[Blocks, Blocks]:
    """Blocks whose batch axes broadcast: those of the base point in front, further ones as in torch."""
    x, y = a.blocks, b.blocks
    name = a.chart.layout.names[0]
    missing = x[name].ndim - y[name].ndim
    if missing and (points := len(a.at.batch_shape)):
        x = map_blocks(lambda block: insert_axes(block, points, -missing), x)
        y = map_blocks(lambda block: insert_axes(block, points, missing), y)
    return x, y


def _flatten(tensor: Rank1) -> tuple[list[Any], Any]:
    """The base point travels as a leaf where it is itself batched or traced, else as static context."""
    leaves: list[Any] = list(tensor.blocks.values())
    names = tuple(tensor.blocks)
    if is_wrapped(tensor.at.blocks) or tensor.at.batch_shape:
        return [leaves, tensor.at], (tensor.chart, names, None)
    return [leaves], (tensor.chart, names, tensor.at)


def _unflatten(cls: type[Rank1]) -> Callable[[Any, Any], Rank1]:
    def build(children: list[Any], context: Any) -> Rank1:
        chart, names, at = context
        return cls(chart, dict(zip(names, children[0], strict=True)), at if at is not None else children[1])

    return build


for _cls in (Vector, Covector):
    makers[_cls.__name__.lower()] = _maker(_cls)
    register_pytree(_cls, _flatten, _unflatten(_cls))
