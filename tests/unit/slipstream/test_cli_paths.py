"""The ways between workers on the command line: in `status`, and measured on demand by `transfer probe`."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner, Result

from slipstream.cli.app import app
from slipstream.cli.paths import MAX_SHOWN, bandwidth, latency
from slipstream.v1.registry_pb2 import (
    ROLE_DECODE,
    ROLE_PREFILL,
    STARTING,
    TransferEndpoint,
    TransferPath,
    WorkerRecord,
    WorkerSet,
)
from slipstream.v1.worker_pb2 import (
    CacheUpdate,
    GetStatusRequest,
    ProbePathRequest,
    SetFenceRequest,
    SetRoleRequest,
    WatchCacheRequest,
)
from slipstream.v1.worker_pb2_grpc import WorkerServicer, add_WorkerServicer_to_server
from tests.unit.slipstream import scripted_registry
from tests.unit.slipstream.serving import serving

TCP = "TCP, although both hosts have an RDMA device: let UCX_TLS include rc"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})


def lines(result: Result) -> list[list[str]]:
    """The words of each line, without those of empty ones."""
    return [words for words in (line.split() for line in result.stdout.splitlines()) if words]


def a_path(peer: str, *, transport: str = "shm", detail: str = "direct", error: str = "", **more: str) -> TransferPath:
    if error:
        return TransferPath(peer_worker_id=peer, peer_epoch=7, error=error, measured_unix_s=1_700_000_000)
    return TransferPath(
        peer_worker_id=peer,
        peer_epoch=7,
        transport=transport,
        detail=detail,
        bytes_per_s=4.21e9 if transport == "shm" else 118e6,
        latency_s=85e-6 if transport == "shm" else 1.42e-3,
        measured_unix_s=1_700_000_000,
        **more,
    )


def a_worker(
    worker_id: str, *paths: TransferPath, transports: tuple[str, ...] = ("shm", "ucx"), host_id: str = "host-a"
) -> WorkerRecord:
    role = ROLE_PREFILL if worker_id.startswith("prefill") else ROLE_DECODE
    record = scripted_registry.record(worker_id, role)
    record.host_id = host_id
    record.transfer.CopyFrom(TransferEndpoint(address="127.0.0.1:7100", epoch=7, transports=transports))
    record.paths.extend(paths)
    return record


def status_of(*workers: WorkerRecord, flags: tuple[str, ...] = ()) -> Result:
    with scripted_registry.serve([WorkerSet(workers=workers, settled=True)]) as address:
        return invoke("status", *flags, "--control-plane", address)


# -- status -------------------------------------------------------------------------------------------------


def test_status_shows_the_way_of_each_pair() -> None:
    result = status_of(
        a_worker("prefill-0", a_path("decode-0"), a_path("decode-1")),
        a_worker("decode-0", a_path("prefill-0")),
        a_worker("decode-1", a_path("prefill-0", transport="ucx", detail="tcp/eth0", warning=TCP)),
    )
    table = lines(result)[4:]
    assert table[0] == ["KV", "blocks", "from", "to", "way", "bandwidth", "latency"]
    assert table[1] == ["prefill-0", "decode-0", "shm/direct", "4.21", "GB/s", "85", "µs"]
    assert table[2][:7] == ["prefill-0", "decode-1", "ucx/tcp/eth0", "118", "MB/s", "1.42", "ms"]
    assert " ".join(table[2][7:]) == f"warning: {TCP}"
    assert len(table) == 3, "the ways back are as they should be: nothing to tell"


def test_status_tells_of_broken_and_unmeasured_ways_and_of_slow_ways_back() -> None:
    result = status_of(
        a_worker("prefill-0", a_path("decode-1", transport="ucx", detail="tcp/eth0", warning=TCP)),
        a_worker("decode-0", a_path("prefill-0", error="connection refused")),
        a_worker("decode-1"),
    )
    table = [" ".join(words) for words in lines(result)[5:]]
    assert table == [
        "prefill-0 decode-0 none - - error: connection refused",
        "prefill-0 decode-1 not measured - -",
        f"decode-1 prefill-0 ucx/tcp/eth0 118 MB/s 1.42 ms warning: {TCP}",
    ]


def test_status_forgets_what_was_measured_with_an_earlier_start_of_a_peer() -> None:
    restarted = a_worker("prefill-0")
    restarted.transfer.epoch = 8
    result = status_of(restarted, a_worker("decode-0", a_path("prefill-0")))
    assert lines(result)[-1] == ["prefill-0", "decode-0", "not", "measured", "-", "-"]


def test_workers_of_two_models_are_no_pair() -> None:
    other = a_worker("decode-0")
    other.model = "another"
    assert "KV blocks from" not in status_of(a_worker("prefill-0"), other).stdout


def test_status_json_has_all_ways() -> None:
    workers = a_worker("prefill-0"), a_worker("decode-0", a_path("prefill-0"))
    shown = json.loads(status_of(*workers, flags=("--json",)).stdout)["paths"]
    assert [(path["sender"], path["receiver"]) for path in shown] == [
        ("prefill-0", "decode-0"),
        ("decode-0", "prefill-0"),
    ]
    assert shown[0]["bytes_per_s"] == 4.21e9
    assert (shown[0]["transport"], shown[0]["detail"], shown[0]["latency_s"]) == ("shm", "direct", 85e-6)
    assert shown[1]["measured_unix_s"] == 0


def test_of_very_many_pairs_the_worst_are_shown() -> None:
    prefills = [a_worker(f"prefill-{index:02}") for index in range(MAX_SHOWN + 5)]
    paths = [a_path(record.worker_id) for record in prefills]
    paths[-1] = a_path(prefills[-1].worker_id, error="connection refused")
    result = status_of(*prefills, a_worker("decode-0", *paths))
    shown = [words for words in lines(result) if words[1:2] == ["decode-0"]]
    assert len(shown) == MAX_SHOWN
    assert shown[0][0] == prefills[-1].worker_id
    assert "5 more, none worse than these" in result.stdout


@pytest.mark.parametrize(
    ("bytes_per_s", "shown"), [(4.214e9, "4.21 GB/s"), (118.4e6, "118 MB/s"), (0.94e6, "0.9 MB/s"), (1e9, "1.00 GB/s")]
)
def test_bandwidth_has_three_digits(bytes_per_s: float, shown: str) -> None:
    assert bandwidth(bytes_per_s) == shown


@pytest.mark.parametrize(("seconds", "shown"), [(85e-6, "85 µs"), (1.42e-3, "1.42 ms"), (1.2, "1.20 s")])
def test_latency_has_three_digits(seconds: float, shown: str) -> None:
    assert latency(seconds) == shown


# -- transfer probe -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class ScriptedMeasurer(WorkerServicer):
    """A worker's service that says what `answer` says."""

    answer: Callable[[ProbePathRequest], TransferPath]
    asked: list[ProbePathRequest] = field(default_factory=list)

    def ProbePath(self, request: ProbePathRequest, context: grpc.ServicerContext) -> TransferPath:  # noqa: N802
        self.asked.append(request)
        return self.answer(request)

    def GetStatus(self, request: GetStatusRequest, context: grpc.ServicerContext) -> WorkerRecord:  # noqa: N802
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "not asked for here")

    def WatchCache(self, request: WatchCacheRequest, context: grpc.ServicerContext) -> Iterator[CacheUpdate]:  # noqa: N802
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "not asked for here")

    def SetRole(self, request: SetRoleRequest, context: grpc.ServicerContext) -> WorkerRecord:  # noqa: N802
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "not asked for here")

    def SetFence(self, request: SetFenceRequest, context: grpc.ServicerContext) -> WorkerRecord:  # noqa: N802
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "not asked for here")


def says(**facts: str) -> Callable[[ProbePathRequest], TransferPath]:
    return lambda request: a_path(request.worker_id, **facts)


@contextmanager
def cluster(**measurers: tuple[WorkerRecord, ScriptedMeasurer]) -> Iterator[str]:
    """A registry that knows these workers; yields its address."""
    with ExitStack() as stack:
        for record, measurer in measurers.values():
            record.address = stack.enter_context(
                serving(lambda server, measurer=measurer: add_WorkerServicer_to_server(measurer, server), threads=2)  # type: ignore[misc]
            )
        records = [record for record, _ in measurers.values()]
        yield stack.enter_context(scripted_registry.serve([WorkerSet(workers=records, settled=True)]))


@pytest.fixture
def prefill() -> tuple[WorkerRecord, ScriptedMeasurer]:
    return a_worker("prefill-0"), ScriptedMeasurer(says())


@pytest.fixture
def decode() -> tuple[WorkerRecord, ScriptedMeasurer]:
    return a_worker("decode-0"), ScriptedMeasurer(says())


Worker = tuple[WorkerRecord, ScriptedMeasurer]


def test_probe_asks_each_receiver_and_prints_both_directions(prefill: Worker, decode: Worker) -> None:
    with cluster(prefill=prefill, decode=decode) as address:
        result = invoke("transfer", "probe", "prefill-0", "decode-0", "--control-plane", address)
    assert result.exit_code == 0
    assert lines(result)[1:] == [
        ["prefill-0", "decode-0", "shm/direct", "4.21", "GB/s", "85", "µs"],
        ["decode-0", "prefill-0", "shm/direct", "4.21", "GB/s", "85", "µs"],
    ]
    (to_decode,), (to_prefill,) = decode[1].asked, prefill[1].asked
    assert (to_decode.worker_id, to_decode.peer, to_decode.transport) == ("prefill-0", prefill[0].transfer, "")
    assert (to_prefill.worker_id, to_prefill.peer) == ("decode-0", decode[0].transfer)


def test_the_start_of_an_id_will_do(prefill: Worker, decode: Worker) -> None:
    with cluster(prefill=prefill, decode=decode) as address:
        result = invoke("transfer", "probe", "p", "dec", "--json", "--control-plane", address)
    shown = json.loads(result.stdout)
    assert [(path["sender"], path["receiver"]) for path in shown] == [
        ("prefill-0", "decode-0"),
        ("decode-0", "prefill-0"),
    ]
    assert [path["bytes_per_s"] for path in shown] == [4.21e9, 4.21e9]


def test_named_transports_are_measured_one_after_the_other(prefill: Worker, decode: Worker) -> None:
    decode[1].answer = lambda request: a_path(
        request.worker_id, error="nixl is not installed" if request.transport == "nixl" else ""
    )
    with cluster(prefill=prefill, decode=decode) as address:
        flags = ("--transport", "ucx", "--transport", "nixl", "--transport", "ucx")
        result = invoke("transfer", "probe", "p", "d", *flags, "--control-plane", address)
    assert [request.transport for request in decode[1].asked] == ["ucx", "nixl"]
    assert [words[2:4] for words in lines(result)[1:3]] == [["shm/direct", "4.21"], ["nixl:", "none"]]


@pytest.mark.parametrize(
    ("host_id", "transports", "measured"),
    [
        ("host-a", ("shm", "nixl", "ucx"), ["shm", "ucx"]),
        ("host-b", ("shm", "nixl", "ucx"), ["ucx"]),
        ("host-a", ("shm",), ["shm"]),
    ],
)
def test_all_transports_are_those_that_both_have_and_can_use(
    prefill: Worker, decode: Worker, host_id: str, transports: tuple[str, ...], measured: list[str]
) -> None:
    prefill[0].host_id = host_id
    del prefill[0].transfer.transports[:]
    prefill[0].transfer.transports.extend(transports)
    with cluster(prefill=prefill, decode=decode) as address:
        invoke("transfer", "probe", "p", "d", "--transport", "all", "--control-plane", address)
    assert sorted(request.transport for request in decode[1].asked) == measured


def test_one_way_that_works_is_enough_for_success(prefill: Worker, decode: Worker) -> None:
    decode[1].answer = says(error="connection refused")
    with cluster(prefill=prefill, decode=decode) as address:
        result = invoke("transfer", "probe", "p", "d", "--control-plane", address)
    assert result.exit_code == 0
    assert " ".join(lines(result)[1]) == "prefill-0 decode-0 none - - error: connection refused"


def test_no_way_that_works_is_a_failure(prefill: Worker, decode: Worker) -> None:
    prefill[1].answer = decode[1].answer = says(error="connection refused")
    with cluster(prefill=prefill, decode=decode) as address:
        result = invoke("transfer", "probe", "p", "d", "--control-plane", address)
    assert result.exit_code == 1
    assert result.stdout.count("connection refused") == 2


def test_a_slow_road_is_printed_with_the_setting_to_change(prefill: Worker, decode: Worker) -> None:
    decode[1].answer = says(transport="ucx", detail="tcp/eth0", warning=TCP)
    with cluster(prefill=prefill, decode=decode) as address:
        result = invoke("transfer", "probe", "p", "d", "--control-plane", address)
    assert f"warning: {TCP}" in " ".join(lines(result)[1])


def test_a_worker_that_cannot_be_reached_is_named_with_its_address(prefill: Worker) -> None:
    gone = a_worker("decode-0")
    gone.address = "127.0.0.1:1"
    with (
        cluster(prefill=prefill) as _,
        scripted_registry.serve([WorkerSet(workers=[prefill[0], gone], settled=True)]) as address,
    ):
        result = invoke("transfer", "probe", "p", "d", "--control-plane", address)
    assert result.exit_code == 0
    assert "error: decode-0 cannot be reached at 127.0.0.1:1" in " ".join(lines(result)[1])


def test_a_worker_that_is_silent_is_left_at_the_deadline(prefill: Worker, decode: Worker) -> None:
    over = threading.Event()

    def silent(request: ProbePathRequest) -> TransferPath:
        over.wait(30)
        return TransferPath()

    decode[1].answer = silent
    with cluster(prefill=prefill, decode=decode) as address:
        result = invoke("transfer", "probe", "p", "d", "--timeout-s", "0.5", "--control-plane", address)
        over.set()
    assert "gave no answer in 0.5 s" in " ".join(lines(result)[1])
    assert lines(result)[2][2] == "shm/direct"


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ("prefill-9", "decode-0", "no worker's id is or begins with 'prefill-9'; there are: decode-0, decode-1, "),
        ("prefill-0", "decode", "'decode' is the start of several ids: decode-0, decode-1"),
        ("prefill-0", "pref", "'prefill-0' and 'pref' are both prefill-0: name two workers"),
        ("late", "decode-0", "late-0 is starting and has no transfer agent yet: wait until `slipstream status`"),
    ],
)
def test_workers_that_cannot_be_meant_are_one_line_of_error(one: str, other: str, message: str) -> None:
    late = scripted_registry.record("late-0", ROLE_DECODE, STARTING)
    workers = [a_worker("prefill-0"), a_worker("decode-0"), a_worker("decode-1"), late]
    with scripted_registry.serve([WorkerSet(workers=workers, settled=True)]) as address:
        result = invoke("transfer", "probe", one, other, "--control-plane", address)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1


def test_an_id_that_is_the_start_of_another_means_itself() -> None:
    workers = [a_worker("prefill-0"), a_worker("decode-1"), a_worker("decode-10")]
    with scripted_registry.serve([WorkerSet(workers=workers, settled=True)]) as address:
        result = invoke("transfer", "probe", "prefill-0", "decode-1", "--json", "--control-plane", address)
    assert {path["receiver"] for path in json.loads(result.stdout)} == {"prefill-0", "decode-1"}


def test_two_workers_without_a_common_transport_are_told_apart_from_a_failure_to_measure() -> None:
    workers = [a_worker("prefill-0", host_id="host-b"), a_worker("decode-0", transports=("shm", "nixl"))]
    with scripted_registry.serve([WorkerSet(workers=workers, settled=True)]) as address:
        result = invoke("transfer", "probe", "p", "d", "--transport", "all", "--control-plane", address)
    assert result.exit_code == 1
    assert "have no transport in common: shm, ucx and nixl, shm, on two hosts" in result.stderr
