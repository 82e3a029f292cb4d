"""One vLLM engine in this process whose cached prompts can be quantized in place, as a slow link would do it.

Each prompt is one token longer than a whole number of blocks. So its cached blocks are what a decode worker receives,
and asking again computes what a decode worker computes: the prompt's last token and the answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, RequestOutput, SamplingParams
from vllm.transformers_utils.config import get_config

from benchmarks.answer_difference import Answer
from engine.device import kv_token_bytes
from kv_transfer.compression import Codec
from kv_transfer.layout import block_views
from slipstream.errors import StartupError

# vLLM's default on a CPU, and the product's.
BLOCK_TOKENS = 128
# Blocks that an answer fills up, beside its prompt's.
_ANSWER_BLOCKS = 2


@dataclass(frozen=True, slots=True)
class Quantizing:
    """What it took to encode and decode all cached blocks once, on one thread.

    Attributes:
        raw_bytes: of the blocks.
        wire_bytes: of their encoded form.
    """

    raw_bytes: int
    wire_bytes: int
    encode_cpu_s: float
    decode_cpu_s: float


class QuantizedEngine:
    """The engine, with these prompts in its cache.

    Args:
        prompts: token ids; each a multiple of `BLOCK_TOKENS` long, plus one.
    """

    def __init__(self, model: Path, dtype: str, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
        assert all(len(prompt) % BLOCK_TOKENS == 1 for prompt in prompts)
        assert max_tokens < BLOCK_TOKENS
        self._prompts = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        self._lengths = [len(prompt) for prompt in prompts]
        self._max_tokens = max_tokens
        blocks = 2 * sum(length // BLOCK_TOKENS + _ANSWER_BLOCKS for length in self._lengths)
        token_bytes = kv_token_bytes(get_config(str(model), trust_remote_code=False).get_text_config(), 4)
        self._llm = LLM(
            str(model),
            dtype=dtype,
            skip_tokenizer_init=True,
            max_model_len=max(self._lengths) + BLOCK_TOKENS,
            block_size=BLOCK_TOKENS,
            num_gpu_blocks_override=blocks,
            # At most. Without it vLLM claims nearly all memory there is, and does not start where others use some.
            kv_cache_memory_bytes=blocks * BLOCK_TOKENS * token_bytes,
            enforce_eager=True,
            enable_prefix_caching=True,
            generation_config="vllm",
            max_logprobs=-1,
            seed=0,
        )
        self._generate(SamplingParams(temperature=0, max_tokens=1, detokenize=False))
        (runner,) = self._llm.collective_rpc(_model_runner)
        caches = dict(enumerate(runner.kv_caches))
        self.kv_dtype: torch.dtype = caches[0].dtype
        self._blocks = self._cached_blocks()
        views = block_views({str(layer): cache for layer, cache in caches.items()}, self._pool().num_gpu_blocks)
        self._pieces = [view[block] for block in self._blocks for view in views]
        self._originals = [piece.clone() for piece in self._pieces]
        self.kv_bytes = sum(piece.numel() for piece in self._pieces)
        # Quantizing runs where the product does it: on a thread beside the engine's.
        self._thread = ThreadPoolExecutor(1)

    def answers(self) -> list[Answer]:
        """Of all prompts, from the cache as it is."""
        return self._answers(self._cached)

    def answers_computed_anew(self) -> list[Answer]:
        """Of all prompts, computed once more in other steps: equal but for roundings.

        The last thing to ask: the cache that was quantized is gone.
        """
        if not self._llm.reset_prefix_cache():
            raise StartupError("the engine still holds blocks: its cache cannot be emptied")
        heads = [{"prompt_token_ids": prompt["prompt_token_ids"][:BLOCK_TOKENS]} for prompt in self._prompts]
        self._llm.generate(heads, SamplingParams(temperature=0, max_tokens=1, detokenize=False), use_tqdm=False)
        return self._answers(self._generate)

    def _answers(self, ask: Callable[[SamplingParams], list[RequestOutput]]) -> list[Answer]:
        greedy = SamplingParams(temperature=0, max_tokens=self._max_tokens, ignore_eos=True, detokenize=False)
        token_ids = [list(output.outputs[0].token_ids) for output in ask(greedy)]
        first = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, ignore_eos=True, detokenize=False)
        distributions = [
            {token: entry.logprob for token, entry in output.outputs[0].logprobs[0].items()} for output in ask(first)
        ]
        return [Answer(ids, of) for ids, of in zip(token_ids, distributions, strict=True)]

    def restore(self) -> None:
        """Make the cache again what it was after the prompts were computed."""
        for piece, original in zip(self._pieces, self._originals, strict=True):
            piece.copy_(original)

    def quantize(self, codec: Codec) -> Quantizing:
        """Encode and decode every cached block in place, layer by layer as the transfer agent does."""
        return self._thread.submit(self._quantize, codec).result()

    def _quantize(self, codec: Codec) -> Quantizing:
        wire = torch.empty(self.kv_bytes, dtype=torch.uint8)
        wire_bytes = 0
        encode_s = decode_s = 0.0
        for piece in self._pieces:
            out = wire[: codec.encoded_bytes(piece.numel())]
            encode_s += _cpu_seconds(partial(codec.encode, [piece], out))
            decode_s += _cpu_seconds(partial(codec.decode, out, [piece]))
            wire_bytes += out.numel()
        return Quantizing(self.kv_bytes, wire_bytes, encode_s, decode_s)

    def close(self) -> None:
        """Stop the thread and the engine."""
        self._thread.shutdown()
        self._llm.llm_engine.engine_core.shutdown()

    def _cached(self, params: SamplingParams) -> list[RequestOutput]:
        outputs = self._generate(params)
        computed = [length - output.num_cached_tokens for length, output in zip(self._lengths, outputs, strict=True)]
        if set(computed) != {1} or self._cached_blocks() != self._blocks:
            raise StartupError("prompts fell out of the engine's cache: this measurement has nothing to compare")
        return outputs

    def _generate(self, params: SamplingParams) -> list[RequestOutput]:
        outputs: list[RequestOutput] = self._llm.generate(self._prompts, params, use_tqdm=False)
        return outputs

    def _pool(self) -> Any:
        return self._llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool

    def _cached_blocks(self) -> list[int]:
        return [block.block_id for block in self._pool().blocks if block.block_hash is not None]


def _model_runner(worker: Any) -> Any:
    return worker.model_runner


def _cpu_seconds(work: Callable[[], object]) -> float:
    began_s = time.thread_time()
    work()
    return time.thread_time() - began_s
