"""`compare_methods`: is a method better than simple baselines at equal cost?"""

from __future__ import annotations

import hashlib
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hyperopt_peft.comparison.choice import RATES, UPPER_RATES, Plan
from hyperopt_peft.comparison.find import find_method
from hyperopt_peft.comparison.folds import Rows
from hyperopt_peft.comparison.heads import Head, HeadTask
from hyperopt_peft.comparison.result import Comparison
from hyperopt_peft.comparison.store import Store
from hyperopt_peft.comparison.task import Task, without_sizes
from hyperopt_peft.comparison.work import Work, require_pickled
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.heads.frozen_layers import forget
from hyperopt_peft.trainer.fingerprint import data_fingerprint
from hyperopt_peft.trainer.method import Method, has_upper_level
from hyperopt_peft.trainer.quiet import no_bars
from hyperopt_peft.trainer.splits import reads_of
from hyperopt_peft.trainer.trainer import BilevelTrainer
from hyperopt_peft.utils.versions import versions

#: How the names of scores end that are better where they are lower.
LOWER_IS_BETTER = ("loss", "error", "mse", "mae", "perplexity", "wer", "cer", "ece", "brier")
#: The arguments that only adapters read, with their defaults.
OF_ADAPTERS = {"passes": [None], "rates": [*RATES], "upper_rates": [*UPPER_RATES]}
OF_ADAPTERS |= {"development": [100, 101, 102]}


def compare_methods(
    methods: Mapping[str, Method | str],
    base_model: Callable[[], Any],
    adapter: Any,
    args: Any,
    *,
    train_dataset: Any,
    upper_dataset: Any = None,
    test_dataset: Any = None,
    folds: int | None = None,
    head: Head | None = None,
    passes: float | None = None,
    seeds: Iterable[int] | None = None,
    metric: str = "loss",
    lower_is_better: bool | None = None,
    rates: Sequence[float] = RATES,
    upper_rates: Sequence[float] = UPPER_RATES,
    development: Iterable[int] = range(100, 103),
    held_out: float = 0.2,
    ablations: Iterable[str] | None = None,
    frozen_dropout: bool = True,
    folder: str | Path | None = None,
    jobs: int = 1,
    part: tuple[int, int] = (1, 1),
    trainer: type[BilevelTrainer] = BilevelTrainer,
    progress: bool = True,
    dry_run: bool = False,
    **options: Any,
) -> Comparison:
    """Train each method with equally many passes, and score all on the same test rows.

    A pass is one forward and backward over as many rows as a lower step has, and a product of
    second derivatives is two. Each run ends with its ``passes``, to one step, upper batches,
    estimators and second phases included; learning rates decay by passes.
    The rates of each method have the best mean score on rows held out from the training rows, with
    other seeds than the reported ones. Each method with an upper level has two ablations: its upper
    variables frozen, and all variables in one level on all rows. A method whose search is followed
    by a training from scratch lacks the second one.

    With ``folds`` the trusted rows score: seed s is scored on fold s mod K of the division s // K
    into K folds, and trains with the others. The rates are then chosen on a further part of the
    trusted rows, with which all reported runs train. With ``head`` a linear head on the
    features of the frozen base model is trained to its minimum in place of an adapter, without
    rates and passes; see `Head`.

    Args:
        methods: by name; the first one is what the others are compared with.
        base_model: a function that makes a new model without an adapter.
        adapter: the PEFT config, which a method may change.
        args: the arguments of all runs, which set rates, lengths, seeds and folders, write nothing
            and are evaluated at their end alone; a second training has the rate and the batch of
            the first one. Heads read ``upper_fraction`` and what makes features alone.
        train_dataset: the rows; a method with an upper level splits them without trusted ones.
        upper_dataset: the trusted rows; a baseline trains on them too, as its ``all_rows`` says.
        test_dataset: the rows that score; training rows among them are left out.
        folds: K, in place of ``test_dataset``.
        head: the options of a head that is trained in place of an adapter.
        passes: the budget of an adapter's run; heads have none, and no rates to choose.
        seeds: each is a split, a start and an order of the rows, the same for all methods; by
            default five, or as many as folds.
        metric: the score, a key of ``compute_metrics``, or ``loss``.
        lower_is_better: whether a lower score is better; by default true for names of losses and
            errors, such as ``mse`` or ``perplexity``. The heading says so.
        rates, upper_rates: the grids.
        development: the seeds of the runs that choose the rates.
        held_out: the share of the trusted rows that scores these runs; without trusted rows, of the
            training rows.
        ablations: the names of the methods whose ablations are trained; by default all.
        frozen_dropout: whether frozen layers below the adapter keep the model's dropout. Without
            dropout they are computed once for each text, which is several times faster.
        folder: has the finished runs, from which a killed comparison continues.
        jobs: processes, by joblib, whose ``parallel_config`` chooses other backends.
        part: (k, n) for the k-th of n processes that share the runs and ``folder``.
        trainer: the class of the trainer, such as ``bilevel(SFTTrainer)``.
        progress: whether a bar is shown.
        dry_run: print the runs with their passes and minutes, and do none.
        options: further arguments of the trainer, such as ``compute_metrics``.

    Raises:
        ProblemError: fewer than two seeds, or development seeds among them; an argument without
            effect; one model in place of new ones; no test rows but training rows, or a method that
            trains on them; a metric that the task lacks; a phase too short to learn, or a
            run without a finite score; as `BilevelTrainer`.

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
        ...     rates=[3e-2],  # one rate is no choice; leave both out to try five
        ...     upper_rates=[1e-2],
        ...     progress=False,
        ... )
        >>> [row[0] for row in comparison.table()[1:]]
        ['LoRA', 'BiDoRA', 'BiDoRA, upper level frozen', 'BiDoRA, one level']
    """
    seeds = list(dict.fromkeys(map(int, seeds if seeds is not None else range(folds or 5))))
    development, on_heads = list(dict.fromkeys(map(int, development))), head is not None
    values: Any = [passes], [*rates], [*upper_rates], development
    for name, value in zip(OF_ADAPTERS, values, strict=True):
        if on_heads and value != OF_ADAPTERS[name]:
            raise ProblemError(f"{name}: has no effect on heads, which are solved; leave it out")
    if len(seeds) < 2 or not development:
        raise ProblemError(
            f"seeds: {len(seeds)} reported and {len(development)} of development; one seed has no "
            "interval, so give two or more, and one or more of development"
        )
    if both := {*seeds} & {*development}:
        raise ProblemError(
            f"development: the seeds {sorted(both)} are reported ones too; give others"
        )
    if not on_heads and not 0 < (passes or 0) < math.inf:
        raise ProblemError(f"passes: must be the budget of a run, such as 300, got {passes}")
    if jobs == 0:
        raise ProblemError("jobs: must be a number of processes, got 0")
    if part != (1, 1) and folder is None:
        raise ProblemError("part: the parts share their runs through a folder; give folder")
    parts = seeds if on_heads and folds is None else ()
    rows = (train_dataset, upper_dataset, test_dataset)
    reads = reads_of(no_bars()(base_model)(), args)
    data = Rows(*rows, folds, held_out, spare=not on_heads, parts=parts, reads=reads)
    data, note = data.usable()
    known = {n: m if isinstance(m, Method) else find_method(m)() for n, m in methods.items()}
    if not known:
        raise ProblemError("methods: there is none; give each by a name")
    budget = 0.0 if on_heads else passes or 0.0
    shared = (known, base_model, adapter, args, data, budget, metric, trainer, options)
    task = Task(*shared, frozen_dropout=frozen_dropout)
    if head is not None:
        task, rates, upper_rates = HeadTask(*shared, head=head), (0.0,), (head.upper_rate,)
    if lower_is_better is None:
        lower_is_better = metric.lower().endswith(LOWER_IS_BETTER)
    ablated = None if ablations is None else frozenset(ablations)
    two_levels = {name for name, method in known.items() if has_upper_level(method)}
    if wrong := sorted((ablated or frozenset()) - two_levels):
        raise ProblemError(
            f"ablations: {wrong} are no methods with an upper level; those are {sorted(two_levels)}"
        )
    plan = Plan(known, rates, upper_rates, development, seeds, lower_is_better, ablated)
    where, (number, count) = None if folder is None else Path(folder), part
    store = Store(where, settings_of(task), "" if count == 1 else f"-{number}-of-{count}")
    if jobs != 1:
        require_pickled(task)
    total, done = sum(plan.count(*each) for each in plan.candidates()), len(store.results)
    hidden = dry_run or not progress or done >= total
    with tqdm(total=total, initial=min(done, total), disable=hidden, unit="run") as bar:
        work = Work(plan, task, store, jobs, part, bar)
        if dry_run:
            print(work.estimate())
            return Comparison(plan, store, metric, budget, note)
        for runs in plan.stages(store):
            work.do(runs)
    forget()
    for run in runs:  # the reported ones
        if not math.isfinite(score := store.results[run]["score"]):
            raise ProblemError(
                f"{run}: the score is {score:g}, by a loss or a metric that is not finite; give "
                "lower rates or another metric"
            )
    return Comparison(plan, store, metric, budget, note)


def settings_of(task: Task) -> dict[str, Any]:
    """The settings on which all runs of ``task`` depend, for its store.

    Raises:
        ProblemError: ``base_model`` returns one model again and again.
    """
    data, head = task.data, task.head if isinstance(task, HeadTask) else None
    changed = {"learning_rate", "upper_learning_rate", "max_steps", "seed", "retrain_arguments"}
    args = task.args.resume_must_match()
    settings = {
        "passes": task.passes,
        "metric": task.metric,
        "head": None if head is None else asdict(head),
        "trainer": task.trainer.__name__,
        "frozen_dropout": task.frozen_dropout,
        "adapter": None if head or task.adapter is None else task.adapter.to_dict(),
        "args": {name: value for name, value in args.items() if name not in changed},
        "retrain": task.args.retrain,
        "retrain_arguments": without_sizes(task.args),
        "base_model": task.fingerprint(),
        "options": {name: code_of(value) for name, value in task.options.items()},
        "versions": versions(),
        "train_dataset": data_fingerprint(data.train),
        "upper_dataset": data_fingerprint(data.upper),
        "test_dataset": data_fingerprint(data.test),
        "held_out": data.held_out,
        "folds": data.folds,
        "parts": data.parts or None,
    }
    for name, method in task.methods.items():
        options: Any = fields(method) if is_dataclass(method) else ()
        values = [getattr(method, each.name) for each in options]
        settings[f"method {name}"] = [code_of(type(method)), *values, dict(method.defaults)]
    return settings


def code_of(thing: Any) -> str:
    """The name of a function, a class or a value's class, with a hash of the code of a user."""
    if not callable(thing) or not hasattr(thing, "__qualname__"):
        thing = type(thing)
    name, module = f"{thing.__module__}.{thing.__qualname__}", sys.modules.get(thing.__module__)
    folder = str(getattr(module, "__file__", ""))
    if "site-packages" in folder or thing.__module__.startswith("hyperopt_peft"):
        return name
    with suppress(OSError, TypeError):  # as of a function that was typed in
        name += f" {hashlib.sha256(inspect.getsource(module or thing).encode()).hexdigest()[:12]}"
    return name
