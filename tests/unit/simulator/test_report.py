"""A report is one page that needs nothing else, says what happened, and is the same for the same run."""

from __future__ import annotations

import itertools
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from rich.console import Console

from planner.scaling import Start
from simulator.charts import MAX_POINTS, Chart, Series, clock, figure
from simulator.outcome import Outcome
from simulator.report import html, tables
from slipstream.v1.registry_pb2 import Role
from tests.unit.simulator.test_run import ran, steady


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    return ran(steady(), {10.0: (Start("m", Role.ROLE_DECODE),)})[0]


class Page(HTMLParser):
    """Collects tags with their attributes, and refuses text that was not escaped."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_a_page_holds_its_plots_and_asks_for_nothing_from_elsewhere(outcome: Outcome) -> None:
    text = html(outcome, "A <run> & more")
    page = Page()
    page.feed(text)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("svg") == tags.count("figcaption") == 6
    assert not {"script", "link", "img", "iframe", "object"} & set(tags)
    assert "http" not in text
    assert "<title>A &lt;run&gt; &amp; more</title>" in text
    assert "start decode decode-1" in text
    assert html(outcome, "A <run> & more") == text


def test_the_terminals_table_has_the_figures(outcome: Outcome) -> None:
    console = Console(width=100, record=True, file=None, quiet=False)
    with console.capture() as captured:
        console.print(tables(outcome))
    said = captured.get()
    assert f"{outcome.all.requests:,}" in said
    assert f"{outcome.all.attainment:.2%}" in said
    assert "start decode decode-1" in said


def test_a_chart_is_well_formed_and_stays_within_its_frame() -> None:
    times_s = [float(number) for number in range(1, 5001)]
    chart = Chart("Load", "/s", times_s, [Series("a", [number % 97 for number in range(5000)])], ("limit", 90.0))
    drawn = ElementTree.fromstring(figure(chart))
    svg = drawn.find("svg")
    assert svg is not None
    assert len(svg.findall("rect")) <= MAX_POINTS
    (line,) = [one for one in svg.findall("path") if one.get("class") == "s0"]
    places = [tuple(map(float, pair.split())) for pair in line.attrib["d"][1:].split("L")]
    assert all(0 <= x <= 720 and 0 <= y <= 220 for x, y in places)
    assert all(before[0] <= after[0] for before, after in itertools.pairwise(places))


def test_a_chart_of_nothing_is_a_chart() -> None:
    assert "<svg" in figure(Chart("Nothing", "s", [], [Series("a", [])]))
    assert "<svg" in figure(Chart("Zeros", "s", [1.0, 2.0], [Series("a", [0.0, 0.0], stepped=True)], ("limit", 5.0)))


@pytest.mark.parametrize(("time_s", "said"), [(0, "0:00"), (75, "1:15"), (3600, "1:00 h"), (3725, "1:02:05")])
def test_times_are_written_as_clocks_have_them(time_s: float, said: str) -> None:
    assert clock(time_s) == said
