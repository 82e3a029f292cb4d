"""`slipstream planner simulate` and `recommend`: questions answered in virtual time."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from slipstream.cli.app import app

POLICY = """
gpu_budget: 4
start_s: 5
models:
  - model: m
    profile: qwen3-32b-h200-tp1
    objectives: {realtime: {ttft_s: 2, itl_s: 0.05}}
"""
LOAD = ("--rate", "6", "--input-tokens", "2000", "--output-tokens", "100", "--requests", "120")


@pytest.fixture(autouse=True)
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("SLIPSTREAM_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "policy.yaml"
    file.write_text(POLICY)
    return file


def invoke(*words: str) -> Result:
    return CliRunner().invoke(app, ["planner", *words], env={"COLUMNS": "220", "TERMINAL_WIDTH": "220"})


def test_simulate_shows_latencies_costs_and_writes_a_page(policy: Path) -> None:
    result = invoke("simulate", "policy.yaml", *LOAD, "--html", "page.html")
    assert result.exit_code == 0, result.output
    assert "policy.yaml under 6 requests/s (steady)" in result.stdout
    assert "TTFT p50/p90/p99" in result.stdout
    assert "within their limits for each GPU-hour" in result.stdout
    page = (policy.parent / "page.html").read_text()
    assert "policy.yaml under 6 requests/s" in page
    assert "<svg" in page
    assert "Wrote page.html" in result.stderr


def test_simulate_as_json_is_the_same_for_a_seed_and_tells_fixed_workers() -> None:
    fixed = ("simulate", "policy.yaml", *LOAD, "--workers", "1P2D", "--fixed", "--json", "--start", "2026-01-01T00:00")
    first, again = invoke(*fixed), invoke(*fixed)
    assert first.stdout == again.stdout
    outcome = json.loads(first.stdout)["outcome"]
    assert outcome["all"]["requests"] == 120
    assert len(outcome["workers"]) == 3
    assert outcome["actions"] == 0


def test_recommend_says_which_pool_and_why() -> None:
    result = invoke("recommend", *LOAD, "--profile", "qwen3-32b-h200-tp1", "--max-gpus", "4")
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if line.strip()]
    assert "120 requests in" in lines[0]
    assert "TTFT 2 s and 50 ms a token for 99% each" in lines[1]
    assert any(line.split()[:2] == ["1P1D", "qwen3-32b-h200-tp1"] for line in lines)
    assert lines[-2].startswith(("Aggregated: ", "Disaggregated: "))


def test_recommend_takes_objective_budget_and_profile_from_a_policy() -> None:
    answer = json.loads(invoke("recommend", "--policy", "policy.yaml", *LOAD, "--itl-s", "0.5", "--json").stdout)
    assert answer["objective"] == {"ttft_s": 2.0, "itl_s": 0.5, "percentile": 99.0}
    assert {pool["profile"] for pool in answer["best_of_each"]} == {"qwen3-32b-h200-tp1"}
    assert answer["better"] in ("aggregated", "disaggregated")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("recommend", "--rate", "0"), "--rate = 0.0: must be float > 0.0"),
        (("recommend", "--shape", "odd"), "--shape = odd: must be one of steady, bursts, daily"),
        (("recommend", "--ttft-s", "0"), "--ttft-s: must be float > 0.0"),
        (("recommend", "--profile", "none"), "profile none: no such file or packaged profile; packaged are"),
        (("recommend", "--model", "m"), "--model names a model of --policy FILE"),
        (("recommend", "--policy", "policy.yaml", "--model", "n"), "--model = n is not in policy.yaml: it has m"),
        (("recommend", "--trace", "none.csv"), "trace none.csv: cannot be read (No such file or directory)"),
        (("simulate", "none.yaml"), "none.yaml: cannot be read: No such file"),
        (("simulate", "policy.yaml", "--workers", "2"), "workers = 2 must be counts such as 2P3D"),
        (("simulate", "policy.yaml", "--start", "soon"), "--start = soon is neither"),
        (("simulate", "policy.yaml", "--html", "none/page.html"), "--html: there is no folder"),
        (("simulate", "policy.yaml", "--model", "n"), "model n is not in policy.yaml, which has m"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_wrong_is_one_line_that_names_it(words: tuple[str, ...], message: str) -> None:
    result = invoke(*words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
