"""Who gets in: greets whoever connects to a transfer agent, and greets the agents that it connects to.

Until a stranger has proved that it is a registered worker it is told nothing and costs little: it has one small
buffer, `GREETING_S` seconds, and one of a limited number of places, of which one address has a part at most. A
registered worker has a limited number of connections too.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from kv_transfer import greeting, wire
from kv_transfer.channel import Channel, channel
from kv_transfer.greeting import Dialer, Greeting, Listener, Refused, Session
from kv_transfer.identity import Identity, Peers
from slipstream import telemetry
from slipstream.errors import TransferError

log = telemetry.get_logger(__name__)

GREETING_S = 5.0
PATIENCE_S = 2.0
"""How long a worker of which this one has not heard yet may wait for it: both hear of each other within a moment."""
MAX_STRANGERS = 256
MAX_STRANGERS_OF_ADDRESS = 64
MAX_CONNECTIONS_OF_PEER = 32
LOG_EVERY_S = 1.0

REFUSALS = ("not_registered", "bad_identity", "bad_token", "bad_message", "crowded", "slow")
"""Why somebody was turned away; each is counted by itself."""


class Door:
    """See the module's docstring.

    Args:
        owner: the public key of this agent's own service, which may connect too, and say who is registered.
        refused: called with one of `REFUSALS` for each that was turned away.
    """

    def __init__(
        self, identity: Identity, peers: Peers, *, silence_s: float, refused: Callable[[str], None], owner: bytes = b""
    ) -> None:
        self.peers = peers
        self.identity = identity
        self.owner = owner
        self._silence_s = silence_s
        self._refused = refused
        self._strangers: Counter[str] = Counter()
        self._connections: Counter[bytes] = Counter()
        self._logged_s = -LOG_EVERY_S

    def count(self, error: TransferError) -> None:
        """Somebody who had got in was turned away."""
        if error.code in REFUSALS:
            self._refused(error.code)

    # -- who comes ----------------------------------------------------------------------------------------

    @asynccontextmanager
    async def welcomed(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> AsyncIterator[Channel]:
        """The connection, once it is known whose it is; closed at the end in any case.

        Raises:
            TransferError: it is nobody's who may come in; counted and logged already.
        """
        try:
            session = await self._greeted(reader, writer)
        except BaseException:
            writer.close()
            raise
        self._connections[session.peer] += 1
        try:
            async with channel(reader, writer, session, self._silence_s) as line:
                yield line
        finally:
            self._connections[session.peer] -= 1
            if not self._connections[session.peer]:
                del self._connections[session.peer]

    async def _greeted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Session:
        address = str((writer.get_extra_info("peername") or ("",))[0])
        if self._strangers.total() >= MAX_STRANGERS or self._strangers[address] >= MAX_STRANGERS_OF_ADDRESS:
            raise self._turn_away(writer, address, TransferError("too many strangers at once", code="crowded"))
        self._strangers[address] += 1
        try:
            async with asyncio.timeout(GREETING_S):
                return await self._greet(reader, writer)
        except TimeoutError as error:
            late = TransferError(f"no greeting within {GREETING_S:g} s", code="slow")
            raise self._turn_away(writer, address, late) from error
        except TransferError as error:
            raise self._turn_away(writer, address, error) from error
        finally:
            self._strangers[address] -= 1
            if not self._strangers[address]:
                del self._strangers[address]

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Session:
        listener = Listener(self.identity, await _heard(reader))
        claimed = listener.claimed
        if claimed != self.owner and not await self.peers.know(claimed, PATIENCE_S):
            raise TransferError("this worker knows of no registered worker with that key", code="not_registered")
        if self._connections[claimed] >= MAX_CONNECTIONS_OF_PEER:
            raise TransferError(f"that worker has {MAX_CONNECTIONS_OF_PEER} connections already", code="crowded")
        _say(writer, listener.answer())
        return listener.take_proof(await _heard(reader))

    def _turn_away(self, writer: asyncio.StreamWriter, address: str, error: TransferError) -> TransferError:
        self.count(error)
        now_s = time.monotonic()
        if error.code in REFUSALS and now_s - self._logged_s >= LOG_EVERY_S:
            self._logged_s = now_s  # the counter has all of them
            log.warning("stranger_turned_away", address=address, code=error.code, reason=error.message)
        with suppress(OSError):
            _say(writer, Refused(error.code, error.message[:200]))
        return error

    # -- whom it calls ------------------------------------------------------------------------------------

    @asynccontextmanager
    async def dialed(self, address: str, key: bytes, setup_s: float) -> AsyncIterator[Channel]:
        """A connection to the registered worker that has this key.

        Raises:
            TransferError: `worker_gone`: nobody listens there; `not_registered`, `bad_identity`.
        """
        if not await self.peers.know(key, PATIENCE_S):
            error = TransferError(f"no registered worker has the key of the one at {address}", code="not_registered")
            self.count(error)
            raise error
        async with dialed(self.identity, address, key, setup_s, self._silence_s) as line:
            yield line


@asynccontextmanager
async def dialed(
    identity: Identity, address: str, key: bytes, setup_s: float, silence_s: float
) -> AsyncIterator[Channel]:
    """A connection to the agent that has this key.

    Raises:
        TransferError: `worker_gone`: nobody listens there, or nobody answered in time; `bad_identity`: another one.
    """
    reader, writer = await _connect(address, setup_s)
    try:
        async with asyncio.timeout(setup_s):
            dialer = Dialer(identity, key)
            _say(writer, dialer.knock)
            proof, session = dialer.take_answer(await _heard(reader))
            _say(writer, proof)
    except TimeoutError as error:
        writer.close()
        raise TransferError(f"no greeting from {address} in {setup_s:g} s", code="worker_gone") from error
    except BaseException:
        writer.close()
        raise
    async with channel(reader, writer, session, silence_s) as line:
        yield line


async def _connect(address: str, timeout_s: float) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(timeout_s):
            return await asyncio.open_connection(host.strip("[]"), int(port))
    except (OSError, ValueError, OverflowError, TimeoutError) as error:
        raise TransferError(f"no transfer agent at {address}: {error or 'no answer'}", code="worker_gone") from error


def _say(writer: asyncio.StreamWriter, said: Greeting) -> None:
    writer.write(wire.frame(greeting.encode(said)))


async def _heard(reader: asyncio.StreamReader) -> Greeting:
    body = await wire.read_frame(reader, greeting.MAX_GREETING_BYTES)
    if body is None:
        raise TransferError("the other side has closed the connection", code="worker_gone")
    return greeting.decode(body)
