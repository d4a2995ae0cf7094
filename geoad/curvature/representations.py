"""How a curvature matrix is represented: dense, matrix-free, or with structure that is imposed on it.

A representation is a small frozen object with its options; a string stands for the one with default options, and a mapping from
patterns of block names to representations for a mix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

from geoad.errors import GeometryError
from geoad.params import Layout

__all__ = [
    "EKFAC",
    "KFAC",
    "BlockDiagonal",
    "Dense",
    "Diagonal",
    "Implicit",
    "LowRank",
    "Mixed",
    "QuasiDiagonal",
    "Representation",
    "chosen",
    "grouped",
    "layers_of",
    "numbered",
    "representation_of",
]


class Representation:
    """What all of them share.

    Attributes:
        imposed: the matrix is replaced by one of a structure that depends on the chart; else it is the exact one.
    """

    imposed: bool = True


@dataclass(frozen=True)
class Dense(Representation):
    """The (d, d) matrix."""

    imposed = False


@dataclass(frozen=True)
class Implicit(Representation):
    """Matrix-free: products by derivatives of the network."""

    imposed = False


@dataclass(frozen=True)
class LowRank(Representation):
    """U Uᵀ, a column for each sample and column of the root of A (n·c of them): the exact matrix.

    Args:
        rank: keep only the part of the largest eigenvalues, the best approximation of this rank in the Frobenius norm of the
            chart.
    """

    rank: int | None = None

    @property
    def imposed(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A truncated matrix is another one."""
        return self.rank is not None


@dataclass(frozen=True)
class BlockDiagonal(Representation):
    """One dense block for each group of parameter blocks.

    Args:
        groups: "layer" (the parameters of one module together), "parameter" (each by itself), or a sequence of groups, each a
            pattern of block names or a sequence of patterns; a block belongs to the first group that fits.
    """

    groups: str | tuple[tuple[str, ...], ...] = "layer"

    def __init__(self, groups: str | Sequence[str | Sequence[str]] = "layer") -> None:
        if not isinstance(groups, str):
            groups = tuple((each,) if isinstance(each, str) else tuple(each) for each in groups)
        elif groups not in ("layer", "parameter"):
            raise GeometryError(
                f"groups={groups!r} is not known. Use 'layer', 'parameter', or a list of groups of patterns, such as "
                "[['0.*', '2.*'], '4.*']."
            )
        object.__setattr__(self, "groups", groups)


@dataclass(frozen=True)
class Diagonal(Representation):
    """The diagonal."""


@dataclass(frozen=True)
class QuasiDiagonal(Representation):
    """The diagonal and, for each unit, what couples its bias to its weights.

    Ollivier 2015, "Riemannian metrics for neural networks I", section 2.3. Other parameters keep their diagonal.
    """


@dataclass(frozen=True)
class KFAC(Representation):
    r"""One Kronecker product A ⊗ G for each layer (Martens & Grosse 2015; Grosse & Martens 2016 for convolutions).

    A is the mean of a aᵀ over the layer's inputs, G that of g gᵀ over what comes back to its outputs. Layers without such
    structure (norms, embeddings apart) keep their exact block.

    Args:
        sharing: for layers that are used at several positions, "expand" (positions count as samples) or "reduce" (inputs are
            averaged, backward signals summed over positions first); Eschenhagen et al. 2023.
        bias: "joint" (the bias is one more column of the weight) or "separate".
    """

    sharing: str = "expand"
    bias: str = "joint"

    def __post_init__(self) -> None:
        _require("sharing", self.sharing, ("expand", "reduce"))
        _require("bias", self.bias, ("joint", "separate"))


@dataclass(frozen=True)
class EKFAC(KFAC):
    """KFAC with the exact diagonal in the eigenbasis of its factors (George et al. 2018): the best one in Frobenius norm."""


@dataclass(frozen=True)
class Mixed(Representation):
    """Another representation for each group of layers: pattern of block names -> representation, first match wins."""

    parts: tuple[tuple[str, Representation], ...]


def _require(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise GeometryError(f"{name}={value!r} is not known. Available: {list(known)}.")


_NAMED: dict[str, Representation] = {
    "dense": Dense(),
    "implicit": Implicit(),
    "block_diagonal": BlockDiagonal(),
    "diagonal": Diagonal(),
    "quasi_diagonal": QuasiDiagonal(),
    "kfac": KFAC(),
    "ekfac": EKFAC(),
    "low_rank": LowRank(),
}


def representation_of(given: Any) -> Representation:
    """A representation by name, as given, or a mix of them."""
    if isinstance(given, Representation):
        return given
    if isinstance(given, Mapping):
        parts = [(str(p), representation_of(r)) for p, r in cast("Mapping[str, Any]", given).items()]
        wrong = [pattern for pattern, r in parts if isinstance(r, (Implicit, Mixed))]
        if wrong or not parts:
            raise GeometryError(
                f"a mix of representations gives a stored one to every pattern, found {given!r}. Matrix-free products have no "
                "blocks of their own: use representation='implicit' for the whole network, or 'dense' for these blocks."
            )
        return Mixed(tuple(parts))
    if isinstance(given, str) and given in _NAMED:
        return _NAMED[given]
    raise GeometryError(
        f"representation={given!r} is not known. Available: {sorted(_NAMED)}, an object such as "
        "geoad.curvature.KFAC(sharing='reduce'), or a mapping from patterns of block names to these. Nothing is replaced by an "
        "approximation in silence."
    )


def layers_of(layout: Layout) -> dict[str, tuple[str, ...]]:
    """The blocks of each module, by its name.

    >>> layers_of(Layout({"0.weight": (2, 3), "0.bias": (2,), "scale": ()}))
    {'0': ('0.weight', '0.bias'), '': ('scale',)}
    """
    found: dict[str, list[str]] = {}
    for name in layout.names:
        found.setdefault(name.rpartition(".")[0], []).append(name)
    return {layer: tuple(names) for layer, names in found.items()}


def grouped(representation: BlockDiagonal, layout: Layout) -> list[tuple[str, ...]]:
    """The groups of blocks of a block-diagonal representation; they partition the layout."""
    groups = representation.groups
    if groups == "layer":
        return list(layers_of(layout).values())
    if groups == "parameter":
        return [(name,) for name in layout.names]
    assert not isinstance(groups, str)
    return [names for names, _ in chosen([(pattern, i) for i, each in enumerate(groups) for pattern in each], layout)]


def chosen(patterns: Sequence[tuple[str, Any]], layout: Layout) -> list[tuple[tuple[str, ...], Any]]:
    """(blocks, what belongs to them): each block goes with its first pattern; patterns for the same thing are one group."""
    found: dict[Any, list[str]] = {}
    used: set[str] = set()
    for name in layout.names:
        fitting = next(((p, thing) for p, thing in patterns if fnmatchcase(name, p)), None)
        if fitting is None:
            raise GeometryError(
                f"no pattern of {[p for p, _ in patterns]} fits the block '{name}'. Every parameter belongs somewhere; add "
                "'*' as a last pattern."
            )
        used.add(fitting[0])
        found.setdefault(fitting[1], []).append(name)
    idle = [p for p, _ in patterns if p not in used]
    if idle:
        raise GeometryError(f"the patterns {idle} match no block (or only blocks of earlier ones): {list(layout.names)}.")
    return [(tuple(names), thing) for thing, names in found.items()]


def numbered(representation: Mixed) -> list[tuple[str, tuple[int, Representation]]]:
    """The patterns of a mix, each a group of its own."""
    return [(pattern, (i, each)) for i, (pattern, each) in enumerate(representation.parts)]
