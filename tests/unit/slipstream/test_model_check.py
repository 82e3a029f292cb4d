"""Broken model files are named in one sentence, before anything is loaded."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slipstream.errors import StartupError
from slipstream.model_check import INDEX, check_model_files, check_safetensors


def weights(path: Path, bytes_each: int = 16) -> bytes:
    header = {"__metadata__": {"format": "pt"}}
    tensors = {
        name: {"dtype": "F32", "shape": [4], "data_offsets": [at * bytes_each, (at + 1) * bytes_each]}
        for at, name in enumerate(("a", "b"))
    }
    raw = json.dumps(header | tensors).encode()
    content = struct.pack("<Q", len(raw)) + raw + bytes(2 * bytes_each)
    path.write_bytes(content)
    return content


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    weights(tmp_path / "model.safetensors")
    return tmp_path


def test_a_whole_model_is_fine(model: Path) -> None:
    check_model_files(model)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.99])
def test_weights_that_were_cut_short_are_named(model: Path, share: float) -> None:
    path = model / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(StartupError, match=r"model\.safetensors has \d+ bytes"):
        check_model_files(model)


@pytest.mark.parametrize("content", ["", "{", "[]", "nonsense", "[" * 100_000])
def test_a_configuration_that_is_no_json_object_is_named(model: Path, content: str) -> None:
    (model / "config.json").write_text(content)
    with pytest.raises(StartupError, match=r"config\.json is not"):
        check_model_files(model)


def test_a_shard_that_is_not_there_is_named(model: Path) -> None:
    (model / INDEX).write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}))
    with pytest.raises(StartupError, match=r"names model-2\.safetensors, which is not there"):
        check_model_files(model)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=400))
def test_whatever_is_in_a_file_of_weights_it_is_an_error_with_its_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(StartupError, match=r"model\.safetensors"):
        check_safetensors(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.dictionaries(st.text(), inner)))
def test_whatever_a_header_says_the_only_error_is_ours(tmp_path: Path, header: object) -> None:
    raw = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    with suppress(StartupError):
        check_safetensors(path)
