"""Some outputs of a network instead of all: class subsets and differences, as maps of the outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from geoad.errors import GeometryError

__all__ = ["Difference", "Subset", "selecting"]


@dataclass(frozen=True)
class Subset:
    """The outputs with these indices, in this order: (n, ..., c) -> (n, ..., len(indices)).

    >>> import torch
    >>> Subset((2, 0))(torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[3., 1.]])
    """

    indices: tuple[int, ...]
    axis: int = -1

    def __post_init__(self) -> None:
        if not self.indices or len(set(self.indices)) != len(self.indices):
            raise GeometryError(
                f"a subset of the outputs needs at least one index and none twice, found {list(self.indices)}. An output "
                "that is there twice makes every curvature singular; pass each index once, e.g. outputs=[0, 3]."
            )

    def __call__(self, outputs: Tensor) -> Tensor:
        """The selected outputs."""
        _require_indices(outputs, self.indices, self.axis)
        size = outputs.shape[self.axis]
        index = torch.tensor([i % size for i in self.indices], device=outputs.device)
        return outputs.index_select(self.axis, index)


@dataclass(frozen=True)
class Difference:
    """f_i - f_j, e.g. the margin between two classes: (n, ..., c) -> (n, ..., 1).

    >>> import torch
    >>> Difference(2, 0)(torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[2.]])
    """

    i: int
    j: int
    axis: int = -1

    def __call__(self, outputs: Tensor) -> Tensor:
        """The difference, with an axis of length 1 in place of the outputs."""
        _require_indices(outputs, (self.i, self.j), self.axis)
        size = outputs.shape[self.axis]
        if self.i % size == self.j % size:
            raise GeometryError(
                f"Difference({self.i}, {self.j}) is zero everywhere, and so is its curvature. Name two different outputs."
            )
        return outputs.narrow(self.axis, self.i % size, 1) - outputs.narrow(self.axis, self.j % size, 1)


def selecting(outputs: Any, axis: int = -1) -> Callable[[Tensor], Tensor]:
    """The map of a network's outputs that ``outputs=`` of a curvature field stands for.

    Args:
        outputs: None (all), an index, several ([0, 3], a range, a 1-D tensor of integers), a `Difference`, or any callable that
            maps outputs (n, ..., c) to outputs (n, ..., c').
        axis: where the indices count.

    Raises:
        GeometryError: it is none of these.
    """
    if outputs is None:
        return _all
    if callable(outputs):
        return cast("Callable[[Tensor], Tensor]", outputs)
    indices: Any = outputs.tolist() if hasattr(outputs, "tolist") else outputs  # tensors, and the arrays and numbers of numpy
    listed: list[Any] = [indices] if isinstance(indices, int) else list(indices) if isinstance(indices, Iterable) else [None]
    listed = [each.__index__() if not isinstance(each, bool) and hasattr(each, "__index__") else each for each in listed]
    if all(isinstance(each, int) and not isinstance(each, bool) for each in listed):
        return Subset(tuple(listed), axis)
    raise GeometryError(
        f"outputs={outputs!r} selects no outputs. Pass an index, a list of indices such as [0, 3], "
        "geoad.curvature.Difference(i, j), or a function of the outputs."
    )


def _all(outputs: Tensor) -> Tensor:
    return outputs


def _require_indices(outputs: Tensor, indices: tuple[int, ...], axis: int) -> None:
    if outputs.ndim < 2:
        raise GeometryError(
            f"outputs are selected along an axis of (n, ..., c), but the network returned {tuple(outputs.shape)}. Give it a "
            "batch axis and an output axis."
        )
    size = outputs.shape[axis]
    bad = [i for i in indices if not -size <= i < size]
    if bad:
        raise GeometryError(
            f"the network has {size} outputs (shape {tuple(outputs.shape)}, axis {axis}), so there is no output {bad}. Indices "
            f"run from 0 to {size - 1}."
        )
