"""The worker's half of the connector over two real agents: what each step publishes, receives and reports."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from kv_transfer.board import Outcome
from kv_transfer.handoff import Handoff
from kv_transfer.permits import Permit
from kv_transfer.scheduler_side import Hold, Load, Send, Step
from kv_transfer.worker_side import Results, WorkerSide, regions_by_layer
from tests.support.kv_node import DEADLINE_S, KvNode, new_handoff
from tests.support.kv_stranger import identity, token

LAYERS = {"layers.0": (0, 1), "layers.1": (1, 2), "layers.2": (2, 4)}
IDS, TARGETS = [9, 3, 4], [7, 20, 21]


class Worker:
    """A node under a `WorkerSide`, stepped as vLLM does."""

    def __init__(self, node: KvNode, *, by_layer: bool = True) -> None:
        self.node = node
        self.side = WorkerSide(node.agent, node.memory, regions=LAYERS, by_layer=by_layer)
        self.results = Results()

    def step(self, step: Step | None = None) -> Results:
        step = step or Step()
        for send in step.sends:  # the scheduler says so when the request comes
            permit = Permit(send.handoff_id, token(send.handoff_id.hex()), identity("node").public)
            step.expects.append(permit)
        self.side.begin(step)
        for layer in LAYERS:
            self.side.layer_done(layer)
        self.side.forward_done()
        results = self.side.poll()
        self.results.ended |= results.ended
        self.results.received |= results.received
        self.results.failed |= results.failed
        self.results.started |= results.started
        self.results.reports |= results.reports
        return results

    def until(self, done: Callable[[Results], bool]) -> None:
        until_s = time.monotonic() + DEADLINE_S
        while not done(self.results):
            assert time.monotonic() < until_s, self.results
            self.step()


@pytest.fixture
def worker(make: Callable[..., KvNode]) -> Callable[..., Worker]:
    return lambda **options: Worker(make(), **options)


def a_send(handoff: str, first: int, end: int, *, begin: bool = False, ready: int = 0, final: bool = False) -> Send:
    return Send(bytes.fromhex(handoff), (48, 7) if begin else None, IDS, ready, first, end, final)


def a_hold(handoff: str) -> Hold:
    return Hold("p", bytes.fromhex(handoff))


def to_receive(handoff: str, sender: Worker) -> Handoff:
    key = identity("node").public
    return Handoff(bytes.fromhex(handoff), sender.node.address, sender.node.epoch, key, token(handoff))


@pytest.mark.parametrize("by_layer", [True, False], ids=["layer by layer", "after each step"])
def test_a_prompt_goes_from_worker_to_worker_while_it_is_computed(
    worker: Callable[..., Worker], by_layer: bool
) -> None:
    sender, receiver = worker(by_layer=by_layer), worker()
    handoff = new_handoff()
    receiver.step(Step(opens=[("d", to_receive(handoff, sender))]))
    sender.step(Step(tokens=20, sends=[a_send(handoff, 1, 1, begin=True, ready=1)]))
    receiver.until(lambda results: "d" in results.started)
    assert receiver.results.started == {"d": (48, 7)}
    receiver.step(Step(loads=[Load("d", 0, TARGETS)]))
    sender.step(Step(tokens=20, sends=[a_send(handoff, 1, 2)]))
    assert receiver.results.received == set()
    sender.step(Step(tokens=8, sends=[a_send(handoff, 2, 3, final=True)]))
    sender.step(Step(holds=[a_hold(handoff)]))
    receiver.until(lambda results: bool(results.received))
    report = receiver.results.reports["d"]
    assert (receiver.results.received, receiver.results.failed) == ({"d"}, set())
    assert (report.failure, report.blocks, report.bytes_moved) == ("", 3, 3 * sender.node.block_bytes)
    for target, block in zip(TARGETS, IDS, strict=True):
        assert receiver.node.holds(target, f"{sender.node.epoch}-{block}")

    sender.until(lambda results: bool(results.ended))
    assert sender.results.ended == {"p": Outcome.TAKEN}
    assert sender.node.census().handoffs == 0


def test_a_receiver_that_gives_up_releases_the_lease(worker: Callable[..., Worker]) -> None:
    sender, receiver = worker(), worker()
    handoff = new_handoff()
    receiver.step(Step(opens=[("d", to_receive(handoff, sender))]))
    sender.step(Step(tokens=48, sends=[a_send(handoff, 0, 2, begin=True)]))
    receiver.until(lambda results: "d" in results.started)
    receiver.step(Step(loads=[Load("d", 0, TARGETS)]))
    receiver.step(Step(cancels=["d"]))
    receiver.until(lambda results: bool(results.received))
    assert receiver.results.failed == {"d"}
    assert receiver.results.reports["d"].failure == "cancelled"
    sender.step(Step(holds=[a_hold(handoff)]))
    sender.until(lambda results: bool(results.ended))
    assert sender.results.ended == {"p": Outcome.RELEASED}


@pytest.mark.parametrize("outcome", [Outcome.RELEASED, Outcome.EXPIRED])
@pytest.mark.parametrize("at_once", [True, False], ids=["in the same step", "later"])
def test_a_lease_that_ends_frees_the_blocks_and_tells_the_receiver(
    worker: Callable[..., Worker], outcome: Outcome, at_once: bool
) -> None:
    sender, receiver = worker(), worker()
    handoff = new_handoff()
    receiver.step(Step(opens=[("d", to_receive(handoff, sender))]))
    sender.step(Step(tokens=48, sends=[a_send(handoff, 0, 2, begin=True)]))
    receiver.until(lambda results: "d" in results.started)
    receiver.step(Step(loads=[Load("d", 0, TARGETS)]))
    over = [("p", outcome)]
    assert sender.step(Step(holds=[a_hold(handoff)], over=over if at_once else [])).ended == (
        {"p": outcome} if at_once else {}
    )
    assert sender.step(Step(over=[] if at_once else over)).ended == ({} if at_once else {"p": outcome})
    receiver.until(lambda results: bool(results.received))
    assert receiver.results.reports["d"].failure == "lease_ended"


def test_the_end_of_a_lease_that_was_taken_meanwhile_changes_nothing(worker: Callable[..., Worker]) -> None:
    sender, receiver = worker(), worker()
    handoff = new_handoff()
    sender.step(Step(tokens=48, sends=[a_send(handoff, 0, 3, begin=True, final=True)]))
    sender.step(Step(holds=[a_hold(handoff)]))
    assert receiver.node.fetch(handoff, sender.node.address, sender.node.epoch, TARGETS).error == ""
    sender.until(lambda results: bool(results.ended))
    assert sender.results.ended == {"p": Outcome.TAKEN}
    assert sender.step(Step(over=[("p", Outcome.EXPIRED)])).ended == {}
    assert sender.side._over == {}


def test_a_load_of_a_handoff_that_has_failed_before_is_reported_as_failed(worker: Callable[..., Worker]) -> None:
    receiver = worker()
    gone = Handoff(bytes(16), "127.0.0.1:1", 1, identity("node").public, bytes(32))
    receiver.step(Step(opens=[("d", gone)]))
    receiver.until(lambda results: "d" in results.reports)
    assert receiver.results.received == set()  # it had no blocks
    results = receiver.step(Step(loads=[Load("d", 0, TARGETS)]))
    assert (results.received, results.failed) == ({"d"}, {"d"})


def test_a_cancelled_wait_without_blocks_is_no_receive(worker: Callable[..., Worker]) -> None:
    sender, receiver = worker(), worker()
    receiver.step(Step(opens=[("d", to_receive(new_handoff(), sender))]))
    receiver.step(Step(cancels=["d"]))
    receiver.until(lambda results: "d" in results.reports)
    assert receiver.results.received == set()


def test_a_preempted_prompt_begins_anew(worker: Callable[..., Worker]) -> None:
    sender, receiver = worker(), worker()
    handoff = new_handoff()
    receiver.step(Step(opens=[("d", to_receive(handoff, sender))]))
    sender.step(Step(tokens=20, sends=[a_send(handoff, 0, 1, begin=True)]))
    receiver.until(lambda results: "d" in results.started)
    sender.side.begin(Step(resets=[bytes.fromhex(handoff)]))
    sender.node.write(IDS[0], "another prompt")
    sender.node.write(IDS[0], "computed again")
    sender.step(Step(tokens=48, sends=[a_send(handoff, 0, 3, begin=True, final=True)]))
    receiver.step(Step(loads=[Load("d", 0, TARGETS)]))
    receiver.until(lambda results: bool(results.received))
    assert receiver.results.failed == set()
    assert receiver.node.holds(TARGETS[0], "computed again")


def test_an_aborted_prompt_ends_the_receivers_wait(worker: Callable[..., Worker]) -> None:
    sender, receiver = worker(), worker()
    handoff = new_handoff()
    receiver.step(Step(opens=[("d", to_receive(handoff, sender))]))
    sender.step(Step(tokens=20, sends=[a_send(handoff, 0, 1, begin=True)]))
    receiver.until(lambda results: "d" in results.started)
    sender.step(Step(ends=[(bytes.fromhex(handoff), "lease_ended")]))
    receiver.until(lambda results: "d" in results.reports)
    assert receiver.results.reports["d"].failure == "lease_ended"


def test_what_is_taken_before_its_lease_is_held_is_forgotten_with_it(worker: Callable[..., Worker]) -> None:
    """Taken, and aborted before the event was looked at: nothing of it stays in memory."""
    sender, receiver = worker(), worker()
    handoff = new_handoff()
    sender.step(Step(tokens=48, sends=[a_send(handoff, 0, 3, begin=True, final=True)]))
    assert receiver.node.fetch(handoff, sender.node.address, sender.node.epoch, TARGETS).error == ""
    assert sender.node.agent.news.wait(DEADLINE_S)
    sender.side.begin(Step(ends=[(bytes.fromhex(handoff), "lease_ended")]))
    sender.step()
    assert sender.side._taken == {}


def test_regions_follow_the_layers_order() -> None:
    assert regions_by_layer(["a", "b"], 2) == {"a": (0, 1), "b": (1, 2)}
    assert regions_by_layer(["a", "b"], 4) == {"a": (0, 2), "b": (2, 4)}
    assert regions_by_layer([], 0) == {}
