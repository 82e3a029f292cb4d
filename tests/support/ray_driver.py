"""What a test does as a driver of a Ray cluster: in a process of its own, because Ray reads its environment only once.

    python -m tests.support.ray_driver ADDRESS MODEL FOLDER

Places a worker that nobody asks for afterwards, and one for which there is no room; tells what became of both.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

import psutil

from deploy.ray.joining import joined
from deploy.ray.orders import Orders
from deploy.ray.places import Places
from slipstream import config
from slipstream.errors import UnavailableError
from slipstream.v1.registry_pb2 import ROLE_DECODE
from tests.support.ray_cluster import words_of

ORPHAN_AFTER_S = 2.0
_WAIT_S = 40.0


async def abandon(model: str, folder: Path) -> dict[str, object]:
    changed = {"model": model, "worker.engine": "simulated", "ray.orphan_after_s": ORPHAN_AFTER_S}
    orders = Orders.of(config.load(changed, {}, None).settings, folder)
    places = Places("abandoned")
    nodes = await places.nodes()
    no_room = ""
    try:
        await places.place("worker-9", {"CPU": 1.0, "GPU": 8.0}, nodes, None, 0.5)
    except UnavailableError as error:
        no_room = error.message
    await places.place("worker-0", orders.bundle, nodes, None, _WAIT_S)
    await places.begin(orders.order("worker-0", ROLE_DECODE, time.time()), orders.bundle)
    began = {"actors": sorted(await places.names()), "groups": sorted(await places.groups())}
    (worker,) = [one for one in psutil.process_iter() if str(folder / "worker-0.yaml") in words_of(one)]
    ends_s = time.monotonic() + _WAIT_S
    while (left := await places.names() | await places.groups()) and time.monotonic() < ends_s:  # noqa: ASYNC110
        await asyncio.sleep(0.2)
    return {"no_room": no_room, "began": began, "left": sorted(left), "worker_runs": worker.is_running()}


def main(address: str, model: str, folder: str) -> None:
    with joined(address):
        told = asyncio.run(abandon(model, Path(folder)))
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
