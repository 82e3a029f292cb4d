"""The transport for workers on one host.

Two ways, chosen once for each pair of workers:

- `direct`: decode reads the blocks out of the prefill worker's memory. One copy, and the prefill worker does nothing.
- `staged`: decode asks on the board, prefill copies the blocks into a shared-memory segment, decode copies
  them out. For kernels and containers that forbid the first way, and for KV memory on a GPU.

`Receiver` is decode's end, `Stager` prefill's part in the second way. Both are plain blocking code; the connector calls
`Receiver.receive` from transfer threads, where the copies release the GIL.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kv_transfer import layout as layouts
from kv_transfer.board import PREFIX, SUFFIX, Board, Word
from kv_transfer.handoff import Handoff
from kv_transfer.layout import Layout
from kv_transfer.memory import Copy, merge, read_process
from slipstream.errors import TransferError

if TYPE_CHECKING:
    import torch

Mode = Literal["auto", "direct", "staged"]

# Between two looks at the board while prefill stages a copy: short beside the copy itself (4 ms for 16 MiB).
_STAGE_POLL_S = 0.0005
# In front of a staged copy: the lease and the blocks (Word.WANTED) it was made for. Two decode workers may have got the
# same handoff, and a slow one may still write to a slot that has a new lease: the words on the board are not enough.
_HEADER = struct.Struct("=QQ")


@dataclass(frozen=True, slots=True)
class Received:
    """What one transfer moved. `path` is `shm/direct` or `shm/staged`."""

    blocks: int
    bytes_moved: int
    seconds: float
    path: str


@dataclass(slots=True)
class _Peer:
    board: Board
    layout: Layout
    staged: bool


class Receiver:
    """Reads handoffs of any prefill worker on this host into this worker's KV memory.

    Args:
        directory: where boards lie; the same for all workers of the host.
        own: this worker's layout; `views` are its blocks ([blocks, block_bytes] bytes a region).
        timeout_s: longest one transfer may take.
    """

    def __init__(
        self, directory: Path, own: Layout, views: Sequence[torch.Tensor], *, mode: Mode, timeout_s: float
    ) -> None:
        self._directory = directory
        self._own = own
        self._views = views
        self._mode = mode
        self._timeout_s = timeout_s
        self._peers: dict[str, _Peer] = {}
        self._lock = threading.Lock()

    def receive(self, handoff: Handoff, first: int, targets: Sequence[int]) -> Received:
        """Copy the handoff's blocks `first`, `first + 1`, ... into the blocks `targets` and check the lease.

        Raises:
            TransferError: `code` says why; the target blocks' content is then undefined.
        """
        started = time.monotonic()
        deadline = started + self._timeout_s
        peer = self._peer(handoff)
        self._check_lease(peer, handoff)
        if not peer.staged:
            try:
                self._receive_direct(peer, handoff, first, targets, deadline)
            except TransferError as error:
                if error.code != "not_permitted" or self._mode == "direct":
                    raise
                peer.staged = True
        if peer.staged:
            self._receive_staged(peer, handoff, first, targets, deadline)
        self._check_lease(peer, handoff)
        peer.board.put(handoff.slot, Word.TAKEN, handoff.nonce)
        return Received(
            blocks=len(targets),
            bytes_moved=len(targets) * self._own.block_bytes,
            seconds=time.monotonic() - started,
            path="shm/staged" if peer.staged else "shm/direct",
        )

    def close(self) -> None:
        with self._lock:
            for peer in self._peers.values():
                peer.board.close()
            self._peers.clear()

    def _peer(self, handoff: Handoff) -> _Peer:
        with self._lock:
            peer = self._peers.get(handoff.board)
            if peer is None:
                peer = self._peers[handoff.board] = self._open(handoff)
                self._forget_dead()
        if peer.board.epoch != handoff.epoch or not 0 <= handoff.slot < peer.board.slots:
            raise TransferError("handoff and lease board do not belong together", code="bad_handoff")
        return peer

    def _open(self, handoff: Handoff) -> _Peer:
        name = handoff.board
        if os.path.basename(name) != name or not (name.startswith(PREFIX) and name.endswith(SUFFIX)):
            raise TransferError(f"{name!r} does not name a lease board", code="bad_handoff")
        board = Board.open(self._directory / name)
        layout = layouts.decode(board.layout())
        if layout.epoch != board.epoch:
            board.close()
            raise TransferError(f"lease board {name} holds another worker's layout", code="bad_handoff")
        return _Peer(board, layout, staged=self._mode == "staged" or not (layout.direct and self._own.direct))

    def _forget_dead(self) -> None:
        """Unmap boards whose files are gone: their workers have ended."""
        for name in [name for name, peer in self._peers.items() if not peer.board.path.exists()]:
            del self._peers[name]  # unmapped once no transfer uses it any more

    def _receive_direct(
        self, peer: _Peer, handoff: Handoff, first: int, targets: Sequence[int], deadline: float
    ) -> None:
        pairs = list(zip(_wanted(handoff, first, len(targets)), targets, strict=True))
        copies = merge(layouts.plan(peer.layout, self._own, pairs))
        _probe(peer.layout)
        for _ in read_process(peer.layout.pid, copies):
            _check_deadline(deadline, self._timeout_s)
        _probe(peer.layout)  # the same process all the time: its id was not given to another one

    def _receive_staged(
        self, peer: _Peer, handoff: Handoff, first: int, targets: Sequence[int], deadline: float
    ) -> None:
        if peer.layout.fingerprint != self._own.fingerprint:
            raise TransferError("the two workers' KV layouts differ (model, dtype, block size or CPU)", code="layout")
        _wanted(handoff, first, len(targets))
        board, slot = peer.board, handoff.slot
        wanted = first << 32 | len(targets)
        board.put(slot, Word.WANTED, wanted)
        board.put(slot, Word.ASKED, handoff.nonce)
        while board.get(slot, Word.STAGED) != handoff.nonce:
            self._check_lease(peer, handoff)
            _check_deadline(deadline, self._timeout_s)
            time.sleep(_STAGE_POLL_S)
        try:
            with board.segment_path(slot).open("r+b") as file, mmap.mmap(file.fileno(), 0) as segment:
                if _HEADER.unpack_from(segment) != (handoff.nonce, wanted):
                    raise TransferError("the staged copy is one that another worker asked for", code="bad_handoff")
                _scatter(segment, self._views, targets)
        except (OSError, ValueError) as error:
            raise TransferError(f"staged copy cannot be read: {error}", code="worker_gone") from error

    def _check_lease(self, peer: _Peer, handoff: Handoff) -> None:
        if peer.board.get(handoff.slot, Word.HELD) != handoff.nonce:
            raise TransferError("the lease on the blocks has ended", code="lease_ended")


class Stager:
    """Prefill's part in the staged way: copies blocks into a segment when decode asks for them."""

    def __init__(self, board: Board, views: Sequence[torch.Tensor]) -> None:
        self._board = board
        self._views = views

    def serve(self, slot: int, nonce: int, block_ids: Sequence[int]) -> bool:
        """Stage what was asked for on this slot, once. False when it cannot be done (no room)."""
        board = self._board
        if board.get(slot, Word.ASKED) != nonce or board.get(slot, Word.STAGED) == nonce:
            return True
        wanted = board.get(slot, Word.WANTED)
        first, count = wanted >> 32, wanted & 0xFFFF_FFFF
        blocks = block_ids[first : first + count]
        if len(blocks) != count or not blocks:
            return False
        size = _HEADER.size + count * sum(view.shape[1] for view in self._views)
        try:
            self.drop(slot)  # a new file, always: a reader of an older one would be killed if it shrank
            fd = os.open(board.segment_path(slot), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, size)  # or writing to a full tmpfs would be a SIGBUS
                with mmap.mmap(fd, size) as segment:
                    _HEADER.pack_into(segment, 0, nonce, wanted)
                    _gather(segment, self._views, blocks)
            finally:
                os.close(fd)
        except OSError:
            return False
        board.put(slot, Word.STAGED, nonce)
        return True

    def drop(self, slot: int) -> None:
        """Remove the staged copy of a slot, if there is one."""
        self._board.segment_path(slot).unlink(missing_ok=True)


def _wanted(handoff: Handoff, first: int, count: int) -> list[int]:
    blocks = handoff.block_ids[first : first + count]
    if len(blocks) != count:
        raise TransferError(
            f"handoff has {len(handoff.block_ids)} blocks, {count} from {first} were asked for", code="bad_handoff"
        )
    return blocks


def _probe(layout: Layout) -> None:
    """Check that the process still is the one that published this layout."""
    word = ctypes.c_uint64()
    for _ in read_process(layout.pid, [Copy(layout.probe_address, ctypes.addressof(word), 8)]):
        pass
    if word.value != layout.epoch:
        raise TransferError(f"process {layout.pid} is another one now", code="worker_gone")


def _check_deadline(deadline: float, timeout_s: float) -> None:
    if time.monotonic() > deadline:
        raise TransferError(f"transfer took longer than {timeout_s:g} s", code="timeout")


# A segment holds its header, then region after region, and in each the blocks in prompt order.


def _gather(segment: mmap.mmap, views: Sequence[torch.Tensor], blocks: Sequence[int]) -> None:
    import torch

    offset = _HEADER.size
    for view in views:
        index = torch.tensor(blocks, device=view.device)
        piece = torch.frombuffer(segment, dtype=torch.uint8, count=len(blocks) * view.shape[1], offset=offset)
        piece.view(len(blocks), view.shape[1]).copy_(view.index_select(0, index))
        offset += piece.numel()
        del piece  # or the map could not be closed


def _scatter(segment: mmap.mmap, views: Sequence[torch.Tensor], blocks: Sequence[int]) -> None:
    import torch

    offset = _HEADER.size
    for view in views:
        index = torch.tensor(blocks, device=view.device)
        piece = torch.frombuffer(segment, dtype=torch.uint8, count=len(blocks) * view.shape[1], offset=offset)
        view.index_copy_(0, index, piece.view(len(blocks), view.shape[1]).to(view.device))
        offset += piece.numel()
        del piece
    if views and views[0].is_cuda:
        torch.cuda.current_stream().synchronize()
