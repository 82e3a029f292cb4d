"""Makes a worker's transfer agent from its settings, and tells the worker's service where it is."""

from __future__ import annotations

import msgspec

from kv_transfer import ways
from kv_transfer.agent import TransferAgent
from kv_transfer.board import Board
from kv_transfer.exchange import Limits
from kv_transfer.kv_memory import Codec, KvMemory, Verbatim
from kv_transfer.layout import Layout
from kv_transfer.sender_link import Terms
from kv_transfer.transports.base import Transport
from kv_transfer.transports.shm import ShmDirect, ShmStaged
from kv_transfer.transports.ucx import UcxTransport
from kv_transfer.ways import Factory
from slipstream.errors import TransferError
from slipstream.settings import TransferSettings

# One landing place: large beside the cost of a message, small beside the landing area.
_SPAN_BYTES = 2 << 20


class Endpoint(msgspec.Struct, frozen=True):
    """Where a worker's transfer agent is."""

    address: str
    epoch: int
    transports: list[str]


def start(
    memory: KvMemory, layout: Layout, board: Board, settings: TransferSettings, *, host_id: str, host: str
) -> TransferAgent:
    """A running agent, published on the board.

    Raises:
        StartupError: it cannot listen; or the transport asked for is not installed.
    """
    transports = ways.installed()
    span_bytes = max(_SPAN_BYTES, *memory.piece_bytes)
    terms = Terms(
        epoch=board.epoch,
        host_id=host_id,
        transports=transports,
        layout=layout,
        asked=settings.transport,
        mode=settings.mode,
        codec=settings.compression,
        codec_of=lambda name: _codec(name, memory),
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
    factories = _factories(memory, board, settings, host, span_bytes)
    agent = TransferAgent(memory, terms, limits, factories, host=host, port=settings.port)
    agent.start()
    board.publish_endpoint(msgspec.msgpack.encode(Endpoint(agent.address, board.epoch, transports)))
    return agent


def read_endpoint(board: Board) -> Endpoint | None:
    """The agent behind a board; None while its engine is loading."""
    raw = board.endpoint()
    return msgspec.msgpack.decode(raw, type=Endpoint) if raw else None


def _codec(name: str, memory: KvMemory) -> Codec | None:
    if name != "none":
        raise TransferError(f"transfer.compression = {name}: not built in", code="transport_unavailable")
    return None if memory.on_host else Verbatim()


def _factories(
    memory: KvMemory, board: Board, settings: TransferSettings, host: str, span_bytes: int
) -> dict[str, Factory]:
    def staged() -> Transport:
        return ShmStaged(board.path.parent, board.stem, span_bytes=span_bytes, landing_bytes=settings.landing_bytes)

    def ucx() -> Transport:
        return UcxTransport(span_bytes=span_bytes, landing_bytes=settings.landing_bytes, host=host)

    return {"shm/direct": lambda: ShmDirect(readable=memory.on_host), "shm/staged": staged, "ucx": ucx}
