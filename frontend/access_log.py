"""One line for each answered request: in the log for people, and in a file of JSON lines for programs.

The file can be replayed (`simulator.traces.read_access_log`): `timestamp`, `input_length`, `output_length` and
`block_keys` say what was asked and when, as the traces of Mooncake (FAST '25) do; the rest says what became of it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from frontend.request_record import RequestRecord
from slipstream import block_keys, telemetry
from slipstream.errors import StartupError
from slipstream.settings import LogSettings

log = telemetry.get_logger(__name__)

_AGAIN_S = 10.0
"""After a line that could not be written, until the next one is tried."""

BLOCK_TOKENS = 16
"""Tokens a block of `block_keys`; fixed, so that logs of different clusters can be compared."""


class AccessLine(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """A line of the access log. What is absent is empty, 0 or unknown.

    Attributes:
        timestamp: Unix time of the request's arrival, in seconds.
        input_length, output_length: tokens.
        block_keys: the prompt's whole blocks of `block_tokens` tokens (`slipstream.block_keys`): equal keys are equal
            beginnings.
        key: id of the API key; the key itself is nowhere.
        cached_length: prompt tokens that no worker had to compute.
    """

    timestamp: float
    input_length: int
    output_length: int
    request_id: str
    method: str
    path: str
    status: str
    total_s: float
    model: str = ""
    tenant: str = ""
    key: str = ""
    service_class: str = ""
    session: str = ""
    error: str = ""
    ttft_s: float | None = None
    itl_s: float | None = None
    cached_length: int = 0
    prefill_workers: tuple[str, ...] = ()
    decode_workers: tuple[str, ...] = ()
    route: str = ""
    fallback: str = ""
    attempts: int = 0
    trace_id: str = ""
    block_tokens: int = 0
    block_keys: tuple[int, ...] = ()


class AccessLog:
    """Where the lines go. Lines are added whole, so that several processes may share a file."""

    def __init__(self, settings: LogSettings, file: int | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = file
        self._clock = clock
        self._torn = False  # the file ends in the middle of a line
        self._lost = 0  # lines, since the disk was full
        self._again_s = 0.0
        self.to_log = settings.requests
        self.blocks = settings.access_log_blocks and file is not None

    def write(self, record: RequestRecord, total_s: float) -> None:
        line = line_of(record, total_s, blocks=self.blocks)
        if self.to_log:
            fields = msgspec.structs.asdict(line)
            shown = {name: value for name, value in fields.items() if value and name not in _ONLY_IN_FILE}
            telemetry.tell(__name__, "request", shown)
        if self._file is not None:
            self._add(msgspec.json.encode(line) + b"\n")

    def _add(self, content: bytes) -> None:
        """A full disk must not stop the serving: lines are lost while it is, which is said once, and written again
        when there is room."""
        assert self._file is not None
        if self._lost and self._clock() < self._again_s:
            self._lost += 1
            return
        if self._torn:
            content = b"\n" + content
        try:
            written = os.write(self._file, content)
        except OSError as error:
            self._lose(error.strerror)
            return
        self._torn = written < len(content)
        if self._torn:
            self._lose("no space for a whole line")
        elif self._lost:
            log.warning("access_log_regained", lines_lost=self._lost)
            self._lost = 0

    def _lose(self, reason: str | None) -> None:
        if not self._lost:
            log.error("access_log_failed", reason=reason)
        self._lost += 1
        self._again_s = self._clock() + _AGAIN_S


_ONLY_IN_FILE = {"timestamp", "request_id", "trace_id", "block_tokens", "block_keys"}
_current = AccessLog(LogSettings(requests=False), None)


def write(record: RequestRecord, total_s: float) -> None:
    """Add the line of a request that has ended."""
    _current.write(record, total_s)


def wants_prompts() -> bool:
    """Whether records must keep their prompts."""
    return _current.blocks


@contextmanager
def writing(settings: LogSettings) -> Iterator[None]:
    """Write lines as these settings say while the block runs.

    Raises:
        StartupError: the file cannot be written.
    """
    global _current
    before, file = _current, None
    if settings.access_log is not None:
        file = _open(settings.access_log)
    _current = AccessLog(settings, file)
    try:
        yield
    finally:
        _current = before
        if file is not None:
            os.close(file)


def line_of(record: RequestRecord, total_s: float, *, blocks: bool) -> AccessLine:
    """What is told of a request."""
    return AccessLine(
        timestamp=record.started_ns // 1_000_000 / 1e3,
        input_length=record.prompt_tokens,
        output_length=record.completion_tokens,
        request_id=record.request_id,
        method=record.method,
        path=record.path,
        status=record.status,
        total_s=round(total_s, 6),
        model=record.model,
        tenant=record.tenant,
        key=record.key,
        service_class=record.service_class,
        session=record.session,
        error=record.error,
        ttft_s=_rounded(record.ttft_s),
        itl_s=_rounded(record.itl_s),
        cached_length=record.cached_tokens,
        prefill_workers=tuple(record.prefill_workers),
        decode_workers=tuple(record.decode_workers),
        route=record.route,
        fallback=record.fallback,
        attempts=record.attempts,
        trace_id=record.span.trace_id,
        block_tokens=BLOCK_TOKENS if blocks else 0,
        block_keys=_keys(record.model, record.cache_salt, record.prompts) if blocks else (),
    )


def _keys(model: str, salt: str, prompts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    root = block_keys.root_key(model, BLOCK_TOKENS, salt)
    return tuple(key for prompt in prompts for key in block_keys.extend(root, prompt, BLOCK_TOKENS))


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise StartupError(f"log.access_log: {path} cannot be written ({error.strerror})") from None
