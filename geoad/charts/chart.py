"""Coordinate systems. A chart is to coordinates what a device is to memory."""

from __future__ import annotations

import copy
import itertools
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from geoad.errors import ChartDomainError, GeometryError
from geoad.maps.domain import Domain, DomainLike
from geoad.maps.select import Recipe, bind
from geoad.params import Blocks, Layout, is_wrapped

if TYPE_CHECKING:
    from geoad.charts.atlas import Atlas
    from geoad.charts.point import Point
    from geoad.charts.reparametrization import Reparametrization
    from geoad.fields import MetricField, ScalarField
    from geoad.tensors import Cometric, Covector, Endomorphism, Form, Metric, Vector

__all__ = ["Chart", "Components", "makers"]

Components = Tensor | Blocks
"""What a user sees: a plain tensor for a free chart with one block, otherwise a dict name -> tensor."""

makers: dict[str, Callable[..., Any]] = {}
"""Constructors that the floors above register here, so that ``chart.vector(...)`` needs no import upwards."""

_counter = itertools.count()


class Chart:
    """A coordinate system of a manifold: named blocks of numbers.

    ``Chart(shapes)`` makes the reference chart of a new manifold. Further charts of the same manifold come from
    `reparametrize`; they form a tree whose root is the reference chart, whose Euclidean metric and flat connection are
    the default metric, connection and damping reference.

    A chart has an identity that survives pickling and deepcopy: two charts are equal if they have the same ``uid`` and,
    where a learnable map lies between them and the reference, the same parameter values.

    Args:
        shapes: name -> shape of each block; a bare shape means one block named "x".
        name: shown in representations and messages.
        plain: whether components are a bare tensor. Default: yes if there is just one block.
        domain: where the coordinates live: ``{condition in words: predicate}`` or one predicate, see
            `geoad.maps.domain.Domain`. Default: everywhere. Points outside raise `ChartDomainError`.

    >>> import geoad
    >>> geoad.Chart({"x": (2,)}, name="xy")
    Chart('xy', dim=2)
    >>> normal = geoad.Chart({"mu": (), "sigma": ()}, name="normal", domain={"sigma > 0": lambda x: x["sigma"] > 0})
    """

    about: str = ""  # of a reference chart: what the manifold is, for messages

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]] | Sequence[int],
        name: str = "",
        *,
        plain: bool | None = None,
        domain: DomainLike | Domain | None = None,
        parent: Reparametrization | None = None,
        uid: str | None = None,
    ) -> None:
        self.layout = Layout(shapes if isinstance(shapes, Mapping) else {"x": tuple(shapes)})
        self.name = name or f"chart{next(_counter)}"
        self.plain = len(self.layout) == 1 if plain is None else plain
        self.always_dict = plain is False
        if self.plain and len(self.layout) != 1:
            raise GeometryError(
                f"chart '{self.name}' has {len(self.layout)} blocks, so its components cannot be one plain tensor. "
                "Leave plain= out; components are then a dict name -> tensor."
            )
        self.domain = Domain.of(domain)
        self.parent = parent
        self.uid = uid or uuid.uuid4().hex
        self.joined: Atlas | None = None  # set by the atlas, on its own charts only
        self.children: weakref.WeakSet[Chart] = weakref.WeakSet()
        self._snapshot: tuple[int, list[Tensor]] | None = None
        self._learnable: bool | None = None
        if parent is not None:
            parent.source.children.add(self)

    # -- identity ----------------------------------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Chart) or self.uid != other.uid:
            return False
        if not self.learnable:
            return True
        mine, theirs = self._numbers(), other._numbers()
        return len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))

    def __hash__(self) -> int:
        return hash(self.uid)

    def __deepcopy__(self, memo: dict[int, Any]) -> Chart:
        """The chart itself; a copy only where a learnable map could be trained apart from the original."""
        if not self.learnable:
            return self
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.children = weakref.WeakSet()
        twin.parent = copy.deepcopy(self.parent, memo)
        if twin.parent is not None:
            twin.parent.source.children.add(twin)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        del state["children"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.children = weakref.WeakSet()

    def __repr__(self) -> str:
        of = "" if self.parent is None else f", from '{self.parent.source.name}'"
        return f"Chart('{self.name}', dim={self.dim}{of})"

    # -- the tree ----------------------------------------------------------------------------------------------------

    @property
    def dim(self) -> int:
        """The number of coordinates."""
        return self.layout.dim

    @property
    def reference(self) -> Chart:
        """The root of the tree: the chart whose Euclidean metric and flat connection are the defaults."""
        chart = self
        while chart.parent is not None:
            chart = chart.parent.source
        return chart

    @property
    def atlas(self) -> Atlas | None:
        """The `Atlas` that the root of the tree belongs to, which is then one of several charts and stands out in nothing."""
        return self.reference.joined

    @property
    def space(self) -> Chart:
        """The nearest chart above, or this one, that is the root or was made by a map that cannot be undone.

        Charts of one space are related by changes of coordinates; a `Submersion` or `Immersion` begins a space of its own.
        """
        chart = self
        while chart.parent is not None and chart.parent.map.law == "diffeomorphism":
            chart = chart.parent.source
        return chart

    @property
    def ground(self) -> Chart:
        """The chart whose straight lines points of this chart move along.

        It is the reference chart, except below an immersion or a smooth map of any rank: these lines leave the image, so
        there the chart of the map itself takes its place.
        """
        chart = self
        while chart.parent is not None and chart.parent.map.law in ("diffeomorphism", "submersion"):
            chart = chart.parent.source
        return chart

    @property
    def bounded(self) -> bool:
        """True if not all numbers need be coordinates of a point, so that `check_domain` has something to check."""
        return self.parent is not None or self.domain is not None

    @property
    def learnable(self) -> bool:
        """True if a map between the reference chart and this one has parameters."""
        if self.parent is None:
            return False
        if self._learnable is None:  # bound maps keep what they have
            self._learnable = self.parent.map.learnable or self.parent.source.learnable
        return self._learnable

    def descendants(self) -> list[Chart]:
        """This chart and all living charts that were made from it."""
        found: list[Chart] = [self]
        for chart in found:
            found.extend(chart.children)
        return found

    def _numbers(self) -> list[Tensor]:
        numbers: list[Tensor] = []
        chart = self
        while chart.parent is not None:
            numbers.extend(parameter.detach() for parameter in chart.parent.map.parameters())
            chart = chart.parent.source
        return numbers

    def stamp(self) -> int:
        """A number that changes whenever a parameter of a learnable map on the way to the reference changes.

        Values are compared (``Tensor._version`` misses edits through ``.data``); 0 where nothing is learnable.
        """
        if not self.learnable:
            return 0
        now = self._numbers()
        if self._snapshot is None:
            self._snapshot = (1, [each.clone() for each in now])
        count, old = self._snapshot
        same = all(a.dtype == b.dtype and a.device == b.device and torch.equal(a, b) for a, b in zip(old, now, strict=True))
        if not same:
            self._snapshot = (count + 1, [each.clone() for each in now])
        return self._snapshot[0]

    def reparametrize(self, recipe: Recipe, name: str = "", *, domain: DomainLike | None = None) -> Reparametrization:
        """New coordinates ψ = recipe(θ) of the same manifold, where θ are the coordinates of this chart.

        Submersions, immersions and other smooth maps (`geoad.maps.SmoothMap`) give charts with more, fewer or redundant
        coordinates; what has no law under them is refused with `NotADiffeomorphismError`.

        Args:
            recipe: a map of `geoad.maps`, or ``{name pattern: map}`` (fnmatch, first match wins, unmatched blocks
                keep their coordinates, a pattern that matches nothing raises).
            name: the name of the new chart.
            domain: where the new coordinates live, if that is less than the image of the map; see `Chart`.

        Returns:
            The `Reparametrization`, an ``nn.Module``; the new chart is its ``target``.
        """
        bound = bind(recipe, self.layout, lambda point: point.to(self).blocks)
        phi: Reparametrization = makers["reparametrization"](self, bound, name or f"{self.name}'")
        phi.target.domain = Domain.of(domain)
        return phi

    # -- components ----------------------------------------------------------------------------------------------------

    def pack(self, components: Any, what: str = "components") -> Blocks:
        """User components as a dict of blocks in the order of the layout; shapes are checked."""
        if isinstance(components, Mapping):
            given = cast("Mapping[str, Any]", components)
            return self.layout.check({k: _as_tensor(v, what) for k, v in given.items()}, what)
        tensor = _as_tensor(components, what)
        if len(self.layout) == 1:
            return self.layout.check({self.layout.names[0]: tensor}, what)
        if tensor.ndim >= 1 and tensor.shape[-1] == self.dim:
            return self.layout.unravel(tensor)
        raise GeometryError(
            f"{what}: got a tensor of shape {tuple(tensor.shape)}, but chart '{self.name}' has the blocks "
            f"{list(self.layout.names)} with {self.dim} components in all. Pass a dict name -> tensor, or one raveled "
            f"tensor whose last axis has {self.dim} entries."
        )

    def unpack(self, blocks: Blocks) -> Components:
        """Blocks as the user sees them."""
        return blocks[self.layout.names[0]] if self.plain else dict(blocks)

    def check_domain(self, blocks: Blocks, what: str = "the point") -> None:
        """Raise `ChartDomainError` if `blocks` are not coordinates of a point in this chart."""
        if is_wrapped(blocks) or not self.bounded:
            return
        condition = None if self.domain is None else self.domain.violated(self.unpack(blocks))
        if condition is not None:
            raise ChartDomainError(
                f"{what} lies outside the domain of chart '{self.name}': {condition}. These numbers are coordinates of no "
                "point of the manifold, or of a point that another chart covers; choose coordinates inside of the domain, or "
                "make the point in a chart that contains it and move it with .to(chart)."
            )
        if self.parent is None:
            return
        condition = self.parent.map.outside_image(blocks)
        if condition is not None:
            raise ChartDomainError(
                f"{what} lies outside the domain of chart '{self.name}': {condition}. No point of the manifold has these "
                f"coordinates, so nothing can be evaluated there. Make the point in chart '{self.parent.source.name}' and "
                f"move it with .to(chart), or choose coordinates inside the domain."
            )
        self.parent.source.check_domain(self.parent.map.invert(blocks), what)

    # -- constructors (defined on the floors above) ----------------------------------------------------------------------

    def point(self, components: Any) -> Point:
        """The point with these coordinates; leading axes are batch axes. Raises `ChartDomainError` outside the domain."""
        return makers["point"](self, components)

    def vector(self, components: Any, *, at: Point) -> Vector:
        """The tangent vector at `at` with these components v^i."""
        return makers["vector"](self, components, at=at)

    def covector(self, components: Any, *, at: Point) -> Covector:
        """The covector (differential) at `at` with these components ω_i."""
        return makers["covector"](self, components, at=at)

    def form(self, components: Any, *, at: Point) -> Form:
        """The bilinear form at `at` with these components B_ij: a (d, d) tensor, nested dicts or an operator."""
        return makers["form"](self, components, at=at)

    def metric(self, components: Any, *, at: Point) -> Metric:
        """The metric at `at` with these components G_ij; must be symmetric and positive definite."""
        return makers["metric"](self, components, at=at)

    def cometric(self, components: Any, *, at: Point) -> Cometric:
        """The (2,0) tensor at `at` with these components C^ij (an inverse metric, a covariance)."""
        return makers["cometric"](self, components, at=at)

    def endomorphism(self, components: Any, *, at: Point) -> Endomorphism:
        """The linear map of the tangent space at `at` with these components E^i_j."""
        return makers["endomorphism"](self, components, at=at)

    def scalar_field(self, fn: Callable[[Any], Tensor]) -> ScalarField:
        """The function on the manifold whose value is ``fn(components in this chart)``."""
        return makers["scalar_field"](self, fn)

    def metric_field(self, fn: Callable[[Any], Any]) -> MetricField:
        """The metric field whose matrix in this chart is ``fn(components in this chart)``."""
        return makers["metric_field"](self, fn)


def _as_tensor(value: Any, what: str) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (int, float)) or (isinstance(value, (list, tuple)) and value):
        return torch.tensor(value, dtype=torch.get_default_dtype())
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise GeometryError(
            f"{what}: expected a tensor or a dict of tensors, found {type(value).__name__}. Components are plain numbers; "
            "pass T.components if you mean the numbers of a typed object."
        ) from error
