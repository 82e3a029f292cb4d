"""Rereads the key file when it changes, or on SIGHUP. A version that is wrong changes nothing, and is loud."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import NoReturn

from frontend.keys import key_file, metrics
from frontend.keys.guard import Guard
from frontend.keys.key_file import Fingerprint
from frontend.keys.keyring import Keyring
from frontend.keys.ledger import SWEEP_S
from slipstream import telemetry
from slipstream.errors import ConfigError
from slipstream.settings import Settings

log = telemetry.get_logger(__name__)

READ_TIMEOUT_S = 10.0
"""For a disk, or a network's disk, that does not answer."""
_REMIND_S = 60.0


class KeyWatch:
    """Keeps a guard's keys those of a file.

    Args:
        hangup: set when the file shall be read whatever it looks like.
        seen: what it looked like before it was read first.
    """

    def __init__(
        self, guard: Guard, settings: Settings, path: Path, hangup: asyncio.Event, seen: Fingerprint | None
    ) -> None:
        self._guard, self._settings, self._path, self._hangup = guard, settings, path, hangup
        self._seen: Fingerprint | None = seen
        self._failure = ""
        self._told_s = 0.0

    async def run(self) -> NoReturn:
        """Until cancelled."""
        while True:
            try:
                async with asyncio.timeout(self._settings.security.keys_check_s):
                    await self._hangup.wait()
            except TimeoutError:
                asked = False
            else:
                self._hangup.clear()
                asked = True
            await self.look(asked=asked)

    async def look(self, *, asked: bool = False) -> None:
        """Read the file if it has changed, or if it is asked for."""
        now = self._seen
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                # In a thread, since a disk may keep one waiting.
                now = await asyncio.to_thread(key_file.fingerprint, self._path)
                if now == self._seen and not asked:
                    self._remind()
                    return
                content = await asyncio.to_thread(key_file.read, self._path)
        except ConfigError as error:
            self._failed(now, error.message)
        except TimeoutError:
            self._failed(self._seen, f"{self._path} could not be read within {READ_TIMEOUT_S:g} s")
        else:
            keyring = Keyring(content, self._settings.admission.tenants)
            self._guard.replace(keyring)
            self._seen, self._failure = now, ""
            metrics.FILE_GOOD.set(1)
            metrics.KEYS.set(len(keyring))
            log.info("keys_file_read", file=str(self._path), keys=len(keyring))

    def _failed(self, seen: Fingerprint | None, reason: str) -> None:
        self._seen, self._failure = seen, reason
        metrics.FILE_GOOD.set(0)
        metrics.FILE_FAILURES.inc()
        self._tell()

    def _remind(self) -> None:
        if self._failure and asyncio.get_running_loop().time() - self._told_s >= _REMIND_S:
            self._tell()

    def _tell(self) -> None:
        self._told_s = asyncio.get_running_loop().time()
        log.error(
            "keys_file_refused",
            reason=self._failure,
            consequence="the keys of the last good version go on to hold; what was revoked since still works",
        )


async def sweep(guard: Guard) -> NoReturn:
    """`Ledger.sweep`, again and again."""
    while True:
        await asyncio.sleep(SWEEP_S)
        guard.ledger.sweep()
