"""The way between two workers is measured when they meet, and on demand; a user reads it on the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from slipstream.v1.registry_pb2 import Role
from tests.support.cluster import Cluster, wait_for

FOUND_WITHIN_S = 20.0


def slipstream(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "slipstream", *arguments, "--control-plane", cluster.control_plane],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def measured(cluster: Cluster) -> list[dict[str, Any]] | None:
    """What `status` says of both directions, once both are measured."""
    paths: list[dict[str, Any]] = json.loads(slipstream(cluster, "status", "--json").stdout)["paths"]
    return paths if paths and all(path["measured_unix_s"] for path in paths) else None


def test_status_shows_the_way_of_a_pair_soon_after_the_start(cluster: Cluster) -> None:
    paths = wait_for("both ways are measured", lambda: measured(cluster), timeout_s=FOUND_WITHIN_S)
    prefill, decode = cluster.worker(Role.ROLE_PREFILL).worker_id, cluster.worker(Role.ROLE_DECODE).worker_id
    assert [(path["sender"], path["receiver"]) for path in paths] == [(prefill, decode), (decode, prefill)]
    for path in paths:
        assert (path["transport"], path["error"], path["warning"]) == ("shm", "", "")
        assert path["bytes_per_s"] > 0
        assert 0 < path["latency_s"] < FOUND_WITHIN_S
    shown = slipstream(cluster, "status").stdout.splitlines()[-1].split()
    assert shown[:2] == [prefill, decode]
    assert shown[2] == f"{paths[0]['transport']}/{paths[0]['detail']}"


def test_the_measured_way_is_a_metric_of_its_receiver(cluster: Cluster) -> None:
    wait_for("both ways are measured", lambda: measured(cluster), timeout_s=FOUND_WITHIN_S)
    prefill = cluster.worker(Role.ROLE_PREFILL).worker_id
    name = "slipstream_kv_path_bandwidth_bytes_per_second"
    ways = {key: value for key, value in cluster.metrics(Role.ROLE_DECODE).items() if key.startswith(name)}
    # Ways from workers that had the other role for a time are told too.
    (bytes_per_s,) = [value for key, value in ways.items() if key.split(":")[2:] == [prefill, "shm"]]
    assert bytes_per_s > 0


def test_a_probe_measures_both_directions_of_a_pair_now(cluster: Cluster) -> None:
    prefill, decode = cluster.worker(Role.ROLE_PREFILL).worker_id, cluster.worker(Role.ROLE_DECODE).worker_id
    result = slipstream(cluster, "transfer", "probe", "prefill", "decode", "--transport", "shm", "--json")
    assert result.returncode == 0, result.stderr
    paths = json.loads(result.stdout)
    assert [(path["sender"], path["receiver"]) for path in paths] == [(prefill, decode), (decode, prefill)]
    assert [path["transport"] for path in paths] == ["shm", "shm"]
    assert all(path["bytes_per_s"] > 0 and path["latency_s"] > 0 for path in paths)
    table = slipstream(cluster, "transfer", "probe", prefill, decode)
    assert table.returncode == 0, table.stderr
    assert [line.split()[:2] for line in table.stdout.splitlines()[1:]] == [[prefill, decode], [decode, prefill]]
