"""Saving as plain tensors, pickling, copying, dtypes."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import geoad
from geoad import operators as ops
from geoad.errors import ChartMismatchError, GeometryError

torch.manual_seed(0)
theta = geoad.Chart({"w": (2, 2), "b": (2,)}, name="theta")
phi = theta.reparametrize({"w": geoad.maps.Asinh(), "b": geoad.maps.Scale(3.0)}, name="psi")
psi = phi.target
out = geoad.Chart({"y": (2,)}, name="y")


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


A = rand(6, 6)
p = theta.point({"w": rand(2, 2), "b": rand(2)})
v, w = theta.vector(rand(6), at=p), theta.covector(rand(6), at=p)
G = theta.metric(A @ A.mT + torch.eye(6), at=p)
H = theta.form(A + A.mT, at=p)
E = G.inverse() @ H
ones = geoad.metrics.Euclidean(theta)(p)
diagonal = geoad.metrics.Diagonal(theta, torch.arange(1.0, 7.0, dtype=torch.float64))(p)
J = geoad.jacobian(lambda c: c["w"] @ c["b"], space=out)(p)
THINGS: dict[str, Any] = {
    "vector": v,
    "covector": w,
    "metric": G,
    "form": H,
    "cometric": G.inverse(),
    "endomorphism": E,
    "dual": E.mT,
    "identity": ones,
    "diagonal": diagonal,
    "jacobian": J,
    "frame": G.inverse_sqrt(),
    "density": G.det(),
    "log density": G.logdet(),
    "jacobian density": geoad.jacobian(phi)(p).det(),
    "hessian": geoad.hessian(theta.scalar_field(lambda c: (c["w"] ** 4).sum() + c["b"].prod()))(p),
    "batch": theta.vector(rand(5, 6), at=p),
}
CASES = [*THINGS.items(), *((f"moved {name}", thing.to(psi)) for name, thing in THINGS.items())]


def same(a: Any, b: Any) -> None:
    assert type(a) is type(b) and a.chart == b.chart and a.type == b.type and a.weight == b.weight
    assert torch.equal(a.to_dense(), b.to_dense())
    assert all(torch.equal(a.at.blocks[name], b.at.blocks[name]) for name in a.at.blocks)
    assert torch.equal(a.to(theta).to_dense(), b.to(theta).to_dense())


def through_file(thing: Any, **options: Any) -> Any:
    buffer = io.BytesIO()
    geoad.save(thing, buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=True)
    buffer.seek(0)
    return geoad.load(buffer, **options)


@pytest.mark.parametrize(("name", "thing"), CASES, ids=[name for name, _ in CASES])
def test_state_round_trip_is_bit_for_bit(name: str, thing: Any) -> None:
    same(thing, through_file(thing, chart=theta))
    same(thing, geoad.from_state(geoad.to_state(thing), [psi, out], strict=True))


def test_structure_is_kept() -> None:
    assert type(through_file(ones, chart=theta).op) is ops.Multiple
    assert type(through_file(diagonal, chart=theta).op) is ops.Diagonal and through_file(diagonal, chart=theta).op.definite
    assert type(through_file(G.inverse(), chart=theta).op) is ops.Inverse
    assert through_file(G, chart=theta).op.definite and through_file(H, chart=theta).op.symmetric
    huge = geoad.Chart({"x": (100_000,)}, name="huge")
    euclid = geoad.metrics.Euclidean(huge)(huge.point(torch.zeros(100_000)))
    assert through_file(euclid, chart=huge).op.factor == 1


def test_points_keep_their_reference_coordinates() -> None:
    q = p.to(psi)
    again = through_file(q, chart=theta)
    assert again.chart == psi and torch.equal(again.ravel(), q.ravel()) and torch.equal(again.to(theta).ravel(), p.ravel())
    assert again.to(theta).to(psi) is again


def test_nested_containers() -> None:
    read = through_file({"p": p, "list": [v, 3, "text"], "plain": torch.ones(2)}, chart=psi)
    same(read["list"][0], v)
    assert read["list"][1:] == [3, "text"] and torch.equal(read["plain"], torch.ones(2)) and read["p"].chart == theta


def _again(recipe: Any, name: str = "psi") -> geoad.Chart:
    fresh = geoad.Chart({"w": (2, 2), "b": (2,)}, name="theta")
    return fresh.reparametrize(recipe, name=name).target


def test_charts_made_anew_are_found_by_name_and_checked() -> None:
    moved = v.to(psi)
    state = geoad.to_state(moved)
    twin = _again({"w": geoad.maps.Asinh(), "b": geoad.maps.Scale(3.0)})
    read = geoad.from_state(state, twin)
    assert read.chart is twin and torch.equal(read.ravel(), moved.ravel())
    torch.testing.assert_close(read.to(twin.reference).ravel(), v.ravel())
    with pytest.raises(ChartMismatchError, match="strict=True"):
        geoad.from_state(state, twin, strict=True)
    with pytest.raises(ChartMismatchError, match=r"phi\.load_state_dict"):
        geoad.from_state(state, _again({"w": geoad.maps.Asinh(), "b": geoad.maps.Scale(2.0)}))
    with pytest.raises(ChartMismatchError, match="reparametrize"):
        geoad.from_state(state, _again(geoad.maps.Asinh(), name="other"))
    with pytest.raises(ChartMismatchError, match="reparametrize"):
        geoad.from_state(state)
    with pytest.raises(ChartMismatchError, match=r"geoad\.from_state\(state, chart\)"):
        geoad.from_state(geoad.to_state(v), geoad.Chart({"w": (2, 2)}, name="theta"))
    with pytest.raises(ChartMismatchError, match=r"geoad\.from_state\(state, chart\)"):
        geoad.from_state(geoad.to_state(v), out)
    alone = geoad.from_state(geoad.to_state(v))
    assert alone.chart == theta and torch.equal(alone.ravel(), v.ravel())


def test_learnable_charts_are_checked_by_value() -> None:
    learner = theta.reparametrize(geoad.maps.Scale(2.0, learnable=True), name="learnt")
    moved = v.to(learner.target)
    state = geoad.to_state(moved)
    same(geoad.from_state(state, theta), moved)
    with torch.no_grad():
        next(learner.parameters()).add_(0.5)
    with pytest.raises(ChartMismatchError, match=r"phi\.load_state_dict"):
        geoad.from_state(state, theta)


def test_what_has_no_state() -> None:
    with pytest.raises(GeometryError, match=r"torch\.save"):
        geoad.to_state(torch.ones(2))  # pyright: ignore[reportArgumentType]
    with pytest.raises(GeometryError, match="to_state"):
        geoad.from_state({"a": 1}, theta)
    big = geoad.Chart({"x": (20_000,)}, name="big")
    hessian = geoad.hessian(big.scalar_field(lambda c: (c**4).sum()))(big.point(torch.ones(20_000)))
    with pytest.raises(GeometryError, match=r"\.to_dense\(\)"):
        geoad.to_state(hessian)


@pytest.mark.parametrize(("name", "thing"), CASES, ids=[name for name, _ in CASES])
def test_deepcopy(name: str, thing: Any) -> None:
    same(copy.deepcopy(thing), thing)
    assert copy.copy(thing) is thing and copy.deepcopy(thing).at is thing.at


@pytest.mark.parametrize(("name", "thing"), [case for case in CASES if "hessian" not in case[0]], ids=lambda n: str(n)[:20])
def test_pickle(name: str, thing: Any) -> None:
    again = pickle.loads(pickle.dumps(thing))
    assert again.chart == thing.chart
    torch.testing.assert_close(again.to_dense(), thing.to_dense(), rtol=0, atol=0)
    torch.testing.assert_close(again.to(again.chart.reference).to_dense(), thing.to(theta).to_dense())


def test_pickle_of_functions_names_the_way_out() -> None:
    hessian = THINGS["hessian"]
    with pytest.raises(GeometryError, match=r"T\.materialise\(\)"):
        pickle.dumps(hessian)
    again = pickle.loads(pickle.dumps(hessian.materialise()))
    torch.testing.assert_close(again.to_dense(), hessian.to_dense())


def test_points_and_charts_survive_pickling() -> None:
    q, r = pickle.loads(pickle.dumps((p, p.to(psi))))
    assert q.chart == theta and r.chart == psi and torch.equal(r.to(theta).ravel(), p.ravel())
    assert copy.deepcopy(p) is p and copy.deepcopy(psi) is psi


@pytest.mark.parametrize(("name", "thing"), CASES, ids=[name for name, _ in CASES])
def test_dtypes_and_devices(name: str, thing: Any) -> None:
    single = thing.to(torch.float32)
    assert single.dtype == torch.float32 and single.at.dtype == torch.float32 and type(single) is type(thing)
    torch.testing.assert_close(single.to_dense(), thing.to_dense().float(), rtol=1e-4, atol=1e-4)
    assert thing.to("cpu").device.type == "cpu" and thing.to(dtype=torch.float64).dtype == torch.float64
    assert single.to(torch.ones(1, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("name", ["vector", "covector", "metric", "identity", "jacobian", "density"])
def test_meta_device(name: str) -> None:
    shadow = THINGS[name].to(device="meta")
    assert shadow.device.type == "meta" and shadow.to_dense().shape == THINGS[name].to_dense().shape
    assert "meta" in repr(shadow) and (shadow + shadow).device.type == "meta"
