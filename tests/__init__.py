import slipstream  # noqa: F401 - before anything imports gRPC
