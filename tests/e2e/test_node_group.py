"""A prefill worker whose two ranks are on two hosts: it answers as one rank does, and neither host outlives the other.

The hosts are network namespaces joined by a veth pair, as in `test_two_hosts`; the far one has a /dev/shm of its own.
The ranks talk over the cable in every layer, and each sends its part of the blocks to a decode worker of one rank.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support import plain_engine
from tests.support.cluster import scrape
from tests.support.tiny_model import VOCAB_SIZE, make_tiny_model
from tests.support.two_host_cluster import DECODE, FOLLOWER, METRICS_PORT, PREFILL, TwoHostCluster
from tests.support.two_hosts import TwoHosts, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=f"two hosts cannot be made here: {why_not()}")

LENGTHS = (129, 700)
MAX_TOKENS = 8
BLOCK_TOKENS = 128
BLOCK_BYTES = BLOCK_TOKENS * 1024  # two layers, two heads of 32 numbers, K and V, float32
NO_HANG_S = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that two ranks can divide."""
    return make_tiny_model(tmp_path_factory.mktemp("model") / "two-heads", heads=4, kv_heads=2)


@pytest.fixture(scope="module")
def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHostCluster]:
    with (
        TwoHosts() as hosts,
        TwoHostCluster(
            hosts,
            model,
            tmp_path_factory.mktemp("node-group") / "run",
            frontend_flags=("--handoff", "always"),
            own_memory=True,
            group=True,
        ) as running,
    ):
        yield running


def shared_files(processes: list[psutil.Process]) -> set[Path]:
    """What these have of this machine's shared memory."""
    found = set()
    for one in processes:
        with suppress(psutil.Error):
            found |= {Path(area.path) for area in one.memory_maps() if area.path.startswith("/dev/shm/")}
    return {path for path in found if path.exists()}


def test_ranks_on_two_hosts_are_one_worker_and_neither_outlives_the_other(cluster: TwoHostCluster, model: Path) -> None:
    rng = random.Random(7)
    prompts = [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]
    right = plain_engine.greedy(model, prompts, max_tokens=MAX_TOKENS)
    assert {worker.worker_id for worker in cluster.workers()} == {PREFILL, DECODE}
    for prompt, tokens in zip(prompts, right, strict=True):
        before = cluster.hosts.far.sent_bytes()
        answer = cluster.ask(prompt, max_tokens=MAX_TOKENS)
        blocks = -(-(len(prompt) - 1) // BLOCK_TOKENS)
        assert answer.tokens == tokens
        assert (answer.account.fallback, answer.account.decode_computed_tokens) == ("", 1)
        assert (answer.account.kv_blocks_moved, answer.account.kv_bytes_moved) == (blocks, blocks * BLOCK_BYTES)
        assert cluster.hosts.far.sent_bytes() - before > blocks * BLOCK_BYTES // 2  # the second rank's part
    far = cluster.hosts.far
    assert far.call(scrape, f"http://{far.address}:{METRICS_PORT}/metrics")["slipstream_worker_node_ready"] == 1

    processes = [*cluster.family(PREFILL), *cluster.family(FOLLOWER)]
    files = shared_files(processes)
    assert files
    cluster.kill(FOLLOWER)
    assert cluster.ended(PREFILL, NO_HANG_S) not in (0, None)
    assert cluster.ended(FOLLOWER, NO_HANG_S) != 0
    assert psutil.wait_procs(processes, timeout=NO_HANG_S)[1] == []
    assert {path for path in files if path.exists()} == set()
