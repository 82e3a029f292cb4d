"""Asks each frontend of each cluster how it is, again and again, and measures the way there by it."""

from __future__ import annotations

import asyncio
import random
from typing import NoReturn
from urllib.parse import quote

import msgspec

from frontend.cluster_state import STATE_PATH, ClusterState
from frontend.clusters import metrics
from frontend.clusters.breaker import Health
from frontend.clusters.fleet import ClusterFleet, Member
from frontend.clusters.upstream import UpstreamError
from slipstream import telemetry

log = telemetry.get_logger(__name__)

MAX_STATE_BYTES = 1 << 20
_decode = msgspec.json.Decoder(ClusterState).decode


class _RefusedError(Exception):
    """The key is not known there."""


async def follow(fleet: ClusterFleet) -> None:
    """Ask all. Runs until cancelled."""
    async with asyncio.TaskGroup() as tasks:
        for member in fleet.members:
            tasks.create_task(_follow(fleet, member), name=f"watch {member.known.endpoint}")
        tasks.create_task(_measure(fleet), name="measure clusters")


async def _follow(fleet: ClusterFleet, member: Member) -> NoReturn:
    every_s, known = fleet.settings.poll_every_s, member.known
    told = ""
    while True:
        asked_s = fleet.clock()
        try:
            # Late answers count as none: by the next question it should have come.
            async with asyncio.timeout(max(fleet.settings.stale_after_s / 2, every_s)):
                state = await _ask(fleet, member)
            known.heard(state, asked_s, fleet.clock())
            failure = ""
        except _RefusedError as error:
            failure = str(error)
            known.silent(failure, refused=True)
        except (UpstreamError, msgspec.MsgspecError, TimeoutError) as error:
            failure = str(error) or "no answer"
            known.silent(failure)
        if failure and known.stale(fleet.clock(), fleet.settings.stale_after_s):
            # Whoever waits there for an answer need not wait for the end of the request's time.
            member.upstream.abort_silent(fleet.settings.stale_after_s)
        if failure != told:
            if failure:
                log.warning("cluster_silent", endpoint=known.endpoint, reason=failure)
            else:
                log.info("cluster_answers_again", endpoint=known.endpoint)
        told = failure
        await asyncio.sleep(every_s * random.uniform(0.9, 1.1))


async def _ask(fleet: ClusterFleet, member: Member) -> ClusterState:
    known = member.known
    version = known.state.prefixes_version if known.state is not None else -1
    path = f"{STATE_PATH}?peer={quote(fleet.name)}&prefixes={version if version >= 0 else ''}"
    answer = await member.upstream.send("GET", path, [(b"x-slipstream-peer-key", member.key.encode())])
    try:
        content = await answer.read_all(MAX_STATE_BYTES)
    finally:
        answer.close()
    if answer.status in (401, 403):
        raise _RefusedError("the cluster refuses this global frontend's key")
    if answer.status != 200:
        raise UpstreamError(f"status {answer.status} to the question how it is; is it a Slipstream frontend?")
    return _decode(content)


async def _measure(fleet: ClusterFleet) -> NoReturn:
    while True:
        now_s = fleet.clock()
        for name in sorted({one.known.cluster for one in fleet.members}):
            own = [one for one in fleet.members if one.known.cluster == name]
            up = any(fleet.health(one, "http", now_s) is not Health.DOWN for one in own)
            metrics.HEALTH.labels(name).set(up)
            ages = [now_s - one.known.heard_s for one in own if one.known.heard_s is not None]
            metrics.STATE_AGE_S.labels(name).set(min(ages, default=float("inf")))
            metrics.ROUND_TRIP_S.labels(name).set(min((one.known.rtt_s for one in own), default=0.0))
        await asyncio.sleep(fleet.settings.poll_every_s)
