"""Derivatives of maps into a space: jacobian, jvp, vjp, pushforward, pullback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from geoad import operators as ops
from geoad.autodiff.inputs import as_point, output_space, plain_chart, plain_home
from geoad.charts import Chart, Point, Reparametrization, same_manifold
from geoad.errors import BasePointError, ChartMismatchError, GeometryError, VarianceError
from geoad.fields.metric import FormField
from geoad.fields.scalar import ScalarField
from geoad.kernels import products
from geoad.kernels.ladder import visit
from geoad.metrics import Pullback
from geoad.params import Blocks
from geoad.tensors import Axis, Covector, Form, GeoTensor, Metric, Vector, describe
from geoad.tensors.base import TypedTensor, require_same_place
from geoad.tensors.rank2 import Rank2

__all__ = ["jacfwd", "jacobian", "jacrev", "jvp", "pullback", "pushforward", "vjp"]


class _Map:
    """A map from a manifold to a space, as a function of plain blocks of ``home``, at a point."""

    def __init__(self, fn: Any, p: Point, space: Chart | None = None, owner: Any = None) -> None:
        self.fn = fn
        self.owner = fn if owner is None else owner  # whose output space it is
        self.p = p
        if isinstance(fn, Reparametrization):
            if not same_manifold(p.chart, fn.source):
                raise ChartMismatchError(f"the map starts in chart '{fn.source.name}', the point is in chart '{p.chart.name}'.")
            fn.require_derivative("a derivative")
            self.home, self.space = fn.source, fn.target
        else:
            self.home, self.space = plain_home(p), space
        self.here = p.to(self.home)

    def __call__(self, x: Blocks) -> Tensor:
        """The raveled value; remembers the space it lies in."""
        visit(self.owner)
        if isinstance(self.fn, Reparametrization):
            return self.fn.target.layout.ravel(self.fn.map.forward(x))
        value = self.fn(self.home.unpack(x))
        if isinstance(value, Tensor):
            if self.space is None:
                self.space = output_space(self.owner, value.shape)
        elif isinstance(value, dict):
            if self.space is None:
                self.space = plain_chart(value)
        else:
            raise GeometryError(
                f"the map must return a tensor or a dict of tensors, found {type(value).__name__}. A function with "
                "typed results is a "
                "tensor field: use geoad.covariant_derivative(T, metric), for the plain derivative of components is "
                "not a tensor."
            )
        return self.space.layout.ravel(self.space.pack(value, "the value of the map"))

    def target(self) -> Chart:
        """The space of the values."""
        if self.space is None:
            with torch.no_grad():
                self(self.here.blocks)
        assert self.space is not None
        return self.space


def jacobian(
    fn: Any,
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    *,
    space: Chart | None = None,
    mode: str | None = None,
    chunk_size: int | None = 64,
) -> Callable[..., Any]:
    r"""The Jacobian :math:`\partial f^a/\partial\theta^i` of a map into a space, a two-point tensor of type [out^, θ_].

    Args:
        fn: a function of the plain components in the reference chart with values in a tensor (or dict of tensors), or a
            `Reparametrization` φ, whose Jacobian is of type [ψ^, θ_].
        argnums: which argument of `fn` is differentiated; several for a tuple of them, as in ``torch.func.jacrev``.
        has_aux: `fn` returns (value, aux); the result is then (Jacobian, aux).
        space: the chart of the output space. Default: one that belongs to `fn`.
        mode: "reverse" or "forward"; default: by the smaller of the two dimensions.
        chunk_size: how many rows or columns are computed at a time (bounds the memory); None for all.

    Returns:
        A function of the arguments of `fn`: a point (in any chart) or plain numbers for those differentiated, the others as
        they are.

    >>> import torch, geoad
    >>> geoad.jacobian(lambda x: torch.stack([x.sum(), x.prod()]))(torch.tensor([2.0, 3.0])).components
    tensor([[1., 1.],
            [3., 2.]])
    """
    if isinstance(fn, ScalarField):
        raise VarianceError("the Jacobian of a scalar field is its differential, a Covector. Use geoad.grad(L)(p).")

    chosen = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    def at(*args: Any, **kwargs: Any) -> Any:
        if isinstance(fn, Reparametrization):
            point = as_point(*args)
            return _two_point(_Map(fn, point), point, mode, chunk_size)
        indices = [index % len(args) for index in chosen]
        points = {index: as_point(args[index]) for index in indices}
        plain = [points[i].to(plain_home(points[i])).components if i in points else each for i, each in enumerate(args)]

        def of(index: int) -> GeoTensor:
            def alone(components: Any) -> Any:
                value = fn(*plain[:index], components, *plain[index + 1 :], **kwargs)
                return value[0] if has_aux else value

            return _two_point(_Map(alone, points[index], space, owner=fn), points[index], mode, chunk_size)

        result = of(indices[0]) if isinstance(argnums, int) else tuple(of(index) for index in indices)
        return (result, fn(*plain, **kwargs)[1]) if has_aux else result

    return at


def _two_point(mapping: _Map, point: Point, mode: str | None, chunk_size: int | None) -> GeoTensor:
    """The Jacobian of the map, its lower axis in the chart of the point (of the source, for a change of chart)."""
    target, home = mapping.target(), mapping.home
    layout = home.layout

    def raveled(vector: Tensor) -> Tensor:
        return mapping(layout.unravel(vector))

    reverse = mode == "reverse" or (mode is None and target.dim <= layout.dim)
    x = layout.ravel(mapping.here.blocks)
    data = (_reverse_rows if reverse else _forward_columns)(raveled, x, chunk_size)
    axes = [Axis(target, True, target.dim), Axis(home, False, home.dim)]
    result = GeoTensor(data, axes, mapping.here)
    if isinstance(mapping.fn, Reparametrization) or point.chart == home:
        return result
    return result.to(point.chart)


def _forward_columns(fn: Callable[[Tensor], Tensor], x: Tensor, chunk_size: int | None) -> Tensor:
    eye = torch.eye(x.numel(), dtype=x.dtype, device=x.device)

    columns: Tensor = products.mapped(lambda v: products.jvp(fn, x, v)[1], eye, chunk_size)
    return columns.mT


def _reverse_rows(fn: Callable[[Tensor], Tensor], x: Tensor, chunk_size: int | None) -> Tensor:
    value, pull = products.vjp(fn, x)
    return products.mapped(pull, torch.eye(value.numel(), dtype=value.dtype, device=value.device), chunk_size)


def jacrev(fn: Any, argnums: int | tuple[int, ...] = 0, has_aux: bool = False, **options: Any) -> Callable[..., Any]:
    """`jacobian` by reverse mode."""
    return jacobian(fn, argnums, has_aux, mode="reverse", **options)


def jacfwd(fn: Any, argnums: int | tuple[int, ...] = 0, has_aux: bool = False, **options: Any) -> Callable[..., Any]:
    """`jacobian` by forward mode."""
    return jacobian(fn, argnums, has_aux, mode="forward", **options)


def jvp(fn: Any, primals: tuple[Any, ...], tangents: tuple[Any, ...], *, has_aux: bool = False) -> tuple[Any, ...]:
    """(f(p), Df(p) v): drop-in for ``torch.func.jvp`` with Points for primals and Vectors for tangents.

    Plain primals take plain tangents. The results are what `fn` returns: plain tensors. For a `ScalarField` they are the value
    and the derivative in the direction v, both invariant. For a typed result use `pushforward`. With ``has_aux`` the result is
    (f(p), Df(p) v, aux).
    """
    if not isinstance(primals, (tuple, list)) or not isinstance(tangents, (tuple, list)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise GeometryError(
            f"jvp takes tuples of primals and of tangents, as torch.func.jvp does; found {type(primals).__name__} and "
            f"{type(tangents).__name__}. Write geoad.jvp(f, (p,), (v,))."
        )
    if len(primals) != len(tangents):
        raise GeometryError(f"jvp needs one tangent for each primal, got {len(primals)} and {len(tangents)}.")
    if isinstance(fn, ScalarField):
        p = as_point(primals[0])
        field = fn.local(p)
        v = _tangent(p, tangents[0]).to(field.home)

        def plain(x: Blocks) -> Tensor:
            return torch.stack([coefficient * part(x) for coefficient, part in field.parts()]).sum()

        return products.jvp(plain, p.to(field.home).blocks, v.blocks)
    points = [as_point(x) for x in primals]
    homes = [plain_home(p) for p in points]
    x = tuple(p.to(home).components for p, home in zip(points, homes, strict=True))
    v = tuple(_tangent(p, t).to(home).components for p, t, home in zip(points, tangents, homes, strict=True))
    return products.jvp(lambda args: fn(*args), x, v, has_aux)


def _tangent(p: Point, v: Any) -> Vector:
    if isinstance(v, Vector):
        moved = v.to(p.chart)
        if moved.at is not p and moved.at.token is not p.token:
            require_same_place(p.chart.vector(moved.blocks, at=p), moved, "take a directional derivative")
        return moved
    if isinstance(v, TypedTensor):
        raise VarianceError(
            f"a directional derivative goes along a Vector, found {describe(v)}. A differential has no direction until "
            "a metric gives it "
            "one: metric.sharp(covector)."
        )
    return p.chart.vector(v, at=p)


def vjp(fn: Any, *primals: Any, has_aux: bool = False) -> Any:
    """(f(p), pull) with pull(u) the covector uᵀ Df(p): drop-in for ``torch.func.vjp`` with Points for primals.

    `pull` takes plain cotangents in the shape of the output and returns one `Covector` for each primal (a bare one for a single
    primal), in the chart of that primal. With ``has_aux`` the result is (f(p), pull, aux).
    """
    points = [as_point(x) for x in primals]
    if isinstance(fn, ScalarField):
        field = fn.local(points[0])
        homes, fn = [field.home], field.function(field.home)
    else:
        homes = [plain_home(p) for p in points]
    x = tuple(p.to(home).components for p, home in zip(points, homes, strict=True))
    value, pull_plain, *aux = products.vjp(lambda args: fn(*args), x, has_aux)

    def pull(*cotangents: Any) -> Any:
        slopes = pull_plain(cotangents[0] if len(cotangents) == 1 else cotangents)
        typed = tuple(
            Covector(home, home.pack(slope), p.to(home)).to(p.chart)
            for slope, p, home in zip(slopes, points, homes, strict=True)
        )
        return typed[0] if len(typed) == 1 else typed

    return (value, pull, *aux)


def pushforward(fn: Any, v: Vector, *, space: Chart | None = None) -> Any:
    """Df(p) v, where p is the base point of v: a `Vector` of the output space at f(p); matrix-free (one jvp)."""
    if not isinstance(v, Vector):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise VarianceError(
            f"a map pushes vectors forward, found {describe(v)}. Covectors and forms are pulled back: geoad.pullback(f, "
            "T). To make a "
            "vector of a covector use metric.sharp."
        )
    mapping = _Map(fn, v.at, space)
    value, velocity = products.jvp(mapping, mapping.here.blocks, v.to(mapping.home).blocks)
    target = mapping.target()
    point = mapping.here.to(target) if isinstance(fn, Reparametrization) else target.point(target.layout.unravel(value))
    return Vector(target, target.layout.unravel(velocity), point)


def pullback(fn: Any, tensor: Any, *, at: Point | None = None) -> Any:
    """The pull-back of a (0,k) object or field by a map.

    * a `MetricField` (or form field) on the output space gives the field JᵀGJ, see `geoad.metrics.Pullback`;
    * a `ScalarField` on the output space gives the scalar field h∘f;
    * a `Covector`, `Form` or `Metric` at the point f(p) gives Jᵀω or JᵀBJ at p = `at` (with a `Reparametrization` it is known).
    """
    if isinstance(tensor, FormField):
        return Pullback(fn, tensor, plain_home(at) if at is not None else None)
    if at is None and isinstance(fn, Reparametrization) and isinstance(tensor, TypedTensor):
        at = tensor.at.to(fn.source)
    if isinstance(tensor, ScalarField):
        return _pullback_scalar(fn, tensor, at)
    if at is None:
        raise BasePointError(
            f"pulling back {describe(tensor)} needs the base point: many points may have the same image. Pass at=p."
        )
    if isinstance(tensor, Tensor):
        raise VarianceError("a plain tensor has no type to pull back. For plain cotangents use geoad.vjp(f, p)[1](u).")
    if isinstance(tensor, Vector) or not isinstance(tensor, (Covector, Form)):
        raise VarianceError(
            f"only functions and tensors with lower indices are pulled back, found {describe(tensor)}. Vectors are "
            "pushed forward: "
            "geoad.pushforward(f, v)."
        )
    return _pullback_tensor(_Map(fn, at, tensor.chart), tensor, at)


def _pullback_scalar(fn: Any, field: ScalarField, at: Point | None) -> ScalarField:
    if isinstance(fn, Reparametrization):
        return field.in_home(fn.source)
    if at is None:
        raise BasePointError("pulling back a function by a plain map needs to know the manifold: pass at=p, any point of it.")
    outer = field.function(field.home)
    return plain_home(at).scalar_field(lambda components: outer(fn(components)))


class _PullbackOperator(ops.Implicit):
    """Jᵀ B J on blocks."""

    def __init__(self, mapping: _Map, form: Rank2) -> None:
        super().__init__(mapping.home.layout, mapping.here.blocks, symmetric=form.op.symmetric)
        self.mapping, self.form = mapping, form

    def mv(self, v: Blocks) -> Blocks:
        layout = self.form.chart.layout
        _, velocity, pull = products.push_pull(self.mapping, self.x, v)
        return pull(layout.ravel(self.form.operator.mv(layout.unravel(velocity))))


def _pullback_tensor(mapping: _Map, tensor: Covector | Rank2, at: Point) -> Any:
    if isinstance(tensor, Covector):
        slope = products.vjp(mapping, mapping.here.blocks)[1](tensor.ravel())
        return Covector(mapping.home, slope, mapping.here).to(at.chart)
    cls = Metric if isinstance(tensor, Metric) else Form
    return cls(at.chart, _PullbackOperator(mapping, tensor), at, home=mapping.home)
