"""All that a file with a method imports: ``from hyperopt_peft.method import Method, option, …``.

The library's methods, the folder ``problems/`` of the repository, import from here, from each other
and from `hyperopt_peft.heads` alone. Names are imported on first use.
"""

from typing import TYPE_CHECKING

from hyperopt_peft.utils.lazy import lazy

if TYPE_CHECKING:
    from hyperopt_peft.adapters.dora.fast import use_fast_dora as use_fast_dora
    from hyperopt_peft.adapters.dora.variants import set_norm_grad as set_norm_grad
    from hyperopt_peft.adapters.gains import PREFIX as PREFIX
    from hyperopt_peft.adapters.gains import GainedLayer as GainedLayer
    from hyperopt_peft.adapters.gains import add_gains as add_gains
    from hyperopt_peft.adapters.gains import gain_variables as gain_variables
    from hyperopt_peft.adapters.gains import gained_layers as gained_layers
    from hyperopt_peft.adapters.gains import keep_terms as keep_terms
    from hyperopt_peft.adapters.gains import remove_gains as remove_gains
    from hyperopt_peft.adapters.gains import set_layers as set_layers
    from hyperopt_peft.adapters.layers import factors as factors
    from hyperopt_peft.adapters.layers import lora_layers as lora_layers
    from hyperopt_peft.adapters.layers import split_parameters as split_parameters
    from hyperopt_peft.adapters.regularizers import gram_penalty as gram_penalty
    from hyperopt_peft.adapters.regularizers import regularised as regularised
    from hyperopt_peft.core.examples import WeightedRows as WeightedRows
    from hyperopt_peft.core.labels import WEIGHT as WEIGHT
    from hyperopt_peft.core.labels import RowLosses as RowLosses
    from hyperopt_peft.core.labels import require_labels as require_labels
    from hyperopt_peft.core.labels import row_losses as row_losses
    from hyperopt_peft.core.logits import IGNORED as IGNORED
    from hyperopt_peft.core.prior import GaussianPrior as GaussianPrior
    from hyperopt_peft.core.problem import Problem as Problem
    from hyperopt_peft.core.problem import TaskLoss as TaskLoss
    from hyperopt_peft.core.task_level import TaskLevel as TaskLevel
    from hyperopt_peft.errors import ProblemError as ProblemError
    from hyperopt_peft.trainer.data import joined as joined
    from hyperopt_peft.trainer.data import require_examples as require_examples
    from hyperopt_peft.trainer.gained import Gained as Gained
    from hyperopt_peft.trainer.method import Method as Method
    from hyperopt_peft.trainer.tags import INDEX as INDEX
    from hyperopt_peft.trainer.tags import label_counts as label_counts
    from hyperopt_peft.trainer.tags import without as without
    from hyperopt_peft.utils.distributed import gather as gather
    from hyperopt_peft.utils.models import trainable as trainable
    from hyperopt_peft.utils.types import Batch as Batch
    from hyperopt_peft.utils.types import Collate as Collate
    from hyperopt_peft.utils.types import Model as Model
    from hyperopt_peft.utils.types import Rows as Rows
    from hyperopt_peft.utils.validation import Bound as Bound
    from hyperopt_peft.utils.validation import NonNegativeFloat as NonNegativeFloat
    from hyperopt_peft.utils.validation import PositiveFloat as PositiveFloat
    from hyperopt_peft.utils.validation import PositiveInt as PositiveInt
    from hyperopt_peft.utils.validation import Share as Share
    from hyperopt_peft.utils.validation import option as option
else:
    __getattr__, __dir__, __all__ = lazy(__name__)
