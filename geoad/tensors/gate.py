"""The gate: which ``torch.*`` functions act on typed objects, and how. Everything else is refused with the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from geoad.errors import VarianceError
from geoad.tensors import algebra, contraction
from geoad.tensors import batch as _batch  # fills its part of the gate  # noqa: F401  # pyright: ignore[reportUnusedImport]
from geoad.tensors.base import HANDLERS, Axis, TypedTensor, describe
from geoad.tensors.densities import Density, LogDensity
from geoad.tensors.forms import Cometric, DualEndomorphism, Endomorphism, Form
from geoad.tensors.general import GeoTensor, as_general, build, dense_of
from geoad.tensors.rank1 import Rank1
from geoad.tensors.rank2 import Rank2
from geoad.tensors.refusals import on, refuse

__all__: list[str] = []

_Mixed = (Endomorphism, DualEndomorphism)


# -- sums and multiples ------------------------------------------------------------------------------------------------


@on(torch.add, torch.Tensor.add, torch.Tensor.__radd__)
def _add(a: Any, b: Any, *, alpha: float = 1.0) -> Any:
    return algebra.add(a, b if alpha == 1 else algebra.multiply(b, alpha))


@on(torch.sub, torch.subtract, torch.Tensor.sub)
def _sub(a: Any, b: Any, *, alpha: float = 1.0) -> Any:
    return algebra.subtract(a, b if alpha == 1 else algebra.multiply(b, alpha))


@on(torch.rsub, torch.Tensor.__rsub__)
def _rsub(a: Any, b: Any) -> Any:
    return algebra.subtract(b, a)


@on(torch.Tensor.__rdiv__, torch.Tensor.__rtruediv__)
def _rdiv(a: Any, b: Any) -> Any:
    return algebra.divide(b, a)


on(torch.mul, torch.multiply, torch.Tensor.mul, torch.Tensor.__rmul__)(algebra.multiply)
on(torch.div, torch.divide, torch.true_divide, torch.Tensor.div, torch.Tensor.true_divide)(algebra.divide)
on(torch.neg, torch.negative)(lambda a: algebra.multiply(a, -1.0))
on(torch.positive)(lambda a: a)
on(torch.matmul, torch.mm, torch.mv, torch.bmm, torch.Tensor.matmul, torch.linalg.matmul)(contraction.matmul)
on(torch.dot, torch.inner, torch.vdot, torch.linalg.vecdot)(contraction.matmul)
on(torch.Tensor.__rmatmul__)(lambda a, b: contraction.matmul(b, a))
on(torch.einsum)(contraction.einsum)


@on(torch.linalg.multi_dot, torch.chain_matmul)
def _multi_dot(first: Any, *others: Any) -> Any:
    chain = [*first, *others] if isinstance(first, (list, tuple)) else [first, *others]
    result = chain[-1]
    for each in reversed(chain[:-1]):
        result = contraction.matmul(each, result)
    return result


@on(torch.outer, torch.ger, torch.kron)
def _outer(a: Any, b: Any) -> Any:
    contraction.require_typed(a, b)
    if len(a.axes) != 1 or len(b.axes) != 1:
        raise VarianceError(
            f"torch.outer takes two tensors with one index, got {describe(a)} and {describe(b)}. For more indices use "
            "torch.einsum('ij,k->ijk', A, v)."
        )
    return contraction.contract([a, b], [["i"], ["j"]], ["i", "j"])


@on(torch.tensordot)
def _tensordot(a: Any, b: Any, dims: Any = 2, out: Any = None) -> Any:
    contraction.require_typed(a, b)
    n, m = len(a.axes), len(b.axes)
    pairs = (list(range(n - dims, n)), list(range(dims))) if isinstance(dims, int) else (list(dims[0]), list(dims[1]))
    if len(pairs[0]) != len(pairs[1]) or len(pairs[0]) > min(n, m) or any(not -n <= i < n for i in pairs[0]):
        raise VarianceError(
            f"torch.tensordot over dims={dims} does not fit {describe(a)} ({n} indices) and {describe(b)} ({m} indices): "
            "dims count the "
            "typed axes only. Pass dims=([axes of the first], [axes of the second])."
        )
    left = [chr(ord("a") + i) for i in range(n)]
    right = [chr(ord("a") + n + i) for i in range(m)]
    for i, j in zip(*pairs, strict=True):
        right[j] = left[i]
    kept = [c for c in left + right if (left + right).count(c) == 1]
    return contraction.contract([a, b], [left, right], kept)


# -- linear algebra ------------------------------------------------------------------------------------------------------


def _transpose(tensor: Any, dim0: int = -2, dim1: int = -1) -> Any:
    n, batch = len(tensor.axes), len(tensor.batch_shape)
    i, j = ((d - batch if d >= 0 else d + n) for d in (dim0, dim1))
    if min(i, j) < 0 or max(i, j) >= n:
        raise VarianceError(
            f"a transpose exchanges two typed axes; dims {dim0} and {dim1} of {describe(tensor)} ({batch} batch axes, {n} "
            "typed) are not "
            "two of them. Use .mT, negative dims, or .components."
        )
    if isinstance(tensor, Rank2):
        return tensor.mT if i != j else tensor
    order = list(range(n))
    order[i], order[j] = order[j], order[i]
    return _permute(tensor, order)


def _permute(tensor: Any, *dims: Any) -> Any:
    """Typed axes in another order; `dims` count the typed axes only."""
    order = list(dims[0]) if len(dims) == 1 and isinstance(dims[0], (list, tuple)) else list(dims)
    n = len(tensor.axes)
    if sorted(i % max(n, 1) for i in order) != list(range(n)):
        raise VarianceError(
            f"the permutation {tuple(order)} does not fit the {n} typed axes of {describe(tensor)}: batch axes stay in "
            "front. Pass each of "
            f"0 to {n - 1} once, or use .components."
        )
    order = [i % n for i in order]
    if isinstance(tensor, Rank2):
        return tensor.mT if order == [1, 0] else tensor
    general = as_general(tensor)
    batch = len(general.batch_shape)
    data = general.data.permute(*range(batch), *(batch + i for i in order))
    return build(data, [general.axes[i] for i in order], general.at)


on(torch.transpose, torch.swapaxes, torch.swapdims, torch.Tensor.transpose)(_transpose)
on(torch.t, torch.adjoint)(lambda tensor: _transpose(tensor))
on(torch.permute)(_permute)


@on(torch.inverse, torch.linalg.inv)
def _inverse(tensor: Any) -> Any:
    if isinstance(tensor, (Rank2, GeoTensor)) and len(tensor.axes) == 2:
        return tensor.inverse()  # pyright: ignore[reportAttributeAccessIssue]
    raise VarianceError(f"only tensors with two indices have an inverse, found {describe(tensor)}. For G⁻¹ω use G.sharp(w).")


@on(torch.linalg.solve)
def _solve(a: Any, x: Any) -> Any:
    if not isinstance(a, TypedTensor) or not isinstance(x, TypedTensor):
        raise VarianceError(
            f"cannot solve {describe(a)} x = {describe(x)}: both sides need a type. Use chart.covector(x, at=p) or "
            "chart.vector(x, at=p)."
        )
    if isinstance(a, Rank2) and isinstance(x, Rank1):
        return a.solve(x)  # pyright: ignore[reportAttributeAccessIssue]
    if len(a.axes) != 2 or not x.axes or x.axes[0].up != a.axes[0].up or x.axes[0].chart != a.axes[0].chart:
        raise VarianceError(
            f"cannot solve A x = b: the first index of A ({describe(a)}) must have the type of the right-hand side, found "
            f"{describe(x)}. Convert the right-hand side with metric.sharp or metric.flat, or move it with .to(chart)."
        )
    return contraction.matmul(_inverse(a), x)


@on(torch.trace)
def _trace(tensor: Any) -> Any:
    if isinstance(tensor, Rank2):
        return tensor.trace()  # pyright: ignore[reportAttributeAccessIssue]
    if len(tensor.axes) != 2:
        raise VarianceError(f"the trace is for tensors with two indices, found {describe(tensor)}. Use torch.einsum.")
    return contraction.contract([tensor], [["i", "i"]], [])


def _named(method: str, what: str) -> Callable[..., Any]:
    def handler(tensor: Any, **_: Any) -> Any:
        if isinstance(tensor, (Rank2, GeoTensor)):
            return getattr(tensor, method)()
        raise VarianceError(f"{what} is for tensors with two indices, found {describe(tensor)}. Contract or use .components.")

    return handler


on(torch.det, torch.linalg.det)(_named("det", "the determinant"))
on(torch.logdet)(_named("logdet", "the determinant"))
on(torch.slogdet, torch.linalg.slogdet)(_named("slogdet", "the determinant"))


@on(torch.linalg.eigvals, torch.linalg.eigvalsh)
def _eigvals(tensor: Any, *_: Any, **__: Any) -> Any:
    if isinstance(tensor, (*_Mixed, Form, Cometric)):
        return tensor.eigenvalues()
    raise VarianceError(f"eigenvalues belong to endomorphisms, found {describe(tensor)}. Use geoad.eigh(B, metric=G).")


@on(torch.linalg.eig)
def _eig(tensor: Any) -> Any:
    if not isinstance(tensor, _Mixed):
        raise VarianceError(f"eigenvectors belong to endomorphisms, found {describe(tensor)}. Use geoad.eigh(B, metric=G).")
    values, vectors = torch.linalg.eig(dense_of(tensor))
    frame = Axis(None, True, vectors.shape[-1])
    return values, GeoTensor(vectors, [tensor.axes[0], frame], tensor.at)


@on(torch.linalg.cholesky)
def _cholesky(tensor: Any, *, upper: bool = False) -> Any:
    if not isinstance(tensor, (Form, Cometric)):
        raise VarianceError(
            f"a Cholesky factor belongs to a symmetric (0,2) or (2,0) tensor, found {describe(tensor)}. For an "
            "endomorphism E use the form "
            "G @ E."
        )
    factor = tensor.cholesky()
    return factor.mT if upper else factor


# -- densities -----------------------------------------------------------------------------------------------------------


def _density_only(name: str) -> Callable[..., Any]:
    def handler(tensor: Any, *args: Any) -> Any:
        if isinstance(tensor, (Density, LogDensity)) and hasattr(tensor, name):
            return getattr(tensor, name)(*args)
        return refuse(getattr(torch, name), (tensor,))

    return handler


for _name in ("sqrt", "log", "exp", "abs"):
    on(getattr(torch, _name))(_density_only(_name))


@on(torch.pow, torch.Tensor.pow)
def _pow(tensor: Any, exponent: Any) -> Any:
    if isinstance(tensor, Density):
        if isinstance(exponent, Tensor) and exponent.ndim == 0 and not exponent.requires_grad:
            exponent = exponent.item()
        if isinstance(exponent, (int, float)):
            return tensor.power(float(exponent))
        raise VarianceError(
            f"the exponent of a density must be a number, found {describe(exponent)}: the weight scales with it, so it "
            "must be known. "
            "Pass a float."
        )
    return refuse(torch.pow, (tensor,))


HANDLERS["pow"] = _pow
HANDLERS["abs"] = HANDLERS[torch.abs]
on(torch.square)(lambda tensor: _pow(tensor, 2))
on(torch.rsqrt)(lambda tensor: _pow(tensor, -0.5))
on(torch.reciprocal)(lambda tensor: _pow(tensor, -1))


def _ordering(relation: Callable[..., Tensor], mirror: Callable[..., Tensor]) -> Callable[..., Any]:
    def handler(a: Any, b: Any) -> Any:
        if isinstance(a, (Density, LogDensity)):
            return a.compare(b, relation)
        if isinstance(b, (Density, LogDensity)):
            return b.compare(a, mirror)
        return refuse(relation, (a, b))

    return handler


for _relation, _mirror, _method in (
    (torch.lt, torch.gt, torch.Tensor.lt),
    (torch.gt, torch.lt, torch.Tensor.gt),
    (torch.le, torch.ge, torch.Tensor.le),
    (torch.ge, torch.le, torch.Tensor.ge),
    (torch.eq, torch.eq, torch.Tensor.eq),
    (torch.ne, torch.ne, torch.Tensor.ne),
):
    on(_relation, _method, getattr(torch.Tensor, f"__{_relation.__name__}__"))(_ordering(_relation, _mirror))
HANDLERS["eq"] = HANDLERS[torch.eq]
