"""The tangent kernel of a small network on digits: spectrum, principal components, classification, and what training changes.

A network in its tangent space is a kernel machine. Its kernel J G⁻¹ Jᵀ is the same matrix in every chart, and turns towards the
labels while the network is trained.
"""

# %% digits, and a network
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import geoad
from geoad import tangent

torch.manual_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
order = torch.randperm(len(images))
train, test = order[:120], order[120:520]
x, y = images[train], labels[train]
net = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1),
    nn.Tanh(),
    nn.AvgPool2d(2),
    nn.Flatten(),
    nn.Linear(128, 32),
    nn.Tanh(),
    nn.Linear(32, 10),
)
geo = geoad.GeoModule(net)
theta = geo.reference
p = geo.point()

# %% the kernel: (n, c, n, c), and what covers the layers
field = geoad.ntk(geo, x)
kernel = field(p)
print(kernel, tuple(kernel.components.shape))
print(f"conv: {field.coverage()['0.weight']}, linear: {field.coverage()['4.weight']}")

# %% the same in curved coordinates, where JJᵀ of the coordinates is another matrix
psi = theta.reparametrize({"*.weight": geoad.maps.Softplus(), "*": geoad.maps.Identity()}, name="psi").target
whole = kernel.to_dense()
moved = field(psi.point(p.to(psi).components)).to_dense()
naive = geoad.ntk(geo, x, metric=geoad.metrics.Euclidean(psi))(p).to_dense()
gaps = [float((each - whole).norm() / whole.norm()) for each in (moved, naive)]
print(f"from psi: {gaps[0]:.0e} apart; JJᵀ in psi: {gaps[1]:.2f} apart")

# %% numbers without the matrix: products with random vectors
lazy = geoad.ntk(geo, x, representation="implicit")(p)
exact, estimate = tangent.effective_rank(kernel), tangent.effective_rank(lazy, 60, generator=torch.Generator().manual_seed(0))
print(f"effective rank {float(exact):.3f}, estimated {float(estimate):.3f} ± {float(estimate.error):.3f}")

# %% a kernel machine: the network, linearised where it is
targets = tangent.one_hot(y, 10)
for name, metric in (("Euclidean", None), ("Fisher", geoad.curvature.Fisher(geo, x, representation="kfac"))):
    damped = None if metric is None else metric + 0.1 * geoad.metrics.Euclidean(theta)
    machine = tangent.kernel_ridge(geoad.ntk(geo, x, metric=damped), p, targets, ridge=0.1)
    accuracy = (machine.classify(images[test]) == labels[test]).float().mean()
    print(f"kernel classification with the {name} metric: {accuracy:.3f} of {len(test)} test digits right")

# %% training turns the kernel towards the labels
record = tangent.Evolution(geoad.ntk(geo, x, contract="trace"), targets, k=5)
optimizer = torch.optim.Adam(geo.parameters(), lr=3e-3)
for step in range(61):
    if step % 20 == 0:
        record(step)
    optimizer.zero_grad()
    F.cross_entropy(geo(x), y).backward()
    optimizer.step()
for each in record.snapshots:
    print(
        f"step {each.step:2d}: alignment with the labels {each.target_alignment:.3f}, "
        f"with the first kernel {each.initial_alignment:.3f}, effective rank {each.effective_rank:.2f}"
    )

# %% principal components of f₁ - f₀, before and after
pair = (labels[train] == 0) | (labels[train] == 1)
margin = geoad.ntk(geo, images[train][pair], outputs=geoad.curvature.Difference(1, 0))
for name, q in (("before", p), ("after", geo.point())):
    pca = tangent.kernel_pca(margin, q, k=2)
    print(f"two components of the margin kernel {name} training: {float(pca.explained.sum()):.2f} of the variance")
