"""Between the wire's sampling parameters and vLLM's, in both directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm import SamplingParams as VllmSampling
from vllm.exceptions import VLLMError, VLLMServerError
from vllm.sampling_params import RequestOutputKind

from slipstream.errors import InvalidRequestError, SlipstreamError, UnavailableError
from slipstream.v1.sampling_pb2 import Candidate, FinishReason, SamplingParams, TokenLogprobs

FINISH_REASONS: Mapping[str | None, FinishReason.ValueType] = {
    None: FinishReason.FINISH_REASON_UNSPECIFIED,
    "stop": FinishReason.FINISH_REASON_STOP,
    "length": FinishReason.FINISH_REASON_LENGTH,
}
_OPTIONAL = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logprobs",
)


def to_vllm(sampling: SamplingParams, *, transfer: Mapping[str, Any]) -> VllmSampling:
    """vLLM's parameters for `sampling`; `transfer` reaches the KV connector.

    Raises:
        InvalidRequestError: a value out of range, in vLLM's words; or stop strings, which only frontends match.
    """
    if sampling.stop:
        raise InvalidRequestError("stop: workers match token ids only, send stop strings to a frontend", param="stop")
    values: dict[str, Any] = {name: getattr(sampling, name) for name in _OPTIONAL if _is_set(sampling, name)}
    values.setdefault("max_tokens", None)  # up to the context length; vLLM's own default is 16
    if sampling.logit_bias:
        values["logit_bias"] = dict(sampling.logit_bias)
    if sampling.stop_token_ids:
        values["stop_token_ids"] = list(sampling.stop_token_ids)
    if transfer:
        values["extra_args"] = {"kv_transfer_params": dict(transfer)}
    try:
        return VllmSampling(
            detokenize=False, output_kind=RequestOutputKind.DELTA, ignore_eos=sampling.ignore_eos, **values
        )
    except (VLLMError, ValueError) as error:
        raise verdict(error) from error


def verdict(error: VLLMError | ValueError) -> SlipstreamError:
    """vLLM's refusal of a request, in our terms: the caller's mistake, unless vLLM says it is the server's."""
    if isinstance(error, VLLMServerError):
        return UnavailableError(f"the engine refused the request: {error}", code="engine_refused")
    message = str(error.args[0]) if error.args else str(error)
    return InvalidRequestError(message, param=getattr(error, "parameter", None))


def _is_set(sampling: SamplingParams, name: Any) -> bool:
    return sampling.HasField(name)


def prefill_sampling(transfer: Mapping[str, Any]) -> VllmSampling:
    """Compute the prompt; the one token that vLLM insists on is thrown away: decode samples its own."""
    return VllmSampling(
        max_tokens=1,
        temperature=0.0,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        ignore_eos=True,
        extra_args={"kv_transfer_params": dict(transfer)},
    )


def to_wire(
    token_ids: Sequence[int], logprobs: Sequence[Mapping[int, Any]] | None, asked: int
) -> Sequence[TokenLogprobs]:
    """The chosen token's and the `asked` best tokens' log probabilities, for each token."""
    if logprobs is None:
        return ()
    rows = []
    for token_id, row in zip(token_ids, logprobs, strict=False):
        best = sorted((entry.rank, other, entry.logprob) for other, entry in row.items() if entry.rank <= asked)
        rows.append(
            TokenLogprobs(
                chosen=Candidate(token_id=token_id, logprob=row[token_id].logprob),
                top=[Candidate(token_id=other, logprob=logprob) for _, other, logprob in best[:asked]],
            )
        )
    return rows
