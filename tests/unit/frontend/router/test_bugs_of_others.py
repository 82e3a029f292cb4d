"""What went wrong in other routers, in a loop of virtual time. Numbers are of their issues."""

from __future__ import annotations

import random
from typing import Any

import pytest

from frontend.router import Router
from tests.unit.frontend.router.loop import Arrival, Loop, cluster


def poisson(count: int, per_s: float, *, seed: int = 1, **what: Any) -> list[Arrival]:
    draw, at_s, arrivals = random.Random(seed), 0.0, []
    for _ in range(count):
        at_s += draw.expovariate(per_s)
        arrivals.append(Arrival(at_s, **what))
    return arrivals


def test_one_hot_system_prompt_does_not_send_everything_to_one_worker() -> None:
    """Dynamo 737: every request begins with the same long system prompt, which one worker has first.

    The rate is five times what one worker can do when it has the prefix.
    """
    hot: dict[str, Any] = {"tokens": 3000, "prefix": "system", "prefix_tokens": 2000}
    loop = Loop(cluster(8, 8)).run(poisson(1500, 50.0, **hot))
    counts = [loop.prefills[f"p{index}"] for index in range(8)]
    assert max(counts) < 2 * 1500 / 8
    assert min(counts) > 0
    assert sorted(loop.ttft_s)[1350] < 1.0, "nine of ten begin within a second"


def test_a_prefix_is_followed_while_its_worker_has_time() -> None:
    draw = random.Random(2)
    arrivals = [
        Arrival(one.at_s, 3000, f"session-{draw.randrange(24)}", 2900) for one in poisson(800, 8.0, tokens=3000)
    ]
    followed = Loop(cluster(8, 8)).run(arrivals)
    scattered = Loop(cluster(8, 8), router=lambda: Router("round_robin")).run(arrivals)
    assert sum(followed.ttft_s) < 0.5 * sum(scattered.ttft_s)


@pytest.mark.parametrize(("frontends", "feed_s"), [(2, 0.1), (8, 0.1), (8, 0.5), (8, 1.0)])
def test_several_routers_do_not_run_after_the_same_worker(frontends: int, feed_s: float) -> None:
    """Dynamo 589: all see the same worker become free, and nobody what the others send there."""
    arrivals = poisson(2000, 60.0, tokens=1000)
    spread = [Arrival(one.at_s, one.tokens, frontend=index % frontends) for index, one in enumerate(arrivals)]
    alone, many = Loop(cluster(8, 8)).run(arrivals), Loop(cluster(8, 8), frontends, feed_s).run(spread)
    assert max(many.peak[f"d{index}"] for index in range(8)) <= 2 * max(alone.peak[f"d{index}"] for index in range(8))
    by_worker = [many.prefills[f"p{index}"] for index in range(8)]
    assert max(by_worker) < 1.5 * sum(by_worker) / 8
    assert sorted(many.ttft_s)[1900] < 3 * sorted(alone.ttft_s)[1900]


@pytest.mark.parametrize("shared", [False, True], ids=["own prompts", "one prefix"])
def test_no_decode_worker_is_idle_with_one_prefill_worker(shared: bool) -> None:
    """Dynamo 7836: 1P5D, and some decode workers never got anything."""
    what: dict[str, Any] = {"tokens": 400, "prefix": "system" if shared else "", "prefix_tokens": 300 if shared else 0}
    loop = Loop(cluster(1, 5)).run(poisson(500, 15.0, answer_tokens=100, **what))
    counts = [loop.decodes[f"d{index}"] for index in range(5)]
    assert min(counts) > 0.5 * 500 / 5
    assert max(counts) < 1.5 * 500 / 5


def test_decode_workers_do_not_fill_up_with_prompts_while_prefill_keeps_up() -> None:
    loop = Loop(cluster(4, 4), router=Router).run(poisson(1000, 20.0, tokens=1000))
    assert loop.alone < 50
