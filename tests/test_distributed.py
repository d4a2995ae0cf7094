"""Several processes, each with its share of the data."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import distributed_cases as cases
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import geoad
from geoad import UnsupportedModuleError
from geoad.curvature import Fisher, resumable
from geoad.distributed import all_reduce, shard
from geoad.distributed.exchange import ProcessGroup
from geoad.errors import GeometryError

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "distributed_fisher.py"


def test_two_processes(tmp_path: Path) -> None:
    cases.start(cases.CHECKS, tmp_path)


@pytest.fixture
def alone(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# -- processes that end ----------------------------------------------------------------------------------------------------


def test_the_others_are_not_left_waiting(tmp_path: Path) -> None:
    """A process that is stuck for longer than the time-out of the group, or killed, ends the job with an error in the other."""
    started = cases.start((cases.check_endings,), tmp_path, join=False)
    for process in started.processes:  # to join `started` would end the first one as soon as the second has
        process.join(60)
        assert process.exitcode
    stuck, killed = (tmp_path / "said").read_text().splitlines()
    assert "Timed out waiting 2000ms" in stuck and "Timed out" not in killed
    for said in (stuck, killed):
        assert "Fisher(KFAC" in said and "Most likely another process has ended or is stuck" in said and "timeout=" in said


def test_as_torchrun_starts_it(tmp_path: Path) -> None:
    """The example checks itself against one process."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    cases.fork(cases.run_script, tmp_path, str(EXAMPLE), store.port)
    first, second = ((tmp_path / f"printed-{rank}").read_text().splitlines() for rank in range(2))
    assert first[0] == "2 processes, 51 + 50 samples" and not second
    assert sum("same bits in all: True" in line for line in first) == 7
    assert first[-1].endswith("rows 0..50 of 101 here")


# -- one process -------------------------------------------------------------------------------------------------------------


def test_without_a_process_group() -> None:
    with pytest.raises(GeometryError, match=r"not initialised.*torchrun"):
        all_reduce(1.0)


def test_wrappers_are_unwrapped_aloud(alone: None, caplog: pytest.LogCaptureFixture) -> None:
    for wrapper in (nn.parallel.DistributedDataParallel, nn.DataParallel):
        net = cases.network()
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
    for net in (fully_shard(cases.network(), mesh=mesh), nn.Sequential(fully_shard(nn.Linear(4, 3), mesh=mesh))):
        with pytest.raises(UnsupportedModuleError, match=r"shards.*zero in silence.*plain copy"):
            geoad.GeoModule(net)
    placed = cases.network()
    placed[0].weight = nn.Parameter(distribute_tensor(placed[0].weight.detach(), mesh))
    with pytest.raises(UnsupportedModuleError, match=r"'0\.weight' is a DTensor.*full_tensor\(\)"):
        geoad.GeoModule(placed)


def test_the_older_fsdp_is_refused_by_its_class() -> None:
    """Its constructor needs an accelerator, so the class alone stands for it."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    net = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(net)
    vars(net)["_modules"]["_fsdp_wrapped_module"] = cases.network()  # its __getattr__ asks for it
    with pytest.raises(UnsupportedModuleError, match="a FullyShardedDataParallel: its weights are shards"):
        geoad.GeoModule(net)


# -- partial results ---------------------------------------------------------------------------------------------------------

STORED = ("dense", "block_diagonal", "diagonal", "quasi_diagonal", "kfac", "ekfac", "low_rank")


def setting() -> tuple[geoad.GeoModule, list[Any]]:
    return geoad.GeoModule(cases.conv()), list(zip(cases.X.split(2), cases.Y.split(2), strict=True))


@pytest.mark.parametrize(("kind", "representation"), [*(("exact", name) for name in STORED), ("mc", "ekfac")])
def test_resumed_sweeps_are_those_without_interruption(kind: str, representation: str, tmp_path: Path) -> None:
    geo, batches = setting()
    p, field = geo.point(), Fisher(geo, batches, kind=kind, representation=representation)
    whole = field(p).to_dense()
    with cases.counted(geo) as calls, resumable(tmp_path / "sums"):
        assert torch.equal(field(p).to_dense(), whole)
    for stop in range(1, calls[0]):
        with pytest.raises(cases.Interrupted), resumable(tmp_path / "sums", every=1), cases.counted(geo, stop):
            field(p)
        there = (tmp_path / "sums").exists()
        with cases.counted(geo) as left, resumable(tmp_path / "sums", every=1):
            assert torch.equal(field(p).to_dense(), whole)
        assert left[0] < calls[0] or not there
        assert not list(tmp_path.iterdir())
    assert there  # when it was stopped in the last evaluation


def test_stale_partial_results_are_refused(tmp_path: Path) -> None:
    geo, batches = setting()
    file, p = tmp_path / "sums", geo.point()
    Fisher(geo, batches, representation="kfac")(p)  # a first evaluation looks at the network
    with cases.counted(geo) as calls:
        Fisher(geo, batches, representation="kfac")(p)
    with pytest.raises(cases.Interrupted), resumable(file, every=1), cases.counted(geo, calls[0] - 1):
        Fisher(geo, batches, representation="kfac")(p)
    left = file.read_bytes()
    q = p.retract(geoad.riemannian_grad(geo.loss(F.cross_entropy, batches))(p))
    swapped = [batches[1], batches[0], *batches[2:]]
    for field, at, message in (
        (Fisher(geo, batches, representation="ekfac"), p, "another calculation"),
        (Fisher(geo, batches, "gaussian", representation="kfac"), p, "another calculation"),
        (Fisher(geo, batches, representation="kfac"), q, "another calculation"),
        (Fisher(geo, batches[:3], representation="kfac"), p, "another calculation"),
        (Fisher(geo, swapped, representation="kfac"), p, "are not those that were done"),
    ):
        with pytest.raises(GeometryError, match=message), resumable(file):
            field(at)
        assert file.read_bytes() == left
    file.write_bytes(left[: len(left) // 2])
    with pytest.raises(GeometryError, match="no partial sums"), resumable(file):
        Fisher(geo, batches, representation="kfac")(p)


@pytest.mark.parametrize(("then", "now"), [("sums", "sums.0-of-2"), ("sums.1-of-3", "sums"), ("sums.0-of-3", "sums.0-of-2")])
def test_partial_results_of_other_numbers_of_processes_are_refused(then: str, now: str, tmp_path: Path) -> None:
    from geoad.curvature.resume import journal

    (tmp_path / then).touch()
    rank, _, size = now.removeprefix("sums").removeprefix(".").partition("-of-")
    with pytest.raises(GeometryError, match=r"begun by \d processes, found \d now"), resumable(tmp_path / "sums"):
        journal("", torch.device("cpu"), int(rank or 0), int(size or 1))
    (tmp_path / then).unlink()
    (tmp_path / f"other{then}").touch()
    with resumable(tmp_path / "sums"):
        assert journal("", torch.device("cpu"), int(rank or 0), int(size or 1)) is not None


def test_one_matrix_in_a_block(tmp_path: Path) -> None:
    geo, batches = setting()
    field = Fisher(geo, batches, representation="diagonal")
    with resumable(tmp_path / "sums"):
        field(geo.point())
        with pytest.raises(GeometryError, match="a second matrix"):
            field(geo.point())
    field(geo.point())
    with pytest.raises(GeometryError, match="every=0"), resumable(tmp_path / "sums", every=0):
        pass


# -- sums in low precision -----------------------------------------------------------------------------------------------------


def test_sums_of_many_kinds_of_tensors(alone: None) -> None:
    group = ProcessGroup()
    given = [
        torch.ones(2, 3, dtype=torch.bfloat16),
        torch.tensor(3),
        torch.ones(2, dtype=torch.float64).expand(5, 2),
        torch.ones(0),
    ]
    for mine, found in zip(given, group.sum(given, "sums"), strict=True):
        assert found.dtype == mine.dtype and torch.equal(found, mine)
        assert found.data_ptr() != mine.data_ptr() or not mine.numel()
    assert torch.equal(group.joined([torch.arange(3)], "joined")[0], torch.arange(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shard_of_one_process_is_the_data(alone: None, dtype: torch.dtype) -> None:
    geo = geoad.GeoModule(cases.network().to(dtype))
    data, p = (cases.X.to(dtype), cases.Y), geo.point()
    for representation in ("dense", "ekfac", "implicit"):
        mine, whole = (Fisher(geo, each, representation=representation)(p).to_dense() for each in (shard(data), data))
        assert mine.dtype == dtype and torch.equal(mine, whole)
