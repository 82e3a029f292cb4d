"""A landing area: memory cut into places of one size, which are granted, used once and given back.

A ticket is a place and a serial number, so that a ticket of the past is never taken for one of now.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections import deque
from collections.abc import Sequence

from kv_transfer.transports.base import Run
from slipstream.errors import TransferError

_SERIAL_BITS = 40


class Landing:
    """Args:
    memory: at least `places * place_bytes` bytes.
    """

    def __init__(self, places: int, place_bytes: int, memory: memoryview) -> None:
        self.places = places
        self.place_bytes = place_bytes
        self._memory = memory
        self._free = deque(range(places))
        self._granted: set[int] = set()
        self._serial = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def grant(self) -> int:
        """A ticket for a free place; waits while there is none, first come, first served."""
        while not self._free:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter in self._waiting:
                    self._waiting.remove(waiter)
                else:
                    self._wake()  # it was this one's turn: the next in line takes it
                raise
        self._serial = (self._serial + 1) % (1 << _SERIAL_BITS)
        ticket = (self._free.popleft() + 1) << _SERIAL_BITS | self._serial
        self._granted.add(ticket)
        return ticket

    def release(self, ticket: int) -> None:
        """The place is free again; a ticket that is not granted is ignored."""
        if ticket in self._granted:
            self._granted.discard(ticket)
            self._free.append((ticket >> _SERIAL_BITS) - 1)
            self._wake()

    def _wake(self) -> None:
        while self._waiting and self._free:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    @property
    def granted(self) -> int:
        """Tickets that are out."""
        return len(self._granted)

    def place(self, ticket: int) -> memoryview:
        """The bytes of a ticket's place.

        Raises:
            TransferError: `bad_handoff`: there is no such place.
        """
        start = self.offset(ticket)
        return self._memory[start : start + self.place_bytes]

    def offset(self, ticket: int) -> int:
        """Where the place begins; see `place`."""
        number = (ticket >> _SERIAL_BITS) - 1
        if not 0 <= number < self.places:
            raise TransferError(f"there is no landing place {number} among {self.places}", code="bad_handoff")
        return number * self.place_bytes


def gather(pieces: Sequence[Run], place: memoryview) -> None:
    """Copy `pieces` to the front of `place`, one after the other; releases the GIL while it copies."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(place))
    for piece in pieces:
        ctypes.memmove(address, piece.address, piece.length)
        address += piece.length
