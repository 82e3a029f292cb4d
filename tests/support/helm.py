"""Helm in a process of its own: its library is in Go, whose runtime does not bear what other tests do to a process."""

from __future__ import annotations

import atexit
import functools
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class RefusedError(Exception):
    """The chart, or the values that it was given, are refused; the message is Helm's."""


def render(
    chart: Path, values: Mapping[str, Any], *, name: str, namespace: str, kubeconfig: Path | None = None
) -> dict[str, str]:
    """Every template's text by its name, NOTES.txt too.

    Args:
        kubeconfig: names an API server where templates look things up; without one they find nothing.

    Raises:
        RefusedError: by the schema or by a template.
    """
    where = {} if kubeconfig is None else {"kubeconfig": str(kubeconfig)}
    texts: dict[str, str] = _asked("render", str(chart), values=dict(values), name=name, namespace=namespace, **where)
    return texts


def lint(chart: Path, values: Mapping[str, Any], *, kube_version: str) -> dict[str, Any]:
    """What Helm's linter says of the chart, strictly.

    Raises:
        RefusedError: it cannot be loaded.
    """
    report: dict[str, Any] = _asked("lint", str(chart), values=dict(values), kube_version=kube_version)
    return report


def validate_schema(chart: Path, values: Mapping[str, Any]) -> None:
    """Look at values by the chart's schema alone.

    Raises:
        RefusedError: they do not fit.
    """
    _asked("validate_schema", str(chart), values=dict(values))


def package(chart: Path, folder: Path) -> Path:
    """Write the chart's archive into a folder.

    Raises:
        RefusedError: it cannot be loaded.
    """
    return Path(_asked("package", str(chart), values={}, folder=str(folder)))


@functools.cache
def _helm() -> subprocess.Popen[str]:
    program = [sys.executable, str(Path(__file__).with_name("helm_process.py"))]
    process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(process.communicate)  # its input ends, and so does it
    return process


def _asked(what: str, chart: str, **options: Any) -> Any:
    helm = _helm()
    assert helm.stdin is not None
    assert helm.stdout is not None
    helm.stdin.write(json.dumps({"what": what, "chart": chart, "options": options}) + "\n")
    helm.stdin.flush()
    answer = json.loads(helm.stdout.readline())
    if "refused" in answer:
        raise RefusedError(answer["refused"])
    return answer["done"]
