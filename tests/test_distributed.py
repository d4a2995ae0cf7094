"""Two processes, each with half of the data."""

from __future__ import annotations

import copy
import logging
import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import multiprocessing, nn

import geoad
from geoad import UnsupportedModuleError
from geoad.curvature import Fisher
from geoad.distributed import all_reduce, require_same_point
from geoad.errors import BasePointError, GeometryError, VarianceError

X = torch.linspace(-2.0, 2.0, 28, dtype=torch.float64).reshape(7, 4).cos()
Y = torch.arange(7) % 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))


def in_a_process(rank: int, folder: str) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(os.path.join(folder, "store"), 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
        for check in CHECKS:
            check(rank)
            dist.barrier()
    except BaseException:
        Path(folder, f"failed-{rank}").write_text(traceback.format_exc())
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def share(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    return (X[:3], Y[:3]) if rank == 0 else (X[3:], Y[3:])


def check_sums_and_means(rank: int) -> None:
    geo, data = geoad.GeoModule(network()), share(rank)
    psi = geo.reference.reparametrize(geoad.maps.Asinh(), name="psi").target
    n = len(data[0])
    local, whole = geo.loss(F.cross_entropy, data), geo.loss(F.cross_entropy, (X, Y))
    for p in (geo.point(), geo.point().to(psi)):
        w = all_reduce(geoad.grad(local)(p), weight=n)
        assert w.chart is p.chart
        torch.testing.assert_close(w.ravel(), geoad.grad(whole)(p).ravel(), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(all_reduce(local(p), weight=n), whole(p))
        v = geoad.riemannian_grad(whole)(p)
        torch.testing.assert_close(all_reduce(v).ravel(), v.ravel())
        parts = Fisher(geo, data[0], reduction="sum"), Fisher(geo, data[0], reduction="sum", representation="dense")
        wanted = Fisher(geo, X, reduction="sum", representation="dense")(p)
        torch.testing.assert_close(all_reduce(parts[0](p).mv(v), "sum").ravel(), wanted.mv(v).ravel())
        F_p = all_reduce(parts[1](p), "sum")
        assert isinstance(F_p, geoad.Metric)
        torch.testing.assert_close(F_p.to_dense(), wanted.to_dense())
        step = F_p.solve(w, damping=1e-2).ravel()
        both = [torch.zeros_like(step) for _ in range(2)]
        dist.all_gather(both, step)
        assert torch.equal(*both)  # the processes stay together bit for bit
        with pytest.raises(VarianceError, match=r"matrix-free.*mv\(v\)"):
            all_reduce(parts[0](p), "sum")
    assert all_reduce(float(rank), "sum") == 1.0
    assert torch.equal(all_reduce(torch.full((2,), 2.0 * rank)), torch.ones(2))
    with pytest.raises(VarianceError, match="Point"):
        all_reduce(geo.point())
    with pytest.raises(GeometryError, match="op='max'"):
        all_reduce(1.0, "max")
    with pytest.raises(GeometryError, match="weight"):
        all_reduce(1.0, "sum", weight=2.0)


def check_points(rank: int) -> None:
    chart = geoad.Chart({"x": (2,)}, name="x")
    require_same_point(chart.point(torch.ones(2)))
    p = chart.point(torch.tensor([1.0, 1.0 + 1e-16 * rank]))
    require_same_point(p)  # the same bits
    q = chart.point(torch.tensor([1.0, 1.0 + 1e-15 * rank]))
    with pytest.raises(BasePointError, match="same point"):
        all_reduce(chart.covector(torch.ones(2), at=q))


def check_ddp(rank: int) -> None:
    data = share(rank)
    wrapped = nn.parallel.DistributedDataParallel(network())
    geo = geoad.GeoModule(wrapped)
    assert geo.wrapped is wrapped.module and list(geo.reference.layout) == list(dict(network().named_parameters()))
    w = all_reduce(geoad.grad(geo.loss(F.cross_entropy, data))(geo.point()))
    F.cross_entropy(wrapped(data[0]), data[1]).backward()
    for name, parameter in wrapped.module.named_parameters():
        torch.testing.assert_close(w.components[name], parameter.grad)
    with pytest.raises(UnsupportedModuleError, match=r"module '0'.*\.module"):
        geoad.GeoModule(nn.Sequential(wrapped, nn.Tanh()))

    # the other way round, for training: DistributedDataParallel around the GeoModule averages its gradients in any chart
    for curved in (False, True):
        geo = geoad.GeoModule(network())
        twin = copy.deepcopy(geo)
        if curved:
            geo.to(geo.reference.reparametrize(geoad.maps.Asinh()))
        trained = nn.parallel.DistributedDataParallel(geo)
        F.cross_entropy(trained(data[0]), data[1]).backward()
        mean = all_reduce(geoad.grad(twin.loss(F.cross_entropy, data))(twin.point())).ravel()
        torch.testing.assert_close(geo.grad.to(geo.reference).ravel(), mean)


CHECKS = (check_sums_and_means, check_points, check_ddp)


def test_two_processes() -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            multiprocessing.spawn(in_a_process, (folder,), nprocs=2)
        except Exception:
            raise AssertionError("\n".join(file.read_text() for file in Path(folder).glob("failed-*"))) from None


@pytest.fixture
def alone(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_without_a_process_group() -> None:
    with pytest.raises(GeometryError, match=r"not initialised.*torchrun"):
        all_reduce(1.0)


def test_wrappers_are_unwrapped_aloud(alone: None, caplog: pytest.LogCaptureFixture) -> None:
    for wrapper in (nn.parallel.DistributedDataParallel, nn.DataParallel):
        net = network()
        caplog.clear()
        geo = geoad.GeoModule(wrapper(net))
        assert geo.wrapped is net
        assert f"{wrapper.__name__} was unwrapped" in caplog.text and "all_reduce" in caplog.text
        assert caplog.records[0].levelno == logging.WARNING


@pytest.mark.filterwarnings("ignore")
def test_sharded_networks_are_refused(alone: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    for net in (fully_shard(network(), mesh=mesh), nn.Sequential(fully_shard(nn.Linear(4, 3), mesh=mesh))):
        with pytest.raises(UnsupportedModuleError, match=r"shards.*zero in silence.*plain copy"):
            geoad.GeoModule(net)
    placed = network()
    placed[0].weight = nn.Parameter(distribute_tensor(placed[0].weight.detach(), mesh))
    with pytest.raises(UnsupportedModuleError, match=r"'0\.weight' is a DTensor.*full_tensor\(\)"):
        geoad.GeoModule(placed)


def test_the_older_fsdp_is_refused_by_its_class() -> None:
    """Its constructor needs an accelerator, so the class alone stands for it."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    net = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(net)
    vars(net)["_modules"]["_fsdp_wrapped_module"] = network()  # its __getattr__ asks for it
    with pytest.raises(UnsupportedModuleError, match="a FullyShardedDataParallel: its weights are shards"):
        geoad.GeoModule(net)
