"""Products with a linear function that are asked for again and again at one point: what they share is computed once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from geoad.errors import GeometryError
from geoad.kernels import products
from geoad.kernels.ladder import at_top_level
from geoad.kernels.program import Program, record
from geoad.kernels.stamps import Anew, stamp, witnessed
from geoad.params import Blocks, flatten, is_wrapped

__all__ = ["MAX_MEMORY", "Linear", "Repeated", "Terms"]

MAX_MEMORY = 2 << 30
"""How many bytes are kept for products at one point, unless told otherwise."""

_BATCH_MEMORY = 1 << 26  # larger batches of products are not faster on a CPU

Terms = Callable[[], Iterable[Callable[[Any], Any]]]
"""Linear functions of one tree of tensors, whose sum is meant: one for each batch of data."""


class Repeated:
    """Σ f_i(v) for linear functions f_i, faster from the third time on.

    The first product is an ordinary one. The second is recorded (see `geoad.kernels.program`): what does not depend on v is
    kept, as far as `max_memory` bytes reach; the terms beyond that are computed anew each time (all of them, if a loader makes
    its batches anew). From then on only the operations that v reaches are run. What is kept is dropped with this object, and
    when something that it was made of has changed: data, frozen parameters or buffers edited in place, modes of modules, grad
    mode, autocast. Nothing is kept where the products depend on something that requires grad, and inside of transforms.

    Args:
        terms: gives the functions; it is called again for each ordinary product. It must not refer to this object's owner.
        max_memory: in bytes.
    """

    def __init__(self, terms: Terms, max_memory: int = MAX_MEMORY) -> None:
        self.terms, self.max_memory = terms, max_memory
        self.products = 0
        self._kept: _Kept | None = None
        self._hopeless: Hashable = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy, in memory or in a file, keeps for itself."""
        return vars(self) | {"products": 0, "_kept": None, "_hopeless": None}

    @property
    def bytes(self) -> int:
        """The memory that is held now."""
        return 0 if self._kept is None else self._kept.bytes

    def __call__(self, v: Any) -> Any:
        if torch.compiler.is_compiling():
            return _total(term(v) for term in self.terms())
        key = _key(v)
        if self._kept is not None:
            if self._kept.holds(key):
                return _total(term(v) for term in self._kept.terms)
            self._kept, self.products = None, 0
        self.products += 1
        if self.products < 2 or key == self._hopeless or self.max_memory <= 0 or not _is_plain(v):
            return _total(term(v) for term in self.terms())
        return self._recorded(v, key)

    def batched(self, v: Any, axes: int) -> Any:
        """The products with a batch of arguments, under some leading axes."""
        if axes == 0:
            return self(v)
        shape = flatten(v)[0][0].shape[:axes]
        if not all(shape) or not _is_plain(v):
            return products.batched(self, axes)(v)
        done = self.rows(_each(lambda leaf: leaf.flatten(0, axes - 1), v))
        return _each(lambda leaf: leaf.unflatten(0, shape), done)

    def rows(self, v: Any) -> Any:
        """The products with many arguments, along the first axis: recorded with the first, then several at once."""
        leaves, build = flatten(v)
        single = build([leaf[0] for leaf in leaves])
        self.products = max(1, self.products)
        first = self(single)
        if len(leaves[0]) == 1:
            return _each(lambda leaf: leaf.unsqueeze(0), first)
        room = _BATCH_MEMORY if leaves[0].device.type == "cpu" else self.max_memory // 4
        chunk = max(1, min(32, room // max(1, self.bytes))) if self._kept is not None else 1
        rest = products.mapped(self, build([leaf[1:] for leaf in leaves]), chunk)
        return _both(lambda a, b: torch.cat([a.unsqueeze(0), b]), first, rest)

    def _recorded(self, v: Any, key: Hashable) -> Any:
        kept: list[Any] = []
        left, total = self.max_memory, None
        with witnessed() as seen:
            for term in self.terms():
                value, program = record(term, v, left) if left > 0 else (term(v), None)
                left = left - program.bytes if program is not None else 0
                kept.append(program or term)
                total = value if total is None else _both(torch.add, total, value)
        if any(isinstance(thing, Anew) for thing in seen.values()):
            self._hopeless = key
            return total
        whole = all(isinstance(each, Program) for each in kept)
        lasting = all(getattr(thing, "lasting", True) for thing in seen.values())
        if isinstance(kept[0], Program) and (whole or lasting):
            self._kept = _Kept(kept, key, list(seen.values()))
        else:
            self._hopeless = key
        return total


class _Kept:
    """What is run again, and what it was made of."""

    def __init__(self, terms: list[Any], key: Hashable, things: list[Any]) -> None:
        self.terms, self.key, self.things = terms, key, things
        self.stamps = [stamp(thing) for thing in things]

    @property
    def bytes(self) -> int:
        return sum(term.bytes for term in self.terms if isinstance(term, Program))

    def holds(self, key: Hashable) -> bool:
        """Nothing has changed."""
        return (
            key == self.key
            and all(not isinstance(term, Program) or term.holds() for term in self.terms)
            and self.stamps == [stamp(thing) for thing in self.things]
        )


def _is_plain(v: Any) -> bool:
    """`v` can be recorded: it is no part of a transform or of a graph."""
    leaves = flatten(v)[0]
    return at_top_level() and not is_wrapped(dict(enumerate(leaves))) and not any(leaf.requires_grad for leaf in leaves)  # pyright: ignore[reportArgumentType]


def _key(v: Any) -> Hashable:
    """What decides which operations are run: the form of v, and the modes of torch."""
    leaves = flatten(v)[0]
    device = leaves[0].device.type
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return torch.is_grad_enabled(), cast, tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves)


def _each(fn: Callable[[Tensor], Tensor], a: Any) -> Any:
    leaves, build = flatten(a)
    return build([fn(leaf) for leaf in leaves])


def _both(fn: Callable[[Tensor, Tensor], Tensor], a: Any, b: Any) -> Any:
    leaves, build = flatten(a)
    return build([fn(x, y) for x, y in zip(leaves, flatten(b)[0], strict=True)])


def _total(values: Iterable[Any]) -> Any:
    total: Any = None
    for value in values:
        total = value if total is None else _both(torch.add, total, value)
    if total is None:
        raise GeometryError("a product was asked for of a sum that has no terms. Pass data with at least one batch.")
    return total


class Linear:
    """The derivative of a function at a point, for one batch: J v, Jᵀ u, and the value.

    Args:
        fn: the function, from blocks to a tensor.
        x: the point.
        max_memory: how many bytes may be kept for each of the two products.

    >>> import torch
    >>> from geoad.kernels.linear import Linear
    >>> J = Linear(lambda x: x["a"].square(), {"a": torch.tensor([1.0, 2.0])})
    >>> J.outputs, J.push({"a": torch.ones(2)}), J.pull(torch.ones(2))
    (tensor([1., 4.]), tensor([2., 4.]), {'a': tensor([2., 4.])})
    """

    def __init__(self, fn: Callable[[Blocks], Tensor], x: Blocks, max_memory: int = MAX_MEMORY) -> None:
        self.fn, self.x = fn, x
        self._push = Repeated(lambda: [lambda v: products.jvp(fn, x, v)[1]], max_memory)
        self._pull = Repeated(lambda: [lambda u: products.vjp(fn, x)[1](u)], max_memory)
        self._outputs: Tensor | None = None

    @property
    def outputs(self) -> Tensor:
        """f(x)."""
        if self._outputs is None:
            self._outputs = self.fn(self.x)
        return self._outputs

    def push(self, v: Blocks) -> Tensor:
        """J v."""
        return self._push(v)

    def pull(self, u: Tensor) -> Blocks:
        """Jᵀ u."""
        return self._pull(u)
