"""What a global frontend makes of what clusters say, and of what it sends there itself."""

from __future__ import annotations

import msgspec
import pytest

from frontend.cluster_state import ClusterState, ModelState
from frontend.clusters.breaker import Breaker, Health
from frontend.clusters.known import OWN_NAMES_KEPT_S, KnownFrontend, candidate
from frontend.prefix_names import encoded, names_of

PROMPT = b"You are a patient teacher of physics. " * 200
NAMES = names_of("sim", PROMPT)


def state(**more: object) -> ClusterState:
    model = ModelState("sim", 8192, 2, 2, 0, [(1, 0.1), (512, 0.6)], {"batch": 4.0}, {}, {"realtime": 5, "batch": 0})
    whole = ClusterState("f1", ready=True, draining=False, took_s=0.001, global_frontends=1, models=[model])
    return msgspec.structs.replace(whole, **more)


def heard(**more: object) -> KnownFrontend:
    known = KnownFrontend("eu/0", "eu", limit=8)
    known.heard(state(**more), 10.0, 10.021)
    return known


def test_it_is_up_until_nothing_is_heard_for_too_long() -> None:
    known = heard()
    assert known.rtt_s == pytest.approx(0.02)
    assert known.usable(Breaker(), 14.0, 5.0) is Health.UP
    assert known.usable(Breaker(), 15.1, 5.0) is Health.DOWN
    assert KnownFrontend("us/0", "us", 8).usable(Breaker(), 0.0, 5.0) is Health.DOWN


def test_one_that_drains_is_not_ready_or_refuses_the_key_gets_nothing() -> None:
    assert heard(draining=True).usable(Breaker(), 11.0, 5.0) is Health.DOWN
    assert heard(ready=False).usable(Breaker(), 11.0, 5.0) is Health.DOWN
    known = heard()
    known.silent("wrong key", refused=True)
    assert known.usable(Breaker(), 11.0, 5.0) is Health.DOWN
    known.heard(state(), 12.0, 12.02)
    assert known.usable(Breaker(), 12.1, 5.0) is Health.UP


def test_what_was_sent_since_it_spoke_counts_until_it_speaks_again_and_for_the_other_global_frontends_too() -> None:
    alone, with_others = heard(), heard(global_frontends=4)
    for known in (alone, with_others):
        known.begin(0.6, 10.5)
    assert alone.fresh_s(2) == pytest.approx(0.3)
    assert with_others.fresh_s(2) == pytest.approx(1.2)
    alone.heard(state(), 11.0, 11.02)
    assert alone.fresh_s(2) == 0.0


def test_one_late_answer_is_not_taken_for_a_long_way() -> None:
    known = heard()
    known.heard(state(), 11.0, 14.0)
    assert known.rtt_s < 0.04


def test_what_it_says_is_cached_counts_and_what_was_computed_there_a_moment_ago_too() -> None:
    known = heard(prefixes=encoded(NAMES.names[:3]), prefixes_version=1)
    assert known.cached_bytes(NAMES, 11.0) == 3 * 256
    # No news about the prefixes leaves them as they were.
    known.heard(state(prefixes_version=1), 12.0, 12.02)
    assert known.cached_bytes(NAMES, 12.1) == 3 * 256
    known.answered(NAMES, 13.0)
    assert len(PROMPT) * 8 / 9 <= known.cached_bytes(NAMES, 13.1) <= len(PROMPT)
    assert known.cached_bytes(NAMES, 13.0 + OWN_NAMES_KEPT_S) == 3 * 256


def test_a_restarted_frontend_has_nothing_of_what_was_computed_before() -> None:
    known = heard()
    known.answered(NAMES, 11.0)
    known.heard(state(frontend_id="f2", prefixes=""), 12.0, 12.02)
    assert known.cached_bytes(NAMES, 12.1) == 0


def test_a_candidate_has_the_wait_and_the_room_of_its_class_and_is_down_for_models_it_does_not_serve() -> None:
    known = heard()
    about = {"stale_after_s": 5.0, "in_flight": 5, "cached_bytes": 0}
    batch = candidate(known, Breaker(), "sim", "batch", 11.0, **about)  # type: ignore[arg-type]
    assert (batch.wait_s, batch.room) == (4.0, 0)
    realtime = candidate(known, Breaker(), "sim", "realtime", 11.0, **about)  # type: ignore[arg-type]
    assert (realtime.wait_s, realtime.room, realtime.health) == (0.0, 3, Health.UP)
    other = candidate(known, Breaker(), "other", "realtime", 11.0, **about)  # type: ignore[arg-type]
    assert other.health is Health.DOWN
