"""The policy file: what is written reads the same; what is wrong is named with its line, its field and its limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.objectives import Bounds, ModelObjectives, Objective, PlannerObjectives, Window
from planner.policy_file import EXAMPLE, dump_policy, parse_policy, read_policy, write_policy
from planner.policy_schema import BoundsPart, ModelPart, ObjectivePart, PolicyPart, json_schema
from planner.scaling import Counts
from planner.schedule_hours import hours_text, parse_hours
from slipstream.errors import ConfigError

LEAST = "gpu_budget: 8\nmodels:\n  - model: m\n    objectives:\n      realtime: {ttft_s: 2, itl_s: 0.05}\n"


def errors_of(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_policy(text, "policy.yaml")
    return caught.value.message.splitlines()


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False)


printable = st.text(min_size=1, max_size=40).filter(str.isprintable)
objective = st.builds(Objective, ttft_s=numbers(1e-6, 86400), itl_s=numbers(1e-6, 3600), percentile=numbers(1, 99.99))
counts = st.builds(Counts, prefill=st.integers(0, 1024), decode=st.integers(0, 1024))


@st.composite
def windows(draw: st.DrawFn) -> Window:
    start_s = draw(st.integers(0, 86399))
    end_s = draw(st.integers(0, 86400).filter(lambda end_s: end_s != start_s))
    weekdays = draw(st.sets(st.integers(0, 6)))
    return Window(start_s, end_s, draw(counts), tuple(sorted(weekdays)))


@st.composite
def bounds(draw: st.DrawFn) -> Bounds:
    to_zero, aggregated = draw(st.booleans()), draw(st.booleans())
    least = (draw(st.integers(0 if to_zero or aggregated else 1, 9)), draw(st.integers(0 if to_zero else 1, 9)))
    most = (draw(st.integers(least[0], 1024)), draw(st.integers(max(1, least[1]), 1024)))
    return Bounds(*least, *most, to_zero, aggregated)


@st.composite
def policies(draw: st.DrawFn) -> PlannerObjectives:
    names = draw(st.lists(printable, min_size=1, max_size=3, unique=True))
    start_s = draw(numbers(0.001, 7200))
    models = tuple(
        ModelObjectives(
            model=name,
            objectives=draw(st.dictionaries(st.sampled_from(["realtime", "nearline", "batch"]), objective, min_size=1)),
            profile=draw(st.just("") | printable),
            bounds=draw(bounds()),
            schedule=tuple(draw(st.lists(windows(), max_size=2))),
            weight=draw(numbers(0.001, 1e6)),
        )
        for name in names
    )
    return PlannerObjectives(
        models=models,
        gpu_budget=draw(st.integers(60, 65536)),
        interval_s=draw(numbers(0.1, 600)),
        start_s=start_s,
        up_cooldown_s=draw(numbers(0, 86400)),
        down_cooldown_s=draw(numbers(0, 86400)),
        flip_cooldown_s=draw(numbers(0, 86400)),
        max_actions=draw(st.integers(1, 1024)),
        horizon_s=draw(numbers(start_s, 86400)),
    )


@given(policies())
@settings(max_examples=60, deadline=None)
def test_what_is_written_reads_the_same(policy: PlannerObjectives) -> None:
    assert parse_policy(dump_policy(policy), "written.yaml") == policy


def test_a_file_is_written_and_read(tmp_path: Path) -> None:
    policy = parse_policy(LEAST, "policy.yaml")
    write_policy(policy, tmp_path / "policy.yaml")
    assert read_policy(tmp_path / "policy.yaml") == policy


def test_only_budget_model_and_objectives_are_asked_for() -> None:
    policy = parse_policy(LEAST, "policy.yaml")
    assert policy == PlannerObjectives((ModelObjectives("m", {"realtime": Objective(2, 0.05)}),), gpu_budget=8)


def test_the_packaged_example_is_a_policy_that_names_every_setting() -> None:
    assert read_policy(EXAMPLE).gpu_budget == 16
    text = EXAMPLE.read_text()
    names = {*PolicyPart.model_fields} | {
        name for part in json_schema()["$defs"].values() for name in part["properties"]
    }
    assert [name for name in sorted(names) if f"{name}:" not in text] == []


def test_the_example_says_the_defaults() -> None:
    """What it has in comments, uncommented, changes nothing."""
    lines = EXAMPLE.read_text().splitlines()
    settings_in_comments = [line for line in lines if line.strip().startswith("# ") and ": " in line + " "]
    shown = {
        name: value.split("#")[0].strip()
        for name, _, value in (line.strip().removeprefix("#").strip().partition(":") for line in settings_in_comments)
        if name.isidentifier() and value.strip()
    }
    fields: dict[str, Any] = {}
    for part in (PolicyPart, ModelPart, ObjectivePart, BoundsPart):
        fields.update({name: info.default for name, info in part.model_fields.items()})
    assert len(shown) >= 14
    assert {name: yaml.safe_load(value) for name, value in shown.items()} == {name: fields[name] for name in shown}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("ttft_s: 2", "ttft_s: -1"), "5: models[0].objectives.realtime.ttft_s: must be greater than 0, is -1"),
        (("itl_s: 0.05", "itl_s: .nan"), "5: models[0].objectives.realtime.itl_s: must be a finite number, is nan"),
        (("gpu_budget: 8", "gpu_budget: 8.5"), "1: gpu_budget: must be a valid integer, is 8.5"),
        (("gpu_budget: 8", "gpu_budget: true"), "1: gpu_budget: must be a valid integer, is true"),
        (("gpu_budget: 8", "gpu_budget: 1"), "2: models: must fit gpu_budget = 1: at least 2 workers are always there"),
        (("gpu_budget: 8", "gpu_bugdet: 8"), "1: gpu_bugdet: is no setting here; did you mean gpu_budget?"),
        (
            ("      realtime:", "      urgent:"),
            "5: models[0].objectives.urgent: is no setting here; there are realtime, nearline, batch",
        ),
        (("ttft_s: 2", "ttft: 2"), "5: models[0].objectives.realtime.ttft: is no setting here; did you mean ttft_s?"),
        (("ttft_s: 2, ", ""), "5: models[0].objectives.realtime.ttft_s: is missing"),
        (("- model: m", "- model:"), "3: models[0].model: must be a valid string, is empty"),
        (("gpu_budget: 8", "gpu_budget: 8\ngpu_budget: 9"), "2: gpu_budget was already set in line 1"),
        (("gpu_budget: 8", "gpu_budget: [8"), "2: not YAML: expected ',' or ']', but got ':'"),
        (("gpu_budget: 8", "gpu_budget: 8\nhorizon_s: 30"), "1: horizon_s must be at least start_s, is 30 and 60: "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_error_names_the_line_the_field_and_the_limit(change: tuple[str, str], message: str) -> None:
    told = errors_of(LEAST.replace(*change))
    assert any(line.startswith(f"policy.yaml:{message}") for line in told), told


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("bounds: {min_decode: 0}", "bounds: min_decode must be 1 or more, is 0; `to_zero: true` allows none"),
        ("bounds: {min_prefill: 3, max_prefill: 2}", "bounds: min_prefill must not be greater than max_prefill"),
        ("bounds: {min_prefil: 2}", "bounds.min_prefil: is no setting here; did you mean min_prefill?"),
        ("schedule: [{hours: mon-fry 08:00-18:00}]", "schedule[0].hours: must name days as mon, tue, wed"),
        ("schedule: [{hours: 8-18}]", "schedule[0].hours: must be days and hours in UTC"),
        ("schedule: [{hours: 08:00-08:00}]", "schedule[0].hours: must end at another time than it starts"),
        ("schedule: [{hours: 08:00-25:00}]", "schedule[0].hours: must have times from 00:00 to 24:00"),
        ("schedule: [{decode: 2}]", "schedule[0].hours: is missing"),
        ("weight: 0", "weight: must be greater than 0, is 0"),
        ("profile: 5", "profile: must be a valid string, is 5"),
    ],
)
def test_a_model_s_setting_is_named_in_full(more: str, message: str) -> None:
    told = errors_of(f"{LEAST}    {more}\n")
    assert any(line.startswith(f"policy.yaml:6: models[0].{message}") for line in told), told


def test_all_errors_come_at_once_in_the_order_of_lines() -> None:
    text = LEAST.replace("gpu_budget: 8", "gpu_budget: 0").replace("2,", "-2,") + "    weight: -1\n"
    lines = [int(line.split(":")[1]) for line in errors_of(text)]
    assert lines == [1, 5, 6]


def test_a_model_stands_once() -> None:
    text = LEAST + LEAST.split("models:\n")[1]
    assert errors_of(text) == ["policy.yaml:2: models: must name each model once, has m twice"]


def test_hostile_yaml_never_expands() -> None:
    assert "alias" in errors_of("gpu_budget: &a [1]\nmodels: [*a, *a]\n")[0]
    assert "alias" in errors_of("gpu_budget: &a [*a]\n")[0]
    assert "could not determine a constructor" in errors_of("gpu_budget: !!python/object:os.system x\n")[0]


@pytest.mark.parametrize("text", ["", "[]", "16", "# nothing\n"])
def test_what_is_no_mapping_is_told(text: str) -> None:
    assert errors_of(text) == ["policy.yaml:1: the policy must be a mapping of names to values"]


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("mon-fri 08:00-18:00", ((0, 1, 2, 3, 4), 28800, 64800)),
        ("Sat,Sun 22:00-02:00", ((5, 6), 79200, 7200)),
        ("fri-mon 0:00-24:00", ((0, 4, 5, 6), 0, 86400)),
        ("06:30-09:00:30", ((), 23400, 32430)),
    ],
)
def test_hours_are_read_as_people_write_them(text: str, parsed: tuple[tuple[int, ...], int, int]) -> None:
    assert parse_hours(text) == parsed
    assert parse_hours(hours_text(*parsed)) == parsed
