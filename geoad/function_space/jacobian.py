"""The Jacobian of a network over a data set: a two-point tensor J[f^, θ_] by its products."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch
from torch import Tensor

from geoad import transport
from geoad.charts import Chart, Point, same_manifold
from geoad.errors import ChartMismatchError, GeometryError, VarianceError
from geoad.fields import FormField
from geoad.function_space.derivative import Derivative
from geoad.function_space.forms import Pulled, Pushed
from geoad.operators import LinearOperator
from geoad.params import first
from geoad.tensors import Axis, Cometric, Covector, Form, GeoTensor, Metric, Vector, describe
from geoad.tensors.base import require_same_place
from geoad.tensors.rank1 import Rank1

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Jacobian"]


class Jacobian(GeoTensor):
    r"""The Jacobian :math:`J^a{}_i = \partial f^a / \partial\theta^i` at a point p, of type [outputs^, θ_], matrix-free.

    It pushes vectors forward, pulls covectors and forms back, and stands in every contraction of the typing table
    (``torch.einsum``, ``J.mT @ A @ J``), where its matrix is made. ``J @ v``, ``w @ J``, ``J.mT @ w`` and ``v @ J.mT`` are
    products by derivatives of the network; what they share is kept from the second one on.

    ``J.to(chart)`` moves the lower axis to another chart of the network, or the upper one to another chart of the outputs (for
    instance from logits to their differences): f(p) is known, so both have a law.

    Attributes:
        image: the point f(p), in the chart of the outputs.
        space: the chart of the upper axis.

    Made by `FunctionSpace.jacobian`. With N·c outputs and d parameters its matrix, ``J.to_dense()``, is (N·c, d), the last axis
    of the outputs fastest.

    Raises:
        VarianceError: a covector is pushed, a vector pulled; the message says what goes where.
        ChartMismatchError: the argument belongs to another network, or to other data.
        BasePointError: it lives at another point than p, or f(p).

    >>> import torch, geoad
    >>> geo = geoad.GeoModule(torch.nn.Linear(2, 3).double())
    >>> space, p = geoad.FunctionSpace(geo, torch.randn(5, 2, dtype=torch.float64)), geo.point()
    >>> J = space.jacobian(p)
    >>> v = geo.reference.vector(geo.reference.layout.unravel(torch.randn(9).double()), at=p)
    >>> w = space.chart.covector(torch.randn(5, 3).double(), at=J.image)
    >>> torch.allclose(w(J @ v), (w @ J)(v)), torch.allclose((J @ v).ravel(), J.to_dense() @ v.ravel())
    (True, True)
    """

    __slots__ = ("_dense", "_derivative", "_home", "_start", "_turned", "image")

    image: Point
    _derivative: Derivative
    _home: Point
    _start: Point
    _turned: bool
    _dense: list[Tensor]

    def __init__(self, derivative: Derivative, at: Point, home: Point, image: Point) -> None:
        # home, start: the two base points where the derivative computes; at, image: where it is looked at
        self._put(
            chart=at.chart, at=at, image=image, _derivative=derivative, _home=home, _start=image, _turned=False, _dense=[]
        )

    def _like(self, **fields: Any) -> Self:
        twin = object.__new__(type(self))
        names = ("chart", "at", *Jacobian.__slots__)
        return twin._put(**{name: getattr(self, name) for name in names} | fields)

    # -- the type ------------------------------------------------------------------------------------------------------------

    @property
    def space(self) -> Chart:
        """The chart of the outputs."""
        return self.image.chart

    @property
    def axes(self) -> tuple[Axis, ...]:
        pair = (Axis(self.space, True, self.space.dim), Axis(self.chart, False, self.chart.dim))
        return pair[::-1] if self._turned else pair

    @property
    def _axes(self) -> tuple[Axis, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.axes

    @property
    def batch_shape(self) -> torch.Size:
        return torch.Size()

    @property
    def dtype(self) -> torch.dtype:
        return first(self.at.blocks).dtype

    @property
    def device(self) -> torch.device:
        return first(self.at.blocks).device

    @property
    def data(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The matrix (n·c, d) in these charts, transposed for a transposed Jacobian; computed once."""
        if not self._dense:
            matrix = self._derivative.dense()
            matrix = transport.dense(matrix, [None, False], self._home, self.chart, checked=True)
            self._dense.append(transport.dense(matrix, [True, None], self._start, self.space, checked=True))
        return self._dense[0].mT if self._turned else self._dense[0]

    @property
    def mT(self) -> Self:
        """The transpose, of type [θ_, outputs^]: ``J.mT @ w`` is the pull-back of a covector."""
        return self._like(_turned=not self._turned)

    T = mT

    def __repr__(self) -> str:
        a, b = self.axes
        dtype = str(self.dtype).removeprefix("torch.")
        return f"Jacobian([{a}, {b}], ({a.size}, {b.size}), {dtype}, {self.device})"

    # -- moving --------------------------------------------------------------------------------------------------------------

    def _to_chart(self, chart: Chart) -> Self:
        self.at.check_fresh()
        if same_manifold(self.chart, chart):
            transport.require_law(self.chart, chart, 0, 1, describe(self))
            return self._like(chart=chart, at=self.at.to(chart), _dense=[])
        if same_manifold(self.space, chart):
            transport.require_law(self.space, chart, 1, 0, describe(self))
            return self._like(image=self.image.to(chart), _dense=[])
        raise ChartMismatchError(
            f"cannot move {describe(self)} to chart '{chart.name}', which belongs neither to the manifold of the network nor "
            f"to that of its outputs, '{self.space.name}'. Use a chart made from one of them by reparametrize."
        )

    def _cast(self, dtype: torch.dtype, device: torch.device) -> Any:
        if dtype == self.dtype and device == self.device:
            return self
        raise GeometryError(
            f"a matrix-free {describe(self)} is computed by the network, which is {self.dtype} on {self.device}. Convert the "
            f"network, geo.to({dtype}), or the matrix: J.materialise().to({dtype})."
        )

    def map_numbers(self, fn: Callable[[Tensor], Tensor]) -> Any:
        return self.materialise().map_numbers(fn)

    def carry(self, *, to: Point, chart: Chart) -> NoReturn:
        """Refused: the Jacobian at another point is another one."""
        raise GeometryError(
            f"{describe(self)} is the derivative at its point; at another one it is space.jacobian(q). To keep the components, "
            "carry its matrix: J.materialise().carry(to=q, chart=chart)."
        )

    def materialise(self) -> GeoTensor:
        """The same tensor with its matrix stored."""
        return GeoTensor(self.data, self.axes, self.at)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # it holds no numbers of its own

    def __reduce__(self) -> tuple[Any, ...]:
        return GeoTensor, (self.data, self.axes, self.at)

    # -- products ------------------------------------------------------------------------------------------------------------

    def applied(self, argument: Rank1) -> Any:
        if argument.up != self._turned:
            where = self.image if self._turned else self.at
            here = Vector(where.chart, where.blocks, where)
            require_same_place(here, argument, "contract")
            return self.pullback(argument) if self._turned else self.pushforward(argument)
        index = self.axes[1]
        raise VarianceError(
            f"cannot contract the second index of {describe(self)} ({index}) with {describe(argument)}: it takes a "
            f"{'Covector' if index.up else 'Vector'} there. Vectors are pushed forward, J @ v; covectors are pulled back, "
            "w @ J or J.mT @ w; for anything else insert a metric."
        )

    def __matmul__(self, other: Any) -> Any:
        return self.applied(other) if isinstance(other, Rank1) else super().__matmul__(other)

    def pushforward(self, tensor: Any) -> Any:
        """J v for a `Vector` at p, J C Jᵀ for a `Cometric`: a tensor of the same type at f(p).

        The cometric C = G⁻¹ of a metric gives J G⁻¹ Jᵀ, the tangent kernel with respect to G; matrix-free, in the structure of
        layers where its matrix is made and C is a multiple of the identity. Vectors may have batch axes.

        Raises:
            VarianceError: neither a vector nor a cometric.
            BasePointError: it lives at another point than p.
            GeometryError: a batch of cometrics.
        """
        if isinstance(tensor, Vector):
            v = self._at_home(tensor, self.at, self._home)
            pushed = self._derivative.push(v.blocks)
            return Vector(self._start.chart, {self._start.chart.layout.names[0]: pushed}, self._start).to(self.space)
        if isinstance(tensor, Cometric):
            inner = _single(self._at_home(tensor, self.at, self._home))
            start = self._start
            return Cometric(start.chart, Pushed(self._derivative, inner, start.chart.layout, start.blocks), start).to(
                self.space
            )
        raise VarianceError(
            f"a map pushes vectors and cometrics forward, found {describe(tensor)}. Covectors and forms are pulled back, "
            "J.pullback(T); of a metric G push the inverse: J.pushforward(G.inverse())."
        )

    def pullback(self, tensor: Any) -> Any:
        """Jᵀ w for a `Covector` at f(p), Jᵀ A J for a `Form` or `Metric` there: a tensor of the same type at p.

        A field on the outputs stands for its value at f(p). The Fisher metric of a likelihood, `FunctionSpace.metric`, gives
        the Fisher metric of the network. Covectors may have batch axes.

        Raises:
            VarianceError: neither a covector nor a form.
            BasePointError: it lives at another point than f(p).
            GeometryError: a batch of forms.
        """
        if isinstance(tensor, FormField):
            return self.pullback(tensor(self.image))
        if isinstance(tensor, Covector):
            w = self._at_home(tensor, self.image, self._start)
            (name,) = w.blocks
            return Covector(self._home.chart, self._derivative.pull(w.blocks[name]), self._home).to(self.chart)
        if isinstance(tensor, Form):
            inner = _single(self._at_home(tensor, self.image, self._start))
            home, cls = self._home, Metric if isinstance(tensor, Metric) else Form
            return cls(self.chart, Pulled(self._derivative, inner), self.at, home=home.chart)
        raise VarianceError(
            f"only covectors, forms and metrics are pulled back, found {describe(tensor)}. Vectors and cometrics are pushed "
            "forward: J.pushforward(T)."
        )

    def _at_home(self, tensor: Any, here: Point, home: Point) -> Any:
        """The argument where the derivative computes; it must live at `here`, in any chart of that manifold."""
        if not same_manifold(tensor.chart, here.chart):
            require_same_place(tensor, Vector(here.chart, here.blocks, here), "move along a map")
        moved = tensor.to(here.chart)
        require_same_place(moved, Vector(here.chart, here.blocks, here), "move along a map")
        return moved.to(home.chart)


def _single(tensor: Any) -> LinearOperator:
    """The operator of one form or cometric."""
    if tensor.batch_shape:
        raise GeometryError(
            f"{describe(tensor)} is a batch, {tuple(tensor.batch_shape)}; what a Jacobian makes of it is matrix-free, one at "
            "a time. Go through them: [J.pullback(B) for B in forms]; or contract the matrices, J.mT @ B @ J."
        )
    return tensor.operator
