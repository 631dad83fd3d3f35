from typing import Any

from datasets import Dataset

from hyperopt_peft import BilevelTrainer, BilevelTrainingArguments, Method, compare_methods
from hyperopt_peft.comparison import Comparison, find_method


def train(model: Any, rows: Dataset, config: Any) -> Comparison:
    args = BilevelTrainingArguments("outputs", hypergradient="direct", lower_steps=4)
    bidora: type[Method] = find_method("bidora")
    BilevelTrainer(model, args, method=bidora(), train_dataset=rows).train()
    methods: dict[str, Method | str] = {"LoRA": "lora", "BiDoRA": bidora()}
    return compare_methods(
        methods, lambda: model, config, args, train_dataset=rows, test_dataset=rows, passes=300
    )
