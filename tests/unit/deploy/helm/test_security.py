"""Components of a release know each other: by a shared secret, or by certificates that say their role."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from slipstream.security.names import ComponentRole, parse_uri
from tests.support.helm import RefusedError
from tests.support.one_secret_server import secrets_served
from tests.unit.deploy.helm.chart import (
    CASES,
    NAMESPACE,
    component,
    container,
    merged,
    named,
    objects,
    of_kind,
    pod_templates,
    texts,
)
from tests.unit.deploy.helm.test_manifests import NEWEST, OLDEST, problems

SECRET = "demo-slipstream-cluster-token"
KEYED: dict[str, Any] = {"frontend": {"keys": {"secret": "slipstream-keys", "key": "acme.yaml"}}}

ROLE_OF = {
    "control-plane": ComponentRole.CONTROL_PLANE,
    "frontend": ComponentRole.FRONTEND,
    "prefill": ComponentRole.WORKER,
    "decode": ComponentRole.WORKER,
    "test": ComponentRole.OPERATOR,
}


def secret_of(case: str, who: str, mount: str = "/etc/slipstream-security") -> str:
    """The Secret that a component's container finds there."""
    pod = next(pod for _, pod in pod_templates(objects(CASES[case])) if component(pod) == who)
    (volume,) = [each["name"] for each in container(pod)["volumeMounts"] if each["mountPath"] == mount]
    (secret,) = [each["secret"] for each in pod["spec"]["volumes"] if each["name"] == volume]
    assert secret["defaultMode"] == 0o440
    name: str = secret["secretName"]
    return name


def test_without_certificates_all_have_the_token_that_was_made() -> None:
    made = named(objects(CASES["defaults"]), "Secret", "cluster-token")
    assert len(base64.b64decode(made["data"]["token"])) == 64
    assert {secret_of("defaults", who) for who in ROLE_OF} == {made["metadata"]["name"]}


def token(values: dict[str, Any], kubeconfig: Path | None = None) -> str:
    """That of the Secret which the release would have."""
    (secret,) = [each for each in yaml.safe_load_all(texts(values, kubeconfig)["security.yaml"]) if each]
    assert secret["metadata"]["name"] == SECRET
    return base64.b64decode(secret["data"]["token"]).decode()


def test_a_token_is_made_once_and_kept_by_upgrades(tmp_path: Path) -> None:
    there: dict[str, dict[str, str]] = {}
    with secrets_served(NAMESPACE, there, tmp_path) as kubeconfig:
        made = token({}, kubeconfig)
        assert made != token({}, kubeconfig), "nothing is there yet"
        there[SECRET] = {"token": base64.b64encode(made.encode()).decode()}
        assert token({}, kubeconfig) == made
        rotated = f"{'n' * 32}\n{made}\n"
        there[SECRET] = {"token": base64.b64encode(rotated.encode()).decode()}
        assert token({}, kubeconfig) == rotated, "what was put into it by hand stays"


def test_a_secret_that_holds_no_token_is_not_overwritten_with_nothing(tmp_path: Path) -> None:
    with (
        secrets_served(NAMESPACE, {SECRET: {"other": "eA=="}}, tmp_path) as kubeconfig,
        pytest.raises(RefusedError, match=f"the Secret {SECRET} is there and has no key `token`"),
    ):
        texts({}, kubeconfig)


def test_without_looking_at_the_cluster_only_a_token_that_is_named_stays_the_same() -> None:
    said = {"clusterToken": {"value": "0123456789abcdef\nfedcba9876543210"}}

    assert token({}) != token({})
    assert token(said) == token(said) == said["clusterToken"]["value"]


def test_a_token_that_is_said_goes_before_the_one_that_is_there(tmp_path: Path) -> None:
    with secrets_served(NAMESPACE, {SECRET: {"token": "b2xk"}}, tmp_path) as kubeconfig:
        assert token({"clusterToken": {"value": "new-token-of-16-or-more"}}, kubeconfig) == "new-token-of-16-or-more"


@pytest.mark.parametrize(
    "value", ["short", "with a space in the middle", "0123456789abcdef\nshort", "ümlaut-0123456789"]
)
def test_a_token_that_the_product_would_refuse_is_refused_before(value: str) -> None:
    with pytest.raises(RefusedError, match="/clusterToken/value"):
        texts({"clusterToken": {"value": value}})


def test_two_tokens_that_are_said_are_one_too_many() -> None:
    with pytest.raises(RefusedError, match=r"clusterToken.value: clusterToken.existingSecret is set too"):
        texts({"clusterToken": {"value": "0123456789abcdef", "existingSecret": "mine"}})


def test_no_token_is_in_a_pod_or_in_the_settings() -> None:
    said = {"clusterToken": {"value": "a-token-that-is-secret"}}

    for each in objects(said):
        assert each["kind"] == "Secret" or "a-token-that-is-secret" not in json.dumps(each)


def test_a_token_of_ones_own_is_taken() -> None:
    assert of_kind(objects(CASES["own-token"]), "Secret") == []
    assert {secret_of("own-token", who) for who in ROLE_OF} == {"mine"}


@pytest.mark.parametrize("who", ROLE_OF)
def test_each_has_the_certificate_of_its_role(who: str) -> None:
    rendered = objects(CASES["tls"])
    assert of_kind(rendered, "Secret") == []
    certificates = {each["spec"]["secretName"]: each["spec"] for each in of_kind(rendered, "Certificate")}
    certificate = certificates[secret_of("tls", who)]
    name = parse_uri(certificate["uris"][0])
    assert name is not None
    assert name.role is ROLE_OF[who]
    assert certificate["dnsNames"] == [name.dns]


def test_the_faces_certificate_has_the_names_of_clients() -> None:
    face = named(objects(CASES["tls"]), "Certificate", "face")
    assert face["spec"]["secretName"] == secret_of("tls", "frontend", "/etc/slipstream-face")
    assert "llm.example.com" in face["spec"]["dnsNames"]


def test_certificates_of_ones_own_are_taken() -> None:
    assert of_kind(objects(CASES["own-certificates"]), "Certificate", "Secret") == []
    assert secret_of("own-certificates", "decode") == "mine"


@pytest.mark.parametrize("values", [KEYED, merged(CASES["tls"], KEYED)], ids=["token", "tls"])
def test_api_keys_are_a_file_that_frontends_alone_read_and_nobody_writes(values: dict[str, Any]) -> None:
    rendered = objects(values)
    for _, pod in pod_templates(rendered):
        volumes = [each for each in pod["spec"]["volumes"] if "slipstream-keys" in json.dumps(each)]
        if component(pod) != "frontend":
            assert volumes == []
            continue
        (volume,) = volumes
        # Readable by the group, which is the pod's (fsGroup), and by nobody else.
        assert volume["secret"] == {"secretName": "slipstream-keys", "defaultMode": 0o440}
        (mount,) = [each for each in container(pod)["volumeMounts"] if each["name"] == volume["name"]]
        assert mount["readOnly"] is True
        settings = yaml.safe_load(named(rendered, "ConfigMap", "demo-slipstream")["data"]["frontend.yaml"])
        assert settings["security"]["keys_file"] == f"{mount['mountPath']}/acme.yaml"
    assert problems(rendered, OLDEST) == problems(rendered, NEWEST) == []


def test_api_keys_that_are_rotated_reach_the_frontends() -> None:
    """A kubelet swaps a Secret's folder, but never a single file of it (`subPath`); what the product does then is in
    `tests/unit/frontend/keys/test_key_file.py`."""
    deployment = named(objects(KEYED), "Deployment", "-frontend")
    (mount,) = [each for each in container(deployment["spec"]["template"])["volumeMounts"] if each["name"] == "keys"]

    assert mount.keys().isdisjoint({"subPath", "subPathExpr"})
    (volume,) = [each for each in deployment["spec"]["template"]["spec"]["volumes"] if each["name"] == "keys"]
    assert "items" not in volume["secret"], "whatever is in it then"


def test_no_api_key_is_in_arguments_or_variables() -> None:
    for _, pod in pod_templates(objects(KEYED)):
        told = [*container(pod)["args"], *(json.dumps(each) for each in container(pod).get("env", ()))]
        assert not any("keys" in each.lower() for each in told)
        assert not any("secretKeyRef" in each for each in told)


def test_without_keys_frontends_say_that_they_are_open_to_those_whom_the_policy_lets_through() -> None:
    settings = yaml.safe_load(named(objects({}), "ConfigMap", "demo-slipstream")["data"]["frontend.yaml"])

    assert settings["security"]["anonymous"] is True
    assert "WARNING: no API keys" in texts({})["NOTES.txt"]
    assert "WARNING: no API keys" not in texts(KEYED)["NOTES.txt"]
