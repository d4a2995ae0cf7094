"""The suite that every map of `geoad.maps` passes, for maps that others write."""

from __future__ import annotations

import copy
import pickle
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from geoad.charts import Chart
from geoad.errors import ChartDomainError, GeometryError
from geoad.maps.base import Map
from geoad.maps.select import bind
from geoad.params import Blocks, Layout
from geoad.testing.recipes import dense_jacobian, generic_blocks

__all__ = ["DiffeomorphismConformance", "require"]


class DiffeomorphismConformance(ABC):
    """Mix-in for the tests of a user-made `geoad.maps.Diffeomorphism`: subclass it, give two things, inherit the suite.

    pytest collects subclasses whose names begin with Test; any other runner calls the methods ``test_...`` (or `run`).

    Attributes:
        layout: names and shapes of the blocks that the map is bound to (float64 numbers).
        tolerance: largest relative error, in float64, for a map that is well-conditioned at `point`.

    >>> import geoad
    >>> class TestCube(geoad.testing.DiffeomorphismConformance):
    ...     layout = {"x": (2, 3)}
    ...     def make(self):
    ...         return geoad.maps.Power(3.0)
    ...     def outside(self):
    ...         return [{"x": torch.zeros(2, 3)}]
    >>> import torch
    >>> TestCube().run()
    """

    layout: Mapping[str, Sequence[int]]
    tolerance: float = 1e-9

    @abstractmethod
    def make(self) -> Map:
        """A fresh recipe (not bound), with the same numbers each time."""

    def point(self, seed: int) -> Blocks:
        """A point inside of the domain. Default: entries with 0.1 < |x| < 0.9 of random sign."""
        return generic_blocks(Layout(self.layout), seed)

    def outside(self) -> Sequence[Blocks]:
        """Points that `outside_domain` must refuse. Default: none."""
        return ()

    # -- the suite -------------------------------------------------------------------------------------------------------

    def test_inverse(self) -> None:
        """φ⁻¹(φ(x)) = x and φ(φ⁻¹(y)) = y; names, shapes and order of the blocks are kept."""
        bound = self._bound()
        for x in self._points():
            y = bound.forward(x)
            found = Layout({name: block.shape for name, block in y.items()})
            require(found == bound.bound_layout(), f"forward returns the blocks {found}, wanted are {bound.bound_layout()}")
            self._close(bound.invert(y), x, "invert(forward(x)) is not x")
            self._close(bound.forward(bound.invert(y)), y, "forward(invert(y)) is not y")

    def test_products(self) -> None:
        """The four Jacobian products agree with the dense Jacobian of `forward` by reverse mode."""
        bound, layout = self._bound(), Layout(self.layout)
        for seed, x in enumerate(self._points()):
            y, v = bound.forward(x), self._direction(seed)
            jacobian = dense_jacobian(bound, x)
            inverse = torch.linalg.inv(jacobian)
            flat = layout.ravel(v)
            for product, matrix, words in (
                (bound.push, jacobian, "push is not J v"),
                (bound.pull, jacobian.mT, "pull is not Jᵀ w"),
                (bound.push_inverse, inverse, "push_inverse is not J⁻¹ v"),
                (bound.pull_inverse, inverse.mT, "pull_inverse is not J⁻ᵀ w"),
            ):
                self._close(product(x, y, v), layout.unravel(matrix @ flat), words)

    def test_log_abs_det(self) -> None:
        """log |det J| is a scalar and that of the dense Jacobian."""
        bound = self._bound()
        for x in self._points():
            found = bound.log_abs_det(x, bound.forward(x))
            expected = torch.linalg.slogdet(dense_jacobian(bound, x)).logabsdet
            require(found.shape == (), f"log_abs_det returns the shape {tuple(found.shape)}, wanted is a scalar")
            gap = abs(float(found - expected))
            require(
                gap <= self.tolerance * max(1.0, abs(float(expected))),
                f"log_abs_det is {float(found):.12g}, slogdet of the Jacobian of forward gives {float(expected):.12g}",
            )

    def test_domain(self) -> None:
        """Points inside pass both checks; what `outside` gives is refused in words; what is not refused comes back finite."""
        bound = self._bound()
        for x in self._points():
            require(bound.outside_domain(x) is None, f"outside_domain refuses a point of point(): {bound.outside_domain(x)}")
            found = bound.outside_image(bound.forward(x))
            require(found is None, f"outside_image refuses a value of forward: {found}")
        for x in self.outside():
            words: Any = bound.outside_domain(x)
            require(bool(words), "outside_domain accepts a point of outside()")
            require(isinstance(words, str), f"outside_domain returns {words!r}, wanted are words or None")
        for x in self._far_points():
            self._check_far(bound, x)

    def test_flags(self) -> None:
        """`elementwise`, `blockwise`, `monomial` and `linear` say the truth: transport of structure relies on them."""
        bound, layout = self._bound(), Layout(self.layout)
        matrices = [dense_jacobian(bound, x) for x in self._points()]
        for matrix in matrices:
            entries = matrix.abs() > 1e-12 * matrix.abs().max()
            if bound.elementwise:
                require(torch.equal(entries, entries.diagonal().diag()), "elementwise=True, but J is not diagonal")
            if bound.monomial:
                one = bool((entries.sum(0) == 1).all()) and bool((entries.sum(1) == 1).all())
                require(one, "monomial=True, but J has not one entry in each row and column")
            if bound.blockwise:
                for name, where in layout.offsets().items():
                    others = torch.ones(layout.dim, dtype=torch.bool)
                    others[where] = False
                    require(not bool(entries[where][:, others].any()), f"blockwise=True, but block '{name}' depends on others")
            if bound.linear:
                same = float((matrix - matrices[0]).abs().max()) <= self.tolerance * float(matrix.abs().max())
                require(same, "linear=True, but J depends on the point")

    def test_transforms(self) -> None:
        """vmap over points agrees with a loop, and second derivatives of the map and its products are finite."""
        bound, layout = self._bound(), Layout(self.layout)
        many, v = self._points(), self._direction(7)
        stacked = {name: torch.stack([x[name] for x in many]) for name in layout}
        images = torch.func.vmap(bound.forward)(stacked)
        pushed = torch.func.vmap(lambda x, y: bound.push(x, y, v))(stacked, images)
        for i, x in enumerate(many):
            y = bound.forward(x)
            self._close({name: block[i] for name, block in images.items()}, y, "vmap of forward differs from a loop")
            expected = bound.push(x, y, v)
            self._close({name: block[i] for name, block in pushed.items()}, expected, "vmap of push differs from a loop")

        def product(vector: Tensor) -> Tensor:
            x = layout.unravel(vector)
            return layout.ravel(bound.push(x, bound.forward(x), v))

        second: Any = torch.func.jacfwd(product)(layout.ravel(many[0]))
        require(bool(second.isfinite().all()), "the derivative of push is not finite: second derivatives of the map are broken")

    def test_precision(self) -> None:
        """float32 in, float32 out, and there and back to single precision."""
        bound, layout = self._bound(), Layout(self.layout)
        x = {name: block.float() for name, block in self.point(0).items()}
        y = bound.forward(x)
        require(all(block.dtype == torch.float32 for block in y.values()), "forward of float32 blocks is not float32")
        back = layout.ravel(bound.invert(y)).double() - layout.ravel(x).double()
        require(float(back.norm()) <= 1e-3 * float(layout.ravel(x).norm()), "invert(forward(x)) is not x in float32")

    def test_copies(self) -> None:
        """deepcopy and pickle give the same map; two bindings of the recipe agree; a bound map is not bound again."""
        bound, x = self._bound(), self.point(0)
        y = bound.forward(x)
        for other in (copy.deepcopy(bound), pickle.loads(pickle.dumps(bound)), self._bound()):
            self._close(other.forward(x), y, "a copy of the map has other values")
        try:
            self.make().bind(Layout(self.layout).restrict([next(iter(self.layout))])).bind(Layout(self.layout))
        except GeometryError:
            return
        raise AssertionError("a bound map can be bound again: call super().bind, or require_recipe(), in bind")

    def test_chart(self) -> None:
        """As a chart: points go there and back, pairings are kept, and coordinates outside of the image are refused."""
        chart = Chart(self.layout, "x")
        psi = chart.reparametrize(self.make(), "psi").target
        p = chart.point(self.point(0))
        v, w = chart.vector(self._direction(1), at=p), chart.covector(self._direction(2), at=p)
        here, there = w(v), w.to(psi)(v.to(psi))
        require(
            abs(float(here - there)) <= self.tolerance * float(v.ravel().norm() * w.ravel().norm()),
            f"the pairing of a covector and a vector changes from {float(here):.12g} to {float(there):.12g}",
        )
        again = psi.point(p.to(psi).components).to(chart)
        self._close(again.blocks, p.blocks, "the point does not come back from the chart")
        for x in self.outside():
            try:
                chart.point(x).to(psi)
            except ChartDomainError:
                continue
            raise AssertionError("a point of outside() got coordinates in the chart")

    def run(self) -> None:
        """All tests of the suite, for other runners than pytest."""
        for name in dir(self):
            if name.startswith("test_"):
                getattr(self, name)()

    # -- helpers ---------------------------------------------------------------------------------------------------------

    def _bound(self) -> Map:
        recipe, layout = self.make(), Layout(self.layout)
        bound: Any = recipe.bind(layout) if recipe.joint else bind(recipe, layout)
        return bound.requires_grad_(False)

    def _points(self) -> list[Blocks]:
        return [self.point(seed) for seed in range(3)]

    def _direction(self, seed: int) -> Blocks:
        layout = Layout(self.layout)
        draws = torch.Generator().manual_seed(1000 + seed)
        return layout.unravel(torch.randn(layout.dim, generator=draws, dtype=torch.float64))

    def _far_points(self) -> list[Blocks]:
        """Zeros, large and small numbers of either sign, infinities and nans."""
        layout, base = Layout(self.layout), self.point(0)
        far = [{name: factor * block for name, block in base.items()} for factor in (-1.0, 1e-9, 1e3, 1e9, 1e200)]
        constants = (0.0, 1.0, -1.0, torch.inf, torch.nan)
        full = [torch.full((layout.dim,), value, dtype=torch.float64) for value in constants]
        return far + [layout.unravel(each) for each in full]

    def _check_far(self, bound: Map, x: Blocks) -> None:
        """A point that the map does not refuse must have finite coordinates."""
        flat = bound.bound_layout().ravel(x)
        finite = bool(flat.isfinite().all())
        if bound.outside_domain(x) is not None or not finite:
            return
        y = bound.bound_layout().ravel(bound.forward(x))
        require(
            bool(y.isfinite().all()),
            f"outside_domain accepts a point (|x| up to {float(flat.abs().max()):.3g}) at which forward is not finite: "
            f"{int((~y.isfinite()).sum())} of {y.numel()} numbers. Name the violated condition there",
        )

    def _close(self, found: Blocks, expected: Blocks, words: str) -> None:
        layout = Layout(self.layout)
        a, b = layout.ravel(found).detach(), layout.ravel(expected).detach()
        error = float((a - b).norm()) / max(float(b.norm()), 1e-3)
        require(error <= self.tolerance, f"{words}: relative error {error:.2g}, allowed {self.tolerance:.2g}")


def require(condition: bool, words: str) -> None:
    """An assertion that is never switched off."""
    if not condition:
        raise AssertionError(words)
