"""The command line as a person meets it: help that teaches, one line for an error, exit codes that mean something."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from slipstream import __version__
from slipstream.cli.app import app
from slipstream.config_layer import setting_fields
from slipstream.settings import Settings
from slipstream.v1 import inference_pb2
from slipstream.v1.registry_pb2 import (
    DRAINING,
    FENCED,
    ROLE_DECODE,
    ROLE_PREFILL,
    SICK,
    STARTING,
    Health,
    HealthReason,
    WorkerSet,
)
from tests.unit.slipstream import scripted_inference, scripted_registry
from tests.unit.slipstream.scripted_registry import record

COMMANDS = [
    ["up"],
    ["demo"],
    ["chat"],
    ["frontend"],
    ["prefill-worker"],
    ["decode-worker"],
    ["planner", "serve"],
    ["planner", "policy"],
    ["planner", "simulate"],
    ["planner", "recommend"],
    ["planner", "apply"],
    ["planner", "explain"],
    ["planner", "history"],
    ["status"],
    ["transfer", "probe"],
    ["config", "show"],
    ["version"],
]
TIMEOUT_S = 60.0


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No configuration but the test's own."""
    for name in [name for name in os.environ if name.startswith("SLIPSTREAM_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*arguments: str, **environ: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERMINAL_WIDTH": "200", **environ})


def environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[3])
    return {**os.environ, "PYTHONPATH": root, "COLUMNS": "200"}


def program(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """The real thing, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "slipstream", *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=environment(),
        check=False,
    )


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(command: list[str]) -> None:
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    assert result.stdout.count("--help") == 1
    if command != ["version"]:
        assert "Examples:" in result.stdout
        assert f"slipstream {' '.join(command)}" in result.stdout.split("Examples:")[1]


def test_flags_are_described_by_the_settings_themselves() -> None:
    described = " ".join(invoke("decode-worker", "--help").stdout.replace("│", " ").split())
    for path in ("worker.kv_cache_bytes", "worker.threads", "transfer.timeout_s", "device"):
        description = setting_fields()[path].description
        assert description is not None
        assert description in described


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (["up"], ["--prefill", "--decode", "--model", "--http-port", "--threads", "--control-plane-port", "--log-dir"]),
        (["frontend"], ["--http-port", "--grpc-port", "--host", "--control-plane", "--served-model-name"]),
        (["prefill-worker"], ["--model", "--device", "--dtype", "--port", "--kv-cache-bytes", "--control-plane"]),
        (["decode-worker"], ["--worker-id", "--threads", "--transfer-mode", "--drain-timeout-s", "--config"]),
        (["planner", "serve"], ["--host", "--port", "--lease-s", "--log-level"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_role_takes_the_settings_of_its_sections(command: list[str], flags: list[str]) -> None:
    words = invoke(*command, "--help").stdout.split()
    assert [flag for flag in flags if flag not in words] == []


def test_version_is_printed_by_the_flag_and_by_the_command() -> None:
    assert invoke("--version").stdout == f"slipstream {__version__}\n"
    lines = invoke("version").stdout.splitlines()
    assert lines[0] == f"slipstream {__version__}"
    assert [line.split()[0] for line in lines] == ["slipstream", "python", "grpcio", "protobuf", "vllm", "torch"]


def test_python_m_slipstream_is_the_same_command() -> None:
    assert program("--version").stdout == f"slipstream {__version__}\n"


def test_help_loads_neither_servers_nor_engines_nor_the_launcher() -> None:
    code = (
        "import sys\n"
        "from slipstream.cli.app import app\n"
        "app(['--help'], standalone_mode=False)\n"
        "heavy = {'vllm', 'torch', 'uvicorn', 'fastapi', 'tokenizers', 'yaml', 'slipstream.client',\n"
        "         'deploy.launch', 'frontend.process', 'planner.server', 'psutil'}\n"
        "print('loaded:', sorted(heavy & set(sys.modules)))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT_S, env=environment(), check=True
    )
    assert result.stdout.splitlines()[-1] == "loaded: []"


def test_a_bad_value_is_one_line_with_the_flag_and_exit_code_2() -> None:
    result = program("config", "show", "--frontend-http-port", "70000")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == (
        "error: frontend.http_port = 70000 (--frontend-http-port): must be less than or equal to 65535 "
        "(port of the OpenAI-compatible HTTP face)\n"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["up", "--prefil", "2"],
        ["up", "--prefill", "two"],
        ["up", "--device", "tpu"],
        ["nothing"],
        ["up", "--config", "none.yaml"],
        ["config", "show", "--json", "--yaml"],
        ["status", "--timeout-s", "0"],
        ["transfer", "probe", "a"],
        ["transfer", "probe", "a", "b", "--transport", "tcp"],
        ["transfer", "probe", "a", "b", "--timeout-s", "0"],
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_exit_code_2(arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_config_show_says_where_each_value_came_from(empty_folder: Path) -> None:
    (empty_folder / "slipstream.yaml").write_text("worker:\n  threads: 2\n")
    result = invoke("config", "show", "--model", "m", SLIPSTREAM_DEVICE="cpu")
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines()}
    assert rows["model"] == ["m", "--model"]
    assert rows["device"] == ["cpu", "SLIPSTREAM_DEVICE"]
    assert rows["worker.threads"] == ["2", f"{empty_folder}/slipstream.yaml:2"]
    assert rows["frontend.http_port"] == ["8000", "default"]
    assert set(rows) == {"setting", *setting_fields()}


def test_config_show_json_has_values_and_origins() -> None:
    shown = json.loads(invoke("config", "show", "--json", SLIPSTREAM_FRONTEND__HTTP_PORT="9000").stdout)
    assert shown["frontend.http_port"] == {
        "value": 9000,
        "origin": "environment",
        "place": "SLIPSTREAM_FRONTEND__HTTP_PORT",
    }
    assert shown["worker.threads"] == {"value": None, "origin": "default", "place": ""}


def test_config_show_yaml_is_a_configuration_file(empty_folder: Path) -> None:
    shown = invoke("config", "show", "--yaml", "--cluster-decode", "3").stdout
    assert Settings.model_validate(yaml.safe_load(shown)).cluster.decode == 3
    (empty_folder / "again.yaml").write_text(shown)
    assert invoke("config", "show", "--yaml", "--config", "again.yaml").stdout == shown


def test_status_shows_a_row_for_each_worker() -> None:
    workers = [
        record("decode-0"),
        record("prefill-1", ROLE_PREFILL, DRAINING),
        record("prefill-0", ROLE_PREFILL, STARTING),
    ]
    with scripted_registry.serve([WorkerSet(workers=workers, settled=True)]) as address:
        result = invoke("status", "--control-plane", address)
    assert result.exit_code == 0
    header, *rows = (line.split() for line in result.stdout.splitlines())
    assert header[:5] == ["worker", "role", "state", "model", "address"]
    assert [row[:3] for row in rows] == [
        ["prefill-0", "prefill", "starting"],
        ["prefill-1", "prefill", "draining"],
        ["decode-0", "decode", "ready"],
    ]
    assert rows[2][3:13] == ["tiny", "127.0.0.1:7001", "3", "1", "50/200", "25%", "2", "1,234", "5,000,000,000", "7"]


def test_status_says_what_is_wrong_with_those_that_are_not_well() -> None:
    sick = record("decode-0", ROLE_DECODE, FENCED)
    reasons = [HealthReason(code="xid_79", state=SICK, text="GPU 0 has fallen off the bus")]
    sick.health.CopyFrom(Health(state=SICK, reasons=reasons, fenced_because="GPU 0 has fallen off the bus"))
    with scripted_registry.serve([WorkerSet(workers=[sick, record("decode-1")], settled=True)] * 2) as address:
        table = invoke("status", "--control-plane", address).stdout
        shown = json.loads(invoke("status", "--json", "--control-plane", address).stdout)
    below = table[table.index("not well") :]
    assert "decode-0" in below
    assert "GPU 0 has fallen off the bus" in below
    assert "fenced: GPU 0" in below
    assert "decode-1" not in below
    assert [(row["state"], row["health"], row["reasons"]) for row in shown["workers"]] == [
        ("fenced", "sick", ["GPU 0 has fallen off the bus"]),
        ("ready", "", []),
    ]


def test_status_json_is_for_programs() -> None:
    with scripted_registry.serve([WorkerSet(workers=[record("decode-0")], settled=True, lease_s=6)]) as address:
        shown = json.loads(invoke("status", "--json", "--control-plane", address).stdout)
    assert (shown["settled"], shown["lease_s"]) == (True, 6.0)
    (worker,) = shown["workers"]
    assert (worker["worker_id"], worker["tokens_total"], worker["state"]) == ("decode-0", 5_000_000_000, "ready")


def test_status_says_when_the_registry_may_not_know_all_yet() -> None:
    with scripted_registry.serve([WorkerSet(workers=[record("decode-0")])]) as address:
        assert "may not know all workers yet" in invoke("status", "--control-plane", address).stdout
    with scripted_registry.serve([WorkerSet()]) as address:
        assert "knows no worker" in invoke("status", "--control-plane", address).stdout


def test_status_watch_prints_each_change_until_interrupted() -> None:
    sets = [WorkerSet(workers=[record("decode-0", state=STARTING)]), WorkerSet(workers=[record("decode-0")])]
    with scripted_registry.serve(sets) as address:
        process = subprocess.Popen(
            [sys.executable, "-m", "slipstream", "status", "--watch", "--json", "--control-plane", address],
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        assert process.stdout is not None
        states = [json.loads(process.stdout.readline())["workers"][0]["state"] for _ in sets]
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=TIMEOUT_S)
    assert states == ["starting", "ready"]
    assert process.returncode == 0


def test_status_without_a_control_plane_is_a_failure_with_a_remedy() -> None:
    result = invoke("status", "--control-plane", "127.0.0.1:1")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: no control plane answers at 127.0.0.1:1")
    assert "slipstream up" in result.stderr
    assert result.stderr.count("\n") == 1


def test_status_of_a_silent_registry_ends_at_the_deadline() -> None:
    with scripted_registry.serve([]) as address:
        result = invoke("status", "--control-plane", address, "--timeout-s", "0.2")
    assert (result.exit_code, result.stderr) == (
        1,
        f"error: the control plane at {address} did not answer within 0.2 s\n",
    )


def chat(target: str, text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    host, port = target.split(":")
    return program("chat", "--host", host, "--grpc-port", port, *arguments, text=text)


def test_chat_streams_answers_and_remembers_the_conversation() -> None:
    script = scripted_inference.Script(
        responses=[inference_pb2.GenerateResponse(text="Paris", token_ids=[7]), scripted_inference.FINAL],
        models=[inference_pb2.Model(id="tiny")],
    )
    with scripted_inference.serve(script) as target:
        result = chat(target, "France?\n\nAnd?\n/help\n/reset\nSpain?\n", "--system", "Be brief.", "--temperature", "0")
    assert result.returncode == 0
    assert result.stdout.count("Paris.") == 3
    sent = [[(m.role, m.content) for m in request.chat.messages] for request in script.requests]
    system = ("system", "Be brief.")
    assert sent == [
        [system, ("user", "France?")],
        [system, ("user", "France?"), ("assistant", "Paris."), ("user", "And?")],
        [system, ("user", "Spain?")],
    ]
    assert {request.model for request in script.requests} == {"tiny"}
    assert script.requests[0].sampling.temperature == 0


def test_chat_goes_on_after_an_error_without_the_refused_message() -> None:
    import grpc

    script = scripted_inference.Script(
        error=grpc.StatusCode.INVALID_ARGUMENT,
        error_message="5000 tokens do not fit 2048",
        error_metadata=(("slipstream-code", "context_length_exceeded"),),
        models=[inference_pb2.Model(id="tiny")],
    )
    with scripted_inference.serve(script) as target:
        result = chat(target, "long\nshort\n/quit\nnever sent\n")
    assert result.returncode == 0
    assert result.stdout.count("error: 5000 tokens do not fit 2048") == 2
    assert [[m.content for m in request.chat.messages] for request in script.requests] == [["long"], ["short"]]


def test_an_interrupt_stops_the_answer_and_not_the_conversation() -> None:
    script = scripted_inference.Script(endless=True, models=[inference_pb2.Model(id="tiny")])
    with scripted_inference.serve(script) as target:
        host, port = target.split(":")
        process = subprocess.Popen(
            [sys.executable, "-m", "slipstream", "chat", "--host", host, "--grpc-port", port],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Talking to tiny")
        process.stdin.write("Go on\n")
        process.stdin.flush()
        assert process.stdout.read(6) == "again "
        process.send_signal(signal.SIGINT)
        assert script.cancelled.wait(TIMEOUT_S)
        rest, _ = process.communicate("/quit\n", timeout=TIMEOUT_S)
    assert rest.endswith("(stopped)\n")
    assert process.returncode == 0


def test_chat_without_a_frontend_or_a_model_says_so() -> None:
    result = program("chat", "--grpc-port", "1")
    assert result.returncode == 1
    assert result.stderr.startswith("error: cannot reach a Slipstream frontend at 127.0.0.1:1")
    with scripted_inference.serve(scripted_inference.Script()) as target:
        result = chat(target, "")
    assert (result.returncode, "knows no model yet" in result.stderr) == (1, True)


def test_up_on_a_taken_port_names_the_setting_and_starts_nothing(empty_folder: Path) -> None:
    with scripted_registry.serve([]) as address:
        port = address.split(":")[1]
        result = program("up", "--http-port", port, "--grpc-port", "0", "--log-dir", str(empty_folder / "logs"))
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: frontend.http_port = {port}: cannot listen on 127.0.0.1:{port}")
    assert not (empty_folder / "logs").exists()


def test_an_error_in_a_task_group_is_reported_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    from slipstream.cli import status
    from slipstream.errors import UnavailableError

    def fail(*arguments: object, **options: object) -> None:
        raise ExceptionGroup("tasks", [UnavailableError("a"), ExceptionGroup("more", [UnavailableError("b")])])

    monkeypatch.setattr(status, "_show", fail)
    result = invoke("status")
    assert (result.exit_code, result.stderr) == (1, "error: a\nerror: b\n")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from slipstream.cli import status

    def fail(*arguments: object, **options: object) -> None:
        raise ExceptionGroup("tasks", [ZeroDivisionError("a bug")])

    monkeypatch.setattr(status, "_show", fail)
    assert isinstance(invoke("status").exception, ExceptionGroup)
