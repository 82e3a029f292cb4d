"""A prefill worker's memory without the engine: a process that holds known KV blocks on a real lease board.

    python -m tests.support.kv_peer FOLDER [--elsewhere]

Says the board's file name and its own pid in one JSON line, then serves staging requests like the engine does,
until its standard input closes. `--elsewhere` says that its memory cannot be read directly, as on a GPU. A line
`end SLOT` on standard input ends the lease of a slot.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import sys
from pathlib import Path

import torch

from kv_transfer import layout as layouts
from kv_transfer.board import Board, Word
from kv_transfer.layout import Layout
from kv_transfer.memory import allow_readers
from kv_transfer.shm import Stager

BLOCKS = 32
SLOTS = 16
HELD = list(range(8))  # slots that hold a lease from the start; its nonce is (slot + 1) * 8
BLOCK_IDS = [9, 3, 4, 5, 30, 0]


def caches(seed: int) -> dict[str, torch.Tensor]:
    """Three layers of 32 blocks: two joint and permuted, one with K and V apart."""
    torch.manual_seed(seed)
    return {
        "layers.0": torch.randn(BLOCKS, 2, 16, 8),
        "layers.1": torch.randn(BLOCKS, 16, 2, 8).permute(0, 2, 1, 3),
        "layers.2": torch.randn(2, BLOCKS, 16, 8),
    }


def layout_of(views: list[torch.Tensor], *, epoch: int, probe_address: int, direct: bool) -> Layout:
    return Layout(
        fingerprint="tests",
        pid=os.getpid(),
        epoch=epoch,
        probe_address=probe_address,
        direct=direct,
        blocks=BLOCKS,
        block_tokens=16,
        regions=layouts.regions_of(views),
    )


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    folder, direct = Path(sys.argv[1]), "--elsewhere" not in sys.argv
    allow_readers()
    kept = caches(1)
    views = layouts.block_views(kept, BLOCKS)
    board = Board.create(folder, slots=SLOTS)
    probe = ctypes.c_uint64(board.epoch)
    layout = layout_of(views, epoch=board.epoch, probe_address=ctypes.addressof(probe), direct=direct)
    board.publish_layout(layouts.encode(layout))
    for slot in HELD:
        board.put(slot, Word.HELD, (slot + 1) * 8)
    stager = Stager(board, views)
    say(json.dumps({"board": board.path.name, "epoch": board.epoch, "pid": os.getpid()}))
    while True:
        readable, _, _ = select.select([sys.stdin], [], [], 0.001)
        if readable:
            line = sys.stdin.readline().split()
            if not line:
                break
            assert line[0] == "end"
            board.put(int(line[1]), Word.HELD, 0)
            say("done")
        for slot in HELD:
            stager.serve(slot, (slot + 1) * 8, BLOCK_IDS)
    board.unlink()


if __name__ == "__main__":
    main()
