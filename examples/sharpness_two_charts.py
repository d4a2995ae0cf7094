"""Sharpness of one and the same minimum in two charts: the trace and the largest eigenvalue of its Hessian.

Read naively off the second derivatives, a minimum is as sharp or as flat as one likes (Dinh et al. 2017): measure what enters
a hidden unit in other units than what leaves it. With a metric that is moved along, nothing changes.
"""

# %% a small regression, trained to its minimum
import torch
from torch import nn

import geoad

torch.manual_seed(0)
x = torch.linspace(-2, 2, 60, dtype=torch.float64)[:, None]
y = torch.sin(2 * x)
net = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).to(torch.float64)

geo = geoad.GeoModule(net)
theta = geo.reference
optimizer = geoad.optim.Invariant(
    geo, torch.optim.LBFGS, max_iter=3000, tolerance_grad=1e-9, tolerance_change=0.0, line_search_fn="strong_wolfe"
)


def penalty(net):
    return 1e-3 * torch.stack([w.square().sum() for w in net.parameters()]).sum()


def closure():
    optimizer.zero_grad()
    value = nn.functional.mse_loss(geo(x), y) + penalty(geo)
    value.backward()
    return value


optimizer.step(closure)
loss = geo.loss(nn.functional.mse_loss, (x, y)) + geo.scalar_field(penalty)  # the same, as a function on the manifold
p = geo.point()
print(f"loss {loss(p):.6f}, gradient {geoad.grad(loss)(p).ravel().norm():.0e}")

# %% two further charts: hidden units rescaled by 10, and curved coordinates for everything
charts = {
    "theta": theta,
    "rescaled": theta.reparametrize(geoad.maps.Rescale(10.0, pairs=[("0", "2")]), name="rescaled").target,
    "asinh": theta.reparametrize(geoad.maps.Asinh(), name="asinh").target,
}

# %% the same minimum, seen in each of them
metric = geoad.metrics.Euclidean(theta)
print(f"{'chart':>10} {'naive trace':>14} {'naive λmax':>14} {'geoad trace':>14} {'geoad λmax':>14}")
for name, chart in charts.items():
    q = p.to(chart)
    H, G = geoad.hessian(loss)(q), metric(q)

    matrix = H.to_dense()  # at a minimum these are the plain second derivatives in the coordinates of the chart
    naive = matrix.trace(), torch.linalg.eigvalsh(matrix)[-1]

    E = G.inverse() @ H  # without a metric, H.trace() and H.eigenvalues() raise
    print(f"{name:>10} {naive[0]:14.8f} {naive[1]:14.8f} {E.trace():14.8f} {E.eigenvalues()[0]:14.8f}")
