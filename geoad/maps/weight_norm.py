"""Weight normalisation, the redundant coordinates of torch's own ``weight_norm``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from geoad.errors import GeometryError
from geoad.maps.base import need
from geoad.maps.submersion import Submersion, TotalMetric

__all__ = ["WeightNorm"]


class WeightNorm(Submersion):
    r"""W = g v / |v| for every row of a block: a submersion, with one coordinate too many per row.

    The blocks are those of ``torch.nn.utils.parametrizations.weight_norm``: ``<name>_g`` of shape (n, 1, ..., 1) and
    ``<name>_v`` of the shape of W; the section is g = |W|, v = W, as there. The domain is g ≠ 0, v ≠ 0; a zero row has
    no section. With :math:`\hat v = v/|v|`, for each row:

    * :math:`J(\dot g, \dot v) = \dot g\,\hat v + \frac{g}{|v|}(I - \hat v\hat v^\top)\dot v`,
    * horizontal lift of u: :math:`\dot g = \hat v\cdot u`, :math:`\dot v = \frac{|v|}{g}(I - \hat v\hat v^\top)u`.

    Horizontal steps keep the norm of v, and so does `near`. The weights of a diagonal metric on (g, v) do not change the lift.

    Args:
        dim: the axis that numbers the rows (as in torch); None for one norm of the whole block.
        metric: the metric on (g, v), see `Submersion`.

    >>> import torch, geoad
    >>> chart = geoad.Chart({"w": (1, 2)}, name="w")
    >>> psi = chart.reparametrize(geoad.maps.WeightNorm(), name="gv").target
    >>> chart.point(torch.tensor([[3.0, 4.0]])).to(psi).components
    {'w_g': tensor([[5.]]), 'w_v': tensor([[3., 4.]])}

    Source: Salimans & Kingma (2016).
    """

    def __init__(self, dim: int | None = 0, *, metric: TotalMetric = None) -> None:
        super().__init__(metric=metric)
        self.dim = dim

    def extra_repr(self) -> str:
        return f"dim={self.dim}"

    def part_shapes(self, shape: torch.Size) -> dict[str, tuple[int, ...]]:
        rank = len(shape)
        if self.dim is not None and not -rank <= self.dim < rank:
            raise GeometryError(
                f"WeightNorm(dim={self.dim}) was bound to a block of shape {tuple(shape)}, which has no such axis. Choose the "
                "blocks by name pattern, {'*.weight': maps.WeightNorm()}, or pass dim=None for one norm of the whole block."
            )
        axis = None if self.dim is None else self.dim % rank
        self._axes = tuple(i for i in range(rank) if i != axis)
        # torch gives the norm of a whole block no axes
        scale = () if axis is None else tuple(size if i == axis else 1 for i, size in enumerate(shape))
        return {"g": scale, "v": tuple(shape)}

    # -- the map -------------------------------------------------------------------------------------------------------

    def _dot(self, a: Tensor, b: Tensor) -> Tensor:
        """The inner product of each pair of rows, of a shape that broadcasts with both."""
        return (a * b).sum(self._axes, keepdim=True) if self._axes else a * b

    def _norm(self, v: Tensor) -> Tensor:
        return self._dot(v, v).sqrt() if self._axes else v.abs()

    def _shaped(self, g: Tensor, like: Tensor) -> Tensor:
        return g.reshape(like.shape)

    def value(self, x: Tensor) -> dict[str, Tensor]:
        norm = self._norm(x)
        return {"g": norm.reshape(self._images[self._parts["g"]]), "v": x}

    def inverse_value(self, y: dict[str, Tensor]) -> Tensor:
        norm = self._norm(y["v"])
        return y["v"] * (self._shaped(y["g"], norm) / norm)

    def near_value(self, x: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
        """The direction of v and the size of g follow θ; the norm of v and the sign of g stay."""
        if not self._closed():
            return super().near_value(x, y)
        norm, before = self._norm(x), self._norm(y["v"])
        sign = self._shaped(y["g"], before).sign()
        return {"g": (sign * norm).reshape(y["g"].shape), "v": x * (sign * before / norm)}

    def bad_domain(self, x: Tensor) -> str | None:
        norm = self._norm(x)
        return need(norm > 0, "weight normalisation needs rows W ≠ 0, for the direction of a zero row is undefined", norm)

    def bad_image(self, y: dict[str, Tensor]) -> str | None:
        norm = self._norm(y["v"])
        return need(norm > 0, "weight normalisation needs v ≠ 0", norm) or need(
            y["g"] != 0, "weight normalisation needs g ≠ 0, for at g = 0 the direction v has no effect", y["g"]
        )

    # -- products ------------------------------------------------------------------------------------------------------

    def _frame(self, y: dict[str, Tensor]) -> tuple[Tensor, Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
        """The direction of v, g over the norm of v, and the split of a row into its component along v and the rest."""
        norm = self._norm(y["v"])
        unit = y["v"] / norm

        def split(u: Tensor) -> tuple[Tensor, Tensor]:
            along = self._dot(unit, u)
            return along, u - along * unit

        return unit, self._shaped(y["g"], norm) / norm, split

    def _closed(self) -> bool:
        """The lift does not depend on a metric that is diagonal and the same within each row."""
        return self.metric is None or (
            not callable(self.metric) and all(torch.as_tensor(weight).numel() == 1 for weight in self.metric.values())
        )

    def push_block(self, x: Any, y: dict[str, Tensor], v: Tensor) -> Any:
        if not self._closed():
            return super().push_block(x, y, v)
        _, ratio, split = self._frame(y)
        along, across = split(v)
        return {"g": along.reshape(y["g"].shape), "v": across / ratio}

    def pull_block(self, x: Any, y: dict[str, Tensor], w: dict[str, Tensor]) -> Any:
        if not self._closed():
            return super().pull_block(x, y, w)
        unit, ratio, split = self._frame(y)
        return self._shaped(w["g"], ratio) * unit + split(w["v"])[1] / ratio

    def push_inverse_block(self, x: Any, y: dict[str, Tensor], v: dict[str, Tensor]) -> Tensor:
        unit, ratio, split = self._frame(y)
        return self._shaped(v["g"], ratio) * unit + ratio * split(v["v"])[1]

    def pull_inverse_block(self, x: Any, y: dict[str, Tensor], w: Tensor) -> dict[str, Tensor]:
        _, ratio, split = self._frame(y)
        along, across = split(w)
        return {"g": along.reshape(y["g"].shape), "v": ratio * across}
