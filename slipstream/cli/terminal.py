"""Where results and messages are printed: results to standard output, everything else to standard error."""

from __future__ import annotations

import sys

from rich.console import Console

# A table that is piped into a file or a program is not cut to the 80 columns that nobody looks at.
_PIPED_COLUMNS = 240


def output() -> Console:
    return Console(width=None if sys.stdout.isatty() else _PIPED_COLUMNS, highlight=False)


def messages() -> Console:
    return Console(stderr=True, highlight=False)
