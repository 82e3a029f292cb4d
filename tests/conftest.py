"""What tests of every kind share: the tiny model, and time for those that start a real cluster."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, settings

from tests.support.tiny_model import make_tiny_model

# The same cases in every run, and as long as a busy machine needs, so that a change is judged by what it did. To look
# for new ones: `pytest --hypothesis-profile=default`.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    parent=settings.get_profile("default"),
)
settings.load_profile("repeatable")

# What is started in the background ignores Ctrl-C, and so would every program that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A logged traceback with colours and all locals holds up the event loop for a third of a second.
_plain = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
structlog.configure(processors=[*structlog.get_config()["processors"][:-1], _plain])

_CLUSTER_TESTS = tuple(Path(__file__).parent / name for name in ("e2e", "faults"))
_CLUSTER_TEST_TIMEOUT_S = 400


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(folder in item.path.parents for folder in _CLUSTER_TESTS):
            item.add_marker(pytest.mark.timeout(_CLUSTER_TEST_TIMEOUT_S))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model; needs torch."""
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
