"""The real engine: vLLM's AsyncLLM with Slipstream's KV connector, behind the Engine protocol.

vLLM runs its scheduler and the model in a process of its own (the engine core); this class is its client in
the worker's service process. It is made before its process serves anything, and knows nothing of gRPC.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

from vllm.config import VllmConfig
from vllm.exceptions import VLLMError
from vllm.outputs import RequestOutput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError as VllmEngineDeadError
from vllm.v1.engine.exceptions import EngineGenerateError
from vllm.v1.metrics.loggers import StatLoggerBase

from engine import device as devices
from engine.own_agent import OwnAgent
from engine.protocol import CacheChange, EngineTimes, PromptComputed, TokensGenerated
from engine.vllm_arguments import engine_args
from engine.vllm_events import EventSocket, Translation
from engine.vllm_sampling import FINISH_REASONS, prefill_sampling, to_vllm, to_wire, verdict
from kv_transfer.accounts import FAILURES
from kv_transfer.agent_start import Endpoint, read_endpoint
from kv_transfer.board import Board, Counter
from kv_transfer.identity import Identity
from kv_transfer.permits import Permit
from kv_transfer.scheduler_side import ACCOUNT, RECEIVE, SEND
from slipstream import telemetry
from slipstream.errors import (
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    StartupError,
    UnavailableError,
)
from slipstream.settings import Settings
from slipstream.v1.registry_pb2 import Capacity, Load, TransferEndpoint, TransferPath
from slipstream.v1.sampling_pb2 import RequestAccount, SamplingParams
from slipstream.v1.worker_pb2 import Handoff

log = telemetry.get_logger(__name__)

# An idle engine core needs about two seconds on a slow CPU; one that is killed leaves a semaphore and warnings behind.
_ENGINE_END_S = 5.0
# How long a prompt waits for a worker that should have blocks of it, before it is computed here after all.
_SOURCE_PATIENCE_S = 2.0


class _Queues(StatLoggerBase):
    """Keeps the last queue lengths that vLLM reported."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self.running = 0
        self.waiting = 0

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        if scheduler_stats is not None:
            self.running = scheduler_stats.num_running_reqs
            self.waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


class VllmEngine:
    """One vLLM engine.

    Args:
        model_path: a local folder.
        board: this worker's lease board; its engine core maps it too.
        identity: of this worker's service, by which its transfer agents know it.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        model_path: Path,
        served_name: str,
        board: Board,
        identity: Identity | None = None,
    ) -> None:
        self._settings = settings
        self._board = board
        self._own_agent = OwnAgent(identity or Identity())
        self._queues: _Queues | None = None
        self._served_name = served_name
        self._events = EventSocket() if settings.worker.cache_events else None
        self.device = devices.choose_device(settings.device)
        try:
            self._args = engine_args(
                settings,
                self.device,
                model_path=model_path,
                served_name=served_name,
                board=board,
                owner_key=self._own_agent.key,
                events=self._events,
            )
        except BaseException:
            self._close_events()
            raise
        self._llm: AsyncLLM | None = None
        self._requests_total = 0
        self._tokens_total = 0
        self.max_model_len = 0
        self._vocab_size = 0
        self.step_tokens = 0

    def start(self) -> None:
        """Load the model; blocks for seconds to minutes.

        Raises:
            StartupError: vLLM cannot serve this model here, in its own words.
        """
        try:
            self._llm = AsyncLLM.from_engine_args(self._args, stat_loggers=[self._stat_logger])
        except (VLLMError, ValueError, RuntimeError, OSError, AssertionError) as error:
            self._close_events()
            raise StartupError(f"vLLM cannot start with {self._args.model}: {error}") from error
        model = self._llm.vllm_config.model_config
        self.max_model_len = model.max_model_len
        self._vocab_size = model.get_vocab_size()
        self.step_tokens = self._llm.vllm_config.scheduler_config.max_num_batched_tokens

    def _stat_logger(self, vllm_config: VllmConfig, engine_index: int = 0) -> StatLoggerBase:
        self._queues = _Queues(vllm_config, engine_index)
        return self._queues

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows."""
        return self._vocab_size

    # -- requests -----------------------------------------------------------------------------------------

    async def prefill(
        self,
        request_id: str,
        token_ids: Sequence[int],
        lease: tuple[int, int],
        *,
        permit: Permit,
        source: Handoff | None,
        cached_only: bool,
        cache_salt: str = "",
    ) -> PromptComputed:
        """See `Engine.prefill`."""
        self._check_prompt(token_ids)
        wishes: dict[str, Any] = {SEND: [*lease, permit.handoff, cached_only, permit.token, permit.receiver]}
        if source is not None:
            wishes[RECEIVE] = _receive(source, _SOURCE_PATIENCE_S)
        params = prefill_sampling(wishes)
        transfer: dict[str, Any] = {}
        times: EngineTimes | None = None
        async with aclosing(self._generate(request_id, token_ids, params, cache_salt)) as outputs:
            async for output in outputs:
                transfer = output.kv_transfer_params or transfer
                times = _times(output)
        account = transfer.get(ACCOUNT, {})
        computed = account.get("computed_tokens", 0)
        self._requests_total += 1
        self._tokens_total += computed
        return PromptComputed(computed, account.get("cached_tokens", 0), account.get("received_tokens", 0), times)

    async def decode(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        handoff: Handoff | None,
        *,
        cache_salt: str = "",
    ) -> AsyncGenerator[TokensGenerated, None]:
        """See `Engine.decode`."""
        self._check_prompt(token_ids)
        self._check_ids("logit_bias", sampling.logit_bias)
        self._check_ids("stop_token_ids", sampling.stop_token_ids)
        params = to_vllm(sampling, transfer={RECEIVE: _receive(handoff, 0.0)} if handoff else {})
        self._requests_total += 1
        async with aclosing(self._generate(request_id, token_ids, params, cache_salt)) as outputs:
            async for output in outputs:
                if output.outputs[0].finish_reason in ("abort", "error"):
                    raise UnavailableError("the engine gave the request up", code="engine_aborted")
                generated = _to_tokens(output, sampling.logprobs)
                self._tokens_total += len(generated.token_ids)
                yield generated

    async def _generate(
        self, request_id: str, token_ids: Sequence[int], params: Any, cache_salt: str
    ) -> AsyncGenerator[RequestOutput, None]:
        llm = self._running()
        try:
            prompt: dict[str, Any] = {"prompt_token_ids": list(token_ids)}
            if cache_salt:
                prompt["cache_salt"] = cache_salt
            stream = llm.generate(prompt, params, request_id)
            async with aclosing(stream):
                async for output in stream:
                    yield output
        except VllmEngineDeadError as error:
            raise EngineDeadError("the worker's engine has died") from error
        except EngineGenerateError as error:
            raise UnavailableError("the engine gave the request up", code="engine_aborted") from error
        except (VLLMError, ValueError) as error:
            raise verdict(error) from error

    def _check_prompt(self, token_ids: Sequence[int]) -> None:
        self._running()
        if not token_ids:
            raise InvalidRequestError("token_ids: at least one token is needed", param="token_ids")
        if len(token_ids) >= self.max_model_len:
            raise ContextLengthError(
                f"the prompt has {len(token_ids)} tokens; with one token of answer at most "
                f"{self.max_model_len} fit (worker.max_model_len)",
                param="token_ids",
            )
        self._check_ids("token_ids", token_ids)

    def _check_ids(self, name: str, token_ids: Any) -> None:
        highest = max(token_ids, default=0)
        if highest >= self._vocab_size:
            raise InvalidRequestError(f"{name}: {highest} is not below the vocabulary's {self._vocab_size}", param=name)

    def _running(self) -> AsyncLLM:
        if self._llm is None:
            raise EngineDeadError("the worker's engine is not running")
        return self._llm

    # -- state --------------------------------------------------------------------------------------------

    def capacity(self) -> Capacity:
        board = self._board
        return Capacity(
            max_model_len=self.max_model_len,
            block_tokens=board.counter(Counter.BLOCK_TOKENS),
            blocks=board.counter(Counter.BLOCKS_TOTAL),
            block_bytes=board.counter(Counter.BLOCK_BYTES),
            max_running=self._settings.worker.max_running,
        )

    def load(self) -> Load:
        """See `Engine.load`; the block counts are exact, straight from the engine's block pool."""
        board, queues = self._board, self._queues
        return Load(
            running=queues.running if queues else 0,
            waiting=queues.waiting if queues else 0,
            blocks_used=board.counter(Counter.BLOCKS_TOTAL) - board.counter(Counter.BLOCKS_FREE),
            requests_total=self._requests_total,
            tokens_total=self._tokens_total,
            handoffs_held=board.counter(Counter.HANDOFFS_HELD),
            fallbacks_total=sum(board.counter(word) for cause, word in FAILURES.items() if cause != "cancelled")
            + board.counter(Counter.FAILED_OTHER)
            + board.counter(Counter.HANDOFFS_EXPIRED),
        )

    def transfer(self) -> TransferEndpoint | None:
        """See `Engine.transfer`."""
        found = read_endpoint(self._board)
        if found is None:
            return None
        return TransferEndpoint(
            address=found.address,
            epoch=found.epoch,
            transports=found.transports,
            ranks=found.ranks,
            public_key=found.key,
        )

    async def admit(self, keys: Collection[bytes]) -> None:
        """See `Engine.admit`."""
        await self._own_agent.admit(self._own_endpoint(), keys)

    async def probe_path(self, worker_id: str, peer: TransferEndpoint, transport: str) -> TransferPath:
        """See `Engine.probe_path`."""
        return await self._own_agent.measure(self._own_endpoint(), worker_id, peer, transport)

    def _own_endpoint(self) -> Endpoint:
        own = read_endpoint(self._board)
        if own is None:
            raise EngineDeadError("the worker's engine is not running")
        return own

    def cache_changes(self) -> AsyncIterator[CacheChange] | None:
        """See `Engine.cache_changes`."""
        if self._events is None:
            return None
        return self._events.changes(Translation(self._served_name, self.capacity().block_tokens))

    @property
    def alive(self) -> bool:
        return self._llm is not None and not self._llm.errored

    def shutdown(self) -> None:
        """End the engine core; requests still in it are lost.

        It is killed when it takes longer than it should: its state is only memory.
        """
        llm, self._llm = self._llm, None
        if llm is not None:
            with contextlib.suppress(VllmEngineDeadError):
                llm.shutdown(timeout=_ENGINE_END_S)
        self._close_events()

    def _close_events(self) -> None:
        if self._events is not None:
            self._events.close()


def _to_tokens(output: RequestOutput, logprobs_asked: int) -> TokensGenerated:
    completion = output.outputs[0]
    finished = completion.finish_reason
    return TokensGenerated(
        token_ids=list(completion.token_ids),
        logprobs=to_wire(completion.token_ids, cast(Any, completion.logprobs), logprobs_asked),
        finish_reason=FINISH_REASONS[finished],
        stop_reason="" if completion.stop_reason is None else str(completion.stop_reason),
        account=_account(output) if finished is not None else None,
        times=_times(output) if finished is not None else None,
    )


def _times(output: RequestOutput) -> EngineTimes | None:
    """As the engine core measured them; None for what ended before it got that far."""
    stats = output.metrics
    if stats is None or not stats.queued_ts <= stats.scheduled_ts <= stats.first_token_ts <= stats.last_token_ts:
        return None
    return EngineTimes(stats.queued_ts, stats.scheduled_ts, stats.first_token_ts, stats.last_token_ts)


def _receive(handoff: Handoff, patience_s: float) -> list[Any]:
    sender = handoff.sender
    ranks = list(sender.ranks)
    return [handoff.id, sender.address, sender.epoch, ranks, patience_s, sender.public_key, handoff.token]


def _account(output: RequestOutput) -> RequestAccount:
    facts = (output.kv_transfer_params or {}).get(ACCOUNT, {})
    return RequestAccount(
        prompt_tokens=facts.get("prompt_tokens", 0),
        decode_computed_tokens=facts.get("computed_tokens", 0),
        decode_cached_tokens=facts.get("cached_tokens", 0),
        kv_blocks_moved=facts.get("blocks_moved", 0),
        kv_bytes_moved=facts.get("bytes_moved", 0),
        kv_wire_bytes=facts.get("wire_bytes", 0),
        kv_spans_resent=facts.get("resent", 0),
        transfer_exposed_s=facts.get("exposed_s", 0.0),
        transfer_s=facts.get("transfer_s", 0.0),
        transport=facts.get("transport", ""),
        fallback=f"transfer_{facts['failure']}" if facts.get("failure") else "",
    )
