"""The versions of the packages that a result depends on."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

__version__ = version("hyperopt-peft")
PACKAGES = ["hyperopt-peft", "torch", "transformers", "peft", "accelerate", "datasets"]
PACKAGES += ["trl", "bitsandbytes"]


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """The version of each of ``packages`` that is installed."""
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def show_versions() -> None:
    """Print the versions of `PACKAGES`, of Python and of the platform, for a report of a bug.

    Example:
        >>> show_versions()
        hyperopt-peft ...
        platform      ...
    """
    found = {**versions(), "Python": platform.python_version(), "platform": platform.platform()}
    for name, number in found.items():
        print(f"{name:13} {number}")
