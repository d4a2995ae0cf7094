"""Changes of coordinates from modules with ``torch.nn.utils.parametrize``."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm  # pyright: ignore[reportPrivateUsage]

from geoad.errors import GeometryError, UnsupportedModuleError
from geoad.maps.base import Map
from geoad.maps.parametrized_maps import (
    ParametrizedBlock,
    ParametrizedEntries,
    ParametrizedImmersion,
    ParametrizedSmooth,
    ParametrizedSubmersion,
    Part,
    frozen,
    require_real,
)
from geoad.maps.parametrized_rank import Kind, classify
from geoad.maps.weight_norm import WeightNorm

__all__ = ["Parametrized", "from_parametrized"]

_MAPS: dict[Kind, type[Any]] = {
    "elementwise": ParametrizedEntries,
    "diffeomorphism": ParametrizedBlock,
    "submersion": ParametrizedSubmersion,
    "immersion": ParametrizedImmersion,
    "smooth": ParametrizedSmooth,
}


class Parametrized(Mapping[str, Map]):
    """A parametrized network, taken apart: the recipe {name of the tensor: map}, which it is itself, and more.

    Attributes:
        network: a copy without the parametrizations: its parameters are the weights θ.
        components: the original numbers, name of the block of ψ -> tensor, for ``psi.point(found.components)``; with the other
            trained parameters of the network.
        kinds: name of the tensor -> "elementwise", "diffeomorphism", "submersion", "immersion" or "smooth".
    """

    def __init__(self, recipe: dict[str, Map], network: nn.Module, components: dict[str, Tensor]) -> None:
        self.recipe = recipe
        self.network = network
        self.components = components

    @property
    def kinds(self) -> dict[str, str]:
        """What was found of each tensor."""
        return {name: "elementwise" if made.elementwise else made.law for name, made in self.recipe.items()}

    def __getitem__(self, name: str) -> Map:
        return self.recipe[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.recipe)

    def __len__(self) -> int:
        return len(self.recipe)

    def __repr__(self) -> str:
        return f"Parametrized({', '.join(f'{name}: {kind}' for name, kind in self.kinds.items())})"


def from_parametrized(
    net: nn.Module, name: str | Sequence[str] | None = None, kind: str | Mapping[str, str] | None = None
) -> Parametrized:
    r"""The maps :math:`\psi \mapsto \theta` from the trained tensors of a parametrized network to its weights.

    With ``torch.nn.utils.parametrize`` a network is trained in coordinates ψ (``parametrizations.weight.original``, ...) that
    make the weights θ. `net` itself can be wrapped as it is: ``GeoModule(net)`` has ψ for its reference chart. Here θ becomes
    the reference chart, and ψ a chart (or redundant, or fewer, coordinates) of it:

    >>> import torch, geoad
    >>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2))
    >>> found = geoad.maps.from_parametrized(torch.nn.Sequential(layer))
    >>> geo = geoad.GeoModule(found.network)
    >>> psi = geo.reference.reparametrize(found, name="psi").target
    >>> found, sorted(psi.layout), psi.point(found.components).chart
    (Parametrized(0.weight: submersion), ['0.bias', '0.weight_g', '0.weight_v'], Chart('psi', dim=10, from 'theta'))

    The kind of each map is found out: by dimensions, by the rank of :math:`∂θ/∂ψ` at the present ψ and at others, and by
    whether ``right_inverse`` leads back.

    ================== ====================================================== ==========================================
    kind               when                                                   examples
    ================== ====================================================== ==========================================
    elementwise        each entry by itself, right_inverse leads back both    exp, softplus
                       ways
    diffeomorphism     as many numbers, full rank, the same                   triangular mixing
    submersion         rank of θ, ``module(right_inverse(θ)) = θ``            weight_norm (in closed form, `WeightNorm`)
    immersion          all numbers that have an effect are independent        orthogonal: the triangle that counts
    smooth             the rest                                               spectral_norm (in eval mode), LoRA
    ================== ====================================================== ==========================================

    Where ``right_inverse`` does not lead back, the ψ of a weight is searched from the original one.
    Blocks of ψ are called like the tensor, or ``<tensor>_original0`` ... (`WeightNorm`: ``_g``, ``_v``) where there are many;
    trained tensors of the parametrizations themselves are blocks as well.

    Args:
        net: the network; it is not changed.
        name: which tensors, by name pattern ("0.weight"); default all. The others stay parametrized in the copy.
        kind: ask for a kind, which is checked: "diffeomorphism", "submersion", "immersion" or "smooth"; or {pattern: kind}.

    Raises:
        GeometryError: nothing is parametrized, right_inverse is missing, or what is asked for is not what was found.
        UnsupportedModuleError: a parametrization is no smooth function of its tensors (spectral_norm in training mode), or
            shares tensors with another.

    Source: T. Salimans & D. P. Kingma (2016) for weight norm; M. Lezcano-Casado (2019) for trivialisations.
    """
    twin = _copied(net)
    _convert_hooks(twin)
    places = _chosen(twin, name)
    _require_unshared(twin, places)
    recipe: dict[str, Map] = {}
    components: dict[str, Tensor] = {}
    for tensor, (module, local) in places.items():
        modules = cast("parametrize.ParametrizationList", cast(nn.ModuleDict, module.parametrizations)[local])
        parts = _parts(tensor, modules)
        if not parts:
            continue
        weight = modules().detach()
        made, originals = _map(tensor, frozen(copy.deepcopy(modules)), parts, _asked(kind, tensor))
        recipe[tensor] = made
        components |= {_block(tensor, key): value.to(weight, copy=True) for key, value in originals.items()}
        _unparametrize(module, local, weight)
    others = {key: p.detach().clone() for key, p in twin.named_parameters() if p.requires_grad and key not in recipe}
    return Parametrized(recipe, twin, others | components)


# -- the network ---------------------------------------------------------------------------------------------------------------


def _copied(net: nn.Module) -> nn.Module:
    """A deep copy; weights that hooks of the old style have computed are no leaves, which torch does not copy."""
    memo: dict[int, Any] = {}
    for module in net.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(net, memo)


def _convert_hooks(net: nn.Module) -> None:
    """Turn ``torch.nn.utils.weight_norm`` of the old style into the parametrization with the same numbers."""
    for module in net.modules():
        hooks, parameters = vars(module)["_forward_pre_hooks"], vars(module)["_parameters"]
        for key, hook in list(hooks.items()):
            if type(hook).__name__ == "SpectralNorm" and type(hook).__module__.startswith("torch."):
                raise UnsupportedModuleError(
                    f"a {type(module).__name__} has a spectral norm of the old style, torch.nn.utils.spectral_norm, which "
                    "computes weights in a hook. Such weights are no coordinates; use torch.nn.utils.parametrizations."
                    "spectral_norm instead."
                )
            if type(hook).__name__ == "WeightNorm" and type(hook).__module__.startswith("torch."):
                old = hook
                del hooks[key]
                g, v = (cast(nn.Parameter, parameters.pop(f"{old.name}_{part}")) for part in "gv")
                delattr(module, old.name)
                module.register_parameter(old.name, nn.Parameter(v.detach().clone(), requires_grad=v.requires_grad))
                torch.nn.utils.parametrizations.weight_norm(module, old.name, old.dim)
                made: Any = cast(nn.ModuleDict, module.parametrizations)[old.name]
                made.original0.data.copy_(g.detach().reshape(made.original0.shape))


def _chosen(net: nn.Module, name: str | Sequence[str] | None) -> dict[str, tuple[nn.Module, str]]:
    """The parametrized tensors that the patterns choose."""
    found = {
        f"{path}.{local}" if path else local: (module, local)
        for path, module in net.named_modules()
        if parametrize.is_parametrized(module)
        for local in cast(nn.ModuleDict, module.parametrizations)
    }
    patterns = ["*"] if name is None else [name] if isinstance(name, str) else list(name)
    for pattern in patterns:
        if not any(fnmatchcase(each, pattern) for each in found):
            raise GeometryError(
                f"from_parametrized was asked for '{pattern}', but the parametrized tensors are {list(found)}. Only what "
                "torch.nn.utils.parametrize has registered is known as a map; register a parametrization, or use a map of "
                "geoad.maps with chart.reparametrize."
            )
    return {each: place for each, place in found.items() if any(fnmatchcase(each, pattern) for pattern in patterns)}


def _require_unshared(net: nn.Module, places: dict[str, tuple[nn.Module, str]]) -> None:
    owners: dict[int, list[str]] = {}
    for path, module in net.named_modules():
        for local, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(f"{path}.{local}" if path else local)
    for tensor, (module, local) in places.items():
        for parameter in cast(nn.ModuleDict, module.parametrizations)[local].parameters():
            if parameter.requires_grad and len(owners[id(parameter)]) > 1:
                raise UnsupportedModuleError(
                    f"the parametrization of '{tensor}' shares a trained tensor, known as {owners[id(parameter)]}. Each map "
                    "acts on a weight of its own, and the shared numbers would be coordinates twice; untie them, or take the "
                    "network as it is: GeoModule(net), whose reference chart has the tensor once."
                )


def _unparametrize(module: nn.Module, local: str, weight: Tensor) -> None:
    """Put a plain parameter in the place of a parametrized tensor; torch's own way would change the class of the original."""
    made = cast(nn.ModuleDict, module.parametrizations)
    del made[local]
    old = type(module)
    if len(made):
        kept = {key: value for key, value in vars(old).items() if key not in (local, "__dict__", "__weakref__")}
        module.__class__ = cast("type[nn.Module]", type(old.__name__, old.__bases__, kept))
    else:
        del module.parametrizations
        module.__class__ = cast("type[nn.Module]", old.__bases__[0])
    module.register_parameter(local, nn.Parameter(weight.clone()))


# -- one tensor ----------------------------------------------------------------------------------------------------------------


def _parts(tensor: str, modules: nn.Module) -> dict[str, Part]:
    """The trained tensors of a parametrization, by the names of the parts of ψ."""
    trained = {name: p for name, p in modules.named_parameters() if p.requires_grad}
    require_real(list(trained.values()), tensor)
    if list(trained) == ["original"]:
        return {"": Part("original", trained["original"].shape)}
    return {name.replace(".", "_"): Part(name, p.shape) for name, p in trained.items()}


def _map(tensor: str, modules: Any, parts: dict[str, Part], kind: str | None) -> tuple[Map, dict[str, Tensor]]:
    """The map of one tensor, and the original values of the parts of ψ."""
    layers = list(modules)[: len(modules)]
    if len(layers) == 1 and isinstance(layers[0], _WeightNorm) and len(parts) == 2 and kind in (None, "submersion"):
        dim = layers[0].dim
        return WeightNorm(None if dim == -1 else dim), {"g": modules.original0, "v": modules.original1}
    device = next(modules.buffers()).device
    found, making = classify(tensor, modules.cpu(), parts, kind)
    making.to(device)
    return _MAPS[found](making), making.originals(torch.zeros((), dtype=torch.float64, device="cpu"))


def _asked(kind: str | Mapping[str, str] | None, tensor: str) -> str | None:
    if kind is None or isinstance(kind, str):
        return kind
    return next((value for pattern, value in kind.items() if fnmatchcase(tensor, pattern)), None)


def _block(tensor: str, part: str) -> str:
    return f"{tensor}_{part}" if part else tensor
