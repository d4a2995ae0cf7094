"""Derivatives of single samples in the structure of layers: what went in and what came back, never multiplied out.

Curvature matrices are sums over samples n and seeds k of r rᵀ with the rows r = sᵀ J_n. `linearize` evaluates the network once
on a chunk of samples; `Linearized.pull` sends seeds back through it and gives the `Rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from geoad.kernels import products, rules
from geoad.kernels.bags import SpelledOutPadding
from geoad.kernels.graph import dependencies, nodes, numbers_held
from geoad.kernels.jacobians import batched, rebuilt
from geoad.kernels.ladder import at_top_level, climb, one_by_one, watched
from geoad.kernels.norms import SpelledOut
from geoad.kernels.rows import Plan, Rows, UseRows
from geoad.kernels.tap import Tap
from geoad.params import Blocks, Layout, outside_of_transforms, unwrapped

__all__ = [
    "Glance",
    "Linearized",
    "glance",
    "linearize",
    "linearize_together",
    "plan_of",
    "trial",
]

_ = rules  # the tap knows them from now on

Outputs = Callable[[Blocks, Any], Tensor]
_NONE: Set[int] = frozenset()


def plan_of(outputs: Outputs, x: Blocks, sample: Any) -> Plan:
    """What one evaluation on `sample` (a single sample with its batch axis of 1) shows; see `trial`."""
    return trial(outputs, x, sample).plan


def trial(outputs: Outputs, x: Blocks, sample: Any) -> Linearized:
    """`sample` linearized by a plan that is made of it: the plan is right for samples of this form."""
    seen = glance(outputs, x, sample)
    return _tried(seen.plan, outputs, seen.layout, x, sample)


def glance(outputs: Outputs, x: Blocks, sample: Any) -> Glance:
    """The plan that one evaluation shows; whether samples can be evaluated together is left to `linearize`.

    Tapped operations take the parameters as constants, and the graph of the outputs is searched for the parameters: one that is
    still found has a use that no torch function shows (a custom ``autograd.Function``), and is not covered.
    """
    layout = Layout({name: block.shape for name, block in x.items()})
    everything = Plan([], frozenset(x), {})
    plain = unwrapped(x)
    if plain is None:
        return Glance(layout, everything.without_structure("parameters under vmap or the compiler"))
    with outside_of_transforms(), one_by_one(), torch.enable_grad():
        leaves = {name: block.detach().requires_grad_() for name, block in plain.items()}
        try:
            with Tap(leaves, cut=True) as tap, SpelledOut():
                f = outputs(leaves, sample)
        except RuntimeError as error:  # a derivative inside of the network that misses its parameters; others come again
            why = (str(error).splitlines() or [type(error).__name__])[0]
            return Glance(
                layout, everything.without_structure(f"an operation that fails where parameters are constants ({why})")
            )
        above = nodes([f])
        hidden = {id(leaf) for leaf in dependencies([f], above)}
    seen = {name for use in tap.uses for name in use.names} - set(tap.others) - tap.overwritten()
    covered = frozenset(name for name in seen if id(leaves[name]) not in hidden)
    for name in seen - covered:
        tap.others.setdefault(name, []).append("a function that the tap does not see")
    for name in tap.overwritten():
        tap.others.setdefault(name, []).append("an operation that changes the input of the layer in place")
    kept = [(use, a) for each, a in zip(tap.uses, tap.inputs, strict=True) if (use := each.only(covered)) is not None]
    others = {name: tap.others.get(name, []) for name in x if name not in covered}
    plan = Plan([use for use, _ in kept], covered, others, *(numbers_held(above) if others else ()))
    return Glance(layout, plan, f.detach(), [a.detach().unsqueeze(0) for _, a in kept])


def _tried(plan: Plan, outputs: Outputs, layout: Layout, x: Blocks, sample: Any) -> Linearized:
    """By the plan if the samples of a chunk can be evaluated together and it fits then, else without structure."""
    with watched() as seen:
        linearized = linearize(outputs, layout, x, sample, plan)
    if next((each.way for each in reversed(seen) if each.path[-1] == _KIND), "vmap") == "loop":
        linearized.plan = plan.without_structure("vmap cannot batch the network, samples are gone through one by one")
    return linearized


# -- evaluation --------------------------------------------------------------------------------------------------------------


class Linearized:
    """A chunk of n samples, evaluated once.

    Attributes:
        outputs: (n, ..., c).
        plan: which blocks have structure here.
        inputs: what the uses of the plan were applied to, (n, ...).
    """

    outputs: Tensor
    plan: Plan
    layout: Layout
    inputs: list[Tensor]

    def outline(self, seeds: int) -> Rows:
        """The rows of so many seeds without their numbers, to judge sizes by."""
        n = self.outputs.shape[0]
        uses = [UseRows(use, a, ()) for use, a in zip(self.plan.uses, self.inputs, strict=True)]
        others = {name: self.outputs.new_empty(()).expand(n, seeds, self.layout[name].numel()) for name in self.plan.others}
        return Rows(self.layout, self.plan, uses, others, n, seeds)

    def pull(self, seeds: Tensor, signs: Tensor | None = None, squared: Set[int] = _NONE) -> Rows:
        """The rows of seeds (K, n, ..., c); of the uses in `squared` (by number) only Σ_k σ_k g_k², with the signs σ (K, n)."""
        raise NotImplementedError


class Glance(Linearized):
    """One sample as `glance` saw it: its outputs, and what went into the layers, without a graph.

    Where nothing could be seen the outputs are empty, and there is no `outline`.
    """

    def __init__(self, layout: Layout, plan: Plan, outputs: Tensor | None = None, inputs: Sequence[Tensor] = ()) -> None:
        self.layout, self.plan, self.inputs = layout, plan, list(inputs)
        self.outputs = torch.empty(0, device="cpu") if outputs is None else outputs


def linearize(outputs: Outputs, layout: Layout, x: Blocks, inputs: Any, plan: Plan) -> Linearized:
    """Evaluate a chunk of samples, with the graph for any number of seeds.

    Each sample runs by itself under ``vmap``, with a batch axis of 1: whatever axes the layers see belong to that sample.
    Blocks that are not covered are expanded over the samples and differentiated in the same passes, exactly. Networks that
    ``vmap`` cannot batch are gone through sample by sample, and so without structure.
    """

    def samples_together() -> Linearized:
        try:
            return _Together(outputs, layout, x, inputs, plan)
        except _AnotherPath:
            why = "the network took another path than on the sample that the plan was made of"
            return _Together(outputs, layout, x, inputs, plan.without_structure(why))

    with one_by_one():
        return climb(_KIND, [("vmap", samples_together), ("loop", lambda: _OneByOne(outputs, layout, x, inputs, plan))])


def linearize_together(outputs: Outputs, layout: Layout, x: Blocks, inputs: Any, plan: Plan) -> Linearized:
    """`linearize` by this plan or not at all, and all seeds at once: for what is traced."""
    with one_by_one():
        linearized = _Together(outputs, layout, x, inputs, plan)
    linearized.small = True
    return linearized


_KIND = "rows of samples"
"""Apart from the kind of `geoad.kernels.jacobians`: the tap takes operations apart that ``vmap`` cannot batch as a whole."""


class _AnotherPath(Exception):
    """The operations of this evaluation are not those of the plan."""


class _Together(Linearized):
    """All samples under vmap, inside of one vjp."""

    def __init__(self, outputs: Outputs, layout: Layout, x: Blocks, inputs: Any, plan: Plan) -> None:
        batch = tuple(batched(inputs))
        n = batch[0].shape[0]
        covered = {name: x[name] for name in x if name in plan.covered}
        like = next(iter(x.values()))
        zeros = [like.new_zeros(()).expand(n, *use.shape) for use in plan.uses]
        others = {name: block.expand(n, *block.shape) for name, block in x.items() if name not in covered}

        def single(samples: tuple[Tensor, ...], zeros: list[Tensor], rest: Blocks) -> Any:
            blocks = covered | rest
            with SpelledOutPadding(), Tap(covered, zeros) as tap:
                f = outputs({name: blocks[name] for name in x}, rebuilt(inputs, iter(samples)))[0]
            if tap.surplus or tap.others or tap.uses != plan.uses:
                raise _AnotherPath
            return f, tap.inputs

        def evaluate(zeros: list[Tensor], rest: Blocks) -> Any:
            return products.quiet_vmap(single)(batch, zeros, rest)

        linearized: Any = torch.func.vjp(evaluate, zeros, others, has_aux=True)
        self.outputs, self._pull, self.inputs = linearized
        self.plan, self.layout = plan, layout
        self.small = n * len(plan.uses) <= _SMALL

    def pull(self, seeds: Tensor, signs: Tensor | None = None, squared: Set[int] = _NONE) -> Rows:
        backs: list[list[Tensor]] = [[] for _ in self.plan.uses]
        rest: dict[str, list[Tensor]] = {name: [] for name in self.plan.others}
        sums: list[Tensor | None] = [None for _ in self.plan.uses]
        # torch.func would record a graph of the backward pass as well; it is kept where someone may ask for it
        with torch.set_grad_enabled(self.outputs.requires_grad or not at_top_level()):
            for k, (back, generic) in enumerate(self._together(seeds) if self.small else map(self._pull, seeds)):
                for i in reversed(range(len(back))):
                    g = _wide(back.pop())  # its memory is for the next seed
                    if i in squared:
                        sums[i] = _with_square(sums[i], g, None if signs is None else signs[k])
                    else:
                        backs[i].append(g)
                for name, each in generic.items():
                    rest[name].append(each)
        n, k = self.outputs.shape[0], len(seeds)
        uses = [UseRows(*each) for each in zip(self.plan.uses, self.inputs, backs, sums, strict=True)]
        others = {name: _wide(torch.stack(each, 1).reshape(n, k, -1)) for name, each in rest.items()}
        return Rows(self.layout, self.plan, uses, others, n, k)

    def _together(self, seeds: Tensor) -> Iterator[tuple[list[Tensor], Blocks]]:
        back, generic = products.mapped(self._pull, seeds)
        backs, rest = [each.unbind(0) for each in back], {name: each.unbind(0) for name, each in generic.items()}
        for k in range(len(seeds)):
            yield [each[k] for each in backs], {name: each[k] for name, each in rest.items()}


def _with_square(total: Tensor | None, g: Tensor, sign: Tensor | None) -> Tensor:
    """total + σ g² for the signs σ (n,) of a seed; `total` may be written into."""
    bent = g if sign is None else g * sign.to(g.dtype).reshape(-1, *[1] * (g.ndim - 1))
    return g * bent if total is None else total.addcmul_(g, bent)


def _wide(numbers: Tensor) -> Tensor:
    """Sums over samples are taken in single precision at least."""
    return numbers.float() if numbers.dtype in (torch.bfloat16, torch.float16) else numbers


_SMALL = 512
"""Below this many samples times layers, seeds go back together; above, one by one, which takes less memory."""


class _OneByOne(Linearized):
    """Sample by sample, without structure."""

    def __init__(self, outputs: Outputs, layout: Layout, x: Blocks, inputs: Any, plan: Plan) -> None:
        batch = tuple(batched(inputs))

        def single(sample: tuple[Tensor, ...]) -> tuple[Tensor, Callable[[Tensor], Blocks]]:
            return products.vjp(lambda y: outputs(y, rebuilt(inputs, iter(sample)))[0], x)

        each = [single(tuple(part[i] for part in batch)) for i in range(batch[0].shape[0])]
        self.outputs, self._pulls = torch.stack([f for f, _ in each]), [pull for _, pull in each]
        self.plan, self.layout, self.inputs = plan.without_structure(), layout, []

    def pull(self, seeds: Tensor, signs: Tensor | None = None, squared: Set[int] = _NONE) -> Rows:
        found = [products.mapped(pull, seeds[:, i]) for i, pull in enumerate(self._pulls)]
        stacked = {name: torch.stack([each[name] for each in found]) for name in self.layout}
        others = {name: _wide(each.reshape(len(found), len(seeds), -1)) for name, each in stacked.items()}
        return Rows(self.layout, self.plan, [], others, len(found), len(seeds))
