"""What do scores of training rows predict, cost and find?"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[2])

from benchmarks.measure import run_script  # noqa: E402

run_script(
    "attribution",
    {
        "scores": "every method on texts: retrainings, cost, memory, wrong labels (80 minutes)",
        "trainers": "the same through a Trainer, on token tags and documents (30 minutes)",
        "uses": "what acting on scores gains",
        "heads": "the rows behind a prediction",
        "report": "all tables of the runs",
    },
)
