"""Weight normalisation has more numbers than weights: what that does to sharpness and evidence, and how to read them rightly.

A network is trained with torch's own ``weight_norm``, W = g v / |v|. The length of v has no effect on the network, but second
derivatives in (g, v) depend on it: the same minimum looks as flat as one likes, and its evidence is what one likes. In geoad
(g, v) are redundant coordinates of the weights, and the numbers are those of the weights (Kristiadi et al. 2023, table 1).
"""

# %% a small regression, trained in (g, v) to its minimum
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import geoad

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
x = torch.linspace(-2, 2, 40)[:, None]
y = torch.sin(2 * x)
net = nn.Sequential(weight_norm(nn.Linear(1, 5)), nn.Tanh(), weight_norm(nn.Linear(5, 1)))


def energy(network):
    """Minus the log of the joint density: a Gaussian likelihood and a Gaussian prior on the weights."""
    weights = [w for layer in (network[0], network[2]) for w in (layer.weight, layer.bias)]
    return 0.5 * F.mse_loss(network(x), y, reduction="sum") / 0.1**2 + 0.5 * sum(w.square().sum() for w in weights)


def train(network):
    optimizer = torch.optim.LBFGS(
        network.parameters(), max_iter=4000, tolerance_grad=1e-9, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = energy(network)
        value.backward()
        return value

    optimizer.step(closure)


train(net)

# %% the weights as reference chart, and torch's (g, v) as redundant coordinates of them
found = geoad.maps.from_parametrized(net)
geo = geoad.GeoModule(found.network)
theta = geo.reference
psi = theta.reparametrize(found, name="gv").target
print(f"{found}: {theta.dim} weights, {psi.dim} numbers")

loss = geo.scalar_field(energy)
metric = geoad.metrics.Euclidean(theta)


def log_evidence(height, dim, logdet):
    """Laplace: log Z = -energy + (d/2) log 2π - ½ logdet H."""
    return -height + 0.5 * dim * math.log(2 * math.pi) - 0.5 * logdet


# %% the same network with v shorter and longer, and in the weights themselves
print(f"{'':>10} {'naive trace':>14} {'naive log Z':>14} {'geoad trace':>14} {'geoad log Z':>14}")
for size in (0.3, 1.0, 3.0):
    q = psi.point({name: size * block if name.endswith("_v") else block for name, block in found.components.items()})
    H, G = geoad.hessian(loss)(q), metric(q)

    matrix = H.to_dense()  # at a minimum, the plain second derivatives in (g, v)
    spectrum = torch.linalg.eigvalsh(matrix)[psi.dim - theta.dim :]  # the rest is zero: the length of v has no effect
    naive = matrix.trace(), log_evidence(loss(q), psi.dim, spectrum.log().sum())

    E = G.inverse() @ H
    ours = E.trace(), log_evidence(loss(q), theta.dim, geoad.quotient_logdet(H, G))
    print(f"{size:>6} |v| {naive[0]:14.4f} {naive[1]:14.4f} {ours[0]:14.4f} {ours[1]:14.4f}")

p = geo.point()
H, G = geoad.hessian(loss)(p), metric(p)
matrix = H.to_dense()
known = matrix.trace(), log_evidence(loss(p), theta.dim, torch.linalg.slogdet(matrix).logabsdet)
ours = (G.inverse() @ H).trace(), log_evidence(loss(p), theta.dim, geoad.quotient_logdet(H, G))
print(f"{'weights':>10} {known[0]:14.4f} {known[1]:14.4f} {ours[0]:14.4f} {ours[1]:14.4f}")

# %% a step of gradient descent in (g, v) depends on |v| as well; the steepest direction of the weights does not
target = geo.scalar_field(lambda network: network(x).mean())
for size in (0.3, 3.0):
    q = psi.point({name: size * block if name.endswith("_v") else block for name, block in found.components.items()})
    plain = geoad.Vector(psi, geoad.grad(target)(q).components, q).to(theta)  # the numbers of the gradient taken for a step
    steep = geoad.riemannian_grad(target)(q).to(theta)
    print(f"speed of the weights, {size} |v|: naive {plain.ravel().norm():.4f}, geoad {steep.ravel().norm():.4f}")
