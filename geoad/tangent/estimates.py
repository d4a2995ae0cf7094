r"""Numbers that describe a kernel: trace, Frobenius norm, effective rank, alignment; exact, or from random products.

With respect to the Euclidean metric of the outputs. For a stored matrix they are exact. For a matrix-free kernel they are
estimates with their standard errors: Hutchinson's :math:`\operatorname{tr} A \approx \frac1m \sum z^\top A z` with random
signs z, or Hutch++ (Meyer, Musco, Musco & Woodruff 2021), which takes the part of A in the span Q of a few products exactly:

.. math:: \operatorname{tr} A^\top B = \operatorname{tr} (AQ)^\top BQ + \mathbb E\, (Az_\perp)^\top B z_\perp .
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geoad import operators as ops
from geoad.errors import GeometryError
from geoad.operators import LinearOperator
from geoad.params import Blocks
from geoad.tensors import Cometric

__all__ = ["Estimate", "alignment", "centred", "effective_rank", "frobenius", "trace"]


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error.

    Attributes:
        value: the number.
        error: one standard deviation; 0 where the value is exact.
        products: how many products with the kernel it took.
    """

    value: Tensor
    error: Tensor
    products: int

    def __float__(self) -> float:
        return float(self.value)

    def __repr__(self) -> str:
        return f"{float(self.value):.6g} ± {float(self.error):.2g} ({self.products} products)"


# -- centring ----------------------------------------------------------------------------------------------------------------


class _Centred(ops.Implicit):
    """H K H with H = I - 11ᵀ/n over the samples."""

    def __init__(self, inner: LinearOperator) -> None:
        super().__init__(inner.layout, {"f": inner.like}, symmetric=True)
        self.inner = inner
        self.axes = len(inner.layout["f"])

    def mv(self, v: Blocks) -> Blocks:
        return {"f": self._without_mean(self.inner.mv({"f": self._without_mean(v["f"])})["f"])}

    def _without_mean(self, u: Tensor) -> Tensor:
        return u - u.mean(-self.axes, keepdim=True)


def centred(kernel: Cometric) -> Cometric:
    """H K H with H = I - 11ᵀ/n: the kernel of the features without their mean over the samples, output by output."""
    op = _operator(kernel)
    inner = _Centred(op)
    made = ops.Dense(op.layout, ops.to_dense(inner), symmetric=True) if isinstance(op, ops.Dense) else inner
    return Cometric(kernel.home, made, kernel.at.to(kernel.home)).to(kernel.chart)


def _operator(kernel: Any) -> LinearOperator:
    if not isinstance(kernel, Cometric) or kernel.home.layout.names != ("f",) or kernel.batch_shape:
        raise GeometryError(
            f"this takes the kernel of one data set, the value geoad.ntk(geo, x)(p) with contract='none' or 'trace', found "
            f"{type(kernel).__name__}. For the kernels of single outputs go through them one by one, outputs=[c]."
        )
    return kernel.op


# -- estimates ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sampled:
    """A number: an exact part, and samples of the rest."""

    exact: Tensor
    samples: Tensor

    @property
    def value(self) -> Tensor:
        return self.exact + self.samples.mean() if len(self.samples) else self.exact


def _exact(value: Tensor) -> _Sampled:
    return _Sampled(value, value.new_zeros(0))


def _delta(parts: list[tuple[_Sampled, Tensor]]) -> Tensor:
    """The standard error of a function with these partial derivatives, its arguments sampled together."""
    mixed = torch.stack([slope * part.samples for part, slope in parts]).sum(0)
    count = len(mixed)
    if count < 2:
        return mixed.new_full((), math.nan if count else 0.0)
    return mixed.std() / count**0.5


class _Products:
    """Products of kernels with an orthonormal basis Q and with random vectors in its complement; rows are vectors."""

    def __init__(self, kernels: list[LinearOperator], products: int, method: str, generator: torch.Generator | None) -> None:
        like, self.d = kernels[0].like, kernels[0].layout.dim
        exact = all(isinstance(each, ops.Dense) for each in kernels)
        sketch = _split(self.d, products, method, exact)
        self.matrices = [ops.to_dense(each) for each in kernels] if exact else None
        self.count = 0 if exact else products
        if exact:
            return
        seen = sum(_apply(each, _signs(sketch, self.d, like, generator)) for each in kernels) if sketch else None
        self.q = torch.linalg.qr(seen.mT).Q.mT if isinstance(seen, Tensor) else like.new_zeros(0, self.d)
        z = _signs(max(0, products - 2 * sketch), self.d, like, generator)
        self.z = z - (z @ self.q.mT) @ self.q
        self.images = [(_apply(each, self.q), _apply(each, self.z)) for each in kernels]

    def trace(self, i: int) -> _Sampled:
        """tr A."""
        if self.matrices is not None:
            return _exact(self.matrices[i].diagonal().sum())
        on_basis, on_rest = self.images[i]
        return _Sampled((self.q * on_basis).sum(), (self.z * on_rest).sum(-1))

    def inner(self, i: int, j: int) -> _Sampled:
        """tr AᵀB."""
        if self.matrices is not None:
            return _exact((self.matrices[i] * self.matrices[j]).sum())
        (a, x), (b, y) = self.images[i], self.images[j]
        return _Sampled((a * b).sum(), (x * y).sum(-1))

    def estimate(self, value: Tensor, parts: list[tuple[_Sampled, Tensor]]) -> Estimate:
        """With the standard error that follows from those of the parts."""
        return Estimate(value, _delta(parts), self.count)


def _split(d: int, products: int, method: str, exact: bool) -> int:
    if method not in ("hutch++", "hutchinson"):
        raise GeometryError(f"method={method!r} is not offered for an estimate. Available: 'hutch++' and 'hutchinson'.")
    if not exact and products < (6 if method == "hutch++" else 2):
        raise GeometryError(f"{products} products are too few for an estimate with its error. Take 6 or more.")
    return min(d, products // 3) if method == "hutch++" else 0


def _signs(count: int, d: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else like.device
    bits = torch.randint(0, 2, (count, d), generator=generator, device=device)
    return (2 * bits - 1).to(device=like.device, dtype=like.dtype)


def _apply(op: LinearOperator, rows: Tensor) -> Tensor:
    if not len(rows):
        return rows
    return op.layout.ravel(op.mv(op.layout.unravel(rows)))


def trace(
    kernel: Cometric, products: int = 60, *, method: str = "hutch++", generator: torch.Generator | None = None
) -> Estimate:
    """tr K.

    Args:
        kernel: the value of a `geoad.ntk` field.
        products: how many products with a matrix-free kernel; the error falls with their root ("hutchinson"), or faster.
        method: "hutch++" or "hutchinson".
        generator: for the random signs.

    >>> import torch, geoad
    >>> geo = geoad.GeoModule(torch.nn.Linear(2, 1, bias=False))  # K(x, y) = x · y
    >>> K = geoad.ntk(geo, torch.tensor([[1.0, 0.0], [0.0, 2.0]]))(geo.point())
    >>> geoad.tangent.trace(K)
    5 ± 0 (0 products)
    """
    found = _Products([_operator(kernel)], products, method, generator)
    t = found.trace(0)
    return found.estimate(t.value, [(t, torch.ones_like(t.value))])


def frobenius(
    kernel: Cometric, products: int = 60, *, method: str = "hutch++", generator: torch.Generator | None = None
) -> Estimate:
    """√tr K², the Frobenius norm; arguments as for `trace`."""
    found = _Products([_operator(kernel)], products, method, generator)
    f = found.inner(0, 0)
    norm = f.value.clamp_min(0).sqrt()
    return found.estimate(norm, [(f, 0.5 / norm)])


def effective_rank(
    kernel: Cometric, products: int = 60, *, method: str = "hutch++", generator: torch.Generator | None = None
) -> Estimate:
    """(tr K)²/tr K², the number of equal eigenvalues with the same trace and norm; arguments as for `trace`.

    >>> import torch, geoad
    >>> geo = geoad.GeoModule(torch.nn.Linear(3, 1, bias=False))
    >>> float(geoad.tangent.effective_rank(geoad.ntk(geo, torch.eye(3))(geo.point())))
    3.0
    """
    found = _Products([_operator(kernel)], products, method, generator)
    t, f = found.trace(0), found.inner(0, 0)
    rank = t.value.square() / f.value
    return found.estimate(rank, [(t, 2 * rank / t.value), (f, -rank / f.value)])


def alignment(
    kernel: Cometric,
    other: Cometric | Tensor,
    products: int = 60,
    *,
    method: str = "hutch++",
    generator: torch.Generator | None = None,
) -> Estimate:
    r"""The cosine :math:`\operatorname{tr} K_1K_2 / (|K_1||K_2|)` (Cristianini, Shawe-Taylor, Elisseeff & Kandola 2001).

    Args:
        kernel: the value of a `geoad.ntk` field, perhaps `centred`.
        other: another kernel on outputs of the same shape, of any network and at any point, or targets: y in the shape of the
            outputs for K₂ = yyᵀ; (n, ..., k) with one axis more for the sum :math:`\sum_k y_k y_k^\top`.
        products: as for `trace`, with each of the kernels.
        method: as for `trace`.
        generator: as for `trace`.

    >>> import torch, geoad
    >>> geo = geoad.GeoModule(torch.nn.Linear(2, 1, bias=False))
    >>> K = geoad.ntk(geo, torch.tensor([[1.0, 0.0], [0.0, 2.0]]))(geo.point())
    >>> round(float(geoad.tangent.alignment(K, torch.tensor([[0.0], [1.0]]))), 4)  # 4 / √17
    0.9701
    """
    op = _operator(kernel)
    if isinstance(other, Tensor):
        return _with_targets(op, other, products, method, generator)
    second = _operator(other)
    if second.layout != op.layout:
        raise GeometryError(
            f"kernels on outputs of the shapes {tuple(op.layout['f'])} and {tuple(second.layout['f'])} have no alignment: they "
            "are matrices of different sizes. Take the same data, outputs= and contract= for both."
        )
    found = _Products([op, second], products, method, generator)
    cross, a, b = found.inner(0, 1), found.inner(0, 0), found.inner(1, 1)
    norm = (a.value * b.value).sqrt()
    value = cross.value / norm
    return found.estimate(value, [(cross, 1 / norm), (a, -0.5 * value / a.value), (b, -0.5 * value / b.value)])


def _with_targets(
    op: LinearOperator, targets: Tensor, products: int, method: str, generator: torch.Generator | None
) -> Estimate:
    shape = op.layout["f"]
    if targets.shape == shape:
        targets = targets.unsqueeze(-1)
    if targets.shape[:-1] != shape or not targets.is_floating_point():
        raise GeometryError(
            f"targets for the alignment with a kernel on outputs of shape {tuple(shape)} must be real numbers of that shape "
            f"(or with one axis more), found {targets.dtype} of shape {tuple(targets.shape)}. For classes use "
            "geoad.tangent.one_hot(labels, c)."
        )
    y = targets.reshape(op.layout.dim, -1).mT.to(op.like)
    found = _Products([op], products, method, generator)
    cross, f = (y * _apply(op, y)).sum(), found.inner(0, 0)
    value = cross / ((y @ y.mT).norm() * f.value.sqrt())
    return found.estimate(value, [(f, -0.5 * value / f.value)])
