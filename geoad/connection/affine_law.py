r"""The law of a connection under a change of coordinates φ: θ ↦ ψ. It is affine: a connection is not a tensor.

.. math:: \tilde\Gamma^k_{ij} = J^k_o \bigl(\Gamma^o_{mn} K^m_i K^n_j + \partial_i \partial_j \theta^o\bigr), \qquad
          J = \partial\psi/\partial\theta, \quad K = J^{-1}

Source: Kristiadi et al. (2023), eq. (7). Both directions are computed with derivatives of φ at θ only, by
:math:`J^k_o\, \partial_i\partial_j\theta^o = -\partial_m\partial_n\psi^k\, K^m_i K^n_j`, so φ⁻¹ is never differentiated twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from geoad import transport
from geoad.charts import Chart, Point, path
from geoad.maps.base import Map
from geoad.params import Blocks, Layout

__all__ = ["moved"]


def moved(symbols: Tensor, at: Point, end: Chart) -> Tensor:
    """Symbols (*batch, d, d, d) in the chart of `at`, ordered [k, i, j], in chart `end`."""
    here = at
    for phi, along in path(at.chart, end, at):
        there = here.to(phi.target if along else phi.source)
        theta, psi = (here, there) if along else (there, here)
        if phi.map.law != "diffeomorphism":
            raise transport.refusal("a connection", phi, along)
        step: Any = _law(phi.map, phi.source.layout, along)
        for _ in at.batch_shape:
            step = torch.func.vmap(step)
        symbols = step(symbols, theta.blocks, psi.blocks)
        here = there
    return symbols


def _law(bound: Map, layout: Layout, along: bool) -> Callable[[Tensor, Blocks, Blocks], Tensor]:
    def step(symbols: Tensor, x: Blocks, y: Blocks) -> Tensor:
        jacobian = _matrix(layout, symbols, lambda v: bound.push(x, y, v))
        inverse = _matrix(layout, symbols, lambda v: bound.push_inverse(x, y, v))
        bend = symbols.new_zeros(symbols.shape) if bound.linear else _second(bound, layout, symbols, x)
        if along:
            curved = torch.einsum("ko,omn->kmn", jacobian, symbols) - bend
            return torch.einsum("kmn,mi,nj->kij", curved, inverse, inverse)
        return torch.einsum("ok,kmn->omn", inverse, torch.einsum("kij,im,jn->kmn", symbols, jacobian, jacobian) + bend)

    return step


def _matrix(layout: Layout, like: Tensor, product: Callable[[Blocks], Blocks]) -> Tensor:
    """The matrix of a linear map on blocks."""
    eye = torch.eye(layout.dim, dtype=like.dtype, device=like.device)
    return torch.func.vmap(lambda e: layout.ravel(product(layout.unravel(e))))(eye).mT


def _second(bound: Map, layout: Layout, like: Tensor, x: Blocks) -> Tensor:
    """∂²ψ^k/∂θ^m∂θ^n, by one forward derivative of the map's own Jacobian product."""

    def jacobian(flat: Tensor) -> Tensor:
        theta = layout.unravel(flat)
        psi = bound.forward(theta)
        return _matrix(layout, like, lambda v: bound.push(theta, psi, v))

    second: Any = torch.func.jacfwd(jacobian)(layout.ravel(x))
    return 0.5 * (second + second.mT)
