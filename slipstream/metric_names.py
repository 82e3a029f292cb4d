"""Our metrics under the names that users know from vLLM and Dynamo, where they mean the same.

A page of /metrics is written from our own metrics alone; when it is asked for, each family that has another name
elsewhere is written a second time under that one. So dashboards and autoscalers made for those work here, and
counting costs nothing more. `FRONTEND` and `WORKER` are all of it; docs/observability.md shows them as a table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample


@dataclass(frozen=True, slots=True)
class Alias:
    """A family of ours and its name elsewhere, without a counter's `_total`.

    Attributes:
        only: labels that a sample must have to be meant; they are left out.
        added: labels that it gets.
    """

    ours: str
    theirs: str
    only: Mapping[str, str] = field(default_factory=dict)
    added: Mapping[str, str] = field(default_factory=dict)


FRONTEND = (
    Alias("slipstream_frontend_time_to_first_token_seconds", "vllm:time_to_first_token_seconds"),
    Alias("slipstream_frontend_time_to_first_token_seconds", "dynamo_frontend_time_to_first_token_seconds"),
    Alias("slipstream_frontend_inter_token_latency_seconds", "vllm:inter_token_latency_seconds"),
    Alias("slipstream_frontend_inter_token_latency_seconds", "dynamo_frontend_inter_token_latency_seconds"),
    Alias("slipstream_frontend_request_duration_seconds", "vllm:e2e_request_latency_seconds"),
    Alias("slipstream_frontend_request_duration_seconds", "dynamo_frontend_request_duration_seconds"),
    Alias("slipstream_frontend_input_sequence_tokens", "vllm:request_prompt_tokens"),
    Alias("slipstream_frontend_input_sequence_tokens", "dynamo_frontend_input_sequence_tokens"),
    Alias("slipstream_frontend_output_sequence_tokens", "vllm:request_generation_tokens"),
    Alias("slipstream_frontend_output_sequence_tokens", "dynamo_frontend_output_sequence_tokens"),
    Alias("slipstream_frontend_requests", "dynamo_frontend_requests"),
    Alias("slipstream_frontend_requests_in_flight", "dynamo_frontend_inflight_requests"),
    Alias("slipstream_frontend_requests_awaiting_first_token", "dynamo_frontend_queued_requests"),
    Alias("slipstream_frontend_completion_tokens", "dynamo_frontend_output_tokens"),
)

WORKER = (
    Alias("slipstream_worker_requests_running", "vllm:num_requests_running"),
    Alias("slipstream_worker_requests_waiting", "vllm:num_requests_waiting"),
    Alias("slipstream_worker_kv_usage_ratio", "vllm:kv_cache_usage_perc"),
    Alias("slipstream_worker_preemptions", "vllm:num_preemptions"),
    Alias("slipstream_worker_prompt_tokens", "vllm:prompt_tokens"),
    Alias("slipstream_worker_prompt_tokens", "vllm:prefix_cache_queries"),
    Alias("slipstream_worker_prompt_tokens_cached", "vllm:prefix_cache_hits"),
    Alias(
        "slipstream_worker_prompt_tokens_computed",
        "vllm:prompt_tokens_by_source",
        added={"source": "local_compute"},
    ),
    Alias(
        "slipstream_worker_prompt_tokens_cached",
        "vllm:prompt_tokens_by_source",
        added={"source": "local_cache_hit"},
    ),
    Alias(
        "slipstream_worker_prompt_tokens_received",
        "vllm:prompt_tokens_by_source",
        added={"source": "external_kv_transfer"},
    ),
    Alias("slipstream_worker_tokens", "vllm:generation_tokens", only={"role": "decode"}),
    Alias("slipstream_worker_stage_seconds", "vllm:request_queue_time_seconds", only={"stage": "queue"}),
    Alias("slipstream_worker_stage_seconds", "vllm:request_prefill_time_seconds", only={"stage": "prefill"}),
    Alias("slipstream_worker_stage_seconds", "vllm:request_decode_time_seconds", only={"stage": "decode"}),
)


class KnownNames(Collector):
    """A registry's families, and those of them that have other names under these too.

    Args:
        model: the one served, for families that have no label `model`. Samples about no model are left out.
    """

    def __init__(self, families: Collector, aliases: Iterable[Alias], *, model: str) -> None:
        self._families = families
        self._aliases: dict[str, list[Alias]] = {}
        for alias in aliases:
            self._aliases.setdefault(alias.ours, []).append(alias)
        self._model = model

    def collect(self) -> Iterator[Metric]:
        """All families: ours first."""
        others: dict[str, Metric] = {}
        for family in self._families.collect():
            yield family
            for alias in self._aliases.get(family.name, ()):
                other = others.get(alias.theirs)
                if other is None:
                    text = f"The same as {family.name}: {family.documentation}"
                    other = others[alias.theirs] = Metric(alias.theirs, text, family.type)
                other.samples += self._renamed(family, alias)
        yield from others.values()

    def _renamed(self, family: Metric, alias: Alias) -> Iterator[Sample]:
        vllm = alias.theirs.startswith("vllm:")
        for sample in family.samples:
            model = sample.labels.get("model", self._model)
            if not model or any(sample.labels.get(name) != value for name, value in alias.only.items()):
                continue
            labels = {name: value for name, value in sample.labels.items() if name not in (*alias.only, "model")}
            labels |= alias.added
            # vLLM numbers the engines of a process; here it is always the one.
            labels |= {"model_name": model, "engine": "0"} if vllm else {"model": model}
            suffix = sample.name[len(family.name) :]
            yield sample._replace(name=alias.theirs + suffix, labels=labels)
