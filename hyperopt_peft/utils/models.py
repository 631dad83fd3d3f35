"""The model behind an adapter."""

from __future__ import annotations

from typing import Any


def base_model(model: Any) -> Any:
    """The pretrained model inside a PeftModel; any other model itself.

    Example:
        >>> from torch import nn
        >>> base_model(nn.Linear(2, 1))
        Linear(in_features=2, out_features=1, bias=True)
    """
    return model.get_base_model() if hasattr(model, "get_base_model") else model
