"""``python -m hyperopt_peft.betty script.py ARGS`` runs a script that was written for Betty."""

import runpy
import sys
from importlib import import_module
from pathlib import Path

from hyperopt_peft.errors import NonFiniteError, ProblemError


def main() -> int:
    """Run the script as Python does, with this package as ``betty``; returns the exit status."""
    for module in ("", ".engine", ".problems", ".configs"):
        sys.modules[f"betty{module}"] = import_module(f"hyperopt_peft.betty{module}")
    script = sys.argv.pop(1) if len(sys.argv) > 1 else "-h"
    sys.argv[0], sys.path[0] = script, str(Path(script).resolve().parent)
    try:
        if not Path(script).is_file():
            raise ProblemError("usage: python -m hyperopt_peft.betty script.py [argument ...]")
        runpy.run_path(script, run_name="__main__")
        return 0
    except (ProblemError, NonFiniteError) as error:
        message, status = str(error), 2 - isinstance(error, NonFiniteError)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("betty."):
            raise
        message, status = f"{error.name}: is not supported; use hyperopt_peft.Engine", 2
    print(f"{script}: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
