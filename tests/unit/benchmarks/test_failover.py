"""When latencies count as back to normal after a loss, and what is taken for wrong."""

from __future__ import annotations

from benchmarks import failover, failover_windows
from benchmarks.arrivals import Driven
from benchmarks.failover import Loss, Plan, report, whole
from benchmarks.failover_windows import recovery, windows
from benchmarks.load import Answer
from benchmarks.report import machine
from benchmarks.server import CpuUse
from slipstream.v1.registry_pb2 import Role, WorkerRecord

CALM = dict.fromkeys(range(-20, 0), 100.0)
PLAN = Plan("local", 3, 1, "p", 1.0, 4, 3, 0.0, 20.0, 20.0)


def answer(sent_s: float, *arrivals_s: float, text: str = "a b c", **account: int) -> Answer:
    return Answer(
        4, sent_s, arrivals_s[-1], list(arrivals_s), len(arrivals_s), completion_tokens=3, text=text, account=account
    )


def test_a_token_belongs_to_the_second_in_which_it_came() -> None:
    seen = windows([answer(9.2, 9.5, 9.7, 12.0)], lost_s=10.0)
    assert seen.ttft_p99_ms == {-1: 300.0}
    assert seen.itl_p99_ms == {-1: 200.0, 2: 2300.0}


def test_normal_is_a_fifth_more_than_the_median_before_or_what_was_usual_then() -> None:
    after = dict.fromkeys(range(20), 119.0)
    assert recovery(CALM | after, -20, 19).back_s == 0
    rough = CALM | dict.fromkeys(range(-20, 0, 4), 300.0)
    assert recovery(rough | after, -20, 19).limit_ms == 300.0


def test_it_is_back_when_it_stays_so_but_for_odd_seconds() -> None:
    after = dict.fromkeys(range(20), 100.0)
    for bad in (0, 1, 2, 4, 6, 12):
        after[bad] = 500.0
    found = recovery(CALM | after, -20, 19)
    assert found.back_s == 3
    assert found.worst_ms == 500.0


def test_what_comes_back_and_goes_again_was_not_back() -> None:
    after = dict.fromkeys(range(20), 100.0) | dict.fromkeys(range(9, 13), 200.0)
    assert recovery(CALM | after, -20, 19).back_s == 13


def test_seconds_in_which_nothing_came_are_not_normal() -> None:
    assert recovery(CALM | dict.fromkeys(range(8, 20), 100.0), -20, 19).back_s == 7.0 + 1
    assert recovery(CALM, -20, 19).back_s is None


def test_what_never_comes_back_is_never_back() -> None:
    found = recovery(CALM | dict.fromkeys(range(20), 130.0), -20, 19)
    assert found.back_s is None
    assert failover_windows.NORMAL == 1.2


def test_restarted_workers_replace_those_that_were_lost() -> None:
    def worker(name: str, role: Role.ValueType, epoch: int = 1) -> WorkerRecord:
        return WorkerRecord(worker_id=name, role=role, epoch=epoch)

    before = [worker("p0", Role.ROLE_PREFILL), worker("d0", Role.ROLE_DECODE), worker("d1", Role.ROLE_DECODE)]
    assert not whole(before, before, ["d0"])
    assert not whole(before, [before[0], before[2]], ["d0"])
    assert whole(before, [before[0], worker("d0", Role.ROLE_DECODE, 2), before[2]], ["d0"])
    assert whole(before, [before[0], worker("d7", Role.ROLE_DECODE), before[2]], ["d0"])
    assert not whole(before, [before[0], worker("d7", Role.ROLE_PREFILL), before[2]], ["d0"])


def test_failed_wrong_and_cut_answers_are_counted_apart() -> None:
    good = [answer(at_s, at_s + 0.1, at_s + 0.2, at_s + 0.3) for at_s in range(40)]
    wrong, cut = answer(5.0, 5.1, 5.2, 5.3, text="a b d", migrations=1), answer(6.0, 6.1, 6.2, 6.3)
    cut.completion_tokens = 2
    driven = Driven((*good, wrong, cut, None), ("lost",), 0.001, CpuUse(40.0, 1.0, 1.0, 8.0))
    calm = ["a b c"] * 43
    found = report(machine(), PLAN, driven, calm, Loss(20.0, ("d0",), 6.0), {})
    seen = found.outcome
    assert (seen.requests, seen.failed, seen.wrong, seen.cut, seen.moved) == (43, 1, 1, 1, 1)
    assert [target.met for target in found.targets] == [False, False, True, True]
    assert {target.target for target in found.targets} == {failover._NONE_FAILED, failover._NORMAL}
