"""The tap: what goes into the affine layers of a network and what comes back, seen while it runs.

`Tap` looks at every torch function that a parameter is handed to, by the identity of the tensor, so functional code, weights
that are used twice and layers of one's own are seen as well as modules. Affine operations are *tapped*: their input is
recorded, and a zero is added to their output, by which one can differentiate. Every other use of a parameter is noted, so
that no parameter is skipped in silence: structure is used only where all uses of a parameter are tapped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode, resolve_name

from geoad.params import flatten

__all__ = ["AffineUse", "Tap"]


@dataclass(frozen=True)
class AffineUse:
    """One affine operation, out = a Wᵀ + b.

    Attributes:
        weight: the name of W (out, in), or None if it is no parameter.
        bias: the name of b (out,), or None.
        shape: the shape of the output.
    """

    weight: str | None
    bias: str | None
    shape: tuple[int, ...]


class Tap(TorchFunctionMode):
    """Records what happens to parameters while it is active.

    Args:
        names: id of a parameter -> its name.
        zeros: what is added to the outputs of the tapped operations, in the order of `uses`; None for nothing.

    Attributes:
        uses: the tapped operations, in the order in which they ran.
        inputs: their inputs, (..., in).
        others: name of a parameter -> the functions that it was handed to otherwise.

    >>> import torch
    >>> from geoad.kernels.tap import Tap
    >>> w, x = torch.eye(2), torch.ones(3, 2)
    >>> with Tap({id(w): "w"}) as tap:
    ...     y = torch.nn.functional.linear(x, w) + w.sum()
    >>> tap.uses, tap.others
    ([AffineUse(weight='w', bias=None, shape=(3, 2))], {'w': ['torch.Tensor.sum']})
    """

    def __init__(self, names: Mapping[int, str], zeros: list[Tensor] | None = None) -> None:
        super().__init__()
        self.names, self.zeros = names, zeros
        self.uses: list[AffineUse] = []
        self.inputs: list[Tensor] = []
        self.others: dict[str, list[str]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear:
            return self._linear(*args, **kwargs)
        if func not in _LOOKS:
            self._note(func, (args, kwargs))
        return func(*args, **kwargs)

    def _note(self, func: Any, arguments: Any) -> None:
        for leaf in flatten(arguments)[0]:
            name = self.names.get(id(leaf))
            if name is not None:
                self.others.setdefault(name, []).append(resolve_name(func) or getattr(func, "__name__", str(func)))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        w, b = self.names.get(id(weight)), self.names.get(id(bias))
        self._note(functional.linear, input)
        if w is not None and input.is_nested:
            self._note(functional.linear, weight)
            return functional.linear(input, weight, bias)
        out = functional.linear(input, weight, bias)
        if w is None and b is None:
            return out
        self.uses.append(AffineUse(w, b, tuple(out.shape)))
        self.inputs.append(input)
        return out if self.zeros is None else out + self.zeros[len(self.uses) - 1].to(out.dtype)


def _getters(*names: str) -> set[Any]:
    return {getattr(Tensor, name).__get__ for name in names}


_LOOKS: set[Any] = {
    *_getters("shape", "dtype", "device", "ndim", "requires_grad", "is_leaf", "grad", "is_sparse", "is_nested", "layout"),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__, Tensor.__hash__),
    Tensor.detach,
}
"""What asks a tensor for anything but its numbers, or cuts off derivatives."""
