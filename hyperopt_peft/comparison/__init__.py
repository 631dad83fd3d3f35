"""Whether a method is better than others, at equal price."""

from typing import TYPE_CHECKING

from hyperopt_peft.utils.lazy import lazy

if TYPE_CHECKING:
    from hyperopt_peft.comparison.choice import Choice as Choice
    from hyperopt_peft.comparison.compare import compare_heads as compare_heads
    from hyperopt_peft.comparison.compare import compare_methods as compare_methods
    from hyperopt_peft.comparison.find import METHODS as METHODS
    from hyperopt_peft.comparison.find import find_method as find_method
    from hyperopt_peft.comparison.result import Comparison as Comparison
    from hyperopt_peft.comparison.work import Runs as Runs
    from hyperopt_peft.utils.verdict import Verdict as Verdict
else:
    __getattr__, __dir__, __all__ = lazy(__name__)
