"""The layer proposed to PEFT against the installed PEFT."""

import copy
import doctest
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

pytest.importorskip("peft", minversion="0.19")  # which has DoraCaching
import benchmark
import fast_dora
from fast_dora import enable_fast_dora
from peft.helpers import DoraCaching


class Pair(nn.Module):
    """Two layers, 6 to 5 to 4 or as many times as wide."""

    def __init__(self, bias: bool = True, gpt2: bool = False, wide: int = 1) -> None:
        super().__init__()
        self.first = Conv1D(5, 6) if gpt2 else nn.Linear(6 * wide, 5 * wide, bias=bias)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Linear(5 * wide, 4 * wide, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.act(self.first(x)) + 1)
        return y


def config(**options: Any) -> LoraConfig:
    defaults = {"r": 2, "lora_alpha": 3, "target_modules": ["first", "second"]}
    options = defaults | {"init_lora_weights": False} | options
    return LoraConfig(use_dora=True, **options)


def adapted(
    dtype: torch.dtype = torch.float64,
    base_bias: bool = True,
    gpt2: bool = False,
    wide: int = 1,
    seed: int = 0,
    **options: Any,
) -> PeftModel:
    torch.manual_seed(seed)
    targets = {"fan_in_fan_out": True, "target_modules": ["first"]} if gpt2 else {}
    model = get_peft_model(Pair(base_bias, gpt2, wide), config(**targets, **options)).to(dtype)
    randomise(model)
    return model


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)


def inputs(dtype: torch.dtype = torch.float64, wide: int = 1, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(7 * wide, 2, 6 * wide, dtype=torch.float64).to(dtype).requires_grad_()


def results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output and the gradients of x and of all parameters that are trained."""
    torch.manual_seed(2)
    model.zero_grad()
    x.grad = None
    y = model(x)
    y.double().square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad.clone()} | found


def caches(model: nn.Module) -> list[dict[str, Tensor]]:
    return [module._dora_cache for module in model.modules() if isinstance(module, DoraLinearLayer)]


@pytest.mark.parametrize("options", [{}, {"gpt2": True}, {"base_bias": False}, {"bias": "all"}])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients(options: Any, dropout: float, training: bool) -> None:
    model = adapted(lora_dropout=dropout, **options).train(training)
    expected = results(model, inputs())
    changed = enable_fast_dora(model)
    torch.testing.assert_close(results(model, inputs()), expected, rtol=1e-11, atol=1e-12)
    assert changed == enable_fast_dora(model, enabled=False) == (1 if "gpt2" in options else 2)
    assert all(type(m) is not fast_dora.FastDoraLinearLayer for m in model.modules())
    variants = model.base_model.model.first.lora_variant.values()
    assert [type(variant) for variant in variants] == [DoraLinearVariant]
    torch.testing.assert_close(results(model, inputs()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("mixed", [False, True])  # adapters in float32 on a base in bfloat16
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_agrees_with_peft_to_rounding(dropout: float, mixed: bool, dtype: torch.dtype) -> None:
    """Over 20 draws: the errors of a single one differ by up to a factor of two either way."""
    means = []
    for seed in range(20):
        model = adapted(dtype, lora_dropout=dropout, wide=8, seed=seed)
        if mixed:
            for name, parameter in model.named_parameters():
                parameter.data = parameter.data.float() if "lora_" in name else parameter.data
        x = inputs(dtype, wide=8, seed=seed + 100)
        exact = results(copy.deepcopy(model).double(), x.detach().double().requires_grad_())
        theirs = results(model, x)
        enable_fast_dora(model)
        ours = results(model, x)
        assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in theirs.items()}
        errors = [
            torch.stack([(t - exact[n]).norm() / exact[n].norm() for n, t in found.items()])
            for found in (ours, theirs)
        ]
        assert errors[0].max() < 112 * torch.finfo(dtype).eps  # the rows that a gradient sums
        means.append(torch.stack([error.mean() for error in errors]))
    ours_mean, theirs_mean = torch.stack(means).mean(0)
    assert ours_mean < 1.5 * theirs_mean


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_changes_nothing(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base, x = Pair(wide=8).to(dtype), inputs(dtype, wide=8)
    expected = base(x)
    model = get_peft_model(base, config(lora_dropout=0.4, init_lora_weights=True))
    enable_fast_dora(model.to(dtype))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_autocast(dropout: float) -> None:
    model = adapted(torch.float32, lora_dropout=dropout)
    exact = results(model, inputs(torch.float32))
    enable_fast_dora(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = results(model, inputs(torch.float32))
    assert ours.pop("y").dtype == torch.bfloat16
    for name, tensor in ours.items():
        assert (tensor - exact[name]).norm() < 0.05 * exact[name].norm()


def test_second_derivatives() -> None:
    def second(model: PeftModel) -> tuple[Tensor, ...]:
        parameters = [p for p in model.parameters() if p.requires_grad]
        first = torch.autograd.grad(model(inputs()).pow(3).sum(), parameters, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), parameters)

    model = adapted()
    expected = second(model)
    enable_fast_dora(model)
    torch.testing.assert_close(second(model), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("gpt2", [True, False])
def test_merging(safe: bool, gpt2: bool) -> None:
    model, x = adapted(gpt2=gpt2).eval(), inputs()
    expected = model(x)
    enable_fast_dora(model)
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_files_are_those_of_peft(tmp_path: Path) -> None:
    model, x = adapted(torch.float32), inputs(torch.float32)
    names, parameters = list(model.state_dict()), list(model.parameters())
    enable_fast_dora(model)
    assert list(model.state_dict()) == names
    assert all(ours is theirs for ours, theirs in zip(model.parameters(), parameters, strict=True))
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Pair(), tmp_path)
    torch.testing.assert_close(again(x), model(x))
    assert enable_fast_dora(again) == 2
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x), rtol=0, atol=0)


def test_several_adapters() -> None:
    model, x = adapted(lora_dropout=0.4), inputs()
    model.add_adapter("other", config(r=1, lora_dropout=0.0))
    model.double()
    randomise(model)
    both = copy.deepcopy(model)
    assert enable_fast_dora(both) == 4
    both.add_adapter("late", config())  # PEFT's until the function is called again
    assert enable_fast_dora(both) == 2
    for active in ("other", "default", ["default", "other"]):
        for module in (model, both):
            module.base_model.set_adapter(active)
        torch.testing.assert_close(results(both, x), results(model, x), rtol=1e-11, atol=1e-12)
    with model.disable_adapter(), both.disable_adapter():
        torch.testing.assert_close(both(x), model(x), rtol=0, atol=0)


class TestCaching:
    """``peft.helpers.DoraCaching`` acts as in PEFT, but keeps n alone."""

    @pytest.fixture(autouse=True)
    def off(self) -> Iterator[None]:
        yield
        DoraCaching()(enabled=False)

    def test_results_and_what_is_kept(self) -> None:
        model, x = adapted(lora_dropout=0.4).eval(), inputs()
        expected = results(model, x)
        enable_fast_dora(model)
        with DoraCaching():
            for _ in range(2):  # filled, then read
                torch.testing.assert_close(results(model, x), expected, rtol=1e-11, atol=1e-12)
                held = [tensor for cache in caches(model) for tensor in cache.values()]
                assert [tuple(tensor.shape) for tensor in held] == [(5,), (4,)]
                assert not any(tensor.requires_grad for tensor in held)
        torch.testing.assert_close(results(model, x), expected, rtol=1e-11, atol=1e-12)
        assert not any(caches(model))  # a pass outside has cleared them

    def test_when_it_is_filled_and_cleared(self) -> None:
        model, x = adapted(), inputs()
        enable_fast_dora(model)
        DoraCaching()(enabled=True)
        model(x)
        assert not any(caches(model))  # training mode
        model.eval()(x)
        assert all(caches(model))
        model.train()
        assert not any(caches(model))
        model.eval()(x)
        enable_fast_dora(model, enabled=False)
        assert not any(caches(model))

    def test_weights_changed_after_the_first_pass(self) -> None:
        """The norm is then that of before, in both."""
        theirs, x = adapted().eval(), inputs()
        ours = copy.deepcopy(theirs)
        enable_fast_dora(ours)
        with DoraCaching():
            for model in (theirs, ours):
                model(x)
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(1.5)
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-11, atol=1e-12)

    def test_adapters_have_their_own(self) -> None:
        model, x = adapted(), inputs()
        model.add_adapter("other", config(r=1))
        model.double().eval()
        enable_fast_dora(model)
        expected = {}
        for name in ("default", "other"):
            model.set_adapter(name)
            expected[name] = model(x)
        with DoraCaching():
            for name in ("default", "other", "default"):
                model.set_adapter(name)
                torch.testing.assert_close(model(x), expected[name])


class Formed(TorchDispatchMode):
    """Counts the tensors with at least ``size`` entries that operations newly allocate."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        if isinstance(out, Tensor) and out.numel() >= self.size:
            self.count += out.untyped_storage().data_ptr() not in given
        return out


def test_nothing_of_the_size_of_the_weight_is_formed() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(40, 30))
    model = get_peft_model(base, config(target_modules=["0"]))
    x = torch.randn(3, 40)
    for counted in (True, False):
        with Formed(30 * 40) as formed:
            model(x).sum().backward()
        assert bool(formed.count) is counted
        enable_fast_dora(model)


def test_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    expected = results(model, inputs())
    enable_fast_dora(model)
    monkeypatch.setattr(fast_dora, "BLOCK", 12)
    torch.testing.assert_close(results(model, inputs()), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("left", [1.0, 1e-2, 1e-4])
def test_rows_that_nearly_cancel(left: float) -> None:
    """s·B·A takes all but the share ``left`` from one row of W0."""
    model = adapted(torch.float32, r=6)
    layer = model.base_model.model.first
    with torch.no_grad():
        a = layer.lora_A["default"].weight
        row = (left - 1) * layer.get_base_layer().weight[0] / layer.scaling["default"]
        layer.lora_B["default"].weight[0] = torch.linalg.solve(a.T.double(), row.double()).float()
    exact = results(copy.deepcopy(model).double(), inputs())
    theirs = results(model, inputs(torch.float32))
    enable_fast_dora(model)
    ours = results(model, inputs(torch.float32))
    for name, tensor in exact.items():
        bound = max(1e-5, 10 * float((theirs[name] - tensor).norm() / tensor.norm()))
        assert (ours[name] - tensor).norm() < bound * tensor.norm()


def test_a_row_of_zeros_has_no_nan() -> None:
    model = adapted(torch.float32)
    layer = model.base_model.model.first
    with torch.no_grad():
        layer.get_base_layer().weight[1] = 0
        layer.lora_B["default"].weight[1] = 0
        layer.lora_magnitude_vector["default"].weight[1] = 0
    assert results(model, inputs(torch.float32))["y"].isnan().any()
    enable_fast_dora(model)
    assert all(t.isfinite().all() for t in results(model, inputs(torch.float32)).values())


def test_a_quantised_layer() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 32, compute_dtype=torch.float32))
    model = get_peft_model(base.to("cpu"), config(target_modules=["0"]))
    randomise(model)
    x = torch.randn(5, 64, requires_grad=True)
    expected = results(model, x)
    assert enable_fast_dora(model) == 1
    torch.testing.assert_close(results(model, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiled() -> None:
    model = adapted()
    expected = results(model, inputs())
    enable_fast_dora(model)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(results(compiled, inputs())["y"], expected["y"])
    torch.compiler.reset()


def test_what_is_not_a_linear_dora_layer_stays() -> None:
    plain = LoraConfig(target_modules=["first"])
    assert enable_fast_dora(get_peft_model(Pair(), plain)) == 0
    words = get_peft_model(nn.Sequential(nn.Embedding(4, 3)), config(target_modules=["0"]))
    assert enable_fast_dora(words) == 0


def test_the_benchmark_prints_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(benchmark, "SIZES", ((32, 64),))
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--rounds", "1"])
    benchmark.main()
    torch.set_num_threads(threads)
    rows = json.loads(capsys.readouterr().out)["rows"]
    bare, dropped, plain, caching = rows
    for row in (bare, dropped):
        assert row["kept bytes"]["fast DoRA"] < row["kept bytes"]["PEFT DoRA"]
    assert not any(plain["cached bytes"].values())
    assert caching["cached bytes"] == {"PEFT DoRA": 4224, "fast DoRA": 128, "LoRA": 0}


def test_the_example_in_the_docstring() -> None:
    assert doctest.testmod(fast_dora).failed == 0
