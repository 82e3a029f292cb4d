"""A whole cluster with certificates, as two commands make it: `slipstream ca init` and `slipstream up --tls`."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import yaml

from slipstream.client import Client, Tls
from slipstream.errors import UnavailableError
from slipstream.security.authority import make_everything, renew
from slipstream.security.names import ComponentRole, server_name
from slipstream.v1 import registry_pb2, registry_pb2_grpc
from tests.e2e.test_global_frontend import KEY, GlobalFrontend
from tests.support.cluster import Cluster, wait_for
from tests.support.text_model_folder import write_model_folder


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    make_everything(folder, "slipstream", [], days=1.0, authority_days=2.0)
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, certificates: Path) -> Iterator[Cluster]:
    model = write_model_folder(tmp_path_factory.mktemp("model"), config={"max_position_embeddings": 8192})
    folder = tmp_path_factory.mktemp("cluster") / "run"
    flags = ("--engine", "simulated", "--served-model-name", "sim", "--tls", str(certificates))
    config = folder.with_suffix(".yaml")
    config.write_text(yaml.safe_dump({"admission": {"peer_key_sha256": sha256(KEY.encode()).hexdigest()}}))
    with Cluster(model, folder, "--config", str(config), *flags, "--frontend-workers", "2") as running:
        yield running


def answered(cluster: Cluster, ca_file: Path) -> str:
    with Client(cluster.grpc_target, timeout_s=30, tls=Tls(ca_file=ca_file)) as client:
        return client.complete("hello world", model="sim", max_tokens=4).text


def asked_over_http(cluster: Cluster, ca_file: Path) -> int:
    context = ssl.create_default_context(cafile=str(ca_file))
    body = {"model": "sim", "prompt": "hello world", "max_tokens": 4}
    with httpx.Client(verify=context, timeout=30, trust_env=False) as client:
        url = cluster.http_url.replace("http:", "https:")
        return int(client.post(f"{url}/v1/completions", json=body).status_code)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-P", "-m", "slipstream", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)


def test_both_faces_answer_over_tls_and_not_without(cluster: Cluster, certificates: Path) -> None:
    assert answered(cluster, certificates / "ca.pem")
    assert asked_over_http(cluster, certificates / "ca.pem") == 200
    with httpx.Client(trust_env=False) as client, pytest.raises(httpx.TransportError):
        client.get(f"{cluster.http_url}/health/live")
    with Client(cluster.grpc_target, timeout_s=5) as plain, pytest.raises(UnavailableError):
        plain.models()


def test_commands_need_the_certificates_too(cluster: Cluster, certificates: Path) -> None:
    told = command("status", "--json", "--control-plane", cluster.control_plane, "--tls", str(certificates))
    assert told.returncode == 0, told.stderr
    workers = json.loads(told.stdout)["workers"]
    assert [worker["state"] for worker in workers] == ["ready", "ready"]
    assert all(worker["metrics_url"].startswith("https://") for worker in workers)
    http_port = cluster.http_url.rpartition(":")[2]
    top = command("top", "--once", "--json", "--interval-s", "0.2", "--control-plane", cluster.control_plane,
                  "--frontend-http-port", http_port, "--tls", str(certificates))  # fmt: skip
    assert top.returncode == 0, top.stderr
    assert json.loads(top.stdout)["problems"] == []


def test_metrics_are_for_those_with_a_certificate(cluster: Cluster, certificates: Path) -> None:
    told = command("status", "--json", "--control-plane", cluster.control_plane, "--tls", str(certificates))
    url = json.loads(told.stdout)["workers"][0]["metrics_url"]
    context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    name = {"sni_hostname": server_name("slipstream", ComponentRole.WORKER)}
    with httpx.Client(verify=context, trust_env=False) as client, pytest.raises(httpx.TransportError):
        client.get(url, extensions=name)
    context.load_cert_chain(certificates / "metrics.pem", certificates / "metrics-key.pem")
    with httpx.Client(verify=context, trust_env=False) as client:
        page = client.get(url, extensions=name).text
    assert 'slipstream_certificate_seconds_to_expiry{certificate="component"}' in page


def test_a_frontends_certificate_registers_no_worker(cluster: Cluster, certificates: Path) -> None:
    read = [(certificates / name).read_bytes() for name in ("ca.pem", "frontend-key.pem", "frontend.pem")]
    override = [("grpc.ssl_target_name_override", server_name("slipstream", ComponentRole.CONTROL_PLANE))]
    credentials = grpc.ssl_channel_credentials(*read)
    with grpc.secure_channel(cluster.control_plane, credentials, options=override) as channel:
        stub = registry_pb2_grpc.RegistryStub(channel)
        with pytest.raises(grpc.RpcError, match="a frontend may not do that"):
            stub.Register(registry_pb2.RegisterRequest(), timeout=5)


async def test_a_global_frontend_reaches_it_by_the_authority_of_its_certificate(
    cluster: Cluster, certificates: Path, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign"
    make_everything(foreign, "foreign", [], days=1.0, authority_days=1.0)
    http_port, grpc_port = cluster.http_url.rpartition(":")[2], cluster.grpc_target.rpartition(":")[2]

    def peer(name: str, host: str, trusted: Path) -> dict[str, Any]:
        http, grpc_face = f"https://{host}:{http_port}", f"{host}:{grpc_port}"
        return {"name": name, "http": [http], "grpc": [grpc_face], "key": KEY, "ca_file": str(trusted / "ca.pem")}

    peers = [peer("trusted", "127.0.0.1", certificates), peer("unknown", "localhost", foreign)]
    with GlobalFrontend(tmp_path / "global", peers).running() as front:
        told = front.clusters()
        assert (told["trusted"]["health"], told["unknown"]["health"]) == ("up", "down")
        assert "certificate" in told["unknown"]["why"].lower()
        async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
            assert (await front.ask(client, "hello")).status_code == 200
        assert len(await front.tokens([5, 6, 7])) == 80


def test_everything_goes_on_with_new_certificates(cluster: Cluster, certificates: Path) -> None:
    """The last test here: it changes what all have in common."""
    old = (certificates / "ca.pem").read_bytes()
    renew(certificates, days=1.0, within_days=None, new_authority=True)
    new = certificates / "new-ca.pem"
    new.write_bytes((certificates / "ca.pem").read_bytes().removesuffix(old))

    def taken() -> bool:
        try:
            return bool(answered(cluster, new)) and asked_over_http(cluster, new) == 200
        except (UnavailableError, httpx.TransportError):
            return False

    wait_for("the faces show new certificates", taken, timeout_s=20)
    (certificates / "ca.pem").write_bytes(new.read_bytes())  # the old authority is not trusted any more
    assert answered(cluster, new)
    told = command("status", "--json", "--control-plane", cluster.control_plane, "--tls", str(certificates))
    assert [worker["state"] for worker in json.loads(told.stdout)["workers"]] == ["ready", "ready"]
