"""GeoModule: a network as a manifold with charts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from geoad.charts import Chart, Point, Reparametrization
from geoad.data import plain_inputs, require_match, without_targets
from geoad.errors import GeometryError
from geoad.fields import ScalarField
from geoad.kernels.ladder import visit
from geoad.kernels.norms import spelled_out
from geoad.module.coordinates import Coordinates
from geoad.module.misfit import MISFITS, refuse_inputs
from geoad.module.slots import Place, Selection, select
from geoad.module.sources import LossSource, NetworkSource
from geoad.module.state import KEY, Loading, note
from geoad.module.support import Deterministic, admit
from geoad.module.survey import Survey, Use
from geoad.params import Blocks, is_traced
from geoad.tensors import Covector

__all__ = ["GeoModule"]

_SHARED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_SHARED_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks")


class GeoModule(nn.Module):
    """Any ``nn.Module`` as a manifold: its parameters are a point, seen in a chart.

    ``geo(x)`` is ``net(x)`` in every chart. ``geo.to(psi)`` makes the module's own parameters the ψ coordinates: leaf
    ``nn.Parameter`` objects under the original names, with gradients with respect to ψ. In the reference chart the parameters
    are those of `net` itself. Everything else is that of an ``nn.Module``: ``functional_call``, ``state_dict``, ``deepcopy``,
    hooks, devices and dtypes, and a place inside another module.

    While the module is in another chart than the reference, calling `net` or a part of it directly, or taking its bare state
    dict, raises: ψ numbers are never used as weights. The parameters of learnable maps are not among ``geo.parameters()``; they
    receive gradients through ``geo(x)`` and follow the device and dtype of the module.

    A network in ``DistributedDataParallel`` is unwrapped, see `geoad.distributed`. Networks of which torch cannot take
    derivatives as functions of their parameters (sharded, scripted, quantized, with active dropout, ...) are refused with an
    `UnsupportedModuleError`, here or when they are evaluated as such functions; ``geo(x)`` stays torch's own.

    A child of the network whose name is an attribute of this class (chart, reference, point, grad, loss, scalar_field,
    evaluate, wrapped) works, but ``torch.func.functional_call(geo, ...)`` cannot reach parameters below it, and says so.

    Args:
        net: the network. Shared weights, buffers and frozen parameters are fine.
        params: which parameters are coordinates: name patterns or a predicate (name, parameter). Default: those with
            ``requires_grad``. The others are constants.
        forward: how losses and curvatures evaluate the network on a batch of inputs, ``forward(net, inputs)``; default
            ``net(inputs)``, ``net(*inputs)`` for tuples and lists, or ``net(**inputs)`` without the targets for mappings.

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
        if not isinstance(net, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise GeometryError(
                f"a GeoModule wraps an nn.Module, found {type(net).__name__}. Pass the network itself; for a plain function of "
                "a dict of tensors make a free chart: geoad.Chart({'x': shape})."
            )
        net = admit(net)
        chosen = select(net, params)
        own = self.__dict__
        # the wrapper shares the registries of the network: names, buffers and children are the network's own
        own.update({registry: net.__dict__[registry] for registry in (*_SHARED, *_SHARED_HOOKS)})
        own["training"] = net.training
        own["_version"] = net._version
        own["_wrapped"] = net
        own["_forward_fn"] = forward
        own["_coordinates"] = Coordinates(net, chosen)
        own["_survey"] = Survey()
        own["_loading"] = None
        self.register_load_state_dict_post_hook(_finish_loading)

    _wrapped: nn.Module
    _forward_fn: Callable[[nn.Module, Any], Any] | None
    _coordinates: Coordinates
    _survey: Survey
    _loading: Loading | None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__:
            self.__dict__[name] = value  # plain state: nothing of the wrapper is registered beside the network's own
        else:
            super().__setattr__(name, value)

    # -- charts and points -----------------------------------------------------------------------------------------------

    @property
    def wrapped(self) -> nn.Module:
        """The network that was given."""
        return self._wrapped

    @property
    def coordinates(self) -> Coordinates:
        """The stored reference coordinates and the leaves of the present chart: for people who write optimizers."""
        return self._coordinates

    @property
    def reference(self) -> Chart:
        """The chart whose coordinates are the network's own parameters."""
        return self._coordinates.reference

    @property
    def chart(self) -> Chart:
        """The chart that the module's parameters are in now."""
        return self._coordinates.chart

    def point(self) -> Point:
        """The current parameters as a `Point` in `chart`: a copy, and the same Point until the values change.

        Raises:
            ChartDomainError: the parameters were set to numbers that are no coordinates in the present chart.
        """
        return self._coordinates.point()

    def set_point(self, p: Point) -> Self:
        """Make `p`, a point in any chart, the current parameters; the module stays in its chart.

        >>> import torch, geoad
        >>> geo = geoad.GeoModule(torch.nn.Linear(3, 2))
        >>> L = geo.loss(torch.nn.functional.mse_loss, (torch.ones(4, 3), torch.zeros(4, 2)))
        >>> q = geo.point().retract(-0.1 * geoad.riemannian_grad(L)(geo.point()))
        >>> geo.set_point(q).point().log(q).ravel().abs().max()
        tensor(0.)

        Raises:
            ChartMismatchError: the point belongs to another manifold.
            ChartDomainError: the point has no coordinates in the present chart; nothing was changed.
        """
        here = p.to(self.chart)  # raises before anything is changed
        self._coordinates.set(here.blocks, p.to(self.reference).blocks)
        return self

    @property
    def grad(self) -> Covector:
        """The ``.grad`` of the parameters, typed: a `Covector` at `point`, in `chart`. Blocks without a gradient are zero."""
        live = self._coordinates.live()
        if all(parameter.grad is None for parameter in live.values()):
            raise GeometryError(
                "the parameters have no gradient yet. Call loss.backward() on a loss of geo(x) first, or take the differential "
                "directly: geoad.grad(geo.loss(...))(geo.point())."
            )
        blocks = {name: _gradient(parameter) for name, parameter in live.items()}
        return Covector(self.chart, blocks, self.point())

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """``geo.to(chart)`` turns the module's parameters into the coordinates of `chart`; devices and dtypes as usual.

        Gradients move along, where they have a law (of redundant coordinates only those that belong to the present point).
        Charts with other blocks (`geoad.maps.SmoothMap`) give the module parameters of other names, such as
        ``0.weight_g``. A `Reparametrization` stands for its target.

        Raises:
            ChartDomainError: the present point has no coordinates in `chart`; nothing was changed.
            ChartMismatchError: the chart belongs to another manifold.
        """
        if args and isinstance(args[0], Reparametrization):
            args = (args[0].target, *args[1:])
        if args and isinstance(args[0], Chart):
            self._coordinates.enter(args[0])
            args = args[1:]
            if not args and not kwargs:
                return self
        return super().to(*args, **kwargs)

    def stored_parameters(self) -> dict[str, nn.Parameter]:
        """The reference coordinates as parameters; in the reference chart they are the module's own."""
        self._coordinates.stored()
        return dict(self._coordinates.theta)

    # -- evaluation ------------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``net(*args, **kwargs)``, whatever the chart."""
        if self._coordinates.plain:
            return self._wrapped(*args, **kwargs)
        return self._coordinates.slots.call(self._coordinates.weights(), self._wrapped, *args, **kwargs)

    def evaluate(self, theta: Blocks, inputs: Any) -> Any:
        """The outputs on a batch of inputs, as a plain function of the reference coordinates (for kernels).

        In training mode buffers (running statistics) are not changed.

        Raises:
            GeometryError: the inputs are on another device, of another dtype or of other shapes than the layers of torch take.
        """
        try:
            return self._evaluate(theta, inputs)
        except MISFITS as error:
            require_match(inputs, theta, "the inputs", error)
            refuse_inputs(self._evaluate, theta, inputs, error)
            raise

    def _evaluate(self, theta: Blocks, inputs: Any) -> Any:
        if self._forward_fn is not None:
            return self.apply_network(theta, self._forward_fn, plain_inputs(inputs))
        if isinstance(inputs, Mapping):
            given = cast("Mapping[str, Any]", inputs)
            return self.apply_network(theta, _call_named, without_targets(given))
        arguments = cast("tuple[Any, ...]", tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,))
        return self.apply_network(theta, _call, *arguments)

    def apply_network(self, theta: Blocks, fn: Callable[..., Any], *args: Any) -> Any:
        """fn(net, *args) with the reference coordinates `theta` in the network.

        Raises:
            UnsupportedModuleError: the network is not a function of its parameters that autodiff sees through (random, with
                parameters that are read past their places, ...).
        """
        visit(self)
        net, coordinates = self._wrapped, self._coordinates
        training = [module for module in net.modules() if module.training]
        exact = [place for module in net.modules() for place in _exact_slopes(module)]
        looks = not is_traced()  # the compiler cannot follow

        def run(values: Blocks, given: Sequence[Any]) -> Any:
            buffers = [place for module in training for place in _copied_buffers(module)]
            with coordinates.evaluating(), Deterministic() if looks else nullcontext():
                return coordinates.slots.call(values, fn, net, *given, buffers=[*buffers, *exact])

        if looks:
            self._survey(Use(self, net, fn, coordinates.theta, bool(training)), run, theta, args)
            visit(self)  # a first survey may have found that forward mode leaves something out
        with spelled_out():  # the norms of torch have wrong second derivatives
            return run(theta, args)

    def loss(self, loss_fn: Callable[..., Tensor], data: Any, reduction: str = "mean") -> ScalarField:
        """The loss over a data set as a `ScalarField`.

        Args:
            loss_fn: ``loss_fn(outputs, targets)``, the mean over the batch as torch losses are by default (``loss_fn(outputs)``
                if the data have no targets). For losses that count samples unequally (class weights, ``ignore_index``) the mean
                of the batches is not the mean over all samples; give them ``reduction="sum"``.
            data: (x, y), a mapping, a list of batches or a ``DataLoader``. Batches are weighted by their size, so that a ragged
                last batch counts as it should; one-shot iterators are refused.
            reduction: "mean" or "sum" over all samples.

        >>> import torch, geoad
        >>> geo = geoad.GeoModule(torch.nn.Linear(3, 2))
        >>> L = geo.loss(torch.nn.functional.mse_loss, (torch.ones(4, 3), torch.zeros(4, 2)))
        >>> L(geo.point()).shape
        torch.Size([])
        """
        return ScalarField(self.reference, LossSource(self, loss_fn, data, reduction))

    def scalar_field(self, fn: Callable[[Any], Tensor]) -> ScalarField:
        """A function of the network as a `ScalarField` (a prior, a penalty): ``fn(net)`` sees the reference coordinates.

        >>> import torch, geoad
        >>> geo = geoad.GeoModule(torch.nn.Linear(3, 2))
        >>> prior = geo.scalar_field(lambda net: sum((w ** 2).sum() for w in net.parameters()))
        """
        return ScalarField(self.reference, NetworkSource(self, fn))

    # -- module machinery --------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """As usual."""
        self._wrapped.train(mode)
        self.training = mode
        return self

    def extra_repr(self) -> str:
        return f"chart={self.chart.name!r}, dim={self.chart.dim}"

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self._coordinates.check_conversion(fn)
        self._wrapped._apply(fn, recurse)
        self._coordinates.converted(fn)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        told = note(self._coordinates)
        self._wrapped._save_to_state_dict(destination, prefix, keep_vars)
        if told is not None:
            destination[prefix + KEY] = told

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        self._loading = Loading(self._coordinates)
        self._loading.begin(state_dict, prefix)
        self._wrapped._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _finish_loading(self, incompatible_keys: Any) -> None:
        if self._loading is not None:
            loading, self._loading = self._loading, None
            loading.finish()
        for hook in self._wrapped._load_state_dict_post_hooks.values():
            hook(self._wrapped, incompatible_keys)


def _finish_loading(geo: Any, incompatible_keys: Any) -> None:
    geo._finish_loading(incompatible_keys)


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        return torch.zeros_like(parameter.detach())
    slope = parameter.grad.detach()
    return slope.to_dense() if slope.is_sparse else slope.clone()


def _copied_buffers(module: nn.Module) -> list[Place]:
    held = vars(module)["_buffers"]
    return [(held, name, value.clone()) for name, value in held.items() if value is not None]


def _exact_slopes(module: nn.Module) -> list[Place]:
    """What makes an embedding's backward give the derivative: no scaling by frequency, no sparse tensors."""
    if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return []
    held = vars(module)
    return [(held, name, False) for name in ("sparse", "scale_grad_by_freq") if held.get(name)]


def _call(net: Callable[..., Any], *args: Any) -> Any:
    return net(*args)


def _call_named(net: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    return net(**inputs)
