"""Who reads the wall clock, and what for. It may jump; leases, deadlines and waits go by the monotonic clock.

A new reader belongs here with its reason, which is never that something ends at a time of the wall clock, but for what
people have given such an end themselves: keys and certificates.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SECURITY = ROOT / "slipstream" / "security"  # keys, tokens and certificates
PACKAGES = ("slipstream", "frontend", "planner", "engine", "kv_transfer", "prefill_worker", "decode_worker", "deploy")

READERS = {
    "deploy/kubernetes/lease.py": "stamps for people; who holds the lease is judged by when its object changed here",
    "deploy/kubernetes/scaler.py": "compared with the stamps of Kubernetes' objects",
    "deploy/ray/nodes.py": "Ray wants the end of a drain as Unix time",
    "deploy/ray/pool.py": "when a worker was started, for people",
    "deploy/scaler_service.py": "when a worker was started, for people",
    "engine/health/watch.py": "since when a state holds, for people",
    "engine/host_process.py": "the worker's epoch, and since when it runs and is fenced, for people",
    "engine/own_agent.py": "when a path was measured, for people",
    "engine/profiler.py": "the day of a profile",
    "engine/simulated/engine.py": "when a path was measured, for people",
    "engine/startup.py": "the age of the process, once, at its start",
    "frontend/admission/gate.py": "when a request came, for people",
    "frontend/chat_template.py": "templates may ask for the date",
    "frontend/dispatch.py": "when a decision was made, for people",
    "frontend/explanation.py": "when something was told, for people",
    "frontend/http_face.py": "the field `created` of OpenAI's answers",
    "frontend/inference.py": "the beginning of a trace and of a line of the access log",
    "frontend/keys/guard.py": "a key ends when its owner said",
    "frontend/request_life.py": "the beginning of a trace and of a line of the access log",
    "planner/fence_keeper.py": "compared with since when workers say that they are fenced",
    "planner/loop.py": "the time of day, for schedules and daily seasons",
    "slipstream/cli/authority.py": "certificates end when their owner said",
    "slipstream/cli/keys.py": "keys end when their owner said",
    "slipstream/cli/local.py": "the name of a run's folder",
    "slipstream/cli/planner_decisions.py": "what a user means by a time of day",
    "slipstream/cli/planner_simulate.py": "what a user means by a time of day",
    "slipstream/cli/status.py": "how long workers have been running, for people",
    "slipstream/model_cache.py": "which entry was used longest ago",
    "slipstream/tracing.py": "traces tell Unix time",
}

_NAMES = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow"), ("date", "today")}


def readers() -> set[str]:
    """Files of the product, but for `SECURITY`, in which the wall clock is read, or handed on to be read."""
    found = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            if SECURITY not in path.parents and any(_reads(node) for node in ast.walk(ast.parse(path.read_text()))):
                found.add(str(path.relative_to(ROOT)))
    return found


def _reads(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom) and node.module == "time":
        return any((node.module, alias.name) in _NAMES for alias in node.names)
    if not isinstance(node, ast.Attribute):
        return False
    owner = node.value
    name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
    return (name, node.attr) in _NAMES


def test_nobody_else_reads_the_wall_clock() -> None:
    assert readers() == set(READERS)
