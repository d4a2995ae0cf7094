"""Second derivatives and eigenvalues with respect to a metric."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from geoad import operators as ops
from geoad.autodiff.hessian import FieldHessian
from geoad.autodiff.inputs import as_point, plain_home
from geoad.errors import VarianceError
from geoad.fields.metric import FormField
from geoad.fields.scalar import FunctionSource, ScalarField
from geoad.tensors import Axis, Form, GeoTensor, InnerProduct, describe, require_same_place
from geoad.tensors.rank2 import common_home

__all__ = ["eigh", "hessian"]


def hessian(fn: Any, metric: FormField | None = None, argnums: int = 0, has_aux: bool = False) -> Callable[..., Any]:
    r"""The Riemannian Hessian :math:`H_{ij} = \partial_i\partial_j L - \Gamma^k_{ij}\,\partial_k L`, a `Form`.

    Matrix-free: ``H.mv(v)`` costs one Hessian-vector product (a few more for a metric that varies), ``H.to_dense()`` gives the
    matrix. Default connection: the flat one of the reference chart, so ∂²L there, moved by J⁻ᵀ∂²L J⁻¹. The plain second
    derivative in another chart is not a tensor away from critical points and is never handed out as one.

    Args:
        fn: a `ScalarField`, or (drop-in for ``torch.func.hessian``) a callable of plain components in the reference chart.
        metric: a metric field, whose Levi-Civita connection is used.
        argnums: which argument of a drop-in callable.
        has_aux: the callable returns (value, aux).

    Raises:
        GeometryError: a product with the Hessian of a loss (``geo.loss``) is not finite, because of data, parameters or the
            loss. A function of your own may be infinite.

    Source: Kristiadi et al. (2023), eq. (6).

    >>> import torch, geoad
    >>> H = geoad.hessian(lambda x: x[0] ** 2 * x[1])(torch.tensor([1.0, 3.0]))
    >>> H.components
    tensor([[6., 2.],
            [2., 0.]])
    """
    if isinstance(fn, ScalarField):
        return FieldHessian(fn, metric)

    def at(*args: Any, **kwargs: Any) -> Any:
        index = argnums % len(args)
        point = as_point(args[index])
        home = plain_home(point)

        def plain(components: Any) -> Tensor:
            plain_args = (*args[:index], components, *args[index + 1 :])
            result = fn(*plain_args, **kwargs)
            return result[0] if has_aux else result

        form = FieldHessian(ScalarField(home, FunctionSource(home, plain)), metric)(point)
        if not has_aux:
            return form
        aux = fn(*args[:index], point.to(home).components, *args[index + 1 :], **kwargs)[1]
        return form, aux

    return at


def eigh(form: Form, metric: InnerProduct, k: int | None = None, which: str = "largest") -> tuple[Tensor, GeoTensor]:
    """Eigenvalues of a symmetric form B with respect to a metric G, B u = λ G u, and a G-orthonormal frame of eigenvectors.

    Returns:
        (values, frame): values descending (``which`` = "largest", "smallest" or "magnitude"), the first k only if `k` is given;
        the frame is of type [^, F], its columns are vectors with G(u_a, u_b) = δ_ab. The values are the same in every chart.
        In redundant coordinates they are those over the horizontal space.

    >>> import torch, geoad
    >>> x = geoad.Chart({"x": (2,)}, name="x")
    >>> p = x.point(torch.zeros(2))
    >>> B, G = x.form(torch.diag(torch.tensor([4.0, 9.0])), at=p), x.metric(torch.diag(torch.tensor([1.0, 3.0])), at=p)
    >>> geoad.eigh(B, metric=G)[0]
    tensor([4.0000, 3.0000])
    """
    if not isinstance(metric, InnerProduct):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise VarianceError(
            f"eigenvalues of a form need a metric, found {describe(metric)}. Without one they depend on the chart. Pass "
            "metric=G, the "
            "value of a metric field at the point: geoad.metrics.Euclidean(theta)(p)."
        )
    if not isinstance(form, Form) or not form.op.symmetric:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise VarianceError(
            f"geoad.eigh is for symmetric (0,2) forms, found {describe(form)}. For an endomorphism use E.eigenvalues(); "
            "symmetrise a form "
            "with 0.5 * (B + B.mT)."
        )
    require_same_place(form, metric, "diagonalise")
    home, b, g = common_home(form, metric)
    values, vectors = ops.eigh(b, g, k, which)
    axes = [Axis(home, True, home.dim), Axis(None, True, vectors.shape[-1])]
    return values, GeoTensor(vectors, axes, form.at.to(home)).to(form.chart)
