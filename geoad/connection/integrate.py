"""Ordinary differential equations on dicts of plain blocks: y' = f(y), from time 0."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from geoad.errors import GeometryError
from geoad.params import Blocks, Layout, add, axpy, first, is_wrapped

__all__ = ["METHODS", "integrate", "require_finite", "require_steps", "rk4_step", "times_of", "visit"]

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
    if method == "rk4":
        return visit(start, times, steps, lambda y, h: rk4_step(rate, y, h))
    require_steps(steps)
    numbers = [_number(t) for t in times]
    found: dict[int, Blocks] = {i: start for i, t in enumerate(numbers) if t == 0}
    for order in _outward(numbers):
        if method == "scipy":
            states = _scipy(rate, start, [numbers[i] for i in order], dict(options or {}))
        else:
            states = _torchdiffeq(rate, start, [times[i] for i in order], dict(options or {}))
        found.update(zip(order, states, strict=True))
    return [found[i] for i in range(len(numbers))]


State = TypeVar("State")


def visit(start: State, times: Sequence[Time], steps: int, advance: Callable[[State, Time], State]) -> list[State]:
    """The states at each of `times` (in any order, of either sign), by equal steps ``advance(state, h)``.

    `steps` steps lead to the longest time, and steps no longer than these to the others.
    """
    require_steps(steps)

    def march(state: State, length: Time, count: int) -> State:
        h = length / count
        for _ in range(count):
            state = advance(state, h)
        return state

    if len(times) == 1:  # a time inside a transform need not be known
        if not (isinstance(times[0], Tensor) and is_wrapped({"": times[0]})):
            _number(times[0])
        return [march(start, times[0], steps)]
    numbers = [_number(t) for t in times]
    shortest = max((abs(t) for t in numbers), default=0.0) / steps
    found: dict[int, State] = {i: start for i, t in enumerate(numbers) if t == 0}
    for order in _outward(numbers):
        state, last, reached = start, 0.0, 0.0
        for i in order:
            number = abs(numbers[i])
            if number > reached:
                state = march(state, times[i] - last, max(1, math.ceil((number - reached) / shortest * (1 - 1e-9))))
            last, reached = times[i], number
            found[i] = state
    return [found[i] for i in range(len(numbers))]


def _outward(numbers: list[float]) -> list[list[int]]:
    """The indices of the times after 0 and of those before, each from 0 outwards."""
    return [
        sorted((i for i, t in enumerate(numbers) if sign * t > 0), key=lambda i: abs(numbers[i]))
        for sign in (1, -1)
        if any(sign * t > 0 for t in numbers)
    ]


def require_steps(steps: Any) -> None:
    """Raise unless `steps` is a number of steps."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise GeometryError(
            f"steps= must be a whole number of at least 1, found {steps!r}. It is the number of Runge-Kutta steps."
        )


def times_of(t: Any) -> tuple[list[Time], bool]:
    """The times that a user asks for, and whether it is a single one."""
    if isinstance(t, Tensor) and t.ndim <= 1 and not t.is_complex():
        return ([t], True) if t.ndim == 0 else (list(t.unbind()), False)
    if isinstance(t, (int, float)) and not isinstance(t, bool):
        return [float(t)], True
    if isinstance(t, (list, tuple)):
        listed = [times_of(each) for each in cast("Sequence[Any]", t)]
        if all(single for _, single in listed):
            return [times[0] for times, _ in listed], False
    found = f"a tensor of shape {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
    raise GeometryError(f"t must be a number, a sequence of numbers or a 1-dimensional tensor of times, found {found}.")


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
    """One classical Runge-Kutta step of length h: error O(h⁵). Raises where it runs into numbers that are not finite."""
    k1 = rate(y)
    k2 = rate(axpy(h / 2, k1, y))
    k3 = rate(axpy(h / 2, k2, y))
    k4 = rate(axpy(h, k3, y))
    y = axpy(h / 6, axpy(2.0, add(k2, k3), add(k1, k4)), y)
    require_finite(y)
    return y


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
