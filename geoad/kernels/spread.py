"""Sums over processes as functions that can be differentiated any number of times.

Every process of a group evaluates the same function at the same x, on data of its own. Two linear maps are all that is needed:

=========  =====================================  ===========
map        what it does                           transposed
=========  =====================================  ===========
`spread`   x, which all share, for own use        `total`
`total`    Σ_r y_r, on all of them                `spread`
=========  =====================================  ===========

so that f(x) = Σ_r f_r(x) is ``total(f_r(spread(x)))``, and its derivatives of every order, in both modes, are those of f.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from geoad.kernels.ladder import at_top_level
from geoad.kernels.stamps import Anew, depend
from geoad.params import flatten, is_wrapped

__all__ = ["Exchange", "digest", "fingerprint", "spread", "total"]


class Exchange(Protocol):
    """What processes tell each other."""

    rank: int
    size: int

    def agree(self, call: str) -> None:
        """Raise in all processes unless all are at the same `call`."""
        ...

    def sum(self, tensors: Sequence[Tensor], call: str) -> list[Tensor]:
        """The sums over all processes, the same bits in each; `call` says what they are and must be the same."""
        ...

    def guarded(self, call: str) -> AbstractContextManager[None]:
        """Own work before an exchange: if it fails here, the others are told."""
        ...

    def joined(self, stacks: Sequence[Tensor], call: str) -> list[Tensor]:
        """Tensors side by side along the first axis, in the order of the processes."""
        ...

    def alike(self, text: str, call: str = "compare") -> bool:
        """All processes have the same `text`; raise in all of them unless all are at the same `call`."""
        ...

    def gathered(self, thing: Any, call: str = "gather") -> list[Any]:
        """The (small, picklable) things of all processes; `call` says what they are and must be the same."""
        ...


_OTHERS = Anew()


def total(tree: Any, exchange: Exchange, call: str) -> Any:
    """Σ_r y_r for trees of tensors of the same form in all processes."""
    depend(_OTHERS)
    leaves, build = flatten(tree)
    if at_top_level() and not any(leaf.requires_grad for leaf in leaves) and not _wrapped(leaves):
        return build(exchange.sum(leaves, call))
    return build(_apply(_Total, exchange, call, leaves))


def spread(tree: Any, exchange: Exchange, call: str) -> Any:
    """x for use in this process; what comes back to it is summed over all."""
    leaves, build = flatten(tree)
    if at_top_level() and not any(leaf.requires_grad for leaf in leaves) and not _wrapped(leaves):
        return tree
    return build(_apply(_Spread, exchange, call, leaves))


def _wrapped(leaves: Sequence[Tensor]) -> bool:
    return is_wrapped({str(i): leaf for i, leaf in enumerate(leaves)})


def _apply(fn: Any, exchange: Exchange, call: str, tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return fn.apply(exchange, call, *tensors)


class _Linear(torch.autograd.Function):
    """A map that acts on each tensor; a subclass says what it does and which one is its transposed."""

    transposed: type[_Linear]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.exchange, ctx.call = inputs[:2]

    @classmethod
    def _vmap(cls, in_dims: tuple[int | None, ...], exchange: Exchange, call: str, *tensors: Tensor) -> Any:
        return _apply(cls, exchange, f"{call}, batched", tensors), in_dims[2:]


class _Total(_Linear):
    @staticmethod
    def forward(exchange: Exchange, call: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(exchange.sum(tensors, call))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return None, None, *_apply(_Spread, ctx.exchange, ctx.call, cotangents)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _apply(_Total, ctx.exchange, f"{ctx.call}, tangents", tangents[2:])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return _Total._vmap(in_dims, *args)


class _Spread(_Linear):
    @staticmethod
    def forward(exchange: Exchange, call: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(each.clone() for each in tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return None, None, *_apply(_Total, ctx.exchange, f"{ctx.call}, cotangents", cotangents)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _apply(_Spread, ctx.exchange, ctx.call, tangents[2:])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return _Spread._vmap(in_dims, *args)


# -- what is the same ---------------------------------------------------------------------------------------------------------


def fingerprint(tree: Any) -> str:
    """A word that is the same for the same bits, shapes and types of tensors; "..." inside of transforms.

    >>> import torch
    >>> from geoad.kernels.spread import fingerprint
    >>> a = fingerprint({"a": torch.ones(2)})
    >>> a == fingerprint({"a": torch.ones(2)}), a == fingerprint({"a": torch.tensor([1.0, 2.0])})
    (True, False)
    """
    leaves = [leaf for leaf in flatten(tree)[0] if isinstance(leaf, Tensor)]
    if _wrapped(leaves):
        return "..."
    here = [leaf.device.type == "cpu" for leaf in leaves]
    sums = iter(_sums([leaf for leaf, near in zip(leaves, here, strict=True) if not near]))
    code = 0
    for leaf, near in zip(leaves, here, strict=True):
        bits = _checksum(leaf) if near else next(sums)
        code = zlib.crc32(f"{tuple(leaf.shape)} {leaf.dtype} {bits}".encode(), code)
    return f"{code:08x}"


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8)


def _checksum(tensor: Tensor) -> int:
    bits: Any = _bytes(tensor).numpy()
    return zlib.crc32(bits)


def _sums(tensors: Sequence[Tensor]) -> list[int]:
    """Weighted sums of the bits, made on the device and read at once."""
    found: list[Tensor] = []
    for tensor in tensors:
        flat = _bytes(tensor)
        padded = torch.nn.functional.pad(flat, (0, -len(flat) % 4)).view(torch.int32).to(torch.int64)
        places = torch.arange(1, len(padded) + 1, device=flat.device)
        found.append((padded * (2 * places + 1)).sum())
    where = found[0].device if found else None
    return torch.stack([each.to(where) for each in found]).tolist() if found else []


def digest(text: str) -> int:
    """56 bits of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())
