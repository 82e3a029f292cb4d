"""A follower's part of an engine: vLLM's ranks on this node, which the scheduler on the first node drives.

vLLM starts them with the executor that a whole engine has (`vllm serve --headless` does the same); it watches them, and
has nothing else to do here.
"""

from __future__ import annotations

import threading
from pathlib import Path

from vllm.exceptions import VLLMError
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from engine import device as devices
from engine.loading import kill_children
from engine.vllm_arguments import engine_args
from kv_transfer.board import Board
from slipstream.errors import StartupError
from slipstream.settings import Settings

_ENDED_S = 5.0


class VllmRanks:
    """This node's ranks of an engine.

    Args:
        model_path: a local folder.
        board: this node's, with what the leader has given of it.
        owner_key: of the leader's service.
    """

    def __init__(
        self, settings: Settings, *, model_path: Path, served_name: str, board: Board, owner_key: bytes
    ) -> None:
        self.device = devices.choose_device(settings.device)
        self._args = engine_args(
            settings, self.device, model_path=model_path, served_name=served_name, board=board, owner_key=owner_key
        )
        self._executor: MultiprocExecutor | None = None
        self._failed = threading.Event()

    def start(self) -> None:
        """Load this node's parts of the model; blocks until the ranks of all nodes have met and have done so.

        Raises:
            StartupError: vLLM cannot, in its own words.
        """
        try:
            self._executor = MultiprocExecutor(self._args.create_engine_config(headless=True))
        except Exception as error:  # vLLM raises a plain Exception when a rank cannot start
            known = isinstance(error, (VLLMError, ValueError, RuntimeError, OSError, AssertionError))
            if not known and type(error) is not Exception:
                raise
            raise StartupError(f"vLLM cannot start its ranks with {self._args.model}: {error}") from error
        self._executor.register_failure_callback(self._failed.set)

    @property
    def alive(self) -> bool:
        return self._executor is not None and not self._failed.is_set()

    def shutdown(self) -> None:
        """End the ranks at once: a rank whose leader is gone waits for it, and has no state but memory."""
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutting_down = True  # so that its watch does not wonder why they end
            kill_children()
            for rank in executor.workers:
                rank.proc.join(_ENDED_S)
