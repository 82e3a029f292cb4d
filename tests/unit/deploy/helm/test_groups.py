"""Workers that are groups of pods: one command for all, one worker for everybody else, and nobody else among them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.policy_file import parse_policy
from tests.support.helm import RefusedError
from tests.unit.deploy.helm.chart import (
    CASES,
    ROLES,
    Object,
    component,
    container,
    environment,
    follows,
    is_worker,
    merged,
    named,
    objects,
    of_kind,
    pod_templates,
    pools,
    preset,
    selects,
    texts,
)
from tests.unit.deploy.helm.test_lifecycle import LEAST_MARGIN_S
from tests.unit.deploy.helm.test_links import lets_through, policies

GROUPS = pools(workload="LeaderWorkerSet", groupSize=2)
GROUP_CASES = [case for case in CASES if case.endswith("large-groups")]
RACK = "topology.k8s.aws/network-node-layer-3"
# Of the leader's group, that LeaderWorkerSet names by a label.
GROUP_KEY = "leaderworkerset.sigs.k8s.io/group-key"


def groups(case: str) -> list[tuple[str, Object, Object]]:
    """Role, leader and follower of each pool whose workers are groups."""
    found = []
    for each in of_kind(objects(CASES[case]), "LeaderWorkerSet"):
        template = each["spec"]["leaderWorkerTemplate"]
        if template["size"] > 1:
            leader, follower = template["leaderTemplate"], template["workerTemplate"]
            found.append((component(leader), leader, follower))
    assert found
    return found


def settings_of(values: dict[str, Any], role: str) -> dict[str, Any]:
    data = named(objects(values), "ConfigMap", "demo-slipstream")["data"]
    loaded: dict[str, Any] = yaml.safe_load(data[f"{role}.yaml"])
    return loaded


@pytest.mark.parametrize("case", GROUP_CASES)
def test_pods_of_a_group_differ_in_nothing_but_what_others_may_ask_them(case: str) -> None:
    """Devices, huge pages, shared memory, claims, variables, time to end: a follower computes as its leader does."""
    for _, leader, follower in groups(case):
        own_to_one = {"ports", "startupProbe", "livenessProbe", "readinessProbe"}
        assert without(container(leader), own_to_one) == without(container(follower), own_to_one)
        different = {"containers", "terminationGracePeriodSeconds"}
        assert without(leader["spec"], different) == without(follower["spec"], different)
        labels = [each["metadata"]["labels"] for each in (leader, follower)]
        assert labels[0] == labels[1] | {"slipstream.dev/member": "leader"}


def without(mapping: Object, names: set[str]) -> Object:
    return {name: value for name, value in mapping.items() if name not in names}


@pytest.mark.parametrize("case", GROUP_CASES)
def test_which_of_its_group_a_pod_is_says_leader_worker_set(case: str) -> None:
    for role, leader, _ in groups(case):
        command, *arguments = container(leader)["args"]
        given = dict(zip(arguments[::2], arguments[1::2], strict=True))

        assert command == f"{role}-worker"
        assert given["--nnodes"] == "$(LWS_GROUP_SIZE)"
        assert given["--node-rank"] == "$(LWS_WORKER_INDEX)"
        assert given["--master-addr"] == "$(LWS_LEADER_ADDRESS)"
        # It sets them in place of the pod's own, of which there must be none.
        assert not any(name.startswith("LWS_") for name in environment(leader))


@pytest.mark.parametrize("case", ["groups", "defaults"])
def test_a_worker_of_one_pod_is_told_of_no_group(case: str) -> None:
    for _, pod in pod_templates(objects(CASES[case])):
        assert "--nnodes" not in container(pod)["args"]
        assert "slipstream.dev/member" not in pod["metadata"]["labels"]


@pytest.mark.parametrize("case", GROUP_CASES)
def test_a_follower_outlives_its_leader_whose_ranks_it_has(case: str) -> None:
    """Also where both are told to end at the same moment: a follower waits for so long, and then ends."""
    for role, leader, follower in groups(case):
        graces_s = [each["spec"]["terminationGracePeriodSeconds"] for each in (leader, follower)]
        drain_s = settings_of(CASES[case], role)["worker"]["drain_timeout_s"]
        assert graces_s[0] >= drain_s + LEAST_MARGIN_S
        assert graces_s[1] >= graces_s[0] + LEAST_MARGIN_S


@pytest.mark.parametrize("case", GROUP_CASES)
def test_a_group_starts_at_once_and_anew_when_one_of_its_pods_is_lost(case: str) -> None:
    for each in of_kind(objects(CASES[case]), "LeaderWorkerSet"):
        # With LeaderReady nobody would start: a leader waits for its followers' parts of the model.
        assert each["spec"]["startupPolicy"] == "LeaderCreated"
        assert each["spec"]["leaderWorkerTemplate"]["restartPolicy"] == "RecreateGroupOnPodRestart"


@pytest.mark.parametrize(
    ("count", "config", "ranks"), [(8, {}, 16), (1, {}, 2), (0, {}, 2), (0, {"worker": {"tensor_parallel_size": 4}}, 4)]
)
def test_the_model_is_spread_over_the_gpus_of_all_pods(count: int, config: dict[str, Any], ranks: int) -> None:
    values = merged({"accelerator": {"count": count}, "config": config}, {"decode": GROUPS["decode"]})

    assert settings_of(values, "decode")["worker"]["tensor_parallel_size"] == ranks
    alone = {} if count == 0 and not config else {"tensor_parallel_size": count or 4}
    assert alone.items() <= settings_of(values, "prefill")["worker"].items()


def test_the_planners_budget_counts_the_gpus_of_all_pods() -> None:
    """Prefill: up to 4 workers of one pod. Decode: up to 3 of two. Each pod has four."""
    policy = named(objects(CASES["large-groups"]), "ConfigMap", "demo-slipstream")["data"]["policy.yaml"]

    assert parse_policy(policy, "policy.yaml").gpu_budget == 4 * (4 * 1 + 3 * 2)
    assert settings_of(CASES["large-groups"], "decode")["worker"]["tensor_parallel_size"] == 8


@pytest.mark.parametrize("case", GROUP_CASES)
def test_pods_of_a_group_reach_each_other_on_every_port(case: str) -> None:
    """torch.distributed, the tie between leader and followers, and agents of KV blocks listen where they like."""
    for _, leader, follower in groups(case):
        for port in (29501, 29502, 41234):
            assert reaches(case, labels(leader), labels(follower), port)
            assert reaches(case, labels(follower), labels(leader), port)
            assert reaches(case, labels(follower), labels(follower), port)


@pytest.mark.parametrize("case", GROUP_CASES)
def test_nobody_else_reaches_a_follower_and_only_metrics_are_read(case: str) -> None:
    own = {component(pod): labels(pod) for _, pod in pod_templates(objects(CASES[case])) if not is_worker(pod)}
    strangers = [{}, {"app": "shop"}, {"app.kubernetes.io/component": "decode"}]
    for _, leader, follower in groups(case):
        for port in (7700, 7702, 29501, 41234):
            others = [*own.values(), *strangers]
            assert not any(reaches(case, other, labels(follower), port) for other in others)
        assert reaches(case, {"app": "prometheus"}, labels(follower), 7701)
        assert reaches(case, own["frontend"], labels(leader), 7700)


def labels(pod: Object) -> dict[str, str]:
    found: dict[str, str] = pod["metadata"]["labels"]
    return found


def reaches(case: str, source: dict[str, str], target: dict[str, str], port: int) -> bool:
    out, into = policies(case, source, "Egress"), policies(case, target, "Ingress")
    leaves = not out or lets_through((r for p in out for r in p.get("egress", ())), "to", target, port)
    return leaves and lets_through((r for p in into for r in p.get("ingress", ())), "from", source, port)


@pytest.mark.parametrize("case", GROUP_CASES)
def test_a_follower_is_asked_for_its_metrics_since_it_serves_nothing_else(case: str) -> None:
    secure = "tls" in case
    for _, leader, follower in groups(case):
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            probe, leaders = container(follower)[kind], container(leader)[kind]
            asked = probe["exec"]["command"][3:5] if secure else [probe["httpGet"]["path"], probe["httpGet"]["port"]]
            assert asked == (["http", "https://$POD_IP:7701/metrics"] if secure else ["/metrics", "metrics"])
            for name in ("periodSeconds", "failureThreshold", "timeoutSeconds"):
                assert probe[name] == leaders[name]


@pytest.mark.parametrize(("metrics", "scheme"), [("tls", "HTTPS"), ("plain", "HTTP")])
def test_metrics_that_everybody_may_read_a_kubelet_reads_itself(metrics: str, scheme: str) -> None:
    values = merged(CASES["tls-large-groups"], {"config": {"security": {"metrics": metrics}}})
    followers = [pod for _, pod in pod_templates(objects(values)) if follows(pod)]

    assert len(followers) == 2
    for pod in followers:
        assert container(pod)["livenessProbe"]["httpGet"]["scheme"] == scheme


def test_prometheus_reads_followers_too() -> None:
    (monitor,) = of_kind(objects(CASES["large-groups"]), "PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]

    for _, leader, follower in groups("large-groups"):
        for pod in (leader, follower):
            assert selects(monitor["spec"]["selector"], labels(pod))
            assert endpoint["port"] in {each["name"] for each in container(pod)["ports"]}


amounts = st.one_of(st.integers(1, 5), st.integers(1, 100).map("{}%".format))


@settings(max_examples=25, deadline=None)
@given(amount=amounts, size=st.integers(1, 6), replicas=st.integers(1, 9))
def test_of_one_pool_no_more_groups_are_disrupted_than_the_value_says(
    amount: int | str, size: int, replicas: int
) -> None:
    """At worst each pod that may be evicted is of another group, and each of these groups then starts anew."""
    values = {"decode": {"workload": "LeaderWorkerSet", "groupSize": size, "maxUnavailable": amount}}
    budget = named(objects(values), "PodDisruptionBudget", "-decode")["spec"]["maxUnavailable"]

    assert evictable(budget, size * replicas) <= evictable(amount, replicas)
    assert evictable(budget, size * replicas) >= 1


def evictable(amount: int | str, pods: int) -> int:
    """As the disruption controller counts: percentages of pods are rounded up."""
    return amount if isinstance(amount, int) else -(-pods * int(amount.removesuffix("%")) // 100)


def terms(pod: Object, how: str) -> list[Object]:
    found = pod["spec"]["affinity"]["podAffinity"].get(f"{how}DuringSchedulingIgnoredDuringExecution", [])
    return [each.get("podAffinityTerm", each) | {"weight": each.get("weight")} for each in found]


def of_own_group(pod: Object, how: str) -> list[Object]:
    return [each for each in terms(pod, how) if each.get("matchLabelKeys") == [GROUP_KEY]]


def placed(groups: dict[str, str], near: list[str]) -> Object:
    values = merged(GROUPS, {"placement": {"groups": groups, "near": near}})
    return named(objects(values), "LeaderWorkerSet", "-decode")


def pods_of(workload: Object) -> list[Object]:
    return [pod for _, pod in pod_templates([workload])]


def test_pods_of_a_group_prefer_to_be_near_each_other_more_than_to_others() -> None:
    for pod in pods_of(placed({}, [RACK, "nvidia.com/gpu.clique"])):
        own, weights = of_own_group(pod, "preferred"), Counter[bool]()
        assert [each["topologyKey"] for each in own] == [RACK, "nvidia.com/gpu.clique"]
        for each in terms(pod, "preferred"):
            weights[each in own] = max(weights[each in own], each["weight"])
        assert 100 >= weights[True] > weights[False]
        # Without the key of the group it would be the pool's: the selector must take the pod itself.
        assert all(selects(each["labelSelector"], labels(pod)) for each in own)
        assert of_own_group(pod, "required") == []


def test_a_group_can_be_made_to_share_a_domain() -> None:
    workload = placed({"policy": "require", "topologyKey": RACK}, [])
    for pod in pods_of(workload):
        assert [each["topologyKey"] for each in of_own_group(pod, "required")] == [RACK]
        assert of_own_group(pod, "preferred") == []
    assert "leaderworkerset.sigs.k8s.io/exclusive-topology" not in workload["metadata"]["annotations"]


def test_a_group_can_have_a_domain_to_itself() -> None:
    workload = placed({"policy": "exclusive", "topologyKey": RACK}, [])

    assert workload["metadata"]["annotations"]["leaderworkerset.sigs.k8s.io/exclusive-topology"] == RACK
    assert all(of_own_group(pod, "required") == [] for pod in pods_of(workload))


@pytest.mark.parametrize("policy", ["require", "exclusive"])
def test_a_domain_must_be_named_where_it_counts(policy: str) -> None:
    with pytest.raises(RefusedError, match=rf"placement.groups.topologyKey: which label .* \(.* is {policy}\)"):
        texts(merged(GROUPS, {"placement": {"groups": {"policy": policy}}}))
    assert texts({"placement": {"groups": {"policy": policy}}}), "no groups, no matter"


@pytest.mark.parametrize("role", ROLES)
def test_groups_need_what_makes_groups_and_an_engine_that_has_ranks(role: str) -> None:
    with pytest.raises(RefusedError, match=rf"{role}.groupSize: more than 1 needs {role}.workload: LeaderWorkerSet"):
        texts({role: {"groupSize": 2}})
    with pytest.raises(RefusedError, match=rf"{role}.groupSize: a simulated engine is one process, .* among 2 pods"):
        texts(merged(preset("simulated"), {role: GROUPS[role]}))
    with pytest.raises(RefusedError, match=rf"{role}.groupSize: a simulated engine"):
        texts({role: GROUPS[role] | {"config": {"worker": {"engine": "simulated"}}}})


def test_the_notes_say_how_to_see_the_groups() -> None:
    notes = texts(CASES["efa-large-groups"])["NOTES.txt"]

    assert "Each decode worker is a group of 2 pods with 16 GPUs" in notes
    assert "name=demo-slipstream-decode" in notes
    assert "WARNING" not in notes.replace("WARNING: no API keys", "")
    opened = texts(merged(CASES["efa-large-groups"], {"networkPolicy": {"enabled": False}}))["NOTES.txt"]
    assert "WARNING: whoever reaches the ports by which the pods of a group compute together" in opened
