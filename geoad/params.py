"""Dictionaries of tensors as vectors: the layout of a coordinate system and the algebra of its components.

A *layout* is the ordered list of the blocks of a chart with their shapes. Components in it are a plain
``dict[str, Tensor]``. Axes in front of a block's own shape are batch axes. This module is the only user of
``torch.utils._pytree``.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy
import torch
from torch import Tensor
from torch._functorch import pyfunctorch
from torch.utils import _pytree as pytree

from geoad.errors import GeometryError

__all__ = [
    "Blocks",
    "Layout",
    "add",
    "axpy",
    "detach",
    "dot",
    "equal",
    "first",
    "flatten",
    "insert_axes",
    "is_traced",
    "is_wrapped",
    "map_blocks",
    "outside_of_transforms",
    "register_pytree",
    "scale",
    "sub",
    "unwrapped",
    "zeros_like",
]

Blocks = dict[str, Tensor]


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Those of numbers without gaps."""
    return tuple(itertools.accumulate(reversed(shape[1:]), operator.mul, initial=1))[::-1] if shape else ()


class Layout(Mapping[str, torch.Size]):
    """Ordered names and shapes of blocks; immutable, hashable, compared by value.

    >>> layout = Layout({"w": (2, 3), "b": (2,)})
    >>> layout.dim, layout.names
    (8, ('w', 'b'))
    """

    __slots__ = ("_hash", "_shapes", "dim", "names", "row", "sizes")

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        if not shapes:
            raise GeometryError(
                "a coordinate system needs at least one block, but none was given. Without coordinates there is "
                "nothing to differentiate; for a module, check that some parameter has requires_grad=True or is "
                "selected by params=."
            )
        try:
            self._shapes = {str(name): torch.Size(shape) for name, shape in shapes.items()}
        except TypeError as error:
            raise GeometryError(
                f"the blocks of a coordinate system are name -> shape, found {dict(shapes)!r}. A shape is a tuple of sizes: "
                "(2,) for two numbers, () for a single one."
            ) from error
        if any(size < 0 for shape in self._shapes.values() for size in shape):
            raise GeometryError(f"sizes cannot be negative, found {self._shapes}. A block of n numbers has shape (n,).")
        self.names: tuple[str, ...] = tuple(self._shapes)
        self.sizes: tuple[int, ...] = tuple(shape.numel() for shape in self._shapes.values())
        self.dim: int = sum(self.sizes)
        # the name of the only block, if it is a plain row of numbers: then there is nothing to ravel
        self.row: str | None = self.names[0] if len(self.names) == 1 and len(self._shapes[self.names[0]]) == 1 else None
        self._hash = hash(tuple(self._shapes.items()))

    def __getitem__(self, name: str) -> torch.Size:
        return self._shapes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Layout) and list(self._shapes.items()) == list(other._shapes.items())

    def __reduce__(self) -> tuple[Any, ...]:
        return Layout, ({name: tuple(shape) for name, shape in self._shapes.items()},)

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}: {tuple(shape)}" for name, shape in self._shapes.items())
        return f"Layout({inside})"

    def restrict(self, names: Sequence[str]) -> Layout:
        """The layout of some of the blocks, in the order of this layout."""
        return Layout({name: self._shapes[name] for name in self.names if name in set(names)})

    def offsets(self) -> dict[str, slice]:
        """Where each block lies in the raveled vector."""
        slices: dict[str, slice] = {}
        start = 0
        for name, size in zip(self.names, self.sizes, strict=True):
            slices[name] = slice(start, start + size)
            start += size
        return slices

    def batch_shape(self, blocks: Blocks) -> torch.Size:
        """The shape of the leading axes of `blocks` (from the first block)."""
        name = self.names[0]
        block = blocks[name]
        return block.shape[: block.ndim - len(self._shapes[name])]

    def ravel(self, blocks: Blocks) -> Tensor:
        """All blocks as one tensor of shape (*batch, dim), in the order of the layout; a view if they lie side by side."""
        if self.row is not None:
            return blocks[self.row]
        whole = self._side_by_side(blocks)
        if whole is not None:
            return whole
        parts: list[Tensor] = []
        for name, shape in self._shapes.items():
            block = blocks[name]
            parts.append(block.reshape(*block.shape[: block.ndim - len(shape)], shape.numel()))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def rows(self, count: int, like: Tensor) -> Blocks:
        """Blocks with one batch axis, not filled, that lie side by side in memory: `ravel` takes no copy of them."""
        whole = _empty(count, self.dim, like)
        return {name: whole[:, place].view(count, *self._shapes[name]) for name, place in self.offsets().items()}

    def _side_by_side(self, blocks: Blocks) -> Tensor | None:
        """The tensor (n, dim) of which the blocks are the columns, made by `rows`."""
        first = blocks[self.names[0]]
        if first.ndim != len(self._shapes[self.names[0]]) + 1 or len(self.names) == 1 or is_wrapped(blocks):
            return None
        start, base = first.storage_offset(), first._base
        if base is None or base.shape != (len(first), self.dim) or not base.is_contiguous() or start != base.storage_offset():
            return None
        for (name, shape), place in zip(self._shapes.items(), self.offsets().values(), strict=True):
            block = blocks[name]
            there = block._base is base and block.storage_offset() == start + place.start
            if not there or block.requires_grad or block.shape[1:] != shape or block.stride() != (self.dim, *_strides(shape)):
                return None
        return base

    def unravel(self, vector: Tensor) -> Blocks:
        """The inverse of `ravel`."""
        if self.row is not None:
            return {self.row: vector}
        parts = vector.split(self.sizes, dim=-1)
        return {
            name: part.reshape((*part.shape[:-1], *shape))
            for part, (name, shape) in zip(parts, self._shapes.items(), strict=True)
        }

    def check(self, blocks: Mapping[str, Tensor], what: str) -> Blocks:
        """`blocks` in the order of the layout, or an error that names the block that does not fit."""
        missing = [name for name in self.names if name not in blocks]
        extra = [name for name in blocks if name not in self._shapes]
        if missing or extra:
            raise GeometryError(
                f"{what}: the blocks do not fit. Missing: {missing or 'none'}; unknown: {extra or 'none'}; "
                f"the chart has {list(self.names)}. Pass a dict with exactly these names."
            )
        batch: torch.Size | None = None
        for name, shape in self._shapes.items():
            block = blocks[name]
            split = block.ndim - len(shape)
            if split < 0 or block.shape[split:] != shape:
                raise GeometryError(
                    f"{what}: block '{name}' has shape {tuple(block.shape)}, but the chart's block has shape "
                    f"{tuple(shape)} (axes in front of it are batch axes). Reshape the block."
                )
            if batch is not None and block.shape[:split] != batch:
                raise GeometryError(
                    f"{what}: block '{name}' has batch shape {tuple(block.shape[:split])}, others have {tuple(batch)}. "
                    "All blocks of one object share their batch axes; expand the block."
                )
            batch = block.shape[:split]
        return {name: blocks[name] for name in self.names}


def _empty(count: int, dim: int, like: Tensor) -> Tensor:
    """(count, dim), not filled. numpy asks Linux for huge pages, which are at hand some times sooner than those of torch."""
    plain = type(like) in (Tensor, torch.nn.Parameter) and like.device.type == "cpu" and not is_wrapped({"like": like})
    if not plain or count * dim * like.element_size() < _LARGE or like.dtype not in _NUMPY:
        return like.new_empty((count, dim))
    return torch.from_numpy(numpy.empty((count, dim), _NUMPY[like.dtype]))


_LARGE = 1 << 22
"""Bytes above which numpy does so."""

_NUMPY: dict[torch.dtype, Any] = {torch.float32: numpy.float32, torch.float64: numpy.float64}


def map_blocks(fn: Callable[..., Tensor], *blocks: Blocks) -> Blocks:
    """Apply `fn` block by block."""
    return {name: fn(*(each[name] for each in blocks)) for name in blocks[0]}


def insert_axes(tensor: Tensor, position: int, count: int) -> Tensor:
    """`tensor` with `count` axes of length 1 in front of axis `position`."""
    if count <= 0:
        return tensor
    return tensor.reshape(*tensor.shape[:position], *(1,) * count, *tensor.shape[position:])


def add(a: Blocks, b: Blocks) -> Blocks:
    """a + b."""
    return {name: block + b[name] for name, block in a.items()}


def sub(a: Blocks, b: Blocks) -> Blocks:
    """a - b."""
    return {name: block - b[name] for name, block in a.items()}


def scale(factor: float | Tensor, a: Blocks) -> Blocks:
    """factor * a, for a scalar factor."""
    return {name: factor * block for name, block in a.items()}


def axpy(factor: float | Tensor, a: Blocks, b: Blocks) -> Blocks:
    """factor * a + b, for a scalar factor."""
    return {name: factor * block + b[name] for name, block in a.items()}


def dot(a: Blocks, b: Blocks) -> Tensor:
    """The sum of the products of all components (no batch axes)."""
    products = [(block * b[name]).sum() for name, block in a.items()]
    return products[0] if len(products) == 1 else torch.stack(products).sum()


def zeros_like(a: Blocks) -> Blocks:
    """Zeros in the shape of `a`."""
    return {name: torch.zeros_like(block) for name, block in a.items()}


def detach(a: Blocks) -> Blocks:
    """`a` cut from the autograd graph."""
    return {name: block.detach() for name, block in a.items()}


def first(a: Blocks) -> Tensor:
    """The first block: tells dtype and device."""
    return next(iter(a.values()))


def is_traced() -> bool:
    """True if the compiler, or ``make_fx``, notes the operations that are run."""
    return torch.compiler.is_compiling() or _dispatch_mode(_PROXY) is not None


_dispatch_mode: Any = torch._C._get_dispatch_mode  # pyright: ignore
_PROXY: Any = torch._C._TorchDispatchModeKey.PROXY  # pyright: ignore


def is_wrapped(a: Blocks) -> bool:
    """True if a functorch transform or a tracer is looking: values must not be read, nothing may be remembered."""
    if is_traced():
        return True
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # pyright: ignore
    leaves: list[Any] = list(a.values())
    # leaves that are no tensors are put there by pytree utilities (axis numbers, specs)
    return any(not isinstance(leaf, Tensor) or bool(wrapped(leaf)) for leaf in leaves)


def _unwrap(tensor: Tensor) -> Tensor:
    functorch: Any = torch._C._functorch  # pyright: ignore
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def unwrapped(a: Blocks) -> Blocks | None:
    """`a` as plain values, cut from the graph, where they can be read: inside of jvp and grad, not of vmap or compile."""
    if not is_wrapped(a):
        return detach(a) if any(block.requires_grad for block in a.values()) else a
    functorch: Any = torch._C._functorch  # pyright: ignore
    plain: Blocks = {}
    for name, block in a.items():
        while functorch.is_functorch_wrapped_tensor(block):
            if functorch.is_batchedtensor(block):
                return None
            block = functorch.get_unwrapped(block)
        plain[name] = block
    if torch.compiler.is_compiling():
        return None
    with outside_of_transforms():
        return detach(plain)


def outside_of_transforms() -> AbstractContextManager[Any]:
    """What is computed inside of this context takes no part in a transform that is going on; arguments must be `unwrapped`."""
    functorch: Any = torch._C._functorch  # pyright: ignore
    if functorch.peek_interpreter_stack() is None:
        return nullcontext()
    return pyfunctorch.temporarily_clear_interpreter_stack()


def equal(a: Blocks, b: Blocks) -> bool:
    """True if all values agree bit for bit (looks through functorch wrappers)."""
    if a is b:
        return True
    if a.keys() != b.keys():
        return False
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, block in a.items():
        other = b[name]
        if block is other:
            continue
        block, other = _unwrap(block.detach()), _unwrap(other.detach())
        if block.shape != other.shape or block.dtype != other.dtype or block.device != other.device:
            return False
        pairs.append((block, other))
    devices = {block.device for block, _ in pairs}
    if len(devices) == 1 and "cpu" not in {each.type for each in devices} and _equal_at_once(pairs):
        return True
    return all(torch.equal(block, other) or _same_bits(block, other) for block, other in pairs)


def _equal_at_once(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """All pairs are equal, and no nan is among them: one look at the device instead of one for each."""
    return bool(torch.stack([(block == other).all() for block, other in pairs]).all())


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """True if two floating point tensors that hold a nan agree bit for bit; ``torch.equal`` says no to any nan."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = kinds.get(a.element_size())
    if kind is None or not a.is_floating_point() or not bool(a.isnan().any()):
        return False
    return torch.equal(a.view(kind), b.view(kind))


def flatten(tree: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The leaves of nested containers (what is registered as a pytree), and what builds the same containers of other leaves."""
    leaves, spec = pytree.tree_flatten(tree)
    return leaves, lambda others: pytree.tree_unflatten(list(others), spec)


def register_pytree(
    cls: type,
    flatten: Callable[[Any], tuple[list[Any], Any]],
    unflatten: Callable[[Any, Any], Any],
) -> None:
    """Make `cls` a pytree node, so that it crosses the border of `torch.func` transforms and `torch.compile`."""
    pytree.register_pytree_node(
        cls,
        flatten,
        lambda children, context: unflatten(list(children), context),
        serialized_type_name=f"geoad.{cls.__name__}",
    )
