"""The sphere by two charts: a great circle, a gradient flow and parallel transport that go over from chart to chart.

Run with ``--picture sphere.png`` to draw the curves in both charts (needs matplotlib).
"""

# %% two stereographic charts; no chart covers the sphere, and none of them stands out
import math
import sys

import torch

import geoad

torch.set_default_dtype(torch.float64)
sphere = geoad.atlases.Sphere(2)
north, south = sphere.charts
p = sphere.point(torch.tensor([0.6, 0.0, 0.8]))
print(f"{p.chart.name}: {p.components.tolist()}, {south.name}: {p.to(south).components.tolist()}")

# %% fields are given chart by chart, and checked to be one where the charts overlap
G = sphere.metric
height = sphere.scalar_field({"north": lambda x: (1 - x @ x) / (1 + x @ x), "south": lambda x: (x @ x - 1) / (x @ x + 1)})
print("one field to 1e-12:", height.check_compatible(north.point(torch.randn(5, 2))) < 1e-12)
E = G(p).inverse() @ geoad.hessian(height, G)(p)
print(f"eigenvalues of the Hessian: {E.to(south).eigenvalues().tolist()}, the height is {height(p):.6f}")

# %% a great circle: every step is taken in the chart that has room
v = north.vector(torch.tensor([1.0, 0.8]), at=p)
v = v / G(p).norm(v)
times = [math.pi * k / 8 for k in range(17)]
circle = geoad.geodesic(G, p, v, times, steps=64)
print("charts:", " ".join(q.chart.name for q in circle))
print(f"back after 2π, to {(circle[-1].components - p.components).norm():.0e}")

# %% the gradient flow of the height runs from pole to pole: h(t) = tanh(artanh h(0) - t)
down = geoad.riemannian_grad(-height, G)
start = sphere.point(torch.tensor([0.1, 0.05, 1.0]))
flow = geoad.flow(down, start, [0.5 * k for k in range(13)], steps=48)
exact = torch.tanh(torch.atanh(height(start)) - 6.0)
print(f"height after t = 6: {height(flow[-1]):.6f} in chart {flow[-1].chart.name}, exactly {exact:.6f}")

# %% parallel transport around a circle of latitude turns a vector by the area inside
colatitude = 1.0


def latitude(s: torch.Tensor) -> geoad.Point:
    """The circle of latitude, for s from 0 to 1."""
    angle = 2 * math.pi * s
    return north.point(math.tan(colatitude / 2) * torch.stack([angle.cos(), angle.sin()]))


w = north.vector(torch.tensor([1.0, 0.0]), at=latitude(torch.tensor(0.0)))
turned = geoad.parallel_transport(G, latitude, w, steps=40).components
print(f"turned by {math.atan2(turned[1], turned[0]):.6f}, 2π(1 - cos) = {2 * math.pi * (1 - math.cos(colatitude)):.6f}")

# %% what needs a reference chart asks for a metric
try:
    p.retract(v)
except geoad.GeometryError as error:
    print(f"p.retract(v) raises: {str(error)[:62]}...")

# %% the curves in both charts, each where it has room
if "--picture" in sys.argv:
    from matplotlib.figure import Figure

    from geoad import plotting

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    for ax, chart in zip(figure.subplots(1, 2), sphere.charts, strict=True):
        plotting.contours(height, chart, (-3, 3), (-3, 3), ax, resolution=61)
        for curve, name in ((circle, "great circle"), (flow, "gradient flow of the height")):
            near = [q for q in curve if sphere.margins(q).get(chart, 0.0) > 0.1]
            plotting.trajectory(near, chart, ax, label=name, ends=False, marker=".")
        ax.set(title=chart.name, aspect="equal", xlim=(-3, 3), ylim=(-3, 3))
        ax.legend(loc="upper left")
    figure.savefig(sys.argv[sys.argv.index("--picture") + 1], dpi=120)
