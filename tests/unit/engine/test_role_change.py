"""A worker takes another role while it runs: its record says so at once, and all who must hear of it do."""

from __future__ import annotations

import pytest

from engine.host_process import _Host
from slipstream.errors import WorkerDrainingError
from slipstream.settings import Settings
from slipstream.v1.registry_pb2 import Role, WorkerState


class Told:
    """Stands for the registration, the metrics and the paths: what was said to them."""

    def __init__(self) -> None:
        self.pushed = 0
        self.role = Role.ROLE_DECODE
        self.taken: list[Role.ValueType] = []
        self.paths = ()

    def push(self) -> None:
        self.pushed += 1

    def take_role(self, role: Role.ValueType) -> None:
        self.taken.append(role)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def host(told: Told) -> _Host:
    host = _Host(Settings(), Role.ROLE_DECODE, "w")
    host._state = WorkerState.READY
    host._registration = host._metrics = host._path_watch = told  # type: ignore[assignment]
    return host


def test_registry_metrics_and_paths_hear_of_a_new_role(host: _Host, told: Told) -> None:
    epoch = host.record().epoch
    host.set_role(Role.ROLE_PREFILL)
    assert (host.record().role, host.record().epoch, host.record().state) == (
        Role.ROLE_PREFILL,
        epoch,
        WorkerState.READY,
    )
    assert (told.pushed, told.role, told.taken) == (1, Role.ROLE_PREFILL, [Role.ROLE_PREFILL])
    host.set_role(Role.ROLE_PREFILL)
    assert told.pushed == 1, "the role that it has already is no news"


def test_a_worker_that_drains_keeps_its_role(host: _Host, told: Told) -> None:
    host._state = WorkerState.DRAINING
    with pytest.raises(WorkerDrainingError):
        host.set_role(Role.ROLE_PREFILL)
    assert (host.record().role, told.pushed) == (Role.ROLE_DECODE, 0)
