"""Whoever changes the cluster is written down, with what they wanted and how it ended; refusals too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from structlog.testing import capture_logs

from planner.server import open_control_plane
from slipstream.errors import StartupError
from slipstream.security import audit, identity
from slipstream.security.names import ComponentRole
from slipstream.security_settings import SecuritySettings
from slipstream.settings import ControlPlaneSettings
from slipstream.v1.planner_pb2 import ApplyRequest, GetPlanRequest
from slipstream.v1.planner_pb2_grpc import PlannerStub


@pytest.fixture
def log_file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "audit" / "log.jsonl"
    audit.configure(path, "control-plane")
    yield path
    audit.configure(None, "")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def apply(policy: str, *, token: str = "") -> None:
    metadata = [("slipstream-cluster-token", token)] if token else []
    async with (
        open_control_plane(ControlPlaneSettings(port=0)) as plane,
        grpc.aio.insecure_channel(plane.address) as channel,
    ):
        stub = PlannerStub(channel)
        with suppress(grpc.aio.AioRpcError):
            await stub.GetPlan(GetPlanRequest(), metadata=metadata, timeout=10)
        with suppress(grpc.aio.AioRpcError):
            await stub.Apply(ApplyRequest(policy_yaml=policy), metadata=metadata, timeout=10)


async def test_an_act_is_written_down_with_who_what_and_how_it_ended_and_questions_are_not(log_file: Path) -> None:
    await apply("models: {}")

    (line,) = lines(log_file)
    assert line["action"] == "Planner/Apply"
    assert line["component"] == "control-plane"
    assert line["arguments"] == {"policy_yaml": "models: {}"}
    assert line["outcome"] == "unavailable"
    assert "no scaling policy" in line["reason"]
    assert line["peer"].startswith("ipv4:127.0.0.1:")


async def test_who_is_kept_out_is_written_down_without_the_token(log_file: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("t" * 40)
    settings = SecuritySettings(cluster_token_file=tmp_path / "token")
    with identity.installed(settings, ComponentRole.CONTROL_PLANE):
        await apply("models: {}", token="guess" * 8)

    (line,) = lines(log_file)
    assert line["outcome"] == "unauthenticated"
    assert "guess" not in str(line)


async def test_long_arguments_are_cut(log_file: Path) -> None:
    await apply("#" * 10_000)

    policy = lines(log_file)[0]["arguments"]["policy_yaml"]
    assert len(policy) < audit.LONGEST_VALUE + 50
    assert policy.endswith("(10000 characters)")


def test_a_file_that_was_moved_away_is_made_anew(log_file: Path) -> None:
    audit.record("Keys/Create", "done", who="ada")
    log_file.rename(log_file.with_suffix(".1"))
    audit.record("Keys/Revoke", "done", who="ada")

    assert [line["action"] for line in lines(log_file)] == ["Keys/Revoke"]
    assert log_file.stat().st_mode & 0o777 == 0o600


def test_without_a_file_acts_are_among_the_other_log_lines() -> None:
    with capture_logs() as captured:
        audit.record("Keys/Create", "done", who="ada")

    assert [(one["event"], one["action"], one["who"]) for one in captured] == [("audit", "Keys/Create", "ada")]


def test_an_act_that_cannot_be_written_to_its_file_is_not_lost(log_file: Path) -> None:
    log_file.parent.rename(log_file.parent.with_name("gone"))
    with capture_logs() as captured:
        audit.record("Keys/Create", "done", who="ada")

    assert [one["event"] for one in captured] == ["audit_log_failed", "audit"]


def test_a_file_that_cannot_be_written_is_said_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartupError, match=r"log\.audit_log"):
        audit.configure(tmp_path / "file" / "log", "x")
    audit.configure(None, "")
