"""The pictures: they draw on the axes they are given, in the chart they are asked for."""

from __future__ import annotations

import sys

import pytest
import torch

import geoad

pytest.importorskip("matplotlib")

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from geoad import plotting


@pytest.fixture
def ax() -> Axes:
    return Figure().subplots()


@pytest.fixture
def charts() -> tuple[geoad.Chart, geoad.Chart]:
    theta = geoad.Chart({"x": (2,)}, name="theta")
    return theta, theta.reparametrize(geoad.maps.Sinh(), name="psi").target


def test_contours_are_those_of_the_function_in_the_chart(ax: Axes, charts: tuple[geoad.Chart, geoad.Chart]) -> None:
    theta, psi = charts
    field = theta.scalar_field(lambda x: x.sum())
    assert plotting.contours(field, psi, (-1, 1), (-2, 2), ax, levels=[0.0], fill=False) is ax
    (line,) = [path.vertices for path in ax.collections[0].get_paths()]
    assert torch.as_tensor(line).asinh().sum(-1).abs().max() < 1e-3
    assert ax.get_xlim() == (-1, 1) and ax.get_ylim() == (-2, 2)


def test_trajectories_are_moved(ax: Axes, charts: tuple[geoad.Chart, geoad.Chart]) -> None:
    theta, psi = charts
    numbers = torch.randn(5, 2)
    points = [theta.point(x) for x in numbers]
    assert plotting.trajectory(points, psi, ax, label="run") is ax
    assert torch.equal(torch.as_tensor(ax.lines[0].get_xydata()), numbers.sinh())
    assert ax.lines[0].get_label() == "run" and len(ax.lines) == 3
    plotting.trajectory(theta.point(numbers), psi, ax, ends=False)  # a batch of points
    assert torch.equal(torch.as_tensor(ax.lines[3].get_xydata()), numbers.sinh())


def test_coordinate_lines(ax: Axes, charts: tuple[geoad.Chart, geoad.Chart]) -> None:
    theta, psi = charts
    assert plotting.coordinate_lines(psi, theta, (-1, 1), (-2, 2), ax, count=3, resolution=4) is ax
    seen = torch.stack([torch.as_tensor(line.get_xydata()) for line in ax.lines]).sinh()
    assert seen.shape == (6, 4, 2)
    assert torch.allclose(seen[:3, :, 0], torch.tensor([-1.0, 0.0, 1.0])[:, None].expand(3, 4))
    assert torch.allclose(seen[3:, :, 1], torch.tensor([-2.0, 0.0, 2.0])[:, None].expand(3, 4))


def test_spectrum(ax: Axes) -> None:
    assert plotting.spectrum([torch.tensor([1.0, 3.0, -1.0])], ax, labels=["H"]) is ax
    assert ax.lines[0].get_ydata().tolist() == [3.0, 1.0]
    assert ax.get_yscale() == "log"


def test_only_planes_are_drawn(ax: Axes) -> None:
    space = geoad.Chart({"x": (3,)}, name="space")
    with pytest.raises(geoad.GeometryError, match="'space' has 3 coordinates"):
        plotting.trajectory([space.point(torch.zeros(3))], space, ax)


def test_without_axes_a_figure_is_made(charts: tuple[geoad.Chart, geoad.Chart]) -> None:
    from matplotlib import pyplot

    ax = plotting.trajectory([charts[0].point(torch.zeros(2))], charts[0])
    assert isinstance(ax, Axes)
    pyplot.close(ax.get_figure())


def test_without_matplotlib_the_message_names_the_extra(
    charts: tuple[geoad.Chart, geoad.Chart], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(geoad.GeometryError, match=r"pip install geoad\[plot\]"):
        plotting.trajectory([charts[0].point(torch.zeros(2))], charts[0])
