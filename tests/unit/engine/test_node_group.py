"""Which part of a worker a node is, as its settings say; and what they must not say."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from engine import environment
from engine.node_group import NodeGroup, network_variables
from slipstream.errors import ConfigError
from slipstream.settings import Settings
from slipstream.worker_settings import WorkerSettings


def worker(**changes: Any) -> WorkerSettings:
    several: dict[str, Any] = {"tensor_parallel_size": 8, "nnodes": 2, "master_addr": "10.0.0.1", "host": "10.0.0.2"}
    return WorkerSettings(**(several | changes))


def test_a_worker_is_on_one_node_unless_it_is_told_otherwise() -> None:
    group = NodeGroup.of(WorkerSettings(tensor_parallel_size=4))
    assert (group.several, group.follows, group.local_ranks, list(group.followers)) == (False, False, 4, [])


def test_each_node_has_an_even_part_of_the_ranks() -> None:
    first, last = NodeGroup.of(worker(nnodes=4)), NodeGroup.of(worker(nnodes=4, node_rank=3))
    assert (first.local_ranks, last.local_ranks) == (2, 2)
    assert (first.several, first.follows, last.follows) == (True, False, True)
    assert list(first.followers) == [1, 2, 3]
    assert last.tie_address == "10.0.0.1:29502"


@pytest.mark.parametrize(
    ("changes", "param", "text"),
    [
        ({"node_rank": 2}, "worker.node_rank", "at most 1"),
        ({"nnodes": 3}, "worker.nnodes", "3 does not divide worker.tensor_parallel_size = 8"),
        ({"nnodes": 16}, "worker.nnodes", "16 does not divide"),
        ({"master_addr": None}, "worker.master_addr", "needed with worker.nnodes = 2"),
        ({"engine": "simulated"}, "worker.nnodes", "only vllm"),
        ({"host": "127.0.0.1"}, "worker.host", "cannot reach"),
    ],
)
def test_settings_that_do_not_fit_are_named_with_their_limit(changes: dict[str, Any], param: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as found:
        NodeGroup.of(worker(**changes))
    assert found.value.param == param


def test_nodes_on_one_machine_may_use_its_loopback_addresses() -> None:
    assert NodeGroup.of(worker(host="127.0.0.1", master_addr="127.0.0.2")).several


def test_a_rank_of_a_single_node_has_no_index() -> None:
    with pytest.raises(ConfigError, match=r"worker\.nnodes is 1: at most 0"):
        NodeGroup.of(WorkerSettings(node_rank=1))


def test_torch_and_vllm_are_told_the_address_and_device_by_which_others_reach_this_node() -> None:
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    assert network_variables("127.0.0.1") == {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": loopback}
    assert network_variables("192.0.2.1") == {}  # nobody's: they choose themselves
    assert network_variables("0.0.0.0") == {}
    assert network_variables("no-such-host.invalid") == {}


def test_a_nodes_environment_is_for_its_own_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_is_cpu_build", lambda: True)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    environ: dict[str, str] = {}
    own = worker(host="127.0.0.1", master_addr="127.0.0.2", tensor_parallel_size=4)
    environment.prepare(Settings(worker=own), environ)
    assert environ["VLLM_CPU_OMP_THREADS_BIND"] == "0,1|2,3"
    assert environ["VLLM_HOST_IP"] == "127.0.0.1"
