"""What admission knows of the workers: from their records, and of what others do there from their feeds."""

from __future__ import annotations

import pytest

from frontend.admission.cluster_room import others_of, room_of
from frontend.admission.in_flight import ClusterRoom, Others
from frontend.router import Fleet
from slipstream.v1.registry_pb2 import Capacity, Load, Role, WorkerRecord, WorkerState


def worker(name: str, role: Role.ValueType, **load: int) -> WorkerRecord:
    capacity = Capacity(max_running=4, blocks=10, block_tokens=16)
    return WorkerRecord(
        worker_id=name, role=role, model="m", state=WorkerState.READY, capacity=capacity, load=Load(**load)
    )


def test_room_is_summed_over_the_workers_and_frontends_are_as_many_as_one_of_them_knows() -> None:
    records = [
        worker("p0", Role.ROLE_PREFILL, frontends=1),
        worker("p1", Role.ROLE_PREFILL, frontends=3),
        worker("d0", Role.ROLE_DECODE, frontends=2, running=2, waiting=1, blocks_used=5),
    ]
    assert room_of(records) == ClusterRoom(2, 1, 4, 160, 3, 80, frontends=3)
    assert room_of([worker("d0", Role.ROLE_DECODE)]).frontends == 1, "of workers that do not tell"


@pytest.mark.parametrize("roles", [{"p": Role.ROLE_PREFILL, "d": Role.ROLE_DECODE}, {"p": Role.ROLE_DECODE}])
def test_workers_that_compute_prompts_of_others_are_counted(roles: dict[str, Role.ValueType]) -> None:
    fleet = Fleet()
    fleet.apply([worker(f"{letter}{number}", role) for letter, role in roles.items() for number in range(3)])
    theirs, ours = Load(running=1, waiting_tokens=500), Load(running=1, waiting_tokens=400)
    both = Load(running=2, waiting_tokens=900)
    fleet.note_load("p0", theirs, Load(), 1.0)
    fleet.note_load("p1", both, ours, 1.0)
    fleet.note_load("p2", ours, ours, 1.0)
    assert others_of(fleet, 2) == Others(frontends=2, prefill_workers=2)
    fleet.note_load("p0", Load(), Load(), 1.1)
    assert others_of(fleet, 2).prefill_workers == 1
