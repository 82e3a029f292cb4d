"""Where the API server is: a kubeconfig and its contexts, or the pod's service account."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from deploy.kubernetes import connection
from deploy.kubernetes.connection import connected
from deploy.kubernetes.scaler import open_scaler
from slipstream.errors import ConfigError
from slipstream.placement_settings import KubernetesSettings
from tests.support.kubernetes_server import KubernetesServer


async def test_a_kubeconfig_names_server_user_and_namespace_and_a_setting_goes_before_it(tmp_path: Path) -> None:
    async with KubernetesServer() as server:
        file = server.write_kubeconfig(tmp_path / "config")
        for more, namespace in (
            ({}, "serving"),
            ({"context": "elsewhere"}, "other"),
            ({"context": "elsewhere", "namespace": "mine"}, "mine"),
        ):
            async with connected(KubernetesSettings.model_validate({"kubeconfig": file, **more})) as api:
                assert api.namespace == namespace
        async with open_scaler(KubernetesSettings(kubeconfig=file), lambda: ()) as scaler:
            assert await scaler.workers() == []
        assert server.asked["list", "pods"] == 2


async def test_a_server_that_is_away_is_no_reason_not_to_start(tmp_path: Path) -> None:
    server = KubernetesServer(url="http://127.0.0.1:1")
    file = server.write_kubeconfig(tmp_path / "config")
    async with open_scaler(KubernetesSettings(kubeconfig=file, timeout_s=0.2), lambda: ()) as scaler:
        assert scaler


@pytest.mark.parametrize(
    "content", [None, "not: a kubeconfig", "apiVersion: v1\nkind: Config\ncurrent-context: gone\n"]
)
async def test_a_kubeconfig_that_cannot_be_used_says_which_setting(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "config"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=r"kubernetes\.kubeconfig"):
        async with connected(KubernetesSettings(kubeconfig=file)):
            pass


async def test_in_a_pod_the_service_account_is_who_we_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kubernetes.aio.config import incluster_config

    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    with pytest.raises(ConfigError, match="automountServiceAccountToken"):
        async with connected(KubernetesSettings()):
            pass
    for name in ("token", "ca.crt", "namespace"):
        (tmp_path / name).write_text(f"the-{name}")
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    monkeypatch.setattr(connection, "NAMESPACE_FILE", tmp_path / "namespace")
    configuration, namespace = await connection._configured(KubernetesSettings())
    assert (configuration.host, namespace) == ("https://10.0.0.1:443", "the-namespace")
    assert configuration.ssl_ca_cert == str(tmp_path / "ca.crt")
    assert "bearer the-token" in str(await configuration.auth_settings()).lower()


async def test_without_the_package_it_is_said_which_extra_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes.aio.client.api_client", None)
    with pytest.raises(ConfigError, match=r"slipstream\[kubernetes\]"):
        async with connected(KubernetesSettings()):
            pass
