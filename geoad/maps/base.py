"""What a map between charts is: a recipe that is bound to blocks, and four matrix-free Jacobian products."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, Literal, Self

import torch
from torch import Tensor

from geoad.errors import ChartDomainError, GeometryError, NotADiffeomorphismError
from geoad.maps.numbers import Numbers
from geoad.params import Blocks, Layout

__all__ = ["BlockMap", "Diffeomorphism", "Law", "Map", "join_laws"]

Law = Literal["diffeomorphism", "submersion", "immersion", "smooth"]
"""What is known of a map between charts: the law tables of `geoad.transport` have a column for each."""


def join_laws(laws: Iterable[Law]) -> Law:
    """The law of a map made of maps of these laws, side by side or one after the other."""
    found = set(laws) - {"diffeomorphism"}
    if not found:
        return "diffeomorphism"
    return found.pop() if len(found) == 1 else "smooth"


class Map(Numbers):
    r"""A map between the coordinates θ of a chart and other coordinates ψ, on dicts of blocks.

    An instance that a user makes is a *recipe*; ``chart.reparametrize`` calls `bind`, which returns a copy that knows
    its blocks and owns its numbers. ``joint`` recipes receive all matched blocks at once.

    Four Jacobian products say how objects move. Each takes both ends, ``x`` (θ) and ``y`` (ψ), so that no map is
    evaluated twice:

    ================== ====================================  ==========================  ==========================
    product            moves                                 for ψ = φ(θ), invertible    for θ = f(ψ), see SmoothMap
    ================== ====================================  ==========================  ==========================
    `push`             θ-vector to ψ                         :math:`J v`                 horizontal lift
    `pull`             ψ-covector to θ                       :math:`J^\top w`            its transpose
    `push_inverse`     ψ-vector to θ                         :math:`J^{-1} v`            :math:`J_f v`
    `pull_inverse`     θ-covector to ψ                       :math:`J^{-\top} w`         :math:`J_f^\top w`
    ================== ====================================  ==========================  ==========================

    """

    law: Law = "diffeomorphism"
    joint: bool = True
    #: The Jacobian is diagonal.
    elementwise: bool = False
    #: Every block is mapped by itself.
    blockwise: bool = False
    #: The Jacobian has one entry in each row and column: elementwise maps and (signed) permutations.
    monomial: bool = False
    #: The Jacobian does not depend on the point.
    linear: bool = False
    #: Where a recipe draws its numbers; None is torch's global generator. A bound map has drawn already and keeps None.
    generator: torch.Generator | None = None

    def __init__(self) -> None:
        super().__init__()
        self.layout: Layout | None = None
        #: A point (or its blocks) that the recipe refers to, e.g. the weights that LoRA adapts.
        self.base: Any = None

    def bind(self, layout: Layout) -> Self:
        """A copy of the recipe that is bound to the blocks of `layout`."""
        self.require_recipe()
        # the generator is shared, not copied: a copy would give every block the same numbers; so is the base, which is large
        bound = copy.deepcopy(self, {id(shared): shared for shared in (self.generator, self.base)})
        bound.layout = layout
        bound.prepare(layout)
        bound.generator = None
        return bound

    def require_recipe(self) -> None:
        """Refuse to bind what is bound already."""
        if self.layout is not None:
            raise GeometryError(
                f"{type(self).__name__} is bound to the blocks {list(self.layout.names)} already. A bound map owns "
                "numbers that fit these blocks only; pass a fresh recipe instead."
            )

    def prepare(self, layout: Layout) -> None:
        """Hook of `bind`: check the shapes, draw random numbers, register buffers."""

    def settled(self, blocks_of: Callable[[Any], Blocks]) -> Self:
        """The recipe with its `base` point as blocks of the chart in which it is about to be bound."""
        if not hasattr(self.base, "chart"):
            return self
        twin = copy.copy(self)
        twin.base = blocks_of(self.base)
        return twin

    @property
    def groups(self) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
        """(blocks of θ, blocks of ψ) that depend on one another; all of them unless the map knows better."""
        return [(self.bound_layout().names, tuple(self.image_shapes))]

    @property
    def image_shapes(self) -> dict[str, torch.Size]:
        """Names and shapes of the blocks of ψ; those of θ unless the map says otherwise."""
        return dict(self.bound_layout().items())

    @property
    def by_section(self) -> bool:
        """`forward` is a section: a choice among many ψ, or defined on an image only. It moves points, and nothing else."""
        return self.law != "diffeomorphism"

    # -- the map ---------------------------------------------------------------------------------------------------

    def forward(self, x: Blocks) -> Blocks:
        """ψ = φ(θ)."""
        raise _missing(self, "forward")

    def invert(self, y: Blocks) -> Blocks:
        """θ = φ⁻¹(ψ)."""
        raise _missing(self, "invert")

    def outside_domain(self, x: Blocks) -> str | None:
        """The violated condition in words if θ = `x` is outside the domain, else None. Reads values."""
        return None

    def outside_image(self, y: Blocks) -> str | None:
        """The violated condition in words if ψ = `y` is not a value of the map, else None. Reads values."""
        return None

    @property
    def full_domain(self) -> bool:
        """True if every θ is in the domain, so that `outside_domain` need not be asked."""
        return type(self).outside_domain is Map.outside_domain

    def near(self, x: Blocks, y: Blocks) -> Blocks:
        """The ψ that lies over θ = `x` and continues `y`, a ψ over a nearby θ; φ(x) where the map is invertible."""
        return self.forward(x)

    # -- Jacobian products -----------------------------------------------------------------------------------------

    def push(self, x: Blocks, y: Blocks, v: Blocks) -> Blocks:
        """A θ-vector in ψ."""
        raise no_law(self, "a vector", "from θ to ψ")

    def pull(self, x: Blocks, y: Blocks, w: Blocks) -> Blocks:
        """A ψ-covector in θ."""
        raise no_law(self, "a covector", "from ψ to θ")

    def push_inverse(self, x: Blocks, y: Blocks, v: Blocks) -> Blocks:
        """A ψ-vector in θ."""
        raise _missing(self, "push_inverse")

    def pull_inverse(self, x: Blocks, y: Blocks, w: Blocks) -> Blocks:
        """A θ-covector in ψ."""
        raise _missing(self, "pull_inverse")

    def log_abs_det(self, x: Blocks, y: Blocks) -> Tensor:
        """log |det ∂ψ/∂θ| at θ = x, a scalar."""
        raise no_law(self, "a density", "either way")

    # -- numbers -----------------------------------------------------------------------------------------------------

    def bound_layout(self) -> Layout:
        """The layout this map is bound to."""
        if self.layout is None:
            raise GeometryError(
                f"{type(self).__name__} is a recipe that is not bound to blocks yet, so it has no Jacobian. Bind it "
                "with chart.reparametrize(recipe), or recipe.bind(layout)."
            )
        return self.layout

    @property
    def learnable(self) -> bool:
        """True if the map has parameters of its own."""
        return next(self.parameters(), None) is not None


class Diffeomorphism(Map):
    r"""A smooth map :math:`\varphi: \theta \mapsto \psi` with a smooth inverse, on dicts of blocks.

    ``joint`` recipes receive all matched blocks at once; the others are `BlockMap`. A subclass gives `forward` and
    `invert` (and the two checks where the domain or the image is not everything). The four Jacobian products (with
    :math:`J = ∂ψ/∂θ`, see `Map`) and `log_abs_det` default to autodiff and are overridden where a closed form exists.

    Numbers of a map (scales, rotations) are kept in float64 buffers and cast to the dtype and device of the components
    at use (`constant`), so that a map means the same in every precision; learnable ones are ``nn.Parameter``.

    `forward`, `invert` and the products also take blocks with batch axes in front wherever no reduction over a whole
    block is involved; `log_abs_det` is for one point, use ``torch.func.vmap`` for many.
    """

    # -- Jacobian products -----------------------------------------------------------------------------------------

    def push(self, x: Blocks, y: Blocks, v: Blocks) -> Blocks:
        """J v."""
        return torch.func.jvp(self.forward, (x,), (v,))[1]

    def pull(self, x: Blocks, y: Blocks, w: Blocks) -> Blocks:
        """Jᵀ w."""
        return torch.func.vjp(self.forward, x)[1](w)[0]

    def push_inverse(self, x: Blocks, y: Blocks, v: Blocks) -> Blocks:
        """J⁻¹ v."""
        return torch.func.jvp(self.invert, (y,), (v,))[1]

    def pull_inverse(self, x: Blocks, y: Blocks, w: Blocks) -> Blocks:
        """J⁻ᵀ w."""
        return torch.func.vjp(self.invert, y)[1](w)[0]

    def log_abs_det(self, x: Blocks, y: Blocks) -> Tensor:
        """log |det J| at θ = x, a scalar. The default builds the dense Jacobian (size d²)."""
        layout = self.bound_layout()

        def raveled(vector: Tensor) -> Tensor:
            return layout.ravel(self.forward(layout.unravel(vector)))

        jacobian: Any = torch.func.jacfwd(raveled)(layout.ravel(x))
        return torch.linalg.slogdet(jacobian).logabsdet


class BlockMap(Diffeomorphism):
    """A recipe for one block; bound to several blocks it is bound to each by itself.

    A subclass works on plain tensors: `value`, `inverse_value` and, where there is a closed form, the tensor versions
    of the products (`push_block` ...), `log_abs_det_block`, and the two checks `bad_domain`, `bad_image`.
    """

    joint = False
    blockwise = True

    def __init__(self) -> None:
        super().__init__()
        self.name: str = ""
        self.shape: torch.Size = torch.Size()

    def bind(self, layout: Layout) -> Self:
        if len(layout) != 1:
            raise GeometryError(
                f"{type(self).__name__} maps one block at a time, but was bound to {list(layout.names)}. "
                "Use chart.reparametrize, which binds a copy to each block."
            )
        return super().bind(layout)

    def prepare(self, layout: Layout) -> None:
        self.name = layout.names[0]
        self.shape = layout[self.name]
        self.prepare_block(self.shape)

    def prepare_block(self, shape: torch.Size) -> None:
        """Hook of `bind` for one block."""

    # -- on tensors, for subclasses --------------------------------------------------------------------------------

    def value(self, x: Tensor) -> Tensor:
        """ψ = φ(θ)."""
        raise _missing(self, "value")

    def inverse_value(self, y: Tensor) -> Tensor:
        """θ = φ⁻¹(ψ)."""
        raise _missing(self, "inverse_value")

    def bad_domain(self, x: Tensor) -> str | None:
        """The violated condition, or None."""
        return None

    def bad_image(self, y: Tensor) -> str | None:
        """The violated condition, or None."""
        return None

    def push_block(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """J v."""
        return torch.func.jvp(self.value, (x,), (v,))[1]

    def pull_block(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        """Jᵀ w."""
        return torch.func.vjp(self.value, x)[1](w)[0]

    def push_inverse_block(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """J⁻¹ v."""
        return torch.func.jvp(self.inverse_value, (y,), (v,))[1]

    def pull_inverse_block(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        """J⁻ᵀ w."""
        return torch.func.vjp(self.inverse_value, y)[1](w)[0]

    def log_abs_det_block(self, x: Tensor, y: Tensor) -> Tensor:
        """log |det J|, a scalar."""
        size = x.numel()
        jacobian: Any = torch.func.jacfwd(self.value)(x)
        return torch.linalg.slogdet(jacobian.reshape(size, size)).logabsdet

    # -- the block as a dict -----------------------------------------------------------------------------------------

    def forward(self, x: Blocks) -> Blocks:
        return {self.name: self.value(x[self.name])}

    def invert(self, y: Blocks) -> Blocks:
        return {self.name: self.inverse_value(y[self.name])}

    def outside_domain(self, x: Blocks) -> str | None:
        return self._locate(self.bad_domain(x[self.name]))

    def outside_image(self, y: Blocks) -> str | None:
        return self._locate(self.bad_image(y[self.name]))

    @property
    def full_domain(self) -> bool:
        return type(self).bad_domain is BlockMap.bad_domain

    def _locate(self, condition: str | None) -> str | None:
        return None if condition is None else f"block '{self.name}': {condition}"

    def push(self, x: Blocks, y: Blocks, v: Blocks) -> Blocks:
        n = self.name
        return {n: self.push_block(x[n], y[n], v[n])}

    def pull(self, x: Blocks, y: Blocks, w: Blocks) -> Blocks:
        n = self.name
        return {n: self.pull_block(x[n], y[n], w[n])}

    def push_inverse(self, x: Blocks, y: Blocks, v: Blocks) -> Blocks:
        n = self.name
        return {n: self.push_inverse_block(x[n], y[n], v[n])}

    def pull_inverse(self, x: Blocks, y: Blocks, w: Blocks) -> Blocks:
        n = self.name
        return {n: self.pull_inverse_block(x[n], y[n], w[n])}

    def log_abs_det(self, x: Blocks, y: Blocks) -> Tensor:
        return self.log_abs_det_block(x[self.name], y[self.name])


def no_law(bound: Map, what: str, way: str) -> NotADiffeomorphismError:
    """The refusal of a map that cannot be undone."""
    return NotADiffeomorphismError(
        f"{what} has no law {way} under {type(bound).__name__}: its Jacobian is no square, invertible matrix. "
        "Objects that need its inverse cannot be moved; compute the object anew in the other chart."
    )


def _missing(recipe: Map, method: str) -> GeometryError:
    return GeometryError(
        f"{type(recipe).__name__} has no method `{method}`. A change of coordinates must be known in both directions, "
        "for objects "
        "move both ways. Give the subclass forward and invert, or (per block) value and inverse_value; everything else has a "
        "default by autodiff."
    )


def need(condition: Tensor, words: str, values: Tensor) -> str | None:
    """None if `condition` holds everywhere, else `words` with the count and the first offending value."""
    if bool(condition.all()):
        return None
    bad = ~condition
    where = values.expand_as(condition)[bad].reshape(-1)
    return f"{words} (violated by {int(bad.sum())} of {bad.numel()} entries, for instance {where[0].item():.6g})"


def require_domain(condition: str | None, what: str, chart: str, remedy: str) -> None:
    """Raise `ChartDomainError` if a check returned a condition."""
    if condition is not None:
        raise ChartDomainError(
            f"{what} lies outside the domain of chart '{chart}': {condition}. Coordinates of this chart do not exist "
            f"there, so no object can be moved. {remedy}"
        )
