"""`slipstream planner` against a real control plane: what was decided and why, and another policy."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from planner.history import Outcome
from planner.policy_file import EXAMPLE, dump_policy, read_policy
from planner.scaling import Considered, Counts, Drain, Flip, Start
from planner.server import open_control_plane
from slipstream.cli.app import app
from slipstream.cli.planner_calls import moment
from slipstream.errors import ConfigError
from slipstream.settings import ControlPlaneSettings
from slipstream.v1.registry_pb2 import ROLE_DECODE, ROLE_PREFILL
from tests.support.stepped_planner import POLICY, SteppedPlanner

Command = Callable[..., Coroutine[Any, Any, Result]]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No configuration but the test's own."""
    for name in [name for name in os.environ if name.startswith("SLIPSTREAM_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def live() -> SteppedPlanner:
    return SteppedPlanner()


@pytest.fixture
async def planner(live: SteppedPlanner) -> AsyncIterator[Command]:
    """Runs `slipstream planner` with these words, against a control plane with the stepped planner."""
    async with open_control_plane(ControlPlaneSettings(port=0), live) as plane:

        async def run(command: str, *words: str) -> Result:
            return await asyncio.to_thread(invoke, "planner", command, *words, "--control-plane", plane.address)

        yield run


def invoke(*words: str) -> Result:
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})


async def test_explain_shows_who_acts_what_is_wanted_and_why(planner: Command, live: SteppedPlanner) -> None:
    live.step(
        time.time() - 12,
        Start("m", ROLE_PREFILL),
        Flip("d0", ROLE_PREFILL),
        reason="prompts wait 3.1 s, the limit is 2 s",
        numbers={"m.arrivals_per_s": 3.25, "m.prefill_queue_tokens": 81920.0},
        considered=(
            Considered("m", Counts(1, 1), 4, 3.5, 0.041, "TTFT beyond 2 s"),
            Considered("m", Counts(2, 1), 6, 1.1, 0.042, "chosen"),
        ),
    )
    live.history.done(1, [Outcome("prefill-1"), Outcome(error="it is ending")])
    result = await planner("explain")
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[0] == "Planner planner-1 acts; 7 of 8 GPUs in use; a decision each 5 s"
    assert "m 1P1D 2P1D 1 1" in lines
    assert any(line.startswith("Decision 1 ") and line.endswith("12s ago") for line in lines)
    assert "prompts wait 3.1 s, the limit is 2 s" in lines
    assert "start prefill for m: prefill-1" in lines
    assert "flip d0 to prefill failed: it is ending" in lines
    assert "arrivals_per_s 3.25" in lines
    assert "prefill_queue_tokens 81,920" in lines
    assert "m 1P1D 4 3.50 s 41.0 ms TTFT beyond 2 s" in lines
    assert "m 2P1D 6 1.10 s 42.0 ms chosen" in lines


async def test_explain_finds_a_decision_by_number_and_by_time(planner: Command, live: SteppedPlanner) -> None:
    for unix_s in (1000.0, 2000.0):
        live.step(unix_s)
    assert json.loads((await planner("explain", "1", "--json")).stdout)["unix_s"] == 1000.0
    at = datetime.fromtimestamp(1999.0, UTC).isoformat()
    assert "Decision 1 " in (await planner("explain", "--at", at)).stdout
    assert "Decision 2 " in (await planner("explain", "--at", "1h")).stdout
    unknown = await planner("explain", "7")
    assert unknown.exit_code == 1
    assert "does not remember decision 7" in unknown.stderr
    assert (await planner("explain", "1", "--at", "1h")).exit_code == 2


async def test_a_planner_that_does_nothing_says_so(planner: Command, live: SteppedPlanner) -> None:
    live.dry_run = True
    live.step(1000.0, Drain("d2"))
    said = (await planner("explain")).stdout
    assert "decides and does nothing (dry run)" in said
    assert "not done: a dry run" in said


async def test_history_lists_what_changed_something_the_latest_last(planner: Command, live: SteppedPlanner) -> None:
    live.step(1000.0, Start("m", ROLE_DECODE), reason="load rises")
    live.step(1005.0)
    live.step(1010.0, Drain("d2"), reason="load falls")
    rows = [" ".join(line.split()) for line in (await planner("history")).stdout.splitlines()]
    assert [row.split()[0] for row in rows] == ["no.", "1", "3"]
    assert rows[2].endswith("1P1D 2P1D drain new-0 load falls")
    everything = json.loads((await planner("history", "--all", "--json")).stdout)
    assert [one["number"] for one in everything["decisions"]] == ["3", "2", "1"]
    assert "nothing that changed something" in (await planner("history", "--since", "1h")).stdout


async def test_apply_shows_what_changes_and_puts_it_in_force(
    planner: Command, live: SteppedPlanner, tmp_path: Path
) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(dump_policy(POLICY).replace("gpu_budget: 8", "gpu_budget: 12"))
    tried = await planner("apply", str(file), "--dry-run")
    assert "Nothing was changed" in tried.stdout
    assert live.objectives == POLICY
    done = await planner("apply", str(file))
    assert "gpu_budget 8 12" in " ".join(done.stdout.split())
    assert "In force from the next decision on." in done.stdout
    assert live.objectives == read_policy(file)
    assert "in force already" in (await planner("apply", str(file))).stdout
    said = (await planner("apply", str(file), "--json")).stdout  # after what the planner in this process logs
    assert json.loads(said[said.index("{\n") :]) == {"changes": [], "applied": True}


async def test_apply_names_the_line_of_an_error_in_the_file(planner: Command, tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(dump_policy(POLICY).replace("ttft_s: 2.0", "ttft_s: -1"))
    result = await planner("apply", str(file))
    assert result.exit_code == 2
    assert "policy.yaml:6: models[0].objectives.realtime.ttft_s: must be greater than 0, is -1" in result.stderr


async def test_what_the_planner_itself_refuses_is_told(planner: Command, tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(dump_policy(POLICY).replace("model: m", "model: m\n  profile: none"))
    result = await planner("apply", str(file))
    assert result.exit_code == 1
    assert "profile none: cannot be read" in result.stderr


async def test_a_control_plane_without_a_policy_says_what_to_do() -> None:
    async with open_control_plane(ControlPlaneSettings(port=0)) as plane:
        result = await asyncio.to_thread(invoke, "planner", "explain", "--control-plane", plane.address)
    assert result.exit_code == 1
    assert "planner serve --policy" in result.stderr


def test_nobody_at_the_address_is_told_with_a_remedy() -> None:
    result = invoke("planner", "history", "--control-plane", "127.0.0.1:1")
    assert result.exit_code == 1
    assert "no control plane answers at 127.0.0.1:1" in result.stderr
    assert "--control-plane HOST:PORT" in result.stderr


def test_policy_prints_the_example_its_schema_and_checks_a_file(tmp_path: Path) -> None:
    example = invoke("planner", "policy").stdout
    assert example == EXAMPLE.read_text()
    assert "gpu_budget" in json.loads(invoke("planner", "policy", "--schema").stdout)["required"]
    file = tmp_path / "policy.yaml"
    file.write_text(example)
    assert "16 GPUs for Qwen/Qwen3-32B" in invoke("planner", "policy", str(file)).stdout
    file.write_text(yaml.safe_dump({**yaml.safe_load(example), "gpu_budget": "many"}))
    wrong = invoke("planner", "policy", str(file))
    assert wrong.exit_code == 2
    assert "gpu_budget: must be a valid integer, is 'many'" in wrong.stderr


def test_times_are_ago_or_utc() -> None:
    assert moment("90s", 1000.0, "--at") == 910.0
    assert moment("1.5h", 10000.0, "--at") == 4600.0
    assert moment("1970-01-01T00:10", 0.0, "--at") == 600.0
    assert moment("1970-01-01T01:10+01:00", 0.0, "--at") == 600.0
    for wrong in ("soon", "10", "5y", ""):
        with pytest.raises(ConfigError, match="--at"):
            moment(wrong, 0.0, "--at")
