"""Keys for the life of a frontend's process: read at its start, watched until its end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Iterator

from frontend.keys import key_file, metrics
from frontend.keys.entries import KeyFile
from frontend.keys.guard import Guard
from frontend.keys.keyring import Keyring
from frontend.keys.ledger import Ledger
from frontend.keys.table import Table
from frontend.keys.watch import KeyWatch, sweep
from slipstream import telemetry
from slipstream.background import background
from slipstream.settings import Settings

log = telemetry.get_logger(__name__)


@contextlib.asynccontextmanager
async def guarding(
    settings: Settings,
    table: Table | None = None,
    *,
    check_peer: Callable[[str], None] | None = None,
    counts_tokens: bool = True,
) -> AsyncIterator[Guard | None]:
    """The guard of this process, whose keys are kept those of the file; None where there is neither a file, nor a
    global frontend that may speak for its callers.

    Args:
        table: that the processes of a pool share.
        check_peer, counts_tokens: see `Guard`.

    Raises:
        ConfigError: the key file cannot be used.
    """
    path = settings.security.keys_file
    if path is None:
        if settings.admission.peer_key_sha256 is None or check_peer is None:
            yield None
            return
        unasked = Guard(Keyring(KeyFile()), Ledger(table), required=False, check_peer=check_peer)
        async with background(sweep(unasked), name="sweep key accounts"):
            yield unasked
        return
    seen = key_file.fingerprint(path)  # before it is read: what changes meanwhile is read again
    keyring = Keyring(await asyncio.to_thread(key_file.read, path), settings.admission.tenants)
    guard = Guard(
        keyring,
        Ledger(table),
        observe_needs_key=settings.security.observe_needs_key,
        counts_tokens=counts_tokens,
        check_peer=check_peer,
    )
    metrics.FILE_GOOD.set(1)
    metrics.KEYS.set(len(keyring))
    log.info("keys_file_read", file=str(path), keys=len(keyring))
    if not len(keyring):
        log.warning("keys_file_empty", file=str(path), consequence="every request is refused")
    with _hangups() as hangup:
        watch = KeyWatch(guard, settings, path, hangup, seen)
        async with background(watch.run(), name="watch keys"), background(sweep(guard), name="sweep key accounts"):
            yield guard


@contextlib.contextmanager
def _hangups() -> Iterator[asyncio.Event]:
    """An event that SIGHUP sets."""
    loop, hangup = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, hangup.set)
    try:
        yield hangup
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
