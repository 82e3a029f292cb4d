"""The ground floor of Slipstream: wire stubs, client, configuration, errors, telemetry.

Every other package may import this one; this one imports none of them (the command line in
`slipstream.cli` composes the rest by late import).
"""

import os

# For whoever imports gRPC after this; every other package of ours imports this one before anything else. From 1.80 on
# gRPC does something of its own in each fork, and where calls are under way it now and then ends the child before its
# program has begun. uvloop starts programs by forks.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

__version__ = "0.1.0"
