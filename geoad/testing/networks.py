"""Small networks with small data, one for each thing that a method may trip over."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from geoad.fields import ScalarField
from geoad.module import GeoModule
from geoad.params import Layout
from geoad.testing.recipes import generic_blocks

__all__ = ["NETWORKS", "SmallNetwork", "build"]


@dataclass(frozen=True)
class SmallNetwork:
    """A smooth network with at most 24 coordinates, in float64 and in eval mode, with five samples of data.

    Attributes:
        name: which of `NETWORKS` it is.
        geo: the network as a manifold, in its reference chart.
        bare: a copy of the plain network, that geoad knows nothing of.
        inputs: x, the samples along the first axis.
        targets: classes, for a cross entropy on the two outputs.
        values: real targets of the shape of the outputs, for a squared error.
    """

    name: str
    geo: GeoModule
    bare: nn.Module
    inputs: Tensor
    targets: Tensor
    values: Tensor

    @property
    def data(self) -> tuple[Tensor, Tensor]:
        """(inputs, targets), as `GeoModule.loss` and the curvature fields take them."""
        return self.inputs, self.targets

    def loss(self) -> ScalarField:
        """The mean cross entropy."""
        return self.geo.loss(functional.cross_entropy, self.data)


class _Tied(nn.Module):
    """One weight in two places, and read a third time by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.head = nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.head(h @ self.first.weight)


class _Raw(nn.Module):
    """Bare parameters, one without axes, one of length 1, a row and a column."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, 3))
        self.temperature = nn.Parameter(torch.empty(()))
        self.shift = nn.Parameter(torch.empty(1))
        self.row = nn.Parameter(torch.empty(1, 2))
        self.column = nn.Parameter(torch.empty(3, 1))

    def forward(self, x: Tensor) -> Tensor:
        gated = x * torch.sigmoid(x @ self.column)
        return torch.exp(self.temperature) * torch.sin(gated @ self.weight.mT + self.shift) * (1 + self.row)


class _Buffered(nn.Module):
    """Buffers that the outputs depend on: a scale of the inputs, and the running statistics of a batch norm."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([0.5, 2.0]))
        self.hidden = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.silu(self.norm(self.hidden(x * self.scale))))


def _frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    net[0].weight.requires_grad_(False)
    return net


_BUILDERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)), (2,)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 2)), (1, 2, 3)),
    "tied": (_Tied, (3,)),
    "layernorm": (lambda: nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.GELU(), nn.Linear(3, 2)), (2,)),
    "frozen": (_frozen, (2,)),
    "raw": (_Raw, (3,)),
    "buffers": (_Buffered, (2,)),
}

NETWORKS: tuple[str, ...] = tuple(_BUILDERS)
"""mlp, conv, tied (a shared weight), layernorm, frozen (a parameter that is no coordinate), raw (bare parameters of every
shape), buffers (a batch norm in eval mode)."""


def build(name: str, seed: int = 0) -> SmallNetwork:
    """The network `name` with parameters and data drawn with `seed`.

    No parameter is 0, so that the point lies in the domain of every map (the biases of a new network often do not).

    >>> from geoad.testing import networks
    >>> networks.build("tied").geo.point()
    Point('theta', dim=21, float64, cpu)
    """
    make, shape = _BUILDERS[name]
    net = make().double().eval()
    draws = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=draws, dtype=torch.float64)

    trainable = {key: each for key, each in net.named_parameters() if each.requires_grad}
    start = generic_blocks(Layout({key: each.shape for key, each in trainable.items()}), seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean = 0.1 * normal(module.num_features)
                module.running_var = normal(module.num_features).exp()
        for parameter in net.parameters():
            parameter.copy_(normal(*parameter.shape))
        for key, parameter in trainable.items():
            parameter.copy_(start[key])
    targets = torch.randint(0, 2, (5,), generator=draws)
    bare = copy.deepcopy(net)
    return SmallNetwork(name, GeoModule(net), bare, normal(5, *shape), targets, normal(5, 2))
