"""The frontend's text is what transformers, which the frontend does not have, makes of the same model folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from frontend.tokenizer import TextModel
from tests.support.text_model_folder import BOS, EOS, write_model_folder

AS_TRANSFORMERS = """
import json, sys
from transformers import AutoTokenizer
folders, texts, messages = json.loads(sys.stdin.read())
for folder in folders:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    print("made:" + json.dumps({
        "ids": [tokenizer(text)["input_ids"] for text in texts],
        "decoded": [tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) for text in texts],
        "chat": tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
        "eos": tokenizer.eos_token_id,
    }))
"""


def test_text_becomes_what_transformers_makes_of_it(tmp_path: Path) -> None:
    names: dict[str, object] = {"bos_token": BOS, "eos_token": EOS, "tokenizer_class": "PreTrainedTokenizerFast"}
    configs: list[dict[str, object]] = [
        {},
        {"add_bos_token": False},
        {"add_eos_token": True},
        {"pad_token": "<pad>", "unk_token": "h"},
    ]
    folders = [tmp_path / str(place) for place in range(len(configs))]
    for folder, config in zip(folders, configs, strict=True):
        folder.mkdir()
        write_model_folder(folder, tokenizer_config=names | config, config={"model_type": "llama", "vocab_size": 300})
    texts = ["hello world", "é🙂 <s>x</s>", "", "  <pad>  h", "a\r\n\tb"]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi <s>"}]
    given = json.dumps([list(map(str, folders)), texts, messages])
    program = [sys.executable, "-c", AS_TRANSFORMERS]
    printed = subprocess.run(program, input=given, capture_output=True, text=True, timeout=100, check=True).stdout
    made = [json.loads(line.removeprefix("made:")) for line in printed.splitlines() if line.startswith("made:")]

    for folder, theirs in zip(folders, made, strict=True):
        model = TextModel.load(folder)
        ids = [model.encode_now(text, add_special_tokens=True) for text in texts]
        assert ids == theirs["ids"]
        assert [model.decode(one) for one in ids] == theirs["decoded"]
        assert model.chat_template is not None
        assert model.chat_template.render(messages) == theirs["chat"]
        assert theirs["eos"] in model.eos_token_ids
