"""The networks, the data and the rows of the benchmarks.

All curvature matrices are means over the N samples, for softmax outputs and cross-entropy.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

Net = Callable[[float], nn.Module]
"""A network, with its hidden widths multiplied by a number."""


def mlp(*sizes: int) -> Net:
    """Linear layers with ReLU between them."""

    def make(scale: float) -> nn.Module:
        widths = [sizes[0], *(_width(each, scale) for each in sizes[1:-1]), sizes[-1]]
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    return make


def small_conv(scale: float) -> nn.Module:
    """4858 parameters at scale 1, for images of 8 × 8."""
    a, b, c = (_width(each, scale) for each in (8, 16, 48))
    stages = [
        nn.Conv2d(1, a, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(a, b, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]
    return nn.Sequential(*stages, nn.Flatten(), nn.Linear(4 * b, c), nn.ReLU(), nn.Linear(c, 10))


def large_conv(scale: float) -> nn.Module:
    """997 472 parameters at scale 1, for images of 8 × 8."""
    a, b, c, d = (_width(each, scale) for each in (32, 64, 128, 1730))
    stages = [nn.Conv2d(1, a, 3, padding=1), nn.ReLU(), nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    stages += [nn.Conv2d(b, c, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*stages, nn.Flatten(), nn.Linear(4 * c, d), nn.ReLU(), nn.Linear(d, 10))


def _width(width: int, scale: float) -> int:
    return max(2, round(scale * width))


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """The 1797 handwritten digits of scikit-learn, shuffled: images (1797, 1, 8, 8) in [0, 1] and labels."""
    from sklearn.datasets import load_digits  # pyright: ignore

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.images / 16, dtype=torch.float32)[order, None], torch.tensor(data.target)[order]


@dataclass(frozen=True)
class Row:
    """What is computed, on which network and how many samples, and what is aimed at.

    Attributes:
        name: its name on the command line and in `rivals`.
        title: one line for the tables.
        net: the network.
        samples: how many digits.
        image: inputs are images, not vectors.
        target: seconds of the fastest rival over those of geoad; None where nothing is aimed at.
        memory: (rival, factor): the peak memory of geoad is at most this multiple of that rival's.
        tolerance: a relative error above is wrong: the candidate is not ranked. (Rounding errors grow where products follow
            each other.)
        repeat: how many products at one point, for rows that have products.
        steps: how long the network is trained. (Where it is sure of a class, NNGeometry's root of A is nan in float32.)
    """

    name: str
    title: str
    net: Net
    samples: int = 1797
    image: bool = True
    target: float | None = None
    memory: tuple[str, float] | None = None
    tolerance: float = 1e-4
    repeat: int = 1
    steps: int = 60


ROWS = {
    row.name: row
    for row in (
        Row("a", "dense exact Fisher, MLP 64-100-10", mlp(64, 100, 10), image=False, target=6.0, memory=("nngeometry", 1.0)),
        Row("b", "tangent kernel, conv net, 256 digits", small_conv, 256, target=2.5, memory=("torch: vmap(jacrev)", 1.0)),
        Row(
            "b2",
            "tangent kernel, MLP 64-256-256-10, 256 digits",
            mlp(64, 256, 256, 10),
            256,
            image=False,
            target=40.0,
            memory=("torch: vmap(jacrev)", 0.1),
        ),
        Row("b3", "tangent kernel, MLP 64-512-512-100, 8 digits", mlp(64, 512, 512, 100), 8, image=False, target=80.0),
        Row("c1", "KFAC of the exact Fisher, conv net: factors and a product", small_conv, target=1.3),
        Row("c2", "EKFAC of the exact Fisher, conv net: trace and a product", small_conv, target=1.6),
        Row("d", "diagonal of the exact Fisher, conv net", small_conv, target=1.3, memory=("nngeometry", 1.5)),
        Row(
            "d2",
            "diagonal of the exact Fisher, MLP 64-256-256-10",
            mlp(64, 256, 256, 10),
            512,
            image=False,
            target=2.0,
            steps=20,
        ),
        Row("e", "Fisher-vector product, conv net of 1 M parameters", large_conv, 512, target=1.0, steps=20),
        Row(
            "e20",
            "20 Fisher-vector products at one point, in turn",
            large_conv,
            512,
            target=1.5,
            tolerance=1e-3,
            repeat=20,
            steps=20,
        ),
        Row("f", "Hessian-vector product, conv net", small_conv, 512, target=1.0),
        Row("f50", "50 Hessian-vector products at one point, in turn", small_conv, 512, target=1.5, tolerance=1e-3, repeat=50),
        Row("f2", "largest eigenvalue of the Hessian, conv net", small_conv, 512, tolerance=1e-3),
        Row("g", "Hutchinson trace of the Hessian, 50 probes, conv net", small_conv, 512, tolerance=0.3),
        Row("h", "block-diagonal exact Fisher, conv net", small_conv, target=3.0, memory=("nngeometry", 1.5)),
        Row("i", "per-sample gradients, conv net", small_conv, target=1.0),
    )
}


class Work:
    """What every candidate of a row is given, beside a copy of `net` of its own.

    Attributes:
        net: the network, trained a little.
        x, y: the data.
        v: a fixed vector, its components in the order of ``net.parameters()`` (`flat`, `blocks`).
        layers: (module, its part of a flat vector) for each layer with parameters.
    """

    def __init__(
        self, row: Row, *, samples: int | None = None, scale: float = 1.0, device: str = "cpu", trained: bool = True
    ) -> None:
        self.row, self.device = row, torch.device(device)
        x, y = digits() if row.image else (digits()[0].flatten(1), digits()[1])
        torch.manual_seed(0)
        self.net = row.net(scale).float()
        if trained:
            train(self.net, x, y, row.steps)
        self.net.to(self.device)
        n = samples or row.samples
        self.x, self.y = x[:n].to(self.device), y[:n].to(self.device)
        generator = torch.Generator().manual_seed(2)
        self.flat = torch.randn(self.dim, generator=generator, dtype=torch.float32).to(self.device)

    @property
    def dim(self) -> int:
        return sum(p.numel() for p in self.net.parameters())

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.net.named_parameters()]

    @property
    def layers(self) -> list[slice]:
        """The part of a flat vector that belongs to each layer, weight and bias together."""
        sizes = [sum(p.numel() for p in m.parameters()) for m in self.net.children()]
        stops = list(itertools.accumulate(sizes))
        return [slice(stop - size, stop) for size, stop in zip(sizes, stops, strict=True) if size]

    def blocks(self, flat: Tensor) -> dict[str, Tensor]:
        """The parts of a flat vector by parameter."""
        parameters = dict(self.net.named_parameters())
        parts = flat.split([p.numel() for p in parameters.values()])
        return {name: part.view_as(p) for (name, p), part in zip(parameters.items(), parts, strict=True)}

    def copy(self) -> nn.Module:
        """The network as nobody has touched it."""
        return copy.deepcopy(self.net)

    def double(self) -> Work:
        """The same in float64."""
        other = copy.copy(self)
        other.net, other.x, other.flat = self.copy().double(), self.x.double(), self.flat.double()
        return other

    def batches(self, size: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """(x, y) in parts of at most `size`."""
        size = size or len(self.x)
        return list(zip(self.x.split(size), self.y.split(size), strict=True))

    def loader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """One batch with all samples, taken at once."""
        return DataLoader(Samples(self.x, self.y), batch_size=len(self.x), collate_fn=lambda batch: batch)

    def products(self, product: Callable[[Tensor], Tensor]) -> Tensor:
        """A v for one product; for more of them each takes the normed result of the one before."""
        v = product(self.flat)
        for _ in range(self.row.repeat - 1):
            v = product(v / v.norm())
        return v

    def probes(self, count: int = 50) -> Tensor:
        """Random signs (count, d)."""
        return 2.0 * torch.randint(0, 2, (count, self.dim), device=self.device).to(self.flat.dtype) - 1.0


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """As a ``TensorDataset``, but a batch is one indexing, not N of them and a stack: no library pays for the loader."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.x[indices], self.y[indices]


def train(net: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    """A few steps of Adam, so that the matrices are not those of a random network."""
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        chosen = torch.randint(len(x), (128,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(net(x[chosen]), y[chosen]).backward()
        optimizer.step()
    net.zero_grad(set_to_none=True)
    net.eval()
