"""Failures of an API server: each has a type, what passes is tried again, and nothing is done twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from deploy.kubernetes import api as calls
from deploy.kubernetes.api import DEPLOYMENTS, LEADER_WORKER_SETS, LEASES, PODS, KubernetesApi
from deploy.kubernetes.connection import connected
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
from deploy.kubernetes.objects import Pool, pods_of, pools_of
from deploy.kubernetes.seats import add_seats
from slipstream.errors import DeadlineError, UnavailableError
from slipstream.placement_settings import KubernetesSettings
from tests.support.kubernetes_objects import Object
from tests.support.kubernetes_server import Fault, KubernetesServer
from tests.support.scripted_worker import until


@dataclass(slots=True)
class Reached:
    """A server, and somebody who talks to it."""

    server: KubernetesServer
    api: KubernetesApi

    async def add(self, more: int) -> int:
        async with self.api.within(5.0, "scaling"):
            return await add_seats(self.api, self.pool, more)

    @property
    def pool(self) -> Pool:
        (pool,) = pools_of(self.server.store.all("deployments"), DEPLOYMENTS)
        return pool


@pytest.fixture
async def at(tmp_path: Path) -> AsyncIterator[Reached]:
    async with (
        KubernetesServer() as server,
        connected(KubernetesSettings(kubeconfig=server.write_kubeconfig(tmp_path / "config"))) as api,
    ):
        server.add_deployment("decode", 1)
        yield Reached(server, api)


async def test_a_missing_rule_is_named_as_it_is_written_into_a_role(at: Reached) -> None:
    at.server.denied |= {("list", "pods"), ("patch", "deployments/scale")}
    with pytest.raises(AccessDeniedError) as caught:
        await at.api.call("list", PODS)
    assert "Missing in the Role of the planner's service account, in namespace serving" in caught.value.message
    assert 'apiGroups: [""], resources: ["pods"], verbs: ["list"]' in caught.value.message
    with pytest.raises(AccessDeniedError) as caught:
        await at.add(1)
    assert 'apiGroups: ["apps"], resources: ["deployments/scale"], verbs: ["patch"]' in caught.value.message


async def test_every_failure_has_a_type_that_planners_live_with(at: Reached, tmp_path: Path) -> None:
    async def failure(verb: str, kind: calls.Kind, name: str = "") -> KubernetesError:
        with pytest.raises(KubernetesError) as caught:
            await at.api.call(verb, kind, name, repeatable=False, body={"metadata": {"name": name}})
        assert isinstance(caught.value, UnavailableError)
        return caught.value

    at.server.faults = [Fault("get", "pods", 422), Fault("get", "pods", 503)]
    assert type(await failure("get", PODS, "p")) is RefusedError
    assert type(await failure("get", PODS, "p")) is ApiBrokenError
    missing = await failure("get", PODS, "p")
    assert type(missing) is ObjectMissingError
    assert missing.message == 'kubernetes: get pods p in namespace serving: pods "p" not found'
    lease: Object = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "l"}, "spec": {}}
    await at.api.call("create", LEASES, body=lease)
    with pytest.raises(ConflictError):
        await at.api.call("create", LEASES, body=lease)
    with pytest.raises(RefusedError, match="leaseDurationSeconds"):
        await at.api.call("update", LEASES, "l", body={**lease, "spec": {"leaseDurationSeconds": "3"}})
    stranger = KubernetesSettings(kubeconfig=at.server.write_kubeconfig(tmp_path / "other", token="wrong"))
    async with connected(stranger) as api:
        with pytest.raises(NotAuthenticatedError):
            await api.call("list", PODS)


async def test_credentials_that_cannot_be_had_are_a_failure_like_any_other(at: Reached) -> None:
    def refresh(configuration: object) -> None:
        raise ValueError("Token file exists but empty.")

    at.api._client.configuration.refresh_api_key_hook = refresh
    with pytest.raises(NotAuthenticatedError, match="no credentials: Token file exists but empty"):
        await at.api.call("list", PODS)


async def test_what_passes_is_tried_again_until_the_deadline_and_the_last_failure_is_told(at: Reached) -> None:
    at.server.faults = [Fault("list", "pods", 429, times=2), Fault("list", "pods", 500)]
    async with at.api.within(5.0, "listing"):
        assert (await at.api.call("list", PODS))["items"]
    assert at.server.asked["list", "pods"] == 4
    at.server.faults = [Fault("list", "pods", 429, times=99, retry_after="7")]
    with pytest.raises(ThrottledError) as caught:
        async with at.api.within(0.5, "listing"):
            await at.api.call("list", PODS)
    assert caught.value.retry_after_s == 7.0
    assert at.server.asked["list", "pods"] == 5, "it waited for as long as it was told to"
    at.server.faults = [Fault("list", "pods", delay_s=0.4)]
    with pytest.raises(DeadlineError, match=r"listing took longer than 0\.1 s"):
        async with at.api.within(0.1, "listing"):
            await at.api.call("list", PODS)


async def test_a_server_that_hangs_or_is_not_there_is_unreachable(
    at: Reached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "REQUEST_TIMEOUT_S", 0.1)
    at.server.faults = [Fault("get", "pods", delay_s=0.3)]
    with pytest.raises(ApiUnreachableError, match=r"no answer within 0\.1 s"):
        await at.api.call("get", PODS, "p", repeatable=False)
    at.server.faults = [Fault("list", "pods", delay_s=0.3)]
    async with at.api.within(5.0, "listing"):
        assert (await at.api.call("list", PODS))["items"], "another try comes through"
    at.server.url = "http://127.0.0.1:1"
    nobody = KubernetesSettings(kubeconfig=at.server.write_kubeconfig(tmp_path / "nobody"))
    async with connected(nobody) as api:
        with pytest.raises(ApiUnreachableError, match="list pods in namespace serving"):
            async with api.within(0.3, "listing"):
                await api.call("list", PODS)


async def test_a_change_that_somebody_overtook_is_made_from_what_is_there_now(at: Reached) -> None:
    at.server.faults = [Fault("patch", "deployments/scale", delay_s=0.1)]
    adding = asyncio.create_task(at.add(+1))
    await until(lambda: at.server.asked["patch", "deployments/scale"])
    at.server.store.patch("deployments", "slipstream-decode", {"spec": {"replicas": 6}})
    assert await adding == 7
    assert at.pool.replicas == 7
    assert at.server.asked["patch", "deployments/scale"] == 2


@pytest.mark.parametrize("status", [500, 504])
async def test_a_change_whose_answer_was_lost_is_not_made_twice(at: Reached, status: int) -> None:
    at.server.faults = [Fault("patch", "deployments/scale", status, done=True)]
    assert await at.add(+1) == 2
    assert at.pool.replicas == 2
    assert at.server.asked["patch", "deployments/scale"] == 1
    at.server.faults = [Fault("patch", "deployments/scale", status)]
    assert await at.add(-1) == 1, "and one that was not done is made again"
    assert at.server.asked["patch", "deployments/scale"] == 3


async def test_seats_never_go_below_none(at: Reached) -> None:
    assert await at.add(-1) == 0
    assert await at.add(-1) == 0
    assert at.server.asked["patch", "deployments/scale"] == 1


def test_a_pool_that_cannot_be_used_is_left_out() -> None:
    labels = {"slipstream.dev/role": "decode"}
    annotations = {"slipstream.dev/model": "m", "slipstream.dev/max-replicas": "3"}
    selector: Object = {"matchLabels": {"a": "b"}}

    def item(**wrong: Object) -> Object:
        parts = {"labels": labels, "annotations": annotations, "selector": selector} | wrong
        selected = {"selector": parts.pop("selector")}
        return {"metadata": {"name": "d", **parts}, "spec": selected}

    (pool,) = pools_of([item()], DEPLOYMENTS)
    assert (pool.replicas, pool.most, pool.ends_last) == (1, 3, False)
    assert pools_of([item()], LEADER_WORKER_SETS)[0].ends_last
    for wrong in (
        item(labels={"slipstream.dev/role": "both"}),
        item(annotations={}),
        item(annotations={**annotations, "slipstream.dev/max-replicas": "many"}),
        item(selector={**selector, "matchExpressions": [{"key": "c"}]}),
    ):
        assert pools_of([wrong], DEPLOYMENTS) == []


def test_objects_that_are_none_are_a_failure_of_the_server() -> None:
    for wrong in ({}, {"metadata": None}, {"metadata": {"name": "p", "creationTimestamp": "yesterday"}}):
        with pytest.raises(ApiBrokenError, match="among the pods"):
            pods_of([wrong])
        with pytest.raises(ApiBrokenError, match="among the deployments"):
            pools_of([wrong], DEPLOYMENTS)
