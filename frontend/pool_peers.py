"""The members of a pool ask each other for what only one of them knows: what it did with a request.

A client asks for that over a connection of its own, which the kernel gives to any member. So each of them listens on
a Unix socket in the pool's private folder: a request's id comes in, as a line of JSON, and what is known of it goes
out.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from frontend.explanation import Explainer, Explanation, joined
from slipstream import telemetry
from slipstream.errors import StartupError

log = telemetry.get_logger(__name__)

_SUFFIX = ".peer"
_ANSWER_TIMEOUT_S = 2.0
"""How long a member may take; one that does not answer by then is left out."""


@contextlib.asynccontextmanager
async def answering(folder: Path, explainer: Explainer) -> AsyncIterator[PoolPeers]:
    """This process answers the others of the folder while the block runs, and can ask them.

    Raises:
        StartupError: the folder's name is too long for a socket.
    """
    path = _socket(folder, os.getpid())
    path.unlink(missing_ok=True)  # of one that was killed and had the same process id

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Whoever asked may have left, or never said anything.
        with contextlib.suppress(OSError, TimeoutError, ValueError, msgspec.MsgspecError), contextlib.closing(writer):
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                request_id = msgspec.json.decode(await reader.readline(), type=str)
                writer.write(msgspec.json.encode(explainer.of(request_id)))
                await writer.drain()

    try:
        server = await asyncio.start_unix_server(answer, path)
    except OSError as error:
        raise StartupError(f"cannot listen on {path} ({error}); set TMPDIR to a folder with a shorter name") from error
    try:
        yield PoolPeers(path, explainer)
    finally:
        server.close()
        path.unlink(missing_ok=True)


def member_pids(folder: Path) -> list[int]:
    """The members that answer now, and such as were killed a moment ago."""
    return sorted(int(path.stem) for path in folder.glob(f"*{_SUFFIX}"))


def forget(folder: Path, pid: int) -> None:
    """A member has ended."""
    _socket(folder, pid).unlink(missing_ok=True)


def _socket(folder: Path, pid: int) -> Path:
    return folder / f"{pid}{_SUFFIX}"


class PoolPeers:
    """What a member knows together with the others.

    Args:
        own: its socket; those of the others are beside it.
    """

    def __init__(self, own: Path, explainer: Explainer) -> None:
        self._own = own
        self._explainer = explainer

    async def find(self, request_id: str) -> Explanation:
        """`Explains`, whichever member had the request. Never fails."""
        others = sorted(path for path in self._own.parent.glob(f"*{_SUFFIX}") if path != self._own)
        found = await asyncio.gather(*(_ask(path, request_id) for path in others))
        return joined([self._explainer.of(request_id), *(one for one in found if one is not None)])


async def _ask(path: Path, request_id: str) -> Explanation | None:
    try:
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            reader, writer = await asyncio.open_unix_connection(path)
            with contextlib.closing(writer):
                writer.write(msgspec.json.encode(request_id) + b"\n")
                return msgspec.json.decode(await reader.read(), type=Explanation)
    except ConnectionError:
        return None  # it was killed, and left its socket behind
    except (OSError, TimeoutError, msgspec.MsgspecError) as error:
        log.warning("pool_peer_silent", peer=path.stem, reason=str(error) or type(error).__name__)
        return None
