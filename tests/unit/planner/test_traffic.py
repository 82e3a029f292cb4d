"""What frontends report adds up to what happened, however the reports come."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.observation import Traffic
from planner.traffic import LONGEST_INTERVAL_S, REMEMBERED, SILENT_AFTER_S, TrafficBook
from slipstream.errors import InvalidRequestError
from slipstream.latency_counts import LAST_BUCKET, LatencyCounts
from slipstream.v1.planner_pb2 import LatencyHistogram, TrafficPart, TrafficReport

COUNTS = [
    *("arrivals", "refused", "failed", "input_tokens", "computed_prompt_tokens", "cached_tokens"),
    *("finished", "output_tokens"),
]
KEYS = [("m", "realtime"), ("m", "batch"), ("other", "realtime")]

histograms = st.dictionaries(st.integers(0, LAST_BUCKET), st.integers(1, 9), max_size=3).map(
    lambda counts: LatencyHistogram(
        buckets=sorted(counts), counts=[counts[bucket] for bucket in sorted(counts)], total_s=float(sum(counts))
    )
)
parts = st.builds(
    lambda name, counts, queued, ttft, itl: TrafficPart(
        model=name[0], service_class=name[1], queued=queued, queued_tokens=3 * queued, ttft=ttft, itl=itl, **counts
    ),
    st.sampled_from(KEYS),
    st.fixed_dictionaries({name: st.integers(0, 99) for name in COUNTS}),
    st.integers(0, 5),
    histograms,
    histograms,
)


def report(frontend: str, sequence: int, *reported: TrafficPart, interval_s: float = 1.0) -> TrafficReport:
    return TrafficReport(frontend_id=frontend, sequence=sequence, interval_s=interval_s, parts=reported)


def plain(sums: dict[tuple[str, str], Traffic]) -> dict[tuple[str, str], dict[str, object]]:
    """Comparable."""
    return {
        name: {
            field.name: list(value.pairs()) if isinstance(value, LatencyCounts) else value
            for field in dataclasses.fields(one)
            if (value := getattr(one, field.name)) is not None
        }
        for name, one in sums.items()
    }


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"), st.lists(parts, max_size=2, unique_by=lambda part: (part.model, part.service_class))
        ),
        max_size=12,
    ),
    st.data(),
)
def test_every_report_counts_once_in_whatever_order_and_however_often_it_comes(
    told: list[tuple[str, list[TrafficPart]]], data: st.DataObject
) -> None:
    sequences = dict.fromkeys("abc", 0)
    reports = []
    for frontend, some in told:
        sequences[frontend] += 1
        reports.append(report(frontend, sequences[frontend], *some))
    expected: dict[tuple[str, str], Traffic] = {}
    for one in reports:
        for part in one.parts:
            sum_ = expected.setdefault((part.model, part.service_class), Traffic())
            for name in COUNTS:
                setattr(sum_, name, getattr(sum_, name) + getattr(part, name))
            for mine, theirs in ((sum_.ttft, part.ttft), (sum_.itl, part.itl)):
                mine.merge(LatencyCounts(dict(zip(theirs.buckets, theirs.counts, strict=True)), theirs.total_s))
            if one.sequence == sequences[one.frontend_id]:
                sum_.queued += part.queued
                sum_.queued_tokens += 3 * part.queued
    again = data.draw(st.lists(st.sampled_from(reports)) if reports else st.just([]))
    coming = data.draw(st.permutations(reports + again))
    book = TrafficBook(0.0)
    for one in coming:
        book.take(one, 1.0)
    assert plain(book.collect(2.0)) == plain(expected)


def test_what_was_looked_at_is_not_seen_again_but_what_waits_still_waits() -> None:
    book, part = TrafficBook(0.0), TrafficPart(model="m", service_class="realtime", arrivals=3, queued=2)
    book.take(report("a", 1, part), 1.0)
    assert book.collect(2.0)["m", "realtime"].arrivals == 3
    (later,) = book.collect(3.0).values()
    assert (later.arrivals, later.queued) == (0, 2)
    book.take(report("a", 1, part), 4.0)
    (later,) = book.collect(4.0).values()
    assert (later.arrivals, later.queued) == (0, 2), "a report that comes again is none"
    book.take(report("a", 2), 5.0)
    assert book.collect(5.0) == {}


def test_a_frontend_that_fell_silent_has_nothing_waiting_and_is_forgotten() -> None:
    book = TrafficBook(0.0)
    book.take(report("a", 1, TrafficPart(model="m", service_class="batch", finished=1, queued=9)), 0.0)
    (sums,) = book.collect(SILENT_AFTER_S).values()
    assert (sums.finished, sums.queued, len(book)) == (1, 0, 0), "what it had told happened all the same"
    book.take(report("a", 1, TrafficPart(model="m", service_class="batch", finished=1)), 100.0)
    assert len(book) == 1


def test_the_picture_is_whole_once_every_frontend_had_the_time_to_report() -> None:
    book = TrafficBook(10.0)
    assert not book.whole(10.0 + SILENT_AFTER_S - 0.1)
    assert book.whole(10.0 + SILENT_AFTER_S)


def test_counts_of_a_long_time_are_not_taken_for_those_of_one_interval() -> None:
    book, part = TrafficBook(0.0), TrafficPart(model="m", service_class="realtime", arrivals=300, queued=4)
    book.take(report("a", 1, part, interval_s=LONGEST_INTERVAL_S + 1), 1.0)
    (sums,) = book.collect(1.0).values()
    assert (sums.arrivals, sums.queued) == (0, 4)


def test_a_report_from_long_ago_is_no_news() -> None:
    book, part = TrafficBook(0.0), TrafficPart(model="m", service_class="realtime", arrivals=1)
    book.take(report("a", 2 * REMEMBERED), 1.0)
    book.take(report("a", REMEMBERED, part), 1.0)
    assert book.collect(1.0) == {}
    book.take(report("a", REMEMBERED + 1, part), 1.0)
    assert book.collect(1.0)["m", "realtime"].arrivals == 1


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        (report("", 1), "frontend_id"),
        (report("a\n", 1), "frontend_id"),
        (report("a", 1, interval_s=float("nan")), "interval_s"),
        (report("a", 1, TrafficPart(service_class="batch")), "parts.model"),
        (report("a", 1, TrafficPart(model="m", service_class="urgent")), "parts.service_class"),
        (report("a", 1, TrafficPart(model="m", service_class="batch", oldest_wait_s=-1)), "parts.oldest_wait_s"),
        (
            report("a", 1, TrafficPart(model="m", service_class="batch", ttft=LatencyHistogram(buckets=[1]))),
            "parts.ttft",
        ),
        (
            report(
                "a",
                1,
                TrafficPart(
                    model="m", service_class="batch", itl=LatencyHistogram(buckets=[LAST_BUCKET + 1], counts=[1])
                ),
            ),
            "parts.itl.buckets",
        ),
        (report("a", 1, *[TrafficPart(model="m", service_class="batch")] * 769), "parts"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_misshapen_report_is_refused_and_leaves_nothing_behind(wrong: TrafficReport, param: str) -> None:
    book = TrafficBook(0.0)
    with pytest.raises(InvalidRequestError) as caught:
        book.take(wrong, 1.0)
    assert caught.value.param == param
    assert (len(book), book.collect(1.0)) == (0, {})
