"""A cluster's frontend as a global frontend meets it on the wire: says how it is, and answers as a test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgspec

from frontend.cluster_state import STATE_PATH, ClusterState, ModelState

Script = Callable[[asyncio.StreamWriter], Awaitable[None]]


@dataclass(slots=True)
class Seen:
    """A request as it came."""

    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(slots=True)
class ScriptedPeer:
    """One. `script` writes the answer to each POST; a deaf one answers nothing, and keeps its connections."""

    script: Script
    key: str = "s3cret"
    wait_s: float = 0.0
    port: int = 0
    deaf: bool = False
    model: str = "sim"
    seen: list[Seen] = field(default_factory=list)
    _connections: set[asyncio.StreamWriter] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[ScriptedPeer]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for one in self._connections:
                one.close()
            for _ in range(500):
                if not self._connections:
                    break
                await asyncio.sleep(0.01)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                headers = dict(line.split(": ", 1) for line in head[1:] if line)
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                if self.deaf:
                    continue
                method, path, _ = head[0].split(" ")
                if method == "GET" and path.startswith(STATE_PATH):
                    self._tell(headers, writer)
                else:
                    self.seen.append(Seen(path, headers, body))
                    await self.script(writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            self._connections.discard(writer)

    def _tell(self, headers: dict[str, str], writer: asyncio.StreamWriter) -> None:
        if headers.get("x-slipstream-peer-key") != self.key:
            whole(401, b'{"error":{"code":"invalid_peer_key"}}')(writer)
            return
        model = ModelState(self.model, 8192, 1, 1, 0, [(1, 0.05), (512, 0.5)], {"realtime": self.wait_s})
        state = ClusterState(f"frontend-{self.port}", True, False, 0.0, 1, [model], 1, "")
        whole(200, msgspec.json.encode(state))(writer)


def whole(status: int, content: bytes, **headers: str) -> Callable[[asyncio.StreamWriter], None]:
    """An answer in one piece."""

    def write(writer: asyncio.StreamWriter) -> None:
        lines = [f"HTTP/1.1 {status} X", f"content-length: {len(content)}", "content-type: application/json"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode() + content)

    return write


def says(status: int, content: bytes, **headers: str) -> Script:
    """A script of one such answer."""

    async def script(writer: asyncio.StreamWriter) -> None:
        whole(status, content, **headers)(writer)

    return script


def streams(*events: bytes, then_gone: bool = False) -> Script:
    """A script of events; `then_gone` closes the connection before their end."""

    async def script(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for event in events:
            writer.write(b"%x\r\n%s\r\n" % (len(event), event))
            await writer.drain()
            await asyncio.sleep(0)
        if then_gone:
            writer.close()
            raise ConnectionError
        writer.write(b"0\r\n\r\n")

    return script


async def gone(writer: asyncio.StreamWriter) -> None:
    """A script of no answer at all."""
    writer.close()
    raise ConnectionError
