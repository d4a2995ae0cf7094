"""How a tangent kernel changes during training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from geoad.charts import Point
from geoad.errors import GeometryError
from geoad.tangent.estimates import alignment, effective_rank, frobenius, trace
from geoad.tangent.kernel import TangentKernel
from geoad.tangent.spectra import spectrum
from geoad.tensors import Cometric

__all__ = ["Evolution", "Snapshot"]


@dataclass(frozen=True)
class Snapshot:
    """A kernel at one step.

    Attributes:
        step: the number of the step.
        eigenvalues: the largest ones, descending.
        trace, frobenius, effective_rank: of the kernel.
        target_alignment: with the targets; nan if there are none.
        initial_alignment: with the kernel of the first snapshot: 1 in the lazy regime.
        velocity: 1 - alignment with the kernel of the snapshot before: how far it turned.
    """

    step: int
    eigenvalues: Tensor
    trace: float
    frobenius: float
    effective_rank: float
    target_alignment: float
    initial_alignment: float
    velocity: float


class Evolution:
    r"""Records spectrum and alignment of a kernel during training (Fort et al. 2020; Baratin et al. 2021).

    Args:
        field: a kernel of one data set, stored, with contract="none" or "trace".
        targets: for the alignment with :math:`yy^\top`, see `geoad.tangent.alignment`.
        k: how many eigenvalues are kept.

    >>> import torch, geoad
    >>> geo = geoad.GeoModule(torch.nn.Linear(2, 1))
    >>> record = geoad.tangent.Evolution(geoad.ntk(geo, torch.randn(5, 2)), k=2)
    >>> record().initial_alignment
    1.0
    """

    def __init__(self, field: TangentKernel, targets: Tensor | None = None, k: int = 10) -> None:
        if not field.symmetric or field.contract == "diagonal" or field.representation != "dense":
            raise GeometryError(
                f"an evolution is that of one stored kernel matrix over fixed data, found {field!r}. Use ntk(geo, x) with "
                "contract='none' or 'trace' and representation='dense'."
            )
        self.field, self.targets, self.k = field, targets, k
        self.snapshots: list[Snapshot] = []
        self._first: Cometric | None = None
        self._last: Cometric | None = None

    def __call__(self, step: int | None = None, p: Point | None = None) -> Snapshot:
        """Record the kernel at p, by default where the network is now, as that of `step` (default: one more than the last)."""
        kernel = self.field(self.field.geo.point() if p is None else p)
        number = step if step is not None else (self.snapshots[-1].step + 1 if self.snapshots else 0)
        first = kernel if self._first is None else self._first
        last = kernel if self._last is None else self._last
        snapshot = Snapshot(
            number,
            spectrum(kernel, min(self.k, kernel.op.dim))[0],
            float(trace(kernel)),
            float(frobenius(kernel)),
            float(effective_rank(kernel)),
            float("nan") if self.targets is None else float(alignment(kernel, self.targets)),
            1.0 if first is kernel else float(alignment(kernel, first)),
            0.0 if last is kernel else 1 - float(alignment(kernel, last)),
        )
        self._first, self._last = first, kernel
        self.snapshots.append(snapshot)
        return snapshot

    def table(self) -> dict[str, Tensor]:
        """All snapshots: for each quantity a tensor with the steps along its first axis."""
        if not self.snapshots:
            raise GeometryError("nothing has been recorded yet. Call the recorder after a step: record().")
        names = ("trace", "frobenius", "effective_rank", "target_alignment", "initial_alignment", "velocity")
        steps = torch.tensor([each.step for each in self.snapshots], device="cpu")
        found = {name: [getattr(each, name) for each in self.snapshots] for name in names}
        columns = {name: torch.tensor(values, dtype=torch.float64, device="cpu") for name, values in found.items()}
        return {"step": steps, **columns, "eigenvalues": torch.stack([each.eigenvalues for each in self.snapshots])}
