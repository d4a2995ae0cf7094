"""Pictures of tangent kernels: the matrix, principal components, evolution. Needs matplotlib: ``pip install geoad[plot]``.

Every function draws on the axes that it is given and returns them; without axes it makes a figure of its own. Nothing is shown
and no style is set. Eigenvalues are drawn by `geoad.plotting.spectrum`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from geoad.errors import GeometryError
from geoad.plotting import axes_of
from geoad.tangent import Evolution, KernelPCA
from geoad.tensors import Cometric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["components", "eigenvalues", "evolution", "kernel"]


def kernel(value: Cometric, ax: Axes | None = None, *, order: Tensor | None = None, **style: Any) -> Axes:
    """The kernel matrix as an image.

    Args:
        value: the value of a `geoad.ntk` field.
        ax: the axes; None makes a figure.
        order: labels (n,): the samples are sorted by them, so that classes are squares along the diagonal.
        **style: of the image, for ``Axes.imshow``.
    """
    ax = axes_of(ax)
    matrix = value.to_dense().detach().cpu()
    if matrix.ndim != 2:
        raise GeometryError(
            f"one matrix is drawn, found a batch of shape {tuple(matrix.shape)} (contract='diagonal'). Take the kernel of a "
            "single output, outputs=[c], or contract='trace'."
        )
    if order is not None:
        n = len(order)
        within = torch.arange(len(matrix) // n, device="cpu")
        index = order.cpu().argsort(stable=True).unsqueeze(1) * (len(matrix) // n) + within
        matrix = matrix[index.flatten()][:, index.flatten()]
    options: dict[str, Any] = {"interpolation": "nearest", **style}
    ax.imshow(matrix.numpy(), **options)
    ax.set_xticks([])
    ax.set_yticks([])
    return ax


def components(
    pca: KernelPCA,
    labels: Tensor | None = None,
    ax: Axes | None = None,
    *,
    new: Tensor | None = None,
    pair: tuple[int, int] = (0, 1),
    **style: Any,
) -> Axes:
    """The data in two kernel principal components.

    Args:
        pca: the components, with one score for each sample.
        labels: (n,) integers, for colours and the legend.
        ax: the axes; None makes a figure.
        new: scores (m, k) of other data, ``pca.project(x)``, drawn as crosses.
        pair: which two components.
        **style: of the points, for ``Axes.scatter``.
    """
    scores = pca.scores.detach().cpu()
    scores = scores.flatten(0, -2) if scores.ndim > 2 and scores.shape[1:-1].numel() == 1 else scores
    if scores.ndim != 2 or max(pair) >= scores.shape[1]:
        raise GeometryError(
            f"two components of one score for each sample are drawn, found scores of shape {tuple(pca.scores.shape)} and the "
            f"pair {pair}. Use kernel_pca(ntk(geo, x, contract='trace'), p, k={max(pair) + 1})."
        )
    ax = axes_of(ax)
    i, j = pair
    options: dict[str, Any] = {"s": 14, **style}
    if labels is None:
        ax.scatter(scores[:, i].numpy(), scores[:, j].numpy(), **options)
    else:
        for label in labels.unique().tolist():
            chosen = scores[labels.cpu() == label]
            ax.scatter(chosen[:, i].numpy(), chosen[:, j].numpy(), label=str(label), **options)
        ax.legend(title="class", fontsize="small")
    if new is not None:
        other = new.detach().cpu().reshape(-1, scores.shape[1])
        ax.scatter(other[:, i].numpy(), other[:, j].numpy(), marker="x", color="0.3", s=options["s"])
    shares = pca.explained
    ax.set_xlabel(f"component {i + 1} ({float(shares[i]):.0%})")
    ax.set_ylabel(f"component {j + 1} ({float(shares[j]):.0%})")
    return ax


def eigenvalues(record: Evolution, ax: Axes | None = None, **style: Any) -> Axes:
    """The largest eigenvalues of a kernel during training, one line each.

    Args:
        record: the evolution.
        ax: the axes; None makes a figure.
        **style: of the lines, for ``Axes.plot``.
    """
    ax = axes_of(ax)
    table = record.table()
    values = table["eigenvalues"].detach().cpu()
    for index, line in enumerate(values.mT):
        options: dict[str, Any] = {"color": str(0.75 * index / max(1, values.shape[1])), "linewidth": 1.0, **style}
        ax.plot(table["step"].numpy(), line.numpy(), **options)
    ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel("eigenvalue")
    return ax


def evolution(
    record: Evolution,
    ax: Axes | None = None,
    *,
    quantities: Sequence[str] = ("initial_alignment", "target_alignment"),
    **style: Any,
) -> Axes:
    """Numbers of a kernel during training.

    Args:
        record: the evolution.
        ax: the axes; None makes a figure.
        quantities: which columns of ``record.table()``.
        **style: of the lines, for ``Axes.plot``.
    """
    table = record.table()
    unknown = [name for name in quantities if name not in table or name in ("step", "eigenvalues")]
    if unknown:
        known = [name for name in table if name not in ("step", "eigenvalues")]
        raise GeometryError(f"an evolution has no quantities {unknown}. Available: {', '.join(known)}.")
    ax = axes_of(ax)
    for name in quantities:
        ax.plot(table["step"].numpy(), table[name].numpy(), label=name.replace("_", " "), **style)
    ax.set_xlabel("step")
    ax.legend(fontsize="small")
    return ax
