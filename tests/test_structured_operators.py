"""Structured operators against their matrices: every class and every operation, the table of both in `TABLE`."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from geoad import operators as ops
from geoad.errors import GeometryError, SingularMetricError, StructureNotPreservedError
from geoad.operators import Arrangement, numbers
from geoad.params import Blocks, Layout

F64 = torch.float64
DRAWS = torch.Generator().manual_seed(3)


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=DRAWS, dtype=F64)


def spd(groups: int, n: int) -> Tensor:
    root = rand(groups, n, n)
    return root @ root.mT / n + torch.eye(n, dtype=F64)


def positive(*shape: int) -> Tensor:
    return rand(*shape).square() + 0.5


def blocks(layout: Layout, *batch: int) -> Blocks:
    return {name: rand(*batch, *shape) for name, shape in layout.items()}


def positive_blocks(layout: Layout) -> Blocks:
    return {name: positive(*shape) for name, shape in layout.items()}


# -- examples --------------------------------------------------------------------------------------------------------------

LINEAR = Layout({"weight": (3, 4), "bias": (3,)})
ARRANGED: dict[str, tuple[Layout, Arrangement]] = {
    "linear, joint bias": (LINEAR, Arrangement("weight", "bias")),
    "linear": (Layout({"weight": (3, 4)}), Arrangement("weight")),
    "bias": (Layout({"bias": (5,)}), Arrangement(bias="bias")),
    "bias before weight": (Layout({"b": (3,), "w": (3, 2)}), Arrangement("w", "b")),
    "scale": (Layout({"scale": ()}), Arrangement(bias="scale")),
    "convolution": (Layout({"w": (2, 3, 2, 2), "b": (2,)}), Arrangement("w", "b")),
    "grouped convolution": (Layout({"w": (6, 2, 3), "b": (6,)}), Arrangement("w", "b", groups=2)),
    "addmm": (Layout({"w": (4, 3), "b": (3,)}), Arrangement("w", "b", transposed=True)),
    "transposed convolution": (Layout({"w": (4, 3, 2), "b": (6,)}), Arrangement("w", "b", transposed=True, groups=2)),
    "embedding": (Layout({"w": (7, 3)}), Arrangement("w", transposed=True)),
}


def kronecker(name: str, definite: bool = True) -> ops.Kronecker:
    layout, arrangement = ARRANGED[name]
    groups, units, inputs = arrangement.sizes(layout)
    right = positive(groups, inputs) if name == "embedding" else spd(groups, inputs)
    return ops.Kronecker(layout, arrangement, spd(groups, units), right, definite=definite)


def eigen(name: str, orthogonal: bool = True) -> ops.EigenKronecker:
    layout, arrangement = ARRANGED[name]
    groups, units, inputs = arrangement.sizes(layout)
    left, right = torch.linalg.qr(rand(groups, units, units)).Q, torch.linalg.qr(rand(groups, inputs, inputs)).Q
    if not orthogonal:
        left, right = left + 0.2 * rand(groups, units, units), right + 0.2 * rand(groups, inputs, inputs)
    left_basis = None if name == "embedding" else left
    return ops.EigenKronecker(
        layout, arrangement, left_basis, right, positive(groups, units, inputs), orthogonal=orthogonal, definite=True
    )


NET = Layout({"0.weight": (3, 2), "0.bias": (3,), "norm": (3,), "2.weight": (2, 3)})


def low_rank(base: str, rank: int = 4) -> ops.LowRank:
    bases: dict[str, Any] = {
        "multiple": ops.Multiple(NET, torch.tensor(0.7, dtype=F64), definite=True),
        "diagonal": ops.Diagonal(NET, positive_blocks(NET), definite=True),
        "none": None,
        "signed": ops.Multiple(NET, torch.tensor(30.0, dtype=F64)),
    }
    signs = torch.tensor([1.0, -1.0, 2.0, -0.5], dtype=F64) if base == "signed" else None
    full = base == "none" and rank >= NET.dim
    return ops.LowRank(NET, blocks(NET, rank), signs, bases[base], definite=full or base != "none")


def quasi(layout: Layout, *pairs: Any) -> ops.QuasiDiagonal:
    entries = positive_blocks(layout)
    cross: dict[Any, Tensor] = {}
    for pair in pairs:
        arrangement = pair if isinstance(pair, Arrangement) else Arrangement(*pair)
        assert arrangement.weight is not None and arrangement.bias is not None
        cross[pair] = 0.2 * rand(*layout[arrangement.weight])
        entries[arrangement.bias] = entries[arrangement.bias] + 0.2 * arrangement.sizes(layout)[2]
    return ops.QuasiDiagonal(layout, entries, cross, definite=True)


def mixed() -> ops.BlockDiagonal:
    first, norm, last = NET.restrict(["0.weight", "0.bias"]), NET.restrict(["norm"]), NET.restrict(["2.weight"])
    return ops.BlockDiagonal(
        NET,
        {
            ("2.weight",): ops.Dense(last, spd(1, 6)[0], definite=True),
            ("0.weight", "0.bias"): ops.Kronecker(
                first, Arrangement("0.weight", "0.bias"), spd(1, 3), spd(1, 3), definite=True
            ),
            ("norm",): ops.Diagonal(norm, {"norm": positive(3)}, definite=True),
        },
    )


class Hidden(ops.Implicit):
    """A matrix that is known by its products only."""

    def __init__(self, layout: Layout, matrix: Tensor) -> None:
        super().__init__(layout, {"": matrix}, symmetric=True, definite=True)
        self.matrix = matrix

    def mv(self, v: Blocks) -> Blocks:
        return self.layout.unravel(self.layout.ravel(v) @ self.matrix)


def general() -> ops.Kronecker:
    return ops.Kronecker(LINEAR, Arrangement("weight", "bias"), rand(1, 3, 3), rand(1, 5, 5), symmetric=False)


EXAMPLES: dict[str, ops.LinearOperator] = {
    **{f"Kronecker, {name}": kronecker(name) for name in ARRANGED},
    "Kronecker, not known to be definite": kronecker("linear, joint bias", definite=False),
    **{f"EigenKronecker, {name}": eigen(name) for name in ARRANGED},
    "EigenKronecker, oblique": eigen("linear, joint bias", orthogonal=False),
    "EigenKronecker, oblique groups": eigen("grouped convolution", orthogonal=False),
    "LowRank, multiple": low_rank("multiple"),
    "LowRank, diagonal": low_rank("diagonal"),
    "LowRank, signed": low_rank("signed"),
    "LowRank, many factors": low_rank("none", 40),
    "LowRank, multiple and many factors": low_rank("multiple", 40),
    "QuasiDiagonal": quasi(NET, ("0.weight", "0.bias")),
    "QuasiDiagonal, transposed groups": quasi(ARRANGED["transposed convolution"][0], ARRANGED["transposed convolution"][1]),
    "QuasiDiagonal, without cross terms": quasi(NET),
    "BlockDiagonal": mixed(),
    "BlockDiagonal of quasi-diagonals": ops.BlockDiagonal(
        NET,
        {
            ("0.weight", "0.bias"): quasi(NET.restrict(["0.weight", "0.bias"]), ("0.weight", "0.bias")),
            ("norm", "2.weight"): ops.LowRank(
                NET.restrict(["norm", "2.weight"]),
                blocks(NET.restrict(["norm", "2.weight"]), 2),
                base=ops.Multiple(NET.restrict(["norm", "2.weight"]), torch.tensor(2.0, dtype=F64), definite=True),
                definite=True,
            ),
        },
    ),
    "Dense": ops.Dense(NET, spd(1, NET.dim)[0], definite=True),
    "Diagonal": ops.Diagonal(NET, positive_blocks(NET), definite=True),
    "Multiple": ops.Multiple(NET, torch.tensor(1.7, dtype=F64), definite=True),
    "Inverse": ops.inverse(ops.Dense(NET, spd(1, NET.dim)[0], definite=True)),
    "Sum": ops.plus(mixed(), low_rank("multiple"), definite=True),
    "Implicit": Hidden(NET, spd(1, NET.dim)[0]),
    "Detached": ops.Detached(mixed()),
}
UNSYMMETRIC: dict[str, ops.LinearOperator] = {
    "Kronecker, not symmetric": general(),
    "BlockDiagonal, not symmetric": ops.BlockDiagonal(LINEAR, {("weight", "bias"): general()}),
    "Product": ops.Product(mixed(), low_rank("diagonal")),
    "Transpose": ops.Transpose(ops.Product(mixed(), low_rank("diagonal"))),
}
EVERY = {**EXAMPLES, **UNSYMMETRIC}
every = pytest.mark.parametrize("name", EVERY)
symmetric = pytest.mark.parametrize("name", EXAMPLES)

# -- the table -------------------------------------------------------------------------------------------------------------

OPERATIONS = (
    "mv",
    "to_dense",
    "solve",
    "inverse",
    "power",
    "sample",
    "trace",
    "diagonal",
    "slogdet",
    "inner",
    "eigvals",
    "eigh",
    "times",
    "plus",
    "compose",
)
CLASSES = (
    "Multiple",
    "Diagonal",
    "Dense",
    "BlockDiagonal",
    "Kronecker",
    "EigenKronecker",
    "LowRank",
    "QuasiDiagonal",
    "Sum",
    "Product",
    "Inverse",
    "Implicit",
)
_ODD = {
    ("QuasiDiagonal", "power"): "refused",
    **{("QuasiDiagonal", operation): "iterative" for operation in ("eigvals", "eigh")},
    **{("QuasiDiagonal", operation): "lazy" for operation in ("compose", "inverse")},
    ("LowRank", "compose"): "lazy",
    **{("Sum", operation): "lazy" for operation in ("inverse", "plus", "compose")},
    **{("Sum", operation): "iterative" for operation in ("solve", "eigvals", "eigh")},
    **{("Sum", operation): "dense" for operation in ("power", "sample", "slogdet")},
    **{("Product", operation): "lazy" for operation in ("inverse", "times", "plus", "compose")},
    **{("Product", operation): "dense" for operation in ("power", "sample", "inner", "eigh")},
    ("Product", "eigvals"): "iterative",
    **{("Inverse", operation): "lazy" for operation in ("times", "plus", "compose")},
    **{("Inverse", operation): "dense" for operation in ("trace", "diagonal", "inner")},
    **{("Inverse", operation): "iterative" for operation in ("eigvals", "eigh")},
    **{("Implicit", operation): "lazy" for operation in ("inverse", "times", "plus", "compose")},
    **{("Implicit", operation): "dense" for operation in ("power", "sample", "trace", "diagonal", "slogdet", "inner")},
    **{("Implicit", operation): "iterative" for operation in ("solve", "eigvals", "eigh")},
}
TABLE: dict[tuple[str, str], str] = {
    (cls, operation): _ODD.get((cls, operation), "closed form") for cls in CLASSES for operation in OPERATIONS
}
"""How each class does each operation: in "closed form" from its numbers; "lazy", as an exact unevaluated operator; from the
"dense" matrix up to `geoad.operators.DENSE_LIMIT` coordinates, refused above; "iterative" above that limit (CG, Lanczos); or
"refused" with an error that names what to use. Of a Product, Inverse or Sum: if its parts do it so. ``to_dense`` is the one
operation that makes the matrix at any size."""


def close(got: Tensor, want: Tensor, tol: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


def ravel(op: ops.LinearOperator, v: Blocks) -> Tensor:
    return op.layout.ravel(v)


def matrix_of(op: ops.LinearOperator) -> Tensor:
    """The matrix by products with the unit vectors, independent of `to_dense`."""
    return ravel(op, op.mv(op.layout.unravel(torch.eye(op.dim, dtype=F64)))).mT


# -- arrangements ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARRANGED)
def test_arrangements_are_permutations(name: str) -> None:
    layout, arrangement = ARRANGED[name]
    v = blocks(layout, 2, 3)
    tensor = arrangement.matrix(layout, v)
    assert tensor.shape == (2, 3, *arrangement.sizes(layout))
    back = arrangement.blocks(layout, tensor)
    assert list(back) == list(layout.names) and all(torch.equal(back[each], v[each]) for each in layout)
    assert sorted(arrangement.places(layout).flatten().tolist()) == list(range(layout.dim))


def test_rows_of_arrangements_are_output_units() -> None:
    """One row of the tensor holds what feeds one output: differences there change only this output."""
    x = rand(1, 4, 5)
    for transposed in (False, True):
        shape = (4, 3, 2) if transposed else (6, 2, 3)
        layout, arrangement = Layout({"w": shape, "b": (6,)}), Arrangement("w", "b", transposed=transposed, groups=2)
        convolve = torch.nn.functional.conv_transpose1d if transposed else torch.nn.functional.conv1d
        v = blocks(layout)
        tensor = arrangement.matrix(layout, v)
        before = convolve(x, v["w"], v["b"], groups=2)
        for group in range(2):
            for unit in range(3):
                changed = tensor.clone()
                changed[group, unit] += 1
                u = arrangement.blocks(layout, changed)
                moved = (convolve(x, u["w"], u["b"], groups=2) - before).abs().amax((0, 2)) > 0
                assert moved.nonzero().flatten().tolist() == [3 * group + unit]


@pytest.mark.parametrize(
    ("layout", "arrangement"),
    [
        (LINEAR, Arrangement("weight", "no bias")),
        (LINEAR, Arrangement()),
        (LINEAR, Arrangement("bias")),
        (LINEAR, Arrangement("weight", groups=2)),
        (Layout({"w": (3, 4), "b": (4,)}), Arrangement("w", "b")),
        (Layout({"w": (3, 4), "b": (3,)}), Arrangement("w", "b", transposed=True)),
    ],
)
def test_wrong_arrangements_are_refused(layout: Layout, arrangement: Arrangement) -> None:
    with pytest.raises(GeometryError, match="arrangement of a layer"):
        arrangement.check(layout)


# -- operations against the matrix -----------------------------------------------------------------------------------------


@every
def test_products(name: str) -> None:
    op = EVERY[name]
    matrix = matrix_of(op)
    close(ops.to_dense(op), matrix)
    v = rand(2, 3, op.dim)
    close(ravel(op, ops.mv(op, op.layout.unravel(v))), v @ matrix.mT)
    close(ravel(op, ops.mv(op, op.layout.unravel(v[0, 1]))), matrix @ v[0, 1])
    close(ravel(op, ops.rmv(op, op.layout.unravel(v))), v @ matrix)
    close(ops.to_dense(ops.transpose(op)), matrix.mT)
    assert [list(block) for block in (op.mv(op.layout.unravel(v)), op.rmv(op.layout.unravel(v)))] == [list(op.layout)] * 2
    if op.symmetric:
        close(matrix, matrix.mT)
    if op.definite:
        assert bool((torch.linalg.eigvalsh(matrix) > 0).all())


@every
def test_solves_and_inverses(name: str) -> None:
    op = EVERY[name]
    matrix, v = matrix_of(op), rand(2, 3, op.dim)
    want = torch.linalg.solve(matrix, v.unsqueeze(-1)).squeeze(-1)
    close(ravel(op, ops.solve(op, op.layout.unravel(v))), want)
    if op.symmetric:
        close(ravel(op, ops.solve(op, op.layout.unravel(v), positive=True)), want)
    inverse = ops.inverse(op, positive=op.symmetric)
    close(matrix_of(inverse), torch.linalg.inv(matrix))
    assert inverse.definite or not op.symmetric
    close(ravel(op, inverse.rmv(op.layout.unravel(v))), v @ torch.linalg.inv(matrix))
    close(ravel(op, ops.solve(inverse, op.layout.unravel(v))), v @ matrix.mT, 1e-9)


@every
def test_numbers(name: str) -> None:
    op = EVERY[name]
    matrix = matrix_of(op)
    close(ops.trace(op), matrix.trace())
    close(ravel(op, ops.diagonal(op)), matrix.diagonal())
    sign, value = ops.slogdet(op)
    want = torch.linalg.slogdet(matrix)
    close(sign, want.sign)
    close(value, want.logabsdet)
    close(ops.frobenius(op), torch.linalg.matrix_norm(matrix))
    values = ops.eigvals(op)
    wanted = torch.linalg.eigvalsh(matrix).flip(0) if op.symmetric else torch.linalg.eigvals(matrix)
    if op.symmetric:
        close(values, wanted)
    else:  # complex numbers have no order: compare their power sums
        for power in (1, 2, 3):
            close((values**power).sum().real.to(F64), (wanted**power).sum().real, 1e-9)


@symmetric
def test_powers(name: str) -> None:
    op = EXAMPLES[name]
    values, vectors = torch.linalg.eigh(matrix_of(op))
    for p in (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.7, 2.0, 3.0):
        if "uasi" in name and p not in (-1.0, 0.0, 1.0):
            with pytest.raises(StructureNotPreservedError, match="block_diagonal"):
                ops.power(op, p)
            continue
        raised = ops.power(op, p)
        close(matrix_of(raised), (vectors * values**p) @ vectors.mT, 1e-9)
        assert raised.symmetric and (raised.definite or not op.definite)


@symmetric
def test_inverse_root(name: str) -> None:
    if "uasi" not in name:
        root = matrix_of(ops.inverse_sqrt(EXAMPLES[name]))
        close(root @ root, torch.linalg.inv(matrix_of(EXAMPLES[name])))


@symmetric
def test_eigenvectors(name: str) -> None:
    op = EXAMPLES[name]
    matrix = matrix_of(op)
    wanted = torch.linalg.eigvalsh(matrix)
    for k, which in itertools.product((None, 1, 3), ("largest", "smallest", "magnitude")):
        if k is not None and k > op.dim:
            continue
        values, vectors = ops.eigh(op, k=k, which=which)
        close(values, (wanted if which == "smallest" else wanted.flip(0))[:k])
        close(vectors.mT @ vectors, torch.eye(len(values), dtype=F64))
        close(matrix @ vectors, vectors * values, 1e-9)
        close(ops.eigvals(op, k=k, which=which), values)


@symmetric
def test_eigenvalues_with_respect_to_a_metric(name: str) -> None:
    op = EXAMPLES[name]
    one = torch.tensor(2.5, dtype=F64)
    entries = positive_blocks(op.layout)
    metrics = [
        ops.Multiple(op.layout, one, definite=True),
        ops.Diagonal(op.layout, entries, definite=True),
        ops.Dense(op.layout, spd(1, op.dim)[0], definite=True),
    ]
    for metric in metrics:
        values, vectors = ops.eigh(op, metric)
        b, g = matrix_of(op), matrix_of(metric)
        close(vectors.mT @ g @ vectors, torch.eye(op.dim, dtype=F64))
        close(b @ vectors, (g @ vectors) * values, 1e-9)
        product = ops.compose(ops.inverse(metric), op)
        close(ops.eigvals(product), values, 1e-9)


@symmetric
def test_samples_have_the_inverse_as_covariance(name: str) -> None:
    """Exactly: draws are C z, so a map of unit vectors instead of noise gives C, and C Cᵀ must be A⁻¹."""
    op = EXAMPLES[name]
    from geoad.operators.sample import factor_product

    for invert, want in ((True, torch.linalg.inv(matrix_of(op))), (False, matrix_of(op))):
        factor = ravel(op, factor_product(op, op.layout.unravel(torch.eye(op.dim, dtype=F64)), invert)).mT
        close(factor @ factor.mT, want)
    again = [ops.sample(op, 4, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    noise = torch.randn(4, op.dim, generator=torch.Generator().manual_seed(1), dtype=F64)
    drawn = ravel(op, again[0])
    assert torch.equal(drawn, ravel(op, again[1]))
    close(drawn, noise @ ravel(op, factor_product(op, op.layout.unravel(torch.eye(op.dim, dtype=F64)), True)))
    assert all(again[0][each].shape == (4, *shape) for each, shape in op.layout.items())


def test_samples_by_their_moments() -> None:
    op = EXAMPLES["BlockDiagonal"]
    drawn = ravel(op, ops.sample(op, 40_000, generator=torch.Generator().manual_seed(0)))
    covariance, want = drawn.mT @ drawn / len(drawn), torch.linalg.inv(matrix_of(op))
    assert float((covariance - want).norm() / want.norm()) < 5 * (NET.dim / len(drawn)) ** 0.5


# -- pairs -----------------------------------------------------------------------------------------------------------------

ON_NET = {name: op for name, op in EVERY.items() if op.layout == NET}
ON_LINEAR = {
    **{name: op for name, op in EVERY.items() if op.layout == LINEAR},
    "Kronecker, other": kronecker("linear, joint bias"),
    "Kronecker, diagonal factors": ops.Kronecker(LINEAR, Arrangement("weight", "bias"), positive(1, 3), positive(1, 5)),
    "QuasiDiagonal, linear": quasi(LINEAR, ("weight", "bias")),
    "Multiple, linear": ops.Multiple(LINEAR, torch.tensor(2.0, dtype=F64), definite=True),
    "Diagonal, linear": ops.Diagonal(LINEAR, positive_blocks(LINEAR), definite=True),
    "Dense, linear": ops.Dense(LINEAR, rand(15, 15)),
    "LowRank, linear": ops.LowRank(LINEAR, blocks(LINEAR, 2), base=None),
}
GROUPS = [ON_NET, ON_LINEAR]


@pytest.mark.parametrize(("group", "a"), [(group, a) for group in range(2) for a in GROUPS[group]])
def test_pairs(group: int, a: str) -> None:
    x = GROUPS[group][a]
    p = matrix_of(x)
    for y in GROUPS[group].values():
        q = matrix_of(y)
        total = ops.plus(x, y, definite=x.definite and y.definite)
        close(matrix_of(total), p + q)
        close(ops.to_dense(total), p + q)
        product = ops.compose(x, y)
        close(matrix_of(product), p @ q)
        close(ops.inner(x, y), (p * q).sum())
        for operator, matrix in ((total, p + q), (product, p @ q)):
            if operator.symmetric:
                close(matrix, matrix.mT)
        assert total.symmetric or not (x.symmetric and y.symmetric)


@every
def test_multiples(name: str) -> None:
    op = EVERY[name]
    matrix = matrix_of(op)
    for factor in (3.0, -2.0, torch.tensor(0.5, dtype=F64)):
        multiple = ops.times(factor, op, positive=float(factor) > 0)
        close(matrix_of(multiple), float(factor) * matrix)
        close(ops.to_dense(multiple), float(factor) * matrix)
        assert multiple.symmetric == op.symmetric and multiple.definite == (op.definite and float(factor) > 0)


def test_structure_survives() -> None:
    kron, other, ekfac = kronecker("convolution"), kronecker("convolution"), eigen("convolution")
    one = ops.Multiple(kron.layout, torch.tensor(0.1, dtype=F64), definite=True)
    diagonal = ops.Diagonal(kron.layout, positive_blocks(kron.layout))
    assert type(ops.plus(kron, one)) is ops.EigenKronecker and type(ops.plus(one, ekfac)) is ops.EigenKronecker
    assert type(ops.plus(kron, diagonal)) is ops.Sum and type(ops.plus(kron, other)) is ops.Sum
    assert type(ops.times(2.0, kron, positive=True)) is ops.Kronecker and type(ops.inverse(kron)) is ops.Kronecker
    assert type(ops.compose(kron, other)) is ops.Kronecker and type(ops.inverse(ekfac)) is ops.EigenKronecker
    assert type(ops.power(kron, 0.3)) is ops.Kronecker and type(ops.power(ekfac, 0.3)) is ops.EigenKronecker
    low = low_rank("multiple")
    for result in (
        ops.plus(low, low_rank("diagonal")),
        ops.inverse(low),
        ops.power(low, 0.3),
        ops.times(-1.0, low, positive=False),
    ):
        assert type(result) is ops.LowRank
    assert ops.plus(low, low).rank == 8  # pyright: ignore[reportAttributeAccessIssue]
    block = mixed()
    damped = ops.plus(block, ops.Multiple(NET, torch.tensor(1.0, dtype=F64)))
    assert isinstance(damped, ops.BlockDiagonal)
    assert [type(part) for part in damped.parts.values()] == [ops.Dense, ops.EigenKronecker, ops.Diagonal]
    assert isinstance(ops.plus(block, EXAMPLES["BlockDiagonal of quasi-diagonals"]), ops.BlockDiagonal)
    both = ops.plus(ops.plus(kron, diagonal), one)
    assert isinstance(both, ops.Sum) and len(both.terms) == 2
    assert type(ops.plus(quasi(NET, ("0.weight", "0.bias")), ops.Diagonal(NET, positive_blocks(NET)))) is ops.QuasiDiagonal


# -- large: nothing of size d × d is made ----------------------------------------------------------------------------------

WIDE = Layout({"w": (90, 91), "b": (90,)})


def wide() -> dict[str, ops.LinearOperator]:
    joint = Arrangement("w", "b")
    one = torch.tensor(0.3, dtype=F64)
    kron = ops.Kronecker(WIDE, joint, spd(1, 90), spd(1, 92), definite=True)
    base = ops.Multiple(WIDE, one, definite=True)
    return {
        "Kronecker": kron,
        "EigenKronecker": ops.plus(kron, base, definite=True),
        "LowRank": ops.LowRank(WIDE, blocks(WIDE, 5), base=base, definite=True),
        "LowRank, diagonal": ops.LowRank(WIDE, blocks(WIDE, 5), base=ops.Diagonal(WIDE, positive_blocks(WIDE)), definite=True),
        "QuasiDiagonal": quasi(WIDE, ("w", "b")),
        "BlockDiagonal": ops.BlockDiagonal(
            WIDE,
            {
                ("w",): ops.Kronecker(WIDE.restrict(["w"]), Arrangement("w"), spd(1, 90), spd(1, 91), definite=True),
                ("b",): ops.Dense(WIDE.restrict(["b"]), spd(1, 90)[0], definite=True),
            },
        ),
    }


@pytest.mark.parametrize(
    "name", ["Kronecker", "EigenKronecker", "LowRank", "LowRank, diagonal", "QuasiDiagonal", "BlockDiagonal"]
)
def test_large_operators_keep_their_structure(name: str) -> None:
    op = wide()[name]
    assert op.dim > ops.DENSE_LIMIT
    b = blocks(WIDE, 2)
    x = ops.solve(op, b, positive=True)
    close(ravel(op, op.mv(x)), ravel(op, b), 1e-9)
    close(ravel(op, ops.inverse(op).mv(b)), ravel(op, x), 1e-8)
    ops.sample(op, 2)
    assert bool(ops.slogdet(op)[1].isfinite()) and float(ops.frobenius(op)) > 0
    close(sum((block.sum() for block in ops.diagonal(op).values()), torch.zeros((), dtype=F64)), ops.trace(op), 1e-9)
    close(ops.inner(op, op), ops.frobenius(op).square())
    if "diagonal" not in name.lower() or name == "BlockDiagonal":
        values, vectors = ops.eigh(op, k=3)
        close(ravel(op, op.mv(op.layout.unravel(vectors.mT))), vectors.mT * values.unsqueeze(-1), 1e-8)
        root = ops.inverse_sqrt(op)
        close(ravel(op, root.mv(root.mv(b))), ravel(op, x), 1e-8)
    with pytest.raises(GeometryError, match="not made behind your back"):
        ops.eigh(op)
    if name == "LowRank, diagonal":
        with pytest.raises(StructureNotPreservedError, match="multiple of the identity"):
            ops.power(op, 0.5)


class Stretch(ops.Implicit):
    """A diagonal that is known by its products only."""

    def __init__(self, entries: Blocks) -> None:
        super().__init__(WIDE, entries, symmetric=True, definite=True)

    def mv(self, v: Blocks) -> Blocks:
        return {name: block * self.x[name] for name, block in v.items()}


def large(cls: str) -> ops.LinearOperator:
    diagonal = ops.Diagonal(WIDE, positive_blocks(WIDE), definite=True)
    found = wide()
    odd: dict[str, ops.LinearOperator] = {
        "Multiple": ops.Multiple(WIDE, torch.tensor(2.0, dtype=F64), definite=True),
        "Diagonal": diagonal,
        "Sum": ops.plus(found["Kronecker"], diagonal, definite=True),
        "Product": ops.compose(found["Kronecker"], diagonal),
        "Inverse": ops.inverse(found["QuasiDiagonal"]),
        "Implicit": Stretch({name: (block * 4).round() + 1 for name, block in positive_blocks(WIDE).items()}),
    }
    return {**found, **odd}[cls]


CALLS: dict[str, Callable[[ops.LinearOperator], Any]] = {
    "mv": lambda op: op.mv(blocks(WIDE)),
    "solve": lambda op: ops.solve(op, blocks(WIDE)),
    "inverse": ops.inverse,
    "power": lambda op: ops.power(op, -0.5),
    "sample": lambda op: ops.sample(op, 1),
    "trace": ops.trace,
    "diagonal": ops.diagonal,
    "slogdet": ops.slogdet,
    "inner": lambda op: ops.inner(op, op),
    "eigvals": lambda op: ops.eigvals(op, 2),
    "eigh": lambda op: ops.eigh(op, k=2),
    "times": lambda op: ops.times(2.0, op, positive=True),
    "plus": lambda op: ops.plus(op, ops.Multiple(WIDE, torch.tensor(1.0, dtype=F64), definite=True), definite=True),
    "compose": lambda op: ops.compose(op, op),
}


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls != "Dense"])
def test_the_table_is_true(cls: str) -> None:
    op = large(cls)
    assert op.dim > ops.DENSE_LIMIT and type(op).__name__ in (cls, "Stretch")
    for operation, call in CALLS.items():
        if (cls, operation) in (("Product", "eigh"), ("Inverse", "power")):
            continue  # a product is not symmetric; the power of an inverse is that of what is inside
        how = TABLE[cls, operation]
        if how == "refused":
            with pytest.raises(StructureNotPreservedError):
                call(op)
        elif how == "dense":
            with pytest.raises(GeometryError, match="not made behind your back"):
                call(op)
        else:
            result = call(op)
            assert isinstance(result, (ops.Sum, ops.Product, ops.Inverse)) == (
                how == "lazy" or type(result) is type(op) is ops.Sum
            )
        assert not hasattr(op, "dense"), operation


# -- singular and indefinite -----------------------------------------------------------------------------------------------


def singular() -> dict[str, ops.LinearOperator]:
    layout, arrangement = ARRANGED["linear, joint bias"]
    thin = rand(1, 5, 2)
    left = spd(1, 3)
    values = positive(1, 3, 5)
    values[0, 0, 0] = 0
    entries = positive_blocks(LINEAR)
    entries["weight"][1, 2] = 0
    gone = ops.QuasiDiagonal(LINEAR, entries, {("weight", "bias"): torch.zeros(3, 4, dtype=F64)})
    arrow = {"weight": torch.ones(3, 4, dtype=F64), "bias": torch.full((3,), 4.0, dtype=F64)}
    return {
        "Kronecker": ops.Kronecker(layout, arrangement, left, thin @ thin.mT),
        "Kronecker, diagonal": ops.Kronecker(layout, arrangement, left, torch.tensor([[1.0, 0.0, 1.0, 2.0, 3.0]], dtype=F64)),
        "EigenKronecker": ops.EigenKronecker(layout, arrangement, None, None, values),
        "LowRank": ops.LowRank(NET, blocks(NET, 3)),
        "QuasiDiagonal": gone,
        "QuasiDiagonal, rank one": ops.QuasiDiagonal(LINEAR, arrow, {("weight", "bias"): torch.ones(3, 4, dtype=F64)}),
        "BlockDiagonal": ops.BlockDiagonal(
            NET,
            {
                ("norm",): ops.Multiple(NET.restrict(["norm"]), torch.tensor(0.0, dtype=F64)),
                ("0.weight", "0.bias", "2.weight"): ops.Multiple(
                    NET.restrict(["0.weight", "0.bias", "2.weight"]), torch.tensor(1.0, dtype=F64)
                ),
            },
        ),
    }


@pytest.mark.parametrize("name", list(singular()))
@pytest.mark.parametrize("positive", [True, False])
def test_singular_operators_are_refused(name: str, positive: bool) -> None:
    op = singular()[name]
    b = blocks(op.layout)
    for call in (
        lambda: ops.solve(op, b, positive=positive),
        lambda: ops.mv(ops.inverse(op, positive=positive), b),
        lambda: ops.sample(op, 2),
    ):
        with pytest.raises(SingularMetricError):
            call()
    if "Quasi" not in name:
        with pytest.raises(SingularMetricError):
            ops.power(op, -0.5)
        root = ops.power(op, 0.5)
        close(matrix_of(root) @ matrix_of(root), matrix_of(op), 1e-7)
    sign, value = ops.slogdet(op)
    assert float(sign) == 0 or float(value) < -20
    damped = ops.plus(op, ops.Multiple(op.layout, torch.tensor(1e-3, dtype=F64), definite=True), definite=True)
    x = ops.solve(damped, b, positive=True)
    close(ravel(op, x), torch.linalg.solve(matrix_of(op) + 1e-3 * torch.eye(op.dim, dtype=F64), ravel(op, b)), 1e-8)


def indefinite() -> dict[str, ops.LinearOperator]:
    layout, arrangement = ARRANGED["linear, joint bias"]
    values = positive(1, 3, 5)
    values[0, 1, 1] = -1
    sign = torch.diag(torch.tensor([1.0, -1.0, 1.0], dtype=F64))[None]
    return {
        "Kronecker": ops.Kronecker(layout, arrangement, sign, spd(1, 5)),
        "EigenKronecker": ops.EigenKronecker(layout, arrangement, None, None, values),
        "LowRank": ops.LowRank(
            NET, blocks(NET, 2), torch.tensor([1.0, -1.0], dtype=F64), ops.Multiple(NET, torch.tensor(0.3, dtype=F64))
        ),
        "LowRank, negative base": ops.LowRank(NET, blocks(NET, 2), base=ops.Multiple(NET, torch.tensor(-1.0, dtype=F64))),
        "QuasiDiagonal": ops.QuasiDiagonal(
            LINEAR, positive_blocks(LINEAR), {("weight", "bias"): torch.full((3, 4), 9.0, dtype=F64)}
        ),
    }


@pytest.mark.parametrize("name", list(indefinite()))
def test_indefinite_operators_solve_but_are_no_metrics(name: str) -> None:
    op = indefinite()[name]
    b, matrix = blocks(op.layout), matrix_of(op)
    close(ravel(op, ops.solve(op, b)), torch.linalg.solve(matrix, ravel(op, b)), 1e-9)
    close(matrix_of(ops.inverse(op)), torch.linalg.inv(matrix), 1e-9)
    sign, value = ops.slogdet(op)
    want = torch.linalg.slogdet(matrix)
    close(sign, want.sign)
    close(value, want.logabsdet)
    for call in (
        lambda: ops.solve(op, b, positive=True),
        lambda: ops.sample(op, 1),
        lambda: ops.inverse(op, positive=True).mv(b),
    ):
        with pytest.raises(SingularMetricError):
            call()
    if "Quasi" not in name:
        close(matrix_of(ops.power(op, 2)), matrix @ matrix, 1e-9)
        close(matrix_of(ops.power(op, -2)), torch.linalg.inv(matrix @ matrix), 1e-8)
        with pytest.raises(SingularMetricError, match="negative eigenvalue"):
            ops.power(op, 0.5)


def test_determinants_of_arrows_with_zeros() -> None:
    layout = Layout({"w": (4, 2), "b": (4,)})
    entries = {"w": torch.tensor([[0.0, 2.0], [1.0, 1.0], [2.0, 0.0], [3.0, 1.0]], dtype=F64), "b": positive(4)}
    op = ops.QuasiDiagonal(layout, entries, {("w", "b"): rand(4, 2)})
    want = torch.linalg.slogdet(matrix_of(op))
    sign, value = ops.slogdet(op)
    close(sign, want.sign)
    close(value, want.logabsdet)


# -- crossing borders ------------------------------------------------------------------------------------------------------

STORED = {name: op for name, op in EVERY.items() if op.materialised}


def same(a: ops.LinearOperator, b: ops.LinearOperator) -> None:
    assert type(a) is type(b) and a.layout == b.layout and (a.symmetric, a.definite) == (b.symmetric, b.definite)
    assert torch.equal(ops.to_dense(a), ops.to_dense(b))


@pytest.mark.parametrize("name", STORED)
def test_pickle_copy_and_state(name: str) -> None:
    op = STORED[name]
    same(op, pickle.loads(pickle.dumps(op)))
    same(op, copy.deepcopy(op))
    same(op, numbers.map_numbers(op, torch.clone))
    leaves, spec = numbers.flatten(op)
    assert all(isinstance(leaf, Tensor) for leaf in leaves) and hash(spec) == hash(numbers.flatten(op)[1])
    same(op, numbers.unflatten(spec, leaves))
    if name not in ("Product", "Transpose", "Detached"):
        same(op, numbers.from_state(numbers.state_of(op), op.layout))


@pytest.mark.parametrize("name", [name for name in STORED if name not in ("Product", "Transpose")])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 2e-3), (torch.bfloat16, 0.25)])
def test_lower_precision(name: str, dtype: torch.dtype, tol: float) -> None:
    exact = STORED[name]
    op = numbers.map_numbers(exact, lambda tensor: tensor.to(dtype))
    assert op.like.dtype == dtype
    b = blocks(op.layout, 2)
    cast = {each: block.to(dtype) for each, block in b.items()}
    image = op.mv(cast)
    assert all(block.dtype == dtype for block in image.values())

    def near(got: Tensor, want: Tensor) -> None:
        assert float((got.to(F64) - want).norm() / want.norm()) < tol

    near(ravel(op, image), ravel(op, exact.mv(b)))
    if name in ("Dense", "Sum", "Detached", "Inverse") and dtype == torch.bfloat16:
        return
    if exact.symmetric:
        near(ravel(op, ops.solve(op, cast, positive=True)), ravel(op, ops.solve(exact, b)))
        sample = ops.sample(op, 3, generator=torch.Generator().manual_seed(0))
        near(ravel(op, sample), ravel(op, ops.sample(exact, 3, generator=torch.Generator().manual_seed(0))))


def test_gradients_go_through_the_numbers() -> None:
    layout, arrangement = ARRANGED["linear, joint bias"]
    left, right, b = spd(1, 3), spd(1, 5), blocks(LINEAR)

    def loss(left: Tensor, right: Tensor) -> Tensor:
        op = ops.plus(ops.Kronecker(layout, arrangement, left, right), ops.Multiple(layout, left.new_ones(())))
        x = ops.solve(op, b)
        return ops.slogdet(op)[1] + sum((block.square().sum() for block in x.values()), left.new_zeros(()))

    def plain(left: Tensor, right: Tensor) -> Tensor:
        matrix = torch.kron(left[0].contiguous(), right[0].contiguous()) + torch.eye(15, dtype=F64)
        flat = arrangement.matrix(layout, b).flatten()
        return torch.linalg.slogdet(matrix).logabsdet + torch.linalg.solve(matrix, flat).square().sum()

    for got, want in zip(torch.func.grad(loss, (0, 1))(left, right), torch.func.grad(plain, (0, 1))(left, right), strict=True):
        close(got + got.mT, want + want.mT)


def test_operators_come_out_of_vmap() -> None:
    """A stack of Kronecker products, made under vmap, acts on a stack of vectors."""
    layout, arrangement = ARRANGED["grouped convolution"]
    left, right = torch.stack([spd(2, 3) for _ in range(4)]), torch.stack([spd(2, 7) for _ in range(4)])
    v = blocks(layout, 4)
    stack = ops.Kronecker(layout, arrangement, left, right, definite=True)
    assert ops.batch_shape(stack) == (4,)
    one = [ops.Kronecker(layout, arrangement, left[i], right[i], definite=True) for i in range(4)]
    vectors = [{name: block[i] for name, block in v.items()} for i in range(4)]
    close(ravel(stack, stack.mv(v)), torch.stack([ravel(op, op.mv(u)) for op, u in zip(one, vectors, strict=True)]))
    close(
        ravel(stack, ops.solve(stack, v)),
        torch.stack([ravel(op, ops.solve(op, u)) for op, u in zip(one, vectors, strict=True)]),
    )
    close(ops.slogdet(stack)[1], torch.stack([ops.slogdet(op)[1] for op in one]))
    close(ops.to_dense(stack), torch.stack([ops.to_dense(op) for op in one]))
    mapped = torch.func.vmap(lambda a, b, u: ops.solve(ops.Kronecker(layout, arrangement, a, b), u))(left, right, v)
    close(ravel(stack, mapped), ravel(stack, ops.solve(stack, v)))


# -- SciPy -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Kronecker, convolution", "LowRank, diagonal", "BlockDiagonal", "Product"])
def test_scipy(name: str) -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")
    op = EVERY[name]
    there, matrix = ops.to_scipy(op), matrix_of(op)
    x = rand(op.dim)
    close(torch.from_numpy(there @ x.numpy()), matrix @ x)
    close(torch.from_numpy(there.T @ x.numpy()), matrix.mT @ x)
    assert there.shape == (op.dim, op.dim) and there.dtype.name == "float64"
    close(torch.from_numpy(there @ rand(op.dim, 2).numpy()).new_zeros(()), torch.zeros((), dtype=F64))
    if op.symmetric:
        top = linalg.eigsh(there, k=2, return_eigenvectors=False)
        close(torch.from_numpy(top).sort().values, torch.linalg.eigvalsh(matrix)[-2:], 1e-8)


def test_scipy_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(GeometryError, match=r"geoad\[scipy\]"):
        ops.to_scipy(EXAMPLES["Dense"])


# -- wrong use -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: ops.BlockDiagonal(NET, {("norm",): ops.Multiple(NET.restrict(["norm"]), torch.ones(()))}),
        lambda: ops.BlockDiagonal(LINEAR, {("weight",): EXAMPLES["Dense"], ("bias",): EXAMPLES["Dense"]}),
        lambda: ops.Kronecker(LINEAR, Arrangement("weight", "bias"), torch.eye(3), torch.eye(5)[None]),
        lambda: ops.Kronecker(LINEAR, Arrangement("weight"), torch.eye(3)[None], torch.eye(4)[None]),
        lambda: ops.EigenKronecker(LINEAR, Arrangement("weight", "bias"), None, None, torch.ones(3, 5)),
        lambda: ops.EigenKronecker(LINEAR, Arrangement("weight", "bias"), torch.ones(1, 2, 2), None, torch.ones(1, 3, 5)),
        lambda: ops.LowRank(LINEAR, {"weight": torch.ones(3, 4), "bias": torch.ones(3)}),
        lambda: ops.LowRank(LINEAR, {"weight": torch.ones(2, 3, 4), "bias": torch.ones(2, 3)}, torch.ones(3)),
        lambda: ops.LowRank(LINEAR, blocks(LINEAR, 2), base=EXAMPLES["Dense"]),
        lambda: ops.QuasiDiagonal(LINEAR, blocks(LINEAR), {("weight", "bias"): torch.ones(4, 3)}),
        lambda: ops.QuasiDiagonal(LINEAR, blocks(LINEAR), {Arrangement("weight"): torch.ones(3, 4)}),
        lambda: ops.sample(EXAMPLES["Dense"], -1),
        lambda: ops.power(general(), 0.5),
    ],
)
def test_wrong_use_is_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(GeometryError):
        make()
