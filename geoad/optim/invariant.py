"""Any torch optimizer, with the same trajectory in every chart."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from geoad.errors import ChartDomainError, GeometryError
from geoad.fields import Transition
from geoad.module import GeoModule

__all__ = ["Invariant"]


class Invariant(Optimizer):
    """``Invariant(geo, torch.optim.AdamW, lr=1e-3)``: the optimizer runs on the reference coordinates, whatever chart `geo` is in.

    The update rule (momentum, second moments, weight decay, clipping by value, ...) acts on θ and on the cotangent of θ, both bit
    for bit the same in every chart, so the trajectory is the same, bit for bit; the module's parameters are then written in its
    chart. `geo` may change its chart between steps. Learning-rate schedulers, closures and ``state_dict`` work as usual.

    Args:
        geo: the module.
        optimizer: a ``torch.optim`` class (or any callable that makes an `Optimizer` from parameter groups).
        groups: parameter groups by name pattern, ``[{"params": "*.bias", "weight_decay": 0.0}, ...]``; unmatched parameters form
            a last group with the defaults. Default: one group.
        **options: of the optimizer: lr, momentum, ...

    If ``.grad`` was edited by hand (clipped, say) the edited covector is moved to θ by Jᵀ: right, but no longer bit for bit.
    """

    def __init__(
        self,
        geo: GeoModule,
        optimizer: Callable[..., Optimizer],
        *,
        groups: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(geo, GeoModule):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise GeometryError(
                f"Invariant steps a GeoModule, found {type(geo).__name__}. Bare parameters have no chart: wrap the network first, "
                "geo = geoad.GeoModule(net)."
            )
        self.geo = geo
        named = geo.stored_parameters()
        self.inner = optimizer(_grouped(named, groups), **options)
        super().__init__(self.inner.param_groups, dict(self.inner.defaults))
        self._share()

    def _share(self) -> None:
        """One set of groups and one state: those of the inner optimizer."""
        self.param_groups = self.inner.param_groups
        self.state = self.inner.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of the inner optimizer on θ; then ψ = φ(θ).

        Raises:
            ChartDomainError: the step leaves the domain of the module's chart; parameters and optimizer are as before the step.
        """
        geo = self.geo
        if geo.chart == geo.reference:
            return self.inner.step(closure)  # pyright: ignore
        backup = self._backup()
        try:
            geo.load_cotangents()
            if closure is None:
                result: Any = self.inner.step()
            else:
                evaluate = torch.enable_grad()(closure)

                def inner_closure() -> Any:
                    geo.write_back()
                    loss = evaluate()
                    geo.load_cotangents()
                    return loss

                result = self.inner.step(inner_closure)  # pyright: ignore
            geo.write_back()
        except ChartDomainError as error:
            self._restore(backup)
            raise ChartDomainError(
                f"the step leaves the domain of the chart that the module is in; nothing was changed. {error} Or make the step in a chart "
                "without boundary: geo.to(geo.reference)."
            ) from error
        finally:
            geo.drop_cotangents()
        return result

    def _backup(self) -> tuple[dict[str, Tensor], Any] | None:
        way = Transition(self.geo.reference, self.geo.chart)
        if all(bound.full_domain for bound, _ in way.steps):
            return None
        theta = {name: p.detach().clone() for name, p in self.geo.stored_parameters().items()}
        return theta, copy.deepcopy(self.inner.state_dict())

    def _restore(self, backup: tuple[dict[str, Tensor], Any] | None) -> None:
        if backup is None:
            return
        theta, state = backup
        for name, parameter in self.geo.stored_parameters().items():
            parameter.copy_(theta[name])
        self.geo.write_back()
        self.load_state_dict(state)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the module's parameters in its chart (and of θ)."""
        for parameter in self.geo.parameters():
            if parameter.grad is not None:
                if set_to_none:
                    parameter.grad = None
                else:
                    parameter.grad = torch.zeros_like(parameter.grad)
        self.geo.drop_cotangents(forget=True)

    def state_dict(self) -> dict[str, Any]:
        """The state of the inner optimizer: it belongs to θ and fits any chart."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        """Load the state of the inner optimizer."""
        self.inner.load_state_dict(state_dict)
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Groups are given at construction; see ``groups``."""
        if not hasattr(self, "inner") or "param_groups" not in self.__dict__ or self.param_groups is not self.inner.param_groups:
            super().add_param_group(param_group)  # the base class's constructor
            return
        raise GeometryError(
            "Invariant covers all coordinates of its module from the start; parameters outside of it have no chart. Pass groups= at "
            "construction, and a second optimizer for other parameters."
        )

    def __repr__(self) -> str:
        return f"Invariant({self.inner!r})"


def _grouped(named: dict[str, nn.Parameter], groups: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    rest = dict(named)
    made: list[dict[str, Any]] = []
    for group in groups or ():
        patterns = group["params"]
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        chosen = [name for name in rest if any(fnmatchcase(name, pattern) for pattern in patterns)]
        if not chosen:
            raise GeometryError(
                f"groups: the patterns {patterns} match none of the remaining parameters {list(rest)}. Each parameter belongs to the first "
                "group that matches; mend the pattern."
            )
        options = {key: value for key, value in group.items() if key != "params"}
        made.append({"params": [(name, rest.pop(name)) for name in chosen], **options})
    if rest:
        made.append({"params": list(rest.items())})
    return made
