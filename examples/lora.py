"""Low-rank adaptation is no change of coordinates: what its factors A and B know of the network, and what they do not.

A small classifier is trained, then adapted to other data by W = W₀ + B A with W₀ frozen. The map from (A, B) to the weights
has another rank than its number of coordinates, even another one at its usual start B = 0. So differentials and forms come
down to (A, B), vectors go up to the weights, and the rest is refused by name instead of being computed wrongly.
"""

# %% a trained network
import torch
import torch.nn.functional as F
from torch import nn

import geoad

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
x = torch.randn(200, 5)
before, after = (x[:, 0] * x[:, 1] > 0).long(), (x[:, 0] * x[:, 1] + x[:, 2] > 0).long()
net = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 2))
optimizer = torch.optim.Adam(net.parameters(), lr=2e-2)
for _ in range(150):
    optimizer.zero_grad()
    F.cross_entropy(net(x), before).backward()
    optimizer.step()

# %% its LoRA chart: A and B for the weights, the biases frozen
geo = geoad.GeoModule(net)
theta, base = geo.reference, geo.point()
recipe = {"*.weight": geoad.maps.LoRA(2, alpha=4, base=base), "*.bias": geoad.maps.Frozen(base)}
psi = theta.reparametrize(recipe, name="lora").target
start = base.to(psi)  # A random, B = 0: the network as it was trained
print("blocks:", {name: tuple(shape) for name, shape in psi.layout.items()})


def rank(q: geoad.Point) -> int:
    """The number of directions in which the network can move: the rank of the Euclidean metric seen in ψ."""
    return int(torch.linalg.matrix_rank(geoad.metrics.Euclidean(theta)(q).to_dense()))


generic = psi.point({name: block + 0.1 * torch.randn_like(block) for name, block in start.components.items()})
print(f"coordinates: {theta.dim} in theta, {psi.dim} in lora; rank {rank(start)} at the start, {rank(generic)} elsewhere")

# %% the gradient in (A, B) is Jᵀ dL
loss = geo.loss(F.cross_entropy, (x, after))
down = geoad.grad(loss)(generic)
above = geoad.grad(loss)(generic.to(theta))
print("Jᵀ dL is the gradient in (A, B):", torch.allclose(above.to(psi).ravel(), down.ravel()))

# %% what has no law
velocity = geoad.riemannian_grad(loss)(generic.to(theta))  # the steepest direction of all the weights
hessian = geoad.hessian(loss)(generic.to(theta))
shape = geoad.metrics.Euclidean(theta)(generic.to(theta)).inverse() @ hessian  # an endomorphism
for name, ask in (
    ("a vector from theta", lambda: velocity.to(psi)),
    ("an endomorphism from theta", lambda: shape.to(psi)),
    ("a differential of lora", lambda: geoad.Covector(psi, down.components, generic).to(theta)),
    ("the steepest direction without a metric of lora", lambda: geoad.riemannian_grad(loss)(generic)),
):
    try:
        ask()
    except geoad.GeometryError as error:
        print(f"refused: {name} ({type(error).__name__})")

# %% a natural gradient step needs a metric that is definite in (A, B): say whose identity matrix makes it so
fisher = geoad.curvature.Fisher(geo, x, "categorical")
damped = fisher + 0.3 * geoad.metrics.Euclidean(psi)
q = start
print(f"loss {loss(q):.4f}", end="")
for _ in range(15):
    q = q.retract(damped(q).sharp(geoad.grad(loss)(q)), -0.5)
print(f" -> {loss(q):.4f} in 15 natural gradient steps")
update = q.to(theta).components["0.weight"] - base.components["0.weight"]
print("rank of the update of the first layer:", int(torch.linalg.matrix_rank(update)))
