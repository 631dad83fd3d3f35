"""`compare_methods`: is a method better than simple baselines at equal cost?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any

from hyperopt_peft.comparison.choice import Choice, Plan
from hyperopt_peft.comparison.find import find_method
from hyperopt_peft.comparison.heads import HeadSettings, HeadTask
from hyperopt_peft.comparison.identity import rows_of_seeds, settings_of
from hyperopt_peft.comparison.result import Comparison
from hyperopt_peft.comparison.rows import Rows, Source
from hyperopt_peft.comparison.store import Store
from hyperopt_peft.comparison.task import Kind, Task
from hyperopt_peft.comparison.work import Runs, Work
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.heads.frozen_layers import forget
from hyperopt_peft.heads.head import L2
from hyperopt_peft.trainer.method import Method
from hyperopt_peft.trainer.quiet import no_bars
from hyperopt_peft.trainer.splits import reads_of
from hyperopt_peft.trainer.trainer import BilevelTrainer

#: How the names of scores end that are better where they are lower.
LOWER_IS_BETTER = (
    *("loss", "nll", "error", "error_rate", "mse", "mae", "wer", "cer"),
    *("perplexity", "ece", "brier"),
)
#: Five rates for each level.
DEFAULT = Choice()


def compare_methods(
    methods: Mapping[str, Method | str],
    base_model: Callable[[], Any],
    adapter: Any,
    args: Any,
    *,
    train_dataset: Source,
    upper_dataset: Source = None,
    test_dataset: Source = None,
    folds: int | None = None,
    passes: float,
    seeds: Iterable[int] | None = None,
    metric: str = "loss",
    choice: Choice = DEFAULT,
    ablations: Mapping[str, Sequence[Kind]] | None = None,
    frozen_dropout: bool = False,
    runs: Runs | None = None,
    trainer: type[BilevelTrainer] = BilevelTrainer,
    **options: Any,
) -> Comparison:
    """Train each method with equally many passes, and score all on the same test rows.

    A pass is one forward and backward over as many rows as a lower step has, and a product of
    second derivatives is two. Each run ends with its ``passes``, to one step, upper batches,
    estimators and second phases included; learning rates decay by passes.
    Each seed chooses the rates of each method on rows that it holds out, so that the noise of the
    choice is in the interval over seeds. Each method with an upper level has two ablations: its
    upper variables frozen, and all variables in one level on all rows. A method whose search is
    followed by a training from scratch lacks the second one.

    An interval is over the seeds and over the test rows, as crossed effects: it holds for other
    seeds and other rows of the same kind, not for other training rows, unless ``train_dataset`` is
    a function of the seed. With ``folds`` the trusted rows score: seed s is scored on fold s mod K
    of the division s // K into K folds, and trains with the others.

    Args:
        methods: by name; the first one is what the others are compared with.
        base_model: a function that makes a new model without an adapter.
        adapter: the PEFT config, which a method may change.
        args: the arguments of all runs, which set rates, lengths, seeds and folders, write nothing
            and are evaluated by the comparison alone; a second training has the rate and the batch
            of the first one.
        train_dataset: the rows; a method with an upper level splits them without trusted ones. Each
            of the three sets may be a function of the seed, such as one that draws rows.
        upper_dataset: the trusted rows; a baseline trains on them too, as its ``all_rows`` says.
        test_dataset: the rows that score; training rows among them are left out.
        folds: K, in place of ``test_dataset``.
        passes: the budget of an adapter's run. Another budget is another call, and may share the
            folder of ``runs``.
        seeds: each is a split, a start and an order of the rows, the same for all methods; by
            default five, or as many as folds.
        metric: the score, a key of ``compute_metrics``, or ``loss``. Whether a lower one is better
            says ``greater_is_better`` of ``args``, or the name, such as ``mse`` or ``perplexity``.
        choice: the grids of rates, and how each seed chooses.
        ablations: the kinds that are trained, by the method's name, as ``{"mine": ["frozen"]}``;
            by default all.
        frozen_dropout: whether frozen layers below the adapter keep the model's dropout. By default
            they are computed once for each text, which is several times faster.
        runs: the folder, the processes and the bar.
        trainer: the class of the trainer, such as ``bilevel(SFTTrainer)``.
        options: further arguments of the trainer, such as ``compute_metrics``.

    Raises:
        ProblemError: fewer than two seeds; an argument without effect; one model in place of new
            ones; no test rows but training rows, or a method that trains on them; a metric that the
            task lacks; a phase too short to learn, or a run without a finite score; as
            `BilevelTrainer`.

    Example:
        >>> import torch
        >>> from datasets import Dataset
        >>> from peft import LoraConfig
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from hyperopt_peft import BiDoRA, BilevelTrainingArguments
        >>> size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        >>> config = BertConfig(vocab_size=100, num_attention_heads=2, **size)
        >>> tokens, labels = torch.randint(100, (60, 8)).tolist(), [0, 1] * 30
        >>> rows = Dataset.from_dict({"input_ids": tokens, "labels": labels})
        >>> comparison = compare_methods(
        ...     {"LoRA": "lora", "BiDoRA": BiDoRA()},
        ...     lambda: BertForSequenceClassification(config),
        ...     LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]),
        ...     BilevelTrainingArguments("unused", report_to="none", use_cpu=True),
        ...     train_dataset=rows.select(range(40)),
        ...     test_dataset=rows.select(range(40, 60)),
        ...     passes=20,
        ...     seeds=range(2),
        ...     choice=Choice([3e-2], [1e-2]),  # one rate is no choice; leave it out to try five
        ...     runs=Runs(progress=False),
        ... )
        >>> [*comparison.scores()]
        ['LoRA', 'BiDoRA', 'BiDoRA, upper level frozen', 'BiDoRA, one level']
    """
    _require_budget(passes)
    plan = _plan(methods, seeds, folds, metric, args, choice, passes, ablations)
    shared = (plan.methods, base_model, adapter, args)
    task_of = lambda rows: Task(*shared, rows, metric, trainer, options, frozen_dropout)  # noqa: E731
    tables: dict[str, Source] = {"train_dataset": train_dataset, "upper_dataset": upper_dataset}
    tables["test_dataset"] = test_dataset
    return _compare(plan, task_of, base_model, args, tables, folds, runs)


def compare_heads(
    methods: Mapping[str, Method | str],
    base_model: Callable[[], Any],
    args: Any,
    *,
    train_dataset: Source,
    upper_dataset: Source = None,
    test_dataset: Source = None,
    folds: int | None = None,
    l2: float = L2,
    upper_steps: int = HeadSettings.upper_steps,
    upper_rate: float = HeadSettings.upper_rate,
    seeds: Iterable[int] | None = None,
    metric: str = "loss",
    ablations: Mapping[str, Sequence[Kind]] | None = None,
    runs: Runs | None = None,
    trainer: type[BilevelTrainer] = BilevelTrainer,
    **options: Any,
) -> Comparison:
    """`compare_methods` on linear heads: each is trained to its minimum on frozen features.

    A run takes a second, and has neither rates nor passes. Since its training is not random, each
    seed has a random 80 % of the training rows and of the trusted ones, or its own, where
    ``train_dataset`` or ``upper_dataset`` is a function of the seed, or folds.

    Args:
        methods, train_dataset, upper_dataset, test_dataset, folds: as `compare_methods` has them.
        base_model: a function that makes a new model; its last linear layer is the head.
        args: of which ``upper_fraction`` and what makes features are read.
        l2: the penalty ½λ‖W‖² of a head.
        upper_steps, upper_rate: the steps of Adam and their rate, for methods with an upper level.
        seeds, metric, ablations, runs, trainer, options: as `compare_methods` has them.

    Raises:
        ProblemError: a method changes an adapter, or the model has no head; as `compare_methods`.

    Example:
        >>> import torch
        >>> from datasets import Dataset
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from hyperopt_peft import BilevelTrainingArguments
        >>> size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        >>> config = BertConfig(vocab_size=100, num_attention_heads=2, **size)
        >>> tokens, labels = torch.randint(100, (60, 8)).tolist(), [0, 1] * 30
        >>> rows = Dataset.from_dict({"input_ids": tokens, "labels": labels})
        >>> comparison = compare_heads(
        ...     {"all rows": "lora", "trusted rows 3 times": "trusted_repeated"},
        ...     lambda: BertForSequenceClassification(config),
        ...     BilevelTrainingArguments("unused", report_to="none", use_cpu=True),
        ...     train_dataset=rows.select(range(20)),
        ...     upper_dataset=rows.select(range(20, 40)),
        ...     test_dataset=rows.select(range(40, 60)),
        ...     runs=Runs(progress=False),
        ... )
        >>> comparison.scores().shape
        (5, 2)
    """
    for name in ("passes", "choice", "adapter", "frozen_dropout"):
        if name in options:
            raise ProblemError(f"{name}: has no effect on heads, which are solved; leave it out")
    head = HeadSettings(l2, upper_steps, upper_rate)
    plan = _plan(methods, seeds, folds, metric, args, Choice([1.0], [upper_rate]), 0.0, ablations)
    shared = (plan.methods, base_model, None, args)
    task_of = lambda rows: HeadTask(*shared, rows, metric, trainer, options, head=head)  # noqa: E731
    tables: dict[str, Source] = {"train_dataset": train_dataset, "upper_dataset": upper_dataset}
    tables["test_dataset"] = test_dataset
    return _compare(plan, task_of, base_model, args, tables, folds, runs)


def _require_budget(passes: Any) -> None:
    """Raise ProblemError for a budget that is not positive and finite."""
    if not (isinstance(passes, Real) and 0 < float(passes) < math.inf):
        raise ProblemError(f"passes: must be the budget of a run, such as 300, got {passes}")


def _plan(
    methods: Mapping[str, Method | str],
    given: Iterable[int] | None,
    folds: int | None,
    metric: str,
    args: Any,
    *more: Any,
) -> Plan:
    """The methods, the seeds, what is better and how each seed chooses.

    Raises:
        ProblemError: there is no comparison of these.
    """
    known = {n: m if isinstance(m, Method) else find_method(m)() for n, m in methods.items()}
    seeds = list(dict.fromkeys(map(int, given if given is not None else range(folds or 5))))
    plan = Plan(known, more[0], seeds, metric, lower(metric, args), *more[1:])
    if not known:
        raise ProblemError("methods: there is none; give each by a name")
    if len(seeds) < 2:
        raise ProblemError(
            f"seeds: {len(seeds)} reported; one seed has no interval, so give two or more"
        )
    forms = [pair for pair in replace(plan, ablations=None).candidates() if pair[1] != "method"]
    for name, kinds in (plan.ablations or {}).items():
        if unknown := [kind for kind in kinds if (name, kind) not in forms]:
            text = f"ablations: {name!r} has no {', '.join(unknown)}; there are {forms}"
            raise ProblemError(text)
    return plan


def _compare(
    plan: Plan,
    task_of: Callable[[Rows], Task],
    base_model: Callable[[], Any],
    args: Any,
    tables: Mapping[str, Any],
    folds: int | None,
    how: Runs | None,
) -> Comparison:
    """The comparison of adapters or heads, by what makes their task of the rows."""
    runs = how or Runs()
    reads = reads_of(no_bars()(base_model)(), args)
    options = {"held_out": plan.choice.held_out, "reads": reads}
    rows, note = Rows.made(tables, plan.seeds, folds, solved=not plan.passes, **options)
    task = task_of(rows)
    folder = None if runs.folder is None else Path(runs.folder)
    file = "" if runs.part == (1, 1) else "-{}-of-{}".format(*runs.part)
    store = Store(folder, settings_of(task), file, rows_of_seeds(rows))
    work = Work(plan, task, store, runs)
    found = Comparison(plan, store, note, task.data.scoring)
    if runs.dry_run:
        print(work.estimate(work.check()))
    else:
        work.do()
    forget()
    if not runs.dry_run:
        found.require_finite()
    return found


def lower(metric: str, args: Any) -> bool:
    """Whether a lower ``metric`` is better.

    Example:
        >>> from types import SimpleNamespace as Args
        >>> best = {"metric_for_best_model": None, "greater_is_better": False}
        >>> lower("mse", Args()), lower("accuracy", Args()), lower("distance", Args(**best))
        (True, False, True)
    """
    greater = getattr(args, "greater_is_better", None)
    named = getattr(args, "metric_for_best_model", None) or metric
    if greater is not None and named.removeprefix("eval_") == metric:
        return not greater
    return metric.lower().endswith(LOWER_IS_BETTER)
