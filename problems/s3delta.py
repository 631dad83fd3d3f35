"""S3Delta: chooses the layers with an adapter, by gates learned on validation data.

    upper: min over α          L(A*, B*, z(α); D_val),   Σ_l n_l·p_l = share·Σ_l n_l
    lower: A*, B*(α) = argmin over A, B, head   L(A, B, z(α); D_train)

The update of layer l is ΔW_l = z_l·s·B_l A_l with p_l = σ(α_l/β) and n_l parameters. In training
z_l = σ(logit p_l + logit U) with U uniform in (0, 1), a draw of the binary concrete distribution;
in evaluation z_l = p_l. Then the layers of largest p within the budget are trained from scratch.
Hu et al. 2022, arXiv:2206.07382, who have gates for other kinds of adapters too.
α is shifted to the budget after each upper step. Their code does so in each pass, and also holds
Σ_l p_l constant in ∂p/∂α (``shift_detach``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from hyperopt_peft.method import (
    Bound,
    Method,
    PositiveFloat,
    ProblemError,
    add_gains,
    drawn,
    gain_variables,
    gained_layers,
    gather,
    keep_terms,
    option,
)


@dataclass
class S3Delta(Method):
    """Gates above, A, B and head below; then an adapter in some layers.

    **Where gates are not drawn, a solved lower level absorbs them**, as with `LayerScales`. A gate
    has no gradient where B = 0.

    Raises:
        ProblemError: ``share`` is no share, or too small for any layer; β is not positive; later,
            as `add_gains`.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> layers = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        >>> config = LoraConfig(r=2, target_modules=["0", "1"])
        >>> model, method = get_peft_model(torch.nn.Sequential(*layers), config), S3Delta()
        >>> method.prepare(model)
        >>> list(method.upper_variables(model).values())[1].data += 1
        >>> method.project()
        >>> method.gates(model)
        {'0': 0.377..., '1': 0.622...}
        >>> method.finish(model).peft_config["default"].target_modules, method.layers
        ('1', ['1'])
    """

    share: Annotated[float, Bound(">", 0), Bound("<", 1)] = option(
        0.5, help="the share of the adapter's parameters that remains"
    )
    beta: PositiveFloat = option(1.0, help="β; if small, gates are near 0 and 1, with small slopes")
    sampled: bool = option(True, help="whether gates are drawn in training")
    choose: Literal["gates", "sizes", "random"] = option(
        "gates", help="what remains: by p, or as a control by the norm of p·BA, or drawn"
    )

    defaults = {"hypergradient": "darts:xi=lr", "upper_learning_rate": 0.1, "retrain": "scratch"}

    @property
    def absorbed(self) -> bool:
        """True without draws."""
        return not self.sampled

    def prepare(self, model: Any) -> None:
        """Let B be z·B, with equal gates."""
        mean = partial(_gate, beta=self.beta)
        draw = partial(_draw, beta=self.beta) if self.sampled else mean
        layers = add_gains(model, mean, columns=False, in_training=draw)
        self._sizes = torch.tensor([float(x.a.numel() + x.b.numel()) for x in layers])
        if self._sizes.min() > self.share * self._sizes.sum():
            raise ProblemError(f"share: {self.share} is less than any layer's; give a larger one")
        self._gains = [each.gain for each in layers]
        self.project()

    def upper_variables(self, model: Any) -> dict[str, Tensor]:
        """α of every layer."""
        return gain_variables(model)

    def after_upper_step(self) -> None:
        """Shift α, so that Σ n_l·p_l is the budget."""
        variables = [gain.u for gain in self._gains]
        alpha = torch.cat([gather(u.detach()).flatten().cpu() for u in variables]).double()
        sizes = self._sizes.double()
        low, high = alpha.min() - 40 * self.beta, alpha.max() + 40 * self.beta
        for _ in range(100):  # p falls with the shift
            shift = (low + high) / 2
            above = sizes @ ((alpha - shift) / self.beta).sigmoid() > self.share * sizes.sum()
            low, high = (shift, high) if above else (low, shift)
        for u in variables:
            u.sub_(float(shift))

    def gates(self, model: Any) -> dict[str, float]:
        """p of each layer, by its name in the base model."""
        return {each.name: each.gain.values().item() for each in gained_layers(model)}

    def after_search(self, model: Any) -> None:
        """For a control, order α by its criterion."""
        if self.choose == "gates":
            return
        layers = gained_layers(model)
        scores = drawn(len(layers))
        if self.choose == "sizes":
            sizes = [each.gain.values().item() * (each.b @ each.a).norm() for each in layers]
            scores = torch.tensor([float(size) for size in sizes])
        for rank, k in enumerate(scores.argsort().tolist()):
            layers[k].gain.u.fill_(self.beta * rank)

    def finish(self, model: Any) -> Any:
        """A model with a new adapter in the layers of largest p; ``layers`` has their names."""
        layers, budget = gained_layers(model), self.share * float(self._sizes.sum()) * (1 + 1e-6)
        alpha = torch.tensor([float(each.gain.u.detach()) for each in layers])
        #: The layers that have an adapter, by name in the base model.
        self.layers = []
        order = drawn(len(layers)).argsort()
        for k in order[alpha[order].argsort(descending=True, stable=True)].tolist():
            if self._sizes[k] <= budget:
                self.layers.append(layers[k].name)
                budget -= float(self._sizes[k])
        kept = {each.name: torch.full((len(each.a),), each.name in self.layers) for each in layers}
        return keep_terms(model, kept)


def _gate(alpha: Tensor, *, beta: float) -> Tensor:
    """p = σ(α/β)."""
    return (alpha / beta).sigmoid()


def _draw(alpha: Tensor, *, beta: float) -> Tensor:
    """σ(α/β + logit U)."""
    return (alpha / beta + torch.rand_like(alpha).logit(1e-6)).sigmoid()
