"""Channels and ports come from one place, where they get their credentials, and every call has a rule."""

from __future__ import annotations

import ast
from pathlib import Path

from slipstream.security.rules import MAY_CALL
from slipstream.v1 import node_group_pb2, planner_pb2, registry_pb2, scaler_pb2, worker_pb2

ROOT = Path(__file__).resolve().parents[4]
PACKAGES = (
    "slipstream",
    "kv_transfer",
    "engine",
    "prefill_worker",
    "decode_worker",
    "frontend",
    "planner",
    "deploy",
    "simulator",
)
CONSTRUCTORS = {"insecure_channel", "secure_channel", "add_insecure_port", "add_secure_port"}
ON_ITS_OWN = {"deploy/images/healthcheck.py"}
"""Imports nothing of ours, and says why."""


def _constructs(node: ast.Attribute) -> bool:
    made_by_grpc = ast.unparse(node) in ("grpc.server", "grpc.aio.server")
    return node.attr in CONSTRUCTORS or made_by_grpc


def _uses(path: Path) -> list[int]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return [node.lineno for node in nodes if isinstance(node, ast.Attribute) and _constructs(node)]


def test_no_other_module_opens_a_channel_or_a_port() -> None:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 100
    found = {str(path.relative_to(ROOT)): lines for path in files if (lines := _uses(path))}
    others = {name: lines for name, lines in found.items() if not name.startswith("slipstream/security/")}
    assert others.keys() <= ON_ITS_OWN, others
    assert any(name.startswith("slipstream/security/") for name in found)


def test_every_call_between_components_has_a_rule() -> None:
    files = (node_group_pb2, planner_pb2, registry_pb2, scaler_pb2, worker_pb2)
    methods = {
        f"/{service.full_name}/{method.name}"
        for file in files
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert methods == {name for name in MAY_CALL if name.startswith("/slipstream.v1.")}
    assert all(MAY_CALL.values())
