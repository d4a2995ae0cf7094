"""Any torch optimizer, with the same trajectory in every chart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from geoad.errors import ChartDomainError, GeometryError, NotADiffeomorphismError
from geoad.fields import Transition
from geoad.module import GeoModule
from geoad.module.slots import matching

__all__ = ["Invariant"]


class Invariant(Optimizer):
    """Any torch optimizer, run on the reference coordinates whatever chart `geo` is in.

    The update rule (momentum, second moments, weight decay, clipping by value, ...) acts on θ and on the cotangent of θ, both
    bit for bit the same in every chart, so the trajectory is the same, bit for bit; the module's parameters are then written in
    its chart. `geo` may change its chart between steps. Learning-rate schedulers, closures, step hooks and ``state_dict`` work
    as usual; the state belongs to θ and fits any chart.

    Args:
        geo: the module.
        optimizer: a ``torch.optim`` class (or any callable that makes an `Optimizer` from parameter groups).
        params: name patterns of the parameters to step, for rules that do not suit all (``Muon`` takes matrices only); give the
            others to a second `Invariant`. Default: all coordinates.
        groups: parameter groups by name pattern, ``[{"params": "*.bias", "weight_decay": 0.0}, ...]``; unmatched parameters
            form a last group with the defaults. Default: one group.
        **options: of the optimizer: lr, momentum, ...

    If ``.grad`` was edited by hand (clipped, say) the change is moved to θ by Jᵀ: right, but no longer bit for bit. Where a
    joint map mixes frozen parameters with others, the gradients of the frozen ones cannot be edited and stay as they are.

    >>> import torch, geoad
    >>> geo = geoad.GeoModule(torch.nn.Linear(3, 2))
    >>> optimizer = geoad.optim.Invariant(geo, torch.optim.AdamW, lr=1e-3)
    >>> geo = geo.to(geo.reference.reparametrize(geoad.maps.Asinh(), name="psi").target)
    >>> geo(torch.ones(4, 3)).square().sum().backward()
    >>> optimizer.step()
    """

    def __init__(
        self,
        geo: GeoModule,
        optimizer: Callable[..., Optimizer],
        *,
        params: str | Iterable[str] | None = None,
        groups: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> None:
        _check_arguments(geo, optimizer)
        self.geo = geo
        named = geo.stored_parameters()
        aliases = geo.coordinates.slots.aliases
        if params is not None:
            aliases = {name: aliases[name] for name in matching(params, aliases, "params")}
        self.inner = optimizer(_grouped({name: named[name] for name in aliases}, aliases, groups), **options)
        self._names = tuple(aliases)
        super().__init__(self.inner.param_groups, dict(self.inner.defaults))
        self._share()

    def _share(self) -> None:
        """One set of groups and one state: those of the inner optimizer."""
        self.param_groups = self.inner.param_groups
        self.state = self.inner.state

    def __getstate__(self) -> dict[str, Any]:
        return {"geo": self.geo, "inner": self.inner, "names": self._names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "inner" in state:
            self.geo, self.inner, self._names = state["geo"], state["inner"], state["names"]
            self.defaults = dict(self.inner.defaults)
            self._share()
        super().__setstate__({})

    # -- the step --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the inner optimizer on θ; then ψ = φ(θ).

        Raises:
            ChartDomainError: the step leaves the domain of the module's chart; parameters and optimizer are as before the step.
        """
        coordinates = self.geo.coordinates
        self._check_parameters()
        self._check_chart()
        if coordinates.psi is None:
            return self._inner_step(None if closure is None else torch.enable_grad()(closure))
        backup = self._backup(always=closure is not None)
        try:
            coordinates.load_cotangents()
            result = self._inner_step(None if closure is None else self._on_reference(closure))
            coordinates.write_back()
        except BaseException as error:
            self._restore(backup)
            if not isinstance(error, ChartDomainError):
                raise
            raise ChartDomainError(
                f"the step leaves the domain of the chart that the module is in; nothing was changed. {error} Or make the step "
                "in a chart without boundary: geo.to(geo.reference)."
            ) from error
        finally:
            coordinates.drop_cotangents()
        return result

    def _on_reference(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure as the inner optimizer needs it: evaluates at the present θ and leaves θ's cotangent in ``.grad``."""
        evaluate = torch.enable_grad()(closure)

        def inner_closure() -> Any:
            self.geo.coordinates.write_back()
            loss = evaluate()
            self.geo.coordinates.load_cotangents()
            return loss

        return inner_closure

    def _inner_step(self, closure: Callable[[], Any] | None) -> Any:
        """The step without the hooks that torch puts around it: those of this optimizer run already."""
        method = type(self.inner).step
        bare = cast(
            "Callable[..., Any]", getattr(method, "__wrapped__", method) if getattr(method, "hooked", False) else method
        )
        return bare(self.inner) if closure is None else bare(self.inner, closure)

    def _check_parameters(self) -> None:
        stored = self.geo.stored_parameters()
        mine = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        gone = [name for name in self._names if id(stored[name]) not in mine]
        if gone:
            raise GeometryError(
                f"the parameters {gone} of the module were replaced by other tensors since this optimizer was made (assigned, "
                "or loaded with assign=True), so a step would not reach them. Make the optimizer anew."
            )

    def _check_chart(self) -> None:
        chart = self.geo.chart
        if chart.ground != self.geo.reference:
            raise NotADiffeomorphismError(
                f"Invariant was asked to step in chart '{chart.name}', which covers only a part of "
                f"'{self.geo.reference.name}': a step of the reference coordinates leaves it. Step its own coordinates with a "
                "plain optimizer, torch.optim.SGD(geo.parameters(), ...), or go back first with geo.to(geo.reference)."
            )

    # -- leaving the domain ----------------------------------------------------------------------------------------------

    def _backup(self, *, always: bool) -> _Backup | None:
        """θ, groups and state as they are; None if no step can leave the domain of the chart."""
        way = Transition(self.geo.reference, self.geo.chart)
        if not always and all(bound.full_domain for bound, _ in way.steps):
            return None
        coordinates = self.geo.coordinates
        theta = {name: p.detach().clone() for name, p in coordinates.theta.items()}
        psi = {name: p.detach().clone() for name, p in coordinates.live().items()}
        groups = [{key: _copy(value) for key, value in group.items() if key != "params"} for group in self.param_groups]
        return theta, psi, groups, {parameter: _copy(state) for parameter, state in self.state.items()}

    def _restore(self, backup: _Backup | None) -> None:
        if backup is None:
            self.geo.coordinates.write_back()
            return
        theta, psi, groups, state = backup
        self.geo.coordinates.set(psi, theta)
        for group, before in zip(self.param_groups, groups, strict=True):
            group.update(before)
        self.state.clear()
        self.state.update(state)

    # -- as usual --------------------------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the parameters that are stepped, in the module's chart."""
        for parameter in self.geo.coordinates.leaves_of(self._names):
            if parameter.grad is not None:
                parameter.grad = None if set_to_none else torch.zeros_like(parameter.grad)

    def state_dict(self) -> dict[str, Any]:
        """The state of the inner optimizer: it belongs to θ and fits any chart."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        """Load the state of the inner optimizer, saved in any chart."""
        self.inner.load_state_dict(state_dict)
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Groups are given at construction; see ``groups``."""
        if "param_groups" not in self.__dict__ or self.param_groups is not self.inner.param_groups:
            super().add_param_group(param_group)  # the base class's constructor
            return
        raise GeometryError(
            "Invariant covers the coordinates of its module from the start; parameters outside of it have no chart. Pass "
            "groups= at construction, and a second optimizer for other parameters."
        )

    def __repr__(self) -> str:
        return f"Invariant({self.inner!r})"


_Backup = tuple[dict[str, Tensor], dict[str, Tensor], list[dict[str, Any]], dict[Any, Any]]
"""θ, ψ, the groups and the state of the inner optimizer."""


def _check_arguments(geo: Any, optimizer: Any) -> None:
    if not isinstance(geo, GeoModule):
        raise GeometryError(
            f"Invariant steps a GeoModule, found {type(geo).__name__}. Bare parameters have no chart: wrap the network first, "
            "geo = geoad.GeoModule(net)."
        )
    if isinstance(optimizer, Optimizer) or not callable(optimizer):
        raise GeometryError(
            f"Invariant takes an optimizer class, found {type(optimizer).__name__}. It makes the optimizer itself, on the "
            "reference coordinates; pass the class and its options: Invariant(geo, torch.optim.AdamW, lr=1e-3)."
        )
    if isinstance(optimizer, type) and issubclass(optimizer, torch.optim.SparseAdam):
        raise GeometryError(
            "Invariant was given SparseAdam, which steps sparse gradients only. Which entries of a gradient are zero depends "
            "on the chart. Use torch.optim.Adam, with torch.nn.Embedding(sparse=False)."
        )


def _grouped(
    named: dict[str, nn.Parameter], aliases: dict[str, list[str]], groups: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    rest = dict(aliases)
    made: list[dict[str, Any]] = []
    for group in groups or ():
        if "params" not in group:
            raise GeometryError(
                f"groups: the group {dict(group)} does not say which parameters it is for. Give name patterns, as in "
                "{'params': '*.bias', 'weight_decay': 0.0}."
            )
        chosen = matching(group["params"], rest, "groups: each parameter belongs to the first group that matches")
        options = {key: value for key, value in group.items() if key != "params"}
        made.append({"params": [(name, named[name]) for name in chosen], **options})
        rest = {name: names for name, names in rest.items() if name not in chosen}
    if rest:
        made.append({"params": [(name, named[name]) for name in rest]})
    return made


def _copy(value: Any) -> Any:
    """A copy of optimizer state that later steps do not change in place."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copy(each) for key, each in cast("dict[Any, Any]", value).items()}
    if isinstance(value, list):
        return [_copy(each) for each in cast("list[Any]", value)]
    return value
