"""Nothing that any of our processes reads can carry code: no pickle and nothing like it, in any package.

What comes over a wire, out of shared memory or from a file is read as JSON, msgpack of known structs, protobuf, YAML of
plain values or safetensors. What vLLM does on its own wires is looked at by `tests/e2e/test_worker_sockets.py`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

ROOT = Path(__file__).parents[2]
PACKAGES = (
    *("slipstream", "kv_transfer", "engine", "prefill_worker", "decode_worker", "frontend", "planner", "deploy"),
    *("simulator", "benchmarks"),
)
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle", "code"}
CALLS = {"eval", "exec", "compile", "execfile"}
METHODS = {
    ("torch", "load"),
    ("yaml", "load"),
    ("yaml", "load_all"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
    ("numpy", "load"),
    ("np", "load"),
}
ZMQ_METHODS = {"recv_pyobj", "send_pyobj"}
"""pyzmq's own pickles."""


def offences(source: str) -> Iterator[str]:
    """What in this source could run what it reads."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (f"import {one.name}" for one in names if one.name.partition(".")[0] in MODULES)
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in MODULES:
                yield f"from {module} import"
            case ast.Call(func=ast.Name(id=name)) if name in CALLS:
                yield f"{name}()"
            case ast.Call(func=ast.Name(id="__import__")):
                yield "__import__()"
            case ast.Attribute(value=ast.Name(id=module), attr=name) if (module, name) in METHODS:
                yield f"{module}.{name}"
            case ast.Attribute(attr=name) if name in ZMQ_METHODS:
                yield name
            case ast.keyword(arg="allow_pickle" | "trust_remote_code", value=ast.Constant(value=True)):
                yield "allow_pickle or trust_remote_code = True"
            case _:
                pass


@pytest.mark.parametrize("package", PACKAGES)
def test_no_package_reads_what_could_be_code(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    found = {str(path.relative_to(ROOT)): list(offences(path.read_text())) for path in files}
    assert {path: what for path, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "import os, marshal",
        "torch.load(path)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "socket.recv_pyobj()",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_what_is_looked_for_is_found(source: str) -> None:
    assert list(offences(source))


def test_vllms_own_wires_refuse_what_msgpack_cannot_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "0")  # as `engine.environment` sets it
    with pytest.raises(TypeError, match="not serializable"):
        MsgpackEncoder().encode(object())
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    pickled = MsgpackEncoder().encode({1, complex(1, 2)})
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "0")
    with pytest.raises((NotImplementedError, TypeError)):
        MsgpackDecoder().decode(pickled)
