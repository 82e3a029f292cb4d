"""Questions to a simulator in a process of its own: the control plane's event loop goes on, whatever they cost.

The planner does not know the simulator: whoever starts the control plane says which command answers. It reads one
line of JSON, `{"question": ..., "request": ..., "timeout_s": ...}`, and writes lines with one of `update`, `result` and
`error` each.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from slipstream import telemetry
from slipstream.child_python import module_path
from slipstream.errors import DeadlineError, InvalidRequestError, OverloadedError, SlipstreamError, UnavailableError

log = telemetry.get_logger(__name__)

MOST_TIMEOUT_S = 600.0
MAX_LINE_BYTES = 32 << 20
END_GRACE_S = 5.0

Answer = Mapping[str, Any]


class WhatIf:
    """Asks one question at a time.

    Args:
        command: program and arguments; none: there is no simulator.
    """

    def __init__(self, command: Sequence[str] = ()) -> None:
        self._command = command
        self._busy = False

    async def ask(self, question: str, request: Mapping[str, object], timeout_s: float) -> AsyncGenerator[Answer, None]:
        """What the simulator writes: updates, then one result. Leave the generator, and the process is ended.

        Raises:
            UnavailableError: there is no simulator, or it died. OverloadedError: it is busy with another question.
            InvalidRequestError: the question is wrong. DeadlineError: it took too long.
        """
        if not self._command:
            raise UnavailableError("this control plane was started without a simulator")
        if self._busy:
            raise OverloadedError("another simulation runs on this control plane, which runs one", retry_after_s=10.0)
        self._busy = True
        try:
            async with asyncio.timeout(min(timeout_s, MOST_TIMEOUT_S)):
                process = await self._start()
                try:
                    await _write(process, {"question": question, "request": request, "timeout_s": timeout_s})
                    async for answer in _answers(process):
                        yield answer
                finally:
                    await _end(process)
        except TimeoutError:
            raise DeadlineError(f"the simulation did not end within {min(timeout_s, MOST_TIMEOUT_S):g} s") from None
        finally:
            self._busy = False

    async def _start(self) -> asyncio.subprocess.Process:
        environ = {**os.environ, "PYTHONPATH": module_path(os.environ)}
        try:
            return await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=environ,
                start_new_session=True,  # a Ctrl-C is for the control plane, which ends this one
                limit=MAX_LINE_BYTES,
            )
        except OSError as error:
            raise UnavailableError(f"the simulator cannot be started: {error}") from None


async def _write(process: asyncio.subprocess.Process, line: Mapping[str, object]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(line).encode() + b"\n")
    # One that died already is seen when it does not answer.
    with suppress(ConnectionError):
        await process.stdin.drain()
    process.stdin.close()


async def _answers(process: asyncio.subprocess.Process) -> AsyncGenerator[Answer, None]:
    assert process.stdout is not None
    async for line in process.stdout:
        answer: Answer = json.loads(line)
        if "error" in answer:
            raise _error(answer["error"])
        yield answer
        if "result" in answer:
            return
    raise UnavailableError(f"the simulator ended without an answer (status {await process.wait()}); its log says why")


def _error(told: Mapping[str, Any]) -> SlipstreamError:
    return InvalidRequestError(told["message"], param=told.get("param"))


async def _end(process: asyncio.subprocess.Process) -> None:
    """It computes and holds nothing: it is killed."""
    if process.returncode is None:
        process.kill()
    try:
        async with asyncio.timeout(END_GRACE_S):
            await process.wait()
    except TimeoutError:
        log.warning("simulator_not_ended", pid=process.pid)
