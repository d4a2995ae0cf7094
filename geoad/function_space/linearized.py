"""A network replaced by its tangent at a point: f(x; θ₀) + J(x)(θ - θ₀) as a module."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from geoad.charts import Point
from geoad.errors import GeometryError
from geoad.kernels import products
from geoad.kernels.ladder import FIXES
from geoad.params import Blocks, axpy, flatten

if TYPE_CHECKING:
    from collections.abc import Callable

    from geoad.module import GeoModule

__all__ = ["Linearized", "linearized"]


def linearized(geo: GeoModule, p0: Point | None = None, *, centred: bool = False) -> Linearized:
    r"""The linearisation of a network at p₀ in its parameters, a module with parameters of its own.

    .. math:: g(x; \theta) = f(x; \theta_0) + \partial_\theta f(x; \theta_0)\,(\theta - \theta_0)

    Training it is training in the tangent space at p₀ (the "lazy" regime): its Jacobian, hence its tangent kernel and the
    generalised Gauss-Newton part of its Hessian, are those of the network at p₀ wherever θ is. g is affine in the *reference*
    coordinates; in another chart of the network the tangent would be another function.

    Args:
        geo: the network. It is copied, and stays as it is.
        p0: the point, in any chart. Default: the present one.
        centred: the parameters are δ = θ - θ₀, which start at zero, instead of θ; weight decay then pulls to p₀.

    >>> import torch, geoad
    >>> geo = geoad.GeoModule(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)))
    >>> x, tangent = torch.randn(5, 2), geoad.linearized(geo)
    >>> torch.equal(tangent(x), geo(x)), [name for name, w in tangent.named_parameters() if w.requires_grad][:2]
    (True, ['0.weight', '0.bias'])
    """
    return Linearized(geo, geo.point() if p0 is None else p0, centred)


class Linearized(nn.Module):
    """See `linearized`. Called like the network (with a batch of inputs, if that was given a ``forward=``).

    Parameters have the names of the network's; the network itself lies in `tangency`, frozen at θ₀ and in evaluation mode, and
    is part of the ``state_dict``. Differentiable in parameters and inputs; works under ``torch.func`` and in a
    `GeoModule`, as any module does.
    """

    tangency: GeoModule

    def __init__(self, geo: GeoModule, p0: Point, centred: bool) -> None:
        super().__init__()
        start = p0.to(geo.reference)
        if start.batch_shape:
            raise GeometryError(
                f"a network is linearised at one point, found a batch of them, {tuple(start.batch_shape)}. Make one module for "
                "each: [geoad.linearized(geo, q) for q in p]."
            )
        base = copy.deepcopy(geo)
        base.to(base.reference)
        for parameter in base.parameters():
            parameter.grad = None
        base.set_point(Point(base.reference, {name: block.detach().clone() for name, block in start.blocks.items()}))
        self.centred = centred
        self.tangency = base.eval().requires_grad_(False)
        recurrent = any(isinstance(module, nn.RNNBase) for module in base.modules())
        self._fixes = [fix for fix in FIXES if recurrent or fix.name != "unfused recurrent layers"]  # that one is slow
        self.names = tuple(start.blocks)
        for name, block in start.blocks.items():
            number = torch.zeros_like(block) if centred else block.detach().clone()
            _place(self, name, nn.Parameter(number))

    def train(self, mode: bool = True) -> Linearized:
        """As usual; the network at θ₀ stays in evaluation mode, for the tangent is one function."""
        super().train(mode)
        self.tangency.eval()
        return self

    def offsets(self) -> Blocks:
        """θ - θ₀, by the names of the network's parameters."""
        mine = {name: self._own(name) for name in self.names}
        return mine if self.centred else axpy(-1.0, self._start(), mine)

    def _own(self, name: str) -> Tensor:
        """A parameter, or what stands in its place (``functional_call``)."""
        path, _, last = name.rpartition(".")
        return getattr(self.get_submodule(path), last)

    def _start(self) -> Blocks:
        kept = self.tangency.stored_parameters()
        return {name: kept[name] for name in self.names}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """g(x; θ)."""
        base, given = self.tangency, kwargs or (args[0] if len(args) == 1 else args)

        def outputs(theta: Blocks) -> Any:
            if base._forward_fn is not None:  # pyright: ignore[reportPrivateUsage]
                return base.evaluate(theta, given)
            return base.apply_network(theta, _called, args, kwargs)

        # J v as the transpose of u ↦ Jᵀu: formulas of forward mode have no derivative at times, or a wrong one. Who will
        # differentiate the result is not known here, so operations that lack a second derivative are replaced beforehand
        with ExitStack() as settings:
            for fix in self._fixes:
                settings.enter_context(fix.context())
            value, pull = products.vjp(outputs, self._start())
            change = products.vjp(pull, _each(torch.zeros_like, value))[1](self.offsets())
        return _sum(value, change)


def _called(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return net(*args, **kwargs)


def _each(fn: Callable[[Tensor], Tensor], tree: Any) -> Any:
    leaves, build = flatten(tree)
    return build([fn(leaf) for leaf in leaves])


def _sum(value: Any, change: Any) -> Any:
    leaves, build = flatten(value)
    return build([a + b for a, b in zip(leaves, flatten(change)[0], strict=True)])


def _place(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Register a parameter under its dotted name."""
    *path, last = name.split(".")
    for part in path:
        inner = dict(module.named_children()).get(part)
        if inner is None:
            _require_free(module, part, name)
            inner = nn.Module()
            module.add_module(part, inner)
        elif type(inner) is not nn.Module:
            _require_free(module, part, name)
        module = inner
    _require_free(module, last, name)
    module.register_parameter(last, parameter)


def _require_free(module: nn.Module, part: str, name: str) -> None:
    if hasattr(module, part):
        raise GeometryError(
            f"the linearised network keeps the names of the parameters, but the '{part}' of '{name}' is an attribute of the "
            "module itself. Rename that part of the network."
        )
