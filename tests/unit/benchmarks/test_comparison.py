"""What is made of the samples: the promised targets, word for word, and the shape of the JSON."""

from __future__ import annotations

import json

import pytest

from benchmarks.comparison import ITL_TARGET, Seen, Settings, report
from benchmarks.load import Answer
from benchmarks.phases import Interference, Sequential
from benchmarks.report import Machine, below, equals, machine, ratio, to_json
from benchmarks.samples import Window
from benchmarks.server import CpuUse, Server

MACHINE = Machine("2026-01-01", "a CPU", 2, 8.0, "6.1", "3.11", 0.0, {})
SETTINGS = Settings(model="a-model", dtype="float32", lengths=(100,))


def seen(name: str, disturbed_s: float, *, requests: int = 20, account: dict[str, float] | None = None) -> Seen:
    answers = tuple(
        Answer(100, sent_s=0.0, ended_s=2.0, arrivals_s=[1.0, 1.5, 2.0], completion_tokens=3, account=account)
        for _ in range(requests)
    )
    cpu = CpuUse(wall_s=10.0, server_s=5.0, client_s=1.0, others_s=2.0)
    interference = Interference(
        disturbed_s=[disturbed_s] * 10, windows=[Window(0.0, 2.0)], arrivals=10, reads=9, cpu=cpu
    )
    server = Server(name, "http://there", "a-model", 1, has_account=account is not None, start_s=1.0)
    return Seen(server, "words", 0.0, Sequential(answers, cpu), interference)


@pytest.mark.parametrize(("cluster_s", "met"), [(0.49, True), (0.5, False), (0.51, False)])
def test_the_target_is_met_below_half_of_the_aggregated_engines_latency(cluster_s: float, met: bool) -> None:
    found = report(SETTINGS, MACHINE, [seen("slipstream", cluster_s), seen("aggregated", 1.0)])

    target = next(target for target in found.targets if target.target == ITL_TARGET)
    assert target.value == pytest.approx(cluster_s)
    assert target.met is met


def test_the_harder_rival_is_compared_too_but_is_not_the_target() -> None:
    systems = [seen("slipstream", 0.1), seen("aggregated", 1.0), seen("small_steps", 0.15)]

    found = report(SETTINGS, MACHINE, systems)

    assert [target.met for target in found.targets] == [True, True, False]  # the last is in accounts, and here are none
    assert [(one.name, one.met) for one in found.comparisons] == [("itl_p99_under_prefill_of_small_steps", False)]


def test_fewer_requests_than_promised_miss_the_target() -> None:
    systems = [seen("slipstream", 0.1, requests=19), seen("aggregated", 1.0, requests=19)]

    found = report(SETTINGS, MACHINE, systems)

    assert [target.met for target in found.targets] == [False, True, False]


def test_the_json_names_each_target_with_value_words_and_verdict() -> None:
    found = json.loads(to_json(report(SETTINGS, MACHINE, [seen("slipstream", 0.1), seen("aggregated", 1.0)])))

    assert found["benchmark"] == "first_light"
    assert all(set(target) == {"name", "value", "target", "met"} for target in found["targets"])
    assert found["machine"]["cores"] == 2
    assert found["settings"]["interference"]["long_prompt_tokens"] == 2000


def test_latencies_speed_and_cpu_are_worked_out() -> None:
    system = report(SETTINGS, MACHINE, [seen("slipstream", 0.1), seen("aggregated", 1.0)]).systems[0]

    latencies = system.by_length["100"]
    assert latencies.ttft is not None
    assert latencies.itl is not None
    assert (latencies.ttft.p50_ms, latencies.itl.p50_ms, latencies.itl.samples) == (1000.0, 500.0, 40)
    assert latencies.tokens_per_s == 1.5
    assert (system.cpu_s_per_request, system.others_cores, system.interference.others_cores) == (0.25, 0.2, 0.2)
    assert (system.interference.came_together, system.interference.tokens_per_s_under_prefill) == (0.1, 5.0)


def test_the_account_tells_where_the_time_to_the_first_token_went() -> None:
    account = {"prefill_s": 0.75, "transfer_s": 0.125, "transfer_exposed_s": 0.0625}

    found = report(SETTINGS, MACHINE, [seen("slipstream", 0.1, account=account), seen("aggregated", 1.0)]).systems

    ways = found[0].all_lengths
    assert (ways.prefill_ms, ways.transfer_ms, ways.exposed_ms) == (750.0, 125.0, 62.5)
    assert ways.rest_of_ttft_ms == 187.5
    assert found[1].all_lengths.prefill_ms is None


def test_a_transfer_that_decode_waits_for_misses_the_target() -> None:
    met = []
    for exposed_s in (0.0125, 0.0126):
        account = {"prefill_s": 0.75, "transfer_s": 0.125, "transfer_exposed_s": exposed_s}
        found = report(SETTINGS, MACHINE, [seen("slipstream", 0.1, account=account), seen("aggregated", 1.0)])
        met.append(found.targets[-1].met)
    assert met == [True, False]


def test_what_was_not_measured_meets_no_target() -> None:
    assert not below("a", None, 1.0, "words").met
    assert not equals("a", None, 1.0, "words").met


def test_a_ratio_to_nothing_is_none() -> None:
    assert [ratio(1.0, 0.0), ratio(None, 1.0), ratio(1.0, None), ratio(1.0, 4.0)] == [None, None, None, 0.25]


def test_the_facts_of_this_machine_are_found() -> None:
    facts = machine()

    assert facts.cores >= 1
    assert facts.memory_gib > 0
    assert facts.versions["grpcio"].startswith("1.")
