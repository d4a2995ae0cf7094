"""What all typed objects share: a type, a chart, a base point, frozenness, and the gate for ``torch.*`` functions."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple, NoReturn, Self

import torch
from torch import Tensor

from geoad.charts import Chart, Point, Reparametrization, same_manifold, same_point, why_apart
from geoad.errors import BasePointError, ChartMismatchError, GeometryError, VarianceError
from geoad.tensors.methods import HANDLERS, Methods

__all__ = [
    "HANDLERS",
    "Axis",
    "TensorType",
    "TypedTensor",
    "describe",
    "is_scalar",
    "plain_scalar",
    "require_same_numbers",
    "require_same_place",
]


class TensorType(NamedTuple):
    """(number of upper indices, number of lower indices)."""

    up: int
    down: int


class Axis(NamedTuple):
    """The type of an axis: its chart and variance. ``chart`` None marks a frame axis: orthonormal, self dual, unmoved."""

    chart: Chart | None
    up: bool
    size: int

    def pairs_with(self, other: Axis) -> bool:
        """True if the two axes may be summed over."""
        if self.chart is None or other.chart is None:
            return self.chart is other.chart and self.size == other.size
        return self.up != other.up and self.chart == other.chart

    def dual(self) -> Axis:
        """The axis of the dual space."""
        return Axis(self.chart, not self.up, self.size)

    def __str__(self) -> str:
        if self.chart is None:
            return "F"
        return f"{self.chart.name}{'^' if self.up else '_'}"


class TypedTensor(Methods):
    """A geometric object: numbers that know their tensor type, chart and base point.

    Not a ``torch.Tensor``: it holds plain tensors, and ``__torch_function__`` is a gate that lets through the operations
    that have a typing rule and refuses all others. ``.components`` is the one way out.
    """

    __slots__ = ("__weakref__", "at", "chart")

    chart: Chart
    at: Point

    __array_ufunc__ = None

    def __setattr__(self, name: str, value: object) -> None:
        raise GeometryError(
            f"cannot set '{name}' of a {type(self).__name__}: typed objects are frozen, so that their type stays true of "
            "their numbers. Make a new one, for instance chart.vector(components, at=p)."
        )

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)

    def _put(self, **fields: Any) -> Self:
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        return self

    # -- the type ----------------------------------------------------------------------------------------------------

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The types of the trailing axes; leading axes are batch axes."""
        raise NotImplementedError

    @property
    def type(self) -> TensorType:
        """(upper, lower) indices; frame axes count for neither."""
        typed = [axis for axis in self.axes if axis.chart is not None]
        up = sum(axis.up for axis in typed)
        return TensorType(up, len(typed) - up)

    @property
    def weight(self) -> float:
        """The density weight; 0 except for densities."""
        return 0

    @property
    def batch_shape(self) -> torch.Size:
        """The shape of the leading axes."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the numbers."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """The device of the numbers."""
        raise NotImplementedError

    # -- moving --------------------------------------------------------------------------------------------------------

    def to(self, target: Any = None, *, dtype: torch.dtype | None = None, device: Any = None) -> Self:
        """This object in another chart (by the law of its type), dtype or device."""
        if isinstance(target, Chart):
            return self if target is self.chart else self._to_chart(target)
        if isinstance(target, Reparametrization):
            return target(self)
        if isinstance(target, torch.dtype):
            dtype = target
        elif isinstance(target, Tensor):
            dtype, device = target.dtype, target.device
        elif target is not None:
            device = target
        return self._cast(dtype or self.dtype, torch.device(device) if device is not None else self.device)

    def _to_chart(self, chart: Chart) -> Self:
        raise NotImplementedError

    def _cast(self, dtype: torch.dtype, device: torch.device) -> Self:
        raise NotImplementedError

    def map_numbers(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """The same type with `fn` applied to the stored numbers (a linear function that keeps trailing axes)."""
        raise NotImplementedError

    def at_point(self, at: Point) -> Self:
        """The same numbers at another base point (an element of the batch of points)."""
        return copy_with(self, at=at)

    def detach(self) -> Self:
        """Cut from the autograd graph."""
        return self.map_numbers(torch.detach)

    def clone(self) -> Self:
        """A copy of the numbers."""
        return self.map_numbers(torch.clone)

    # -- algebra (the rules are in geoad.tensors.algebra, which registers itself) ---------------------------------------

    def __add__(self, other: Any) -> Any:
        return HANDLERS["add"](self, other)

    def __radd__(self, other: Any) -> Any:
        return HANDLERS["add"](other, self)

    def __sub__(self, other: Any) -> Any:
        return HANDLERS["sub"](self, other)

    def __rsub__(self, other: Any) -> Any:
        return HANDLERS["sub"](other, self)

    def __mul__(self, other: Any) -> Any:
        return HANDLERS["mul"](self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return HANDLERS["div"](self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return HANDLERS["div"](other, self)

    def __neg__(self) -> Self:
        return HANDLERS["mul"](self, -1.0)

    def __pos__(self) -> Self:
        return self

    def __matmul__(self, other: Any) -> Any:
        return HANDLERS["matmul"](self, other)

    def __rmatmul__(self, other: Any) -> Any:
        return HANDLERS["matmul"](other, self)

    def __pow__(self, exponent: Any) -> Any:
        return HANDLERS["pow"](self, exponent)

    def __abs__(self) -> Any:
        return HANDLERS["abs"](self)

    def __getitem__(self, index: Any) -> Self:
        """Index into the batch axes."""
        return HANDLERS["getitem"](self, index)

    def __len__(self) -> int:
        if not self.batch_shape:
            raise VarianceError(
                f"a single {type(self).__name__} has no length: its axes are typed, not batch axes. Use .chart.dim for the "
                "number of components."
            )
        return self.batch_shape[0]

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))

    def __bool__(self) -> NoReturn:
        raise VarianceError(
            f"the truth value of a {describe(self)} has no meaning in all charts at once. Compare invariants (norms, "
            "pairings), "
            "or numbers from .components."
        )

    def __float__(self) -> float:
        raise VarianceError(
            f"a {describe(self)} is not a number. Contract it to a scalar first (w(v), G(u, v), E.trace()), or take "
            ".components."
        )

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        raise VarianceError(
            f"a {describe(self)} does not turn into a numpy array by itself, for its type would be lost in silence. Use "
            ".components (or .ravel(), .to_dense()) and convert that."
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = HANDLERS.get(func)
        if handler is not None:
            return handler(*args, **(kwargs or {}))
        return HANDLERS["refuse"](func, args)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.clone()


def copy_with(tensor: Any, **fields: Any) -> Any:
    """A shallow copy with some fields replaced."""
    twin = object.__new__(type(tensor))
    names = [name for cls in type(tensor).__mro__ for name in getattr(cls, "__slots__", ()) if name != "__weakref__"]
    return twin._put(**{name: getattr(tensor, name) for name in names} | fields)


def describe(thing: Any) -> str:
    """'Covector in chart "psi"', for messages."""
    if isinstance(thing, TypedTensor):
        weight = f" of weight {thing.weight:g}" if thing.weight else ""
        return f"{type(thing).__name__}{weight} in chart '{thing.chart.name}'"
    if isinstance(thing, Point):
        return f"Point in chart '{thing.chart.name}'"
    if isinstance(thing, Tensor):
        return f"plain tensor of shape {tuple(thing.shape)}"
    if type(thing).__module__ == "numpy":
        return f"numpy {type(thing).__name__}"
    return type(thing).__name__


def is_scalar(thing: Any) -> bool:
    """True for numbers and 0-dimensional plain tensors."""
    if type(thing) is float or type(thing) is int:
        return True
    if isinstance(thing, Tensor):
        return thing.ndim == 0 and thing.dtype != torch.bool and not thing.is_complex()
    return thing is not True and thing is not False and isinstance(thing, Real)


def plain_scalar(thing: Any) -> Any:
    """A scalar as PyTorch likes it: numpy scalars as Python numbers."""
    return thing if isinstance(thing, (float, int, Tensor)) and type(thing).__module__ != "numpy" else float(thing)


def require_same_place(a: TypedTensor, b: TypedTensor, operation: str) -> None:
    """Raise unless both objects are written in the same chart and live at the same point."""
    if a.at is b.at:
        return
    if a.chart != b.chart:
        remedy = (
            f"Move one of them first: T.to(chart), for instance second.to(first.chart) to get both into '{a.chart.name}'."
            if same_manifold(a.chart, b.chart)
            else why_apart(a.chart, b.chart)
        )
        twins = " (two charts of the same name)" if a.chart.name == b.chart.name else ""
        raise ChartMismatchError(
            f"cannot {operation}: {describe(a)} and {describe(b)}{twins}. Components in different charts are different numbers "
            f"for the same object. {remedy}"
        )
    if not same_point(a.at, b.at):
        raise BasePointError(
            f"cannot {operation}: {describe(a)} and {describe(b)} live at different points. Tangent spaces at different points "
            "are different spaces, and to identify them is a choice that depends on a chart or a connection. Say which: "
            "T.carry(to=p, chart=reference) keeps the components of that chart, geoad.parallel_transport uses a metric."
        )


def require_same_numbers(a: TypedTensor, b: TypedTensor, operation: str, error: Exception) -> None:
    """Raise a clear error if dtypes or devices explain why `operation` failed with `error`."""
    if a.device != b.device:
        found, remedy = f"{a.device} and {b.device}", f"T.to('{a.device}')"
    elif a.dtype != b.dtype:
        found, remedy = f"{a.dtype} and {b.dtype}", f"T.to({a.dtype})"
    else:
        return
    raise GeometryError(
        f"cannot {operation}: {describe(a)} and {describe(b)} hold numbers of {found}, and torch says: {error}. Convert one of "
        f"them, for instance {remedy} for the second."
    ) from error
