"""The systemd units of a GPU server: systemd itself reads them, and what they start is a command of ours."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slipstream.cli.app import app

UNITS = Path(__file__).resolve().parents[3] / "deploy" / "systemd"
SERVICES = sorted(UNITS.glob("*.service"))
COMMAND = "/opt/slipstream/.venv/bin/slipstream"


def verified(folder: Path) -> subprocess.CompletedProcess[str]:
    files = [str(file) for file in sorted(folder.iterdir())]
    return subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *files], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units, with a command that is on this machine."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze on this machine")
    for file in UNITS.iterdir():
        (tmp_path / file.name).write_text(file.read_text().replace(COMMAND, sys.executable))
    return tmp_path


def test_systemd_has_nothing_to_say(units: Path) -> None:
    done = verified(units)

    assert (done.returncode, done.stderr) == (0, "")


def test_systemd_would_say_something(units: Path) -> None:
    unit = units / "slipstream-frontend.service"
    unit.write_text(unit.read_text().replace("TimeoutStopSec=45s", "TimeoutStopSec=soon"))

    assert "Failed to parse time value" in verified(units).stderr


@pytest.mark.parametrize("file", SERVICES, ids=lambda file: file.name)
def test_what_a_unit_starts_is_a_command_of_ours(file: Path) -> None:
    [line] = re.findall(r"^ExecStart=(.*)$", file.read_text(), re.MULTILINE)
    command, *arguments = line.split()

    assert command == COMMAND
    done = CliRunner().invoke(app, [*arguments, "--help"])
    assert done.exit_code == 0, done.output
    assert [each for each in arguments if each.startswith("--") and each not in done.output] == []
