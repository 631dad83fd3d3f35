"""Runs on a linear head over frozen features: each is solved to its minimum, in a second.

The minimum is that of the method's lower level with the penalty of a head (`heads.head`). A method
with an upper level takes steps of Adam along the hypergradient at that minimum first. No rate is
chosen and no passes are equalised: a solved level depends on neither.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.optim import Adam
from transformers import EvalPrediction, default_data_collator, set_seed

from hyperopt_peft.comparison.budget import peak_memory
from hyperopt_peft.comparison.influence import Influence, influence, parts
from hyperopt_peft.comparison.rows import all_of, with_rows
from hyperopt_peft.comparison.task import Price, Run, Task
from hyperopt_peft.comparison.upper import summary, vector_of
from hyperopt_peft.core.data import DataStream, to_device
from hyperopt_peft.core.labels import mean_loss, row_losses
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.engine.engine import Engine
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.heads.features import Features, features_of
from hyperopt_peft.heads.head import FEATURES, L2, OnFeatures, head_of, require_head
from hyperopt_peft.heads.minimum import penalised, solve
from hyperopt_peft.trainer.checks import read_rows
from hyperopt_peft.trainer.data import batches_of
from hyperopt_peft.trainer.logs import StepLog
from hyperopt_peft.trainer.method import Method, has_upper_level
from hyperopt_peft.trainer.own_loss import require_row_losses
from hyperopt_peft.trainer.quiet import no_bars
from hyperopt_peft.trainer.splits import LABELS, firsts, split_dataset
from hyperopt_peft.trainer.step import UPPER_NUMBERS
from hyperopt_peft.trainer.tags import INDEX, numbered
from hyperopt_peft.utils.validation import PositiveFloat, PositiveInt, require_types


@dataclass(frozen=True)
class HeadSettings:
    """The penalty λ of a head, and the upper level's Adam.

    Example:
        >>> HeadSettings(l2=0.3)
        HeadSettings(l2=0.3, upper_steps=15, upper_rate=0.6)
    """

    l2: PositiveFloat = L2
    upper_steps: PositiveInt = 15
    upper_rate: PositiveFloat = 0.6

    def __post_init__(self) -> None:
        require_types(self)


@dataclass
class HeadTask(Task):
    """What all heads of a comparison share.

    Attributes:
        head: their options.
        model: the head of 0 on the features of all rows, once there is one.
    """

    head: HeadSettings = HeadSettings()
    model: OnFeatures | None = None

    def check(self, run: Run) -> Price:
        """Make the features and solve ``run``; a head has no steps."""
        self.read()
        return Price(phases=0, seconds=self.run(run)["seconds"])

    @no_bars()
    def run(self, run: Run) -> dict[str, Any]:
        """Solve and score; the entries as those of `Task.run`.

        Raises:
            ProblemError: the method changes an adapter, which a head lacks; as the method.
        """
        begin, peak = time.perf_counter(), peak_memory()
        *rows, test = self.data.of(run.seed, run.split)
        model, upper = self.solve(run, *rows)
        metrics, moved = self.evaluate(model, test)
        self.require_metric(metrics)
        more = {"seconds": time.perf_counter() - begin, "memory": peak(), "steps": [], "spent": {}}
        return self.line(run, metrics, influence=moved, **more, **upper)

    def solve(self, run: Run, train: Any, upper: Any) -> tuple[Any, dict[str, Any]]:
        """The head of ``run``, made in the order of a trainer, and what its upper level did."""
        set_seed(run.seed)
        did: dict[str, Any] = {}
        method = self.method_of(run)
        vars(method)["row_losses"] = self.rule
        bilevel = has_upper_level(method)
        if INDEX in method.tags:
            train, upper = numbered(train, upper)
        train, upper = method.rows(train, upper)
        if bilevel and upper is None:
            share = self.args.with_defaults(method.defaults).upper_fraction
            train, upper = split_dataset(train, share, run.seed, reads={FEATURES})
        rows = train if bilevel else method.all_rows(train, upper)
        assert self.model is not None
        model: Any = OnFeatures(self.model.x, self.model.head)
        read = partial(_read, tags=method.tags)
        batch = partial(read, device=model.x.device)
        method.read_rows(model, rows, read)
        try:
            method.prepare(model)
        except (ProblemError, AttributeError) as error:  # of its config, say
            text = f"{run.method}: a head lacks what it reads of a model ({error}); call"
            raise ProblemError(
                f"{text} compare_methods, or choose --score_model adapter"
            ) from error
        if bilevel:
            did["upper"] = self._search(run, method, model, batch(rows), batch(upper))
            model = method.finish(model)
            rows = method.all_rows(train, upper)
            method.read_rows(model, rows, read)
        solve(self._lower(method, model), batch(rows))
        return model, did

    def _lower(self, method: Method, model: Any) -> Problem:
        """The lower level with the penalty of a head."""
        return penalised(method.lower(model, partial(self._loss, model)), self.head.l2)

    def _search(self, run: Run, method: Method, model: Any, below: Any, above: Any) -> Any:
        """Learn the upper variables by hypergradients at the minimum of the lower level."""
        lower, rate = self._lower(method, model), self.head.upper_rate
        upper = method.upper(model, partial(self._loss, model))
        lower.batches = DataStream([below], lower.name)
        upper.batches = DataStream([above], upper.name)
        upper.optimizer, start = Adam(upper.variables, rate), vector_of(upper)
        upper.optimizer.register_step_post_hook(method.project)
        engine = Engine(upper, lower, "cg:steps=30", lower_steps="minimum", progress=False)
        log = StepLog()
        steps = self.head.upper_steps if run.kind == "method" else 0
        for record in engine.run(steps):
            log.add({name: record[name] for name in UPPER_NUMBERS})
        return summary(upper, start, rate, steps, log)

    def evaluate(self, model: nn.Module, rows: Any) -> tuple[dict[str, float], Influence]:
        """The loss of ``rows``, and the metrics of the options, as a Trainer names them.

        The second result is the influence of parts of the rows on each.
        """
        whole, count = _read(rows, device=next(model.parameters()).device), len(rows)

        @torch.no_grad()
        def scores(chosen: Any) -> dict[str, float]:
            batch = {name: values[chosen] for name, values in whole.items()}
            logits, labels = model(batch[FEATURES]).logits.float().cpu(), batch["labels"].cpu()
            metrics = {"loss": float(self._loss(model, batch))}
            if reduce := self.options.get("preprocess_logits_for_metrics"):
                logits = reduce(logits, labels)
            if measure := self.options.get("compute_metrics"):
                metrics.update(measure(EvalPrediction(logits.numpy(), labels.numpy())))
            numbers = {k: float(x) for k, x in metrics.items() if np.ndim(x) == 0}
            return {f"eval_{name.removeprefix('eval_')}": x for name, x in numbers.items()}

        metrics = scores(np.arange(count))
        return metrics, influence(scores, count, parts(count, count)[0], metrics)

    def _loss(self, model: Any, batch: Any) -> Tensor:
        """The loss of a batch, which may have tags: the model's, or the mean by the user's rule."""
        inputs = {name: batch[name] for name in (FEATURES, "labels")}
        if self.rule is not None:
            return mean_loss(*row_losses(model, inputs, self.rule))
        loss: Tensor = model(**inputs).loss
        return loss

    @no_bars()
    def read(self) -> None:
        """Make the features of all rows, once, and tables that have their numbers."""
        if self.model is not None:
            return
        data, known = self.data, list[Features]()
        tables: dict[int, Any] = {}  # by the identity of a table, which several arguments may share
        bases = {name: all_of(rows) for name, rows in data.tables().items()}
        for rows in bases.values():
            if rows is None or id(rows) in tables:
                continue
            trainer, features, read = self._features(rows)
            begin = sum(len(each.x) for each in known)
            known.append(features)
            numbers = [begin + row for row in firsts(rows, data.reads)]
            columns = {x: rows[x][:] for x in rows.column_names if x not in (*read, *LABELS)}
            labels = features.labels.tolist()
            tables[id(rows)] = Dataset.from_dict({**columns, FEATURES: numbers, "labels": labels})
        every = Features.joined(known)
        seen = len({id(bases[name]) for name in ("train", "upper") if bases[name] is not None})
        every = every.standardized(Features.joined(known[:seen])).to(trainer.args.device)
        self.model = OnFeatures(every.x, head_of(trainer.model, every))
        made = {k: with_rows(x, tables.get(id(bases[k]))) for k, x in data.tables().items()}
        self.data = replace(data, **made, reads={FEATURES})

    def _features(self, rows: Any) -> tuple[Any, Features, list[str]]:
        """A trainer, the features of ``rows``, and the columns that the trainer's model reads."""
        plain = replace(self, methods={"": Method()}, adapter=None)
        with tempfile.TemporaryDirectory(prefix="comparison-") as folder:
            run = Run("", "method", 0, 1e-3)
            trainer = plain.make(run, (rows, None, rows), folder)
        model, prepared, collate = trainer.model, read_rows(trainer), trainer.data_collator
        size, precision = trainer.args.eval_batch_size, trainer.compute_loss_context_manager
        some = range(len(prepared))[:size]
        (first,) = batches_of(prepared, collate, size, trainer.args.device, chosen=some)
        require_head(model, first)
        require_row_losses(trainer, self.rule, [first], trainer.tags)
        features = features_of(model, prepared, collate, batch_size=size, precision=precision)
        if len(features.row) != len(rows) or not torch.equal(features.row, torch.arange(len(rows))):
            raise ProblemError(
                "labels: a head predicts a class or numbers a row, and these rows have a label for "
                "each token; call compare_methods, or choose --score_model adapter"
            )
        return trainer, features, prepared.column_names


def _read(rows: Any, tags: Sequence[str] = (), device: Any = "cpu") -> Any:
    """The batch of ``rows``: the numbers of their features, labels and tags."""
    names = (FEATURES, "labels", *tags)
    rows = [{name: row[name] for name in names if name in row} for row in rows]
    batch: dict[str, Tensor] = default_data_collator(rows)
    if batch["labels"].is_floating_point():
        batch["labels"] = batch["labels"].double()
    return to_device(batch, device)
