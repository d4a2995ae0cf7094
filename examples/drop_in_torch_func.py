"""geoad's transforms in place of those of torch.func: the same calls on plain tensors and dicts, with typed results."""

# %% a plain function of plain tensors
import torch

import geoad

torch.set_default_dtype(torch.float64)


def energy(x, strength=1.0):
    return strength * (x[0] ** 2 * x[1] + x[1].cos())


x = torch.tensor([1.0, 2.0])
for name in ("grad", "hessian"):
    ours, theirs = getattr(geoad, name)(energy)(x), getattr(torch.func, name)(energy)(x)
    print(f"{name:>8}: {ours!r}")
    print(f"          the numbers of torch.func: {torch.equal(ours.components, theirs)}")

# %% value_and_grad, keyword arguments, auxiliary output
w, aux = geoad.grad(lambda x: (energy(x), x.sum()), has_aux=True)(x)
print("grad with aux:", w.components.tolist(), aux.item())
value, w = geoad.value_and_grad(energy)(x, strength=2.0)
print("value:", value.item(), "grad:", w.components.tolist())

# %% dicts of tensors, as with functional_call
parameters = {"weight": torch.randn(2, 3), "bias": torch.zeros(2)}
w = geoad.grad(lambda p: torch.tanh(p["weight"] @ torch.ones(3) + p["bias"]).sum())(parameters)
print("blocks of the differential:", {name: tuple(block.shape) for name, block in w.components.items()})

# %% the difference: what depends on the chart is not handed out by accident
H = geoad.hessian(energy)(x)
try:
    H.trace()
except geoad.VarianceError as error:
    print("H.trace() raises:", str(error).split(":")[0])
G = geoad.metrics.Euclidean(H.chart)(H.at)
print(f"tr G⁻¹H = {G.trace(H):.6f}")

# %% and a point in another chart gives the same differential in the coordinates of that chart
psi = H.chart.reparametrize(geoad.maps.Exp(), name="psi").target
at_psi = geoad.grad(energy)(H.at.to(psi))
print("in psi = exp(x):", at_psi.components.tolist())
print("moved back     :", at_psi.to(H.chart).components.tolist())
