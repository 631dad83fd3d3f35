"""Write the tables of steps into benchmarks/README.md, or check them.

python benchmarks/speed report --check
"""

from __future__ import annotations

import argparse
import json

from benchmarks import pages


def main() -> None:
    """The tables of the last measurements."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 where they differ")
    options = parser.parse_args()
    sections = {}
    for name, files in (("speed", ["speed"]), ("language", ["speed_language", "on_paper"])):
        results = [json.loads((pages.RESULTS / f"{file}.json").read_text()) for file in files]
        tables = {title: rows for each in results for title, rows in each["tables"].items()}
        sections[name] = pages.titled(tables, results[0])
    pages.write(pages.ROOT / "benchmarks/README.md", sections, check=options.check)
