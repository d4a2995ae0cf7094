r"""Two-index objects under maps that cannot be undone: submersions, immersions and smooth maps of any rank.

Under a change of coordinates an object keeps its numbers where they were made. Under these maps it depends:

* seen in redundant coordinates it keeps them as well: solves and traces take place in θ, that is in the horizontal space;
* under an immersion, and on the way back from redundant coordinates, it becomes an object of the new chart: its
  operator there is the lazy congruence, and inverses and determinants are those of the smaller (or larger) matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geoad import operators as ops
from geoad import transport
from geoad.charts import Chart, Point, Reparametrization, path, same_space
from geoad.errors import VarianceError
from geoad.operators import LinearOperator
from geoad.params import Blocks, is_wrapped
from geoad.tensors.base import HANDLERS, describe, require_same_place
from geoad.tensors.forms import DualEndomorphism, Endomorphism, Form, HorizontalMetric, InnerProduct, Metric
from geoad.tensors.moved import Moved
from geoad.tensors.rank2 import Rank2

__all__ = ["cross", "quotient_logdet"]

_PROBES = 2


def cross(tensor: Rank2, chart: Chart) -> Any:
    """`tensor` in `chart`, step by step, by the law of each map on the way."""
    for phi, along in path(tensor.chart, chart, tensor.at):
        tensor = _step(tensor, phi, along)
    return tensor


def _step(tensor: Rank2, phi: Reparametrization, along: bool) -> Rank2:
    law, end = phi.map.law, phi.target if along else phi.source
    up = sum(tensor.ups)
    verdict = transport.rule(law, along, up, 2 - up)
    if verdict == "never":
        raise transport.refusal(describe(tensor), phi, along)
    there = tensor.at.to(end)
    if law == "diffeomorphism" or (law == "submersion" and (along or _leads_home(tensor, phi))):
        cls = _seen_class(tensor, end)
        return cls(end, tensor.op, there, home=tensor.home, ups=tensor.ups)
    moved: LinearOperator = Moved(tensor.op, tensor.ups, tensor.at.to(tensor.home), end)
    if verdict == "if":
        moved = _verified(tensor, moved, there, phi, along)
    # a metric below an immersion may be semidefinite by now, as any Metric: its inverse is refused where there is none
    metric = isinstance(tensor, InnerProduct)
    cls = type(tensor) if not metric else Metric if along else Form
    return cls(end, moved, there, home=end, ups=tensor.ups)


def _leads_home(tensor: Rank2, phi: Reparametrization) -> bool:
    """The numbers lie on the other side of `phi`: the object came from there."""
    return any(step is phi for step, _ in path(tensor.chart, tensor.home, tensor.at))


def _seen_class(tensor: Rank2, end: Chart) -> Any:
    if isinstance(tensor, InnerProduct):
        return Metric if same_space(end, tensor.home) else HorizontalMetric
    return type(tensor)


def _verified(tensor: Rank2, moved: LinearOperator, there: Point, phi: Reparametrization, along: bool) -> LinearOperator:
    """`moved`, if the object survives the way there and back on random vectors (a wrong one does so with probability 0)."""
    operator, at = tensor.operator, tensor.at
    ups = tensor.ups
    if ups == (False, True):  # the transpose of an endomorphism
        operator, moved_op, ups = ops.transpose(operator), ops.transpose(moved), (True, False)
    else:
        moved_op = moved
    same = torch.ones((), dtype=torch.bool, device=tensor.device)
    generator = torch.Generator().manual_seed(0)
    for _ in range(_PROBES):
        probe = _random(tensor.chart, at, tensor, generator)
        inward = transport.covector if ups[1] else transport.vector
        outward = transport.vector if ups[0] else transport.covector
        image, far = operator.mv(probe), moved_op.mv(inward(probe, at, there.chart))
        if ups[0] == along:  # compare where the law of the first index is unconditional
            image, far = image, outward(far, there, at.chart)
            layout = at.chart.layout
        else:
            image, layout = outward(image, at, there.chart), there.chart.layout
        same = same & transport.agree(layout.ravel(image), layout.ravel(far))
    if is_wrapped({"": same}):
        return ops.times(torch.where(same, 1.0, torch.nan).to(tensor.dtype), moved, positive=False)
    if not bool(same):
        raise transport.refusal(describe(tensor), phi, along)
    return moved


def _random(chart: Chart, at: Point, tensor: Rank2, generator: torch.Generator) -> Blocks:
    """A random vector, the same at every point of a batch."""
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)
        .to(tensor.device, tensor.dtype)
        .expand((*at.batch_shape, *shape))
        for name, shape in chart.layout.items()
    }


HANDLERS["cross"] = cross


def quotient_logdet(form: Any, metric: Any = None) -> Tensor:
    r"""log |det| on the horizontal space of redundant coordinates, a plain scalar.

    For a form B and a metric G in ψ, over a submersion with Jacobian J and any basis Q of the horizontal space,
    :math:`\log|\det(Q^\top B Q)| - \log\det(Q^\top G Q)`. It does not depend on Q, nor on the coordinates: it is
    log |det G⁻¹B| of the objects on the quotient. For an endomorphism E, pass it alone. In charts that are related by a
    change of coordinates to the one where the objects were made this is the ordinary logdet of G⁻¹B.

    Raises:
        VarianceError: other types.
        NotADiffeomorphismError: the form was made in ψ and is not basic.

    >>> import torch, geoad
    >>> chart = geoad.Chart({"w": (2, 3)}, name="w")
    >>> p = chart.point(torch.randn(2, 3, generator=torch.Generator().manual_seed(0)))
    >>> q = p.to(chart.reparametrize(geoad.maps.WeightNorm(), name="gv").target)
    >>> G = geoad.metrics.Euclidean(chart)
    >>> round(float(geoad.quotient_logdet((3 * G)(q), G(q)) / torch.tensor(3.0).log()), 4)
    6.0
    """
    if isinstance(form, (Endomorphism, DualEndomorphism)) and metric is None:
        return ops.slogdet(_on_quotient(form).op)[1]
    if not isinstance(form, Form) or not isinstance(metric, Form):
        raise VarianceError(
            f"quotient_logdet takes a (0,2) form and a metric, or one endomorphism, found {describe(form)} and "
            f"{describe(metric)}. Other determinants are densities, which have no law under a submersion; pass (B, G)."
        )
    require_same_place(form, metric, "compare")
    above, below = _on_quotient(form), _on_quotient(metric)
    return ops.slogdet(above.op)[1] - ops.slogdet(below.operator_in(above.home))[1]


def _on_quotient(tensor: Rank2) -> Any:
    """The object in the nearest chart above all submersions over its chart."""
    chart = tensor.chart.space
    while chart.parent is not None and chart.parent.map.law == "submersion":
        chart = chart.parent.source.space
    return tensor.to(chart)
