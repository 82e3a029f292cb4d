"""What the chart renders is what API servers take: checked against the schemas of several Kubernetes versions."""

from __future__ import annotations

import functools
import json
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from tests.support import helm
from tests.unit.deploy.helm import custom_resources
from tests.unit.deploy.helm.chart import BASE, CASES, CHART, Object, objects, of_kind, own_objects, pod_templates

OLDEST, NEWEST = "1.30", "1.37"
# Cases that need a newer Kubernetes than the oldest.
SINCE = {"claims": "1.34", "tls-large-groups": "1.34"}
IN_BETWEEN = [("defaults", "1.34"), ("efa-large-groups", "1.34"), ("planner", "1.34"), ("watched", "1.34")]
VERSIONS = [(case, version) for case in CASES for version in (OLDEST, NEWEST) if version >= SINCE.get(case, "")]
VERSIONS += [*IN_BETWEEN, *SINCE.items()]


@functools.cache
def problem(text: str, version: str) -> str:
    """What the schema says against an object; the same object is asked about once."""
    manifest = json.loads(text)
    schema = custom_resources.SCHEMAS.get((manifest["apiVersion"], manifest["kind"]))
    try:
        if schema is not None:
            jsonschema.validate(manifest, schema)
        else:
            kubernetes_validate.validate(manifest, version, strict=True)
    except (jsonschema.ValidationError, kubernetes_validate.ValidationError) as error:
        return f"{manifest['kind']} {manifest['metadata']['name']}: {error.json_path}: {error.message}"
    return ""


def to_check(rendered: list[Object]) -> list[Object]:
    """With the pods inside of custom resources, which their schemas leave out."""
    pods = []
    for each in of_kind(rendered, "LeaderWorkerSet"):
        for number, (_, template) in enumerate(pod_templates([each])):
            metadata = template["metadata"] | {"name": f"{each['metadata']['name']}-{number}"}
            pods.append({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]})
    return rendered + pods


def problems(rendered: list[Object], version: str) -> list[str]:
    found = [problem(json.dumps(each, sort_keys=True), version) for each in to_check(rendered)]
    return [each for each in found if each]


@pytest.mark.parametrize(("case", "version"), VERSIONS)
def test_every_manifest_is_valid(case: str, version: str) -> None:
    assert problems(objects(CASES[case]), version) == []


def test_the_check_sees_a_field_that_does_not_exist() -> None:
    rendered = own_objects(CASES["efa-large-groups"])
    pod = next(template for name, template in pod_templates(rendered) if "follower" in name)
    pod["spec"]["containers"][0]["resource"] = {}
    next(iter(of_kind(rendered, "LeaderWorkerSet")))["spec"]["replica"] = 1

    found = problems(rendered, NEWEST)

    assert any("'resource' was unexpected" in each for each in found)
    assert any("'replica' was unexpected" in each for each in found)


@pytest.mark.parametrize("case", CASES)
def test_no_two_objects_have_the_same_name(case: str) -> None:
    keys = [
        (each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"]) for each in objects(CASES[case])
    ]

    assert len(keys) == len(set(keys))
    assert all(len(name) <= 63 for _, _, name in keys)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_helm_finds_nothing_to_warn_of(version: str) -> None:
    report: dict[str, Any] = helm.lint(CHART, BASE, kube_version=f"v{version}.0")

    said = [each["error"] for each in report["messages"]]
    assert report["errors"] == []
    assert said == ["icon is recommended"]
