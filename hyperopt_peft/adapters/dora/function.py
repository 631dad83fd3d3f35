"""DoRA's linear layer as one autograd node that recomputes intermediates in its backward pass.

    y = g ∘ V x + b     V = W0 + s·B·A     g = m / ‖V_j‖

Shapes: x (…, in), y (…, out), A (r, in), B (out, r), W0 (out, in), g and b (out,). With
dy = ∂L/∂y and sums over all tokens t (arXiv:2402.09353, Eq. 5, differentiated):

    ∂L/∂x = dy (g ∘ V)        ∂L/∂A = s·((dy ∘ g) B)ᵀ x        ∂L/∂b = Σ_t dy
    ∂L/∂g = Σ_t dy ∘ V x      ∂L/∂B = s·g ∘ (dyᵀ x Aᵀ)

x, A and B have the dtype of the matrix products, and g has float32 or wider. y replaces the base
layer's output in memory and has its dtype. Backward passes are differentiable; one with respect to
some of the variables computes only their gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.utils.autograd import needed_inputs, without_autocast

# For ∂L/∂x, forming g ∘ V takes passes over (out, in), and not forming it, passes over the tokens.
# From this ratio of tokens to `in`, forming g ∘ V is faster.
MERGE_FROM = 3

Gradients = tuple[Tensor | None, ...]


class DoraLinear(torch.autograd.Function):
    """y = g ∘ V x + b, given ``base`` = W0 x + b without its graph.

    Returns y and (A x)ᵀ, which has no gradient. V x = (y − b)/g is not saved, since the next
    operation usually saves y. V x is recomputed for rows with g close to zero.
    """

    @staticmethod
    @without_autocast
    def forward(
        x: Tensor,
        a: Tensor,
        b: Tensor,
        g: Tensor,
        w0: Tensor,
        base: Tensor,
        bias: Tensor | None,
        s: float,
    ) -> tuple[Tensor, Tensor]:
        """y in the memory of ``base``, which is contiguous, and (A x)ᵀ of shape (r, tokens)."""
        a_x, factor, rows = a @ _matrix(x).T, _scaled(b, g, s), _matrix(base)
        shift = torch.zeros_like(g) if bias is None else (1 - g) * bias
        if base.dtype == g.dtype == a_x.dtype:
            torch.addcmul(shift, rows, g, out=rows).addmm_(a_x.T, factor)
        else:
            rows.copy_(torch.addcmul(shift, rows, g) + a_x.T @ factor)
        return base, a_x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Save the arguments and the outputs."""
        x, a, b, g, w0, base, bias, ctx.s = inputs
        ctx.mark_dirty(base)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, a, b, g, w0, bias, *output)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor | None, _: None) -> Gradients:
        """∂L/∂x, ∂L/∂A, ∂L/∂B, ∂L/∂g, …, ∂L/∂b."""
        if dy is None:
            return (None,) * 8
        x, a, b, g, w0, bias, y, a_x = ctx.saved_tensors
        need = needed_inputs(ctx, 4)
        products = _product_gradients(dy, x, a, b, g, w0, a_x, ctx.s, need, base_gain=g)
        dg = dbias = None
        if need[3]:
            along = _sum_of_products(dy, y, g.dtype, bias)
            dg = _gain_gradient(along, dy, x, a, b, g, w0, ctx.s)
        if bias is not None and ctx.needs_input_grad[6]:
            dbias = _matrix(dy).sum(0, dtype=g.dtype).to(bias.dtype)
        return *products, dg, None, None, dbias, None


class DoraDropoutLinear(torch.autograd.Function):
    """y = W0 x0 + b + (g − 1) ∘ W0 x + g ∘ s·B A x, where x is x0 after dropout.

    ``base`` is W0 x0 + b without its graph. Returns y, and (A x)ᵀ and V x, which have no gradient.
    """

    @staticmethod
    @without_autocast
    def forward(
        x: Tensor,
        a: Tensor,
        b: Tensor,
        g: Tensor,
        x0: Tensor,
        w0: Tensor,
        base: Tensor,
        bias: Tensor | None,
        s: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y in the memory of ``base``, (A x)ᵀ of shape (r, tokens), and V x shaped like y."""
        tokens, rows = _matrix(x), _matrix(base)
        a_x, w0_x, factor = a @ tokens.T, tokens @ w0.to(x.dtype).T, _scaled(b, g, s)
        if base.dtype == g.dtype == a_x.dtype:
            rows.addcmul_(w0_x, g - 1).addmm_(a_x.T, factor)
        else:
            rows.copy_(torch.addcmul(rows, w0_x, g - 1) + a_x.T @ factor)
        return base, a_x, w0_x.addmm_(a_x.T, s * b.T).view_as(base)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save the arguments, (A x)ᵀ and V x."""
        x, a, b, g, _, w0, base, bias, ctx.s = inputs
        ctx.mark_dirty(base)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, a, b, g, w0, bias, *output[1:])

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> Gradients:
        """∂L/∂x, ∂L/∂A, ∂L/∂B, ∂L/∂g, ∂L/∂x0, …, ∂L/∂b."""
        if dy is None:
            return (None,) * 9
        x, a, b, g, w0, bias, a_x, v_x = ctx.saved_tensors
        need = needed_inputs(ctx, 5)
        products = _product_gradients(dy, x, a, b, g, w0, a_x, ctx.s, need, base_gain=g - 1)
        dg = dx0 = dbias = None
        if need[3]:
            if torch.is_grad_enabled():  # differentiated once more: V x must be a function of all
                v_x = x @ torch.addmm(w0.to(x.dtype), b, a, alpha=ctx.s).T
            dg = _sum_of_products(dy, v_x, g.dtype)
        if need[4]:
            dx0 = (dy @ w0.to(dy.dtype)).to(x.dtype)
        if bias is not None and ctx.needs_input_grad[7]:
            dbias = _matrix(dy).sum(0, dtype=g.dtype).to(bias.dtype)
        return *products, dg, dx0, None, None, dbias, None


def _product_gradients(
    dy: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    w0: Tensor,
    a_x: Tensor,
    s: float,
    need: tuple[bool, ...],
    base_gain: Tensor,
) -> Gradients:
    """The needed ones of ∂L/∂x, ∂L/∂A and ∂L/∂B for base_gain ∘ W0 x + g ∘ s·B A x."""
    need_x, need_a, need_b = need[:3]
    tokens, rows = _matrix(x), _matrix(dy)
    narrow = rows.to(x.dtype)
    merge = len(tokens) >= MERGE_FROM * tokens.shape[1]
    dx = da = db = None
    if need_x and merge:
        weight = base_gain[:, None] * w0
        weight = weight.addmm_((s * g)[:, None] * b, a.to(weight.dtype))
        dx = rows @ weight.to(rows.dtype)
    if need_a or (need_x and not merge):
        dh = _scaled(b, g, s) @ narrow.T
        if need_a:
            da = dh @ tokens
        if need_x and not merge:
            dx = (rows * base_gain).to(rows.dtype) @ w0.to(rows.dtype)
            dx = dx.to(x.dtype).addmm_(dh.T, a)
    if need_b:
        if torch.is_grad_enabled():  # differentiated once more: A x must be a function of both
            a_x = a @ tokens.T
        db = (s * g * (a_x @ narrow)).T.to(b.dtype)
    return None if dx is None else dx.to(x.dtype).view_as(x), da, db


def _gain_gradient(
    along: Tensor, dy: Tensor, x: Tensor, a: Tensor, b: Tensor, g: Tensor, w0: Tensor, s: float
) -> Tensor:
    """∂L/∂g = Σ_t dy ∘ V x as along / g; rows with g near zero are recomputed. Reads g back.

    The division enlarges the rounding error ε of y. Since rows with |g| below ε^¼ are recomputed,
    the error stays under ε^¾ of |y|.
    """
    near_zero = g.abs() <= torch.finfo(dy.dtype).eps ** 0.25
    dg = along / g.masked_fill(near_zero, 1)
    if not g.is_meta and len(rows := near_zero.nonzero()[:, 0]):
        v = torch.addmm(w0[rows].to(x.dtype), b[rows], a, alpha=s)
        exact = (_matrix(dy)[:, rows].to(g.dtype) * (_matrix(x) @ v.T)).sum(0)
        dg = dg.index_copy(0, rows, exact)
    return dg


def _sum_of_products(
    dy: Tensor, y: Tensor, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """Σ_t dy ∘ (y − b), (out,); on a CPU in blocks of tokens that fit its cache."""
    dy, y = _matrix(dy), _matrix(y)
    block = max(1, 2**18 // y.shape[1]) if y.device.type == "cpu" else max(1, len(y))
    pairs = zip(dy.split(block), y.split(block), strict=True)
    shift = 0 if bias is None else bias.to(dtype)
    return torch.stack([(p.to(dtype) * (q - shift)).sum(0) for p, q in pairs]).sum(0)


def _matrix(tensor: Tensor) -> Tensor:
    """``tensor`` with all axes but the last flattened."""
    return tensor.reshape(-1, tensor.shape[-1])


def _scaled(b: Tensor, g: Tensor, s: float) -> Tensor:
    """(s·g ∘ B)ᵀ of shape (r, out) in the dtype of B; contiguous, as thin products are faster."""
    return (s * g * b.T).to(b.dtype).contiguous()
