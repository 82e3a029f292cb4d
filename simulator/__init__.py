"""Discrete-event simulation: real router, real admission, real planner, the simulated engine's scheduler, virtual time.

Nothing here sleeps, listens or reads a clock: a run is a function of a load, a cluster, a policy and a seed. `run` is
its door; `serving` is a request's way, `members` are the workers as they come and go, `scaling` is the control loop.
"""

import slipstream  # noqa: F401 - before anything imports gRPC
