"""Write the tables of steps into benchmarks/README.md, or check them.

python benchmarks/speed report --check
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks import pages


def of_gpu(path: Path) -> str:
    """The tables of the file of `python benchmarks/speed gpu`, and the parts without a result."""
    if not path.exists():
        return "Nothing has been measured on a GPU yet.\n"
    content = json.loads(path.read_text())
    failed = {name: x["error"] for name, x in content["parts"].items() if "error" in x}
    lines = [f"- {name}: {reason}\n" for name, reason in (content["left out"] | failed).items()]
    return "\n".join([pages.titled(content["tables"], content), "".join(lines)])


def main() -> None:
    """The tables of the last measurements."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 where they differ")
    options = parser.parse_args()
    sections = {"gpu": of_gpu(pages.RESULTS / "speed_gpu.json")}
    for name, files in (("speed", ["speed"]), ("language", ["speed_language", "on_paper"])):
        results = [json.loads((pages.RESULTS / f"{file}.json").read_text()) for file in files]
        tables = {title: rows for each in results for title, rows in each["tables"].items()}
        sections[name] = pages.titled(tables, results[0])
    pages.write(pages.ROOT / "benchmarks/README.md", sections, check=options.check)
