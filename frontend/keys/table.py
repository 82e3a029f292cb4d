"""Where the accounts of keys are kept: in a process's own memory, or in memory that the processes of a pool share.

An account is a row of numbers (see the constants). The processes of a pool find an account's row by a hash of its
name, as in any open hash table, and change it under a lock of the file; a row, once taken, stays its account's. What a
process has running is in columns of its own, which its successor clears: a killed process leaves nothing behind.

The lock is held for some microseconds. One who does not get it within `LOCK_WAIT_S`, because the other was stopped in
the middle, goes on without: a count may then be lost, and a request never waits for a process that does not run.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Protocol, TypeAlias

FULL_AT_REQUESTS, FULL_AT_INPUT, FULL_AT_OUTPUT, LAST_HELD = range(4)
"""Columns of a row that all share: when each bucket is full again (see `bucket`), and when output was held last."""
SHARED_COLUMNS = 4
STREAMS, CONNECTIONS, HELD = range(3)
"""Columns that each process has of its own: what it has running."""
OWN_COLUMNS = 3

LOCK_WAIT_S = 0.002
_LOCK_RETRY_S = 0.0001
ROWS = 1 << 14
"""Of a shared table: more than keys may be in a file. What does not fit is counted by each process."""
_ID_WORDS = 2

Row: TypeAlias = "memoryview[float]"
"""Of doubles: the shared columns, then those of each process."""


class Table(Protocol):
    """Finds rows, and locks them."""

    member: int

    def row(self, account: str) -> Row:
        """The account's row; always the same one."""
        ...

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Nobody else changes a row meanwhile."""
        ...


class OwnTable:
    """Of one process alone."""

    member = 0

    def __init__(self) -> None:
        self._unlocked = contextlib.nullcontext()

    def row(self, account: str) -> Row:
        return _zeros(SHARED_COLUMNS + OWN_COLUMNS)

    def locked(self) -> contextlib.AbstractContextManager[None]:
        return self._unlocked


class SharedTable:
    """Of the processes of a pool: a file that all have in their memory. Close it when done.

    Args:
        member: the place of this process among them, from 0; a successor has its predecessor's.
        members: how many there are.
    """

    def __init__(self, path: Path, member: int, members: int, rows: int = ROWS) -> None:
        self.member, self._rows = member, rows
        self._width = _ID_WORDS + SHARED_COLUMNS + OWN_COLUMNS * members
        size = rows * self._width * 8
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._file, size)  # to the same size, whoever comes first; what is new is zero
        self._memory = mmap.mmap(self._file, size)
        whole = memoryview(self._memory)
        self._words, self._ids = whole.cast("d"), whole.cast("Q")
        self._overflow: dict[str, Row] = {}
        self._clear_own()

    def row(self, account: str) -> Row:
        first, second = _name_words(account)
        with self.locked():
            for step in range(self._rows):
                at = (first + step) % self._rows * self._width
                if not self._ids[at + 1]:
                    self._ids[at], self._ids[at + 1] = first, second
                if self._ids[at] == first and self._ids[at + 1] == second:
                    return self._words[at + _ID_WORDS : at + self._width]
        return self._overflow.setdefault(account, _zeros(self._width - _ID_WORDS))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        held = self._lock()
        try:
            yield
        finally:
            if held:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def _lock(self) -> bool:
        ends_s = 0.0
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                now_s = time.monotonic()
                ends_s = ends_s or now_s + LOCK_WAIT_S
                if now_s >= ends_s:
                    return False
                time.sleep(_LOCK_RETRY_S)

    def _clear_own(self) -> None:
        own = _ID_WORDS + SHARED_COLUMNS + OWN_COLUMNS * self.member
        with self.locked():
            for at in range(0, self._rows * self._width, self._width):
                if self._ids[at + 1]:
                    self._words[at + own : at + own + OWN_COLUMNS] = _zeros(OWN_COLUMNS)

    def close(self) -> None:
        """Let go of the file. Rows stay readable for whoever still has one."""
        os.close(self._file)


def _zeros(count: int) -> Row:
    return memoryview(bytearray(8 * count)).cast("d")


def own_columns(member: int) -> int:
    """Where the columns of a process begin."""
    return SHARED_COLUMNS + OWN_COLUMNS * member


def total(row: Row, column: int) -> float:
    """Over all processes."""
    return sum(row[SHARED_COLUMNS + column :: OWN_COLUMNS])


def _name_words(account: str) -> tuple[int, int]:
    found = sha256(account.encode()).digest()
    return int.from_bytes(found[:8]), int.from_bytes(found[8:16]) | 1  # never 0, which is an empty row
