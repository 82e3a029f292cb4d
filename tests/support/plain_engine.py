"""One plain vLLM engine, without any of our code: what a cluster's answers are compared with.

    python -m tests.support.plain_engine < request.json > answer.json

The request is `{"model": folder, "prompts": [[token ids]], "max_tokens": n}`; the answer is a list of token id
lists, greedy, one for each prompt.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TIMEOUT_S = 300.0


def greedy(model: Path, prompts: Sequence[Sequence[int]], *, max_tokens: int) -> list[list[int]]:
    """Run the engine in a process of its own and return its answers. End-of-sequence tokens are ignored."""
    request = {"model": str(model), "prompts": [list(prompt) for prompt in prompts], "max_tokens": max_tokens}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.plain_engine"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    if done.returncode != 0:
        raise AssertionError(f"the plain engine failed:\n{done.stderr[-4000:]}")
    answers: list[list[int]] = json.loads(done.stdout.splitlines()[-1])
    return answers


def main() -> None:
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_STREAM="ext://sys.stderr", TORCHDYNAMO_DISABLE="1"
    )
    from vllm import SamplingParams

    request = json.load(sys.stdin)
    params = SamplingParams(temperature=0, max_tokens=request["max_tokens"], ignore_eos=True, detokenize=False)
    outputs = load(request["model"]).generate(
        [{"prompt_token_ids": ids} for ids in request["prompts"]], params, use_tqdm=False
    )
    sys.stdout.write(json.dumps([list(output.outputs[0].token_ids) for output in outputs]) + "\n")


def clear_answers(model: str, prompts: Sequence[Sequence[int]], max_tokens: int, least_margin: float, out: str) -> None:
    """Write to `out`, as JSON, pairs of a prompt and its greedy answer: first for the prompts given, then for second
    turns that begin with a prompt and half of its answer.

    Only answers in which each token was chosen clearly: by at least `least_margin` (natural logarithm) before the
    second best, so that the rounding of another batch cannot change it.
    """
    from vllm import SamplingParams

    engine = load(model)
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, logprobs=2)
    pairs: list[tuple[list[int], list[int]]] = []
    turn = [list(prompt) for prompt in prompts]
    for _ in range(2):
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in turn], params, use_tqdm=False)
        clear = []
        for prompt, output in zip(turn, outputs, strict=True):
            chances = [
                sorted((one.logprob for one in step.values()), reverse=True) for step in output.outputs[0].logprobs
            ]
            if min(best - second for best, second, *_ in chances) >= least_margin:
                clear.append((prompt, list(output.outputs[0].token_ids)))
        pairs += clear
        turn = [prompt + answer[: max_tokens // 2] + prompt[:40] for prompt, answer in clear[::2]]
    Path(out).write_text(json.dumps(pairs))


def load(model: str) -> Any:
    """The engine, in this process."""
    from vllm import LLM

    return LLM(
        model,
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=4096,
        kv_cache_memory_bytes=256 << 20,
        enforce_eager=True,
        generation_config="vllm",
    )


if __name__ == "__main__":
    main()
