"""The demo's answer and its account: figures that mean what they say."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from slipstream.cli.demo_account import Timing, ask_and_account, timing
from slipstream.cli.status import duration
from slipstream.errors import NoWorkerError
from slipstream.v1 import inference_pb2
from tests.unit.slipstream.scripted_inference import FINAL, Script, serve


def test_tokens_that_come_together_share_the_time_since_those_before() -> None:
    measured = timing(10.0, [(10.5, 1), (10.6, 1), (11.0, 2)])
    assert measured.ttft_s == pytest.approx(0.5)
    assert measured.itl_s == pytest.approx((0.1, 0.2, 0.2))


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 5)), min_size=1, max_size=20))
def test_there_is_one_interval_less_than_tokens_and_they_add_up(arrivals: list[tuple[float, int]]) -> None:
    arrivals = sorted(arrivals)
    measured = timing(0.0, arrivals)
    assert len(measured.itl_s) == sum(tokens for _, tokens in arrivals) - 1
    assert measured.ttft_s + sum(measured.itl_s) == pytest.approx(arrivals[-1][0], abs=1e-6)


def test_an_answer_without_tokens_has_no_timing() -> None:
    assert timing(1.0, []) == Timing(0.0, ())


async def test_the_answer_is_printed_and_every_figure_accounted_for() -> None:
    script = Script(
        responses=[
            inference_pb2.GenerateResponse(text="Par", token_ids=[7]),
            inference_pb2.GenerateResponse(text="is", token_ids=[8]),
            FINAL,
        ]
    )
    output = io.StringIO()
    with serve(script) as target:
        await ask_and_account(target, "What is [bold]?", 16, Console(file=output, width=200))
    text = output.getvalue()
    assert "> What is [bold]?\nParis.\n" in text
    rows = dict(line.split(maxsplit=1) for line in text.split("What happened")[1].strip().splitlines())
    assert rows["prompt"].strip() == "5 tokens"
    assert rows["prefill"].strip() == "3 computed, 2 cached on prefill-0 in 10.0 ms"
    assert rows["KV"].split(maxsplit=1)[1].strip() == "1 blocks, 4,096 bytes"
    assert rows["transfer"].strip() == "2.00 ms of work, 0.00 ms after prefill, shm/direct"
    assert rows["decode"].strip() == "prompt tokens 1 computed, 0 cached on decode-0"
    assert rows["fallback"].strip() == "none"
    assert rows["answer"].strip() == "3 tokens, ended by stop"
    assert {"TTFT", "ITL", "speed"} <= set(rows)
    assert script.requests[0].sampling.max_tokens == 16


async def test_a_failed_question_is_an_error() -> None:
    import grpc

    script = Script(error=grpc.StatusCode.UNAVAILABLE, error_metadata=(("slipstream-code", "no_worker"),))
    with serve(script) as target, pytest.raises(NoWorkerError):
        await ask_and_account(target, "Hello?", 16, Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0s"), (59.9, "59s"), (192, "3m 12s"), (18180, "5h 3m"), (1051200, "12d 4h"), (-3, "0s")]
)
def test_durations_are_short(seconds: float, words: str) -> None:
    assert duration(seconds) == words
