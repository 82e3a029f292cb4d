"""Who gets through to a control plane: over real gRPC, with real certificates and tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from planner.server import open_control_plane
from slipstream.cli.worker_sets import current_set
from slipstream.errors import ConfigError, StartupError, UnavailableError
from slipstream.security import files, identity
from slipstream.security.authority import renew
from slipstream.security.channels import open_blocking_channel, open_channel
from slipstream.security.names import ComponentRole
from slipstream.security_settings import SecuritySettings
from slipstream.settings import ControlPlaneSettings
from slipstream.v1.planner_pb2 import ApplyRequest
from slipstream.v1.planner_pb2_grpc import PlannerStub
from slipstream.v1.registry_pb2 import RegisterRequest, WatchRequest
from slipstream.v1.registry_pb2_grpc import RegistryStub
from tests.support.certificates import a_token, an_authority, an_expired_set
from tests.unit.planner.test_registry import a_record

TIMEOUT_S = 5.0
OLD, NEW = "old-token-0123456789abcdef", "new-token-0123456789abcdef"


@asynccontextmanager
async def a_plane(settings: SecuritySettings) -> AsyncIterator[str]:
    with identity.installed(settings, ComponentRole.CONTROL_PLANE):
        opening = open_control_plane(ControlPlaneSettings(port=0))
        plane = await opening.__aenter__()
    try:
        yield plane.address
    finally:
        await opening.__aexit__(None, None, None)


def channel_as(
    settings: SecuritySettings, role: ComponentRole, address: str, peer: ComponentRole = ComponentRole.CONTROL_PLANE
) -> grpc.aio.Channel:
    with identity.installed(settings, role):
        return open_channel(address, peer=peer)


async def registered(channel: grpc.aio.Channel) -> grpc.StatusCode:
    """What comes of registering a worker."""
    try:
        await RegistryStub(channel).Register(RegisterRequest(worker=a_record()), timeout=TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_a_worker_with_its_certificate_registers_and_watches(tmp_path: Path) -> None:
    settings = an_authority(tmp_path)
    async with a_plane(settings) as address, channel_as(settings, ComponentRole.WORKER, address) as channel:
        assert await registered(channel) is grpc.StatusCode.OK
        watch = RegistryStub(channel).Watch(WatchRequest(), timeout=TIMEOUT_S)
        async for workers in watch:
            if workers.workers:  # the set is posted soon after
                assert [record.worker_id for record in workers.workers] == [a_record().worker_id]
                break
        watch.cancel()


@pytest.mark.parametrize("role", [role for role in ComponentRole if role is not ComponentRole.WORKER])
async def test_nobody_else_registers_as_a_worker(tmp_path: Path, role: ComponentRole) -> None:
    settings = an_authority(tmp_path)
    async with a_plane(settings) as address, channel_as(settings, role, address) as channel:
        assert await registered(channel) is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("role", [ComponentRole.WORKER, ComponentRole.FRONTEND])
async def test_only_an_operator_applies_a_policy(tmp_path: Path, role: ComponentRole) -> None:
    settings = an_authority(tmp_path)
    async with a_plane(settings) as address, channel_as(settings, role, address) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match=f"a {role} may not do that"):
            await PlannerStub(channel).Apply(ApplyRequest(), timeout=TIMEOUT_S)


async def test_an_operator_is_let_through(tmp_path: Path) -> None:
    settings = an_authority(tmp_path)
    async with a_plane(settings) as address, channel_as(settings, ComponentRole.OPERATOR, address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await PlannerStub(channel).Apply(ApplyRequest(), timeout=TIMEOUT_S)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE  # there is no planner; the call came through


async def test_strangers_do_not_even_connect(tmp_path: Path) -> None:
    ours, theirs = an_authority(tmp_path / "ours"), an_authority(tmp_path / "theirs")
    expired = an_expired_set(tmp_path / "expired", ComponentRole.WORKER)
    async with a_plane(ours) as address:
        for settings in (theirs, expired):
            mixed = SecuritySettings(
                ca_file=tmp_path / "ours" / "ca.pem",
                certificate_file=(settings.tls_folder or tmp_path) / "worker.pem",
                key_file=(settings.tls_folder or tmp_path) / "worker-key.pem",
            )
            async with channel_as(mixed, ComponentRole.WORKER, address) as channel:
                assert await registered(channel) is grpc.StatusCode.UNAVAILABLE
        async with grpc.aio.insecure_channel(address) as plain:
            assert await registered(plain) is grpc.StatusCode.UNAVAILABLE
        credentials = grpc.ssl_channel_credentials((tmp_path / "ours" / "ca.pem").read_bytes())
        name = [("grpc.ssl_target_name_override", "control-plane.test.slipstream.internal")]
        async with grpc.aio.secure_channel(address, credentials, options=name) as nameless:
            assert await registered(nameless) is grpc.StatusCode.UNAVAILABLE


async def test_a_certificate_of_our_authority_for_another_cluster_is_not_enough(tmp_path: Path) -> None:
    ours = an_authority(tmp_path / "ours", "one")
    theirs = an_authority(tmp_path / "theirs", "two")
    both = tmp_path / "both.pem"
    both.write_bytes((tmp_path / "ours" / "ca.pem").read_bytes() + (tmp_path / "theirs" / "ca.pem").read_bytes())
    trusting = ours.model_copy(update={"ca_file": both})
    stranger = theirs.model_copy(update={"ca_file": both})
    with identity.installed(stranger, ComponentRole.WORKER):
        stranger_channel = open_channel("127.0.0.1:1", peer=ComponentRole.CONTROL_PLANE)
    await stranger_channel.close()
    async with a_plane(trusting) as address:
        key, certificate = (tmp_path / "theirs" / name for name in ("worker-key.pem", "worker.pem"))
        credentials = grpc.ssl_channel_credentials(both.read_bytes(), key.read_bytes(), certificate.read_bytes())
        name = [("grpc.ssl_target_name_override", "control-plane.one.slipstream.internal")]
        async with grpc.aio.secure_channel(address, credentials, options=name) as channel:
            with pytest.raises(grpc.aio.AioRpcError, match="it is of cluster two, and this is one"):
                await RegistryStub(channel).Register(RegisterRequest(worker=a_record()), timeout=TIMEOUT_S)


async def test_a_worker_cannot_stand_in_for_the_control_plane(tmp_path: Path) -> None:
    settings = an_authority(tmp_path)
    with identity.installed(settings, ComponentRole.WORKER):
        opening = open_control_plane(ControlPlaneSettings(port=0))
        impostor = await opening.__aenter__()
    try:
        async with channel_as(settings, ComponentRole.WORKER, impostor.address) as channel:
            assert await registered(channel) is grpc.StatusCode.UNAVAILABLE
    finally:
        await opening.__aexit__(None, None, None)


async def test_new_certificates_are_taken_without_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LOOK_EVERY_S", 0.0)
    settings = an_authority(tmp_path)
    async with a_plane(settings) as address, channel_as(settings, ComponentRole.WORKER, address) as channel:
        stub = RegistryStub(channel)
        open_call = stub.Watch(WatchRequest(), timeout=30)
        await open_call.read()
        assert await registered(channel) is grpc.StatusCode.OK
        first = (tmp_path / "ca.pem").read_bytes()

        renew(tmp_path, days=1.0, within_days=None, new_authority=True)  # what signs them, too

        assert await registered(channel) is grpc.StatusCode.OK
        # The old authority is still trusted until it is taken out: then old certificates are worth nothing.
        (tmp_path / "ca.pem").write_bytes((tmp_path / "ca.pem").read_bytes().removesuffix(first))
        assert await registered(channel) is grpc.StatusCode.OK
        await open_call.read()  # a call that was open went on
        open_call.cancel()
        async with channel_as(settings, ComponentRole.WORKER, address) as another:
            assert await registered(another) is grpc.StatusCode.OK


async def test_half_written_files_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LOOK_EVERY_S", 0.0)
    settings = an_authority(tmp_path)
    async with a_plane(settings) as address:
        other = an_authority(tmp_path / "other")
        assert other.tls_folder is not None
        (tmp_path / "control-plane.pem").write_bytes((other.tls_folder / "control-plane.pem").read_bytes())
        async with channel_as(settings, ComponentRole.WORKER, address) as channel:
            assert await registered(channel) is grpc.StatusCode.OK


async def test_tokens_are_asked_for_and_rotate_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LOOK_EVERY_S", 0.0)
    own, theirs = tmp_path / "own", tmp_path / "theirs"
    client = a_token(theirs, OLD)
    async with a_plane(a_token(own, OLD)) as address:
        async with grpc.aio.insecure_channel(address) as plain:
            assert await registered(plain) is grpc.StatusCode.UNAUTHENTICATED
        async with channel_as(client, ComponentRole.WORKER, address) as channel:
            assert await registered(channel) is grpc.StatusCode.OK
            a_token(own, NEW, OLD)
            assert await registered(channel) is grpc.StatusCode.OK
            a_token(own, NEW)
            assert await registered(channel) is grpc.StatusCode.UNAUTHENTICATED
            a_token(theirs, NEW)
            assert await registered(channel) is grpc.StatusCode.OK


async def test_health_is_told_without_a_token(tmp_path: Path) -> None:
    async with a_plane(a_token(tmp_path / "token", OLD)) as address, grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        reply = await stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING


async def test_the_synchronous_channel_proves_the_same(tmp_path: Path) -> None:
    def first_set(settings: SecuritySettings, address: str) -> bool:
        with (
            identity.installed(settings, ComponentRole.OPERATOR),
            open_blocking_channel(address, peer=ComponentRole.CONTROL_PLANE) as channel,
        ):
            for _ in RegistryStub(channel).Watch(WatchRequest(), timeout=TIMEOUT_S):
                return True
        return False

    for settings in (an_authority(tmp_path / "tls"), a_token(tmp_path / "token", OLD)):
        async with a_plane(settings) as address:
            assert await asyncio.to_thread(first_set, settings, address)


async def test_an_unprotected_control_plane_is_for_this_machine_alone(tmp_path: Path) -> None:
    everywhere = ControlPlaneSettings(host="0.0.0.0", port=0)
    with pytest.raises(StartupError, match=r"let everybody in.*security\.tls_folder.*security\.cluster_token_file"):
        async with open_control_plane(everywhere):
            pass
    settings = [SecuritySettings(allow_insecure=True), a_token(tmp_path / "token", OLD), an_authority(tmp_path / "tls")]
    for one in settings:
        with identity.installed(one, ComponentRole.CONTROL_PLANE):
            async with open_control_plane(everywhere) as plane:
                assert plane.address.startswith("0.0.0.0:")


async def test_a_process_does_not_start_with_another_roles_certificate(tmp_path: Path) -> None:
    an_authority(tmp_path)
    borrowed = SecuritySettings(
        ca_file=tmp_path / "ca.pem", certificate_file=tmp_path / "worker.pem", key_file=tmp_path / "worker-key.pem"
    )
    with (
        identity.installed(borrowed, ComponentRole.CONTROL_PLANE),
        pytest.raises(ConfigError, match=r"security\.certificate_file: .* is that of a worker, and this is a control-"),
    ):
        async with open_control_plane(ControlPlaneSettings(port=0)):
            pass


@pytest.mark.parametrize("token", ["", "short", "not plain ASCII: ünïcödé"])
async def test_what_is_no_secret_is_no_token(tmp_path: Path, token: str) -> None:
    with (
        identity.installed(a_token(tmp_path / "token", token), ComponentRole.CONTROL_PLANE),
        pytest.raises(ConfigError, match=r"security\.cluster_token_file"),
    ):
        async with open_control_plane(ControlPlaneSettings(port=0)):
            pass


async def test_commands_are_told_what_is_wrong_with_certificates(tmp_path: Path) -> None:
    ours, theirs = an_authority(tmp_path / "ours"), an_authority(tmp_path / "theirs")

    async def complaint(settings: SecuritySettings, address: str) -> str:
        with identity.installed(settings, ComponentRole.OPERATOR), pytest.raises(UnavailableError) as told:
            await current_set(address, TIMEOUT_S)
        return told.value.message

    async with a_plane(ours) as address:
        assert "it speaks TLS: set security.tls_folder (--tls FOLDER)" in await complaint(SecuritySettings(), address)
        assert "security.ca_file" in await complaint(theirs, address)
    async with a_plane(SecuritySettings()) as address:
        assert "it does not speak TLS" in await complaint(ours, address)
