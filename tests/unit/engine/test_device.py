"""What the engine is given when the user says nothing, and what is refused when the user says too little."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from engine import device
from slipstream.errors import ConfigError


def test_without_a_setting_the_cache_holds_four_contexts() -> None:
    assert device.choose_kv_bytes(None, 1000, 100, memory_bytes=10**9) == 400_000


def test_without_a_setting_the_cache_takes_a_bounded_share_of_the_memory() -> None:
    assert device.choose_kv_bytes(None, 1000, 1000, memory_bytes=10**7) == 2 * 10**6


def test_a_cache_too_small_for_one_context_is_refused_with_both_remedies() -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_bytes: 5000 .* 5 tokens.* 100 .*max_model_len.* 100000"):
        device.choose_kv_bytes(5000, 1000, 100, memory_bytes=10**9)


def test_float32_is_chosen_where_bfloat16_would_be_emulated() -> None:
    assert device.choose_dtype("auto", "cpu", "flags: avx512f avx512_vnni") == "float32"
    assert device.choose_dtype("auto", "cpu", "flags: avx512f avx512_bf16") == "auto"
    assert device.choose_dtype("auto", "cuda", "") == "auto"
    assert device.choose_dtype("bfloat16", "cpu", "") == "bfloat16"


def test_a_cpu_takes_short_steps_so_that_an_abort_is_felt_soon() -> None:
    assert device.choose_step_tokens(None, 64, "cpu") == 256
    assert device.choose_step_tokens(None, 512, "cpu") == 512
    assert device.choose_step_tokens(None, 64, "cuda") is None
    assert device.choose_step_tokens(4096, 64, "cpu") == 4096


def test_a_step_has_room_for_every_running_request() -> None:
    with pytest.raises(ConfigError, match=r"max_batched_tokens: 64 .*max_running \(128\)"):
        device.choose_step_tokens(64, 128, "cpu")


def test_kv_bytes_of_a_token_follow_the_key_value_heads() -> None:
    smollm2 = SimpleNamespace(num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, hidden_size=576)
    assert device.kv_token_bytes(smollm2, 4) == 45 * 1024
    own_head_size = SimpleNamespace(num_hidden_layers=2, num_attention_heads=4, hidden_size=64, head_dim=32)
    assert device.kv_token_bytes(own_head_size, 2) == 2 * 2 * 4 * 32 * 2


def test_a_gpu_that_is_not_there_is_refused_with_the_remedy() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match="--device cpu"):
        device.choose_device("cuda")
    assert device.choose_device("auto") == "cpu"


def test_cpu_flags_are_read_where_there_are_any(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nflags : fpu avx2\n")
    assert device.cpu_flags(info) == "flags : fpu avx2"
    assert device.cpu_flags(tmp_path / "none") == ""
