"""The documentation builds as a site without a warning; nothing in it leads nowhere."""

import importlib
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("sphinx", reason="Sphinx is an extra")
from sphinx.util.inventory import InventoryFile

pytestmark = pytest.mark.slow  # a process of its own
ROOT = Path(__file__).parents[2]
MODULES = ["", ".adapters", ".diagnostics", ".hypergradients", ".problems"]


class Page(HTMLParser):
    """The anchors of a page, and the files and anchors that it names."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.targets: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value:
                self.targets.append(value)


def names_of(module: str) -> set[str]:
    """The public names of a module, with its own."""
    return {f"{module}.{name}" for name in importlib.import_module(module).__all__}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "docs", str(folder)],
        cwd=ROOT,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_link_and_picture_is_there(site: Path) -> None:
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    assert len(pages) > 20
    lost = []
    for path, page in pages.items():
        for target in page.targets:
            scheme, host, name, _, anchor = urlsplit(target)
            if scheme or host:
                continue
            other = (path.parent / unquote(name)).resolve() if name else path
            known = pages[other].anchors if other in pages else set()
            if not other.exists() or (anchor and other in pages and unquote(anchor) not in known):
                lost.append(f"{path.relative_to(site)}: {target}")
    assert not lost


def test_every_public_name_is_described(site: Path) -> None:
    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="").data
    described = {name for kind, names in inventory.items() if kind[:3] == "py:" for name in names}
    public = {name for suffix in MODULES for name in names_of("hyperopt_peft" + suffix)}
    assert {name.rpartition(".")[2] for name in public - described} <= {
        name.rpartition(".")[2] for name in public & described
    }  # a name of two modules is described once
