"""What two processes check of dual solves, each with its share of the data; started by test_dual_solve.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed_cases import BATCHES, X, Y, close, conv, network, same_bits
from torch.utils.data import DataLoader, TensorDataset

import geoad
from geoad.curvature import GGN, Fisher
from geoad.distributed import ProcessError, shard
from geoad.errors import GeometryError
from geoad.metrics import Diagonal, Euclidean


def check_shares(rank: int) -> None:
    """Data in any of the ways to share them, all kinds: the solution of one process, the same bits in both."""
    geo = geoad.GeoModule(network())
    p = geo.point()
    batch = geo.reference.covector(geo.reference.layout.unravel(torch.randn(2, 3, 27)), at=p)
    loader = DataLoader(TensorDataset(X, Y), batch_size=2)
    for data, kind in ((shard(BATCHES), "covariance"), (shard((X, Y)), "exact"), (shard(loader), "empirical")):
        alone = geoad.DualSolver(Fisher(geo, (X, Y), kind=kind), p, 0.1)
        both = geoad.DualSolver(Fisher(geo, data, kind=kind), p, 0.1)
        assert both.size == alone.size
        same_bits(both.gram)
        close(both.solve(batch).ravel(), alone.solve(batch).ravel())
        close(both.logdet(), alone.logdet())


def check_sums(rank: int) -> None:
    """Several fields and a structured rest; a network with explicit rows; another chart; little memory."""
    geo = geoad.GeoModule(conv())
    p, w = geo.point(), geoad.grad(geo.loss(F.cross_entropy, (X, Y)))(geo.point())
    psi = geo.reference.reparametrize(geoad.maps.Asinh(), name="psi").target
    entries = {name: torch.linspace(0.1, 1, shape.numel()).reshape(shape) for name, shape in geo.reference.layout.items()}

    def system(data: Any, other: Any) -> Any:
        stored = Fisher(geo, other, representation={"*.bias": "diagonal", "*": "block_diagonal"})
        return 2.0 * GGN(geo, data, F.cross_entropy) - 1e-3 * Fisher(geo, other) + stored + Diagonal(geo.reference, entries)

    alone, both = system((X, Y), (X[:4], Y[:4])), system(shard(BATCHES), shard((X[:4], Y[:4])))
    close(geoad.dual_solve(both, p, w, max_memory=1).ravel(), geoad.dual_solve(alone, p, w).ravel())
    moved = geoad.dual_solve(both, p.to(psi), w.to(psi), 0.1, Euclidean(psi))
    close(moved.ravel(), geoad.dual_solve(alone, p.to(psi), w.to(psi), 0.1, Euclidean(psi)).ravel())


def check_refused(rank: int) -> None:
    """What does not go together is told in both."""
    geo = geoad.GeoModule(network())
    p, parts = geo.point(), shard(BATCHES)
    with pytest.raises(GeometryError, match="shared out among processes and others have not"):
        geoad.DualSolver(Fisher(geo, parts) + Fisher(geo, X), p, 0.1)
    with pytest.raises(ProcessError):
        geoad.DualSolver((1.0 + rank) * Fisher(geo, parts), p, 0.1)
    broken = [(x, y if i else y + 7 * (rank == 0)) for i, (x, y) in enumerate(BATCHES)]
    with pytest.raises(GeometryError):
        geoad.DualSolver(Fisher(geo, shard(broken, by="process"), kind="empirical"), p, 0.1)
    w = geoad.grad(geo.loss(F.cross_entropy, (X, Y)))(p)
    same_bits(geoad.dual_solve(Fisher(geo, parts), p, w, 0.1).ravel())


CHECKS = (check_shares, check_sums, check_refused)
