"""Where the API server is and who we are: the pod's service account, or a kubeconfig file."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.kubernetes.api import KubernetesApi
from slipstream.errors import ConfigError
from slipstream.placement_settings import KubernetesSettings

if TYPE_CHECKING:
    from kubernetes.aio.client.configuration import Configuration

SERVICE_HOST_VARIABLE = "KUBERNETES_SERVICE_HOST"
"""Set in every pod."""
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@asynccontextmanager
async def connected(settings: KubernetesSettings) -> AsyncIterator[KubernetesApi]:
    """The API server's namespace while the block runs. Nothing is sent yet: an outage is no reason not to start.

    Raises:
        ConfigError: the extra is not installed, or there is neither a service account nor a usable kubeconfig.
    """
    try:
        from kubernetes.aio.client.api_client import ApiClient
    except ImportError:
        raise ConfigError(
            "planner.scaler: kubernetes needs the Python package kubernetes: pip install 'slipstream[kubernetes]'",
            param="planner.scaler",
        ) from None
    configuration, namespace = await _configured(settings)
    async with ApiClient(configuration) as client:
        client.user_agent = "slipstream-planner"
        yield KubernetesApi(client, namespace)


async def _configured(settings: KubernetesSettings) -> tuple[Configuration, str]:
    from kubernetes.aio import config
    from kubernetes.aio.client.configuration import Configuration

    configuration = Configuration()
    in_pod = settings.kubeconfig is None and SERVICE_HOST_VARIABLE in os.environ
    try:
        if in_pod:
            config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
            return configuration, settings.namespace or _own_namespace()
        file = str(settings.kubeconfig.expanduser()) if settings.kubeconfig is not None else None
        await config.load_kube_config(  # type: ignore[no-untyped-call]
            file, context=settings.context, client_configuration=configuration, persist_config=False
        )
        return configuration, settings.namespace or _namespace_of(file, settings.context)
    except (config.ConfigException, OSError) as error:
        where = "the pod's service account" if in_pod else "the kubeconfig (kubernetes.kubeconfig, KUBECONFIG)"
        raise ConfigError(
            f"kubernetes: {where} cannot be used: {error}. In a pod, mount its service account's token "
            "(automountServiceAccountToken: true); elsewhere set kubernetes.kubeconfig and kubernetes.context",
            param="kubernetes.kubeconfig",
        ) from error


def _own_namespace() -> str:
    return NAMESPACE_FILE.read_text().strip()


def _namespace_of(file: str | None, context: str | None) -> str:
    """That of the kubeconfig's context; kubectl takes `default` where it names none, and so do we."""
    from kubernetes.aio import config

    contexts, current = config.list_kube_config_contexts(file)  # type: ignore[no-untyped-call]
    chosen = next((one for one in contexts if one["name"] == context), current)
    return str(chosen["context"].get("namespace") or "default")
