"""The tangent kernel J G⁻¹ Jᵀ of a network, as a field."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from geoad import operators as ops
from geoad.charts import Chart, Point
from geoad.curvature.selection import selecting
from geoad.errors import GeometryError
from geoad.fields import FormField
from geoad.fields.scalar import require_point
from geoad.kernels.kernel_gram import CONTRACTIONS
from geoad.kernels.memory import bytes_of
from geoad.metrics import Euclidean
from geoad.params import detach
from geoad.tangent.data import Data, space_of
from geoad.tangent.dense import Request, kernel_matrix, norms, row_blocks
from geoad.tangent.inverse import groups_of, sharp_of
from geoad.tangent.operator import KernelOperator
from geoad.tangent.shared import shared_rows
from geoad.tangent.tracked import is_tracked, tracked_matrix, tracked_norms
from geoad.tensors import Cometric, GeoTensor
from geoad.tensors.base import Axis

if TYPE_CHECKING:
    from geoad.module import GeoModule

__all__ = ["TangentKernel", "ntk"]


def ntk(
    geo: GeoModule,
    x1: Any,
    x2: Any = None,
    metric: FormField | None = None,
    *,
    outputs: Any = None,
    contract: str = "none",
    representation: str = "dense",
    max_memory: int = 1 << 28,
    progress: bool = False,
) -> TangentKernel:
    r"""The (empirical) neural tangent kernel :math:`K_{nc,md} = \partial_i f_c(x_n)\, G^{ij}\, \partial_j f_d(x_m)`, a field.

    Args:
        geo: the network f.
        x1: n inputs: a tensor, (inputs, targets), a mapping, a list of batches or a ``DataLoader``. Targets are left aside.
        x2: m other inputs, or None for those of `x1`.
        metric: G, a metric field on the network's manifold; semidefinite ones need damping. Default: the reference metric,
            which is the identity in the network's own parameters and moves along. (Any symmetric form with an inverse will do.)
        outputs: some of the outputs instead of all: an index, several, ``curvature.Difference(i, j)``, or a function of them.
        contract: "none"; "trace", the sum :math:`\sum_c K_{nc,mc}`; or "diagonal", the kernel of each output by itself. The
            last two cost as much less as there are fewer numbers.
        representation: "dense", or "implicit" for a matrix-free operator (one data set).
        max_memory: bytes for everything beside the result; fewer means more passes over the data. All outputs of a sample are
            taken together: where that is more, the logger "geoad" warns.
        progress: show a progress bar (needs tqdm).

    Returns:
        A field. Its value at p depends on the point alone, not on the chart in which p is given:

        ==============  =============================================================  ==========================
        contract        one data set                                                   two data sets
        ==============  =============================================================  ==========================
        "none"          `Cometric` at f(p): ``.components`` (n, c, n, c),              `GeoTensor` (n, c, m, d)
                        ``.to_dense()`` (nc, nc), c fastest
        "trace"         `Cometric` (n, n), at the origin                               `GeoTensor` (n, m)
        "diagonal"      a batch of c of them, at the outputs: (c, n, n)                a batch of c, (c, n, m)
        ==============  =============================================================  ==========================

    Layers are contracted as outer products of what goes in and what comes back (structured derivatives, Novak,
    Sohl-Dickstein & Schoenholz 2022); J is never formed for layers at one position. What the tap does not cover is multiplied
    out, exactly; `TangentKernel.coverage` says what that is. The value is differentiable in the point and the data: inside of
    a derivative all rows are multiplied out, n · c · d numbers.

    Raises:
        GeometryError: outputs or a kernel that are not finite, or depend on the batch; data that come in another order in
            every pass; a result larger than the memory of the machine.
        SingularMetricError: G has no inverse.

    >>> import torch, geoad
    >>> geo = geoad.GeoModule(torch.nn.Linear(2, 3))
    >>> geoad.ntk(geo, torch.ones(4, 2))(geo.point()).components.shape
    torch.Size([4, 3, 4, 3])
    """
    return TangentKernel(
        geo,
        x1,
        x2,
        metric,
        outputs=outputs,
        contract=contract,
        representation=representation,
        max_memory=bytes_of(max_memory),
        progress=progress,
    )


class TangentKernel:
    """The field p ↦ J G⁻¹ Jᵀ; made by `geoad.ntk`."""

    type = (2, 0)

    def __init__(
        self,
        geo: GeoModule,
        x1: Any,
        x2: Any = None,
        metric: FormField | None = None,
        *,
        outputs: Any = None,
        contract: str = "none",
        representation: str = "dense",
        max_memory: int = 1 << 28,
        progress: bool = False,
    ) -> None:
        _check(geo, metric, contract, representation, x2)
        self.geo, self.chosen = geo, outputs
        self.select = None if outputs is None else selecting(outputs)
        self.metric = Euclidean(geo.reference) if metric is None else metric.place(geo.reference)
        self.left = Data(geo, x1, self.select, shared=True)
        self.right = self.left if x2 is None else Data(geo, x2, self.select, shared=True)
        self.contract, self.representation = contract, representation
        self.max_memory, self.progress = max_memory, progress

    def with_data(self, x1: Any, x2: Any = None, **changes: Any) -> TangentKernel:
        """The kernel of the same network with the same settings on other data; `changes` are other arguments of `geoad.ntk`."""
        options: dict[str, Any] = {
            "metric": self.metric,
            "outputs": self.chosen,
            "contract": self.contract,
            "representation": self.representation if x2 is None else "dense",
            "max_memory": self.max_memory,
            "progress": self.progress,
        }
        return TangentKernel(self.geo, x1, x2, **(options | changes))

    @property
    def symmetric(self) -> bool:
        """Of one data set."""
        return self.left is self.right

    def __repr__(self) -> str:
        sizes = f"{self.left.batches.total}" + ("" if self.symmetric else f" × {self.right.batches.total}")
        made = f", metric={type(self.metric).__name__}, contract='{self.contract}', {self.representation}"
        return f"TangentKernel({sizes} samples{made})"

    def coverage(self, p: Point | None = None) -> dict[str, str]:
        """For each block of the network the rules that cover it, or the functions that prevent it."""
        return self.left.coverage(self._theta(p or self.geo.point()))

    def outputs(self, p: Point) -> Tensor:
        """f(p) on the first data set, (n, ..., c)."""
        return self.left.values(self._theta(p))

    def squared_norms(self, p: Point) -> Tensor:
        """|df_c(x_n)|² in the metric, (n, ..., c): the diagonal of K, whose sum is its trace, without K."""
        p = self._require(p)
        if self._tracked(p):
            return tracked_norms(self.left, sharp_of(self.metric, p, self.geo.reference), p.to(self.geo.reference).blocks)
        f = self.left.values(self._theta(p))
        with torch.no_grad():
            return norms(self._request(p), self._theta(p)).reshape(f.shape)

    def blocks(self, p: Point) -> Iterator[tuple[slice, Tensor]]:
        """(samples, their rows of K), one block after another, for kernels larger than the memory.

        The rows have the axes of the components of the value, with fewer samples. Over data that are shared out among processes
        (`geoad.distributed.shard`) these are the rows of the samples of this process, in one block, against the samples of
        all; places are in the order of the processes.
        """
        p = self._require(p, shared=True)
        if self._tracked(p):
            raise GeometryError(
                "the rows of a tangent kernel, block by block, were asked for inside of a derivative, which would be zero in "
                "silence. The whole kernel is differentiable, field(p), and so are its products, representation='implicit'; or "
                "detach the point: chart.point({name: block.detach() ...})."
            )
        request = self._request(p)
        f = self.left.values(self._theta(p))
        if self.right.batches.exchange is not None:
            place, block = shared_rows(request, self._theta(p))
            yield place, self._arranged(block, f.shape, torch.Size([self.right.batches.total, *f.shape[1:]]))
            return
        g = f if self.symmetric else self.right.values(self._theta(p))
        for samples, block in row_blocks(request, self._theta(p)):
            yield samples, self._arranged(block, f[samples].shape, g.shape)

    def __call__(self, p: Point) -> Any:
        p = self._require(p)
        if self.representation == "implicit":
            return self._implicit(p)
        matrix, f, g = self._matrix(p)
        data = self._arranged(matrix, f.shape, g.shape)
        batch = 1 if self.contract == "diagonal" else 0
        spaces = [self._space(side, value) for side, value in ((self.left, f), (self.right, g))]
        dims = [space.dim for space in spaces]
        flat = data.reshape(*data.shape[:batch], *dims)
        if not self.symmetric:
            return GeoTensor(flat, [Axis(space, True, space.dim) for space in spaces], p)
        op = ops.Dense(spaces[0].layout, flat, symmetric=True)
        return Cometric(spaces[0], op, self._image(spaces[0], f))

    # -- parts -------------------------------------------------------------------------------------------------------------

    def _require(self, p: Point, shared: bool = False) -> Point:
        if not shared and not (self.left.batches.exchange is None and self.right.batches.exchange is None):
            raise GeometryError(
                "a tangent kernel over data that are shared out among processes is had by its rows: each process holds those "
                "of its own samples. Go through kernel.blocks(p), or pass data that are not sharded."
            )
        p = require_point(p, self.geo.reference, "a tangent kernel")
        if p.batch_shape:
            raise GeometryError("a tangent kernel takes one point, found a batch of them. Go through them in a loop.")
        self.left.require_separate_samples()
        return p

    def _theta(self, p: Point) -> dict[str, Tensor]:
        return detach(p.to(self.geo.reference).blocks)

    def _request(self, p: Point) -> Request:
        for side in (self.left, self.right):
            side.renew()
        groups = groups_of(self.metric, p, self.geo.reference)
        return Request(self.left, self.right, groups, self.contract, self.max_memory, self.progress)

    def _tracked(self, p: Point) -> bool:
        return is_tracked(p.to(self.geo.reference).blocks, self.left, self.right)

    def _matrix(self, p: Point) -> tuple[Tensor, Tensor, Tensor]:
        if self._tracked(p):
            sharp, here = sharp_of(self.metric, p, self.geo.reference), p.to(self.geo.reference).blocks
            return tracked_matrix(self.left, self.right, sharp, here, self.contract)
        theta = self._theta(p)
        with torch.no_grad():
            matrix, f, g = kernel_matrix(self._request(p), theta)
        return matrix, self.left.joined(theta, f), self.right.joined(theta, g)

    def _arranged(self, matrix: Tensor, f: torch.Size, g: torch.Size) -> Tensor:
        """With the axes of the outputs."""
        if self.contract == "none":
            return matrix.reshape(*f, *g)
        return matrix.reshape(*matrix.shape[:-2], *_contracted(f), *_contracted(g))

    def _space(self, side: Data, f: Tensor) -> Chart:
        shape = f.shape if self.contract == "none" else _contracted(f.shape)
        return space_of(self.geo, side.source, (side.meaning, self.contract), shape)

    def _image(self, space: Chart, f: Tensor) -> Point:
        """f(p); for a sum over outputs there is no such point, and the origin stands for it."""
        if self.contract == "none":
            return space.point({"f": f})
        if self.contract == "trace":
            return space.point({"f": torch.zeros_like(f[..., 0] if f.ndim > 1 else f)})
        return space.point({"f": (f.movedim(-1, 0) if f.ndim > 1 else f.unsqueeze(0)).contiguous()})

    def _implicit(self, p: Point) -> Cometric:
        f = self.left.values(self._theta(p))
        space = self._space(self.left, f)
        return Cometric(space, KernelOperator(self, p, space.layout, f), self._image(space, f))


def _contracted(shape: torch.Size) -> torch.Size:
    """Without the last axis, the outputs; one number for each sample is that already."""
    return shape[:-1] if len(shape) > 1 else shape


def _check(geo: Any, metric: Any, contract: str, representation: str, x2: Any) -> None:
    if not callable(getattr(geo, "evaluate", None)):
        raise GeometryError(
            f"a tangent kernel belongs to a network, found {type(geo).__name__}. Pass the geoad.GeoModule; bare networks have "
            "no chart."
        )
    if metric is not None and not isinstance(metric, FormField):
        raise GeometryError(
            f"metric= must be a metric field of the network's manifold, found {type(metric).__name__}. A kernel is a field: it "
            "needs G at every point; pass for instance geoad.metrics.Constant(chart, G)."
        )
    if contract not in CONTRACTIONS:
        raise GeometryError(f"contract={contract!r} is not offered. Available: {', '.join(map(repr, CONTRACTIONS))}.")
    if representation not in ("dense", "implicit"):
        raise GeometryError(f"representation={representation!r} is not offered for a tangent kernel: 'dense' or 'implicit'.")
    if representation == "implicit" and (x2 is not None or contract == "diagonal"):
        what = "two data sets" if x2 is not None else "contract='diagonal'"
        raise GeometryError(
            f"a matrix-free kernel is an operator on the outputs over one data set, and was asked for {what}. Use "
            "representation='dense', or the kernel of the union of both sets."
        )
