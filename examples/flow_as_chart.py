"""A normalizing flow is a chart of the space that it was trained on: densities, differentials and distances in it.

The flow T maps data to a latent space in which they are normally distributed. As a change of coordinates it moves points,
differentials and metrics, and its log |det| is what densities change by. With zuko installed it is a neural spline flow, else
a composition of transforms of ``torch.distributions``.
"""

# %% data on a bent curve
import math

import torch
from torch import nn
from torch.distributions import AffineTransform, ComposeTransform, StackTransform, TanhTransform

import geoad

torch.manual_seed(0)
t = torch.randn(400)
data = torch.stack([t, t.square() - 1], 1) + 0.25 * torch.randn(400, 2)


def make_flow():
    try:
        import zuko
    except ImportError:
        return one_by_one()
    return zuko.flows.NSF(2, transforms=2, hidden_features=(32,))


def one_by_one():
    """Every coordinate by itself, x -> c tanh((x - m) / s) + ..., with learnable numbers: without zuko, a rough fit."""
    parts = []
    for _ in range(2):
        scale, shift = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(0.0))
        narrow, wide = AffineTransform(shift, scale), AffineTransform(0.0, nn.Parameter(torch.tensor(3.0)))
        parts.append(ComposeTransform([narrow, TanhTransform(), wide]))
    return StackTransform(parts, dim=-1)


# %% the flow as a chart of the plane
plane = geoad.Chart({"x": (2,)}, name="plane")
phi = plane.reparametrize(geoad.maps.from_transform(make_flow()), name="latent")
latent = phi.target


def log_density(x):
    """The density of data under the flow: standard normal in the latent space, times |det ∂z/∂x|."""
    z = phi.map.forward({"x": x})
    return -0.5 * z["x"].square().sum() - math.log(2 * math.pi) + phi.map.log_abs_det({"x": x}, z)


# %% train the parameters of the map
optimizer = torch.optim.Adam(phi.parameters(), lr=1e-2)
for step in range(61):
    optimizer.zero_grad()
    cost = -torch.func.vmap(log_density)(data).mean()
    cost.backward()
    optimizer.step()
    if step % 30 == 0:
        print(f"step {step}: -log p = {cost.item():.3f}")
phi.requires_grad_(False).double()

# %% a point and the differential of the log density, in both charts
p = plane.point(torch.tensor([0.6, -0.4], dtype=torch.float64))
score = plane.scalar_field(log_density)
omega = geoad.grad(score)(p)
v = plane.vector(torch.tensor([1.0, 0.5], dtype=torch.float64), at=p)
print("there and back:", torch.allclose(p.to(latent).to(plane).ravel(), p.ravel()), p.to(latent).to(plane) is p)
print("ω(v) in both charts:", torch.allclose(omega(v), omega.to(latent)(v.to(latent))))

# %% distances: the Euclidean metric of the latent space, seen in the plane
metric = geoad.metrics.Euclidean(latent)
jacobian = torch.func.jacrev(lambda x: phi.map.forward({"x": x})["x"])(p.ravel())
print("the metric is JᵀJ:", torch.allclose(metric(p).to_dense(), jacobian.mT @ jacobian))

# %% between two data points: the straight line of the latent space follows the data
a, b = (plane.point(torch.tensor(end, dtype=torch.float64)) for end in ([-1.2, 0.44], [1.2, 0.44]))
times = torch.linspace(0, 1, 9, dtype=torch.float64)
za, zb = a.to(latent).ravel(), b.to(latent).ravel()
straight = torch.lerp(a.ravel(), b.ravel(), times[:, None])
bent = latent.point(torch.lerp(za, zb, times[:, None])).to(plane).ravel()
for name, line in (("plane", straight), ("latent", bent)):
    print(f"lowest log density on the straight line of {name}: {torch.func.vmap(log_density)(line).min():.2f}")
