"""Components of a release know each other: by a shared secret, or by certificates that say their role."""

from __future__ import annotations

import base64

import pytest

from slipstream.security.names import ComponentRole, parse_uri
from tests.unit.deploy.helm.chart import CASES, component, container, named, objects, of_kind, pod_templates

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
