"""How each fault is done to a real worker."""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import random
import signal
import socket
import struct
from contextlib import ExitStack, suppress

import msgspec
import psutil

from kv_transfer import greeting, wire
from kv_transfer.handoff import ID_BYTES
from slipstream.v1.registry_pb2 import WorkerRecord
from tests.faults.fuzz_cases import Fault, Kind
from tests.support.fault_cluster import FaultCluster, Member, landing_area

_SYS_PIDFD_GETFD = 438
_FLIP_EVERY_S = 0.001

_libc = ctypes.CDLL(None, use_errno=True)


async def inflict(fault: Fault, cluster: FaultCluster, rng: random.Random) -> bool:
    """Do it; returns when it is done, and what was stopped runs again. True when the worker's process will end."""
    member = cluster.members[fault.member]
    match fault.kind:
        case Kind.NOTHING:
            pass
        case Kind.KILL_SERVICE:
            return member.signal(signal.SIGKILL, engine=False)
        case Kind.KILL_ENGINE:
            return member.signal(signal.SIGKILL, service=False)
        case Kind.STOP_SHORT | Kind.STOP_LONG:
            await _stop(member, fault.hold_s, service=True, engine=True)
        case Kind.STOP_ENGINE:
            await _stop(member, fault.hold_s, service=False, engine=True)
        case Kind.STOP_SERVICE:
            await _stop(member, fault.hold_s, service=True, engine=False)
        case Kind.DRAIN:
            return member.signal(signal.SIGTERM, engine=False)
        case Kind.CUT:
            cut_connections(member, {one.settings.transfer.port for one in cluster.members})
        case Kind.GARBAGE:
            await send_garbage(member.settings.transfer.port, rng)
        case Kind.FLIP:
            await flip_bits(member.record, fault.hold_s, rng)
        case Kind.LOSE_PLANE:
            if cluster.plane is not None:
                cluster.plane.kill()
    return False


async def _stop(member: Member, hold_s: float, *, service: bool, engine: bool) -> None:
    member.signal(signal.SIGSTOP, service=service, engine=engine)
    try:
        await asyncio.sleep(hold_s)
    finally:
        member.signal(signal.SIGCONT)


def cut_connections(member: Member, agents: set[int]) -> int:
    """Shut down what is connected to or from a worker's transfer agent; returns how many connections.

    Args:
        agents: ports of all transfer agents.

    """
    pid = member.engine_pid()
    return cut(pid, agents) if pid is not None else 0


def cut(pid: int, ports: set[int]) -> int:
    """Shut down a process' connections from or to these ports; returns how many.

    Its sockets are borrowed (pidfd_getfd): both ends see the connection end, as when a firewall drops it.
    """
    ended = 0
    with ExitStack() as stack, suppress(OSError, psutil.Error):
        process = os.pidfd_open(pid)
        stack.callback(os.close, process)
        for connection in psutil.Process(pid).net_connections(kind="tcp"):
            near, far = connection.laddr, connection.raddr
            if connection.status != psutil.CONN_ESTABLISHED or not {near.port, far.port} & ports:
                continue
            borrowed = _libc.syscall(_SYS_PIDFD_GETFD, process, connection.fd, 0)
            if borrowed < 0:
                continue
            with socket.socket(fileno=borrowed) as line, suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
                ended += 1
    return ended


async def send_garbage(port: int, rng: random.Random) -> None:
    """Talk to a transfer agent as no worker would, in one of several ways."""
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(2.0):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                for chunk in _nonsense(rng):
                    writer.write(chunk)
                    await writer.drain()
                    await asyncio.sleep(rng.uniform(0, 0.05))
            finally:
                writer.close()


def said(message: wire.Message) -> bytes:
    """As somebody says it who has not been greeted."""
    return wire.frame(wire.encode(message))


def _nonsense(rng: random.Random) -> list[bytes]:
    handoff = rng.randbytes(ID_BYTES)
    hello = wire.Hello(wire.VERSION, rng.getrandbits(60), rng.getrandbits(60), "elsewhere", ["shm", "telepathy"], None)
    return rng.choice(
        [
            [rng.randbytes(rng.randrange(1, 4096))],
            [struct.pack(">I", 0xFFFF_FFFF), rng.randbytes(64)],
            [struct.pack(">I", 1000), rng.randbytes(10)],
            [said(hello)[: rng.randrange(1, 20)]],
            [said(hello), said(wire.Open(handoff, rng.randbytes(32))), said(wire.Announce(handoff, 0, 1 << 30))],
            [said(wire.Done(handoff)), said(wire.Again(handoff, 1 << 50))],
            [wire.frame(greeting.encode(greeting.Knock(greeting.VERSION, rng.randbytes(32), rng.randbytes(32))))],
            [wire.frame(greeting.encode(greeting.Proof(rng.randbytes(64))))],
            [struct.pack(">I", 5) + msgspec.msgpack.encode(None) * 5],
            [said(wire.Link("shm/staged", rng.randbytes(30), "zip"))],
            [],
        ]
    )


async def flip_bits(record: WorkerRecord | None, hold_s: float, rng: random.Random) -> None:
    """Change bits in the landing area of a receiver, again and again: what lies there has been digested by its sender,
    and has not been checked by the receiver."""
    path = landing_area(record) if record is not None else None
    if path is None:
        return
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as area:
        stride = rng.choice((1 << 10, 4 << 10, 16 << 10, 64 << 10))
        end_s = asyncio.get_running_loop().time() + hold_s
        while asyncio.get_running_loop().time() < end_s:
            for start in range(0, len(area) - stride, stride):
                area[start + rng.randrange(stride)] ^= 1 << rng.randrange(8)
            await asyncio.sleep(_FLIP_EVERY_S)
