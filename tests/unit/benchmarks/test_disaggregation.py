"""The benchmark of when prefill workers are worth it: its loads, and the figure it compares."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from benchmarks.disaggregation import Report, Setting, answer, print_tables, rate_of
from benchmarks.report import machine

SETTING = Setting("qwen3-32b-h200-tp1", ttft_s=2.0, percentile=99.0, busy_gpus=1.0, hit_rate=0.0, requests=60)


def test_the_rate_keeps_so_many_gpus_busy_whatever_the_lengths() -> None:
    twice = Setting("qwen3-32b-h200-tp1", 2.0, 99.0, busy_gpus=2.0, hit_rate=0.0, requests=60)
    assert rate_of(twice, 2000, 400) == pytest.approx(2 * rate_of(SETTING, 2000, 400))
    assert rate_of(SETTING, 500, 100) > rate_of(SETTING, 2000, 100) > rate_of(SETTING, 2000, 400)


def test_a_cell_compares_what_a_gpu_bears_in_both_ways() -> None:
    cell = answer(SETTING, 0.05, 500, 20)
    apart, together = cell.answer.disaggregated, cell.answer.aggregated
    assert apart is not None
    assert together is not None
    assert cell.gain == pytest.approx(apart.margin * together.gpus / (together.margin * apart.gpus))
    written = io.StringIO()
    print_tables(Console(file=written, width=200), Report(SETTING, machine(), [cell], []))
    assert f"{cell.gain:.2f}" in written.getvalue()
    assert f"{apart.gpus} GPUs: {apart.counts} of TP1" in written.getvalue()
