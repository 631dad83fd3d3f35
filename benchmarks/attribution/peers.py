"""Scores of training rows by other libraries and papers, with the sign of `attribute`.

On a CPU Bergson runs without the CUDA packages that its wheel names: ``pip install --no-deps
bergson jaxtyping wadler-lindig ml_dtypes natsort petname simple-parsing docstring-parser``.
"""

from __future__ import annotations

import copy
import tempfile
import time
from importlib.util import find_spec
from typing import Any

import torch
from text_data import load_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import set_seed

from benchmarks.attribution.runs import CHUNK, RowWeighted
from benchmarks.attribution.tables import HEAD
from benchmarks.last_layers import LastLayers
from hyperopt_peft.attribution.estimators import HEAD_ESTIMATOR, parse_estimator
from hyperopt_peft.attribution.head import HeadTraining, batch_of, chosen_l2
from hyperopt_peft.attribution.rows import ROW
from hyperopt_peft.attribution.run import Run
from hyperopt_peft.attribution.scores import Evaluation, RetrainingSetup, scores
from hyperopt_peft.attribution.trainer import setup_from_trainer
from hyperopt_peft.problems.features import Features
from hyperopt_peft.problems.head import Head


def datainf(setting: RetrainingSetup) -> Tensor:
    """DataInf (Kwon et al. 2024, arXiv:2310.00902, Eq. 5), each variable as a layer, ``(n,)``."""
    lower: Any = setting.run.levels[0]
    (parts,) = setting.evaluation.slices.values()
    above = setting.evaluation.gradient(parts, lower.variables).gradient
    numbers = torch.arange(len(lower.weights)).split(1)
    rows = [lower.differentiate(row, lower.variables)[2] for row in numbers]
    total = torch.zeros(len(rows))
    for layer, wanted in enumerate(above):
        if wanted is not None:
            gradients = torch.stack([row[layer].flatten() for row in rows])
            total += datainf_layer(gradients, wanted.flatten())
    return total.double()


def datainf_layer(rows: Tensor, wanted: Tensor) -> Tensor:
    """−1/n ⟨wanted, H⁻¹ g_k⟩ for the gradients ``rows`` ``(n, d)`` of one layer, ``(n,)``.

        H⁻¹ ≈ 1/n Σ_i (g_i g_iᵀ + λ)⁻¹,   λ = 0.1 · mean of the squared entries of all g_i

    Example:
        >>> datainf_layer(torch.tensor([[1.0]]), torch.tensor([1.1])).item()
        -1.0
    """
    count, damping = len(rows), 0.1 * rows.square().mean()
    products, lengths = rows @ wanted, rows.square().sum(1)
    inner = rows @ rows.T
    corrected = (products / (damping + lengths)) @ inner / count
    return -(products - corrected) / damping / count


def head(setting: RetrainingSetup) -> Tensor:
    """The scores of a head on the base model's features, as with ``attribute(model="head")``."""
    lower: Any = setting.run.levels[0]
    rows, body = lower.rows, LastLayers(load_model("minilm", ["no", "yes"]))
    body.classifier, both = nn.Identity(), torch.cat([rows.train, rows.above])
    with torch.no_grad():
        x = torch.cat([body(**rows.states.inputs(part)).logits for part in both.split(CHUNK)])
    labels = torch.cat([rows.labels, rows.states.labels[rows.above]])
    every = Features(x.double(), labels, torch.arange(len(labels)))
    count = len(rows.train)
    first, above = every.select(torch.arange(count)), every.select(torch.arange(count, len(labels)))
    train, above = first.standardized(), above.standardized(first)
    model = Head(x.shape[1], rows.classes, dtype=torch.float64)
    training = HeadTraining(model, train, count, chosen_l2(model, train, count))
    phi = Evaluation(training.weights, training.on_rows.mean([batch_of(above)]))
    setup = RetrainingSetup(training, phi, {"all": 1.0}, training.level, lambda: batch_of(train))
    return scores(setup, parse_estimator(HEAD_ESTIMATOR))[0]["all"]


def kronfluence(setting: RetrainingSetup) -> Tensor:
    """EK-FAC of the trained layers, by kronfluence with its defaults, ``(n,)``."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task

    lower: Any = setting.run.levels[0]
    names = [n for n, m in lower.model.named_modules() if _trained(m)]

    class Rows(Task):  # type: ignore[misc]
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits = model(batch["states"], batch["mask"]).logits
            labels = batch["labels"]
            if sample:
                labels = torch.multinomial(logits.detach().softmax(1), 1)[:, 0]
            return cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return names

    task = Rows()
    model = prepare_model(copy.deepcopy(lower.model), task)
    data = lower.rows
    train = _items(lower, data.train, data.labels)
    above = _items(lower, data.above, data.states.labels[data.above])
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            "benchmark", model, task, cpu=True, log_level=40, disable_tqdm=True, output_dir=folder
        )
        sizes = {"per_device_batch_size": CHUNK}
        analyzer.fit_all_factors("ekfac", train, factor_args=FactorArguments("ekfac"), **sizes)
        analyzer.compute_pairwise_scores(
            "scores",
            "ekfac",
            query_dataset=above,
            train_dataset=train,
            per_device_query_batch_size=CHUNK,
            per_device_train_batch_size=CHUNK,
        )
        pairwise: Tensor = analyzer.load_pairwise_scores("scores")["all_modules"]
    return -pairwise.double().mean(0) / len(data.train)


class Batches:
    """A run's batches with a weight for each row, as a data stream for Bergson."""

    def __init__(self, run: Run) -> None:
        self.micro = [step[0].batch for step in run.steps]
        self.weights = nn.Parameter(run.row_weights.clone())
        self.device, self.requires_grad = self.weights.device, True

    def __len__(self) -> int:
        return len(self.micro)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        (micro,) = self.micro[step]
        names = ("inputs_embeds", "attention_mask", "labels")
        batch = {name: micro.batch[name] for name in names}
        return {**batch, "example_weight": self.weights[micro.batch[ROW]]}


def magic(trainer: Any) -> tuple[Tensor, float]:
    """Bergson's scores of a Trainer's AdamW run on a causal language model, and the seconds.

    The trainer has ``model_init``. Bergson trains on the same batches, at the same rates. Adam adds
    1e-16 under its root, since the zero gradients of LoRA's first step would give NaN.
    """
    import torchopt
    from bergson.magic import BackwardState
    from bergson.magic import Trainer as Bergson
    from bergson.magic.cli import compute_query_gradients
    from bergson.utils import weighted_causal_lm_ce

    quietly: dict[str, Any] = {"memory_limit": 1.0, "progress": False, "twice": False}
    run = setup_from_trainer(trainer, None, None, differentiated=False, **quietly).run
    set_seed(trainer.args.seed)
    model = trainer.model_init()
    model.set_attn_implementation("eager")  # attention with a second derivative
    model.get_base_model().loss_function = weighted_causal_lm_ce
    rates = [step[0].optimizer["groups"][0]["lr"] for step in run.steps]
    adam = torchopt.adamw(
        lambda count: rates[int(count)],
        eps=trainer.args.adam_epsilon,
        eps_root=1e-16,
        weight_decay=trainer.args.weight_decay,
    )
    data: Any = Batches(run)
    above: Any = [trainer.data_collator(list(trainer.eval_dataset))]
    begin = time.process_time()
    bergson, state = Bergson.initialize(model, adam)
    with tempfile.TemporaryDirectory() as folder:
        state = bergson.train(state, data, save_dir=folder)
        wanted, _ = compute_query_gradients(state, model, above)
        moments = [
            torch.zeros_like(x)
            for x in torchopt.pytree.tree_iter(state.opt_state)
            if isinstance(x, Tensor) and x.is_floating_point()
        ]
        behind = BackwardState(wanted, moments, torch.zeros_like(data.weights))
        result = bergson.backward(folder, data, behind, state)
    return result.weight_grads.detach().double(), time.process_time() - begin


def peers() -> dict[str, Any]:
    """The installed peers by name."""
    installed = {"kronfluence (EK-FAC)": kronfluence} if find_spec("kronfluence") else {}
    return {HEAD: head, "DataInf": datainf, **installed}


def _trained(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.weight.requires_grad


def _items(lower: RowWeighted, index: Tensor, labels: Tensor) -> list[dict[str, Tensor]]:
    inputs = lower.rows.states.inputs(index)
    return [
        {"states": s, "mask": m, "labels": y}
        for s, m, y in zip(inputs["states"], inputs["mask"], labels, strict=True)
    ]
