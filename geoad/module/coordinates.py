"""The two sets of numbers of a `GeoModule`: the stored reference coordinates θ, and the leaves ψ of the chart it is in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from geoad.charts import Chart, Point
from geoad.errors import GeometryError, NotADiffeomorphismError
from geoad.fields import Transition
from geoad.module.guards import Guards
from geoad.module.leaves import dense, difference, leaf_like, make_leaves, moved_gradients, own_memory, write
from geoad.module.node import Graph, Ledger, groups_of, to_reference
from geoad.module.slots import Slots
from geoad.params import Blocks, equal, first, is_wrapped, map_blocks
from geoad.tensors import Covector

__all__ = ["Coordinates"]


@contextlib.contextmanager
def _plain() -> Generator[None]:
    """Numbers made here are ordinary tensors without a graph, whatever the caller's mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class Coordinates:
    """θ and ψ of a network, and what connects them. For people who write optimizers; others use `GeoModule`.

    In the reference chart there is only θ, in the slots of the network. In another chart ψ sits in the slots, and the θ that
    belongs to it is stored beside; it is recomputed only where ψ or a learnable map was changed from outside, so it is bit for
    bit what an optimizer on θ wrote.

    Attributes:
        chart: the chart of the leaves.
        theta: the reference coordinates, as parameters.
        psi: the leaves in another chart, or None.
    """

    def __init__(self, net: nn.Module, chosen: dict[str, nn.Parameter]) -> None:
        self.slots = Slots(net, chosen)
        self.reference = Chart({name: p.shape for name, p in chosen.items()}, "theta", plain=False)
        self.chart = self.reference
        self.theta = chosen
        self.psi: dict[str, nn.Parameter] | None = None
        self.guards = Guards(net, self)
        self.suspended = False
        self._evaluating = 0
        self._forget()

    def _forget(self) -> None:
        self._written: tuple[Blocks, int] = ({}, 0)
        self._way: Transition | None = None
        self._ledger = Ledger()
        self._graph: tuple[Graph, Blocks] | None = None
        self._last: Point | None = None

    def __getstate__(self) -> dict[str, Any]:
        # gradients are not copied with a module, nor is what remembers them
        return {**self.__dict__, "_ledger": Ledger(self._ledger.groups), "_graph": None, "_evaluating": 0}

    # -- reading -------------------------------------------------------------------------------------------------------

    def live(self) -> dict[str, nn.Parameter]:
        """The leaves in the slots: θ in the reference chart, ψ elsewhere. Parameters that were replaced are taken over."""
        self.resume()
        known = self.theta if self.psi is None else self.psi
        found = self.slots.read_parameters()
        for name, parameter in found.items():
            if parameter is known[name]:
                continue
            if not isinstance(parameter, nn.Parameter) or is_wrapped({name: parameter}):  # pyright: ignore
                break  # inside functional_call: somebody else's numbers
            if parameter.shape != known[name].shape:
                raise GeometryError(
                    f"parameter '{name}' was replaced by one of shape {tuple(parameter.shape)}, the coordinates have "
                    f"{tuple(known[name].shape)}. The manifold has another dimension then; wrap the network anew."
                )
            known[name] = parameter
            self._graph = None
        return known

    def current(self) -> Blocks:
        """The components in the present chart (no copies)."""
        return {name: parameter.detach() for name, parameter in self.live().items()}

    def stored(self) -> Blocks:
        """θ bit for bit as stored (no copies); recomputed only where ψ or the map was changed from outside."""
        if self.psi is None:
            return self.current()
        current = self.current()
        written, stamp = self._written
        if stamp != self.chart.stamp() or not equal(written, current):
            assert self._way is not None
            self.chart.check_domain(current, "the module's parameters")
            with _plain():
                for name, block in self._way(current).items():
                    write(self.theta[name], block)
                self._ledger.clear()
                self._remember(map_blocks(torch.clone, current))
        return {name: parameter.detach() for name, parameter in self.theta.items()}

    def _remember(self, blocks: Blocks) -> None:
        """Note the present ψ, of which `blocks` is a copy, as the one that belongs to the stored θ."""
        self._written = (blocks, self.chart.stamp())
        self._graph, self._last = None, None

    def point(self) -> Point:
        """The point: a copy, and the same object until the values change."""
        current = self.current()
        known = self._last
        if (
            known is not None
            and known.chart is self.chart
            and known.stamp == self.chart.stamp()
            and equal(known.blocks, current)
        ):
            return known
        theta = self.stored()
        with _plain():
            point = Point(self.reference, map_blocks(torch.clone, theta))
            if self.psi is not None:
                point = Point(self.chart, map_blocks(torch.clone, current), point.token)
        self._last = point
        return point

    # -- evaluation ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def evaluating(self) -> Generator[None]:
        """Reference coordinates are in the slots meanwhile, put there by ``functional_call``."""
        self._evaluating += 1
        try:
            yield
        finally:
            self._evaluating -= 1

    @property
    def plain(self) -> bool:
        """True if what is in the slots are reference coordinates."""
        if self.suspended:
            self.resume()
        return self.psi is None or self._evaluating > 0

    def weights(self) -> dict[str, Tensor]:
        """θ as a differentiable function of what sits in the slots. ``torch.compile`` does not look inside."""
        return _untraced(self) if torch.compiler.is_compiling() else _read_weights(self)

    def _weights(self) -> dict[str, Tensor]:
        assert self.psi is not None and self._way is not None
        found = cast(Blocks, self.slots.read())
        if any(found[name] is not parameter for name, parameter in self.psi.items()):
            return self._way(found)  # functional_call(geo, coordinates, x): somebody else's ψ
        stored = self.stored()
        if not torch.is_grad_enabled():
            return dict(stored)
        if torch._C._functorch.peek_interpreter_stack() is not None:  # pyright: ignore
            return self._way(found)
        known = self._graph
        if known is None or known[0].flags != known[0].current_flags():
            numbers = self._way.numbers() if self.chart.learnable else []
            graph = Graph(self._way, self.psi, self._written[0], stored, numbers, self._written[1], self._ledger)
            if not any(graph.flags):
                return dict(stored)
            known = self._graph = (graph, to_reference(graph))
        return dict(known[1])

    # -- changing the chart ------------------------------------------------------------------------------------------------

    def enter(self, chart: Chart) -> None:
        """Make the coordinates of `chart` the parameters; their gradients move along. Raises before anything is changed."""
        if chart is self.chart:
            return
        with _plain():
            self._enter(chart)

    def _enter(self, chart: Chart) -> None:
        live = self.live()
        here = self.point()
        point = here.to(chart)
        theta = here.to(self.reference)
        self.slots.seats_of(chart.layout)  # raises before anything is changed
        try:
            cotangents = self.cotangents()
        except NotADiffeomorphismError:  # of an earlier point of redundant coordinates, or edited: no differential here
            cotangents = dict.fromkeys(self.theta)
        way = None if chart == self.reference else Transition(chart, self.reference)
        groups = [] if way is None else groups_of(way)
        flags = self._flags(live)
        slopes = moved_gradients(cotangents, theta, chart, groups, flags)
        self.guards.release()
        self.chart = chart
        self._forget()
        self._ledger = Ledger(groups)
        self.psi = None
        if way is not None:
            self.psi = make_leaves(point, self.theta, groups, flags)
        for name, parameter in self.theta.items():
            parameter.requires_grad_(flags[name])
            parameter.grad = cotangents[name] if self.psi is None else None
        self.slots.write(self.live_unchecked())
        if self.psi is not None:
            self._way = way
            self._remember(map_blocks(torch.clone, point.blocks))
            for name, slope in slopes.items():
                self.psi[name].grad = None if slope is None else slope.clone()
            for index, (names, images) in enumerate(groups):
                self._ledger.set(index, tuple(cotangents[n] for n in names), tuple(slopes[n] for n in images))
            self.guards.set()
        self._last = point

    def _flags(self, live: dict[str, nn.Parameter]) -> dict[str, bool]:
        """Which blocks of θ are trained: those for which some leaf of their group is."""
        if self.psi is None:
            return {name: parameter.requires_grad for name, parameter in live.items()}
        known = {name: parameter.requires_grad for name, parameter in self.theta.items()}
        for names, images in self._ledger.groups:
            if images:  # frozen blocks have no leaves
                known |= dict.fromkeys(names, any(live[image].requires_grad for image in images))
        return known

    def live_unchecked(self) -> dict[str, nn.Parameter]:
        """The leaves, without a look at the slots."""
        return self.theta if self.psi is None else self.psi

    def leaves_of(self, names: Iterable[str]) -> list[nn.Parameter]:
        """The leaves of the present chart that stand for these blocks of θ."""
        live, wanted = self.live(), set(names)
        if self.psi is None:
            return [live[name] for name in live if name in wanted]
        images = {image for theta, psi in self._ledger.groups if wanted & set(theta) for image in psi}
        return [live[name] for name in live if name in images]

    # -- for optimizers ---------------------------------------------------------------------------------------------------

    def cotangents(self) -> dict[str, Tensor | None]:
        """The gradient in θ: what flowed back through the node, bit for bit, plus Jᵀ of what was changed in ``.grad``."""
        return self._account()[0]

    def _account(self) -> tuple[dict[str, Tensor | None], bool]:
        """The gradient in θ, and whether some ``.grad`` was edited."""
        live = self.live()
        if self.psi is None:
            return {name: parameter.grad for name, parameter in live.items()}, False
        found: dict[str, Tensor | None] = {}
        edits: dict[str, Tensor] = {}
        for index, (names, images) in enumerate(self._ledger.groups):
            leaves = [self.psi[image] for image in images]
            if not any(leaf.requires_grad for leaf in leaves):
                found |= dict.fromkeys(names)
                continue
            present = tuple(leaf.grad for leaf in leaves)
            theta, psi, whole = self._ledger.accounted(index, present, [self.theta[name] for name in names])
            if not whole:
                known = any(each is not None for each in psi)
                if not known or not all(bool(each.isfinite().all()) for each in psi if each is not None):
                    theta, psi = (None,) * len(names), (None,) * len(images)  # all of it comes from elsewhere
                edits |= {n: difference(new, old, leaf) for n, new, old, leaf in zip(images, present, psi, leaves, strict=True)}
            found |= zip(names, theta, strict=True)
        if edits:
            self._add(found, edits)
        return {name: found[name] for name in self.theta}, bool(edits)

    def _add(self, found: dict[str, Tensor | None], edits: dict[str, Tensor]) -> None:
        assert self.psi is not None
        point = self.point()
        zero = {name: edits.get(name, torch.zeros_like(block)) for name, block in point.blocks.items()}
        try:
            moved = Covector(self.chart, zero, point).to(self.reference).blocks
        except NotADiffeomorphismError as error:
            raise NotADiffeomorphismError(
                f"the gradients in chart '{self.chart.name}' are those of no function of the network: they were edited there "
                "(a penalty on redundant coordinates, clipping by value), or belong to an earlier point. Call zero_grad() and "
                f"backward() again, and make edits in chart '{self.reference.name}'. {error}"
            ) from error
        joint = not Transition(self.reference, self.chart).blockwise
        for names, images in self._ledger.groups:
            if not any(self.psi[image].requires_grad for image in images):
                continue
            if joint or any(image in edits for image in images):
                for name in names:
                    known = found[name]
                    found[name] = moved[name] if known is None else dense(known) + moved[name]

    def load_cotangents(self) -> None:
        """Give the stored θ their ``.grad`` and ``requires_grad``; nothing to do in the reference chart."""
        if self.psi is None:
            return
        found, edited = self._account()
        for index, (names, images) in enumerate(self._ledger.groups):
            leaves = [self.psi[image] for image in images]
            trained = any(leaf.requires_grad for leaf in leaves)
            for name in names:
                self.theta[name].requires_grad_(trained)
                self.theta[name].grad = found[name]
            if edited and trained:
                held = tuple(None if leaf.grad is None else leaf.grad.detach().clone() for leaf in leaves)
                self._ledger.set(index, tuple(found[name] for name in names), held)

    def drop_cotangents(self) -> None:
        """Clear the ``.grad`` of the stored θ; nothing to do in the reference chart, where they are the module's own."""
        if self.psi is not None:
            for parameter in self.theta.values():
                parameter.grad = None

    def write_back(self) -> None:
        """After the stored θ were changed in place: check the domain and write ψ = φ(θ)."""
        if self.psi is None:
            return
        with _plain():
            theta = {name: parameter.detach() for name, parameter in self.theta.items()}
            before = Point(self.chart, {name: parameter.detach() for name, parameter in self.psi.items()})
            point = Point(self.reference, theta).followed_from(before)
            own = {name: own_memory(block, theta) for name, block in point.blocks.items()}
            for name, parameter in self.psi.items():
                parameter.copy_(own[name])
            self._remember(own)

    def set(self, blocks: Blocks, theta: Blocks) -> None:
        """Make `blocks` the components in the present chart; `theta` are the same point's reference coordinates."""
        leaves = self.live()
        with _plain():
            for name, parameter in self.theta.items():
                write(parameter, theta[name])
            if self.psi is not None:
                own = map_blocks(torch.clone, blocks)
                for name, parameter in leaves.items():
                    write(parameter, own[name])
                self._ledger.clear()
                self._remember(own)

    # -- changes from outside ----------------------------------------------------------------------------------------------

    def check_conversion(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Raise if the coordinates leave the domain of the chart when `fn` converts them to another precision."""
        if self.psi is None:
            return
        current = self.current()
        with _plain():
            probe = fn(first(current)[:0] if first(current).ndim else first(current))
            if probe.dtype != first(current).dtype and probe.device.type != "meta":
                self.chart.check_domain(map_blocks(fn, current), f"the module's parameters, converted to {probe.dtype},")

    def converted(self, fn: Callable[[Tensor], Tensor]) -> None:
        """The leaves were converted by `fn` (device, dtype): θ and the maps follow."""
        live = self.live()
        for chart in self.reference.descendants():
            if chart.parent is not None:
                chart.parent.map._apply(fn)  # pyright: ignore[reportPrivateUsage]
        self._last, self._graph = None, None
        self._ledger.clear()
        if self.psi is not None:
            for parameter in self.theta.values():
                parameter.data = fn(parameter.data)
                parameter.grad = None
            with _plain():
                self._remember(map_blocks(lambda p: p.detach().clone(), cast(Blocks, live)))

    def suspend(self) -> None:
        """Put θ into the slots for a while: state dicts are loaded in the reference chart."""
        if self.psi is not None and not self.suspended:
            self.stored()
            self.guards.release()
            self.slots.write(self.theta)
            self.suspended = True

    def resume(self, saved: Blocks | None = None) -> None:
        """Back to the present chart, with ψ = φ(θ), or ψ = `saved` where that is known to belong to θ."""
        if not self.suspended or self.psi is None:
            return
        with _plain():
            assert self.slots.seats is self.slots.places
            self.theta = self.slots.read_parameters()
            theta = {name: parameter.detach() for name, parameter in self.theta.items()}
            blocks = saved or Point(self.reference, theta).to(self.chart).blocks
            like = first(theta)
            own = {name: own_memory(block.to(theta.get(name, like)), theta) for name, block in blocks.items()}
            for name, parameter in self.psi.items():
                if parameter.dtype == own[name].dtype and parameter.device == own[name].device:
                    parameter.copy_(own[name])
                else:
                    self.psi[name] = leaf_like(parameter, own[name], parameter.requires_grad)
            self.suspended = False
            self.slots.write(self.psi)
            self._ledger.clear()
            self._remember(own)
            self.guards.set()


def _read_weights(coordinates: Coordinates) -> dict[str, Tensor]:
    return coordinates._weights()  # pyright: ignore[reportPrivateUsage]


_torch: Any = torch
_untraced: Any = _torch._disable_dynamo(_read_weights)  # torch.compiler.disable would import the compiler at once
