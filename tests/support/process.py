"""Python in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def python(*arguments: Any, folder: Path = ROOT, fails: bool = False, **variables: str) -> Any:
    """``python`` with ``arguments`` in ``folder``, which must succeed, or fail: what it printed."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths} | variables,
        capture_output=True,
        text=True,
    )
    assert (done.returncode != 0) == fails, done.stdout[-9000:] + done.stderr[-9000:]
    return done
