"""The plan of a run: owners of the parameters, examples, steps, and an estimate of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.adapters import split_parameters
from hyperopt_peft.problems import BiDoRATrainingArguments


def phases(args: BiDoRATrainingArguments, lower: int, everything: int) -> tuple[int, int]:
    """The lower steps of bidora's search and of its retraining.

    Args:
        args: the settings.
        lower: the number of examples of the lower level alone.
        everything: the number of examples of both levels.
    """
    search = args.steps_of(lower)
    again = 0 if args.retrain == "none" else args.for_retraining().steps_of(everything)
    return search, again


def plan(trainer: Any, everything: int, evaluation: int) -> str:
    """The plan in lines, by one forward pass and without training.

    Args:
        trainer: the trainer of the run.
        everything: the number of training examples of both levels.
        evaluation: the number of evaluation examples.

    Raises:
        ProblemError: the run has no upper step.
    """
    args, model = trainer.args, trainer.model
    lines = [f"method: {args.method}"]
    lower, bilevel = len(trainer.train_dataset), trainer.upper is not None
    if bilevel:
        parts = split_parameters(model)
        lines += [
            f"upper level, magnitudes: {_count(parts.magnitudes.values())}",
            f"lower level, directions: {_count(parts.directions.values())}",
            f"lower level, head: {_count(parts.rest.values())}",
        ]
    else:
        lines.append(f"one level, all of the adapter: {_count(trainer.lower.variables)}")
    lines.append(f"frozen: {_count(p for p in model.parameters() if not p.requires_grad)}")
    if bilevel:
        assert trainer.upper_dataset is not None
        search, again = phases(args, lower, everything)
        trainer.require_upper_step(search)
        lines += [
            f"examples: {lower} lower level, {len(trainer.upper_dataset)} upper level, "
            f"{everything if again else 0} retraining, {evaluation} evaluation",
            f"steps: {search} lower in the search, {search // args.lower_steps} upper, "
            f"{again} in the retraining",
            f"estimator: {args.estimator()!r}{_cost(args)}",
        ]
    else:
        lines += [
            f"examples: {lower} training, {evaluation} evaluation",
            f"steps: {args.steps_of(lower)}",
        ]
    return "\n".join([*lines, memory(trainer)])


def _cost(args: BiDoRATrainingArguments) -> str:
    cost = args.estimator().cost()
    if cost is None:
        return ""
    return f", an upper step of {cost.losses} losses and {cost.backward_passes} backward passes"


def _count(parameters: Iterable[Tensor]) -> str:
    sizes = [p.numel() for p in parameters]
    return f"{sum(sizes):,} parameters in {len(sizes)} tensors"


def memory(trainer: Any) -> str:
    """An estimate of the memory of training, as a sum of named parts."""
    lower, upper = trainer.lower.variables, () if trainer.upper is None else trainer.upper.variables
    trained = _bytes([*lower, *upper])
    batch, size = longest_batch(trainer)
    with trainer.compute_loss_context_manager():
        graph = saved_bytes(lambda: trainer.lower.evaluate(batch)[0], trainer.model.parameters())
    parts = {
        "weights": _bytes(trainer.model.parameters()),
        "gradients of trained parameters": trained,
        f"activations (of a forward pass of the {size} longest examples, measured)": graph,
    }
    if "adam" in str(trainer.args.optim.value):
        parts["AdamW's two moments"] = 2 * trained
    missing = ["PyTorch itself", "temporary tensors of an operation", "the data", "evaluation"]
    if trainer.upper is not None:
        estimator = trainer.args.estimator()
        if estimator.requirements.second_derivatives:
            parts["activations again (the estimator differentiates a gradient)"] = graph
        if (cost := estimator.cost()) is None:
            missing.insert(0, f"the vectors of {estimator.name}")
        else:
            held = cost.vectors * _bytes(lower)
            parts[f"{cost.vectors} vectors of the hypergradient"] = held
    words = " + ".join(f"{name} {_size(value)}" for name, value in parts.items())
    total = _size(sum(parts.values()))
    return f"memory: about {total} = {words}; not counted: {', '.join(missing)}"


def longest_batch(trainer: Any) -> tuple[Any, int]:
    """A lower batch of the longest examples, and their number."""
    data: Any = trainer.train_dataset
    lengths = [len(row["input_ids"]) for row in data]
    longest = sorted(range(len(data)), key=lambda row: -lengths[row])
    rows = longest[: trainer.args.per_device_train_batch_size]
    return trainer.data_collator([data[row] for row in rows]), len(rows)


def saved_bytes(loss: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """The bytes that the graph of ``loss`` saves for backward, without ``parameters``."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = loss()  # the graph lives, so that no address is used twice
    del graph
    return sum(saved.values())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _size(size: int) -> str:
    return f"{size / 2**20:,.1f} MB" if size >= 2**20 else f"{size / 2**10:,.1f} kB"
