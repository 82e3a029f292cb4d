"""What is made of four systems' samples: the promise word for word, for each load, and the shape of the JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from benchmarks.arrivals import Driven, Load
from benchmarks.load import Answer
from benchmarks.nixl_pair import Placement
from benchmarks.pd_comparison import AGGREGATED, AS_SHIPPED, NIXL, SLIPSTREAM, TARGET, Seen, Settings, report
from benchmarks.report import Machine, to_json
from benchmarks.server import CpuUse, Server

MACHINE = Machine("2026-01-01", "a CPU", 2, 8.0, "6.1", "3.11", 0.0, {})
SETTINGS = Settings("a-model", "auto", 3, (Load("short", 100, 0.5, 2, 3, busy=True),))
CPU = CpuUse(wall_s=10.0, server_s=12.0, client_s=1.0, others_s=2.0)


def answered(ttft_s: float, gap_s: float, sent_s: float = 0.0, text: str = "x") -> Answer:
    arrivals_s = [sent_s + ttft_s, sent_s + ttft_s + gap_s, sent_s + ttft_s + 2 * gap_s]
    return Answer(100, sent_s, arrivals_s[-1], arrivals_s, completion_tokens=3, text=text)


def seen(answers: Sequence[Answer | None], placements: Sequence[Placement] = ()) -> Seen:
    server = Server("any", "http://there", "m", 1, has_account=False, start_s=1.0)
    return Seen(server, 0.5, {"short": Driven(tuple(answers), (), 0.002, CPU)}, placements)


def fast() -> Seen:
    return seen([answered(0.5, 0.25), answered(0.5, 0.25, sent_s=1.0)])  # 6 tokens in 2 s


def slow() -> Seen:
    return seen([answered(1.0, 0.75), answered(1.0, 0.75, sent_s=1.5)])  # 6 tokens in 4 s


def verdicts(systems: dict[str, Seen]) -> dict[str, tuple[float | None, bool]]:
    found = report(SETTINGS, MACHINE, systems, {})
    assert {target.target for target in found.targets} == {TARGET}
    return {target.name: (target.value, target.met) for target in found.targets}


def test_the_promise_is_kept_at_exactly_half_the_wait_and_twice_the_speed() -> None:
    assert verdicts({SLIPSTREAM: fast(), NIXL: slow(), AGGREGATED: slow()}) == {
        "short_ttft_p50_of_nixl": (0.5, True),
        "short_tokens_per_s_of_nixl": (2.0, True),
        "short_itl_p99_of_aggregated": (pytest.approx(1 / 3), True),
    }


def test_as_good_as_the_rivals_is_not_enough() -> None:
    assert verdicts({SLIPSTREAM: slow(), NIXL: slow(), AGGREGATED: slow()}) == {
        "short_ttft_p50_of_nixl": (1.0, False),
        "short_tokens_per_s_of_nixl": (1.0, False),
        "short_itl_p99_of_aggregated": (1.0, False),
    }


def test_a_load_that_everybody_can_hold_is_not_what_the_promise_is_judged_by() -> None:
    calm = replace(SETTINGS, loads=(replace(SETTINGS.loads[0], busy=False),))

    found = report(calm, MACHINE, {SLIPSTREAM: fast(), NIXL: slow(), AGGREGATED: slow()}, {})

    assert found.targets == []
    assert [one.name for one in found.comparisons][:2] == ["short_ttft_p50_of_nixl", "short_tokens_per_s_of_nixl"]


def test_what_could_not_be_measured_is_not_met_and_says_why() -> None:
    found = report(SETTINGS, MACHINE, {SLIPSTREAM: fast(), AGGREGATED: slow()}, {NIXL: "no network"})

    assert [(target.value is None, target.met) for target in found.targets] == [
        (True, False),
        (True, False),
        (False, True),
    ]
    assert found.skipped == {NIXL: "no network"}


def test_a_request_that_slipstream_fails_spoils_every_figure_of_that_load() -> None:
    ours = seen([answered(0.5, 0.25), None])

    assert set(verdicts({SLIPSTREAM: ours, NIXL: slow(), AGGREGATED: slow()}).values()) == {(None, False)}


def test_a_rivals_failed_request_is_counted_and_left_out_of_its_figures() -> None:
    found = report(SETTINGS, MACHINE, {SLIPSTREAM: fast(), NIXL: seen([None, answered(1.0, 0.5, sent_s=3.0)])}, {})

    load = found.systems[0].loads["short"]
    assert (load.requests, load.failed, load.duration_s, load.tokens_per_s) == (2, 1, 2.0, 1.5)


def test_speed_cpu_and_agreement_are_worked_out() -> None:
    nixl = seen([answered(1.0, 0.75), answered(1.0, 0.75, sent_s=1.5, text="y")])

    load = report(SETTINGS, MACHINE, {SLIPSTREAM: fast(), NIXL: nixl}, {}).systems[0].loads["short"]

    assert load.ttft is not None
    assert load.itl is not None
    assert (load.ttft.p50_ms, load.itl.p99_ms, load.itl.samples) == (1000.0, 750.0, 4)
    assert (load.duration_s, load.tokens_per_s, load.same_answers) == (4.0, 1.5, 1)
    assert (load.cpu_s, load.cpu_s_per_1000_tokens) == (12.0, 2000.0)
    assert (load.client_cores, load.others_cores, load.sent_late_ms) == (0.1, 0.2, 2.0)


def test_a_load_that_other_programs_disturbed_is_named() -> None:
    found = report(SETTINGS, MACHINE, {SLIPSTREAM: fast()}, {})

    assert found.disturbed == {"slipstream short": 0.2}


def test_the_json_has_the_systems_in_the_promises_order_and_where_their_threads_ran() -> None:
    placement = Placement("prefill", "0", {"0": 4, "1": 1}, {"0": 5}, [])
    pair = seen([answered(1.0, 0.75), answered(1.0, 0.75, sent_s=1.5)], [placement])
    systems = {SLIPSTREAM: fast(), AGGREGATED: slow(), NIXL: pair, AS_SHIPPED: pair}

    found = json.loads(to_json(report(SETTINGS, MACHINE, systems, {})))

    assert found["benchmark"] == "pd_vs_nixl"
    assert [system["description"][:3] for system in found["systems"]] == ["(a)", "(b)", "(c)", "(d)"]
    assert all(set(target) == {"name", "value", "target", "met"} for target in found["targets"])
    assert found["systems"][0]["placements"][0]["threads_when_ready"] == {"0": 4, "1": 1}
