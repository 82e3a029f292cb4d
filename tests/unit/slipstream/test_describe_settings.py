"""docs/configuration.md says what the settings say."""

from __future__ import annotations

from pydantic import BaseModel

from slipstream.describe_settings import PAGE, render
from slipstream.settings import Settings


def test_the_configuration_page_is_what_the_settings_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run `make docs`"


def test_every_setting_has_a_description_for_the_page() -> None:
    sections = [
        info.annotation
        for info in Settings.model_fields.values()
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
    ]
    silent = [
        f"{model.__name__}.{name}"
        for model in (Settings, *sections)
        for name, info in model.model_fields.items()
        if not info.description and info.annotation not in sections
    ]

    assert silent == []
