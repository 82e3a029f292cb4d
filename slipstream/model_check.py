"""Looks at a model's files before an engine loads them, so that what is broken is said in one sentence.

An engine notices most of it too, after half a minute of imports and in the words of a library, in the middle of a
traceback of another process. Read here are the beginnings of the files alone: a wrong number among the weights is found
by nobody but `slipstream prefetch --verify`, which compares digests.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, Final

from slipstream.errors import StartupError

INDEX: Final = "model.safetensors.index.json"
_LENGTH_BYTES: Final = 8
# safetensors' own limit of a header.
_MOST_HEADER_BYTES: Final = 100_000_000


def check_model_files(folder: Path) -> None:
    """Configuration and weights, as far as that is quickly done.

    Raises:
        StartupError: a file is missing, cut short, or not what it should be; the message names it.
    """
    _json_object(folder / "config.json")
    for name in ("generation_config.json", "tokenizer.json"):
        if (folder / name).exists():
            _json_object(folder / name)
    files = sorted(folder.glob("*.safetensors"))
    if (folder / INDEX).exists():
        shards = _json_object(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise _broken(folder / INDEX, "has no `weight_map` of names")
        if missing := sorted(set(shards.values()) - {path.name for path in files}):
            raise _broken(folder / INDEX, f"names {missing[0]}, which is not there ({len(missing)} such files)")
    for path in files:
        check_safetensors(path)


def check_safetensors(path: Path) -> None:
    """The header of a file of weights, and that all it names is there.

    Raises:
        StartupError: see `check_model_files`.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(_LENGTH_BYTES)
            if len(start) < _LENGTH_BYTES:
                raise _broken(path, f"has {size} bytes, not even a header")
            (length,) = struct.unpack("<Q", start)
            if length > min(_MOST_HEADER_BYTES, size - _LENGTH_BYTES):
                raise _broken(path, f"has {size} bytes, its header alone should have {length}")
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        wanted = _LENGTH_BYTES + length + max(ends, default=0)
    except OSError as error:
        raise _broken(path, f"cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise _broken(path, "has a header that is no header of safetensors") from error
    if wanted != size:
        how = "was cut short" if size < wanted else "has something behind its end"
        raise _broken(path, f"has {size} bytes, its header describes {wanted}: it {how}")


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise _broken(path, f"cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise _broken(path, "is not a JSON object")
    return found


def _broken(path: Path, what: str) -> StartupError:
    return StartupError(f"{path} {what}; fetch the model again")
