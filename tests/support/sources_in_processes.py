"""A `SourceTrainer` in each of two processes; run as a script by one of them."""

from pathlib import Path

from torch import Tensor

from tests.support import two_processes
from tests.support.source_runs import trainer
from tests.support.trainers import values


def train(folder: Path, batch: int) -> dict[str, Tensor]:
    """The logits of the weights and the adapter at the end, in float64."""
    run = trainer(
        folder,
        double=True,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=3,
        hypergradient="minres:steps=3,damping=0.1",
        upper_prior=0.1,
        max_steps=4,  # before an epoch ends, whose last batch the processes would fill up
        lower_steps=2,
    )
    run.weights.double()
    run.train()
    return {"logits": run.weights.logits.detach().clone(), **values(run.model)}


if __name__ == "__main__":
    two_processes.main(lambda folder: train(folder, 4))
