"""The policy file's shape: every name, its meaning, its limits and its default, checked by pydantic.

What is read becomes `planner.objectives`; `json_schema` is for editors that complete and check YAML.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from planner.objectives import Bounds, ModelObjectives, Objective, PlannerObjectives, Window
from planner.scaling import Counts
from planner.schedule_hours import hours_text, parse_hours

MAX_WORKERS = 1024
MAX_GPUS = 65536
MAX_MODELS = 256
MAX_WINDOWS = 64

ServiceClass = Literal["realtime", "nearline", "batch"]


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be printable characters")
    return text


def _hours(text: str) -> str:
    parse_hours(text)
    return text


Name = Annotated[str, AfterValidator(_printable)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ObjectivePart(Part):
    """What one class of requests shall get."""

    ttft_s: float = Field(gt=0, le=86400, description="time to first token, queueing included")
    itl_s: float = Field(gt=0, le=3600, description="mean time between two tokens of an answer")
    percentile: float = Field(99.0, ge=1, le=99.99, description="of requests that shall keep each of both, in percent")


class BoundsPart(Part):
    """Least and most workers of a model."""

    min_prefill: int = Field(1, ge=0, le=MAX_WORKERS, description="prefill workers at least")
    min_decode: int = Field(1, ge=0, le=MAX_WORKERS, description="decode workers at least")
    max_prefill: int = Field(MAX_WORKERS, ge=0, le=MAX_WORKERS, description="prefill workers at most")
    max_decode: int = Field(MAX_WORKERS, ge=1, le=MAX_WORKERS, description="decode workers at most")
    to_zero: bool = Field(False, description="no worker at all while nothing comes; the first request then waits")
    allow_aggregated: bool = Field(
        False, description="the planner may do without prefill workers where decode alone is cheaper"
    )
    idle_s: float = Field(300.0, gt=0, le=86400, description="with `to_zero`: time without a request before that")

    @model_validator(mode="after")
    def _in_order(self) -> BoundsPart:
        for role in ("prefill", "decode"):
            least, most = getattr(self, f"min_{role}"), getattr(self, f"max_{role}")
            if least > most:
                raise ValueError(f"min_{role} must not be greater than max_{role}, is {least} and {most}")
        if self.min_decode == 0 and not self.to_zero:
            raise ValueError("min_decode must be 1 or more, is 0; `to_zero: true` allows none")
        if self.min_prefill == 0 and not (self.to_zero or self.allow_aggregated):
            raise ValueError(
                "min_prefill must be 1 or more, is 0; `allow_aggregated: true` or `to_zero: true` allow none"
            )
        return self


class WindowPart(Part):
    """Workers that shall be there at certain hours whatever comes, within the bounds."""

    hours: Annotated[str, AfterValidator(_hours)] = Field(
        description="days and hours, UTC: `mon-fri 08:00-18:00`; without days every day; past midnight: `22:00-02:00`"
    )
    prefill: int = Field(0, ge=0, le=MAX_WORKERS, description="prefill workers at least")
    decode: int = Field(0, ge=0, le=MAX_WORKERS, description="decode workers at least")


class ModelPart(Part):
    """One model's workers."""

    model: Name = Field(min_length=1, max_length=256, description="name under which its workers register")
    profile: Name = Field(
        "", max_length=4096, description="packaged profile or file; the workers' own where there is none"
    )
    weight: float = Field(
        1.0, gt=0, le=1e6, description="the model with the larger one goes first where the GPUs do not suffice for all"
    )
    objectives: dict[ServiceClass, ObjectivePart] = Field(
        min_length=1, description="by class: realtime, nearline, batch; a class without one takes what is left"
    )
    bounds: BoundsPart = Field(default_factory=BoundsPart, description="least and most workers")
    schedule: list[WindowPart] = Field(
        default_factory=list, max_length=MAX_WINDOWS, description="floors for certain hours"
    )


class PolicyPart(Part):
    """All of a scaling policy."""

    gpu_budget: int = Field(ge=1, le=MAX_GPUS, description="GPUs that all models' workers may occupy together")
    interval_s: float = Field(5.0, ge=0.1, le=600, description="time between two decisions")
    horizon_s: float = Field(120.0, gt=0, le=86400, description="how far ahead is planned; at least `start_s`")
    start_s: float = Field(
        60.0, gt=0, le=7200, description="what a new worker takes until it is ready, before one was seen to start"
    )
    up_cooldown_s: float = Field(10.0, ge=0, le=86400, description="least time between two starts for one model")
    down_cooldown_s: float = Field(
        120.0, ge=0, le=86400, description="least time from any change of a model to a drain of its workers"
    )
    flip_cooldown_s: float = Field(20.0, ge=0, le=86400, description="least time between two flips for one model")
    max_actions: int = Field(4, ge=1, le=MAX_WORKERS, description="starts, drains and flips in one decision")
    models: list[ModelPart] = Field(min_length=1, max_length=MAX_MODELS, description="one entry for each model")

    @field_validator("models")
    @classmethod
    def _once_each(cls, models: list[ModelPart]) -> list[ModelPart]:
        names = [one.model for one in models]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"must name each model once, has {twice} twice")
        return models

    @field_validator("models")
    @classmethod
    def _within_budget(cls, models: list[ModelPart], info: ValidationInfo) -> list[ModelPart]:
        floor = sum(one.bounds.min_prefill + one.bounds.min_decode for one in models if not one.bounds.to_zero)
        budget = info.data.get("gpu_budget")
        if budget is not None and floor > budget:
            raise ValueError(f"must fit gpu_budget = {budget}: at least {floor} workers are always there")
        return models

    @model_validator(mode="after")
    def _far_enough(self) -> PolicyPart:
        if self.horizon_s < self.start_s:
            raise ValueError(
                f"horizon_s must be at least start_s, is {self.horizon_s:g} and {self.start_s:g}: "
                "a worker that is started must be there for what was foreseen"
            )
        return self


def to_objectives(part: PolicyPart) -> PlannerObjectives:
    """As the planner has it."""
    settings = {name: getattr(part, name) for name in PolicyPart.model_fields if name != "models"}
    return PlannerObjectives(models=tuple(_model(one) for one in part.models), **settings)


def from_objectives(objectives: PlannerObjectives) -> PolicyPart:
    """As the file has it.

    Raises:
        pydantic.ValidationError: objectives that no file could hold.
    """
    settings: dict[str, Any] = {name: getattr(objectives, name) for name in PolicyPart.model_fields if name != "models"}
    return PolicyPart(models=[_part(one) for one in objectives.models], **settings)


def json_schema() -> dict[str, Any]:
    """JSON Schema of the file."""
    return PolicyPart.model_json_schema()


def _model(part: ModelPart) -> ModelObjectives:
    return ModelObjectives(
        model=part.model,
        profile=part.profile,
        weight=part.weight,
        objectives={name: Objective(**one.model_dump()) for name, one in part.objectives.items()},
        bounds=Bounds(**part.bounds.model_dump()),
        schedule=tuple(_window(one) for one in part.schedule),
    )


def _window(part: WindowPart) -> Window:
    weekdays, start_s, end_s = parse_hours(part.hours)
    return Window(start_s, end_s, Counts(part.prefill, part.decode), weekdays)


def _part(one: ModelObjectives) -> ModelPart:
    objectives: dict[Any, ObjectivePart] = {
        name: ObjectivePart(**_fields(ObjectivePart, each)) for name, each in one.objectives.items()
    }
    return ModelPart(
        model=one.model,
        profile=one.profile,
        weight=one.weight,
        objectives=objectives,
        bounds=BoundsPart(**_fields(BoundsPart, one.bounds)),
        schedule=[
            WindowPart(
                hours=hours_text(each.weekdays, each.start_s, each.end_s),
                prefill=each.floor.prefill,
                decode=each.floor.decode,
            )
            for each in one.schedule
        ],
    )


def _fields(kind: type[Part], data: object) -> dict[str, Any]:
    return {name: getattr(data, name) for name in kind.model_fields}
