"""AdamW in two charts: the plain optimizer trains two different networks, geoad's one and the same, bit for bit."""

# %% data and a network; the same initial network for every run
import copy

import torch
from torch import nn

import geoad

torch.manual_seed(0)
x = torch.randn(256, 10)
y = (x[:, 0] * x[:, 1] > 0).long()
start = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 2))


def train(optimizer, map, steps=60):
    """Train a copy of the network, with the coordinates that `map` gives; returns the logits."""
    geo = geoad.GeoModule(copy.deepcopy(start))
    if map is not None:
        geo.to(geo.reference.reparametrize(map, name="psi").target)
    opt = optimizer(geo)
    for _ in range(steps):
        opt.zero_grad()
        loss = nn.functional.cross_entropy(geo(x), y)  # geo(x) is the same function in every chart
        loss.backward()
        opt.step()
    print(f"    {geo.chart.name:>6}: loss {loss.item():.6f}")
    return geo(x).detach()


# %% torch's AdamW on the parameters, whatever they are
def plain(geo):
    return torch.optim.AdamW(geo.parameters(), lr=1e-2)


# %% the same optimizer in geoad's wrapper: moments, weight decay and step live in the reference chart
def invariant(geo):
    return geoad.optim.Invariant(geo, torch.optim.AdamW, lr=1e-2)


# %%
for name, optimizer in {"torch.optim.AdamW": plain, "geoad.optim.Invariant(AdamW)": invariant}.items():
    print(name)
    a, b = train(optimizer, None), train(optimizer, geoad.maps.Sinh())
    print(f"    largest difference of a logit: {(a - b).abs().max():.3g}")
