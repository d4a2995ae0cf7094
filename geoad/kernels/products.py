"""Products with first and second derivatives: jvp, vjp, gradient, Hessian product, and many products at once.

Drop-in for those of ``torch.func``, but each goes down the `ladder` where torch lacks a derivative. Arguments and values are
trees of tensors (dicts, tuples). The results are differentiable.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from geoad.kernels.graph import dependencies, nodes, once_differentiable
from geoad.kernels.ladder import at_top_level, climb, differentiated_twice, failed_before, refuse_second
from geoad.kernels.lean import Lean
from geoad.kernels.norms import SpelledOut
from geoad.kernels.spelled import apart
from geoad.params import flatten, is_wrapped

__all__ = ["batched", "gradient", "hessian_product", "jvp", "mapped", "push_pull", "quiet_vmap", "vjp"]

_jvp: Any = torch.func.jvp  # torch annotates them for has_aux too
_vjp: Any = torch.func.vjp
_grad: Any = torch.func.grad


def jvp(fn: Callable[[Any], Any], x: Any, v: Any, has_aux: bool = False) -> tuple[Any, ...]:
    """(f(x), Df(x) v), and what `fn` returns beside its value with `has_aux`.

    >>> import torch
    >>> from geoad.kernels import products
    >>> products.jvp(torch.square, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]))
    (tensor([1., 4.]), tensor([2., 0.]))
    """

    def by_reverse() -> tuple[Any, ...]:
        _check_once(fn, x, has_aux)
        value, pull, *aux = _vjp(fn, x, has_aux=has_aux)
        return (value, _transposed(lambda u: pull(u)[0], value, v), *aux)

    def by_autograd() -> tuple[Any, ...]:
        tape = _Tape(fn, x, has_aux)
        return (tape.result(tape.value), tape.push(v), *tape.aux)

    ways = [("forward", lambda: _jvp(fn, (x,), (v,), has_aux=has_aux)), ("reverse", by_reverse), ("autograd", by_autograd)]
    return climb("jvp", ways)


def _transposed(pull: Callable[[Any], Any], value: Any, v: Any) -> Any:
    """Df v, as the transpose of the linear map u ↦ uᵀDf at any u."""
    leaves, build = flatten(value)
    zero = build([torch.zeros_like(leaf) for leaf in leaves])
    return _vjp(pull, zero)[1](v)[0]


def vjp(fn: Callable[[Any], Any], x: Any, has_aux: bool = False) -> tuple[Any, ...]:
    """(f(x), pull) with pull(u) = uᵀDf(x) in the form of x, and what `fn` returns beside its value with `has_aux`.

    >>> import torch
    >>> from geoad.kernels import products
    >>> products.vjp(torch.square, torch.tensor([1.0, 2.0]))[1](torch.ones(2))
    tensor([2., 4.])
    """

    def by_func() -> tuple[Any, ...]:
        value, pull, *aux = _vjp(fn, x, has_aux=has_aux)
        return (value, lambda u: pull(u)[0], *aux)

    def by_autograd() -> tuple[Any, ...]:
        tape = _Tape(fn, x, has_aux)
        return (tape.result(tape.value), tape.pull, *tape.aux)

    return climb("vjp", [("reverse", by_func), ("autograd", by_autograd)])


def push_pull(fn: Callable[[Any], Any], x: Any, v: Any) -> tuple[Any, Any, Callable[[Any], Any]]:
    """(f(x), Df(x) v, pull) with pull(u) = uᵀDf(x): both products of one evaluation, by forward mode inside of reverse mode.

    >>> import torch
    >>> from geoad.kernels import products
    >>> f, velocity, pull = products.push_pull(torch.square, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]))
    >>> f, velocity, pull(velocity)
    (tensor([1., 4.]), tensor([2., 0.]), tensor([4., 0.]))
    """

    def together() -> tuple[Any, ...]:
        with apart():
            value, pull, velocity = _vjp(lambda y: _jvp(fn, (y,), (v,)), x, has_aux=True)
        return value, velocity, lambda u: pull(u)[0]

    def in_turn() -> tuple[Any, ...]:
        value, pull = vjp(fn, x)
        return value, jvp(fn, x, v)[1], pull

    return cast("tuple[Any, Any, Callable[[Any], Any]]", climb("product", [("forward", together), ("apart", in_turn)]))


def gradient(fn: Callable[[Any], Any], x: Any) -> tuple[Any, Any]:
    """(∇f(x), aux) of a function that returns (number, aux).

    >>> import torch
    >>> from geoad.kernels import products
    >>> products.gradient(lambda x: (x.square().sum(), "aux"), torch.tensor([1.0, 2.0]))
    (tensor([2., 4.]), 'aux')
    """

    def by_autograd() -> tuple[Any, Any]:
        tape = _Tape(fn, x, has_aux=True)
        return tape.pull(torch.ones_like(tape.value)), tape.result(tape.aux[0])

    return climb("gradient", [("reverse", lambda: _grad(fn, has_aux=True)(x)), ("autograd", by_autograd)])


def hessian_product(fn: Callable[[Any], Tensor], x: Any, v: Any) -> Any:
    """∇²f(x) v: by double backward where plain autograd is the one transform, else forward over reverse where torch can.

    >>> import torch
    >>> from geoad.kernels import products
    >>> products.hessian_product(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]), torch.ones(2))
    tensor([ 6., 12.])
    """

    def watched(y: Any) -> Tensor:
        value = fn(y)
        once = once_differentiable(nodes([value])) if isinstance(value, Tensor) else None  # pyright: ignore[reportUnnecessaryIsInstance]
        if once is not None:  # forward mode too stops at its backward, for a slope that depends on x
            raise differentiated_twice(once)
        return value

    compiling = torch.compiler.is_compiling()  # the compiler cannot follow a look at the graph
    slope = _grad(fn if compiling else watched)
    twice = ("autograd", lambda: _Tape(fn, x).curve(v))
    ways = [("forward", lambda: _jvp(slope, (x,), (v,))[1]), ("reverse", lambda: _vjp(slope, x)[1](v)[0])]
    first = not compiling and at_top_level() and not torch.is_inference_mode_enabled()
    return climb("hessian", [twice, *ways] if first else [*ways, twice])


def mapped(fn: Callable[[Any], Any], rows: Any, chunk_size: int | None = None) -> Any:
    """`fn` of every row of `rows`, stacked: by ``vmap``, or by a loop where `fn` cannot be batched.

    >>> import torch
    >>> from geoad.kernels import products
    >>> products.mapped(lambda v: v.sum(), torch.eye(2))
    tensor([1., 1.])
    """
    leaves, build = flatten(rows)
    count = leaves[0].shape[0]

    def by_loop() -> Any:
        results = [flatten(fn(build([leaf[i] for leaf in leaves]))) for i in range(count)]
        return results[0][1]([torch.stack(same) for same in zip(*(each for each, _ in results), strict=True)])

    batched = quiet_vmap(fn, chunk_size=chunk_size)
    if count == 0:  # a loop would not know the form of the result
        return batched(rows)
    return climb("rows", [("vmap", lambda: batched(rows)), ("loop", by_loop)])


def batched(fn: Callable[[Any], Any], axes: int) -> Callable[[Any], Any]:
    """`fn`, written for single arguments, under some leading axes."""
    for _ in range(axes):
        fn = functools.partial(mapped, fn)
    return fn


def _check_once(fn: Callable[[Any], Any], x: Any, has_aux: bool = False) -> None:
    """Refuse to differentiate twice in reverse mode what has one derivative; looked at when that way is taken first."""
    if failed_before() and all(isinstance(leaf, Tensor) and not is_wrapped({"": leaf}) for leaf in flatten(x)[0]):
        _Tape(fn, x, has_aux).check_once()


def quiet_vmap(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``torch.func.vmap`` that does not warn of operations which it takes one by one: there is nothing a user could do."""
    batched: Any = torch.func.vmap(fn, **options)
    warn: Any = torch._C._functorch._set_vmap_fallback_warning_enabled  # pyright: ignore

    def call(*args: Any) -> Any:
        inside = not at_top_level()
        warn(False)
        try:
            return batched(*args)
        finally:
            if not inside:
                warn(True)

    return call


class _Formulas(Lean):
    """`SpelledOut` and `Lean`, in one mode."""

    formulas: ClassVar[Mapping[Any, Callable[..., Any]]] = {**SpelledOut.formulas, **Lean.formulas}


class _Tape:
    """f(x) recorded by plain autograd on leaves of its own.

    What comes out keeps a graph where x, or something else that f depends on, asks for one.
    """

    def __init__(self, fn: Callable[[Any], Any], x: Any, has_aux: bool = False) -> None:
        if torch.is_inference_mode_enabled():
            raise RuntimeError("plain autograd records nothing in inference mode: every derivative would be zero")
        keep = torch.is_grad_enabled()
        given, self.build = flatten(x)
        self.leaves = [_leaf(each, keep) for each in given]
        with torch.enable_grad(), _Formulas():  # further transforms inside are not seen by the norms
            result = fn(self.build(self.leaves))
        self.value: Any = result[0] if has_aux else result
        self.aux: tuple[Any, ...] = result[1:] if has_aux else ()
        self.outputs, self.build_value = flatten(self.value)
        found = nodes(self.outputs)
        self.once = once_differentiable(found)
        own = {id(leaf) for leaf in self.leaves if leaf.is_leaf}
        self.keep = keep and any(id(each) not in own for each in dependencies(self.outputs, found))

    def result(self, tree: Any) -> Any:
        """`tree` as it is handed out."""
        if self.keep:
            return tree
        leaves, build = flatten(tree)
        return build([leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves])

    def _slopes(self, u: Any) -> list[Tensor]:
        """uᵀDf for each leaf, with its graph."""
        pairs = [(f, w) for f, w in zip(self.outputs, flatten(u)[0], strict=True) if f.requires_grad]
        if not pairs:
            return [torch.zeros_like(leaf) for leaf in self.leaves]
        outputs, weights = zip(*pairs, strict=True)
        self.check_once()
        slopes: Any = torch.autograd.grad(outputs, self.leaves, weights, create_graph=True, allow_unused=True)
        return [torch.zeros_like(leaf) if s is None else s for s, leaf in zip(slopes, self.leaves, strict=True)]

    def check_once(self) -> None:
        """Refuse to be part of a second derivative, if an operation of f has only one."""
        if self.once is not None:
            refuse_second(self.once)

    def pull(self, u: Any) -> Any:
        """uᵀDf."""
        with torch.enable_grad():
            return self.result(self.build(self._slopes(u)))

    def curve(self, v: Any) -> Any:
        """∇²f v, with a graph where one is asked for; ∇f is symmetric, so reverse mode may be taken twice."""
        if not isinstance(self.value, Tensor) or self.value.ndim:
            raise RuntimeError(f"a Hessian is that of a function with one number for its value, found {_form(self.value)}")
        given = flatten(v)[0]
        keep = self.keep or (torch.is_grad_enabled() and any(leaf.requires_grad for leaf in given))
        with torch.enable_grad():
            slopes = self._slopes(torch.ones_like(self.value))
            pairs = [(s, w) for s, w in zip(slopes, given, strict=True) if s.requires_grad]
            if not pairs:
                return self.build([torch.zeros_like(leaf) for leaf in given])
            slopes, weights = zip(*pairs, strict=True)
            curved: Any = torch.autograd.grad(slopes, self.leaves, weights, create_graph=keep, allow_unused=True)
            return self.build([torch.zeros_like(w) if c is None else c for c, w in zip(curved, given, strict=True)])

    def push(self, v: Any) -> Any:
        """Df v, the transpose of `pull` at u = 0."""
        with torch.enable_grad():
            zero = [torch.zeros_like(each).requires_grad_() for each in self.outputs]
            linear = self._slopes(self.build_value(zero))
            pairs = [(s, w) for s, w in zip(linear, flatten(v)[0], strict=True) if s.requires_grad]
            if not pairs:
                return self.build_value([torch.zeros_like(each).detach() for each in self.outputs])
            slopes, directions = zip(*pairs, strict=True)
            pushed: Any = torch.autograd.grad(slopes, zero, directions, create_graph=True, allow_unused=True)
            pushed = [torch.zeros_like(z) if p is None else p for p, z in zip(pushed, zero, strict=True)]
            return self.result(self.build_value(pushed))


def _form(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _leaf(tensor: Tensor, keep: bool) -> Tensor:
    """A tensor to differentiate by: apart from what else depends on the given one, but with its graph if that is kept."""
    if keep and tensor.requires_grad:
        return tensor.view_as(tensor)
    return tensor.detach().requires_grad_()
