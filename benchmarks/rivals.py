"""An adapter for every library and row. A library is imported when one of its candidates is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import plain
import torch
import torch.nn.functional as F
from candidates import candidate
from plain import Result
from torch import Tensor, nn
from workloads import Work

# -- NNGeometry ----------------------------------------------------------------------------------------------------------------


def _nng(w: Work, net: nn.Module, representation: str) -> Any:
    import nngeometry.object as objects  # pyright: ignore
    from nngeometry.metrics import FIM  # pyright: ignore

    return FIM(net, w.loader(), getattr(objects, representation), variant="classif_logits", device=str(w.device))


def _nng_product(matrix: Any) -> Callable[[Tensor], Tensor]:
    from nngeometry.object.vector import PVector  # pyright: ignore

    layers = matrix.generator.layer_collection
    return lambda v: matrix.mv(PVector(layers, vector_repr=v)).to_torch().detach()


@candidate("a", "nngeometry")
def _(w: Work, net: nn.Module) -> Result:
    return _nng(w, net, "PMatDense").to_torch()


@candidate("b b2 b3", "nngeometry")
def _(w: Work, net: nn.Module) -> Result:
    from nngeometry.gram import GramMatrix

    gram = GramMatrix(model=net, loader=w.loader(), function=lambda *data: net(data[0]))
    return gram.to_torch().detach().permute(1, 0, 3, 2)


@candidate("c1", "nngeometry")
def _(w: Work, net: nn.Module) -> Result:
    return {"joint": _nng_product(_nng(w, net, "PMatKFAC"))(w.flat.clone())}


@candidate("c2", "nngeometry")
def _(w: Work, net: nn.Module) -> Result:
    matrix = _nng(w, net, "PMatEKFAC")
    matrix.update_diag(w.loader())
    return {"trace": matrix.trace().detach(), "product": _nng_product(matrix)(w.flat.clone())}


@candidate("d d2", "nngeometry")
def _(w: Work, net: nn.Module) -> Result:
    return _nng(w, net, "PMatDiag").get_diag().detach()


@candidate("e e20", "nngeometry")
def _(w: Work, net: nn.Module) -> Result:
    return w.products(_nng_product(_nng(w, net, "PMatImplicit")))


def _nng_hessian(w: Work, net: nn.Module) -> Any:
    from nngeometry.hessian import Hessian  # pyright: ignore
    from nngeometry.object import PMatImplicit  # pyright: ignore

    return Hessian(net, w.loader(), PMatImplicit, function=lambda out, y: F.cross_entropy(out, y))


@candidate("f f50", "nngeometry")
def _(w: Work, net: nn.Module) -> Result:
    return w.products(_nng_product(_nng_hessian(w, net)))


@candidate("g", "nngeometry: loop over probes")
def _(w: Work, net: nn.Module) -> Result:
    product = _nng_product(_nng_hessian(w, net))
    return torch.stack([z @ product(z) for z in w.probes()]).mean()


@candidate("h", "nngeometry")
def _(w: Work, net: nn.Module) -> Result:
    return [block.detach() for block in _nng(w, net, "PMatBlockDiag").data.values()]


@candidate("i", "nngeometry")
def _(w: Work, net: nn.Module) -> Result:
    from nngeometry.jacobian import Jacobian  # pyright: ignore

    losses = lambda x, y: F.cross_entropy(net(x), y, reduction="none")[:, None]  # noqa: E731
    return Jacobian(model=net, loader=w.loader(), function=losses).to_torch()[0].detach()


# -- curvlinops ----------------------------------------------------------------------------------------------------------------


def _clo(w: Work, net: nn.Module, name: str, parameters: list[nn.Parameter] | None = None, **options: Any) -> Any:
    import curvlinops  # pyright: ignore

    options |= {"check_deterministic": False, "num_data": len(w.x)}
    given = parameters or list(net.parameters())
    return getattr(curvlinops, name)(net, nn.CrossEntropyLoss(), given, w.batches(), **options)


def _clo_kfac(w: Work, net: nn.Module, name: str) -> Any:
    from curvlinops import FisherType, KFACType  # pyright: ignore

    kinds = {"fisher_type": FisherType.TYPE2, "kfac_approx": KFACType.EXPAND}
    return _clo(w, net, name, separate_weight_and_bias=False, num_per_example_loss_terms=1, **kinds)


def _columns(w: Work, operator: Any, width: int = 128) -> Tensor:
    """The matrix of an operator, some products at a time."""
    unit = torch.eye(operator.shape[0], device=w.device)
    return torch.cat([(operator @ part).detach() for part in unit.split(width, 1)], 1)


@candidate("a", "curvlinops")
def _(w: Work, net: nn.Module) -> Result:
    return _columns(w, _clo(w, net, "GGNLinearOperator"))


@candidate("c1", "curvlinops")
def _(w: Work, net: nn.Module) -> Result:
    return {"joint": (_clo_kfac(w, net, "KFACLinearOperator") @ w.flat).detach()}


@candidate("c2", "curvlinops")
def _(w: Work, net: nn.Module) -> Result:
    matrix = _clo_kfac(w, net, "EKFACLinearOperator")
    product = (matrix @ w.flat).detach()
    trace = matrix.trace() if callable(matrix.trace) else matrix.trace
    return {"trace": trace.detach(), "product": product}


@candidate("e e20", "curvlinops")
def _(w: Work, net: nn.Module) -> Result:
    operator = _clo(w, net, "GGNLinearOperator")
    return w.products(lambda v: (operator @ v).detach())


@candidate("f f50", "curvlinops")
def _(w: Work, net: nn.Module) -> Result:
    operator = _clo(w, net, "HessianLinearOperator")
    return w.products(lambda v: (operator @ v).detach())


@candidate("f2", "curvlinops: with scipy")
def _(w: Work, net: nn.Module) -> Result:
    operator = _clo(w, net, "HessianLinearOperator")
    return plain.eigsh(w, lambda v: (operator @ v).detach())


@candidate("g", "curvlinops")
def _(w: Work, net: nn.Module) -> Result:
    import curvlinops  # pyright: ignore

    return curvlinops.hutchinson_trace(_clo(w, net, "HessianLinearOperator"), num_matvecs=50).detach()


@candidate("h", "curvlinops")
def _(w: Work, net: nn.Module) -> Result:
    layers = [list(m.parameters()) for m in net.children() if next(m.parameters(), None) is not None]
    return [_columns(w, _clo(w, net, "GGNLinearOperator", parameters)) for parameters in layers]


# -- BackPACK ------------------------------------------------------------------------------------------------------------------


def _backpack(w: Work, net: nn.Module, extension: str, reduction: str = "mean") -> list[Any]:
    """The parameters of the network, with what the extension leaves at them."""
    import backpack  # pyright: ignore
    from backpack import extensions  # pyright: ignore

    net, loss = backpack.extend(net), backpack.extend(nn.CrossEntropyLoss(reduction=reduction))
    with backpack.backpack(getattr(extensions, extension)()):
        loss(net(w.x), w.y).backward()
    return list(net.parameters())


@candidate("a", "backpack")
def _(w: Work, net: nn.Module) -> Result:
    r = torch.cat([p.sqrt_ggn_exact.flatten(2) for p in _backpack(w, net, "SqrtGGNExact")], 2).flatten(0, 1)
    return r.T @ r


@candidate("c1", "backpack: KFLR, bias apart")
def _(w: Work, net: nn.Module) -> Result:
    weights = [p for p in _backpack(w, net, "KFLR") if p.ndim > 1]
    return {"weights": plain.weights_product(w, [(p.kflr[1], p.kflr[0]) for p in weights])}


@candidate("d d2", "backpack")
def _(w: Work, net: nn.Module) -> Result:
    return torch.cat([p.diag_ggn_exact.flatten() for p in _backpack(w, net, "DiagGGNExact")])


@candidate("e e20", "backpack")
def _(w: Work, net: nn.Module) -> Result:
    from backpack.hessianfree.ggnvp import ggn_vector_product  # pyright: ignore

    out = net(w.x)
    loss = F.cross_entropy(out, w.y)
    flat = lambda parts: torch.cat([t.flatten() for t in parts]).detach()  # noqa: E731
    return w.products(lambda v: flat(ggn_vector_product(loss, out, net, list(w.blocks(v).values()))))


@candidate("f f50", "backpack")
def _(w: Work, net: nn.Module) -> Result:
    from backpack.hessianfree.hvp import hessian_vector_product  # pyright: ignore

    loss, parameters = F.cross_entropy(net(w.x), w.y), list(net.parameters())
    flat = lambda parts: torch.cat([t.flatten() for t in parts]).detach()  # noqa: E731
    return w.products(lambda v: flat(hessian_vector_product(loss, parameters, list(w.blocks(v).values()))))


@candidate("h", "backpack")
def _(w: Work, net: nn.Module) -> Result:
    parts = [p.sqrt_ggn_exact.flatten(2).flatten(0, 1) for p in _backpack(w, net, "SqrtGGNExact")]
    layers = [torch.cat(pair, 1) for pair in zip(parts[::2], parts[1::2], strict=True)]
    return [r.T @ r for r in layers]


@candidate("i", "backpack")
def _(w: Work, net: nn.Module) -> Result:
    return torch.cat([p.grad_batch.flatten(1) for p in _backpack(w, net, "BatchGrad", "sum")], 1)


# -- ASDL ----------------------------------------------------------------------------------------------------------------------


def _asdl(w: Work, net: nn.Module, shape: str) -> list[Any]:
    """The modules of the network with a Fisher matrix at them; the first entry is the network."""
    from asdl import FISHER_EXACT, LOSS_CROSS_ENTROPY, FisherConfig, get_fisher_maker  # pyright: ignore

    options = {"fisher_type": FISHER_EXACT, "loss_type": LOSS_CROSS_ENTROPY, "data_size": len(w.x)}
    maker = get_fisher_maker(net, FisherConfig(fisher_shapes=[shape], **options))
    out = maker.setup_model_call(net, w.x)
    maker.setup_loss_call(F.cross_entropy, out, w.y)
    maker.forward_and_backward()
    return [net, *(m for m in net.children() if hasattr(m, "fisher"))]


@candidate("a", "asdl")
def _(w: Work, net: nn.Module) -> Result:
    return _asdl(w, net, "full")[0].fisher.data


@candidate("c1", "asdl: bias apart")
def _(w: Work, net: nn.Module) -> Result:
    pairs = [(m.fisher.kron.A, m.fisher.kron.B) for m in _asdl(w, net, "kron")[1:]]
    return {"weights": plain.weights_product(w, pairs)}


@candidate("d d2", "asdl")
def _(w: Work, net: nn.Module) -> Result:
    found = [m.fisher.diag for m in _asdl(w, net, "diag")[1:]]
    return torch.cat([part.flatten() for each in found for part in (each.weight, each.bias)]).detach()


@candidate("h", "asdl")
def _(w: Work, net: nn.Module) -> Result:
    return [m.fisher.data for m in _asdl(w, net, "layer_wise")[1:]]


@candidate("i", "asdl")
def _(w: Work, net: nn.Module) -> Result:
    from asdl import batch_gradient  # pyright: ignore

    def closure() -> Tensor:
        net.zero_grad()
        loss = F.cross_entropy(net(w.x), w.y, reduction="sum")
        loss.backward()
        return loss

    return batch_gradient(net, closure)


# -- Laplace -------------------------------------------------------------------------------------------------------------------


def _laplace(net: nn.Module) -> Any:
    from laplace.curvature import GGNInterface  # pyright: ignore

    return GGNInterface(net, "classification")


@candidate("a", "laplace")
def _(w: Work, net: nn.Module) -> Result:
    return sum(_laplace(net).full(x, y)[1] for x, y in w.batches(256)) / len(w.x)


@candidate("d d2", "laplace")
def _(w: Work, net: nn.Module) -> Result:
    return sum(_laplace(net).diag(x, y)[1] for x, y in w.batches(256)) / len(w.x)


@candidate("i", "laplace")
def _(w: Work, net: nn.Module) -> Result:
    return _laplace(net).gradients(w.x, w.y)[0].detach()


# -- PyHessian and hessian-eigenthings -----------------------------------------------------------------------------------------


def _pyhessian(w: Work, net: nn.Module) -> Any:
    from pyhessian import hessian  # pyright: ignore

    return hessian(net, nn.CrossEntropyLoss(), data=(w.x, w.y), cuda=w.device.type == "cuda")


@candidate("f f50", "pyhessian")
def _(w: Work, net: nn.Module) -> Result:
    from pyhessian.utils import hessian_vector_product  # pyright: ignore

    h = _pyhessian(w, net)
    product = lambda v: hessian_vector_product(h.gradsH, h.params, list(w.blocks(v).values()))  # noqa: E731
    return w.products(lambda v: torch.cat([t.flatten() for t in product(v)]).detach())


@candidate("f2", "pyhessian: power iteration")
def _(w: Work, net: nn.Module) -> Result:
    return torch.tensor(_pyhessian(w, net).eigenvalues(maxIter=200, tol=1e-4, top_n=1)[0][0])


@candidate("g", "pyhessian")
def _(w: Work, net: nn.Module) -> Result:
    return torch.tensor(_pyhessian(w, net).trace(maxIter=50, tol=0.0)).mean()


def _eigenthings(w: Work, net: nn.Module) -> Any:
    from hessian_eigenthings import HessianOperator, supervised_loss  # pyright: ignore

    return HessianOperator(net, w.batches(), supervised_loss(F.cross_entropy))


@candidate("e e20", "hessian-eigenthings")
def _(w: Work, net: nn.Module) -> Result:
    from hessian_eigenthings import GGNOperator, supervised_forward, supervised_loss_of_output  # pyright: ignore

    operator = GGNOperator(net, w.batches(), supervised_forward, supervised_loss_of_output(F.cross_entropy))
    return w.products(lambda v: operator.matvec(v).detach())


@candidate("f f50", "hessian-eigenthings")
def _(w: Work, net: nn.Module) -> Result:
    operator = _eigenthings(w, net)
    return w.products(lambda v: operator.matvec(v).detach())


def _eigenthings_lanczos(w: Work, net: nn.Module, **options: int) -> Result:
    from hessian_eigenthings import lanczos  # pyright: ignore

    return lanczos(_eigenthings(w, net), k=1, seed=0, **options).eigenvalues.flatten()[0].detach()


candidate("f2", "hessian-eigenthings: lanczos")(_eigenthings_lanczos)
candidate("f2", "hessian-eigenthings: lanczos, max_iter=40")(lambda w, net: _eigenthings_lanczos(w, net, max_iter=40))


@candidate("g", "hessian-eigenthings")
def _(w: Work, net: nn.Module) -> Result:
    from hessian_eigenthings import hutchinson  # pyright: ignore

    return torch.tensor(hutchinson(_eigenthings(w, net), num_samples=50, seed=0).estimate)
