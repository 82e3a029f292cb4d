"""Makes a worker's transfer agent from its settings, and tells the worker's service where it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from kv_transfer import ways
from kv_transfer.accounts import REFUSED
from kv_transfer.agent import TransferAgent
from kv_transfer.board import Board
from kv_transfer.compression import codec_for
from kv_transfer.exchange import Limits
from kv_transfer.identity import Identity
from kv_transfer.kv_memory import Codec, KvMemory, Verbatim
from kv_transfer.layout import Layout
from kv_transfer.sender_link import Terms
from kv_transfer.transports.base import Transport
from kv_transfer.transports.shm import ShmDirect, ShmStaged
from kv_transfer.ways import Factory
from slipstream.errors import StartupError, TransferError
from slipstream.worker_settings import TransferSettings

# One landing place: large beside the cost of a message, small beside the landing area.
_SPAN_BYTES = 8 << 20


class Endpoint(msgspec.Struct, frozen=True):
    """Where a worker's transfer agent is, and its public key.

    Attributes:
        ranks: the addresses of the agents of all its ranks, where it has several; they have one key.
    """

    address: str
    epoch: int
    transports: list[str]
    key: bytes
    ranks: list[str] = []


def start(
    memory: KvMemory,
    layout: Layout,
    board: Board,
    settings: TransferSettings,
    *,
    host_id: str,
    host: str,
    owner: bytes = b"",
    registered: Iterable[bytes] = (),
) -> tuple[TransferAgent, Endpoint]:
    """A running agent, and where it is.

    Args:
        owner: the public key of the worker's service; it tells the agent who is registered.
        registered: who is from the start.

    Raises:
        StartupError: it cannot listen; or the transport asked for is not installed.
    """
    transports = ways.installed()
    if settings.transport != "auto" and settings.transport not in transports:
        raise StartupError(
            f"transfer.transport = {settings.transport}: not installed here, only {', '.join(transports)}"
        )
    _codec(settings.compression, memory)  # complains now, not at the first handoff
    span_bytes = max(_SPAN_BYTES, *memory.piece_bytes)
    terms = Terms(
        epoch=board.epoch,
        host_id=host_id,
        transports=transports,
        layout=layout,
        asked=settings.transport,
        mode=settings.mode,
        codec=settings.compression,
        codec_of=partial(_codec, memory=memory),
        rdma=ways.has_rdma(),
        silence_s=settings.silence_s,
        setup_s=settings.timeout_s,
    )
    limits = Limits(
        timeout_s=settings.timeout_s,
        parked_s=settings.lease_s,
        resend_budget=settings.resend_budget,
        span_bytes=span_bytes,
    )
    stem = f"{board.stem}-{layout.rank}"
    factories = _factories(memory, board.path.parent, stem, settings, host, span_bytes)

    def refused(why: str) -> None:
        if layout.rank == 0:  # a word of the board has one writer: of other ranks only their logs tell
            board.add(REFUSED[why])

    agent = TransferAgent(
        memory,
        terms,
        limits,
        factories,
        host=host,
        port=settings.port + layout.rank if settings.port else 0,
        identity=Identity.of(board.seed),
        registered=registered,
        owner=owner,
        refused=refused,
    )
    agent.start()
    return agent, Endpoint(agent.address, board.epoch, transports, agent.key)


def publish(board: Board, ranks: Sequence[Endpoint]) -> None:
    """Tell the worker's service where the agents of its engine's ranks are, in order."""
    first = ranks[0]
    shared = [name for name in first.transports if all(name in end.transports for end in ranks)]
    addresses = [end.address for end in ranks] if len(ranks) > 1 else []
    board.publish_endpoint(msgspec.msgpack.encode(Endpoint(first.address, first.epoch, shared, first.key, addresses)))


def read_endpoint(board: Board) -> Endpoint | None:
    """The agent behind a board; None while its engine is loading."""
    raw = board.endpoint()
    return msgspec.msgpack.decode(raw, type=Endpoint) if raw else None


def _codec(name: str, memory: KvMemory) -> Codec | None:
    """What pieces go through on a landing link.

    Raises:
        StartupError: this KV cache cannot be quantized so.
    """
    import torch

    codec = codec_for(name, getattr(torch, memory.dtype))
    if codec is None:
        return None if memory.on_host else Verbatim()
    try:
        for size in set(memory.piece_bytes):
            codec.encoded_bytes(size)
    except TransferError as error:
        raise StartupError(f"transfer.compression = {name} does not fit this KV cache: {error.message}") from error
    return codec


def _factories(
    memory: KvMemory, folder: Path, stem: str, settings: TransferSettings, host: str, span_bytes: int
) -> dict[str, Factory]:
    landing_bytes = settings.landing_bytes

    def ucx() -> Transport:
        from kv_transfer.transports.ucx import UcxTransport  # late: loads a library that one host alone never needs

        return UcxTransport(span_bytes=span_bytes, landing_bytes=landing_bytes, host=host)

    def nixl() -> Transport:
        from kv_transfer.transports.nixl import NixlTransport

        return NixlTransport(
            backend=settings.nixl_backend, span_bytes=span_bytes, landing_bytes=landing_bytes, host=host
        )

    return {
        "shm/direct": lambda: ShmDirect(readable=memory.on_host),
        "shm/staged": lambda: ShmStaged(folder, stem, span_bytes=span_bytes, landing_bytes=landing_bytes),
        "ucx": ucx,
        "nixl": nixl,
    }
