"""A Kubernetes API server for tests, over real HTTP: not the real one, but what the documentation says of it.

Deployments and LeaderWorkerSets with their `scale`, pods, leases; label selectors, versions and conflicts, RBAC,
failures and slow answers on demand. What acts on the objects is in `kubernetes_controllers`.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import kubernetes_validate
import yaml
from aiohttp import web

from tests.support.kubernetes_controllers import Controllers
from tests.support.kubernetes_objects import Object, RefusalError, Store

NAMESPACE = "serving"
TOKEN = "a-service-accounts-token"
SCHEMAS = "1.37"
"""Kubernetes' version whose schemas are used."""
_PATH = re.compile(
    r"^/(?:api|apis/(?P<group>[^/]+))/(?P<version>[^/]+)(?:/namespaces/(?P<namespace>[^/]+))?/(?P<plural>[^/]+)"
    r"(?:/(?P<name>[^/]+))?(?:/(?P<subresource>[^/]+))?$"
)
_KINDS = {
    ("", "pods"),
    ("", "nodes"),
    ("apps", "deployments"),
    ("coordination.k8s.io", "leases"),
    ("leaderworkerset.x-k8s.io", "leaderworkersets"),
}
_VERBS = {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


@dataclass(slots=True)
class Fault:
    """What happens to the next requests of a verb and a resource.

    Attributes:
        status: of the answer.
        done: the request is carried out all the same: only its answer is lost.
        delay_s: before anything happens.
    """

    verb: str
    resource: str
    status: int = 0
    times: int = 1
    done: bool = False
    retry_after: str = ""
    delay_s: float = 0.0


@dataclass(slots=True)
class KubernetesServer:
    """Serves while it is entered.

    Attributes:
        denied: verbs and resources that the service account's Role lacks.
        asked: requests by verb and resource.
        acts_after_s: how long controllers take to notice a change.
        paused: controllers notice nothing.
    """

    store: Store = field(default_factory=lambda: Store(NAMESPACE))
    denied: set[tuple[str, str]] = field(default_factory=set)
    faults: list[Fault] = field(default_factory=list)
    asked: Counter[tuple[str, str]] = field(default_factory=Counter)
    acts_after_s: float = 0.0
    paused: bool = False
    url: str = ""
    controllers: Controllers = field(init=False)
    _runner: web.AppRunner | None = None

    def __post_init__(self) -> None:
        self.controllers = Controllers(self.store)

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    def write_kubeconfig(self, path: Path, *, token: str = TOKEN) -> Path:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{"name": "fake", "cluster": {"server": self.url}}],
            "users": [{"name": "planner", "user": {"token": token}}],
            "contexts": [
                {"name": "here", "context": {"cluster": "fake", "user": "planner", "namespace": NAMESPACE}},
                {"name": "elsewhere", "context": {"cluster": "fake", "user": "planner", "namespace": "other"}},
            ],
        }
        path.write_text(yaml.safe_dump(config))
        return path

    def add_deployment(
        self,
        role: str,
        replicas: int,
        *,
        name: str = "",
        model: str = "m",
        annotations: Mapping[str, str] | None = None,
    ) -> Object:
        """A pool as the chart makes it."""
        labels = {"slipstream.dev/pool": name or role, "slipstream.dev/role": role}
        body = {
            "metadata": {
                "name": f"slipstream-{name or role}",
                "labels": labels,
                "annotations": {"slipstream.dev/model": model, **(annotations or {})},
            },
            "spec": {
                "replicas": replicas,
                "selector": {"matchLabels": {"slipstream.dev/pool": name or role}},
                "template": {"metadata": {"labels": labels}},
            },
        }
        made = self.store.create("deployments", body)
        self.controllers.act()
        return made

    def add_leader_worker_set(self, role: str, replicas: int, *, size: int, model: str = "m") -> Object:
        labels = {"slipstream.dev/pool": f"lws-{role}", "slipstream.dev/role": role}
        body = {
            "metadata": {
                "name": f"lws-{role}",
                "labels": labels,
                "annotations": {"slipstream.dev/model": model},
            },
            "spec": {
                "replicas": replicas,
                "leaderWorkerTemplate": {"size": size, "leaderTemplate": {"metadata": {"labels": labels}}},
            },
        }
        made = self.store.create("leaderworkersets", body)
        self.controllers.act()
        return made

    def pods(self, pool: str = "") -> list[Object]:
        """All, or those of a pool, that are not ending."""
        return [
            one
            for one in self.store.all("pods")
            if "deletionTimestamp" not in one["metadata"]
            and pool in ("", one["metadata"]["labels"]["slipstream.dev/pool"])
        ]

    async def _answer(self, request: web.Request) -> web.Response:
        try:
            return web.json_response(await self._served(request))
        except RefusalError as refusal:
            return web.json_response(refusal.status(), status=refusal.code, headers=refusal.headers)
        finally:
            if not self.paused:
                asyncio.get_running_loop().call_later(self.acts_after_s, self.controllers.act)

    async def _served(self, request: web.Request) -> Object:
        found = _PATH.match(request.path)
        if found is None or (found["group"] or "", found["plural"]) not in _KINDS:
            raise RefusalError(404, "NotFound", "the server could not find the requested resource")
        verb = _VERBS[request.method]
        if verb == "get" and not found["name"]:
            verb = "list"
        resource = found["plural"] + (f"/{found['subresource']}" if found["subresource"] else "")
        self.asked[verb, resource] += 1
        self._check_allowed(request, verb, resource, found["group"] or "", found["namespace"])
        fault = next((one for one in self.faults if (one.verb, one.resource) == (verb, resource) and one.times), None)
        if fault is None:
            return await self._done(request, verb, found)
        fault.times -= 1
        await asyncio.sleep(fault.delay_s)
        done = await self._done(request, verb, found) if fault.done or not fault.status else {}
        if not fault.status:
            return done
        headers = {"Retry-After": fault.retry_after} if fault.retry_after else {}
        raise RefusalError(fault.status, "InternalError", "the server is not well", headers)

    def _check_allowed(self, request: web.Request, verb: str, resource: str, group: str, namespace: str | None) -> None:
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            raise RefusalError(401, "Unauthorized", "Unauthorized")
        where = None if resource == "nodes" else self.store.namespace
        if (verb, resource) in self.denied or namespace != where:
            raise RefusalError(
                403,
                "Forbidden",
                f'{resource} is forbidden: User "system:serviceaccount:{namespace}:planner" cannot {verb} resource '
                f'"{resource}" in API group "{group}" in the namespace "{namespace}"',
            )

    async def _done(self, request: web.Request, verb: str, path: re.Match[str]) -> Object:
        plural, name, subresource = path["plural"], path["name"], path["subresource"]
        body = json.loads(await request.read() or b"{}")
        if verb == "list":
            return {"kind": "List", "items": self.store.select(plural, request.query.get("labelSelector", ""))}
        if subresource == "scale":
            return self._scale(verb, plural, name, body)
        if verb == "get":
            return self.store.get(plural, name)
        if verb in ("create", "update"):
            _check_schema(body)
            return self.store.create(plural, body) if verb == "create" else self.store.replace(plural, name, body)
        if verb == "patch":
            _check_patch(request)
            return self.store.patch(plural, name, body)
        pod = self.store.get(plural, name)
        self.store.check(plural, pod, body.get("preconditions") or {})
        self.controllers.delete(pod)
        return pod

    def _scale(self, verb: str, plural: str, name: str, body: Mapping[str, Any]) -> Object:
        found = self.store.get(plural, name)
        if verb == "patch":
            replicas = body["spec"]["replicas"]
            if replicas < 0:
                raise RefusalError(422, "Invalid", "spec.replicas: must be greater than or equal to 0")
            self.store.patch(plural, name, {"metadata": body.get("metadata", {}), "spec": {"replicas": replicas}})
        metadata = {key: found["metadata"][key] for key in ("name", "namespace", "uid", "resourceVersion")}
        scale = {
            "kind": "Scale",
            "apiVersion": "autoscaling/v1",
            "metadata": metadata,
            "spec": {"replicas": found["spec"]["replicas"]},
            "status": {"replicas": found.get("status", {}).get("replicas", 0)},
        }
        _check_schema(scale)
        return scale


def _check_schema(body: Object) -> None:
    """By Kubernetes' own schema of the kind, without unknown fields."""
    try:
        kubernetes_validate.validate(body, SCHEMAS, strict=True)
    except kubernetes_validate.ValidationError as error:
        raise RefusalError(422, "Invalid", str(error)) from error


def _check_patch(request: web.Request) -> None:
    if request.content_type != "application/merge-patch+json":
        raise RefusalError(415, "UnsupportedMediaType", f"{request.content_type} is not supported by this server")
