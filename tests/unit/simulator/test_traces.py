"""Readers of traces: what they take, what they refuse, and what a replay keeps."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator import traces
from simulator.traces import Arrival, assigned, at_changing_speed, repeated
from slipstream.errors import ConfigError


def written(folder: Path, *lines: str) -> Path:
    file = folder / "trace"
    file.write_text("\n".join(lines) + "\n")
    return file


def mooncake(at_ms: int, tokens: int, blocks: list[int]) -> str:
    return json.dumps({"timestamp": at_ms, "input_length": tokens, "output_length": 5, "hash_ids": blocks})


def test_a_mooncake_trace_gives_keys_for_whole_blocks_only(tmp_path: Path) -> None:
    file = written(tmp_path, mooncake(3000, 1100, [0, 1, 2]), mooncake(3500, 1024, [0, 1]), mooncake(4000, 600, [0, 9]))
    first, second, third = traces.read_mooncake(file)
    assert [one.at_s for one in (first, second, third)] == [0.0, 0.5, 1.0]
    assert len(first.keys) == 2, "the third block is not full"
    assert first.keys == second.keys
    assert third.keys == first.keys[:1]


def test_an_azure_trace_has_lengths_and_times(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:15:46.6805900,374,44",
        "2023-11-16 18:15:50.9951690,396,109",
    )
    first, second = traces.read_azure(file)
    assert (first.input_tokens, first.output_tokens) == (374, 44)
    assert second.at_s == pytest.approx(4.314579)


def test_our_own_access_log_is_a_trace(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 20.0, "input_length": 5, "output_length": 2, "tenant": "b", "status": 200},
        {"timestamp": 12.5, "input_length": 7, "output_length": 3, "block_keys": [1, 2], "session": "s"},
        {"timestamp": 13.0, "input_length": 0, "output_length": 0, "status": 400},
    ]
    file = written(tmp_path, *map(json.dumps, lines))
    first, second = traces.read_access_log(file)
    assert (first.at_s, first.keys, first.session) == (0.0, (1, 2), "s")
    assert (second.at_s, second.tenant) == (7.5, "b")


@pytest.mark.parametrize(
    ("read", "lines"),
    [
        (traces.read_mooncake, ['{"timestamp": 0}']),
        (traces.read_mooncake, ["nonsense"]),
        (traces.read_mooncake, [mooncake(5, 600, [1]), mooncake(4, 600, [1])]),
        (traces.read_mooncake, [""]),
        (traces.read_azure, ["TIMESTAMP,ContextTokens,GeneratedTokens", "today,1,2"]),
        (traces.read_azure, ["TIMESTAMP", "2023-11-16 18:15:46"]),
        (traces.read_access_log, ['{"timestamp": "now", "input_length": 1, "output_length": 1}']),
    ],
)
def test_what_is_not_such_a_trace_is_refused_with_its_file(tmp_path: Path, read, lines: list[str]) -> None:  # type: ignore[no-untyped-def]
    file = written(tmp_path, *lines)
    with pytest.raises(ConfigError, match=str(file)):
        read(file)


@given(st.lists(st.floats(0, 1e4), min_size=2, max_size=20), st.floats(0.1, 10))
def test_a_faster_replay_keeps_order_and_requests(times: list[float], factor: float) -> None:
    arrivals = [Arrival(at_s, str(index), 1, 1) for index, at_s in enumerate(sorted(times))]
    faster = list(traces.at_speed(arrivals, factor))
    assert [one.request_id for one in faster] == [one.request_id for one in arrivals]
    assert all(one.at_s * factor == pytest.approx(before.at_s) for one, before in zip(faster, arrivals, strict=True))


def test_a_compressed_trace_is_read_as_it_is(tmp_path: Path) -> None:
    plain = written(tmp_path, mooncake(0, 600, [1]), mooncake(10, 1200, [1, 2]))
    packed = tmp_path / "trace.xz"
    packed.write_bytes(lzma.compress(plain.read_bytes()))
    assert traces.read_mooncake(packed) == traces.read_mooncake(plain)


def test_a_trace_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        traces.read_azure(tmp_path / "nowhere.csv")


def test_a_trace_at_a_speed_that_rises_comes_closer_and_closer_together() -> None:
    even = [Arrival(float(at_s), str(at_s), 10, 1) for at_s in range(101)]
    faster = list(at_changing_speed(even, lambda now_s: 1.0 if now_s < 50 else 2.0))
    assert [one.request_id for one in faster] == [one.request_id for one in even]
    assert faster[50].at_s == pytest.approx(50.0)
    assert faster[100].at_s == pytest.approx(75.0)


def test_a_repeated_trace_goes_on_where_it_ended_under_new_ids() -> None:
    trace = [Arrival(0.0, "a", 10, 1, (1, 2)), Arrival(4.0, "b", 20, 2)]
    twice = list(repeated(trace, 2, pause_s=1.0))
    assert [(one.at_s, one.request_id) for one in twice] == [(0.0, "a.0"), (4.0, "b.0"), (5.0, "a.1"), (9.0, "b.1")]
    assert twice[2].keys == (1, 2)


def test_requests_are_assigned_to_a_model_and_a_class() -> None:
    (one,) = assigned([Arrival(0.0, "a", 10, 1, tenant="t")], model="m", service_class="batch")
    assert (one.model, one.service_class, one.tenant) == ("m", "batch", "t")


@pytest.mark.parametrize("content", [b"", b"\xfd7zXZ\x00\x00\x04\xe6\xd6\xb4F", b"no such archive"])
def test_an_archive_that_is_cut_off_or_is_none_is_refused_with_its_file(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "t.xz"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"t\.xz"):
        traces.read_mooncake(file)


def test_a_trace_that_is_no_text_is_refused_with_its_file(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_bytes(b"\xff\xfe{}")
    for read in (traces.read_mooncake, traces.read_access_log, traces.read_azure):
        with pytest.raises(ConfigError, match=r"t\.jsonl"):
            read(file)
