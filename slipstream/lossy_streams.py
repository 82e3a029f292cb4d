"""Standard output and error that lose what cannot be written: a full disk below a log must not stop what is logged.

`logging` takes care of itself. What libraries print (a progress bar while weights are loaded is enough) would raise,
and end a worker's start.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TextIO


class LossyStream:
    """A text stream that another one does all for, except to fail."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            return

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def install() -> None:
    """From now on, in this process. Again is fine."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, LossyStream):
            setattr(sys, name, LossyStream(stream))
