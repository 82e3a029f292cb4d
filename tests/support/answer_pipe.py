"""Standard output for answers alone, of a process that a test commands over pipes."""

from __future__ import annotations

import os
from typing import BinaryIO


def take_standard_output() -> BinaryIO:
    """The pipe to the test; what the product or a library prints from now on goes to standard error."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return out
