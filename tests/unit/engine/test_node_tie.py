"""The tie between the nodes of a worker, over gRPC: who is taken, what is shared, and that each misses the other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from engine import node_tie
from engine.node_group import NodeGroup
from engine.node_tie import Facts, Leader, Shared, facts_of, joined
from slipstream.errors import StartupError
from slipstream.free_ports import free_ports
from slipstream.model_folder import ModelFolder
from slipstream.security import identity
from slipstream.security.authority import new_token, write_secret
from slipstream.security.names import ComponentRole
from slipstream.security_settings import SecuritySettings
from slipstream.settings import Settings
from slipstream.worker_settings import WorkerSettings

FACTS = {"worker.max_model_len": "4096"}
SHARED = Shared(7, b"s" * 32, b"k" * 32)
HOST = "127.0.0.1"
SOON_S = 10.0

Group = Callable[..., NodeGroup]


@pytest.fixture
def group() -> Group:
    port = free_ports(1, HOST)[0] - 1
    return lambda rank=0, nodes=2: NodeGroup(nodes, rank, 1, HOST, port)


def leader(group: NodeGroup, facts: Facts = FACTS) -> Leader:
    return Leader(group, "host-0", facts, SHARED)


async def test_a_follower_is_given_what_ranks_share_and_both_stay_while_the_other_does(group: Group) -> None:
    async with leader(group()).serving(HOST) as first:
        async with joined(group(1), "host-1", FACTS, SOON_S) as follower:
            await first.all_here(SOON_S)
            assert follower.shared == SHARED
            await asyncio.sleep(2.5 * node_tie.BEAT_S)
            assert not first.lost.is_set()
            assert not follower.lost.is_set()
        async with asyncio.timeout(SOON_S):
            await first.lost.wait()
        assert "node 1 of this worker's 2" in first.why


async def test_a_follower_misses_its_leader(group: Group) -> None:
    async with leader(group()).serving(HOST) as first:
        tie = joined(group(1), "host-1", FACTS, SOON_S)
        follower = await tie.__aenter__()
        await first.all_here(SOON_S)
    async with asyncio.timeout(SOON_S):
        await follower.lost.wait()
    await tie.__aexit__(None, None, None)


async def test_one_that_says_nothing_any_more_is_gone(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_tie, "SILENCE_S", 0.2)
    async with leader(group()).serving(HOST) as first, joined(group(1), "host-1", FACTS, SOON_S) as follower:
        async with asyncio.timeout(SOON_S):  # beats come each second
            await first.lost.wait()
            await follower.lost.wait()


async def test_a_follower_waits_for_a_leader_that_comes_later(group: Group) -> None:
    async def come() -> Shared:
        async with joined(group(1), "host-1", FACTS, SOON_S) as follower:
            return follower.shared

    coming = asyncio.create_task(come())
    await asyncio.sleep(0.3)
    async with leader(group()).serving(HOST):
        assert await coming == SHARED


async def test_a_follower_that_is_to_stop_tells_the_leader(group: Group) -> None:
    async with leader(group()).serving(HOST) as first, joined(group(1), "host-1", FACTS, SOON_S) as follower:
        follower.stop()
        async with asyncio.timeout(SOON_S):
            await first.stopping.wait()
        assert not first.lost.is_set()


async def test_a_leader_names_the_nodes_that_do_not_come(group: Group) -> None:
    async with leader(group(nodes=3)).serving(HOST) as first, joined(group(1), "host-1", FACTS, SOON_S):
        with pytest.raises(StartupError, match=r"worker.node_rank 2 did not come within 1 s .worker.start_timeout_s."):
            await first.all_here(1.0)


async def test_a_follower_names_the_leader_that_does_not_come(group: Group) -> None:
    with pytest.raises(StartupError, match=rf"node 0 at {group().tie_address} .* within 0.6 s"):
        async with joined(group(1), "host-1", FACTS, 0.6):
            pass


@pytest.mark.parametrize(
    ("rank", "host_id", "facts", "text"),
    [
        (
            1,
            "host-1",
            {"worker.max_model_len": "2048"},
            "must be the same on all .* 4096 on node 0 and 2048 on node 1",
        ),
        (1, "host-1", {}, "worker.max_model_len must .* absent on node 1"),
        (2, "host-1", FACTS, "worker.node_rank = 2: the followers of this group are 1 to 1"),
        (1, "host-0", FACTS, "has the same memory as node 0"),
    ],
)
async def test_who_does_not_belong_to_the_group_is_told_why(
    group: Group, rank: int, host_id: str, facts: Facts, text: str
) -> None:
    async with leader(group()).serving(HOST) as first:
        with pytest.raises(StartupError, match=text):
            async with joined(group(rank), host_id, facts, SOON_S):
                pass
        assert not first.lost.is_set()


async def test_a_leader_that_has_lost_a_node_takes_none_any_more(group: Group) -> None:
    async with leader(group()).serving(HOST) as first:
        async with joined(group(1), "host-1", FACTS, SOON_S):
            pass
        async with asyncio.timeout(SOON_S):
            await first.lost.wait()
        with pytest.raises(StartupError, match="about to end"):
            async with joined(group(1), "host-1", FACTS, 0.6):
                pass


async def test_without_the_clusters_token_nobody_is_given_the_seed(group: Group, tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        write_secret(tmp_path / name, f"{new_token()}\n")
    with identity.installed(SecuritySettings(cluster_token_file=tmp_path / "ours"), ComponentRole.WORKER):
        serving = leader(group()).serving(HOST)
        await serving.__aenter__()
        async with joined(group(1), "host-1", FACTS, SOON_S) as follower:
            assert follower.shared == SHARED
    for security in (SecuritySettings(cluster_token_file=tmp_path / "theirs"), SecuritySettings()):
        with (
            identity.installed(security, ComponentRole.WORKER),
            pytest.raises(StartupError, match="wants its token with each call"),
        ):
            async with joined(group(1), "host-1", FACTS, 0.6):
                pass
    await serving.__aexit__(None, None, None)


async def test_a_taken_port_is_named(group: Group) -> None:
    async with leader(group()).serving(HOST):
        with pytest.raises(StartupError, match=r"worker.master_port \+ 1: cannot listen"):
            async with leader(group()).serving(HOST):
                pass


def test_what_must_be_the_same_is_said_by_the_settings_names(tmp_path: Path) -> None:
    folder = ModelFolder(tmp_path, "tiny")
    one = facts_of(Settings(worker=WorkerSettings(max_model_len=2048)), folder)
    other = facts_of(Settings(worker=WorkerSettings(max_model_len=4096, node_rank=1, threads=3)), folder)
    assert {name for name in one if one[name] != other[name]} == {"worker.max_model_len"}
