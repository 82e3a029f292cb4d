"""Which ways two workers try, and in which order."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.transports.base import LandingLink, ReadLink, Run
from kv_transfer.ways import Transports, has_rdma, to_try
from slipstream.errors import TransferError

ALL = ["shm", "ucx", "nixl"]
SOME = st.lists(st.sampled_from(ALL), unique=True)


@pytest.mark.parametrize(
    ("asked", "mode", "same_host", "rdma", "own", "peer", "ways"),
    [
        ("auto", "auto", True, False, ["shm"], ["shm"], ["shm/direct", "shm/staged"]),
        ("auto", "auto", True, False, ALL, ALL, ["shm/direct", "shm/staged", "ucx", "nixl"]),
        ("auto", "auto", True, True, ALL, ALL, ["shm/direct", "shm/staged", "nixl", "ucx"]),
        ("auto", "staged", True, False, ALL, ["shm"], ["shm/staged"]),
        ("auto", "auto", False, False, ALL, ALL, ["ucx", "nixl"]),
        ("auto", "auto", False, True, ALL, ALL, ["nixl", "ucx"]),
        ("auto", "auto", False, True, ALL, ["shm", "ucx"], ["ucx"]),
        ("shm", "direct", True, False, ALL, ALL, ["shm/direct"]),
        ("ucx", "auto", True, True, ALL, ALL, ["ucx"]),
        ("nixl", "auto", True, False, ALL, ALL, ["nixl"]),
    ],
)
def test_the_order_of_ways(
    asked: str, mode: str, same_host: bool, rdma: bool, own: list[str], peer: list[str], ways: list[str]
) -> None:
    assert to_try(asked, mode, same_host=same_host, rdma=rdma, own=own, peer=peer) == ways


@pytest.mark.parametrize(
    ("asked", "same_host", "own", "peer"),
    [
        ("shm", False, ALL, ALL),
        ("auto", False, ["shm"], ["shm"]),
        ("ucx", True, ALL, ["shm"]),
        ("nixl", True, ["shm", "ucx"], ALL),
        ("auto", True, ALL, []),
    ],
)
def test_where_there_is_no_way_the_reason_is_said(asked: str, same_host: bool, own: list[str], peer: list[str]) -> None:
    with pytest.raises(TransferError) as caught:
        to_try(asked, "auto", same_host=same_host, rdma=False, own=own, peer=peer)
    assert caught.value.code == "no_path"
    assert f"transfer.transport = {asked}" in caught.value.message
    assert ("one host" if same_host else "two hosts") in caught.value.message


@given(
    st.sampled_from(["auto", *ALL]), st.sampled_from(["auto", "direct", "staged"]), st.booleans(), st.booleans(),
    SOME, SOME,
)  # fmt: skip
def test_a_way_is_only_tried_where_both_can_use_it(
    asked: str, mode: str, same_host: bool, rdma: bool, own: list[str], peer: list[str]
) -> None:
    try:
        ways = to_try(asked, mode, same_host=same_host, rdma=rdma, own=own, peer=peer)
    except TransferError:
        return
    names = [way.partition("/")[0] for way in ways]
    assert len(set(ways)) == len(ways) > 0
    assert all(name in own and name in peer for name in names)
    assert all(same_host for name in names if name == "shm")
    assert asked == "auto" or set(names) == {asked}


def test_rdma_devices_are_found_where_the_kernel_lists_them(tmp_path: Path) -> None:
    assert not has_rdma(tmp_path / "nothing")
    assert not has_rdma(tmp_path)
    (tmp_path / "mlx5_0").mkdir()
    assert has_rdma(tmp_path)


class Scripted:
    """A transport that opens on its `opens`-th try, after a moment."""

    name = "scripted"

    def __init__(self, log: list[str], *, fails: bool = False, takes_s: float = 0.0) -> None:
        self._log, self._fails, self._takes_s = log, fails, takes_s

    async def open(self, memory: Sequence[Run]) -> None:
        self._log.append("open")
        await asyncio.sleep(self._takes_s)
        if self._fails:
            raise TransferError("not today", code="transport_unavailable")

    def card(self) -> bytes:
        return b""

    async def connect(self, card: bytes) -> ReadLink | LandingLink:
        raise NotImplementedError

    async def close(self) -> None:
        self._log.append("close")


async def test_a_transport_is_opened_once_and_when_it_is_needed() -> None:
    log: list[str] = []
    transports = Transports({"scripted": lambda: Scripted(log)}, [], 5.0)
    assert log == []
    first, second = await asyncio.gather(transports.get("scripted"), transports.get("scripted"))
    assert first is second
    assert log == ["open"]
    await transports.close()
    assert log == ["open", "close"]


async def test_a_transport_that_did_not_open_is_closed_and_tried_again_next_time() -> None:
    log: list[str] = []
    made = iter([Scripted(log, fails=True), Scripted(log)])
    transports = Transports({"scripted": lambda: next(made)}, [], 5.0)
    with pytest.raises(TransferError, match="not today"):
        await transports.get("scripted")
    assert log == ["open", "close"]
    assert await transports.get("scripted") is not None
    await transports.close()
    assert log == ["open", "close", "open", "close"]


async def test_a_transport_that_hangs_is_given_up() -> None:
    log: list[str] = []
    transports = Transports({"scripted": lambda: Scripted(log, takes_s=60.0)}, [], 0.05)
    with pytest.raises(TransferError, match=r"not ready in 0\.05 s") as caught:
        await transports.get("scripted")
    assert caught.value.code == "transport_unavailable"
    assert log == ["open", "close"]


async def test_one_who_stops_waiting_does_not_stop_the_opening() -> None:
    log: list[str] = []
    transports = Transports({"scripted": lambda: Scripted(log, takes_s=0.1)}, [], 5.0)
    waiter = asyncio.create_task(transports.get("scripted"))
    await asyncio.sleep(0.02)
    waiter.cancel()
    assert await transports.get("scripted") is not None
    assert log == ["open"]
    await transports.close()


async def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(TransferError, match="pigeon"):
        await Transports({}, [], 1.0).get("pigeon")
