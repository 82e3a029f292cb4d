"""What a worker does about an engine that stands still: its requests go elsewhere, and at last the worker ends."""

from __future__ import annotations

from collections.abc import Callable

from engine.admission import Admission
from engine.step_watch import TOKEN_S, Stall, StepWatch
from kv_transfer.board import Board, Counter
from slipstream import telemetry
from slipstream.errors import EngineDeadError
from slipstream.v1.registry_pb2 import Health, HealthReason, HealthState
from slipstream.worker_settings import WorkerSettings

log = telemetry.get_logger(__name__)


class Standstill:
    """Watches one engine by the steps it counts on its board.

    Args:
        device: of the engine.
        on_change: called when it began, or ceased, to stand still.

    Attributes:
        now: whether it stands still.
    """

    def __init__(
        self,
        worker: WorkerSettings,
        device: str,
        board: Board,
        admission: Admission,
        *,
        clock: Callable[[], float],
        on_change: Callable[[], None],
    ) -> None:
        self.now = False
        self._board = board
        self._admission = admission
        self._clock = clock
        self._on_change = on_change
        # A simulated engine lives in this process, and counts no steps.
        token_s = TOKEN_S.get(device, min(TOKEN_S.values())) if worker.engine == "vllm" else None
        self._watch = StepWatch(worker.engine_silence_s, worker.engine_hang_s, token_s) if token_s else None

    def look(self) -> None:
        """Call it often.

        Raises:
            EngineDeadError: it has stood still for so long that it will not go on.
        """
        if self._watch is None:
            return
        board, busy = self._board, self._admission.work.busy
        stall = self._watch.look(
            board.counter(Counter.STEPS), board.counter(Counter.STEP_TOKENS), busy=busy > 0, now_s=self._clock()
        )
        silent_s = self._watch.silent_s
        if stall is Stall.HUNG:
            log.error("engine_hangs", silent_s=round(silent_s, 1))
            raise EngineDeadError(f"the engine has taken no step for {silent_s:.0f} s (worker.engine_hang_s)")
        if (stall is Stall.SILENT) == self.now:
            return
        self.now = stall is Stall.SILENT
        if self.now:
            log.error("engine_silent", silent_s=round(silent_s, 1), requests=busy)
            self._admission.stand_still(f"the worker's engine has taken no step for {silent_s:.0f} s")
        else:
            log.warning("engine_goes_on")
            self._admission.go_on()
        self._on_change()

    def tell(self, health: Health) -> None:
        """Write into what the worker says of itself that it is sick, if its engine stands still."""
        if self.now:
            health.state = HealthState.SICK
            text = "its engine has requests and takes no step"
            health.reasons.insert(0, HealthReason(code="engine_silent", state=HealthState.SICK, text=text))
