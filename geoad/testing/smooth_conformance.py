"""The suites that submersions, immersions and smooth maps of `geoad.maps` pass, for those that others write."""

from __future__ import annotations

import copy
import pickle
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from geoad.charts import Chart
from geoad.errors import ChartDomainError
from geoad.maps import Immersion, SmoothMap, Submersion
from geoad.params import Blocks, Layout
from geoad.testing.conformance import require
from geoad.testing.recipes import generic_blocks

__all__ = ["ImmersionConformance", "SmoothMapConformance", "SubmersionConformance"]


class SmoothMapConformance(ABC):
    """Mix-in for the tests of a user-made `geoad.maps.SmoothMap`: subclass it, give two things, inherit the suite.

    pytest collects subclasses whose names begin with Test; any other runner calls the methods ``test_...`` (or `run`). All
    points are points of ψ, for every ψ lies over a θ.

    Attributes:
        layout: names and shapes of the blocks of θ that the map is bound to; just one, unless the map is joint.
        tolerance: largest relative error, in float64, for a map that is well-conditioned at `point`.
    """

    layout: Mapping[str, Sequence[int]]
    tolerance: float = 1e-9

    @abstractmethod
    def make(self) -> Any:
        """A fresh recipe (not bound), with the same numbers each time."""

    def point(self, seed: int) -> Blocks:
        """A ψ inside of the domain. Default: entries with 0.1 < |ψ| < 0.9 of random sign."""
        return generic_blocks(self._bound().image_layout(), seed)

    def outside(self) -> Sequence[Blocks]:
        """Blocks of ψ that `outside_image` must refuse. Default: none."""
        return ()

    # -- the suite -------------------------------------------------------------------------------------------------------

    def test_products(self) -> None:
        """J v and Jᵀ w agree with the dense Jacobian of ψ ↦ θ by reverse mode; names and shapes are those of the layout."""
        bound, theta, psi = self._spaces()
        for seed, y in enumerate(self._points()):
            x, jacobian = bound.invert(y), self._jacobian(bound, y)
            found = Layout({name: block.shape for name, block in x.items()})
            require(found == theta, f"invert returns the blocks {found}, wanted are {theta}")
            v, w = self._direction(psi, seed), self._direction(theta, seed)
            self._close(theta, bound.push_inverse(x, y, v), jacobian @ psi.ravel(v), "push_inverse is not J v")
            self._close(psi, bound.pull_inverse(x, y, w), jacobian.mT @ theta.ravel(w), "pull_inverse is not Jᵀ w")

    def test_domain(self) -> None:
        """Points inside are accepted, those of `outside` are refused in words, and by the chart with `ChartDomainError`."""
        bound, theta, _ = self._spaces()
        for y in self._points():
            words = bound.outside_image(y)
            require(words is None, f"outside_image refuses a point of point(): {words}")
        for y in self.outside():
            words: Any = bound.outside_image(y)
            require(bool(words) and isinstance(words, str), f"outside_image returns {words!r} for a point of outside()")
            chart = Chart(theta, "x").reparametrize(self.make(), "psi").target
            try:
                chart.point(y)
            except ChartDomainError:
                continue
            raise AssertionError("a point of outside() was made in the chart")

    def test_transforms(self) -> None:
        """vmap over points agrees with a loop, and derivatives of all products of the law are finite."""
        bound, theta, psi = self._spaces()
        many, v = self._points(), self._direction(psi, 7)
        stacked = {name: torch.stack([y[name] for y in many]) for name in psi}
        images = torch.func.vmap(bound.invert)(stacked)
        pushed = torch.func.vmap(lambda y: bound.push_inverse(bound.invert(y), y, v))(stacked)
        for i, y in enumerate(many):
            x = bound.invert(y)
            self._close(theta, {n: b[i] for n, b in images.items()}, theta.ravel(x), "vmap of invert differs from a loop")
            expected = theta.ravel(bound.push_inverse(x, y, v))
            self._close(theta, {n: b[i] for n, b in pushed.items()}, expected, "vmap of push_inverse differs from a loop")

        def product(vector: Tensor) -> Tensor:
            y = psi.unravel(vector)
            return theta.ravel(bound.push_inverse(bound.invert(y), y, v))

        second: Any = torch.func.jacfwd(product)(psi.ravel(many[0]))
        require(bool(second.isfinite().all()), "the derivative of push_inverse is not finite")

    def test_precision(self) -> None:
        """float32 in, float32 out, and the same numbers to single precision."""
        bound, theta, _ = self._spaces()
        y = self.point(0)
        x = bound.invert({name: block.float() for name, block in y.items()})
        require(all(block.dtype == torch.float32 for block in x.values()), "invert of float32 blocks is not float32")
        exact = theta.ravel(bound.invert(y))
        gap = float((theta.ravel(x).double() - exact).norm())
        require(gap <= 1e-3 * max(float(exact.norm()), 1.0), "invert in float32 differs from invert in float64")

    def test_copies(self) -> None:
        """deepcopy and pickle give the same map, and two bindings of the recipe agree."""
        bound, theta, _ = self._spaces()
        y = self.point(0)
        expected = theta.ravel(bound.invert(y))
        for other in (copy.deepcopy(bound), pickle.loads(pickle.dumps(bound)), self._bound()):
            self._close(theta, other.invert(y), expected, "a copy of the map has other values")

    def test_chart(self) -> None:
        """As a chart: points of ψ are seen in θ, and pairings of θ-covectors and ψ-vectors agree in both."""
        _, theta, psi = self._spaces()
        home = Chart(theta, "x")
        chart = home.reparametrize(self.make(), "psi").target
        require(chart.layout == psi, f"the chart has the blocks {chart.layout}, the map {psi}")
        q = chart.point(self.point(0))
        v, w = chart.vector(self._direction(psi, 1), at=q), home.covector(self._direction(theta, 2), at=q.to(home))
        here, there = float(w(v.to(home))), float(w.to(chart)(v))
        scale = float(v.to(home).ravel().norm() * w.ravel().norm())
        require(abs(here - there) <= self.tolerance * max(scale, 1e-3), f"a pairing is {here:.12g} in θ, {there:.12g} in ψ")

    def run(self) -> None:
        """All tests of the suite, for other runners than pytest."""
        for name in dir(self):
            if name.startswith("test_"):
                getattr(self, name)()

    # -- helpers -----------------------------------------------------------------------------------------------------------

    def _bound(self) -> Any:
        bound = self.make().bind(Layout(self.layout))
        require(isinstance(bound, SmoothMap), f"make() gives a {type(bound).__name__}, which is no geoad.maps.SmoothMap")
        return bound.requires_grad_(False)

    def _spaces(self) -> tuple[Any, Layout, Layout]:
        bound = self._bound()
        return bound, Layout(self.layout), bound.image_layout()

    def _points(self) -> list[Blocks]:
        return [self.point(seed) for seed in range(3)]

    def _direction(self, layout: Layout, seed: int) -> Blocks:
        draws = torch.Generator().manual_seed(1000 + seed)
        return layout.unravel(torch.randn(layout.dim, generator=draws, dtype=torch.float64))

    def _jacobian(self, bound: Any, y: Blocks) -> Tensor:
        """∂θ/∂ψ by autodiff of `invert` alone."""
        theta, psi = bound.bound_layout(), bound.image_layout()
        result: Any = torch.func.jacrev(lambda flat: theta.ravel(bound.invert(psi.unravel(flat))))(psi.ravel(y))
        return result

    def _close(self, layout: Layout, found: Blocks, expected: Tensor, words: str) -> None:
        a, b = layout.ravel(found).detach(), expected.detach()
        error = float((a - b).norm()) / max(float(b.norm()), 1e-3)
        require(error <= self.tolerance, f"{words}: relative error {error:.2g}, allowed {self.tolerance:.2g}")

    def _full_rank(self, jacobian: Tensor, words: str) -> None:
        spectrum = torch.linalg.svdvals(jacobian)
        require(float(spectrum[-1]) > 1e-10 * float(spectrum[0]), f"{words}: the rank of its Jacobian is below {len(spectrum)}")


class SubmersionConformance(SmoothMapConformance):
    """Mix-in for the tests of a user-made `geoad.maps.Submersion`; see `SmoothMapConformance`.

    >>> import geoad
    >>> class TestSum(geoad.testing.SubmersionConformance):
    ...     layout = {"x": (3,)}
    ...     def make(self):
    ...         return geoad.maps.WeightNorm(None)
    >>> TestSum().run()
    """

    def without_section(self) -> Sequence[Blocks]:
        """Blocks of θ that have no section, which `outside_domain` must refuse. Default: none."""
        return ()

    def test_rank(self) -> None:
        """The map is a `Submersion` from more coordinates to fewer, of full rank."""
        bound, theta, psi = self._spaces()
        require(isinstance(bound, Submersion) and bound.law == "submersion", "the map is no geoad.maps.Submersion")
        require(psi.dim >= theta.dim, f"ψ has {psi.dim} coordinates, θ has {theta.dim}: no submersion")
        for y in self._points():
            self._full_rank(self._jacobian(bound, y), "the map is no submersion")

    def test_section(self) -> None:
        """π(section(θ)) = θ; what `without_section` gives is refused in words."""
        bound, theta, _ = self._spaces()
        for y in self._points():
            x = bound.invert(y)
            words = bound.outside_domain(x)
            require(words is None, f"outside_domain refuses the θ of a point of point(): {words}")
            self._close(theta, bound.invert(bound.forward(x)), theta.ravel(x), "invert(forward(x)) is not x")
        for x in self.without_section():
            words: Any = bound.outside_domain(x)
            require(bool(words) and isinstance(words, str), f"outside_domain returns {words!r} for a θ of without_section()")

    def test_lift(self) -> None:
        """`push` is the horizontal lift of the metric of the map, by dense linear algebra, and `pull` its transpose."""
        bound, theta, psi = self._spaces()
        for seed, y in enumerate(self._points()):
            x, lift = bound.invert(y), bound.horizontal(y)
            v, w = self._direction(theta, seed), self._direction(psi, seed)
            self._close(psi, bound.push(x, y, v), lift @ theta.ravel(v), "push is not the horizontal lift")
            self._close(theta, bound.pull(x, y, w), lift.mT @ psi.ravel(w), "pull is not the transpose of the horizontal lift")

    def test_near(self) -> None:
        """`near` lies over the θ it is asked for, is y over the θ of y, and leaves y in the direction of the lift."""
        bound, theta, psi = self._spaces()
        for seed, y in enumerate(self._points()):
            x, v = bound.invert(y), self._direction(theta, seed)
            self._close(psi, bound.near(x, y), psi.ravel(y), "near(π(y), y) is not y")

            def along(h: float, x: Blocks = x, y: Blocks = y, v: Blocks = v) -> tuple[Blocks, Blocks]:
                goal = {name: x[name] + h * v[name] for name in x}
                return goal, bound.near(goal, y)

            goal, moved = along(0.01)
            self._close(theta, bound.invert(moved), theta.ravel(goal), "near(x, y) does not lie over x")
            velocity = (psi.ravel(along(1e-5)[1]) - psi.ravel(along(-1e-5)[1])) / 2e-5
            lift = psi.ravel(bound.push(x, y, v))
            error = float((velocity - lift).norm()) / max(float(lift.norm()), 1e-3)
            require(error <= 1e-4, f"near does not leave y in the direction of the lift: {error:.2g} off")


class ImmersionConformance(SmoothMapConformance):
    """Mix-in for the tests of a user-made `geoad.maps.Immersion`; see `SmoothMapConformance`.

    Attributes:
        locates: the map finds ψ for a θ on its image.

    >>> import torch, geoad
    >>> class TestPlane(geoad.testing.ImmersionConformance):
    ...     layout = {"w": (2, 3), "b": (2,)}
    ...     def make(self):
    ...         return geoad.maps.Subspace(3, generator=torch.Generator().manual_seed(0))
    >>> TestPlane().run()
    """

    locates: bool = True

    def test_rank(self) -> None:
        """The map is an `Immersion` from fewer coordinates to more, whose Jacobian is one to one."""
        bound, theta, psi = self._spaces()
        require(isinstance(bound, Immersion) and bound.law == "immersion", "the map is no geoad.maps.Immersion")
        require(psi.dim <= theta.dim, f"ψ has {psi.dim} coordinates, θ has {theta.dim}: no immersion")
        for y in self._points():
            self._full_rank(self._jacobian(bound, y), "the map is no immersion")

    def test_left_inverse(self) -> None:
        """`push` takes J v back to v, and `pull` is its transpose."""
        bound, theta, psi = self._spaces()
        for seed, y in enumerate(self._points()):
            x, jacobian = bound.invert(y), self._jacobian(bound, y)
            v, w, u = self._direction(psi, seed), self._direction(psi, seed + 10), self._direction(theta, seed)
            tangent = theta.unravel(jacobian @ psi.ravel(v))
            self._close(psi, bound.push(x, y, tangent), psi.ravel(v), "push does not take J v back to v")
            one = torch.dot(theta.ravel(bound.pull(x, y, w)), theta.ravel(u))
            other = torch.dot(psi.ravel(w), psi.ravel(bound.push(x, y, u)))
            require(
                abs(float(one - other)) <= self.tolerance * max(abs(float(other)), 1.0), "pull is not the transpose of push"
            )

    def test_locate(self) -> None:
        """The ψ of a θ on the image is found, and a θ that is off the image is refused in words."""
        if not self.locates:
            return
        bound, theta, psi = self._spaces()
        for y in self._points():
            x, jacobian = bound.invert(y), self._jacobian(bound, y)
            words = bound.outside_domain(x)
            require(words is None, f"outside_domain refuses a point of the image: {words}")
            self._close(psi, bound.forward(x), psi.ravel(y), "forward(invert(y)) is not y")
            if psi.dim < theta.dim:
                normal = torch.linalg.svd(jacobian).U[:, psi.dim]
                off: Any = bound.outside_domain(theta.unravel(theta.ravel(x) + 1e-3 * normal))
                require(bool(off) and isinstance(off, str), f"outside_domain returns {off!r} for a θ that is off the image")
