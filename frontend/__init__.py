"""The frontend: OpenAI-compatible HTTP and gRPC faces, text and tokens, routing to the two pools.

The only part of Slipstream that knows text. It never imports torch or vllm.
"""

import slipstream  # noqa: F401 - before anything imports gRPC
