"""Networks for the tests of the layer kernels: one for each way in which the tap may meet a parameter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Lambda(nn.Module):
    """A function of a dictionary of parameters and the input."""

    def __init__(self, fn: Callable[[Any, Tensor], Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.fn = fn
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(0.5 * torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self, x)


class Twice(nn.Module):
    """A layer used twice, a weight used in functional code, raw and unused parameters, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(4, 4), nn.Linear(4, 3, bias=False)
        self.norm = nn.LayerNorm(4)
        self.raw, self.unused = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.a(torch.tanh(self.a(x)))) * self.raw
        return self.c(h) + F.linear(x, self.c.weight)


class Across(nn.Module):
    """Linear on sequences that come with the positions in front, as many as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.q(x.transpose(0, 1))).mean(0))


class Attention(nn.Module):
    """One function of torch, to itself or to something else."""

    def __init__(self, cross: bool = False) -> None:
        super().__init__()
        self.body, self.cross = nn.MultiheadAttention(4, 2, batch_first=True), cross

    def forward(self, x: Tensor) -> Tensor:
        y = x.sin() if self.cross else x
        return self.body(x, y, y, need_weights=False)[0].mean(1)


class Recurrent(nn.Module):
    """vmap cannot batch a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class Hidden(torch.autograd.Function):
    """W ↦ sin W, in a form that no torch function shows."""

    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():  # pyright: ignore
            return w.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (w,) = ctx.saved_tensors
        return grads[0] * w.cos()


def _tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
    net[2].weight = net[0].weight
    return net


def _same_conv_twice() -> nn.Module:
    conv = nn.Conv1d(2, 2, 3, padding="same", dilation=2)
    return nn.Sequential(conv, nn.Tanh(), conv, nn.Flatten(), nn.Linear(10, 3))


def _flat(*layers: nn.Module, width: int) -> Callable[[], nn.Module]:
    return lambda: copy.deepcopy(nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(width, 3))).double()


def _attention(p: Any, x: Tensor) -> Tensor:
    q, k, v = (x @ part for part in p.qkv.chunk(3, dim=1))
    return ((q @ k.mT).softmax(-1) @ v).mean(1) + p.shift[:, 1]


def _force(p: Any, x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.grad(lambda y: (F.linear(y, p.w, p.b).tanh() @ p.v).sum()))(x)[:, :3]


def _force_by_autograd(p: Any, x: Tensor) -> Tensor:
    h = F.linear(x, p.w, p.b)
    (slope,) = torch.autograd.grad((h.tanh() @ p.v).sum(), h, create_graph=True)
    return slope[:, :3] * h[:, :3]


def _tangent(p: Any, x: Tensor) -> Tensor:
    return torch.func.jvp(lambda y: F.linear(y, p.w, p.b).tanh() @ p.v, (x,), (x.cos(),))[1] + p.c


@dataclass(frozen=True)
class Case:
    """A network, the shape of a sample (or the number of tokens there are, and of a sample), what is covered."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    covered: set[str] | str = "all"
    tokens: int = 0


CASES: dict[str, Case] = {
    "mlp": Case(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), (4,)),
    "no bias": Case(lambda: nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False)), (4,)),
    "in place": Case(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)), (4,)),
    "one unit": Case(lambda: nn.Sequential(nn.Linear(4, 1), nn.Tanh(), nn.Linear(1, 3)), (4,)),
    "sequence": Case(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3)), (3, 4)),
    "across": Case(Across, (5, 4)),
    "outputs": Case(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Unflatten(1, (2, 3))), (4,)),
    "tied": Case(_tied, (4,)),
    "twice": Case(Twice, (4,), {"a.weight", "a.bias", "c.weight", "norm.weight", "norm.bias", "raw"}),
    "x @ W": Case(lambda: Lambda(lambda p, x: (x @ p.w).tanh() @ p.v, w=(4, 5), v=(5, 3)), (4,)),
    "sequences @ W": Case(lambda: Lambda(lambda p, x: ((x @ p.w).tanh() @ p.v).mean(1), w=(4, 5), v=(5, 3)), (3, 4)),
    "x @ W.T": Case(lambda: Lambda(lambda p, x: x @ p.w.T + x @ p.w.t() * x.sum(1, keepdim=True), w=(3, 4)), (4,)),
    "linear of W.T": Case(lambda: Lambda(lambda p, x: F.linear(x, p.w.T, p.b), w=(4, 3), b=(3,)), (4,)),
    "addmm": Case(lambda: Lambda(lambda p, x: torch.addmm(p.b, x, p.w), w=(4, 3), b=(3,)), (4,)),
    "both orders": Case(lambda: Lambda(lambda p, x: F.linear((x @ p.w).tanh(), p.w)[:, :3], w=(4, 4)), (4,)),
    "bias alone": Case(lambda: Lambda(lambda p, x: F.linear(x, p.w.exp(), p.b), w=(3, 4), b=(3,)), (4,), {"b"}),
    "weight and its bias apart": Case(
        lambda: Lambda(lambda p, x: F.linear(x, p.w, p.b) + F.linear(x.sin(), p.w), w=(3, 4), b=(3,)), (4,)
    ),
    "slices": Case(lambda: Lambda(_attention, qkv=(4, 9), shift=(3, 2)), (3, 4)),
    "expanded": Case(lambda: Lambda(lambda p, x: x[:, :3] * p.s.expand(3) + p.t, s=(1,), t=()), (4,)),
    "scale and shift": Case(
        lambda: Lambda(
            lambda p, x: ((p.s * x - p.b)[:, 0] + (p.c - x.sin() * p.s).sum(1)) * p.a, s=(3,), b=(2, 1), c=(3,), a=()
        ),
        (2, 3),
    ),
    "used outside of layers": Case(
        lambda: Lambda(lambda p, x: F.linear(x, p.w, p.b) + x @ p.w.T.sin(), w=(3, 4), b=(3,)), (4,), {"b"}
    ),
    "hidden from torch functions": Case(
        lambda: Lambda(lambda p, x: F.linear(x, p.w, p.b) + F.linear(x, Hidden.apply(p.w)), w=(3, 4), b=(3,)), (4,), {"b"}
    ),
    "detached": Case(lambda: Lambda(lambda p, x: F.linear(x, p.w) * F.linear(x, p.w.detach()), w=(3, 4)), (4,)),
    "conv1d": Case(_flat(nn.Conv1d(2, 3, 3, stride=2, padding=1), width=9), (2, 5)),
    "conv2d": Case(_flat(nn.Conv2d(2, 4, 3, padding=(1, 0)), nn.Tanh(), nn.Conv2d(4, 3, 2), width=18), (2, 4, 5)),
    "conv2d, no bias": Case(_flat(nn.Conv2d(1, 2, 2, bias=False), width=18), (1, 4, 4)),
    "conv2d, many channels": Case(_flat(nn.Conv2d(6, 2, (2, 3), padding=1), width=40), (6, 4, 4)),
    "conv2d, strided, dilated, in groups": Case(
        _flat(nn.Conv2d(4, 6, (2, 3), stride=(2, 1), dilation=(1, 2), groups=2, padding=1), width=36), (4, 4, 4)
    ),
    "conv2d, depthwise": Case(_flat(nn.Conv2d(3, 6, 2, groups=3), width=24), (3, 3, 3)),
    "conv2d, circular": Case(_flat(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), width=18), (1, 3, 3)),
    "conv3d": Case(_flat(nn.Conv3d(2, 3, 2, padding=(0, 1, 0)), width=18), (2, 2, 2, 3)),
    "conv twice": Case(_same_conv_twice, (2, 5)),
    "conv without batch axis": Case(
        lambda: Lambda(lambda p, x: torch.stack([F.conv1d(each, p.w, p.b).sum(1) for each in x]), w=(3, 2, 2), b=(3,)), (2, 4)
    ),
    "transposed conv1d": Case(_flat(nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), width=24), (2, 4)),
    "transposed conv2d, in groups": Case(
        _flat(nn.ConvTranspose2d(4, 6, (3, 2), stride=(1, 2), dilation=(2, 1), groups=2, padding=(1, 0)), width=144), (4, 2, 3)
    ),
    "transposed conv3d": Case(_flat(nn.ConvTranspose3d(1, 2, 2, padding=1, stride=2), width=16), (1, 2, 2, 2)),
    "embedding": Case(_flat(nn.Embedding(5, 3), width=9), (3,), tokens=5),
    "embedding, padded": Case(_flat(nn.Embedding(5, 3, padding_idx=1), width=9), (3,), tokens=5),
    "tied embedding": Case(lambda: Lambda(lambda p, x: (F.embedding(x, p.e).tanh() @ p.e.T).mean(1), e=(5, 3)), (3,), tokens=5),
    "layer norm": Case(lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)), (4,)),
    "rms norm": Case(lambda: nn.Sequential(nn.Linear(4, 6), nn.RMSNorm(6), nn.Tanh(), nn.Linear(6, 3)), (4,)),
    "group norm": Case(_flat(nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4), width=16), (2, 5)),
    "instance norm": Case(_flat(nn.Conv1d(2, 4, 2), nn.InstanceNorm1d(4, affine=True), width=16), (2, 5)),
    "batch norm": Case(_flat(nn.Conv1d(2, 4, 2), nn.BatchNorm1d(4).eval(), width=16), (2, 5)),
    "prelu": Case(_flat(nn.Conv1d(2, 4, 2), nn.PReLU(4), nn.PReLU(), width=16), (2, 5)),
    "embedding bag": Case(_flat(nn.EmbeddingBag(5, 3, mode="mean", padding_idx=2), width=3), (3,), tokens=5),
    "attention": Case(lambda: Attention(), (3, 4)),
    "cross attention": Case(lambda: Attention(cross=True), (3, 4)),
    "derivative inside": Case(lambda: Lambda(_force, w=(5, 4), b=(5,), v=(5, 2)), (4,), set()),
    "derivative inside, by autograd": Case(lambda: Lambda(_force_by_autograd, w=(5, 4), b=(5,), v=(5, 2)), (4,), set()),
    "tangents inside": Case(lambda: Lambda(_tangent, w=(5, 4), b=(5,), v=(5, 3), c=(3,)), (4,), {"c"}),
    "recurrent": Case(Recurrent, (2, 4), set()),
}
