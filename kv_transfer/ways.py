"""Which way two workers use: the order in which ways are tried, and the transports that were opened for them.

Transports are opened when they are first needed. A laptop never loads a network library; two hosts load it when they
meet, at registration (`transfer.probe`), not in a request.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kv_transfer.transports.base import Run, Transport
from kv_transfer.transports.ucx_devices import RDMA_DEVICES
from slipstream import telemetry
from slipstream.errors import TransferError

log = telemetry.get_logger(__name__)

Factory = Callable[[], Transport]
_MODULES = {"ucx": "ucxx", "nixl": "nixl"}


def installed() -> list[str]:
    """Transports that this installation has: always `shm`."""
    return ["shm", *(name for name, module in _MODULES.items() if importlib.util.find_spec(module) is not None)]


def has_rdma(devices: Path = RDMA_DEVICES) -> bool:
    """Whether this host has an RDMA device; EFA, InfiniBand and RoCE devices are all listed there."""
    return devices.is_dir() and any(devices.iterdir())


def to_try(asked: str, mode: str, *, same_host: bool, rdma: bool, own: Sequence[str], peer: Sequence[str]) -> list[str]:
    """Ways in the order of preference: `shm/direct`, `shm/staged`, `nixl`, `ucx`.

    Args:
        asked: `transfer.transport`. mode: `transfer.mode`.
        same_host: the two workers share memory.
        own, peer: the transports that each can use.

    Raises:
        TransferError: `no_path`: there is none.
    """
    shm = {"auto": ["shm/direct", "shm/staged"], "direct": ["shm/direct"], "staged": ["shm/staged"]}[mode]
    network = [name for name in (("nixl", "ucx") if rdma else ("ucx", "nixl")) if name in own and name in peer]
    near = shm if same_host and "shm" in own and "shm" in peer else []
    ways = {"auto": [*near, *network], "shm": near}.get(asked, [name for name in network if name == asked])
    if not ways:
        raise TransferError(
            f"no way between the two workers: transfer.transport = {asked}, "
            f"{'one host' if same_host else 'two hosts'}, this worker can use {', '.join(own)}, the other "
            f"{', '.join(peer)}",
            code="no_path",
        )
    return ways


class Transports:
    """The transports of one agent, opened on first use.

    Args:
        factories: by way: `shm/direct`, `shm/staged`, `ucx`, `nixl`.
        memory: what they may send from.
    """

    def __init__(self, factories: Mapping[str, Factory], memory: Sequence[Run], timeout_s: float) -> None:
        self._factories = factories
        self._memory = memory
        self._timeout_s = timeout_s
        self._opened: dict[str, asyncio.Task[Transport]] = {}

    async def get(self, way: str) -> Transport:
        """An open transport.

        Raises:
            TransferError: `transport_unavailable`.
        """
        if way not in self._factories:
            raise TransferError(f"there is no way called {way!r}", code="transport_unavailable")
        task = self._opened.get(way)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._opened[way] = asyncio.create_task(self._open(way), name=f"open-{way}")
        return await asyncio.shield(task)

    async def _open(self, way: str) -> Transport:
        transport = self._factories[way]()
        try:
            async with asyncio.timeout(self._timeout_s):
                await transport.open(self._memory)
        except TimeoutError as error:
            await transport.close()
            raise TransferError(
                f"{way} was not ready in {self._timeout_s:g} s", code="transport_unavailable"
            ) from error
        except BaseException:
            await transport.close()
            raise
        log.info("transport_opened", way=way)
        return transport

    async def close(self) -> None:
        """Close all of them."""
        for task in self._opened.values():
            task.cancel()
        for result in await asyncio.gather(*self._opened.values(), return_exceptions=True):
            if not isinstance(result, BaseException):
                await result.close()
        self._opened.clear()
