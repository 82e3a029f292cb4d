"""Loads to replay: published traces and our own access log, as arrivals in order of time.

A trace says how long a prompt is and which of its blocks it shares with others, never its text. Blocks have 64-bit
keys, as `slipstream.block_keys` makes them for a running cluster.
"""

from __future__ import annotations

import csv
import lzma
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import TextIO, TypeVar

import msgspec
from xxhash import xxh3_64_intdigest

from slipstream.errors import ConfigError

T = TypeVar("T")

MOONCAKE_BLOCK_TOKENS = 512
"""Tokens that one of the trace's `hash_ids` stands for."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a load.

    Attributes:
        at_s: from the beginning of the trace.
        keys: of the prompt's whole blocks.
        model: empty: the only one that is served, or the first.
    """

    at_s: float
    request_id: str
    input_tokens: int
    output_tokens: int
    keys: tuple[int, ...] = ()
    tenant: str = ""
    service_class: str = "realtime"
    session: str = ""
    model: str = ""


class _MooncakeLine(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int] = []


class _AccessLine(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    block_keys: list[int] = []
    tenant: str = ""
    service_class: str = "realtime"
    session: str = ""


def read_mooncake(file: Path, *, salt: str = "mooncake") -> list[Arrival]:
    """The format of Mooncake's traces (FAST'25): JSON lines with timestamp in ms, lengths and block hashes.

    Raises:
        ConfigError: a line is not of that format; the message names it.
    """
    arrivals = []
    for number, line in _lines(file):
        one = _decoded(file, number, line, _MooncakeLine)
        whole = one.input_length // MOONCAKE_BLOCK_TOKENS
        keys = tuple(_key(f"{salt}/{block}") for block in one.hash_ids[:whole])
        arrivals.append(
            Arrival(one.timestamp / 1e3, f"m{number}", max(1, one.input_length), max(1, one.output_length), keys)
        )
    return _checked(file, arrivals)


def read_access_log(file: Path) -> list[Arrival]:
    """Slipstream's own access log (`log.access_log`); `timestamp` is in seconds.

    Raises:
        ConfigError: a line is not of that format; the message names it.
    """
    arrivals = []
    for number, line in _lines(file):
        one = _decoded(file, number, line, _AccessLine)
        if one.input_length < 1 or one.output_length < 1:
            continue  # refused before it was tokenized, or ended without an answer
        arrivals.append(
            Arrival(
                one.timestamp,
                f"a{number}",
                one.input_length,
                one.output_length,
                tuple(one.block_keys),
                one.tenant,
                one.service_class,
                one.session,
            )
        )
    return _checked(file, sorted(arrivals, key=lambda arrival: arrival.at_s))


def read_azure(file: Path) -> list[Arrival]:
    """The format of Azure's LLM inference traces (2023): CSV with TIMESTAMP, ContextTokens, GeneratedTokens.

    Raises:
        ConfigError: a row is not of that format; the message names it.
    """
    arrivals = []
    with _opened(file) as rows:
        for number, row in enumerate(_readable(file, csv.DictReader(rows)), start=2):
            try:
                at_s = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
                lengths = max(1, int(row["ContextTokens"])), max(1, int(row["GeneratedTokens"]))
            except (KeyError, TypeError, ValueError, OverflowError, OSError) as error:
                raise ConfigError(f"{file}:{number}: not a row of an Azure trace ({error})", param="trace") from None
            arrivals.append(Arrival(at_s, f"z{number}", *lengths))
    return _checked(file, arrivals)


def at_speed(arrivals: Iterable[Arrival], factor: float) -> Iterator[Arrival]:
    """The same requests, `factor` times as close together."""
    for arrival in arrivals:
        yield _at(arrival, arrival.at_s / factor, arrival.request_id)


def at_changing_speed(arrivals: Iterable[Arrival], speed: Callable[[float], float]) -> Iterator[Arrival]:
    """The same requests in the same order, `speed` times as close together, by the time that has passed so far.

    `at_changing_speed(azure, lambda s: 1 + s / 600)` is the trace at rates that rise by its own each ten minutes.
    """
    before_s = now_s = 0.0
    for arrival in arrivals:
        now_s += (arrival.at_s - before_s) / speed(now_s)
        before_s = arrival.at_s
        yield _at(arrival, now_s, arrival.request_id)


def repeated(arrivals: Sequence[Arrival], times: int, pause_s: float = 0.0) -> Iterator[Arrival]:
    """A trace over and over, each time with ids of its own; prompts are the same, so that they may be cached."""
    length_s = arrivals[-1].at_s + pause_s if arrivals else 0.0
    for turn in range(times):
        for arrival in arrivals:
            yield _at(arrival, arrival.at_s + turn * length_s, f"{arrival.request_id}.{turn}")


def assigned(arrivals: Iterable[Arrival], *, model: str = "", service_class: str = "") -> Iterator[Arrival]:
    """The same requests for a model, or in a class, where one is given."""
    for arrival in arrivals:
        yield replace(arrival, model=model or arrival.model, service_class=service_class or arrival.service_class)


def _at(arrival: Arrival, at_s: float, request_id: str) -> Arrival:
    """The same request at another time; by hand, which is several times as fast as `replace`."""
    return Arrival(
        at_s,
        request_id,
        arrival.input_tokens,
        arrival.output_tokens,
        arrival.keys,
        arrival.tenant,
        arrival.service_class,
        arrival.session,
        arrival.model,
    )


def _key(name: str) -> int:
    return xxh3_64_intdigest(name.encode())


def _opened(file: Path) -> TextIO:
    """For reading; compressed files (.xz) are read as what is in them.

    Raises:
        ConfigError: it cannot be.
    """
    try:
        return lzma.open(file, "rt", newline="") if file.suffix == ".xz" else file.open(newline="")
    except OSError as error:
        raise ConfigError(f"trace {file}: cannot be read ({error.strerror})", param="trace") from None


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    with _opened(file) as lines:
        for number, line in enumerate(_readable(file, lines), start=1):
            if line.strip():
                yield number, line


def _readable(file: Path, lines: Iterable[T]) -> Iterator[T]:
    """The same, with an error in words where the file is cut off, or is no text.

    Raises:
        ConfigError
    """
    try:
        yield from lines
    except (EOFError, OSError, lzma.LZMAError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"trace {file}: cannot be read ({error})", param="trace") from None


def _decoded(file: Path, number: int, line: str, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(line, type=kind)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise ConfigError(f"{file}:{number}: not a line of this trace format ({error})", param="trace") from None


def _checked(file: Path, arrivals: list[Arrival]) -> list[Arrival]:
    """In order, and beginning at 0."""
    if not arrivals:
        raise ConfigError(f"{file}: the trace holds no requests", param="trace")
    if any(later.at_s < earlier.at_s for earlier, later in pairwise(arrivals)):
        raise ConfigError(f"{file}: the trace's times go backwards", param="trace")
    start_s = arrivals[0].at_s
    return [replace(arrival, at_s=arrival.at_s - start_s) for arrival in arrivals]
