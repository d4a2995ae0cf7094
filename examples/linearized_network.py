"""How long does a network stay in its tangent? Training it, and training its linearisation, from the same point.

The tangent f(x; θ₀) + J(x)(θ - θ₀) is a network of its own. With squared loss its outputs over the training set obey a linear
equation, f' = -K (f - y), with the tangent kernel K at θ₀: the third column is that solution, with no training at all.
A wide network (in the parametrisation of Jacot et al. 2018) hardly leaves its tangent, a narrow one does.
"""

# %% data on a circle
import torch
from torch import nn

import geoad
from geoad.metrics import Euclidean

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
angle = torch.linspace(0, 6.0, 24)
x = torch.stack([angle.cos(), angle.sin()], 1)
y = (2 * angle).sin().unsqueeze(1)


# %% a network with outputs of order one at any width
class Wide(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.last = nn.Linear(2, width), nn.Linear(width, 1, bias=False)
        for layer in (self.first, self.last):
            nn.init.normal_(layer.weight)
        self.scale = width**-0.5

    def forward(self, x):
        return self.scale * self.last(self.first(x).tanh())


# %% gradient descent with small steps
def train(net, lr, steps):
    optimizer = torch.optim.SGD([w for w in net.parameters() if w.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * (net(x) - y).square().sum()).backward()
        optimizer.step()
    return net(x).detach()


# %% the three ways to the same time
lr, steps = 0.02, 150
for width in (16, 64, 256, 1024):
    geo = geoad.GeoModule(Wide(width))
    p = geo.point()
    space = geoad.FunctionSpace(geo, x)
    J = space.jacobian(p)
    kernel = J.pushforward(Euclidean(geo.reference)(p).inverse()).to_dense()  # a (2,0) tensor of the space of outputs
    decay = torch.linalg.matrix_power(torch.eye(24) - lr * kernel, steps)
    predicted = y + (decay @ (space(p).components - y).flatten()).reshape(y.shape)

    tangent = geoad.linearized(geo, p)
    linear = train(tangent, lr, steps)
    full = train(geo, lr, steps)
    losses = [0.5 * (outputs - y).square().sum() for outputs in (full, linear)]
    print(f"width {width:5}: loss {losses[0]:.4f}, in the tangent {losses[1]:.4f}; ", end="")
    print(f"outputs of both at most {(full - linear).abs().max():.4f} apart, ", end="")
    print(f"tangent and kernel {(linear - predicted).abs().max():.0e}")

# %% the tangent is a manifold too: its kernel is that of the network at p, wherever it has been trained to
again = geoad.GeoModule(tangent)
there = geoad.FunctionSpace(again, x).jacobian(again.point())
gap = (there.pushforward(Euclidean(again.reference)(again.point()).inverse()).to_dense() - kernel).abs().max()
print(f"kernel of the trained tangent less that of the network where it started: {gap:.0e}")
