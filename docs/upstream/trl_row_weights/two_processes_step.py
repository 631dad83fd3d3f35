"""One weighted step of the trainer proposed to TRL, each process with half of the rows."""

from pathlib import Path
from typing import Any

from patched_trainer import proposed

from tests.support import two_processes


def train(folder: Path, batch: int) -> Any:
    """The loss and the parameters after a step on two micro-batches."""
    case = proposed.TestLossWeights()
    case.tmp_dir = str(folder)
    rows = proposed.make_dataset(loss_weight=proposed.WEIGHTS)
    batches = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 2}
    return case.step(rows.select(range(4)), **batches)


if __name__ == "__main__":
    two_processes.main(lambda folder: train(folder, 1))
