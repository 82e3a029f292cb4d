"""Whether KV blocks can travel from one worker to another, read off their records: what routes are checked against."""

from __future__ import annotations

from slipstream.v1.registry_pb2 import WorkerRecord

SHM = "shm"
"""The transport within one host; every other one crosses hosts."""


def same_host(one: WorkerRecord, other: WorkerRecord) -> bool:
    """Whether two workers share memory; those that do not tell their host share none."""
    return bool(one.host_id) and one.host_id == other.host_id


def crossing(record: WorkerRecord) -> frozenset[str]:
    """The transports with which a worker reaches other hosts."""
    return frozenset(record.transfer.transports) - {SHM}


def broken_senders(receiver: WorkerRecord) -> set[tuple[str, int]]:
    """Senders, by worker id and epoch of their transfer agent, from which no measured way works."""
    works: dict[tuple[str, int], bool] = {}
    for path in receiver.paths:
        sender = path.peer_worker_id, path.peer_epoch
        works[sender] = works.get(sender, False) or not path.error
    return {sender for sender, working in works.items() if not working}


def is_broken(sender: WorkerRecord, broken: set[tuple[str, int]]) -> bool:
    """Whether a sender, as it runs now, is one of the broken ones."""
    return bool(broken) and (sender.worker_id, sender.transfer.epoch) in broken


def usable(receiver: WorkerRecord, sender: WorkerRecord) -> bool:
    """Whether blocks can travel between these two."""
    if not sender.transfer.address or is_broken(sender, broken_senders(receiver)):
        return False
    return same_host(receiver, sender) or bool(crossing(receiver) & crossing(sender))
