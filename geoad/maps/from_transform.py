"""Changes of coordinates from bijections that exist already: ``torch.distributions``, normalizing flows."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.distributions import Transform, TransformedDistribution, constraints
from torch.distributions import transforms as td

from geoad.errors import GeometryError, NotADiffeomorphismError
from geoad.maps.base import Map
from geoad.maps.compose import Compose, Inverse
from geoad.maps.elementwise import Exp, Identity, Softplus, Tanh
from geoad.maps.free_transform import FREE, FreeTransform
from geoad.maps.transform_tree import Inverted, children
from geoad.maps.transformed import transformed

__all__ = ["from_transform"]

_SAME: dict[type[Transform], type[Map]] = {td.ExpTransform: Exp, td.TanhTransform: Tanh, td.SoftplusTransform: Softplus}

_NO_CHART: dict[type[Transform], str] = {
    td.AbsTransform: "it is two to one: x and -x have the same image. Use maps.Identity(), or maps.Log() for numbers that are "
    "positive",
    td.SoftmaxTransform: "it is not one to one: x and x + c have the same image, n numbers have n - 1 degrees of freedom. Use "
    "from_transform(StickBreakingTransform(), free=True), whose ψ are the first n probabilities of n + 1",
    td.StickBreakingTransform: "its values satisfy an equation (the probabilities sum to 1): n numbers become n + 1, and the "
    "Jacobian is (n + 1) × n, whatever its flag bijective says. Pass free=True: ψ are then the first n probabilities",
    td.CorrCholeskyTransform: "its values satisfy equations (rows of length 1): a vector of n(n-1)/2 numbers becomes an n × n "
    "matrix. Pass free=True: ψ are then the entries below the diagonal",
    td.LowerCholeskyTransform: "it forgets the entries above the diagonal: of n² numbers n(n+1)/2 count. Pass free=True and a "
    "block of n(n+1)/2 numbers, the triangle by rows",
    td.PositiveDefiniteTransform: "its values are symmetric, and it forgets the entries above the diagonal: of n² numbers "
    "n(n+1)/2 count. Pass free=True and a block of n(n+1)/2 numbers, the triangle by rows",
}


def from_transform(transform: Any, *, inverse: bool = False, free: bool = False, context: Tensor | None = None) -> Map:
    r"""The recipe ψ = T(θ) for a bijection T of ``torch.distributions``, of zuko, or in their manner.

    T acts on the last axes of each block it is bound to (on its entries, if its ``event_dim`` is 0). What T says of itself is
    not relied on: that it keeps the dimension, that its Jacobian has full rank, that its inverse leads back, and that its
    ``log_abs_det_jacobian`` is the volume, is checked when the recipe is bound, at points of T's domain. Points outside of
    T's domain or codomain are refused by charts as everywhere.

    Elementwise transforms (also composed, concatenated and stacked ones) keep diagonal structure. Numbers of T that ask for a
    gradient, and the parameters of T where it is a module, are parameters of the bound map (a copy), and follow device and
    dtype. Approximate inverses (the bisections of zuko's NAF, BPF and GF) are sharpened by Newton's method.

    Args:
        transform: a ``torch.distributions.Transform`` (``T.inv`` as well), a ``TransformedDistribution``; a flow of zuko or its
            ``flow.transform``; any other module or object with ``forward`` and ``inverse``, each returning the value or the
            pair (value, log \|det\|) for vectors on the last axis.
        inverse: take ψ = T⁻¹(θ) instead.
        free: for the transforms whose values satisfy equations (`StickBreaking`, `CorrCholesky`, `LowerCholesky` and
            `PositiveDefinite`): ψ are the coordinates that are free, see `geoad.maps.free_transform.FreeTransform`.
        context: what a conditional flow is called with.

    Raises:
        NotADiffeomorphismError: T is no change of coordinates, now or when it is bound.
        UnsupportedModuleError: T cannot be differentiated by ``torch.func`` (when it is bound).
        GeometryError: it is no transform, or does not act on such a block.

    ``SoftplusTransform`` becomes the exact `maps.Softplus` (torch's own is off by 2e-9 above 20, and not the inverse of its
    inverse there).

    >>> import torch, geoad
    >>> from torch.distributions import AffineTransform, ComposeTransform, SigmoidTransform
    >>> chart = geoad.Chart({"x": (2,)}, name="x")
    >>> interval = ComposeTransform([SigmoidTransform(), AffineTransform(-1.0, 2.0)])  # onto (-1, 1)
    >>> psi = chart.reparametrize(geoad.maps.from_transform(interval), name="psi").target
    >>> chart.point(torch.tensor([0.0, 1.0])).to(psi).components
    tensor([0.0000, 0.4621])
    """
    made = _unpacked(transform)
    if type(made).__name__ == "LazyInverse":  # of zuko: by itself it would hide a forward direction that is exact
        made, inverse = made.transform, not inverse
    if free:
        made = _freed(made)
    if not isinstance(made, Transform):
        recipe: Map = transformed(made if _is_lazy(made) else _Foreign(made), context, type(transform).__name__)
        return Inverse(recipe) if inverse else recipe
    if context is not None:
        raise GeometryError(
            f"context= was given with a {type(made).__name__}, which takes none. Only modules that make a transform for each "
            "context use it; leave it out."
        )
    return _inverted(made) if inverse else _recipe(made)


def _unpacked(given: Any) -> Any:
    """The transform of a distribution or a flow; others as they are."""
    if isinstance(given, TransformedDistribution):
        return td.ComposeTransform(list(given.transforms))
    if not isinstance(given, Transform) and hasattr(given, "base") and hasattr(given, "transform"):
        return given.transform  # a flow: a base distribution with a transform
    if isinstance(given, type):
        raise GeometryError(f"from_transform takes an instance, found the class {given.__name__}; pass {given.__name__}(...).")
    if isinstance(given, (Transform, nn.Module)) or (callable(getattr(given, "forward", None)) and hasattr(given, "inverse")):
        return given
    raise GeometryError(
        f"from_transform takes a transform of torch.distributions, a flow, or an object with forward and inverse, found "
        f"{type(given).__name__}. A change of coordinates must be known in both directions; for two plain functions use "
        "maps.Functions(forward, inverse)."
    )


def _freed(made: Any) -> Transform:
    if type(made) not in FREE:
        names = ", ".join(each.__name__ for each in FREE)
        raise GeometryError(
            f"free=True was asked of {type(made).__name__}: which of its coordinates are free is known for {names} only. Leave "
            "it out, or compose the map of a free transform with others (maps.Compose)."
        )
    return FreeTransform(made)


# -- transforms of torch -------------------------------------------------------------------------------------------------------


def _recipe(made: Transform) -> Map:
    if type(made) in _NO_CHART:
        raise NotADiffeomorphismError(f"{type(made).__name__} is no change of coordinates: {_NO_CHART[type(made)]}.")
    if type(made) in _SAME:
        return _SAME[type(made)]()
    if isinstance(made, td._InverseTransform):  # pyright: ignore[reportPrivateUsage]
        return _inverted(made.inv)
    if isinstance(made, td.IndependentTransform):
        return _recipe(made.base_transform)
    if isinstance(made, td.ComposeTransform) and _separable(made):
        return Compose(*map(_recipe, made.parts)) if made.parts else Identity()
    return transformed(made)


def _inverted(made: Transform) -> Map:
    if isinstance(made, (td._InverseTransform, Inverted)):  # pyright: ignore[reportPrivateUsage]
        return _recipe(made.inv)
    if isinstance(made, td.ReshapeTransform):
        return _recipe(td.ReshapeTransform(made.out_shape, made.in_shape))
    if isinstance(made, td.IndependentTransform):
        return _inverted(made.base_transform)
    if isinstance(made, td.ComposeTransform) and _separable(made):
        return Compose(*map(_inverted, reversed(made.parts))) if made.parts else Identity()
    if isinstance(made, td.ComposeTransform):
        return transformed(made.inv)
    return Inverse(_recipe(made))


def _separable(made: Transform) -> bool:
    """True if each part is a change of coordinates by itself, as far as is known."""
    return type(made) not in _NO_CHART and all(map(_separable, children(made)))


# -- bijections of other libraries ---------------------------------------------------------------------------------------------


def _is_lazy(made: Any) -> bool:
    """True for a module that makes a transform when it is called."""
    return isinstance(made, nn.Module) and not callable(getattr(made, "inverse", None))


class _Foreign(nn.Module):
    """Makes a transform of an object with ``forward`` and ``inverse``."""

    def __init__(self, bijection: Any) -> None:
        super().__init__()
        self.bijection = bijection

    def forward(self) -> Transform:
        return _ForeignTransform(self.bijection)


class _ForeignTransform(Transform):
    bijective = True
    domain = codomain = constraints.real_vector

    def __init__(self, bijection: Any) -> None:
        super().__init__()
        self.bijection = bijection

    @staticmethod
    def _rows(fn: Any, x: Tensor) -> tuple[Tensor, Any]:
        """The value and what else is returned; such libraries want exactly one batch axis."""
        result = fn(x.reshape(-1, x.shape[-1]))
        value, rest = cast("tuple[Tensor, Any]", result[:2]) if isinstance(result, tuple) else (cast(Tensor, result), None)
        return value.reshape(*x.shape[:-1], -1), rest

    def _call(self, x: Tensor) -> Tensor:
        return self._rows(self.bijection.forward, x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self._rows(self.bijection.inverse, y)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        given = getattr(self.bijection, "log_abs_det_jacobian", None)
        volume = self._rows(self.bijection.forward, x)[1] if given is None else given(x, y)
        if volume is None:
            raise NotImplementedError
        return volume
