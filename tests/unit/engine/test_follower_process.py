"""The process of a node that follows, with ranks that load at once and wait: what it is given, and how it ends."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from engine.node_group import NodeGroup
from engine.node_tie import Leader, Shared, facts_of
from slipstream.free_ports import free_ports
from slipstream.model_folder import ModelFolder
from slipstream.settings import Settings
from tests.support.tiny_model import make_tiny_tokenizer

# The ranks are vLLM's; here it is the process around them that is tested.
PROGRAM = """
import sys
from engine import follower_process, host_process
from slipstream.settings import Settings
from slipstream.v1.registry_pb2 import Role

class Ranks:
    alive = True
    def shutdown(self):
        print("ranks ended", flush=True)

def load(self, model_path, served_name, board, owner_key):
    print("loaded", board.path, board.epoch, board.seed.hex(), owner_key.hex(), flush=True)
    return Ranks()

follower_process._FollowerProcess._load_ranks = load
host_process.run(Settings.model_validate_json(sys.argv[1]), Role.ROLE_DECODE, lambda *service: ())
"""
SHARED = Shared(7, b"s" * 32, b"k" * 32)
HOST = "127.0.0.1"
SOON_S = 60.0


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    folder = tmp_path / "model"
    make_tiny_tokenizer(folder)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")  # no tensors
    port = free_ports(1)[0] - 1
    several = {"tensor_parallel_size": 2, "nnodes": 2, "node_rank": 1, "master_addr": HOST, "master_port": port}
    return Settings(model=str(folder), served_model_name="tiny", worker=several)


@asynccontextmanager
async def followed(settings: Settings) -> AsyncIterator[tuple[Leader, asyncio.subprocess.Process, Path]]:
    """A leader, its follower once that has its ranks, and the follower's board."""
    first = NodeGroup.of(settings.worker.model_copy(update={"node_rank": 0}))
    facts = facts_of(settings, ModelFolder(Path(settings.model), "tiny"))
    async with Leader(first, "another host", facts, SHARED).serving(HOST) as leader:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", PROGRAM, settings.model_dump_json()),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        async with asyncio.timeout(SOON_S):
            word, _, told = (await process.stdout.readline()).decode().strip().partition(" ")
        if word != "loaded":
            process.kill()
            pytest.fail(f"the follower has no ranks: {await process.communicate()}")
        path, epoch, seed, owner_key = told.split()
        assert (int(epoch), bytes.fromhex(seed), bytes.fromhex(owner_key)) == (7, SHARED.seed, SHARED.owner_key)
        yield leader, process, Path(path)


async def test_a_follower_ends_with_a_failure_when_its_leader_is_gone(settings: Settings) -> None:
    async with followed(settings) as (_, process, board):
        pass
    async with asyncio.timeout(SOON_S):
        out, error = await process.communicate()
    assert process.returncode not in (0, None)
    assert b"ranks ended" in out
    assert f"node 0 of this worker, at {HOST}:{settings.worker.master_port + 1}, is gone".encode() in error
    assert not board.exists()


async def test_a_follower_that_is_to_stop_lets_the_leader_end_first(settings: Settings) -> None:
    async with followed(settings) as (leader, process, board):
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(SOON_S):
            await leader.stopping.wait()
        assert board.exists()
        assert not leader.lost.is_set()
    async with asyncio.timeout(SOON_S):
        out, _ = await process.communicate()
    assert process.returncode == 0
    assert b"ranks ended" in out
    assert not board.exists()
