"""Other libraries' and papers' scores of the training rows of a run, in the sign of `attribute`."""

from __future__ import annotations

import copy
import tempfile
from importlib.util import find_spec
from typing import Any

import torch
from attribution_runs import CHUNK, RowWeighted
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hyperopt_peft.attribution.methods import Setting


def datainf(setting: Setting) -> Tensor:
    """DataInf (Kwon et al. 2024, arXiv:2310.00902, Eq. 5), a layer a variable, ``(n,)``."""
    lower: Any = setting.run.levels[0]
    (parts,) = setting.evaluation.slices.values()
    above = setting.evaluation.gradient(parts, lower.variables).gradient
    numbers = torch.arange(len(lower.weights)).split(1)
    rows = [lower.differentiate(row, lower.variables)[2] for row in numbers]
    total = torch.zeros(len(rows))
    for layer, wanted in enumerate(above):
        if wanted is not None:
            own = torch.stack([row[layer].flatten() for row in rows])
            total += datainf_layer(own, wanted.flatten())
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


def kronfluence(setting: Setting) -> Tensor:
    """EK-FAC by kronfluence with its defaults, of the trained layers, ``(n,)``."""
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
        found: Tensor = analyzer.load_pairwise_scores("scores")["all_modules"]
    return -found.double().mean(0) / len(data.train)


def peers() -> dict[str, Any]:
    """The peers that are installed, by name."""
    installed = {"kronfluence (EK-FAC)": kronfluence} if find_spec("kronfluence") else {}
    return {"DataInf": datainf, **installed}


def _trained(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.weight.requires_grad


def _items(lower: RowWeighted, index: Tensor, labels: Tensor) -> list[dict[str, Tensor]]:
    inputs = lower.rows.states.inputs(index)
    return [
        {"states": s, "mask": m, "labels": y}
        for s, m, y in zip(inputs["states"], inputs["mask"], labels, strict=True)
    ]
