"""What do a bilevel step, the DoRA layer and an upper iteration cost?"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[2])

from benchmarks.measure import run_script  # noqa: E402

run_script(
    "speed",
    {
        "timing": "step, layers and MLP iteration in one process; writes results/speed.json",
        "language": "memory and time of a language model's steps; results/speed_language.json",
        "head": "a head on 100,000 rows, its penalty chosen; writes results/speed_head.json",
        "gpu": "everything on one GPU in nine minutes; writes results/speed_gpu.json",
        "on_paper": "memory of 8B and 70B on eight cards, on the meta device",
        "report": "the tables of benchmarks/README.md; --check compares them",
    },
)
