"""The rules of the tap: which operations of torch are linear in a parameter, and what has to be known of them.

A rule gets the arguments of a torch function, computes its result, and records a use; it gives None for a case that it does not
know. Normalisations are taken apart: the function without its parameters, then scale and shift.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from geoad.kernels.bags import SpelledOutBags
from geoad.kernels.tap import Tap, tapped
from geoad.kernels.uses import AffineUse, ConvUse, EmbeddingUse, Part, ScaleUse, ShiftUse

__all__: list[str] = []


# -- affine layers -----------------------------------------------------------------------------------------------------------


@tapped(functional.linear)
def linear(tap: Tap, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """a Wᵀ + b."""
    w, b = tap.part(weight), tap.part(bias)
    if tap.part(input) is not None or input.is_nested or weight.ndim != 2 or (bias is not None and bias.ndim != 1):
        return None
    out = functional.linear(input, tap.value(weight), tap.value(bias))
    return tap.record(AffineUse(w, b, tuple(out.shape)), input, out)


@tapped(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def matmul(tap: Tap, input: Tensor, other: Tensor) -> Tensor | None:
    """a W, as functional code has it."""
    w = tap.part(other)
    if w is None or tap.part(input) is not None or other.ndim != 2:
        return None
    out = torch.matmul(input, tap.value(other))
    return tap.record(AffineUse(w.t, None, tuple(out.shape)), input, out)


@tapped(Tensor.__rmatmul__)
def reversed_matmul(tap: Tap, input: Tensor, other: Tensor) -> Tensor | None:
    """other @ input."""
    return matmul(tap, other, input)


@tapped(torch.addmm, Tensor.addmm)
def addmm(tap: Tap, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor | None:
    """b + a W, the Conv1D of GPT-2."""
    w, b = tap.part(mat2), tap.part(input)
    if tap.part(mat1) is not None or alpha != 1 or beta != 1 or (b is not None and input.ndim != 1):
        return None
    if b is not None and b.shape[0] != mat2.shape[1]:
        return None
    out = torch.addmm(tap.value(input), mat1, tap.value(mat2))
    return tap.record(AffineUse(None if w is None else w.t, b, tuple(out.shape)), mat1, out)


# -- convolutions ------------------------------------------------------------------------------------------------------------


def _tuple(value: Any, count: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return tuple(int(v) for v in (values * count if len(values) == 1 else values))


def _conv(convolve: Callable[..., Tensor], axes: int) -> Callable[..., Tensor | None]:
    def rule(
        tap: Tap,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor | None:
        w, b = tap.part(weight), tap.part(bias)
        if tap.part(input) is not None:
            return None
        out = convolve(input, tap.value(weight), tap.value(bias), stride, padding, dilation, groups)
        kernel, dilations = tuple(weight.shape[2:]), _tuple(dilation, axes)
        use = ConvUse(
            None if w is None else _grouped(w, groups),
            b,
            tuple(out.shape),
            groups,
            kernel,
            _tuple(stride, axes),
            dilations,
            _padding(padding, kernel, dilations),
            (1,) * axes,
        )
        return tap.record(use, input, out)

    return rule


def _padding(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    if isinstance(padding, str):
        spans = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        return tuple((span // 2, span - span // 2) for span in spans)
    return tuple((p, p) for p in _tuple(padding, len(kernel)))


def _grouped(part: Part, groups: int) -> Part:
    """(groups · out, in, *kernel) as (groups, out, in, *kernel)."""
    out = part.shape[0] // groups
    shape, strides = (groups, out, *part.shape[1:]), (out * part.strides[0], *part.strides)
    return Part(part.name, part.size, shape, strides, part.offset)


def _transposed_conv(convolve: Callable[..., Tensor], axes: int) -> Callable[..., Tensor | None]:
    def rule(
        tap: Tap,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Tensor | None:
        w, b = tap.part(weight), tap.part(bias)
        if tap.part(input) is not None:
            return None
        out = convolve(input, tap.value(weight), tap.value(bias), stride, padding, output_padding, groups, dilation)
        kernel, dilations, paddings = tuple(weight.shape[2:]), _tuple(dilation, axes), _tuple(padding, axes)
        spans = [d * (k - 1) for k, d in zip(kernel, dilations, strict=True)]
        around = [(s - p, s - p + e) for s, p, e in zip(spans, paddings, _tuple(output_padding, axes), strict=True)]
        turned = None if w is None else _turned(w, groups)
        steps, spread = (1,) * axes, _tuple(stride, axes)
        use = ConvUse(turned, b, tuple(out.shape), groups, kernel, steps, dilations, tuple(around), spread, True)
        return tap.record(use, input, out)

    return rule


def _turned(part: Part, groups: int) -> Part:
    """(groups · in, out, *kernel) as (groups, out, in, *kernel)."""
    inputs, out, *kernel = part.shape
    first, second, *steps = part.strides
    shape, strides = (groups, out, inputs // groups, *kernel), (inputs // groups * first, second, first, *steps)
    return Part(part.name, part.size, shape, strides, part.offset)


for _axes, _function in enumerate((functional.conv1d, functional.conv2d, functional.conv3d), start=1):
    tapped(_function)(_conv(_function, _axes))
for _axes, _function in enumerate(
    (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d), start=1
):
    tapped(_function)(_transposed_conv(_function, _axes))


# -- tables --------------------------------------------------------------------------------------------------------------------


@tapped(functional.embedding)
def embedding(
    tap: Tap,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    """Rows of a table. Not with max_norm, which overwrites the table, nor with gradients scaled by frequency."""
    w = tap.part(weight)
    if w is None or max_norm is not None or scale_grad_by_freq:
        return None
    out = functional.embedding(input, tap.value(weight), padding_idx)
    padding = None if padding_idx is None else padding_idx % weight.shape[0]
    return tap.record(EmbeddingUse(w, None, tuple(out.shape), padding), input, out)


@tapped(functional.embedding_bag)
def embedding_bag(tap: Tap, *args: Any, **kwargs: Any) -> Any:
    """A sum, a mean or a maximum of rows of a table."""
    given = _bag_arguments.bind(*args, **kwargs).arguments
    if given.get("max_norm") is not None or given.get("scale_grad_by_freq"):
        return None
    with tap:
        return _bag(*args, **kwargs)


_bag = SpelledOutBags.formulas[functional.embedding_bag]
_bag_arguments = inspect.signature(_bag)


# -- scale and shift -----------------------------------------------------------------------------------------------------------


@tapped(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply)
def multiply(tap: Tap, input: Any, other: Any) -> Tensor | None:
    """s ⊙ a."""
    s, a = (other, input) if tap.part(input) is None else (input, other)
    part = tap.part(s)
    if part is None or not isinstance(a, Tensor) or tap.part(a) is not None or a.is_complex():
        return None
    out = tap.value(s) * a
    return tap.record(ScaleUse(part, None, tuple(out.shape)), a, out)


@tapped(functional.prelu)
def prelu(tap: Tap, input: Tensor, weight: Tensor) -> Tensor | None:
    """max(a, 0) + s ⊙ min(a, 0)."""
    if tap.part(weight) is None or tap.part(input) is not None or weight.ndim > 1 or input.ndim < 2:
        return None
    return functional.relu(input) + _scaled(tap, input.clamp(max=0), weight, channels=weight.numel() > 1)


def _shift(tap: Tap, a: Any, b: Any, sign: int, out: Callable[[Any, Any], Tensor]) -> Tensor | None:
    part = tap.part(b)
    if part is None or not isinstance(a, Tensor) or tap.part(a) is not None or a.is_complex():
        return None
    result = out(a, tap.value(b))
    return tap.record(ShiftUse(None, part, tuple(result.shape), sign), result.new_zeros(()), result)


@tapped(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def add(tap: Tap, input: Any, other: Any, *, alpha: Any = 1) -> Tensor | None:
    """a + b."""
    if alpha != 1:
        return None
    a, b = (input, other) if tap.part(input) is None else (other, input)
    return _shift(tap, a, b, 1, torch.add)


@tapped(torch.sub, Tensor.sub, Tensor.__sub__, torch.subtract, Tensor.subtract)
def subtract(tap: Tap, input: Any, other: Any, *, alpha: Any = 1) -> Tensor | None:
    """a - b or b - a."""
    if alpha != 1:
        return None
    if tap.part(input) is None:
        return _shift(tap, input, other, -1, torch.sub)
    return _shift(tap, other, input, 1, lambda a, b: torch.sub(b, a))


@tapped(Tensor.__rsub__)
def reversed_subtract(tap: Tap, input: Any, other: Any) -> Tensor | None:
    """other - input."""
    return subtract(tap, other, input)


# -- attention -----------------------------------------------------------------------------------------------------------------


def _opened(function: Any) -> Any:
    """A Python function of torch that does not hand itself over to modes: they see what it calls instead."""
    names: dict[str, Any] = {**function.__globals__, "has_torch_function": lambda _: False}
    found = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    found.__kwdefaults__ = function.__kwdefaults__
    return found


_attention = _opened(functional.multi_head_attention_forward)


@tapped(functional.multi_head_attention_forward)
def attention(tap: Tap, *args: Any, **kwargs: Any) -> Any:
    """``nn.MultiheadAttention`` by its affine layers."""
    with tap:
        return _attention(*args, **kwargs)


# -- normalisations ------------------------------------------------------------------------------------------------------------


def _affine(tap: Tap, y: Tensor, weight: Tensor | None, bias: Tensor | None, channels: bool) -> Tensor:
    """y ⊙ weight + bias, each of them tapped if it is a parameter; along axis 1 or the last axes."""
    y = y if weight is None else _scaled(tap, y, weight, channels)
    if bias is None:
        return y
    value, part = _along(tap, y, bias, channels)
    out = y + value
    return out if part is None else tap.record(ShiftUse(None, part, tuple(out.shape)), y.new_zeros(()), out)


def _scaled(tap: Tap, y: Tensor, weight: Tensor, channels: bool) -> Tensor:
    """y ⊙ weight."""
    value, part = _along(tap, y, weight, channels)
    out = y * value
    return out if part is None else tap.record(ScaleUse(part, None, tuple(out.shape)), y, out)


def _along(tap: Tap, y: Tensor, parameter: Tensor, channels: bool) -> tuple[Tensor, Part | None]:
    """The parameter in the shape in which it meets y."""
    value: Tensor = tap.value(parameter)
    part, after = tap.part(parameter), y.ndim - 2
    if not channels:
        return value, part
    value = value.reshape(-1, *[1] * after)
    if part is None:
        return value, None
    return value, Part(part.name, part.size, (part.shape[0], *[1] * after), (part.strides[0], *[0] * after), part.offset)


@tapped(functional.layer_norm)
def layer_norm(
    tap: Tap,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    """Without its parameters, then scale and shift."""
    if tap.part(input) is not None:
        return None
    return _affine(tap, functional.layer_norm(input, list(normalized_shape), None, None, eps), weight, bias, channels=False)


@tapped(functional.rms_norm, torch.rms_norm)
def rms_norm(
    tap: Tap, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor | None:
    """Without its scale, then scale."""
    if tap.part(input) is not None:
        return None
    return _affine(tap, functional.rms_norm(input, list(normalized_shape), None, eps), weight, None, channels=False)


@tapped(functional.group_norm)
def group_norm(
    tap: Tap, input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor | None:
    """Without its parameters, then scale and shift of the channels."""
    if tap.part(input) is not None:
        return None
    return _affine(tap, functional.group_norm(input, num_groups, None, None, eps), weight, bias, channels=True)


@tapped(functional.batch_norm)
def batch_norm(
    tap: Tap,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """In eval mode: without its parameters, then scale and shift of the channels."""
    if training or any(tap.part(each) is not None for each in (input, running_mean, running_var)):
        return None
    y = functional.batch_norm(input, running_mean, running_var, None, None, False, momentum, eps)
    return _affine(tap, y, weight, bias, channels=True)


@tapped(functional.instance_norm)
def instance_norm(
    tap: Tap,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """Without its parameters, then scale and shift of the channels."""
    if any(tap.part(each) is not None for each in (input, running_mean, running_var)):
        return None
    y = functional.instance_norm(input, running_mean, running_var, None, None, use_input_stats, momentum, eps)
    return _affine(tap, y, weight, bias, channels=True)
