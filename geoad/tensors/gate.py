"""The gate: which ``torch.*`` functions act on typed objects, and how. Everything else is refused with the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from geoad import operators as ops
from geoad.errors import SingularMetricError, VarianceError
from geoad.params import is_wrapped
from geoad.tensors import algebra
from geoad.tensors.base import HANDLERS, Axis, TypedTensor, describe, require_same_place
from geoad.tensors.densities import Density, LogDensity
from geoad.tensors.forms import Cometric, Endomorphism, Form
from geoad.tensors.general import GeoTensor, as_general, build, dense_of
from geoad.tensors.rank1 import Rank1
from geoad.tensors.rank2 import Rank2

__all__: list[str] = []


def _on(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        for function in functions:
            HANDLERS[function] = handler
        return handler

    return register


# -- sums and multiples ------------------------------------------------------------------------------------------------


@_on(torch.add, torch.Tensor.add, torch.Tensor.__radd__)
def _add(a: Any, b: Any, *, alpha: float = 1.0) -> Any:
    return algebra.add(a, b if alpha == 1 else algebra.multiply(b, alpha))


@_on(torch.sub, torch.subtract, torch.Tensor.sub)
def _sub(a: Any, b: Any, *, alpha: float = 1.0) -> Any:
    return algebra.subtract(a, b if alpha == 1 else algebra.multiply(b, alpha))


_on(torch.mul, torch.multiply, torch.Tensor.mul, torch.Tensor.__rmul__)(algebra.multiply)
_on(torch.div, torch.divide, torch.true_divide, torch.Tensor.div, torch.Tensor.true_divide)(algebra.divide)
_on(torch.neg, torch.negative)(lambda a: algebra.multiply(a, -1.0))
_on(torch.matmul, torch.mm, torch.mv, torch.dot, torch.inner, torch.vdot, torch.Tensor.matmul, torch.linalg.vecdot)(
    algebra.matmul
)
_on(torch.einsum)(algebra.einsum)


@_on(torch.outer, torch.ger)
def _outer(a: Any, b: Any) -> Any:
    if len(a.axes) != 1 or len(b.axes) != 1:
        raise VarianceError(f"torch.outer takes two tensors with one index, got {describe(a)} and {describe(b)}.")
    return algebra.contract([a, b], [["i"], ["j"]], ["i", "j"])


@_on(torch.tensordot)
def _tensordot(a: Any, b: Any, dims: Any = 2, out: Any = None) -> Any:
    n, m = len(a.axes), len(b.axes)
    pairs = (list(range(n - dims, n)), list(range(dims))) if isinstance(dims, int) else (list(dims[0]), list(dims[1]))
    left = [chr(ord("a") + i) for i in range(n)]
    right = [chr(ord("a") + n + i) for i in range(m)]
    for i, j in zip(*pairs, strict=True):
        right[j] = left[i]
    kept = [c for c in left + right if (left + right).count(c) == 1]
    return algebra.contract([a, b], [left, right], kept)


# -- linear algebra ------------------------------------------------------------------------------------------------------


def _transpose(tensor: Any, dim0: int = -2, dim1: int = -1) -> Any:
    n = len(tensor.axes)
    if isinstance(tensor, Rank2) and not tensor.batch_shape and {dim0 % 2, dim1 % 2} == {0, 1}:
        return tensor.mT
    order = list(range(n))
    batch = len(tensor.batch_shape)
    i, j = ((d - batch if d >= 0 else d + n) for d in (dim0, dim1))
    if min(i, j) < 0 or max(i, j) >= n:
        raise VarianceError("a transpose may not exchange batch axes with typed axes. Use .components.")
    order[i], order[j] = order[j], order[i]
    return _permute(tensor, order)


def _permute(tensor: Any, *dims: Any) -> Any:
    order = list(dims[0]) if len(dims) == 1 and isinstance(dims[0], (list, tuple)) else list(dims)
    general = as_general(tensor)
    batch = len(general.batch_shape)
    data = general.data.permute(*range(batch), *(batch + i for i in order))
    return build(data, [general.axes[i] for i in order], general.at, symmetric=getattr(tensor, "op", None) is not None)


_on(torch.transpose, torch.swapaxes, torch.Tensor.transpose)(_transpose)
_on(torch.t, torch.adjoint)(lambda tensor: _transpose(tensor))
_on(torch.permute)(_permute)


@_on(torch.inverse, torch.linalg.inv)
def _inverse(tensor: Any) -> Any:
    if isinstance(tensor, (Form, Cometric, Endomorphism)):
        return tensor.inverse()
    general = as_general(tensor)
    if len(general.axes) != 2:
        raise VarianceError(f"only tensors with two indices have an inverse, found {describe(tensor)}.")
    a, b = general.axes
    data, info = torch.linalg.inv_ex(general.data)
    if not is_wrapped({"": data}) and bool((info != 0).any()):
        raise SingularMetricError(f"{describe(tensor)} is singular, so it has no inverse. Add a metric, or use a solve with damping.")
    return build(data, [b.dual(), a.dual()], general.at)


@_on(torch.linalg.solve)
def _solve(a: Any, x: Any) -> Any:
    if isinstance(a, Form) or (isinstance(a, Endomorphism) and isinstance(x, Rank1) and x.up):
        return a.solve(x)
    if not isinstance(a, TypedTensor) or not isinstance(x, TypedTensor):
        raise VarianceError(
            f"cannot solve {describe(a)} x = {describe(x)}: both sides need a type. Use chart.covector(x, at=p) or "
            "chart.vector(x, at=p)."
        )
    if len(a.axes) != 2 or not x.axes or x.axes[0].up != a.axes[0].up:
        raise VarianceError(
            f"cannot solve A x = b: the first index of A ({describe(a)}) must have the type of the right-hand side, found "
            f"{describe(x)}. Convert the right-hand side with metric.sharp or metric.flat."
        )
    return algebra.matmul(_inverse(a), x)


@_on(torch.trace)
def _trace(tensor: Any) -> Any:
    if isinstance(tensor, Endomorphism):
        return tensor.trace()
    if isinstance(tensor, (Form, Cometric)):
        return tensor.trace()  # raises
    return algebra.contract([tensor], [["i", "i"]], [])


@_on(torch.det, torch.linalg.det)
def _det(tensor: Any) -> Any:
    sign, logabsdet = _slogdet(tensor)
    return sign * logabsdet.exp()


@_on(torch.logdet)
def _logdet(tensor: Any) -> Any:
    return tensor.logdet() if isinstance(tensor, (Form, Cometric, Endomorphism)) else _slogdet(tensor)[1]


@_on(torch.slogdet, torch.linalg.slogdet)
def _slogdet(tensor: Any) -> Any:
    if isinstance(tensor, (Form, Cometric, Endomorphism)):
        return tensor.slogdet()
    if isinstance(tensor, Rank2):
        return ops.slogdet(tensor.op)
    general = as_general(tensor)
    charts = {axis.chart for axis in general.axes}
    if len(general.axes) != 2 or charts != {general.chart}:
        raise VarianceError(
            f"the determinant of {describe(tensor)} is a density in two spaces at once, of weight +1 in one and -1 in the other. "
            "Take det of J^T G J, or .components."
        )
    return torch.linalg.slogdet(general.data)


@_on(torch.linalg.eigvals, torch.linalg.eigvalsh)
def _eigvals(tensor: Any, *_: Any, **__: Any) -> Any:
    if isinstance(tensor, (Endomorphism, Form, Cometric)):
        return tensor.eigenvalues()
    raise VarianceError(f"eigenvalues belong to endomorphisms, found {describe(tensor)}. Use geoad.eigh(B, metric=G).")


@_on(torch.linalg.eig)
def _eig(tensor: Any) -> Any:
    if not isinstance(tensor, Endomorphism):
        raise VarianceError(f"eigenvectors belong to endomorphisms, found {describe(tensor)}. Use geoad.eigh(B, metric=G).")
    values, vectors = torch.linalg.eig(tensor.to_dense())
    frame = Axis(None, True, vectors.shape[-1])
    return values, GeoTensor(vectors, [tensor.axes[0], frame], tensor.at)


@_on(torch.linalg.cholesky)
def _cholesky(tensor: Any, *, upper: bool = False) -> Any:
    if not isinstance(tensor, (Form, Cometric)):
        raise VarianceError(f"a Cholesky factor belongs to a symmetric (0,2) or (2,0) tensor, found {describe(tensor)}.")
    lower, info = torch.linalg.cholesky_ex(dense_of(tensor))
    if not is_wrapped({"": lower}) and bool((info != 0).any()):
        raise SingularMetricError(
            f"{describe(tensor)} is not positive definite, so it has no Cholesky factor. Add damping: G + lam * reference metric."
        )
    frame = Axis(None, True, lower.shape[-1])
    factor = GeoTensor(lower, [tensor.axes[0], frame], tensor.at)
    return factor.mT if upper else factor


# -- batch axes and copies -----------------------------------------------------------------------------------------------


@_on(torch.stack)
def _stack(tensors: Any, dim: int = 0) -> Any:
    first = tensors[0]
    for other in tensors[1:]:
        if type(other) is not type(first):
            raise VarianceError(f"cannot stack {describe(first)} and {describe(other)}: one batch holds one type.")
        require_same_place(first, other, "stack")
    if not 0 <= dim <= len(first.batch_shape):
        raise VarianceError(f"typed objects stack along batch axes, 0 to {len(first.batch_shape)}, got dim={dim}.")
    if isinstance(first, Rank1):
        blocks = {name: torch.stack([each.blocks[name] for each in tensors], dim) for name in first.blocks}
        return type(first)(first.chart, blocks, first.at)
    if isinstance(first, Rank2):
        data = torch.stack([each.to_dense() for each in tensors], dim)
        symmetric, definite = (all(getattr(each.op, flag) for each in tensors) for flag in ("symmetric", "definite"))
        op = ops.Dense(first.chart.layout, data, symmetric=symmetric, definite=definite)
        return type(first)(first.chart, op, first.at, ups=first.ups)
    data = torch.stack([dense_of(each) for each in tensors], dim)
    if isinstance(first, (Density, LogDensity)):
        return type(first)(first.chart, data, first.weight, first.at)
    return GeoTensor(data, first.axes, first.at)


def _over_batch(name: str, function: Callable[..., Tensor]) -> Callable[..., Any]:
    def reduce(tensor: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
        batch = len(tensor.batch_shape)
        dims = list(range(batch)) if dim is None else [dim] if isinstance(dim, int) else list(dim)
        if not batch or any(not 0 <= d < batch for d in dims):
            raise VarianceError(
                f"torch.{name} of a {describe(tensor)} over typed axes depends on the chart: components are not comparable. It "
                f"runs over batch axes only, dim=0 to {batch - 1}"
                + (" (this one has none)" if not batch else "")
                + ". For a size use G.norm(v); for numbers .components."
            )
        return _batchwise(tensor, lambda block: function(block, dim=dims, keepdim=keepdim))

    return reduce


def _batchwise(tensor: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function of the batch axes to the numbers."""
    if isinstance(tensor, Rank2) and not isinstance(tensor.op, (ops.Dense, ops.Diagonal)):
        tensor = tensor.materialise()
    return tensor._map(fn)


_on(torch.mean)(_over_batch("mean", torch.mean))
_on(torch.sum)(_over_batch("sum", torch.sum))


def _getitem(tensor: Any, index: Any) -> Any:
    parts = index if isinstance(index, tuple) else (index,)
    batch = len(tensor.batch_shape)
    used = sum(1 for part in parts if part is not None and part is not Ellipsis)
    masks = any(isinstance(part, Tensor) and part.ndim > 1 for part in parts)
    if used > batch or Ellipsis in [p for p in parts if not isinstance(p, Tensor)] or masks:
        raise VarianceError(
            f"cannot index the typed axes of a {describe(tensor)} (it has {batch} batch axes): single components depend on the "
            "chart. Use .components."
        )
    return _batchwise(tensor, lambda block: block[index])


HANDLERS["getitem"] = _getitem
_on(torch.clone)(lambda tensor, **_: tensor.clone())
_on(torch.detach)(lambda tensor: tensor.detach())
_on(torch.zeros_like)(lambda tensor, **_: tensor._map(torch.zeros_like))


@_on(torch.isfinite)
def _isfinite(tensor: Any, **_: Any) -> Tensor:
    """One flag for each element of the batch: are all components finite."""
    data = dense_of(tensor).isfinite()
    typed = len(tensor.axes)
    return data.flatten(-typed).all(-1) if typed else data


@_on(torch.allclose)
def _allclose(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> bool:
    if type(a) is not type(b):
        raise VarianceError(f"cannot compare {describe(a)} with {describe(b)}: different types. Compare like with like.")
    require_same_place(a, b, "compare")
    return torch.allclose(dense_of(a), dense_of(b), rtol, atol, equal_nan)


# -- densities -----------------------------------------------------------------------------------------------------------


def _density_only(name: str) -> Callable[..., Any]:
    def handler(tensor: Any, *args: Any) -> Any:
        if isinstance(tensor, (Density, LogDensity)) and hasattr(tensor, name):
            return getattr(tensor, name)(*args)
        return _refuse(getattr(torch, name), (tensor,))

    return handler


for _name in ("sqrt", "log", "exp", "abs"):
    _on(getattr(torch, _name))(_density_only(_name))


@_on(torch.pow)
def _pow(tensor: Any, exponent: Any) -> Any:
    if isinstance(tensor, Density) and isinstance(exponent, (int, float)):
        return tensor.power(exponent)
    return _refuse(torch.pow, (tensor,))


HANDLERS["pow"] = _pow
HANDLERS["abs"] = HANDLERS[torch.abs]


# -- refusals ------------------------------------------------------------------------------------------------------------

_REMEDIES = {
    "norm": "For an invariant length say with respect to which metric: G.norm(v).",
    "vector_norm": "For an invariant length say with respect to which metric: G.norm(v).",
    "matrix_norm": "For an invariant size use E = G.inverse() @ B and E.eigenvalues().",
    "eigh": "Use geoad.eigh(B, metric=G): eigenvalues with respect to a metric, and a G-orthonormal frame.",
    "svd": "Singular values need an inner product on both sides; use geoad.eigh(B, metric=G).",
    "diagonal": "The diagonal depends on the chart.",
    "diag": "The diagonal depends on the chart.",
    "cat": "Typed axes are not concatenated; torch.stack makes a batch.",
}


def _refuse(func: Any, args: Any) -> Any:
    name = getattr(func, "__name__", str(func)).strip("_")
    if name == "get":  # an attribute of torch.Tensor that is asked for through the gate
        name = str(getattr(func, "__self__", func))
    found = next((describe(arg) for arg in args if isinstance(arg, TypedTensor)), "a typed object")
    remedy = _REMEDIES.get(name, "It has no law under a change of chart.")
    raise VarianceError(
        f"torch.{name} is not defined for {found}: its result would depend on the chart. {remedy} The plain numbers are in "
        ".components (or .ravel(), .to_dense())."
    )


HANDLERS["refuse"] = _refuse
