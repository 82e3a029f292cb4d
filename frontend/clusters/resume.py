"""How an answer over gRPC goes on at another cluster: the same tokens, asked for after those that the client has. Pure.

Only where that is exact: the prompt came as token ids, nothing of the text is held back for a stop string, and what is
sampled next depends on the tokens alone (`frontend.resumption`). The messages that were passed on are kept as the bytes
that they were, and looked at only when they are needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from frontend.resumption import continuable, rest_of
from slipstream.v1.inference_pb2 import GenerateRequest, GenerateResponse, Usage
from slipstream.v1.sampling_pb2 import FinishReason

MAX_KEPT_BYTES = 16 << 20
"""Of one answer; a longer one does not go on elsewhere."""


def resumable(request: GenerateRequest) -> bool:
    """Whether an answer to it can go on at another cluster as if nothing had happened."""
    return request.WhichOneof("input") == "token_ids" and not request.sampling.stop and continuable(request.sampling)


@dataclass(slots=True)
class Passed:
    """What the client has of one answer.

    Attributes:
        generated: tokens of clusters that were lost.
    """

    request: GenerateRequest
    generated: list[int] = field(default_factory=list)
    _kept: list[bytes] = field(default_factory=list)
    _kept_bytes: int = 0

    @property
    def exact(self) -> bool:
        """Whether all of it is known."""
        return self._kept_bytes <= MAX_KEPT_BYTES

    def pass_on(self, message: bytes) -> bytes:
        """A message of the present cluster as the client gets it."""
        self._kept_bytes += len(message)
        if self.exact:
            self._kept.append(message)
        else:
            self._kept.clear()
        return self._whole(message) if self.generated else message

    def take_over(self) -> GenerateRequest | GenerateResponse:
        """The present cluster is lost: what to ask the next one, or the answer's end when only that was to come."""
        for message in self._kept:
            self.generated += GenerateResponse.FromString(message).token_ids
        self._kept.clear()
        rest = GenerateRequest()
        rest.CopyFrom(self.request)
        rest.token_ids.ids.extend(self.generated)
        rest.sampling.CopyFrom(rest_of(self.request.sampling, self.generated))
        if self.request.sampling.HasField("max_tokens") and rest.sampling.max_tokens == 0:
            return self._end()
        return rest

    def _whole(self, message: bytes) -> bytes:
        """A continuation's last message counts what came before it as generated, not as prompt."""
        response = GenerateResponse.FromString(message)
        if not response.finish_reason:
            return message
        before = len(self.generated)
        response.usage.prompt_tokens -= before
        response.usage.completion_tokens += before
        response.usage.cached_tokens = min(response.usage.cached_tokens, response.usage.prompt_tokens)
        if response.HasField("account"):
            response.account.prompt_tokens -= before
        return response.SerializeToString()

    def _end(self) -> GenerateResponse:
        usage = Usage(prompt_tokens=len(self.request.token_ids.ids), completion_tokens=len(self.generated))
        return GenerateResponse(
            request_id=self.request.request_id,
            model=self.request.model,
            finish_reason=FinishReason.FINISH_REASON_LENGTH,
            usage=usage,
        )
