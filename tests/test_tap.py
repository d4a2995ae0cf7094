"""The tap, the plan and the rows of single samples, against ``vmap`` + ``jacrev`` on the plain network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tap_cases import CASES, Hidden, Lambda
from torch import Tensor, nn
from torch.nn import functional as F

import geoad
from geoad.data import take
from geoad.kernels import positions
from geoad.kernels.jacobians import sample_jacobian
from geoad.kernels.layered import Linearized, linearize, plan_of
from geoad.kernels.rows import Plan, Rows
from geoad.kernels.tap import Tap
from geoad.testing import zoo

SAMPLES, SEEDS = 5, 2
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:LSTM with projections")


def case(name: str) -> tuple[geoad.GeoModule, Any, Tensor]:
    """(network, its parameters, inputs)."""
    torch.manual_seed(0)
    each = CASES[name]
    geo = geoad.GeoModule(each.make())
    shape = (SAMPLES, *each.shape)
    return geo, geo.point().blocks, torch.randint(each.tokens, shape) if each.tokens else torch.randn(shape)


def rows_of(geo: geoad.GeoModule, x: Any, inputs: Any, seeds: int = SEEDS) -> tuple[Plan, Linearized, Rows, Tensor]:
    """(plan, linearized, rows, the seeds)."""
    plan = plan_of(geo.evaluate, x, take(inputs, slice(0, 1)))
    linearized = linearize(geo.evaluate, geo.reference.layout, x, inputs, plan)
    s = torch.randn(seeds, *linearized.outputs.shape)
    return plan, linearized, linearized.pull(s.to(linearized.outputs.dtype)), s


def expected(geo: geoad.GeoModule, x: Any, inputs: Any, s: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and rows (n, K, d), by ``vmap`` and ``jacrev``."""
    layout = geo.reference.layout
    f, jacobian = sample_jacobian(geo.evaluate, layout, x, inputs)
    return f, torch.einsum("knc,ncd->nkd", s.flatten(2), jacobian.reshape(len(f), -1, layout.dim))


def explicit(rows: Rows) -> Tensor:
    return torch.cat([rows.explicit(name) for name in rows.layout], -1)


@pytest.mark.parametrize("name", list(CASES))
def test_rows_agree_with_vmap_and_jacrev(name: str) -> None:
    geo, x, inputs = case(name)
    plan, linearized, rows, s = rows_of(geo, x, inputs)
    f, reference = expected(geo, x, inputs, s)
    covered = CASES[name].covered
    assert plan.covered == (set(x) if covered == "all" else covered)
    assert set(plan.others) == set(x) - plan.covered
    assert linearized.plan.covered == plan.covered
    torch.testing.assert_close(linearized.outputs, f, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(explicit(rows), reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["conv2d", "twice", "embedding, padded", "slices", "bias alone"])
def test_seeds_together_or_in_turn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    geo, x, inputs = case(name)
    _, linearized, rows, s = rows_of(geo, x, inputs, seeds=4)
    monkeypatch.setattr("geoad.kernels.layered._SMALL", 0)
    torch.testing.assert_close(explicit(linearized.pull(s)), explicit(rows), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_rows_of_the_zoo(name: str) -> None:
    model = zoo.build(name)
    geo = model.geo()
    x = geo.point().blocks
    _, linearized, rows, s = rows_of(geo, x, model.inputs)
    f, reference = expected(geo, x, model.inputs, s)
    torch.testing.assert_close(linearized.outputs, f, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(explicit(rows), reference, rtol=1e-12, atol=1e-12)


GENERIC = {
    "raw nn.Parameter": {"core", "scale"},
    "Bilinear, two inputs": {"head.weight", "head.bias"},
    "complex numbers (FFT)": {"real", "imaginary"},
    "nn.GRUCell in a loop": {f"cell.{kind}_{of}" for kind in ("weight", "bias") for of in ("ih", "hh")},
}
PREFIXES = {"parametrizations.": "0.parametrizations", "custom parametrize": "0.parametrizations"}
SINGLY = ("nn.GRU", "nn.LSTM", "nn.LSTM, two layers, projected", "nn.GRU, bidirectional", "nn.RNN", "mixture of experts")


@pytest.mark.parametrize("name", zoo.NAMES)
def test_coverage_of_the_zoo(name: str) -> None:
    model = zoo.build(name)
    geo = model.geo()
    x = geo.point().blocks
    coverage = plan_of(geo.evaluate, x, take(model.inputs, slice(0, 1))).coverage()
    generic = {block for block, how in coverage.items() if how.startswith("generic")}
    assert set(coverage) == set(x)
    if name in SINGLY:
        assert generic == set(x)
        return
    prefix = next((p for start, p in PREFIXES.items() if name.startswith(start)), None)
    wanted = {block for block in x if prefix is not None and block.startswith(prefix)}
    assert generic == GENERIC.get(name, wanted)


def test_an_input_that_is_changed_in_place_after_its_layer_is_an_error_as_in_torch() -> None:
    def overwritten(p: Any, x: Tensor) -> Tensor:
        h = x.clone()
        y = F.linear(h, p.w)
        h.tanh_()
        return y + h[:, :3]

    geo = geoad.GeoModule(Lambda(overwritten, w=(3, 4)))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rows_of(geo, geo.point().blocks, torch.randn(SAMPLES, 4))


def test_coverage_says_why() -> None:
    geo, x, inputs = case("used outside of layers")
    assert plan_of(geo.evaluate, x, inputs[:1]).coverage() == {"b": "affine", "w": "generic: torch.Tensor.sin"}
    geo, x, inputs = case("twice")
    coverage = plan_of(geo.evaluate, x, inputs[:1]).coverage()
    assert coverage["unused"] == "generic: not used"
    assert (coverage["norm.weight"], coverage["norm.bias"], coverage["a.weight"]) == ("scale", "shift", "affine")
    geo, x, inputs = case("hidden from torch functions")
    assert "does not see" in plan_of(geo.evaluate, x, inputs[:1]).coverage()["w"]
    geo, x, inputs = case("recurrent")
    assert "vmap cannot batch" in plan_of(geo.evaluate, x, inputs[:1]).coverage()["head.weight"]


def test_a_network_that_takes_another_path_than_the_first_sample_is_still_right() -> None:
    """Which operations run depends on how long the sequences of a batch are."""

    def forward(p: Any, x: Tensor) -> Tensor:
        return F.linear(x, p.w).mean(1) if x.shape[1] > 2 else F.linear(x.sum(1), p.w * 2.0)

    geo = geoad.GeoModule(Lambda(forward, w=(3, 4)))
    x, long, short = geo.point().blocks, torch.randn(SAMPLES, 3, 4), torch.randn(SAMPLES, 2, 4)
    plan = plan_of(geo.evaluate, x, long[:1])
    assert plan.covered == {"w"}
    for inputs in (long, short):
        linearized = linearize(geo.evaluate, geo.reference.layout, x, inputs, plan)
        s = torch.randn(SEEDS, *linearized.outputs.shape)
        torch.testing.assert_close(explicit(linearized.pull(s)), expected(geo, x, inputs, s)[1], rtol=1e-12, atol=1e-12)
    assert not linearize(geo.evaluate, geo.reference.layout, x, short, plan).plan.covered
    longer = torch.randn(SAMPLES, 5, 4)  # the same operations, with other shapes
    assert not linearize(geo.evaluate, geo.reference.layout, x, longer, plan).plan.covered


class Mixed(nn.Module):
    """Layers that compute in another precision than the parameters have."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.b(torch.tanh(self.a(x))).float()


def test_mixed_precision_is_that_of_the_network() -> None:
    torch.manual_seed(0)
    geo, inputs = geoad.GeoModule(Mixed().float()), torch.randn(6, 4, dtype=torch.float32)
    x = geo.point().blocks
    _, linearized, rows, s = rows_of(geo, x, inputs)
    f, reference = expected(geo, x, inputs, s.float())
    torch.testing.assert_close(linearized.outputs, f, rtol=2e-2, atol=2e-2)
    assert linearized.plan.covered == set(x)
    assert explicit(rows).dtype == torch.float32
    torch.testing.assert_close(explicit(rows), reference, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_gives_rows_in_single_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    inputs = torch.randn(SAMPLES, 4)
    exact = geoad.GeoModule(net)
    geo = geoad.GeoModule(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype))
    geo.wrapped.load_state_dict(net.state_dict())
    x = geo.point().blocks
    _, _, rows, s = rows_of(geo, x, inputs.to(dtype))
    _, reference = expected(exact, exact.point().blocks, inputs, s)
    assert explicit(rows).dtype == torch.float32
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(explicit(rows).double(), reference, rtol=tolerance, atol=tolerance)


def test_rows_are_differentiable_in_the_parameters() -> None:
    geo, x, inputs = case("mlp")
    layout, plan = geo.reference.layout, plan_of(geo.evaluate, x, inputs[:1])
    v = {name: torch.randn_like(block) for name, block in x.items()}
    s = torch.randn(SEEDS, SAMPLES, 3)

    def structured(y: Any) -> Tensor:
        return explicit(linearize(geo.evaluate, layout, y, inputs, plan).pull(s))

    def plain(y: Any) -> Tensor:
        return expected(geo, y, inputs, s)[1]

    torch.testing.assert_close(torch.func.jvp(structured, (x,), (v,))[1], torch.func.jvp(plain, (x,), (v,))[1])

    def planned(y: Any) -> Tensor:
        return explicit(linearize(geo.evaluate, layout, y, inputs, plan_of(geo.evaluate, y, inputs[:1])).pull(s))

    torch.testing.assert_close(torch.func.jvp(planned, (x,), (v,))[1], torch.func.jvp(plain, (x,), (v,))[1])
    leaves = {name: block.clone().requires_grad_() for name, block in x.items()}
    total = structured(leaves).square().sum()
    slopes = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True, allow_unused=True)
    wanted = torch.func.grad(lambda y: plain(y).square().sum())(x)
    torch.testing.assert_close(dict(zip(x, slopes, strict=True)), wanted)


def test_rows_of_plain_points_hold_no_graph() -> None:
    geo, x, inputs = case("conv2d")
    _, linearized, rows, _ = rows_of(geo, x, inputs)
    assert not linearized.outputs.requires_grad
    assert not any(each.requires_grad for use in rows.uses for each in (use.a, *use.back))


def test_parts_of_rows_and_writing_them() -> None:
    geo, x, inputs = case("twice")
    _, _, rows, s = rows_of(geo, x, inputs, seeds=1)
    part = rows.part(slice(1, 4))
    assert part.samples == 3
    torch.testing.assert_close(explicit(part), explicit(rows)[1:4])
    result = {name: torch.zeros(7, *block.shape) for name, block in x.items()}
    rows.write(result, slice(2, 7))
    torch.testing.assert_close(geo.reference.layout.ravel(result)[2:], expected(geo, x, inputs, s)[1][:, 0])
    with pytest.raises(ValueError, match="single seed"):
        rows_of(geo, x, inputs, seeds=2)[2].write(result, slice(2, 7))


@pytest.mark.parametrize("cache", [1, 4000, 1 << 20])
@pytest.mark.parametrize("name", sorted(CASES))
def test_rows_are_written_by_portions(name: str, cache: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(positions, "_CACHE", cache)
    geo, x, inputs = case(name)
    _, _, rows, s = rows_of(geo, x, inputs, seeds=1)
    result = {name: torch.full((SAMPLES + 2, *block.shape), torch.nan) for name, block in x.items()}
    rows.write(result, slice(1, SAMPLES + 1))
    found = geo.reference.layout.ravel(result)
    torch.testing.assert_close(found[1:-1], expected(geo, x, inputs, s)[1][:, 0])
    assert bool(found[[0, -1]].isnan().all())


def test_no_rows_are_written_for_no_samples() -> None:
    geo, x, inputs = case("conv2d")
    _, _, rows, _ = rows_of(geo, x, inputs, seeds=1)
    result = {name: torch.zeros(0, *block.shape) for name, block in x.items()}
    rows.part(slice(0, 0)).write(result, slice(0, 0))


def test_an_unused_parameter_has_zero_rows() -> None:
    geo, x, inputs = case("twice")
    _, _, rows, _ = rows_of(geo, x, inputs)
    assert not bool(rows.explicit("unused").any())


def test_a_parameter_that_is_looked_at_stays_covered_and_one_that_is_used_does_not() -> None:
    w, b, x = torch.randn(3, 4), torch.randn(3), torch.randn(2, 4)
    with Tap({"w": w, "b": b}) as tap:
        assert w.shape[0] == 3
        assert w.dtype == b.dtype
        y = F.linear(x, w, b)
        z = b.exp() + y
    assert [use.names for use in tap.uses] == [("w", "b")]
    assert tap.others == {"b": ["torch.Tensor.exp"]}
    assert torch.equal(z, b.exp() + F.linear(x, w, b))


def test_out_arguments_are_noted_not_tapped() -> None:
    w, x, out = torch.randn(4, 3), torch.randn(2, 4), torch.empty(2, 3)
    with Tap({"w": w}) as tap:
        torch.mm(x, w, out=out)
    assert not tap.uses
    assert list(tap.others) == ["w"]
    assert torch.equal(out, x @ w)


def test_hidden_functions_have_the_right_derivative() -> None:
    """The reference of this file must itself be right about them."""
    w = torch.randn(3)
    torch.testing.assert_close(torch.func.grad(lambda w: Hidden.apply(w).sum())(w), w.cos())
