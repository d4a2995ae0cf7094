"""Low-rank adaptation: weights that differ from given ones by a product of two thin matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geoad.errors import GeometryError
from geoad.maps.anchor import anchored, plain
from geoad.maps.factorization import balanced_factors, matrix_sizes, require_rank, singular_values, spectral_slack
from geoad.maps.smooth import SmoothMap
from geoad.params import Layout

__all__ = ["LoRA"]


class LoRA(SmoothMap):
    r"""W = W₀ + (α/r) B A for every matched block, with W₀ kept as it is: a smooth map whose rank changes.

    The blocks of ψ are ``<name>_A`` and ``<name>_B``, of the shapes of ``lora_A`` and ``lora_B`` in the library peft: A
    is (r, n), B is (m, r) for a weight of shape (m, n); (r, in, height, width) and (m, r, 1, 1) for a convolution. Vectors go
    from (A, B) to W, functions, differentials and forms from W to (A, B); everything else is refused by name:

    * :math:`J(\dot A, \dot B) = \frac{α}{r}(\dot B A + B \dot A)`,
    * :math:`J^\top Z = \frac{α}{r}(B^\top Z,\ Z A^\top)`, the gradient that autodiff finds in (A, B).

    J has rank r(m + n - r) where A and B have rank r, but only r m at the usual starting point B = 0, so there (A, B)
    are no coordinates of anything: metrics in (A, B) are semidefinite forms, inverses of them do not exist.

    The section at W₀ is the starting point of peft: A uniform in :math:`±1/\sqrt n`, B = 0. Elsewhere it has balanced
    factors, where W - W₀ has a rank ≤ r; other W are outside of the domain.

    Args:
        rank: r.
        alpha: α; the factor before B A is α/r. Default: r, so that the factor is 1.
        base: W₀: a point of any chart of the manifold, or a dict name -> tensor. To adapt a network pass ``geo.point()``.
            Default: 0, so that only weights of rank ≤ r are in the domain.
        generator: where the A of the section at W₀ is drawn.

    Raises:
        GeometryError: a block has fewer than two axes, or is not in the base.
        ChartDomainError: W - W₀ has a rank above r.

    >>> import torch, geoad
    >>> chart = geoad.Chart({"w": (6, 5)}, name="w")
    >>> p = chart.point(torch.randn(6, 5))
    >>> psi = chart.reparametrize(geoad.maps.LoRA(2, base=p), name="lora").target
    >>> psi.layout, bool((p.to(psi).components["w_B"] == 0).all())
    (Layout(w_A: (2, 5), w_B: (6, 2)), True)

    Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models (2021).
    """

    def __init__(
        self, rank: int, alpha: float | None = None, *, base: Any = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.rank = require_rank(rank, "LoRA")
        self.factor = 1.0 if alpha is None else float(alpha) / rank
        if self.factor == 0 or self.factor != self.factor or self.factor in (float("inf"), -float("inf")):
            raise GeometryError(
                f"LoRA needs a finite alpha ≠ 0, found {alpha}: W = W₀ + (alpha / rank) B A would not depend on A and B."
            )
        self.base = plain(base)
        self.generator = generator

    def extra_repr(self) -> str:
        return f"rank={self.rank}, factor={self.factor:g}"

    def part_shapes(self, shape: torch.Size) -> dict[str, tuple[int, ...]]:
        self._shape, self._sizes = shape, matrix_sizes(shape, "LoRA")
        return {"A": (self.rank, *shape[1:]), "B": (shape[0], self.rank, *(1,) * (len(shape) - 2))}

    def prepare_parts(self, layout: Layout) -> None:
        name = layout.names[0]
        self._from_zero = self.base is None
        base = {name: torch.zeros(self._shape, device="cpu")} if self._from_zero else self.base
        self.base = None
        self.register_buffer("frozen", anchored(base, layout, "LoRA", "the weights W₀ that it adapts")[name])
        device = torch.device("cpu") if self.generator is None else self.generator.device
        shape = (self.rank, self._sizes[1])
        uniform = torch.rand(shape, generator=self.generator, dtype=torch.float64, device=device).cpu()
        self.register_buffer("start", (2 * uniform - 1) / max(shape[1], 1) ** 0.5)

    def _factors(self, y: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """B (m × r) and A (r × n) as matrices."""
        return y["B"].reshape(self._sizes[0], self.rank), y["A"].reshape(self.rank, self._sizes[1])

    def _parts_of_factors(self, b: Tensor, a: Tensor) -> dict[str, Tensor]:
        shapes = self.part_shapes(self._shape)
        return {"A": a.reshape(shapes["A"]), "B": b.reshape(shapes["B"])}

    # -- the map -------------------------------------------------------------------------------------------------------

    def inverse_value(self, y: dict[str, Tensor]) -> Tensor:
        b, a = self._factors(y)
        return self.constant("frozen", b) + self.factor * (b @ a).reshape(self._shape)

    def _update(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """W - W₀ as a matrix, and the size of a singular value of it that is nothing but rounding."""
        frozen = self.constant("frozen", x)
        slack = torch.maximum(spectral_slack(x.reshape(self._sizes)), spectral_slack(frozen.reshape(self._sizes)))
        return (x - frozen).reshape(self._sizes), slack

    def value(self, x: Tensor) -> dict[str, Tensor]:
        update, slack = self._update(x)
        b, a = balanced_factors(update / self.factor, self.rank)
        at_base = update.norm() <= slack
        start = self.constant("start", x)
        return self._parts_of_factors(torch.where(at_base, torch.zeros_like(b), b), torch.where(at_base, start, a))

    def bad_domain(self, x: Tensor) -> str | None:
        update, slack = self._update(x)
        beyond = singular_values(update)[self.rank :]
        if not beyond.numel() or bool(beyond[0] <= slack):
            return None
        condition = (
            f"LoRA of rank {self.rank} reaches weights that differ from W₀ by a matrix of at most that rank, but the singular "
            f"value number {self.rank + 1} of the difference is {float(beyond[0]):.6g}"
        )
        if self._from_zero:
            condition += " (no base was given, so W₀ = 0; to adapt these weights pass LoRA(rank, base=geo.point()))"
        return condition

    # -- products ------------------------------------------------------------------------------------------------------

    def push_inverse_block(self, x: Tensor, y: dict[str, Tensor], v: dict[str, Tensor]) -> Tensor:
        (b, a), (db, da) = self._factors(y), self._factors(v)
        return self.factor * (db @ a + b @ da).reshape(self._shape)

    def pull_inverse_block(self, x: Tensor, y: dict[str, Tensor], w: Tensor) -> dict[str, Tensor]:
        b, a = self._factors(y)
        z = self.factor * w.reshape(self._sizes)
        return self._parts_of_factors(z @ a.mT, b.mT @ z)
