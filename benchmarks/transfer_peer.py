"""The sending worker of `benchmarks.transfer`: a transfer agent over a made-up KV cache, in a process of its own.

    python -m benchmarks.transfer_peer FOLDER SETTINGS

Commanded by JSON lines on standard input, answering each with one: `begin`, `publish` (when, on CLOCK_MONOTONIC),
`end`, and `memory` (where its cache is, for the raw copies that are measured beside). Ends when its input closes.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from kv_transfer import agent_start
from kv_transfer.agent import TransferAgent
from kv_transfer.board import Board
from kv_transfer.extents import Extent
from kv_transfer.identity import Identity
from kv_transfer.kv_memory import KvMemory
from kv_transfer.layout import Layout, block_views
from kv_transfer.permits import Permit
from slipstream import telemetry
from slipstream.settings import LogSettings
from slipstream.worker_settings import TransferSettings

REGIONS = 8
PIECE_BYTES = 128 << 10
BLOCK_BYTES = REGIONS * PIECE_BYTES
BLOCKS = 256
HOST_ID = "benchmark"
SENDER, RECEIVER = 1, 2


def make_worker(folder: Path, transfer: dict[str, Any], *, seed: int) -> tuple[Board, KvMemory, TransferAgent]:
    """A board, a KV cache of `BLOCKS` blocks of random bytes and a running agent over them."""
    telemetry.configure(LogSettings(level="error"), component="benchmark")
    torch.manual_seed(seed)
    caches = {f"layers.{n}": torch.randint(0, 255, (BLOCKS, PIECE_BYTES), dtype=torch.uint8) for n in range(REGIONS)}
    memory = KvMemory(block_views(caches, BLOCKS), dtype="float32")
    board = Board.create(folder, slots=16, seed=bytes([seed]) * 32)
    settings = TransferSettings(**transfer)
    layout = Layout("benchmark", BLOCKS, 16, memory.regions)
    agent, _ = agent_start.start(
        memory,
        layout,
        board,
        settings,
        host_id=HOST_ID,
        host="127.0.0.1",
        registered=[identity(SENDER).public, identity(RECEIVER).public],
    )
    return board, memory, agent


def identity(seed: int) -> Identity:
    """The sender's, or the receiver's: both processes know both."""
    return Identity.of(bytes([seed]) * 32)


def main() -> None:
    folder = Path(sys.argv[1])
    board, memory, agent = make_worker(folder, json.loads(sys.argv[2]), seed=SENDER)
    say({"address": agent.address, "epoch": board.epoch})
    for line in sys.stdin:
        ask = json.loads(line)
        say(_do(ask, memory, agent))
    agent.stop()
    board.unlink()


def _do(ask: dict[str, Any], memory: KvMemory, agent: TransferAgent) -> dict[str, Any]:
    handoff_id = bytes.fromhex(ask.get("id", ""))
    match ask["do"]:
        case "begin":
            agent.expect(Permit(handoff_id, bytes.fromhex(ask["token"]), identity(RECEIVER).public))
            agent.begin(handoff_id, ask["blocks"] * 16, 0)
        case "publish":
            now_ns = time.monotonic_ns()
            agent.publish(handoff_id, list(range(BLOCKS)), Extent(0, ask["blocks"], 0, REGIONS))
            agent.computed(handoff_id)
            return {"at_ns": now_ns}
        case "end":
            agent.end(handoff_id, "lease_ended", "measured")
        case "memory":
            return {"runs": [list(run) for run in memory.runs()]}
    return {}


def say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
