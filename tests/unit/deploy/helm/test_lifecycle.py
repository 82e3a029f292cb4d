"""How pods begin and end: nothing is cut off that the product would have finished, and no node is held up for ever."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.helm import RefusedError
from tests.unit.deploy.helm.chart import (
    CASES,
    ROLES,
    Object,
    component,
    container,
    follows,
    is_worker,
    merged,
    named,
    objects,
    of_kind,
    pod_templates,
    pools,
    selects,
    texts,
)

# What a process takes to end after its drain: the gRPC server's grace, the engine's and the transfer agent's end.
LEAST_MARGIN_S = 10


def pre_stop_s(pod: Object) -> int:
    seconds: int = container(pod).get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    return seconds


def grace_s(pod: Object) -> int:
    seconds: int = pod["spec"]["terminationGracePeriodSeconds"]
    return seconds


def check_ends(values: dict[str, Any]) -> None:
    rendered = objects(values)
    full = merged(
        {"frontend": {"drainSeconds": 60}, "prefill": {"drainSeconds": 45}, "decode": {"drainSeconds": 60}}, values
    )
    pods = {component(pod): pod for _, pod in pod_templates(rendered) if not follows(pod)}
    for role in ("frontend", *ROLES):
        drain_s = full[role]["drainSeconds"]
        assert grace_s(pods[role]) >= pre_stop_s(pods[role]) + drain_s + LEAST_MARGIN_S
    assert all(grace_s(pods["frontend"]) >= grace_s(pods[role]) for role in ROLES)


@pytest.mark.parametrize("case", CASES)
def test_a_pod_has_time_for_its_drain_and_frontends_outlive_workers(case: str) -> None:
    check_ends(CASES[case])


_POOL = st.fixed_dictionaries({}, optional={"drainSeconds": st.integers(1, 600), "preStopSeconds": st.integers(0, 60)})


@settings(max_examples=25, deadline=None)
@given(st.fixed_dictionaries({}, optional={"frontend": _POOL, "prefill": _POOL, "decode": _POOL}))
def test_whatever_times_are_given_they_fit_together_or_are_refused(values: dict[str, Any]) -> None:
    refused = ""
    try:
        texts(values)
    except RefusedError as error:
        refused = str(error)
    if not refused:
        check_ends(values)
    else:
        assert "frontend.drainSeconds: frontends must not end before the workers" in refused


@pytest.mark.parametrize("case", CASES)
def test_the_startup_probe_outlasts_the_time_that_the_engine_may_take(case: str) -> None:
    for _, pod in pod_templates(objects(CASES[case])):
        probe = container(pod).get("startupProbe")
        if is_worker(pod) and probe:
            start_s = CASES[case].get(component(pod), {}).get("startSeconds", 3600)
            assert probe["periodSeconds"] * probe["failureThreshold"] > start_s


@pytest.mark.parametrize("case", CASES)
def test_every_process_has_all_three_probes(case: str) -> None:
    for _, pod in pod_templates(objects(CASES[case])):
        wanted = {"startupProbe", "livenessProbe", "readinessProbe"} if component(pod) != "test" else set()
        assert wanted <= container(pod).keys()


@pytest.mark.parametrize("case", CASES)
def test_no_disruption_budget_keeps_a_node_from_being_drained(case: str) -> None:
    rendered = objects(CASES[case])
    budgets = of_kind(rendered, "PodDisruptionBudget")

    assert {each["metadata"]["labels"]["app.kubernetes.io/component"] for each in budgets} == {"frontend", *ROLES}
    for budget in budgets:
        spec = budget["spec"]
        assert "minAvailable" not in spec
        assert spec["maxUnavailable"] not in (0, "0%")
        assert spec["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
        own = budget["metadata"]["labels"]["app.kubernetes.io/component"]
        found = {
            component(pod) for _, pod in pod_templates(rendered) if selects(spec["selector"], pod["metadata"]["labels"])
        }
        assert found == {own}


@pytest.mark.parametrize("amount", [0, "0%", -1, "101%", "none"])
def test_a_budget_of_nothing_is_refused(amount: object) -> None:
    with pytest.raises(RefusedError, match="/prefill/maxUnavailable"):
        texts({"prefill": {"maxUnavailable": amount}})


@pytest.mark.parametrize("case", CASES)
def test_settings_that_change_replace_the_pods(case: str) -> None:
    def checksums(values: dict[str, Any]) -> dict[str, str]:
        return {
            component(pod): pod["metadata"]["annotations"]["checksum/config"]
            for _, pod in pod_templates(objects(values))
            if component(pod) != "test"
        }

    before = checksums(CASES[case])
    after = checksums(merged(CASES[case], {"config": {"log": {"level": "debug"}}}))
    pool = checksums(merged(CASES[case], {"decode": {"config": {"worker": {"max_running": 7}}}}))

    assert all(before[name] != after[name] for name in before)
    assert {name for name in before if before[name] != pool[name]} == {"decode"}


@pytest.mark.parametrize("workload", ["Deployment", "LeaderWorkerSet"])
@pytest.mark.parametrize("surge", [0, 2])
def test_a_rollout_can_always_go_on(workload: str, surge: int) -> None:
    rendered = objects(pools(workload=workload, maxSurge=surge))
    for role in ROLES:
        spec = named(rendered, workload, f"-{role}")["spec"]
        update = (
            spec["strategy"]["rollingUpdate"]
            if workload == "Deployment"
            else spec["rolloutStrategy"]["rollingUpdateConfiguration"]
        )
        assert (update["maxSurge"], update["maxUnavailable"]) == (surge, 0 if surge else 1)


def test_workers_go_to_one_zone_and_prefer_other_hosts_than_the_other_role() -> None:
    rendered = objects(CASES["tuned"])
    for role, other in (ROLES, ROLES[::-1]):
        affinity = named(rendered, "Deployment", f"-{role}")["spec"]["template"]["spec"]["affinity"]
        (zone,) = affinity["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        (apart,) = affinity["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
        near = affinity["podAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
        pods = {component(pod): pod["metadata"]["labels"] for _, pod in pod_templates(rendered)}

        assert zone["topologyKey"] == "topology.kubernetes.io/zone"
        # It takes the worker itself too, or the first of all could never be placed.
        assert {who for who, labels in pods.items() if selects(zone["labelSelector"], labels)} == set(ROLES)
        term = apart["podAffinityTerm"]
        assert [who for who, labels in pods.items() if selects(term["labelSelector"], labels)] == [other]
        assert [each["podAffinityTerm"]["topologyKey"] for each in near] == CASES["tuned"]["placement"]["near"]
        assert all(1 <= each["weight"] <= 100 for each in [*near, apart])
