"""The default model, end to end: `slipstream demo` as a new user runs it."""

from __future__ import annotations

import subprocess
import sys

import psutil

from slipstream.errors import StartupError
from slipstream.model_folder import resolve
from slipstream.settings import DEFAULT_MODEL


def test_the_demo_answers_paris_and_accounts_for_it() -> None:
    try:
        resolve(DEFAULT_MODEL)
    except StartupError as error:
        raise AssertionError(f"`make test` fetches the default model first: {error}") from error
    done = subprocess.run(
        [sys.executable, "-m", "slipstream", "demo", "--prompt", "What is the capital of France?"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout + done.stderr
    assert "Paris" in said
    for fact in ("prefill-0", "decode-0", "KV moved", "transfer", "TTFT", "ITL"):
        assert fact in said
    assert not [p for p in psutil.process_iter(["cmdline"]) if "smollm2" in " ".join(p.info["cmdline"] or [])]
