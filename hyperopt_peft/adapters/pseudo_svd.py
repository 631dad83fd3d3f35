"""LoRA's update as a pseudo singular value decomposition, in a plain PEFT adapter.

    ΔW = s·P Λ Q      P (out, r), Q (r, in), Λ = diag(λ), λ (r,), s PEFT's scaling

Q is PEFT's A, and P Λ a parametrization of PEFT's B, so that forward pass, dropout, merging and
switching are PEFT's. State dicts have B = P Λ in place of P and λ, so that a saved adapter or
checkpoint is a LoRA adapter, which loads without this library.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import layer as lora
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hyperopt_peft.adapters import peft_internals
from hyperopt_peft.adapters.layers import factors, lora_layers, resolve_adapter
from hyperopt_peft.errors import ProblemError

P, VALUES = (f"parametrizations.weight.original{index}" for index in (0, 1))


class ScaledColumns(nn.Module):
    """B = P Λ; of a convolution B has shape (out, r, 1, …)."""

    def forward(self, p: Tensor, values: Tensor) -> Tensor:
        """B for P of B's shape and λ of shape (r,)."""
        return p * values.view(-1, *(1,) * (p.dim() - 2))

    def right_inverse(self, b: Tensor) -> tuple[Tensor, Tensor]:
        """P with unit columns, and λ ≥ 0; for a zero column of B λ = 0 and P is random."""
        columns = b.flatten(1)
        values = torch.linalg.vector_norm(columns, dim=0)
        zero = values == 0
        p = columns / torch.where(zero, 1, values)
        if zero.any():
            p = torch.where(zero, _orthonormal(columns.shape).to(p), p)
        return p.view_as(b), values


def use_pseudo_svd(peft_model: PeftModel, adapter_name: str | None = None) -> PeftModel:
    """Replace B and A by P, Λ and Q in every layer of a LoRA adapter, with equal outputs.

    P Λ Q is the singular value decomposition of B·A. If B = 0, as in a new adapter, λ = 0, and P
    and Q are random with orthonormal columns and rows; the penalty is then at its minimum, and
    ∂L/∂λ is not zero.

    Layers are linear or convolutions, also over a quantised base. To load a saved adapter, call
    ``PeftModel.from_pretrained(..., is_trainable=True)`` and then this function.

    Args:
        adapter_name: the active adapter by default.

    Returns:
        ``peft_model`` itself.

    Raises:
        ProblemError: as `lora_layers`; a layer with a variant of LoRA such as DoRA; an embedding or
            a bare parameter; a frozen adapter; a rank above the size of the weight; or a second
            call. Nothing has changed.

    Example:
        >>> from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
        >>> config = LoraConfig(r=2, target_modules=["0"])
        >>> model = use_pseudo_svd(get_peft_model(nn.Sequential(nn.Linear(4, 3)), config))
        >>> sorted(get_peft_model_state_dict(model))
        ['base_model.model.0.lora_A.weight', 'base_model.model.0.lora_B.weight']
    """
    adapter = resolve_adapter(peft_model, adapter_name)
    layers = lora_layers(peft_model, adapter)
    for name, layer in layers:
        _check(name, layer, adapter)
    for _, layer in layers:
        _decompose(*factors(layer, adapter))
        lora_b: Any = layer.lora_B[adapter]
        parametrize.register_parametrization(lora_b, "weight", ScaledColumns())
        lora_b.register_state_dict_post_hook(_join)
        lora_b.register_load_state_dict_pre_hook(_separate)
    return peft_model


def pseudo_singular_values(
    peft_model: PeftModel, adapter_name: str | None = None
) -> dict[str, nn.Parameter]:
    """λ, (r,), of every layer, by its name in ``peft_model.named_parameters()``.

    Raises:
        ProblemError: as `lora_layers`; or `use_pseudo_svd` was not called for the adapter.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> config = LoraConfig(r=2, target_modules=["0"])
        >>> model = use_pseudo_svd(get_peft_model(nn.Sequential(nn.Linear(4, 3)), config))
        >>> [values.tolist() for values in pseudo_singular_values(model).values()]
        [[0.0, 0.0]]
    """
    adapter = resolve_adapter(peft_model, adapter_name)
    layers = _pseudo_layers(peft_model, adapter)
    return {f"{n}.lora_B.{adapter}.{VALUES}": b.get_parameter(VALUES) for n, b, _ in layers}


def orthogonality_penalty(peft_model: PeftModel, adapter_name: str | None = None) -> Tensor:
    """Σ over layers of ‖PᵀP − I‖² + ‖QQᵀ − I‖² (Frobenius norms), a scalar.

    The dtype is float32 or wider, also under autocast.

    Raises:
        ProblemError: as `pseudo_singular_values`.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> config = LoraConfig(r=2, target_modules=["0"])
        >>> model = use_pseudo_svd(get_peft_model(nn.Sequential(nn.Linear(4, 3)), config))
        >>> orthogonality_penalty(model).item() < 1e-6  # orthonormal at the start
        True
    """
    terms = []
    for _, lora_b, q in _pseudo_layers(peft_model, resolve_adapter(peft_model, adapter_name)):
        with torch.autocast(q.device.type, enabled=False):
            terms += [_distance(lora_b.get_parameter(P).flatten(1).T), _distance(q)]
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def _distance(rows: Tensor) -> Tensor:
    """‖M Mᵀ − I‖² of M (r, n)."""
    m = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return (m @ m.T - torch.eye(len(m), dtype=m.dtype, device=m.device)).square().sum()


def _pseudo_layers(peft_model: PeftModel, adapter: str) -> list[tuple[str, nn.Module, Tensor]]:
    """Name, PEFT's module of B, and Q of every layer."""
    pseudo_layers = []
    for name, layer in lora_layers(peft_model, adapter):
        b: Any = dict(layer.lora_B).get(adapter)
        parametrized = b is not None and parametrize.is_parametrized(b, "weight")
        if not parametrized or not isinstance(b.parametrizations.weight[0], ScaledColumns):
            raise ProblemError(
                f"{name}: has no pseudo singular values for adapter {adapter!r}; call "
                "use_pseudo_svd(model) first"
            )
        pseudo_layers.append((name, b, factors(layer, adapter)[0]))
    return pseudo_layers


def _check(name: str, layer: lora.LoraLayer, adapter: str) -> None:
    variant = peft_internals.variant(layer, adapter)
    if variant is not None:
        raise ProblemError(
            f"{name}: uses {type(variant).__name__} for adapter {adapter!r}, and a pseudo SVD "
            "needs plain LoRA; create the adapter with use_dora=False and no other variant"
        )
    if adapter not in layer.lora_A or isinstance(layer, peft_internals.ParamWrapper):
        raise ProblemError(
            f"{name}: is a lora.{type(layer).__name__}, and a pseudo SVD needs linear or "
            "convolution layers; leave it out of target_modules and target_parameters"
        )
    if parametrize.is_parametrized(layer.lora_B[adapter]):
        raise ProblemError(f"{name}: has a parametrized B already; call use_pseudo_svd once only")
    a, b = factors(layer, adapter)
    rank, size = len(a), min(len(b), a.shape[1])
    if rank > size:
        raise ProblemError(
            f"{name}: has rank {rank}, its weight only {size}, so P and Q cannot be orthonormal; "
            f"give it a rank of at most {size}, with rank_pattern for example"
        )
    if not all(m[adapter].weight.requires_grad for m in (layer.lora_A, layer.lora_B)):
        raise ProblemError(
            f"{name}: is frozen; load adapter {adapter!r} with "
            "PeftModel.from_pretrained(..., is_trainable=True) or activate it with set_adapter"
        )


@torch.no_grad()
def _decompose(a: Tensor, b: Tensor) -> None:
    """Change A and B in place to Q and P Λ with the same product; a random Q where B = 0."""
    if not b.any():
        a.copy_(_orthonormal(a.T.shape).T)
        return
    left, r_left = torch.linalg.qr(b.to("cpu", torch.float64))
    right, r_right = torch.linalg.qr(a.T.to("cpu", torch.float64))
    u, values, vh = torch.linalg.svd(r_left @ r_right.T)
    a.copy_(vh @ right.T)
    b.copy_(left @ u * values)


def _orthonormal(shape: tuple[int, ...]) -> Tensor:
    """A random matrix with orthonormal columns."""
    # On the CPU, because some accelerators have no float64.
    return nn.init.orthogonal_(torch.empty(shape, dtype=torch.float64))


def _join(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """P and λ of a state dict become B."""
    if state.keys() >= {prefix + P, prefix + VALUES}:
        p, values = state.pop(prefix + P), state.pop(prefix + VALUES)
        state[f"{prefix}weight"] = ScaledColumns()(p, values)


def _separate(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """B of a state dict becomes P and λ."""
    if f"{prefix}weight" in state and parametrize.is_parametrized(module, "weight"):
        b = state.pop(f"{prefix}weight")
        state[prefix + P], state[prefix + VALUES] = ScaledColumns().right_inverse(b)
