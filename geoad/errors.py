"""The one family of exceptions of geoad.

Every message has four parts: what was asked, what was found (both sides), why it matters, and the call that mends it.
None of the classes derives from ``TypeError``: PyTorch's binary operators turn a ``TypeError`` that is raised in
``__torch_function__`` into ``NotImplemented`` and the message would be lost.
"""

from __future__ import annotations

__all__ = [
    "BasePointError",
    "ChartDomainError",
    "ChartMismatchError",
    "GeometryError",
    "NotADiffeomorphismError",
    "SingularMetricError",
    "StructureNotPreservedError",
    "UnsupportedModuleError",
    "VarianceError",
]


class GeometryError(Exception):
    """Base class of all errors that geoad raises on purpose."""


class VarianceError(GeometryError):
    """The operation has no meaning for these tensor types (a vector plus a covector, the trace of a bilinear form)."""


class ChartMismatchError(GeometryError):
    """Two objects are written in different charts, or in charts of different manifolds."""


class BasePointError(GeometryError):
    """Two objects live at different points of the manifold, or a base point is missing or out of date."""


class ChartDomainError(GeometryError):
    """A point lies outside the domain of a chart."""


class NotADiffeomorphismError(GeometryError):
    """The map is not invertible and smooth both ways, so this object has no law under it."""


class SingularMetricError(GeometryError):
    """A metric is singular or indefinite where its inverse is needed."""


class StructureNotPreservedError(GeometryError):
    """The asked representation does not survive this map."""


class UnsupportedModuleError(GeometryError):
    """The module cannot be differentiated in the asked way."""
