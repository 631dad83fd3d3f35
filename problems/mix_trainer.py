"""`MixTrainer`: how much should each source of training data count?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers.trainer_utils import TrainOutput

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.engine import checkpoint
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients import Estimator
from hyperopt_peft.problems.common import trainable
from hyperopt_peft.problems.data_sources import SOURCE, SourceWeights, default_prior
from hyperopt_peft.problems.example_weights import HeldOut
from hyperopt_peft.problems.features import features_of
from hyperopt_peft.problems.head import problem_type_of
from hyperopt_peft.problems.head_mix import SEARCH_STEPS, HeadMix, Plan
from hyperopt_peft.problems.head_rows import HeadRows, kept, of_classes
from hyperopt_peft.problems.mix_arguments import AUTO, STEPS_OF_TEXTS, MixTrainingArguments
from hyperopt_peft.problems.source_data import TRUSTED, SourceData
from hyperopt_peft.problems.source_trainer import SourceTrainer, equal_weights
from hyperopt_peft.problems.two_phases import TwoPhaseTrainer, options_of_retraining
from hyperopt_peft.problems.votes import VOTES
from hyperopt_peft.trainer.checks import check_class
from hyperopt_peft.trainer.trainer import BilevelTrainer
from hyperopt_peft.utils.distributed import broadcast
from hyperopt_peft.utils.models import base_model
from hyperopt_peft.utils.restore import assign_, perturbed

#: The file with the features of a search on the head.
FEATURES = "features.safetensors"
#: Of texts about how many labels of the sources, and of the trusted rows, a head is trained on at
#: most, and its most classes.
LABELS, CLASSES = 8_000, 500
#: The settings of a parent by which its rows are not those of the data.
PACKS = ("packing", "padding_free", "eval_packing", "shuffle_dataset")


class MixTrainer(SourceTrainer, TwoPhaseTrainer):
    """Learns the weights of data sources on trusted rows, then trains on everything with them.

    In the search the lower level trains a head on features of the frozen model, or the adapter, on
    the sources (`Mixture`), and the upper level the weights on the trusted rows (`HeldOut`). The
    trusted rows are one more source of the lower level, ``trusted``, whose weight is learned as
    well. Then the adapter is trained from its initial values on sources and trusted rows.
    ``weights`` has the result; `compare_baselines` says whether it was worth it, and `retrain`
    trains by another `Plan`.

    A search on the head takes seconds, of texts minutes; its hypergradient is by implicit
    differentiation at the head's minimum (`HeadMix`). The model must not be in shards (FSDP).

    The default prior makes n·(F + prior), with F the mean loss of n trusted rows, a negative log
    posterior whose logits have the prior variance 8.

    A search on the adapter needs about ten rows of each source in a step: see
    ``gradient_accumulation_steps``. Where the logged ``upper_snr`` is near 0 from the beginning,
    the weights follow noise.

    Of a language model each label has a source, and f is the mean over all labels: the loss that
    the parent trains where all weights are 1. ``MixTrainer.over(SFTTrainer)`` takes texts, which
    SFTTrainer prepares, each source alone; a packed row has one source.

    Args:
        model: a PeftModel for classification or language modelling, or what the parent takes.
        args: the settings.
        sources: data sets by name; or one data set with the column ``votes``, a list of a class
            for each labelling function, -1 for none, or of its probabilities of the classes, all
            0 for none.
        trusted: the trusted rows, with the columns of the sources; of votes, with labels, and
            with the functions' votes on them where they are known.
        trainer: further arguments of `transformers.Trainer`.

    Raises:
        ProblemError: as `SourceData.of` and `BilevelTrainer`.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> model = get_peft_model(BertForSequenceClassification(tiny), LoraConfig())
        >>> def rows(first):
        ...     ids = [[first + k] * 4 for k in range(6)]
        ...     return Dataset.from_dict({"input_ids": ids, "labels": [0, 1] * 3})
        >>> args = MixTrainingArguments("outputs", report_to="none", use_cpu=True)
        >>> trainer = MixTrainer(
        ...     model, args, sources={"web": rows(1), "books": rows(10)}, trusted=rows(20)
        ... )
        >>> trainer.weights.names
        ['web', 'books', 'trusted']
    """

    Arguments = MixTrainingArguments
    args: MixTrainingArguments
    may_share_rows = True

    def __init__(
        self,
        model: Any,
        args: MixTrainingArguments,
        *,
        sources: Mapping[str, Dataset] | Dataset | SourceData,
        trusted: Dataset | None = None,
        **trainer: Any,
    ) -> None:
        check_class(args, self.Arguments)
        for name, value in (
            ("label_smoothing_factor", args.label_smoothing_factor),
            ("compute_loss_func", trainer.get("compute_loss_func")),
        ):
            if value:
                raise ProblemError(
                    f"{name}: not possible in MixTrainer, whose levels have a loss of each row; "
                    "leave it out"
                )
        #: The sources and the trusted rows as they were given.
        self.data = sources if isinstance(sources, SourceData) else SourceData.of(sources, trusted)
        #: The arguments of the parent for further trainers of the same model.
        self.options = options_of_retraining(trainer)
        super().__init__(
            model,
            args,
            parts=self.data.parts,
            names=self.data.names,
            upper=MixTrainer._held_out,
            **trainer,
        )
        #: The initial values of the trainable parameters.
        self.initial = [variable.detach().clone() for variable in self._variables()]
        search, whole = self.args.search, not self.is_fsdp_enabled
        #: Whether the weights are learned on a head.
        self.on_head = search == "head" or (search == AUTO and whole)
        if self.on_head:
            self._require_whole_model()
        self.args = copy(self.args)  # the caller's may be those of another model too
        self.args.search = "head" if self.on_head else "adapter"

    def _variables(self) -> list[Tensor]:
        return [parameter for _, parameter in trainable(self.model)]

    @property
    def of_texts(self) -> bool:
        """Whether the model is a language model, whose labels are tokens."""
        head = getattr(base_model(self.model), "get_output_embeddings", None)
        return head is not None and head() is not None

    def _require_whole_model(self) -> None:
        if self.is_fsdp_enabled:
            raise ProblemError(
                "search: a head needs the features of a whole model, and this one is in shards "
                "(FSDP); choose the adapter"
            )

    def _held_out(self) -> Problem:
        prior = default_prior(len(self.weights.names), len(self.data.trusted))
        # The argument, where there is one, becomes the level's prior afterwards.
        default = prior if self.args.upper_prior is None else None
        return HeldOut(self.model, self.weights, task_loss=self.task_loss, prior=default)

    def make_estimator(self) -> Estimator:
        """As `BilevelTrainer.make_estimator`; by default the one for tokens, or for rows."""
        return self.args.estimator(of_tokens=self.of_tokens)

    @cached_property
    def head_mix(self) -> HeadMix:
        """The head on the features of all rows, of the model with the adapter's initial values.

        The features are in the file ``features.safetensors`` of the output folder. Of texts they
        are those of about `LABELS` labels of all sources, as many of each, and of as many trusted
        ones; a label's class is the token, one of the `CLASSES` most frequent of the trusted rows,
        or any other one.

        Raises:
            ProblemError: the model is in shards (FSDP); see `features_of`.
        """
        self._require_whole_model()
        args = self.args
        steps = args.search_steps or (STEPS_OF_TEXTS if self.of_texts else SEARCH_STEPS)
        rate, prior = args.upper_learning_rate, args.upper_prior
        return HeadMix(self._head_rows(), prior=prior, rate=rate, steps=steps)

    def _head_rows(self) -> HeadRows:
        args, single = self.args, self
        if any(getattr(args, name, None) for name in PACKS):
            single = self.of_single_rows(self.data.parts)
        rows = single.train_dataset
        groups = torch.tensor(rows[VOTES if VOTES in rows.column_names else SOURCE][:])
        share = sampled = None
        if self.of_texts:
            counts = self.weights.counts.cpu()
            most = torch.full_like(counts, LABELS / (len(counts) - 1))
            most[-1] = LABELS
            share = (most / counts).clamp(max=1)[groups]
        with perturbed(self._variables()):
            assign_(self._variables(), self.initial)
            features = features_of(
                self.model,
                rows,
                single.data_collator,
                batch_size=args.per_device_eval_batch_size,
                device=args.device,
                precision=self.compute_loss_context_manager,
                cache=Path(args.output_dir or "") / FEATURES if args.should_save else None,
                progress=not args.disable_tqdm,
                shifted=self.shifted,
                share=share,
            )
        config = base_model(self.model).config
        outputs, kind = config.num_labels, problem_type_of(config, features.labels)
        if self.of_texts:
            source, last = groups[features.row], len(self.data.names) - 1
            trusted = features.labels[source == last]
            labels, outputs = of_classes(features.labels, trusted, CLASSES)
            features = replace(features, labels=labels)
            # By the labels that the adapter is trained on, packed or not.
            sampled = source.bincount(minlength=last + 1).clamp(min=1) / counts
        return HeadRows.of(
            self.data.names,
            features,
            groups,
            outputs=outputs,
            trusted_votes=self.data.trusted_votes,
            problem_type=kind,
            sampled=sampled,
        )

    def of_single_rows(self, parts: Mapping[str, Dataset]) -> SourceTrainer:
        """As `of_parts`, with rows that are neither packed nor shuffled, to read them alone."""
        args = copy(self.args)
        for name in PACKS:
            if getattr(args, name, None):
                setattr(args, name, False)
        args.eval_strategy, args.load_best_model_at_end, args.report_to = "no", False, []
        return self.of_parts(
            parts, args, **{**self.options, "callbacks": None, "eval_dataset": None}
        )

    def search(self, point: Any, *args: Any, **kwargs: Any) -> Any:
        """As `TwoPhaseTrainer.search`, or on the head, which has no checkpoints."""
        if not self.on_head:
            return super().search(point, *args, **kwargs)
        mix = self.head_mix
        self._take(mix.learned)
        self.state.log_history += [{"step": k, **record} for k, record in enumerate(mix.history)]
        self.state.log_history.append({"step": len(mix.history), "shares": self.shares()})
        last = {name: mix.history[-1][name] for name in ("upper_loss", "residual")}
        self.log({"search_steps": mix.steps, "search_passes": mix.learned.passes, **last})
        return TrainOutput(0, last["upper_loss"], last)

    def retrain(self, plan: Plan, *, resume: bool = False) -> None:
        """Train the adapter from its initial values by ``plan``, whose weights `weights` then has.

        The steps are those of `retraining`. A training on the trusted rows alone has half of them
        where another one is before it.

        Args:
            plan: the plan.
            resume: whether to go on from the last complete checkpoint of a training by it, if any.
        """
        args, data = self.args.for_retraining(), self.data
        assign_(self._variables(), self.initial)
        self._take(plan)
        if plan.groups is not None:
            data = kept(data, plan.groups, self.head_mix.rows)
        phases = phases_of(plan, data, args.steps_of(len(self.train_dataset)))
        folders = [Path(args.output_dir or ""), Path(args.output_dir or "") / TRUSTED]
        point = next(checkpoint.valid_checkpoints(*folders), None) if resume else None
        begin = 0 if point is None else folders.index(point[0].parent)
        for (parts, steps), folder in [*zip(phases, folders)][begin:]:
            phase = copy(args)
            phase.max_steps, phase.output_dir = steps, str(folder)
            weights = self._present_weights if len(parts) > 1 else equal_weights
            self.retrainer = self.of_parts(parts, phase, weights, **self.options)
            self.retrainer._train_from(point)
            point = None

    def _take(self, plan: Plan) -> None:
        """Let the weights be those of ``plan``, on all processes."""
        with torch.no_grad():
            self.weights.logits.copy_(plan.logits)
        broadcast([self.weights.logits], self.args.device)

    def retraining(self, args: Any) -> BilevelTrainer:
        """The trainer of the adapter on everything, with the learned weights."""
        return self.of_parts(self.data.parts, args, self._present_weights, **self.options)

    def _present_weights(self, counts: Mapping[str, int]) -> SourceWeights:
        return self.weights

    def of_parts(
        self,
        parts: Mapping[str, Dataset],
        args: Any,
        weights: Callable[[Mapping[str, int]], SourceWeights] = equal_weights,
        **options: Any,
    ) -> SourceTrainer:
        """A trainer of the same kind that trains the model on ``parts``, with fixed weights."""
        of_parts = {"parts": parts, "names": self.data.names, "weights": weights}
        made: SourceTrainer = self.trainer_of(SourceTrainer, args, **of_parts, **options)
        return made

    def search_passes(self) -> int:
        """The passes of the search over a micro-batch; for a head, those of the features."""
        if self.on_head:
            return math.ceil(len(self.train_dataset) / int(self.args.per_device_train_batch_size))
        steps = self.args.steps_of(len(self.train_dataset))
        return math.ceil(steps * self.passes_of_an_upper_step() / self.args.lower_steps)

    def shares(self) -> dict[str, float]:
        """The share of each source, and of the trusted rows, in the training loss; sum 1."""
        return self._by_name(self.weights.shares())

    def row_weights(self) -> dict[str, float]:
        """The weight of a row of each source, by name; the mean over all rows is 1."""
        return self._by_name(self.weights())

    def _by_name(self, values: Tensor) -> dict[str, float]:
        return dict(zip(self.weights.names, values.tolist(), strict=True))


def phases_of(plan: Plan, data: SourceData, steps: int) -> list[tuple[dict[str, Dataset], int]]:
    """The parts of ``data`` that ``plan`` trains on, and for how many of ``steps``, by phase.

    A phase of the trusted rows alone has no other part.
    """
    trusted = {TRUSTED: data.parts[TRUSTED]}
    after = steps // 2 if plan.then_trusted else 0
    first = (trusted if plan.trusted_only else data.parts, steps - after)
    return [first, (trusted, after)] if after else [first]
