"""What the comparison of the simulated engine with the real one reports."""

from __future__ import annotations

from benchmarks.arrivals import Driven
from benchmarks.load import Answer
from benchmarks.server import CpuUse
from benchmarks.simulated_engine import Plan, draw, summary, targets


def driven(ttft_s: float, gap_s: float) -> Driven:
    answer = Answer(3, sent_s=1.0, arrivals_s=[1.0 + ttft_s, 1.0 + ttft_s + gap_s, 1.0 + ttft_s + 2 * gap_s])
    return Driven((answer, None), ("it was busy",), 0.0, CPU)


CPU = CpuUse(**dict.fromkeys(CpuUse.__dataclass_fields__, 0.0))


def test_both_engines_get_the_same_requests_at_the_same_times() -> None:
    plan = Plan(requests=10)
    assert draw(plan, range(100)) == draw(plan, range(100))
    assert sorted(len(one.token_ids) for one in draw(plan, range(100))) == sorted(plan.lengths * 2)
    assert len(draw(plan, range(100), 3)) == 3


def test_an_engine_is_off_by_the_share_of_the_real_one() -> None:
    ttft, itl = targets(summary("vllm", driven(1.0, 0.1)), summary("simulated", driven(1.1, 0.08)))
    assert (round(ttft.value or 0, 6), ttft.met) == (0.1, True)
    assert (round(itl.value or 0, 6), itl.met) == (0.2, False)


def test_failures_are_counted() -> None:
    assert summary("vllm", driven(1.0, 0.1)).failed == 1
