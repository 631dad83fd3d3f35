"""Write the tables of benchmarks/README.md from results/speed.json, or check them.

python benchmarks/speed report --check
"""

from __future__ import annotations

import argparse
import json

from benchmarks import pages


def main() -> None:
    """The tables of the last timing."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 where they differ")
    options = parser.parse_args()
    result = json.loads((pages.RESULTS / "speed.json").read_text())
    text = pages.titled(result["tables"], result)
    pages.write(pages.ROOT / "benchmarks/README.md", {"speed": text}, check=options.check)
