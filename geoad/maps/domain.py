"""The domain of a chart or a map: conditions in words, each with a predicate on plain components."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from geoad.errors import GeometryError

__all__ = ["Domain", "DomainLike"]

Predicate = Callable[[Any], Any]
DomainLike = Predicate | Mapping[str, Predicate]


class Domain:
    r"""An open set of coordinates, :math:`U = \{x : c_1(x), c_2(x), \ldots\}`.

    Args:
        conditions: ``{words: predicate}``, for instance ``{"sigma > 0": lambda x: x["sigma"] > 0}``, or one predicate, whose
            name stands for the words. A predicate takes the plain components of a single point and gives a bool, a tensor of
            bools (all of which must hold), or None or the violated condition as a string.

    To be pickled with its chart, a predicate has to be a function of a module.

    >>> import torch
    >>> Domain({"x > 0": lambda x: x > 0}).violated(torch.tensor([1.0, -2.0]))
    'x > 0 (violated by 1 of 2 entries)'
    """

    def __init__(self, conditions: DomainLike) -> None:
        if not isinstance(conditions, Mapping):
            conditions = {getattr(conditions, "__name__", type(conditions).__name__): conditions}
        self.conditions: dict[str, Predicate] = dict(conditions)
        for words, predicate in self.conditions.items():
            if not callable(predicate):
                raise GeometryError(
                    f"the condition '{words}' of a domain is a {type(predicate).__name__}, not a function. A domain is asked "
                    "whether coordinates lie in it; pass {'sigma > 0': lambda x: x['sigma'] > 0}, or one function."
                )

    @staticmethod
    def of(conditions: DomainLike | Domain | None) -> Domain | None:
        """`conditions` as a `Domain`; None is everything."""
        return conditions if conditions is None or isinstance(conditions, Domain) else Domain(conditions)

    def violated(self, components: Any) -> str | None:
        """The first violated condition in words, None inside of the domain. Reads values."""
        for words, predicate in self.conditions.items():
            answer = predicate(components)
            if answer is None or answer is True:
                continue
            if isinstance(answer, str):
                return answer
            if isinstance(answer, Tensor) and answer.ndim:
                holds = answer.bool()
                if not bool(holds.all()):
                    return f"{words} (violated by {int((~holds).sum())} of {holds.numel()} entries)"
            elif not bool(answer):
                return words
        return None

    def __repr__(self) -> str:
        return f"Domain({', '.join(self.conditions)})"
