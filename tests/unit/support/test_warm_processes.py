"""Waiting for a process of a test: it has done its work, or the test fails in time and says what the process said."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.support import warm_processes


def works() -> None:
    """Nothing to do."""


def fails() -> None:
    sys.exit(3)


def hangs() -> None:
    time.sleep(600)


def started(target: Callable[[], None]) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=target)
    process.start()
    return process


def finish(process: BaseProcess, folder: Path, limit_s: float) -> None:
    log = folder / "log"
    log.write_text("its last words")
    warm_processes.finish(process, "the engine", log=log, limit_s=limit_s)


def test_one_that_works_is_waited_for(tmp_path: Path) -> None:
    finish(started(works), tmp_path, 60)


def test_one_that_fails_fails_the_test_with_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="the engine failed with 3: its last words"):
        finish(started(fails), tmp_path, 60)


def test_one_that_hangs_is_killed(tmp_path: Path) -> None:
    process = started(hangs)
    with pytest.raises(AssertionError, match=r"the engine did not end within 0.1 s: its last words"):
        finish(process, tmp_path, 0.1)
    assert not process.is_alive()
