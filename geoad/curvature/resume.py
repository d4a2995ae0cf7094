"""Sweeps over long data sets that are saved on the way, and go on from there."""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
from collections.abc import Generator, Sequence
from glob import escape
from pathlib import Path
from typing import Any

import torch

from geoad.curvature.collect import Collector
from geoad.errors import GeometryError
from geoad.kernels.conditions import settle
from geoad.kernels.spread import digest, fingerprint

__all__ = ["Journal", "Page", "journal", "resumable", "resuming"]


@contextlib.contextmanager
def resumable(path: str | os.PathLike[str], every: int = 100) -> Generator[None]:
    """One curvature matrix is computed in this block so that it survives an interruption.

    The sums are written to a file each time `every` batches are done, and at the end of each pass over the data; if the file
    is there when the block begins, the calculation goes on from it. The result is the same, bit for bit, as without an
    interruption. When the matrix is complete the file is deleted.

    Args:
        path: the file. Each of several processes has one of its own: ``path.0-of-2``, ... It is replaced in one piece.
        every: in batches of this process.

    Raises:
        GeometryError: the file belongs to another field, point, network or data set, or to another number of processes, or is
            no such file; two matrices are asked for in one block.

    The batches that are done are still drawn from the data, and compared with what was seen before: the order must not change.
    Representations of "ekfac" go through the data twice here. Matrix-free values (representation="implicit") have no sweep, and
    nothing is saved.

    >>> import torch, geoad
    >>> geo = geoad.GeoModule(torch.nn.Linear(2, 3))
    >>> F = geoad.curvature.Fisher(geo, torch.randn(5, 2), representation="kfac")
    >>> with geoad.curvature.resumable("fisher.pt"):
    ...     F_p = F(geo.point())
    """
    if every < 1:
        raise GeometryError(f"every={every}: the sums are saved after a number of batches. Pass at least 1.")
    outer = _local.request
    _local.request = request = _Request(Path(path), every)
    try:
        yield
    finally:
        _local.request = outer
        request.used = True


class _Request:
    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every, self.used = path, every, False


class _Local(threading.local):
    def __init__(self) -> None:
        self.request: _Request | None = None


_local = _Local()


def resuming() -> bool:
    """A journal was asked for."""
    return _local.request is not None


def journal(stamp: str, device: torch.device, rank: int = 0, size: int = 1) -> Journal | None:
    """The journal of the sweep that begins now, if one was asked for.

    Args:
        stamp: what is computed, in words.
        device: where the sums live.
        rank: which process this is.
        size: of how many.
    """
    request = _local.request
    if request is None:
        return None
    if request.used:
        raise GeometryError(
            f"a second matrix was asked for in the block of resumable('{request.path}'), whose file holds one. Use a block and "
            "a file for each."
        )
    request.used = True
    path = request.path if size == 1 else request.path.with_name(f"{request.path.name}.{rank}-of-{size}")
    _require_as_many(request.path, size)
    return Journal(path, request.every, stamp, device)


def _require_as_many(path: Path, size: int) -> None:
    """Raise if there are sums of another number of processes: their parts of the data are not those of today."""
    found = [1] if path.exists() else []
    for each in path.parent.glob(f"{escape(path.name)}.*-of-*"):
        count = each.name.rpartition("-of-")[2]
        found += [int(count)] if count.isdigit() else []
    others = sorted(set(found) - {size})
    if others:
        raise GeometryError(
            f"'{path}' was begun by {others[0]} processes, found {size} now. Each has sums over its own part of the data, and "
            f"with {size} processes the parts are others. Start {others[0]} processes, or delete the files and begin again."
        )


class Page:
    """One pass over the data in a journal.

    Attributes:
        skip: how many batches are done already.
        step: how many samples are taken together from there on.
    """

    def __init__(self, book: Journal, collectors: Sequence[Collector], found: dict[str, Any] | None) -> None:
        self.book, self.collectors = book, collectors
        self.skip, self.step, self.expected = 0, 0, ""
        self.seen, self.chain = 0, ""
        if found is not None:
            self.skip, self.step, self.expected = found["batches"], found["step"], found["chain"]
            for each, state in zip(collectors, found["states"], strict=True):
                each.load(state)

    def saw(self, inputs: Any, targets: Any) -> bool:
        """Note a batch; True if it is still to be done."""
        if self.seen == self.skip:
            self._require_same()
        self.seen += 1
        self.chain = f"{digest(self.chain + fingerprint([inputs, targets])):014x}"
        return self.seen > self.skip

    def _require_same(self) -> None:
        if self.chain != self.expected:
            raise GeometryError(
                f"cannot go on from '{self.book.path}': the first {self.skip} batches are not those that were done (other "
                "data, or a loader that shuffles). Use the same data in the same order, or delete the file."
            )

    def done(self, step: int) -> None:
        """The last batch is in the sums."""
        self.step = step
        if self.seen % self.book.every == 0:
            self.save()

    def close(self) -> None:
        """The pass is over."""
        if self.seen == self.skip:
            self._require_same()
        self.save()

    def content(self) -> dict[str, Any]:
        """What is saved."""
        states = [each.state() for each in self.collectors]
        return {"batches": max(self.seen, self.skip), "step": self.step, "chain": self.chain, "states": states}

    def save(self) -> None:
        """Write the journal, if all that was checked of the data holds."""
        settle()
        self.book.save(self.content())


class Journal:
    """The file of a calculation: one page for each pass over the data, the last of them unfinished."""

    def __init__(self, path: Path, every: int, stamp: str, device: torch.device) -> None:
        self.path, self.every, self.stamp = path, every, stamp
        self.written: list[dict[str, Any]] = []
        self.found = self._read(device) if path.exists() else []

    def _read(self, device: torch.device) -> list[dict[str, Any]]:
        try:
            content: Any = torch.load(self.path, map_location=device, weights_only=True)
            stamp, pages = content["stamp"], content["pages"]
        except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
            raise GeometryError(
                f"'{self.path}' holds no partial sums of geoad ({error}). Delete it, or pass another path."
            ) from error
        if stamp != self.stamp:
            raise GeometryError(
                f"'{self.path}' holds partial sums of another calculation:\n  found {stamp}\n  asked {self.stamp}\nSums at "
                "different points or over different data do not add up. Delete the file, or go back to what it was made of."
            )
        return pages

    def page(self, collectors: Sequence[Collector]) -> Page:
        """The page of the next pass: collectors are set to where it was left."""
        return Page(self, collectors, self.found[len(self.written)] if len(self.written) < len(self.found) else None)

    def save(self, page: dict[str, Any]) -> None:
        """Write all pages; the file is replaced in one piece."""
        beside = self.path.with_name(self.path.name + ".part")
        with beside.open("wb") as file:
            torch.save({"stamp": self.stamp, "pages": [*self.written, page]}, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path)

    def turn(self, page: Page) -> None:
        """The pass is over: what it summed in this process stays as it is now."""
        page.close()
        self.written.append(page.content())

    def finish(self) -> None:
        """The calculation is complete."""
        self.path.unlink(missing_ok=True)
