"""Orthogonal weights are a curved subset of all weights: its geometry does not depend on how torch parametrizes it.

``torch.nn.utils.parametrizations.orthogonal`` makes an orthogonal matrix of the triangle of another matrix, by one of several
maps. The networks are the same; gradients and second derivatives in the trained numbers are not. geoad finds out that the
triangle are coordinates of a submanifold (an immersion) and measures with the metric that the weights induce on it.
"""

# %% one network with an orthogonal weight
import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import orthogonal

import geoad

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
x, y = torch.randn(50, 4), torch.randn(50, 3)
plain = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 3))
nn.init.orthogonal_(plain[0].weight)
skew = torch.randn(4, 4)
turn = torch.linalg.matrix_exp(0.3 * (skew - skew.mT))


def written(how):
    """The network as torch writes it. Its base is turned away from the weight, for there all maps begin in the same way."""
    net = copy.deepcopy(plain)
    with torch.no_grad():
        net[0].weight.copy_(turn @ plain[0].weight)
    return nn.Sequential(orthogonal(net[0], orthogonal_map=how), *net[1:])


# %% the same point of the same submanifold, in two charts of it
print(f"{'map':>12} {'numbers':>8} {'count':>6} {'naive slope':>12} {'naive trace':>12} {'slope':>10} {'trace':>10}")
for how in ("matrix_exp", "cayley"):
    net = written(how)
    found = geoad.maps.from_parametrized(net, "0.weight")
    geo = geoad.GeoModule(found.network)
    theta = geo.reference
    psi = theta.reparametrize(found, name=how).target
    q = theta.point(dict(plain.named_parameters())).to(psi)  # ψ is searched for, starting from torch's numbers

    loss = geo.loss(F.mse_loss, (x, y))
    metric = geoad.metrics.Euclidean(theta)  # at a point of the submanifold it is the induced one
    slope, plain_hessian = geoad.grad(loss)(q), geoad.hessian(loss, geoad.metrics.Euclidean(psi))(q)
    naive = slope.ravel().norm(), plain_hessian.to_dense().trace()

    steepest = geoad.riemannian_grad(loss, metric)(q)
    ours = metric(q).norm(steepest), metric(q).trace(geoad.hessian(loss, metric)(q))
    numbers, count = net[0].parametrizations.weight.original.numel(), psi.layout["0.weight"].numel()
    print(f"{how:>12} {numbers:>8} {count:>6} {naive[0]:12.6f} {naive[1]:12.6f} {ours[0]:10.6f} {ours[1]:10.6f}")

# %% steps of steepest descent stay orthogonal, for they are steps in coordinates of the submanifold
p = q
for _ in range(8):
    p = p.retract(geoad.riemannian_grad(loss, metric)(p), -0.3)
weight = p.to(theta).components["0.weight"]
print(f"loss {loss(q):.4f} -> {loss(p):.4f}, |WᵀW - I| = {(weight.mT @ weight - torch.eye(4)).abs().max():.0e}")

# %% what has no law is refused: the gradient of the weights points out of the submanifold
try:
    geoad.riemannian_grad(loss)(q.to(theta)).to(psi)
except geoad.NotADiffeomorphismError as error:
    print("refused:", str(error).split(":")[0])
