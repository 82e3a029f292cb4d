"""The control plane: for now the registry of workers.

`registry` is the pure soft state, `record_check` what a record must look like, `service` the gRPC face of it,
`server` the process. Nothing is stored: whoever restarts this process loses nothing, because the workers
tell it everything again. It never imports torch or vllm.
"""
