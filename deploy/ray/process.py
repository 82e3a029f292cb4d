"""The process in which the pool lives, beside the control plane: the only one here that knows Ray.

    python -P -m deploy.ray.process --config FILE --run-folder FOLDER

It may be killed at any time: the launcher starts it again, and it finds its workers by their names. SIGTERM is the
wish to end the cluster: then the workers drain first. It is apart from the control plane and the frontends because a
process that has joined a Ray cluster is ended by Ray when the cluster's head is gone for long; they go on.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import socket
import sys
from contextlib import AsyncExitStack
from pathlib import Path

from deploy.ray.joining import joined
from deploy.ray.orders import Orders
from deploy.ray.places import Places
from deploy.ray.pool import Pool
from deploy.ray.scaler_service import serving
from slipstream import config, telemetry
from slipstream.background import background
from slipstream.errors import SlipstreamError
from slipstream.security import audit, identity
from slipstream.security.names import ComponentRole
from slipstream.settings import Settings

log = telemetry.get_logger(__name__)

COMPONENT = "ray-pool"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog=COMPONENT)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--run-folder", type=Path, required=True)
    given = parser.parse_args(arguments)
    settings = config.load({}, {}, given.config).settings
    telemetry.configure(settings.log, component=COMPONENT)
    identity.install(settings.security, ComponentRole.LAUNCHER)
    audit.configure(settings.log.audit_log, COMPONENT)
    try:
        with joined(settings.ray.address):
            asyncio.run(_serve(settings, given.run_folder))
    except SlipstreamError as error:
        log.error("ray_pool_failed", error=error.message)
        return 1
    return 0


async def _serve(settings: Settings, run_folder: Path) -> None:
    """Until SIGTERM or SIGINT, which end the workers; a failure before all were ready ends them, too."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    pool = Pool(Orders.of(settings, run_folder), Places(settings.cluster.name, _launcher(run_folder)))
    async with AsyncExitStack() as stack:
        if settings.planner.scaler:
            await stack.enter_async_context(serving(pool, settings.planner.scaler))
        running = await stack.enter_async_context(background(pool.run(), name="pool"))
        stopping = await stack.enter_async_context(background(_wait(stop), name="stop"))
        await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done() and pool.whole:
            # A bug, as far as one can see: the workers go on, and the next pool takes them over.
            log.error("pool_ended")
            await pool.abandon()
        else:
            await pool.close()


def _launcher(run_folder: Path) -> str:
    """Of whoever has started this process, and starts it again when it has died: then nobody else asks its actors."""
    return f"{socket.gethostname()}:{run_folder}"


async def _wait(event: asyncio.Event) -> None:
    await event.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
