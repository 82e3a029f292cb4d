"""Values that do not exist, or do not fit, are refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from slipstream.describe_settings import CHART_SCHEMA, render_chart_schema
from slipstream.settings import Settings
from tests.support import helm
from tests.support.helm import RefusedError
from tests.unit.deploy.helm.chart import BASE, CASES, CHART, merged, preset, texts

REFUSED = [
    ({"modell": {}}, "modell"),
    ({"prefill": {"gpus": 2}}, "gpus"),
    ({"decode": {"resources": {"limit": {}}}}, "limit"),
    ({"fabric": {"kind": "ethernet"}}, "/fabric/kind"),
    ({"fabric": {"env": {"FI PROVIDER": "efa"}}}, "FI PROVIDER"),
    ({"accelerator": {"count": 65}}, "/accelerator/count"),
    ({"scaling": {"mode": "both"}}, "/scaling/mode"),
    ({"podSecurity": {"runAsUser": 0}}, "/podSecurity/runAsUser"),
    ({"images": {"worker": {"digest": "sha256:abc"}}}, "/images/worker/digest"),
    ({"model": {"cache": {"type": "nfs"}}}, "/model/cache/type"),
    ({"config": {"worker": {"max_runing": 1}}}, "max_runing"),
    ({"config": {"worker": {"max_running": 0}}}, "/config/worker/max_running"),
    ({"config": {"frontend": {"http_port": 80}}}, "http_port"),
    ({"decode": {"config": {"worker": {"port": 1}}}}, "port"),
    ({"decode": {"config": {"frontend": {}}}}, "frontend"),
    ({"config": {"transfer": {"transport": "rdma"}}}, "/config/transfer/transport"),
    ({"prefill": {"shmSize": "8 GB"}}, "/prefill/shmSize"),
    ({"networkPolicy": {"clients": [{"cidr": "10.0.0.0/8"}]}}, "cidr"),
]
NOT_FITTING = [
    ({"model": {"name": ""}}, "model.name"),
    ({"model": {"name": "/cache/m"}}, "model.cache"),
    ({"scaling": {"prefill": {"min": 9, "max": 3}}}, "scaling.prefill.min"),
    ({"frontend": {"autoscaling": {"minReplicas": 9}}}, "frontend.autoscaling.minReplicas"),
    ({"serviceAccounts": {"create": False}}, "serviceAccounts."),
]


@pytest.mark.parametrize(("values", "field"), REFUSED, ids=[field for _, field in REFUSED])
def test_a_value_that_does_not_exist_is_refused_by_name(values: dict[str, Any], field: str) -> None:
    with pytest.raises(RefusedError) as refused:
        texts(values)

    assert "don't meet the specifications of the schema" in str(refused.value)
    assert field in str(refused.value)


@pytest.mark.parametrize(("values", "field"), NOT_FITTING, ids=[field for _, field in NOT_FITTING])
def test_values_that_do_not_fit_together_are_refused_by_name(values: dict[str, Any], field: str) -> None:
    with pytest.raises(RefusedError) as refused:
        texts(values)

    assert field in str(refused.value)


def test_without_a_models_name_nothing_is_rendered() -> None:
    with pytest.raises(RefusedError, match=r"model.name: a Hugging Face id, or a folder in the model cache, is needed"):
        helm.render(CHART, {}, name="demo", namespace="llm")


def schema() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(CHART_SCHEMA.read_text())
    return found


def nodes(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Each schema within the schema, with its place."""
    if isinstance(node, list):
        for number, each in enumerate(node):
            yield from nodes(each, f"{path}/{number}")
    elif isinstance(node, dict):
        yield path, node
        for name, each in node.items():
            yield from nodes(each, f"{path}/{name}")


def test_the_schema_is_one_and_lets_no_unknown_name_through() -> None:
    jsonschema.Draft7Validator.check_schema(schema())
    lax = [
        path
        for path, node in nodes(schema())
        if node.get("type") == "object" and "properties" in node and node.get("additionalProperties") is not False
    ]

    assert lax == []


def test_every_value_has_a_description_in_the_schema() -> None:
    silent = [
        f"{path}/{name}"
        for path, node in nodes(schema())
        if isinstance(node.get("properties"), dict) and node.get("type") == "object"
        for name, value in node["properties"].items()
        if "description" not in value
        and "$ref" not in value
        and "allOf" not in value
        and not path.endswith("/properties")
    ]

    assert silent == []


def paths(values: Any, path: str = "") -> Iterator[str]:
    if isinstance(values, dict) and values:
        for name, value in values.items():
            yield from paths(value, f"{path}.{name}" if path else name)
    else:
        yield path


def test_every_value_of_the_schema_has_a_default_in_the_values_file() -> None:
    definitions = schema()["definitions"]
    free = {"config", "global"}

    def known(node: dict[str, Any], path: str) -> Iterator[str]:
        if "$ref" in node:
            node = definitions[node["$ref"].rpartition("/")[2]]
        properties = node.get("properties")
        if properties and path.rpartition(".")[2] not in free:
            for name, value in properties.items():
                yield from known(value, f"{path}.{name}" if path else name)
        else:
            yield path

    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    missing = []
    for path in known(schema(), ""):
        if path == "global" or ".resources." in path or ".image" in path:
            continue
        here: Any = defaults
        for name in path.split("."):
            if not isinstance(here, dict) or name not in here:
                missing.append(path)
                break
            here = here[name]

    assert missing == []


def test_the_schemas_settings_are_those_of_the_product() -> None:
    current = CHART_SCHEMA.read_text(encoding="utf-8")

    assert current == render_chart_schema(current), "run `make docs`"


def test_what_the_schema_takes_as_settings_the_product_takes() -> None:
    settings = schema()["definitions"]["settings"]["properties"]
    for name, section in settings.items():
        assert name in Settings.model_fields
        fields = getattr(Settings.model_fields[name].annotation, "model_fields", None)
        assert fields is None or section["properties"].keys() <= fields.keys()


@pytest.mark.parametrize("name", sorted(path.name for path in CHART.glob("values-*.yaml")))
def test_a_preset_is_one_that_is_tested_and_fits_the_schema(name: str) -> None:
    fabric = name.removeprefix("values-").removesuffix(".yaml")

    assert CASES[fabric] == preset(fabric)
    helm.validate_schema(CHART, merged(BASE, preset(fabric)))


def test_a_packaged_chart_holds_the_alerts_and_dashboards_that_it_links_to(tmp_path: Path) -> None:
    archive = helm.package(CHART, tmp_path)

    values = merged(BASE, CASES["watched"], CASES["own-token"])  # else a new one is made each time
    packaged = helm.render(archive, values, name="demo", namespace="llm")
    assert packaged == helm.render(CHART, values, name="demo", namespace="llm")
    assert "SlipstreamNoDecodeWorker" in packaged["slipstream/templates/monitors.yaml"]
