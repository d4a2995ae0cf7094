"""The ladder: which way a derivative is taken where torch lacks the usual one.

A product has several *ways* that give the same numbers, the best one first: forward-mode AD, reverse mode only, plain
``torch.autograd`` (for a Hessian product first, where no transform is around it: the fastest); ``vmap``, a loop. `climb` takes
the first that works. Where a faster kernel stands in the way of forward-mode AD (fused attention, fused recurrent networks), a
*fix* switches it off for that product and the way is tried again, before a slower way is. What had to be done is remembered
for the owner of the function (a loss, a network; they say `visit` when they are evaluated), so that the next product does not
begin with a failure, and is logged once at level INFO under the name "geoad".
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn
from torch.autograd import forward_ad

from geoad.errors import UnsupportedModuleError
from geoad.kernels.bags import SpelledOutBags, SpelledOutPadding
from geoad.kernels.norms import SpelledOut
from geoad.kernels.stamps import depend

__all__ = [
    "Fix",
    "Outcome",
    "Way",
    "at_top_level",
    "climb",
    "differentiated_twice",
    "failed_before",
    "forget_forward_mode",
    "lacks_derivative",
    "one_by_one",
    "only_once",
    "refuse_second",
    "singly",
    "visit",
    "watched",
]

logger = logging.getLogger("geoad")
T = TypeVar("T")
Way = tuple[str, Callable[[], T]]
"""(name, computation): "forward", "reverse" (both by torch.func), "autograd", "vmap" or "loop"."""


@dataclass(frozen=True)
class Fix:
    """A setting under which torch uses operations that have all derivatives.

    Attributes:
        name: for the log.
        words: what the error says of the operation that has not.
        context: makes the context manager.
    """

    name: str
    words: tuple[str, ...]
    context: Callable[[], AbstractContextManager[Any]]


def _math_attention() -> AbstractContextManager[Any]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)


@contextlib.contextmanager
def _plain_recurrence() -> Generator[None]:
    # the public context managers set more than they are asked to
    flags: Any = torch._C  # pyright: ignore
    mkldnn, cudnn = flags._get_mkldnn_enabled(), flags._get_cudnn_enabled()
    flags._set_mkldnn_enabled(False)
    flags._set_cudnn_enabled(False)
    try:
        yield
    finally:
        flags._set_mkldnn_enabled(mkldnn)
        flags._set_cudnn_enabled(cudnn)


FIXES = (
    Fix("unfused attention", ("_scaled_dot_product_", "_flash_attention", "_efficient_attention"), _math_attention),
    Fix("unfused recurrent layers", ("mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn"), _plain_recurrence),
    Fix("spelled-out weight norm", ("_weight_norm",), SpelledOut),
    Fix("spelled-out embedding bags", ("_embedding_bag",), SpelledOutBags),
)

Path = tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """How a product was taken.

    Attributes:
        path: the product, below those that it was taken inside of.
        way: the name of the way.
        fixes: the names of the fixes.
    """

    path: Path
    way: str
    fixes: tuple[str, ...]


@dataclass
class _Memory:
    """What derivatives of one owner need: the first way to try and the fixes, for each kind of product and order of ways."""

    needs: dict[tuple[Path, Path], tuple[int, tuple[Fix, ...]]] = field(
        default_factory=dict[tuple[Path, Path], tuple[int, tuple[Fix, ...]]]
    )
    forward: bool = True
    once: str | None = None


class _Needs(BaseException):
    """Raised by `visit` to an attempt that is known to fail; no error, so it is no ``Exception``."""

    def __init__(self, attempt: _Attempt, way: int, fixes: tuple[Fix, ...]) -> None:
        super().__init__()
        self.attempt, self.way, self.fixes = attempt, way, fixes


class _Attempt:
    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path, self.names = path, tuple(names)
        self.way = 0
        self.top = at_top_level()  # elsewhere plain autograd would see constants
        self.fixes: tuple[Fix, ...] = ()
        self.owner: Any = None
        self.errors: list[RuntimeError] = []

    @property
    def cause(self) -> RuntimeError | None:
        """Why the best way was not taken."""
        return self.errors[0] if self.errors else None

    def environment(self) -> AbstractContextManager[Any]:
        stack = ExitStack()
        if self.names[self.way] == "forward":  # for J v to be of the same function as w J
            stack.enter_context(SpelledOutPadding())
        for fix in self.fixes:
            stack.enter_context(fix.context())
        return stack

    def descend(self, error: RuntimeError) -> bool:
        """After a failure: add a fix, or go to the next way. False if there is none."""
        self.errors.append(error)
        if isinstance(error, torch.OutOfMemoryError):
            return False
        text = str(error)
        for fix in FIXES:
            if fix not in self.fixes and any(word in text for word in fix.words):
                self.fixes = (*self.fixes, fix)
                return True
        return self.skip()

    def skip(self) -> bool:
        """Go to the next way that can be taken here."""
        self.way += 1
        if self.way < len(self.names) and not self.allowed(self.way):
            self.way += 1
        return self.way < len(self.names)

    def allowed(self, way: int) -> bool:
        """Plain autograd would cut the graph of the transforms around."""
        return self.top or self.names[way] != "autograd"

    def remember(self) -> None:
        """Note what was needed, for the owner."""
        if self.cause is None or self.owner is None:
            return
        memory = _memories.setdefault(self.owner, _Memory())
        memory.needs[self.path, self.names] = (self.way, self.fixes)
        done = ", ".join([f"by {self.names[self.way]}", *(fix.name for fix in self.fixes)])
        reason = str(self.cause).strip().split("\n")[0][:200]
        kind = _KINDS.get(self.path[-1], self.path[-1])
        logger.info("%s of a %s: %s, for torch says: %s (exact)", kind, type(self.owner).__name__, done, reason)


_KINDS = {
    "jvp": "Jacobian products J v",
    "vjp": "Jacobian products wJ",
    "product": "products JᵀAJ v",
    "gradient": "gradients",
    "hessian": "Hessian products",
    "rows": "rows of products",
    "samples": "Jacobians of single samples",
}

_memories: weakref.WeakKeyDictionary[Any, _Memory] = weakref.WeakKeyDictionary()


class _Local(threading.local):
    def __init__(self) -> None:
        self.stack: list[_Attempt] = []
        self.watchers: list[list[Outcome]] = []
        self.singles = 0


_local = _Local()


def at_top_level() -> bool:
    """True if no transform of ``torch.func`` and no dual level is active."""
    level: int | None = torch._C._functorch.maybe_current_level()  # pyright: ignore
    dual: int = forward_ad._current_level  # pyright: ignore
    return level is None and dual < 0


def climb(kind: str, ways: Sequence[Way[T]]) -> T:
    """The result of the first way that works.

    Args:
        kind: the kind of product, under which what it took is remembered.
        ways: the ways; all give the same.

    Raises:
        UnsupportedModuleError: torch lacks the derivative on every way.
        RuntimeError: what the first way raised, if that is another error.
    """
    if torch.compiler.is_compiling():  # the compiler sees what forward mode sees
        return ways[0][1]()
    stack = _local.stack
    attempt = _Attempt((*stack[-1].path, kind) if stack else (kind,), [name for name, _ in ways])
    stack.append(attempt)
    try:
        result = _first_that_works(attempt, ways)
    finally:
        stack.pop()
    for watcher in _local.watchers:
        watcher.append(Outcome(attempt.path, attempt.names[attempt.way], tuple(fix.name for fix in attempt.fixes)))
    return result


def _first_that_works(attempt: _Attempt, ways: Sequence[Way[T]]) -> T:
    while True:
        try:
            with attempt.environment():
                result = ways[attempt.way][1]()
        except _Needs as signal:
            if signal.attempt is not attempt:
                raise
            attempt.way, attempt.fixes = max(attempt.way, signal.way), signal.fixes
        except RuntimeError as error:
            if not attempt.descend(error):
                _give_up(attempt, error)
        else:
            attempt.remember()
            return result


def _give_up(attempt: _Attempt, last: RuntimeError) -> None:
    cause = attempt.cause or last
    tried = [cause, last, *attempt.errors]
    lacking = next((error for error in (last, cause) if lacks_derivative(error)), None)
    if lacking is None or len(_local.stack) > 1 or not attempt.top:
        raise cause
    kind = _KINDS.get(attempt.path[-1], attempt.path[-1])
    where = next((found for error in tried if (found := _where(error))), "the function, or its loss,")
    raise UnsupportedModuleError(
        f"{kind[0].upper()}{kind[1:]} were asked for, and torch has no derivative of an operation in {where}: "
        f"{_first_line(lacking)}. No other way leads there (tried: {', '.join(attempt.names)}), and a part left out would be a "
        "zero in silence. Write that operation with others, or leave it out of the function; see docs/models.md."
    ) from lacking


def lacks_derivative(error: Exception) -> bool:
    """It says that torch lacks a derivative, or that a transform cannot go through an operation."""
    return any(words in str(error) for words in _LACKING)


def _where(error: RuntimeError) -> str:
    """The module that was being evaluated when torch raised, read off the traceback."""
    frame, running = error.__traceback__, list[nn.Module]()
    while frame is not None:
        module = frame.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            running.append(module)
        frame = frame.tb_next
    if not running or running[-1] is running[0]:
        return ""
    path = next((path for path, module in running[0].named_modules() if module is running[-1]), "")
    return f"module '{path}' ({type(running[-1]).__name__})" if path else f"a {type(running[-1]).__name__}"


def _first_line(error: RuntimeError) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")[:300]


_LACKING = (
    "forward AD",
    "forward-mode AD",
    "forward mode AD",
    "ZeroTensors are immutable",
    "derivative for",
    "is not implemented",
    "once_differentiable",
    "setup_context",
    "saved tensor hooks",
    "don't support automatic differentiation",
    "Checkpointing is not compatible",
    "incompatible with .grad()",
    "incompatible with `.grad()`",
)
"""What torch says where a derivative is missing."""


def visit(owner: Any) -> None:
    """`owner` is about to be evaluated: what its derivatives need is known from now on to the products under way.

    Called at the entry, before anything is computed, so that a product which is known to fail is abandoned at no cost.
    """
    if torch.compiler.is_compiling():
        return
    depend(owner)
    if not (stack := _local.stack):
        return
    try:
        memory = _memories.get(owner)
    except TypeError:  # it can be neither hashed nor remembered
        return
    if memory is not None and memory.once is not None:
        refuse_second(memory.once)
    for attempt in stack:
        first = attempt.owner is None
        if first:
            attempt.owner = owner
        if memory is None:
            continue
        way, fixes = memory.needs.get((attempt.path, attempt.names), (0, ())) if first else (0, ())
        way = max(way, attempt.way)
        if not memory.forward and attempt.names[way] == "forward":
            way += 1
        if not attempt.allowed(way):
            continue
        if way > attempt.way or any(fix not in attempt.fixes for fix in fixes):
            raise _Needs(attempt, way, fixes)


def refuse_second(name: str) -> None:
    """Raise if reverse mode would go twice through `name`, which has a first derivative only: the second would be zero."""
    if any(attempt.path[-1] in ("jvp", "hessian") and attempt.names[attempt.way] != "forward" for attempt in _local.stack):
        raise differentiated_twice(name)


def differentiated_twice(name: str) -> RuntimeError:
    """What to raise where a second derivative would be zero in silence."""
    return RuntimeError(f"trying to differentiate twice {name}, which is marked with @once_differentiable")


def only_once(owner: Any, name: str) -> None:
    """From now on no second derivatives of `owner` are taken in reverse mode, for `name` has none."""
    _memories.setdefault(owner, _Memory()).once = name


def failed_before() -> bool:
    """The innermost product has just failed on a better way, not known to fail before."""
    return bool(_local.stack) and _local.stack[-1].cause is not None


def forget_forward_mode(owner: Any) -> None:
    """From now on derivatives of `owner` are taken in reverse mode only."""
    _memories.setdefault(owner, _Memory()).forward = False
    logger.info(
        "derivatives of a %s are taken in reverse mode only: it works under no_grad on its coordinates", type(owner).__name__
    )


@contextlib.contextmanager
def one_by_one() -> Generator[None]:
    """In this block functions are evaluated on single samples, each by itself: networks that couple samples are refused."""
    _local.singles += 1
    try:
        yield
    finally:
        _local.singles -= 1


def singly() -> bool:
    """True inside of `one_by_one`."""
    return _local.singles > 0


@contextlib.contextmanager
def watched() -> Generator[list[Outcome]]:
    """The outcomes of all products in this block, in order of completion.

    >>> import torch
    >>> from geoad.kernels import ladder, products
    >>> with ladder.watched() as seen:
    ...     products.jvp(torch.sin, torch.zeros(2), torch.ones(2))
    (tensor([0., 0.]), tensor([1., 1.]))
    >>> seen
    [Outcome(path=('jvp',), way='forward', fixes=())]
    """
    seen: list[Outcome] = []
    _local.watchers.append(seen)
    try:
        yield seen
    finally:
        _local.watchers.remove(seen)
