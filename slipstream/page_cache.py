"""Reads files into the kernel's page cache, several at a time, so that the next process finds them in memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

_PIECE_BYTES: Final = 64 << 20
_READ_BYTES: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class Warmed:
    """What was read.

    Attributes:
        skipped: why nothing was; empty when it was.
    """

    size_bytes: int
    seconds: float
    skipped: str = ""


def warm(
    files: Sequence[Path],
    *,
    readers: int,
    available_bytes: Callable[[], int] = lambda: int(psutil.virtual_memory().available),
) -> Warmed:
    """Read the files with so many readers, each a piece of a file at a time.

    Files that memory has no room for are not read: the last would push the first out again.
    """
    size_bytes, room_bytes = sum(path.stat().st_size for path in files), available_bytes()
    if size_bytes > room_bytes:
        return Warmed(0, 0.0, skipped=f"{size_bytes} bytes do not fit into {room_bytes} bytes of memory")
    pieces = [(path, start) for path in files for start in range(0, path.stat().st_size, _PIECE_BYTES)]
    began_s = time.monotonic()
    with ThreadPoolExecutor(readers, thread_name_prefix="page-cache") as threads:
        read = sum(threads.map(_read_piece, pieces))
    return Warmed(read, time.monotonic() - began_s)


def _read_piece(piece: tuple[Path, int]) -> int:
    path, start = piece
    buffer, done = bytearray(_READ_BYTES), 0
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while done < _PIECE_BYTES:
            count = os.preadv(descriptor, [buffer], start + done)
            if count == 0:
                break
            done += count
    finally:
        os.close(descriptor)
    return min(done, _PIECE_BYTES)
