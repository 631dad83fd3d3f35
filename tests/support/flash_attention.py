"""FlashAttention on a CPU: Transformers' own cast, then a function of half precision alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import get_target_dtype
from transformers.masking_utils import flash_attention_mask

from hyperopt_peft.utils.autograd import HALF

NAME = "flash_on_cpu"


class HalfAlone(torch.autograd.Function):
    """Attention whose backward pass autograd does not see, as that of FlashAttention's kernels."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        if any(x.dtype not in HALF for x in (q, k, v)):
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale = scale
        return scaled_dot_product_attention(q, k, v, mask, scale=scale)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, mask = ctx.saved_tensors
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in inputs]
            y = scaled_dot_product_attention(*inputs, mask, scale=ctx.scale)
        return (*torch.autograd.grad(y, inputs, slope), None, None)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    position_ids: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The tokens of a row see those of their own document, with and without padding."""
    to, batch = get_target_dtype(query, module), query.shape[0]
    repeats = query.shape[1] // key.shape[1]
    q, k, v = (x.to(to or x.dtype) for x in (query, key, value))
    k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    size = query.shape[2]
    mask = torch.ones(batch, size, size, dtype=torch.bool)
    if getattr(module, "is_causal", True):
        mask = mask.tril()
    if attention_mask is not None:
        mask = mask & attention_mask.bool()[:, None] | torch.eye(size, dtype=torch.bool)
    elif position_ids is not None and batch == 1:
        document = (position_ids == 0).cumsum(-1)
        mask = mask & (document[:, None] == document[:, :, None])
    return HalfAlone.apply(q, k, v, mask[:, None], scaling).transpose(1, 2), None


@contextmanager
def flash_attention() -> Iterator[str]:
    """Within the body, the implementation of the yielded name can be chosen in a config."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    try:
        yield NAME
    finally:
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(NAME)
