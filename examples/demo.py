"""The same network in four charts: what plain autodiff says in each of them, beside what geoad says.

Trains a small network on scikit-learn's handwritten digits and prints a table *quantity × chart*. In the naive columns every
number is what ``torch.func`` gives in the coordinates of that chart; they disagree, although the network is the same function.
In the geoad columns every number is computed from the same coordinates, and they agree. Also draws gradient descent in two
charts, naive and invariant (Kristiadi et al. 2023, Fig. 2a).

    python examples/demo.py [--out DIR] [--quick]

The exit status is 1 if a geoad row agrees to fewer than 8 digits, or a naive row agrees although it must not.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import geoad
from geoad.metrics import Euclidean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REQUIRED_DIGITS = 8.0
"""The geoad columns must agree at least this well,"""
VISIBLE = 1e-3
"""and the naive ones must differ by more than this."""


# %% the network, the data, and the two points at which everything is compared


@dataclass(frozen=True)
class Setting:
    """What is trained, and how."""

    samples: int = 1000
    hidden: int = 8
    epochs: int = 80
    polish: int = 400
    prior: float = 3e-3
    seed: int = 0

    @property
    def damping(self) -> float:
        """λ of F + λ G: the curvature of the prior."""
        return self.prior


QUICK = Setting(samples=200, hidden=2, epochs=30, polish=150, prior=1e-2)


@dataclass
class Trained:
    """The network as a manifold, its objective, a point of the training and the minimum."""

    setting: Setting
    net: nn.Module
    geo: geoad.GeoModule
    data: tuple[Tensor, Tensor]
    objective: geoad.ScalarField
    early: geoad.Point
    minimum: geoad.Point
    story: list[str] = field(default_factory=list)


def digits(setting: Setting) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test data: 8 × 8 images in [0, 1] as 64 numbers, and the labels."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(setting.seed))
    x = torch.as_tensor(bunch.data, dtype=torch.float64)[order] / 16
    y = torch.as_tensor(bunch.target)[order]
    n = setting.samples
    return (x[:n], y[:n]), (x[1297:], y[1297:])


def log_prior(net: nn.Module) -> Tensor:
    """½|θ|², the penalty of weight decay: a function of the network, whatever its coordinates."""
    return 0.5 * torch.stack([p.square().sum() for p in net.parameters()]).sum()


def train(setting: Setting) -> Trained:
    """AdamW in curved coordinates for a while, L-BFGS in the reference chart, then Newton's method down to rounding errors."""
    torch.manual_seed(setting.seed)
    data, test = digits(setting)
    x, y = data
    net = nn.Sequential(nn.Linear(64, setting.hidden), nn.Tanh(), nn.Linear(setting.hidden, 10)).to(torch.float64)
    geo = geoad.GeoModule(net)
    theta = geo.reference
    loss = geo.loss(F.cross_entropy, data)
    objective = loss + setting.prior * geo.scalar_field(log_prior)
    trained = Trained(setting, net, geo, data, objective, geo.point(), geo.point())
    trained.story.append(
        f"network 64-{setting.hidden}-10 (tanh), {theta.dim} parameters, float64; {len(x)} training digits; "
        f"objective = cross entropy + {setting.prior:g} · ½|θ|²"
    )

    geo.to(theta.reparametrize(geoad.maps.Asinh(), name="asinh θ").target)  # any chart: the trajectory is the same, bit for bit
    optimizer = geoad.optim.Invariant(geo, torch.optim.AdamW, lr=2e-2, weight_decay=setting.prior)
    for _ in range(setting.epochs):
        optimizer.zero_grad()
        F.cross_entropy(geo(x), y).backward()
        optimizer.step()
    trained.early = geo.point()
    trained.story.append(_progress(trained, trained.early, f"{setting.epochs} steps of AdamW in {geo.chart.name}"))

    geo.to(theta)
    polish(trained)
    newton(trained)
    right = geo(test[0]).argmax(1) == test[1]
    trained.story.append(f"test accuracy at the minimum: {right.double().mean():.1%} of {len(right)} digits")
    return trained


def polish(trained: Trained) -> None:
    """L-BFGS on the objective, in the reference chart."""
    geo, (x, y) = trained.geo, trained.data
    optimizer = geoad.optim.Invariant(
        geo,
        torch.optim.LBFGS,
        max_iter=trained.setting.polish,
        history_size=40,
        tolerance_grad=1e-8,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(geo(x), y) + trained.setting.prior * log_prior(geo)
        value.backward()
        return value

    optimizer.step(closure)
    trained.story.append(_progress(trained, geo.point(), "then L-BFGS in θ"))


def newton(trained: Trained, steps: int = 40) -> None:
    """Newton's method with the damping of Levenberg; ends at a minimum, with a gradient of the size of rounding errors."""
    geo, objective = trained.geo, trained.objective
    p, damping, count = geo.point(), 0.0, 0
    while count < steps:
        slope = geoad.grad(objective)(p)
        if Euclidean(geo.reference)(p).norm(slope) < 1e-12:
            break
        form = geoad.hessian(objective)(p).materialise()
        lowest = geoad.eigh(form, metric=Euclidean(geo.reference)(p), k=1, which="smallest")[0]
        damping = max(damping / 10 if damping > 1e-8 else 0.0, -2 * float(lowest))
        count += 1
        while True:
            q = p.retract(form.solve(slope, damping=damping), -1.0)
            if objective(q) <= objective(p) + 1e-14:
                break
            damping = max(10 * damping, 1e-6)
        p = q
    trained.minimum = p
    with torch.no_grad():
        for name, parameter in geo.named_parameters():
            parameter.copy_(p.components[name])
    trained.story.append(_progress(trained, p, f"then {count} Newton steps"))


def _progress(trained: Trained, p: geoad.Point, what: str) -> str:
    value, slope = geoad.value_and_grad(trained.objective)(p)
    size = Euclidean(trained.geo.reference)(p).norm(slope)
    return f"{what}: objective {value:.8f}, ‖grad‖ = {size:.1e}"


# %% four charts


def four_charts(theta: geoad.Chart) -> list[geoad.Chart]:
    """θ itself, 2θ, an elementwise curved chart, and one that mixes all layers."""
    generator = torch.Generator().manual_seed(1)
    maps = geoad.maps
    recipes = {
        "2θ": maps.Scale(2.0),
        "asinh 5θ": maps.Compose(maps.Scale(5.0), maps.Asinh()),
        "coupling": maps.Coupling(strength=1.0, generator=generator),
    }
    return [theta, *(theta.reparametrize(recipe, name=name).target for name, recipe in recipes.items())]


# %% the rows of the table

STEPS = {"gradient descent": 1.0, "Newton": 0.1, "natural gradient": 0.5}
"""The three optimizers and their learning rates. (The Hessian is indefinite there: a whole Newton step leads far away.)"""


@dataclass
class Column:
    """The numbers of one column: quantities by name, and the logits after each step."""

    values: dict[str, float]
    logits: dict[str, Tensor]


def _spectrum(values: dict[str, float], name: str, trace: Tensor, largest: Tensor, logdet: Tensor) -> None:
    values[f"{name}: trace"] = float(trace)
    values[f"{name}: λmax"] = float(largest)
    values[f"{name}: logdet"] = float(logdet)


def naive(trained: Trained, chart: geoad.Chart) -> Column:
    """What plain autodiff computes in the coordinates ψ of a chart: f(ψ) = loss(functional_call(net, φ⁻¹(ψ)))."""
    x, y = trained.data
    net, prior, damping = trained.net, trained.setting.prior, trained.setting.damping
    unravel = chart.layout.unravel
    inverse: Callable[..., dict[str, Tensor]] = (lambda psi: psi) if chart.parent is None else chart.parent.map.invert

    def logits(psi: Tensor, inputs: Tensor = x) -> Tensor:
        return functional_call(net, inverse(unravel(psi)), (inputs,))

    def objective(psi: Tensor) -> Tensor:
        weights = inverse(unravel(psi))
        penalty = 0.5 * torch.stack([w.square().sum() for w in weights.values()]).sum()
        return F.cross_entropy(functional_call(net, weights, (x,)), y) + prior * penalty

    def damped_fisher(psi: Tensor) -> Tensor:
        per_sample = torch.func.vmap(torch.func.jacrev(lambda v, one: logits(v, one[None])[0]), (None, 0))
        total = damping * torch.eye(chart.dim, dtype=psi.dtype)
        for inputs in x.split(100):
            jacobian = per_sample(psi, inputs)
            p = logits(psi, inputs).softmax(-1)
            weighted = p[..., None] * (jacobian - torch.einsum("nc,ncd->nd", p, jacobian)[:, None])
            total = total + jacobian.flatten(0, 1).mT @ weighted.flatten(0, 1) / len(x)
        return total

    psi, values, after = trained.early.to(chart).ravel(), dict[str, float](), dict[str, Tensor]()
    slope, curved, fisher = torch.func.grad(objective)(psi), torch.func.hessian(objective)(psi), damped_fisher(psi)
    values["during training: loss + prior"] = float(objective(psi))
    values["during training: ‖grad‖"] = float(slope.norm())
    directions = (slope, torch.linalg.solve(curved, slope), torch.linalg.solve(fisher, slope))
    for (name, rate), direction in zip(STEPS.items(), directions, strict=True):
        values[f"loss + prior after {name}"] = float(objective(psi - rate * direction))
        after[name] = logits(psi - rate * direction)

    psi = trained.minimum.to(chart).ravel()
    values["minimum: loss + prior"] = float(objective(psi))
    for name, matrix in {"Hessian": torch.func.hessian(objective)(psi), "Fisher + λ": damped_fisher(psi)}.items():
        eigenvalues = torch.linalg.eigvalsh(matrix)
        _spectrum(values, name, matrix.trace(), eigenvalues[-1], torch.linalg.slogdet(matrix).logabsdet)
    return Column(values, after)


def invariant(trained: Trained, chart: geoad.Chart) -> Column:
    """The same quantities with geoad, from the same coordinates."""
    geo, objective = trained.geo, trained.objective
    theta, x = geo.reference, trained.data[0]
    metric = Euclidean(theta)
    fisher = geoad.curvature.Fisher(geo, trained.data, representation="dense") + trained.setting.damping * metric

    # the points are made afresh from the numbers: nothing but the coordinates in this chart is known
    p = chart.point(trained.early.to(chart).ravel().clone())
    values, after = dict[str, float](), dict[str, Tensor]()
    value, slope = geoad.value_and_grad(objective)(p)
    values["during training: loss + prior"] = float(value)
    values["during training: ‖grad‖"] = float(metric(p).norm(slope))
    directions = (
        geoad.riemannian_grad(objective, metric)(p),
        geoad.hessian(objective)(p).solve(slope),
        fisher(p).sharp(slope),
    )
    for (name, rate), direction in zip(STEPS.items(), directions, strict=True):
        q = p.retract(direction, -rate)
        values[f"loss + prior after {name}"] = float(objective(q))
        after[name] = geo.evaluate(q.to(theta).blocks, x)

    p = chart.point(trained.minimum.to(chart).ravel().clone())
    values["minimum: loss + prior"] = float(objective(p))
    here = metric(p)
    for name, form in {"Hessian": geoad.hessian(objective)(p).materialise(), "Fisher + λ": fisher(p)}.items():
        largest = geoad.eigh(form, metric=here, k=1)[0][0]
        _spectrum(values, name, here.trace(form), largest, form.logdet() - here.logdet())
    return Column(values, after)


# %% comparing the columns


@dataclass(frozen=True)
class Row:
    """One quantity in all charts."""

    name: str
    naive: list[float]
    geoad: list[float]
    scale: float | None = None
    """The rows of differences are compared with this size; the others with their own."""

    def spread(self, values: list[float]) -> float:
        """The largest relative disagreement."""
        if self.scale is not None:
            return max(map(abs, values)) / self.scale
        return (max(values) - min(values)) / max(map(abs, values))

    @property
    def digits(self) -> float:
        """To how many digits the geoad columns agree."""
        spread = self.spread(self.geoad)
        return math.nan if math.isnan(spread) else min(16.0, -math.log10(max(spread, 1e-16)))

    @property
    def must_differ(self) -> bool:
        """Whether the quantity depends on the chart when it is computed naively: everything but a value of the loss does."""
        return not self.name.endswith(": loss + prior")

    @property
    def passed(self) -> bool:
        """Whether geoad agrees and naive does not."""
        naive = self.spread(self.naive)
        return self.digits >= REQUIRED_DIGITS and (naive > VISIBLE if self.must_differ else naive < 10**-REQUIRED_DIGITS)


def compare(trained: Trained, charts: Sequence[geoad.Chart], report: Callable[[str], None] = lambda line: None) -> list[Row]:
    """All rows of the table."""
    columns: dict[str, list[Column]] = {"naive": [], "geoad": []}
    for chart in charts:
        for name, compute in (("naive", naive), ("geoad", invariant)):
            start = time.perf_counter()
            columns[name].append(compute(trained, chart))
            report(f"  {name} in {chart.name}: {time.perf_counter() - start:.1f} s")
    rows = [
        Row(name, *([column.values[name] for column in columns[kind]] for kind in ("naive", "geoad")))
        for name in columns["geoad"][0].values
    ]
    for name in STEPS:
        moved = {
            kind: [float((c.logits[name] - own[0].logits[name]).abs().max()) for c in own] for kind, own in columns.items()
        }
        size = float(columns["geoad"][0].logits[name].abs().max())
        rows.append(Row(f"Δ logits after {name}", moved["naive"], moved["geoad"], size))
    return rows


SECTIONS = (
    ("during training", "at a point of the training"),
    ("minimum", "at the minimum of loss + prior"),
    ("Hessian", None),
    ("Fisher + λ", None),
    ("loss + prior after", "loss + prior after one step from the point of the training"),
    ("Δ logits after", "the network after that step: largest difference of a logit to the step taken in θ"),
)
WIDTH = 10


def number(value: float) -> str:
    """As many digits as fit into a column."""
    if value == 0:
        return "0"
    if abs(value) < 1e-4 or abs(value) >= 1e8:
        return f"{value:.1e}"
    whole = len(f"{abs(value):.0f}") + (value < 0)
    return f"{value:.{max(0, WIDTH - 1 - whole)}f}"


def table(rows: Sequence[Row], charts: Sequence[geoad.Chart]) -> str:
    """Naive value beside geoad value, for each chart; 120 columns wide."""
    left, pair = 24, 2 * WIDTH + 3
    rule = "─" * left + ("┼" + "─" * pair) * len(charts)
    titles = ["θ" if chart.parent is None else f"ψ = {chart.name}" for chart in charts]
    lines = [
        " " * left + "".join(f"│{title:^{pair}}" for title in titles),
        " " * left + "".join(f"│ {'naive':>{WIDTH}} {'geoad':>{WIDTH}} " for _ in charts),
    ]
    for prefix, title in SECTIONS:
        if title is not None:
            lines += [rule, title]
        for row in rows:
            if not row.name.startswith(prefix):
                continue
            name = row.name if title is None else row.name.removeprefix(prefix).removeprefix(":").strip()
            pairs = zip(row.naive, row.geoad, strict=True)
            cells = "".join(f"│ {number(a):>{WIDTH}} {number(b):>{WIDTH}} " for a, b in pairs)
            lines.append(f"{'  ' + name:<{left}}{cells}")
    return "\n".join(line.rstrip() for line in lines)


def verdict(row: Row) -> str:
    """How far the naive columns are apart, and to how many digits those of geoad agree."""
    spread, same_sign = row.spread(row.naive), min(row.naive) * max(row.naive) > 0
    sizes = sorted(map(abs, row.naive))
    if not row.must_differ:
        apart = f"agrees to {min(16.0, -math.log10(max(spread, 1e-16))):.1f} digits (it must)"
    elif row.scale is not None:
        apart = f"differs by {spread:.2g} × the largest logit"
    elif same_sign and sizes[-1] > 2 * sizes[0]:
        apart = f"differs by a factor of {sizes[-1] / sizes[0]:.3g}"
    elif "logdet" in row.name:
        apart = f"differs by {max(row.naive) - min(row.naive):.1f}"
    else:
        apart = f"differs by {spread:.2g} × its size"
    return f"  {row.name:<38} naive: {apart:<36} geoad: agrees to {row.digits:.1f} digits{'' if row.passed else '  <- FAILED'}"


# %% the picture: gradient descent in two charts of the plane

LEARNING_RATE = 0.04
MARKS = [0, 2, 6, 11, 18, 29, 50, 90]
"""The numbers of steps at which the trajectories carry a mark."""


def valley(x: Tensor) -> Tensor:
    """A curved valley with its minimum at (0.9, 0.7)."""
    along = x[..., 0] - 0.9 + 0.4 * (x[..., 1] - 0.7)
    across = x[..., 1] - 0.7 - 0.45 * (x[..., 0].square() - 0.81)
    return 0.5 * along.square() + 1.2 * across.square()


def plane() -> tuple[geoad.Chart, geoad.Chart]:
    """The coordinates θ of the plane, and curved coordinates ψ = softplus(1.2 θ₁, 3 θ₂)."""
    theta = geoad.Chart({"x": (2,)}, name="θ")
    stretch = geoad.maps.Scale(torch.tensor([1.2, 3.0], dtype=torch.float64))
    return theta, theta.reparametrize(geoad.maps.Compose(stretch, geoad.maps.Softplus()), name="ψ").target


def descend_naively(loss: geoad.ScalarField, start: geoad.Point, steps: int) -> list[geoad.Point]:
    """Gradient descent as it is usually written: coordinates minus a multiple of the partial derivatives."""
    chart = start.chart
    slope = torch.func.grad(loss.function(chart))
    numbers = [start.components]
    for _ in range(steps):
        numbers.append(numbers[-1] - LEARNING_RATE * slope(numbers[-1]))
    return [chart.point(x) for x in numbers]


def descend(loss: geoad.ScalarField, start: geoad.Point, steps: int) -> list[geoad.Point]:
    """Gradient descent with geoad: from the point along the Riemannian gradient."""
    slope = geoad.riemannian_grad(loss)
    points = [start]
    for _ in range(steps):
        points.append(points[-1].retract(slope(points[-1]), -LEARNING_RATE))
    return points


def picture(path: Path, steps: int = 220) -> float:
    """Draw the trajectories; returns how far the two of geoad are apart."""
    from matplotlib.figure import Figure

    theta, psi = plane()
    loss = theta.scalar_field(valley)
    start = theta.point(torch.tensor([-1.1, 1.45], dtype=torch.float64))
    runs = {
        "naive:  coordinates − η · partial derivatives": [descend_naively(loss, start.to(c), 2 * steps) for c in (theta, psi)],
        "geoad:  along the Riemannian gradient": [descend(loss, start.to(c), steps) for c in (theta, psi)],
    }
    windows = {theta: ((-1.75, 1.75), (-0.75, 1.9)), psi: ((0.12, 2.2), (0.08, 5.2))}
    figure = Figure(figsize=(11.5, 9.4), layout="constrained")
    axes = figure.subplots(2, 2)
    for row, (seen, window) in enumerate(windows.items()):
        for column, (title, pair) in enumerate(runs.items()):
            draw(axes[row, column], loss, seen, pair, window)
            if row == 0:
                axes[row, column].set_title(title, fontsize=14, pad=10)
        axes[row, 0].set_ylabel(f"seen in {seen.name}\n{seen.name}₂", fontsize=14)
    axes[0, 0].legend(loc="lower left", fontsize=12, framealpha=0.95)
    figure.suptitle("Gradient descent from one point, run in two charts", fontsize=18)
    figure.savefig(path, dpi=150)
    first, second = (torch.stack([p.to(theta).ravel() for p in run]) for run in list(runs.values())[1])
    return float((first - second).abs().max())


def draw(
    ax: Axes,
    loss: geoad.ScalarField,
    seen: geoad.Chart,
    pair: Sequence[list[geoad.Point]],
    window: tuple[tuple[float, float], tuple[float, float]],
) -> None:
    """The trajectories run in θ and in ψ over the level lines of the loss; rings and dots mark the same numbers of steps."""
    from geoad import plotting

    blue, red = "#3d8fe0", "#b3261e"
    marks = [step for step in MARKS if step < min(map(len, pair))]
    plotting.contours(loss, seen, *window, ax, levels=[0.015 * 1.9**k for k in range(11)], cmap="Greys")
    rings = {"marker": "o", "markersize": 12, "markerfacecolor": "white", "markeredgecolor": blue, "markeredgewidth": 2}
    dots = {"marker": "o", "markersize": 5.5, "linestyle": (0, (4, 1.6))}
    plotting.trajectory(
        pair[0], seen, ax, ends=False, label="run in θ", color=blue, linewidth=6.5, alpha=0.75, markevery=marks, **rings
    )
    plotting.trajectory(pair[1], seen, ax, ends=False, label="run in ψ", color=red, linewidth=1.9, markevery=marks, **dots)
    bottom = seen.reference.point(torch.tensor([0.9, 0.7], dtype=torch.float64)).to(seen)
    square, star = {"marker": "s", "color": "black", "markersize": 9}, {"marker": "*", "color": "gold", "markersize": 20}
    ax.plot(*pair[0][0].to(seen).ravel(), linestyle="none", label="start", **square)
    ax.plot(*bottom.ravel(), linestyle="none", label="minimum", markeredgecolor="black", zorder=9, **star)
    ax.set_xlabel(f"{seen.name}₁", fontsize=14)


# %% all of it


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, write the picture; 0 if everything is as it must be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("."), metavar="DIR", help="where to write demo.png (default: here)")
    parser.add_argument("--quick", action="store_true", help="a smaller network on fewer digits: a few seconds")
    options = parser.parse_args(arguments)
    begin = time.perf_counter()
    torch.set_num_threads(1)  # the matrices are small; more threads cost time where cores are shared
    trained = train(QUICK if options.quick else Setting())
    print(*trained.story, sep="\n", end="\n\n")

    charts = four_charts(trained.geo.reference)
    rows = compare(trained, charts)
    print(table(rows, charts), end="\n\n")
    rates = ", ".join(f"{name} {rate:g}" for name, rate in STEPS.items())
    print(f"λ = {trained.setting.damping:g}; rates of the steps: {rates}.")
    print("A naive Newton step does not notice a linear change of coordinates such as 2θ, but every other change.")
    print("The points of the geoad columns were made anew from the coordinates in each chart.\n")
    print("The four charts against each other:")
    print(*map(verdict, rows), sep="\n", end="\n\n")

    failed = [row.name for row in rows if not row.passed]
    worst = min(rows, key=lambda row: row.digits)
    if importlib.util.find_spec("matplotlib") is None:
        print("No picture: matplotlib is not installed (pip install geoad[plot]).")
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        gap = picture(options.out / "demo.png")
        print(f"Picture: {options.out / 'demo.png'}; the two invariant trajectories are {gap:.0e} apart.")
        if not gap < 1e-12:
            failed.append("the picture")
    print(f"{time.perf_counter() - begin:.0f} seconds.")
    if failed:
        print(f"FAILED: {', '.join(failed)}")
        return 1
    print(f"OK: every geoad row agrees to at least {worst.digits:.1f} digits (worst: {worst.name}); the naive rows do not.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
