"""Bilevel programs: BiDoRA and others, to use or to adapt."""

from hyperopt_peft.problems.bidora_trainer import BiDoRATrainer, BiDoRATrainingArguments

__all__ = ["BiDoRATrainer", "BiDoRATrainingArguments"]
