"""`slipstream ca`: what it writes is right, private, and can be renewed."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from slipstream.cli.app import app
from slipstream.errors import ConfigError
from slipstream.security.authority import Authority
from slipstream.security.files import TlsFiles, read_tls, read_tokens
from slipstream.security.identity import FACE, pair
from slipstream.security.names import ComponentName, ComponentRole, component_name, parse_uri

run = CliRunner().invoke


def made(folder: Path, *more: str) -> Path:
    result = run(app, ["ca", "init", str(folder), *more])
    assert result.exit_code == 0, result.output
    return folder


def test_one_command_makes_everything_and_keys_are_private(tmp_path: Path) -> None:
    folder = made(tmp_path / "certificates", "--host", "llm.example.com", "--cluster", "blue")
    for role in ComponentRole:
        certificate, key = pair(folder, role)
        material = read_tls(TlsFiles(certificate, key, folder / "ca.pem"))
        assert material.name == ComponentName("blue", role, "any")
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        assert "PRIVATE" not in repr(material)
    authority_key = folder / "authority" / "ca-key.pem"
    assert stat.S_IMODE(authority_key.stat().st_mode) == 0o600
    assert stat.S_IMODE(authority_key.parent.stat().st_mode) == 0o700
    face = x509.load_pem_x509_certificate(pair(folder, FACE)[0].read_bytes())
    assert isinstance(face.public_key(), ec.EllipticCurvePublicKey)
    names = face.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {"localhost", "llm.example.com"} <= set(names.get_values_for_type(x509.DNSName))
    assert "127.0.0.1" in {str(address) for address in names.get_values_for_type(x509.IPAddress)}


def test_components_certificates_are_signed_by_the_authority_and_end_soon(tmp_path: Path) -> None:
    folder = made(tmp_path)
    authority = Authority.load(folder)
    certificate = x509.load_pem_x509_certificate((folder / "worker.pem").read_bytes())
    certificate.verify_directly_issued_by(authority.certificate)
    assert (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days == 30
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_an_authority_is_not_overwritten(tmp_path: Path) -> None:
    before = (made(tmp_path) / "ca.pem").read_bytes()
    again = run(app, ["ca", "init", str(tmp_path)])
    assert isinstance(again.exception, ConfigError) or again.exit_code == 2
    assert (tmp_path / "ca.pem").read_bytes() == before


def test_renewing_keeps_names_and_changes_keys(tmp_path: Path) -> None:
    folder = made(tmp_path, "--host", "llm.example.com")
    before = {path.name: path.read_bytes() for path in folder.glob("*.pem")}
    assert run(app, ["ca", "renew", str(folder), "--within-days", "3"]).output == ""
    assert run(app, ["ca", "renew", str(folder)]).output.count("renewed") == len(ComponentRole) + 1
    after = {path.name: path.read_bytes() for path in folder.glob("*.pem")}
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] == after[name]] == ["ca.pem"]
    face = json.loads(run(app, ["ca", "show", str(folder), "--json"]).output)[2]
    assert face["file"].endswith("face.pem")
    assert "llm.example.com" in face["names"]


def test_a_new_authority_stands_beside_the_old_one(tmp_path: Path) -> None:
    folder = made(tmp_path)
    old = (folder / "ca.pem").read_bytes()
    assert run(app, ["ca", "renew", str(folder), "--authority"]).exit_code == 0
    both = (folder / "ca.pem").read_bytes()
    assert both.endswith(old)
    assert len(x509.load_pem_x509_certificates(both)) == 2
    worker = x509.load_pem_x509_certificate((folder / "worker.pem").read_bytes())
    worker.verify_directly_issued_by(Authority.load(folder).certificate)


def test_one_more_certificate_for_one_component(tmp_path: Path) -> None:
    folder = made(tmp_path / "all")
    to = tmp_path / "gpu-7"
    arguments = ["ca", "issue", str(folder), "--role", "worker", "--name", "gpu-7", "--to", str(to)]
    assert run(app, arguments).exit_code == 0
    certificate, key = pair(to, "worker")
    assert read_tls(TlsFiles(certificate, key, to / "ca.pem")).name == component_name("slipstream", "worker", "gpu-7")


def test_tokens_are_long_private_and_added_in_front(tmp_path: Path) -> None:
    file = tmp_path / "cluster.token"
    assert run(app, ["ca", "token", str(file)]).exit_code == 0
    (first,) = read_tokens(file)
    assert len(first) == 64
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert run(app, ["ca", "token", str(file)]).exit_code != 0
    rotated = run(app, ["ca", "token", str(file), "--rotate"])
    assert rotated.exit_code == 0
    assert first not in rotated.output
    assert read_tokens(file)[1:] == (first,)


@pytest.mark.parametrize(("cluster", "name"), [("Blue", "x"), ("", "x"), ("a/b", "x"), ("blue", "a/b"), ("blue", "")])
def test_names_that_would_not_come_back_are_refused(cluster: str, name: str) -> None:
    with pytest.raises(ConfigError):
        component_name(cluster, "worker", name)


@given(st.sampled_from(ComponentRole), st.from_regex(r"[a-z0-9]{1,20}", fullmatch=True))
def test_a_name_comes_back_from_its_uri(role: ComponentRole, name: str) -> None:
    whole = component_name("blue", role, name)
    assert parse_uri(whole.uri) == whole


@given(st.text(max_size=80))
def test_no_other_uri_is_anybody(text: str) -> None:
    assert parse_uri(text) is None
    assert parse_uri(f"spiffe://elsewhere/blue/worker/{text}") is None
