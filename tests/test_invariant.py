"""optim.Invariant: bit for bit the same trajectory in every chart, for every optimizer of torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook

import geoad
from geoad import maps
from geoad.errors import ChartDomainError, GeometryError
from geoad.optim import Invariant

Recipe = Callable[[torch.Generator], Any]

RECIPES: dict[str, Recipe] = {
    "scale": lambda g: maps.Scale(3.0),
    "asinh": lambda g: maps.Asinh(),
    "layer affine": lambda g: maps.LayerAffine(generator=g),
    "affine": lambda g: maps.Affine(generator=g),
    "householder": lambda g: {"*.weight": maps.Householder(generator=g)},
    "polar": lambda g: {"*.weight": maps.Polar(kind="stereographic")},
    "coupling": lambda g: maps.Coupling(generator=g),
    "compose": lambda g: maps.Compose(maps.Asinh(), maps.LayerAffine(generator=g), {"0.*": maps.Scale(0.5)}),
    "learnable": lambda g: maps.Scale(2.0, learnable=True),
    "learnable coupling": lambda g: maps.Coupling(generator=g, learnable=True),
}


class Net(nn.Sequential):
    """A net with dead inputs, a parameter that is never used and a frozen one."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
        self.unused = nn.Parameter(torch.randn(3))
        self.frozen = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * self.frozen[:3]


def data(n: int = 16) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    x = torch.randn(n, 5, generator=g)
    x[:, 1] = 0.0  # a dead pixel
    return x, torch.randint(3, (n,), generator=g)


def make(recipe: Recipe | None = None, *, freeze: bool = True) -> geoad.GeoModule:
    torch.manual_seed(3)
    net = Net()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.4)
    geo = geoad.GeoModule(net)
    if freeze:
        net.frozen.requires_grad_(False)
    if recipe is not None:
        geo.to(geo.reference.reparametrize(recipe(torch.Generator().manual_seed(1)), name="psi"))
    return geo


def backward(geo: geoad.GeoModule, step: int = 0) -> Tensor:
    x, y = data()
    loss = F.cross_entropy(geo(x[step % 4 :]), y[step % 4 :])
    loss.backward()
    return loss


def same(a: geoad.GeoModule, b: geoad.GeoModule) -> bool:
    x = data()[0]
    ours, theirs = a.stored_parameters(), b.stored_parameters()
    return all(torch.equal(ours[name], theirs[name]) for name in ours) and torch.equal(a(x), b(x))


def run(geo: geoad.GeoModule, optimizer: torch.optim.Optimizer, steps: int = 6) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        backward(geo, step)
        optimizer.step()


def plain(geo: geoad.GeoModule, optimizer: Callable[..., torch.optim.Optimizer], **options: Any) -> torch.optim.Optimizer:
    return optimizer(geo.wrapped.parameters(), **options)


OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "SGD momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    "SGD nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "foreach": True}),
    "SGD maximize": (torch.optim.SGD, {"lr": 0.1, "maximize": True}),
    "Adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "Adam eps": (torch.optim.Adam, {"lr": 0.01, "eps": 1e-16}),
    "Adam amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True, "foreach": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "AdamW maximize": (torch.optim.AdamW, {"lr": 0.01, "maximize": True, "foreach": False}),
    "AdamW fused": (torch.optim.AdamW, {"lr": 0.01, "fused": True}),
    "AdamW tensor lr": (torch.optim.AdamW, {"lr": torch.tensor(0.01), "foreach": False}),
    "Adamax": (torch.optim.Adamax, {"lr": 0.01, "weight_decay": 0.1}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.01, "decoupled_weight_decay": True, "weight_decay": 0.1}),
    "RAdam": (torch.optim.RAdam, {"lr": 0.01}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
    "Adadelta": (torch.optim.Adadelta, {"lr": 1.0}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.5}),
    "Rprop": (torch.optim.Rprop, {"lr": 0.01}),
    "ASGD": (torch.optim.ASGD, {"lr": 0.1}),
    "Adafactor": (torch.optim.Adafactor, {"lr": 0.05}),
}


def test_every_optimizer_of_torch_is_covered() -> None:
    known = {factory.__name__ for factory, _ in OPTIMIZERS.values()} | {"LBFGS", "Muon", "SparseAdam", "Optimizer"}
    exported = {name for name in vars(torch.optim) if isinstance(getattr(torch.optim, name), type)}
    assert exported == known


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_same_trajectory_bit_for_bit(name: str) -> None:
    factory, options = OPTIMIZERS[name]
    theta = make()
    run(theta, plain(theta, factory, **options))
    for recipe in (None, *RECIPES.values()):
        psi = make(recipe)
        run(psi, Invariant(psi, factory, **options))
        assert same(theta, psi)
        assert torch.equal(psi.stored_parameters()["frozen"], make().wrapped.frozen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", ["asinh", "scale", "coupling"])
def test_low_precision(dtype: torch.dtype, recipe: str) -> None:
    x, y = data()
    ends = []
    for each in (None, RECIPES[recipe]):
        geo = make().to(dtype)
        if each is not None:
            geo.to(geo.reference.reparametrize(each(torch.Generator().manual_seed(1))))
        optimizer = Invariant(geo, torch.optim.Rprop, lr=0.01)
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(geo(x.to(dtype)), y).backward()
            optimizer.step()
        ends.append(geo.stored_parameters())
    assert all(torch.equal(block, ends[1][name]) for name, block in ends[0].items())


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_lbfgs(recipe: str, line_search: str | None) -> None:
    ends = []
    for each in (None, RECIPES[recipe]):
        geo = make(each)
        optimizer = Invariant(geo, torch.optim.LBFGS, lr=0.5, max_iter=6, line_search_fn=line_search)

        def closure(geo: geoad.GeoModule = geo, optimizer: Invariant = optimizer) -> Tensor:
            optimizer.zero_grad()
            return backward(geo)

        losses = [optimizer.step(closure).detach() for _ in range(3)]
        ends.append((geo, losses))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_muon_on_matrices_and_another_rule_for_the_rest() -> None:
    ends = []
    for each in (None, RECIPES["coupling"], RECIPES["polar"]):
        geo = make(each)
        first = Invariant(geo, torch.optim.Muon, params="*.weight", lr=0.02)
        second = Invariant(geo, torch.optim.AdamW, params=["*.bias", "unused", "frozen"], lr=0.01)
        for step in range(5):
            first.zero_grad()
            second.zero_grad()
            backward(geo, step)
            first.step()
            second.step()
        ends.append(geo)
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])


def test_sparse_adam_is_refused() -> None:
    with pytest.raises(GeometryError, match="SparseAdam"):
        Invariant(make(), torch.optim.SparseAdam)


@pytest.mark.parametrize("recipe", ["asinh", "coupling"])
def test_groups_by_pattern(recipe: str) -> None:
    groups = [{"params": "*.bias", "weight_decay": 0.0, "lr": 0.05}, {"params": ["0.*", "unused"], "weight_decay": 0.3}]
    ends = []
    for each in (None, RECIPES[recipe]):
        geo = make(each)
        optimizer = Invariant(geo, torch.optim.AdamW, groups=groups, lr=0.01)
        assert [len(group["params"]) for group in optimizer.param_groups] == [3, 2, 3]
        assert optimizer.param_groups[0]["param_names"] == ["0.bias", "2.bias", "4.bias"]
        run(geo, optimizer)
        ends.append(geo)
    assert same(*ends)
    assert groups[0] == {"params": "*.bias", "weight_decay": 0.0, "lr": 0.05}


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    "OneCycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=12),
    "CosineWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str) -> None:
    ends = []
    for each in (None, RECIPES["layer affine"]):
        geo = make(each)
        inner = plain(geo, torch.optim.SGD, lr=0.1, momentum=0.9) if each is None else None
        optimizer = inner or Invariant(geo, torch.optim.SGD, lr=0.1, momentum=0.9)
        scheduler = SCHEDULERS[name](optimizer)
        for step in range(8):
            optimizer.zero_grad()
            loss = backward(geo, step)
            optimizer.step()
            scheduler.step(*([loss.detach()] if name == "ReduceLROnPlateau" else []))
        ends.append((geo, optimizer.param_groups[0]["lr"]))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_save_in_one_chart_resume_in_another(tmp_path: Any) -> None:
    whole = make()
    optimizer = Invariant(whole, torch.optim.AdamW, lr=0.01, amsgrad=True)
    run(whole, optimizer, 3)
    run(whole, optimizer, 3)

    first = make(RECIPES["coupling"])
    optimizer = Invariant(first, torch.optim.AdamW, lr=0.01, amsgrad=True)
    run(first, optimizer, 3)
    torch.save({"geo": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for each in (None, RECIPES["polar"], RECIPES["coupling"]):
        second = make(each)
        optimizer = Invariant(second, torch.optim.AdamW, lr=0.5)
        second.load_state_dict(saved["geo"])
        optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))  # torch keeps the tensors, it does not copy them
        run(second, optimizer, 3)
        assert same(whole, second)


@pytest.mark.parametrize("pending", [False, True])
def test_the_chart_may_change_in_mid_training(pending: bool) -> None:
    still, moving = make(), make()
    charts = [
        moving.reference.reparametrize(RECIPES[n](torch.Generator().manual_seed(2))).target for n in ("polar", "coupling")
    ]
    charts += [moving.reference, charts[0].reparametrize(maps.Scale(2.0)).target]
    optimizers = [Invariant(geo, torch.optim.Rprop, lr=0.01) for geo in (still, moving)]
    for step in range(10):
        for geo, optimizer in zip((still, moving), optimizers, strict=True):
            optimizer.zero_grad()
            backward(geo, step)
        moving.to(charts[step % len(charts)])  # the gradients move along
        if not pending:
            optimizers[1].zero_grad()
            backward(moving, step)
        for optimizer in optimizers:
            optimizer.step()
        assert same(still, moving)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("to_none", [True, False])
def test_accumulation_and_zero_grad(recipe: str, to_none: bool) -> None:
    ends = []
    for each in (None, RECIPES[recipe]):
        geo = make(each)
        optimizer = Invariant(geo, torch.optim.AdamW, lr=0.01, eps=1e-16, weight_decay=0.2)
        for step in range(4):
            optimizer.zero_grad(set_to_none=to_none)
            for part in range(3):
                backward(geo, step + part)
            optimizer.step()
        geo.zero_grad(set_to_none=to_none)
        backward(geo)
        optimizer.step()
        optimizer.step()  # the same gradient again
        backward(geo)  # on top of the old one
        optimizer.step()
        ends.append(geo)
    assert same(*ends)


def test_several_forwards_in_one_graph_and_several_backwards() -> None:
    x, y = data()
    ends = []
    for each in (None, RECIPES["layer affine"], RECIPES["learnable"]):
        geo = make(each)
        optimizer = Invariant(geo, torch.optim.Adagrad, lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            outputs = [geo(x[i : i + 4]) for i in range(0, 16, 4)]
            losses = [F.cross_entropy(out, y[4 * i : 4 * i + 4]) for i, out in enumerate(outputs)]
            (losses[0] + losses[1] * losses[2]).backward(retain_graph=True)
            torch.autograd.grad(
                losses[1], [p for p in geo.parameters() if p.requires_grad], allow_unused=True, retain_graph=True
            )
            (losses[3] + losses[0]).backward()
            optimizer.step()
        ends.append(geo)
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])


def test_dropout_with_a_seed_and_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    x, y = data()
    for reentrant in (True, False):
        ends = []
        for recipe in (None, maps.Asinh(), maps.Coupling(generator=torch.Generator().manual_seed(0))):
            torch.manual_seed(0)
            geo = geoad.GeoModule(nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3)))
            if recipe is not None:
                geo.to(geo.reference.reparametrize(recipe))
            optimizer = Invariant(geo, torch.optim.Adam, lr=0.01)
            torch.manual_seed(1)
            for _ in range(4):
                optimizer.zero_grad()
                out = checkpoint(geo, x.clone().requires_grad_(), use_reentrant=reentrant)
                F.cross_entropy(out, y).backward()
                optimizer.step()
            ends.append(geo.stored_parameters())
        for other in ends[1:]:
            assert all(torch.equal(block, other[name]) for name, block in ends[0].items())


def test_shared_weights_and_embeddings() -> None:
    class Tied(nn.Module):
        def __init__(self, sparse: bool) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 4, sparse=sparse)
            self.block = nn.Linear(4, 4)
            self.head = nn.Linear(4, 7, bias=False)
            if not sparse:
                self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            h = self.embed(tokens)
            return self.head(torch.tanh(self.block(torch.tanh(self.block(h)))))

    tokens = torch.randint(7, (6, 3), generator=torch.Generator().manual_seed(0))
    for sparse, factory in ((False, torch.optim.AdamW), (True, torch.optim.SGD)):
        ends = []
        for recipe in (None, maps.LayerAffine(generator=torch.Generator().manual_seed(4)), maps.Asinh()):
            torch.manual_seed(0)
            geo = geoad.GeoModule(Tied(sparse))
            if recipe is not None:
                geo.to(geo.reference.reparametrize(recipe))
            optimizer = Invariant(geo, factory, lr=0.05)
            for _ in range(4):
                optimizer.zero_grad()
                for _ in range(2):
                    (F.cross_entropy(geo(tokens).flatten(0, 1), tokens.flatten()) + geo(tokens).square().mean()).backward()
                optimizer.step()
            ends.append(geo.stored_parameters())
        for other in ends[1:]:
            assert all(torch.equal(block, other[name]) for name, block in ends[0].items())


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_edited_gradient_moves_by_its_law(recipe: str) -> None:
    def edited(geo: geoad.GeoModule) -> dict[str, Tensor]:
        optimizer = Invariant(geo, torch.optim.SGD, lr=0.1, momentum=0.9)
        for step in range(3):
            optimizer.zero_grad()
            backward(geo, step)
            total = geo.grad
            for name, parameter in geo.named_parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(0.25)
                    assert torch.equal(parameter.grad, 0.25 * total.components[name])
            optimizer.step()
        return geo.stored_parameters()

    ours, theirs = edited(make(freeze=False)), edited(make(RECIPES[recipe], freeze=False))
    for name, block in ours.items():
        torch.testing.assert_close(block, theirs[name], rtol=1e-12, atol=1e-12)


def test_clip_grad_norm_of_torch_takes_the_fallback() -> None:
    geo, twin = make(RECIPES["coupling"], freeze=False), make(RECIPES["coupling"], freeze=False)
    start = geo.point()
    backward(geo)
    nn.utils.clip_grad_norm_(geo.parameters(), 1e-2)
    slope = geo.grad.to(geo.reference)  # at the point before the step
    optimizer = Invariant(geo, torch.optim.SGD, lr=1.0)
    optimizer.step()
    backward(twin)
    before = start.to(geo.reference).components
    for name, parameter in geo.stored_parameters().items():
        if name != "frozen":
            torch.testing.assert_close(parameter.detach(), before[name] - slope.components[name], rtol=1e-12, atol=1e-12)
    assert slope.ravel().norm() < 0.9 * twin.grad.to(twin.reference).ravel().norm()


def test_a_penalty_on_the_coordinates_themselves() -> None:
    geo = make(RECIPES["asinh"])
    optimizer = Invariant(geo, torch.optim.SGD, lr=0.1)
    start = {name: p.detach().clone() for name, p in geo.stored_parameters().items()}
    x, y = data()
    (F.cross_entropy(geo(x), y) + 0.5 * sum(p.square().sum() for p in geo.parameters())).backward()
    optimizer.step()

    leaves = {name: p.clone().requires_grad_() for name, p in start.items()}
    loss = F.cross_entropy(torch.func.functional_call(make().wrapped, leaves, (x,)), y)
    slopes = torch.autograd.grad(loss + 0.5 * sum(p.asinh().square().sum() for p in leaves.values()), list(leaves.values()))
    for (name, before), slope in zip(leaves.items(), slopes, strict=True):
        if name != "frozen":
            torch.testing.assert_close(geo.stored_parameters()[name], before - 0.1 * slope, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["SGD momentum", "AdamW", "Adam amsgrad", "NAdam", "Rprop", "ASGD", "Adagrad"])
def test_leaving_the_domain_changes_nothing(name: str) -> None:
    factory, options = OPTIMIZERS[name]
    net = nn.Linear(3, 1, bias=False)
    nn.init.constant_(net.weight, 0.5)
    geo = geoad.GeoModule(net)
    geo.to(geo.reference.reparametrize(maps.Log()))
    optimizer = Invariant(geo, factory, **{**options, "lr": 0.01})
    for _ in range(2):
        optimizer.zero_grad()
        geo(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] = 1e6
    for state in optimizer.state.values():  # some keep step sizes of their own
        if "step_size" in state:
            state["step_size"].fill_(49.0)
            group["step_sizes"] = (1e-6, 1e6)
        if "eta" in state:
            state["eta"].fill_(1e6)
    optimizer.zero_grad()
    geo(torch.ones(2, 3)).sum().backward()
    psi = {key: (value.clone(), value.grad.clone()) for key, value in geo.named_parameters()}
    theta = {key: value.detach().clone() for key, value in geo.stored_parameters().items()}
    state = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ChartDomainError, match=r"nothing was changed.*geo\.to\(geo\.reference\)"):
        optimizer.step()
    for key, (value, slope) in psi.items():
        now = dict(geo.named_parameters())[key]
        assert torch.equal(now, value)
        assert torch.equal(now.grad, slope)
    assert all(torch.equal(value, geo.stored_parameters()[key]) for key, value in theta.items())
    assert all(parameter.grad is None for parameter in geo.stored_parameters().values())
    _assert_equal_nested(optimizer.state_dict(), state)
    assert optimizer.state is optimizer.inner.state


def _assert_equal_nested(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            _assert_equal_nested(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            _assert_equal_nested(x, y)
    else:
        assert a == b


def test_a_closure_that_leaves_the_domain_or_fails() -> None:
    net = nn.Linear(3, 1, bias=False)
    nn.init.constant_(net.weight, 0.5)
    geo = geoad.GeoModule(net)
    geo.to(geo.reference.reparametrize(maps.Log()))
    optimizer = Invariant(geo, torch.optim.LBFGS, lr=100.0)
    before = geo(torch.eye(3)).detach()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = geo(torch.ones(2, 3)).sum()
        loss.backward()
        return loss

    with pytest.raises(ChartDomainError, match="nothing was changed"):
        optimizer.step(closure)
    assert torch.equal(geo(torch.eye(3)), before)
    assert optimizer.state_dict()["state"] == {}

    calls = []

    def failing() -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("my own mistake")
        return closure()

    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    with pytest.raises(RuntimeError, match="my own mistake"):
        optimizer.step(failing)
    assert torch.equal(geo(torch.eye(3)), before)


def test_nan_gradients_do_the_same_as_in_the_reference_chart() -> None:
    ends = []
    for recipe in (None, RECIPES["scale"]):
        geo = make(recipe)
        optimizer = Invariant(geo, torch.optim.SGD, lr=0.1)
        x, y = data()
        x = x.clone()
        x[0, 0] = float("nan")
        F.cross_entropy(geo(x), y).backward()
        optimizer.step()
        optimizer.step()
        ends.append(geo.stored_parameters())
    for name, block in ends[0].items():
        assert torch.equal(block.view(torch.int64), ends[1][name].view(torch.int64))


def test_hooks_run_once_a_step() -> None:
    calls: list[str] = []
    for recipe in (None, RECIPES["asinh"]):
        calls.clear()
        geo = make(recipe)
        optimizer = Invariant(geo, torch.optim.SGD, lr=0.1)
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
        optimizer.register_step_post_hook(lambda *_: calls.append("post"))
        handle = register_optimizer_step_post_hook(lambda *_: calls.append("global"))
        backward(geo)
        optimizer.step()
        handle.remove()
        assert calls == ["pre", "post", "global"]


def test_copies_and_pickles_carry_their_module(tmp_path: Any) -> None:
    geo, twin = make(RECIPES["coupling"]), make()
    optimizer = Invariant(geo, torch.optim.AdamW, lr=0.01)
    run(geo, optimizer, 2)
    for copied in (copy.deepcopy(optimizer), _through_a_file(optimizer, tmp_path / "o.pt")):
        assert copied.geo is not geo
        assert same(copied.geo, geo)
        before = {name: p.detach().clone() for name, p in geo.stored_parameters().items()}
        run(copied.geo, copied, 2)
        assert all(torch.equal(before[name], p) for name, p in geo.stored_parameters().items())
        twin = make()
        run(twin, reference := Invariant(twin, torch.optim.AdamW, lr=0.01), 2)
        run(twin, reference, 2)
        assert same(twin, copied.geo)


def _through_a_file(thing: Any, path: Any) -> Any:
    torch.save(thing, path)
    return torch.load(path, weights_only=False)


def test_misuse_is_refused() -> None:
    geo = make()
    with pytest.raises(GeometryError, match="GeoModule"):
        Invariant(geo.wrapped, torch.optim.SGD, lr=0.1)  # type: ignore[arg-type]
    with pytest.raises(GeometryError, match="optimizer class, found SGD"):
        Invariant(geo, torch.optim.SGD(geo.parameters(), lr=0.1))  # type: ignore[arg-type]
    with pytest.raises(GeometryError, match="matches no parameter"):
        Invariant(geo, torch.optim.SGD, groups=[{"params": "nothing.*"}], lr=0.1)
    with pytest.raises(GeometryError, match="matches no parameter"):
        Invariant(geo, torch.optim.SGD, groups=[{"params": "*.bias"}, {"params": "0.bias"}], lr=0.1)
    with pytest.raises(GeometryError, match="does not say which parameters"):
        Invariant(geo, torch.optim.SGD, groups=[{"lr": 0.1}])
    with pytest.raises(GeometryError, match="name patterns"):
        Invariant(geo, torch.optim.SGD, groups=[{"params": list(geo.parameters())}], lr=0.1)
    optimizer = Invariant(geo, torch.optim.SGD, lr=0.1)
    with pytest.raises(GeometryError, match="at construction"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert "SGD" in repr(optimizer)
    geo.load_state_dict({name: p.clone() for name, p in geo.state_dict().items()}, assign=True)
    with pytest.raises(GeometryError, match="Make the optimizer anew"):
        optimizer.step()
    with pytest.raises(ValueError, match="learning rate"):
        Invariant(geo, torch.optim.SGD, lr=-1.0)


def test_a_step_without_gradients_does_nothing() -> None:
    geo, twin = make(RECIPES["asinh"]), make()
    Invariant(geo, torch.optim.AdamW, lr=0.1).step()
    assert same(geo, twin)


def test_the_map_can_learn_beside() -> None:
    geo = make()
    phi = geo.reference.reparametrize(maps.Scale(2.0, learnable=True))
    geo.to(phi)
    inner = Invariant(geo, torch.optim.SGD, lr=0.05)
    outer = torch.optim.SGD(phi.parameters(), lr=0.01)
    x, y = data()
    losses = []
    for _ in range(5):
        inner.zero_grad()
        outer.zero_grad()
        loss = F.cross_entropy(geo(x), y)
        loss.backward()
        assert sum(parameter.grad is not None for parameter in phi.parameters()) >= 6
        inner.step()
        outer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
