"""The manifest for KubeRay: its own fields by a schema of the CRD's fields that are used, the rest by Kubernetes' own.

The schema is written down here from KubeRay 1.5's API reference, strictly: a field that is not in it is refused.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import typer.main
import yaml

import deploy.ray
from slipstream.cli.app import app

MANIFEST = Path(deploy.ray.__file__).with_name("kuberay.yaml")
KUBERNETES = "1.31"

_STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
_TEMPLATE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["spec"],
    "properties": {"metadata": {"type": "object"}, "spec": {"type": "object"}},
}
_COUNT = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}


def _object(required: list[str], properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


RAY_CLUSTER = _object(
    ["apiVersion", "kind", "metadata", "spec"],
    {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayCluster"},
        "metadata": _object(["name"], {"name": {"type": "string", "maxLength": 50}, "annotations": _STRINGS}),
        "spec": _object(
            ["headGroupSpec"],
            {
                "rayVersion": {"type": "string"},
                "authOptions": _object([], {"mode": {"enum": ["disabled", "token"]}, "secretName": {"type": "string"}}),
                "enableInTreeAutoscaling": {"type": "boolean"},
                "headGroupSpec": _object(
                    ["template"],
                    {
                        "serviceType": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
                        "rayStartParams": _STRINGS,
                        "template": _TEMPLATE,
                    },
                ),
                "workerGroupSpecs": {
                    "type": "array",
                    "items": _object(
                        ["groupName", "maxReplicas", "minReplicas", "template"],
                        {
                            "groupName": {"type": "string"},
                            "replicas": _COUNT,
                            "minReplicas": _COUNT,
                            "maxReplicas": _COUNT,
                            "numOfHosts": _COUNT,
                            "rayStartParams": _STRINGS,
                            "template": _TEMPLATE,
                        },
                    ),
                },
            },
        ),
    },
)


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(MANIFEST.read_text()))


@pytest.fixture(scope="module")
def cluster(documents: list[dict[str, Any]]) -> dict[str, Any]:
    return documents[0]


def pods(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    spec = cluster["spec"]
    groups = {group["groupName"]: group["template"]["spec"] for group in spec["workerGroupSpecs"]}
    return {"head": spec["headGroupSpec"]["template"]["spec"], **groups}


def launched(cluster: dict[str, Any]) -> list[str]:
    """The words after `slipstream` in the head's script, with the variables that its shell puts in."""
    (container,) = pods(cluster)["head"]["containers"]
    script = container["args"][0].replace("\\\n", " ").replace("$POD_IP", "10.0.0.1")
    (line,) = re.findall(r"^exec slipstream (.*)$", script, re.MULTILINE)
    return shlex.split(line)


def test_its_own_fields_are_those_of_the_crd(cluster: dict[str, Any]) -> None:
    jsonschema.validate(cluster, RAY_CLUSTER)


def test_a_field_that_the_crd_has_not_is_refused(cluster: dict[str, Any]) -> None:
    wrong = {**cluster, "spec": {**cluster["spec"], "workers": 3}}
    with pytest.raises(jsonschema.ValidationError, match="workers"):
        jsonschema.validate(wrong, RAY_CLUSTER)


@pytest.mark.parametrize("group", ["head", "gpu"])
def test_pods_are_valid_for_kubernetes(cluster: dict[str, Any], group: str) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": group}, "spec": pods(cluster)[group]}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    wrong = {**pod, "spec": {**pods(cluster)[group], "terminationGraceSeconds": 3}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def test_the_service_is_valid_and_leads_to_the_head(documents: list[dict[str, Any]], cluster: dict[str, Any]) -> None:
    _, service = documents
    kubernetes_validate.validate(service, KUBERNETES, strict=True)
    assert service["spec"]["selector"] == {"ray.io/cluster": cluster["metadata"]["name"], "ray.io/node-type": "head"}
    (container,) = pods(cluster)["head"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports.keys()


def test_the_command_line_takes_what_the_head_gives_it(cluster: dict[str, Any]) -> None:
    command, *flags = launched(cluster)
    given = typer.main.get_command(app).commands[command].make_context(command, flags).params  # type: ignore[attr-defined]
    assert given["cluster__on"] == "ray"
    assert given["cluster__max_workers"] >= given["cluster__prefill"] + given["cluster__decode"]
    (container,) = pods(cluster)["head"]["containers"]
    assert given["control_plane__metrics_port"] in [port["containerPort"] for port in container["ports"]]


def test_the_nodes_have_room_for_all_workers(cluster: dict[str, Any]) -> None:
    command, *flags = launched(cluster)
    given = typer.main.get_command(app).commands[command].make_context(command, flags).params  # type: ignore[attr-defined]
    (group,) = cluster["spec"]["workerGroupSpecs"]
    resources = group["template"]["spec"]["containers"][0]["resources"]["requests"]
    for name, each in (("nvidia.com/gpu", given["ray__gpus_per_worker"]), ("cpu", given["ray__cpus_per_worker"])):
        assert group["replicas"] * int(resources[name]) >= given["cluster__max_workers"] * each


def test_a_pod_that_ends_has_time_for_the_drain_that_ray_announces(cluster: dict[str, Any]) -> None:
    pod = pods(cluster)["gpu"]
    (announced,) = [
        float(one["value"])
        for one in pod["containers"][0]["env"]
        if one["name"] == "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
    ]
    assert announced < pod["terminationGracePeriodSeconds"]


def test_every_container_runs_a_command_of_its_own(cluster: dict[str, Any]) -> None:
    assert cluster["metadata"]["annotations"]["ray.io/overwrite-container-cmd"] == "true"
    for pod in pods(cluster).values():
        (container,) = pod["containers"]
        assert "$KUBERAY_GEN_RAY_START_CMD" in container["args"][0]
