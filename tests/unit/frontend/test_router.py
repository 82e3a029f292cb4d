"""The router: a pure function, so that each of its rules is one line to check."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend.outstanding import FOREIGN_PROMPT_TOKENS, Outstanding, OutstandingWork
from frontend.paths import usable
from frontend.router import Ask, Candidate, Fallback, choose
from slipstream.errors import ModelNotFoundError, NoWorkerError
from slipstream.v1.registry_pb2 import (
    Capacity,
    Load,
    Role,
    TransferEndpoint,
    TransferPath,
    WorkerRecord,
    WorkerState,
)

PREFILL, DECODE = Role.ROLE_PREFILL, Role.ROLE_DECODE
ASK = Ask("m", prompt_tokens=100, max_tokens=50)


def worker(
    worker_id: str,
    role: Role.ValueType,
    *,
    requests: int = 0,
    prompt_tokens: int = 0,
    used: int = 0,
    suspect: bool = False,
    **fields: Any,
) -> Candidate:
    record = WorkerRecord(
        worker_id=worker_id,
        role=role,
        state=fields.get("state", WorkerState.READY),
        model=fields.get("model", "m"),
        host_id=fields.get("host_id", "h"),
        capacity=Capacity(max_model_len=fields.get("max_model_len", 1000), block_tokens=16, blocks=100),
        load=Load(blocks_used=used),
        transfer=fields.get("transfer", TransferEndpoint(address="h:1", epoch=7, transports=["shm"])),
        paths=fields.get("paths", ()),
    )
    return Candidate(record, suspect, Outstanding(requests, prompt_tokens))


def test_prefill_goes_where_the_fewest_prompt_tokens_wait() -> None:
    route = choose(
        ASK, [worker("p0", PREFILL, prompt_tokens=900), worker("p1", PREFILL, requests=9), worker("d", DECODE)]
    )
    assert route.prefill is not None
    assert (route.prefill.worker_id, route.decode.worker_id, route.fallback) == ("p1", "d", None)


def test_decode_goes_where_the_fewest_requests_are_then_where_the_cache_is_emptier() -> None:
    busy, free = worker("d0", DECODE, requests=2), worker("d1", DECODE, requests=1, used=80)
    assert choose(ASK, [busy, free]).decode.worker_id == "d1"
    fuller, emptier = worker("d0", DECODE, used=60), worker("d1", DECODE, used=20)
    assert choose(ASK, [fuller, emptier]).decode.worker_id == "d1"


def test_a_decode_worker_without_room_for_the_prompt_is_the_last_choice() -> None:
    full, busy = worker("d0", DECODE, used=95), worker("d1", DECODE, requests=30, used=50)
    assert choose(ASK, [full, busy]).decode.worker_id == "d1"
    assert choose(ASK, [full]).decode.worker_id == "d0"


@pytest.mark.parametrize("prompt_tokens", [0, 1])
def test_a_prompt_with_nothing_to_move_goes_to_decode_alone(prompt_tokens: int) -> None:
    route = choose(Ask("m", prompt_tokens), [worker("p", PREFILL), worker("d", DECODE)])
    assert (route.prefill, route.fallback, route.reason) == (None, None, "nothing_to_move")


def test_without_prefill_workers_decode_does_it_alone_with_the_reason() -> None:
    assert choose(ASK, [worker("d", DECODE)]).fallback is Fallback.NO_PREFILL_WORKER


@pytest.mark.parametrize("host_id", ["elsewhere", ""])
def test_a_prefill_worker_on_another_host_is_not_eligible(host_id: str) -> None:
    route = choose(ASK, [worker("p", PREFILL, host_id=host_id), worker("d", DECODE)])
    assert (route.prefill, route.fallback) == (None, Fallback.NO_PATH)


def test_workers_that_do_not_tell_their_host_are_never_a_pair() -> None:
    route = choose(ASK, [worker("p", PREFILL, host_id=""), worker("d", DECODE, host_id="")])
    assert route.fallback is Fallback.NO_PATH


def far(**fields: Any) -> dict[str, Any]:
    """A worker on a host of its own, with a transport that crosses hosts."""
    transports = fields.pop("transports", ["shm", "ucx"])
    return {"transfer": TransferEndpoint(address="h:1", epoch=7, transports=transports), **fields}


@pytest.mark.parametrize(
    ("prefill", "decode", "paired"),
    [
        (["shm", "ucx"], ["shm", "ucx"], True),
        (["nixl", "ucx"], ["ucx"], True),
        (["nixl"], ["ucx"], False),
        (["shm"], ["shm"], False),
        ([], [], False),
    ],
    ids=str,
)
def test_workers_on_different_hosts_are_a_pair_when_they_share_a_transport_that_crosses_hosts(
    prefill: list[str], decode: list[str], paired: bool
) -> None:
    workers = [
        worker("p", PREFILL, **far(host_id="a", transports=prefill)),
        worker("d", DECODE, **far(host_id="b", transports=decode)),
    ]
    route = choose(ASK, workers)
    assert (route.prefill is not None) == paired
    assert route.fallback is (None if paired else Fallback.NO_PATH)


def test_a_pair_on_one_host_is_preferred_to_a_less_loaded_one_on_two() -> None:
    workers = [
        worker("p-a", PREFILL, **far(host_id="a", prompt_tokens=900)),
        worker("p-b", PREFILL, **far(host_id="b")),
        worker("d-a", DECODE, **far(host_id="a", requests=3)),
        worker("d-c", DECODE, **far(host_id="c")),
    ]
    route = choose(ASK, workers)
    assert route.prefill is not None
    assert (route.prefill.worker_id, route.decode.worker_id) == ("p-a", "d-a")


def test_a_prefill_worker_without_a_transfer_agent_is_not_used() -> None:
    workers = [worker("p", PREFILL, transfer=TransferEndpoint()), worker("d", DECODE)]
    assert choose(ASK, workers).fallback is Fallback.NO_PATH


BROKEN = TransferPath(peer_worker_id="p0", peer_epoch=7, transport="shm", error="permission denied")


def test_a_pair_whose_way_was_measured_to_be_broken_is_not_used() -> None:
    decode = worker("d", DECODE, paths=[BROKEN])
    route = choose(ASK, [worker("p0", PREFILL), worker("p1", PREFILL, prompt_tokens=900), decode])
    assert route.prefill is not None
    assert route.prefill.worker_id == "p1"
    assert choose(ASK, [worker("p0", PREFILL), decode]).fallback is Fallback.NO_PATH


def test_a_broken_way_says_nothing_of_a_restarted_sender_nor_of_its_other_transports() -> None:
    restarted = TransferEndpoint(address="h:1", epoch=8, transports=["shm"])
    assert choose(ASK, [worker("p0", PREFILL, transfer=restarted), worker("d", DECODE, paths=[BROKEN])]).prefill
    other = TransferPath(peer_worker_id="p0", peer_epoch=7, transport="ucx", bytes_per_s=1e8)
    assert choose(ASK, [worker("p0", PREFILL), worker("d", DECODE, paths=[BROKEN, other])]).prefill


@pytest.mark.parametrize(
    ("known", "requests", "chosen"),
    [(50, 2, "d1"), (50, 3, "d0"), (49, 0, "d0"), (99, 2, "d1")],
    ids=["half the prompt", "too busy", "too little", "all"],
)
def test_a_decode_worker_that_knows_the_prompt_is_preferred_when_it_is_not_much_busier(
    known: int, requests: int, chosen: str
) -> None:
    ask = Ask("m", 100, known={"d1": known})
    # More KV in use makes d1 the second choice on its own account.
    workers = [worker("d0", DECODE), worker("d1", DECODE, requests=requests, used=50), worker("p", PREFILL)]
    assert choose(ask, workers).decode.worker_id == chosen


def test_a_full_decode_worker_is_not_preferred_for_what_it_knows() -> None:
    ask = Ask("m", 100, known={"d1": 96})
    assert choose(ask, [worker("d0", DECODE), worker("d1", DECODE, used=95)]).decode.worker_id == "d0"


@pytest.mark.parametrize(("waiting", "chosen"), [(63, "p1"), (65, "p0")])
def test_what_a_prefill_worker_knows_of_the_prompt_counts_against_what_waits_there(waiting: int, chosen: str) -> None:
    ask = Ask("m", 100, known={"p1": 64})
    workers = [worker("p0", PREFILL), worker("p1", PREFILL, prompt_tokens=waiting), worker("d", DECODE)]
    route = choose(ask, workers)
    assert route.prefill is not None
    assert route.prefill.worker_id == chosen


def test_a_busier_decode_worker_beside_a_prefill_worker_is_preferred_to_the_slow_road() -> None:
    workers = [
        worker("p", PREFILL, host_id="a"),
        worker("d-a", DECODE, host_id="a", requests=3),
        worker("d-b", DECODE, host_id="b"),
    ]
    route = choose(ASK, workers)
    assert (route.decode.worker_id, route.fallback) == ("d-a", None)


@pytest.mark.parametrize(
    "unfit",
    [
        {"state": WorkerState.STARTING},
        {"state": WorkerState.DRAINING},
        {"state": WorkerState.WORKER_STATE_UNSPECIFIED},
        {"suspect": True},
        {"model": "other"},
    ],
    ids=str,
)
def test_workers_that_cannot_take_requests_get_nothing(unfit: dict[str, Any]) -> None:
    workers = [worker("p", PREFILL, **unfit), worker("d0", DECODE, **unfit), worker("d1", DECODE, requests=99)]
    route = choose(ASK, workers)
    assert (route.prefill, route.decode.worker_id, route.fallback) == (None, "d1", Fallback.NO_PREFILL_WORKER)


def test_workers_that_failed_this_request_are_not_asked_again() -> None:
    ask = Ask("m", 100, excluded=frozenset({"p0", "d0"}))
    workers = [worker("p0", PREFILL), worker("d0", DECODE), worker("d1", DECODE, requests=99)]
    assert choose(ask, workers).decode.worker_id == "d1"
    with pytest.raises(NoWorkerError, match="failed this request") as caught:
        choose(ask, workers[:2])
    assert caught.value.retry_after_s


def test_a_long_request_goes_to_a_worker_with_a_long_context() -> None:
    short, long = worker("d0", DECODE, max_model_len=120), worker("d1", DECODE, requests=5, max_model_len=4096)
    assert choose(ASK, [short, long]).decode.worker_id == "d1"
    assert choose(ASK, [short]).decode.worker_id == "d0", "the worker says what its limit is"


def test_unknown_models_and_models_without_a_free_worker_are_different_errors() -> None:
    with pytest.raises(ModelNotFoundError) as unknown:
        choose(Ask("n", 9), [worker("d", DECODE)])
    assert unknown.value.param == "model"
    with pytest.raises(NoWorkerError, match="no decode worker of model 'm' is registered"):
        choose(ASK, [worker("p", PREFILL)])
    with pytest.raises(NoWorkerError, match="draining"):
        choose(ASK, [worker("d", DECODE, state=WorkerState.DRAINING)])


def candidates() -> st.SearchStrategy[list[Candidate]]:
    one = st.builds(
        worker,
        st.uuids().map(str),
        st.sampled_from([PREFILL, DECODE]),
        requests=st.integers(0, 3),
        prompt_tokens=st.integers(0, 3),
        used=st.integers(0, 100),
        suspect=st.booleans(),
        host_id=st.sampled_from(["a", "b", ""]),
        transfer=st.builds(
            TransferEndpoint,
            address=st.sampled_from(["h:1", ""]),
            epoch=st.just(7),
            transports=st.lists(st.sampled_from(["shm", "ucx", "nixl"]), unique=True),
        ),
        state=st.sampled_from([WorkerState.READY, WorkerState.STARTING, WorkerState.DRAINING]),
        model=st.sampled_from(["m", "n"]),
    )
    return st.lists(one, max_size=8, unique_by=lambda candidate: candidate.record.worker_id)


@given(candidates(), st.integers(0, 2000), st.integers(0, 2000), st.randoms(use_true_random=False))
def test_laws_of_every_route(workers: list[Candidate], prompt_tokens: int, known: int, order: Any) -> None:
    ask = Ask("m", prompt_tokens, known={one.record.worker_id: known for one in workers[::2]})
    by_id = {one.record.worker_id: one for one in workers}
    try:
        route = choose(ask, workers, tie_break="x")
    except (ModelNotFoundError, NoWorkerError):
        assert not any(
            one.record.role == DECODE
            and one.record.model == "m"
            and one.record.state == WorkerState.READY
            and not one.suspect
            for one in workers
        )
        return
    for chosen, role in ((route.decode, DECODE), (route.prefill, PREFILL)):
        if chosen is not None:
            assert (chosen.role, chosen.model, chosen.state) == (role, "m", WorkerState.READY)
            assert not by_id[chosen.worker_id].suspect
    if route.prefill is not None:
        assert usable(route.decode, route.prefill)
        assert route.fallback is None
    else:
        assert (route.fallback is None) == (prompt_tokens <= 1)
    order.shuffle(workers)
    assert choose(ask, workers, tie_break="x") == route, "the order of the view must not matter"


def test_equal_workers_are_chosen_differently_by_different_frontends() -> None:
    workers = [worker(f"d{index}", DECODE) for index in range(8)]
    assert len({choose(ASK, workers, tie_break=f"frontend-{index}").decode.worker_id for index in range(64)}) > 4


def test_a_workers_own_figures_do_not_count_this_frontends_requests_twice() -> None:
    work = OutstandingWork()
    for _ in range(3):
        work.begin("w", 10)
    work.note(WorkerRecord(worker_id="w", renewals=1, load=Load(running=4, waiting=1)))
    assert work.of("w") == Outstanding(5, 30 + 2 * FOREIGN_PROMPT_TOKENS)
    work.begin("w", 10)
    assert work.of("w").requests == 6, "a request sent since is known at once"


def test_figures_that_still_show_finished_requests_are_not_taken_for_others() -> None:
    work = OutstandingWork()
    for _ in range(3):
        work.begin("w", 10)
    for _ in range(3):
        work.end("w", 10)
    work.note(WorkerRecord(worker_id="w", renewals=1, load=Load(running=3)))
    assert work.of("w") == Outstanding(0, 0)
    work.note(WorkerRecord(worker_id="w", renewals=2, load=Load(running=3)))
    assert work.of("w").requests == 3, "a second look shows that they are others'"


def test_accounts_of_workers_that_are_gone_are_dropped_once_idle() -> None:
    work = OutstandingWork()
    work.begin("busy", 10)
    work.note(WorkerRecord(worker_id="idle", renewals=1, load=Load(running=1)))
    work.forget_all_but(set())
    assert (work.of("idle"), work.of("busy")) == (Outstanding(), Outstanding(1, 10))
    work.end("busy", 10)
    work.forget_all_but(set())
    assert work.of("busy") == Outstanding()
