"""Prefill and decode on two hosts: blocks cross a real network, which is slow, breaks in the middle and comes back.

The hosts are network namespaces joined by a veth pair; all parts of the cluster are started as on two machines, by
their commands and with each other's addresses. What is promised is what holds on one host: the right tokens, within
deadlines, and nothing is left held. Nobody is restarted in these tests.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from kv_transfer import ways
from tests.support import plain_engine
from tests.support.cluster import wait_for
from tests.support.tiny_model import VOCAB_SIZE
from tests.support.two_host_cluster import DECODE, PREFILL, Answer, TwoHostCluster
from tests.support.two_hosts import DEVICE, TwoHosts, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=f"two hosts cannot be made here: {why_not()}")

SILENCE_S, LEASE_S = 1.5, 4.0
WORKER_FLAGS = (
    *("--transfer-silence-s", f"{SILENCE_S:g}", "--transfer-timeout-s", "3", "--transfer-lease-s", f"{LEASE_S:g}"),
)
# Several steps for a prompt, so that blocks can leave while later ones are computed.
PREFILL_FLAGS = ("--max-batched-tokens", "512")
FRONTEND_FLAGS = (
    *("--handoff", "always", "--prefill-timeout-s", "6"),
    *("--first-token-timeout-s", "10", "--token-timeout-s", "10"),
)
# Well beyond every deadline above: what takes longer is a hang.
NO_HANG_S = 30.0

BLOCK_TOKENS = 128
BLOCK_BYTES = BLOCK_TOKENS * 512  # two layers, one head of 32 numbers, K and V, float32
LONG, SHORT = 3900, 700
SHORT_PROMPTS = 24
MAX_TOKENS = 8

# What a user writes, and the beginning of the way that comes of it. Two hosts without RDMA get ucx by themselves.
TRANSPORTS = {
    "ucx": ("ucx" if ways.has_rdma() else "auto", f"ucx/tcp/{DEVICE}"),
    "nixl": ("nixl", f"nixl/UCX:tcp/{DEVICE}"),
}


class Questions:
    """Prompts with the answers of a plain engine; each is asked once, or a prefix cache would answer."""

    def __init__(self, model: Path) -> None:
        rng = random.Random(23)
        lengths = [LONG] * 3 + [SHORT] * SHORT_PROMPTS
        prompts = [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in lengths]
        self._all = list(zip(prompts, plain_engine.greedy(model, prompts, max_tokens=MAX_TOKENS), strict=True))
        self._left = {LONG: self._all[:3], SHORT: self._all[3:]}

    def afresh(self) -> None:
        """For a cluster that has not seen any of them."""
        self._left = {LONG: self._all[:3], SHORT: self._all[3:]}

    def next(self, length: int) -> tuple[list[int], list[int]]:
        """A prompt of this length, and its answer."""
        return self._left[length].pop(0)


@pytest.fixture(scope="module")
def questions(tiny_model: Path) -> Questions:
    return Questions(tiny_model)


@pytest.fixture(scope="module", params=sorted(TRANSPORTS))
def transport(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name not in ways.installed():
        pytest.skip(f"the transport {name} is not installed")
    return name


@pytest.fixture(scope="module")
def running(
    transport: str, questions: Questions, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TwoHostCluster]:
    questions.afresh()
    asked, _ = TRANSPORTS[transport]
    with (
        TwoHosts() as hosts,
        TwoHostCluster(
            hosts,
            tiny_model,
            tmp_path_factory.mktemp(transport) / "run",
            *("--transfer-transport", asked, *WORKER_FLAGS),
            prefill_flags=PREFILL_FLAGS,
            frontend_flags=FRONTEND_FLAGS,
            own_memory=True,
        ) as cluster,
    ):
        yield cluster


@pytest.fixture
def cluster(running: TwoHostCluster) -> Iterator[TwoHostCluster]:
    yield running
    running.hosts.restore()


def blocks_of(tokens: int) -> int:
    """Blocks of a prompt, without its last token."""
    return -(-(tokens - 1) // BLOCK_TOKENS)


def ask(cluster: TwoHostCluster, questions: Questions, length: int = SHORT) -> Answer:
    prompt, right = questions.next(length)
    answer = cluster.ask(prompt, max_tokens=MAX_TOKENS)
    assert answer.tokens == right
    return answer


def cut_in_the_middle(cluster: TwoHostCluster, prompt: list[int]) -> Future[Answer]:
    """Ask over a slow cable, and cut it when about a quarter of the blocks has left."""
    far = cluster.hosts.far
    cluster.hosts.slow(mbit=4)
    before = far.sent_bytes()
    asking = cluster.asking(prompt, max_tokens=MAX_TOKENS)
    enough = before + blocks_of(LONG) * BLOCK_BYTES // 4
    wait_for("blocks are under way", lambda: far.sent_bytes() > enough, timeout_s=NO_HANG_S, every_s=0.02)
    cluster.hosts.cut()
    return asking


def is_all_free(cluster: TwoHostCluster) -> bool:
    held = ("slipstream_worker_kv_blocks_used", "slipstream_kv_handoffs_held")
    return all(cluster.metrics(worker)[name] == 0 for worker in (PREFILL, DECODE) for name in held)


def until_blocks_move_again(cluster: TwoHostCluster, questions: Questions) -> None:
    """Every answer on the way there is right, too."""
    wait_for(
        "blocks move again",
        lambda: not ask(cluster, questions).account.fallback,
        timeout_s=NO_HANG_S,
        every_s=1.0,
    )


def busiest_share(cluster: TwoHostCluster, seconds: float = 2.0) -> float:
    """Share of a core that the busier one of the two workers uses."""
    before = {name: cluster.cpu_s(name) for name in (PREFILL, DECODE)}
    time.sleep(seconds)
    return max(cluster.cpu_s(name) - before[name] for name in before) / seconds


def test_blocks_cross_the_network_and_the_answer_is_right(
    cluster: TwoHostCluster, questions: Questions, transport: str
) -> None:
    before = cluster.hosts.far.sent_bytes()
    answer = ask(cluster, questions, LONG)
    account = answer.account
    blocks = blocks_of(LONG)
    assert (account.prefill_worker, account.decode_worker) == (PREFILL, DECODE)
    assert (account.transport, account.fallback) == (TRANSPORTS[transport][1], "")
    assert (account.kv_blocks_moved, account.kv_bytes_moved) == (blocks, blocks * BLOCK_BYTES)
    assert account.decode_computed_tokens == 1
    assert cluster.hosts.far.sent_bytes() - before > blocks * BLOCK_BYTES
    assert len({worker.host_id for worker in cluster.workers()}) == 2
    assert is_all_free(cluster)


def test_a_probe_shows_the_network_in_both_directions(cluster: TwoHostCluster, transport: str) -> None:
    rows = cluster.probe()
    assert [(row["sender"], row["receiver"]) for row in rows] == [(PREFILL, DECODE), (DECODE, PREFILL)]
    for row in rows:
        assert f"{row['transport']}/{row['detail']}" == TRANSPORTS[transport][1]
        assert row["error"] == ""
        assert row["bytes_per_s"] > 0


def test_over_a_slow_network_blocks_still_leave_while_the_prompt_is_computed(
    cluster: TwoHostCluster, questions: Questions
) -> None:
    hidden = "slipstream_kv_transfer_hidden_seconds_total"
    before = cluster.metrics(DECODE).get(hidden, 0.0)
    cluster.hosts.slow(mbit=100, delay_ms=20)
    answer = ask(cluster, questions)
    assert answer.account.fallback == ""
    assert answer.account.kv_blocks_moved == blocks_of(SHORT)
    assert cluster.metrics(DECODE)[hidden] > before


def test_cut_in_the_middle_the_answer_comes_and_later_blocks_move_again(
    cluster: TwoHostCluster, questions: Questions, transport: str
) -> None:
    prompt, right = questions.next(LONG)
    answer = cut_in_the_middle(cluster, prompt).result(timeout=NO_HANG_S)
    assert answer.tokens == right
    assert answer.account.fallback in ("transfer_worker_gone", "transfer_timeout")
    assert answer.account.decode_computed_tokens == LONG
    wait_for("no block is held on either side", lambda: is_all_free(cluster), timeout_s=NO_HANG_S, every_s=0.2)
    assert ask(cluster, questions).account.decode_computed_tokens == SHORT  # still cut: decode alone

    cluster.hosts.restore()
    until_blocks_move_again(cluster, questions)
    for _ in range(3):
        account = ask(cluster, questions).account
        assert (account.fallback, account.transport) == ("", TRANSPORTS[transport][1])
        assert account.kv_blocks_moved == blocks_of(SHORT)
    wait_for("the workers rest", lambda: busiest_share(cluster) < 0.1, timeout_s=NO_HANG_S)


def test_what_was_under_way_when_a_long_cut_began_harms_nobody_afterwards(
    cluster: TwoHostCluster, questions: Questions
) -> None:
    """The cut outlasts the lease, the silence and the registration. What the kernel still has of the broken transfer
    may come when the cable is whole; its blocks have other uses then."""
    prompt, right = questions.next(LONG)
    asking = cut_in_the_middle(cluster, prompt)
    time.sleep(2 * LEASE_S)
    assert len(cluster.workers()) == 1
    cluster.hosts.restore()
    assert asking.result(timeout=NO_HANG_S).tokens == right
    until_blocks_move_again(cluster, questions)
    for _ in range(3):
        assert ask(cluster, questions).account.fallback == ""
    assert is_all_free(cluster)
    status = json.loads(cluster.slipstream("status", "--json"))
    assert {path["error"] for path in status["paths"]} == {""}
