"""Which measured rows are compared, and which rule leaves the others out."""

from __future__ import annotations

import pytest

from benchmarks.silicon import Compared, errors
from benchmarks.silicon_rows import Row, row_of

AGG = {
    "id": "one",
    "silicon_data_source": "source_file=x.csv; model=Llama-3.1-70B; silicon_concurrency=16; wip=False",
    "backend": "vllm",
    "model_path": "meta-llama/Llama-3.1-70B",
    "system": "h200_sxm",
    "precision": "fp8",
    "mode": "agg",
    "isl": "1024",
    "osl": "1024",
    "batch_size": "16",
    "tp_size": "4",
    "prefill_num_workers": "",
    "prefill_tp_size": "",
    "decode_num_workers": "",
    "decode_tp_size": "",
    "decode_batch_size": "",
    "silicon_ttft_ms": "126.2",
    "silicon_tpot_ms": "10.94",
}
DISAGG = AGG | {
    "mode": "disagg",
    "silicon_data_source": "a.csv; gtl_job_id=1",
    "model_path": "Qwen/Qwen3-32B",
    "system": "h100_sxm",
    "prefill_num_workers": "8",
    "prefill_tp_size": "1",
    "decode_num_workers": "2",
    "decode_tp_size": "4",
    "decode_batch_size": "16",
}


def test_an_aggregated_row_has_its_profile_and_its_published_client() -> None:
    row = row_of(AGG)
    assert isinstance(row, Row)
    assert (row.decode.name, row.clients, row.least_share) == ("llama-3.1-70b-h200-tp4", 16, 0.8)
    assert row.fits
    assert row.possible


def test_a_disaggregated_row_has_the_clients_of_all_its_decode_workers() -> None:
    row = row_of(DISAGG)
    assert isinstance(row, Row)
    assert (row.workers, row.clients, row.least_share) == ((8, 2), 32, 1.0)
    assert (row.prefill.name, row.decode.name) == ("qwen3-32b-h100-tp1", "qwen3-32b-h100-tp4")


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"system": "b200_sxm"}, "not on H100"),
        ({"model_path": "openai/gpt-oss-120b"}, "without a profile"),
        ({"backend": "trtllm"}, "another engine"),
        ({"tp_size": "16"}, "division over GPUs"),
    ],
)
def test_other_rows_are_left_out_by_a_rule_that_says_why(change: dict[str, str], rule: str) -> None:
    found = row_of(AGG | change)
    assert isinstance(found, str)
    assert rule in found


def test_a_row_that_is_faster_than_its_memory_is_impossible() -> None:
    row = row_of(AGG | {"silicon_tpot_ms": "2.0"})
    assert isinstance(row, Row)
    assert not row.possible


def test_a_row_whose_sequences_do_not_fit_says_so() -> None:
    row = row_of(AGG | {"tp_size": "1", "batch_size": "512"})
    assert isinstance(row, Row)
    assert not row.fits


def test_errors_are_medians_of_what_was_off() -> None:
    rows = [Compared(str(n), "g", "agg", 1, 1.0, 1.0, 1.0 + n / 10, 1.0 - n / 10, 0) for n in (1, 2, 3)]
    found = errors("three", rows)
    assert found.ttft == pytest.approx(0.2)
    assert found.tpot_bias == pytest.approx(-0.2)
    assert errors("none", []).tpot is None
