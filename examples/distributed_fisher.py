"""A Fisher matrix, a natural gradient and a tangent kernel over data that two processes share.

    torchrun --nproc-per-node 2 examples/distributed_fisher.py

Each process goes through its own part of the data; what comes out is the same in both, to the last bit, and what one process
finds for all of the data, to rounding. Without torchrun the script is a group of one process.
"""

from __future__ import annotations

import os
import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import geoad
from geoad.curvature import Fisher, resumable
from geoad.distributed import shard


def start() -> None:
    """The processes of torchrun, or this one alone; who waits longer than a minute for another one gives up."""
    options = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", timeout=timedelta(minutes=1), **options)


def same_bits(numbers: Tensor) -> bool:
    """All processes hold the same numbers."""
    everywhere = [torch.empty_like(numbers) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, numbers.contiguous())
    return all(torch.equal(numbers, other) for other in everywhere)


def report(what: str, mine: Tensor, whole: Tensor) -> None:
    """Compare with one process alone."""
    same, error = same_bits(mine), float((mine - whole).abs().max() / whole.abs().max())
    if dist.get_rank() == 0:
        print(f"{what:28} difference to one process {error:.1e}, same bits in all: {same}")
    assert same and error < 1e-12


def main() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the same network and data everywhere
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    x, y = torch.randn(101, 8), torch.randint(4, (101,))
    batches = list(zip(x.split(10), y.split(10), strict=True))

    geo = geoad.GeoModule(net)
    p, mine = geo.point(), shard(batches)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} processes, {' + '.join(map(str, mine.sizes))} samples")

    w, of_all = (geoad.grad(geo.loss(F.cross_entropy, data))(p) for data in (mine, batches))
    report("gradient", w.ravel(), of_all.ravel())
    v = geoad.riemannian_grad(geo.loss(F.cross_entropy, batches))(p)
    for representation in ("implicit", "dense", "kfac", "ekfac", "diagonal"):
        F_p, whole = (Fisher(geo, data, representation=representation)(p) for data in (mine, batches))
        report(f"Fisher ({representation}) times v", F_p.mv(v).ravel(), whole.mv(v).ravel())
    step, wanted = (
        Fisher(geo, data, representation="kfac")(p).solve(slope, damping=1e-2) for data, slope in ((mine, w), (batches, of_all))
    )
    report("natural gradient (kfac)", step.ravel(), wanted.ravel())

    with tempfile.TemporaryDirectory() as folder, resumable(os.path.join(folder, "fisher.pt"), every=2):
        Fisher(geo, mine, representation="kfac")(p)  # after an interruption, a second start goes on from the file

    kernel = geoad.ntk(geo, mine, contract="trace")
    for rows, block in kernel.blocks(p):
        if dist.get_rank() == 0:
            print(f"{'tangent kernel':28} rows {rows.start}..{rows.stop - 1} of {block.shape[-1]} here")
    dist.destroy_process_group()


if __name__ == "__main__":
    start()
    main()
