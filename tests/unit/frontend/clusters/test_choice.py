"""Which cluster a request goes to, by law and by example."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from frontend.clusters.breaker import Health
from frontend.clusters.choice import Ask, Candidate, Choice, Reason, choose, home_of, predict, seconds_for

READY = ((1, 0.05), (512, 0.25), (2048, 1.0), (8192, 5.0))


def cluster(name: str, **more: object) -> Candidate:
    return replace(Candidate(f"{name}/0", name, ready_s=READY), **more)  # type: ignore[arg-type]


def chosen(ask: Ask, *candidates: Candidate, tie: str = "") -> Choice:
    choice = choose(ask, candidates, tie)
    assert choice is not None
    return choice


some_cluster = st.builds(
    Candidate,
    endpoint=st.just(""),
    cluster=st.sampled_from(["eu", "us", "ap"]),
    health=st.sampled_from(Health),
    room=st.integers(-2, 20),
    rtt_s=st.floats(0, 0.5),
    wait_s=st.floats(0, 60),
    ready_s=st.sampled_from([READY, (), ((1, 0.5),)]),
    cached_bytes=st.integers(0, 50_000),
    bytes_per_token=st.floats(1, 8),
)
clusters = st.lists(some_cluster, min_size=1, max_size=6).map(
    lambda several: [replace(one, endpoint=f"{one.cluster}/{place}") for place, one in enumerate(several)]
)
asks = st.builds(Ask, prompt_bytes=st.integers(0, 50_000), session=st.sampled_from(["", "ann", "bob"]))


@given(asks, clusters)
def test_an_unhealthy_one_is_never_chosen_while_there_is_a_healthy_one(ask: Ask, those: list[Candidate]) -> None:
    choice = chosen(ask, *those)
    healths = {one.endpoint: one.health for one in those}
    if healths[choice.predicted.endpoint] is Health.DOWN:
        assert set(healths.values()) == {Health.DOWN}
        assert choice.reason is Reason.LAST_RESORT


@given(asks, clusters)
def test_a_full_one_is_chosen_only_when_all_healthy_ones_are_full(ask: Ask, those: list[Candidate]) -> None:
    by_name = {one.endpoint: one for one in those}
    one = by_name[chosen(ask, *those).predicted.endpoint]
    if one.room <= 0:
        assert all(other.room <= 0 for other in those if (other.health is Health.DOWN) == (one.health is Health.DOWN))


@given(asks, clusters, st.floats(0, 60))
def test_a_longer_wait_never_makes_a_cluster_win(ask: Ask, those: list[Candidate], more_s: float) -> None:
    before = chosen(ask, *those).predicted.endpoint
    for place, one in enumerate(those):
        if one.endpoint != before:
            worse = [*those[:place], replace(one, wait_s=one.wait_s + more_s), *those[place + 1 :]]
            assert chosen(replace(ask, session=""), *worse).predicted.endpoint != one.endpoint or (
                chosen(replace(ask, session=""), *those).predicted.endpoint == one.endpoint
            )


@given(asks, some_cluster, st.integers(0, 50_000))
def test_a_longer_cached_beginning_never_makes_the_first_token_later(ask: Ask, one: Candidate, more: int) -> None:
    before = predict(ask.prompt_bytes, one)
    assert predict(ask.prompt_bytes, replace(one, cached_bytes=one.cached_bytes + more)).ttft_s <= before.ttft_s


@given(asks, clusters)
def test_a_frontend_that_has_failed_the_request_is_not_asked_again(ask: Ask, those: list[Candidate]) -> None:
    excluded: set[str] = set()
    for _ in those:
        choice = chosen(replace(ask, excluded=frozenset(excluded)), *those)
        assert choice.predicted.endpoint not in excluded
        excluded.add(choice.predicted.endpoint)
    assert choose(replace(ask, excluded=frozenset(excluded)), those) is None


@given(st.integers(1, 40_000), st.integers(1, 40_000))
def test_more_tokens_take_no_less_time(one: int, other: int) -> None:
    fewer, more = sorted((one, other))
    assert seconds_for(fewer, READY) <= seconds_for(more, READY) + 1e-9


def test_a_cached_prefix_outweighs_the_way_there() -> None:
    far = cluster("us", rtt_s=0.15, cached_bytes=28_000)
    choice = chosen(Ask(32_000), cluster("eu", rtt_s=0.002), far)
    assert (choice.predicted.cluster, choice.reason) == ("us", Reason.PREFIX_HIT)
    # A short prompt is computed sooner than it has travelled.
    assert chosen(Ask(1_000), cluster("eu", rtt_s=0.002), replace(far, cached_bytes=900)).predicted.cluster == "eu"


def test_a_queue_outweighs_a_cached_prefix() -> None:
    busy = cluster("us", wait_s=6.0, cached_bytes=28_000)
    assert chosen(Ask(32_000), cluster("eu"), busy).predicted.cluster == "eu"


def test_a_session_stays_at_home_while_that_is_about_as_good_and_spills_over_when_it_is_not() -> None:
    home = home_of("ann", ["eu", "us"])
    other = "us" if home == "eu" else "eu"
    ask = Ask(4_000, session="ann")
    assert chosen(ask, cluster(home, rtt_s=0.02), cluster(other)).predicted.cluster == home
    assert chosen(ask, cluster(home, rtt_s=0.02), cluster(other)).reason is Reason.SESSION
    full = chosen(ask, cluster(home, room=0), cluster(other))
    assert (full.predicted.cluster, full.reason) == (other, Reason.SPILL_OVER)
    assert chosen(ask, cluster(home, wait_s=3.0), cluster(other)).predicted.cluster == other


def test_another_cluster_goes_first_after_a_failure_then_another_frontend_of_the_same() -> None:
    both = [cluster("eu"), replace(cluster("eu"), endpoint="eu/1"), cluster("us", wait_s=9.0)]
    choice = chosen(Ask(100, excluded=frozenset({"eu/0"}), avoided=frozenset({"eu"})), *both)
    assert (choice.predicted.endpoint, choice.reason) == ("us/0", Reason.FAILOVER)
    choice = chosen(Ask(100, excluded=frozenset({"eu/0", "us/0"}), avoided=frozenset({"eu", "us"})), *both)
    assert choice.predicted.endpoint == "eu/1"


def test_several_global_frontends_do_not_all_choose_the_same_of_equals() -> None:
    equals = [cluster(name) for name in ("eu", "us", "ap")]
    assert len({chosen(Ask(100), *equals, tie=f"global-{n}").predicted.cluster for n in range(40)}) == 3
