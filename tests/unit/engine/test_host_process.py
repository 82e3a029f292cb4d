"""The process around an engine, with an engine that never finishes to load: its end must come all the same."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_model import make_tiny_tokenizer

# `time.sleep` stands for an import or a load of weights: neither hears a signal, and the event loop must not wait.
PROGRAM = """
import sys, time
from engine import host_process
from slipstream.settings import Settings
from slipstream.v1.registry_pb2 import Role

def load(self, model_path, board):
    print("loading", board.path, flush=True)
    time.sleep(60)

host_process._Host._load_engine = load
settings = Settings(model=sys.argv[1], worker={"start_timeout_s": float(sys.argv[2])})
host_process.run(settings, Role.ROLE_DECODE, lambda *service: ())
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    make_tiny_tokenizer(folder)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")  # no tensors
    return folder


def start(model: Path, *, start_timeout_s: float) -> tuple[subprocess.Popen[str], Path]:
    """The worker once it loads, and its lease board."""
    worker = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(model), str(start_timeout_s)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout is not None
    word, _, board = worker.stdout.readline().strip().partition(" ")
    if word != "loading":
        worker.kill()
        pytest.fail(f"the worker did not begin to load: {worker.communicate()[1]}")
    return worker, Path(board)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_stopped_while_it_loads_ends_at_once_and_leaves_no_board(model: Path, number: signal.Signals) -> None:
    worker, board = start(model, start_timeout_s=60)
    assert board.exists()
    worker.send_signal(number)
    _, log = worker.communicate(timeout=20)
    assert worker.returncode == 0, log
    assert "load_abandoned" in log
    assert not board.exists()


def test_a_load_that_takes_too_long_ends_the_worker_and_says_so(model: Path) -> None:
    worker, board = start(model, start_timeout_s=0.2)
    _, log = worker.communicate(timeout=20)
    assert worker.returncode == 1
    assert "did not load within 0.2 s (worker.start_timeout_s)" in log
    assert not board.exists()


FETCHING = """
import sys, time
from engine import host_process, loading
from slipstream.settings import Settings
from slipstream.v1.registry_pb2 import Role

def fetch(settings, environ):
    print("fetching", flush=True)
    time.sleep(60)

loading.local_model = fetch
host_process.run(Settings(model="org/name"), Role.ROLE_DECODE, lambda *service: ())
"""


def test_a_worker_stopped_while_it_fetches_its_model_ends_at_once() -> None:
    command = [sys.executable, "-c", FETCHING]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "fetching\n"
        worker.send_signal(signal.SIGTERM)
        _, log = worker.communicate(timeout=20)
    assert worker.returncode == 0, log
    assert "load_abandoned" in log
