"""Bilevel programs, ready to run and to copy."""

from hyperopt_peft.problems.bidora_trainer import BiDoRATrainer, BiDoRATrainingArguments

__all__ = ["BiDoRATrainer", "BiDoRATrainingArguments"]
