"""Natural gradient descent by hand: the Fisher metric turns the differential of the loss into a direction.

Damping is the step where invariance is usually lost: F + λI depends on whose identity matrix it is. In geoad it is a multiple
of a metric, which moves along, so the run in curved coordinates is the run in the network's own parameters.
"""

# %% a small classification problem
import torch
import torch.nn.functional as F
from torch import nn

import geoad

torch.manual_seed(0)
x = torch.randn(300, 4, dtype=torch.float64)
y = (x[:, 0].sin() + x[:, 1] * x[:, 2] > 0).long()
geo = geoad.GeoModule(nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 2)).to(torch.float64))
theta = geo.reference
psi = theta.reparametrize({"*.weight": geoad.maps.Asinh(), "*": geoad.maps.Sinh()}, name="psi").target

# %% the objects: a function, and two metric fields that add
loss = geo.loss(F.cross_entropy, (x, y))
fisher = geoad.curvature.Fisher(geo, x, "categorical")
damped = fisher + 1e-2 * geoad.metrics.Euclidean(theta)


# %% steepest descent with respect to any metric
def descend(p, metric, lr, steps=15):
    for _ in range(steps):
        differential = geoad.grad(loss)(p)  # a covector: it has no direction yet
        p = p.retract(metric(p).sharp(differential), -lr)
    return p


# %% both metrics, in both charts
euclidean = geoad.metrics.Euclidean(theta)
for name, metric, lr in (("gradient descent", euclidean, 0.5), ("natural gradient", damped, 0.5)):
    ends = {chart.name: descend(geo.point().to(chart), metric, lr) for chart in (theta, psi)}
    for chart, p in ends.items():
        print(f"{name} in {chart:>5}: loss {loss(p):.10f}")
    gap = (ends["theta"].ravel() - ends["psi"].to(theta).ravel()).abs().max()
    print(f"    distance of the two ends: {gap:.0e}")
