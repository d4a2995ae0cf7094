"""What a GPU asks of the code, as far as it can be seen without one: nobody waits in a loop, and nothing is made elsewhere."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from device_cases import waits
from torch import Tensor, nn

import geoad
from geoad import GeometryError
from geoad.curvature import GGN, Fisher, LowRank, OutputMatrix, resumable
from geoad.curvature.likelihoods import Family, Gaussian
from geoad.kernels import lean
from geoad.kernels.conditions import holds, settle, together

SAMPLES = 12
X = torch.linspace(-2.0, 2.0, 4 * SAMPLES, dtype=torch.float64).reshape(SAMPLES, 4).cos()
Y = torch.arange(SAMPLES) % 3
R = torch.linspace(-1.0, 1.5, 3 * SAMPLES, dtype=torch.float64).reshape(SAMPLES, 3).sin()


def network() -> nn.Module:
    torch.manual_seed(0)
    parts = nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 2, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)
    return nn.Sequential(*parts)


def batches(count: int, each: int, targets: Tensor = Y) -> list[tuple[Tensor, Tensor]]:
    return list(zip(X.split(each)[:count], targets.split(each)[:count], strict=True))


@pytest.fixture(autouse=True)
def large_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrices of convolutions of small images are made on CPU alone, where nobody waits for anything."""
    monkeypatch.setattr(lean, "is_small", lambda *_: False)


# -- the helper sees what it is to see ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: bool((x > 0).all()),
        lambda x: [1 for each in x if each > 0],
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x.clone()),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.cpu(),
        lambda x: x.repeat_interleave((x > 0).long()),
        lambda x: torch.linalg.cholesky(x.abs().diag_embed()),
        lambda x: torch.vmap(lambda row: row * 2)(x).sum().item(),
    ],
)
def test_waits_are_seen(read: Callable[[Tensor], Any]) -> None:
    x = torch.tensor([1.0, 2.0, 3.0])
    with waits() as found:
        (x * 2).sum().exp().expand(3).where(x > 1, 0.0)
    assert not found
    with waits() as found:
        read(x)
    assert found


# -- nobody waits in a loop --------------------------------------------------------------------------------------------------

REPRESENTATIONS = ("dense", "block_diagonal", "diagonal", "quasi_diagonal", "kfac", "ekfac", "low_rank", LowRank(2))
KINDS = ("exact", "mc", "empirical", "covariance")
NORMAL = Family(lambda f: torch.distributions.Normal(f[..., 0], f[..., 1].exp()))
OUTPUTS: dict[str, tuple[Any, Tensor]] = {
    "bernoulli": ("bernoulli", R.sigmoid()),
    "poisson": ("poisson", R.abs()),
    "gaussian": ("gaussian", R),
    "gaussian, matrix": (Gaussian(torch.eye(3, dtype=torch.float64) + 0.1), R),
    "probabilities": ("categorical", R.softmax(-1)),
}
LOSSES: dict[str, tuple[Any, Tensor]] = {
    **OUTPUTS,
    "categorical": ("categorical", Y),
    "ignored": (geoad.curvature.likelihoods.Categorical(ignore_index=1), Y),
    "cross_entropy": (F.cross_entropy, Y),
    "mse_loss": (F.mse_loss, R),
    "a matrix": (OutputMatrix(lambda f, y: f.square() + 1), R),
}

Make = Callable[[list[Any], int], Callable[[], Any]]


def value(field: Any, **options: Any) -> Make:
    """The value of a field, made anew each time."""

    def make(data: list[Any], memory: int) -> Callable[[], Any]:
        geo = geoad.GeoModule(network())
        known, p = field(geo, data, max_memory=memory, **options), geo.point()
        return lambda: known(p)

    return make


def first_product(field: Any, **options: Any) -> Make:
    """A value and its first product."""

    def make(data: list[Any], memory: int) -> Callable[[], Any]:
        geo = geoad.GeoModule(network())
        known, p = field(geo, data, max_memory=memory, **options), geo.point()
        v = p.chart.vector(p.blocks, at=p)
        return lambda: known(p).mv(v)

    return make


def later_products(field: Any, **options: Any) -> Make:
    """Products at a point where the second one has been recorded (that looks at what it keeps, once for each batch)."""

    def make(data: list[Any], memory: int) -> Callable[[], Any]:
        geo = geoad.GeoModule(network())
        here, p = field(geo, data, max_memory=memory, **options)(geo.point()), geo.point()
        v = p.chart.vector(p.blocks, at=p)
        here.mv(v), here.mv(v)
        return lambda: here.mv(v)

    return make


def hessian_products(geo: Any, data: list[Any], max_memory: int) -> Any:
    return lambda p: geoad.hessian(geo.loss(F.cross_entropy, data))(p)


def sample_gradients(geo: Any, data: list[Any], max_memory: int) -> Any:
    return geoad.per_sample_grads(geo.loss(F.cross_entropy, data), max_memory=max_memory)


def gradient(geo: Any, data: list[Any], max_memory: int) -> Any:
    return geoad.grad(geo.loss(F.cross_entropy, data))


def dual(geo: Any, data: list[Any], max_memory: int, **options: Any) -> Any:
    field, slope = Fisher(geo, data, **options), geoad.grad(geo.loss(F.cross_entropy, data))
    return lambda p: geoad.DualSolver(field, p, damping=0.1, max_memory=max_memory).solve(slope(p))


def growth(make: Make, targets: Tensor = Y, most: int = 16) -> Counter[str]:
    """What is waited for more often with more batches, or with more chunks of a batch; bounded for the fewest."""
    more: Counter[str] = Counter()
    for few, many in (((2, 2, 1 << 28), (3, 2, 1 << 28)), ((1, 2, 1), (1, 3, 1))):
        found: list[Counter[str]] = []
        for count, each, memory in (few, many):
            call = make(batches(count, each, targets), memory)
            call()  # a first evaluation looks at the network
            with waits() as now:
                call()
            found.append(now)
        assert sum(found[0].values()) <= most
        more += found[1] - found[0]
    return more


def offered(kind: str, representation: Any) -> bool:
    return (kind, representation) != ("covariance", "kfac")


@pytest.mark.parametrize("representation", REPRESENTATIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_no_wait_in_each_batch(kind: str, representation: Any) -> None:
    if not offered(kind, representation):
        pytest.skip("has no Kronecker factors")
    assert not growth(value(Fisher, kind=kind, representation=representation))


@pytest.mark.parametrize("kind", KINDS)
def test_no_wait_in_products(kind: str) -> None:
    assert not growth(first_product(Fisher, kind=kind))
    assert not growth(later_products(Fisher, kind=kind), most=0)


@pytest.mark.parametrize("name", LOSSES)
def test_no_wait_for_labels(name: str) -> None:
    likelihood, targets = LOSSES[name]
    assert not growth(value(GGN, likelihood=likelihood, representation="diagonal"), targets)
    assert not growth(first_product(GGN, likelihood=likelihood), targets)


@pytest.mark.parametrize("kind", ["mc", "empirical"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_no_wait_for_labels_of_a_family(name: str, kind: str) -> None:
    likelihood, targets = OUTPUTS[name]
    assert not growth(value(Fisher, likelihood=likelihood, kind=kind, representation="diagonal"), targets)


def test_no_wait_for_the_parameters_of_a_distribution() -> None:
    assert not growth(value(Fisher, likelihood=NORMAL, representation="diagonal"))


def test_no_wait_in_other_calls() -> None:
    assert not growth(first_product(hessian_products), most=1)  # it is finite
    assert not growth(later_products(hessian_products), most=0)
    assert not growth(value(gradient), most=0)
    assert not growth(value(sample_gradients), most=1)  # they are finite
    found = growth(value(dual), most=20)
    assert not [place for place in found if "program.py" not in place]  # its products are recorded, batch by batch


# -- conditions that are looked at together ----------------------------------------------------------------------------------


def positive(x: Tensor) -> Tensor:
    if not holds((x > 0).all()):
        raise GeometryError(f"{x.item():g} is not positive")
    return x.log()


def test_conditions_are_read_once_and_told_as_they_stand() -> None:
    good, bad = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, -2.0, -3.0])
    with waits() as found:
        assert len(together(lambda: [positive(x) for x in good])) == 3
    assert sum(found.values()) == 1
    seen: list[float] = []

    def pass_by() -> None:
        for x in bad:
            positive(x)
            seen.append(float(x))

    with pytest.raises(GeometryError, match="-2 is not positive"):
        together(pass_by)
    assert seen == [1.0, -2.0, -3.0, 1.0]  # all, and then up to the first that does not hold
    with pytest.raises(GeometryError, match="-2 is not positive"):
        positive(bad[1])  # outside, at once
    with pytest.raises(GeometryError, match="-3 is not positive"):
        together(lambda: together(lambda: positive(bad[2])))


def test_what_fails_after_a_condition_is_told_by_the_condition() -> None:
    def later() -> None:
        positive(torch.tensor(-1.0))
        raise ZeroDivisionError

    with pytest.raises(GeometryError, match="-1 is not positive"):
        together(later)

    def other() -> None:
        positive(torch.tensor(1.0))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        together(other)
    assert not holds(torch.tensor(False))  # nothing is left of the above


def test_conditions_inside_of_transforms_are_read_there() -> None:
    def loss(x: Tensor) -> Tensor:
        return positive(x.detach()) * x

    assert float(together(lambda: torch.func.grad(loss)(torch.tensor(2.0)))) == pytest.approx(0.6931471805599453)
    with pytest.raises(GeometryError, match="-2 is not positive"):
        together(lambda: torch.func.grad(loss)(torch.tensor(-2.0)))


def test_settled_before_something_lasting_is_made() -> None:
    written: list[Tensor] = []

    def write() -> None:
        y = positive(torch.tensor(-1.0))
        settle()
        written.append(y)

    with pytest.raises(GeometryError, match="-1 is not positive"):
        together(write)
    assert not written


def test_random_data_that_fail_once() -> None:
    signs = iter([-1.0, 1.0])
    with pytest.raises(GeometryError, match="are random"):
        together(lambda: positive(torch.tensor(next(signs))))


@pytest.mark.parametrize("representation", ["implicit", *REPRESENTATIONS], ids=str)
@pytest.mark.parametrize(
    ("kind", "broken", "message"),
    [
        ("exact", "inputs", r"Fisher matrix there would be nan.*mend the data"),
        ("mc", "inputs", r"Fisher matrix there would be nan.*mend the data"),
        ("empirical", "labels", "labels must lie between 0 and 2.*found labels from . to 7"),
    ],
)
def test_the_last_batch_is_looked_at_too(kind: str, broken: str, message: str, representation: Any, tmp_path: Path) -> None:
    x, y = X.clone(), Y.clone()
    if broken == "inputs":
        x[-1, 0] = torch.nan
    else:
        y[-1] = 7
    geo = geoad.GeoModule(network())
    field = Fisher(geo, list(zip(x.split(5), y.split(5), strict=True)), kind=kind, representation=representation)
    p = geo.point()
    with pytest.raises(GeometryError, match=message):
        field(p).mv(p.chart.vector(p.blocks, at=p))
    if representation != "implicit":
        with pytest.raises(GeometryError, match=message), resumable(tmp_path / "sums", every=1):
            field(p)
        if (tmp_path / "sums").exists():  # up to the last batch but one, and never with what was wrong
            states = torch.load(tmp_path / "sums")["pages"][-1]["states"]
            assert all(bool(each.isfinite().all()) for state in states for each in state.values())


def test_the_dual_solver_looks_at_the_last_batch_too() -> None:
    x = X.clone()
    x[-1] = torch.inf
    geo = geoad.GeoModule(network())
    with pytest.raises(GeometryError, match="not finite"):
        geoad.DualSolver(Fisher(geo, list(x.split(5))), geo.point(), damping=0.1)


# -- comparisons that are read once ------------------------------------------------------------------------------------------


def test_points_are_compared_by_one_look() -> None:
    from geoad.params import _equal_at_once

    a, b = torch.arange(3.0), torch.ones(2, 2)
    with waits() as found:
        assert _equal_at_once([(a, a.clone()), (b, b.clone())])
    assert sum(found.values()) == 1
    assert not _equal_at_once([(a, a.clone()), (b, b + 1)])
    assert not _equal_at_once([(a, a * torch.nan)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.bool])
def test_sums_of_bits_of_a_device(dtype: torch.dtype) -> None:
    """Fingerprints of what is not on the CPU: read at once, and other ones for other numbers, places and signs."""
    from geoad.kernels.spread import _sums

    x = torch.tensor([1, 0, 1, 1, 0, 1, 1]).to(dtype)
    others = [x[[1, 0, 2, 3, 4, 5, 6]], torch.cat([x, x[:1]]), x[1:], torch.zeros(0, dtype=dtype)]
    with waits() as found:
        sums = _sums([x, x.clone(), *others, x[::2], x[::2].contiguous()])
    assert sum(found.values()) == 1  # by tolist
    assert sums[0] == sums[1] and sums[-1] == sums[-2] and sums[0] not in sums[2:6]
    assert _sums([]) == [] and _sums([torch.tensor(0.0)]) != _sums([torch.tensor(-0.0)])


# -- nothing is made elsewhere -----------------------------------------------------------------------------------------------

PACKAGE = Path(geoad.__file__).resolve().parent
MAKERS = {
    *("arange", "empty", "eye", "full", "linspace", "logspace", "normal", "ones", "rand", "randint", "randn", "randperm"),
    *("scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros"),
}
FREE = {("charts/chart.py", "_as_tensor")}
"""Numbers of the user's that become a tensor go where torch puts such."""


def makers_without_device(source: str) -> list[tuple[str, int]]:
    """Calls of torch that make a tensor and do not say where: (function, line)."""
    found: list[tuple[str, int]] = []
    tree = ast.parse(source)
    for function in [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.Module))]:
        for node in ast.walk(function):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr not in MAKERS:
                continue
            if not isinstance(node.func.value, ast.Name) or node.func.value.id != "torch":
                continue
            if not any(each.arg in ("device", None) for each in node.keywords):
                found.append((getattr(function, "name", ""), node.lineno))
    return found


def test_the_lint_sees_what_it_is_to_see() -> None:
    assert makers_without_device("import torch\ntorch.zeros(3, dtype=d)") == [("", 2)]
    assert not makers_without_device("import torch\ntorch.zeros(3, device=x.device)\nx.new_zeros(3)\ntorch.zeros_like(x)")


FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if "testing" not in file.parts]


@pytest.mark.parametrize("file", FILES, ids=[str(each.relative_to(PACKAGE)) for each in FILES])
def test_tensors_are_made_on_a_device_that_is_said(file: Path) -> None:
    name = file.relative_to(PACKAGE).as_posix()
    found = makers_without_device(file.read_text())
    free = {line for function, line in found if (name, function) in FREE}
    assert not [f"{name}:{line}" for _, line in found if line not in free]


@pytest.fixture
def elsewhere() -> Any:
    """torch's default device is one that has no numbers: what is made there by mistake cannot be used."""
    with torch.device("meta"):
        yield


META: dict[str, Make] = {
    **{
        f"{kind}, {each}": value(Fisher, kind=kind, representation=each)
        for kind in KINDS
        for each in REPRESENTATIONS
        if offered(kind, each)
    },
    **{f"{kind}, products": later_products(Fisher, kind=kind) for kind in KINDS},
    **{f"one by one, {each}": value(GGN, representation=each) for each in REPRESENTATIONS},
    "hessian": later_products(hessian_products),
    "gradients of samples": value(sample_gradients),
    "gradient": value(gradient),
    "dual": value(dual),
}


@pytest.mark.parametrize("name", META)
def test_everything_is_made_where_the_parameters_are(name: str) -> None:
    data, memory = batches(2, 4), 1 if "one by one" in name else 1 << 28
    twin = META[name](data, memory)
    torch.manual_seed(0)
    wanted = twin()
    call = META[name](data, memory)
    torch.manual_seed(0)
    with torch.device("meta"):
        found = call()
    if wanted is not None and "mc" not in name:
        numbers = (lambda t: t.ravel()) if hasattr(wanted, "ravel") else (lambda t: t.to_dense())
        torch.testing.assert_close(numbers(found), numbers(wanted), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", LOSSES)
def test_likelihoods_are_made_where_the_parameters_are(name: str, elsewhere: None) -> None:
    likelihood, targets = LOSSES[name]
    with torch.device("cpu"):
        geo = geoad.GeoModule(network())
    p = geo.point()
    given = type(likelihood)(likelihood.covariance) if isinstance(likelihood, Gaussian) else likelihood
    GGN(geo, batches(2, 4, targets), given, representation="diagonal")(p)
    GGN(geo, batches(2, 4, targets), given, representation="low_rank")(p)
    if name in OUTPUTS:
        Fisher(geo, batches(2, 4, targets), given, kind="mc", samples=2, representation="diagonal")(p)
