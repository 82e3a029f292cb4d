"""Sampling parameters on their way into vLLM, and log probabilities on their way out."""

from types import SimpleNamespace
from typing import Any

import pytest

from engine.vllm_sampling import prefill_sampling, to_vllm, to_wire
from slipstream.errors import InvalidRequestError
from slipstream.v1.sampling_pb2 import SamplingParams

EVERYTHING: dict[str, Any] = {
    "max_tokens": 7,
    "min_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.1,
    "seed": 11,
    "presence_penalty": 0.25,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.25,
    "logprobs": 3,
}


def test_every_field_reaches_the_engine() -> None:
    wire = SamplingParams(**EVERYTHING, ignore_eos=True, logit_bias={5: -100.0}, stop_token_ids=[9])
    params = to_vllm(wire, transfer={"key": b"value"})
    assert {name: getattr(params, name) for name in EVERYTHING} == EVERYTHING
    assert params.ignore_eos
    assert params.logit_bias == {5: -100.0}
    assert params.stop_token_ids == [9]
    assert params.extra_args == {"kv_transfer_params": {"key": b"value"}}
    assert not params.detokenize


def test_what_is_absent_takes_the_engines_neutral_value() -> None:
    params = to_vllm(SamplingParams(), transfer={})
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert (params.seed, params.logprobs, params.extra_args) == (None, None, None)
    assert params.max_tokens is None  # up to the context length


def test_a_temperature_of_zero_is_greedy_and_not_absent() -> None:
    assert to_vllm(SamplingParams(temperature=0.0), transfer={}).temperature == 0.0
    assert to_vllm(SamplingParams(seed=0), transfer={}).seed == 0


@pytest.mark.parametrize(
    "bad", [{"top_p": 0.0}, {"temperature": -1.0}, {"top_k": -5}, {"presence_penalty": 3.0}, {"max_tokens": 0}]
)
def test_values_out_of_range_are_the_callers_mistake(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        to_vllm(SamplingParams(**bad), transfer={})
    assert next(iter(bad)) in caught.value.message


def test_stop_strings_are_not_for_workers() -> None:
    with pytest.raises(InvalidRequestError, match="frontend"):
        to_vllm(SamplingParams(stop=["\n"]), transfer={})


def test_a_prompt_is_computed_with_one_throwaway_token() -> None:
    params = prefill_sampling({"lease": [1, 8]})
    assert (params.max_tokens, params.temperature) == (1, 0.0)


def test_log_probabilities_are_ordered_and_cut_to_what_was_asked() -> None:
    row = {
        4: SimpleNamespace(logprob=-3.0, rank=7),
        1: SimpleNamespace(logprob=-0.5, rank=1),
        2: SimpleNamespace(logprob=-1.0, rank=2),
    }
    (wire,) = to_wire([4], [row], 2)
    assert (wire.chosen.token_id, wire.chosen.logprob) == (4, -3.0)
    assert [(one.token_id, one.logprob) for one in wire.top] == [(1, -0.5), (2, -1.0)]
    (only_chosen,) = to_wire([4], [row], 0)
    assert not only_chosen.top
    assert to_wire([4], None, 0) == ()
