"""All processes of a local cluster: started together, restarted with backoff, stopped in order, none left behind."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from deploy.processes import Component, Process, describe_exit, log_tail
from slipstream.errors import StartupError

State = Literal[
    "starting",
    "loading",
    "waiting for workers",
    "ready",
    "died",
    "restarted",
    "given up",
    "stopping",
    "stopped",
    "retired",
    "sick",
]

# How long the end of a killed process may take: the kernel has to give back its memory.
_KILL_TIMEOUT_S = 10.0


class Report(Protocol):
    """Takes each change of a component, for people to see."""

    def __call__(self, name: str, state: State, detail: str = "") -> None: ...


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """When a process that died is started again: after a wait that doubles, and not without end.

    Attributes:
        limit: restarts within `window_s` after which it is given up.
    """

    limit: int = 5
    window_s: float = 600.0
    first_delay_s: float = 1.0
    max_delay_s: float = 30.0

    def delay_s(self, restarts_s: Sequence[float], now_s: float) -> float | None:
        """Seconds to wait before the next start, given when earlier restarts were; None to give up."""
        recent = sum(1 for restart_s in restarts_s if now_s - restart_s < self.window_s)
        if recent >= self.limit:
            return None
        return min(self.first_delay_s * 2.0**recent, self.max_delay_s)


class Supervisor:
    """Owns the processes from entering it until it is left: then all have ended, however it is left.

    Args:
        stop_timeout_s: longest a graceful stop may take in all before what is left is killed.
    """

    def __init__(
        self,
        components: Sequence[Component],
        *,
        report: Report,
        policy: RestartPolicy,
        stop_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._components = list(components)
        self._report = report
        self._policy = policy
        self._stop_timeout_s = stop_timeout_s
        self._clock = clock
        self._running: dict[str, Process] = {}
        self._keeping: dict[str, asyncio.Task[StartupError | None]] = {}
        self._retiring: set[str] = set()
        self._killed = False

    async def __aenter__(self) -> Self:
        try:
            for component in self._components:
                self._start(component)
                self._report(component.name, "starting")
        except BaseException:
            await self._end_all()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end_all()

    def pids(self) -> dict[str, int]:
        """The processes that run now."""
        return {name: process.pid for name, process in self._running.items()}

    def tell(self, name: str, state: State, detail: str = "") -> None:
        """Report what somebody else has found out of a component; of one that is not there (any more): nothing."""
        if name in self._running and name not in self._retiring:
            self._report(name, state, detail)

    @property
    def components(self) -> tuple[Component, ...]:
        """All that are kept running, or are on their way to their end."""
        return tuple(self._components)

    @property
    def retiring(self) -> frozenset[str]:
        """Names of those that were asked to end for good."""
        return frozenset(self._retiring)

    @property
    def keeps(self) -> bool:
        """Whether everything was ready once, and components may come and go."""
        return bool(self._keeping)

    def add(self, component: Component) -> None:
        """One component more, kept running from now on. While `keep_running` runs.

        Raises:
            StartupError: it cannot be started.
        """
        self._start(component)
        self._components.append(component)
        self._report(component.name, "starting")
        self._keep_from_now_on(component)

    def retire(self, name: str) -> None:
        """Ask a component to end, for good; returns at once. Asked again, or of one that is not there: nothing.

        One that takes longer than the whole cluster may is killed.
        """
        if name in self._retiring or name not in self._keeping:
            return
        self._retiring.add(name)
        self._report(name, "stopping")
        process = self._running.get(name)
        if process is None:  # it died, and waits to be started again
            self._keeping[name].cancel()
            return
        process.ask_to_end()
        asyncio.get_running_loop().call_later(self._stop_timeout_s, process.kill)

    async def first_death(self) -> StartupError:
        """Wait until any process ends; the error says which, how, and what it wrote last."""
        waits = {asyncio.create_task(self._running[component.name].wait()): component for component in self._components}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _cancel(waits)
        task = next(task for task in waits if task in done)
        component, how = waits[task], describe_exit(task.result())
        self._report(component.name, "died", how)
        tail = log_tail(component.log_path) or "(empty)"
        return StartupError(f"{component.name} {how} while starting; the end of {component.log_path}:\n{tail}")

    async def keep_running(self) -> StartupError:
        """Restart what dies, until something essential cannot be kept running; that is the error."""
        for component in self._components:
            self._keep_from_now_on(component)
        tasks = list(self._keeping.values())
        try:
            essential = [task for task, component in zip(tasks, self._components, strict=True) if component.essential]
            # Others end too when they are given up; the cluster goes on without them.
            done, _ = await asyncio.wait(
                essential or tasks,
                return_when=asyncio.FIRST_COMPLETED if essential else asyncio.ALL_COMPLETED,
            )
            error = next(iter(done)).result()
            assert error is not None, "what is essential is not retired"
            return error
        finally:
            keeping, self._keeping = list(self._keeping.values()), {}
            await _cancel(keeping)

    def kill_now(self) -> None:
        """SIGKILL to everything, at once. A stop that is under way then ends too."""
        self._killed = True
        for process in self._running.values():
            process.kill()

    def _start(self, component: Component) -> None:
        self._running[component.name] = Process.spawn(component)

    def _keep_from_now_on(self, component: Component) -> None:
        task = asyncio.create_task(self._keep(component), name=f"keep {component.name}")
        self._keeping[component.name] = task
        task.add_done_callback(lambda _: self._let_go(component))

    def _let_go(self, component: Component) -> None:
        """It was retired or given up: it is none of ours any more. What still runs at the end of all is ended there."""
        if self._keeping.pop(component.name, None) is None or component.essential:
            return
        self._retiring.discard(component.name)
        self._components.remove(component)

    async def _keep(self, component: Component) -> StartupError | None:
        """Until it is retired (None) or given up (why)."""
        restarts_s: list[float] = []
        while True:
            how = describe_exit(await self._running[component.name].wait())
            del self._running[component.name]
            if component.name in self._retiring:
                self._report(component.name, "retired")
                return None
            delay_s = self._policy.delay_s(restarts_s, self._clock())
            if delay_s is None:
                how = f"{how}, after {len(restarts_s)} restarts; its log is {component.log_path}"
                self._report(component.name, "given up", how)
                return StartupError(f"{component.name} {how}:\n{log_tail(component.log_path)}")
            self._report(component.name, "died", f"{how}; restarting in {delay_s:g} s; its log is {component.log_path}")
            await asyncio.sleep(delay_s)
            restarts_s.append(self._clock())
            try:
                self._start(component)
            except StartupError as error:
                self._report(component.name, "given up", error.message)
                return error
            self._report(component.name, "restarted", f"restart {len(restarts_s)}")

    async def _end_all(self) -> None:
        stages = itertools.groupby(sorted(self._components, key=lambda c: c.stop_stage), key=lambda c: c.stop_stage)
        try:
            if not self._killed:
                async with asyncio.timeout(self._stop_timeout_s):
                    for _, stage in stages:
                        await self._end_stage([component.name for component in stage])
        except TimeoutError:
            late = ", ".join(self._running)
            self._report(late, "stopping", f"not ended within {self._stop_timeout_s:g} s; killing")
        finally:
            await self._kill_the_rest()

    async def _end_stage(self, names: Sequence[str]) -> None:
        processes = {name: self._running[name] for name in names if name in self._running}
        for name, process in processes.items():
            self._report(name, "stopping")
            process.ask_to_end()
        for name, process in processes.items():
            await process.wait()
            del self._running[name]
            self._report(name, "stopped")

    async def _kill_the_rest(self) -> None:
        for process in self._running.values():
            process.kill()
        try:
            async with asyncio.timeout(_KILL_TIMEOUT_S):
                for name, process in list(self._running.items()):
                    await process.wait()
                    del self._running[name]
        except TimeoutError:
            for name, process in self._running.items():
                self._report(
                    name, "stopping", f"pid {process.pid} does not end even when killed; it hangs in the kernel"
                )


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
