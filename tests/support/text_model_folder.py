"""A model folder without weights: a byte-level tokenizer of a few hundred tokens, configs, a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

IM_START, IM_END, BOS, EOS = "<|im_start|>", "<|im_end|>", "<s>", "</s>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("o", "r"), ("Ġw", "or")]


def byte_level_tokenizer() -> Tokenizer:
    """Every byte is a token, a few words are more; so any text can be said, also badly."""
    vocab = {character: token_id for token_id, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in _MERGES:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=_MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in (BOS, EOS, IM_START, IM_END)]
    )
    return tokenizer


def write_model_folder(folder: Path, **overrides: dict[str, Any]) -> Path:
    """Write the folder; a keyword named after a file (`config`, `tokenizer_config`, ...) replaces its content."""
    tokenizer = byte_level_tokenizer()
    # As Llama saves it: completions begin with <s>.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    eos = tokenizer.token_to_id(EOS)
    files: dict[str, dict[str, Any]] = {
        "config": {"max_position_embeddings": 256, "eos_token_id": eos},
        "tokenizer_config": {"bos_token": BOS, "eos_token": IM_END},
        "generation_config": {"eos_token_id": [eos]},
    }
    for name, content in (files | overrides).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder
