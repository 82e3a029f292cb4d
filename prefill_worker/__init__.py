"""The prefill role: computes a prompt and sends its KV blocks to one decode worker meanwhile."""

import slipstream  # noqa: F401 - before anything imports gRPC
