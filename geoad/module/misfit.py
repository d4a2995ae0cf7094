"""Data that do not fit a network or a loss: what torch says, with what was given to whom, and what it should have been."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

from geoad.errors import GeometryError
from geoad.kernels.ladder import lacks_derivative
from geoad.kernels.spelled import without_own_modes
from geoad.module.survey import unwrapped
from geoad.params import Blocks, flatten, is_traced, outside_of_transforms

__all__ = ["MISFITS", "refuse_inputs", "refuse_targets"]

MISFITS = (RuntimeError, IndexError, ValueError, TypeError, AssertionError)
"""What torch raises where shapes, dtypes or indices do not fit."""


def refuse_inputs(run: Callable[[Blocks, Any], object], theta: Blocks, inputs: Any, error: Exception) -> None:
    """Raise a clear error if the network, outside of all derivatives, cannot take the inputs.

    An error that the network raises by itself, or in an operation of its own, stays as it is and gets a note.

    Args:
        run: evaluates the network at coordinates on inputs.
        theta: its coordinates.
        inputs: what it was evaluated on.
        error: what it raised.
    """

    def again() -> None:
        nonlocal inputs
        inputs = _bare(inputs)
        run({name: unwrapped(block, 0).detach() for name, block in theta.items()}, inputs)

    found = _plainly(again, error)
    if found is None:
        return
    where = _Where(found)
    given = f"inputs {_described(inputs)}"
    if not where.in_torch:
        _note(error, f"geoad evaluated the network on {given}; the first axis counts the samples.")
        return
    hint = _indices(where) or (
        "The first axis of the inputs counts the samples, the others are those of one sample: compare them with what the layer "
        "takes. A single sample is a batch of one, x.unsqueeze(0)."
    )
    raise GeometryError(f"the network cannot be evaluated on {given}: {where}{_said(found)}. {hint}") from found


def refuse_targets(loss: Callable[..., object], outputs: Any, targets: Any, error: Exception) -> None:
    """Raise a clear error if a loss, outside of all derivatives, cannot take these targets."""

    def again() -> None:
        nonlocal outputs, targets
        outputs, targets = _bare(outputs), _bare(targets)
        _ = loss(outputs) if targets is None else loss(outputs, targets)

    found = _plainly(again, error)
    if found is None or len({each.device for each in _tensors((outputs, targets))}) > 1:
        return
    given = f"outputs {_described(outputs)} and {'no targets' if targets is None else f'targets {_described(targets)}'}"
    if targets is not None and not _Where(found).in_torch:
        _note(error, f"geoad evaluated the loss on {given}.")
        return
    name = getattr(loss, "__name__", type(loss).__name__)
    raise GeometryError(
        f"the loss {name} cannot be evaluated on {given}: {_said(found)}. {_mended(outputs, targets)}"
    ) from found


# -- what went wrong ---------------------------------------------------------------------------------------------------------


def _plainly(run: Callable[[], object], error: Exception) -> Exception | None:
    """What is raised outside of all transforms, or None: then `error` is one of a derivative."""
    # subclasses have a meaning of their own: out of memory, not implemented
    if type(error) not in MISFITS or lacks_derivative(error) or is_traced():
        return None
    contexts: list[AbstractContextManager[Any]] = [outside_of_transforms(), without_own_modes(), torch.no_grad()]
    with ExitStack() as stack:
        for each in contexts:
            stack.enter_context(each)
        try:
            run()
        except Exception as found:
            return found if type(found) in MISFITS and not lacks_derivative(found) else None
    return None


def _bare(tree: Any) -> Any:
    """The tensors below all transforms, with the samples that ``vmap`` goes through side by side."""
    leaves, build = flatten(tree)
    return build([_below(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves])


def _below(tensor: Tensor) -> Tensor:
    if not _functorch.is_functorch_wrapped_tensor(tensor):
        return tensor.detach()
    below = _functorch.get_unwrapped(tensor)
    if not _functorch.is_batchedtensor(tensor):
        return _below(below)
    moved = _below(below).movedim(int(_functorch.maybe_get_bdim(tensor)), 0)
    return moved[0] if moved.ndim == 1 else moved.flatten(0, 1)


_functorch: Any = torch._C._functorch  # pyright: ignore


class _Where:
    """Where torch raised: the layer, and what it was given."""

    def __init__(self, error: Exception) -> None:
        self.layer: nn.Module | None = None
        self.net: nn.Module | None = None
        self.given: Any = None
        last, entered = "torch", False  # an error without frames of others is of a function in C
        trace = error.__traceback__
        while trace is not None:
            frame = trace.tb_frame
            name = str(frame.f_globals.get("__name__", ""))
            module = frame.f_locals.get("self")
            if name.startswith("geoad."):
                if entered:  # a mode through which an operation goes
                    break
            elif name.startswith("torch.nn.") or name.partition(".")[0] != "torch":
                last, entered = name, True
                if isinstance(module, nn.Module):
                    self.net = self.net or module
                    if type(module).__module__.startswith("torch.nn."):
                        self.layer = module
                        if frame.f_code.co_name == "forward":
                            self.given = frame.f_locals.get("input", frame.f_locals.get("query"))
            trace = trace.tb_next
        self.in_torch = last.partition(".")[0] == "torch"

    def __str__(self) -> str:
        if self.net is None or self.layer is None or self.layer is self.net:
            return ""
        path = next((path for path, each in self.net.named_modules() if each is self.layer), "")
        given = f", which was given {_described(self.given)}" if isinstance(self.given, Tensor) else ""
        named = repr(self.layer)
        named = named if len(named) < 200 and "\n" not in named else f"a {type(self.layer).__name__}"
        return f"in module '{path}', {named}{given}: "


def _indices(where: _Where) -> str:
    """What to say of indices into a table."""
    rows, given = getattr(where.layer, "num_embeddings", None), where.given
    if rows is None or not isinstance(given, Tensor) or given.is_floating_point() or not given.numel():
        return ""
    low, high = int(given.min()), int(given.max())
    if low >= 0 and high < rows:
        return ""
    return (
        f"Indices must lie between 0 and {rows - 1}, found {low} to {high}: give the embedding more rows, or map unknown "
        "tokens to one that it has."
    )


def _mended(outputs: Any, targets: Any) -> str:
    """What to do about targets."""
    if targets is None:
        return (
            "Pass the data as (x, y). A bare tensor, and each of a list of tensors of one shape, is a batch of inputs without "
            "targets; several inputs go into one batch as ((x1, x2), y)."
        )
    if not isinstance(targets, Tensor) or not isinstance(outputs, Tensor) or outputs.ndim == 0:
        return _EACH
    if targets.dtype == torch.bool:
        return "Truth values are no labels: use y.long(), or y.to(outputs.dtype) for a loss that compares with probabilities."
    labels = not targets.is_floating_point() and not targets.is_complex()
    classes = outputs.shape[1] if outputs.ndim > 1 else 0
    if labels and outputs.ndim > 1 and targets.shape == outputs.shape:
        return "Class probabilities (one-hot targets) are floating point: y.to(outputs.dtype); or pass labels, y.argmax(1)."
    if labels and targets.ndim == outputs.ndim and targets.shape[1:2] == (1,):
        return "Labels have the shape of the outputs without the axis of the classes: y.squeeze(1)."
    if not labels and targets.ndim < outputs.ndim:
        return "Labels of classes are integers, y.long(); real targets have the shape of the outputs, e.g. y.unsqueeze(-1)."
    if labels and targets.numel() and classes and targets.ndim == outputs.ndim - 1:
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= classes:
            return (
                f"Labels must lie between 0 and {classes - 1}, for there are {classes} classes; found {low} to {high}. Let "
                "them start at 0, give the network more outputs, or name the label of padding to the loss, ignore_index=..."
            )
    return _EACH


_EACH = "Each sample needs its target, along the first axis and in the form that the loss takes."


# -- words -------------------------------------------------------------------------------------------------------------------


def _said(error: Exception) -> str:
    words = str(error).strip().split("\n")[0].rstrip(".")
    return f"torch says: {words[:300]}" if words else f"torch raised {type(error).__name__}"


def _note(error: Exception, words: str) -> None:
    if words not in getattr(error, "__notes__", ()):
        error.add_note(words)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in flatten(tree)[0] if isinstance(leaf, Tensor))


def _described(tree: Any) -> str:
    """Dtypes and shapes of the tensors in a batch."""
    if isinstance(tree, Tensor):
        return f"{str(tree.dtype).removeprefix('torch.')} of shape {tuple(tree.shape)}"
    if isinstance(tree, Mapping):
        items = cast("Mapping[str, Any]", tree).items()
        return "{" + ", ".join(f"{key}: {_described(each)}" for key, each in itertools.islice(items, 8)) + "}"
    if isinstance(tree, (list, tuple)):
        return "(" + ", ".join(_described(each) for each in itertools.islice(cast("tuple[Any, ...]", tree), 8)) + ")"
    return f"a {type(tree).__name__}"
