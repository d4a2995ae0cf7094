"""The outputs of a network over a data set as a space of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from geoad.charts import Chart, Point, same_manifold
from geoad.curvature.likelihoods import Likelihood, likelihood_of
from geoad.curvature.selection import selecting
from geoad.data import Batches
from geoad.errors import ChartMismatchError, GeometryError
from geoad.fields import Transition
from geoad.function_space.derivative import Derivative
from geoad.function_space.jacobian import Jacobian
from geoad.function_space.metric import OutputMetric
from geoad.kernels import products
from geoad.kernels.layered import Outputs
from geoad.kernels.memory import bytes_of
from geoad.params import Blocks, is_wrapped
from geoad.tangent.data import Data, require_length, space_of
from geoad.tensors import describe

if TYPE_CHECKING:
    from geoad.module import GeoModule

__all__ = ["FunctionSpace", "at_home"]


class FunctionSpace:
    r"""The space of the outputs f(θ) = (f(x₁; θ), ..., f(x_N; θ)) of a network over a data set, and the map θ ↦ f(θ) into it.

    Its chart has the components (N, ..., c). Directions f moves along, residuals and gradients with respect to the outputs are
    ordinary typed objects there:

    >>> import torch, geoad
    >>> geo = geoad.GeoModule(torch.nn.Linear(2, 3))
    >>> x, y = torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1])
    >>> space = geoad.FunctionSpace(geo, x)
    >>> p = geo.point()
    >>> J = space.jacobian(p)
    >>> J
    Jacobian([outputs^, theta_], (15, 9), float32, cpu)
    >>> loss = space.chart.scalar_field(lambda f: torch.nn.functional.cross_entropy(f, y))
    >>> slope = J.pullback(geoad.grad(loss)(space(p)))
    >>> whole = geoad.grad(geo.loss(torch.nn.functional.cross_entropy, (x, y)))(p)
    >>> torch.allclose(slope.ravel(), whole.ravel(), atol=1e-6)
    True

    ``space(p)`` is the point f(p). A plain dict of reference coordinates gives the plain outputs, so that ``geoad.jacobian``,
    ``geoad.pullback(space, field)`` and the like take the space for the map.

    Args:
        geo: the network.
        data: (x, y), x alone as a tensor, a mapping, a list of batches or a ``DataLoader`` that does not shuffle; targets are
            left aside.
        outputs: which function of the network's outputs is meant: indices of classes, a `Difference`, or a callable.
        max_memory: bytes that intermediate results, and what is kept for further products at a point, may take. A dense
            Jacobian is made by portions of the samples, and of the outputs of one; products go batch by batch.

    Raises:
        GeometryError: a loader that yields the samples in another order every time, or outputs whose samples do not come first.
    """

    def __init__(self, geo: GeoModule, data: Any, *, outputs: Any = None, max_memory: int = 1 << 30) -> None:
        if not callable(getattr(geo, "evaluate", None)):
            raise GeometryError(
                f"a function space belongs to a network, found {type(geo).__name__}. Pass the geoad.GeoModule; bare networks "
                "have no chart."
            )
        self.geo, self.max_memory = geo, bytes_of(max_memory)
        self._select = outputs
        self.data = Data(geo, data, None if outputs is None else selecting(outputs))
        self._chart: Chart | None = None

    def __repr__(self) -> str:
        shape = "" if self._chart is None else f", shape={tuple(self.shape)}"
        return f"FunctionSpace({type(self.geo.wrapped).__name__}{shape})"

    # -- the space -----------------------------------------------------------------------------------------------------------

    @property
    def batches(self) -> Batches:
        """The data."""
        return self.data.batches

    @property
    def chart(self) -> Chart:
        """The chart of the outputs, one block (N, ..., c); the same one for the same network, data and selection."""
        if self._chart is None:
            size, inputs, _ = next(self.batches.sized())
            with torch.no_grad():
                f = self.evaluate(self.geo.point().to(self.geo.reference).blocks, inputs)
            require_length(f, size)
            self._chart = space_of(self.geo, self.data.source, (self.data.meaning, "none"), (self.batches.total, *f.shape[1:]))
            self._chart.about = f"the outputs of a {type(self.geo.wrapped).__name__} over {self.batches.total} samples"
        return self._chart

    @property
    def shape(self) -> torch.Size:
        """(N, ..., c)."""
        return self.chart.layout[self.chart.layout.names[0]]

    def evaluate(self, theta: Blocks, inputs: Any) -> Tensor:
        """The outputs of a batch at the reference coordinates."""
        return self.data.evaluate(theta, inputs)

    def __call__(self, p: Any) -> Any:
        """f(p), a `Point` of the space; of plain reference coordinates the plain outputs (N, ..., c)."""
        if not isinstance(p, Point):
            return self._plain(p)
        theta = self._require_mine(p).to(self.geo.reference).blocks
        if not p.batch_shape and not is_wrapped(theta):
            return self.chart.point(self.data.values(theta))
        return self.chart.point(products.batched(self._plain, len(p.batch_shape))(theta))

    def _plain(self, theta: Any) -> Tensor:
        self.data.require_separate_samples()
        return torch.cat([self.evaluate(theta, inputs) for _, inputs, _ in self.batches.sized()])

    def _require_mine(self, p: Point) -> Point:
        if same_manifold(p.chart, self.geo.reference):
            return p
        raise ChartMismatchError(
            f"the outputs were asked for at a point in chart '{p.chart.name}' of another manifold than this network's. Pass "
            "geo.point(), or a point in a chart made from geo.reference by reparametrize."
        )

    # -- the map -------------------------------------------------------------------------------------------------------------

    def jacobian(self, p: Point) -> Jacobian:
        """The Jacobian at p, a two-point tensor of type [outputs^, θ_] with `pushforward` and `pullback`; matrix-free.

        In coordinates that cannot be undone (below an immersion) it is the Jacobian of the network as a function of these.
        """
        if not isinstance(p, Point):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise GeometryError(
                f"the Jacobian was asked for at {describe(p)}. It is a tensor at a point of the network: pass geo.point(), or "
                "theta.point(components); for plain numbers there is torch.func.jacrev(space)."
            )
        self._require_mine(p)
        if p.batch_shape:
            raise GeometryError(
                f"the Jacobian was asked for at a batch of points, {tuple(p.batch_shape)}. It is a matrix-free object at one "
                "point; go through them: [space.jacobian(q) for q in p]."
            )
        image = self(p)
        home, outputs = at_home(self.evaluate, p, self.geo.reference)
        derivative = Derivative(outputs, self.batches, home.blocks, self.shape, self.max_memory)
        return Jacobian(derivative, p, home, image)

    # -- metrics -------------------------------------------------------------------------------------------------------------

    def metric(self, likelihood: str | Likelihood = "categorical", reduction: str = "mean") -> OutputMetric:
        r"""The Fisher metric of a likelihood on the outputs: a metric field whose value at f is w ⊕_n A(f_n).

        Its pull-back by the Jacobian is ``geoad.curvature.Fisher(geo, data, likelihood, reduction=reduction)``.

        Args:
            likelihood: "categorical", "bernoulli", "gaussian", "poisson", or a `Likelihood`.
            reduction: "mean" (w = 1/N) or "sum" (w = 1).

        >>> import torch, geoad
        >>> geo = geoad.GeoModule(torch.nn.Linear(2, 3))
        >>> space = geoad.FunctionSpace(geo, torch.randn(5, 2))
        >>> A = space.metric("gaussian")(space(geo.point()))
        >>> A.sharp(A.flat(space.chart.vector(torch.ones(5, 3), at=A.at))).components.allclose(torch.ones(5, 3))
        True
        """
        if reduction not in ("mean", "sum"):
            raise GeometryError(f"reduction={reduction!r} is not offered. Available: 'mean' and 'sum' over the samples.")
        return OutputMetric(self.chart, likelihood_of(likelihood), 1 / self.shape[0] if reduction == "mean" else 1.0)


def at_home(evaluate: Outputs, p: Point, reference: Chart) -> tuple[Point, Outputs]:
    """Where derivatives at p are computed, and the outputs as a function there.

    That is the reference chart, unless covectors would have no law on the way back from p.
    """
    home = p.chart.ground
    if home == reference:
        return p.to(reference), evaluate
    way = Transition(home, reference)
    return p.to(home), lambda x, inputs: evaluate(way(x), inputs)
