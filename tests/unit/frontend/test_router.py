"""The router: a pure function, so that each of its rules is one line to check."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend.outstanding import FOREIGN_PROMPT_TOKENS, Outstanding, OutstandingWork
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
        state=st.sampled_from([WorkerState.READY, WorkerState.STARTING, WorkerState.DRAINING]),
        model=st.sampled_from(["m", "n"]),
    )
    return st.lists(one, max_size=8, unique_by=lambda candidate: candidate.record.worker_id)


@given(candidates(), st.integers(0, 2000), st.randoms(use_true_random=False))
def test_laws_of_every_route(workers: list[Candidate], prompt_tokens: int, order: Any) -> None:
    ask = Ask("m", prompt_tokens)
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
        assert route.prefill.host_id == route.decode.host_id != ""
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
