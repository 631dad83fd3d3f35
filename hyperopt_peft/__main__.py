"""``python -m hyperopt_peft``: the command line."""

import sys

from hyperopt_peft.cli.main import main

sys.exit(main())
