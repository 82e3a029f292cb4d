"""Prompts and what a plain engine answers to them, clearly enough to be compared: in a process forked warm, in time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tests.support import plain_engine, warm_processes

LEAST_MARGIN = 0.01
LIMIT_S = plain_engine.TIMEOUT_S

Pair = tuple[list[int], list[int]]


def clear_answers(model: Path, prompts: Sequence[Sequence[int]], max_tokens: int, folder: Path) -> list[Pair]:
    """See `plain_engine.clear_answers`. The log and the answers lie in the folder afterwards.

    Raises:
        AssertionError: the engine failed, or took too long.
    """
    out, log = folder / "answers.json", folder / "plain-engine.log"
    process = warm_processes.start(
        plain_engine.clear_answers,
        *(str(model), [list(prompt) for prompt in prompts], max_tokens, LEAST_MARGIN, str(out)),
        log=log,
        environ={"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    )
    warm_processes.finish(process, "the plain engine", log=log, limit_s=LIMIT_S)
    pairs: list[Pair] = [(prompt, answer) for prompt, answer in json.loads(out.read_text())]
    return pairs
