"""The methods that pages, notebooks and examples define have the right loss on padded rows."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertForSequenceClassification

from hyperopt_peft.core.labels import WEIGHT
from tests.support.documents import sources

#: Modules that the methods' losses need.
MODULES = ("dataclasses", "hyperopt_peft", "torch", "typing")


def defined() -> Iterator[Any]:
    """The methods with a loss of their own, each with the imports of its document."""
    for path, code in sources():
        tree = ast.parse(code)
        names = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = [x for x in names if ast.unparse(x).split()[1].split(".")[0] in MODULES]
        for node in tree.body:
            of_methods = isinstance(node, ast.ClassDef) and "Method" in map(ast.unparse, node.bases)
            if of_methods and re.search(r"def (lower|upper)_loss", ast.unparse(node)):
                name = f"{Path(path).name}:{node.name}"
                yield pytest.param(ast.Module([*names, node], []), node.name, id=name)


DEFINED = list(defined())


def test_they_are_found() -> None:
    assert {"README.md:Offsets", "define-a-method.md:Offsets"} < {each.id for each in DEFINED}


@pytest.fixture
def _doubles() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_doubles")
@pytest.mark.parametrize(("module", "name"), DEFINED)
def test_a_padded_row_has_the_loss_of_the_row_alone(module: Any, name: str) -> None:
    """Three rows of different lengths, one of each class, beside tags and a Trainer's entry."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    config = BertConfig(**size, intermediate_size=16, initializer_range=0.5, num_labels=3)
    model, scope = BertForSequenceClassification(config).eval(), {"__name__": __name__}
    exec(compile(module, name, "exec"), scope)
    method: Any = scope[name]()
    method.prepare(model)
    for u in method.upper_variables(model).values():
        torch.nn.init.normal_(u)
    ids, labels = [torch.randint(1, 50, (length,)) for length in (3, 9, 5)], torch.arange(3)

    def batch(*which: int) -> dict[str, Any]:
        padded = pad_sequence([ids[k] for k in which], batch_first=True)
        given = {"input_ids": padded, "attention_mask": (padded > 0).long()}
        tags = {tag: torch.zeros(len(which), dtype=torch.int64) for tag in method.tags}
        return {**given, "labels": labels[list(which)], **tags, WEIGHT: torch.ones(())}

    def task_loss(rows: Any) -> Any:
        inputs = {key: x for key, x in rows.items() if key not in (*method.tags, WEIGHT)}
        return model(**inputs).loss

    for loss in (method.lower_loss, method.upper_loss):
        of_row = [loss(model, batch(k), task_loss) for k in range(3)]
        found = loss(model, batch(0, 1, 2), task_loss)
        torch.testing.assert_close(found, torch.stack(of_row).mean())
