"""The protocol of likelihoods: what a network's outputs parametrise, and the curvature of -log p in output space."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from geoad.curvature.likelihoods.roots import Seeds, numbers_of_a_sample, signed_root, wide
from geoad.errors import GeometryError
from geoad.kernels import products
from geoad.kernels.conditions import holds
from geoad.params import is_wrapped

__all__ = ["Likelihood", "RealTargets", "described", "readable", "require_same_device", "seeds_of"]


class Likelihood(ABC):
    """A family p(y | f) with parameters f, the network's outputs of shape (n, ..., c).

    Samples come first, the parameters of one factor last; axes between them (positions, pixels) are independent factors, whose
    -log p add up. So A(f), the curvature of one sample, is block diagonal over the positions. A likelihood of your own needs
    `fisher`; with `nll` (and `sample`) it also serves empirical (and Monte-Carlo) Fishers and the GGN. Everything is
    differentiable in f and works under ``torch.func``; values are looked at only by `check` and `check_targets`.

    Attributes:
        hessian_type: A is the Hessian in f of a potential, so ∂A is symmetric in all three indices (natural parameters). Where
            it is not said, the general formula for connections is used, which is always right.
        numberwise: outputs (n,), one number for each sample, are taken too; targets then are (n,).
    """

    hessian_type: bool = False
    numberwise: bool = False

    @abstractmethod
    def fisher(self, outputs: Tensor, t: Tensor) -> Tensor:
        """A(f) t with A = E_y[∇ log p ∇ log pᵀ], the Fisher matrix of the family; t has the shape of the outputs."""

    def nll(self, outputs: Tensor, targets: Any) -> Tensor:
        """-log p(y | f) of every sample, shape (n,), summed over the positions; nothing is dropped."""
        raise GeometryError(
            f"{type(self).__name__} defines no -log p(y | f), so scores, empirical Fishers and Gauss-Newton matrices cannot be "
            "had from it. Give it a method nll(outputs, targets) that returns one number per sample, or use kind='exact'."
        )

    def score(self, outputs: Tensor, targets: Any) -> Tensor:
        """∇_f log p(y | f), in the shape of the outputs."""
        return products.gradient(lambda f: (-self.nll(f, targets).sum(), ()), outputs)[0]

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Any:
        """Labels y ~ p(y | f), cut from the graph; without `generator` from torch's global one."""
        raise GeometryError(
            f"{type(self).__name__} cannot draw labels, so there is no Monte-Carlo Fisher of it. Give it a method "
            "sample(outputs, generator), or use kind='exact'."
        )

    def hessian(self, outputs: Tensor, targets: Any, t: Tensor) -> Tensor:
        """∇²_f(-log p(y | f)) t: A of the Gauss-Newton matrix. For natural parameters it is `fisher`, whatever y."""
        return products.hessian_product(lambda f: self.nll(f, targets).sum(), outputs, t)

    def matrix(self, outputs: Tensor, targets: Any = None) -> Tensor:
        """The blocks of A, (n, ..., c, c): the Fisher matrix, or with targets the Hessian of -log p."""

        def column(unit: Tensor) -> Tensor:
            t = unit.expand_as(outputs)  # the same unit vector at every position: positions do not mix
            return self.fisher(outputs, t) if targets is None else self.hessian(outputs, targets, t)

        units = torch.eye(outputs.shape[-1], dtype=outputs.dtype, device=outputs.device)
        return products.mapped(column, units).movedim(0, -1)

    def root(self, outputs: Tensor, targets: Any = None) -> Tensor:
        """Seeds s (K, n, ..., c) with A(f) = Σ_k s_k s_kᵀ for every sample, of `fisher`, or with targets of `hessian`.

        With axes between n and c every seed is nonzero at one position, since A is block diagonal over them.

        Raises:
            GeometryError: the matrix is not positive semidefinite.
        """
        return self.seeds(outputs, targets).all()[0]

    def signs(self, outputs: Tensor, targets: Any = None) -> Tensor | None:
        """±1 of every seed, (K, n), where A = Σ_k ±s_k s_kᵀ is indefinite; None: all are +1."""
        return self.seeds(outputs, targets).all()[1]

    def seeds(self, outputs: Tensor, targets: Any = None) -> Seeds:
        """The seeds of `root` with their `signs`, made a portion at a time: with P positions all are P² times as many numbers.

        A likelihood of your own with a root in closed form defines this (``Seeds.at_positions``), or `root` itself.
        """
        of = "the Fisher matrix" if targets is None else "the Hessian"
        local, _ = signed_root(wide(self.matrix(outputs, targets)), f"{of} of {type(self).__name__} in the outputs")
        return Seeds.at_positions(local.to(outputs.dtype))

    def columns(self, outputs_shape: Sequence[int]) -> int:
        """K, the number of seeds that `root` gives for outputs of this shape."""
        return numbers_of_a_sample(outputs_shape)

    def mean_factor(self, outputs_shape: Sequence[int]) -> float:
        """The number a with loss(f, y) = a · mean over n of `nll` + constant, for torch's loss with ``reduction="mean"``.

        That loss is also divided by the number of positions (or of outputs), while a likelihood adds them up; its Hessian and
        Gauss-Newton matrix are a times the ones here.
        """
        raise GeometryError(
            f"torch has no loss of its own for {type(self).__name__}, so there is no factor to it. Compare with the mean of "
            "likelihood.nll(outputs, targets)."
        )

    def check(self, outputs: Tensor) -> None:
        """Raise if the outputs cannot be parameters of this family."""
        if outputs.ndim < (1 if self.numberwise else 2):
            raise GeometryError(
                "the likelihood needs outputs of shape (n, ..., c), samples in front and parameters last, found "
                f"{tuple(outputs.shape)}. Give the network a batch axis and an output axis (.unsqueeze(-1) for one output)."
            )
        if not outputs.is_floating_point():
            raise GeometryError(
                f"the likelihood needs real outputs, found {outputs.dtype}. Predictions such as argmax have no derivative; "
                "return what they were made of."
            )

    def takes(self, outputs: Tensor, targets: Tensor) -> bool | None:
        """Whether a tensor has the form of targets for these outputs; None: any form may be."""
        return None

    def check_targets(self, outputs: Tensor, targets: Any) -> None:
        """Raise if the targets do not fit the outputs or this family. Values are looked at where they can be read."""
        self.check(outputs)
        if targets is None:
            raise GeometryError(
                f"{type(self).__name__} was asked for a quantity that depends on the labels, and the data have none. Pass the "
                "data as (x, y), or use kind='exact', which needs no labels."
            )
        require_same_device(outputs, targets)


class RealTargets(Likelihood):
    """A family of one natural parameter an output, with a real target for each: targets have the shape of the outputs."""

    hessian_type = True
    numberwise = True

    def hessian(self, outputs: Tensor, targets: Any, t: Tensor) -> Tensor:
        self.real(outputs, targets)
        return self.fisher(outputs, t)

    def mean_factor(self, outputs_shape: Sequence[int]) -> float:
        return 1 / numbers_of_a_sample(outputs_shape)

    def real(self, outputs: Tensor, targets: Any) -> Tensor:
        """The targets in the dtype of the outputs; nothing is broadcast."""
        if not isinstance(targets, Tensor) or targets.shape != outputs.shape or targets.is_complex():
            raise GeometryError(
                f"{type(self).__name__} needs one real target for every output: outputs have shape {tuple(outputs.shape)}, the "
                f"targets are {described(targets)}. Broadcasting would pair samples with each other's targets; reshape them, "
                "e.g. y.unsqueeze(-1) or y.view_as(outputs)."
            )
        return targets.to(outputs.dtype)

    def takes(self, outputs: Tensor, targets: Tensor) -> bool | None:
        return targets.shape == outputs.shape and not targets.is_complex()

    def check_targets(self, outputs: Tensor, targets: Any) -> None:
        super().check_targets(outputs, targets)
        y = self.real(outputs, targets)
        if readable(y) and not holds(y.isfinite().all()):
            raise GeometryError(
                f"{int((~y.isfinite()).sum())} of {y.numel()} targets are not finite. The curvature would be nan throughout; "
                "drop these samples."
            )


def seeds_of(likelihood: Likelihood, outputs: Tensor, targets: Any = None) -> Seeds:
    """The seeds of a likelihood in portions, or all at once where it has a `root` (or `signs`) of its own."""
    kind = type(likelihood)
    if kind.root is not Likelihood.root or kind.signs is not Likelihood.signs:
        return Seeds.given(likelihood.root(outputs, targets), likelihood.signs(outputs, targets))
    _require_one_matrix(kind)
    return likelihood.seeds(outputs, targets)


def _require_one_matrix(kind: type[Likelihood]) -> None:
    """Refuse a family that changes A but inherits the root of another one: matrix-free and stored values would differ."""
    first = {name: next(c for c in kind.__mro__ if name in vars(c)) for name in ("seeds", "fisher", "hessian", "matrix")}
    source = first.pop("seeds")
    changed = [name for name, owner in first.items() if owner is not source and issubclass(owner, source)]
    if changed and source is not Likelihood:
        raise GeometryError(
            f"{kind.__name__} has a {changed[0]} of its own and inherits the root of {source.__name__}, which belongs to the "
            f"matrix there: stored matrices would be those of {source.__name__}, matrix-free ones those of {kind.__name__}. "
            "Define root(outputs, targets) too, or derive from Likelihood, whose root follows from fisher and hessian."
        )


def require_same_device(outputs: Tensor, targets: Any) -> None:
    """Refuse targets that are on another device."""
    if isinstance(targets, Tensor) and targets.device != outputs.device:
        raise GeometryError(
            f"the outputs are on {outputs.device}, the targets on {targets.device}. Move the data to the network, "
            f"y.to('{outputs.device}')."
        )


def described(targets: Any) -> str:
    """What the targets are, for messages."""
    if not isinstance(targets, Tensor):
        return f"a {type(targets).__name__}"
    return f"{str(targets.dtype).removeprefix('torch.')} of shape {tuple(targets.shape)}"


def readable(tensor: Tensor) -> bool:
    """True if values may be looked at: outside of transforms and of the compiler."""
    return not is_wrapped({"values": tensor})
