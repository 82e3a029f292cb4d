"""A Python client for a Slipstream cluster, over its gRPC face; synchronous and asynchronous.

    from slipstream.client import Client

    with Client("localhost:8001") as client:
        for piece in client.generate("The capital of France is", max_tokens=16):
            print(piece.text, end="", flush=True)

        answer = client.chat([{"role": "user", "content": "Who are you?"}], temperature=0).collect()
        print(answer.text, answer.usage.completion_tokens)

`AsyncClient` is the same with `async with`, `async for` and `await`. Sampling parameters are keywords with the
names of `slipstream.v1.SamplingParams` (see `SamplingOptions`). Errors are the types of `slipstream.errors`.
"""

from slipstream.client.asynchronous import AsyncClient, AsyncStream
from slipstream.client.connection import Tls
from slipstream.client.results import Account, Candidate, Completion, ModelInfo, Piece, TokenLogprob, Usage
from slipstream.client.sampling import ChatMessage, SamplingOptions
from slipstream.client.synchronous import Client, Stream

__all__ = [
    "Account",
    "AsyncClient",
    "AsyncStream",
    "Candidate",
    "ChatMessage",
    "Client",
    "Completion",
    "ModelInfo",
    "Piece",
    "SamplingOptions",
    "Stream",
    "Tls",
    "TokenLogprob",
    "Usage",
]
