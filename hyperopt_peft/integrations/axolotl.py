"""The plug-in for axolotl: two levels from the YAML file of a fine-tuning run.

Its YAML has ``plugins: [hyperopt_peft.integrations.axolotl.BilevelPlugin]`` and ``bilevel``.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from axolotl.common.datasets import load_datasets
from axolotl.core.trainers import AxolotlTrainer
from axolotl.integrations.base import BasePlugin
from axolotl.utils.dict import DictDefault
from pydantic import BaseModel

from hyperopt_peft.comparison.find import find_method
from hyperopt_peft.core.labels import row_losses
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.trainer import bilevel
from hyperopt_peft.utils.types import Model

#: Keys that replace the trainer, join rows, or compute adapters without their modules.
REFUSED = ["rl", "reward_model", "process_reward_model", "trainer_cls", "sample_packing", "relora"]
REFUSED += [f"lora_{name}_kernel" for name in ("mlp", "qkv", "o", "embedding")]


class BilevelInput(BaseModel):
    """The key that the plug-in adds to the YAML."""

    bilevel: dict[str, Any] | None = None


class BilevelPlugin(BasePlugin):
    """Trains the adapter of a supervised fine-tuning with a method.

    The key ``bilevel`` has ``method``, a name or ``my_method.py:MyMethod``, the method's options,
    the upper level's arguments, and its rows: ``upper_datasets``, as axolotl's ``datasets``. The
    loss of axolotl's own trainer is taken for the mean over labels, and compared with it.
    """

    trainer: Any = None

    def get_input_args(self) -> str:
        """The class of the plug-in's key."""
        return f"{__name__}.{BilevelInput.__name__}"

    def get_trainer_cls(self, cfg: DictDefault) -> Any:
        """The class of the trainer; None without the key ``bilevel``.

        Raises:
            ProblemError: the method or an option is unknown, or another key is not possible.
        """
        if not cfg.bilevel:
            return None
        if keys := ", ".join(filter(cfg.get, REFUSED)):
            raise ProblemError(f"{keys}: not possible with bilevel; set to false")
        settings, parent = dict(cfg.bilevel), bilevel(AxolotlTrainer)
        rows = settings.pop("upper_datasets", None)
        kind = find_method(settings.pop("method", "bidora"))
        own = {x.name for x in fields(kind)} if is_dataclass(kind) else set[str]()
        method = kind(**{name: settings.pop(name) for name in own & settings.keys()})
        if rows is not None:
            changes = {"datasets": rows, "test_datasets": None, "val_set_size": 0}
            rows = load_datasets(cfg=DictDefault({**cfg, **changes})).train_dataset

        class BilevelAxolotlTrainer(parent):  # type: ignore[misc,valid-type]
            def __init__(self, model: Any, args: Any, **options: Any) -> None:
                args = parent.Arguments.of(args, **settings)
                options |= {"method": method, "upper_dataset": rows, "row_losses": row_losses}
                super().__init__(model, args, **options)

        return BilevelAxolotlTrainer

    def post_trainer_create(self, cfg: DictDefault, trainer: AxolotlTrainer) -> None:
        """Remember ``trainer``, whose model a method may replace."""
        self.trainer = trainer if cfg.bilevel else None

    def post_train(self, cfg: DictDefault, model: Model) -> None:
        """Save the model with the settings, and compare it with what stock PEFT loads."""
        if self.trainer is not None:
            self.trainer.save_model()
