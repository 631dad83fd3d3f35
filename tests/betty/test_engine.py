"""Options and callbacks of problems, and where Betty's own results are wrong."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hyperopt_peft
from hyperopt_peft import ProblemError
from hyperopt_peft.betty import Config, Engine, EngineConfig, ImplicitProblem
from tests.support.betty_programs import Values, chain, ridge


class Quadratic(ImplicitProblem):
    """½‖w − batch‖² over the parameters ``values`` of the module."""

    def training_step(self, batch: Any) -> Any:
        return (self.module.values - batch).square().sum() / 2


def quadratic(
    kind: Any = Quadratic, *, name: str = "fit", config: Config | None = None, **parts: Any
) -> Quadratic:
    module = parts.pop("module", None) or Values([1.0, 2.0])
    optimizer = parts.pop("optimizer", torch.optim.SGD(module.parameters(), lr=0.1))
    data = parts.pop("train_data_loader", [torch.zeros(2, dtype=torch.float64)])
    return kind(name, config, module, optimizer, train_data_loader=data, **parts)


def below(lower: Any, upper: Any) -> dict[str, Any]:
    return {"l2u": {lower: [upper]}, "u2l": {upper: [lower]}}


def run(problems: list[Any], steps: int, *, upper: Any = None, **options: Any) -> Engine:
    """An engine after ``steps`` of these problems, the last of which is below ``upper``, if any."""
    graph = None if upper is None else {"l2u": {problems[-1]: [upper]}, "u2l": {}}
    engine = Engine(problems, EngineConfig(train_iters=steps, strategy="cpu", **options), graph)
    engine.run()
    return engine


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (Config, "type", "reinforce"),
        (Config, "precision", "fp16"),
        (Config, "first_order", False),
        (Config, "darts_multitask", True),
        (Config, "sama_multitask", True),
        (Config, "scale_factor", 3.0),
        (Config, "initial_dynamic_scale", 1.0),
        (Config, "unroll_steps", 0),
        (Config, "neumann_alpha", -1.0),
        (EngineConfig, "strategy", "fsdp"),
        (EngineConfig, "distributed", True),
        (EngineConfig, "backend", "gloo"),
        (EngineConfig, "valid_step", 0),
    ],
)
def test_options_are_refused(kind: Any, name: str, value: Any) -> None:
    with pytest.raises(ProblemError, match=name):
        kind(**{name: value})


@pytest.mark.parametrize(
    "method",
    ["get_batch", "custom_optimizer_step", "patch_module", "meta_trainable_parameters"],
)
def test_methods_that_are_not_called_are_refused(method: str) -> None:
    with pytest.raises(ProblemError, match=method):
        type("Mine", (ImplicitProblem,), {method: lambda self: None})


def test_engines_refuse_what_is_no_chain() -> None:
    a, b, top = (quadratic(name=name) for name in ("a", "b", "top"))
    graph = {"l2u": {a: [top], b: [top]}, "u2l": {top: [a, b]}}
    with pytest.raises(ProblemError, match="a, b"):
        Engine([top, a, b], dependencies=graph)
    with pytest.raises(ProblemError, match="top, a"):
        Engine([top, a], dependencies={"l2u": {a: [top], top: [a]}, "u2l": {}})
    with pytest.raises(ProblemError, match="top, a"):
        Engine([top, a], dependencies={"l2u": {a: [top]}, "u2l": {a: [top]}})
    with pytest.raises(ProblemError, match="env"):
        Engine([a], env=object())
    with pytest.raises(ProblemError, match="run: is an attribute"):
        Engine([quadratic(name="run")])


@pytest.mark.parametrize(
    ("part", "value"),
    [("train_data_loader", None), ("train_data_loader", ([0.0], [1.0])), ("optimizer", None)],
)
def test_a_part_is_missing_or_given_twice(part: str, value: Any) -> None:
    with pytest.raises(ProblemError, match=f"fit: give one {part}"):
        Engine([quadratic(**{part: value})])


def test_the_loader_is_in_a_list_of_one() -> None:
    class Counted(Quadratic):
        def configure_scheduler(self) -> Any:
            return torch.optim.lr_scheduler.StepLR(self.optimizer, len(self.train_data_loader[0]))

    batches = [torch.full((2,), x, dtype=torch.float64) for x in (0.0, 1.0)]
    problem = quadratic(Counted, train_data_loader=batches)
    for steps in (2, 4):  # the second engine goes on with the same batches
        run([problem], steps)
    assert problem.train_data_loader[0] is batches
    expected = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for rate, x in ((0.1, 0.0), (0.1, 1.0), (0.01, 0.0), (0.01, 1.0)):
        expected = expected - rate * (expected - x)
    torch.testing.assert_close(problem.module.values.detach(), expected)


def test_levels_share_a_parameter() -> None:
    module = Values([1.0])
    upper, lower = quadratic(name="upper", module=module), quadratic(module=module)
    with pytest.raises(ProblemError, match="memory"):
        Engine([upper, lower], dependencies=below(lower, upper))


def test_one_problem_is_trained() -> None:
    problem = quadratic()
    run([problem], 3)
    expected = torch.tensor([1.0, 2.0], dtype=torch.float64) * 0.9**3
    assert torch.allclose(problem.module.values, expected)


def test_accumulation_is_a_step_along_the_mean() -> None:
    batches = [torch.full((2,), x, dtype=torch.float64) for x in (0.0, 1.0, 5.0)]
    many = quadratic(config=Config(gradient_accumulation=3), train_data_loader=batches)
    one = quadratic(train_data_loader=[torch.stack(batches).mean(0)])
    run([many], 6)
    run([one], 2)
    assert torch.allclose(many.module.values, one.module.values)


class Partly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.values, self.unused, self.frozen = (nn.Parameter(torch.ones(2)) for _ in range(3))
        self.frozen.requires_grad_(False)


@pytest.mark.parametrize("allowed", [True, False])
def test_unused_parameters(allowed: bool) -> None:
    module = Partly()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=1.0)
    lower = quadratic(
        config=Config(allow_unused=allowed),
        module=module,
        optimizer=optimizer,
        train_data_loader=[torch.zeros(2)],
    )
    upper = quadratic(name="upper", module=Values([1.0, 1.0]))
    if not allowed:
        with pytest.raises(ProblemError, match="unused"):
            run([upper, lower], 3, upper=upper)
        return
    run([upper, lower], 3, upper=upper)
    assert (module.values < 0.9).all()
    assert torch.equal(module.unused, torch.ones(2))
    assert torch.equal(module.frozen, torch.ones(2))


def test_group_options_are_kept() -> None:
    module = Values([1.0]), Values([1.0])
    both = nn.ModuleList(module)
    groups = [{"params": [module[0].values], "lr": 0.5}, {"params": [module[1].values]}]

    class Both(ImplicitProblem):
        def training_step(self, batch: Any) -> Any:
            return sum(x().sum() for x in self.module)

        def trainable_parameters(self) -> list[Tensor]:
            return [module[0].values]

    optimizer = torch.optim.SGD(groups, lr=0.1)
    run([quadratic(Both, module=both, optimizer=optimizer, train_data_loader=[0])], 1)
    assert [x.item() for x in (module[0].values, module[1].values)] == [0.5, 1.0]


def test_both_passes_have_the_masks_of_the_step() -> None:
    """f = Σ r·u·w with random r: the implicit term is −r·∂F/∂w with the r of the lower step."""
    drawn, slopes = [], []

    class Outer(ImplicitProblem):
        def training_step(self, batch: Any) -> Any:
            return (self.inner() - 1).square().sum()

        def grad_callback(self) -> None:
            slopes.append(self.module.values.grad.clone())

    class Inner(ImplicitProblem):
        def training_step(self, batch: Any) -> Any:
            drawn.append(torch.rand(3, dtype=torch.float64))
            return (drawn[-1] * self.outer() * self()).sum()

    u, w = Values([1.0, 2.0, 3.0]), Values([0.5, -0.5, 0.1])
    outer, inner = (
        kind(name, None, x, torch.optim.SGD(x.parameters(), lr=0.01), train_data_loader=[0])
        for kind, name, x in ((Outer, "outer", u), (Inner, "inner", w))
    )
    engine = Engine([outer, inner], EngineConfig(1, strategy="cpu"), below(inner, outer))
    engine.run()
    torch.testing.assert_close(slopes[0], -drawn[0] * 2 * (w.values - 1), rtol=1e-6, atol=0)


def test_bfloat16_runs_and_its_differences_are_in_float32() -> None:
    slopes, kinds = [], set()

    class Outer(ImplicitProblem):
        def training_step(self, batch: Any) -> Any:
            return (self.inner(batch) - 1).square().mean()

        def grad_callback(self) -> None:
            slopes.append(torch.cat([x.grad.flatten() for x in self.parameters()]))

    class Inner(ImplicitProblem):
        def training_step(self, batch: Any) -> Any:
            out = self(batch)
            kinds.add(out.dtype)
            return ((out - self.outer(batch)).tanh() ** 2).mean()

    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        problems = []
        for kind, name in ((Outer, "outer"), (Inner, "inner")):
            module = nn.Linear(4, 3)
            optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
            config = Config(precision=precision)  # type: ignore[arg-type]
            problems.append(kind(name, config, module, optimizer, train_data_loader=[x]))
        graph = below(problems[1], problems[0])
        Engine(problems, EngineConfig(1, strategy="cpu"), graph).run()
    assert torch.bfloat16 in kinds
    assert (slopes[1] - slopes[0]).norm() < 0.02 * slopes[0].norm()


@pytest.mark.parametrize(("mode", "tolerance", "steps"), [("min", 3, 14), ("max", 2, 6)])
def test_early_stopping(mode: str, tolerance: int, steps: int) -> None:
    class Watched(Engine):
        def validation(self) -> dict[str, Any]:
            values = [3.0, 2.0, 2.5, 1.0, 1.5, 1.0, 1.2, 0.1]
            return {"error": torch.tensor(values[self.global_step // 2 - 1])}

    config = EngineConfig(
        train_iters=16,
        valid_step=2,
        strategy="cpu",
        early_stopping=True,
        early_stopping_metric="error",
        early_stopping_mode=mode,  # type: ignore[arg-type]
        early_stopping_tolerance=tolerance,
    )
    engine = Watched([quadratic()], config)
    engine.run()
    assert engine.global_step == steps


def test_a_metric_is_missing() -> None:
    engine_class = type("Silent", (Engine,), {"validation": lambda self: None})
    config = EngineConfig(train_iters=2, valid_step=1, early_stopping=True)
    with pytest.raises(ProblemError, match="early_stopping_metric"):
        engine_class([quadratic()], config).run()


def test_roll_back_keeps_the_warm_up_and_restores_buffers() -> None:
    class Counted(Values):
        def __init__(self) -> None:
            super().__init__([1.0, 2.0])
            self.register_buffer("passes", torch.zeros(()))

    class Lower(Quadratic):
        def training_step(self, batch: Any) -> Any:
            self.module.passes += 1
            return super().training_step(batch)

    module = Counted()
    lower = quadratic(Lower, name="lower", config=Config(warmup_steps=4), module=module)
    upper = quadratic(name="upper")
    run([upper, lower], 6, upper=upper, roll_back=True)
    expected = torch.tensor([1.0, 2.0], dtype=torch.float64) * 0.9**6
    torch.testing.assert_close(module.values.detach(), expected)
    assert module.passes == 6
    assert upper.count == 2


def test_roll_back_repeats_the_last_step_at_the_rate_of_the_cycle() -> None:
    class Follow(ImplicitProblem):
        def training_step(self, batch: Any) -> Any:
            return (self() - self.upper() - batch).square().sum() / 2

    w, u = Values([1.0, 2.0]), Values([0.5, -0.5])
    optimizer = torch.optim.SGD(w.parameters(), lr=0.4)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    batches = [torch.full((2,), x, dtype=torch.float64) for x in (0.0, 1.0, 5.0)]
    lower = Follow("lower", Config(unroll_steps=2), w, optimizer, scheduler, batches)
    upper = quadratic(name="upper", module=u)
    expected, target, rate = w.values.detach().clone(), u.values.detach().clone(), 0.4
    run([upper, lower], 8, upper=upper, roll_back=True)
    for last in (1.0, 0.0, 5.0, 1.0):  # the second batch of each cycle of two
        target = target * 0.9
        expected = expected - rate * (expected - target - last)
        rate /= 2
    torch.testing.assert_close(u.values.detach(), target)
    torch.testing.assert_close(w.values.detach(), expected)
    assert scheduler.get_last_lr() == pytest.approx([rate])


def test_sama_differentiates_the_step_of_adam() -> None:
    def of_adam(**lower: Any) -> Any:
        return ridge(hyperopt_peft.betty, {"train_iters": 5}, lower, {}, optimizer="adam")

    found, same = of_adam(type="sama", sama_adam_alpha=1e-3), of_adam()
    upper, lower = same.engine._levels
    upper.owner.scheduler.last_epoch = 0
    hyperopt_peft.Engine(upper, lower, "unrolled:steps=1", progress=False).run(5)
    found.engine.run()
    torch.testing.assert_close(found.u.values, same.u.values, rtol=1e-4, atol=0)
    with pytest.raises(ProblemError, match="sama cannot accumulate"):
        of_adam(type="sama", gradient_accumulation=2)


def test_states_are_restored() -> None:
    first, second = (ridge(hyperopt_peft.betty, {"train_iters": 4}, {}, {}) for _ in range(2))
    first.engine.run()
    for one, other in ((first.outer, second.outer), (first.inner, second.inner)):
        other.load_state_dict(one.state_dict())
    assert torch.equal(first.u.values, second.u.values)
    assert second.inner.scheduler.last_epoch == first.inner.scheduler.last_epoch
    assert second.inner.optimizer.state_dict()["state"]


def test_a_chain_solves_by_cg() -> None:
    lower = {"type": "cg", "cg_iterations": 4, "unroll_steps": 3}
    middle = {"type": "cg", "cg_iterations": 4, "unroll_steps": 2}
    program = chain(hyperopt_peft.betty, lower, middle, train_iters=20)
    program.engine.run()
    assert program.engine.global_step == 18
    assert all(x.isfinite().all() for x in program.values)


def path_through_the_lowest(cases: list[Any], goal: Tensor, **options: Any) -> Engine:
    """w follows 2v, which follows u: v*(u) = u/2. F = ½‖v − goal‖²."""

    class Top(ImplicitProblem):
        def training_step(self, batch: Any) -> Any:
            return (self.middle() - goal).square().sum() / 2

        def grad_callback(self) -> None:
            cases.append((self.module.values.grad.clone(), self.middle().detach().clone()))

    class Middle(ImplicitProblem):
        def training_step(self, batch: Any) -> Any:
            return (self.lowest() - self.top()).square().sum() / 2

        def grad_callback(self) -> None:
            cases.append(self.lowest.count)

    class Lowest(ImplicitProblem):
        def training_step(self, batch: Any) -> Any:
            return (self() - 2 * self.middle()).square().sum() / 2

    starts = {"top": [0.5, 0.1], "middle": [0.3, -0.2], "lowest": [0.0, 0.0]}
    cg = {"type": "cg", "cg_iterations": 2}
    top, middle, lowest = (
        kind(x, Config(**config), m, torch.optim.SGD(m.parameters(), lr=0.1), train_data_loader=[0])
        for kind, (x, m), config in zip(
            (Top, Middle, Lowest),
            ((x, Values(start)) for x, start in starts.items()),
            ({}, {"unroll_steps": 3, **cg}, {"unroll_steps": 2, **cg, **options}),
            strict=True,
        )
    )
    graph = {"l2u": {lowest: [middle, top], middle: [top]}, "u2l": {top: [middle, lowest]}}
    return Engine([top, middle, lowest], EngineConfig(train_iters=14, strategy="cpu"), graph)


def test_the_middle_of_a_chain_reads_its_parameters_through_the_lowest_alone() -> None:
    cases, goal = list[Any](), torch.tensor([0.2, -0.4], dtype=torch.float64)
    path_through_the_lowest(cases, goal).run()
    pairs = [x for x in cases if isinstance(x, tuple)]
    assert len(pairs) == 2
    for slope, v in pairs:
        torch.testing.assert_close(slope, (v - goal) / 2, rtol=1e-6, atol=1e-9)


def test_the_warm_up_of_the_lowest_ends_with_a_cycle() -> None:
    cases = list[Any]()
    path_through_the_lowest(cases, torch.zeros(2, dtype=torch.float64), warmup_steps=5).run()
    counts = [x for x in cases if isinstance(x, int)]
    assert counts == [6, 8, 10, 12, 14]  # as in Betty: the first even numbers above five
