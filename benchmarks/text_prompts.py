"""Prompts of real English, as token ids: what Python's standard library says about itself.

Text that a model has an opinion about, on every machine without a download; random words have none.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from slipstream.errors import StartupError

MODULES = (
    "decimal",
    "statistics",
    "collections",
    "datetime",
    "random",
    "itertools",
    "subprocess",
    "threading",
    "asyncio",
    "logging",
    "difflib",
    "fractions",
    "zipfile",
    "socket",
    "tempfile",
    "shutil",
    "configparser",
    "pathlib",
    "os",
    "email.message",
)


def text_prompts(model_folder: Path, lengths: Sequence[int]) -> list[list[int]]:
    """One prompt of each length, in tokens, each about another module.

    Raises:
        StartupError: there are more lengths than modules, or a module says less than that.
    """
    if len(lengths) > len(MODULES):
        raise StartupError(f"{len(lengths)} prompts of text, there are modules for {len(MODULES)}")
    tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    prompts = []
    for module, length in zip(MODULES, lengths, strict=False):
        ids: list[int] = tokenizer.encode(documentation(module), add_special_tokens=False).ids
        if len(ids) < length:
            raise StartupError(f"the documentation of Python's {module} has {len(ids)} tokens, not {length}")
        prompts.append(ids[:length])
    return prompts


def documentation(module: str) -> str:
    """The docstrings of a module, of the public classes and functions in it, and of their public methods."""
    found = importlib.import_module(module)
    members = [value for name, value in sorted(vars(found).items()) if not name.startswith("_")]
    documented: list[object] = [found]
    for member in (member for member in members if inspect.isclass(member) or inspect.isroutine(member)):
        documented.append(member)
        if inspect.isclass(member):
            documented += [value for name, value in sorted(vars(member).items()) if not name.startswith("_")]
    docs = (getattr(each, "__doc__", None) for each in documented)
    return "\n\n".join(inspect.cleandoc(doc) for doc in docs if isinstance(doc, str))
