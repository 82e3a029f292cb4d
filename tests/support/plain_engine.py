"""One plain vLLM engine, without any of our code: what a cluster's answers are compared with.

It runs in a process forked from one that has imported vLLM (`warm_processes`): what it takes is then seconds.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support import warm_processes

TIMEOUT_S = 300.0


def greedy(model: Path, prompts: Sequence[Sequence[int]], *, max_tokens: int) -> list[list[int]]:
    """The engine's answers, greedy, a list of token ids for each prompt. End-of-sequence tokens are ignored."""
    warm_processes.start_fork_server()
    with tempfile.TemporaryDirectory(prefix="plain-engine-") as folder:
        out, log = Path(folder) / "answers.json", Path(folder) / "engine.log"
        asked = [list(prompt) for prompt in prompts]
        process = warm_processes.start(
            *(_answer, str(model), asked, max_tokens, str(out)),
            log=log,
            environ={"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        )
        process.join(TIMEOUT_S)
        if process.exitcode != 0:
            process.kill()
            raise AssertionError(f"the plain engine failed:\n{log.read_text()[-4000:]}")
        answers: list[list[int]] = json.loads(out.read_text())
    return answers


def _answer(model: str, prompts: Sequence[Sequence[int]], max_tokens: int, out: str) -> None:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    outputs = load(model).generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    Path(out).write_text(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))


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
