"""Two levels over a small network, plain or distributed in two processes."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from hyperopt_peft import Engine, Nested, NonFiniteError, Problem, ProblemError, hypergradient
from hyperopt_peft.hypergradients import registered

WHOLE = sorted(
    {*registered()} - {"fastmix"}
    | {"darts:scheme=forward", "darts:product=exact", "cg:product=difference"}
    | {"unrolled:steps=2", "unrolled:product=difference"}
)
FIRST_ORDER = [
    "direct",
    "darts",
    "darts:scheme=forward,xi=lr",
    "sama",
    "sama:scheme=forward",
    "f2sa",
    *(f"{name}:product=difference" for name in ("cg", "minres", "neumann", "nystrom", "warm")),
]
KEPT = "warm:product=difference"
SHARDED_RUNS = [
    "darts:scheme=forward",
    "cg:product=difference",
    KEPT,
    "f2sa:inner_steps=2",
    "sama",
]
RUNS = [*SHARDED_RUNS, "cg:steps=5", "unrolled:steps=2", "sama:product=exact"]
SECOND_ORDER = ["cg", "exact", "darts:product=exact", "unrolled", "unrolled:product=difference"]
SECOND_ORDER += ["sama:product=exact", "nystrom"]


class Block(nn.Module):
    """A frozen layer with a trained one beside it, and its weight decay."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.adapter = nn.Linear(6, 5).requires_grad_(False), nn.Linear(6, 5)
        self.gate = nn.Parameter(torch.rand(5))

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        h = (self.base(x) + self.adapter(x) * self.gate).tanh()
        return h, sum(p.square().sum() for p in self.adapter.parameters())


class Network(nn.Module):
    """A block, a head and a temperature; no size is a multiple of two."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(), nn.Linear(5, 3)
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        h, penalty = self.block(x)
        penalty = penalty + sum(p.square().sum() for p in self.head.parameters())
        return self.head(h) * self.temperature, penalty


class Level(Problem):
    """Cross entropy with weight decay; some rows read tensors that other rows do not."""

    def __init__(self, net: Any, rare: Any, variables: Any, **options: Any) -> None:
        self.net, self.rare = net, rare
        self.drawn = []
        super().__init__(variables, **options)

    def loss(self, batch: Any) -> dict[str, Any]:
        x, y, special = batch
        logits, penalty = self.net(x)
        if special.any():
            u, w = self.rare
            shift = (u * w + w) * x[:, :3]
            logits = logits + torch.where(special[:, None], shift, 0)
        self.drawn.append(torch.rand(()).item())
        accuracy = (logits.argmax(1) == y).double().mean()
        return {"loss": cross_entropy(logits, y) + penalty / 5, "accuracy": accuracy}


def batches(count: int, rank: int, seed: int) -> Any:
    """This process's share of each batch; the first process alone has special rows."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(3):
        x = torch.randn(12, 6, dtype=torch.float64, generator=generator)
        y = torch.randint(3, (12,), generator=generator)
        special = torch.arange(12) < 4
        result.append(tuple(part.chunk(count)[rank] for part in (x, y, special)))
    return result


def levels(kind: str, count: int = 1, rank: int = 0) -> tuple[Any, ...]:
    """Upper and lower level over one network, equal at every call."""
    torch.manual_seed(0)
    model = net = Network().double()
    rare = [torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    if kind == "ddp":
        net = DistributedDataParallel(model)
    elif kind == "fsdp":
        for module in (model.block, model):
            fully_shard(module)
    named = dict(model.named_parameters())
    u = [(name, named[name]) for name in ("block.gate", "temperature")] + [("rare", rare[0])]
    w = [pair for pair in named.items() if "adapter" in pair[0] or "head" in pair[0]]
    w.append(("rare", rare[1]))
    adam = torch.optim.Adam([v for _, v in u], lr=0.05)
    momentum = torch.optim.SGD([v for _, v in w], lr=0.1, momentum=0.9)
    data = partial(batches, count, rank)
    return (
        Level(net, rare, u, data=data(1), optimizer=adam, name="upper", max_grad_norm=0.02),
        Level(net, rare, w, data=data(2), optimizer=momentum, name="lower", max_grad_norm=1.0),
    )


def whole(tensors: Any) -> list[Any]:
    return [x.full_tensor() if isinstance(x, DTensor) else x.detach().clone() for x in tensors]


def gradients(kind: str, *place: Any) -> Any:
    """Loss and gradient of each level, and whether a held ``.grad`` survived."""
    upper, lower = levels(kind, *place)
    everything = (*upper.variables, *lower.variables)
    for variable in everything:
        variable.grad = torch.ones_like(variable)
    result = {}
    for level in (upper, lower):
        evaluation = level.gradient(level.next_batch(), level.variables)
        result[level.name] = [torch.tensor(evaluation.loss), *whole(evaluation.gradient)]
    result["held"] = whole([variable.grad for variable in everything])
    return result


def estimates(kind: str, methods: Any, *place: Any) -> dict[str, Any]:
    return {method: whole(hypergradient(*levels(kind, *place), method)) for method in methods}


def trained(kind: str, method: str, *place: Any) -> tuple[Any, ...]:
    """The records of a short run, and both levels' variables at its end; SAMA reads an Adam."""
    upper, lower = levels(kind, *place)
    if method.startswith("sama"):
        lower.optimizer = torch.optim.Adam(lower.variables, lr=0.05, eps=1e-3)
    records = Engine(upper, lower, method, lower_steps=2, progress=False).run(4)
    return records, whole((*upper.variables, *lower.variables))


def chained(kind: str, *place: Any) -> list[Any]:
    """All variables of three levels after a short run."""
    middle, lower = levels(kind, *place)
    top, u, optimizer = middle.net, middle.variables[1:2], partial(torch.optim.SGD, lr=0.05)
    v = [pair for pair in zip(middle.names, middle.variables) if pair[0] != "temperature"]
    data = [partial(batches, *(place or (1, 0)))(seed) for seed in (1, 3)]
    options = {"optimizer": optimizer([x for _, x in v]), "data": data[0], "name": "middle"}
    middle = Level(top, middle.rare, v, **options)
    top = Level(top, middle.rare, u, optimizer=optimizer(u), data=data[1], name="top")
    level = Nested(middle, lower, "cg:product=difference,steps=3", lower_steps=2)
    Engine(top, level, "cg:product=difference,steps=2", progress=False).run(2)
    return whole((*top.variables, *middle.variables, *lower.variables))


def resumed(kind: str, method: str, *place: Any) -> tuple[Any, ...]:
    """The variables after the run of `trained`, stopped in its middle, and what was kept."""
    runs = [Engine(*levels(kind, *place), method, lower_steps=2, progress=False) for _ in range(2)]
    runs[0].run(2)
    state = runs[0].state_dict()
    runs[1].load_state_dict(state)
    runs[1].run(2)
    return whole((*runs[1].upper.variables, *runs[1].lower.variables)), state["estimator"]


def refusals(kind: str, *place: Any) -> Any:
    """What second-order methods, and differences in half precision, say of shards."""
    messages = {}
    for method in [*SECOND_ORDER, "darts"]:
        half = torch.autocast("cpu", torch.bfloat16, enabled=method == "darts")
        try:
            with half:
                hypergradient(*levels(kind, *place), method)
        except ProblemError as error:
            messages[method] = str(error)
    return messages


def poisoned(kind: str, *place: Any) -> Any:
    """What a process says where another one's batch has a NaN."""
    upper, lower = levels(kind, *place)
    if dist.get_rank() == 1:
        for batch in lower.batches.data:
            batch[0][:] = torch.nan
    try:
        Engine(upper, lower, "darts", progress=False).run(1)
    except NonFiniteError as error:
        return str(error)


def drawn(kind: str, *place: Any) -> Any:
    upper, lower = levels(kind, *place)
    Engine(upper, lower, "direct", progress=False).run(3)
    return upper.drawn


def work(folder: Path, *kinds: str) -> dict[str, Any]:
    dist.init_process_group("gloo")
    place = dist.get_world_size(), dist.get_rank()
    results = {
        kind: {
            "gradients": gradients(kind, *place),
            "estimates": estimates(kind, FIRST_ORDER if kind == "fsdp" else WHOLE, *place),
            "runs": {
                m: trained(kind, m, *place) for m in (SHARDED_RUNS if kind == "fsdp" else RUNS)
            },
            "chained": chained(kind, *place),
            "resumed": resumed(kind, KEPT, *place),
            "poisoned": poisoned(kind, *place),
            "drawn": drawn(kind, *place),
        }
        for kind in kinds
    }
    if "fsdp" in results:
        results["refusals"] = refusals("fsdp", *place)
    return results
