"""A tiny Llama with random weights, made on the spot: real enough for the real engine, small enough for any test.

Its text is nonsense, but the same nonsense every time, and each part of the prompt has a say in it. That is what
tests that compare token for token need: greedy output that differs between prompts, falls into no loop, and has
a clear winner at nearly every step, so that the rounding of another batch does not change it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SERVED_NAME: Final = "tiny"
VOCAB_SIZE: Final = 512
MAX_MODEL_LEN: Final = 8192
SPECIAL_TOKENS: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT, IM_START, IM_END = range(3)  # ids; the 256 bytes follow, then what is merged from them
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# The CPU attention of vLLM takes heads of 32, 64, 96, 128, ...
_HEAD: Final = 32
# Wide enough that attention picks single tokens out of thousands; a narrow one averages them all, and a KV block gone
# wrong would not show.
_WEIGHT_STD: Final = 0.25

# What the tokenizer is trained on. Some words have characters of two, three and four bytes.
_TEXT: Final = """
The quick brown fox jumps over the lazy dog while the river carries the leaves to the sea. In the morning the
people of the town open their windows and the sound of the market comes in with the light. What is the name of the
man who brings the bread? Nobody knows, but everybody likes him, and there is always something left for the birds.
When the rain falls they stand under the trees and talk about the weather, the harvest and the children. How many
stars are there? More than there are words, said the teacher, and that is why we have numbers: one, two, three.
A café in Zürich, a façade in São Paulo, a naïve question in Köln: 東京 と 京都 🙂 🚀 🙂 🚀 東京 と 京都.
"""


def make_tiny_model(folder: Path, *, seed: int = 0, heads: int = 2, kv_heads: int = 1) -> Path:
    """Write the whole model, weights in float32, into `folder` (made if need be) and return it.

    Another seed makes another model: it answers the same prompt differently. Needs torch and transformers.

    Args:
        heads, kv_heads: of attention; what a tensor-parallel engine divides among its ranks.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    make_tiny_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=heads * _HEAD,
        intermediate_size=2 * heads * _HEAD,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=_HEAD,
        max_position_embeddings=MAX_MODEL_LEN,
        tie_word_embeddings=False,
        bos_token_id=IM_START,
        eos_token_id=IM_END,
        pad_token_id=END_OF_TEXT,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                continue
            std = 1.0 if name.startswith(("model.embed_tokens", "lm_head")) else _WEIGHT_STD
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)
        # A zero logit never wins: the model speaks in whole characters, and ends now and then.
        unspoken = [token_id for token_id, text in enumerate(_texts(folder)) if not _speakable(token_id, text)]
        model.lm_head.weight[unspoken] = 0.0
    model.to(torch.float32).save_pretrained(folder)
    return folder


def make_tiny_tokenizer(folder: Path) -> Path:
    """Write what a frontend needs of the tiny model, its tokenizer and configuration, into `folder`. No torch."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=1,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"the text yields {tokenizer.get_vocab_size()} tokens instead of {VOCAB_SIZE}: make it longer")
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL_TOKENS[IM_START],
            "eos_token": SPECIAL_TOKENS[IM_END],
            "pad_token": SPECIAL_TOKENS[END_OF_TEXT],
            "clean_up_tokenization_spaces": False,
            "model_max_length": MAX_MODEL_LEN,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    _write_json(
        folder / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": MAX_MODEL_LEN,
            "bos_token_id": IM_START,
            "eos_token_id": IM_END,
        },
    )
    return folder


def _texts(folder: Path) -> list[str]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [tokenizer.decode([token_id]) for token_id in range(VOCAB_SIZE)]


def _speakable(token_id: int, text: str) -> bool:
    return token_id == IM_END or (text != "" and "\ufffd" not in text and (text.isprintable() or text == "\n"))


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
