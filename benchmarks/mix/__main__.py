"""Do learned weights of sources beat simpler ways to mix them, and search?"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[2])

from benchmarks.measure import run_script  # noqa: E402

run_script(
    "mix",
    {
        "cells": "all methods on all tasks, by a head and by LoRA (hours)",
        "language": "all ways on sources of text, for a language model (an hour)",
        "defaults": "the search on a head with one default changed (ten minutes)",
        "report": "the tables of docs/when-bilevel-pays.md; --check compares them",
    },
)
