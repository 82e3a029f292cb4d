"""The lease board: a page of shared memory between a worker's engine and its service.

The service opens, renews and releases leases on it; the engine sees them in its next step, whatever it is doing, and
writes down how they ended. Every word has one writer, so no lock is needed; a word is 8 aligned bytes, which every
64-bit CPU writes whole.

A lease is a slot and a nonce (random, its low three bits zero). Words of a slot, and who writes them:

    held      engine   the nonce while the blocks of a computed prompt are pinned
    outcome   engine   nonce | Outcome once the lease has ended
    released  service  the nonce when the owner gave it up
    deadline  service  CLOCK_MONOTONIC nanoseconds; the service renews it while its caller is there (the first
                       lease period counts from when the blocks are ready)

The head of the board carries counters of the engine process, which its service exports as metrics. Behind the slots lie
the endpoint of the engine's transfer agent, and the secret from which the agents of all its ranks make their key. Only
this user may open the file, and nothing but a plain file of this user's is taken for a board.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import mmap
import os
import secrets
import stat
from pathlib import Path
from typing import BinaryIO

from slipstream.errors import StartupError, TransferError

MAGIC = 0x33_44_52_42_50_4C_53  # "SLPBRD3"
ENDPOINT_BYTES, SEED_BYTES = 4096, 32
PREFIX, SUFFIX, SEGMENT_SUFFIX = "slipstream-", ".board", ".kv"

_HEAD_WORDS = 128
_SLOT_WORDS = 4


class Head(enum.IntEnum):
    """Words of the head that are not counters."""

    MAGIC = 0
    EPOCH = 1
    SLOTS = 2
    ENDPOINT_LENGTH = 3  # bytes; 0 until the engine has published where its transfer agent is


@enum.unique
class Counter(enum.IntEnum):
    """Words of the head that the engine process counts in. All only grow, but for the gauges at the end."""

    PROMPT_TOKENS_COMPUTED = 8
    PROMPT_TOKENS_CACHED = 9
    PROMPT_TOKENS_RECEIVED = 10
    BLOCKS_RECEIVED = 11
    BYTES_RECEIVED = 12
    WIRE_BYTES = 13
    TRANSFER_NS = 14
    EXPOSED_NS = 15
    TRANSFERS_DONE = 16
    SPANS_RESENT = 17
    HANDOFFS_OPENED = 18
    HANDOFFS_TAKEN = 19
    HANDOFFS_RELEASED = 20
    HANDOFFS_EXPIRED = 21
    HANDOFFS_NOT_CACHED = 22
    HANDOFFS_RESET = 23  # blocks taken away by a preemption while they were being sent
    HIDDEN_NS = 24
    PREEMPTIONS = 25  # of any request, for lack of blocks
    STEPS = 26  # that the scheduler has begun; also those in which there was nothing to compute yet
    HANDOFFS_ABORTED = 27  # that began and were given up before the whole prompt was computed
    BYTES_SHM_DIRECT = 32
    BYTES_SHM_STAGED = 33
    BYTES_UCX = 34
    BYTES_NIXL = 35
    FAILED_WORKER_GONE = 40
    FAILED_TIMEOUT = 41
    FAILED_LEASE_ENDED = 42
    FAILED_DIGEST = 43
    FAILED_NO_PATH = 44
    FAILED_CANCELLED = 45
    FAILED_OTHER = 46
    FAILED_NOT_REGISTERED = 47
    FAILED_BAD_IDENTITY = 48
    FAILED_BAD_TOKEN = 49
    REFUSED_NOT_REGISTERED = 52  # who was turned away; written by the agent's thread
    REFUSED_BAD_IDENTITY = 53
    REFUSED_BAD_TOKEN = 54
    REFUSED_BAD_MESSAGE = 55
    REFUSED_CROWDED = 56
    REFUSED_SLOW = 57
    HANDOFFS_HELD = 64  # gauge
    BLOCKS_TOTAL = 65  # gauge
    BLOCKS_FREE = 66  # gauge
    BLOCK_TOKENS = 67  # gauge
    BLOCK_BYTES = 68  # gauge
    STEP_TOKENS = 69  # gauge: of the newest step
    START_WEIGHTS_NS = 72  # parts of the engine's start
    START_KV_CACHE_NS = 73
    START_TRANSFER_NS = 74
    START_WARMUP_NS = 75


class Word(enum.IntEnum):
    """Words of a slot; see the module's docstring."""

    HELD = 0
    OUTCOME = 1
    RELEASED = 2
    DEADLINE = 3


class Outcome(enum.IntEnum):
    """How a lease ended."""

    TAKEN = 1
    RELEASED = 2
    EXPIRED = 3
    ABORTED = 4  # the request ended before there was anything to hold
    NOT_CACHED = 5  # what was to be handed over was not in the prefix cache


def new_nonce() -> int:
    """A nonce: 61 random bits, never 0, low three bits free for an Outcome."""
    return (secrets.randbits(60) | 1 << 60) << 3


class Board:
    """A mapped board. Words are read and written through `get` and `put`."""

    def __init__(self, path: Path, view: mmap.mmap, lock_fd: int | None) -> None:
        self.path = path
        self._mmap = view
        self._words = memoryview(view).cast("Q")
        self._lock_fd = lock_fd
        self.epoch = self._words[Head.EPOCH]
        self.slots = self._words[Head.SLOTS]

    @classmethod
    def create(cls, directory: Path, *, slots: int, seed: bytes = b"", epoch: int = 0, node: int = 0) -> Board:
        """Make a board, owned by this process until `unlink`; a dead owner's is removed by `remove_stale`.

        Args:
            seed: see `seed`; random unless it is given.
            epoch: of the worker; random unless it is given.
            node: which of the worker's nodes this is; those that follow have the first one's seed and epoch.

        Raises:
            StartupError: the folder cannot be written.
        """
        epoch = epoch or secrets.randbits(63)
        path = directory / f"{PREFIX}{epoch:016x}{f'.{node}' if node else ''}{SUFFIX}"
        unfinished = path.with_suffix(".new")
        try:
            fd = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StartupError(f"cannot create the lease board in {directory}: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            size = _size(slots)
            os.posix_fallocate(fd, 0, size)  # or the first write to a full tmpfs would be a SIGBUS
            view = mmap.mmap(fd, size)
            words = memoryview(view).cast("Q")
            words[Head.EPOCH], words[Head.SLOTS] = epoch, slots
            words[Head.MAGIC] = MAGIC
            words.release()
            view[size - SEED_BYTES : size] = seed or secrets.token_bytes(SEED_BYTES)
            # Only now under its name: another worker's `remove_stale` would take an unlocked board for a dead one's.
            unfinished.rename(path)
        except OSError as error:
            os.close(fd)
            unfinished.unlink(missing_ok=True)
            raise StartupError(f"cannot create the lease board in {directory}: {error.strerror}") from error
        return cls(path, view, fd)

    @classmethod
    def open(cls, path: Path) -> Board:
        """Map a board that another process made.

        Raises:
            TransferError: it is gone (its worker ended) or is no board.
        """
        try:
            with open_own(path) as file:
                view = mmap.mmap(file.fileno(), 0)
        except (OSError, ValueError) as error:
            raise TransferError(f"lease board {path.name} cannot be opened: {error}", code="worker_gone") from error
        words = memoryview(view).cast("Q")
        intact = len(words) >= _HEAD_WORDS and words[Head.MAGIC] == MAGIC
        intact = intact and len(view) == _size(words[Head.SLOTS])
        words.release()
        if not intact:
            view.close()
            raise TransferError(f"{path.name} is not a lease board of this version", code="bad_handoff")
        return cls(path, view, None)

    def close(self) -> None:
        """Unmap; the file stays."""
        self._words.release()
        self._mmap.close()
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def unlink(self) -> None:
        """Remove the file and the landing areas that belong to it. Mapped views stay valid."""
        _remove(self.path)

    @property
    def stem(self) -> str:
        """With which the names of files begin that belong to this worker, and end in `.kv`; removed with the board."""
        return self.path.name.removesuffix(SUFFIX)

    @property
    def seed(self) -> bytes:
        """Of the key pair that the agents of the engine's ranks share (`identity.Identity.of`)."""
        return bytes(self._mmap[-SEED_BYTES:])

    # -- head ---------------------------------------------------------------------------------------------

    def counter(self, counter: Counter) -> int:
        return self._words[counter]

    def add(self, counter: Counter, amount: int = 1) -> None:
        """Count. Each counter has one thread that calls this; it is the engine process's main one for most."""
        self._words[counter] += amount

    def set_gauge(self, counter: Counter, value: int) -> None:
        self._words[counter] = value

    def publish_endpoint(self, raw: bytes) -> None:
        if len(raw) > ENDPOINT_BYTES:
            raise StartupError(f"the endpoint takes {len(raw)} bytes, the board has room for {ENDPOINT_BYTES}")
        start = _endpoint_offset(self.slots)
        self._mmap[start : start + len(raw)] = raw
        self._words[Head.ENDPOINT_LENGTH] = len(raw)

    def endpoint(self) -> bytes:
        """What `publish_endpoint` wrote; empty until then."""
        start = _endpoint_offset(self.slots)
        return bytes(self._mmap[start : start + self._words[Head.ENDPOINT_LENGTH]])

    # -- slots --------------------------------------------------------------------------------------------

    def get(self, slot: int, word: Word) -> int:
        return self._words[_HEAD_WORDS + slot * _SLOT_WORDS + word]

    def put(self, slot: int, word: Word, value: int) -> None:
        self._words[_HEAD_WORDS + slot * _SLOT_WORDS + word] = value

    def outcome(self, slot: int, nonce: int) -> Outcome | None:
        """How this lease ended; None while it is open (or was never seen by the engine)."""
        value = self.get(slot, Word.OUTCOME)
        return Outcome(value & 7) if value & ~7 == nonce else None


def remove_stale(directory: Path) -> list[str]:
    """Remove boards, and landing areas, whose owner has died; returns the names of the boards.

    An owner holds a lock on its board, and the kernel drops the lock when it dies, however it dies.
    """
    removed = []
    for path in directory.glob(f"{PREFIX}*{SUFFIX}"):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue  # another user's, or just removed
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(path)
            removed.append(path.name)
        except BlockingIOError:
            pass  # its owner lives
        finally:
            os.close(fd)
    return removed


def _remove(path: Path) -> None:
    stem = path.name.removesuffix(SUFFIX)
    for segment in path.parent.glob(f"{stem}-*{SEGMENT_SUFFIX}"):
        segment.unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _endpoint_offset(slots: int) -> int:
    return (_HEAD_WORDS + slots * _SLOT_WORDS) * 8


def _size(slots: int) -> int:
    return _endpoint_offset(slots) + ENDPOINT_BYTES + SEED_BYTES


def open_own(path: Path) -> BinaryIO:
    """Open a plain file of this user's for reading and writing: no link, no device, nobody else's.

    Raises:
        OSError
    """
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
        os.close(fd)
        raise PermissionError(errno.EPERM, "not a plain file of this user", str(path))
    return os.fdopen(fd, "r+b")
