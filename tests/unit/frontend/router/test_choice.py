"""The router: a pure function, so that each of its rules is one line to check."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frontend.router import Ask, Fallback, Reason, Router
from frontend.router.choice import PolicyName
from slipstream.errors import ModelNotFoundError, NoWorkerError
from slipstream.v1.registry_pb2 import TransferEndpoint, TransferPath, WorkerState
from tests.unit.frontend.router.paths import usable
from tests.unit.frontend.router.workers import ASK, DECODE, PREFILL, Worker, choose, fast_worker, worker


def test_prefill_goes_where_the_fewest_prompt_tokens_wait() -> None:
    route = choose(ASK, [worker("p0", PREFILL, waiting=900), worker("p1", PREFILL, requests=1), worker("d", DECODE)])
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


@pytest.mark.parametrize(("waiting", "prefill"), [(10, "p-a"), (900, "p-b")])
def test_a_pair_on_one_host_is_preferred_as_long_as_that_saves_time(waiting: int, prefill: str) -> None:
    # Between hosts a way that nobody has measured takes 9 ms longer, in which 18 tokens are computed.
    workers = [
        worker("p-a", PREFILL, **far(host_id="a", waiting=waiting)),
        worker("p-b", PREFILL, **far(host_id="b")),
        worker("d-a", DECODE, **far(host_id="a")),
        worker("d-c", DECODE, **far(host_id="c")),
    ]
    route = choose(ASK, workers)
    assert route.prefill is not None
    assert route.prefill.worker_id == prefill
    assert prefill == "p-b" or route.decode.worker_id == "d-a"


@pytest.mark.parametrize(("prefill", "decode", "paired"), [(2, 2, True), (4, 2, True), (1, 2, True), (3, 2, False)])
def test_workers_are_a_pair_when_the_ranks_of_one_divide_those_of_the_other(
    prefill: int, decode: int, paired: bool
) -> None:
    def of(ranks: int) -> TransferEndpoint:
        addresses = [f"h:{rank + 1}" for rank in range(ranks)]
        return TransferEndpoint(address="h:1", epoch=7, transports=["shm"], ranks=addresses)

    route = choose(ASK, [worker("p", PREFILL, transfer=of(prefill)), worker("d", DECODE, transfer=of(decode))])
    assert (route.prefill is not None) == paired
    assert route.fallback is (None if paired else Fallback.NO_PATH)


def test_a_prefill_worker_without_a_transfer_agent_is_not_used() -> None:
    workers = [worker("p", PREFILL, transfer=TransferEndpoint()), worker("d", DECODE)]
    assert choose(ASK, workers).fallback is Fallback.NO_PATH


BROKEN = TransferPath(peer_worker_id="p0", peer_epoch=7, transport="shm", error="permission denied")


def test_a_pair_whose_way_was_measured_to_be_broken_is_not_used() -> None:
    decode = worker("d", DECODE, paths=[BROKEN])
    route = choose(ASK, [worker("p0", PREFILL), worker("p1", PREFILL, waiting=900), decode])
    assert route.prefill is not None
    assert route.prefill.worker_id == "p1"
    assert choose(ASK, [worker("p0", PREFILL), decode]).fallback is Fallback.NO_PATH


def test_a_broken_way_says_nothing_of_a_restarted_sender_nor_of_its_other_transports() -> None:
    restarted = TransferEndpoint(address="h:1", epoch=8, transports=["shm"])
    assert choose(ASK, [worker("p0", PREFILL, transfer=restarted), worker("d", DECODE, paths=[BROKEN])]).prefill
    other = TransferPath(peer_worker_id="p0", peer_epoch=7, transport="ucx", bytes_per_s=1e8)
    assert choose(ASK, [worker("p0", PREFILL), worker("d", DECODE, paths=[BROKEN, other])]).prefill


@pytest.mark.parametrize(
    ("known", "requests", "prefill", "reason"),
    [
        (2800, 0, "", Reason.PREFIX_ON_DECODE),
        (2800, 60, "p", Reason.LEAST_TIME),
        (1200, 2, "p", Reason.LEAST_TIME),
    ],
    ids=["most of the prompt", "much to disturb", "a system prompt"],
)
def test_a_decode_worker_that_knows_the_prompt_computes_its_rest_if_that_disturbs_few(
    known: int, requests: int, prefill: str, reason: Reason
) -> None:
    ask = Ask("m", 3000, 100, known={"d1": known})
    busy = [fast_worker(f"d{index}", DECODE, requests=requests) for index in range(2)]
    route = choose(ask, [*busy, fast_worker("p", PREFILL)], router=Router())
    assert (route.prefill.worker_id if route.prefill else "", route.reason, route.fallback) == (prefill, reason, None)
    if not prefill:
        assert route.decode.worker_id == "d1"


@pytest.mark.parametrize(("tokens", "alone"), [(20, True), (2000, False)])
def test_a_short_prompt_is_not_worth_a_handoff(tokens: int, alone: bool) -> None:
    # A handoff costs 1 ms; 20 tokens are computed in 3.
    route = choose(Ask("m", tokens, 50), [fast_worker("p", PREFILL), fast_worker("d", DECODE)], router=Router())
    assert (route.prefill is None) == alone
    assert route.reason == (Reason.HANDOFF_NOT_WORTH_IT if alone else Reason.LEAST_TIME)
    assert route.fallback is None


def test_decode_takes_prompts_when_prefill_is_far_behind_and_decode_is_idle() -> None:
    workers = [fast_worker("p", PREFILL, waiting=50_000), fast_worker("d", DECODE)]
    assert choose(Ask("m", 2000, 50), workers, router=Router()).prefill is None
    assert choose(Ask("m", 2000, 50), workers).prefill is not None, "unless told always to hand off"


def test_a_full_decode_worker_is_not_preferred_for_what_it_knows() -> None:
    ask = Ask("m", 100, known={"d1": 96})
    assert choose(ask, [worker("d0", DECODE), worker("d1", DECODE, used=95)]).decode.worker_id == "d0"


# 64 tokens known are 32 ms of this request and, with half a prompt waiting on average, 16 ms of another one.
@pytest.mark.parametrize(("waiting", "chosen"), [(94, "p1"), (98, "p0")])
def test_what_a_prefill_worker_knows_of_the_prompt_counts_against_what_waits_there(waiting: int, chosen: str) -> None:
    ask = Ask("m", 100, known={"p1": 64})
    workers = [worker("p0", PREFILL), worker("p1", PREFILL, waiting=waiting), worker("d", DECODE)]
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


def fleets() -> st.SearchStrategy[list[Worker]]:
    one = st.builds(
        worker,
        st.uuids().map(str),
        st.sampled_from([PREFILL, DECODE]),
        requests=st.integers(0, 3),
        waiting=st.integers(0, 300),
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
    return st.lists(one, max_size=8, unique_by=lambda worker: worker.record.worker_id)


@pytest.mark.parametrize("policy", get_args(PolicyName))
@settings(deadline=None, max_examples=60)
@given(fleets(), st.integers(0, 2000), st.integers(0, 2000), st.booleans(), st.randoms(use_true_random=False))
def test_laws_of_every_route(
    policy: PolicyName, workers: list[Worker], prompt_tokens: int, known: int, always: bool, order: Any
) -> None:
    ask = Ask("m", prompt_tokens, known={one.record.worker_id: known for one in workers[::2]}, session="s")
    by_id = {one.record.worker_id: one for one in workers}
    try:
        route = choose(ask, workers, tie_break="x", router=Router(policy, always_hand_off=always))
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
    elif route.fallback is None:
        assert prompt_tokens <= 1 or not always
        assert route.reason in (Reason.NOTHING_TO_MOVE, Reason.HANDOFF_NOT_WORTH_IT, Reason.PREFIX_ON_DECODE)
    order.shuffle(workers)
    if policy != "power_of_two":  # which draws by place
        again = choose(ask, workers, tie_break="x", router=Router(policy, always_hand_off=always))
        assert again == route, "the order of the view must not matter"


def test_equal_workers_are_chosen_differently_by_different_frontends() -> None:
    workers = [worker(f"d{index}", DECODE) for index in range(8)]
    assert len({choose(ASK, workers, tie_break=f"frontend-{index}").decode.worker_id for index in range(64)}) > 4
