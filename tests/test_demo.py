"""The demo on a smaller network: the rows of its table, what it calls a failure, and its picture."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import geoad

pytest.importorskip("sklearn")

DEMO = Path(__file__).resolve().parent.parent / "examples" / "demo.py"
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(demo: Any) -> Any:
    return demo.train(demo.QUICK)


@pytest.fixture(scope="module")
def charts(demo: Any, trained: Any) -> list[geoad.Chart]:
    return demo.four_charts(trained.geo.reference)


@pytest.fixture(scope="module")
def rows(demo: Any, trained: Any, charts: list[geoad.Chart]) -> Any:
    return demo.compare(trained, charts)


def test_the_minimum_is_one(trained: Any) -> None:
    metric = geoad.metrics.Euclidean(trained.geo.reference)
    slope = geoad.grad(trained.objective)(trained.minimum)
    assert metric(trained.minimum).norm(slope) < 1e-11
    form = geoad.hessian(trained.objective)(trained.minimum).materialise()
    assert geoad.eigh(form, metric=metric(trained.minimum))[0].min() > 0
    assert trained.objective(trained.minimum) < trained.objective(trained.early)


def test_geoad_agrees_and_naive_does_not(rows: Any) -> None:
    assert len(rows) == 15
    for row in rows:
        assert row.passed, row
        assert row.digits >= 8
        if row.must_differ:
            assert row.spread(row.naive) > 1e-3, row
    assert sum(not row.must_differ for row in rows) == 2


def test_in_the_reference_chart_naive_is_right(rows: Any) -> None:
    for row in rows:
        assert row.naive[0] == pytest.approx(row.geoad[0], rel=1e-8, abs=1e-12), row.name


def test_at_the_minimum_only_the_metric_is_missing(demo: Any, trained: Any, charts: list[geoad.Chart]) -> None:
    """There the naive Hessian has the right numbers; with the metric's numbers in the same chart it gives the same trace."""
    traces = []
    for chart in charts:
        p = chart.point(trained.minimum.to(chart).ravel().clone())
        flat = p.ravel()
        function = trained.objective.function(chart)
        plain = torch.func.hessian(lambda v, f=function, c=chart: f(c.layout.unravel(v)))(flat)
        moved = geoad.hessian(trained.objective)(p).to_dense()
        assert (plain - moved).abs().max() < 1e-9 * plain.abs().max()
        metric = geoad.metrics.Euclidean(trained.geo.reference)(p).to_dense()
        traces.append(torch.linalg.solve(metric, plain).trace())
    stacked = torch.stack(traces)
    assert (stacked - stacked[0]).abs().max() < 1e-8 * stacked[0]


def test_the_table_fits_the_terminal(demo: Any, rows: Any, charts: list[geoad.Chart]) -> None:
    lines = demo.table(rows, charts).splitlines()
    assert max(map(len, lines)) <= 120
    for row in rows:
        assert "FAILED" not in demo.verdict(row)
        assert len(demo.verdict(row)) <= 120


def test_numbers_keep_to_their_column(demo: Any) -> None:
    for value in (0.0, 1e-15, 1.5e-4, 0.1, 9.99999999999, 99.9999999999, -3109.1684999, 123456.789, 12345678.9, 1e100, -1e-300):
        assert len(demo.number(value)) <= demo.WIDTH, value


def test_disagreement_is_a_failure(
    demo: Any, trained: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(demo, "train", lambda setting: trained)
    monkeypatch.setattr(demo, "picture", lambda path: 0.0)
    for broken, good in (("invariant", "naive"), ("naive", "invariant")):
        with monkeypatch.context() as patch:
            patch.setattr(demo, broken, getattr(demo, good))
            assert demo.main(["--quick", "--out", str(tmp_path)]) == 1
        assert "FAILED" in capsys.readouterr().out


def test_it_writes_a_picture(
    demo: Any, trained: Any, rows: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    pytest.importorskip("matplotlib")
    from geoad import plotting

    full = demo.picture
    monkeypatch.setattr(demo, "train", lambda setting: trained)
    monkeypatch.setattr(demo, "compare", lambda trained, charts: rows)
    monkeypatch.setattr(demo, "picture", lambda path: full(path, steps=20))
    monkeypatch.setattr(plotting, "contours", functools.partial(plotting.contours, resolution=31))
    assert demo.main(["--quick", "--out", str(tmp_path / "new")]) == 0
    picture = tmp_path / "new" / "demo.png"
    assert picture.read_bytes()[:8] == PNG
    printed = capsys.readouterr().out
    assert str(picture) in printed
    assert "OK: every geoad row agrees" in printed


def test_the_two_runs_of_geoad_coincide_and_the_naive_ones_do_not(demo: Any) -> None:
    theta, psi = demo.plane()
    loss = theta.scalar_field(demo.valley)
    start = theta.point(torch.tensor([-1.1, 1.45]))
    for run, coincide in ((demo.descend, True), (demo.descend_naively, False)):
        a, b = (torch.stack([p.to(theta).ravel() for p in run(loss, start.to(chart), 15)]) for chart in (theta, psi))
        assert bool((a - b).abs().max() < 1e-12) is coincide
