"""Where a model's files are: turns what the user wrote after `--model` into a folder on this machine.

Three kinds of name: the packaged default model (converted once into the user's cache folder by
`engine.default_model`), a folder, and a Hugging Face id. No torch here: the frontend asks too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from slipstream.errors import StartupError
from slipstream.settings import DEFAULT_MODEL

# Part of the folder's name, so that a better conversion never meets the files of an older one.
DEFAULT_MODEL_VERSION: Final = "1"

_REQUIRED: Final = ("config.json", "tokenizer.json")
# Configuration, tokenizer and chat template, and what an engine reads weights from.
DESCRIPTION_PATTERNS: Final = ("*.json", "*.jinja", "*.txt", "*.model")
WEIGHT_PATTERNS: Final = ("*.safetensors",)
_HUB_ID: Final = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model's files on this machine.

    Attributes:
        path: absolute; holds config.json and tokenizer.json at least.
        served_name: the name clients use unless the configuration gives another.
    """

    path: Path
    served_name: str


def resolve(model: str, *, weights: bool = True, environ: Mapping[str, str] | None = None) -> ModelFolder:
    """The folder of `model`, which is downloaded first when it is a hub id that is not here yet.

    Args:
        model: the default model's name, a folder, or a Hugging Face id.
        weights: False leaves a hub model's weights where they are, for those who need its tokenizer only.
        environ: where HOME and XDG_CACHE_HOME are looked up; this process's environment when None.

    Raises:
        StartupError: there is no such model, or it is incomplete; the message says what to do.
    """
    environ = os.environ if environ is None else environ
    if model == DEFAULT_MODEL:
        return _default_model(environ)
    if not model.strip():
        raise StartupError(f"the model's name is empty: leave --model out to use {DEFAULT_MODEL}")
    folder = Path(model).expanduser()
    if folder.is_dir() or _looks_like_path(model):
        return _local(folder)
    return _from_hub(model, weights=weights)


def is_hub_id(model: str) -> bool:
    """Whether a model's name is looked for on the Hugging Face hub."""
    named = model.strip() and model != DEFAULT_MODEL
    return bool(named) and not Path(model).expanduser().is_dir() and not _looks_like_path(model)


def models_cache(environ: Mapping[str, str]) -> Path:
    """The folder that converted models are kept in, below the user's cache folder; it may not exist yet.

    Raises:
        StartupError: neither XDG_CACHE_HOME nor HOME is set to an absolute path.
    """
    # The XDG specification has a relative path ignored.
    for base in (environ.get("XDG_CACHE_HOME", ""), f"{home}/.cache" if (home := environ.get("HOME", "")) else ""):
        if os.path.isabs(base):
            return Path(base) / "slipstream" / "models"
    raise StartupError("no cache folder: set HOME or XDG_CACHE_HOME to an absolute path")


def default_model_folder(environ: Mapping[str, str]) -> Path:
    """Where the default model is kept once it is converted. It is whole whenever it exists.

    Raises:
        StartupError: as for `models_cache`.
    """
    return models_cache(environ) / f"{DEFAULT_MODEL}-{DEFAULT_MODEL_VERSION}"


def missing_files(folder: Path) -> list[str]:
    """Names of the files that a model cannot be served without and `folder` lacks."""
    return [name for name in _REQUIRED if not (folder / name).is_file()]


def _default_model(environ: Mapping[str, str]) -> ModelFolder:
    folder = default_model_folder(environ)
    if not folder.is_dir():
        raise StartupError(
            f"the default model {DEFAULT_MODEL} is not in {folder}: run `make model` "
            "(or `python -m engine.default_model` where the workers are installed), or name another with --model"
        )
    if missing := missing_files(folder):
        raise StartupError(
            f"{folder} has lost {' and '.join(missing)}: remove the folder and run `make model` to convert it again"
        )
    return ModelFolder(folder, DEFAULT_MODEL)


def _looks_like_path(model: str) -> bool:
    return model.startswith(("/", "./", "../", "~")) or model in {".", ".."} or not _HUB_ID.fullmatch(model)


def _local(folder: Path) -> ModelFolder:
    if not folder.is_dir():
        raise StartupError(
            f"model {str(folder)!r} is not a folder: give a folder that holds {' and '.join(_REQUIRED)}, "
            f"a Hugging Face id like org/name, or {DEFAULT_MODEL}"
        )
    folder = folder.resolve()
    if missing := missing_files(folder):
        raise StartupError(
            f"model folder {folder} lacks {' and '.join(missing)}: give a folder in Hugging Face layout "
            "(as `save_pretrained` writes it, with a fast tokenizer)"
        )
    return ModelFolder(folder, folder.name)


def _from_hub(model: str, *, weights: bool) -> ModelFolder:
    patterns = [*DESCRIPTION_PATTERNS, *(WEIGHT_PATTERNS if weights else ())]
    folder = _cached_snapshot(model, patterns, weights=weights) or _download(model, patterns)
    # Out of reach of the hub, its client returns a snapshot that is not whole as if it were.
    if missing := _missing_from_snapshot(folder, weights=weights):
        raise StartupError(
            f"model {model!r} in {folder} has no {' and '.join(missing)}: if its page on the hub has, "
            "download it again where there is a network; if not, Slipstream cannot serve it"
        )
    return ModelFolder(folder, model)


def _cached_snapshot(model: str, patterns: list[str], *, weights: bool) -> Path | None:
    """The snapshot that is here already, so that a start needs no network; None when it is not whole."""
    try:
        folder = Path(snapshot_download(model, allow_patterns=patterns, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return None if _missing_from_snapshot(folder, weights=weights) else folder


def _missing_from_snapshot(folder: Path, *, weights: bool) -> list[str]:
    has_weights = not weights or any(any(folder.glob(pattern)) for pattern in WEIGHT_PATTERNS)
    return [*missing_files(folder), *([] if has_weights else ["*.safetensors"])]


def _download(model: str, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except HFValidationError as error:
        raise StartupError(f"model {model!r} is neither a folder here nor a valid Hugging Face id: {error}") from error
    except GatedRepoError as error:
        raise StartupError(
            f"model {model!r} asks for its terms to be accepted: accept them on its page, then set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise StartupError(
            f"model {model!r} is neither a folder here nor a model on the hub "
            "(a private one needs HF_TOKEN): check the name"
        ) from error
    # The base of whatever the hub's client raises, which depends on where a missing network is noticed.
    except OSError as error:
        raise StartupError(
            f"model {model!r} is not a folder here, not in the Hugging Face cache, and could not be downloaded "
            f"({type(error).__name__}): download it where there is a network and give its folder, "
            f"or leave --model out to use {DEFAULT_MODEL}"
        ) from error
