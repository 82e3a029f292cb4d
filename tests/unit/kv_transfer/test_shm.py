"""The shared-memory transport between two real processes; every case over both of its ways."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from kv_transfer import handoff as handoffs
from kv_transfer import layout as layouts
from kv_transfer.board import Board, Word
from kv_transfer.handoff import Handoff
from kv_transfer.shm import Mode, Receiver
from slipstream.errors import TransferError
from tests.support import kv_peer

TIMEOUT_S = 1.0
FORBIDDEN_READER = """
import json, sys
from pathlib import Path
from kv_transfer import handoff
from slipstream.errors import TransferError
from tests.unit.kv_transfer.test_shm import Ours
facts = json.loads(sys.argv[1])
asked = handoff.decode(bytes.fromhex(facts["handoff"]))
print("auto", Ours(Path(facts["folder"]), "auto").receiver.receive(asked, 0, [1]).path)
try:
    Ours(Path(facts["folder"]), "direct").receiver.receive(asked, 0, [1])
except TransferError as error:
    print("direct", error.code)
"""


class Peer:
    """A started `tests.support.kv_peer`."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.kv_peer", str(folder), *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        facts = json.loads(self._answer())
        self.board_name, self.epoch, self.pid = facts["board"], facts["epoch"], facts["pid"]
        self.board = Board.open(folder / self.board_name)

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        assert self._answer() == "done"

    def handoff(self, slot: int) -> Handoff:
        return Handoff(
            version=handoffs.VERSION,
            board=self.board_name,
            epoch=self.epoch,
            slot=slot,
            nonce=(slot + 1) * 8,
            tokens=90,
            digest=0,
            block_ids=kv_peer.BLOCK_IDS,
        )

    def close(self) -> None:
        self.process.kill()
        self.process.wait(timeout=10)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


class Ours:
    """The decode side: blocks of its own, empty, and a receiver over them."""

    def __init__(self, folder: Path, mode: Mode, *, fingerprint: str = "tests") -> None:
        self.views = layouts.block_views({k: torch.zeros_like(v) for k, v in kv_peer.caches(2).items()}, kv_peer.BLOCKS)
        probe = ctypes.c_uint64()
        layout = kv_peer.layout_of(self.views, epoch=1, probe_address=ctypes.addressof(probe), direct=True)
        layout = msgspec.structs.replace(layout, fingerprint=fingerprint)
        self.receiver = Receiver(folder, layout, self.views, mode=mode, timeout_s=TIMEOUT_S)
        self.block_bytes = layout.block_bytes


def blocks_of(views: list[torch.Tensor], blocks: list[int]) -> list[list[bytes]]:
    return [[bytes(view[block].tolist()) for block in blocks] for view in views]


@pytest.fixture(params=["direct", "staged"])
def mode(request: pytest.FixtureRequest) -> Mode:
    chosen: Mode = request.param
    return chosen


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Peer]]:
    peers: list[Peer] = []

    def started(*flags: str) -> Peer:
        peers.append(Peer(tmp_path, *flags))
        return peers[-1]

    yield started
    for peer in peers:
        peer.close()


def test_blocks_arrive_byte_for_byte_and_nothing_else_is_touched(
    start: Callable[..., Peer], tmp_path: Path, mode: Mode
) -> None:
    peer, ours = start(), Ours(tmp_path, mode)
    theirs = layouts.block_views(kv_peer.caches(1), kv_peer.BLOCKS)
    targets = [7, 20, 21, 22, 1]
    received = ours.receiver.receive(peer.handoff(0), 1, targets)
    assert blocks_of(ours.views, targets) == blocks_of(theirs, kv_peer.BLOCK_IDS[1:])
    untouched = [block for block in range(kv_peer.BLOCKS) if block not in targets]
    assert all(not any(raw) for row in blocks_of(ours.views, untouched) for raw in row)
    assert (received.blocks, received.bytes_moved) == (5, 5 * ours.block_bytes)
    assert received.path == f"shm/{mode}"
    assert peer.board.get(0, Word.TAKEN) == peer.handoff(0).nonce


def test_a_lease_that_has_ended_is_never_accepted(start: Callable[..., Peer], tmp_path: Path, mode: Mode) -> None:
    peer, ours = start(), Ours(tmp_path, mode)
    peer.tell("end 2")
    with pytest.raises(TransferError) as caught:
        ours.receiver.receive(peer.handoff(2), 0, [1, 2])
    assert caught.value.code == "lease_ended"
    assert peer.board.get(2, Word.TAKEN) == 0


def test_the_next_holder_of_a_slot_is_not_mistaken_for_the_last(
    start: Callable[..., Peer], tmp_path: Path, mode: Mode
) -> None:
    peer, ours = start(), Ours(tmp_path, mode)
    old = msgspec.structs.replace(peer.handoff(3), nonce=8000)
    with pytest.raises(TransferError) as caught:
        ours.receiver.receive(old, 0, [1])
    assert caught.value.code == "lease_ended"


def test_a_restarted_worker_is_another_one(start: Callable[..., Peer], tmp_path: Path, mode: Mode) -> None:
    peer, ours = start(), Ours(tmp_path, mode)
    with pytest.raises(TransferError) as caught:
        ours.receiver.receive(msgspec.structs.replace(peer.handoff(0), epoch=peer.epoch + 1), 0, [1])
    assert caught.value.code == "bad_handoff"


def test_a_killed_worker_is_noticed_at_once_or_within_the_deadline(
    start: Callable[..., Peer], tmp_path: Path, mode: Mode
) -> None:
    peer, ours = start(), Ours(tmp_path, mode)
    ours.receiver.receive(peer.handoff(0), 0, [1])
    peer.process.kill()
    peer.process.wait(timeout=10)
    with pytest.raises(TransferError) as caught:
        ours.receiver.receive(peer.handoff(1), 0, [1])
    assert caught.value.code == ("worker_gone" if mode == "direct" else "timeout")


def test_a_stopped_worker_can_be_read_directly_and_times_out_when_it_has_to_help(
    start: Callable[..., Peer], tmp_path: Path, mode: Mode
) -> None:
    peer, ours = start(), Ours(tmp_path, mode)
    os.kill(peer.pid, signal.SIGSTOP)
    if mode == "direct":
        assert ours.receiver.receive(peer.handoff(0), 0, [1]).blocks == 1
    else:
        with pytest.raises(TransferError) as caught:
            ours.receiver.receive(peer.handoff(0), 0, [1])
        assert caught.value.code == "timeout"


def test_layouts_that_differ_are_refused_before_a_byte_moves(
    start: Callable[..., Peer], tmp_path: Path, mode: Mode
) -> None:
    peer, ours = start(), Ours(tmp_path, mode, fingerprint="another model")
    with pytest.raises(TransferError) as caught:
        ours.receiver.receive(peer.handoff(0), 0, [1])
    assert caught.value.code == "layout"


def test_more_blocks_than_the_handoff_has_are_refused(start: Callable[..., Peer], tmp_path: Path, mode: Mode) -> None:
    peer, ours = start(), Ours(tmp_path, mode)
    with pytest.raises(TransferError) as caught:
        ours.receiver.receive(peer.handoff(0), 4, [1, 2, 3])
    assert caught.value.code == "bad_handoff"


def test_two_workers_with_the_same_handoff_get_their_own_blocks_or_an_error(
    start: Callable[..., Peer], tmp_path: Path, mode: Mode
) -> None:
    peer, first, second = start(), Ours(tmp_path, mode), Ours(tmp_path, mode)
    first.receiver.receive(peer.handoff(0), 0, [1, 2, 3, 4, 5, 6])
    if mode == "staged":  # one copy is staged, once
        with pytest.raises(TransferError) as caught:
            second.receiver.receive(peer.handoff(0), 2, [1, 2, 3, 4])
        assert caught.value.code == "bad_handoff"
        return
    second.receiver.receive(peer.handoff(0), 2, [1, 2, 3, 4])
    theirs = layouts.block_views(kv_peer.caches(1), kv_peer.BLOCKS)
    assert blocks_of(second.views, [1, 2, 3, 4]) == blocks_of(theirs, kv_peer.BLOCK_IDS[2:])


@pytest.mark.parametrize("name", ["../slipstream-1.board", "/etc/passwd", "slipstream-1.kv", ""])
def test_a_handoff_cannot_name_a_file_of_its_choice(tmp_path: Path, name: str) -> None:
    handoff = Handoff(handoffs.VERSION, name, 1, 0, 8, 10, 0, [1])
    with pytest.raises(TransferError) as caught:
        Ours(tmp_path, "auto").receiver.receive(handoff, 0, [1])
    assert caught.value.code == "bad_handoff"


def test_auto_reads_directly_where_it_can_and_asks_for_staging_where_it_cannot(
    start: Callable[..., Peer], tmp_path: Path
) -> None:
    ours = Ours(tmp_path, "auto")
    assert ours.receiver.receive(start().handoff(0), 0, [1]).path == "shm/direct"
    assert ours.receiver.receive(start("--elsewhere").handoff(0), 0, [1]).path == "shm/staged"


def test_auto_asks_for_staging_where_the_kernel_forbids_direct_reads(
    start: Callable[..., Peer], tmp_path: Path
) -> None:
    peer = start()
    facts = json.dumps({"folder": str(tmp_path), "handoff": handoffs.encode(peer.handoff(0)).hex()})
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.forbid_memory_reads", sys.executable, "-c", FORBIDDEN_READER, facts],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines() == ["auto shm/staged", "direct not_permitted"], done.stderr


def test_staging_without_room_ends_in_an_error_not_in_a_wait(tmp_path: Path) -> None:
    from kv_transfer.shm import Stager

    board = Board.create(tmp_path, slots=2)
    board.put(0, Word.WANTED, 0 << 32 | 5)  # more than it holds
    board.put(0, Word.ASKED, 8)
    views = layouts.block_views(kv_peer.caches(1), kv_peer.BLOCKS)
    assert not Stager(board, views).serve(0, 8, [1, 2])
    board.segment_path(0).mkdir()  # the segment cannot be created
    board.put(0, Word.WANTED, 2)
    assert not Stager(board, views).serve(0, 8, [1, 2])
