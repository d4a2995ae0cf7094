"""The outputs of a network over a data set, and the rows of their Jacobian chunk by chunk."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler, SubsetRandomSampler, WeightedRandomSampler
from torch.utils.weak import WeakIdKeyDictionary

from geoad.charts import Chart
from geoad.curvature.selection import Difference, Subset
from geoad.data import Batches, batch_size, spoilt_by, take
from geoad.errors import GeometryError
from geoad.kernels.jacobians import batched
from geoad.kernels.kernel_gram import Features, Group, features
from geoad.kernels.layered import Linearized, linearize, trial
from geoad.kernels.layers import layers_of
from geoad.kernels.memory import MOST, fitting, report
from geoad.kernels.rows import Plan, Rows
from geoad.kernels.uses import EmbeddingUse
from geoad.params import Blocks, Layout, equal

if TYPE_CHECKING:
    from geoad.module import GeoModule

__all__ = ["Chunk", "Data", "Form", "require_length", "space_of"]

Select = Callable[[Tensor], Tensor]


class Data:
    """A network's outputs f(θ) over a data set, (n, ..., c), as a function of the reference coordinates.

    Attributes:
        geo: the network.
        batches: the data; targets are left aside.
        select: which function of the outputs is meant, or None.
        shared: whoever asks knows what to do with data that are shared out among processes.
    """

    def __init__(self, geo: GeoModule, data: Any, select: Select | None, *, shared: bool = False) -> None:
        _require_order(data)
        self.geo, self.source, self.select = geo, data, select
        self.batches = data if shared and isinstance(data, Batches) else Batches(data)
        self._trials: dict[Any, Linearized] = {}
        self._width: int | None = None
        self._seen: tuple[Blocks, Tensor] | None = None
        self._by_sample = select is None or isinstance(select, (Subset, Difference))

    @property
    def meaning(self) -> Any:
        """What tells selections apart, as soon as the outputs have been seen: however one is written, it means the same."""
        return _meaning(self.select, self._width)

    def evaluate(self, theta: Blocks, inputs: Any) -> Tensor:
        """The outputs (n, ..., c) of a batch."""
        return self._selected(self._all(theta, inputs))

    def _selected(self, outputs: Tensor) -> Tensor:
        if self.select is None:
            return outputs
        selected: Any = self.select(outputs)
        if not isinstance(selected, Tensor) or selected.shape[:1] != outputs.shape[:1] or not selected.is_floating_point():
            found = f"{selected.dtype} of shape {tuple(selected.shape)}" if isinstance(selected, Tensor) else type(selected)
            raise GeometryError(
                f"outputs= turned outputs of shape {tuple(outputs.shape)} into {found}. It must give real numbers with the "
                "samples along the first axis, (n, ..., c); sum over other axes only, e.g. outputs=lambda f: f.sum(-1)."
            )
        return selected

    def _all(self, theta: Blocks, inputs: Any) -> Tensor:
        """What the network returns for a batch."""
        outputs: Any = self.geo.evaluate(theta, inputs)
        if not isinstance(outputs, Tensor) or outputs.ndim == 0 or not outputs.is_floating_point():
            found = type(outputs).__name__
            found = f"{outputs.dtype} of shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else found
            raise GeometryError(
                f"a tangent kernel needs the outputs as one real tensor (n, ..., c), the network returned {found}. Say which "
                "part is meant: GeoModule(net, forward=lambda net, batch: net(**batch).logits)."
            )
        self._width = outputs.shape[-1] if outputs.ndim > 1 else None
        return outputs

    def values(self, theta: Blocks) -> Tensor:
        """f(θ), detached; outputs that are not finite are refused."""
        self.require_separate_samples()
        parts: list[Tensor] = []
        with torch.no_grad():
            for size, inputs, _ in self.batches.sized():
                parts.append(self.evaluate(theta, inputs))
                require_length(parts[-1], size)
        return self.joined(theta, parts).detach()

    def joined(self, theta: Blocks, parts: Sequence[Tensor]) -> Tensor:
        """The outputs of all batches together, (N, ..., c)."""
        _require_one_shape({part.shape[1:] for part in parts})
        outputs = torch.cat(list(parts))
        if not bool(outputs.isfinite().all()):
            cause = spoilt_by(theta, self.batches, targets=False) or (
                "the parameters and the data are finite, so the network divides by zero, or runs out of range"
            )
            raise GeometryError(
                f"the network's outputs hold {int((~outputs.isfinite()).sum())} of {outputs.numel()} numbers that are not "
                f"finite ({cause}). A tangent kernel there would be nan throughout; mend the data or go back to a finite point."
            )
        self._require_same(theta, outputs)
        return outputs

    def _require_same(self, theta: Blocks, outputs: Tensor) -> None:
        """Refuse data that are others in every pass: rows, columns and targets would belong to different samples."""
        if self.batches.lasting or self.batches.exchange is not None:
            return
        before, self._seen = self._seen, (theta, outputs)
        if before is None or not equal(before[0], theta):
            return
        slack = torch.finfo(outputs.dtype).eps ** 0.5
        if before[1].shape != outputs.shape or not torch.allclose(
            before[1], outputs, slack, slack * float(outputs.abs().max())
        ):
            raise GeometryError(
                "two passes over the data gave the network's outputs at the same point in another order, or other outputs: the "
                "loader shuffles, or changes samples at random. A kernel has fixed axes; pass a loader that yields the same "
                "samples in the same order every time, or list(loader)."
            )

    def renew(self) -> None:
        """Forget the structure: the network may have been changed."""
        self._trials = {}

    def trial(self, theta: Blocks, inputs: Any) -> Linearized:
        """The first sample that had inputs of this form, with the structure of the network."""
        form = tuple((each.shape[1:], each.dtype) for each in batched(inputs))
        if form not in self._trials:
            self._require_own_samples(theta, inputs)
            self._trials[form] = trial(self.evaluate, theta, take(inputs, slice(0, 1)))
        return self._trials[form]

    def shape_of_sample(self, theta: Blocks, inputs: Any) -> torch.Size:
        """(..., c)."""
        with torch.no_grad():
            return self.evaluate(theta, take(inputs, slice(0, 1))).shape[1:]

    def coverage(self, theta: Blocks) -> dict[str, str]:
        """For each block the rules that cover it, or the functions that prevent it."""
        self.renew()
        return self.trial(theta, next(inputs for _, inputs, _ in self.batches.sized())).plan.coverage()

    def _require_own_samples(self, theta: Blocks, inputs: Any) -> None:
        """Refuse a function of the outputs that mixes samples (the network itself is looked at when it is first evaluated)."""
        if self._by_sample or batch_size(inputs) < 2:
            return
        with torch.no_grad():
            outputs = self._all(theta, take(inputs, slice(0, 2)))
            together, alone = self._selected(outputs)[:1], self._selected(outputs[:1])
        if not torch.allclose(together, alone, 1e-3, 1e-3 * float(alone.abs().max()), equal_nan=True):
            raise GeometryError(
                "the function outputs= gives other numbers for a sample alone than beside another one, so no sample has a "
                "Jacobian of its own. Let it act on each row of the outputs (n, ..., c), e.g. lambda f: f - f.mean(-1, True)."
            )
        self._by_sample = True

    def require_separate_samples(self) -> None:
        """Refuse networks in which the samples of a batch depend on each other."""
        for name, module in self.geo.wrapped.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and (  # pyright: ignore[reportPrivateUsage]
                module.training or module.running_mean is None
            ):
                raise GeometryError(
                    f"a tangent kernel was asked of a network whose module '{name}' ({type(module).__name__}) normalises with "
                    "the statistics of the batch: its samples depend on each other, and no sample has a Jacobian of its own. "
                    "Call geo.eval() first."
                )


def _require_one_shape(shapes: set[torch.Size]) -> None:
    if len(shapes) > 1:
        raise GeometryError(
            f"the outputs of different batches have the shapes {sorted(tuple(s) for s in shapes)} behind the sample axis, so "
            "they form no space. Pad the inputs to one length, or take one kernel for each length."
        )


def require_length(outputs: Tensor, size: int) -> None:
    """Refuse outputs that do not have one entry of their first axis for each sample."""
    if outputs.ndim == 0 or outputs.shape[0] != size:
        raise GeometryError(
            f"the network returned outputs of shape {tuple(outputs.shape)} for a batch of {size} samples. The outputs over "
            "data form a space if the samples come first, (n, ..., c); move that axis: "
            "GeoModule(net, forward=lambda net, x: net(x).movedim(1, 0))."
        )


def _meaning(select: Select | None, width: int | None) -> Any:
    if isinstance(select, (Subset, Difference)) and select.axis == -1 and width is not None:
        if isinstance(select, Difference):
            return Difference(select.i % width, select.j % width)
        indices = tuple(i % width for i in select.indices)
        return None if indices == tuple(range(width)) else Subset(indices)
    try:
        hash(select)
    except TypeError:
        return object()
    return select


def _require_order(data: Any) -> None:
    """Refuse loaders that are known to shuffle."""
    batches: Any = getattr(data, "batch_sampler", None)
    for sampler in (getattr(data, "sampler", None), getattr(batches, "sampler", None)):
        if isinstance(sampler, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)):
            raise GeometryError(
                f"the data are a loader with a {type(sampler).__name__}, which yields the samples in another order in every "
                "pass, so the outputs over them have no fixed axes. Pass DataLoader(dataset, batch_size=..., shuffle=False)."
            )


# -- rows --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """Some samples.

    Attributes:
        place: where they lie in the data set.
        outputs: their outputs.
        plain: their rows.
        dual: their rows times the inverse metric; the same object where the metric is the identity.
    """

    place: slice
    outputs: Tensor
    plain: Features
    dual: Features


@dataclass(frozen=True)
class Form:
    """How rows are brought into features.

    Attributes:
        groups: the blocks with their metrics.
        contract: what becomes of the outputs, see `geoad.kernels.kernel_gram.CONTRACTIONS`.
        structured: use the structure of layers.
        memory: bytes for the samples of one chunk.
    """

    groups: Sequence[Group]
    contract: str
    structured: bool
    memory: int

    @property
    def is_plain(self) -> bool:
        """Both sides of an inner product have the same features."""
        return all(group.solve is None for group in self.groups)

    def of(self, rows: Rows, dual: bool, places: int, partners: int) -> Features:
        """The features of rows."""
        options: dict[str, Any] = {"contract": self.contract, "places": places, "partners": partners}
        return features(rows, self.groups, dual=dual, structured=self.structured, **options)

    def numbers(self, plan: Plan, layout: Layout, seeds: int) -> int:
        """About how many numbers a sample needs, at most: signals, rows that are multiplied out, and copies of them."""
        signals = sum(3 * seeds * math.prod(use.shape) for use in plan.uses)
        sizes = {name: shape.numel() for name, shape in layout.items()}
        generic = {name for group in self.groups if group.explicit for name in group.names}
        generic |= set(layers_of(plan, layout)[1] if self.structured else layout)
        spread = (use for use in plan.uses if math.prod(use.shape[:-1]) > 1 and not isinstance(use, EmbeddingUse))
        many = {name for use in spread for name in use.names}
        if seeds <= _FEW:
            many |= {name for group in self.groups if group.weighted for name in group.names}
        explicit = sum(sizes[name] for name in generic)
        once = sum(sizes[name] for name in many - generic)
        return signals + seeds * (4 * explicit + 2 * once + plan.working) + plan.graph


def chunks(data: Data, theta: Blocks, form: Form, start: int = 0, partners: int = 1) -> Iterator[Chunk]:
    """The rows of all samples from `start` on, a few samples at a time."""
    layout, first = Layout({name: block.shape for name, block in theta.items()}), 0
    shapes: set[torch.Size] = set()
    known: Plan | None = None
    for size, inputs, _ in data.batches.sized():
        sample = data.trial(theta, inputs)
        plan, shape = sample.plan, sample.outputs.shape[1:]
        shapes.add(shape)
        _require_one_shape(shapes)
        seeds = math.prod(shape)
        each = form.numbers(plan, layout, seeds) * _width(theta)
        step = fitting(form.memory, each, most=MOST)
        if plan is not known:
            report(step, each, each, form.memory)
        known = plan
        places = seeds // shape[-1] if shape else 1
        for low in range(max(0, start - first), size, step):
            high = min(low + step, size)
            outputs, rows = _rows(data, layout, theta, take(inputs, slice(low, high)), plan)
            plain = form.of(rows, False, places, partners)
            dual = plain if form.is_plain else form.of(rows, True, places, partners)
            del rows
            yield Chunk(slice(first + low, first + high), outputs.detach(), plain, dual)
            del outputs, plain, dual  # before the next ones are made
        first += size


_FEW = 4
"""With fewer outputs, layers with a weighted metric are multiplied out."""


def _width(theta: Blocks) -> int:
    return max(4, next(iter(theta.values())).element_size())


def _rows(data: Data, layout: Layout, theta: Blocks, inputs: Any, plan: Plan) -> tuple[Tensor, Rows]:
    """The rows of all outputs."""
    linearized = linearize(data.evaluate, layout, theta, inputs, plan)
    f = linearized.outputs
    count = f[0].numel()
    eye = torch.eye(count, dtype=f.dtype, device=f.device).reshape(count, 1, *f.shape[1:])
    return f, linearized.pull(eye.expand(count, *f.shape))


# -- spaces ------------------------------------------------------------------------------------------------------------------

_spaces: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""network -> data (by identity) -> what is meant -> chart."""


def space_of(geo: GeoModule, data: Any, key: tuple[Any, ...], shape: Sequence[int]) -> Chart:
    """The space of outputs of a network over data: the same chart for the same data, so that kernels there can be compared."""
    known: dict[Any, Chart] = {}
    with suppress(TypeError):  # what cannot be referred to weakly has spaces of its own
        known = _spaces.setdefault(geo, WeakIdKeyDictionary()).setdefault(data[0] if type(data) is tuple else data, {})
    full = (*key, tuple(shape))
    if full not in known:
        known[full] = Chart({"f": tuple(shape)}, "outputs")
    return known[full]
