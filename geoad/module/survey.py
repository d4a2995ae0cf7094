"""A look at a network before its derivatives are taken: is it a function of its parameters that autodiff sees through?

`Survey` evaluates a network twice, once for each way in which it is used, and refuses what autodiff would get wrong in silence:
outputs that are random or depend on earlier calls, parameters that are read past the places where geoad puts the coordinates,
checkpoints that hide parameters from ``torch.autograd.grad``, samples that depend on each other where each is taken alone.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from geoad.errors import UnsupportedModuleError
from geoad.kernels.graph import dependencies, nodes, once_differentiable
from geoad.kernels.ladder import forget_forward_mode, only_once, singly
from geoad.kernels.spelled import without_own_modes
from geoad.module.support import refuse_modules
from geoad.params import Blocks, map_blocks

__all__ = ["Survey", "Use", "unwrapped"]

Run = Callable[[Blocks, Any], Any]
"""(coordinates, arguments) to outputs."""


class Survey:
    """Finds out, once for each way of using a network, whether its derivatives can be trusted."""

    def __init__(self) -> None:
        self._looked: weakref.WeakKeyDictionary[Any, set[tuple[bool, bool]]] = weakref.WeakKeyDictionary()
        self._compared: weakref.WeakKeyDictionary[Any, set[bool]] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return Survey, ()  # a copy looks for itself

    def __call__(self, use: Use, run: Run, theta: Blocks, args: Any) -> None:
        """Look at ``run(theta, args)``, unless that was done before for the same use.

        Raises:
            UnsupportedModuleError: the network is not a function of its parameters that autodiff sees through.
        """
        axes = [_samples(each) for each in _tensors(args)]
        batched = any(count is not None for count in axes)
        sampled = batched or singly()
        looked = self._looked.setdefault(use.fn, set())
        compared = self._compared.setdefault(use.fn, set())
        look = (use.training, sampled) not in looked
        compare = batched and use.training not in compared and max(count or 0 for count in axes) > 1
        if not (look or compare):
            return
        refuse_modules(use.net, sampled)
        with _apart(), without_own_modes(), torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the evaluation that follows will say it
            bare = map_blocks(lambda block: unwrapped(block, 0).detach(), theta)  # other objects: a `Tap` looks away
            samples = [_mapped(args, lambda each, i=i: unwrapped(each, i)) for i in range(2 if batched else 1)]
            if look:
                _look_at_few(use, run, bare, samples[0])
                looked.add((use.training, sampled))
            if compare and _compare(use.net, run, bare, samples, [count is not None for count in axes]):
                compared.add(use.training)


@dataclass(frozen=True)
class Use:
    """One way of using a network.

    Attributes:
        owner: whose derivatives are taken.
        net: the network.
        fn: how it is evaluated.
        originals: its own parameters by name.
        training: some module is in training mode.
    """

    owner: Any
    net: nn.Module
    fn: Callable[..., Any]
    originals: Mapping[str, nn.Parameter]
    training: bool


_FEW = 4
_FEW_IN_TRAINING = 32
"""Layers that drop whole samples now and then have to be caught at it."""


def _look_at_few(use: Use, run: Run, theta: Blocks, args: Any) -> None:
    """Look at some of the samples of a large batch, if the network takes them: what they show is true of all."""
    axes = [each.shape[0] for each in _tensors(args) if each.ndim]
    few = _FEW_IN_TRAINING if use.training else _FEW
    if not axes or axes[0] <= few:
        _look_twice(use, run, theta, args)
        return
    part = _mapped(args, lambda each: each[:few] if each.ndim and each.shape[0] == axes[0] else each)
    try:
        _look_twice(use, run, theta, part)
    except UnsupportedModuleError:
        raise
    except Exception:  # a network for batches of one size
        _look_twice(use, run, theta, args)


def _look_twice(use: Use, run: Run, theta: Blocks, args: Any) -> None:
    frozen = [parameter for parameter in use.originals.values() if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)  # so that a graph would show it
        inputs = _mapped(
            args, lambda each: each.detach().clone()
        )  # should the network write into them, the second look shows it
        first, second = _Look(run, theta, inputs), _Look(run, theta, inputs, again=True)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    if not _close(first.outputs, second.outputs, 1e3):
        raise UnsupportedModuleError(_random(use.net))
    _refuse_hidden(use.net, first, use.originals)
    _refuse_hidden(use.net, second, {})
    once = once_differentiable(first.nodes)
    if once is not None:
        only_once(use.owner, once)
    if first.stopped:
        _refuse_constant(use.net, first)
        forget_forward_mode(use.owner)


def _refuse_hidden(net: nn.Module, look: _Look, originals: Mapping[str, Tensor]) -> None:
    if look.checkpointed:
        raise UnsupportedModuleError(
            f"{_name(net)} uses torch.utils.checkpoint with use_reentrant=True, which hides the parameters inside from "
            "torch.func and torch.autograd.grad: their derivatives would be zero. Pass use_reentrant=False, or switch "
            "checkpointing off (gradient_checkpointing_disable() for transformers)."
        )
    names = {id(each): name for name, each in originals.items()}
    own = {id(leaf) for leaf in look.leaves.values()}
    found = [each for each in look.dependencies if id(each) not in own]
    hidden = [name for each in found if (name := names.get(id(each)) or getattr(each, _PROBE, None)) is not None]
    if hidden:
        raise UnsupportedModuleError(_hidden(net, hidden[0]))
    changed = [name for name, weight in look.weights.items() if weight._version]
    if changed:
        raise UnsupportedModuleError(
            f"{_name(net)} changes its parameter '{changed[0]}' in place when it is evaluated, so it is not a function of it. "
            "Take such steps outside of forward; for an embedding leave max_norm=None."
        )


def _refuse_constant(net: nn.Module, look: _Look) -> None:
    own = {id(leaf) for leaf in look.leaves.values()}
    if not any(id(each) in own for each in look.dependencies):
        raise UnsupportedModuleError(
            f"the outputs of {_name(net)} are computed under no_grad (or inference_mode) from its parameters, so every "
            "derivative would be zero in silence. Remove the decorator or the context from forward."
        )


def _compare(net: nn.Module, run: Run, theta: Blocks, samples: list[Any], varies: list[bool]) -> bool:
    """Refuse outputs of one sample that depend on another one. False if these two samples cannot tell."""
    pairs = list(zip(*(_tensors(each) for each in samples), varies, strict=True))
    varied = [(a, b) for a, b, both in pairs if both]
    if any(a.ndim == 0 or len(a) != 1 for a, _ in varied):
        return True  # not single samples
    if all(torch.equal(a, b) for a, b in varied):
        return False
    joined = iter([torch.cat([a, b, a]) if both else a for a, b, both in pairs])
    with torch.no_grad():
        together = next(_tensors(run(theta, _mapped(samples[0], lambda _: next(joined)))), None)
        alone = next(_tensors(run(theta, samples[0])), None)
    if together is None or together.ndim == 0 or len(together) != 3 or alone is None or len(alone) != 1:
        return True  # no outputs by sample
    # beside another sample, before and after it
    pair = [together[:1], together[2:]]
    if not _close(pair, [alone, alone], 1e6) and not _close(pair, [alone, alone], 1e6, _coarsest(run, theta, samples[0])):
        raise UnsupportedModuleError(
            f"the outputs of {_name(net)} for one sample depend on the other samples of the batch, so it has no Jacobian of a "
            "single sample. Objects of whole batches work: representation='implicit'."
        )
    return True


def _coarsest(run: Run, theta: Blocks, args: Any) -> float:
    """The rounding of the coarsest numbers in an evaluation: layers of another dtype, or norms that cast, round by theirs."""
    precision = _Precision()
    with torch.no_grad(), precision:
        run(theta, args)
    return precision.eps


class _Precision(TorchFunctionMode):
    """Notes the coarsest floating point type that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in _tensors(result):
            if each.is_floating_point() or each.is_complex():
                self.eps = max(self.eps, torch.finfo(each.dtype).eps)
        return result


_PROBE = "_geoad_probe"


class _Look(TorchFunctionMode):
    """One evaluation on leaves of its own, and what it is found to depend on."""

    def __init__(self, run: Run, theta: Blocks, args: Any, again: bool = False) -> None:
        super().__init__()
        self.stopped = self.checkpointed = False
        self.leaves = {name: block.detach().clone().requires_grad_() for name, block in theta.items()}
        for name, leaf in self.leaves.items():
            setattr(leaf, _PROBE, name)  # to be known again, should the network keep something that was computed from it
        self.weights = {name: leaf.clone() for name, leaf in self.leaves.items()}
        with contextlib.nullcontext() if again else self:  # where gradients are switched off, the first look has seen
            result = run(self.weights, args)
        self.outputs = list(_tensors(result))
        self.nodes = nodes(self.outputs)
        self.dependencies = dependencies(self.outputs, self.nodes)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not torch.is_grad_enabled() and isinstance(result, Tensor) and result.is_floating_point():
            where = _inside()
            self.checkpointed = self.checkpointed or where == "checkpoint"
            if not (self.stopped or where):
                self.stopped = self._touched([*args, *(kwargs or {}).values()])
        return result

    def _touched(self, given: list[Any]) -> bool:
        """Some of these depend on the coordinates."""
        own = {id(leaf) for leaf in self.leaves.values()}
        tracked = [each for each in given if isinstance(each, Tensor) and each.requires_grad]
        return any(id(leaf) in own for leaf in dependencies(tracked))


def _inside() -> str | None:
    """Where torch switches gradients off by itself: an ``autograd.Function``, whose backward brings them, or a checkpoint."""
    frame, function = inspect.currentframe(), None
    while frame is not None:
        module = frame.f_globals.get("__name__")
        if module == "torch.utils.checkpoint" and frame.f_code.co_qualname == "CheckpointFunction.forward":
            return "checkpoint"
        if module == "torch.autograd.function" and frame.f_code.co_name == "apply":
            function = "function"
        frame = frame.f_back
    return function


@contextlib.contextmanager
def _apart() -> Generator[None]:
    """Outside of all transforms that are under way."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    with temporarily_clear_interpreter_stack():
        yield


_functorch: Any = torch._C._functorch  # pyright: ignore


def _samples(tensor: Tensor) -> int | None:
    """How many samples ``vmap`` hides in a tensor; None if it is not batched."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        below = _functorch.get_unwrapped(tensor)
        if _functorch.is_batchedtensor(tensor):
            return int(below.shape[_functorch.maybe_get_bdim(tensor)])
        tensor = below
    return None


def unwrapped(tensor: Tensor, sample: int) -> Tensor:
    """The numbers below all transforms; of a batched tensor those of one sample (the last one, if there are fewer)."""
    if not _functorch.is_functorch_wrapped_tensor(tensor):
        return tensor
    below = unwrapped(_functorch.get_unwrapped(tensor), sample)
    if not _functorch.is_batchedtensor(tensor):
        return below
    axis = int(_functorch.maybe_get_bdim(tensor))
    return below.select(axis, min(sample, below.shape[axis] - 1))


def _children(tree: Any) -> Iterable[Any] | None:
    if isinstance(tree, Mapping):
        return cast("Mapping[Any, Any]", tree).values()
    if isinstance(tree, (list, tuple)):
        return cast("Iterable[Any]", tree)
    if isinstance(tree, SimpleNamespace) or (is_dataclass(tree) and not isinstance(tree, type)):
        return vars(tree).values()
    return None


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in a tree of mappings, sequences and plain objects."""
    if isinstance(tree, Tensor):
        yield tree
        return
    for each in _children(tree) or ():
        yield from _tensors(each)


def _mapped(tree: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """`tree` with other tensors, for plain dicts, lists and tuples; what is not changed stays the same object."""
    if isinstance(tree, Tensor):
        return fn(tree)
    if type(tree) is dict:
        given = cast("dict[Any, Any]", tree)
        changed: Any = {key: _mapped(value, fn) for key, value in given.items()}
        return tree if all(changed[key] is value for key, value in given.items()) else changed
    if type(tree) in (list, tuple):
        items = cast("list[Any]", tree)
        changed = [_mapped(each, fn) for each in items]
        return tree if all(a is b for a, b in zip(changed, items, strict=True)) else type(items)(changed)
    return tree


def _close(first: list[Tensor], second: list[Tensor], roundings: float, coarsest: float = 0.0) -> bool:
    """Equal up to what other orders of summation may change, in the `coarsest` precision that took part."""
    if [each.shape for each in first] != [each.shape for each in second]:
        return False
    for a, b in zip(first, second, strict=True):
        if not (a.is_floating_point() or a.is_complex()) or torch.equal(a, b):
            continue
        a, b = a.detach(), b.detach()
        eps = max(torch.finfo(a.dtype).eps, coarsest)
        size = float(a[a.isfinite()].abs().max()) if bool(a.isfinite().any()) else 0.0
        if not torch.allclose(a, b, rtol=0.0, atol=min(roundings * eps, eps**0.5) * size, equal_nan=True):
            return False
    return True


def _name(net: nn.Module) -> str:
    return f"the network (a {type(net).__name__})"


def _random(net: nn.Module) -> str:
    return (
        f"{_name(net)} gave other outputs when it was evaluated again with the same parameters and inputs: it draws random "
        "numbers (dropout by functional.dropout without training=self.training, noise), depends on earlier calls, or writes "
        "into its inputs. Then every evaluation is another function, and a second derivative would mix several of them. Call "
        "geo.eval(), pass the noise as an input, or seed it inside: forward= with torch.random.fork_rng() and "
        "torch.manual_seed(...)."
    )


def _hidden(net: nn.Module, name: str) -> str:
    owner, _, attribute = name.rpartition(".")
    module = net.get_submodule(owner) if owner else net
    return (
        f"{_name(net)} reads its parameter '{name}' past '{attribute}' of {type(module).__name__}: from a list, a closure, a "
        "compiled function or a value computed from it earlier. There the coordinates of a point do not arrive, and its "
        "derivative would be zero or incomplete in silence. Read it as an attribute in forward (self."
        f"{attribute}, or nn.ParameterList for lists), and compute what depends on it in every call."
    )
