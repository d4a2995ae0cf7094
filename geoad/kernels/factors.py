"""Kronecker factors of layers (KFAC), and the exact diagonal in their eigenbases (EKFAC)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geoad.errors import GeometryError
from geoad.kernels.layers import Layer, layers_of
from geoad.kernels.positions import columns_at, inputs_at, second_moment, signals_at
from geoad.kernels.rows import Plan, Rows, UseRows
from geoad.kernels.squares import squares_in_basis
from geoad.kernels.uses import EmbeddingUse

__all__ = ["EigenSum", "Factors", "KroneckerSum"]


@dataclass(frozen=True)
class Factors:
    """Σ_nk r rᵀ of a layer, approximately G ⊗ A for each group.

    Attributes:
        layer: the blocks.
        left: G, (groups, out, out).
        right: A, (groups, in, in), the bias last; (groups, in), the diagonal, for a table.
    """

    layer: Layer
    left: Tensor
    right: Tensor


def _another_path(layer: Layer) -> str:
    return (
        f"Kronecker factors of the layer {list(layer.names)} were asked for, but the network does not use it as a layer on all "
        "samples: its operations depend on the data, so there are no inputs and outputs to take the factors of. Use "
        "representation='diagonal', 'block_diagonal' or 'implicit', which are exact for every path."
    )


class _Running:
    """The sums for one layer."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.left: Tensor | None = None
        self.right: Tensor | None = None
        self.samples = self.positions = 0

    @property
    def name(self) -> str:
        """What the layer is called."""
        return "+".join(self.layer.names)


class KroneckerSum:
    r"""The Kronecker factors of layers, over chunks (Martens & Grosse 2015; Eschenhagen et al. 2023).

    With N samples, T positions for each, inputs a (with a 1 where the bias is joint) and backward signals g of all seeds k,

    ============  ==================================================  ===================================================
    sharing       A                                                   G
    ============  ==================================================  ===================================================
    "expand"      :math:`\frac1N \sum_{n,t} a_{nt} a_{nt}^\top`         :math:`\frac1T \sum_{n,k,t} g_{nkt} g_{nkt}^\top`
    "reduce"      :math:`\frac1N \sum_n \bar a_n \bar a_n^\top`         :math:`\sum_{n,k} \hat g_{nk} \hat g_{nk}^\top`
    ============  ==================================================  ===================================================

    with ā the mean and ĝ the sum over positions. All uses of a weight count as positions. G ⊗ A estimates Σ_nk r rᵀ, and equals
    it for a single sample at one position. The A of a table (an embedding) is the diagonal of counts; tables are always
    expanded, for only then it is diagonal.

    Args:
        plan: the structure of the network.
        names: the blocks.
        sharing: see above.
        joint: a bias that is always used with one weight is one more input of it.

    Attributes:
        layers: the layers found.
        rest: the blocks without such structure (norms, generic ones).
    """

    def __init__(self, plan: Plan, names: Sequence[str], sharing: str = "expand", joint: bool = True) -> None:
        self.layers, self.rest = layers_of(plan, names, joint)
        self.expand = sharing == "expand"
        self._sums = [_Running(layer) for layer in self.layers]

    def add(self, rows: Rows, signs: Tensor | None = None) -> None:
        """Add the rows of a chunk, with signs or weights (K, n); inputs count once, with the first seeds of their samples."""
        weights = None if signs is None else signs.to(rows.dtype)
        for each in self._sums:
            if not each.layer.uses(rows):
                raise GeometryError(_another_path(each.layer))
            each.samples += 0 if rows.further else rows.samples
            if self.expand or each.layer.table:
                _expand(each, rows, weights)
            else:
                _reduce(each, rows, weights)

    def state(self) -> dict[str, Tensor]:
        """The sums so far; they add up over disjoint data."""
        found: dict[str, Tensor] = {}
        for each in self._sums:
            if each.left is not None and each.right is not None:
                counts = torch.tensor([each.samples, each.positions], device=each.left.device)
                found |= {f"{each.name} left": each.left, f"{each.name} right": each.right, f"{each.name} counts": counts}
        return found

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from other sums."""
        for each in self._sums:
            each.left, each.right = state.get(f"{each.name} left"), state.get(f"{each.name} right")
            counts = state.get(f"{each.name} counts")
            each.samples, each.positions = (0, 0) if counts is None else counts.tolist()

    def factors(self) -> list[Factors]:
        """The factors of each layer."""
        found: list[Factors] = []
        for each in self._sums:
            assert each.left is not None and each.right is not None
            left = each.left * (each.samples / max(1, each.positions)) if each.positions else each.left
            found.append(Factors(each.layer, left, each.right / each.samples))
        return found


def _plus(total: Tensor | None, value: Tensor) -> Tensor:
    return value if total is None else total.add_(value)


def _expand(total: _Running, rows: Rows, weights: Tensor | None) -> None:
    layer = total.layer
    for each in layer.uses(rows):
        if not rows.further:
            total.positions += signals_at(each.use, each.back[0][:1]).shape[2] * rows.samples
            total.right = _plus(total.right, _right_expanded(layer, each))
        step = max(1, _TOGETHER // max(1, each.back[0].nbytes))  # short ones side by side, as if of more samples
        for k in range(0, rows.seeds, step):
            backs = [_kept(each, back) for back in each.back[k : k + step]]
            back = backs[0] if len(backs) == 1 else torch.cat(backs)
            total.left = _plus(
                total.left, _left_expanded(each, back, None if weights is None else weights[k : k + step].reshape(-1))
            )


_TOGETHER = 1 << 18
"""Bytes of backward signals below which one product of matrices takes several seeds."""


def _left_expanded(each: UseRows, back: Tensor, weights: Tensor | None) -> Tensor:
    """Σ_nt w g gᵀ for some seeds (n, *shape), one after another, with weights (n,): (groups, out, out)."""
    g = signals_at(each.use, back)
    if g.shape[3] <= 2 * g.shape[2]:  # sample by sample, without another copy
        bent = g if weights is None else g * weights[:, None, None, None]
        n, groups, positions, out = g.shape
        left, right = (t.reshape(n * groups, positions, out) for t in (bent, g))
        return torch.bmm(left.mT, right).reshape(n, groups, out, out).sum(0)
    g = columns_at(each.use, back)
    bent = g if weights is None else g * weights.repeat_interleave(g.shape[-1] // len(weights))
    return bent @ g.mT


def _kept(each: UseRows, back: Tensor) -> Tensor:
    """What came back, without the positions that have no gradient."""
    if not isinstance(each.use, EmbeddingUse) or each.use.padding is None:
        return back
    return back * (each.a != each.use.padding).to(back.dtype).reshape(*each.a.shape, 1).reshape(*back.shape[:-1], 1)


def _right_expanded(layer: Layer, each: UseRows) -> Tensor:
    """Σ_nt a aᵀ, (groups, in, in)."""
    dtype, device = each.back[0].dtype, each.a.device
    if isinstance(each.use, EmbeddingUse):
        tokens = each.a.flatten() if each.use.padding is None else each.a[each.a != each.use.padding]
        return torch.bincount(tokens, minlength=layer.part.shape[0]).to(dtype).unsqueeze(0)
    if layer.weight is None:
        count = each.back[0].shape[0] * signals_at(each.use, each.back[0][:1]).shape[2]
        return torch.full((layer.groups, 1, 1), float(count), dtype=dtype, device=device)
    return second_moment(each.use, each.a.to(dtype), layer.bias is not None)


def _reduce(total: _Running, rows: Rows, weights: Tensor | None) -> None:
    uses = total.layer.uses(rows)
    if not rows.further:
        a = _mean_input(total.layer, uses, rows.dtype).transpose(0, 1)
        total.right = _plus(total.right, a.mT @ a)
    for k in range(rows.seeds):
        parts = [signals_at(each.use, each.back[k]).sum(2) for each in uses]
        g = torch.stack(parts).sum(0).transpose(0, 1)
        bent = g if weights is None else g * weights[k, :, None]
        total.left = _plus(total.left, bent.mT @ g)


def _mean_input(layer: Layer, uses: Sequence[UseRows], dtype: torch.dtype) -> Tensor:
    """The mean over positions, (n, groups, in)."""
    if layer.weight is None:
        return rows_of_ones(uses[0], layer)
    inputs = [inputs_at(each.use, each.a).to(dtype) for each in uses]
    a = torch.stack([each.sum(2) for each in inputs]).sum(0) / sum(each.shape[2] for each in inputs)
    return a if layer.bias is None else torch.cat([a, torch.ones_like(a[..., :1])], -1)


def rows_of_ones(each: UseRows, layer: Layer) -> Tensor:
    """The input of a bias alone, (n, groups, 1)."""
    return each.back[0].new_ones(each.back[0].shape[0], layer.groups, 1)


# -- eigenbases --------------------------------------------------------------------------------------------------------------


class EigenSum:
    """λ = Σ_nk w (U_Gᵀ R U_A)² for the rows R (groups, out, in) of layers: the diagonal in given bases (George et al. 2018).

    Args:
        bases: for each layer U_G (groups, out, out) and U_A (groups, in, in); None stands for the identity (a table).
    """

    def __init__(self, bases: Sequence[tuple[Layer, Tensor | None, Tensor | None]]) -> None:
        self.bases = list(bases)
        self._sums: list[Tensor | None] = [None] * len(self.bases)

    def add(self, rows: Rows, signs: Tensor | None = None) -> None:
        """Add the rows of a chunk, with signs or weights (K, n)."""
        weights = None if signs is None else signs.mT.to(rows.dtype)
        for i, (layer, left, right) in enumerate(self.bases):
            self._sums[i] = _plus(self._sums[i], squares_in_basis(layer, rows, weights, (left, right)))

    def state(self) -> dict[str, Tensor]:
        """The sums so far; they add up over disjoint data."""
        return {str(i): each for i, each in enumerate(self._sums) if each is not None}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from other sums."""
        self._sums = [state.get(str(i)) for i in range(len(self.bases))]

    def values(self) -> list[Tensor]:
        """λ (groups, out, in) of each layer."""
        return [each for each in self._sums if each is not None]
