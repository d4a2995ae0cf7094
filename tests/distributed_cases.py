"""What two processes check, each with its share of the data; `start` runs it in both of them."""

from __future__ import annotations

import contextlib
import copy
import multiprocessing as standard
import os
import runpy
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, multiprocessing, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import geoad
from geoad import UnsupportedModuleError
from geoad.curvature import GGN, Fisher, LowRank, resumable
from geoad.distributed import ProcessError, all_reduce, kernel_rows, require_same_point, shard
from geoad.errors import BasePointError, GeometryError, VarianceError
from geoad.kernels.kernel_gram import Group
from geoad.kernels.layered import linearize, plan_of
from geoad.kernels.rows import Rows
from geoad.metrics import Euclidean

X = torch.linspace(-2.0, 2.0, 28, dtype=torch.float64).reshape(7, 4).cos()
Y = torch.arange(7) % 3
BATCHES = [(X[:3], Y[:3]), (X[3:5], Y[3:5]), (X[5:], Y[5:])]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))


def conv() -> nn.Module:
    """A convolution, and a norm that has no Kronecker structure."""
    torch.manual_seed(0)
    parts = nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 2, 2, padding=1), nn.GroupNorm(1, 2), nn.Flatten(), nn.Linear(18, 3)
    return nn.Sequential(*parts)


def start(checks: tuple[Callable[[int], None], ...], folder: Path, join: bool = True) -> Any:
    """Two processes that go through the checks; what goes wrong in them is said here."""
    try:
        return fork(run, folder, checks, join=join)
    except Exception:
        raise AssertionError("\n".join(file.read_text() for file in folder.glob("failed-*"))) from None


def fork(do: Callable[..., None], folder: Path, *more: Any, join: bool = True) -> Any:
    """Two processes, from a server that has imported torch and geoad once, where there is such a thing."""
    method = "forkserver" if "forkserver" in standard.get_all_start_methods() else "spawn"
    if method == "forkserver":
        standard.get_context(method).set_forkserver_preload(["pytest", "torch.utils.data", "torch.distributed", "geoad"])
    return multiprocessing.start_processes(do, (str(folder), *more), 2, join, start_method=method)


def run_script(rank: int, folder: str, script: str, port: int) -> None:
    """A script, with the variables that torchrun sets for the processes of a store it holds; what is printed goes to a file."""
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "localhost"}
    group |= {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ |= {name: str(value) for name, value in group.items()}
    with open(os.path.join(folder, f"printed-{rank}"), "w") as file, contextlib.redirect_stdout(file):
        runpy.run_path(script, run_name="__main__")


def run(rank: int, folder: str, checks: tuple[Callable[[int], None], ...], seconds: float = 60.0) -> None:
    """Go through the checks; what goes wrong is written down."""
    os.environ["GEOAD_TEST_FOLDER"] = folder
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(os.path.join(folder, "store"), 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=seconds))
        for check in checks:
            check(rank)
            dist.barrier()
    except BaseException:
        Path(folder, f"failed-{rank}").write_text(traceback.format_exc())
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def share(rank: int) -> tuple[Tensor, Tensor]:
    return (X[:3], Y[:3]) if rank == 0 else (X[3:], Y[3:])


def same_bits(mine: Tensor) -> None:
    """The other process holds the same numbers."""
    both = [torch.zeros_like(mine) for _ in range(2)]
    dist.all_gather(both, mine.detach().contiguous())
    assert torch.equal(*both)


def close(mine: Tensor, whole: Tensor, tolerance: float = 1e-12) -> None:
    """The same bits in both processes, and what one process alone finds."""
    same_bits(mine)
    torch.testing.assert_close(mine, whole, rtol=tolerance, atol=1e-15)


# -- by hand -----------------------------------------------------------------------------------------------------------------


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
        same_bits(F_p.solve(w, damping=1e-2).ravel())  # the processes stay together
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


# -- sharded data ------------------------------------------------------------------------------------------------------------


def check_losses(rank: int) -> None:
    geo = geoad.GeoModule(network())
    p, psi = geo.point(), geo.reference.reparametrize(geoad.maps.Asinh(), name="psi").target
    q, v = p.to(psi), geoad.riemannian_grad(geo.loss(F.cross_entropy, (X, Y)))(p)
    prior = geo.scalar_field(lambda net: sum((w**2).sum() for w in net.parameters()))
    for data, by in (((X, Y), "samples"), (BATCHES, "batches")):
        parts = shard(data)
        assert parts.by == by and parts.total == 7 and parts.own == parts.sizes[rank] and sum(parts.sizes) == 7
        for reduction in ("mean", "sum"):
            mine, whole = (geo.loss(F.cross_entropy, each, reduction) for each in (parts, data))
            for L, W in ((mine, whole), (mine * mine + prior, whole * whole + prior)):
                close(L(q), W(q))
                close(geoad.grad(L)(q).ravel(), geoad.grad(W)(q).ravel())
    L, W = (geo.loss(F.cross_entropy, each) for each in (shard((X, Y)), (X, Y)))
    for f, g in ((L, W), (L * L + prior, W * W + prior)):
        H, K = (geoad.hessian(each)(q) for each in (f, g))
        for _ in range(4):  # products are recorded, where they can be
            close(H.mv(v.to(psi)).ravel(), K.mv(v.to(psi)).ravel())
        close(geoad.hessian(f)(p).to_dense(), geoad.hessian(g)(p).to_dense())
        close(geoad.jvp(f, (p,), (v,))[1], geoad.jvp(g, (p,), (v,))[1])
    metrics = (Fisher(geo, each) + 0.1 * Euclidean(geo.reference) for each in (shard((X, Y)), (X, Y)))
    H, K = (geoad.hessian(f, metric)(p) for f, metric in zip((L, W), metrics, strict=True))
    close(H.mv(v).ravel(), K.mv(v).ravel())


def check_points_in_a_batch(rank: int) -> None:
    geo = geoad.GeoModule(network())
    p = geo.point()
    many = geo.reference.point({name: torch.stack([block, 2 * block]) for name, block in p.blocks.items()})
    L, W = (geo.loss(F.cross_entropy, each) for each in (shard(BATCHES), BATCHES))
    close(L(many), W(many))
    close(geoad.grad(L)(many).ravel(), geoad.grad(W)(many).ravel())


STORED = ("dense", "block_diagonal", "diagonal", "quasi_diagonal", "kfac", "ekfac", "low_rank", LowRank(4))


def check_curvature(rank: int) -> None:
    geo = geoad.GeoModule(conv())
    p, parts = geo.point(), shard(BATCHES)
    w = geoad.grad(geo.loss(F.cross_entropy, (X, Y)))(p)
    for representation in ("implicit", *STORED):
        value, whole = (Fisher(geo, data, representation=representation)(p) for data in (parts, BATCHES))
        close(value.to_dense(), whole.to_dense())
        if representation != "quasi_diagonal":  # which is indefinite here
            same_bits(value.solve(w, damping=0.1).ravel())
    value, whole = (GGN(geo, data, representation="ekfac", max_memory=1 << 12)(p) for data in (parts, BATCHES))
    close(value.to_dense(), whole.to_dense())  # the rows do not fit: the data are gone through twice


def check_kinds(rank: int) -> None:
    geo, parts = geoad.GeoModule(network()), shard(BATCHES)
    p = geo.point()
    v = geoad.riemannian_grad(geo.loss(F.cross_entropy, (X, Y)))(p)
    for kind in ("mc", "empirical", "covariance"):
        for representation in ("implicit", "ekfac", "low_rank"):
            torch.manual_seed(rank)  # the seed of the labels is that of the first process all the same
            mine = Fisher(geo, parts, kind=kind, representation=representation)
            whole = Fisher(geo, BATCHES, kind=kind, representation=representation)
            whole.seed = mine.seed
            close(mine(p).mv(v).ravel(), whole(p).mv(v).ravel())
    torch.manual_seed(0)
    labels = Fisher(geo, shard((X, Y)), kind="mc")
    drawn = [batch.labels for batch in labels.swept(p.blocks)]
    told: list[Any] = [None, None]
    dist.all_gather_object(told, torch.cat(drawn).flatten().tolist())
    assert len(told[0]) == 3 and told[0] != told[1][:3]  # the processes draw labels of their own


def check_ways_to_shard(rank: int) -> None:
    geo = geoad.GeoModule(network())
    p, whole = geo.point(), geo.loss(F.cross_entropy, (X, Y))
    diagonal = Fisher(geo, (X, Y), representation="diagonal")(p).to_dense()
    dataset = TensorDataset(X, Y)
    samplers = [DistributedSampler(dataset, 2, rank, shuffle=shuffle, seed=3) for shuffle in (False, True)]
    sampled = [DataLoader(dataset, 2, sampler=each) for each in samplers]
    for data, by, sizes in (
        (X, "samples", [3, 4]),
        ({"x": X, "y": Y}, "samples", [3, 4]),
        ([(X, Y)], "samples", [3, 4]),
        (DataLoader(dataset, 2), "batches", [4, 3]),
        (sampled[0], "process", [4, 3]),  # the eighth sample is the first once more
        (sampled[1], "process", [4, 3]),
    ):
        parts = shard(data)
        assert (parts.by, parts.sizes) == (by, sizes)
        if by == "batches" or isinstance(data, DataLoader):
            close(geo.loss(F.cross_entropy, parts)(p), whole(p))
            close(
                Fisher(geo, parts, representation="diagonal")(p).to_dense(),
                diagonal,
            )
    close(geo.loss(F.cross_entropy, shard(share(rank), by="process"))(p), whole(p))
    assert [len(x) for x, _ in shard(BATCHES, by="samples")] == ([1, 1, 1] if rank == 0 else [2, 1, 1])
    grads = geoad.per_sample_grads(geo.loss(F.cross_entropy, shard((X, Y))))(p)
    assert grads.batch_shape == (len(share(rank)[0]),)
    for wrong, message in (
        (iter(BATCHES), "one-shot"),
        (DataLoader(dataset, 2, shuffle=True), "shuffles"),
        (DataLoader(dataset, 2, sampler=DistributedSampler(dataset, 2, 1 - rank)), "DistributedSampler for process"),
        (shard((X, Y)), "a Shard already"),
    ):
        with pytest.raises(GeometryError, match=message):
            shard(wrong)
    with pytest.raises(GeometryError, match="by='rows'"):
        shard((X, Y), by="rows")
    with pytest.raises(ProcessError, match=r"\[0, 1\] samples"):
        shard((X[:1], Y[:1]))
    with pytest.raises(ProcessError, match=r"do not do the same.*\n.*7 batches|1 batches"):
        shard((X[: 5 + rank], Y[: 5 + rank]))
    with pytest.raises(ProcessError, match="do not do the same"):
        shard((X + 1e-16 + 1e-3 * rank, Y))  # as many, but not the same


def check_what_does_not_go_together(rank: int) -> None:
    """All processes raise, whichever it is that is wrong, and can go on together."""
    geo, other = geoad.GeoModule(network()), geoad.GeoModule(network())
    parts, p = shard(BATCHES), geo.point()
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1e-15 * rank
    frozen = nn.Sequential(network(), nn.BatchNorm1d(3)).eval()
    frozen[1].running_mean += rank
    still = geoad.GeoModule(frozen)
    loss = geo.loss(F.cross_entropy, parts)
    mistakes: list[Callable[[], Any]] = [
        lambda: Fisher(geo, parts, representation="dense" if rank else "kfac")(p),
        lambda: Fisher(geo, parts, "gaussian" if rank else "categorical")(p),
        lambda: Fisher(geo, parts, reduction="sum" if rank else "mean", representation="diagonal")(p),
        lambda: Fisher(other, parts)(other.point()),
        lambda: Fisher(still, parts, representation="diagonal")(still.point()),
        lambda: loss(p) if rank else geoad.grad(loss)(p),
        lambda: geoad.grad(other.loss(F.cross_entropy, parts))(other.point()),
        lambda: Fisher(geo, parts)(p).mv(p.chart.vector({n: b + rank for n, b in p.blocks.items()}, at=p)),
    ]
    for mistake in mistakes:
        with pytest.raises(ProcessError, match=r"do not do the same thing.*\n  process 0: .*\n  process 1: "):
            mistake()
    close(geoad.grad(loss)(p).ravel(), geoad.grad(geo.loss(F.cross_entropy, BATCHES))(p).ravel())


def check_failures_are_told(rank: int) -> None:
    geo, p = geoad.GeoModule(network()), geoad.GeoModule(network()).point()
    p = geo.point()
    broken = [(x.clone(), y) for x, y in BATCHES]
    broken[1][0][0, 0] = torch.nan  # a batch of the second process
    parts = shard(broken)

    def failing(outputs: Tensor, targets: Tensor) -> Tensor:
        if rank == 1:
            raise ValueError("the loss of one process fails")
        return F.cross_entropy(outputs, targets)

    for call in (
        lambda: Fisher(geo, parts, representation="kfac")(p),
        lambda: Fisher(geo, parts)(p).mv(geoad.riemannian_grad(geo.loss(F.mse_loss, (X, Y.new_zeros(7, 3) * 1.0)))(p)),
        lambda: geo.loss(failing, shard((X, Y)))(p),
        lambda: geoad.grad(geo.loss(failing, shard((X, Y))))(p),
    ):
        with pytest.raises((GeometryError, ValueError)) as found:
            call()
        assert isinstance(found.value, ProcessError) == (rank == 0)
        if rank == 0:
            assert "failed in another one. process 1: " in str(found.value)


def check_sums_by_hand_go_together(rank: int) -> None:
    p = geoad.GeoModule(network()).point()
    v, w = p.chart.vector(p.blocks, at=p), p.chart.covector(p.blocks, at=p)
    mistakes: list[Callable[[], Any]] = [
        lambda: all_reduce(1.0) if rank else all_reduce(torch.ones(3)),
        lambda: all_reduce(torch.ones(3 + rank)),
        lambda: all_reduce(torch.ones(3), "sum" if rank else "mean"),
        lambda: all_reduce(v if rank else w),
        lambda: all_reduce(v) if rank else require_same_point(p),
        lambda: shard((X, Y)) if rank else all_reduce(1.0),
    ]
    for mistake in mistakes:
        with pytest.raises(ProcessError, match=r"do not do the same thing.*\n  process 0: .*\n  process 1: "):
            mistake()
    with pytest.raises(GeometryError, match="add up to 0"):
        all_reduce(v, weight=0.0)
    assert torch.equal(all_reduce(torch.tensor([1, 2]), "sum"), torch.tensor([2, 4]))
    half = torch.full((3,), 1 / 3, dtype=torch.bfloat16)
    assert torch.equal(all_reduce(half * (rank + 1), weight=rank), 2 * half)


def check_groups(rank: int) -> None:
    """A group that is not that of all processes."""
    geo, group = geoad.GeoModule(network()), dist.new_group([1])
    if rank == 0:
        with pytest.raises(GeometryError, match="does not belong to the group"):
            shard((X, Y), group)
        return
    parts = shard((X, Y), group)
    assert parts.sizes == [7] and all_reduce(3.0, "sum", group=group) == 3.0
    for representation in ("ekfac", "low_rank", "implicit"):
        mine, whole = (Fisher(geo, data, representation=representation)(geo.point()) for data in (parts, (X, Y)))
        assert torch.equal(mine.to_dense(), whole.to_dense())
    ((_, block),) = geoad.ntk(geo, parts).blocks(geo.point())
    torch.testing.assert_close(block, geoad.ntk(geo, X)(geo.point()).components)


def check_one_process_fails(rank: int) -> None:
    """Wherever one of them fails, it tells why, the other one says so, and both can go on."""
    geo = geoad.GeoModule(network())
    p, wrong = geo.point(), Y.clone()
    wrong[-1] = 9  # a sample of the second process
    v = geoad.riemannian_grad(geo.loss(F.cross_entropy, (X, Y)))(p)
    parts, bad = shard((X, Y)), shard((X, wrong))
    shapeless = torch.tensor(0.0)
    rows = rows_of(geo, X[:3])
    for call, at in (
        (lambda: Fisher(geo, bad, kind="empirical", representation="kfac")(p), None),
        (lambda: Fisher(geo, bad, kind="empirical")(p).mv(v), None),
        (lambda: Fisher(geo, bad, kind="covariance", representation="low_rank")(p), None),
        (lambda: shard([share(rank)] if rank == 0 else [(shapeless, shapeless)], by="process"), None),
        (lambda: Fisher(geo, parts, representation="low_rank")(p), "geoad.curvature.combine.require_memory"),
        (lambda: kernel_rows(rows), "geoad.distributed.rows.gram"),
        (lambda: kernel_rows(rows), "geoad.distributed.rows.features"),
        (lambda: list(geoad.ntk(geo, parts).blocks(p)), "geoad.tangent.shared.gram"),
        (lambda: list(geoad.ntk(geo, parts).blocks(p)), "geoad.tangent.shared.chunks"),
    ):
        with pytest.raises((GeometryError, OutOfRoom)) as found, failing(at if rank == 1 else None):
            call()
        assert isinstance(found.value, ProcessError) == (rank == 0), found.value
        if rank == 0:
            assert "failed in another one. process 1: " in str(found.value)
        assert all_reduce(1.0, "sum") == 2.0


class OutOfRoom(Exception):
    pass


@contextlib.contextmanager
def failing(name: str | None) -> Iterator[None]:
    """A function of geoad raises."""

    def fail(*_: Any, **__: Any) -> None:
        raise OutOfRoom

    with pytest.MonkeyPatch.context() as patch:
        if name is not None:
            patch.setattr(name, fail)
        yield


# -- kernels -----------------------------------------------------------------------------------------------------------------


def rows_of(geo: geoad.GeoModule, inputs: Tensor) -> Rows:
    """The Jacobians of all outputs, in structure."""
    x = geo.point().blocks
    linearized = linearize(geo.evaluate, geo.reference.layout, x, inputs, plan_of(geo.evaluate, x, inputs[:1]))
    f = linearized.outputs
    return linearized.pull(torch.eye(3)[:, None].expand(3, len(f), 3))


def jacobian(geo: geoad.GeoModule) -> Tensor:
    layout = geo.reference.layout
    outputs = torch.func.jacrev(lambda t: torch.func.functional_call(geo.wrapped, layout.unravel(t), (X,)))
    return outputs(geo.point().ravel())


def check_kernel_rows(rank: int) -> None:
    mine = slice(0, 3) if rank == 0 else slice(3, 7)
    for net in (network(), conv()):
        geo = geoad.GeoModule(net)
        rows, J = rows_of(geo, X[mine]), jacobian(geo)
        K = torch.einsum("nci,mdi->ncmd", J, J)
        torch.testing.assert_close(kernel_rows(rows), K[mine])
        torch.testing.assert_close(kernel_rows(rows, contract="trace")[:, 0, :, 0], torch.einsum("ncmc->nm", K)[mine])
        torch.testing.assert_close(kernel_rows(rows, contract="diagonal"), torch.einsum("ncmc->cnm", K)[:, mine])
        halved = [Group((name,), torch.tensor(0.5)) for name in geo.reference.layout]
        torch.testing.assert_close(kernel_rows(rows, halved), 0.5 * K[mine])
        for contract, wanted in (("none", K), ("trace", torch.einsum("ncmc->nm", K))):
            ((place, block),) = geoad.ntk(geo, shard((X, Y)), contract=contract).blocks(geo.point())
            assert place == mine
            torch.testing.assert_close(block, wanted[mine])
        damped = geoad.curvature.Fisher(geo, shard(BATCHES), representation="diagonal") + 0.1 * Euclidean(geo.reference)
        G = damped(geo.point()).to_dense()
        ((_, block),) = geoad.ntk(geo, shard(X), metric=damped).blocks(geo.point())
        torch.testing.assert_close(block, torch.einsum("nci,ij,mdj->ncmd", J, torch.linalg.inv(G), J)[mine])
        with pytest.raises(GeometryError, match=r"had by its rows.*blocks\(p\)"):
            geoad.ntk(geo, shard(X))(geo.point())
    with pytest.raises(GeometryError, match="wrong in silence"):
        geoad.data.Batches(shard(X))
    with pytest.raises(ProcessError, match="do not do the same"):
        kernel_rows(rows, contract="trace" if rank else "none")


# -- partial results -----------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def check_resumed(rank: int) -> None:
    """One process is stopped in its last batch, the other is told, and both go on from there."""
    told = [tempfile.mkdtemp()]
    dist.broadcast_object_list(told, 0)
    file, own = Path(told[0], "sums.pt"), Path(told[0], f"sums.pt.{rank}-of-2")
    geo, batches = geoad.GeoModule(conv()), [(X[i : i + 1], Y[i : i + 1]) for i in range(7)]
    p, parts = geo.point(), shard(batches)
    for stopped, representation in enumerate(("kfac", "ekfac", "low_rank")):
        field = Fisher(geo, parts, representation=representation)
        whole = field(p).to_dense()
        with counted(geo) as calls, resumable(file):
            assert torch.equal(field(p).to_dense(), whole)
        left = calls[0] - 1 if rank == stopped % 2 else 1000
        with pytest.raises((Interrupted, ProcessError)), resumable(file, every=1), counted(geo, left):
            field(p)
        assert own.exists()
        with counted(geo) as again, resumable(file, every=1):
            assert torch.equal(field(p).to_dense(), whole)
        assert again[0] < calls[0] and not own.exists()


@contextlib.contextmanager
def counted(geo: geoad.GeoModule, most: int = 1000) -> Iterator[list[int]]:
    """Count the evaluations of the network, and stop after `most`."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1
        if calls[0] > most:
            raise Interrupted

    hook = geo.wrapped.register_forward_pre_hook(count)
    try:
        yield calls
    finally:
        hook.remove()


CHECKS = (
    check_sums_and_means,
    check_points,
    check_ddp,
    check_losses,
    check_points_in_a_batch,
    check_curvature,
    check_kinds,
    check_ways_to_shard,
    check_what_does_not_go_together,
    check_failures_are_told,
    check_sums_by_hand_go_together,
    check_groups,
    check_one_process_fails,
    check_kernel_rows,
    check_resumed,
)


# -- endings -------------------------------------------------------------------------------------------------------------------


def check_endings(rank: int) -> None:
    """The second process is stuck, and then killed, in the middle of a sweep; the first one must not be left waiting."""
    geo = geoad.GeoModule(network())
    for end, seconds in ((lambda: time.sleep(4), 2), (lambda: os._exit(1), 60)):
        group = dist.new_group(timeout=timedelta(seconds=seconds))
        field = Fisher(geo, shard(BATCHES, group), representation="kfac")
        field(geo.point())
        with pytest.raises(ProcessError) as found, before_the_network(geo, end if rank == 1 else lambda: None):
            field(geo.point())
        if rank == 0:
            with Path(os.environ["GEOAD_TEST_FOLDER"], "said").open("a") as file:
                file.write(f"{found.value}\n")


@contextlib.contextmanager
def before_the_network(geo: geoad.GeoModule, act: Callable[[], Any]) -> Iterator[None]:
    """Do something at the first evaluation of the network."""
    hook = geo.wrapped.register_forward_pre_hook(lambda *_: (hook.remove(), act())[:0] or None)
    try:
        yield
    finally:
        hook.remove()
