"""The tiny model keeps what the end-to-end tests build on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tokenizers import Tokenizer

from tests.support import tiny_model

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

PROMPT_LENGTHS = (1, 2, 7, 33, 128, 300, 1000)
NEW_TOKENS = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder: Path) -> LlamaForCausalLM:
    from transformers import LlamaForCausalLM

    loaded: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder)
    return loaded


def _prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, tiny_model.VOCAB_SIZE), k=length)


def _greedy(model: LlamaForCausalLM, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """The continuation, and at each step the lead of its token over the next best."""
    import torch

    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
    best = torch.stack([step[0].topk(2).values for step in out.logits])
    return out.sequences[0, len(prompt) :].tolist(), best[:, 0] - best[:, 1]


def test_the_same_seed_makes_the_same_files(folder: Path, tmp_path: Path) -> None:
    again = tiny_model.make_tiny_model(tmp_path)

    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in again.iterdir()
    }


def test_greedy_output_differs_between_prompts_and_falls_into_no_loop(model: LlamaForCausalLM) -> None:
    outputs = [_greedy(model, _prompt(length))[0] for length in PROMPT_LENGTHS]

    assert len({tuple(output) for output in outputs}) == len(outputs)
    assert all(len(set(output)) > NEW_TOKENS // 2 for output in outputs)


def test_greedy_output_has_a_clear_winner_at_each_step(model: LlamaForCausalLM) -> None:
    leads = [lead for length in PROMPT_LENGTHS for lead in _greedy(model, _prompt(length))[1].tolist()]

    # Batching and chunking move the logits by about 1e-5.
    assert min(leads) > 1e-3


def test_a_change_of_32_tokens_anywhere_in_a_long_prompt_changes_the_output(model: LlamaForCausalLM) -> None:
    prompt = _prompt(1000)
    output, _ = _greedy(model, prompt)

    for start in (0, 320, 640, 960):
        changed = prompt[:start] + _prompt(32, seed=start + 1) + prompt[start + 32 :]
        assert _greedy(model, changed)[0] != output


def test_the_tokenizer_takes_any_text_and_gives_it_back(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "Hello, 123 wörld!\n\t東京 🙂 \x00 <|im_start|>x<|im_end|>"

    ids = tokenizer.encode(text).ids

    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.encode("<|im_end|>").ids == [tiny_model.IM_END]
    assert tokenizer.get_vocab_size() == tiny_model.VOCAB_SIZE
