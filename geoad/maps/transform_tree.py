"""What a ``torch.distributions`` transform is made of: its numbers taken out and put back in, and its structure."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.distributions import Distribution, Transform, constraints
from torch.distributions import transforms as td

from geoad.errors import GeometryError

__all__ = ["FRESH", "Inverted", "Slot", "children", "has_fixed_axes", "is_elementwise", "is_linear", "rebuild"]


@dataclass(frozen=True)
class Slot:
    """The place of a number that is kept elsewhere, under `name`."""

    name: str


class Inverted(Transform):
    """The inverse of `base`. Unlike the one that torch makes it can be copied and pickled.

    Args:
        base: the transform that is turned around.
    """

    def __init__(self, base: Transform) -> None:
        super().__init__()
        self.base = base

    @property
    def domain(self) -> constraints.Constraint:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.base.codomain

    @property
    def codomain(self) -> constraints.Constraint:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.base.domain

    @property
    def bijective(self) -> bool:
        return self.base.bijective

    @property
    def sign(self) -> int:
        return self.base.sign

    @property
    def inv(self) -> Transform:
        return self.base

    def _call(self, x: Any) -> Any:
        return self.base.inv(x)

    def log_abs_det_jacobian(self, x: Any, y: Any) -> Any:
        return -self.base.log_abs_det_jacobian(y, x)


def rebuild(made: Any, swap: Callable[[Any], Any]) -> Any:
    """A copy of a transform without caches or validation, with ``swap(number)`` for each tensor or `Slot` in it.

    Raises:
        GeometryError: it holds a network in a place from which its parameters cannot be followed.
    """
    if isinstance(made, (Tensor, Slot)):
        return swap(made)
    if isinstance(made, td._InverseTransform):  # pyright: ignore[reportPrivateUsage]
        return Inverted(rebuild(made.inv, swap))
    if isinstance(made, (nn.Module, functools.partial)) or isinstance(getattr(made, "__self__", None), nn.Module):
        raise GeometryError(
            "the transform holds a network in one of its functions, out of reach: its parameters would not be learnable or "
            "follow device and dtype. Pass the module that makes the transform, for instance the flow itself or flow.transform "
            "instead of flow().transform."
        )
    if isinstance(made, (Transform, Distribution)):
        twin = object.__new__(type(made))
        for key, value in vars(made).items():
            twin.__dict__[key] = FRESH[key] if key in FRESH else rebuild(value, swap)
        if isinstance(made, Distribution):
            twin.__dict__["_validate_args"] = False  # else that of the class
        return twin
    if type(made) in (list, tuple):
        return type(made)(rebuild(each, swap) for each in made)
    if type(made) is dict:
        return {key: rebuild(value, swap) for key, value in cast("dict[Any, Any]", made).items()}
    return made


# caches would keep tensors of torch.func beyond their time; validation reads values, which vmap does not allow
FRESH = {"_inv": None, "_cached_x_y": (None, None), "_cache_size": 0, "_validate_args": False}
"""The attributes of transforms and distributions that are set anew."""


def children(made: Transform) -> list[Transform]:
    """The transforms that `made` puts together, each acting on entries where `made` does; none for a leaf."""
    if isinstance(made, td.ComposeTransform):
        return list(made.parts)
    if isinstance(made, td.IndependentTransform):
        return [made.base_transform]
    if isinstance(made, (td.CatTransform, td.StackTransform)):
        return list(made.transforms)
    if isinstance(made, td._InverseTransform):  # pyright: ignore[reportPrivateUsage]
        return [made.inv]
    if isinstance(made, Inverted):
        return [made.base]
    if type(made).__module__.partition(".")[0] == "zuko":  # ComposedTransform and DependentTransform
        held = [*getattr(made, "transforms", ()), getattr(made, "base", None)]
        return [each for each in held if isinstance(each, Transform)]
    return []


def has_fixed_axes(made: Transform) -> bool:
    """True if an axis is counted from the front, so that batch axes in front would shift it."""
    return getattr(made, "dim", -1) >= 0 or any(map(has_fixed_axes, children(made)))


def is_elementwise(made: Transform) -> bool:
    """True if each entry is mapped by itself, as far as the structure says."""
    parts = children(made)
    if parts:
        return all(map(is_elementwise, parts))
    if isinstance(made, (td.AffineTransform, td.ComposeTransform)):
        return True
    return not isinstance(made, td.ReshapeTransform) and made.domain.event_dim == made.codomain.event_dim == 0


def is_linear(made: Transform) -> bool:
    """True if the Jacobian does not depend on the point, as far as the structure says."""
    parts = children(made)
    if parts:
        return all(map(is_linear, parts))
    return isinstance(made, (td.AffineTransform, td.ReshapeTransform, td.ComposeTransform))
