"""Calls to a Kubernetes API server: objects as plain dictionaries, failures as types, retries within a deadline.

The official client brings the connection, TLS and credentials that renew themselves. Its generated models are left
out: they cost a second and 35 MB to import, and a planner reads a dozen fields.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, urlencode

from deploy.kubernetes.errors import (
    AccessDeniedError,
    ApiBrokenError,
    ApiUnreachableError,
    ConflictError,
    KubernetesError,
    NotAuthenticatedError,
    ObjectMissingError,
    RefusedError,
    ThrottledError,
)
from slipstream.errors import DeadlineError

if TYPE_CHECKING:
    from kubernetes.aio.client.api_client import ApiClient

REQUEST_TIMEOUT_S = 3.0
"""Of one try: a connection that hangs leaves time for another within a call's deadline."""
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.1, 2.0
MERGE_PATCH = "application/merge-patch+json"
_SHOWN_CHARS = 300

_METHODS: Final = {
    "get": "GET",
    "list": "GET",
    "create": "POST",
    "update": "PUT",
    "patch": "PATCH",
    "delete": "DELETE",
}
"""How RBAC's verbs are sent."""

Object = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of objects, as paths and RBAC rules name it."""

    group: str
    version: str
    plural: str
    namespaced: bool = True

    def path(self, namespace: str, name: str, subresource: str) -> str:
        base = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        parts = [base, "namespaces", quote(namespace, safe="")] if self.namespaced else [base]
        parts.append(self.plural)
        if name:
            parts.append(quote(name, safe=""))
        return "/".join([*parts, subresource] if subresource else parts)


DEPLOYMENTS = Kind("apps", "v1", "deployments")
PODS = Kind("", "v1", "pods")
NODES = Kind("", "v1", "nodes", namespaced=False)
LEASES = Kind("coordination.k8s.io", "v1", "leases")
LEADER_WORKER_SETS = Kind("leaderworkerset.x-k8s.io", "v1", "leaderworkersets")


@dataclass(frozen=True, slots=True)
class Asked:
    """One call, for messages: in the words of an RBAC rule."""

    verb: str
    kind: Kind
    namespace: str
    name: str = ""
    subresource: str = ""

    @property
    def resource(self) -> str:
        return f"{self.kind.plural}/{self.subresource}" if self.subresource else self.kind.plural

    def __str__(self) -> str:
        named = f" {self.name}" if self.name else ""
        where = f" in namespace {self.namespace}" if self.kind.namespaced else ""
        return f"{self.verb} {self.resource}{named}{where}"


class KubernetesApi:
    """One namespace of one API server.

    Args:
        client: owned by the caller.
    """

    def __init__(self, client: ApiClient, namespace: str) -> None:
        self._client = client
        self.namespace = namespace
        self._last_error: KubernetesError | None = None

    @asynccontextmanager
    async def within(self, limit_s: float, what: str) -> AsyncIterator[None]:
        """All calls of the block together take at most so long, with every try and every pause.

        Raises:
            KubernetesError: the last failure, where there was one.
            DeadlineError: there was none.
        """
        self._last_error = None
        try:
            async with asyncio.timeout(limit_s):
                yield
        except TimeoutError:
            if self._last_error is not None:
                raise self._last_error from None
            raise DeadlineError(f"kubernetes: {what} took longer than {limit_s:g} s (kubernetes.timeout_s)") from None

    async def call(
        self,
        verb: str,
        kind: Kind,
        name: str = "",
        subresource: str = "",
        *,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        repeatable: bool = True,
    ) -> Object:
        """One call, tried again while the API server is away or asks for patience, until the deadline of `within`.

        Args:
            repeatable: doing it twice does what doing it once does. Else a call that may have been done is not
                repeated here: who asked looks what became of it.

        Raises:
            KubernetesError
        """
        asked = Asked(verb, kind, self.namespace, name, subresource)
        backoff_s = FIRST_BACKOFF_S
        while True:
            try:
                return await self._once(asked, query or {}, body)
            except (ThrottledError, ApiUnreachableError, ApiBrokenError) as error:
                self._last_error = error
                if not repeatable and not isinstance(error, ThrottledError):
                    raise
                await asyncio.sleep(max(error.retry_after_s or 0.0, random.uniform(backoff_s / 2, backoff_s)))
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    async def _once(self, asked: Asked, query: Mapping[str, str], body: Object | None) -> Object:
        import aiohttp  # comes with the client

        resource = asked.kind.path(asked.namespace, asked.name, asked.subresource)
        path = f"{resource}?{urlencode(query)}" if query else resource
        content = {"Content-Type": MERGE_PATCH if asked.verb == "patch" else "application/json"}
        try:
            serialized = await self._client.param_serialize(
                _METHODS[asked.verb],
                path,
                header_params={"Accept": "application/json", **content},
                body=body,
                auth_settings=["BearerToken"],
            )
        except Exception as error:  # of a token file, or of whatever program a kubeconfig names
            raise NotAuthenticatedError(f"kubernetes: {asked}: no credentials: {error}") from error
        limit = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
        try:
            response = await self._client.call_api(*serialized, _request_timeout=limit)
            content_bytes: bytes = await response.read()  # type: ignore[no-untyped-call]
        except TimeoutError:
            raise ApiUnreachableError(f"kubernetes: {asked}: no answer within {REQUEST_TIMEOUT_S:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ApiUnreachableError(f"kubernetes: {asked}: {error}") from error
        if response.status >= HTTPStatus.BAD_REQUEST:
            raise failure(asked, response.status, content_bytes, response.headers.get("Retry-After"))
        return _parsed(asked, content_bytes)


def failure(asked: Asked, status: int, content: bytes, retry_after: str | None) -> KubernetesError:
    """What an HTTP status of a call means."""
    told = f"kubernetes: {asked}: {_message(content) or HTTPStatus(status).phrase}"
    if status == HTTPStatus.FORBIDDEN:
        role = f"Role of the planner's service account, in namespace {asked.namespace}"
        if not asked.kind.namespaced:
            role = "ClusterRole of the planner's service account"
        return AccessDeniedError(
            f"{told}\nMissing in the {role}: "
            f'apiGroups: ["{asked.kind.group}"], resources: ["{asked.resource}"], verbs: ["{asked.verb}"]'
        )
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return ThrottledError(told, retry_after_s=_seconds(retry_after))
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return ApiBrokenError(told, retry_after_s=_seconds(retry_after))
    kinds: Mapping[int, type[KubernetesError]] = {
        HTTPStatus.UNAUTHORIZED: NotAuthenticatedError,
        HTTPStatus.NOT_FOUND: ObjectMissingError,
        HTTPStatus.CONFLICT: ConflictError,
    }
    return kinds.get(status, RefusedError)(told)


def _parsed(asked: Asked, content: bytes) -> Object:
    try:
        parsed = json.loads(content)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise ApiBrokenError(f"kubernetes: {asked}: the answer is no object: {content[:80]!r}")
    return parsed


def _message(content: bytes) -> str:
    """Of a `Status` object, or of whatever a proxy said instead."""
    try:
        parsed = json.loads(content)
        text = str(parsed["message"])
    except (ValueError, TypeError, KeyError):
        text = content.decode(errors="replace").strip()
    return text[:_SHOWN_CHARS]


def _seconds(retry_after: str | None) -> float | None:
    return float(retry_after) if retry_after is not None and retry_after.isdecimal() else None
