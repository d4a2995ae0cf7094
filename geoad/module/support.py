"""What networks geoad does not differentiate, and why.

`admit` looks at the modules when a network is wrapped, `refuse_modules` when it is evaluated as a function of its parameters.
What only an evaluation shows is found by `geoad.module.survey`.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from geoad.errors import UnsupportedModuleError

__all__ = ["Deterministic", "admit", "refuse_modules"]

logger = logging.getLogger("geoad")


def admit(net: nn.Module) -> nn.Module:
    """The network itself, out of what replicates it for data-parallel training.

    Raises:
        UnsupportedModuleError: torch cannot differentiate it as a function of its parameters.
    """
    while isinstance(net, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        logger.warning(
            "%s was unwrapped: what geoad computes of the network are the values of this process, on its share of the data; "
            "geoad.distributed.all_reduce(T) combines them.",
            type(net).__name__,
        )
        net = net.module
    for path, module in net.named_modules():
        reason = _refusal(module)
        if reason is not None:
            where = f"module '{path}'" if path else "the network"
            raise UnsupportedModuleError(f"{where} is a {type(module).__name__}: {reason}")
    for name, parameter in net.named_parameters():
        if _from(parameter, "torch.distributed.tensor"):
            raise UnsupportedModuleError(
                f"parameter '{name}' is a DTensor, of which this process holds a part. torch has no forward-mode derivatives "
                "of it, and a point of a manifold needs all its coordinates. Gather them into a plain copy of the network "
                "(parameter.full_tensor()) and wrap that."
            )
    return net


def _from(thing: Any, *packages: str) -> bool:
    """True if a class of `thing` comes from one of these packages; nothing is imported."""
    return _descends(type(thing), packages)


@functools.lru_cache(maxsize=512)
def _descends(kind: type, packages: tuple[str, ...]) -> bool:
    return any(cls.__module__.startswith(packages) for cls in kind.__mro__)


def _refusal(module: nn.Module) -> str | None:
    if _from(module, "torch.distributed.fsdp", "torch.distributed._composable"):
        return (
            "its weights are shards that hooks exchange behind the parameters, so functional derivatives would be zero in "
            "silence. Gather the weights into a plain copy of the network (torch.distributed.checkpoint.state_dict."
            "get_model_state_dict with full_state_dict=True) and wrap that."
        )
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return "it synchronises gradients by hooks that functional derivatives pass by. Wrap the network inside it (.module)."
    if isinstance(module, torch.jit.ScriptModule):
        return (
            "compiled TorchScript holds its own references to the parameters, so other coordinates would not reach it and "
            "derivatives would be zero in silence. Wrap the Python module that was scripted or traced."
        )
    if _from(module, "torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized"):
        return "its weights are integers and its outputs rounded, so derivatives vanish or are missing. Wrap the float network."
    return None


class Deterministic:
    """A context: the network is one function of its parameters.

    No fast paths of transformers, which give other numbers at padded places and are taken or not depending on
    ``requires_grad``; no cached parametrizations.
    """

    def __enter__(self) -> None:
        self._fast = torch.backends.mha.get_fastpath_enabled()
        self._cached, parametrize._cache_enabled = parametrize._cache_enabled, 0  # pyright: ignore
        torch.backends.mha.set_fastpath_enabled(False)

    def __exit__(self, *_: object) -> None:
        torch.backends.mha.set_fastpath_enabled(self._fast)
        parametrize._cache_enabled = self._cached  # pyright: ignore


def refuse_modules(net: nn.Module, sampled: bool) -> None:
    """Refuse modules whose outputs are, in their present mode, no function of the parameters.

    Args:
        net: the network.
        sampled: it is evaluated on single samples.
    """
    for path, module in net.named_modules():
        reason = _unsteady(module) or (_coupled(module) if sampled else None)
        if reason is not None:
            where = f"module '{path}', a {type(module).__name__}," if path else f"the network, a {type(module).__name__},"
            raise UnsupportedModuleError(f"{where} {reason}")


def _unsteady(module: nn.Module) -> str | None:
    """Why the outputs of a module are not a function of its parameters in its present mode."""
    if not module.training:
        return None
    rate = getattr(module, "p", 0) if isinstance(module, nn.modules.dropout._DropoutNd) else getattr(module, "dropout", 0)  # pyright: ignore
    active = isinstance(rate, (int, float)) and rate > 0
    layered = not isinstance(module, nn.RNNBase) or module.num_layers > 1
    known = isinstance(module, (nn.modules.dropout._DropoutNd, nn.MultiheadAttention, nn.RNNBase))  # pyright: ignore
    if (active and layered and known) or isinstance(module, nn.RReLU):
        return (
            "is in training mode and draws random numbers: every evaluation would be another function, a Hessian product would "
            "mix several of them. Call geo.eval() first, or set its rate to 0."
        )
    hooks: Any = module._forward_pre_hooks.values()  # pyright: ignore
    if any(_from(each, "torch.nn.utils.spectral_norm") for each in hooks) or type(module).__name__ == "_SpectralNorm":
        return (
            "is a spectral normalisation in training mode: each evaluation takes a step of its power iteration, which no "
            "derivative sees. Call geo.eval() first."
        )
    return None


def _coupled(module: nn.Module) -> str | None:
    """Why a module has no Jacobian of a single sample."""
    norm = isinstance(module, nn.modules.batchnorm._BatchNorm)  # pyright: ignore
    if norm and (module.training or module.running_mean is None):
        return (
            "normalises by the statistics of the batch, so the output for one sample depends on all others and there is no "
            "Jacobian of a single sample. Call geo.eval() first; objects of whole batches (gradients, Hessians, "
            "representation='implicit') work in training mode too, and leave the running statistics as they are."
        )
    return None
