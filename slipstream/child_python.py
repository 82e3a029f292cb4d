"""How a process starts another one of this product in Python, with the very code that it runs itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

_SOURCE_ROOT = Path(__file__).resolve().parent.parent


def module_path(environ: Mapping[str, str]) -> str:
    """PYTHONPATH for a child that is started with `-P`, which does not search its current folder for modules."""
    return os.pathsep.join(filter(None, (str(_SOURCE_ROOT), environ.get("PYTHONPATH"))))
