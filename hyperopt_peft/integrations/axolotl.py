"""The plug-in for axolotl: two levels from the YAML file of a fine-tuning run.

adapter: lora
peft_use_dora: true
plugins: [hyperopt_peft.integrations.axolotl.BilevelPlugin]
bilevel: {method: bidora, gamma: 1.0e-5, lower_steps: 4, retrain: warm}
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from axolotl.core.trainers import AxolotlTrainer
from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from hyperopt_peft.comparison.find import find_method
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.trainer import bilevel

#: The keys of axolotl's YAML that choose or replace the trainer, or rows that a step would mix.
REFUSED = ("rl", "reward_model", "process_reward_model", "trainer_cls", "sample_packing", "relora")


class BilevelInput(BaseModel):
    """The key that the plug-in adds to the YAML."""

    bilevel: dict[str, Any] | None = None


class BilevelPlugin(BasePlugin):  # type: ignore[misc]
    """Trains the adapter of axolotl's supervised fine-tuning by a method.

    The mapping ``bilevel`` has ``method``, a name or ``my_method.py:MyMethod``, options of the
    method, and arguments of `BilevelTrainingArguments`.
    """

    def get_input_args(self) -> str:
        """The class of the plug-in's keys."""
        return f"{__name__}.{BilevelInput.__name__}"

    def get_trainer_cls(self, cfg: Any) -> Any:
        """The class of the trainer; None without the key ``bilevel``.

        Raises:
            ProblemError: an unknown method or option, or another key of the YAML is not possible.
        """
        if not cfg.bilevel:
            return None
        for key in REFUSED:
            if cfg[key]:
                raise ProblemError(f"{key}: not possible with bilevel; leave one of them out")
        settings = dict(cfg.bilevel)
        kind = find_method(settings.pop("method", "bidora"))
        own = {field.name for field in fields(kind)} if is_dataclass(kind) else set()
        method = kind(**{name: settings.pop(name) for name in own & settings.keys()})
        parent = bilevel(AxolotlTrainer)

        class BilevelAxolotlTrainer(parent):
            """With the method and the settings of the YAML."""

            def __init__(self, model: Any, args: Any, **options: Any) -> None:
                args = parent.Arguments.of(args, **settings)
                super().__init__(model, args, method=method, **options)

        return BilevelAxolotlTrainer
