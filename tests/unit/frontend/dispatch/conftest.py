"""After each test no request of the dispatcher is open."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prometheus_client import REGISTRY


@pytest.fixture(autouse=True)
def no_request_is_left_open() -> Iterator[None]:
    yield
    assert REGISTRY.get_sample_value("slipstream_frontend_dispatched_requests") == 0
