"""Which hypergradient estimator is right, how noisy and how dear is it?"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[2])

from benchmarks.measure import run_script  # noqa: E402

run_script(
    "estimators",
    {
        "comparison": "all estimators and other libraries on four problems; docs/comparison.md",
        "convergence": "the value function against backward passes, and its figure",
        "fidelity": "the implicit term under dropout and in bfloat16",
        "noise": "the minimum that minibatches reach",
    },
)
