"""Our metrics under other projects' names: the same figures, with the labels that those have."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from slipstream.metric_names import FRONTEND, WORKER, Alias, KnownNames


def page(registry: CollectorRegistry, *aliases: Alias, model: str = "m") -> dict[str, float]:
    """What a scrape sees, as `name{sorted labels}`, without the times of creation."""
    text = generate_latest(KnownNames(registry, aliases, model=model)).decode()
    return {
        sample.name + "".join(f",{key}={value}" for key, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_a_counter_has_both_names_and_one_value() -> None:
    registry = CollectorRegistry()
    Counter("ours", "Text.", ["model"], registry=registry).labels("tiny").inc(3)

    assert page(registry, Alias("ours", "vllm:theirs"), Alias("ours", "theirs")) == {
        "ours_total,model=tiny": 3,
        "vllm:theirs_total,engine=0,model_name=tiny": 3,
        "theirs_total,model=tiny": 3,
    }


def test_a_histogram_keeps_its_buckets() -> None:
    registry = CollectorRegistry()
    Histogram("ours_seconds", "Text.", registry=registry, buckets=(1.0,)).observe(0.5)

    seen = page(registry, Alias("ours_seconds", "vllm:theirs_seconds"))
    theirs = {name: value for name, value in seen.items() if name.startswith("vllm:")}
    assert theirs == {
        "vllm:theirs_seconds_bucket,engine=0,le=1.0,model_name=m": 1,
        "vllm:theirs_seconds_bucket,engine=0,le=+Inf,model_name=m": 1,
        "vllm:theirs_seconds_count,engine=0,model_name=m": 1,
        "vllm:theirs_seconds_sum,engine=0,model_name=m": 0.5,
    }


def test_several_of_ours_can_be_one_of_theirs_and_one_several() -> None:
    registry = CollectorRegistry()
    Gauge("computed", "Text.", registry=registry).set(1)
    Gauge("cached", "Text.", registry=registry).set(2)
    stages = Gauge("stage", "Text.", ["stage"], registry=registry)
    stages.labels("queue").set(3)
    stages.labels("decode").set(4)

    seen = page(
        registry,
        Alias("computed", "tokens", added={"source": "a"}),
        Alias("cached", "tokens", added={"source": "b"}),
        Alias("stage", "queue", only={"stage": "queue"}),
    )
    assert {name: value for name, value in seen.items() if name.startswith(("tokens", "queue"))} == {
        "tokens,model=m,source=a": 1,
        "tokens,model=m,source=b": 2,
        "queue,model=m": 3,
    }


def test_what_is_about_no_model_has_no_other_name() -> None:
    registry = CollectorRegistry()
    Gauge("ours", "Text.", ["model"], registry=registry).labels("").set(1)

    assert page(registry, Alias("ours", "theirs")) == {"ours,model=": 1}


def test_vllms_names_are_names_that_vllm_has() -> None:
    vllm = find_spec("vllm")
    if vllm is None or vllm.origin is None:
        pytest.skip("the engine is not installed")
    source = Path(vllm.origin).parent.joinpath("v1", "metrics", "loggers.py").read_text(encoding="utf-8")
    named = {alias.theirs for alias in (*FRONTEND, *WORKER) if alias.theirs.startswith("vllm:")}

    assert {name for name in named if f'"{name}"' not in source} == set()
