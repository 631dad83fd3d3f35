"""``python -m hyperopt_peft.betty script.py ARGS`` runs a script that was written for Betty."""

import runpy
import sys
from importlib import import_module
from pathlib import Path

from hyperopt_peft.errors import NonFiniteError, ProblemError


def main() -> str | None:
    """Run the script as Python does, with this package as ``betty``; returns an error."""
    for name in ("", ".engine", ".problems", ".configs"):
        sys.modules[f"betty{name}"] = import_module(f"hyperopt_peft.betty{name}")
    script = Path(sys.argv[1] if len(sys.argv) > 1 else "")
    if not script.is_file():
        return "usage: python -m hyperopt_peft.betty script.py [argument ...]"
    sys.argv[:2], sys.path[0] = sys.argv[1:2], str(script.resolve().parent)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except (ProblemError, NonFiniteError) as error:
        return f"{script}: {error}"
    except ImportError as error:
        if "betty" not in str(error.name):
            raise
        what = str(error).partition(" (")[0]
        return f"{script}: {what}, which is not supported; use hyperopt_peft.Engine"
    return None


if __name__ == "__main__":
    sys.exit(main())
