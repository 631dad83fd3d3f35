"""`BiDoRATrainer`: BiDoRA on `transformers.Trainer`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers.hf_argparser import HfArg
from transformers.trainer_utils import has_length
from transformers.utils import logging

from hyperopt_peft.adapters import dora_layers
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients import DARTS, Estimator
from hyperopt_peft.problems.bidora import BiDoRA
from hyperopt_peft.problems.two_phases import TwoPhaseTrainingArguments
from hyperopt_peft.trainer.checks import check_class
from hyperopt_peft.trainer.trainer import BilevelTrainer

logger = logging.get_logger(__name__)
#: An adapter hardly learns in a phase of a smaller rate × steps, twice the way that Adam takes a
#: weight with linear decay. The held-out score of DoRA on five tasks was .46 at .03, .60 at .1 and
#: .68 to .70 from .3 on, whether by more steps or by a higher rate.
LEARNS = 0.1
#: The estimator of BiDoRA's own code.
PUBLISHED = {"hypergradient": "darts:scheme=forward", "xi": 1.0}


@dataclass
class BiDoRATrainingArguments(TwoPhaseTrainingArguments):
    """The arguments of `BiDoRATrainer`; those of `BilevelTrainingArguments` are for the search.

    Raises:
        ProblemError: a value is out of range; the estimator has no option ``xi``; or an option
            contradicts ``preset``.

    Example:
        >>> args = BiDoRATrainingArguments(
        ...     output_dir="outputs", preset="published", report_to="none"
        ... )
        >>> args.hypergradient, args.xi
        ('darts:scheme=forward', 1.0)
    """

    # Equal in quality to the published one, which has darts and an upper step after each lower
    # one, and cheaper (benchmarks/study).
    hypergradient: str = HfArg(
        default="direct",
        help="hypergradient estimator, with options: minres:steps=5,damping=1.0",
    )
    lower_steps: int = HfArg(
        default=4, help="optimizer steps from one update of the magnitudes to the next"
    )
    preset: Literal["published"] | None = HfArg(
        default=None,
        help="settings by name: published has the estimator of BiDoRA's code, darts with xi=1",
    )
    xi: float | None = HfArg(
        default=None,
        help="ξ of darts, in place of its option of that name, 1: the published code has 1, the "
        "DARTS formula the lower learning rate",
    )
    gamma: float = HfArg(
        default=0.0, help="weight of the Gram regulariser; the published recipes have 1e-5"
    )
    norm_grad: Literal["full", "detach"] = HfArg(
        default="full",
        help="whether the row norm is in the graph; detach is PEFT's approximation",
    )
    fast_dora: bool = HfArg(
        default=True, help="whether linear layers run the fast forward pass instead of PEFT's"
    )

    def __post_init__(self) -> None:
        if self.preset == "published":
            for name, value in PUBLISHED.items():
                if getattr(self, name) not in (getattr(type(self), name), value):  # the default
                    raise ProblemError(
                        f"{name}: preset='published' has {value!r}, got {getattr(self, name)!r}; "
                        "leave one of them out"
                    )
                setattr(self, name, value)
        super().__post_init__()
        self._require("not be negative", lambda x: x >= 0, "gamma")

    def phases(self, lower: int, everything: int) -> tuple[int, int]:
        """The steps of the search, on ``lower`` rows, and of the retraining.

        Example:
            >>> options = {"per_device_train_batch_size": 8, "report_to": "none"}
            >>> BiDoRATrainingArguments("outputs", num_train_epochs=2, **options).phases(80, 100)
            (20, 26)
        """
        again = 0 if self.retrain == "none" else self.for_retraining().steps_of(everything)
        return self.steps_of(lower), again

    def warn_of_short_phases(self, search: int, retraining: int) -> None:
        """Log a warning of each phase whose steps are too few for an adapter to learn by Adam."""
        for phase, args, steps in (
            ("search", self, search),
            ("retraining", self.for_retraining(), retraining),
        ):
            rate = args.learning_rate
            if 0 < rate * steps < LEARNS and "adam" in args.optim:
                logger.warning_once(
                    f"{phase}: {steps} steps at a learning rate of {rate:g} hardly train an "
                    f"adapter; give it {math.ceil(LEARNS / rate)} steps or a higher rate"
                )

    def estimator(self) -> Estimator:
        """The estimator that ``hypergradient`` and ``xi`` name."""
        estimator = super().estimator()
        if self.xi is None:
            return estimator
        if not isinstance(estimator, DARTS):
            raise ProblemError(
                f"xi: an option of darts, not of {estimator.name}; give hypergradient=darts"
            )
        return replace(estimator, xi=self.xi)


class BiDoRATrainer(BilevelTrainer):
    """`BilevelTrainer` with the method `BiDoRA`, whose options are arguments.

    The class replaces ``Trainer(model, args, train_dataset=…)`` for a PeftModel with
    ``use_dora=True``. ``compute_loss``, ``compute_loss_func`` and ``label_smoothing_factor`` apply
    to both levels and both phases. After ``train``, ``model`` has the adapter of the last phase, a
    plain PEFT adapter. The retraining has its own trainer, ``retrainer``, with its own
    ``state.log_history``. `AdapterTrainer` trains LoRA or DoRA in the same harness.

    Args:
        model: a PeftModel with ``use_dora=True``; or what a trainer that this is `over` makes one
            of, with a ``peft_config``.
        args: the settings.
        train_dataset: all training examples, split by ``args.upper_fraction``; the lower level's
            examples if ``upper_dataset`` is given.
        upper_dataset: the examples for the magnitudes; not ``eval_dataset``.
        trainer: further arguments of `transformers.Trainer`. The retraining has copies of the
            ``callbacks`` in their initial state.

    Raises:
        ProblemError: as `BilevelTrainer`; a layer has no magnitude; or a product is exact over a
            quantised base.

    Example:
        >>> args = BiDoRATrainingArguments(output_dir="outputs", report_to="none", use_cpu=True)
        >>> args.for_retraining().output_dir
        'outputs/retrain'
    """

    Arguments = BiDoRATrainingArguments
    args: BiDoRATrainingArguments

    def __init__(
        self,
        model: Any,
        args: BiDoRATrainingArguments,
        *,
        train_dataset: Any,
        upper_dataset: Any = None,
        **trainer: Any,
    ) -> None:
        check_class(args, self.Arguments)
        if trainer.get("peft_config") is None:
            dora_layers(model)  # raises for a model without magnitudes
        #: The examples that were given for the upper level alone.
        self.given_upper = upper_dataset
        super().__init__(
            model,
            args,
            method=BiDoRA(args.gamma, args.norm_grad, args.fast_dora),
            train_dataset=train_dataset,
            upper_dataset=upper_dataset,
            **trainer,
        )

    @property
    def examples(self) -> Any:
        """All training examples, of both levels."""
        assert self.method is not None
        return self.method.all_rows(*self._rows)

    def search(self, point: Any, *args: Any, **kwargs: Any) -> Any:
        """As `BilevelTrainer.search`; a warning names phases that are too short to learn."""
        data = self.train_dataset, self.examples
        lower, everything = (len(rows) if has_length(rows) else 0 for rows in data)
        self.args.warn_of_short_phases(*self.args.phases(lower, everything))
        return super().search(point, *args, **kwargs)
