"""Numbers that are not finite: whether there are any, and a look at the first product of an operator for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from geoad.kernels.ladder import at_top_level
from geoad.params import Blocks, is_wrapped

__all__ = ["FirstLook", "all_finite", "how_many"]


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether all numbers are finite, a boolean of shape () on their device: one pass over them, without a copy.

    >>> import torch
    >>> from geoad.kernels.finite import all_finite
    >>> all_finite([torch.ones(3), torch.tensor([torch.nan])])
    tensor(False)
    """
    real = (torch.view_as_real(each) if each.is_complex() else each for each in tensors)
    ends = [each.detach().aminmax() for each in real if each.is_floating_point() and each.numel()]
    if not ends:
        return torch.ones((), dtype=torch.bool, device="cpu")
    low, high = torch.stack([a for a, _ in ends]), torch.stack([b for _, b in ends])
    return ((low > -torch.inf) & (high < torch.inf)).all()  # nan is neither


def how_many(tensor: Tensor) -> str:
    """How many numbers of a batch are not finite, for messages; empty if all are.

    >>> import torch
    >>> from geoad.kernels.finite import how_many
    >>> how_many(torch.tensor([[0.0, 1.0], [torch.nan, torch.inf]]))
    '2 of 4 numbers that are not finite, the first in sample 1'
    """
    bad = ~tensor.detach().isfinite()
    count = int(bad.sum())
    if not count:
        return ""
    sample = int(bad.reshape(len(bad), -1).any(1).int().argmax()) if tensor.ndim else 0
    return f"{count} of {tensor.numel()} numbers that are not finite, the first in sample {sample}"


class FirstLook:
    """Looks at the first product of a linear operator: what data or a point have spoilt shows in it, whatever the argument.

    Args:
        blame: is called where the product of a finite argument is not finite; it raises, or leaves it at that.
    """

    def __init__(self, blame: Callable[[], object]) -> None:
        self.blame = blame
        self.done = False

    def __call__(self, argument: Blocks, product: Blocks) -> None:
        """Look, unless that was done before; inside of transforms nothing can be seen."""
        if self.done or torch.compiler.is_compiling() or not at_top_level() or is_wrapped(product):
            return
        found = list(product.values())
        if not _at_a_glance(found) and not bool(all_finite(found)):
            if not bool(all_finite(argument.values())):
                return
            self.blame()
        self.done = True


def _at_a_glance(tensors: Sequence[Tensor]) -> bool:
    """All numbers are finite, for their sum is; False where that overflows, too."""
    return math.isfinite(torch.stack([each.detach().sum() for each in tensors]).sum().item().real)
