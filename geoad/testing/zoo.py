"""A zoo of models: one small network for each way in which networks use their parameters, with data, a loss and a likelihood.

``build(name)`` gives a `Model` in float64 (or any dtype); run your own method over `NAMES` to see what it does not survive. The
first 27 kinds are those by which curvature libraries were compared, `docs/models.md` says what geoad does with each of them.

>>> import geoad
>>> from geoad.testing import zoo
>>> model = zoo.build("nn.GRU")
>>> geo = model.geo()
>>> geoad.grad(model.field(geo))(geo.point())
Covector('theta', dim=71, float64, cpu)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize

from geoad.errors import GeometryError
from geoad.fields import ScalarField
from geoad.module import GeoModule
from geoad.testing import zoo_modules as own

__all__ = ["NAMES", "Model", "build"]

Inputs = Any


@dataclass(frozen=True)
class Model:
    """A small smooth network with data.

    Attributes:
        name: which of `NAMES` it is.
        net: the bare network.
        inputs: a batch of inputs: a tensor, a tuple of arguments or a mapping of keyword arguments.
        targets: what belongs to them.
        loss: loss(outputs, targets), the mean over all outputs.
        likelihood: what the outputs parametrise: "categorical" or "gaussian".
        forward: how the network is evaluated on `inputs`, or None for a plain call.
    """

    name: str
    net: nn.Module
    inputs: Inputs
    targets: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    likelihood: str
    forward: Callable[[nn.Module, Any], Tensor] | None

    @property
    def data(self) -> Any:
        """The data as `GeoModule.loss` and the curvature fields take them."""
        if isinstance(self.inputs, Mapping):
            return {**self.inputs, "labels": self.targets}
        return self.inputs, self.targets

    def geo(self) -> GeoModule:
        """A copy of the network as a manifold."""
        return GeoModule(copy.deepcopy(self.net), forward=self.forward)

    def field(self, geo: GeoModule) -> ScalarField:
        """The loss on that manifold."""
        return geo.loss(self.loss, self.data)

    def outputs(self, net: nn.Module) -> Tensor:
        """The outputs of the bare network: plain torch, for references."""
        if self.forward is not None:
            return self.forward(net, self.inputs)
        if isinstance(self.inputs, Mapping):
            return net(**cast("Mapping[str, Any]", self.inputs))
        return net(*self.inputs) if isinstance(self.inputs, tuple) else net(self.inputs)


def _tail(width: int) -> list[nn.Module]:
    return [nn.Tanh(), nn.Flatten(), nn.Linear(width, 2)]


def _parametrized(register: Callable[[nn.Linear], Any]) -> nn.Module:
    layer = nn.Linear(3, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-0.9, 1.1, 9).reshape(3, 3).sin() + 0.4 * torch.eye(3))
    register(layer)
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(3, 2))


def _exponential(layer: nn.Linear) -> None:
    parametrize.register_parametrization(layer, "weight", own.Exponential())


def _transformer_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)


def _logits(net: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    return net(batch["input_ids"], batch["attention_mask"]).logits


def _flat_mse(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean()


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


@dataclass(frozen=True)
class _Kind:
    make: Callable[[], nn.Module]
    inputs: Any
    """Shapes of real inputs; a string stands for tokens, masks, ... of `_special`."""
    likelihood: str = "categorical"
    forward: Callable[[nn.Module, Any], Tensor] | None = None


_SEQUENCE = (3, 4)
_KINDS: dict[str, _Kind] = {
    "Linear MLP": _Kind(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (3,)),
    "Linear no bias": _Kind(lambda: nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False)), (3,)),
    "residual (custom forward)": _Kind(own.Residual, (3,)),
    "Linear on sequences (3d)": _Kind(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (3, 3)),
    "Conv1d": _Kind(lambda: nn.Sequential(nn.Conv1d(2, 3, 3), *_tail(9)), (2, 5)),
    "Conv2d": _Kind(lambda: nn.Sequential(nn.Conv2d(1, 2, 2), *_tail(12)), (1, 3, 4)),
    "Conv2d strided, dilated": _Kind(
        lambda: nn.Sequential(nn.Conv2d(1, 2, 2, stride=2, dilation=2, padding=1), *_tail(8)), (1, 4, 4)
    ),
    "Conv2d groups=2": _Kind(lambda: nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), *_tail(16)), (2, 3, 3)),
    "Conv3d": _Kind(lambda: nn.Sequential(nn.Conv3d(1, 2, 2), *_tail(4)), (1, 2, 2, 3)),
    "ConvTranspose2d": _Kind(lambda: nn.Sequential(nn.ConvTranspose2d(1, 2, 2, stride=2), *_tail(32)), (1, 2, 2)),
    "BatchNorm2d eval": _Kind(lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), *_tail(8)), (1, 3, 3)),
    "LayerNorm": _Kind(lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)), (3,)),
    "GroupNorm": _Kind(lambda: nn.Sequential(nn.Conv1d(1, 4, 2), nn.GroupNorm(2, 4), *_tail(12)), (1, 4)),
    "RMSNorm": _Kind(lambda: nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4), nn.Tanh(), nn.Linear(4, 2)), (3,)),
    "PReLU": _Kind(lambda: nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2)), (3,)),
    "inplace ReLU": _Kind(lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)), (3,)),
    "Embedding": _Kind(lambda: nn.Sequential(nn.Embedding(5, 3), *_tail(9)), "tokens"),
    "attention (Linear q,k,v + LayerNorm)": _Kind(own.Attention, _SEQUENCE),
    "nn.MultiheadAttention": _Kind(own.SelfAttention, _SEQUENCE),
    "nn.GRU": _Kind(lambda: own.Recurrent(nn.GRU), (3, 2)),
    "module called twice": _Kind(own.Twice, (3,)),
    "shared weight tensor": _Kind(own.Shared, (3,)),
    "raw nn.Parameter": _Kind(own.Raw, (3,), "gaussian"),
    "F.linear(x, layer.weight)": _Kind(own.Functional, (3,)),
    "parametrizations.weight_norm": _Kind(lambda: _parametrized(parametrizations.weight_norm), (3,)),
    "parametrizations.orthogonal": _Kind(lambda: _parametrized(parametrizations.orthogonal), (3,)),
    "custom parametrize (exp)": _Kind(lambda: _parametrized(_exponential), (3,)),
    # beyond the 27 of the comparison
    "nn.LSTM": _Kind(lambda: own.Recurrent(nn.LSTM), (3, 2)),
    "nn.LSTM, two layers, projected": _Kind(lambda: own.Recurrent(nn.LSTM, num_layers=2, proj_size=2), (3, 2)),
    "nn.GRU, bidirectional": _Kind(lambda: own.Recurrent(nn.GRU, bidirectional=True), (3, 2)),
    "nn.RNN": _Kind(lambda: own.Recurrent(nn.RNN), (3, 2)),
    "nn.GRUCell in a loop": _Kind(own.Unrolled, (3, 2)),
    "scaled_dot_product_attention": _Kind(own.Called, _SEQUENCE),
    "causal attention": _Kind(lambda: own.Called(causal=True), _SEQUENCE),
    "nn.MultiheadAttention, weights": _Kind(lambda: own.SelfAttention(need_weights=True), _SEQUENCE),
    "nn.TransformerEncoderLayer": _Kind(lambda: nn.Sequential(_transformer_layer(), nn.Flatten(), nn.Linear(12, 2)), _SEQUENCE),
    "nn.TransformerEncoder, padded": _Kind(own.Encoder, "padded"),
    "language model, dict batch, tied": _Kind(own.LanguageModel, "text", forward=_logits),
    "tagger (n, t, c)": _Kind(own.Tagger, "tokens"),
    "BatchNorm1d eval": _Kind(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)), (3,)),
    "InstanceNorm1d": _Kind(lambda: nn.Sequential(nn.Conv1d(1, 3, 2), nn.InstanceNorm1d(3, affine=True), *_tail(12)), (1, 5)),
    "EmbeddingBag": _Kind(lambda: nn.Sequential(nn.EmbeddingBag(5, 3), nn.Tanh(), nn.Linear(3, 2)), "tokens"),
    "Bilinear, two inputs": _Kind(own.Siamese, ((3,), (3,))),
    "depthwise Conv2d": _Kind(lambda: nn.Sequential(nn.Conv2d(2, 2, 2, groups=2), nn.Conv2d(2, 3, 1), *_tail(12)), (2, 3, 3)),
    "complex numbers (FFT)": _Kind(own.Fourier, (6,)),
    "parametrizations.spectral_norm": _Kind(lambda: _parametrized(parametrizations.spectral_norm), (3,)),
    "ParameterList, ParameterDict": _Kind(own.Lists, (3,)),
    "GLU, norm without parameters": _Kind(own.Gated, (3,), "gaussian"),
    "hypernetwork": _Kind(own.Hypernetwork, ((3,), (2,)), "gaussian"),
    "mixture of experts": _Kind(own.Experts, (3,)),
    "no_grad inside": _Kind(own.Stopped, (3,)),
    "max pooling, softplus": _Kind(
        lambda: nn.Sequential(nn.Conv1d(1, 3, 2), nn.Softplus(), nn.MaxPool1d(2), *_tail(6)), (1, 5), "gaussian"
    ),
}

NAMES: tuple[str, ...] = tuple(_KINDS)
"""The kinds of models, the 27 of the comparison first."""

_SAMPLES = 4


def _special(kind: str, draw: Callable[..., Tensor], draws: torch.Generator) -> Any:
    tokens = torch.randint(0, 5, (_SAMPLES, 3), generator=draws)
    padding = torch.zeros(_SAMPLES, 3, dtype=torch.bool)
    padding[1, 2:] = padding[3, 1:] = True
    match kind:
        case "tokens":
            return tokens
        case "padded":
            return draw(_SAMPLES, *_SEQUENCE), padding
        case _:
            return {"input_ids": tokens, "attention_mask": (~padding).long()}


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> Model:
    """The model `name`, in eval mode, with parameters and data drawn with `seed`: the same numbers in every dtype.

    Raises:
        GeometryError: there is no model of that name.
    """
    if name not in _KINDS:
        raise GeometryError(f"there is no model {name!r} in the zoo. Choose one of geoad.testing.zoo.NAMES: {list(NAMES)}.")
    kind = _KINDS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = kind.make().double()
    draws = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draws, dtype=torch.float64).to(dtype)

    with torch.no_grad():
        for path, parameter in net.named_parameters():
            if "parametrizations" not in path:
                parameter.add_(0.6 * draw(*parameter.shape).double())
        for module in net.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.running_mean = 0.1 * draw(module.num_features).double()
                module.running_var = draw(module.num_features).double().exp()
    net = net.eval().to(dtype)
    if isinstance(kind.inputs, str):
        inputs = _special(kind.inputs, draw, draws)
    elif isinstance(kind.inputs[0], tuple):
        inputs = tuple(draw(_SAMPLES, *shape) for shape in kind.inputs)
    else:
        inputs = draw(_SAMPLES, *kind.inputs)
    loss = _cross_entropy if kind.likelihood == "categorical" else _flat_mse
    model = Model(name, net, inputs, torch.zeros(()), loss, kind.likelihood, kind.forward)
    with torch.no_grad():
        shape = model.outputs(net).shape
    gaussian = kind.likelihood == "gaussian"
    targets = draw(*shape) if gaussian else torch.randint(0, shape[-1], shape[:-1], generator=draws)
    return Model(name, net, inputs, targets, loss, kind.likelihood, kind.forward)
