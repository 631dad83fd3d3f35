"""Layer scales: a factor of each layer's update, learned on validation data.

    upper: min over u          L(A*, B*, u; D_val)
    lower: A*, B*(u) = argmin over A, B, head   L(A, B, u; D_train) + decay·½(‖A‖² + ‖B‖²)

The update of layer l is ΔW_l = e^(u_l)·s_l·B_l A_l. A scale near 0 removes a layer's adapter. Tian,
Liu and Sun 2025 (MetaPEFT), arXiv:2603.01759, for LoRA. Its code has a raw factor for e^u, and for
each upper step takes K lower steps on a third split, which it then undoes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hyperopt_peft.method import (
    Gained,
    Model,
    NonNegativeFloat,
    add_gains,
    gained_layers,
    option,
    remove_gains,
    set_layers,
)


@dataclass
class LayerScales(Gained):
    """Scales above, A, B and head below; the saved adapter has them in its ``alpha_pattern``.

    **Without decay the hypergradient of a solved lower level is 0**: B absorbs every scale, so that
    `direct`, the published estimator, learns which layers train too fast or too slowly. A scale
    has no gradient where B = 0, as in a new adapter.

    Raises:
        ProblemError: the decay is negative; later, as `add_gains`.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> config = LoraConfig(r=2, lora_alpha=2, target_modules=["0"])
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), config)
        >>> method = LayerScales()
        >>> method.prepare(model)
        >>> for u in method.upper_variables(model).values():
        ...     u.data.fill_(0.5).log_()
        tensor([[-0.6931]])
        >>> method.finish(model).peft_config["default"].alpha_pattern
        {'^0': 1.0}
    """

    decay: NonNegativeFloat = option(0.0, help="of A and B at the lower level")

    defaults = {"hypergradient": "direct", "lower_steps": 5}
    # Larger scales of smaller factors take a decay to 0.
    one_level = property(lambda self: self.absorbed)

    def prepare(self, model: Model) -> None:
        """Let B be e^u·B."""
        add_gains(model, torch.exp, columns=False)

    def finish(self, model: Model) -> Any:
        """``model`` with e^u in the scale s of every layer; ``scales`` has the factors."""
        adapter, gained = model.active_adapter, gained_layers(model)
        #: e^u of each layer, by its name in the base model.
        self.scales = {each.name: each.gain.values().item() for each in gained}
        remove_gains(model, fold=False)
        scaled = {x.name: x.layer.scaling[adapter] * self.scales[x.name] for x in gained}
        layers = {x.name: (x.layer.r[adapter], scaled[x.name]) for x in gained}
        computed = set_layers(model.peft_config[adapter], layers)
        for each in gained:
            each.layer.scaling[adapter] = computed[each.name]
        return model
