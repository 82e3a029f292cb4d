"""Measuring a way: how fast a large transfer goes, and how long a small one takes.

It uses the same calls that blocks use, with a piece of the sender's probe memory instead of its KV cache.
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import statistics
import time

from kv_transfer import wire
from kv_transfer.inbound import Sender
from kv_transfer.transports.base import LandingLink, ReadLink, Run
from slipstream.errors import TransferError

PROBE_BYTES = 8 << 20
_SMALL_BYTES = 4096
_SMALL_ROUNDS = 15
_LARGE_ROUNDS = 4
_UNDER_WAY = 4


class ProbeMemory:
    """What a sender sends from when it is probed."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, PROBE_BYTES)
        self._map.write(bytes(PROBE_BYTES))  # touched: or the first probe would measure page faults
        self.run = Run(ctypes.addressof(ctypes.c_char.from_buffer(self._map)), PROBE_BYTES)


async def probe(sender: Sender, answers: asyncio.Queue[wire.ProbeSent], timeout_s: float) -> wire.ProbeResult:
    """Measure.

    Raises:
        TransferError: `timeout`, or what the link raises.
    """
    try:
        async with asyncio.timeout(timeout_s):
            if isinstance(sender.link, ReadLink):
                latency_s, rate = await _probe_reads(sender, sender.link, answers)
            else:
                latency_s, rate = await _probe_landings(sender, sender.link, answers)
    except TimeoutError as error:
        raise TransferError(f"the probe took longer than {timeout_s:g} s", code="timeout") from error
    way = sender.link.way
    return wire.ProbeResult(way.transport, way.detail, rate, latency_s, way.warning)


async def _probe_reads(sender: Sender, link: ReadLink, answers: asyncio.Queue[wire.ProbeSent]) -> tuple[float, float]:
    landed = ProbeMemory()
    own = landed.run
    latencies = []
    there = own
    for _ in range(_SMALL_ROUNDS):
        began = time.perf_counter()
        sender.post(wire.ProbeAsk(0, 0))
        answer = await answers.get()
        there = Run(answer.address, answer.length)
        link.read([Run(there.address, _SMALL_BYTES)], [Run(own.address, _SMALL_BYTES)])
        latencies.append(time.perf_counter() - began)
    length = min(there.length, own.length)
    rates = []
    for _ in range(_LARGE_ROUNDS):
        began = time.perf_counter()
        await asyncio.to_thread(link.read, [Run(there.address, length)], [Run(own.address, length)])
        rates.append(length / (time.perf_counter() - began))
    return statistics.median(latencies), statistics.median(rates)


async def _probe_landings(
    sender: Sender, link: LandingLink, answers: asyncio.Queue[wire.ProbeSent]
) -> tuple[float, float]:
    async def land(length: int) -> None:
        ticket = await link.grant()
        try:
            sender.post(wire.ProbeAsk(ticket, length))
            answer = await answers.get()  # in the order asked only while one is under way; tickets tell them apart
            await link.receive(answer.ticket, length)
            link.release(answer.ticket)
        except BaseException:
            link.release(ticket)
            raise

    latencies = []
    for _ in range(_SMALL_ROUNDS):
        began = time.perf_counter()
        await land(_SMALL_BYTES)
        latencies.append(time.perf_counter() - began)
    length = min(link.span_bytes, PROBE_BYTES)
    rates = []
    for _ in range(_LARGE_ROUNDS):
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(_UNDER_WAY):
                group.create_task(land(length))
        rates.append(_UNDER_WAY * length / (time.perf_counter() - began))
    return statistics.median(latencies), statistics.median(rates)
