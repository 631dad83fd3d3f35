"""Lower layers that nothing trains: their output is computed once for each text.

A training with an adapter in the last two of six layers then takes a third of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from hyperopt_peft.trainer.tags import without
from hyperopt_peft.utils.models import base_model, evaluating, hook_calls

EACH = "every layer is computed in each pass"
#: The states ``(tokens, d)`` above the frozen layers, by the tokens of a text.
States = dict[tuple[int, ...], Tensor]
#: Columns of a batch that belong to a text's key.
COLUMNS = ("input_ids", "token_type_ids")
#: The first rows, of which the shortest and the longest show what a layer reads.
ROWS = 64
#: Of models that this process has seen: settings and frozen parameters, with their states.
_SEEN: list[tuple[str, list[Tensor], States]] = []
#: Bytes of states, and models, above which no further ones are kept.
LIMIT, MODELS = 2**32, 3


def compute_once(trainer: Any, *, dropout: bool = True) -> str:
    """Let the model of ``trainer`` compute its frozen lower layers once a text.

    Args:
        trainer: before its training.
        dropout: whether these layers keep the dropout that they have, with which they are computed
            in each pass; else it is set to 0.

    Returns:
        In words, how many layers are computed once, or why none is.

    Example:
        >>> from types import SimpleNamespace
        >>> compute_once(SimpleNamespace(model=nn.Linear(2, 1)))
        'every layer is computed in each pass: the model has no list of its layers'
    """
    model = trainer.model
    layers = _layers_of(base_model(model))
    if not layers:
        return f"{EACH}: the model has no list of its layers"
    variables = [variable for level in trainer.levels for variable in level.variables]
    owned = set(map(id, variables))
    below = next(
        (k for k, each in enumerate(layers) if any(id(p) in owned for p in each.parameters())),
        len(layers) - 1,
    )
    if below == 0:
        return f"{EACH}: the lowest one is trained"
    named = (getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if trainer.args.gradient_checkpointing or any(named):
        return (
            f"{EACH}: gradient checkpointing computes one again when another batch may be known; "
            "with gradient_checkpointing=False they are computed once"
        )
    batch, alone = _batches(trainer)
    before, states = _before(model, layers[below], batch)
    if states.requires_grad and any(
        gradient is not None
        for gradient in torch.autograd.grad(states.sum(), variables, allow_unused=True)
    ):
        return f"{EACH}: something below the layers is trained"
    inside = {*before, *(module for layer in layers[:below] for module in layer.modules())}
    if not dropout:
        for module in inside:
            for name in _dropouts(module):
                setattr(module, name, 0.0)
    if any(map(_dropouts, inside)):
        remedy = "without it (frozen_dropout: false) they are computed once"
        return f"{EACH}: the frozen ones have dropout; {remedy}"
    inner = {id(p) for module in inside for p in module.parameters(recurse=False)}
    frozen = [p for p in model.parameters() if id(p) in inner]
    once = _Once(layers, below)
    with torch.no_grad(), evaluating(model):
        plain = model(**alone).logits
        if plain is None:  # as of TRL's SFTTrainer before 1.15
            return f"{EACH}: the model returns no logits"
        once.install(model)
        model(**batch)  # from which the states of the row alone are
        known = model(**alone).logits
    mask = alone.get("attention_mask")
    if mask is not None and plain.shape[:2] == mask.shape:  # a padding's state is not kept
        plain, known = plain[mask.bool()], known[mask.bool()]
    rounding = torch.finfo(plain.dtype).eps ** 0.5 * float(plain.abs().max())
    if not once.used or float((known - plain).abs().max()) > rounding:
        once.remove()
        example = "its place among packed texts or padding"
        return f"{EACH}: one reads more than the text of its row, such as {example}"
    config, args = base_model(model).config.to_dict(), trainer.args
    settings = f"{config} {args.bf16} {args.fp16} {args.device}"
    once.use(_states_of(settings, frozen))
    return f"{below} of {len(layers)} layers are frozen, and computed once a text"


class _Once:
    """Replaces the first ``count`` of ``layers`` by their known output."""

    def __init__(self, layers: Sequence[nn.Module], count: int) -> None:
        self.layers, self.count = layers, count
        self.known, self.keys, self.mask = False, list[Any](), torch.empty(0)
        self.used = False
        self.use({})

    def use(self, states: States) -> None:
        """Read and keep ``states`` from now on."""
        self.states, self.bytes = states, sum(state.nbytes for state in states.values())

    def __deepcopy__(self, memo: Any) -> Self:
        """Itself: a copy of the model, such as a method's teacher, has the same frozen layers."""
        return self

    def install(self, model: nn.Module) -> None:
        """Put the hooks."""
        self.hooks = [
            *hook_calls(model, before=self._begin),
            self.layers[self.count].register_forward_pre_hook(self._enter, with_kwargs=True),
        ]
        for layer in self.layers[: self.count]:
            layer.forward = self._skipping(layer.forward)

    def remove(self) -> None:
        """Take all away again."""
        for hook in self.hooks:
            hook.remove()
        for layer in self.layers[: self.count]:
            del layer.forward

    def _begin(self, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.keys, self.known = [], False
        if ids is None or ids.dim() != 2 or "position_ids" in kwargs:  # such as packed texts
            return
        mask = kwargs.get("attention_mask")
        self.mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        columns = [ids, *(kwargs[name] for name in COLUMNS[1:] if kwargs.get(name) is not None)]
        rows = zip(torch.stack(columns, dim=1), self.mask, strict=True)
        self.keys = [tuple(row[:, kept].flatten().tolist()) for row, kept in rows]
        self.known = all(key in self.states for key in self.keys)

    def _skipping(self, forward: Any) -> Any:
        in_tuple = False  # as GPT-2's layers return their states in early releases of Transformers

        def passed(states: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal in_tuple
            if self.known:
                return (states,) if in_tuple else states
            with torch.no_grad():
                output = forward(states, *args, **kwargs)
            in_tuple = isinstance(output, tuple)
            return output

        return passed

    def _enter(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        keys, self.used = self.keys, self.known
        self.keys, self.known = [], False  # for a pass that begins at another module
        if not keys:
            return None
        states = args[0] if args else kwargs["hidden_states"]
        if not self.used:
            for key, row, kept in zip(keys, states, self.mask, strict=True):
                if key not in self.states and self.bytes < LIMIT:
                    self.states[key] = row[kept].detach().clone()
                    self.bytes += self.states[key].nbytes
            return None
        states = torch.zeros_like(states)
        states[self.mask] = torch.cat([self.states[key] for key in keys])
        return ((states, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": states})


def _layers_of(base: nn.Module) -> Sequence[nn.Module]:
    """The list of the layers, as many as the config says; none where there are several lists."""
    count = getattr(getattr(base, "config", None), "num_hidden_layers", 0)
    lists = [m for m in base.modules() if isinstance(m, nn.ModuleList) and len(m) == count > 0]
    return list(lists[0]) if len(lists) == 1 else []


def _batches(trainer: Any) -> list[dict[str, Any]]:
    """Two training rows of different lengths as the model reads them, and the shorter one alone."""
    rows = trainer.train_dataset
    rows = rows.select(range(min(ROWS, len(rows))))
    if "input_ids" in rows.column_names:
        lengths = [len(each) for each in rows["input_ids"]]
        order = sorted(range(len(rows)), key=lengths.__getitem__)
        rows = rows.select([order[0], order[-1]])
    batches = [rows.select(range(min(count, len(rows)))) for count in (2, 1)]
    loaded = (next(iter(trainer.get_eval_dataloader(each))) for each in batches)
    return [without(batch, trainer.tags) for batch in loaded]


def _before(model: Any, layer: nn.Module, batch: dict[str, Any]) -> tuple[set[nn.Module], Tensor]:
    """The modules whose forward pass ends before ``layer`` begins, and the states that enter it."""
    done, entered = set[nn.Module](), list[tuple[set[nn.Module], Tensor]]()

    def enter(_: Any, args: Any, kwargs: Any) -> None:
        entered.append(({*done}, args[0] if args else kwargs["hidden_states"]))

    hooks: list[Any] = [m.register_forward_hook(lambda m, *_: done.add(m)) for m in model.modules()]
    hooks.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
    with torch.enable_grad(), evaluating(model):
        model(**batch)
    for hook in hooks:
        hook.remove()
    return entered[0]


def _dropouts(module: nn.Module) -> list[str]:
    """The attributes of ``module`` that are a rate of dropout above 0."""
    named = vars(module).items()
    rates = [name for name, x in named if isinstance(x, float) and x > 0]
    return [x for x in rates if "dropout" in x or (x == "p" and isinstance(module, nn.Dropout))]


def _states_of(settings: str, frozen: list[Tensor]) -> States:
    """The states of a model with equal settings and frozen parameters, or new ones."""
    for others, parameters, states in _SEEN:
        alike = others == settings and len(parameters) == len(frozen)
        if alike and all(map(torch.equal, parameters, frozen)):
            return states
    _SEEN.append((settings, frozen, {}))
    del _SEEN[:-MODELS]
    return _SEEN[-1][2]


def forget() -> None:
    """Free the states of all models."""
    _SEEN.clear()
