"""Kinds and representations of curvature fields against Jacobians of the plain network, and against each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import geoad
from geoad import maps
from geoad import operators as ops
from geoad.connection.products import contracted, first_kind
from geoad.curvature import (
    EKFAC,
    GGN,
    KFAC,
    BlockDiagonal,
    Categorical,
    Fisher,
    Gaussian,
    Hessian,
    LowRank,
    OutputMatrix,
    running_average,
)
from geoad.errors import GeometryError, SingularMetricError, StructureNotPreservedError
from geoad.metrics import Euclidean

X = torch.linspace(-2.0, 2.0, 36, dtype=torch.float64).reshape(9, 4).cos()
Y = torch.arange(9) % 3


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)),
        nn.Conv2d(1, 4, 2, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 2, 2, groups=2),
        nn.GroupNorm(2, 2),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


class Tokens(nn.Module):
    """Embedding, norm, a layer over positions, and one that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(5, 3), nn.LayerNorm(3)
        self.mix, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.embed((x * 2).long().clamp(-2, 2) + 2))
        return self.head(torch.tanh(self.mix(torch.tanh(self.mix(h)))).mean(1))


NETS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "conv": conv, "tokens": Tokens}
every_net = pytest.mark.parametrize("name", NETS)


def jacobian(geo: geoad.GeoModule, inputs: Tensor = X) -> tuple[Tensor, Tensor]:
    """Outputs (n, c) and the Jacobian (n, c, d) of the plain network in its raveled parameters."""
    layout, theta = geo.reference.layout, geo.point().to(geo.reference).ravel()

    def outputs(vector: Tensor) -> Tensor:
        return functional_call(geo.wrapped, layout.unravel(vector), (inputs,))

    return outputs(theta), torch.func.jacrev(outputs)(theta)


def softmax_matrix(f: Tensor) -> Tensor:
    p = f.softmax(-1)
    return torch.diag_embed(p) - p[..., None] * p[..., None, :]


def exact(geo: geoad.GeoModule) -> Tensor:
    f, j = jacobian(geo)
    return torch.einsum("nci,ncd,ndj->ij", j, softmax_matrix(f), j) / len(f)


def gradients(geo: geoad.GeoModule) -> Tensor:
    """(n, d): the gradients of the cross-entropy of the single samples."""
    f, j = jacobian(geo)
    return torch.einsum("nc,nci->ni", f.softmax(-1) - F.one_hot(Y, 3), j)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1e-3, float(b.abs().max())))


def groups_of(geo: geoad.GeoModule) -> dict[str, Tensor]:
    """The places of the parameters of each module in the raveled order."""
    layout = geo.reference.layout
    places = layout.unravel(torch.arange(layout.dim, dtype=torch.float64))
    found: dict[str, list[Tensor]] = {}
    for name, place in places.items():
        found.setdefault(name.rpartition(".")[0], []).append(place.flatten().long())
    return {layer: torch.cat(parts) for layer, parts in found.items()}


# -- kinds -------------------------------------------------------------------------------------------------------------------


@every_net
@pytest.mark.parametrize("representation", ["dense", "implicit", "low_rank"])
def test_the_kinds_of_the_same_matrix(name: str, representation: str) -> None:
    geo = geoad.GeoModule(NETS[name]())
    g = gradients(geo)
    second, mean = g.T @ g / len(g), g.mean(0)
    wanted = {"exact": exact(geo), "empirical": second, "covariance": second - torch.outer(mean, mean)}
    for kind, matrix in wanted.items():
        field = Fisher(geo, (X, Y), kind=kind, representation=representation)
        value = field(geo.point())
        close(value.to_dense(), matrix)
        v = geo.reference.vector(torch.randn(geo.reference.dim), at=geo.point())
        close(value.mv(v).ravel(), matrix @ v.ravel())
        close(value(v, v), v.ravel() @ matrix @ v.ravel())
        total = Fisher(geo, (X, Y), kind=kind, representation=representation, reduction="sum")
        close(total(geo.point()).to_dense(), len(g) * matrix)


@pytest.mark.parametrize("representation", ["dense", "implicit", "low_rank", "diagonal", "block_diagonal", "kfac", "ekfac"])
def test_sampled_labels_converge_and_are_the_same_ones(representation: str) -> None:
    """The error of a Monte-Carlo Fisher falls as 1/√m; a field is one function, whatever the chart and the memory."""
    geo = geoad.GeoModule(mlp())
    p = geo.point()
    psi = geo.reference.reparametrize(maps.Asinh()).target
    exactly = Fisher(geo, X, representation=representation)(p).to_dense()
    errors = []
    for samples in (25, 400):
        few = []
        for seed in range(4):
            field = Fisher(
                geo,
                X,
                kind="mc",
                representation=representation,
                samples=samples,
                generator=torch.Generator().manual_seed(seed),
                max_memory=1 << 22,
            )
            few.append(float((field(p).to_dense() - exactly).norm() / exactly.norm()))
        errors.append(sum(few) / len(few))
    assert 2.1 < errors[0] / errors[1] < 7.4, errors  # 4 = √16, from a few numbers
    field = Fisher(geo, X, kind="mc", representation=representation, generator=torch.Generator().manual_seed(0))
    again = Fisher(geo, X, kind="mc", representation=representation, generator=torch.Generator().manual_seed(0), max_memory=1)
    value = field(p).to_dense()
    close(again(p).to_dense(), value, 1e-12)
    close(field(p.to(psi)).to(geo.reference).to_dense(), value, 1e-9)
    field.resample()
    assert float((field(p).to_dense() - value).norm()) > 1e-3 * float(value.norm())


def test_sampling_leaves_the_global_generator_alone_with_one_of_its_own() -> None:
    geo = geoad.GeoModule(mlp())
    torch.manual_seed(3)
    field = Fisher(geo, X, kind="mc", generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    field(geo.point()).to_dense()
    assert torch.equal(before, torch.get_rng_state())


# -- representations ---------------------------------------------------------------------------------------------------------


@every_net
def test_blocks_and_diagonals_are_those_of_the_matrix(name: str) -> None:
    geo = geoad.GeoModule(NETS[name]())
    p, matrix = geo.point(), exact(geo)
    masked = torch.zeros_like(matrix)
    for place in groups_of(geo).values():
        masked[place[:, None], place] = matrix[place[:, None], place]
    close(Fisher(geo, X, representation="block_diagonal")(p).to_dense(), masked)
    close(Fisher(geo, X, representation="diagonal")(p).to_dense(), matrix.diagonal().diag())
    alone = torch.zeros_like(matrix)
    for place in geo.reference.layout.offsets().values():
        alone[place, place] = matrix[place, place]
    close(Fisher(geo, X, representation=BlockDiagonal("parameter"))(p).to_dense(), alone)
    names = list(geo.reference.layout)
    whole = Fisher(geo, X, representation=BlockDiagonal([names[:2], "*"]))(p).to_dense()
    places = geo.reference.layout.offsets()
    first = torch.cat([torch.arange(matrix.shape[0])[places[each]] for each in names[:2]])
    close(whole[first[:, None], first], matrix[first[:, None], first])
    close(whole[first].norm(), whole[first[:, None], first].norm(), 1e-14)


@every_net
def test_the_quasi_diagonal_couples_biases_to_their_weights(name: str) -> None:
    geo = geoad.GeoModule(NETS[name]())
    matrix = exact(geo)
    value = Fisher(geo, X, representation="quasi_diagonal")(geo.point()).to_dense()
    layout = geo.reference.layout
    places = layout.unravel(torch.arange(layout.dim, dtype=torch.float64))
    wanted = matrix.diagonal().diag()
    for module in ("0", "2", "1", "3", "6", "mix", "head"):
        weight, bias = places.get(f"{module}.weight"), places.get(f"{module}.bias")
        if weight is None or bias is None or weight.ndim < 2:
            continue
        for unit, b in zip(weight.long(), bias.long(), strict=True):
            wanted[unit.flatten(), b] = wanted[b, unit.flatten()] = matrix[unit.flatten(), b]
    close(value, wanted)


@every_net
def test_low_rank_of_a_rank_is_the_best_one(name: str) -> None:
    geo = geoad.GeoModule(NETS[name]())
    matrix = exact(geo)
    values, vectors = torch.linalg.eigh(matrix)
    best = (vectors[:, -4:] * values[-4:]) @ vectors[:, -4:].T
    close(Fisher(geo, X, representation=LowRank(4))(geo.point()).to_dense(), best, 1e-9)


def deep_linear() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5, bias=False), nn.Linear(5, 2))


@pytest.mark.parametrize(
    "representation", ["kfac", "ekfac", KFAC("reduce"), KFAC(bias="separate"), EKFAC("reduce", "separate")]
)
def test_kronecker_factors_are_exact_for_deep_linear_networks(representation: Any) -> None:
    """With a Gaussian likelihood, where what comes back does not depend on the sample: Bernacchia et al. 2018."""
    geo = geoad.GeoModule(deep_linear())
    likelihood = Gaussian(torch.tensor([[2.0, 0.5], [0.5, 1.0]]))
    p = geo.point()
    blocks = Fisher(geo, X, likelihood, representation="block_diagonal")(p)
    if getattr(representation, "bias", "joint") == "separate":
        blocks = Fisher(geo, X, likelihood, representation=BlockDiagonal("parameter"))(p)
    value = Fisher(geo, X, likelihood, representation=representation)(p)
    close(value.to_dense(), blocks.to_dense())


def kfac_by_hand(geo: geoad.GeoModule, sharing: str) -> dict[str, Tensor]:
    """A ⊗ G of the conv net's layers from patches and autograd, over (o, i) with the bias as the last i."""
    net = geo.wrapped
    layers = {name: m for name, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        m.register_forward_hook(lambda _, i, o, name=name: seen.__setitem__(name, (i[0], o))) for name, m in layers.items()
    ]
    f = net(X)
    for hook in hooks:
        hook.remove()
    root = torch.linalg.cholesky(softmax_matrix(f).detach() + 1e-14 * torch.eye(3))
    found: dict[str, Tensor] = {}
    for name, m in layers.items():
        a, out = seen[name]
        backs = [torch.autograd.grad((f * root[..., k]).sum(), out, retain_graph=True)[0] for k in range(3)]
        groups = getattr(m, "groups", 1)
        if isinstance(m, nn.Conv2d):
            a = F.unfold(a, m.kernel_size, padding=m.padding).mT  # (n, t, channels · kernel)
            backs = [g.flatten(2).mT for g in backs]
        else:
            a, backs = a[:, None], [g[:, None] for g in backs]
        n, t = a.shape[:2]
        blocks = []
        for i in range(groups):
            ai = torch.cat([a.reshape(n, t, groups, -1)[:, :, i], torch.ones(n, t, 1)], -1).detach()
            gi = torch.stack([g.reshape(n, t, groups, -1)[:, :, i] for g in backs])
            if sharing == "reduce":
                ai, gi = ai.mean(1, keepdim=True), gi.sum(2, keepdim=True)
            left = torch.einsum("knto,kntp->op", gi, gi) / (n * gi.shape[2])
            right = torch.einsum("nti,ntj->ij", ai, ai) / n
            blocks.append(torch.kron(left, right))
        found[name] = torch.block_diag(*blocks)
    return found


def order(geo: geoad.GeoModule, module: str) -> Tensor:
    """The places of (o, i) with the bias as the last i."""
    layout = geo.reference.layout
    places = layout.unravel(torch.arange(layout.dim, dtype=torch.float64))
    weight = places[f"{module}.weight"].flatten(1)
    return torch.cat([weight, places[f"{module}.bias"][:, None]], 1).flatten().long()


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_kfac_of_a_conv_net_against_hooks(sharing: str) -> None:
    geo = geoad.GeoModule(conv())
    value = Fisher(geo, X, representation=KFAC(sharing))(geo.point())
    matrix, full = value.to_dense(), exact(geo)
    for module, wanted in kfac_by_hand(geo, sharing).items():
        place = order(geo, module)
        close(matrix[place[:, None], place], wanted, 1e-6)
    place = groups_of(geo)["4"]  # the norm keeps its exact block
    close(matrix[place[:, None], place], full[place[:, None], place])


@every_net
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_ekfac_has_the_exact_diagonal_in_the_eigenbasis(name: str, sharing: str) -> None:
    geo = geoad.GeoModule(NETS[name]())
    p, matrix = geo.point(), exact(geo)
    value = Fisher(geo, X, representation=EKFAC(sharing))(p)
    kfac = Fisher(geo, X, representation=KFAC(sharing))(p)
    close(value.to_dense().trace(), matrix.trace())
    blocks = Fisher(geo, X, representation="block_diagonal")(p).to_dense()
    assert float((value.to_dense() - blocks).norm()) <= float((kfac.to_dense() - blocks).norm()) * (1 + 1e-12)
    basis = torch.linalg.eigh(kfac.to_dense())[1]
    if name == "mlp":  # with distinct eigenvalues the basis is one
        rotated = basis.T @ blocks @ basis
        close(basis @ rotated.diagonal().diag() @ basis.T, value.to_dense(), 1e-6)


def test_a_mix_is_put_together_from_its_parts() -> None:
    geo = geoad.GeoModule(conv())
    p = geo.point()
    mix = Fisher(geo, X, representation={"1.*": "kfac", "3.*": "diagonal", "6.weight": "low_rank", "*": "dense"})(p)
    parts = {r: Fisher(geo, X, representation=r)(p).to_dense() for r in ("kfac", "diagonal", "dense")}
    matrix, groups = mix.to_dense(), groups_of(geo)
    for module, r in (("1", "kfac"), ("3", "diagonal"), ("4", "dense")):
        place = groups[module]
        close(matrix[place[:, None], place], parts[r][place[:, None], place])
    place = groups["6"][:24]
    close(matrix[place[:, None], place], parts["dense"][place[:, None], place])
    assert float(matrix[groups["1"][:, None], groups["3"]].abs().max()) == 0


STRUCTURED = ["dense", "block_diagonal", "diagonal", "quasi_diagonal", "kfac", "ekfac", "low_rank"]


@every_net
@pytest.mark.parametrize("representation", STRUCTURED)
def test_damped_solves_are_exact_and_the_same_in_every_chart(name: str, representation: str) -> None:
    geo = geoad.GeoModule(NETS[name]())
    psi = geo.reference.reparametrize(maps.Coupling(generator=torch.Generator().manual_seed(0)), name="psi").target
    p = geo.point()
    slope = geoad.grad(geo.loss(F.cross_entropy, (X, Y)))(p)
    field = Fisher(geo, X, representation=representation)
    damping = 1.0 if representation == "quasi_diagonal" else 1e-2  # an arrow need not be positive
    matrix = field(p).to_dense() + damping * torch.eye(p.chart.dim)
    wanted = torch.linalg.solve(matrix, slope.ravel())
    damped = (field + damping * Euclidean(geo.reference))(p)
    for step in (damped.sharp(slope), field(p).solve(slope, damping=damping), damped.inverse().mv(slope)):
        close(step.ravel(), wanted, 1e-9)
    q = p.to(psi)
    there = (field + damping * Euclidean(geo.reference))(q).sharp(slope.to(psi))
    close(there.to(geo.reference).ravel(), wanted, 1e-8)
    close(damped.logdet().value, torch.linalg.slogdet(matrix)[1], 1e-9)
    moved = field(q).to_dense()
    close(moved, ops.to_dense(field(p).to(psi).operator), 1e-9)


@pytest.mark.parametrize("representation", ["diagonal", "block_diagonal"])
def test_structure_imposed_in_another_chart(representation: str) -> None:
    """The diagonal of ψ is not the moved diagonal of θ, unless the map is elementwise."""
    geo = geoad.GeoModule(mlp())
    psi = geo.reference.reparametrize(maps.Coupling(generator=torch.Generator().manual_seed(0)), name="psi").target
    q = geo.point().to(psi)
    there = Fisher(geo, X, representation="dense")(q).to_dense()
    built = Fisher(geo, X, representation=representation, chart=psi)(q).to_dense()
    mask = torch.zeros_like(there)
    for place in [torch.tensor([i]) for i in range(psi.dim)] if representation == "diagonal" else groups_of(geo).values():
        mask[place[:, None], place] = 1
    close(built, there * mask, 1e-9)
    assert float((Fisher(geo, X, representation=representation)(q).to_dense() - built).norm()) > 1e-3 * float(built.norm())
    scaled = geo.reference.reparametrize(maps.Asinh(), name="elementwise").target
    q = geo.point().to(scaled)
    moved = Fisher(geo, X, representation="diagonal")(q)
    close(moved.to_dense(), Fisher(geo, X, representation="diagonal", chart=scaled)(q).to_dense(), 1e-9)


@pytest.mark.parametrize("representation", ["kfac", "ekfac", "quasi_diagonal"])
def test_layer_structure_is_refused_in_charts_that_mix(representation: str) -> None:
    geo = geoad.GeoModule(mlp())
    psi = geo.reference.reparametrize(maps.Asinh(), name="psi").target
    with pytest.raises(StructureNotPreservedError, match="psi"):
        Fisher(geo, X, representation=representation, chart=psi)(geo.point().to(psi))


@pytest.mark.parametrize("representation", STRUCTURED)
def test_running_averages(representation: str) -> None:
    geo = geoad.GeoModule(conv())
    psi = geo.reference.reparametrize(maps.Asinh(), name="psi").target
    p = geo.point()
    q = p.retract(p.chart.vector(0.1 * torch.randn(p.chart.dim), at=p))
    field = Fisher(geo, X, representation=representation)
    old, new = field(p), field(q)
    if representation == "ekfac":
        with pytest.raises(StructureNotPreservedError, match="eigenbases differ"):
            running_average(old, new, 0.9)
        return
    mean = running_average(old, new, 0.9)
    assert type(mean.op) is type(new.op)
    if representation != "kfac":
        close(mean.to_dense(), 0.9 * old.to_dense() + 0.1 * new.to_dense())
    else:
        left, right = (each.op.parts["6.weight", "6.bias"] for each in (old, new))
        wanted = torch.kron(0.9 * left.left[0] + 0.1 * right.left[0], 0.9 * left.right[0] + 0.1 * right.right[0])
        place = order(geo, "6")
        close(mean.to_dense()[place[:, None], place], wanted)
    there = running_average(field(p.to(psi)), field(q.to(psi)), 0.9)
    close(there.to(geo.reference).to_dense(), mean.to_dense(), 1e-9)


@pytest.mark.parametrize("representation", [*STRUCTURED, LowRank(3)])
def test_the_connection_is_that_of_the_represented_matrix(representation: Any) -> None:
    """Christoffel symbols of the first kind, against differences of the dense matrices."""
    geo = geoad.GeoModule(mlp())
    field = Fisher(geo, X, representation=representation)
    x, theta = geo.point().ravel(), geo.reference
    u, v, w = torch.randn(3, len(x))

    def form(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
        p = theta.point(x + t)
        return field(p)(theta.vector(a, at=p), theta.vector(b, at=p))

    def slope(along: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (form(1e-4 * along, a, b) - form(-1e-4 * along, a, b)) / 2e-4

    wanted = 0.5 * (slope(u, v, w) + slope(v, u, w) - slope(w, u, v))
    found = first_kind(field, theta.layout.unravel(x), theta.layout.unravel(u), theta.layout.unravel(v))
    torch.testing.assert_close(theta.layout.ravel(found) @ w, wanted, rtol=1e-5, atol=1e-7)
    other = contracted(field, theta.layout.unravel(x), theta.layout.unravel(v), theta.layout.unravel(w))
    torch.testing.assert_close(theta.layout.ravel(other) @ u, wanted, rtol=1e-5, atol=1e-7)


# -- Gauss-Newton and Hessian ------------------------------------------------------------------------------------------------


def ggn_by_hand(geo: geoad.GeoModule, loss: Callable[[Tensor, Tensor], Tensor], targets: Tensor) -> Tensor:
    f, j = jacobian(geo)
    a = torch.stack(
        [torch.func.hessian(lambda g, y=y: loss(g[None], y[None]))(each) for each, y in zip(f, targets, strict=True)]
    )
    return torch.einsum("nci,ncd,ndj->ij", j, a, j) / len(f)


LOSSES: dict[str, tuple[Any, Tensor]] = {
    "cross_entropy": (F.cross_entropy, Y),
    "mse": (F.mse_loss, torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))),
    "huber": (F.huber_loss, torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))),
    "own": (lambda f, y: ((f - y) ** 4).sum(-1).mean(), torch.randn(9, 3, dtype=torch.float64)),
}


@pytest.mark.parametrize("representation", ["implicit", "dense", "diagonal"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_gauss_newton_matrix_of_any_convex_loss(loss: str, representation: str) -> None:
    geo = geoad.GeoModule(mlp())
    fn, targets = LOSSES[loss]
    wanted = ggn_by_hand(geo, fn, targets)
    value = GGN(geo, (X, targets), fn, representation=representation)(geo.point()).to_dense()
    close(value, wanted.diagonal().diag() if representation == "diagonal" else wanted, 1e-9)
    close(GGN(geo, (X, targets), loss=fn)(geo.point()).to_dense(), wanted, 1e-9)


def test_the_pull_back_of_a_matrix_of_ones_own() -> None:
    geo = geoad.GeoModule(mlp())
    f, j = jacobian(geo)

    def a(outputs: Tensor, targets: Any) -> Tensor:
        return outputs[..., None] * outputs[..., None, :] + torch.eye(3)

    wanted = torch.einsum("nci,ncd,ndj->ij", j, a(f, None), j) / len(f)
    for representation in ("implicit", "dense", "low_rank", "block_diagonal"):
        value = GGN(geo, (X, Y), OutputMatrix(a), representation=representation)(geo.point())
        if representation != "block_diagonal":
            close(value.to_dense(), wanted)


def test_an_indefinite_matrix_keeps_its_signs() -> None:
    geo = geoad.GeoModule(mlp())
    f, j = jacobian(geo)
    a = torch.diag(torch.tensor([1.0, -2.0, 0.5]))
    wanted = torch.einsum("nci,cd,ndj->ij", j, a, j) / len(f)
    for representation in ("implicit", "dense", "low_rank", "diagonal"):
        field = GGN(
            geo, (X, Y), OutputMatrix(lambda f, y: a.expand(len(f), 3, 3), positive=False), representation=representation
        )
        value = field(geo.point())
        assert not isinstance(value, geoad.Metric)
        close(value.to_dense(), wanted.diagonal().diag() if representation == "diagonal" else wanted)


@pytest.mark.parametrize("outputs", [[0, 2], lambda f: f[:, 2:] - f[:, :1]])
def test_some_of_the_outputs(outputs: Any) -> None:
    geo = geoad.GeoModule(mlp())
    _, j = jacobian(geo)
    j = j[:, [0, 2]] if isinstance(outputs, list) else j[:, 2:] - j[:, :1]
    wanted = torch.einsum("nci,ncj->ij", j, j) / len(j)
    for representation in ("implicit", "dense"):
        close(Fisher(geo, X, "gaussian", representation=representation, outputs=outputs)(geo.point()).to_dense(), wanted)


def test_the_hessian_field() -> None:
    geo = geoad.GeoModule(mlp())
    p = geo.point()
    loss = geo.loss(F.cross_entropy, (X, Y))
    matrix = geoad.hessian(loss)(p).to_dense()
    layout = geo.reference.layout
    plain = torch.func.hessian(lambda v: F.cross_entropy(functional_call(geo.wrapped, layout.unravel(v), (X,)), Y))(p.ravel())
    close(matrix, plain)
    close(Hessian(loss)(p).to_dense(), plain)
    close(Hessian(geo, (X, Y), F.cross_entropy, representation="dense")(p).to_dense(), plain)
    close(Hessian(geo, (X, Y), F.cross_entropy, representation="diagonal")(p).to_dense(), plain.diagonal().diag())
    masked = torch.zeros_like(plain)
    for place in groups_of(geo).values():
        masked[place[:, None], place] = plain[place[:, None], place]
    close(Hessian(loss, representation="block_diagonal")(p).to_dense(), masked)
    values, vectors = torch.linalg.eigh(plain)
    first = values.abs().argsort(descending=True)[:3]
    best = (vectors[:, first] * values[first]) @ vectors[:, first].T
    close(Hessian(loss, representation=LowRank(3))(p).to_dense(), best, 1e-8)
    damped = Hessian(loss, representation="block_diagonal") + 10.0 * Euclidean(geo.reference)
    close(damped(p).to_dense(), masked + 10 * torch.eye(len(masked)))
    psi = geo.reference.reparametrize(maps.Coupling(generator=torch.Generator().manual_seed(0))).target
    close(Hessian(loss, representation="dense")(p.to(psi)).to_dense(), geoad.hessian(loss)(p.to(psi)).to_dense(), 1e-9)
    with pytest.raises(StructureNotPreservedError, match="GGN"):
        Hessian(loss, representation="kfac")(p)


# -- gradients of single samples ---------------------------------------------------------------------------------------------


@every_net
def test_gradients_of_single_samples(name: str) -> None:
    geo = geoad.GeoModule(NETS[name]())
    psi = geo.reference.reparametrize(maps.Coupling(generator=torch.Generator().manual_seed(0))).target
    loss = geo.loss(F.cross_entropy, [(X[:5], Y[:5]), (X[5:], Y[5:])])
    p = geo.point()
    rows = geoad.per_sample_grads(loss)(p)
    close(rows.ravel(), gradients(geo))
    close(geoad.per_sample_grads(geo, F.cross_entropy, (X, Y), max_memory=1)(p).ravel(), gradients(geo))
    there = geoad.per_sample_grads(loss)(p.to(psi))
    for i in (0, 8):
        one = geoad.grad(geo.loss(F.cross_entropy, (X[i : i + 1], Y[i : i + 1])))(p.to(psi))
        close(there.ravel()[i], one.ravel(), 1e-9)


@every_net
def test_gradients_of_single_samples_can_be_differentiated(name: str) -> None:
    geo = geoad.GeoModule(NETS[name]())
    rows, p = geoad.per_sample_grads(geo.loss(F.cross_entropy, (X, Y))), geo.point()
    theta, v = p.ravel(), torch.linspace(-1.0, 1.0, geo.reference.layout.dim, dtype=torch.float64)

    def energy(z: Tensor) -> Tensor:
        return rows(geo.reference.point(z)).ravel().square().sum() / 2

    def plain(z: Tensor) -> Tensor:
        def single(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(functional_call(geo.wrapped, geo.reference.layout.unravel(z), (x[None],)), y[None])

        # not by vmap: torch 2.13 has wrong second derivatives of embeddings there
        return torch.stack([torch.func.grad(single)(z, x, y) for x, y in zip(X, Y, strict=True)]).square().sum() / 2

    wanted = torch.func.grad(plain)(theta)
    close(torch.func.grad(energy)(theta), wanted, 1e-9)
    leaf = theta.clone().requires_grad_()
    close(torch.autograd.grad(energy(leaf), leaf)[0], wanted, 1e-9)
    close(torch.func.jvp(energy, (theta,), (v,))[1], wanted @ v, 1e-9)
    several = torch.stack([theta, theta + v / 9])
    close(torch.func.vmap(energy)(several), torch.stack([plain(z) for z in several]), 1e-9)


def test_many_gradients_of_samples_take_huge_pages_and_no_copy() -> None:
    geo = geoad.GeoModule(nn.Linear(64, 32).double())
    x, y = torch.randn(300, 64, dtype=torch.float64), torch.randn(300, 32, dtype=torch.float64)
    batch = geoad.per_sample_grads(geo.loss(F.mse_loss, (x, y)))(geo.point())
    back = (geo.wrapped(x) - y).detach() / 16
    close(batch.ravel(), torch.cat([(back[:, :, None] * x[:, None]).flatten(1), back], 1))
    assert batch.ravel().data_ptr() == batch.blocks["weight"].data_ptr()


def test_per_sample_gradients_refuse_what_has_no_samples() -> None:
    geo = geoad.GeoModule(mlp())
    loss = geo.loss(F.cross_entropy, (X, Y))
    prior = geo.scalar_field(lambda net: sum(w.square().sum() for w in net.parameters()))
    with pytest.raises(GeometryError, match="loss of a network over data"):
        geoad.per_sample_grads(loss + prior)
    with pytest.raises(GeometryError, match="takes a loss field"):
        geoad.per_sample_grads(geo)


# -- engineering -------------------------------------------------------------------------------------------------------------


@every_net
@pytest.mark.parametrize("representation", STRUCTURED)
def test_batches_and_memory_make_no_difference(name: str, representation: str) -> None:
    geo = geoad.GeoModule(NETS[name]())
    p = geo.point()
    whole = Fisher(geo, X, representation=representation)(p).to_dense()
    ragged = [(X[:4], Y[:4]), (X[4:8], Y[4:8]), (X[8:], Y[8:])]
    close(Fisher(geo, ragged, representation=representation)(p).to_dense(), whole, 1e-11)
    close(Fisher(geo, X, representation=representation, max_memory=1 << 13)(p).to_dense(), whole, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("representation", [*STRUCTURED, "implicit"])
def test_lower_precision(dtype: torch.dtype, representation: str) -> None:
    geo = geoad.GeoModule(conv())
    exactly = Fisher(geo, X, representation=representation)(geo.point()).to_dense()
    geo.to(dtype)
    value = Fisher(geo, X.to(dtype), representation=representation)(geo.point())
    assert value.dtype == dtype
    error = float((value.to_dense().double() - exactly).norm() / exactly.norm())
    limit = 1e-5 if dtype == torch.float32 else 0.05
    assert error < (10 * limit if representation == "ekfac" else limit)  # its eigenbases are sensitive


def test_coverage_names_the_rule_or_the_reason() -> None:
    geo = geoad.GeoModule(Tokens())
    coverage = Fisher(geo, X).coverage()
    assert list(coverage) == list(geo.reference.layout)
    assert "embedding" in coverage["embed.weight"]
    assert "affine" in coverage["mix.weight"]
    assert "scale" in coverage["norm.weight"]


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    geo = geoad.GeoModule(mlp())
    Fisher(geo, X, representation="dense", progress=True)(geo.point())
    assert "9/9" in capsys.readouterr().err


def test_bad_input_is_refused_at_the_call() -> None:
    geo = geoad.GeoModule(mlp())
    p = geo.point()
    with pytest.raises(GeometryError, match="kind='other'"):
        Fisher(geo, X, kind="other")
    with pytest.raises(GeometryError, match="needs the labels"):
        Fisher(geo, X, kind="empirical")(p).to_dense()
    with pytest.raises(GeometryError, match="samples=0"):
        Fisher(geo, X, kind="mc", samples=0)
    with pytest.raises(GeometryError, match="no pattern"):
        Fisher(geo, X, representation={"0.*": "kfac"})(p)
    with pytest.raises(GeometryError, match="match no block"):
        Fisher(geo, X, representation={"9.*": "kfac", "*": "dense"})(p)
    with pytest.raises(GeometryError, match="stored one"):
        Fisher(geo, X, representation={"*": "implicit"})
    with pytest.raises(GeometryError, match="one-shot"):
        Fisher(geo, iter([(X, Y)]))
    with pytest.raises(GeometryError, match=r"geo\.eval"):
        noisy = geoad.GeoModule(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
        Fisher(noisy, X, representation="kfac")(noisy.point())
    with pytest.raises(GeometryError):
        Fisher(geo, (X, Y + 7), Categorical(), kind="empirical", representation="dense")(p)
    with pytest.raises(SingularMetricError):
        slope = geoad.grad(geo.loss(F.cross_entropy, (X, Y)))(p)
        Fisher(geo, X[:1], representation="kfac")(p).sharp(slope)
    with pytest.raises(GeometryError, match=r"diagonal.*implicit"):
        wide = geoad.GeoModule(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)))
        Fisher(wide, X, representation="kfac", max_memory=100)(wide.point())
