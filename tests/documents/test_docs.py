"""The pages in docs say what is true: their programs run, diffs apply, tables are complete."""

import ast
import os
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from peft import PeftModel

from hyperopt_peft import BilevelTrainer, BilevelTrainingArguments
from hyperopt_peft.hypergradients import registered, registry
from hyperopt_peft.trainer.arguments import DEFAULTS
from tests.support import language
from tests.support.documents import PAGES, README, ROOT, blocks
from tests.support.process import python


def run(source: str, name: str, namespace: Any = None) -> Any:
    namespace = {} if namespace is None else namespace
    exec(compile(source, name, "exec"), namespace)
    return namespace


def changes(diff: str) -> Any:
    before, after = ([x[1:] for x in diff.splitlines() if x.startswith(sign)] for sign in "-+")
    return list(zip(before, after, strict=True))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_ENTRIES", registered())  # a page may register its own


# The programs of these pages go on from a run: see tests/cli.
AFTER_A_RUN = ("after-training.md", "command-line.md")
PROGRAMS = [n for n, text in PAGES.items() if "```python" in text and n not in AFTER_A_RUN]


@pytest.mark.slow
@pytest.mark.parametrize("page", PROGRAMS)
def test_python_blocks_run_in_order(page: str) -> None:
    if "from trl import" in PAGES[page]:
        pytest.importorskip("trl", reason="TRL is an extra")
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is an extra")
        language.write_files(Path())
    namespace = {}
    for block in blocks(PAGES[page]):
        run(block, page, namespace)  # the blocks hold assertions of their own


@pytest.mark.slow  # a process of its own
def test_the_estimator_of_the_page_keeps_the_property_tests(tmp_path: Path) -> None:
    page = PAGES["define-an-estimator.md"]
    (source,) = (block for block in blocks(page) if "class Secant" in block)
    (tmp_path / "secant.py").write_text(source)
    (command,) = re.findall(r"<!-- command: property tests -->\n```sh\n(.*?)\n```", page, re.S)
    variables, _, arguments = command.partition(" python ")
    assert variables == "PYTHONPATH=."
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = python(*arguments.split(), "-q", "-p", "no:cacheprovider", **path)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 16


def test_the_diff_turns_dora_into_bidora_in_three_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = r"<!-- script: before -->\n```python\n(.*?)```"
    (before,) = re.findall(script, PAGES["training.md"], re.S)
    after = before
    (diff,) = blocks(PAGES["training.md"], "diff")
    for old, new in changes(diff):
        assert before.splitlines().count(old) == 1
        after = after.replace(old + "\n", new + "\n")
    old, new = before.splitlines(), after.splitlines()
    assert len(old) == len(new) and sum(a != b for a, b in zip(old, new)) == 3

    results = {}
    for name, script in (("dora", before), ("bidora", after)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        results[name] = run(script, name)
    dora, bidora = results["dora"]["trainer"], results["bidora"]["trainer"]
    assert type(dora) is transformers.Trainer and type(bidora) is BilevelTrainer
    assert not any("upper_loss" in record for record in dora.state.log_history)
    assert "upper_loss" in bidora.state.log_history[0]
    assert bidora.retrainer.state.global_step == dora.state.global_step
    assert len(bidora.train_dataset) + len(bidora.upper_dataset) == len(dora.train_dataset)
    folder = tmp_path / "bidora/outputs/adapter"
    PeftModel.from_pretrained(results["dora"]["new_model"]().unload(), folder)


def test_every_diff_changes_nothing_but_the_names() -> None:
    names = {
        "from transformers import Trainer, TrainingArguments": (
            "from hyperopt_peft import BiDoRA, BilevelTrainer, BilevelTrainingArguments"
        ),
        "args = TrainingArguments(": "args = BilevelTrainingArguments(",
        "trainer = Trainer(model, args,": "trainer = BilevelTrainer(model, args, method=BiDoRA(),",
    }
    pages = [PAGES[n] for n in ("training.md", "start.md", "coming-from-peft-trl.md")] + [README]
    for diff in (diff for page in pages for diff in blocks(page, "diff")):
        pairs = changes(diff)
        assert len(pairs) == 3
        for (old, new), (name, renamed) in zip(pairs, names.items()):
            assert old.startswith(name) and new == old.replace(name, renamed)


def test_tables_list_every_argument_with_its_default() -> None:
    _, _, text = PAGES["training-reference.md"].partition("## The upper level's arguments")
    text = text.partition("\n## ")[0]
    listed = {}
    for cells in re.findall(r"^\| (`.*?) \| (.*?) \|", text, re.MULTILINE):
        listed |= dict.fromkeys(re.findall(r"`(\w+)`", cells[0]), cells[1].strip("`"))
    fields = BilevelTrainingArguments.__dataclass_fields__
    own = fields.keys() - transformers.TrainingArguments.__dataclass_fields__.keys()
    assert listed.keys() == own
    for name, said in listed.items():
        default = DEFAULTS.get(name, fields[name].default)
        try:
            said = said.capitalize() if said in ("true", "false") else said
            assert ast.literal_eval(said) == default
        except (SyntaxError, ValueError):
            assert default is None, name  # described in words
