"""docs/configuration.md says what the settings say."""

from __future__ import annotations

from pydantic import BaseModel

from slipstream.describe_settings import PAGE, render
from slipstream.settings import Settings


def test_the_configuration_page_is_what_the_settings_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run `make docs`"


def _sections() -> list[type[BaseModel]]:
    annotations = [info.annotation for info in Settings.model_fields.values()]
    return [each for each in annotations if isinstance(each, type) and issubclass(each, BaseModel)]


def test_every_setting_has_a_description_for_the_page() -> None:
    models: list[type[BaseModel]] = [Settings, *_sections()]
    silent = [
        f"{model.__name__}.{name}"
        for model in models
        for name, info in model.model_fields.items()
        if not info.description and info.annotation not in models
    ]

    assert silent == []
