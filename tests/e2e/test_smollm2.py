"""The default model, end to end: `slipstream demo` as a new user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil

from slipstream.errors import StartupError
from slipstream.model_folder import resolve
from slipstream.settings import DEFAULT_MODEL


def test_the_demo_answers_paris_and_accounts_for_it(tmp_path: Path) -> None:
    try:
        resolve(DEFAULT_MODEL)
    except StartupError as error:
        raise AssertionError(f"`make test` fetches the default model first: {error}") from error
    question = "What is the capital of France?"
    run_folder = str(tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-m", "slipstream", "demo", "--prompt", question, "--log-dir", run_folder],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout + done.stderr
    assert "Paris" in said
    for fact in ("prefill-0", "decode-0", "KV moved", "transfer", "TTFT", "ITL"):
        assert fact in said
    assert not [p for p in psutil.process_iter(["cmdline"]) if run_folder in " ".join(p.info["cmdline"] or [])]
