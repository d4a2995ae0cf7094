"""A change of coordinates of one's own: three methods, and the checks that it must pass.

The map is ψ = θ + a sin θ with |a| < 1, in every entry. It is strictly increasing, so it has an inverse; there is no formula
for it, so it is computed by bisection and Newton's method, written such that its derivatives come out right as well.
"""

# %% the map: for elementwise maps value, inverse_value and derivative are all there is to write
import torch
from torch import Tensor, nn

import geoad
from geoad.maps import Elementwise


class Wave(Elementwise):
    """ψ = θ + a sin θ."""

    def __init__(self, a: float = 0.5) -> None:
        super().__init__()
        if not abs(a) < 1:
            raise ValueError(f"θ + a sin θ is invertible for |a| < 1 only, got a = {a}")
        self.a = a

    def value(self, x: Tensor) -> Tensor:
        return x + self.a * x.sin()

    def inverse_value(self, y: Tensor) -> Tensor:
        with torch.no_grad():
            low, high = y - abs(self.a), y + abs(self.a)  # the solution lies between
            for _ in range(60):
                middle = 0.5 * (low + high)
                above = self.value(middle) > y
                low, high = torch.where(above, low, middle), torch.where(above, middle, high)
            x = 0.5 * (low + high)
        for _ in range(2):  # two Newton steps with derivatives: right to second order
            x = x - (self.value(x) - y) / self.derivative(x, y)
        return x

    def derivative(self, x: Tensor, y: Tensor) -> Tensor:
        return 1 + self.a * x.cos()


# %% what a diffeomorphism has to satisfy, checked at one point (a round trip, and four products that belong together)
def conforms(phi: geoad.Reparametrization, p: geoad.Point) -> dict[str, float]:
    """Errors of the laws, relative to 1."""
    theta, psi = phi.source, phi.target
    v = theta.vector(torch.randn(theta.dim), at=p)
    w = theta.covector(torch.randn(theta.dim), at=p)
    q = psi.point(phi(p).components)  # made of its numbers alone
    jacobian = torch.func.jacfwd(lambda x: theta.layout.ravel(phi.map.forward(theta.layout.unravel(x))))(p.ravel())
    return {
        "φ⁻¹(φ(θ)) = θ": (q.to(theta).ravel() - p.ravel()).abs().max().item(),
        "J v is the derivative of φ": (phi(v).ravel() - jacobian @ v.ravel()).abs().max().item(),
        "J⁻¹ J v = v": (phi.inverse(phi(v)).ravel() - v.ravel()).abs().max().item(),
        "ω(v) is the same number": (phi(w)(phi(v)) - w(v)).abs().item(),
        "log|det J|": (phi.map.log_abs_det(p.blocks, phi(p).blocks) - torch.linalg.slogdet(jacobian)[1]).abs().item(),
    }


torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
geo = geoad.GeoModule(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)))
phi = geo.reference.reparametrize(Wave(0.8), name="wave")
for law, error in conforms(phi, geo.point()).items():
    print(f"{law:<28} {error:.0e}")

# %% and it works like any other chart
x, y = torch.randn(20, 3), torch.randn(20, 1)
loss = geo.loss(nn.functional.mse_loss, (x, y))
p, q = geo.point(), geo.point().to(phi.target)
G = geoad.metrics.Euclidean(geo.reference)
print(f"‖grad‖ in theta {G(p).norm(geoad.grad(loss)(p)):.12f}, in wave {G(q).norm(geoad.grad(loss)(q)):.12f}")
