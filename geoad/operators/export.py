"""Operators as those of SciPy."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from geoad.errors import GeometryError
from geoad.operators.base import LinearOperator
from geoad.operators.solve import working
from geoad.params import Blocks

__all__ = ["to_scipy"]


def to_scipy(operator: LinearOperator) -> Any:
    """A ``scipy.sparse.linalg.LinearOperator`` of shape (d, d) on NumPy vectors, in the raveled order of the layout.

    Its products are those of the operator, on the device of the operator and without gradients.

    Raises:
        GeometryError: SciPy is not installed, or the operator is a batch.
    """
    try:
        linalg: Any = importlib.import_module("scipy.sparse.linalg")
    except ImportError as error:
        raise GeometryError(
            "to_scipy makes an operator of SciPy, which is not installed. Install it with geoad's extra: "
            "pip install 'geoad[scipy]'."
        ) from error
    layout, like = operator.layout, working(operator.like)

    def on_numpy(product: Any) -> Any:
        def apply(x: Any) -> Any:
            vector = torch.tensor(x, dtype=operator.like.dtype, device=like.device).reshape(-1)
            with torch.no_grad():
                image: Blocks = product(layout.unravel(vector))
            flat = layout.ravel(image)
            if flat.ndim != 1:
                raise GeometryError(
                    f"an operator of SciPy is one matrix, but this one is a batch of shape {tuple(flat.shape[:-1])}. Take one "
                    "of them: T[i]."
                )
            return working(flat).cpu().numpy()

        return apply

    dtype = torch.empty(0, dtype=like.dtype, device="cpu").numpy().dtype
    return linalg.LinearOperator(
        shape=(operator.dim, operator.dim), matvec=on_numpy(operator.mv), rmatvec=on_numpy(operator.rmv), dtype=dtype
    )
