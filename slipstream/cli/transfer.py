"""`slipstream transfer probe`: measures the ways of KV blocks between two workers, now, in both directions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from slipstream.cli.flags import CONTROL_PLANE, select, with_settings
from slipstream.cli.paths import PathRow, from_wire, paths_table
from slipstream.cli.show import examples
from slipstream.cli.worker_sets import current_set
from slipstream.config import LoadedConfig
from slipstream.errors import ConfigError, InvalidRequestError, NoWorkerError

if TYPE_CHECKING:
    from slipstream.v1.registry_pb2 import WorkerRecord, WorkerSet

PANEL = "Use a cluster"

_MAX_NAMED = 10


class Transport(StrEnum):
    """What `--transport` takes."""

    SHM = "shm"
    UCX = "ucx"
    NIXL = "nixl"
    ALL = "all"


def add_to(transfer: typer.Typer) -> None:
    transfer.command(
        "probe",
        epilog=examples(
            ("slipstream transfer probe prefill-0 decode-0", "both directions, on the way that requests would take"),
            ("slipstream transfer probe prefill-0 decode-0 --transport all", "on every transport that both have"),
            ("slipstream transfer probe p d --json | jq '.[].bytes_per_s'", "for programs; the start of an id will do"),
        ),
    )(probe)


@with_settings(*select(*CONTROL_PLANE))
def probe(
    loaded: LoadedConfig,
    one: Annotated[str, typer.Argument(metavar="A", help="A worker's id, or the start of it.", show_default=False)],
    other: Annotated[str, typer.Argument(metavar="B", help="Another worker's id.", show_default=False)],
    transports: Annotated[
        Optional[list[Transport]],  # noqa: UP045 - typer reads the annotation
        typer.Option("--transport", help="Use this one, not the one that requests would take; repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    timeout_s: Annotated[float, typer.Option("--timeout-s", help="Longest wait for each answer.")] = 30.0,
) -> None:
    """Measure the ways of KV blocks between two workers: what is really used, bandwidth, latency."""
    if not timeout_s > 0:
        raise ConfigError(f"--timeout-s = {timeout_s:g} must be more than 0")
    address = loaded.settings.control_plane.address
    try:
        rows = asyncio.run(_probe(address, one, other, transports or [], timeout_s))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))  # noqa: T201
    else:
        from slipstream.cli.terminal import output

        output().print(paths_table(rows))
    if not any(row.works for row in rows):
        raise typer.Exit(1)


async def _probe(address: str, one: str, other: str, asked: Sequence[Transport], timeout_s: float) -> list[PathRow]:
    """One after the other: two measurements beside each other would each see half of the bandwidth."""
    workers = await current_set(address, timeout_s)
    first, second = find(workers, one), find(workers, other)
    if first.worker_id == second.worker_id:
        raise InvalidRequestError(f"{one!r} and {other!r} are both {first.worker_id}: name two workers")
    names = _names(asked, first, second)
    directions = ((first, second), (second, first))
    return [await _measure(*direction, name, timeout_s) for direction in directions for name in names]


def find(workers: WorkerSet, wanted: str) -> WorkerRecord:
    """The worker with this id, or the only one whose id begins so.

    Raises:
        NoWorkerError: there is none, or it cannot be measured yet. InvalidRequestError: there are several.
    """
    from slipstream.v1.registry_pb2 import WorkerState

    found = [record for record in workers.workers if record.worker_id == wanted]
    found = found or [record for record in workers.workers if record.worker_id.startswith(wanted)]
    if not found:
        known = _listed([record.worker_id for record in workers.workers])
        doubt = "" if workers.settled else "; the registry has just started and may not know all workers yet"
        raise NoWorkerError(f"no worker's id is or begins with {wanted!r}; there are: {known}{doubt}")
    if len(found) > 1:
        raise InvalidRequestError(f"{wanted!r} is the start of several ids: {_listed([w.worker_id for w in found])}")
    (record,) = found
    if not record.transfer.address:
        state = WorkerState.Name(record.state).lower()
        raise NoWorkerError(
            f"{record.worker_id} is {state} and has no transfer agent yet: "
            "wait until `slipstream status` shows it ready"
        )
    return record


def _names(asked: Sequence[Transport], first: WorkerRecord, second: WorkerRecord) -> list[str]:
    """The transports to measure; an empty name stands for the one that requests would take."""
    if Transport.ALL not in asked:
        return [name.value for name in dict.fromkeys(asked)] or [""]
    one_host = bool(first.host_id) and first.host_id == second.host_id
    both = [name for name in first.transfer.transports if name in second.transfer.transports]
    usable = [name for name in both if one_host or name != "shm"]
    if not usable:
        raise NoWorkerError(
            f"{first.worker_id} and {second.worker_id} have no transport in common: "
            f"{_listed(first.transfer.transports)} and {_listed(second.transfer.transports)}"
            f"{'' if one_host else ', on two hosts'}"
        )
    return usable


async def _measure(sender: WorkerRecord, receiver: WorkerRecord, transport: str, timeout_s: float) -> PathRow:
    """As the receiver measures it; a worker that does not answer is a way that does not work."""
    import grpc.aio

    from slipstream.grpc_channels import client_options
    from slipstream.grpc_errors import from_rpc_error
    from slipstream.security.channels import open_channel
    from slipstream.security.names import ComponentRole
    from slipstream.v1.worker_pb2 import ProbePathRequest
    from slipstream.v1.worker_pb2_grpc import WorkerStub

    request = ProbePathRequest(worker_id=sender.worker_id, peer=sender.transfer, transport=transport)
    async with open_channel(receiver.address, peer=ComponentRole.WORKER, options=client_options()) as channel:
        try:
            path = await WorkerStub(channel).ProbePath(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            reason = from_rpc_error(error).message
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                reason = f"{receiver.worker_id} cannot be reached at {receiver.address}: {reason}"
            elif error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                reason = f"{receiver.worker_id} at {receiver.address} gave no answer in {timeout_s:g} s"
            return PathRow(sender.worker_id, receiver.worker_id, transport=transport, error=reason)
    row = from_wire(path, receiver.worker_id)
    return row if row.transport else replace(row, transport=transport)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(sorted(names)[:_MAX_NAMED]) + more if names else "none"
