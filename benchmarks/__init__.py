"""The measurements behind the library's claims, one folder per question; see README.md."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# The examples are scripts, whose readers of data are imported by their own names.
sys.path.append(str(Path(__file__).parents[1] / "examples"))
