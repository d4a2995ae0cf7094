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
from geoad.tensors import describe

if TYPE_CHECKING:
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

    Raises:
        ChartMismatchError: p₀ is no point of this network.
        GeometryError: it is a batch of points; no `GeoModule` is given; a name of the network is taken by the module itself.
    """
    if not callable(getattr(geo, "set_point", None)):
        raise GeometryError(
            f"what is linearised is a network with its manifold, found {type(geo).__name__}. Wrap it: "
            "geoad.linearized(geoad.GeoModule(net))."
        )
    if not (p0 is None or isinstance(p0, Point)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise GeometryError(
            f"a network is linearised at a point, found {describe(p0)}. Pass geo.point(), or geo.reference.point(components)."
        )
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
        self._names = tuple(start.blocks)
        for name, block in start.blocks.items():
            number = torch.zeros_like(block) if centred else block.detach().clone()
            _place(self, name, nn.Parameter(number))

    def train(self, mode: bool = True) -> Linearized:
        """As usual; the network at θ₀ stays in evaluation mode, for the tangent is one function."""
        super().train(mode)
        self.tangency.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Linearized:
        """As usual; the network at θ₀ stays frozen, for it is the place of the tangent and no part of what is trained."""
        super().requires_grad_(requires_grad)
        self.tangency.requires_grad_(False)
        return self

    def offsets(self) -> Blocks:
        """θ - θ₀, by the names of the network's parameters."""
        mine = {name: self._own(name) for name in self._names}
        return mine if self.centred else axpy(-1.0, self._start(), mine)

    def _own(self, name: str) -> Tensor:
        """A parameter, or what stands in its place (``functional_call``)."""
        path, _, last = name.rpartition(".")
        return getattr(self.get_submodule(path), last)

    def _start(self) -> Blocks:
        kept = self.tangency.stored_parameters()
        return {name: kept[name] for name in self._names}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """g(x; θ)."""
        base, given = self.tangency, kwargs or (args[0] if len(args) == 1 else args)

        seen: list[Any] = []

        def outputs(theta: Blocks) -> list[Tensor]:
            if base._forward_fn is not None:  # pyright: ignore[reportPrivateUsage]
                seen.append(base.evaluate(theta, given))
            else:
                seen.append(base.apply_network(theta, _called, args, kwargs))
            return _tensors(seen[-1])

        # J v as the transpose of u ↦ Jᵀu: formulas of forward mode have no derivative at times, or a wrong one. Who will
        # differentiate the result is not known here, so operations that lack a second derivative are replaced beforehand
        with ExitStack() as settings:
            for fix in self._fixes:
                settings.enter_context(fix.context())
            value, pull = products.vjp(outputs, self._start())
            change = products.vjp(pull, [torch.zeros_like(leaf) for leaf in value])[1](self.offsets())
        return _filled(seen[-1], [a + b for a, b in zip(value, change, strict=True)])


def _called(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return net(*args, **kwargs)


def _tensors(tree: Any) -> list[Tensor]:
    """The tensors among the outputs of a network.

    Raises:
        GeometryError: one of them has no derivative.
    """
    found = [leaf for leaf in flatten(tree)[0] if isinstance(leaf, Tensor)]
    for each in found:
        if not (each.is_floating_point() or each.is_complex()):
            raise GeometryError(
                f"the network returns a tensor of type {each.dtype}, shape {tuple(each.shape)}, which has no tangent: of the "
                "linearised network it would be another one. Say which outputs are meant: "
                "GeoModule(net, forward=lambda net, x: net(x)[0])."
            )
    return found


def _filled(tree: Any, tensors: list[Tensor]) -> Any:
    """The outputs with other tensors; None and the like stay as they are."""
    (leaves, build), others = flatten(tree), iter(tensors)
    return build([next(others) if isinstance(leaf, Tensor) else leaf for leaf in leaves])


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
