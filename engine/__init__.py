"""What both worker roles share: the Engine protocol, the vLLM engine, the process that hosts a role."""

import slipstream  # noqa: F401 - before anything imports gRPC
