"""LoRA, deficient factorisations, subspaces, frozen and tied blocks: values, shapes, domains, bases, and what is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from map_cases import close, normal
from torch import Tensor, nn

import geoad
from geoad import maps
from geoad.errors import ChartDomainError, ChartMismatchError, GeometryError, NotADiffeomorphismError
from geoad.testing import strategies as draws

WB = {"0.weight": (6, 5), "0.bias": (6,)}


def chart_and_point() -> tuple[geoad.Chart, geoad.Point]:
    theta = geoad.Chart(WB, "theta")
    return theta, theta.point({"0.weight": normal(1, 6, 5), "0.bias": normal(2, 6)})


# -- LoRA ----------------------------------------------------------------------------------------------------------------


def rank_at(psi: geoad.Chart, q: geoad.Point) -> int:
    def weights(y: Tensor) -> Tensor:
        return psi.reference.layout.ravel(psi.parent.map.invert(psi.layout.unravel(y)))

    return int(torch.linalg.matrix_rank(torch.func.jacrev(weights)(q.ravel())))


def test_lora_has_the_names_shapes_and_ranks_that_are_known() -> None:
    theta = geoad.Chart({"w": (6, 5)}, "theta")
    p = theta.point(normal(1, 6, 5))
    psi = theta.reparametrize(maps.LoRA(2, 16, base=p)).target
    assert dict(psi.layout.items()) == {"w_A": (2, 5), "w_B": (6, 2)} and psi.dim == 22
    q = psi.point({"w_A": normal(2, 2, 5), "w_B": normal(3, 6, 2)})
    assert rank_at(psi, q) == 18 and rank_at(psi, p.to(psi)) == 12
    expected = p.components + 8.0 * q.components["w_B"] @ q.components["w_A"]
    assert close(q.to(theta).components, expected, 1e-14)


def test_lora_starts_as_peft_does() -> None:
    theta = geoad.Chart({"w": (40, 30)}, "theta")
    p = theta.point(normal(1, 40, 30))
    psi = [theta.reparametrize(maps.LoRA(4, base=p, generator=torch.Generator().manual_seed(s))).target for s in (0, 0, 1)]
    A = [p.to(each).components["w_A"] for each in psi]
    assert torch.equal(A[0], A[1]) and not torch.equal(A[0], A[2])
    bound = 30**-0.5
    assert float(A[0].abs().max()) <= bound and float(A[0].abs().max()) > 0.9 * bound
    assert abs(float(A[0].var()) - bound**2 / 3) < 0.3 * bound**2 / 3
    assert not p.to(psi[0]).components["w_B"].any()
    assert p.to(psi[0]).to(theta) is p


def test_lora_of_a_convolution_is_that_of_peft() -> None:
    """lora_B(lora_A(x)), two convolutions, is the convolution with the update."""
    conv = nn.Conv2d(3, 8, (3, 2), stride=2, padding=1, bias=False)
    theta = geoad.Chart({"weight": (8, 3, 3, 2)}, "theta")
    p = theta.point(conv.weight.detach())
    psi = theta.reparametrize(maps.LoRA(2, base=p)).target
    assert dict(psi.layout.items()) == {"weight_A": (2, 3, 3, 2), "weight_B": (8, 2, 1, 1)}
    A, B, x = normal(1, 2, 3, 3, 2), normal(2, 8, 2, 1, 1), normal(3, 4, 3, 9, 9)
    W = psi.point({"weight_A": A, "weight_B": B}).to(theta).components
    two = nn.functional.conv2d(nn.functional.conv2d(x, A, stride=2, padding=1), B)
    one = nn.functional.conv2d(x, W - p.components, stride=2, padding=1)
    assert close(one, two, 1e-12)


def test_lora_finds_factors_of_reachable_weights_and_refuses_others() -> None:
    theta, p = chart_and_point()
    psi = theta.reparametrize({"*.weight": maps.LoRA(2, 6.0, base=p)}, "lora").target
    update = normal(3, 6, 2) @ normal(4, 2, 5)
    near = theta.point({"0.weight": p.components["0.weight"] + update, "0.bias": normal(5, 6)})
    q = near.to(psi)
    A, B = q.components["0.weight_A"], q.components["0.weight_B"]
    assert close(3.0 * B @ A, update, 1e-13) and close(A @ A.mT, B.mT @ B, 1e-12)
    assert torch.equal(q.components["0.bias"], near.components["0.bias"])
    thin = theta.point({"0.weight": p.components["0.weight"] + normal(3, 6, 1) @ normal(4, 1, 5), "0.bias": normal(5, 6)})
    assert close(psi.point(thin.to(psi).components).to(theta).ravel(), thin.ravel(), 1e-13)
    far = theta.point({"0.weight": normal(6, 6, 5), "0.bias": normal(5, 6)})
    with pytest.raises(ChartDomainError, match=r"'lora'.*'0\.weight'.*singular value number 3"):
        far.to(psi)


def test_lora_at_its_base_sees_through_rounding() -> None:
    theta, p = chart_and_point()
    far = theta.reparametrize(maps.Affine(generator=torch.Generator().manual_seed(0))).target
    psi = theta.reparametrize({"*.weight": maps.LoRA(2, base=far.point(p.to(far).components))}).target
    q = theta.point(p.components).to(psi)
    assert not q.components["0.weight_B"].any()


def test_the_gradient_in_lora_coordinates_is_that_of_autodiff() -> None:
    theta, p = chart_and_point()
    psi = theta.reparametrize({"*.weight": maps.LoRA(2, base=p)}).target
    L = theta.scalar_field(lambda w: (w["0.weight"].sin() @ normal(7, 5) + w["0.bias"]).pow(3).sum())
    q = psi.point({name: normal(8, *shape) for name, shape in psi.layout.items()})

    def plain(A: Tensor, B: Tensor, b: Tensor) -> Tensor:
        return ((p.components["0.weight"] + B @ A).sin() @ normal(7, 5) + b).pow(3).sum()

    found = geoad.grad(L)(q).components
    expected = torch.func.grad(plain, (0, 1, 2))(*(q.components[n] for n in ("0.weight_A", "0.weight_B", "0.bias")))
    for name, each in zip(("0.weight_A", "0.weight_B", "0.bias"), expected, strict=True):
        assert close(found[name], each)


def test_lora_is_fine_tuning_of_a_network() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    geo = geoad.GeoModule(net)
    base = geo.point()
    psi = geo.reference.reparametrize({"*.weight": maps.LoRA(1, base=base), "*.bias": maps.Frozen(base)}, "lora").target
    assert [name.rsplit("_")[-1] for name in psi.layout] == ["A", "B", "A", "B"]
    x, y = normal(1, 20, 4), torch.arange(20) % 3
    L = geo.loss(nn.functional.cross_entropy, (x, y))
    q = base.to(psi)
    assert close(L(q), L(base), 1e-14)
    G = geoad.metrics.Euclidean(psi)
    before = float(L(q))
    for _ in range(20):
        q = q.retract(geoad.riemannian_grad(L, G)(q), -0.5)
    assert float(L(q)) < before - 0.01
    changed = q.to(geo.reference).components
    for name, kept in base.components.items():
        rank = 0 if "bias" in name else 1
        difference = changed[name] - kept
        assert int(torch.linalg.matrix_rank(difference if rank else difference[None], atol=1e-12)) == rank


# -- deficient factorisations ----------------------------------------------------------------------------------------------


def test_deficient_factors_have_the_ranks_that_are_known() -> None:
    theta = geoad.Chart({"w": (6, 5)}, "theta")
    for rank, expected in ((3, 24), (5, 30)):
        psi = theta.reparametrize(maps.Factorization(rank)).target
        q = psi.point({"w_u": normal(1, 6, rank), "w_v": normal(2, rank, 5)})
        assert rank_at(psi, q) == expected
    assert isinstance(theta.reparametrize(maps.Factorization(5)).map.parts[0], maps.Submersion)
    assert not isinstance(theta.reparametrize(maps.Factorization(4)).map.parts[0], maps.Submersion)
    assert all(isinstance(theta.reparametrize(maps.Factorization(k)).map.parts[0], maps.Factorization) for k in (4, 5))


def test_deficient_factors_are_balanced_and_matrices_of_higher_rank_are_outside() -> None:
    theta = geoad.Chart({"w": (6, 2, 3)}, "theta")
    psi = theta.reparametrize(maps.Factorization(2), "uv").target
    w = (normal(1, 6, 2) @ normal(2, 2, 6)).reshape(6, 2, 3)
    u, v = theta.point(w).to(psi).components.values()
    assert close((u @ v).reshape(6, 2, 3), w, 1e-13) and close(u.mT @ u, v @ v.mT, 1e-12)
    with pytest.raises(ChartDomainError, match=r"'uv'.*singular value number 3"):
        theta.point(normal(3, 6, 2, 3)).to(psi)
    assert not theta.point(torch.zeros(6, 2, 3)).to(psi).ravel().any()


def test_one_recipe_is_another_kind_of_map_on_another_block() -> None:
    theta = geoad.Chart({"a": (6, 5), "b": (6, 2)}, "theta")
    phi = theta.reparametrize(maps.Factorization(3), "uv")
    assert [part.law for part in phi.map.parts] == ["smooth", "submersion"] and phi.map.law == "smooth"
    assert theta.reparametrize({"b": maps.Factorization(3)}).map.law == "submersion"


# -- subspaces -------------------------------------------------------------------------------------------------------------


def test_random_subspaces() -> None:
    theta, p = chart_and_point()
    seeds = [torch.Generator().manual_seed(s) for s in (0, 0, 1)]
    psi = [theta.reparametrize(maps.Subspace(4, p, generator=each), "z").target for each in seeds]
    q = [each.point(normal(1, 4)) for each in psi]
    assert torch.equal(q[0].to(theta).ravel(), q[1].to(theta).ravel())
    assert not torch.equal(q[0].to(theta).ravel(), q[2].to(theta).ravel())
    G = geoad.metrics.Euclidean(theta)
    assert close(G(q[0]).to_dense(), torch.eye(4), 1e-13)
    raw = theta.reparametrize(maps.Subspace(4, p, orthonormal=False, generator=torch.Generator().manual_seed(0))).target
    gram = G(raw.point(normal(1, 4))).to_dense()
    assert not close(gram, torch.eye(4), 1e-3) and close(gram, torch.eye(4), 1.0)
    assert psi[0].layout.names == ("z",) and theta.reparametrize(maps.Subspace(2, name="s")).target.layout.names == ("s",)


def test_points_of_a_subspace_and_others() -> None:
    theta, p = chart_and_point()
    psi = theta.reparametrize(maps.Subspace(4, p), "z").target
    assert not theta.point(p.components).to(psi).ravel().any()
    with pytest.raises(ChartDomainError, match=r"'z'.*subspace of dimension 4.*distance"):
        theta.point({"0.weight": normal(1, 6, 5), "0.bias": normal(2, 6) + 1e-6}).to(psi)
    big = psi.point(1e6 * normal(3, 4))
    again = theta.point(big.to(theta).components).to(psi)
    assert close(again.ravel(), big.ravel(), 1e-12)


def test_bases_of_subspaces_are_checked() -> None:
    theta, p = chart_and_point()
    for basis, words in (
        (0, "at least one dimension"),
        (True, "at least one dimension"),
        (normal(1, 35, 2), r"shape \(35, 2\)"),
        (normal(1, 36), r"shape \(36,\)"),
        (normal(1, 36, 1) @ normal(2, 1, 2), "depend on each other"),
        (torch.zeros(36, 1), "depend on each other"),
        (torch.full((36, 2), torch.nan), "not finite"),
        ({"0.weight": normal(1, 6, 5, 2)}, r"'0\.bias'.*nothing"),
        ({"0.weight": normal(1, 6, 5, 2), "0.bias": normal(1, 6, 3)}, r"shape \(6, 2\).*shape \(6, 3\)"),
    ):
        with pytest.raises(GeometryError, match=words):
            theta.reparametrize(maps.Subspace(basis, p))
    with pytest.raises(NotADiffeomorphismError, match="37 coordinates to 36"):
        theta.reparametrize(maps.Subspace(37))
    assert theta.reparametrize(maps.Subspace(36)).target.dim == 36


# -- frozen and tied blocks --------------------------------------------------------------------------------------------------


def test_frozen_blocks_keep_dtype_and_values() -> None:
    theta, p = chart_and_point()
    psi = theta.reparametrize({"*.bias": maps.Frozen(p)}, "weights").target
    assert psi.layout.names == ("0.weight",)
    q = psi.point({"0.weight": normal(4, 6, 5).float()})
    moved = q.to(theta)
    assert moved.components["0.bias"].dtype == torch.float32
    assert close(moved.components["0.bias"], p.components["0.bias"].float(), 1e-7)
    with pytest.raises(ChartDomainError, match=r"'weights'.*frozen block '0\.bias'"):
        theta.point({"0.weight": normal(4, 6, 5), "0.bias": normal(2, 6) + 1e-8}).to(psi)
    with pytest.raises(GeometryError, match="leaves no coordinate"):
        theta.reparametrize(maps.Frozen(p))


def test_tied_blocks() -> None:
    theta = geoad.Chart({"a": (2, 3), "b": (2,), "c": (2, 3), "d": (2,)}, "theta")
    psi = theta.reparametrize(maps.Tied(), "tied").target
    assert psi.layout.names == ("a", "b")
    same = theta.point({"a": normal(1, 2, 3), "b": normal(2, 2), "c": normal(1, 2, 3), "d": normal(2, 2)})
    assert torch.equal(same.to(psi).components["a"], normal(1, 2, 3))
    with pytest.raises(ChartDomainError, match="'b' and 'd' must be equal"):
        theta.point({**same.components, "d": normal(2, 2) + 1e-8}).to(psi)
    with pytest.raises(GeometryError, match="no two have the same shape"):
        theta.reparametrize({"[ab]": maps.Tied()})
    only = theta.reparametrize({"[ac]": maps.Tied()}).target
    assert only.layout.names == ("a", "b", "d")


def test_a_tied_network_has_the_gradient_of_tied_weights() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    geo = geoad.GeoModule(net)
    psi = geo.reference.reparametrize({"*.weight": maps.Tied(), "*.bias": maps.Tied()}, "recurrent").target
    x = normal(1, 5, 3)
    w, b = normal(2, 3, 3), normal(3, 3)
    q = psi.point({"0.weight": w, "0.bias": b})
    L = geo.loss(nn.functional.mse_loss, (x, x))

    def plain(w: Tensor, b: Tensor) -> Tensor:
        return nn.functional.mse_loss((x @ w.mT + b).tanh() @ w.mT + b, x)

    gw, gb = torch.func.grad(plain, (0, 1))(w, b)
    found = geoad.grad(L)(q).components
    assert close(found["0.weight"], gw) and close(found["0.bias"], gb)
    steepest = geoad.riemannian_grad(L)(q).components
    assert close(steepest["0.weight"], gw / 2)


# -- base points -------------------------------------------------------------------------------------------------------------

RECIPES: dict[str, Any] = {
    "lora": lambda base: {"*.weight": maps.LoRA(2, base=base)},
    "frozen": lambda base: {"*.bias": maps.Frozen(base)},
    "subspace": lambda base: maps.Subspace(3, base, generator=torch.Generator().manual_seed(0)),
}
based = pytest.mark.parametrize("make", RECIPES.values(), ids=RECIPES.keys())


@based
def test_a_base_is_a_point_in_any_chart_or_a_dict(make: Any) -> None:
    theta, p = chart_and_point()
    elsewhere = theta.reparametrize(maps.Asinh()).target
    expected = theta.reparametrize(make(p)).target
    y = expected.layout.unravel(normal(3, expected.dim))
    reached = expected.point(y).to(theta).ravel()
    parameters = {name: nn.Parameter(block) for name, block in p.components.items()}
    computed = {name: 1 * block for name, block in parameters.items()}  # in the middle of an autograd graph
    for base in (p.to(elsewhere), p.components, parameters, computed, p.to(torch.float64)):
        psi = theta.reparametrize(make(base)).target
        if "0.weight_A" in psi.layout or "z" in psi.layout or base is not p:
            assert close(psi.point(y).to(theta).ravel(), reached, 1e-12)
        assert not psi.learnable


@based
def test_a_base_goes_through_the_steps_of_a_composition(make: Any) -> None:
    theta, p = chart_and_point()
    middle = theta.reparametrize(maps.Sinh()).target
    expected = middle.reparametrize(make(p)).target
    psi = theta.reparametrize(maps.Compose(maps.Sinh(), make(p))).target
    deep = theta.reparametrize(maps.Compose(maps.Compose(maps.Scale(2.0), maps.Scale(0.5)), maps.Sinh(), make(p))).target
    y = expected.layout.unravel(normal(3, expected.dim))
    for chart in (psi, deep):
        assert close(chart.point(y).to(theta).ravel(), expected.point(y).to(theta).ravel(), 1e-12)


@based
def test_bad_bases(make: Any) -> None:
    theta, p = chart_and_point()
    with pytest.raises(ChartMismatchError):
        theta.reparametrize(make(geoad.Chart(WB, "other").point(p.components)))
    with pytest.raises(GeometryError, match="not among"):
        theta.reparametrize(make({"x": torch.zeros(2)}))
    with pytest.raises(GeometryError, match="has shape"):
        theta.reparametrize(make({"0.weight": torch.zeros(1), "0.bias": torch.zeros(2)}))
    with pytest.raises(GeometryError, match="has shape"):
        theta.reparametrize(make(theta.point({name: normal(1, 2, *shape) for name, shape in WB.items()})))
    with pytest.raises(GeometryError, match="not finite"):
        theta.reparametrize(make({"0.weight": torch.full((6, 5), torch.nan), "0.bias": torch.full((6,), torch.nan)}))
    with pytest.raises(GeometryError, match="found a str"):
        theta.reparametrize(make("weights"))


def test_missing_bases_and_wrong_blocks() -> None:
    theta, p = chart_and_point()
    from_zero = theta.reparametrize({"*.weight": maps.LoRA(2)}, "from zero").target
    with pytest.raises(ChartDomainError, match=r"no base was given.*base=geo\.point\(\)"):
        p.to(from_zero)
    q = from_zero.point({name: torch.randn(shape) for name, shape in from_zero.layout.items()})
    torch.testing.assert_close(q.to(theta).blocks["0.weight"], q.blocks["0.weight_B"] @ q.blocks["0.weight_A"])
    with pytest.raises(GeometryError, match=r"Frozen needs the values.*found nothing.*geo\.point\(\)"):
        theta.reparametrize({"*.bias": maps.Frozen(None)})
    with pytest.raises(GeometryError, match=r"LoRA was bound to a block of shape \(6,\)"):
        theta.reparametrize(maps.LoRA(2, base=p))
    for alpha in (0.0, float("nan"), float("inf")):
        with pytest.raises(GeometryError, match="finite alpha"):
            maps.LoRA(2, alpha, base=p)


@based
def test_bound_maps_are_copied_and_pickled_with_their_numbers_only(make: Any) -> None:
    theta, p = chart_and_point()
    bound = theta.reparametrize(make(p)).map
    y = {name: normal(1, *shape) for name, shape in bound.image_shapes.items()}
    for twin in (pickle.loads(pickle.dumps(bound)), copy.deepcopy(bound)):
        assert all(torch.equal(a, b) for a, b in zip(twin.invert(y).values(), bound.invert(y).values(), strict=True))
    assert all(part.base is None for part in bound.parts)


@based
def test_chart_to_chart_between_two_siblings(make: Any) -> None:
    """From one of these charts to another chart of the manifold and back: the point is the same."""
    theta, p = chart_and_point()
    psi, polar = theta.reparametrize(make(p)).target, theta.reparametrize({"*.weight": maps.WeightNorm()}).target
    q = psi.point(psi.layout.unravel(normal(2, psi.dim)))
    assert q.to(polar).to(psi) is q
    u = psi.vector(psi.layout.unravel(normal(3, psi.dim)), at=q)
    assert close(u.to(polar).to(theta).ravel(), u.to(theta).ravel(), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_precision(dtype: torch.dtype) -> None:
    """Linear algebra takes place in single precision where there is none below."""
    theta, p = chart_and_point()
    base = theta.point({name: block.to(dtype) for name, block in p.components.items()})
    for recipe in (
        {"*.weight": maps.LoRA(2, base=base), "*.bias": maps.Frozen(base)},
        {"*.weight": maps.Factorization(5)},
        {"*.weight": maps.Factorization(7, metric={"u": 2.0, "v": 1.0})},
        {"*.weight": maps.Factorization(2)},
        maps.Subspace(3, base),
    ):
        psi = theta.reparametrize(recipe).target
        q = psi.point({name: normal(3, *shape).to(dtype) for name, shape in psi.layout.items()})
        there = theta.point(q.to(theta).components)
        again = psi.point(there.to(psi).components).to(theta)
        assert again.dtype == there.dtype == dtype
        assert close(again.ravel().double(), there.ravel().double(), 50 * torch.finfo(dtype).eps)
        v = psi.vector({name: normal(4, *shape).to(dtype) for name, shape in psi.layout.items()}, at=q).to(theta)
        w = theta.covector({name: normal(5, *shape).to(dtype) for name, shape in WB.items()}, at=q.to(theta)).to(psi)
        assert v.ravel().dtype == w.ravel().dtype == dtype
        if psi.parent.map.law == "submersion":
            lifted = v.to(psi)
            assert lifted.ravel().dtype == dtype
            assert close(lifted.to(theta).ravel().double(), v.ravel().double(), 100 * torch.finfo(dtype).eps)


# -- hypothesis: random maps of every kind ---------------------------------------------------------------------------------


def jacobian_of(phi: geoad.Reparametrization, q: geoad.Point) -> Tensor:
    theta, psi = phi.source.layout, phi.target.layout
    return torch.func.jacrev(lambda y: theta.ravel(phi.map.invert(psi.unravel(y))))(q.ravel())


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_submersions(data: Any) -> None:
    theta = data.draw(draws.charts(max_dim=8))
    phi = data.draw(draws.submersions(theta))
    q = data.draw(draws.points_above(phi))
    p, psi = q.to(theta), phi.target
    j = jacobian_of(phi, q)
    v, w = data.draw(draws.vectors(p)), data.draw(draws.covectors(p))
    G = data.draw(draws.metrics(p))
    lifted = v.to(psi)
    assert close(j @ lifted.ravel(), v.ravel(), 1e-9)
    assert close(w.to(psi).ravel(), j.mT @ w.ravel())
    assert close(w.to(psi)(lifted), w(v), 1e-9)
    assert close(G.to(psi).to_dense(), j.mT @ G.to_dense() @ j, 1e-9)
    assert close(G.to(psi).sharp(w.to(psi)).to(theta).ravel(), G.sharp(w).ravel(), 1e-8)
    end = q.retract(0.05 * lifted)
    assert close(psi.point(end.components).to(theta).ravel(), p.ravel() + 0.05 * v.ravel(), 1e-10)
    B = data.draw(draws.forms(p, symmetric=True))
    E = G.inverse() @ B
    assert close(E.to(psi).trace(), E.trace(), 1e-9)
    assert close(geoad.quotient_logdet(B.to(psi), G.to(psi)), B.slogdet()[1] - G.slogdet()[1], 1e-8)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_immersions(data: Any) -> None:
    theta = data.draw(draws.charts(max_dim=8).filter(lambda chart: chart.dim > 1))
    phi = data.draw(draws.immersions(theta))
    q = data.draw(draws.points_above(phi))
    p, psi = q.to(theta), phi.target
    j = jacobian_of(phi, q)
    u, w = data.draw(draws.vectors(q)), data.draw(draws.covectors(p))
    G, B = data.draw(draws.metrics(p)), data.draw(draws.forms(p))
    assert close(u.to(theta).ravel(), j @ u.ravel())
    assert close(u.to(theta).to(psi).ravel(), u.ravel(), 1e-9)
    assert close(w.to(psi).ravel(), j.mT @ w.ravel())
    assert close(B.to(psi).to_dense(), j.mT @ B.to_dense() @ j)
    induced = j.mT @ G.to_dense() @ j
    assert close(G.to(psi).sharp(w.to(psi)).ravel(), torch.linalg.solve(induced, j.mT @ w.ravel()), 1e-8)
    if psi.dim < theta.dim:
        normals = torch.linalg.svd(j).U[:, psi.dim :]
        with pytest.raises(NotADiffeomorphismError):
            theta.vector(theta.layout.unravel(normals[:, 0]), at=p).to(psi)


def test_condition_numbers_are_those_of_the_map_and_not_of_its_section() -> None:
    theta = geoad.Chart({"w": (2, 3)}, "theta")
    p = theta.point(normal(1, 2, 3))
    for recipe in (maps.WeightNorm(), maps.Factorization(2), maps.LoRA(1, base=p), maps.Subspace(6)):
        phi = theta.reparametrize(recipe)
        expected = float(torch.linalg.cond(jacobian_of(phi, p.to(phi.target))))
        found = geoad.testing.condition(phi, p)
        assert found == pytest.approx(expected, rel=1e-6) or min(found, expected) > 1e14
