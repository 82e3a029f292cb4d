"""The Helm chart's pods as processes of this machine: their commands, variables, settings files, and their probes.

Each pod has a loopback address of its own in place of a pod's; the Service's name is replaced by the control plane's.
"""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from slipstream.child_python import module_path
from tests.support.cluster import wait_for
from tests.support.text_model_folder import write_model_folder
from tests.unit.deploy.helm.chart import (
    Object,
    component,
    container,
    environment,
    merged,
    named,
    objects,
    pod_templates,
    preset,
)

ADDRESSES = {
    "control-plane": "127.9.0.1",
    "frontend": "127.9.0.2",
    "prefill": "127.9.0.3",
    "decode": "127.9.0.4",
    "test": "127.9.0.5",
    "leader": "127.9.0.6",
    "follower": "127.9.0.7",
}
PROBES = ("startupProbe", "livenessProbe", "readinessProbe")
DRAIN_S = 5


@dataclass(slots=True)
class Pods:
    """Of one release.

    Attributes:
        folder: in place of /etc/slipstream, and of the caches.
    """

    folder: Path
    pods: dict[str, Object]
    processes: dict[str, subprocess.Popen[bytes]]

    def start(self, who: str) -> subprocess.Popen[bytes]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLIPSTREAM_")}
        given = {name: self._here(value, who) for name, value in environment(self.pods[who]).items()}
        python_path = {"PYTHONPATH": module_path(os.environ)}
        arguments = [self._here(each, who) for each in container(self.pods[who])["args"]]
        with (self.folder / f"{who}.log").open("wb") as log:
            self.processes[who] = subprocess.Popen(
                [sys.executable, "-P", "-m", "slipstream", *arguments],
                env=inherited | given | python_path,
                stdout=log,
                stderr=log,
            )
        return self.processes[who]

    def passes(self, who: str, kind: str) -> bool:
        """Whether the probe succeeds, as a kubelet sees it."""
        probe = container(self.pods[who])[kind]
        ports = {each["name"]: each["containerPort"] for each in container(self.pods[who])["ports"]}
        try:
            if "httpGet" in probe:
                url = f"http://{ADDRESSES[who]}:{ports[probe['httpGet']['port']]}{probe['httpGet']['path']}"
                return 200 <= httpx.get(url, timeout=3).status_code < 400
            with grpc.insecure_channel(f"{ADDRESSES[who]}:{probe['grpc']['port']}") as channel:
                asked = health_pb2.HealthCheckRequest(service=probe["grpc"].get("service", ""))
                answer = health_pb2_grpc.HealthStub(channel).Check(asked, timeout=3)
                return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
        except (httpx.HTTPError, grpc.RpcError):
            return False

    def _here(self, text: str, who: str) -> str:
        for theirs, ours in (
            ("$(POD_IP)", ADDRESSES[who]),
            ("$(POD_NAME)", f"demo-{who}-0"),
            ("$(NODE_NAME)", "node-1"),
            ("/etc/slipstream", str(self.folder)),
            ("/cache", str(self.folder / "cache")),
            ("0.0.0.0", ADDRESSES[who]),
            ("demo-slipstream-control-plane.llm.svc", ADDRESSES["control-plane"]),
            # As LeaderWorkerSet sets them. Each member's leader is itself, so that both wait for the others.
            ("$(LWS_LEADER_ADDRESS)", ADDRESSES[who]),
            ("$(LWS_GROUP_SIZE)", "2"),
            ("$(LWS_WORKER_INDEX)", "1" if who == "follower" else "0"),
        ):
            text = text.replace(theirs, ours)
        return text


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pods]:
    folder = tmp_path_factory.mktemp("release")
    (folder / "model").mkdir()
    write_model_folder(folder / "model")
    values = merged(
        preset("simulated"),
        {
            "model": {
                "name": str(folder / "model"),
                "servedName": "sim",
                "cache": {"type": "hostPath", "sharedWithFrontends": True},
            },
            "prefill": {"drainSeconds": DRAIN_S},
            "decode": {"drainSeconds": DRAIN_S},
            "frontend": {"drainSeconds": DRAIN_S},
        },
    )
    rendered = objects(values)
    release = Pods(folder, {component(pod): pod for _, pod in pod_templates(rendered)}, {})
    write_files(release, rendered)
    with ExitStack() as ending:
        for who in ("control-plane", "prefill", "decode", "frontend"):
            process = release.start(who)
            ending.callback(process.wait, 30)
            ending.callback(process.terminate)
        yield release


def write_files(release: Pods, rendered: list[Object]) -> None:
    """What is mounted into the pods."""
    for name, text in named(rendered, "ConfigMap", "demo-slipstream")["data"].items():
        (release.folder / name).write_text(release._here(text, "control-plane"))
    secrets = Path(f"{release.folder}-security")  # in place of /etc/slipstream-security
    secrets.mkdir()
    (secrets / "token").write_bytes(base64.b64decode(named(rendered, "Secret", "token")["data"]["token"]))


def ready(release: Pods) -> bool:
    return all(release.passes(who, "readinessProbe") for who in release.processes)


def test_pods_of_the_chart_become_ready_answer_are_watched_and_end_in_order(release: Pods) -> None:
    wait_for("every pod to be ready", lambda: ready(release), timeout_s=60)
    assert all(release.passes(who, kind) for who in release.processes for kind in PROBES)

    body = {"model": "sim", "prompt": "How many stars are there? " * 8, "max_tokens": 8}
    answer = httpx.post(f"http://{ADDRESSES['frontend']}:8000/v1/completions", json=body, timeout=60)
    assert answer.raise_for_status().json()["usage"]["completion_tokens"] == 8

    # What the monitors would scrape.
    for who, port, metric in (
        ("frontend", 8000, "slipstream_frontend_requests_total"),
        ("control-plane", 7601, "slipstream_registry_workers"),
        ("prefill", 7701, "slipstream_worker_requests_waiting"),
        ("decode", 7701, "slipstream_worker_kv_usage_ratio"),
    ):
        assert metric in httpx.get(f"http://{ADDRESSES[who]}:{port}/metrics", timeout=10).text

    # `helm test`.
    status = release.start("test")
    assert status.wait(30) == 0
    told = (release.folder / "test.log").read_text()
    assert "demo-prefill-0" in told
    assert "demo-decode-0" in told
    del release.processes["test"]

    for who in ("frontend", "prefill", "decode", "control-plane"):
        release.processes[who].terminate()
        assert release.processes[who].wait(DRAIN_S + 15) == 0, (release.folder / f"{who}.log").read_text()[-2000:]


def test_pods_of_a_group_wait_for_each_other_as_their_probes_say_and_end_when_told_to(tmp_path: Path) -> None:
    """Without engines: what comes when all are there is in `test_node_group`, where each has a memory of its own."""
    folder = tmp_path / "release"
    (folder / "model").mkdir(parents=True)
    write_model_folder(folder / "model")
    (folder / "model" / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")  # no tensors
    cache = {"type": "hostPath", "sharedWithFrontends": True}
    values = {
        "model": {"name": str(folder / "model"), "servedName": "big", "cache": cache},
        "accelerator": {"count": 0},
        "config": {"device": "cpu"},
        "decode": {"workload": "LeaderWorkerSet", "groupSize": 2, "drainSeconds": DRAIN_S},
    }
    rendered = objects(values)
    members = {pod["metadata"]["labels"].get("slipstream.dev/member"): pod for _, pod in pod_templates(rendered)}
    group = Pods(folder, {who: members[who] for who in ("leader", "follower")}, {})
    write_files(group, rendered)
    with ExitStack() as ending:
        for who in group.pods:
            process = group.start(who)
            ending.callback(process.wait, 30)
            ending.callback(process.terminate)

        wait_for("the follower to be there", lambda: group.passes("follower", "livenessProbe"), timeout_s=60)
        assert all(group.passes("follower", kind) for kind in PROBES)
        tie = f"{ADDRESSES['leader']}:29502"
        wait_for("the leader to take followers", lambda: listens(tie), timeout_s=60)
        assert not any(group.passes("leader", kind) for kind in PROBES), "its engine has no ranks there yet"

        for who, process in group.processes.items():
            process.terminate()
            assert process.wait(30) == 0, (folder / f"{who}.log").read_text()[-2000:]


def listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
        return True
    return False
