"""Weights that are streamed are the same weights: vLLM's own loader and the real streamer, with our settings."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.runai_streamer_loader import RunaiModelStreamerLoader

from engine.vllm_arguments import _streamed
from slipstream.errors import ConfigError
from slipstream.worker_settings import WorkerSettings

STREAMED = WorkerSettings(load_format="runai_streamer", stream_readers=3, stream_memory_bytes=64 << 20)
VARIABLES = ("RUNAI_STREAMER_CONCURRENCY", "RUNAI_STREAMER_MEMORY_LIMIT")


def test_vllm_streams_the_same_tensors_that_the_file_holds(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # the loader sets them, and the end of the test sets them back
    loader = RunaiModelStreamerLoader(LoadConfig(**_streamed(STREAMED)))

    streamed = dict(loader._get_weights_iterator(str(tiny_model), None))

    held = load_file(tiny_model / "model.safetensors")
    assert streamed.keys() == held.keys()
    assert all(torch.equal(streamed[name], held[name]) for name in held)
    assert [os.environ[name] for name in VARIABLES] == ["3", str(64 << 20)]


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="extra `streamer`"):
        _streamed(STREAMED)
