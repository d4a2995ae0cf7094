"""Sums over the rows of samples (Gram matrices, diagonals, Kronecker factors), against the explicit rows of plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tap_cases import CASES, Lambda
from torch import Tensor, nn
from torch.nn import functional as F

import geoad
from geoad.data import take
from geoad.kernels.factors import EigenSum, KroneckerSum
from geoad.kernels.gram import GramSum
from geoad.kernels.jacobians import sample_jacobian
from geoad.kernels.layered import _OneByOne, linearize, plan_of  # pyright: ignore[reportPrivateUsage]
from geoad.kernels.layers import Layer, layers_of
from geoad.kernels.rows import Plan, Rows
from geoad.kernels.squares import add_cross, add_squares, coupled, squared

SAMPLES, SEEDS = 5, 3


class Setting:
    """A network with the rows of its samples: `chunks` in structure, `rows` (n, K, d) by ``vmap`` and ``jacrev``."""

    def __init__(self, geo: geoad.GeoModule, inputs: Tensor, signed: bool = True) -> None:
        self.geo, self.inputs = geo, inputs
        self.x, self.layout = geo.point().blocks, geo.reference.layout
        self.plan: Plan = plan_of(geo.evaluate, self.x, inputs[:1])
        f, jacobian = sample_jacobian(geo.evaluate, self.layout, self.x, inputs)
        self.s = torch.randn(SEEDS, *f.shape)
        self.signs = torch.randn(SEEDS, len(f)) if signed else None
        self.rows = self._explicit(jacobian)
        self.weights = torch.ones(SEEDS, len(f)) if self.signs is None else self.signs

    def chunks(self, *parts: slice, alone: frozenset[int] = frozenset()) -> Iterator[tuple[Rows, Tensor | None]]:
        """Rows of some samples at a time; of the uses `alone` their squares."""
        for part in parts or (slice(0, 3), slice(3, None)):
            linearized = linearize(self.geo.evaluate, self.layout, self.x, take(self.inputs, part), self.plan)
            signs = None if self.signs is None else self.signs[:, part]
            yield linearized.pull(self.s[:, part], signs, alone), signs

    def _explicit(self, jacobian: Tensor) -> Tensor:
        return torch.einsum("knc,ncd->nkd", self.s.flatten(2), jacobian.reshape(len(jacobian), -1, self.layout.dim))

    def at(self, inputs: Tensor) -> Tensor:
        """The rows at other inputs."""
        return self._explicit(sample_jacobian(self.geo.evaluate, self.layout, self.x, inputs)[1])

    def block(self, name: str) -> Tensor:
        """The rows of one block, (n, K, *shape)."""
        return self.rows[..., self.layout.offsets()[name]].reshape(*self.rows.shape[:2], *self.layout[name])

    def arranged(self, layer: Layer) -> Tensor:
        """The rows of a layer, (n, K, groups, out, in), from the shapes of its blocks alone."""
        if layer.weight is None:
            assert layer.bias is not None
            return self.block(layer.bias).reshape(*self.rows.shape[:2], layer.groups, -1, 1)
        weight = self.block(layer.weight)
        if layer.transposed:  # (groups · in, out, *kernel)
            weight = weight.unflatten(2, (layer.groups, -1)).transpose(3, 4)
        else:
            weight = weight.unflatten(2, (layer.groups, -1))
        weight = weight.flatten(4)
        if layer.bias is None:
            return weight
        return torch.cat([weight, self.block(layer.bias).reshape(*weight.shape[:4], 1)], -1)


def setting(name: str, signed: bool = True) -> Setting:
    torch.manual_seed(0)
    each = CASES[name]
    shape = (SAMPLES, *each.shape)
    inputs = torch.randint(each.tokens, shape) if each.tokens else torch.randn(shape)
    return Setting(geoad.GeoModule(each.make()), inputs, signed)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


every_case = pytest.mark.parametrize("name", list(CASES))


# -- Gram matrices -----------------------------------------------------------------------------------------------------------


@every_case
def test_gram_matrices(name: str) -> None:
    case = setting(name)
    names = list(case.layout)
    groups = [names[::2], names[1::2]] if len(names) > 1 else [names]
    whole, parts = GramSum(case.layout), GramSum(case.layout, groups)
    for rows, signs in case.chunks():
        whole.add(rows, signs)
        parts.add(rows, signs)
    reference = torch.einsum("nki,nkj,kn->ij", case.rows, case.rows, case.weights)
    close(whole.matrix(), reference)
    for group, matrix in zip(groups, parts.matrices(), strict=True):
        places = torch.cat([torch.arange(case.layout.dim)[case.layout.offsets()[each]] for each in names if each in group])
        close(matrix, reference[places][:, places])


def test_gram_matrices_without_signs_are_symmetric_to_the_bit() -> None:
    case = setting("conv2d", signed=False)
    total = GramSum(case.layout)
    for rows, signs in case.chunks():
        total.add(rows, signs)
    matrix = total.matrix()
    assert torch.equal(matrix, matrix.mT)
    close(matrix, torch.einsum("nki,nkj->ij", case.rows, case.rows))


def test_chunks_of_different_structure_add_up() -> None:
    """Sequences of length one make outer products, longer ones do not."""
    torch.manual_seed(0)
    geo = geoad.GeoModule(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    cases = [Setting(geo, torch.randn(3, t, 4)) for t in (1, 2)]
    total = GramSum(geo.reference.layout)
    for case in cases:
        for rows, signs in case.chunks(slice(None)):
            total.add(rows, signs)
    close(total.matrix(), sum(torch.einsum("nki,nkj,kn->ij", c.rows, c.rows, c.weights) for c in cases))  # pyright: ignore


def test_wide_layers_use_several_strips() -> None:
    torch.manual_seed(0)
    geo = geoad.GeoModule(nn.Sequential(nn.Conv1d(3, 12, 5), nn.Flatten(), nn.Linear(36, 3)))
    case = Setting(geo, torch.randn(SAMPLES, 3, 7))
    total = GramSum(case.layout)
    for rows, signs in case.chunks():
        total.add(rows, signs)
    close(total.matrix(), torch.einsum("nki,nkj,kn->ij", case.rows, case.rows, case.weights))


# -- diagonals ---------------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("signed", [True, False])
def test_squares(name: str, signed: bool) -> None:
    case = setting(name, signed)
    total = {block: torch.ones_like(value) for block, value in case.x.items()}
    for rows, signs in case.chunks():
        add_squares(total, rows, signs)
    close(case.layout.ravel(total) - 1, torch.einsum("nki,kn->i", case.rows.square(), case.weights))


@every_case
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("small", [0, 512])
def test_squares_of_signals_are_enough(name: str, signed: bool, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds one by one, of which only Σ_k σ_k g_k² is kept where that is enough, give the numbers of all signals to the bit."""
    monkeypatch.setattr("geoad.kernels.layered._SMALL", small)
    case = setting(name, signed)
    for names in (list(case.x), list(case.x)[::2]):
        alone = squared(case.plan, names)
        pairs = coupled(case.plan, names)
        found: list[list[Tensor]] = []
        for uses in (alone, frozenset[int]()):
            total = {block: torch.zeros_like(case.x[block]) for block in names}
            cross = [torch.zeros(case.layout[layer.names[0]]) for layer in pairs]
            for rows, signs in case.chunks(alone=uses):
                assert all((each.squares is not None) == (not each.back) == (i in uses) for i, each in enumerate(rows.uses))
                add_squares(total, rows, signs)
                for into, layer in zip(cross, pairs, strict=True):
                    add_cross(into, layer, rows, signs)
            found.append([*total.values(), *cross])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_which_signals_are_needed() -> None:
    """Of layers at one position, and of blocks that nobody asks for, the squares are enough."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(2, 3, 3, groups=1), nn.LayerNorm(6)
            self.first, self.shared, self.last = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.conv(x).flatten(1))
            return self.last(self.shared(self.shared(self.first(x)).tanh()))

    geo = geoad.GeoModule(Net())
    plan = plan_of(geo.evaluate, geo.point().blocks, torch.randn(1, 2, 4))
    uses = {name: {i for i, use in enumerate(plan.uses) if name in use.names} for name in geo.reference.layout}
    alone = squared(plan, geo.reference.layout)
    assert alone == uses["first.weight"] | uses["last.bias"]
    assert squared(plan, ["first.weight", "last.bias"]) == set(range(len(plan.uses)))
    assert set(range(len(plan.uses))) - squared(plan, ["conv.bias"]) == uses["conv.bias"]


@every_case
def test_what_couples_biases_to_weights(name: str) -> None:
    case = setting(name)
    for layer in coupled(case.plan, list(case.x)):
        assert layer.weight is not None
        total = torch.ones(case.layout[layer.weight])
        for rows, signs in case.chunks():
            add_cross(total, layer, rows, signs)
        rows = case.arranged(layer)
        reference = torch.einsum("nkgoi,nkgo,kn->goi", rows[..., :-1], rows[..., -1], case.weights)
        reference = (
            reference.transpose(1, 2) if layer.transposed and reference.ndim == 3 and len(total.shape) == 2 else reference
        )
        if layer.transposed and total.ndim > 2:
            groups, out, _ = reference.shape
            reference = reference.reshape(groups, out, total.shape[0] // groups, -1).transpose(1, 2)
        close((total - 1).flatten(), reference.flatten())


def test_kernels_do_not_change_the_rows() -> None:
    for name in ("recurrent", "conv2d", "twice", "embedding"):
        case = setting(name)
        (rows, signs), *_ = case.chunks(slice(None))
        before = {block: rows.explicit(block).clone() for block in case.layout}
        add_squares({block: torch.zeros_like(value) for block, value in case.x.items()}, rows, signs)
        GramSum(case.layout).add(rows, signs)
        KroneckerSum(case.plan, list(case.x)).add(rows, signs)
        assert all(torch.equal(rows.explicit(block), value) for block, value in before.items())


# -- Kronecker factors -------------------------------------------------------------------------------------------------------


def test_layers_and_what_is_none() -> None:
    found, rest = layers_of((case := setting("twice")).plan, list(case.x))
    assert [layer.names for layer in found] == [("a.weight", "a.bias"), ("c.weight",)]
    assert set(rest) == {"norm.weight", "norm.bias", "raw", "unused"}
    separate, _ = layers_of(case.plan, list(case.x), joint=False)
    assert [layer.names for layer in separate] == [("a.weight",), ("a.bias",), ("c.weight",)]
    case = setting("weight and its bias apart")
    assert [layer.names for layer in layers_of(case.plan, list(case.x))[0]] == [("w",), ("b",)]
    assert layers_of(setting("both orders").plan, ["w"]) == ([], ("w",))
    assert layers_of(setting("tied embedding").plan, ["e"]) == ([], ("e",))
    (table,), _ = layers_of(setting("embedding").plan, ["0.weight"])
    assert (table.table, table.transposed, table.groups) == (True, True, 1)
    (conv,), _ = layers_of(setting("transposed conv2d, in groups").plan, ["0.weight", "0.bias"])
    assert (conv.transposed, conv.groups, conv.names) == (True, 2, ("0.weight", "0.bias"))
    (dense,), _ = layers_of(setting("linear of W.T").plan, ["w", "b"])
    assert (dense.transposed, dense.names) == (True, ("w", "b"))


SINGLE = ["mlp", "no bias", "one unit", "x @ W", "x @ W.T", "linear of W.T", "addmm", "in place"]


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_factors_of_one_sample_and_one_seed_are_exact(name: str, sharing: str) -> None:
    case = setting(name, signed=False)
    linearized = linearize(case.geo.evaluate, case.layout, case.x, case.inputs[:1], case.plan)
    sums = KroneckerSum(case.plan, list(case.x), sharing)
    sums.add(linearized.pull(case.s[:1, :1]))
    assert not sums.rest
    if name == "x @ W.T":
        return  # two uses, so two positions
    for each in sums.factors():
        r = case.arranged(each.layer)[0, 0]
        close(torch.einsum("gop,gij->goipj", each.left, each.right), torch.einsum("goi,gpj->goipj", r, r))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_factors_of_a_convolution(sharing: str, joint: bool, groups: int) -> None:
    """Against the definitions, with patches from ``F.unfold``."""
    torch.manual_seed(0)
    geo = geoad.GeoModule(nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=groups), nn.Flatten()))
    case = Setting(geo, torch.randn(SAMPLES, 4, 3, 5))
    sums = KroneckerSum(case.plan, list(case.x), sharing, joint)
    for rows, signs in case.chunks():
        sums.add(rows, signs)
    patches = F.unfold(case.inputs, 3, padding=1, stride=2).mT.unflatten(-1, (groups, -1))  # (n, t, g, i)
    ones = torch.ones_like(patches[..., :1])
    g = case.s.reshape(SEEDS, SAMPLES, groups, 6 // groups, -1)
    positions = patches.shape[1]
    found = {each.layer.names: each for each in sums.factors()}
    inputs = {("0.weight", "0.bias"): torch.cat([patches, ones], -1)} if joint else {("0.weight",): patches, ("0.bias",): ones}
    assert set(found) == set(inputs)
    for names, a in inputs.items():
        if sharing == "expand":
            right = torch.einsum("ntgi,ntgj->gij", a, a) / SAMPLES
            left = torch.einsum("kngot,kngpt,kn->gop", g, g, case.weights) / positions
        else:
            right = torch.einsum("ngi,ngj->gij", a.mean(1), a.mean(1)) / SAMPLES
            left = torch.einsum("kngo,kngp,kn->gop", g.sum(-1), g.sum(-1), case.weights)
        close(found[names].right, right)
        close(found[names].left, left)


def test_factors_with_many_channels_on_small_images() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 2, (2, 3), padding=(1, 0), dilation=(1, 2))
    geo = geoad.GeoModule(nn.Sequential(conv, nn.Flatten()))
    case = Setting(geo, torch.randn(SAMPLES, 6, 3, 5), signed=False)
    sums = KroneckerSum(case.plan, list(case.x))
    for rows, signs in case.chunks():
        sums.add(rows, signs)
    patches = F.unfold(case.inputs, (2, 3), padding=(1, 0), dilation=(1, 2)).mT.flatten(0, 1)
    patches = torch.cat([patches, torch.ones_like(patches[:, :1])], 1)
    (each,) = sums.factors()
    close(each.right[0], patches.mT @ patches / SAMPLES)


@pytest.mark.parametrize("padding", [None, 1])
def test_factors_of_a_table_are_counts(padding: int | None) -> None:
    torch.manual_seed(0)
    geo = geoad.GeoModule(nn.Sequential(nn.Embedding(5, 3, padding_idx=padding), nn.Flatten()))
    case = Setting(geo, torch.randint(5, (SAMPLES, 4)))
    sums = KroneckerSum(case.plan, list(case.x))
    for rows, signs in case.chunks():
        sums.add(rows, signs)
    (each,) = sums.factors()
    seen = F.one_hot(case.inputs, 5).double()
    if padding is not None:
        seen[..., padding] = 0
    close(each.right, seen.sum((0, 1))[None] / SAMPLES)
    g = case.s.reshape(SEEDS, SAMPLES, 4, 3) * seen.sum(-1)[..., None]
    close(each.left[0], torch.einsum("knto,kntp,kn->op", g, g, case.weights) / 4)


def test_uses_of_a_weight_are_positions() -> None:
    torch.manual_seed(0)
    geo = geoad.GeoModule(Lambda(lambda p, x: F.linear(x, p.w) + F.linear(x.sin(), p.w), w=(3, 4)))
    case = Setting(geo, torch.randn(SAMPLES, 4))
    a = torch.stack([case.inputs, case.inputs.sin()], 1)
    for sharing in ("expand", "reduce"):
        sums = KroneckerSum(case.plan, ["w"], sharing)
        for rows, signs in case.chunks():
            sums.add(rows, signs)
        (each,) = sums.factors()
        if sharing == "expand":
            close(each.right[0], torch.einsum("nti,ntj->ij", a, a) / SAMPLES)
            close(each.left[0], torch.einsum("kno,knp,kn->op", case.s, case.s, case.weights))
        else:
            close(each.right[0], torch.einsum("ni,nj->ij", a.mean(1), a.mean(1)) / SAMPLES)
            close(each.left[0], 4 * torch.einsum("kno,knp,kn->op", case.s, case.s, case.weights))


def _bases(case: Setting, layer: Layer) -> tuple[Tensor | None, Tensor | None]:
    _, _, groups, out, inside = case.arranged(layer).shape
    right = None if layer.table or layer.weight is None else torch.linalg.qr(torch.randn(groups, inside, inside))[0]
    return torch.linalg.qr(torch.randn(groups, out, out))[0], right


@every_case
@pytest.mark.parametrize("joint", [True, False])
def test_the_diagonal_in_given_bases(name: str, joint: bool) -> None:
    case = setting(name)
    layers, _ = layers_of(case.plan, list(case.x), joint)
    bases = [(layer, *_bases(case, layer)) for layer in layers]
    sums = EigenSum(bases)
    for rows, signs in case.chunks():
        sums.add(rows, signs)
    for (layer, left, right), values in zip(bases, sums.values(), strict=True):
        rows = case.arranged(layer)
        assert left is not None
        rows = left.mT @ rows if right is None else left.mT @ rows @ right
        close(values, torch.einsum("nkgoi,kn->goi", rows.square(), case.weights))


def test_the_trace_of_eigenvalues_is_that_of_the_gram_matrix() -> None:
    case = setting("conv2d", signed=False)
    sums = KroneckerSum(case.plan, list(case.x))
    for rows, signs in case.chunks():
        sums.add(rows, signs)
    bases = [(f.layer, torch.linalg.eigh(f.left)[1], torch.linalg.eigh(f.right)[1]) for f in sums.factors()]
    exact = EigenSum(bases)
    for rows, signs in case.chunks():
        exact.add(rows, signs)
    total = sum(float(each.sum()) for each in exact.values())
    assert total == pytest.approx(float(case.rows.square().sum()), rel=1e-12)


@every_case
def test_chunks_without_structure_among_others(name: str) -> None:
    """A network may take another path on some samples; there its rows are explicit."""
    case = setting(name)
    layers, _ = layers_of(case.plan, list(case.x))
    bases = [(layer, *_bases(case, layer)) for layer in layers]
    pairs = coupled(case.plan, list(case.x))
    sums, crossed, squares = EigenSum(bases), [torch.zeros(case.layout[p.names[0]]) for p in pairs], {}
    wanted, reference = EigenSum(bases), [torch.zeros(case.layout[p.names[0]]) for p in pairs]
    squares = {block: torch.zeros_like(value) for block, value in case.x.items()}
    gram = GramSum(case.layout)
    for rows, signs in case.chunks():
        wanted.add(rows, signs)
        for total, layer in zip(reference, pairs, strict=True):
            add_cross(total, layer, rows, signs)
    plan = case.plan
    for i, part in enumerate((slice(0, 2), slice(2, None))):
        case.plan = plan.without_structure() if i else plan
        for rows, signs in case.chunks(part):
            sums.add(rows, signs)
            gram.add(rows, signs)
            add_squares(squares, rows, signs)
            for total, layer in zip(crossed, pairs, strict=True):
                add_cross(total, layer, rows, signs)
            if i and layers:
                with pytest.raises(geoad.GeometryError, match="operations depend on the data"):
                    KroneckerSum(plan, list(case.x)).add(rows, signs)
    for got, want in zip([*sums.values(), *crossed], [*wanted.values(), *reference], strict=True):
        close(got, want)
    matrix = torch.einsum("nki,nkj,kn->ij", case.rows, case.rows, case.weights)
    close(gram.matrix(), matrix)
    close(case.layout.ravel(squares), matrix.diagonal())


# -- memory and precision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [1, 1 << 30])
def test_portions_change_nothing(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geoad.kernels.layers._CACHE", room)
    monkeypatch.setattr("geoad.kernels.gram._ROOM", room)
    for name in ("conv2d", "embedding", "twice", "sequence", "mlp"):
        case = setting(name)
        total = {block: torch.zeros_like(value) for block, value in case.x.items()}
        gram = GramSum(case.layout)
        for rows, signs in case.chunks():
            add_squares(total, rows, signs)
            gram.add(rows, signs)
        reference = torch.einsum("nki,nkj,kn->ij", case.rows, case.rows, case.weights)
        close(gram.matrix(), reference)
        close(case.layout.ravel(total), reference.diagonal())


def test_low_precision_is_summed_in_single_precision() -> None:
    torch.manual_seed(0)
    net: Any = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).bfloat16()
    geo = geoad.GeoModule(net)
    x, layout, inputs = geo.point().blocks, geo.reference.layout, torch.randn(64, 4).bfloat16()
    plan = plan_of(geo.evaluate, x, inputs[:1])
    linearized = linearize(geo.evaluate, layout, x, inputs, plan)
    rows = linearized.pull(torch.randn(2, 64, 3).bfloat16())
    gram, kron = GramSum(layout), KroneckerSum(plan, list(x))
    gram.add(rows)
    kron.add(rows)
    r = torch.cat([rows.explicit(name) for name in layout], -1)
    matrix = gram.matrix()
    assert matrix.dtype == torch.float32
    torch.testing.assert_close(matrix.double(), torch.einsum("nki,nkj->ij", r.double(), r.double()), rtol=1e-5, atol=1e-4)
    assert all(each.left.dtype == each.right.dtype == torch.float32 for each in kron.factors())


class _Packed(nn.Module):
    """Saves what is needed for its derivatives in a form of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            return self.net(x)


@pytest.mark.parametrize("kind", ["plain", "x", "inputs", "inference", "frozen", "hooks", "no grad"])
def test_rows_whatever_asks_for_a_graph(kind: str) -> None:
    """Rows have a graph where x or the data do, and nowhere else."""
    torch.manual_seed(0)
    net = _Packed() if kind == "hooks" else nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    if kind == "frozen":
        next(net.parameters()).requires_grad_(False)
    case = Setting(geoad.GeoModule(net), torch.randn(SAMPLES, 4))
    if kind == "x":
        case.x = {name: block.requires_grad_() for name, block in case.x.items()}
    elif kind == "inputs":
        case.inputs = case.inputs.clone().requires_grad_()
    elif kind == "inference":
        with torch.inference_mode():
            case.x = {name: block.clone() for name, block in case.x.items()}
    with torch.set_grad_enabled(kind != "no grad"):
        (rows, _), *_ = case.chunks(slice(None))
    total = torch.cat([rows.explicit(name) for name in case.layout], -1)
    close(total.detach(), case.rows)
    assert total.requires_grad == (kind in ("x", "inputs"))
    if kind == "inputs":  # Σ r² by the data: a second derivative
        (slope,) = torch.autograd.grad(total.square().sum(), case.inputs)
        shift = torch.zeros_like(slope)
        shift[1, 2] = 1e-5

        ends = [float(case.at(case.inputs.detach() + sign * shift).square().sum()) for sign in (1, -1)]
        torch.testing.assert_close(float(slope[1, 2]), (ends[0] - ends[1]) / 2e-5, rtol=1e-6, atol=1e-8)


def test_numbers_of_a_sample_grow_with_seeds() -> None:
    case = setting("conv2d")
    linearized = linearize(case.geo.evaluate, case.layout, case.x, case.inputs, case.plan)
    one, three = (linearized.pull(case.s[:k]).numbers_of_a_sample() for k in (1, 3))
    assert 0 < one < three <= 3 * one


class _Branches(nn.Module):
    """Takes another path for some samples, so that they cannot be evaluated together."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) if bool(x.sum() > 0) else 2 * self.lin(x).tanh()


@pytest.mark.parametrize("representation", ["diagonal", "dense"])
def test_a_chunk_that_loses_its_structure_is_taken_in_smaller_ones(
    representation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net, inputs, taken = _Branches(), torch.randn(40, 4), list[int]()
    pull = _OneByOne.pull

    def counted(self: Any, seeds: Tensor, *rest: Any) -> Rows:
        taken.append(len(self.outputs))
        return pull(self, seeds, *rest)

    monkeypatch.setattr(_OneByOne, "pull", counted)
    geo = geoad.GeoModule(net)
    field = geoad.curvature.Fisher(geo, inputs, "gaussian", representation=representation, max_memory=8 * 1000)
    found = geoad.operators.to_dense(field(geo.point()).operator)
    blocks = [torch.autograd.grad(y, [*net.parameters()], retain_graph=True) for x in inputs for y in net(x[None])[0]]
    rows = torch.stack([torch.cat([g.flatten() for g in each]) for each in blocks])
    dense = rows.mT @ rows / len(inputs)
    close(found, dense if representation == "dense" else dense.diagonal().diag())
    assert sum(taken) == len(inputs)
    assert max(taken) * 3 * 15 * 3 <= 1000
