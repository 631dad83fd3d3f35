"""Text tasks of the command line: files, tokens, models, metrics."""

from typing import Literal

TaskName = Literal[
    "text-classification", "regression", "token-classification", "causal-lm", "seq2seq", "sft"
]
SFT = "sft"  # by TRL
