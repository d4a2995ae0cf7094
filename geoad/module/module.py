"""GeoModule: a network as a manifold with charts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from geoad.charts import Chart, Point, Reparametrization
from geoad.data import without_targets
from geoad.errors import GeometryError
from geoad.fields import ScalarField, Transition
from geoad.module.node import Ledger, to_reference
from geoad.module.slots import Selection, Slots, select
from geoad.module.sources import LossSource, NetworkSource
from geoad.params import Blocks, detach, equal, is_wrapped, map_blocks
from geoad.tensors import Covector

__all__ = ["GeoModule"]


class _Caller(nn.Module):
    """Calls any function of the network, so that ``functional_call`` can put parameters under it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return fn(self.net, *args, **kwargs)


class GeoModule(nn.Module):
    """Any ``nn.Module`` as a manifold: its parameters are a point, seen in a chart.

    ``geo(x)`` is ``net(x)`` in every chart. ``geo.to(psi)`` makes the module's own parameters the ψ coordinates: leaf
    ``nn.Parameter`` objects under the original names, with gradients with respect to ψ. In the reference chart the parameters are
    those of `net` itself.

    Args:
        net: the network. Shared weights, buffers and frozen parameters are fine.
        params: which parameters are coordinates: name patterns or a predicate (name, parameter). Default: those with
            ``requires_grad``. The others are constants.
        forward: how to evaluate the network on a batch of inputs, ``forward(net, inputs)``; default ``net(inputs)``, or
            ``net(**inputs)`` without the targets for mappings.

    >>> import torch, geoad
    >>> geo = geoad.GeoModule(torch.nn.Linear(3, 2))
    >>> psi = geo.reference.reparametrize(geoad.maps.Asinh(), name="psi").target
    >>> geo.to(psi).chart
    Chart('psi', dim=8, from 'theta')
    """

    def __init__(
        self, net: nn.Module, params: Selection = None, forward: Callable[[nn.Module, Any], Any] | None = None
    ) -> None:
        super().__init__()
        if isinstance(net, GeoModule):
            raise GeometryError("the network is a GeoModule already; wrap the plain network, or use this GeoModule as it is.")
        chosen = select(net, params)
        # the wrapper shares the registries of the network: names, buffers, .to(), functional_call and state_dict come for free
        for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[registry] = net.__dict__[registry]
        self.__dict__["net"] = net
        self.training = net.training
        self._caller = _hidden(_Caller(net))
        self._forward_fn = forward
        self._slots = Slots(net, chosen)
        self._theta: dict[str, nn.Parameter] = chosen
        self._psi: dict[str, nn.Parameter] | None = None
        self._written: tuple[Blocks, int] | None = None
        self._way: Transition | None = None
        self._guards: list[Any] = []
        self._last: Point | None = None
        self._ledger = Ledger()
        self._reference = Chart({name: p.shape for name, p in chosen.items()}, "theta", plain=False)
        self._chart = self._reference

    net: nn.Module

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or name == "training":
            self.__dict__[name] = value  # plain state: nothing of the wrapper is registered beside the network's own
        else:
            super().__setattr__(name, value)

    # -- charts and points -----------------------------------------------------------------------------------------------

    @property
    def reference(self) -> Chart:
        """The chart whose coordinates are the network's own parameters."""
        return self._reference

    @property
    def chart(self) -> Chart:
        """The chart that the module's parameters are in now."""
        return self._chart

    def point(self) -> Point:
        """The current parameters as a `Point` in `chart`: a copy, and the same Point until the values change."""
        current = self._coordinates()
        known = self._last
        if known is not None and known.chart is self._chart and known.stamp == self._chart.stamp():
            if equal(known.blocks, current):
                return known
        with torch.inference_mode(False), torch.no_grad():
            theta = Point(self._reference, map_blocks(torch.clone, self._stored()))
            point = theta
            if self._psi is not None:
                point = Point(self._chart, map_blocks(torch.clone, current), theta.token)
        self._last = point
        return point

    @property
    def grad(self) -> Covector:
        """The ``.grad`` of the parameters, typed: a `Covector` at `point`, in `chart`. Blocks without a gradient are zero."""
        live = self._live()
        if all(parameter.grad is None for parameter in live.values()):
            raise GeometryError(
                "the parameters have no gradient yet. Call loss.backward() on a loss of geo(x) first, or take the differential "
                "directly: geoad.grad(geo.loss(...))(geo.point())."
            )
        blocks = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for name, p in live.items()
        }
        return Covector(self._chart, detach(blocks), self.point())

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """``geo.to(chart)`` turns the module's parameters into the coordinates of `chart`; devices and dtypes as usual."""
        if args and isinstance(args[0], Reparametrization):
            args = (args[0].target, *args[1:])
        if args and isinstance(args[0], Chart):
            self._to_chart(args[0])
            args = args[1:]
            if not args and not kwargs:
                return self
        return super().to(*args, **kwargs)

    def _to_chart(self, chart: Chart) -> None:
        if chart is self._chart:
            return
        point = self.point().to(chart)  # raises before anything is changed
        theta = point.to(self._reference)
        has_grad = any(parameter.grad is not None for parameter in self._live().values())
        slope = self.grad.to(chart) if has_grad else None
        self._install(chart, point.blocks, theta.blocks)
        if slope is not None:
            for name, parameter in self._live().items():
                parameter.grad = slope.blocks[name].clone()

    def _install(self, chart: Chart, blocks: Blocks, theta: Blocks) -> None:
        """Make `blocks` the parameters; `theta` are the same point's reference coordinates."""
        with torch.no_grad():
            for name, parameter in self._theta.items():
                if parameter.data_ptr() != theta[name].data_ptr():
                    parameter.copy_(theta[name])
                parameter.grad = None
        self._release()
        self._chart, self._last = chart, None
        self._ledger.clear()
        if chart == self._reference:
            self._psi, self._written, self._way = None, None, None
            self._slots.write(self._theta)
            return
        with torch.no_grad():
            self._psi = {
                name: nn.Parameter(blocks[name].detach().clone(), requires_grad=p.requires_grad)
                for name, p in self._theta.items()
            }
        self._slots.write(self._psi)
        self._way = Transition(chart, self._reference)
        self._remember()
        self._guard()

    # -- the two sets of numbers -------------------------------------------------------------------------------------------

    def _live(self) -> dict[str, nn.Parameter]:
        """The leaves in the slots: θ in the reference chart, ψ elsewhere."""
        return self._theta if self._psi is None else self._psi

    def _coordinates(self) -> Blocks:
        return {name: parameter.detach() for name, parameter in self._live().items()}

    def _remember(self) -> None:
        """Note the present ψ as the one that belongs to the stored θ."""
        self._written = (map_blocks(torch.clone, self._coordinates()), self._chart.stamp())

    def _stored(self) -> Blocks:
        """The reference coordinates: bit for bit what was stored, recomputed only where ψ or the map was changed from outside."""
        if self._psi is not None:
            current = self._coordinates()
            assert self._written is not None and self._way is not None
            written, stamp = self._written
            if stamp != self._chart.stamp() or not equal(written, current):
                self._chart.check_domain(current, "the module's parameters")
                with torch.no_grad():
                    for name, block in self._way(current).items():
                        self._theta[name].copy_(block)
                self._ledger.clear()
                self._remember()
        return {name: parameter.detach() for name, parameter in self._theta.items()}

    def write_back(self, theta: Blocks | None = None) -> None:
        """After the stored θ were changed in place (by an optimizer): check the domain and write ψ = φ(θ)."""
        if self._psi is None:
            return
        blocks = theta or {name: parameter.detach() for name, parameter in self._theta.items()}
        point = Point(self._reference, blocks).to(self._chart)
        with torch.no_grad():
            for name, parameter in self._psi.items():
                parameter.copy_(point.blocks[name])
        self._remember()

    # -- for optimizers ---------------------------------------------------------------------------------------------------

    def stored_parameters(self) -> dict[str, nn.Parameter]:
        """The reference coordinates as parameters: what an optimizer runs on. In the reference chart they are the module's own."""
        return dict(self._theta)

    def load_cotangents(self) -> None:
        """Give the stored θ their ``.grad``: the captured cotangents, or Jᵀ(ψ.grad) where ``.grad`` was edited."""
        if self._psi is None:
            return
        present = {name: parameter.grad for name, parameter in self._psi.items()}
        given = {name: slope for name, slope in present.items() if slope is not None}
        captured = {name: self._ledger.recall(name, slope) for name, slope in given.items()}
        if all(slope is not None for slope in captured.values()):
            for name, parameter in self._theta.items():
                parameter.grad = captured.get(name)
            return
        moved = self.grad.to(self._reference)
        for name, parameter in self._theta.items():
            parameter.grad = moved.blocks[name] if parameter.requires_grad else None

    def drop_cotangents(self, *, forget: bool = False) -> None:
        """Clear the ``.grad`` of the stored θ (not in the reference chart, where they are the module's own)."""
        if self._psi is not None:
            for parameter in self._theta.values():
                parameter.grad = None
        if forget:
            self._ledger.clear()

    # -- evaluation ------------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``net(*args, **kwargs)``, whatever the chart."""
        if self._psi is None:
            return self.net(*args, **kwargs)
        return torch.func.functional_call(self.net, self._weights(), args, kwargs)

    def _weights(self) -> dict[str, Tensor]:
        """θ as a differentiable function of what sits in the slots."""
        assert self._psi is not None and self._way is not None
        found = cast(Blocks, self._slots.read())
        own = all(found[name] is parameter for name, parameter in self._psi.items())
        if not own or is_wrapped(found):  # functional_call(geo, coordinates, x): the slots hold somebody else's ψ
            return cast("dict[str, Tensor]", self._way(found))
        stored = self._stored()
        if not torch.is_grad_enabled():
            return stored
        if self._chart.learnable and any(p.requires_grad for chart in _ancestors(self._chart) for p in chart):
            return cast("dict[str, Tensor]", self._way(found))  # gradients for the map's parameters too
        return to_reference(self._psi, stored, self._way, self._ledger)

    def evaluate(self, theta: Blocks, inputs: Any) -> Any:
        """The outputs on a batch of inputs, as a plain function of the reference coordinates (for kernels)."""
        if self._forward_fn is not None:
            return self.apply_network(theta, self._forward_fn, inputs)
        if isinstance(inputs, dict):
            return torch.func.functional_call(self.net, cast("dict[str, Tensor]", theta), (), without_targets(inputs))
        arguments = inputs if isinstance(inputs, tuple) else (inputs,)
        return torch.func.functional_call(self.net, cast("dict[str, Tensor]", theta), arguments)

    def apply_network(self, theta: Blocks, fn: Callable[..., Any], *args: Any) -> Any:
        """fn(net, *args) with the reference coordinates `theta` in the network."""
        named = {f"net.{name}": block for name, block in theta.items()}
        return torch.func.functional_call(self._caller[0], named, (fn, *args))

    def loss(self, loss_fn: Callable[..., Tensor], data: Any, reduction: str = "mean") -> ScalarField:
        """The loss over a data set as a `ScalarField`.

        Args:
            loss_fn: ``loss_fn(outputs, targets)``, the mean over the batch as torch losses are by default (``loss_fn(outputs)`` if
                the data have no targets).
            data: (x, y), a mapping, a list of batches or a ``DataLoader``. Batches are weighted by their size, so that a ragged
                last batch counts as it should; one-shot iterators are refused.
            reduction: "mean" or "sum" over all samples.
        """
        return ScalarField(self._reference, LossSource(self, loss_fn, data, reduction))

    def scalar_field(self, fn: Callable[[Any], Tensor]) -> ScalarField:
        """A function of the network as a `ScalarField`: priors, penalties, anything.

        >>> import torch, geoad
        >>> geo = geoad.GeoModule(torch.nn.Linear(3, 2))
        >>> prior = geo.scalar_field(lambda net: sum((w ** 2).sum() for w in net.parameters()))
        """
        return ScalarField(self._reference, NetworkSource(self, fn))

    # -- module machinery --------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """As usual; the root of the network is switched too."""
        super().train(mode)
        self.net.training = mode
        return self

    def extra_repr(self) -> str:
        return f"chart={self._chart.name!r}, dim={self._chart.dim}"

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._last = None
        self._ledger.clear()
        if self._psi is not None:
            for parameter in self._theta.values():
                parameter.data = fn(parameter.data)
                parameter.grad = None
        for chart in self._reference.descendants():
            if chart.parent is not None:
                chart.parent.map._apply(fn)
        if self._psi is not None:
            self._remember()
        return self

    def _guard(self) -> None:
        """Refuse what would use ψ numbers as weights: direct calls of the network, and its bare state dict."""
        for module in {id(m): m for m in [self.net, *self._slots.owners()]}.values():
            self._guards.append(module.register_forward_pre_hook(self._refuse_call))
        self._guards.append(self.net.register_state_dict_pre_hook(self._refuse_state))
        self._guards.append(self.net.register_load_state_dict_pre_hook(self._refuse_state))

    def _release(self) -> None:
        for handle in self._guards:
            handle.remove()
        self._guards = []

    def _refuse_call(self, module: nn.Module, _: Any) -> None:
        if self._psi is None or not (module is self.net or self._slots.holds(module, self._psi)):
            return
        found = self._slots.read()
        if any(found[name] is parameter for name, parameter in self._psi.items()):
            raise GeometryError(
                f"the network was called directly while its parameters are the coordinates of chart '{self._chart.name}'. Those "
                "numbers are not weights. Call geo(x), which gives the same function in every chart, or go back first with "
                "geo.to(geo.reference)."
            )

    def _refuse_state(self, *_: Any) -> None:
        raise GeometryError(
            f"the state dict of the bare network was asked for or loaded while its parameters are the coordinates of chart "
            f"'{self._chart.name}'. Those numbers are not weights. Use geo.state_dict() and geo.load_state_dict(), or go back first "
            "with geo.to(geo.reference)."
        )

    # -- state dicts ---------------------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._psi is not None:
            theta = map_blocks(torch.clone, self._stored())
            destination[f"{prefix}_extra_state"] = {"chart": self._chart.uid, "name": self._chart.name, "theta": theta}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        extra = state_dict.pop(f"{prefix}_extra_state", None)
        if self._psi is not None or extra is not None:
            self._translate(state_dict, prefix, extra)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _translate(self, state: Any, prefix: str, extra: Any) -> None:
        """Rewrite the coordinates in a state dict into the present chart."""
        stored = self._stored()
        aliases = self._slots.aliases
        given = {name: state.get(prefix + name) for name in stored}
        source: Blocks = given if extra is None else extra["theta"]
        usable = {n: source.get(n) if source.get(n) is not None else stored[n] for n in stored}
        if any(usable[name].shape != block.shape for name, block in stored.items()):
            return  # let load_state_dict report the shapes
        theta = {name: usable[name].to(block) for name, block in stored.items()}
        point = Point(self._reference, theta)
        same = extra is not None and extra["chart"] == self._chart.uid and not self._chart.learnable
        if same and all(block is not None for block in given.values()):
            blocks = {name: given[name].to(block) for name, block in stored.items()}
        else:
            blocks = point.to(self._chart).blocks
        for name, block in blocks.items():
            for alias in aliases[name]:
                if prefix + alias in state:
                    state[prefix + alias] = block
        if self._psi is not None:
            with torch.no_grad():
                for name, parameter in self._theta.items():
                    parameter.copy_(theta[name])
            self._written = (map_blocks(torch.clone, blocks), self._chart.stamp())


def _ancestors(chart: Chart) -> list[list[nn.Parameter]]:
    found: list[list[nn.Parameter]] = []
    while chart.parent is not None:
        found.append(list(chart.parent.map.parameters()))
        chart = chart.parent.source
    return found


def _hidden(module: nn.Module) -> tuple[nn.Module]:
    """A module that must not be registered as a child."""
    return (module,)
