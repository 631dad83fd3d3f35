"""Sphinx builds the site: ``python -m sphinx -W docs outputs/site``.

Notebooks are shown with the outputs that are committed; none is executed. The docstrings are in
Google's style, with a name of the package between single backticks.
"""

from __future__ import annotations

import os
import re
from importlib.metadata import version as installed
from typing import Any

from sphinx.application import Sphinx
from transformers import TrainingArguments

project = "hyperopt-peft"
version = release = installed(project)
copyright = "the authors of hyperopt-peft; Apache-2.0"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["upstream"]
nb_execution_mode = "off"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

html_theme = "furo"
html_title = "hyperopt-peft"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False

myst_heading_anchors = 4
highlight_language = "text"
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

default_role = "py:obj"  # a name that is not on the site stays as it is
autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True


def own_arguments(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returned: str
) -> tuple[str, str] | None:
    """Arguments that derive from Transformers' have more than a hundred: their own are listed.

    Private arguments and bounds of numbers are left out; a default that a function makes is "...".
    """
    if what == "class" and issubclass(obj, TrainingArguments):
        return "(output_dir, …)", returned
    if signature:
        signature = re.sub(r"~?(?:typing\.)?Annotated\[([^,]*), [^\]]*\]", r"\1", signature)
        signature = re.sub(r", _\w+: [^,)]*", "", signature).replace("<factory>", "...")
    return signature, returned


def named_pages(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """A page that a docstring names, ``docs/training.md``, is a link."""
    lines[:] = [re.sub(r"docs/([\w-]+)\.md", r":doc:`/\1`", line) for line in lines]


def adapted(app: Sphinx, name: str, source: list[str]) -> None:
    """A figure with its interval stays on one line of a table.

    A Markdown file outside this folder is a file to download, like any other file there.
    """
    text = re.sub(r"(?m)^\|.*", lambda row: row[0].replace(" ± ", "\u00a0±\u00a0"), source[0])
    if not name.startswith("notebooks/"):
        text = re.sub(r"\]\((\.\./[^)#]*\.md)(?:#[^)]*)?\)", r"](path:\1)", text)
    source[0] = text


def setup(app: Sphinx) -> None:
    """Connect the hooks above."""
    app.connect("source-read", adapted)
    app.connect("autodoc-process-signature", own_arguments)
    app.connect("autodoc-process-docstring", named_pages)
