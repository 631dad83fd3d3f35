"""A bilevel trainer over a trainer of TRL: what the parent does is the parent's."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import TrainingArguments

from hyperopt_peft import (
    BiDoRA,
    BilevelTrainer,
    BilevelTrainingArguments,
    ProblemError,
    bilevel,
)
from hyperopt_peft.trainer import checks
from hyperopt_peft.trainer.internals import METRICS
from tests.support.language import TRL, language_model, lora, rows
from tests.support.methods import FullBatch
from tests.support.networks import differences
from tests.support.trainers import COUNTS_RIGHT

trl = pytest.importorskip("trl")

from tests.support.over_trl import made  # noqa: E402
from tests.support.resume import require_same_end  # noqa: E402

SFT, DPO = trl.SFTTrainer, trl.DPOTrainer
#: Where TRL divides the auxiliary loss by the number of micro-batches.
routed = pytest.mark.skipif(TRL < (1, 15), reason="refused before TRL 1.15")
counted = pytest.mark.skipif(not COUNTS_RIGHT, reason="the stock loss is no mean over labels")
OURS = ("passes", "seconds")
TIMES = ("_runtime", "_per_second", *OURS)


def end(trainer: Any) -> dict[str, Any]:
    logs = [
        {key: value for key, value in record.items() if not key.endswith(TIMES)}
        for record in trainer.state.log_history
    ]
    return {
        "values": {name: p.detach() for name, p in trainer.model.named_parameters()},
        "moments": [list(state.values()) for state in trainer.optimizer.state.values()],
        "metrics": {name: vars(trainer)[name] for name in METRICS if name in vars(trainer)},
        "logs": logs,
    }


SLOW = [(SFT, "text", 1, {}), (SFT, "messages", 7, {}), (SFT, "wrapped", 7, {})]
SLOW += [(SFT, "completion", 3, {"loss_type": "dft"})]
SLOW += [(parent, "completion", 3, {}) for parent in (DPO, trl.KTOTrainer, trl.RewardTrainer)]
SLOW += [(SFT, "completion", 1, {"experts": 4})]


@pytest.mark.parametrize(
    ("parent", "layout", "accumulation", "settings"),
    [
        pytest.param(*(SFT, "packed", 3, {}), marks=counted),
        pytest.param(
            *(SFT, "completion", 3, {"experts": 4, "router_aux_loss_coef": 1.0}), marks=routed
        ),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW),
    ],
)
def test_one_level_is_the_parent(
    tmp_path: Path, parent: type, layout: str, accumulation: int, settings: Any
) -> None:
    """Bit for bit, with TRL's defaults: bf16 and checkpointing; experts have an auxiliary loss."""
    ends, settings = [], {"gradient_accumulation_steps": accumulation, **settings}
    experts = settings.pop("experts", 0)
    for kind in (None, BilevelTrainer):
        options = {"model": language_model(experts=experts)} if experts else {}
        folder = tmp_path / str(kind is None)
        trainer = made(folder, parent, kind, layout, options=options, **settings)
        trainer.train()
        ends.append(end(trainer))
    # The lower level's numbers are logged besides the parent's.
    for theirs, ours in zip(*(each["logs"] for each in ends), strict=True):
        for key in [key for key in ours if key not in theirs]:
            assert key == "lower_grad_norm"
            del ours[key]
    assert not differences(*ends)


@routed
def test_both_levels_train_the_routers_auxiliary_loss(tmp_path: Path) -> None:
    """F and f are the cross entropy of all labels and the mean of coefficient · auxiliary loss.

    Two micro-batches of a row below, three above.
    """
    off = {"bf16": False, "gradient_checkpointing": False, "per_device_train_batch_size": 1}
    logs = []
    for coefficient in (0.0, 3.0):
        trainer = made(
            tmp_path / str(coefficient),
            SFT,
            FullBatch(),
            options={
                "model": language_model(experts=4),
                "train_dataset": rows(count=2),
                "upper_dataset": rows(count=3, seed=1),
            },
            adapter={"use_dora": True, "target_modules": ["q_proj", "o_proj"]},
            **{"retrain": "none", "lower_steps": 1, "hypergradient": "darts", "max_steps": 1},
            **{"gradient_accumulation_steps": 2, "router_aux_loss_coef": coefficient, **off},
        )
        data = trainer.train_dataset, trainer.upper_dataset
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        mean = [mean_auxiliary_loss(trainer, table) for table in data]
        trainer.train()
        logs.append(trainer.state.log_history[0])
        for name, p in trainer.model.named_parameters():
            assert p.requires_grad == (not torch.equal(p, before[name])), name
    for key, auxiliary in zip(("loss", "upper_loss"), mean, strict=True):
        gain = logs[1][key] - logs[0][key]
        assert gain == pytest.approx(3.0 * auxiliary, rel=1e-5), key


@pytest.mark.skipif(not (1, 0) <= TRL < (1, 15), reason="TRL divides the auxiliary loss")
def test_an_auxiliary_loss_that_trl_does_not_divide_is_refused(tmp_path: Path) -> None:
    options = {"model": language_model(experts=4)}
    adapter = {"use_dora": True, "target_modules": ["q_proj", "o_proj"]}
    with pytest.raises(ProblemError, match=r"router_aux_loss_coef: TRL .* micro-batch"):
        made(tmp_path, SFT, BiDoRA(), options=options, adapter=adapter, router_aux_loss_coef=1.0)


@torch.no_grad()
def mean_auxiliary_loss(trainer: Any, table: Any) -> float:
    batches = [trainer.data_collator([row]) for row in table]
    losses = [trainer.model(**batch, output_router_logits=True).aux_loss for batch in batches]
    return float(sum(losses)) / len(losses)


@pytest.mark.filterwarnings("ignore:f2sa. the relative residual")
@pytest.mark.parametrize("estimator", ["direct", pytest.param("f2sa", marks=pytest.mark.slow)])
def test_what_the_loss_counts_is_what_was_trained(tmp_path: Path, estimator: str) -> None:
    """``num_tokens`` of the search is that of SFTTrainer on the same rows."""
    settings = {"gradient_accumulation_steps": 2, "gradient_checkpointing": False, "bf16": False}
    two = {"retrain": "none", "lower_steps": 1, "hypergradient": estimator, "seed": 3}
    data = {"train_dataset": rows(count=12), "eval_dataset": rows(count=6, seed=5)}
    upper = {"upper_dataset": rows(count=6, seed=1)}
    logs = []
    for kind, options, more in ((None, data, {}), (BiDoRA(), data | upper, two)):
        trainer = made(
            tmp_path / type(kind).__name__,
            SFT,
            kind,
            options=options,
            adapter={"use_dora": True},
            **{"seed": 3, **settings, **more},
        )
        trainer.train()
        logs.append([x["num_tokens"] for x in trainer.state.log_history if "num_tokens" in x])
        evaluation = trainer.evaluate()
        assert evaluation.get("eval_num_tokens", logs[-1][-1]) == logs[-1][-1]
    assert logs[0] == logs[1]


@pytest.mark.slow
@pytest.mark.parametrize(("parent", "peft"), [(SFT, True), (DPO, False)], ids=["sft", "dpo again"])
def test_a_resumed_run_is_bit_identical(tmp_path: Path, parent: type, peft: bool) -> None:

    def make(folder: Path, callbacks: Any = (), **settings: Any) -> Any:
        options: dict[str, Any] = {}
        if not peft:
            options["model"] = get_peft_model(language_model(), lora(use_dora=True))
            options["peft_config"] = None
        common = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lower_steps": 2}
        given = {"callbacks": callbacks, "options": options, **common, **settings}
        return made(
            folder, parent, BiDoRA(), adapter={"use_dora": True, "lora_dropout": 0.1}, **given
        )

    require_same_end(tmp_path, (3, "search"), (3, "retrain"), make=make)


def test_a_class_is_one_object_that_pickles(tmp_path: Path) -> None:
    assert bilevel(SFT) is bilevel(SFT)
    for made_class in (bilevel(SFT), bilevel(DPO)):
        assert pickle.loads(pickle.dumps(made_class)) is made_class
        assert pickle.loads(pickle.dumps(made_class.Arguments)) is made_class.Arguments
    args = bilevel(SFT).Arguments(str(tmp_path), use_cpu=True, report_to="none")
    assert pickle.loads(pickle.dumps(args)).to_dict() == args.to_dict()


def test_defaults_are_the_parents_but_for_what_this_package_declares(tmp_path: Path) -> None:
    options = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    args, theirs = bilevel(SFT).Arguments(**options), trl.SFTConfig(**options)
    own = {"restore_callback_states_from_checkpoint"}
    for name, value in theirs.to_dict().items():
        if name not in own:
            assert args.to_dict()[name] == value, name
    assert args.restore_callback_states_from_checkpoint
    assert {"max_length", "packing", "loss_type"} <= args.resume_must_match().keys()
    assert not {"max_length", "bf16"} & args.bilevel_settings().keys()


@pytest.mark.parametrize("name", ["GRPOTrainer", "RLOOTrainer"])
def test_a_trainer_that_generates_is_refused(name: str) -> None:
    with pytest.raises(ProblemError, match=f"{name}: overrides _prepare_inputs"):
        bilevel(getattr(trl, name))


def test_a_release_older_than_what_was_tried_warns_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warned: list[str] = []
    monkeypatch.setattr(checks.logger, "warning_once", warned.append)
    for release, count in (((0, 24), 0), ((0, 23), 1)):
        monkeypatch.setattr(checks, "_trl", lambda release=release: release)
        made(tmp_path, SFT, BilevelTrainer)
        assert sum("TRL" in text for text in warned) == count


@pytest.mark.parametrize("kind", [TrainingArguments, BilevelTrainingArguments])
def test_arguments_of_another_trainer_are_refused(tmp_path: Path, kind: Any) -> None:
    args = kind(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ProblemError, match="args must be BilevelSFTConfig, got"):
        bilevel(SFT)("none", args=args, lower=None, upper=None, train_dataset=rows())


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"activation_offloading": True}, {}, "activation_offloading"),
        ({}, {"upper_dataset": rows("text", 6, seed=1)}, "no column in common"),
        ({}, {"upper_dataset": rows(count=8), "eval_dataset": rows(count=8)}, "eval_dataset"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    tmp_path: Path, settings: Any, options: Any, message: str
) -> None:
    with pytest.raises(ProblemError, match=message):
        made(tmp_path, SFT, BiDoRA(), options={"model": "none", **options}, **settings)


@pytest.mark.skipif(TRL < (1, 15), reason="without a fused head there is a second derivative")
def test_an_exact_product_of_a_fused_head_is_refused_before_any_step(tmp_path: Path) -> None:
    settings = {"lower_steps": 3, "hypergradient": "minres", "gradient_checkpointing": False}
    trainer = made(tmp_path, SFT, BiDoRA(), adapter={"use_dora": True}, **settings)
    with pytest.raises(ProblemError, match=r"no second derivative.*product=.difference"):
        trainer.train()
    assert trainer.state.global_step == 0


def plain(data: Any) -> Any:
    """The rows of a table, or of tables by name."""
    if isinstance(data, dict):
        return {name: plain(table) for name, table in data.items()}
    return None if data is None else data.to_list()


def test_evaluation_data_come_back_as_the_parent_prepares_them(tmp_path: Path) -> None:
    held_out = rows(count=4, seed=7)
    for given in (None, held_out, {"one": held_out, "two": rows(count=6, seed=8)}):
        options = {"eval_dataset": given, "upper_dataset": rows(count=8, seed=1)}
        trainer = made(tmp_path, SFT, BiDoRA(), options=options, adapter={"use_dora": True})
        assert trainer.upper_dataset.column_names == trainer.train_dataset.column_names
        theirs = made(tmp_path, SFT, options={"eval_dataset": given}).eval_dataset
        assert plain(trainer.eval_dataset) == plain(theirs)
    with pytest.raises(ValueError, match="eval_dataset"):
        made(tmp_path, SFT, BiDoRA(), adapter={"use_dora": True}, eval_strategy="epoch")


def test_packed_rows_are_refused_where_their_lengths_would_be_removed(tmp_path: Path) -> None:
    """A stock Trainer has no use for the column, and documents would attend to each other."""
    packed = made(tmp_path, SFT, layout="packed").train_dataset
    args = BilevelTrainer.Arguments(str(tmp_path), use_cpu=True, report_to="none")
    model = get_peft_model(language_model(), lora(use_dora=True))
    with pytest.raises(ProblemError, match=r"seq_lengths.*bilevel\(SFTTrainer\)"):
        BilevelTrainer(model, args, method=BiDoRA(), train_dataset=packed)
