"""Ways to run a cluster. For now one: processes on this machine, behind `slipstream up` and `slipstream demo`.

cores.py      which CPUs each worker gets
plan.py       settings -> the processes to start, their ports and their folder
child.py      what runs in a child before its command: dies with the launcher, stays on its CPUs
processes.py  one child process, to its very end, with all that it has started
supervisor.py all of them: start, restart with backoff, stop in order
readiness.py  when a local cluster is ready
progress.py   what a person sees meanwhile
launch.py     the whole run: start, wait until ready, do something, stop
"""

import slipstream  # noqa: F401 - before anything imports gRPC
