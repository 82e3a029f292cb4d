"""Faces do not listen where others reach them without keys, unless somebody said so."""

from __future__ import annotations

from pathlib import Path

import pytest

from slipstream.errors import StartupError
from slipstream.exposure import check_faces
from slipstream.security_settings import SecuritySettings
from slipstream.settings import FrontendSettings, Settings


def settings(host: str, **security: object) -> Settings:
    return Settings(frontend=FrontendSettings(host=host), security=SecuritySettings.model_validate(security))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "localhost", "::1", "[::1]"])
def test_on_this_machine_alone_no_keys_are_needed(host: str) -> None:
    check_faces(settings(host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "frontend.example"])
def test_elsewhere_keys_or_a_word_are_needed(host: str) -> None:
    with pytest.raises(StartupError, match=r"security\.keys_file.*security\.anonymous"):
        check_faces(settings(host))
    check_faces(settings(host, keys_file=Path("keys.yaml")))
    check_faces(settings(host, anonymous=True))
