"""Who finds whom: selectors, Services, monitors, and the NetworkPolicies that must let through what components say."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.deploy.helm.chart import (
    CASES,
    NAMESPACE,
    ROLES,
    Object,
    component,
    container,
    follows,
    named,
    objects,
    of_kind,
    pod_templates,
    selects,
)

# From whom to whom, on which ports (None: any), whatever the values are.
LINKS = [
    ("frontend", "control-plane", 7600),
    ("prefill", "control-plane", 7600),
    ("decode", "control-plane", 7600),
    ("test", "control-plane", 7600),
    ("frontend", "prefill", 7700),
    ("frontend", "decode", 7700),
    ("control-plane", "prefill", 7700),
    ("control-plane", "decode", 7700),
    ("prefill", "decode", 7702),
    ("decode", "prefill", 7702),
    # UCX and NIXL listen on ports of their own choice; a prefill worker fetches from others of its role too.
    ("prefill", "decode", 45123),
    ("decode", "prefill", 45123),
    ("prefill", "prefill", 45123),
    ("decode", "decode", 45123),
]
NOT_NEEDED = [
    ("frontend", "prefill", 7702),
    ("test", "decode", 7700),
    ("test", "frontend", 9999),
    ("frontend", "frontend", 22),
    ("decode", "frontend", 9000),
    ("control-plane", "frontend", 9000),
]
CLOSED_CASES = [case for case in CASES if case != "open"]


def labels_by_component(case: str) -> dict[str, dict[str, str]]:
    """Of workers that are groups, those of their leaders: what followers may do is told by `test_groups`."""
    pods = [pod for _, pod in pod_templates(objects(CASES[case])) if not follows(pod)]
    return {component(pod): pod["metadata"]["labels"] for pod in pods}


def policies(case: str, labels: dict[str, str], direction: str) -> list[Object]:
    """Those that say something of these pods' traffic in that direction."""
    return [
        each["spec"]
        for each in of_kind(objects(CASES[case]), "NetworkPolicy")
        if selects(each["spec"]["podSelector"], labels) and direction in each["spec"]["policyTypes"]
    ]


def lets_through(rules: Iterator[Object], peer_key: str, peer: dict[str, str], port: int) -> bool:
    for rule in rules:
        ports = [each["port"] for each in rule.get("ports", ())]
        if ports and port not in ports:
            continue
        peers = rule.get(peer_key)
        if not peers or any(_is(each, peer) for each in peers):
            return True
    return False


def _is(peer: Object, labels: dict[str, str]) -> bool:
    if "ipBlock" in peer:
        return False
    # A namespace of the release's name or none: its own pods are in NAMESPACE.
    namespace_fits = selects(peer.get("namespaceSelector", {}), {"kubernetes.io/metadata.name": NAMESPACE})
    return namespace_fits and selects(peer.get("podSelector", {}), labels)


def allowed(case: str, source: str, target: str, port: int) -> bool:
    labels = labels_by_component(case)
    out = policies(case, labels[source], "Egress")
    into = policies(case, labels[target], "Ingress")
    leaves = not out or lets_through((r for p in out for r in p.get("egress", ())), "to", labels[target], port)
    enters = not into or lets_through((r for p in into for r in p.get("ingress", ())), "from", labels[source], port)
    return leaves and enters


@pytest.mark.parametrize("case", CASES)
def test_every_link_of_the_components_is_let_through(case: str) -> None:
    assert [link for link in LINKS if not allowed(case, *link)] == []


@pytest.mark.parametrize("case", CLOSED_CASES)
def test_what_no_component_needs_is_not(case: str) -> None:
    assert [link for link in NOT_NEEDED if allowed(case, *link)] == []


@pytest.mark.parametrize("case", CLOSED_CASES)
def test_a_policy_denies_by_default_for_every_pod(case: str) -> None:
    default = named(objects(CASES[case]), "NetworkPolicy", "-default")["spec"]

    assert "ingress" not in default
    assert all(selects(default["podSelector"], labels) for labels in labels_by_component(case).values())


@pytest.mark.parametrize("case", CLOSED_CASES)
def test_every_pod_may_ask_for_names(case: str) -> None:
    for labels in labels_by_component(case).values():
        rules = [rule for policy in policies(case, labels, "Egress") for rule in policy.get("egress", ())]
        ports = [(each["port"], each.get("protocol")) for rule in rules for each in rule.get("ports", ())]
        assert {(53, "UDP"), (53, "TCP")} <= set(ports)


def test_traces_may_leave_to_the_collectors_port() -> None:
    rules = [
        rule
        for policy in policies("closed", labels_by_component("closed")["decode"], "Egress")
        for rule in policy.get("egress", ())
    ]

    assert [{"port": 4317, "protocol": "TCP"}] in [rule.get("ports") for rule in rules]
    assert [{"port": 3128, "protocol": "TCP"}] in [rule.get("ports") for rule in rules]


def test_without_downloads_no_pod_reaches_port_443() -> None:
    for labels in labels_by_component("closed").values():
        rules = [rule for policy in policies("closed", labels, "Egress") for rule in policy.get("egress", ())]
        assert not [rule for rule in rules if {"port": 443} in rule.get("ports", ())]


@pytest.mark.parametrize("case", CASES)
def test_selectors_find_their_own_pods_and_no_others(case: str) -> None:
    rendered = objects(CASES[case])
    for each in of_kind(rendered, "Deployment"):
        own = each["spec"]["template"]["metadata"]["labels"]
        selector = each["spec"]["selector"]
        assert selects(selector, own)
        assert [who for who, labels in labels_by_component(case).items() if selects(selector, labels)] == [
            own["app.kubernetes.io/component"]
        ]


@pytest.mark.parametrize("case", CASES)
def test_every_port_of_a_service_is_a_port_of_its_pods(case: str) -> None:
    rendered = objects(CASES[case])
    for service in of_kind(rendered, "Service"):
        selector = {"matchLabels": service["spec"]["selector"]}
        pods = [pod for _, pod in pod_templates(rendered) if selects(selector, pod["metadata"]["labels"])]
        assert len(pods) == 1
        names = {each["name"] for each in container(pods[0])["ports"]}
        assert {each["targetPort"] for each in service["spec"]["ports"]} <= names


def test_monitors_find_the_metrics_of_every_component() -> None:
    rendered = objects(CASES["watched"])
    found = set()
    for monitor in of_kind(rendered, "ServiceMonitor"):
        (service,) = [
            each
            for each in of_kind(rendered, "Service")
            if selects(monitor["spec"]["selector"], each["metadata"]["labels"])
        ]
        (endpoint,) = monitor["spec"]["endpoints"]
        assert endpoint["port"] in {each["name"] for each in service["spec"]["ports"]}
        found.add(service["spec"]["selector"]["app.kubernetes.io/component"])
    (monitor,) = of_kind(rendered, "PodMonitor")
    for _, pod in pod_templates(rendered):
        if selects(monitor["spec"]["selector"], pod["metadata"]["labels"]):
            (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
            assert endpoint["port"] in {each["name"] for each in container(pod)["ports"]}
            found.add(component(pod))

    assert found == {"frontend", "control-plane", *ROLES}


@pytest.mark.parametrize("case", CASES)
def test_what_a_pod_names_is_there(case: str) -> None:
    rendered = objects(CASES[case])
    there = {(each["kind"], each["metadata"]["name"]) for each in rendered}
    given = {("PersistentVolumeClaim", "models")} | {("ServiceAccount", name) for name in "abc"}
    for _, pod in pod_templates(rendered):
        if "serviceAccountName" in pod["spec"]:
            assert ("ServiceAccount", pod["spec"]["serviceAccountName"]) in there | given
        for volume in pod["spec"]["volumes"]:
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in there
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in there | given
        for claim in pod["spec"].get("resourceClaims", ()):
            assert ("ResourceClaimTemplate", claim["resourceClaimTemplateName"]) in there
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        assert {mount["name"] for mount in container(pod)["volumeMounts"]} == volumes


@pytest.mark.parametrize("case", ["hpa", "keda", "keda-groups"])
def test_autoscalers_scale_what_is_there_and_its_number_is_not_fixed(case: str) -> None:
    rendered = objects(CASES[case])
    there = {(each["kind"], each["apiVersion"], each["metadata"]["name"]): each for each in rendered}
    scalers = of_kind(rendered, "HorizontalPodAutoscaler", "ScaledObject")

    assert len(scalers) == (3 if case == "hpa" else 2)
    for scaler in scalers:
        target = scaler["spec"]["scaleTargetRef"]
        assert "replicas" not in there[(target["kind"], target["apiVersion"], target["name"])]["spec"]


@pytest.mark.parametrize("case", CASES)
def test_at_most_one_scaler_scales_a_pool(case: str) -> None:
    rendered = objects(CASES[case])
    targets = [
        each["spec"]["scaleTargetRef"]["name"] for each in of_kind(rendered, "HorizontalPodAutoscaler", "ScaledObject")
    ]

    assert len(targets) == len(set(targets))
