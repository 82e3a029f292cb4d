"""A load that was asked for in a few words is the load that was meant."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import msgspec
import pytest

from frontend.access_log import BLOCK_TOKENS
from simulator.chosen_load import LoadSummary, default_requests, load_of, summary_of
from simulator.load_choice import LoadChoice
from slipstream.errors import ConfigError

MOONCAKE = [
    {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [1, 2, 3]},
    {"timestamp": 2000, "input_length": 1100, "output_length": 7, "hash_ids": [1, 2, 9]},
]
ACCESS = [{"timestamp": 5.0 + at, "input_length": 40, "output_length": 3, "block_keys": [7, at]} for at in (0, 1, 2)]
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.0,374,44\n2023-11-16 18:15:48.0,396,109\n"


def summary(**choice: object) -> LoadSummary:
    load = load_of(LoadChoice(**choice))  # type: ignore[arg-type]
    return summary_of(load.begin(), load.block_tokens)


@pytest.mark.parametrize("hit_rate", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("variation", [0.0, 1.0])
def test_a_synthetic_load_has_the_rate_lengths_and_prefixes_asked_for(hit_rate: float, variation: float) -> None:
    told = summary(
        rate_per_s=5.0, input_tokens=2000.0, output_tokens=300.0, input_variation=variation, hit_rate=hit_rate
    )
    assert told.requests == default_requests(5.0) == 2000
    assert told.rate_per_s == pytest.approx(5.0, rel=0.05)
    assert told.input_tokens == pytest.approx(2000, rel=0.05)
    assert told.output_tokens == pytest.approx(300, rel=0.05)
    assert told.input_variation == pytest.approx(variation, abs=0.15)
    assert told.hit_rate == pytest.approx(hit_rate, abs=0.03)


def test_a_daily_load_has_the_mean_rate_asked_for() -> None:
    told = summary(rate_per_s=2.0, shape="daily", period_s=600.0, duration_s=1200.0)
    assert told.rate_per_s == pytest.approx(2.0, rel=0.06)


def test_it_can_be_run_again_and_faster_and_is_the_same_for_a_seed() -> None:
    load = load_of(LoadChoice(requests=50, shape="bursts", seed=3))
    first, again = list(load.begin()), list(load.begin())
    assert first == again
    assert [one.at_s for one in load.faster(2.0).begin()] == [one.at_s / 2 for one in first]
    assert first != list(load_of(LoadChoice(requests=50, shape="bursts", seed=4)).begin())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "text", "block_tokens", "requests"),
    [
        ("a.jsonl", "\n".join(map(json.dumps, MOONCAKE)), 512, 2),
        ("b.jsonl", "\n".join(map(json.dumps, ACCESS)), BLOCK_TOKENS, 3),
        ("c.csv", AZURE, 0, 2),
    ],
)
def test_a_trace_s_format_is_seen(
    name: str, text: str, block_tokens: int, requests: int, packed: bool, tmp_path: Path
) -> None:
    file = tmp_path / (name + (".xz" if packed else ""))
    file.write_bytes(lzma.compress(text.encode()) if packed else text.encode())
    load = load_of(LoadChoice(trace=str(file), speed=2.0))
    told = summary_of(load.begin(), load.block_tokens)
    assert (told.requests, load.block_tokens) == (requests, block_tokens)
    assert told.duration_s == 1.0
    assert file.name in load.about
    assert told.hit_rate == pytest.approx({"a": 1024 / 2200, "b": 32 / 120, "c": 0.0}[name[0]])


def test_a_part_of_a_trace_is_replayed(tmp_path: Path) -> None:
    file = tmp_path / "b.jsonl"
    file.write_text("\n".join(map(json.dumps, ACCESS)))
    assert summary(trace=str(file), requests=2).requests == 2
    assert summary(trace=str(file), duration_s=1.5).requests == 2


def test_a_trace_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.jsonl: cannot be read \(No such file"):
        load_of(LoadChoice(trace=str(tmp_path / "none.jsonl")))
    (tmp_path / "broken.jsonl.xz").write_bytes(b"no")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_of(LoadChoice(trace=str(tmp_path / "broken.jsonl.xz")))


@pytest.mark.parametrize("wrong", [{"rate_per_s": 0}, {"hit_rate": 1}, {"shape": "odd"}, {"tokens": 5}])
def test_what_is_beyond_its_limits_is_no_choice(wrong: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(wrong, LoadChoice)
