"""Transfer agents for tests: ours in this process, and a peer in another one."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support.kv_node import WAYS, KvNode, Options, Wrap, is_installed
from tests.support.kv_peer import KvPeer


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that load NIXL run only when they are asked for (`-m nixl`): one process holds one build of UCX."""
    here = Path(__file__).parent
    loading = [item for item in items if here in item.path.parents and _loads_nixl(item)]
    for item in loading:
        item.add_marker("nixl")
    if loading and not config.option.markexpr:
        config.hook.pytest_deselected(items=loading)
        items[:] = [item for item in items if item not in loading]


def _loads_nixl(item: pytest.Item) -> bool:
    return item.path.name == "test_nixl.py" or "nixl" in item.name.partition("[")[2]


_epochs = itertools.count(os.getpid() << 16)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    """Each way that blocks can take."""
    chosen: str = request.param
    if not is_installed(chosen):
        pytest.skip(f"{chosen} is not installed")
    if chosen == "nixl" and request.path.name == "test_agent_faults.py":
        pytest.skip("NIXL takes longer to load than these tests let a peer be silent; test_contract.py has its faults")
    return chosen


@pytest.fixture(scope="session")
def shared_peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KvPeer]:
    """A sender that all tests share; it lives through whatever they do to it."""
    started = KvPeer(Options(str(tmp_path_factory.getbasetemp()), next(_epochs)))
    yield started
    started.close()


@pytest.fixture
def peer(shared_peer: KvPeer) -> KvPeer:
    """The sender that all tests share, with the blocks that it had in the beginning."""
    shared_peer.do("refill")
    return shared_peer


@pytest.fixture
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., KvPeer]]:
    """Starts peers of this test's own."""
    peers: list[KvPeer] = []

    def started(*prefix: str, **changes: Any) -> KvPeer:
        options = Options(str(tmp_path_factory.getbasetemp()), next(_epochs))
        peers.append(KvPeer(msgspec.structs.replace(options, **changes), *prefix))
        return peers[-1]

    yield started
    for one in peers:
        one.close()


@pytest.fixture
def make(tmp_path_factory: pytest.TempPathFactory, way: str) -> Iterator[Callable[..., KvNode]]:
    """Makes nodes in this process, which receive over the way that is tested."""
    nodes: list[KvNode] = []

    def made(*, wrap: Wrap = lambda transport: transport, **changes: Any) -> KvNode:
        options = Options(str(tmp_path_factory.getbasetemp()), next(_epochs), way)
        nodes.append(KvNode(msgspec.structs.replace(options, **changes), wrap))
        return nodes[-1]

    yield made
    for node in nodes:
        node.close()


@pytest.fixture
def ours(make: Callable[..., KvNode]) -> KvNode:
    """A receiver in this process."""
    return make()
