"""What several processes, connections and clusters have of one key, together."""

from __future__ import annotations

from pathlib import Path

import pytest

from frontend.admission.claim import Priority
from frontend.keys.bucket import Rate
from frontend.keys.connections import CallPeers, ConnectionAccounts
from frontend.keys.keyring import Key, Rates, model_pattern
from frontend.keys.ledger import Ledger, LimitError
from frontend.keys.table import SharedTable
from frontend.keys.vouching import believed, vouched
from slipstream.errors import InvalidApiKeyError


def key(rates: Rates, **fields: object) -> Key:
    values: dict[str, object] = {"key_id": "k", "digest": bytes(32), "tenant": "acme", "account": "k", "rates": rates}
    return Key(**(values | fields))  # type: ignore[arg-type]


def member(folder: Path, place: int) -> Ledger:
    return Ledger(SharedTable(folder / "table", place, 2, rows=16), clock=lambda: 1000.0)


def test_processes_of_a_pool_count_a_keys_requests_together(tmp_path: Path) -> None:
    one, other = member(tmp_path, 0), member(tmp_path, 1)
    own = key(Rates(requests=Rate(0.1, 6), output_tokens=Rate(1, 100), streams=3))
    for ledger in (one, other):
        with ledger.enter(own) as spending:
            spending.charge(1, 30)
            spending.settle(10)
    assert [left for _, _, left, _ in one.left(own)] == [left for _, _, left, _ in other.left(own)] == [4, 80]
    running = [one.enter(own), other.enter(own), one.enter(own)]
    with pytest.raises(LimitError, match="3 requests at the same time"):
        other.enter(own)
    running[0].charge(1, 70)
    with pytest.raises(LimitError) as caught:
        running[1].charge(1, 20)
    assert caught.value.reason == "output_tokens"


def test_what_a_killed_process_had_running_is_free_when_its_successor_starts(tmp_path: Path) -> None:
    one, killed = member(tmp_path, 0), member(tmp_path, 1)
    own = key(Rates(requests=Rate(0.1, 6), output_tokens=Rate(1, 100), streams=1))
    killed.enter(own).charge(1, 90)
    with pytest.raises(LimitError):
        one.enter(own)
    member(tmp_path, 1)
    assert {name: left for name, _, left, _ in one.left(own)} == {"requests": 5, "output-tokens": 100}
    with one.enter(own):
        pass


def test_a_process_that_was_stopped_with_the_lock_holds_nobody_up(tmp_path: Path) -> None:
    one, stopped = member(tmp_path, 0), member(tmp_path, 1)
    own = key(Rates(requests=Rate(0.1, 6)))
    one.enter(own)
    with stopped.table.locked():
        one.enter(own).charge(1, 1)
    assert one.left(own)[0][2] == 5


def test_a_full_table_counts_on_in_each_process(tmp_path: Path) -> None:
    one = member(tmp_path, 0)
    for number in range(20):
        own = key(Rates(requests=Rate(0.1, 6)), account=f"k{number}")
        one.enter(own).charge(1, 1)
        assert one.left(own)[0][2] == 5


def test_a_connection_counts_once_until_it_is_closed() -> None:
    ledger, own = Ledger(), key(Rates(connections=1))
    first, second = ConnectionAccounts(), ConnectionAccounts()
    for _ in range(2):
        first.use(ledger, own)
    with pytest.raises(LimitError, match="1 connections at the same time"):
        second.use(ledger, own)
    first.close()
    second.use(ledger, own)
    second.close()
    second.close()
    second.use(ledger, own)  # a request that outlives its connection takes no place
    with CallPeers().calling(ledger, own, "ipv4:1"):
        pass


def test_calls_of_one_grpc_connection_count_as_one() -> None:
    ledger, own, peers = Ledger(), key(Rates(connections=1)), CallPeers()
    first, again, other = (peers.calling(ledger, own, one) for one in ("ipv4:1", "ipv4:1", "ipv4:2"))
    with first, again, pytest.raises(LimitError), other:
        pass
    with peers.calling(ledger, own, "ipv4:2"):
        pass


def test_what_a_global_frontend_says_of_a_caller_is_what_the_cluster_goes_by() -> None:
    rates = Rates(Rate(1, 60), Rate(2.5, 150), Rate(1 / 3, 20), 64, 5, 6)
    mine = key(rates, key_id="tenant:acme", weight=2.5, classes=(Priority.NEARLINE, Priority.BATCH),
               models=model_pattern(["llama-*"]))  # fmt: skip
    said = vouched(mine, "llama-3;1, ü")
    theirs = believed(said)
    assert said.isascii()
    assert (theirs.key_id, theirs.tenant, theirs.account) == ("tenant:acme", "acme", "k")
    assert (theirs.weight, theirs.classes) == (2.5, mine.classes)
    assert theirs.may_use("llama-3;1, ü")
    assert not theirs.may_use("llama-4")
    assert theirs.rates == Rates(None, rates.input_tokens, rates.output_tokens, 64)


@pytest.mark.parametrize("said", ["", ";;;;;;;;", "k;t;nan;batch;*;;;1;k", "k;t;1;urgent;*;;;1;k", "k;t;1;;*;1;;1;k"])
def test_what_nobody_would_say_is_refused(said: str) -> None:
    with pytest.raises(InvalidApiKeyError):
        believed(said)
