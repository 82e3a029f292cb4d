"""scaling.mode: planner. The product's scaler, against an API server that allows what the chart's Role allows."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web

from deploy.kubernetes.api import DEPLOYMENTS, LEASES, KubernetesApi
from deploy.kubernetes.connection import connected
from deploy.kubernetes.errors import AccessDeniedError
from deploy.kubernetes.scaler import KubernetesScaler
from planner.policy_file import parse_policy
from slipstream.placement_settings import KubernetesSettings
from slipstream.scaler import SickWorker
from slipstream.v1.registry_pb2 import Role
from tests.support.helm import RefusedError
from tests.support.kubernetes_objects import RefusalError, Store
from tests.support.kubernetes_server import KubernetesServer
from tests.unit.deploy.helm.chart import (
    CASES,
    NAMESPACE,
    ROLES,
    Object,
    merged,
    named,
    objects,
    of_kind,
    own_objects,
    pools,
    texts,
)

PREFILL, DECODE = Role.ROLE_PREFILL, Role.ROLE_DECODE
PLANNED: dict[str, Any] = {"scaling": {"mode": "planner", "decode": {"max": 3}}}
PLURALS = {"Deployment": "deployments", "LeaderWorkerSet": "leaderworkersets"}


@dataclass(slots=True)
class GuardedServer(KubernetesServer):
    """Refuses what no rule of the Role allows, by group, resource, verb and name.

    Attributes:
        used: what was allowed: the number of the rule, and the verb.
    """

    rules: list[Object] = field(default_factory=list)
    used: set[tuple[int, str]] = field(default_factory=set)

    def _check_allowed(self, request: web.Request, verb: str, resource: str, group: str, namespace: str | None) -> None:
        KubernetesServer._check_allowed(self, request, verb, resource, group, namespace)
        below = request.path.rpartition(f"/{resource.partition('/')[0]}")[2]
        name = below.removeprefix("/").partition("/")[0]
        for number, rule in enumerate(self.rules):
            fits = group in rule["apiGroups"] and resource in rule["resources"] and verb in rule["verbs"]
            if fits and name in rule.get("resourceNames", [name]):
                self.used.add((number, verb))
                return
        raise RefusalError(403, "Forbidden", f"{verb} {resource} {name} is not allowed by the chart's Role")


@dataclass(slots=True)
class Cluster:
    server: GuardedServer
    api: KubernetesApi
    scaler: KubernetesScaler

    def seats(self, role: str) -> int:
        for plural in PLURALS.values():
            for one in self.server.store.all(plural):
                if one["metadata"]["labels"]["slipstream.dev/role"] == role:
                    replicas: int = one["spec"]["replicas"]
                    return replicas
        raise AssertionError(role)


@asynccontextmanager
async def cluster(values: Mapping[str, Any], folder: Path) -> AsyncIterator[Cluster]:
    """The chart's pools on a server, with the scaler that its control plane would have."""
    rendered = own_objects(values)
    settings = yaml.safe_load(named(rendered, "ConfigMap", "demo-slipstream")["data"]["control-plane.yaml"])
    rules = [rule for role in of_kind(rendered, "Role", "ClusterRole") for rule in role["rules"]]
    async with GuardedServer(store=Store(NAMESPACE), rules=rules) as server:
        for kind, plural in PLURALS.items():
            for pool in of_kind(rendered, kind):
                if "slipstream.dev/pool" in pool["metadata"]["labels"]:
                    # The API server's default, where the chart leaves the number to the planner.
                    assert "replicas" not in pool["spec"]
                    server.store.create(plural, merged(pool, {"spec": {"replicas": 1}}))
        server.controllers.act()
        kubeconfig = server.write_kubeconfig(folder / "kubeconfig")
        wanted = KubernetesSettings.model_validate(settings["kubernetes"] | {"kubeconfig": kubeconfig})
        async with connected(wanted) as api:
            scaler = KubernetesScaler(api, wanted, lambda: ())
            assert await scaler.hold_lease("planner", 60.0)
            yield Cluster(server, api, scaler)


@pytest.mark.parametrize("grouped", [False, True])
async def test_the_planner_can_do_its_work_with_the_charts_role_and_needs_all_of_it(
    grouped: bool, tmp_path: Path
) -> None:
    values = merged(PLANNED, pools(workload="LeaderWorkerSet", groupSize=2) if grouped else {})
    async with cluster(values, tmp_path) as at:
        assert {one.role for one in await at.scaler.workers()} == {PREFILL, DECODE}
        started = await at.scaler.start("org/model", DECODE)
        assert at.seats("decode") == 2
        assert await at.scaler.drain(started) == started
        assert at.seats("decode") == 1
        if not grouped:
            # Of two the one that is not ready would go first: for the other, the scaler ends the pod itself.
            (oldest,) = [one.worker_id for one in await at.scaler.workers() if one.role == PREFILL]
            at.server.controllers.set_ready(at.server.store.get("pods", oldest))
            await at.scaler.start("org/model", PREFILL)
            await at.scaler.drain(oldest)
        assert await at.scaler.hold_lease("planner", 60.0)
        await at.scaler.release_lease("planner")

        allowed = {(number, verb) for number, rule in enumerate(at.server.rules) for verb in rule["verbs"]}
        unused = {
            (rule, verb) for number, verb in allowed - at.server.used for rule in at.server.rules[number]["resources"]
        }
        # Of groups the last one goes, by the number alone.
        assert unused == ({("pods", "delete")} if grouped else set())


async def test_the_role_reaches_no_other_deployment_and_no_other_lease(tmp_path: Path) -> None:
    async with cluster(PLANNED, tmp_path) as at:
        for one in of_kind(own_objects(PLANNED), "Deployment"):
            if one["metadata"]["name"].endswith("frontend"):
                at.server.store.create("deployments", merged(one, {"spec": {"replicas": 2}}))
        with pytest.raises(AccessDeniedError):
            await at.api.call("get", DEPLOYMENTS, "demo-slipstream-frontend", "scale")
        with pytest.raises(AccessDeniedError):
            await at.api.call("get", LEASES, "another")


@pytest.mark.parametrize("taints", [False, True])
async def test_a_node_with_a_sick_gpu_is_tainted_only_where_the_values_say_so(taints: bool, tmp_path: Path) -> None:
    async with cluster(merged(PLANNED, {"config": {"kubernetes": {"taint_nodes": taints}}}), tmp_path) as at:
        at.server.store.create("nodes", {"metadata": {"name": "node-1"}, "spec": {}})
        (worker, *_) = await at.scaler.workers()

        await at.scaler.report(SickWorker(worker.worker_id, "node-1", ("GPU-1",), True, ("Xid 79",)))

        keys = [each["key"] for each in at.server.store.get("nodes", "node-1")["spec"].get("taints", [])]
        assert keys == (["slipstream.dev/sick"] if taints else [])
        node_rules = {number for number, rule in enumerate(at.server.rules) if "nodes" in rule["resources"]}
        assert {number for number, _ in at.server.used} >= node_rules


async def test_no_more_workers_start_than_the_values_allow(tmp_path: Path) -> None:
    async with cluster(PLANNED, tmp_path) as at:
        for _ in range(2):
            await at.scaler.start("org/model", DECODE)
        with pytest.raises(Exception, match="the most it may have"):
            await at.scaler.start("org/model", DECODE)


def policy_of(values: Mapping[str, Any]) -> str:
    text: str = named(objects(values), "ConfigMap", "demo-slipstream")["data"]["policy.yaml"]
    return text


def test_the_policy_made_of_the_values_is_one_that_the_planner_reads() -> None:
    objectives = parse_policy(policy_of(PLANNED), "policy.yaml")

    (model,) = objectives.models
    assert (model.model, objectives.gpu_budget) == ("org/model", 8 + 3)
    assert (model.objectives["realtime"].ttft_s, model.objectives["realtime"].itl_s) == (2.0, 0.1)


def test_the_budget_counts_all_gpus_of_a_worker_and_its_engine_uses_all_of_them() -> None:
    values = merged(PLANNED, {"accelerator": {"count": 4}})

    assert parse_policy(policy_of(values), "policy.yaml").gpu_budget == 4 * (8 + 3)
    data = named(objects(values), "ConfigMap", "demo-slipstream")["data"]
    for role in ("prefill", "decode"):
        assert yaml.safe_load(data[f"{role}.yaml"])["worker"]["tensor_parallel_size"] == 4


def test_a_policy_of_ones_own_is_taken_as_it_is() -> None:
    own = {
        "gpu_budget": 4,
        "models": [{"model": "org/model", "objectives": {"batch": {"ttft_s": 9.5, "itl_s": 1.5}}}],
    }

    objectives = parse_policy(policy_of(merged(PLANNED, {"planner": {"policy": own}})), "policy.yaml")

    assert objectives.gpu_budget == 4
    assert objectives.models[0].objectives["batch"].ttft_s == 9.5


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ({"name": "org/model"}, "org/model"),
        ({"name": "org/model", "servedName": "m"}, "m"),
        (CASES["claimed-cache"]["model"] | {"servedName": ""}, "m"),
    ],
)
def test_pools_policy_and_workers_agree_on_the_models_name(model: dict[str, Any], name: str) -> None:
    values = merged(PLANNED, {"model": model})

    for role in ROLES:
        assert (
            named(objects(values), "Deployment", f"-{role}")["metadata"]["annotations"]["slipstream.dev/model"] == name
        )
    assert parse_policy(policy_of(values), "policy.yaml").models[0].model == name


def test_a_dry_run_leaves_the_numbers_as_they_are() -> None:
    rendered = objects(merged(PLANNED, {"planner": {"dryRun": True}, "prefill": {"replicas": 5}}))

    assert named(rendered, "Deployment", "-prefill")["spec"]["replicas"] == 5
    assert "tells what it would do" in texts(merged(PLANNED, {"planner": {"dryRun": True}}))["NOTES.txt"]


@pytest.mark.parametrize("mode", ["none", "hpa", "keda"])
def test_without_the_planner_there_is_no_role_and_no_policy(mode: str) -> None:
    rendered = objects({"scaling": {"mode": mode}})

    assert of_kind(rendered, "Role", "RoleBinding", "ClusterRole") == []
    assert "policy.yaml" not in named(rendered, "ConfigMap", "demo-slipstream")["data"]


def test_the_planner_and_an_autoscaler_cannot_be_had_together() -> None:
    with pytest.raises(RefusedError, match="/scaling/mode"):
        texts({"scaling": {"mode": ["planner", "hpa"]}})

    assert of_kind(objects(PLANNED), "HorizontalPodAutoscaler", "ScaledObject") == []


def test_nothing_of_the_role_reaches_beyond_the_namespace_or_is_a_wildcard() -> None:
    rendered = objects(PLANNED)
    (role,), (binding,) = of_kind(rendered, "Role"), of_kind(rendered, "RoleBinding")

    assert role["metadata"]["namespace"] == binding["metadata"]["namespace"] == NAMESPACE
    for rule in role["rules"]:
        assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
        assert not {"secrets", "configmaps", "nodes"} & set(rule["resources"])
    (subject,) = binding["subjects"]
    assert subject["name"].endswith("control-plane")


def test_nodes_are_tainted_only_where_that_is_asked_for() -> None:
    assert of_kind(objects(PLANNED), "ClusterRole", "ClusterRoleBinding") == []

    rendered = objects(merged(PLANNED, {"config": {"kubernetes": {"taint_nodes": True}}}))
    (role,), (binding,) = of_kind(rendered, "ClusterRole"), of_kind(rendered, "ClusterRoleBinding")

    assert role["rules"] == [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "patch"]}]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    settings = yaml.safe_load(named(rendered, "ConfigMap", "demo-slipstream")["data"]["control-plane.yaml"])
    assert KubernetesSettings.model_validate(settings["kubernetes"]).taint_nodes
