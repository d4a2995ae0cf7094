"""The change of coordinates between two charts, as a module."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

from geoad.charts.chart import Chart, makers
from geoad.charts.relations import path
from geoad.errors import ChartMismatchError, NotADiffeomorphismError
from geoad.maps.base import Map
from geoad.maps.compose import Compose, Inverse

__all__ = ["Reparametrization"]

T = TypeVar("T")


class Reparametrization(nn.Module):
    """φ: θ ↦ ψ from chart ``source`` to chart ``target``; calling it moves an object: ``phi(T)`` is ``T.to(phi.target)``.

    It is an ``nn.Module``: parameters of learnable maps are its parameters. ``phi.map`` is the bound
    `geoad.maps.Map` on plain blocks, ``phi.inverse`` the way back (``phi.inverse.inverse is phi``), and
    ``second @ first`` composes.

    >>> import torch, geoad
    >>> x = geoad.Chart({"x": (1,)}, name="x")
    >>> phi = x.reparametrize(geoad.maps.Exp(), name="exp x")
    >>> p = x.point(torch.zeros(1))
    >>> phi(p).components, phi.inverse(phi(p)) is p
    (tensor([1.]), True)
    """

    source: Chart
    target: Chart
    map: Map

    def __init__(self, source: Chart, target: Chart, bound: Map) -> None:
        super().__init__()
        self.source = source
        self.target = target
        self.map = bound
        self.__dict__["_inverse"] = None  # not a submodule: .to() and state_dict() would recurse endlessly

    def forward(self, tensor: T) -> T:
        """`tensor` (a point, a typed tensor or a field whose chart is ``source``) in chart ``target``."""
        thing: Any = tensor
        chart = getattr(thing, "chart", None)
        if chart is None:
            raise ChartMismatchError(
                f"a reparametrization moves points, typed tensors and fields, found {type(tensor).__name__}. Plain numbers "
                "have no chart, so there is no law to move them by; wrap them first: chart.point(x), chart.vector(x, at=p)."
            )
        if chart != self.source:
            raise ChartMismatchError(
                f"the map goes from chart '{self.source.name}' to '{self.target.name}', but the object is in chart "
                f"'{chart.name}'. Moving it by this map would use the wrong Jacobian; call .to(target) on the object, which "
                "finds the way from any chart."
            )
        return thing.to(self.target)

    def require_derivative(self, what: str) -> None:
        """Raise `NotADiffeomorphismError` if `what` asks for the derivative of a section."""
        if self.map.by_section:
            raise NotADiffeomorphismError(
                f"{what} was asked of the way from chart '{self.source.name}' to chart '{self.target.name}', but the map goes "
                f"from '{self.target.name}' to '{self.source.name}' and cannot be undone: the way back is a section, a choice "
                "that moves points only, and its derivative says nothing about the network. Move objects by their laws, "
                "T.to(chart); the map itself, with its derivative, is phi.inverse."
            )

    @property
    def inverse(self) -> Reparametrization:
        """ψ ↦ θ."""
        known = self.__dict__["_inverse"]
        if known is None:
            known = Reparametrization(self.target, self.source, Inverse.of(self.map))
            known.__dict__["_inverse"] = self
            self.__dict__["_inverse"] = known
        return known

    def __matmul__(self, first: Reparametrization) -> Reparametrization:
        """``second @ first``: from ``first.source`` to ``second.target``."""
        if first.target != self.source:
            raise ChartMismatchError(
                f"cannot compose: the first map ends in chart '{first.target.name}', the second starts in chart "
                f"'{self.source.name}'. Compose maps end to start, or use T.to(chart), which finds the way."
            )
        return Reparametrization(first.source, self.target, Compose.of([first.map, self.map]))

    compose = __matmul__

    def __deepcopy__(self, memo: dict[int, Any]) -> Reparametrization:
        """Itself if nothing is learnable (maps are frozen then), else a copy whose charts keep their identity."""
        if not self.target.learnable and not self.source.learnable:
            return self
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin._modules = dict(self._modules)
        twin.map = copy.deepcopy(self.map, memo)
        twin.source = copy.deepcopy(self.source, memo)
        twin.target = copy.deepcopy(self.target, memo)
        twin.__dict__["_inverse"] = None
        return twin

    def extra_repr(self) -> str:
        dim = f"{self.source.dim}" if self.source.dim == self.target.dim else f"{self.source.dim} -> {self.target.dim}"
        return f"{self.source.name!r} -> {self.target.name!r}, dim={dim}"


def _reparametrize(source: Chart, bound: Map, name: str) -> Reparametrization:
    target = Chart(bound.image_shapes, name, plain=False if source.always_dict else None)
    phi = Reparametrization(source, target, bound)
    target.parent = phi
    source.children.add(target)
    return phi


def between(start: Chart, end: Chart) -> Reparametrization:
    """The composite change of coordinates between any two charts of a manifold."""
    steps = [phi.map if along else Inverse.of(phi.map) for phi, along in path(start, end)]
    return Reparametrization(start, end, Compose.of(steps, layout=start.layout))


makers["reparametrization"] = _reparametrize
