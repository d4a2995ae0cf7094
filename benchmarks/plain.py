"""Every row in plain PyTorch, as its documentation would have it. In float64 this is the reference for all candidates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, linearize, vjp, vmap
from workloads import Work

Result = Tensor | list[Tensor] | dict[str, Tensor]
Candidate = Callable[[Work, nn.Module], Result]


def reference(w: Work) -> Result:
    """The result of the row of `w` in float64."""
    w = w.double()
    if w.row.name == "g":  # all estimates are random: compare with a better one
        torch.manual_seed(99)
        return quadratic_forms(w, w.net, w.probes(400)).mean()
    return REFERENCE[w.row.name](w, w.net)


# -- Fisher matrices -----------------------------------------------------------------------------------------------------------


def parameters(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in net.named_parameters()}


def ravel(blocks: dict[str, Tensor], batch: int = 0) -> Tensor:
    """The blocks, behind `batch` axes, as one."""
    return torch.cat([block.flatten(batch) for block in blocks.values()], batch).detach()


def root(logits: Tensor) -> Tensor:
    """S (n, c, c) with S Sᵀ = diag p - p pᵀ."""
    p = logits.softmax(-1)
    return torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]


def rows(w: Work, net: nn.Module) -> Iterator[Tensor]:
    """(n, c, d): the rows r of F = Σ r rᵀ / N, 256 samples at a time."""

    def single(theta: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(net, theta, (sample[None],))[0]

    for x, _ in w.batches(256):
        jacobians = ravel(vmap(jacrev(single), (None, 0))(parameters(net), x), 2)
        yield torch.bmm(root(net(x).detach()).mT, jacobians)


def dense(w: Work, net: nn.Module) -> Tensor:
    total = w.flat.new_zeros(w.dim, w.dim)
    for r in rows(w, net):
        total.addmm_(r.flatten(0, 1).T, r.flatten(0, 1))
    return total.div_(len(w.x))


def diagonal(w: Work, net: nn.Module) -> Tensor:
    return torch.stack([r.square().sum((0, 1)) for r in rows(w, net)]).sum(0) / len(w.x)


def block_diagonal(w: Work, net: nn.Module) -> list[Tensor]:
    totals = [w.flat.new_zeros(s.stop - s.start, s.stop - s.start) for s in w.layers]
    for r in rows(w, net):
        for total, s in zip(totals, w.layers, strict=True):
            part = r[..., s].flatten(0, 1)
            total.addmm_(part.T, part)
    return [total.div_(len(w.x)) for total in totals]


def tangent_kernel(w: Work, net: nn.Module) -> Tensor:
    """K (n, c, n, c) = J Jᵀ, the rows of J made by vmap of jacrev."""

    def single(theta: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(net, theta, (sample[None],))[0]

    jacobians = ravel(vmap(jacrev(single), (None, 0))(parameters(net), w.x), 2)
    n, c, _ = jacobians.shape
    return (jacobians.flatten(0, 1) @ jacobians.flatten(0, 1).T).reshape(n, c, n, c)


def tangent_kernel_by_parameter(w: Work, net: nn.Module) -> Tensor:
    """As in the tutorial of PyTorch: one einsum for each parameter."""

    def single(theta: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(net, theta, (sample[None],))[0]

    blocks = vmap(jacrev(single), (None, 0))(parameters(net), w.x)
    parts = [torch.einsum("naf,mbf->namb", block.flatten(2), block.flatten(2)) for block in blocks.values()]
    return sum(parts[1:], parts[0])


def bent(logits: Tensor, t: Tensor) -> Tensor:
    """(diag p - p pᵀ) t / N."""
    p = logits.softmax(-1)
    return p * (t - (p * t).sum(-1, keepdim=True)) / len(p)


def network(w: Work, net: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda theta: functional_call(net, theta, (w.x,))


def fisher_products(w: Work, net: nn.Module) -> Tensor:
    """A jvp and a vjp for each."""
    f, theta = network(w, net), parameters(net)

    def product(v: Tensor) -> Tensor:
        logits, t = jvp(f, (theta,), (w.blocks(v),))
        return ravel(vjp(f, theta)[1](bent(logits, t))[0])

    return w.products(product)


def fisher_products_linearized(w: Work, net: nn.Module) -> Tensor:
    """The network is linearized once."""
    f, theta = network(w, net), parameters(net)
    logits, push = linearize(f, theta)
    _, pull = vjp(f, theta)
    return w.products(lambda v: ravel(pull(bent(logits, push(w.blocks(v))))[0]))


# -- KFAC, with hooks ----------------------------------------------------------------------------------------------------------


def signals(w: Work, net: nn.Module) -> tuple[list[Tensor], list[list[Tensor]]]:
    """For each layer what goes in, with a one behind (N, t, i+1), and what comes back for each column of the root (N, t, o)."""
    modules = [m for m in net.children() if next(m.parameters(), None) is not None]
    came: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    hooks = [m.register_forward_hook(lambda m, a, out: came.update({m: (a[0].detach(), out)})) for m in modules]
    logits = net(w.x)
    for hook in hooks:
        hook.remove()
    inputs: list[Tensor] = []
    for m in modules:
        a = came[m][0]
        is_conv = isinstance(m, nn.Conv2d)
        a = F.unfold(a, m.kernel_size, m.dilation, m.padding, m.stride).mT if is_conv else a[:, None]  # pyright: ignore
        inputs.append(torch.cat([a, torch.ones_like(a[..., :1])], -1))
    outputs, columns = [came[m][1] for m in modules], root(logits.detach()).unbind(-1)
    back: list[list[Tensor]] = [[] for _ in modules]
    for column in columns:
        found = torch.autograd.grad(logits, outputs, column, retain_graph=True)
        for i, g in enumerate(found):
            back[i].append(g.flatten(2).mT if g.ndim == 4 else g[:, None])
    return inputs, back


def factors(a: Tensor, back: list[Tensor]) -> tuple[Tensor, Tensor]:
    """A = Σ a aᵀ / N and G = Σ g gᵀ / (N t) of one layer (Grosse & Martens 2016; "expand" in Eschenhagen et al. 2023)."""
    n, t = a.shape[:2]
    return torch.einsum("nti,ntj->ij", a, a) / n, sum(torch.einsum("nti,ntj->ij", g, g) for g in back) / (n * t)  # pyright: ignore


def layer_matrices(w: Work, flat: Tensor) -> list[Tensor]:
    """A flat vector as one matrix (o, i+1) for each layer, the bias behind."""
    parts = list(w.blocks(flat).values())
    return [torch.cat([a.flatten(1), b[:, None]], 1) for a, b in zip(parts[::2], parts[1::2], strict=True)]


def flat_layers(matrices: list[Tensor]) -> Tensor:
    return torch.cat([part for m in matrices for part in (m[:, :-1].flatten(), m[:, -1])])


def kfac(w: Work, net: nn.Module) -> dict[str, Tensor]:
    """K v with weight and bias in one block ("joint"); and the weights alone, for those who give each a block ("weights")."""
    pairs = [factors(a, back) for a, back in zip(*signals(w, net), strict=True)]
    joint = [g @ m @ a for (a, g), m in zip(pairs, layer_matrices(w, w.flat), strict=True)]
    return {"joint": flat_layers(joint), "weights": weights_product(w, [(a[:-1, :-1], g) for a, g in pairs])}


def weights_product(w: Work, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Blocks A ⊗ G of the weights alone, times the fixed vector."""
    matrices = [m[:, :-1] for m in layer_matrices(w, w.flat)]
    return torch.cat([(g @ m @ a).flatten() for (a, g), m in zip(pairs, matrices, strict=True)]).detach()


def ekfac(w: Work, net: nn.Module) -> dict[str, Tensor]:
    trace, product = w.flat.new_zeros(()), []
    for a, back, v in zip(*signals(w, net), layer_matrices(w, w.flat), strict=True):
        (_, qa), (_, qg) = (torch.linalg.eigh(m) for m in factors(a, back))
        values = sum(((g @ qg).mT @ (a @ qa)).square().sum(0) for g in back) / len(a)
        trace = trace + values.sum()  # pyright: ignore
        product.append(qg @ (values * (qg.T @ v @ qa)) @ qa.T)
    return {"trace": trace, "product": flat_layers(product)}


# -- derivatives of the loss ---------------------------------------------------------------------------------------------------


def loss(w: Work, net: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda theta: F.cross_entropy(functional_call(net, theta, (w.x,)), w.y)


def hessian_products(w: Work, net: nn.Module) -> Tensor:
    """Forward over reverse for each."""
    slope, theta = grad(loss(w, net)), parameters(net)
    return w.products(lambda v: ravel(jvp(slope, (theta,), (w.blocks(v),))[1]))


def kept_hessian(w: Work, net: nn.Module) -> Callable[[Tensor], Tensor]:
    """Reverse over reverse; the graph of the gradient is kept."""
    _, pull = vjp(grad(loss(w, net)), parameters(net))
    return lambda v: ravel(pull(w.blocks(v))[0])


def hessian_products_kept(w: Work, net: nn.Module) -> Tensor:
    return w.products(kept_hessian(w, net))


def top_eigenvalue(w: Work, net: nn.Module) -> Tensor:
    return eigsh(w, kept_hessian(w, net))


def eigsh(w: Work, product: Callable[[Tensor], Tensor]) -> Tensor:
    """The largest eigenvalue, by ARPACK."""
    from scipy.sparse.linalg import LinearOperator, eigsh  # pyright: ignore

    def matvec(v: Any) -> Any:
        return product(torch.from_numpy(v.ravel()).to(w.flat)).cpu().numpy()

    start = w.flat.cpu().numpy()
    operator = LinearOperator((w.dim, w.dim), matvec, dtype=start.dtype)
    tol = 1e-3 if w.flat.dtype == torch.float32 else 1e-8
    return torch.tensor(eigsh(operator, k=1, which="LA", tol=tol, v0=start, return_eigenvectors=False)[0])


def quadratic_forms(w: Work, net: nn.Module, probes: Tensor) -> Tensor:
    """zᵀ H z for each probe z."""
    product = kept_hessian(w, net)
    return torch.stack([z @ product(z) for z in probes])


def hutchinson(w: Work, net: nn.Module) -> Tensor:
    return quadratic_forms(w, net, w.probes()).mean()


def hutchinson_batched(w: Work, net: nn.Module) -> Tensor:
    """Ten probes at a time."""
    _, pull = vjp(grad(loss(w, net)), parameters(net))
    probes = w.probes()
    columns = {name: torch.stack([w.blocks(z)[name] for z in probes]) for name in w.names}
    return (probes * ravel(vmap(lambda z: pull(z)[0], chunk_size=10)(columns), 1)).sum(1).mean()


def per_sample(w: Work, net: nn.Module) -> Tensor:
    def single(theta: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, theta, (x[None],)), y[None])

    return ravel(vmap(grad(single), (None, 0, 0))(parameters(net), w.x, w.y), 1)


def per_sample_expanded(w: Work, net: nn.Module) -> Tensor:
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    F.cross_entropy(call_for_per_sample_grads(net, loss_reduction="sum")(w.x), w.y, reduction="sum").backward()  # pyright: ignore
    return torch.cat([p.grad_sample.flatten(1) for p in net.parameters()], 1)  # pyright: ignore


REFERENCE: dict[str, Candidate] = {
    "a": dense,
    "b": tangent_kernel,
    "b2": tangent_kernel,
    "b3": tangent_kernel,
    "c1": kfac,
    "c2": ekfac,
    "d": diagonal,
    "d2": diagonal,
    "e": fisher_products,
    "e20": fisher_products,
    "f": hessian_products,
    "f50": hessian_products,
    "f2": top_eigenvalue,
    "g": hutchinson,
    "h": block_diagonal,
    "i": per_sample,
}
