"""Reads step times out of aiconfigurator's measured operator tables; run by `simulator.gpu_profiles`.

This file runs in an environment of its own, in which nothing of Slipstream is installed: its packages are large
and pinned. It reads one JSON task from standard input and prints one JSON answer.

    task:   {"model", "system", "backend", "tensor_parallel", "weights", "experts", "prefill_tokens": [...],
             "batches": [...], "contexts": [...]}; experts: a mixture's [tensor, expert parallelism], else null
    answer: {"prefill": [[tokens, seconds], ...], "decode": [[batch, context, seconds], ...]}
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any


def tables(task: dict[str, Any]) -> dict[str, list[list[float]]]:
    """All points of a task, in the order asked for."""
    from aiconfigurator.cli import api  # type: ignore[import-not-found]  # not a package of ours

    experts = {}
    if task["experts"] is not None:
        experts = {"moe_tp_size": task["experts"][0], "moe_ep_size": task["experts"][1]}
        experts["moe_quant_mode"] = task["weights"]

    def estimate(mode: str, input_tokens: int, output_tokens: int, batch: int) -> Any:
        return api.cli_estimate(
            task["model"],
            task["system"],
            mode=mode,
            backend_name=task["backend"],
            isl=input_tokens,
            osl=output_tokens,
            batch_size=batch,
            tp_size=task["tensor_parallel"],
            gemm_quant_mode=task["weights"],
            **experts,
        )

    prefill = [[tokens, estimate("static_ctx", tokens, 1, 1).ttft / 1e3] for tokens in task["prefill_tokens"]]
    decode = [
        [batch, context, estimate("static_gen", context, 2, batch).tpot / 1e3]
        for batch in task["batches"]
        for context in task["contexts"]
    ]
    return {"prefill": prefill, "decode": decode}


if __name__ == "__main__":
    given = json.load(sys.stdin)
    # The package prints as it goes; standard output is for the answer.
    with contextlib.redirect_stdout(sys.stderr):
        answer = tables(given)
    json.dump(answer, sys.stdout)
