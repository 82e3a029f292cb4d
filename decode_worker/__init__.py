"""The decode role: receives a prompt's KV blocks and generates from them."""

import slipstream  # noqa: F401 - before anything imports gRPC
