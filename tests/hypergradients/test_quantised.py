"""Bases in 4 bits have the hypergradient of their weights; in 8 bits no difference is right."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from hyperopt_peft import Problem, ProblemError, hypergradient
from hyperopt_peft.core.data import DataStream
from hyperopt_peft.hypergradients import oracle, registered
from tests.support.language import lora, quantised
from tests.support.quadratic import relative_error
from tests.support.weighted_levels import weighted

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast")

SOLVERS = ("cg", "exact", "minres", "neumann", "nystrom", "warm")
DIFFERENCES = (
    *(f"{name}:product=difference" for name in (*SOLVERS, "unrolled")),
    *("darts", "darts:scheme=forward", "sama", "f2sa"),
)
OTHERS = ("direct", "darts:product=exact", "minres:steps=3,damping=10.0", "unrolled")


def levels(base: Any, *, training: bool = True) -> tuple[Problem, Problem]:
    """Weights of eight examples above an adapter."""
    torch.manual_seed(0)
    model = get_peft_model(base, lora(r=1, target_modules=["v_proj", "up_proj"])).train(training)
    both = weighted("index", model, 8, torch.float32)
    both[0].variables[0].data.zero_()
    for parameter in both[1].variables:
        parameter.data *= 0.3  # a smooth loss, whose difference has a small truncation error
    for seed, level in enumerate(both):
        ids = torch.randint(3, 20, (8, 8), generator=torch.Generator().manual_seed(seed))
        rows = {"input_ids": ids, "labels": ids, "index": torch.arange(8)}
        level.batches = DataStream([rows], level.name)
    both[1].optimizer = torch.optim.SGD(both[1].variables, lr=0.1)
    return both


@pytest.fixture(scope="module")
def in_8_bits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Problem, Problem]:
    """In evaluation mode, where CPUs too round activations."""
    return levels(quantised(tmp_path_factory.mktemp("8bit"), bits=8), training=False)


@pytest.mark.parametrize("method", DIFFERENCES)
def test_differences_are_refused(method: str, in_8_bits: tuple[Problem, Problem]) -> None:
    with pytest.raises(ProblemError, match=r"^Linear8bitLt: .*; choose product=exact, direct"):
        hypergradient(*in_8_bits, method)


def test_every_estimator_has_been_tried() -> None:
    tried = {name.partition(":")[0] for name in (*DIFFERENCES, *OTHERS)}
    own = "hyperopt_peft."  # other tests register estimators
    known = {n for n, x in registered().items() if x.estimator.__module__.startswith(own)}
    assert known <= tried | {"fastmix"}


def test_exact_products_are_right_there_and_differences_would_not_be(
    tmp_path: Path, in_8_bits: tuple[Problem, Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = levels(quantised(tmp_path, bits=8).dequantize())
    expected = hypergradient(*weights, "darts:product=exact")
    assert relative_error(hypergradient(*in_8_bits, "darts:product=exact"), expected) < 0.15
    assert relative_error(hypergradient(*weights, "darts"), expected) < 0.01
    monkeypatch.setattr(oracle, "require_no_rounding", lambda modules: None)
    assert relative_error(hypergradient(*in_8_bits, "darts"), expected) > 0.5


@pytest.mark.parametrize("method", ["darts:product=exact", "darts"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 0.01), (torch.bfloat16, 0.03)])
def test_bases_in_4_bits_have_the_hypergradient_of_their_weights(
    tmp_path: Path, method: str, dtype: torch.dtype, error: float
) -> None:
    weights = levels(quantised(tmp_path).dequantize())
    actual = hypergradient(*levels(quantised(tmp_path, dtype)), method)
    assert relative_error(actual, hypergradient(*weights, "darts:product=exact")) < error
