"""Every map of `geoad.maps`: inverse, the four Jacobian products, log det, domains, patterns, numbers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from geoad import maps
from geoad.errors import GeometryError
from geoad.maps.base import Diffeomorphism
from geoad.maps.select import Recipe, bind
from geoad.params import Blocks, Layout

# torch itself warns when its forward mode is used for the first time
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

LAYOUTS = {
    "mlp": Layout({"0.weight": (4, 3), "0.bias": (4,), "2.weight": (2, 4), "2.bias": (2,)}),
    "conv": Layout({"c.weight": (3, 2, 2, 1), "c.bias": (3,), "l.weight": (2, 6)}),
    "odd": Layout({"s": (), "one": (1,), "row": (1, 3), "column": (3, 1), "t": ()}),
    "bare": Layout({"weight": (3, 4)}),
}
MIXED: Recipe = {"*weight": maps.Polar(), "*.bias": maps.Compose(maps.Asinh(), maps.Scale(-0.5)), "s": maps.Sinh()}
RECIPES: dict[str, Callable[[], Recipe]] = {
    "identity": maps.Identity,
    "scale": lambda: maps.Scale(-3.0),
    "scale learnable": lambda: maps.Scale(-3.0, learnable=True),
    "exp": maps.Exp,
    "log": maps.Log,
    "softplus": maps.Softplus,
    "asinh": maps.Asinh,
    "sinh": maps.Sinh,
    "tanh": maps.Tanh,
    "atanh": maps.Atanh,
    "power": maps.Power,
    "power -1/2": lambda: maps.Power(-0.5),
    "affine": maps.Affine,
    "affine learnable": lambda: maps.Affine(learnable=True),
    "layers": lambda: maps.Affine(per_layer=True),
    "layers learnable": lambda: maps.LayerAffine(learnable=True),
    "polar": maps.Polar,
    "polar columns": lambda: maps.Polar(0),
    "polar block": lambda: maps.Polar(None),
    "projection": lambda: maps.Polar(kind="stereographic"),
    "projection columns": lambda: maps.Polar(0, "stereographic"),
    "householder": maps.Householder,
    "householder right": lambda: maps.Householder(3, "right"),
    "householder all": lambda: maps.Householder(2, "all", learnable=True),
    "orthogonal": maps.Orthogonal,
    "orthogonal right": lambda: maps.Orthogonal(side="right"),
    "permutation": maps.Permutation,
    "permutation signs": lambda: maps.Permutation(dim=0, signs="random"),
    "permutation last": lambda: maps.Permutation(dim=-1, signs="random"),
    "rescale": maps.Rescale,
    "rescale layers": lambda: maps.Rescale(per="layer"),
    "coupling": maps.Coupling,
    "coupling additive": lambda: maps.Coupling("additive", layers=3, swap=True),
    "coupling learnable": lambda: maps.Coupling(layers=1, learnable=True),
    "composition": lambda: maps.Compose(maps.Coupling(), maps.Asinh(), maps.Householder(), maps.Permutation()),
    "inverse": lambda: maps.Inverse(maps.Compose(maps.Affine(), maps.Asinh())),
}
POSITIVE = {"log"}
CASES = [
    (recipe, layout)
    for recipe in RECIPES
    for layout in LAYOUTS
    if not (recipe.startswith("rescale") and layout in ("odd", "bare"))
]


def point(name: str, layout: Layout, seed: int = 0) -> Blocks:
    """A point inside of the domain: |entries| in (0.1, 0.9)."""
    draws = torch.Generator().manual_seed(seed)
    vector = 0.1 + 0.8 * torch.rand(layout.dim, generator=draws, dtype=torch.float64)
    if name not in POSITIVE:
        vector = vector * torch.randn(layout.dim, generator=draws, dtype=torch.float64).sign()
    return layout.unravel(vector)


def make(name: str, layout: Layout, seed: int = 0) -> Diffeomorphism:
    torch.manual_seed(seed)
    return bind(RECIPES[name](), layout).requires_grad_(False)


def direction(layout: Layout, seed: int) -> Blocks:
    return layout.unravel(torch.randn(layout.dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def dense(m: Diffeomorphism, layout: Layout, x: Blocks) -> Tensor:
    """The Jacobian by reverse mode, of `forward` alone."""
    jacobian = torch.func.jacrev(lambda v: layout.ravel(m.forward(layout.unravel(v))))(layout.ravel(x))
    assert isinstance(jacobian, Tensor)
    return jacobian


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert actual.shape == expected.shape
    actual, expected = actual.detach(), expected.detach()
    assert float((actual - expected).norm()) <= tolerance * max(float(expected.norm()), 1e-3)


@pytest.mark.parametrize(("name", "blocks"), CASES)
def test_laws(name: str, blocks: str) -> None:
    """Inverse both ways, the four products, log det; the blocks keep names, order and shapes."""
    layout = LAYOUTS[blocks]
    m, x = make(name, layout), point(name, layout)
    assert m.outside_domain(x) is None
    y = m.forward(x)
    assert Layout({key: value.shape for key, value in y.items()}) == layout
    assert m.outside_image(y) is None
    close(layout.ravel(m.invert(y)), layout.ravel(x))
    close(layout.ravel(m.forward(m.invert(y))), layout.ravel(y))
    jacobian = dense(m, layout, x)
    inverse = torch.linalg.inv(jacobian)
    v = direction(layout, 1)
    vector = layout.ravel(v)
    close(layout.ravel(m.push(x, y, v)), jacobian @ vector)
    close(layout.ravel(m.pull(x, y, v)), jacobian.mT @ vector)
    close(layout.ravel(m.push_inverse(x, y, v)), inverse @ vector)
    close(layout.ravel(m.pull_inverse(x, y, v)), inverse.mT @ vector)
    volume = m.log_abs_det(x, y)
    assert volume.shape == ()
    assert abs(float(volume - torch.linalg.slogdet(jacobian).logabsdet)) <= 1e-10 * max(1.0, abs(float(volume)))


@pytest.mark.parametrize(("name", "blocks"), [case for case in CASES if case[1] in ("mlp", "odd")])
def test_flags_tell_the_truth(name: str, blocks: str) -> None:
    layout = LAYOUTS[blocks]
    m, x = make(name, layout), point(name, layout)
    jacobian = dense(m, layout, x)
    entries = jacobian.abs() > 1e-12
    if m.elementwise:
        assert torch.equal(jacobian, jacobian.diagonal().diag())
    if m.monomial:
        assert bool((entries.sum(0) == 1).all()) and bool((entries.sum(1) == 1).all())
    if m.linear:
        close(dense(m, layout, point(name, layout, seed=5)), jacobian, 1e-13)
    if m.blockwise:
        for where in layout.offsets().values():
            outside = torch.ones(layout.dim, dtype=torch.bool)
            outside[where] = False
            assert not bool(entries[where][:, outside].any())


def test_flags_are_known() -> None:
    """The flags that structure-preserving transport relies on."""
    expected = {"affine": "l", "layers": "lb", "polar": "b", "householder": "lb", "permutation": "lbm", "coupling": ""}
    expected |= {"rescale": "lbme", "softplus": "bme", "scale": "lbme", "composition": ""}
    for name, letters in expected.items():
        m = make(name, LAYOUTS["mlp"])
        found = {"l": m.linear, "b": m.blockwise, "m": m.monomial, "e": m.elementwise}
        assert "".join(key for key in "lbme" if found[key]) == "".join(key for key in "lbme" if key in letters), name


@pytest.mark.parametrize("name", RECIPES)
def test_transforms(name: str) -> None:
    """vmap over points, float32, finite second derivatives of the products, all nested."""
    layout = LAYOUTS["mlp"]
    m, v = make(name, layout), direction(layout, 2)
    points = [point(name, layout, seed) for seed in range(3)]
    batch = {key: torch.stack([each[key] for each in points]) for key in layout}
    images = torch.func.vmap(m.forward)(batch)
    pushed = torch.func.vmap(lambda x, y: m.pull_inverse(x, y, m.push(x, y, v)))(batch, images)
    volumes = torch.func.vmap(m.log_abs_det)(batch, images)
    for i, x in enumerate(points):
        y = m.forward(x)
        close(layout.ravel({key: value[i] for key, value in images.items()}), layout.ravel(y), 1e-13)
        close(
            layout.ravel({key: value[i] for key, value in pushed.items()}),
            layout.ravel(m.pull_inverse(x, y, m.push(x, y, v))),
            1e-11,
        )
        close(volumes[i], m.log_abs_det(x, y), 1e-11)

    def product(vector: Tensor) -> Tensor:
        x = layout.unravel(vector)
        return layout.ravel(m.push(x, m.forward(x), v))

    start = layout.ravel(points[0])
    second = torch.func.jacfwd(product)(start)
    assert isinstance(second, Tensor) and bool(second.isfinite().all())
    _, along = torch.func.jvp(lambda s: dense(m, layout, layout.unravel(s)) @ layout.ravel(v), (start,), (start,))
    close(second @ start, along, 1e-9)

    single = {key: value.float() for key, value in points[0].items()}
    y = m.forward(single)
    assert all(block.dtype == torch.float32 for block in y.values())
    close(layout.ravel(m.invert(y)).double(), start, 2e-5)
    close(layout.ravel(m.push_inverse(single, y, m.push(single, y, single))).double(), start, 2e-5)


@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@given(
    names=st.lists(st.sampled_from(sorted(set(RECIPES) - {"log", "atanh", "inverse", "exp"})), min_size=2, max_size=3),
    blocks=st.sampled_from(["mlp", "conv"]),
    seed=st.integers(0, 1000),
)
def test_any_composition(names: list[str], blocks: str, seed: int) -> None:
    layout = LAYOUTS[blocks]
    torch.manual_seed(seed)
    composed = maps.Compose(*(RECIPES[each]() for each in names))
    m = bind(maps.Inverse(maps.Inverse(composed)), layout).requires_grad_(False)
    x, v = point("", layout, seed), direction(layout, seed)
    if m.outside_domain(x) is not None:
        return
    y = m.forward(x)
    jacobian = dense(m, layout, x)
    tolerance = 1e-13 * float(torch.linalg.cond(jacobian)) + 1e-10
    close(layout.ravel(m.invert(y)), layout.ravel(x), tolerance)
    close(layout.ravel(m.push(x, y, v)), jacobian @ layout.ravel(v), tolerance)
    close(layout.ravel(m.pull(x, y, v)), jacobian.mT @ layout.ravel(v), tolerance)
    close(layout.ravel(m.push(x, y, m.push_inverse(x, y, v))), layout.ravel(v), tolerance)
    close(layout.ravel(m.pull_inverse(x, y, m.pull(x, y, v))), layout.ravel(v), tolerance)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(size=st.integers(1, 9), seed=st.integers(0, 1000), stereographic=st.booleans(), power=st.integers(-150, 150))
def test_polar_at_any_size(size: int, seed: int, stereographic: bool, power: int) -> None:
    """Radius and angles are what they say, at every order of magnitude."""
    layout = Layout({"x": (size,)})
    m = bind(maps.Polar(kind="stereographic" if stereographic else "hyperspherical"), layout)
    x = {"x": point("", layout, seed)["x"] * 10.0**power}
    y = m.forward(x)
    close(m.invert(y)["x"] / 10.0**power, x["x"] / 10.0**power, 1e-13)
    if size > 1:
        assert float(y["x"][0]) == pytest.approx(10.0**power * float((x["x"] / 10.0**power).norm()), rel=1e-14)
    v = direction(layout, seed)["x"]
    v = {"x": torch.cat([v[:1] * y["x"][:1], v[1:]])}  # a change of the radius in units of the radius
    close(m.push(x, y, m.push_inverse(x, y, v))["x"][1:], v["x"][1:], 1e-11)
    close(m.push(x, y, m.push_inverse(x, y, v))["x"][:1] / y["x"][:1], v["x"][:1] / y["x"][:1], 1e-11)


def test_polar_values() -> None:
    y = bind(maps.Polar(), Layout({"w": (1, 3)})).forward({"w": torch.tensor([[0.0, 3.0, -4.0]])})["w"]
    assert torch.allclose(y, torch.tensor([[5.0, torch.pi / 2, -0.9272952]]))
    columns = bind(maps.Polar(0), Layout({"w": (2, 1)})).forward({"w": torch.tensor([[3.0], [4.0]])})["w"]
    assert torch.allclose(columns, torch.tensor([[5.0], [0.9272952]]))
    filters = bind(maps.Polar(), LAYOUTS["conv"]).forward(point("", LAYOUTS["conv"]))["c.weight"]
    norms = point("", LAYOUTS["conv"])["c.weight"].flatten(1).norm(dim=1)
    assert torch.allclose(filters.flatten(1)[:, 0], norms)
    negative = bind(maps.Polar(), Layout({"s": ()}))
    assert float(negative.forward({"s": torch.tensor(-2.0)})["s"]) == -2.0


@pytest.mark.parametrize("x1", [-1 + 1e-9, -0.5, 0.0, 1.0])
def test_projection_near_its_poles(x1: float) -> None:
    layout = Layout({"x": (3,)})
    m = bind(maps.Polar(kind="stereographic"), layout)
    x = torch.tensor([x1, (1 - x1 * x1) ** 0.5, 0.0], dtype=torch.float64)
    y = m.forward({"x": x})
    close(m.invert(y)["x"], x, 1e-13)
    jacobian = dense(m, layout, {"x": x})
    assert bool(jacobian.isfinite().all())
    close(m.push({"x": x}, y, {"x": x.flip(0)})["x"], jacobian @ x.flip(0), 1e-6 if x1 < -0.9 else 1e-12)


REFUSED_DOMAIN: list[tuple[Recipe, list[float], str]] = [
    (maps.Log(), [1.0, 0.0, 2.0], "all components must be > 0"),
    (maps.Exp(), [0.0, 800.0, 1.0], "overflow"),
    (maps.Softplus(), [-800.0, 0.0, 1.0], "underflow"),
    (maps.Asinh(), [1e200, 0.0, 1.0], "square"),
    (maps.Sinh(), [800.0, 0.0, 1.0], "overflow"),
    (maps.Tanh(), [30.0, 0.0, 1.0], "round to 1"),
    (maps.Atanh(), [1.0, 0.0, 0.5], "strictly between"),
    (maps.Power(), [0.0, 1.0, 1.0], "no component may be 0"),
    (maps.Power(-2.0), [1e-200, 1.0, 1.0], "overflow"),
    (maps.Polar(), [0.0, 0.0, 0.0], "zero vector has no direction"),
    (maps.Polar(), [1.0, 0.0, 0.0], "coordinates of the sphere end"),
    (maps.Polar(), [1.0, -1.0, 0.0], "last angle"),
    (maps.Polar(), [1.0, float("nan"), 0.0], "infinite"),
    (maps.Polar(kind="stereographic"), [-1.0, 0.0, 0.0], "pole"),
    (maps.Compose(maps.Scale(-1.0), maps.Log()), [1.0, -1.0, -1.0], "> 0"),
    (maps.Inverse(maps.Exp()), [-1.0, 1.0, 1.0], "> 0"),
]
REFUSED_IMAGE: list[tuple[Recipe, list[float], str]] = [
    (maps.Exp(), [1.0, -1.0, 1.0], "> 0"),
    (maps.Softplus(), [1.0, 0.0, 1.0], "> 0"),
    (maps.Log(), [1.0, 800.0, 1.0], "overflow"),
    (maps.Tanh(), [1.0, 0.0, 0.0], "strictly between"),
    (maps.Asinh(), [800.0, 0.0, 0.0], "overflow"),
    (maps.Power(), [0.0, 1.0, 1.0], "no component may be 0"),
    (maps.Polar(), [-1.0, 1.0, 1.0], "radius must be > 0"),
    (maps.Polar(), [1.0, -0.1, 1.0], "all angles but the last"),
    (maps.Polar(), [1.0, 1.0, 3.2], "last angle"),
    (maps.Polar(kind="stereographic"), [1.0, 1e200, 1.0], "finite"),
    (maps.Compose(maps.Exp(), maps.Scale(-1.0)), [1.0, -1.0, -1.0], "> 0"),
    (maps.Inverse(maps.Log()), [0.0, 1.0, 1.0], "> 0"),
]


@pytest.mark.parametrize(("recipe", "values", "words"), REFUSED_DOMAIN)
def test_outside_domain(recipe: Recipe, values: list[float], words: str) -> None:
    condition = bind(recipe, Layout({"x": (3,)})).outside_domain({"x": torch.tensor(values, dtype=torch.float64)})
    assert condition is not None and words in condition and "'x'" in condition


@pytest.mark.parametrize(("recipe", "values", "words"), REFUSED_IMAGE)
def test_outside_image(recipe: Recipe, values: list[float], words: str) -> None:
    condition = bind(recipe, Layout({"x": (3,)})).outside_image({"x": torch.tensor(values, dtype=torch.float64)})
    assert condition is not None and words in condition and "'x'" in condition


MLP, XY = LAYOUTS["mlp"], Layout({"x": (2,)})
EYE = torch.eye(2)
REFUSED_RECIPES: list[tuple[Callable[[], Recipe], Layout, str]] = [
    (lambda: {"weights": maps.Exp()}, MLP, r"matches no block.*0\.weight"),
    (lambda: {"*.weight": maps.Exp()}, LAYOUTS["bare"], "bare 'weight'"),
    (lambda: {"*": 3}, MLP, "is a int, not a map"),  # pyright: ignore[reportReturnType]
    (lambda: maps.Scale(0.0), XY, "finite factors other than 0"),
    (lambda: maps.Scale(torch.ones(3)), XY, "must broadcast"),
    (lambda: maps.Power(0.0), XY, "finite exponent"),
    (lambda: maps.Compose(), XY, "at least one map"),
    (lambda: maps.Affine(torch.ones(2, 2)), XY, "is singular"),
    (lambda: maps.Affine(torch.ones(2, 3)), XY, "square matrix"),
    (lambda: maps.Affine(torch.eye(3)), XY, "2 coordinates together"),
    (lambda: maps.Affine(EYE, torch.ones(3)), XY, r"one number or 2"),
    (lambda: maps.Affine(EYE * float("nan")), XY, "not finite"),
    (lambda: maps.Affine(EYE, left=EYE), XY, "compose two maps"),
    (lambda: maps.Affine(limit=3), MLP, "per_layer=True"),
    (lambda: maps.LayerAffine({"1": EYE}), MLP, r"layers \['1'\]"),
    (lambda: maps.LayerAffine(EYE), MLP, "needs one of shape"),
    (lambda: maps.LayerAffine(limit=3), MLP, "maps.Householder"),
    (lambda: maps.LayerAffine(torch.zeros(2, 2)), XY, "is singular"),
    (lambda: maps.Polar(2), MLP, "dim=-1"),
    (lambda: maps.Polar(kind="cartesian"), MLP, "stereographic"),  # pyright: ignore[reportArgumentType]
    (lambda: maps.Householder(0), MLP, "at least one reflection"),
    (lambda: maps.Householder(side="top"), MLP, "'left'"),  # pyright: ignore[reportArgumentType]
    (lambda: maps.Householder(vectors=torch.zeros(1, 2)), XY, "zero vector has no mirror"),
    (lambda: maps.Householder(vectors=torch.ones(1, 2)), MLP, "Pass vectors of that length"),
    (lambda: maps.Orthogonal(2 * EYE), XY, "QᵀQ = I"),
    (lambda: maps.Orthogonal(EYE), MLP, "Pass a matrix of that size"),
    (lambda: maps.Orthogonal(limit=3), MLP, "maps.Householder"),
    (lambda: maps.Permutation([0, 0]), XY, "has to occur once"),
    (lambda: maps.Permutation([0, 1, 2]), XY, "does not reorder"),
    (lambda: maps.Permutation(dim=1), XY, "no such axis"),
    (lambda: maps.Permutation(signs=[1, 2]), XY, "maps.Scale"),
    (lambda: maps.Permutation(signs=[1]), XY, "pass 2 of them"),
    (lambda: maps.Permutation(signs="all"), XY, "'random'"),  # pyright: ignore[reportArgumentType]
    (maps.Rescale, LAYOUTS["bare"], "no consecutive layers"),
    (lambda: maps.Rescale(pairs=[("0", "1")]), MLP, r"has? the layers \['0', '2'\]|the layers"),
    (lambda: maps.Rescale(pairs=[("2", "0")]), MLP, "do not feed"),
    (lambda: maps.Rescale(-1.0), MLP, "positive factors only"),
    (lambda: maps.Rescale([1.0, 2.0]), MLP, "2 factors for 1 pairs"),
    (lambda: maps.Rescale(per="row"), MLP, "'unit' or per 'layer'"),  # pyright: ignore[reportArgumentType]
    (maps.Coupling, Layout({"x": ()}), "neither may be empty"),
    (lambda: maps.Coupling(split="*"), MLP, "into 26 and 0"),
    (lambda: maps.Coupling(split="1.weight"), MLP, "matches none"),
    (lambda: maps.Coupling("spline"), MLP, "'additive'"),  # pyright: ignore[reportArgumentType]
    (lambda: maps.Coupling(hidden=0), MLP, "hidden >= 1"),
    (lambda: bind(maps.Exp(), MLP), MLP, "bound to the blocks"),
    (lambda: maps.Compose(maps.Exp()).bind(MLP), MLP, "bound to the blocks"),
    (lambda: maps.Inverse(maps.Exp()).bind(MLP), MLP, "bound to the blocks"),
    (lambda: maps.Coupling().bind(MLP), MLP, "bound to the blocks"),
]


@pytest.mark.parametrize(("recipe", "layout", "words"), REFUSED_RECIPES)
def test_refused_recipes(recipe: Callable[[], Recipe], layout: Layout, words: str) -> None:
    with pytest.raises(GeometryError, match=words):
        bind(recipe(), layout)


def test_patterns() -> None:
    """The first match wins, what matches nothing keeps its coordinates, the order of the blocks is kept."""
    recipe: Mapping[str, Diffeomorphism] = {"0.*": maps.Scale(2.0), "*.weight": maps.Scale(3.0)}
    layout = LAYOUTS["mlp"]
    y = bind(recipe, layout).forward({name: torch.ones(shape) for name, shape in layout.items()})
    assert {name: float(block.flatten()[0]) for name, block in y.items()} == {
        "0.weight": 2.0,
        "0.bias": 2.0,
        "2.weight": 3.0,
        "2.bias": 1.0,
    }
    assert list(y) == list(layout)
    mixed = bind(MIXED, Layout({**layout, "s": ()}))
    assert not mixed.elementwise and mixed.blockwise


def test_joint_map_sees_only_matched_blocks() -> None:
    layout = LAYOUTS["mlp"]
    torch.manual_seed(0)
    m, x = bind({"*.weight": maps.Coupling()}, layout), point("", layout)
    y = m.forward(x)
    assert torch.equal(y["0.bias"], x["0.bias"]) and not torch.equal(y["2.weight"], x["2.weight"])


def test_generator() -> None:
    """Draws are reproducible, the same in every default dtype, and different for each block."""
    layout = Layout({"a": (5,), "b": (5,)})
    for recipe in (maps.Affine, maps.Householder, maps.Orthogonal, maps.Coupling, maps.Permutation):
        made = [bind(recipe(generator=torch.Generator().manual_seed(3)), layout) for _ in range(2)]
        x = point("", layout)
        first, second = (layout.ravel(each.forward(x)) for each in made)
        assert torch.equal(first, second)
        pickle.dumps(made[0])
    blocks = bind(maps.Householder(generator=torch.Generator().manual_seed(3)), layout)
    same = blocks.forward({"a": torch.arange(5.0), "b": torch.arange(5.0)})
    assert not torch.equal(same["a"], same["b"])


@pytest.mark.parametrize("name", ["scale learnable", "affine learnable", "layers learnable", "householder all"])
def test_learnable(name: str) -> None:
    layout = LAYOUTS["mlp"]
    torch.manual_seed(0)
    m, x = bind(RECIPES[name](), layout), point(name, layout)
    assert m.learnable
    y = m.forward(x)
    target = layout.ravel(m.push_inverse(x, y, x)).sin().sum() + layout.ravel(y).sin().sum() + m.log_abs_det(x, y)
    grads = torch.autograd.grad(target, list(m.parameters()))
    assert all(bool(each.isfinite().all()) and bool((each != 0).any()) for each in grads)


def test_learnable_coupling_moves_with_its_parameters() -> None:
    layout = LAYOUTS["mlp"]
    torch.manual_seed(0)
    m, x = bind(maps.Coupling(learnable=True), layout), point("", layout)
    y = m.forward(x)
    loss = layout.ravel(y).square().sum() + m.log_abs_det(x, y)
    grads = torch.autograd.grad(loss, list(m.parameters()))
    assert all(bool((each != 0).any()) for each in grads)
    with torch.no_grad():
        for parameter in m.parameters():
            parameter += 0.1
    assert not torch.equal(layout.ravel(m.forward(x)), layout.ravel(y))
    close(layout.ravel(m.invert(m.forward(x))), layout.ravel(x))


@pytest.mark.parametrize("name", RECIPES)
def test_numbers_survive(name: str) -> None:
    """.to(dtype) and back keeps the buffers exact; copies and pickles are the same map."""
    layout = LAYOUTS["mlp"]
    m, x = make(name, layout), point(name, layout)
    y = layout.ravel(m.forward(x))
    m.forward({key: value.float() for key, value in x.items()})
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert torch.equal(layout.ravel(other.forward(x)), y)
        close(layout.ravel(other.invert(other.forward(x))), layout.ravel(x))
    if not m.learnable:
        m.to(torch.float32).to(torch.float16).double()
        assert torch.equal(layout.ravel(m.forward(x)), y)


def test_casts_are_remembered_and_forgotten() -> None:
    m = bind(maps.Scale(torch.tensor([2.0, 3.0])), Layout({"x": (2,)}))
    x = {"x": torch.ones(2)}
    with torch.inference_mode():
        m.forward(x)  # a cast made here must not be kept: autograd could not save it
    leaf = x["x"].clone().requires_grad_()
    m.forward({"x": leaf})["x"].sum().backward()
    assert leaf.grad is not None and torch.equal(leaf.grad, torch.tensor([2.0, 3.0]))
    torch.func.grad(lambda v: m.forward({"x": v})["x"].sum())(x["x"])
    for buffer in m.buffers():
        buffer.mul_(2)
    assert torch.equal(m.forward(x)["x"], torch.tensor([4.0, 6.0]))


def test_layer_affine_keeps_kronecker_structure() -> None:
    q, p = torch.tensor([[2.0, 1.0], [0.0, 1.0]]).double(), torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double()
    layout = Layout({"l.weight": (2, 2), "l.bias": (2,)})
    m = bind(maps.Affine(left=q, right=p), layout)
    x = point("", layout)
    y = m.forward(x)
    close(y["l.weight"], q @ x["l.weight"] @ p)
    close(y["l.bias"], q @ x["l.bias"])
    part = next(each for each in m.modules() if isinstance(each, maps.LayerAffine))
    assert part.factors("l.bias")[1] is None
    left, right = part.factors("l.weight")
    assert left is not None and right is not None and torch.equal(left, q) and torch.equal(right, p)


@pytest.mark.parametrize("convolutional", [False, True])
def test_rescale_is_a_symmetry_of_relu(convolutional: bool) -> None:
    torch.manual_seed(0)
    nn = torch.nn
    if convolutional:
        net = nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Conv2d(3, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
        inputs = torch.randn(5, 1, 4, 4).double()
    else:
        net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
        inputs = torch.randn(5, 4).double()
    net = net.double()
    theta = {name: parameter.detach() for name, parameter in net.named_parameters()}
    m = bind(maps.Rescale(), Layout({name: block.shape for name, block in theta.items()}))
    psi = m.forward(theta)
    assert not any(torch.equal(psi[name], theta[name]) for name in theta if name.endswith("weight"))
    close(torch.func.functional_call(net, psi, (inputs,)), net(inputs).detach(), 1e-13)


def test_coupling_mixes_across_blocks_and_scales() -> None:
    layout = LAYOUTS["mlp"]
    jacobian = dense(make("coupling", layout), layout, point("", layout))
    where = layout.offsets()
    for row in layout:
        for column in layout:
            assert bool((jacobian[where[row], where[column]] != 0).any())
    assert float(torch.linalg.cond(jacobian)) < 30
    big = Layout({"0.weight": (300, 400), "0.bias": (300,)})
    torch.manual_seed(0)
    m = bind(maps.Coupling(), big)
    x = {name: block / 20 for name, block in direction(big, 0).items()}
    y = m.forward(x)
    close(big.ravel(m.invert(y)), big.ravel(x), 1e-12)
    moved = float((big.ravel(y) - big.ravel(x)).norm() / big.ravel(x).norm())
    assert 0.05 < moved < 1


@pytest.mark.parametrize("swap", [False, True])
def test_coupling_split_by_names(swap: bool) -> None:
    layout = LAYOUTS["mlp"]
    torch.manual_seed(0)
    m, x = bind(maps.Coupling(split=["0.*"], swap=swap, layers=1), layout), point("", layout)
    y = m.forward(x)
    kept = {name for name in layout if torch.equal(x[name], y[name])}
    assert kept == ({"2.weight", "2.bias"} if swap else {"0.weight", "0.bias"})
    assert bool(m.log_abs_det(x, y) != 0)


def test_affine_by_default_takes_a_small_network() -> None:
    layout = Layout({"0.weight": (20, 30), "0.bias": (20,), "1.weight": (10, 20), "1.bias": (10,)})
    torch.manual_seed(0)
    m, x = bind(maps.Affine(), layout), direction(layout, 0)
    y = m.forward(x)
    close(layout.ravel(m.invert(y)), layout.ravel(x), 1e-13)
    shifted = bind(maps.Affine(shift=2.0), layout).forward(x)
    assert torch.equal(shifted["1.bias"], x["1.bias"] + 2)


@pytest.mark.parametrize("name", ["softplus", "exp", "log", "asinh", "sinh", "tanh", "atanh", "power", "power -1/2"])
def test_derivatives_at_the_tails(name: str) -> None:
    """The derivative and its logarithm in float64 against the same map in extended range by exact identities."""
    m = make(name, XY)
    large = {
        "softplus": 600.0,
        "exp": 600.0,
        "log": 1e300,
        "asinh": 1e150,
        "sinh": 300.0,
        "tanh": 15.0,
        "atanh": 1 - 1e-15,
    }
    ends = [large.get(name, 1e60), (1 if name == "log" else -1) * large.get(name, 1e60) ** (-1 if name == "log" else 1)]
    x = {"x": torch.tensor(ends, dtype=torch.float64)}
    assert m.outside_domain(x) is None
    y, one = m.forward(x), {"x": torch.ones(2, dtype=torch.float64)}
    slope = m.push(x, y, one)["x"]
    assert bool(slope.isfinite().all()) and bool((slope != 0).all())
    close(m.push_inverse(x, y, {"x": slope})["x"], one["x"], 1e-14)
    assert float(m.log_abs_det(x, y)) == pytest.approx(float(slope.abs().log().sum()), rel=1e-12, abs=1e-12)


def test_derivatives_are_smooth_at_zero() -> None:
    """Zero is where biases start: no absolute value may break a second derivative there."""
    x = torch.zeros((), dtype=torch.float64)
    for recipe, second in ((maps.Tanh(), -2.0), (maps.Asinh(), -1.0), (maps.Sinh(), 1.0), (maps.Softplus(), -0.25)):
        m = bind(recipe, Layout({"x": ()}))

        def volume(v: Tensor, m: Diffeomorphism = m) -> Tensor:
            return m.log_abs_det({"x": v}, m.forward({"x": v}))

        assert float(torch.func.grad(torch.func.grad(volume))(x)) == pytest.approx(second)


def test_softplus_is_exact_where_torch_is_not() -> None:
    layout = Layout({"x": (3,)})
    m = bind(maps.Softplus(), layout)
    x = torch.tensor([-700.0, 25.0, 0.0], dtype=torch.float64)
    y = m.forward({"x": x})["x"]
    expected = torch.tensor([9.8596765437597708e-305, 25.000000000013887944, 0.69314718055994530942], dtype=torch.float64)
    assert torch.allclose(y, expected, rtol=1e-15, atol=0)
    single = torch.tensor(-60.0)
    second = torch.func.jacfwd(torch.func.jacrev(lambda v: bind(maps.Softplus(), Layout({"v": ()})).forward({"v": v})["v"]))
    assert bool(torch.as_tensor(second(single)).isfinite())


def test_unbound_recipe_says_so() -> None:
    with pytest.raises(GeometryError, match="not bound to blocks yet"):
        maps.Coupling().forward({"x": torch.ones(2)})


def test_polar_remembers_norms_of_the_same_point_only() -> None:
    layout = Layout({"w": (3, 4)})
    m = bind(maps.Polar(), layout)
    y = m.forward({"w": torch.randn(3, 4)})
    x, w = m.invert(y), {"w": torch.randn(3, 4)}
    expected = m.pull_inverse({"w": x["w"].clone()}, y, w)["w"]  # another tensor: nothing is remembered
    assert torch.allclose(m.pull_inverse(x, y, w)["w"], expected, rtol=1e-12)
    x["w"].mul_(2.0)
    y = m.forward({"w": x["w"].clone()})
    assert torch.allclose(m.pull_inverse(x, y, w)["w"], m.pull_inverse({"w": x["w"].clone()}, y, w)["w"], rtol=1e-12)
    z = m.invert(y)
    z["w"].requires_grad_()
    product = m.pull_inverse(z, m.forward(z), w)["w"].sum()
    (slope,) = torch.autograd.grad(product, z["w"])
    plain = torch.func.grad(lambda t: m.pull_inverse({"w": t}, m.forward({"w": t}), w)["w"].sum())
    assert torch.allclose(slope, plain(z["w"].detach()), rtol=1e-9)
    assert copy.deepcopy(m) is not m
    assert isinstance(pickle.loads(pickle.dumps(m)), type(m))
