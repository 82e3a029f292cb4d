"""The process of `tests.support.helm`: a question in JSON a line, an answer a line, until the input ends."""

from __future__ import annotations

import functools
import json
import sys
from typing import Any

from helm_python import Chart, Config, HelmError, lint


@functools.cache
def chart(path: str) -> Chart:
    return Chart.load(path)


def answer(question: dict[str, Any]) -> Any:
    path, options = question["chart"], question["options"]
    values = options.pop("values")
    match question["what"]:
        case "render" if "kubeconfig" in options:
            with Config(kubeconfig_path=options.pop("kubeconfig"), namespace=options["namespace"]) as config:
                return config.render(chart(path), values, **options)
        case "render":
            return chart(path).render(values, **options)
        case "lint":
            return lint(path, values, strict=True, **options)
        case "validate_schema":
            chart(path).validate_schema(values)
            return None
        case "package":
            return chart(path).save(options["folder"])
        case other:
            raise ValueError(other)


def main() -> None:
    for line in sys.stdin:
        try:
            told = {"done": answer(json.loads(line))}
        except HelmError as error:
            told = {"refused": str(error)}
        print(json.dumps(told), flush=True)  # noqa: T201 - to the process that asked


if __name__ == "__main__":
    main()
