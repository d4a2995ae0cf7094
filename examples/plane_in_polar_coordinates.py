"""The plane in polar coordinates: gradient, Hessian and Laplacian of a function, with a chart that is no network's."""

# %% a free chart, and polar coordinates (r, φ) on the same plane
import torch

import geoad

torch.set_default_dtype(torch.float64)
xy = geoad.Chart({"x": (2,)}, name="xy")
polar = xy.reparametrize(geoad.maps.Polar(), name="polar").target
p = xy.point(torch.tensor([1.0, 1.0])).to(polar)
r, angle = p.components
print(f"(1, 1) is r = {r:.6f}, φ = {angle:.6f}")

# %% a function may be given in any chart: here u = r³ cos φ, that is (x² + y²) x
u = polar.scalar_field(lambda q: q[0] ** 3 * q[1].cos())
print(f"u = {u(p):.6f}, the same in xy: {u(p.to(xy)):.6f}")

# %% the differential has the components ∂u/∂r, ∂u/∂φ; as a vector it needs the metric diag(1, r²)
euclidean = geoad.metrics.Euclidean(xy)
G = euclidean(p)
print("metric in polar coordinates:", G.components.tolist())
du = geoad.grad(u)(p)
print("du   in polar:", du.components.tolist(), " in xy:", du.to(xy).components.tolist())
v = G.sharp(du)
print("grad in polar:", v.components.tolist(), " in xy:", v.to(xy).components.tolist())

# %% the coordinate lines are curved, so the connection does not vanish: Γ^r_φφ = -r, Γ^φ_rφ = 1/r
gamma = geoad.christoffel(euclidean)(p).components
print(f"Γ^r_φφ = {gamma[0, 1, 1]:.6f}, Γ^φ_rφ = {gamma[1, 0, 1]:.6f}")

# %% the Laplacian is the trace of the Hessian with respect to the metric: Δu = 8 x
H = geoad.hessian(u, metric=euclidean)(p)
print(f"Laplacian: {G.trace(H):.6f} (exact: 8)")
plain = torch.func.hessian(u.function(polar))(p.components)
print(f"G⁻¹ with the plain second derivatives instead: {torch.linalg.solve(G.components, plain).trace():.6f}")
