"""The named types with two indices: Form, Metric, Cometric, Endomorphism."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geoad import operators as ops
from geoad.charts import Chart, Point, flat_reference, same_space
from geoad.errors import GeometryError, SingularMetricError, VarianceError
from geoad.operators import CG, LinearOperator
from geoad.operators.eigen import order
from geoad.operators.solve import working
from geoad.params import is_wrapped
from geoad.tensors.base import HANDLERS, Axis, TypedTensor, describe, require_same_numbers, require_same_place
from geoad.tensors.densities import Density, LogDensity
from geoad.tensors.general import GeoTensor
from geoad.tensors.pairing import evaluate
from geoad.tensors.rank1 import Covector, Rank1, Vector
from geoad.tensors.rank2 import CLASSES, Rank2, for_batch

__all__ = [
    "Cometric",
    "DualEndomorphism",
    "Endomorphism",
    "Form",
    "HorizontalMetric",
    "InnerProduct",
    "Metric",
    "reference_metric",
    "seen_from",
]


class _Bilinear(Rank2):
    """Two indices of the same variance."""

    __slots__ = ()

    def __call__(self, u: Rank1, v: Rank1) -> Tensor:
        """B(u, v) = uᵀ B v, an invariant scalar."""
        return evaluate(self, u, v)

    def slogdet(self) -> tuple[Tensor, LogDensity]:
        """The sign and the logarithm of |det B|, a `LogDensity` of weight 2 (of weight -2 for upper indices)."""
        self.require_own_space("the determinant")
        sign, logabsdet = ops.slogdet(self.op)
        here = self.at.to(self.home)
        return sign, LogDensity(self.home, logabsdet, self._det_weight(), here).to(self.chart)

    def logdet(self) -> LogDensity:
        """log det B, a `LogDensity`: only differences like B.logdet() - G.logdet() are numbers. -inf if B is singular."""
        sign, result = self.slogdet()
        _require_not_negative(self, sign)
        return result

    def det(self) -> Density:
        """det B, a `Density` of weight 2 (of weight -2 for upper indices): it moves by |det J⁻¹|^weight."""
        self.require_own_space("the determinant")
        sign, logabsdet = ops.slogdet(self.op)
        here = self.at.to(self.home)
        return Density(self.home, sign * logabsdet.exp(), self._det_weight(), here).to(self.chart)

    def _det_weight(self) -> float:
        return -2 if self.ups[0] else 2

    def cholesky(self) -> GeoTensor:
        """A factor C of type [_,F] with C Cᵀ = B ([^,F] for upper indices): `F` is a frame axis.

        A gauge: C is natural up to an orthogonal map of F. It is computed where the form was made and moved, so that it is the
        same object in every chart.

        Raises:
            SingularMetricError: the tensor is not symmetric and positive definite.
        """
        return self._factor(invert=False)

    def inverse_sqrt(self) -> GeoTensor:
        """A factor of type [^,F] with C Cᵀ = B⁻¹ ([_,F] for upper indices): its columns are a B-orthonormal frame.

        See `cholesky`.
        """
        return self._factor(invert=True)

    def _factor(self, invert: bool) -> GeoTensor:
        ops.require_small(self.op, "a Cholesky factor")
        matrix = ops.densify(self.op).matrix
        if not self.op.symmetric and not is_wrapped({"": matrix}) and not ops.is_symmetric(matrix):
            raise SingularMetricError(
                f"{describe(self)} is not symmetric, so it has no Cholesky factor. Symmetrise it: 0.5 * (B + B.mT)."
            )
        dtype, matrix = matrix.dtype, working(matrix)
        size, lower = ops.scaled_cholesky(matrix)
        factor = size.unsqueeze(-1) * lower
        if invert:
            eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
            factor = torch.linalg.solve_triangular(factor.mT, eye, upper=True)
        axes = [Axis(self.home, self.ups[0] != invert, self.home.dim), Axis(None, True, self.home.dim)]
        return GeoTensor(factor.to(dtype), axes, self.at.to(self.home)).to(self.chart)

    def _no_metric(self, what: str) -> VarianceError:
        kind = "(2,0)" if self.ups[0] else "(0,2)"
        return VarianceError(
            f"{what} of a {describe(self)}, a {kind} tensor: with respect to which metric? The number depends on the "
            "chart unless "
            f"a metric turns it into an endomorphism first. Say G.trace(B), geoad.eigh(B, metric=G), or "
            "(G.inverse() @ B).trace() / .eigenvalues() / .det()."
        )

    def trace(self, *_: Any) -> Any:
        """Refused: needs a metric."""
        raise self._no_metric("the trace")

    def eigenvalues(self, k: int | None = None, which: str = "largest") -> Any:
        """Refused: needs a metric."""
        raise self._no_metric("the eigenvalues")


class Form(_Bilinear):
    """A bilinear form B_ij: a Hessian, a Gauss-Newton matrix, the second moment of gradients. Type (0,2)."""

    __slots__ = ()
    kind = (False, False)

    def solve(self, w: Covector, damping: float | Tensor = 0.0, *, method: CG | None = None) -> Vector:
        """v with (B + λ R) v = ω, where R is the *reference* metric (it moves along, so λ means the same in every chart).

        Raises:
            SingularMetricError: no unique solution; for a `Metric` also if it is not positive definite.
        """
        if getattr(w, "type", None) != (0, 1):
            raise VarianceError(
                f"cannot solve with {describe(self)} for {describe(w)}: B v = ω has a covector on the right. Pass the "
                "differential geoad.grad(L)(p); for a vector use B.mv(v)."
            )
        require_same_place(self, w, "solve")
        form = self.damped(damping)
        positive = isinstance(self, Metric)
        right = w.to(form.home)
        try:
            solution = ops.solve(for_batch(form, right.blocks), right.blocks, positive=positive, method=method)
        except SingularMetricError as error:
            raise _below_a_map(error, form.home) from error
        except RuntimeError as error:
            require_same_numbers(self, w, "solve", error)
            raise
        return Vector(form.home, solution, right.at).to(self.chart)

    def damped(self, damping: float | Tensor) -> Any:
        """B + λ · reference metric."""
        if isinstance(damping, (int, float)) and damping == 0:
            return self
        if isinstance(damping, (int, float)) and damping < 0:
            raise GeometryError(f"damping must be at least 0, got {damping}. Subtract a metric explicitly: B - lam * G.")
        return self + damping * reference_metric(self)

    def inverse(self, damping: float | Tensor = 0.0) -> Any:
        """The (2,0) tensor B⁻¹ (with damping: (B + λ R)⁻¹)."""
        form = self.damped(damping)
        return form._like(ops.inverse(form.op, positive=isinstance(self, Metric)), cls=Cometric)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Vector:
        """n vectors from the Gaussian N(0, B⁻¹) on the tangent space, as a batch; B is positive definite.

        Drawn where the form was made and moved: the same state of the generator gives the same vectors in every chart.

        Raises:
            SingularMetricError: the form is not positive definite.
        """
        return HANDLERS["sample"](self, n, generator)

    def power(self, p: float, metric: Any = None) -> Any:
        """R (R⁻¹B)^p, a form, for a symmetric B and a metric R (default: the reference metric): B² is B R⁻¹ B, B⁰ is R.

        In the structure of B if R is a multiple of the identity where B was made, else dense. Real p need a positive B.

        Raises:
            SingularMetricError: B is singular with p < 0, or has a negative eigenvalue and p is not an integer.
        """
        return HANDLERS["power"](self, p, metric)


class InnerProduct(Form):
    """What `Metric` and `HorizontalMetric` share: a symmetric form that measures vectors and turns them into covectors."""

    __slots__ = ()

    def flat(self, v: Vector) -> Covector:
        """The covector G(v, ·); zero for a vertical v."""
        return self.mv(v)

    def sharp(self, w: Covector, damping: float | Tensor = 0.0) -> Vector:
        """The vector G⁻¹ω: the gradient that belongs to the differential ω. Horizontal, in redundant coordinates."""
        return self.solve(w, damping)

    def norm(self, v: Rank1) -> Tensor:
        """√G(v, v), in redundant coordinates the length of the horizontal part; for a covector √G⁻¹(ω, ω)."""
        if isinstance(v, Covector):
            return v(self.sharp(v)).clamp_min(0).sqrt()
        return self(v, v).clamp_min(0).sqrt()

    def trace(self, form: Any = None, *_: Any) -> Tensor:
        """tr G⁻¹B of a form B: the trace with respect to this metric, an invariant scalar."""
        if not isinstance(form, Form):
            raise self._no_metric("the trace")
        return (self.inverse() @ form).trace()

    def inner(self, a: Form, b: Form) -> Tensor:
        """The inner product of two forms, G^ik G^jl A_ij B_kl = tr G⁻¹A G⁻¹Bᵀ, an invariant scalar."""
        return HANDLERS["inner"](self, a, b)

    def frobenius(self, form: Form) -> Tensor:
        """The norm of a form, √tr G⁻¹B G⁻¹Bᵀ: the Frobenius norm in any G-orthonormal frame."""
        return self.inner(form, form).clamp_min(0).sqrt()


class Metric(InnerProduct):
    """A Riemannian metric at a point: a symmetric, positive (semi)definite `Form`. Type (0,2).

    Fisher and Gauss-Newton metrics are often only semidefinite; `sharp` and `solve` then raise `SingularMetricError`.
    """

    __slots__ = ()


class HorizontalMetric(InnerProduct):
    r"""A metric seen in redundant coordinates ψ, :math:`J^\top G J` for a submersion π: ψ ↦ θ. Type (0,2).

    It is semidefinite: vertical directions, along which the network does not change, have length 0. `sharp`, `solve`,
    `norm` and `trace` take place in the horizontal space, which π maps one to one to the tangent space of θ:
    ``G.sharp(w)`` is the horizontal lift of G⁻¹ω for a basic ω, the solution with the least norm. Its determinant vanishes;
    see `geoad.quotient_logdet`.
    """

    __slots__ = ()


class Cometric(_Bilinear):
    """A (2,0) tensor C^ij: an inverse metric, a posterior covariance. Moves by J C Jᵀ."""

    __slots__ = ()
    kind = (True, True)

    def inverse(self) -> Any:
        """The (0,2) tensor C⁻¹."""
        return self._like(ops.inverse(self.op), cls=Metric if self.op.definite else Form)

    def solve(self, v: Vector) -> Covector:
        """ω with C ω = v."""
        if getattr(v, "type", None) != (1, 0):
            raise VarianceError(
                f"cannot solve with {describe(self)} for {describe(v)}: C ω = v has a vector on the right. For a covector "
                "use C.mv(w)."
            )
        return self.inverse().mv(v)

    def norm(self, w: Covector) -> Tensor:
        """√C(ω, ω)."""
        return self(w, w).clamp_min(0).sqrt()


class _Mixed(Rank2):
    """One upper and one lower index: trace, determinant and eigenvalues are invariant."""

    __slots__ = ()

    def __call__(self, v: Rank1) -> Any:
        """E v."""
        return self.mv(v)

    def trace(self) -> Tensor:
        """tr E, a scalar."""
        return ops.trace(self.op)

    def det(self) -> Tensor:
        """det E, a scalar."""
        sign, logabsdet = self.slogdet()
        return sign * logabsdet.exp()

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """(sign, log |det E|), scalars."""
        self.require_own_space("the determinant")
        return ops.slogdet(self.op)

    def logdet(self) -> Tensor:
        """log det E, a scalar; -inf if E is singular.

        Raises:
            SingularMetricError: the determinant is negative.
        """
        sign, logabsdet = self.slogdet()
        _require_not_negative(self, sign)
        return torch.where(sign < 0, torch.full_like(logabsdet, torch.nan), logabsdet)

    def eigenvalues(self, k: int | None = None, which: str = "largest") -> Tensor:
        """Eigenvalues, descending (``which`` = "largest", "smallest" or "magnitude"); the first k only if `k` is given.

        Real for E = G⁻¹B with a symmetric form B, else complex in general. In redundant coordinates the spectrum has a
        zero for each vertical direction besides.
        """
        values = ops.eigvals(self.op, k, which)
        vertical = self.chart.dim - self.home.dim
        return values if vertical == 0 else _with_zeros(values, vertical, k, which)

    def inverse(self) -> Any:
        """E⁻¹."""
        self.require_own_space("the inverse")
        return self._like(ops.inverse(self.op))

    def solve(self, v: Any) -> Any:
        """x with E x = v."""
        if not isinstance(v, Rank1) or v.up != self.ups[0]:
            kind, other = ("Vector", "covector") if self.ups[0] else ("Covector", "vector")
            raise VarianceError(
                f"cannot solve with {describe(self)} for {describe(v)}: E x = v has a {kind} on both sides. Use "
                "metric.sharp or "
                f"metric.flat on a {other} first."
            )
        require_same_place(self, v, "solve")
        right = v.to(self.home)
        return type(v)(self.home, ops.solve(for_batch(self, right.blocks), right.blocks), right.at).to(self.chart)


class Endomorphism(_Mixed):
    """A linear map E^i_j of the tangent space, e.g. E = G⁻¹H. Type (1,1); trace, det and eigenvalues are invariant."""

    __slots__ = ()
    kind = (True, False)


class DualEndomorphism(_Mixed):
    """A linear map A_i^j of the cotangent space, e.g. the transpose of an `Endomorphism`, or B G⁻¹. Type (1,1)."""

    __slots__ = ()
    kind = (False, True)


CLASSES.update({(False, False): Form, (True, True): Cometric, (True, False): Endomorphism, (False, True): DualEndomorphism})


def _with_zeros(values: Tensor, count: int, k: int | None, which: str) -> Tensor:
    """Eigenvalues together with `count` zeros, in the order of `which`."""
    zeros = values.new_zeros((*values.shape[:-1], count if k is None else min(count, k)))
    joined = torch.cat([values, zeros], -1)
    return joined.gather(-1, order(joined, which)[..., : k or joined.shape[-1]])


def _require_not_negative(tensor: TypedTensor, sign: Tensor) -> None:
    if not is_wrapped({"": sign}) and bool((sign < 0).any()):
        raise SingularMetricError(
            f"the determinant of this {describe(tensor)} is negative, so its logarithm is not real. At a saddle point use "
            ".slogdet(), which gives the sign and log |det|; for a posterior check that the point is a minimum."
        )


def _below_a_map(error: SingularMetricError, home: Chart) -> SingularMetricError:
    """The error, with what helps where the reference metric is singular itself."""
    space = home.space
    if space.parent is None:
        return error
    return SingularMetricError(
        f"{error} In chart '{home.name}', below a map that need not be one to one, the reference metric may be singular too; "
        f"a metric of the chart itself is not: G + lam * geoad.metrics.Euclidean({space.name})(p)."
    )


def reference_metric(tensor: TypedTensor) -> Metric:
    """The Euclidean metric of the reference chart, at the point and in the chart of `tensor`.

    In redundant coordinates it is a `HorizontalMetric`, under an immersion the induced metric.
    """
    home = flat_reference(tensor.chart, "the default metric (of damping, of gradients)", "metric + lam * another_metric at p")
    one = torch.ones((), dtype=tensor.dtype, device=tensor.device)
    return seen_from(Metric, home, ops.Multiple(home.layout, one, definite=True), tensor.at)


def seen_from(cls: Any, home: Chart, op: LinearOperator, at: Point) -> Any:
    """The object with the operator `op` in chart `home`, seen in the chart of `at`."""
    if same_space(home, at.chart):
        return cls(at.chart, op, at, home=home)
    return cls(home, op, at.to(home)).to(at.chart)
