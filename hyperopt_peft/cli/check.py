"""hyperopt-peft check: a diagnosis of the two levels on your model and data, in words."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from hyperopt_peft import check_problem
from hyperopt_peft.cli.compare_estimators import batches_of, trained
from hyperopt_peft.cli.options import parse
from hyperopt_peft.cli.text.setup import TYPES, prepare
from hyperopt_peft.utils.signal_to_noise import ENOUGH
from hyperopt_peft.utils.validation import require_count


@dataclass
class CheckArguments:
    """The point at which the levels are examined, and the accuracy."""

    _argument_group_name = "command"

    steps: int = HfArg(default=0, help="lower steps of the search before the check")
    solver_steps: int = HfArg(default=10, help="steps of the solvers that measure the curvature")

    def __post_init__(self) -> None:
        require_count("steps", self.steps, least=0)
        require_count("solver_steps", self.solver_steps, least=1)


def run(argv: Sequence[str]) -> None:
    """Parse ``argv``, train for ``steps`` steps, examine each level on its first batches.

    Raises:
        ProblemError: a bad option, model or data set.
    """
    own, model_args, data, args = parse("check", (CheckArguments, *TYPES), argv)
    trainer = trained(prepare(model_args, data), args, own.steps)
    assert trainer.upper is not None
    batches = [batches_of(trainer, number) for number in range(ENOUGH)]
    several = {f"{key}es": [batch[key] for batch in batches] for key in batches[0]}
    with trainer.compute_loss_context_manager():
        found = check_problem(
            trainer.upper,
            trainer.lower,
            **batches[0],
            **several,
            seed=args.seed,
            solver_steps=own.solver_steps,
            progress=sys.stderr.isatty(),
        )
    print(found)
