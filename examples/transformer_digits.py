"""A Transformer that reads handwritten digits row by row: natural gradient steps and sharpness, the same in two charts.

Attention, layer norms and embeddings by torch's own modules, nothing rewritten for geoad: where torch's fused attention has no
forward derivative, the products use the unfused one. Natural gradients are solved matrix-free.
"""

# %% digits as sequences of 8 tokens with 8 pixels (needs scikit-learn)
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import geoad

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float64) / 16
classes = torch.tensor(digits.target)
order = torch.randperm(len(images))
train, test = order[:150], order[300:700]


class Reader(nn.Module):
    """Tokens, places, one encoder layer, a mean over the tokens."""

    def __init__(self, width=8):
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.places = nn.Parameter(0.1 * torch.randn(8, width))
        layer = nn.TransformerEncoderLayer(width, 2, 16, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, tokens):
        return self.head(self.body(self.embed(tokens) + self.places).mean(1))


geo = geoad.GeoModule(Reader().to(torch.float64))
theta = geo.reference
psi = theta.reparametrize(geoad.maps.Asinh(), name="psi").target
print(f"{theta.dim} coordinates")

# %% the loss with a prior, and the Fisher metric, damped by the Euclidean metric of the network's own parameters
prior = geo.scalar_field(lambda net: torch.stack([w.square().sum() for w in net.parameters()]).sum())
loss = geo.loss(F.cross_entropy, (images[train], classes[train])) + 5e-4 * prior
metric = geoad.curvature.Fisher(geo, images[train], "categorical") + 0.1 * geoad.metrics.Euclidean(theta)


def natural_gradient(chart, steps=9):
    """Points along natural gradient descent; every solve runs where the metric is, whatever the chart."""
    p = geo.point().to(chart)
    for _ in range(steps):
        p = p.retract(metric(p).sharp(geoad.grad(loss)(p)), -0.7)
    return p


# %% the same run in both charts
ends = {chart.name: natural_gradient(chart) for chart in (theta, psi)}
for name, p in ends.items():
    geo.set_point(p)
    with torch.no_grad():
        right = (geo(images[test]).argmax(-1) == classes[test]).double().mean()
    print(f"natural gradient in {name:>5}: loss {loss(p):.8f}, test accuracy {right:.3f}")
print(f"distance of the two ends: {(ends['theta'].ravel() - ends['psi'].to(theta).ravel()).abs().max():.0e}")

# %% sharpness there: the largest eigenvalues of the Hessian with respect to the Euclidean metric of theta
for chart in (theta, psi):
    q = ends["theta"].to(chart)
    H, G = geoad.hessian(loss)(q), geoad.metrics.Euclidean(theta)(q)
    values = (G.inverse() @ H).eigenvalues(2)
    print(f"sharpness in {chart.name:>5}: " + ", ".join(f"{value:.8f}" for value in values))
