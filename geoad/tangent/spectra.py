"""Spectra of kernels, and kernel principal components."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geoad import operators as ops
from geoad.charts import Point
from geoad.errors import GeometryError
from geoad.operators.spectra import symmetric_eigh
from geoad.tangent.estimates import centred
from geoad.tangent.kernel import TangentKernel
from geoad.tensors import Cometric

__all__ = ["KernelPCA", "kernel_pca", "spectrum"]


def spectrum(kernel: Cometric, k: int | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvalues (k,), descending, and orthonormal eigenvectors (k, n, ..., c), in the Euclidean metric of the outputs.

    Args:
        kernel: the value of a `geoad.ntk` field; a matrix-free one is iterated (Lanczos), with a batch (contract="diagonal")
            all results have its axis in front.
        k: how many; None for all.

    >>> import torch, geoad
    >>> geo = geoad.GeoModule(torch.nn.Linear(2, 1, bias=False))
    >>> values, vectors = geoad.tangent.spectrum(geoad.ntk(geo, torch.tensor([[1.0, 0.0], [0.0, 2.0]]))(geo.point()))
    >>> values, vectors.shape
    (tensor([4., 1.]), torch.Size([2, 2, 1]))
    """
    op = kernel.op
    if ops.batch_shape(op):
        values, vectors = symmetric_eigh(ops.to_dense(op))
        chosen = slice(None) if k is None else slice(0, k)
        values, rows = values.flip(-1)[..., chosen], vectors.flip(-1).mT[..., chosen, :]
    else:
        values, vectors = ops.eigh(op, None, k)
        rows = vectors.mT
    return values, rows.reshape(*rows.shape[:-1], *op.layout["f"])


@dataclass(frozen=True)
class KernelPCA:
    """Principal components of the features G^-½ ∂f(x), after their mean over the samples has been taken away.

    Attributes:
        field: the kernel.
        point: where it was taken.
        values: eigenvalues (k,) of the centred kernel: the variances times n.
        vectors: its eigenvectors (k, n, ...).
        total: its trace, the sum of all variances times n.
        means: the mean of the kernel over its first sample, (..., n, ...): what new data are centred by.
    """

    field: TangentKernel
    point: Point
    values: Tensor
    vectors: Tensor
    total: Tensor
    means: Tensor

    @property
    def explained(self) -> Tensor:
        """The share of the variance in each component."""
        return self.values / self.total

    @property
    def scores(self) -> Tensor:
        """The coordinates (n, ..., k) of the data."""
        return (self.vectors.movedim(0, -1)) * self.values.clamp_min(0).sqrt()

    def project(self, x: Any) -> Tensor:
        """The coordinates (m, ..., k) of new data."""
        axes = self.vectors.ndim - 1
        cross = self.field.with_data(x, self.field.left.source)(self.point).components  # (m, ..., n, ...)
        grand = self.means.mean(axes - 1, keepdim=True)  # over the second sample
        shifted = cross - cross.mean(axes, keepdim=True) - self.means + grand
        weights = self.vectors.flatten(1) / self.values.sqrt().unsqueeze(-1)
        return shifted.flatten(axes) @ weights.mT


def kernel_pca(field: TangentKernel, p: Point, k: int = 2) -> KernelPCA:
    """Kernel principal component analysis of a tangent kernel (Schölkopf, Smola & Müller 1998).

    Args:
        field: a kernel of one data set; contract="trace", or one output or difference of outputs, for one score a sample.
        p: the point.
        k: how many components.

    Raises:
        GeometryError: there are fewer components with a positive variance.

    >>> import torch, geoad
    >>> geo = geoad.GeoModule(torch.nn.Linear(2, 1, bias=False))  # the principal components of x itself
    >>> field = geoad.ntk(geo, torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]]), contract="trace")
    >>> found = geoad.tangent.kernel_pca(field, geo.point(), k=1)
    >>> found.explained.round(decimals=3), found.scores.abs().squeeze().round(decimals=3)
    (tensor([1.]), tensor([5., 0., 5.]))
    """
    if not field.symmetric or field.contract == "diagonal":
        raise GeometryError(
            "kernel principal components need the kernel of one data set with contract='none' or 'trace': they are "
            f"eigenvectors of one matrix, and this is {field!r}. Use field.with_data(x, contract='trace')."
        )
    kernel = field(p)
    middle = centred(kernel)
    values, vectors = spectrum(middle, k)
    means = _means(kernel)
    places = kernel.op.layout["f"][1:].numel()
    total = field.squared_norms(p).sum() - means.reshape(places, -1, places).sum(1).trace()  # tr HKH
    eps = torch.finfo(values.dtype).eps * kernel.op.dim
    if not bool((values > eps * values[0].clamp_min(0)).all()) or len(values) < k:
        rank = int((values > eps * values[0].clamp_min(0)).sum())
        raise GeometryError(
            f"{k} principal components were asked for, but only {rank} have a positive variance: a centred kernel of "
            f"{field.left.batches.total} samples has a rank below that. Ask for fewer."
        )
    return KernelPCA(field, p, values, vectors, total, means)


def _means(kernel: Cometric) -> Tensor:
    """(1/n) Σ_n K[n, ..., m, ...], shape (..., m, ...): one product for each place of a sample."""
    shape = kernel.op.layout["f"]
    like = kernel.op.like
    places = shape[1:].numel()
    eye = torch.eye(places, dtype=like.dtype, device=like.device).reshape(places, 1, *shape[1:])
    found = kernel.op.mv({"f": (eye / shape[0]).expand(places, *shape).contiguous()})["f"]
    return found.reshape(*shape[1:], *shape)
