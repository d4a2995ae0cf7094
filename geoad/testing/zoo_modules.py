"""The modules of the zoo that are not a line of torch.nn: one for each way in which networks use their parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "Attention",
    "Called",
    "Encoder",
    "Experts",
    "Exponential",
    "Fourier",
    "Functional",
    "Gated",
    "Hypernetwork",
    "LanguageModel",
    "LanguageModelOutput",
    "Lists",
    "Raw",
    "Recurrent",
    "Residual",
    "SelfAttention",
    "Shared",
    "Siamese",
    "Stopped",
    "Tagger",
    "Twice",
    "Unrolled",
]


class Residual(nn.Module):
    """x + f(x) by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.second(torch.tanh(self.first(x)))
        return self.head(torch.tanh(x))


class Attention(nn.Module):
    """Self-attention by linear layers and a softmax, with a layer norm and a mean over the sequence."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        return self.head((x + weights @ v).mean(1))


class Called(nn.Module):
    """``functional.scaled_dot_product_attention`` on two heads: the fused kernels of torch."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.qkv, self.head, self.causal = nn.Linear(4, 12), nn.Linear(4, 2), causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each.unflatten(-1, (2, 2)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        h = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.head(h.transpose(1, 2).flatten(2).mean(1))


class SelfAttention(nn.Module):
    """nn.MultiheadAttention of a sequence with itself."""

    def __init__(self, need_weights: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head, self.need_weights = nn.Linear(4, 2), need_weights

    def forward(self, x: Tensor) -> Tensor:
        h, weights = self.attention(x, x, x, need_weights=self.need_weights)
        pooled = h.mean(1)
        return self.head(pooled if weights is None else pooled + weights.mean((1, 2))[:, None])


class Encoder(nn.Module):
    """nn.TransformerEncoder; with padding its fast path works on nested tensors."""

    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
        self.body, self.head = nn.TransformerEncoder(layer, layers), nn.Linear(4, 2)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        h = self.body(x, src_key_padding_mask=padding)
        if padding is None:
            return self.head(h.mean(1))
        kept = (~padding)[..., None].to(h.dtype)
        return self.head((h * kept).sum(1) / kept.sum(1))


class Recurrent(nn.Module):
    """The last output of a recurrent network of torch."""

    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.body: nn.Module = kind(2, 3, batch_first=True, **options)
        width = (options.get("proj_size", 0) or 3) * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


class Unrolled(nn.Module):
    """A cell of torch in a Python loop, as long as the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(2, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 3)
        for step in x.unbind(1):
            h = self.cell(step, h)
        return self.head(h)


class Twice(nn.Module):
    """One module, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(torch.tanh(self.body(x)))))


class Shared(nn.Module):
    """Two modules with one weight, which is also read by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))) + x @ self.first.weight)


class Raw(nn.Module):
    """Bare parameters, contracted by einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.Parameter(torch.zeros(2, 3, 3))
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(self.scale) * torch.einsum("ni,cij,nj->nc", x, self.core, torch.tanh(x))


class Functional(nn.Module):
    """A layer whose weight is read by name and never called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(functional.linear(x, self.layer.weight, self.layer.bias)))


class Exponential(nn.Module):
    """A parametrization of one's own: W = exp(V)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.exp()

    def right_inverse(self, weight: Tensor) -> Tensor:
        """V for a positive W."""
        return weight.abs().clamp_min(1e-3).log()


class Lists(nn.Module):
    """Parameters in a ParameterList and a ParameterDict, modules in a ModuleDict."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.ParameterList([nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(2, 3))])
        self.shifts = nn.ParameterDict({"in": nn.Parameter(torch.zeros(3)), "out": nn.Parameter(torch.zeros(2))})
        self.parts = nn.ModuleDict({"head": nn.Linear(3, 2)})

    def forward(self, x: Tensor) -> Tensor:
        h = (x + self.shifts["in"]) @ self.factors[0] @ self.factors[1]
        return self.parts["head"](torch.tanh(h)) + self.shifts["out"]


class Gated(nn.Module):
    """A gated linear unit with a normalisation that has no parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.head = nn.Linear(3, 6), nn.LayerNorm(3, elementwise_affine=False), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(functional.glu(self.up(x), -1)))


class Siamese(nn.Module):
    """Two inputs through one body."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Bilinear(4, 4, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(a)), torch.tanh(self.body(b)))


class Fourier(nn.Module):
    """A filter in Fourier space: complex numbers on the way, real ones at both ends."""

    def __init__(self, length: int = 6) -> None:
        super().__init__()
        self.real = nn.Parameter(torch.zeros(length // 2 + 1))
        self.imaginary = nn.Parameter(torch.zeros(length // 2 + 1))
        self.head = nn.Linear(length, 2)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x) * torch.complex(self.real, self.imaginary)
        return self.head(torch.tanh(torch.fft.irfft(spectrum, n=x.shape[-1])))


class Hypernetwork(nn.Module):
    """A network whose output is the weight of another one, a matrix for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.maker, self.head = nn.Linear(2, 6), nn.Linear(2, 2)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        weight = self.maker(code).unflatten(-1, (2, 3))
        return self.head(torch.tanh(torch.einsum("nij,nj->ni", weight, x)))


class Experts(nn.Module):
    """A mixture of experts: each sample goes to one of them, so the control flow depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(3, 2)
        self.experts = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])

    def forward(self, x: Tensor) -> Tensor:
        shares = self.gate(x).softmax(-1)
        chosen = shares.argmax(-1)
        result = torch.zeros_like(x[:, :2])
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero().squeeze(-1)
            if rows.numel():
                result = result.index_add(0, rows, shares[rows, i, None] * torch.tanh(expert(x[rows])))
        return result


class Stopped(nn.Module):
    """A part under ``no_grad``: a constant for autograd, but not for torch's forward-mode AD."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(x))
        with torch.no_grad():
            size = h.square().mean(-1, keepdim=True).sqrt()
        return self.head(h / (1 + size))


class Tagger(nn.Module):
    """An output for each place of a sequence of tokens: (n, t, c)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(5, 3), nn.Conv1d(3, 3, 3, padding=1), nn.Linear(3, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.mix(self.embed(tokens).mT).mT
        return self.head(torch.tanh(h))


@dataclass
class LanguageModelOutput:
    """What models of the Hugging Face style return."""

    logits: Tensor
    loss: Tensor | None = None


class LanguageModel(nn.Module):
    """A causal language model in the style of Hugging Face: keyword inputs, an output object, a tied embedding.

    ``forward(input_ids, attention_mask=None, labels=None)``; the logits are for every place of the sequence.
    """

    def __init__(self, vocabulary: int = 5, width: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> LanguageModelOutput:
        h = self.embed(input_ids)
        q, k, v = (each[:, None] for each in self.qkv(self.norm(h)).chunk(3, -1))
        length = input_ids.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
        if attention_mask is not None:
            seen = seen & attention_mask[:, None, None].bool()
        h = h + functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)[:, 0]
        logits = self.head(h)
        loss = None if labels is None else functional.cross_entropy(logits.mT, labels)
        return LanguageModelOutput(logits, loss)
