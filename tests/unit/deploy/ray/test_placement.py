"""Which node a worker gets, and until when one on a node that will go may wait. Ray itself is not needed for either."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from deploy.ray.draining import DrainingNodes, leave_at_s
from deploy.ray.nodes import RayNode
from deploy.ray.placement import choose_node, describe_bundle, describe_room
from slipstream.v1.registry_pb2 import ROLE_DECODE, ROLE_PREFILL, Role

GPU_WORKER = {"CPU": 2.0, "GPU": 1.0}


def node(name: str, *, cpus: float = 8, gpus: float = 4, used: float = 0, gone_at_s: float | None = None) -> RayNode:
    total = {"CPU": cpus, "GPU": gpus}
    free = {"CPU": cpus - 2 * used, "GPU": gpus - used}
    return RayNode(name, f"host-{name}", total, free, gone_at_s)


def place(count: int, nodes: list[RayNode], role: Role.ValueType, placed: list[tuple[str, Role.ValueType]]) -> None:
    for _ in range(count):
        chosen = choose_node(nodes, GPU_WORKER, role, placed)
        assert chosen is not None
        placed.append((chosen, role))


@given(prefill=st.integers(1, 4), decode=st.integers(1, 4), nodes=st.integers(1, 4))
def test_each_role_is_spread_as_evenly_as_it_can_be(prefill: int, decode: int, nodes: int) -> None:
    there, placed = [node(f"n{number}") for number in range(nodes)], list[tuple[str, Role.ValueType]]()
    place(prefill, there, ROLE_PREFILL, placed)
    place(decode, there, ROLE_DECODE, placed)
    for role in (ROLE_PREFILL, ROLE_DECODE):
        counts = [placed.count((one.node_id, role)) for one in there]
        assert max(counts) - min(counts) <= 1


def test_one_of_each_role_is_on_a_node_of_its_own() -> None:
    nodes, placed = [node("a"), node("b")], list[tuple[str, Role.ValueType]]()
    place(1, nodes, ROLE_PREFILL, placed)
    place(1, nodes, ROLE_DECODE, placed)
    assert {name for name, _ in placed} == {"a", "b"}


def test_a_node_without_room_or_about_to_go_is_not_chosen() -> None:
    nodes = [node("full", used=4), node("going", gone_at_s=math.inf), node("free", used=3)]
    assert choose_node(nodes, GPU_WORKER, ROLE_DECODE, [("free", ROLE_DECODE)] * 3) == "free"
    assert choose_node(nodes[:2], GPU_WORKER, ROLE_DECODE, []) is None


def test_people_are_told_what_was_asked_and_what_there_is() -> None:
    assert describe_bundle(GPU_WORKER) == "2 CPU + 1 GPU"
    nodes = [node("a", used=4), node("b", gone_at_s=5.0)]
    assert describe_room(nodes, {"GPU": 1.0}) == "host-a: 0 of 4 GPU free; host-b (draining): 4 of 4 GPU free"
    assert describe_room([], GPU_WORKER) == "no node is alive"


@given(
    announced_s=st.floats(0, 1e9),
    notice_s=st.floats(0, 1e5),
    drain_timeout_s=st.floats(0, 3600),
    start_limit_s=st.floats(1, 7200),
)
def test_a_worker_leaves_before_its_node_is_gone_and_gives_its_replacement_half_of_a_short_notice(
    announced_s: float, notice_s: float, drain_timeout_s: float, start_limit_s: float
) -> None:
    gone_at_s = announced_s + notice_s
    leave_s = leave_at_s(announced_s, gone_at_s, drain_timeout_s=drain_timeout_s, start_limit_s=start_limit_s)
    assert announced_s <= leave_s + 1e-3
    assert leave_s <= gone_at_s
    waits_s = leave_s - announced_s
    assert waits_s >= min(notice_s / 2, start_limit_s) - 1e-3


def test_a_node_that_goes_at_no_known_time_is_left_when_a_replacement_should_long_be_there() -> None:
    assert leave_at_s(100.0, math.inf, drain_timeout_s=30.0, start_limit_s=300.0) == 400.0


def test_the_notice_counts_from_when_it_was_first_seen() -> None:
    draining = DrainingNodes(drain_timeout_s=30.0, start_limit_s=300.0)
    going = [node("a", gone_at_s=1120.0), node("b")]
    assert draining.look(going, 1000.0) == {"a": 1085.0}
    assert draining.look(going, 1050.0) == {"a": 1085.0}
    assert draining.look([node("a"), node("b")], 1060.0) == {}
