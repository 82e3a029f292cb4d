"""What a frontend tells of the workers' speed: factors that it has really seen, once."""

from __future__ import annotations

from frontend.router.speeds import COLD_SAMPLES
from frontend.worker_speeds import WorkerSpeeds
from slipstream.v1.registry_pb2 import Role
from tests.unit.frontend.router.workers import fast_worker, fleet_of


def test_a_worker_is_told_of_when_it_has_shown_something_new() -> None:
    fleet = fleet_of([fast_worker("d0", Role.ROLE_DECODE), fast_worker("d1", Role.ROLE_DECODE)])
    speeds, one = WorkerSpeeds(fleet), fleet.get("d0")
    assert one is not None
    assert speeds.take() == []
    for _ in range(COLD_SAMPLES + 6):
        one.step.note(0.030, 0.015)
    (told,) = speeds.take()
    assert (told.worker_id, told.epoch, told.samples) == ("d0", one.record.epoch, COLD_SAMPLES + 6)
    assert 1.5 < told.step_factor <= 2.001
    assert told.prompt_factor == 0.0, "nothing was seen of its prompts"
    assert speeds.take() == [], "once"
