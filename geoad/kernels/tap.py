"""The tap: what goes into the layers of a network and what comes back, seen while it runs.

`Tap` looks at every torch function that a parameter is handed to, by the identity of the tensor, so functional code, weights
that are used twice and layers of one's own are seen as well as modules. Operations that are linear in a parameter (see
`geoad.kernels.rules`) are *tapped*: their input is recorded, and a zero is added to their output, by which one can
differentiate. Every other use of a parameter is noted, so that no parameter is skipped in silence: structure is used only where
all uses of a parameter are tapped.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import resolve_name

from geoad.kernels.spelled import OwnMode, depth
from geoad.kernels.uses import Part, Use

__all__ = ["RULES", "Tap", "tapped"]

Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}
"""torch function -> rule(tap, *args, **kwargs): the result, or None if the rule does not know this case."""


class Tap(OwnMode):
    """Records what happens to parameters while it is active.

    Args:
        blocks: the parameters to look for.
        zeros: what is added to the outputs of the tapped operations, in the order of `uses`; None for nothing.
        cut: tapped operations take the parameters as constants: what still depends on them is not covered.

    Attributes:
        uses: the tapped operations, in the order in which they ran.
        inputs: what they were applied to.
        others: name of a parameter -> the functions that it was handed to otherwise.
        surplus: there were more operations than zeros, or they had other shapes.

    >>> import torch
    >>> from geoad.kernels.tap import Tap
    >>> w, x = torch.eye(2), torch.ones(3, 2)
    >>> with Tap({"w": w}) as tap:
    ...     y = torch.nn.functional.linear(x, w) + w.sum()
    >>> tap.uses, tap.others
    ([AffineUse(weight='w', bias=None, shape=(3, 2))], {'w': ['torch.Tensor.sum']})
    """

    def __init__(self, blocks: Mapping[str, Tensor], zeros: Sequence[Tensor] | None = None, cut: bool = False) -> None:
        super().__init__()
        self._parts = {id(block): (Part.of(name, block), block, _start(block)) for name, block in blocks.items()}
        self.zeros, self.cut = zeros, cut
        self._names, self._levels = list(blocks), _levels()
        self.uses: list[Use] = []
        self.inputs: list[Tensor] = []
        self.versions: list[int] = []
        self.others: dict[str, list[str]] = {}
        self.surplus = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _LOOKS:
            return func(*args, **kwargs)
        if func in _DERIVATIVES:
            self._note_all(resolve_name(func) or "a derivative")
        if not (self._sees(args) or (kwargs and self._sees(kwargs.values()))):
            return func(*args, **kwargs)
        rule = RULES.get(func)
        if rule is not None and _fits(rule, args, kwargs):
            result = rule(self, *args, **kwargs)
            if result is not None:
                return result
        if func in _VIEWS and self.part(args[0]) is not None:
            return self._viewed(args[0], func(*args, **kwargs), func)
        self.note(func, list(_tensors([*args, *kwargs.values()])))
        return func(*args, **kwargs)

    def _sees(self, given: Iterable[Any]) -> bool:
        """A parameter is among the arguments of a torch function. Asked for every call, so without generators."""
        for each in given:
            if id(each) in self._parts:
                return True
            if isinstance(each, (list, tuple)) and self._sees(cast("Sequence[Any]", each)):
                return True
            if isinstance(each, dict) and self._sees(cast("dict[Any, Any]", each).values()):
                return True
        return False

    # -- for the rules -------------------------------------------------------------------------------------------------------

    def part(self, tensor: Any) -> Part | None:
        """Which entries of which block `tensor` is, or None."""
        found = self._parts.get(id(tensor))
        return None if found is None else found[0]

    def value(self, tensor: Any) -> Any:
        """`tensor` as a tapped operation takes it."""
        return tensor.detach() if self.cut and self.part(tensor) is not None else tensor

    def note(self, func: Any, leaves: Sequence[Any]) -> None:
        """Write down that `func` sees the parameters among `leaves`."""
        for leaf in leaves:
            part = self.part(leaf)
            if part is not None:
                self.others.setdefault(part.name, []).append(resolve_name(func) or getattr(func, "__name__", str(func)))

    def _note_all(self, what: str) -> None:
        for name in self._names:
            self.others.setdefault(name, []).append(what)

    def record(self, use: Use, a: Tensor, out: Tensor) -> Tensor:
        """Record a tapped operation, and give its output on."""
        if _levels() != self._levels:  # derivatives that are taken inside of the network use the parameters once more
            for name in use.names:
                self.others.setdefault(name, []).append("a transform inside of the network")
            return out
        place = len(self.uses)
        self.uses.append(use)
        self.inputs.append(a)
        if self.zeros is None:
            self.versions.append(a._version)
            return out
        if place >= len(self.zeros) or self.zeros[place].shape != out.shape:
            self.surplus = True
            return out
        return out + self.zeros[place].to(out.dtype)

    def overwritten(self) -> set[str]:
        """The weights whose recorded inputs have been changed in place since."""
        pairs = zip(self.uses, self.inputs, self.versions, strict=True)
        return {use.weight.name for use, a, version in pairs if use.weight is not None and a._version != version}

    def _viewed(self, whole: Tensor, result: Any, func: Any) -> Any:
        """Look at the views of a parameter in the place of the parameter."""
        if not torch.is_grad_enabled():  # a constant
            return result
        part, _, start = self._parts[id(whole)]
        for view in result if isinstance(result, (tuple, list)) else (result,):
            if view is whole:
                continue
            seen = _seen_in(whole, view, part, start)
            if seen is None:
                self.note(func, [whole])
                return result
            self._parts[id(view)] = (seen, view, start)
        return result


def _tensors(given: Iterable[Any]) -> Iterator[Tensor]:
    """Those among the arguments of a torch function."""
    for each in given:
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, (list, tuple)):
            yield from _tensors(cast("Sequence[Any]", each))
        elif isinstance(each, dict):
            yield from _tensors(cast("dict[Any, Any]", each).values())


def _levels() -> tuple[float, int]:
    """The transforms that are active: those of ``torch.func``, and dual numbers."""
    dual: int = forward_ad._current_level  # pyright: ignore
    return depth(), dual


def tapped(*functions: Any) -> Callable[[Rule], Rule]:
    """Make the decorated function the rule of `functions`."""

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register


def _fits(rule: Rule, args: Any, kwargs: Any) -> bool:
    """The rule has these arguments; not so for ``out=`` and outdated signatures."""
    try:
        _signature(rule).bind(None, *args, **kwargs)
    except TypeError:
        return False
    return True


_signature = functools.cache(inspect.signature)


def _start(block: Tensor) -> int | None:
    """Where a block starts in its storage, if its entries lie there in order."""
    plain = _plain(block)
    return int(plain.storage_offset()) if plain is not None and plain.is_contiguous() else None


def _plain(tensor: Tensor) -> Tensor | None:
    """The tensor inside of the wrappers of derivatives; None under vmap, where it has another shape."""
    functorch: Any = torch._C._functorch  # pyright: ignore
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return None
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def _seen_in(whole: Tensor, view: Any, part: Part, start: int | None) -> Part | None:
    """Which entries `view` looks at, if it looks at the storage of `whole`."""
    if start is None or not isinstance(view, Tensor) or view.dtype != whole.dtype or view.is_complex():
        return None
    source, plain = _plain(whole), _plain(view)
    if source is None or plain is None or not _same_storage(source, plain):
        return None
    return Part(part.name, part.size, tuple(plain.shape), tuple(plain.stride()), int(plain.storage_offset()) - start)


_same_storage: Any = torch._C._is_alias_of  # pyright: ignore


def _getters(*names: str) -> set[Any]:
    return {getattr(Tensor, name).__get__ for name in names}


_LOOKS: set[Any] = {
    *_getters("shape", "dtype", "device", "ndim", "requires_grad", "is_leaf", "grad", "is_sparse", "is_nested", "layout"),
    *_getters("is_cuda", "is_quantized", "is_meta", "is_mkldnn", "itemsize", "nbytes"),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__, Tensor.__hash__, Tensor.stride),
    *(Tensor.is_contiguous, Tensor.element_size, Tensor.is_complex, Tensor.get_device, Tensor.__format__, Tensor.__repr__),
    Tensor.detach,
}
"""What asks a tensor for anything but its numbers, or cuts off derivatives."""

_DERIVATIVES: set[Any] = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}
"""What goes back through layers inside of the network."""

_VIEWS: set[Any] = {
    *_getters("T", "mT"),
    *(getattr(place, name) for place in (Tensor, torch) for name in ("t", "transpose", "permute", "reshape", "unsqueeze")),
    *(getattr(place, name) for place in (Tensor, torch) for name in ("squeeze", "flatten", "unflatten", "swapaxes", "movedim")),
    *(getattr(place, name) for place in (Tensor, torch) for name in ("split", "chunk", "unbind", "narrow", "select")),
    *(Tensor.view, Tensor.view_as, Tensor.__getitem__, Tensor.contiguous, Tensor.to, Tensor.float, Tensor.double),
    *(Tensor.type_as, Tensor.expand, Tensor.expand_as, torch.broadcast_to),
}
"""What gives the same numbers in another arrangement, or the tensor itself."""
