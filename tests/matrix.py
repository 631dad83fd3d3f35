"""The test-suite on sets of packages that pyproject.toml allows.

    python -m tests.matrix                                 every set, in a temporary folder
    python -m tests.matrix oldest --folder ~/matrix        one set, whose environment is kept
    python -m tests.matrix newest -- -m "not slow"         with options of pytest

Each set gets a virtual environment of its own outside the repository, with this checkout installed
editable. The set ``oldest`` has each dependency, bitsandbytes included, at its lower bound, without
TRL, which has none.
The sets ``axolotl``, ``axolotl-0.21`` and ``ms-swift`` have these programs, ``unsloth`` and
``llamafactory`` the versions that the programs require. unsloth allows TRL 1.15, whose supervised
fine-tuning needs a GPU, so that its set has TRL 1.14. ms-swift allows Transformers 5.19, with which
its PEFT 0.20 runs no encoder-decoder, so that its set has Transformers 5.17. The set ``main`` has
the main branches of Transformers and PEFT. The set ``peft`` runs PEFT's own tests of DoRA, from
PEFT's source distribution, with the fast layer in place of PEFT's: those files of them that need no
GPU, without the tests that ask for a model from the hub.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GITHUB = "git+https://github.com/huggingface"
#: The versions that a set asks for; the others are the newest.
PINS = {
    "newest": "",
    "python3.13": "",
    "axolotl": "axolotl==0.19.0",
    "axolotl-0.21": "axolotl==0.21.0",
    "unsloth": "transformers==5.17.0 trl==1.14.1 datasets==4.8.4",
    "ms-swift": "ms-swift==4.6.0 transformers==5.17.0",
    "llamafactory": "transformers==5.6.0 peft==0.18.1 accelerate==1.11.0 datasets==4.0.0",
    "main": f"transformers@{GITHUB}/transformers peft@{GITHUB}/peft",
    "peft": "",
}
SETS = ("oldest", *PINS)
#: By set, where it is not 3.11; a package that axolotl 0.21 pins has no wheel for 3.13.
NEWER_PYTHON = {"python3.13": "3.13", "axolotl-0.21": "3.12"}
#: Sets without TRL: it has no oldest one, and that of LLaMA-Factory imports parts with mergekit.
WITHOUT_TRL = ("oldest", "llamafactory")
BETTY = "betty-ml==0.2.1"
PEFT_TESTS = ("custom_models", "helpers", "initialization", "lora_variants")
PEFT_NEEDS = ("attrs", "diffusers", "parameterized")
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "torchopt",
    "numpy",
    "trl",
    "bitsandbytes",
)
#: Extras whose packages have bounds that are promised, as those of the dependencies are.
EXTRAS = ("bitsandbytes",)
Row = dict[str, Any]


def bounds() -> list[str]:
    """The promised versions of pyproject.toml: ``torch>=2.10`` and so on, `EXTRAS` included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [bound for name in EXTRAS for bound in project["optional-dependencies"][name]]
    return [*project["dependencies"], *extras]


def lower_bounds() -> list[str]:
    """``torch==2.10`` for ``torch>=2.10`` of `bounds`, and so on."""
    return [re.sub(r">=([\d.]+).*", r"==\1", bound) for bound in bounds()]


def pins(name: str) -> list[str]:
    """The versions that the set ``name`` asks for: ``torch==2.10`` and so on."""
    if name == "oldest":
        return lower_bounds()
    return PINS[name].split()


def environment(name: str, folder: Path) -> Path:
    """The interpreter of the set ``name``; its environment is made unless ``folder`` has it."""
    home = folder / name
    python = home / "bin" / "python"
    install: list[str | Path] = [python, "-m", "pip", "install", "-q"]
    if not (home / "complete").exists():
        shutil.rmtree(home, ignore_errors=True)
        interpreter = f"python{NEWER_PYTHON.get(name, '3.11')}"
        base = shutil.which(interpreter) or sys.exit(f"{name}: no {interpreter}")
        subprocess.run([base, "-m", "venv", home], check=True)
        more = list(PEFT_NEEDS) if name == "peft" else []
        subprocess.run([*install, "--upgrade", "pip"], check=True)
        extras = "test" if name in WITHOUT_TRL else "test,trl"
        subprocess.run([*install, "-e", f"{ROOT}[{extras}]", *pins(name), *more], check=True)
        # Its wheel refuses Python 3.11, on which it runs.
        subprocess.run([*install, "--no-deps", "--ignore-requires-python", BETTY], check=True)
        (home / "complete").touch()
    subprocess.run([*install, "--no-deps", "-e", ROOT], check=True)  # a kept one may be of another
    return python


def versions(python: Path) -> Row:
    """The versions of Python and of `PACKAGES` in an environment."""
    program = (
        "import json, platform, sys; from importlib.metadata import version;"
        "from importlib.util import find_spec;"
        "print(json.dumps({'Python': platform.python_version()}"
        "| {name: version(name) if find_spec(name) else '–' for name in sys.argv[1:]}))"
    )
    done = subprocess.run(
        [python, "-c", program, *PACKAGES], check=True, capture_output=True, text=True
    )
    found: Row = json.loads(done.stdout)
    return found


def peft_source(python: Path, folder: Path) -> Path:
    """The unpacked source distribution of the PEFT that ``python`` has."""
    release = f"peft=={versions(python)['peft']}"
    download = ["pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", folder]
    subprocess.run([python, "-m", *download, release], check=True)
    (archive,) = folder.glob(f"{release.replace('==', '-')}.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    source = folder / archive.name.removesuffix(".tar.gz")
    (source / "tests" / "__init__.py").touch()  # left out of the distribution
    return source


def run(name: str, python: Path, folder: Path, options: list[str]) -> Row:
    """One row of the table: versions, how many tests passed, failed and were skipped, seconds."""
    report, where, tests = folder / f"{name}.xml", ROOT, options
    variables = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    if name == "peft":
        where = peft_source(python, folder)
        files = [f"tests/test_{file}.py" for file in PEFT_TESTS]
        tests = [*files, "-k", "dora", "-p", "fast_dora_in_peft", "-o", "addopts="]
        variables["PYTHONPATH"] = str(ROOT / "tests" / "support")
    begin = time.perf_counter()
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    subprocess.run([*command, *tests], cwd=where, env=os.environ | variables)
    seconds = time.perf_counter() - begin
    return {"set": name} | versions(python) | counts(report) | {"seconds": round(seconds)}


def counts(report: Path) -> Row:
    """How many tests passed, failed (errors included) and were skipped."""
    if not report.exists():
        return {"passed": 0, "failed": 1, "skipped": 0}
    cases = list(ElementTree.parse(report).iter("testcase"))
    kinds = [{child.tag for child in case} for case in cases]
    failed, skipped = (
        sum(bool(tags & kind) for tags in kinds) for kind in ({"failure", "error"}, {"skipped"})
    )
    return {"passed": len(cases) - failed - skipped, "failed": failed, "skipped": skipped}


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = [[*rows[0]], ["---"] * len(rows[0]), *(map(str, row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    """Run the sets that were asked for; 1 where a test failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("sets", nargs="*", metavar="set", help=", ".join(SETS))
    parser.add_argument("--folder", type=Path, help="keep the environments here")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    given, options = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    if unknown := set(given.sets) - set(SETS):
        parser.error(f"set: no {', '.join(unknown)}; known are {', '.join(SETS)}")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for name in given.sets or SETS:
            rows.append(run(name, environment(name, folder), folder, options))
            print(f"\n{table(rows)}\n", flush=True)
    return int(any(row["failed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
