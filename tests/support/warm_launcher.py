"""`slipstream up` whose workers are forked from a process that has imported the engine's libraries already.

    python -m tests.support.warm_launcher FORK_SERVER up --model ...

Everything is the product's own: launcher, plan, supervisor, control plane and frontends as always, and workers with the
settings, environment, CPUs and log that the launcher gives them. They only do not spend ten seconds on imports, twice a
worker, and are children of the fork server (`warm_processes`). How processes come to life, and how they end with a
launcher that was killed, is for tests with a plain `Cluster`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

import slipstream.cli
from deploy.processes import Component, Process
from tests.support import warm_processes
from tests.support.warm_processes import FIRST_VARIABLE, Forked

_WORKERS = {"prefill-worker", "decode-worker"}
_LARGE = "tests.support.fault_cluster:leave_large"


def main() -> None:
    warm_processes.join_fork_server(sys.argv.pop(1))
    os.environ[FIRST_VARIABLE] = ",".join(filter(None, (_LARGE, os.environ.get(FIRST_VARIABLE))))
    spawn = Process.spawn

    def spawned(component: Component) -> Process | Forked:
        if not _WORKERS & set(component.argv):
            return spawn(component)
        arguments = component.argv[component.argv.index("slipstream") + 1 :]
        environ, log = dict(component.environ), component.log_path
        own = environ, component.cpus, arguments
        return Forked(warm_processes.start(run_worker, *own, log=log, environ=environ), log)

    setattr(Process, "spawn", spawned)  # noqa: B010 - not what its type says
    slipstream.cli.main()


def run_worker(environ: Mapping[str, str], cpus: tuple[int, ...], arguments: tuple[str, ...]) -> None:
    """What the command line does in a process of its own."""
    os.setsid()
    for name in [one for one in os.environ if one.startswith("SLIPSTREAM_")]:
        del os.environ[name]
    os.environ.update(environ)
    if cpus:
        os.sched_setaffinity(0, cpus)
    sys.argv = ["slipstream", *arguments]
    slipstream.cli.main()


if __name__ == "__main__":
    main()
