"""The whole run of a local cluster: start, wait until ready, do something with it, stop.

`launch` knows nothing of Slipstream's roles: components are data and readiness is a function, so that the same code
starts a cluster and the small scripts of its tests.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

from rich.console import Console

from deploy import readiness, scaler_service
from deploy.plan import CONTROL_PLANE, FRONTEND, LocalCluster
from deploy.processes import Component
from deploy.progress import Progress
from deploy.supervisor import Report, RestartPolicy, Supervisor
from slipstream.errors import SlipstreamError, StartupError

T = TypeVar("T")

UntilReady = Callable[[Report], Coroutine[Any, Any, None]]
Beside = Callable[[Supervisor], AbstractAsyncContextManager[None]]
"""What runs beside the components and may add and retire some."""

# One wish to stop can arrive twice: `timeout` and some shells signal a process and then its group. What comes within
# this time of the first signal is the same wish.
_SAME_WISH_S = 0.5

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StoppedBySignal(Exception):  # noqa: N818 - not an error: somebody asked
    """The run was ended from outside.

    Attributes:
        ready: whether the cluster was ready by then.
    """

    def __init__(self, signum: int, *, ready: bool) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum
        self.ready = ready


async def launch_cluster(cluster: LocalCluster, body: Callable[[], Coroutine[Any, Any, T]], *, console: Console) -> T:
    """`launch` for a planned cluster: ready means that all workers and the frontend are."""
    settings = cluster.settings

    async def until_ready(report: Report) -> None:
        await readiness.until_ready(
            registry=settings.control_plane.address,
            frontend_url=cluster.http_url,
            enough=readiness.all_named(cluster.worker_names, report),
            control_plane=CONTROL_PLANE,
            frontend=FRONTEND,
            report=report,
        )

    def scaling(supervisor: Supervisor) -> AbstractAsyncContextManager[None]:
        return scaler_service.serving(cluster, supervisor) if settings.cluster.autoscale else nullcontext()

    return await launch(
        cluster.components,
        until_ready,
        body,
        console=console,
        beside=scaling,
        ready_timeout_s=settings.cluster.ready_timeout_s,
        # Both drain one after the other; some seconds on top for the processes to end.
        stop_timeout_s=settings.frontend.drain_timeout_s + settings.worker.drain_timeout_s + 10.0,
    )


async def launch(
    components: Sequence[Component],
    until_ready: UntilReady,
    body: Callable[[], Coroutine[Any, Any, T]],
    *,
    console: Console,
    ready_timeout_s: float,
    stop_timeout_s: float,
    policy: RestartPolicy | None = None,
    beside: Beside = lambda _: nullcontext(),
) -> T:
    """Start the components, and run `body` once they are ready; when it returns, fails or is interrupted, stop them.

    Must run on the main thread. A first SIGINT, SIGTERM or SIGHUP stops gracefully; another one, at least half a
    second later, kills.

    Raises:
        StartupError: a component ended or was not ready in time; or, later, an essential one cannot be kept running.
        StoppedBySignal: a signal came before `body` was done.
    """
    progress = Progress(console, [component.name for component in components])
    supervisor = Supervisor(
        components, report=progress, policy=policy or RestartPolicy(), stop_timeout_s=stop_timeout_s
    )
    with _stop_signals(supervisor) as stop:
        async with supervisor, beside(supervisor):
            with progress.live():
                ready = _ready_within(until_ready(progress), ready_timeout_s, progress)
                await _first(ready, supervisor.first_death(), stop, was_ready=False)
            return await _first(body(), supervisor.keep_running(), stop, was_ready=True)


async def _ready_within(ready: Coroutine[Any, Any, None], timeout_s: float, progress: Progress) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await ready
    except TimeoutError:
        late = ", ".join(progress.not_ready())
        message = f"not ready within cluster.ready_timeout_s = {timeout_s:g} s: {late}; the logs say why"
        raise StartupError(message) from None


async def _first(
    wanted: Coroutine[Any, Any, T],
    failure: Coroutine[Any, Any, SlipstreamError],
    stop: asyncio.Future[int],
    *,
    was_ready: bool,
) -> T:
    """The result of `wanted`, unless a failure or a signal comes first."""
    task, failing = asyncio.ensure_future(wanted), asyncio.ensure_future(failure)
    try:
        everything: set[asyncio.Future[Any]] = {task, failing, stop}
        await asyncio.wait(everything, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if stop.done():
            raise StoppedBySignal(stop.result(), ready=was_ready)
        raise failing.result()
    finally:
        await _end(task)
        await _end(failing)


async def _end(task: asyncio.Future[Any]) -> None:
    if not task.done():
        task.cancel()
        await asyncio.wait({task})


@contextmanager
def _stop_signals(supervisor: Supervisor) -> Iterator[asyncio.Future[int]]:
    """A future of the first signal that asks for the end; a later one kills all processes."""
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[int] = loop.create_future()
    first_s = 0.0

    def on_signal(signum: int) -> None:
        nonlocal first_s
        if not stop.done():
            first_s = loop.time()
            stop.set_result(signum)
        elif loop.time() - first_s > _SAME_WISH_S:
            supervisor.kill_now()

    for signum in _STOP_SIGNALS:
        loop.add_signal_handler(signum, on_signal, signum)
    try:
        yield stop
    finally:
        for signum in _STOP_SIGNALS:
            loop.remove_signal_handler(signum)


async def forever() -> None:
    """A body that only a signal or a failure ends."""
    await asyncio.Event().wait()
