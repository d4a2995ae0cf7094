"""Ordinary differential equations on dicts of plain blocks: y' = f(y), from time 0."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from geoad.errors import GeometryError
from geoad.params import Blocks, Layout, add, axpy, first, is_wrapped

__all__ = ["METHODS", "integrate", "require_finite", "rk4_step"]

METHODS = ("rk4", "scipy", "torchdiffeq")

Rate = Callable[[Blocks], Blocks]
Time = float | Tensor


def integrate(
    rate: Rate,
    start: Blocks,
    times: Sequence[Time],
    *,
    method: str = "rk4",
    steps: int = 64,
    options: Mapping[str, Any] | None = None,
) -> list[Blocks]:
    """The solution at each of `times` (in any order, of either sign).

    Args:
        rate: f, on dicts of blocks.
        start: y at time 0.
        times: numbers or 0-dimensional tensors.
        method: "rk4": `steps` equal steps for the longest time, and steps no longer than these between the others. "scipy":
            ``scipy.integrate.solve_ivp`` (default DOP853). "torchdiffeq": ``torchdiffeq.odeint`` (default dopri5).
        steps: for "rk4".
        options: keyword arguments for scipy or torchdiffeq, e.g. ``{"method": "LSODA", "rtol": 1e-6}``.
    """
    if method not in METHODS:
        raise GeometryError(f"there is no integrator {method!r}. Choose one of {', '.join(map(repr, METHODS))}.")
    if method == "rk4" and options:
        raise GeometryError(
            f"method='rk4' takes steps= and no options, found {sorted(options)}. Tolerances and the like belong to "
            "method='scipy' or 'torchdiffeq'."
        )
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise GeometryError(
            f"steps= must be a whole number of at least 1, found {steps!r}. It is the number of Runge-Kutta steps."
        )
    if len(times) == 1 and method == "rk4":  # a time inside a transform need not be known
        if not (isinstance(times[0], Tensor) and is_wrapped({"": times[0]})):
            _number(times[0])
        return [_march(rate, start, times[0], steps)]
    numbers = [_number(t) for t in times]
    longest = max((abs(t) for t in numbers), default=0.0)
    found: dict[int, Blocks] = {i: start for i, t in enumerate(numbers) if t == 0}
    for sign in (1, -1):
        order = sorted((i for i, t in enumerate(numbers) if sign * t > 0), key=lambda i: abs(numbers[i]))
        if not order:
            continue
        stops = [times[i] for i in order]
        if method == "rk4":
            states = _rk4(rate, start, stops, [abs(numbers[i]) for i in order], longest / steps)
        elif method == "scipy":
            states = _scipy(rate, start, [numbers[i] for i in order], dict(options or {}))
        else:
            states = _torchdiffeq(rate, start, stops, dict(options or {}))
        found.update(zip(order, states, strict=True))
    return [found[i] for i in range(len(numbers))]


def _number(t: Time) -> float:
    if isinstance(t, Tensor):
        if is_wrapped({"": t}):
            raise GeometryError(
                "the times of several points must be known numbers, found a tensor inside a transform (vmap, jvp): they are "
                "sorted first. Inside a transform ask for one time."
            )
        t = t.detach()
    number = float(t)
    if not math.isfinite(number):
        raise GeometryError(f"a time must be a finite number, found {number}.")
    return number


# -- Runge-Kutta -------------------------------------------------------------------------------------------------------


def rk4_step(rate: Rate, y: Blocks, h: Time) -> Blocks:
    """One classical Runge-Kutta step of length h: error O(h⁵)."""
    k1 = rate(y)
    k2 = rate(axpy(h / 2, k1, y))
    k3 = rate(axpy(h / 2, k2, y))
    k4 = rate(axpy(h, k3, y))
    return axpy(h / 6, axpy(2.0, add(k2, k3), add(k1, k4)), y)


def _march(rate: Rate, y: Blocks, length: Time, steps: int) -> Blocks:
    h = length / steps
    for _ in range(steps):
        y = rk4_step(rate, y, h)
        require_finite(y)
    return y


def _rk4(rate: Rate, y: Blocks, stops: list[Time], numbers: list[float], h: float) -> list[Blocks]:
    states: list[Blocks] = []
    last: Time = 0.0
    reached = 0.0
    for stop, number in zip(stops, numbers, strict=True):
        if number > reached:
            y = _march(rate, y, stop - last, max(1, math.ceil((number - reached) / h * (1 - 1e-9))))
        last, reached = stop, number
        states.append(y)
    return states


def require_finite(y: Blocks) -> None:
    """Raise if a number is infinite or NaN (not inside transforms, where values cannot be read)."""
    if not is_wrapped(y) and not all(bool(block.isfinite().all()) for block in y.values()):
        raise GeometryError(
            "the integration ran into numbers that are not finite: the solution leaves the region where the metric is "
            "regular, or the steps are too long. Choose a shorter time, more steps=, or a metric field in a chart that is "
            "regular there."
        )


# -- the integrators of other packages ---------------------------------------------------------------------------------------


def _extra(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise GeometryError(
            f"method='{package}' needs the package {package}, which is not installed. Install it with `pip install "
            "geoad[ode]`, or use method='rk4', which needs nothing."
        ) from error


def _tolerance(like: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    fine = max(1e-10, 100 * torch.finfo(like.dtype).eps)
    return {"rtol": fine, "atol": fine, **options}


def _flat(start: Blocks) -> Layout:
    """The layout in which a (batched) state is one vector."""
    return Layout({name: block.shape for name, block in start.items()})


def _scipy(rate: Rate, start: Blocks, times: list[float], options: dict[str, Any]) -> list[Blocks]:
    like = first(start)
    if is_wrapped(start) or any(block.requires_grad for block in start.values()):
        raise GeometryError(
            "method='scipy' leaves PyTorch, so its result has no derivatives and it cannot run inside a transform; but the "
            "point or the vector requires gradients (or is inside one). Use method='rk4' or 'torchdiffeq', or .detach() "
            "first."
        )
    solver = _extra("scipy.integrate", "scipy")
    layout = _flat(start)

    def plain(y: Any) -> Blocks:
        return layout.unravel(torch.as_tensor(y).to(device=like.device, dtype=like.dtype))

    def function(_: float, y: Any) -> Any:
        return layout.ravel(rate(plain(y))).double().cpu().numpy()

    initial = layout.ravel(start).double().cpu().numpy()
    arguments = {"method": "DOP853", **_tolerance(like, options)}
    with torch.no_grad():
        result = solver.solve_ivp(function, (0.0, times[-1]), initial, t_eval=times, **arguments)
    if not result.success:
        raise GeometryError(
            f"scipy could not integrate to time {times[-1]:g}: {result.message} The solution leaves the region where the "
            "metric is regular, or the tolerances are out of reach. Choose a shorter time or "
            f"options={{'rtol': ..., 'atol': ...}}."
        )
    states = [plain(column) for column in result.y.T]
    for state in states:
        require_finite(state)
    return states


def _torchdiffeq(rate: Rate, start: Blocks, times: list[Time], options: dict[str, Any]) -> list[Blocks]:
    like = first(start)
    if is_wrapped(start):
        raise GeometryError(
            "method='torchdiffeq' chooses its steps by values, so it cannot run inside a transform. Use method='rk4'."
        )
    package = _extra("torchdiffeq", "torchdiffeq")
    layout = _flat(start)
    stops = [torch.as_tensor(t, dtype=like.dtype, device=like.device) for t in times]
    grid = torch.stack([torch.zeros_like(stops[0]), *stops])

    def function(_: Tensor, y: Tensor) -> Tensor:
        return layout.ravel(rate(layout.unravel(y)))

    rows: Tensor = package.odeint(function, layout.ravel(start), grid, **_tolerance(like, options))
    states = [layout.unravel(row) for row in rows[1:]]
    for state in states:
        require_finite(state)
    return states
