"""The Riemannian Hessian of a function as a field, in one of the representations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from geoad import operators as ops
from geoad.autodiff.hessian import FieldHessian
from geoad.charts import Chart, Point
from geoad.curvature.impose import impose
from geoad.curvature.representations import Implicit, representation_of
from geoad.errors import GeometryError
from geoad.fields import FormField, ScalarField
from geoad.fields.scalar import spoilt
from geoad.params import Blocks, is_wrapped
from geoad.tensors import Form

if TYPE_CHECKING:
    from geoad.module import GeoModule

__all__ = ["Hessian"]


class Hessian(FormField):
    r"""The Riemannian Hessian :math:`\partial^2 L - \Gamma \cdot dL` of a loss as a field of bilinear forms.

    As ``geoad.hessian(L, metric)``, with the algebra of fields (``Hessian(L) + lam * Euclidean(theta)``) and a representation.

    Args:
        geo: the network; or a scalar field (a loss, a loss with a prior), and then no `data` and no `loss`.
        data: (x, y), a mapping, a list of batches or a ``DataLoader``.
        loss: as for ``geo.loss``: a function of (outputs, targets).
        chart: the chart in which structure is imposed. Default: the reference chart.
        representation: "implicit", "dense", "diagonal", "block_diagonal" (by one product for each coordinate of a block),
            ``LowRank(rank=k)`` (the k eigenvalues of largest magnitude in `chart`), or a mapping from patterns to "dense" and
            "diagonal". There is no KFAC of a Hessian: see `geoad.curvature.GGN`.
        reduction: "mean" or "sum" over the samples.
        metric: whose connection is used. Default: the flat one of the reference chart.

    Raises:
        GeometryError: a product, or a stored value, of a loss is not finite, because of data, parameters or the loss.

    >>> import torch, geoad
    >>> geo = geoad.GeoModule(torch.nn.Linear(2, 3))
    >>> data = torch.randn(5, 2), torch.randint(3, (5,))
    >>> H = geoad.curvature.Hessian(geo, data, torch.nn.functional.cross_entropy, representation="block_diagonal")
    >>> H(geo.point())
    Form('theta', dim=9, blockdiagonal, float32, cpu)
    """

    value_class = Form

    def __init__(
        self,
        geo: GeoModule | ScalarField,
        data: Any = None,
        loss: Callable[..., Tensor] | None = None,
        chart: Chart | None = None,
        representation: Any = "implicit",
        reduction: str = "mean",
        *,
        metric: FormField | None = None,
    ) -> None:
        function = geo if isinstance(geo, ScalarField) else _loss(geo, data, loss, reduction)
        if isinstance(geo, ScalarField) and (data is not None or loss is not None):
            raise GeometryError("Hessian(L) of a scalar field takes neither data nor loss: L has its own. Pass Hessian(L).")
        self.function = function
        self.forms = FieldHessian(function, metric)
        super().__init__(chart or function.home.reference)
        self.structure = representation_of(representation)

    def operator(self, x: Blocks) -> ops.LinearOperator:
        form = self.forms(Point(self.home, x))
        op = form.operator_in(self.home)
        if not isinstance(self.structure, Implicit) and is_wrapped(x):
            raise GeometryError(
                f"a derivative of the Hessian field in the representation {self.structure} was asked for: it is built from "
                "numbers and has none. Use representation='implicit' there."
            )
        found = impose(self.structure, op)
        if not isinstance(self.structure, Implicit) and not bool(ops.trace(found).isfinite().all()):
            raise GeometryError(self._not_finite(Point(self.home, x)))
        return found

    def _not_finite(self, p: Point) -> str:
        field, _ = self.forms.local(p)
        why = spoilt(field.source, p.to(field.home).blocks) or "look at the function: it has no second derivative there"
        return (
            f"the Hessian of the loss holds numbers that are not finite ({why}): it would be nan in every product. Mend the "
            "data or go back to a finite point."
        )

    def to_representation(self, representation: Any) -> Hessian:
        """The same field in another representation."""
        twin = copy.copy(self)
        twin.structure = representation_of(representation)
        return twin


def _loss(geo: GeoModule, data: Any, loss: Callable[..., Tensor] | None, reduction: str) -> ScalarField:
    if not callable(getattr(geo, "loss", None)) or not callable(loss) or data is None:
        raise GeometryError(
            f"a Hessian belongs to a function: Hessian(L) with a scalar field, or Hessian(geo, data, loss); found "
            f"{type(geo).__name__}, data {type(data).__name__}, loss {type(loss).__name__}."
        )
    return geo.loss(loss, data, reduction)
